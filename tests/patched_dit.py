"""Train the paper's DiT instead of the small latent model, to compare the two.

    python tests/patched_dit.py 4 --model latent --data path/to/music --out runs/patch4
    python train.py --model latent --data path/to/music --out runs/spectral

The first argument is the number of latent frames in a token (the paper: 1, so 2048 tokens in a
window); the rest is for train.py. Width, depth and heads are those of the small SpectralDiT.
Compare the validations in the two log.csv. No other command opens the model.pt of a patched DiT.
"""
import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dit
import sample
import train


class PatchedDiT(dit.DiT):
    """A DiT whose tokens are `patch` successive frames."""

    def __init__(self, config, patch):
        super().__init__(replace(config, channels=patch * config.channels,
                                 frames=-(-config.frames // patch)))
        self.config = config
        self.patch = patch

    def forward(self, x_t, t, start=None):
        """As DiT.forward: x_t (B, C, n) -> v (B, C, n). A start is rounded down to a patch."""
        n = x_t.shape[-1]
        tokens = F.pad(x_t, (0, -n % self.patch)).unflatten(-1, (-1, self.patch))
        tokens = tokens.transpose(2, 3).flatten(1, 2)                       # (B, C patch, tokens)
        if start is not None:
            start = start // self.patch
        v = super().forward(tokens, t, start)
        v = v.unflatten(1, (-1, self.patch)).transpose(2, 3).flatten(2)     # (B, C, n or more)
        return v[..., :n]


def build(patch, config):
    """The patched DiT; but a SpectralDiT, of a file that is opened for its VAE, is one."""
    if config.hops:
        return dit.SpectralDiT(config)
    return PatchedDiT(config, patch)


def main(argv=None):
    parser = sample.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("patch", type=sample.within(1, 64, int), help="latent frames in a token")
    parser.add_argument("train", nargs=argparse.REMAINDER, help="arguments of train.py")
    options = parser.parse_args(argv)
    if "latent" not in options.train:
        raise sample.UserError("tokens are of latent frames: give --model latent")
    _, config_class, presets = sample.NETS["latent"]
    without_spectra = {size: replace(preset, hops=()) for size, preset in presets.items()}
    sample.NETS["latent"] = partial(build, options.patch), config_class, without_spectra
    train.main(options.train)


if __name__ == "__main__":
    sample.run(main)
