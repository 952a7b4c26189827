"""An infill from Python: the algorithm itself, without the command line.

    python examples/from_python.py examples/clip.wav infill.wav

sample.py also takes care of other rates, of edits longer than a window, and of levels; it starts
from the repeated context, and moves away from a weak model.
"""
import sys
from pathlib import Path

import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import guidance
import sample
import tasks


def infill(source, target, steps=50, seed=0):
    """New audio for the middle 1.9 s of the first 5.9 s of a track."""
    # A model, and audio (1, 2, 262144) at 44.1 kHz that fills its window.
    checkpoint = sample.open_checkpoint("latent")
    audio = sample.to_stereo_44k(*sample.read_audio(source))[None]
    n = checkpoint.window * checkpoint.hop
    if audio.shape[-1] < n:
        raise sample.UserError(f"{source} is shorter than 5.95 s: take a longer track")
    audio = audio[..., :n]

    # The contexts in the model's space, (1, C, 2048): its first and its last 700 frames.
    C_L, C_R = 700, 700
    x_bar = sample.encode_context(checkpoint, audio, C_L, C_R)

    # Table 2's row, and Algorithm 1.
    generator = torch.Generator().manual_seed(seed)
    z = guidance.draw_noise(x_bar, generator)
    task = tasks.infill(x_bar, C_L, C_R, z)
    x_0 = guidance.sample(checkpoint.net, task.x_T, task, steps=steps, sampler="ddpm", xi=0.03,
                          generator=generator)

    # Audio again, with the spectrum of its context.
    a, b = C_L * checkpoint.hop, audio.shape[-1] - C_R * checkpoint.hop     # samples
    new = sample.like_original(checkpoint.decode(x_0), audio, a, b)
    soundfile.write(target, new[0].T.numpy(), sample.SAMPLE_RATE)


def main():
    if len(sys.argv) != 3:
        raise sample.UserError("give two files: a track, and the wav file to write")
    infill(*sys.argv[1:])


if __name__ == "__main__":
    sample.run(main)
