"""Edit real tracks with Stable Audio Open 1.0 in place of the shipped model: sample.py with its
flags, and those below.

    pip install diffusers transformers accelerate       # for this example only, beside
    requirements.txt python examples/stable_audio_open.py --task infill --input song.wav --start 60
    --end 64 [--prompt "warm pads"]
 1.06 billion parameters, 44.1 kHz stereo, 47.6 s at once (Evans et al., 2024), trained with the
diffusion of diffusion.py: its transformer is model(x_t, t) -> v as it stands. The scheduler's time
atan(sigma) 2 / pi is our t, and the input that it scales is our x_t. So every task runs, with the
step sizes of our own latent model, which nobody has tuned or heard. Another sound than the track's
wants --no-equalise. 4.6 TFLOP (with a prompt 9.4) and 8 GiB a step.
 The weights are your own download, from the page below: accept their licence there and run `hf auth
login`. It is the Stability AI Community License: free for research, and for business under 1 M USD
a year; it asks for attribution.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sample
from diffusion import add_noise
from sample import SAMPLE_RATE, Checkpoint, UserError, run, within
from vae import chunks

PAGE = "https://huggingface.co/stabilityai/stable-audio-open-1.0"
SCALE = 7.0
# latent frames that the autoencoder works on at a time: 3.5 GiB with gradients; all 1024 take 40
CHUNK = 64


def add_flags(add):
    sample.Settings.add_flags(add)
    add("--pretrained", default=PAGE.split("/", 3)[3], help="folder or hub id of the pipeline (%(default)s)")
    add("--prompt", help="what to play; without it the model is unconditional")
    add("--scale", type=within(0, 100), help=f"classifier-free guidance towards --prompt, at twice the work ({SCALE})")
    add("--timing", type=sample.seconds, nargs=2, metavar=("START", "TOTAL"),
        help="tell the model that its window lies there in a track so long (that it is all of the track)")
    add("--recompute", action="store_true", help="less memory, 1.4 times the work")


class Net(nn.Module):
    """model(x_t, t) -> v; x_t (B, C, n), with n at most config.frames; t (B,).

    dit, timer  the pipeline's transformer, and its projection model, which makes tokens of seconds
    silence     (1, C, 1), a latent frame of it
    text        (1, m, width), an encoded prompt; None: unconditional
    timing      start and total in seconds; None: the window is a whole track, with silence behind it as in training
    """

    def __init__(self, dit, timer, silence, text=None, scale=SCALE, timing=None):
        super().__init__()
        self.dit, self.timer, self.silence = dit, timer, silence
        self.text, self.scale, self.timing = text, scale, timing
        self.config = SimpleNamespace(frames=dit.config.sample_size, channels=dit.config.in_channels)
        always = torch.Generator().manual_seed(0)
        self.noise = torch.randn(1, self.config.channels, self.config.frames, generator=always).to(silence)
        # bf16 would put its phases off by 0.07 rad
        exact = torch.autocast(silence.device.type, enabled=False)
        dit.time_proj.forward = exact(dit.time_proj.forward)

    def forward(self, x_t, t):
        B, C, n = x_t.shape
        timing = self.timing or (0.0, n * Autoencoder.hop / SAMPLE_RATE)
        if self.timing is None:
            noise = self.noise[..., n:].expand(B, -1, -1)
            # (B, C, frames)
            x_t = torch.cat([x_t, add_noise(self.silence.expand_as(noise), noise, t)[0]], dim=-1)
        with torch.autocast(x_t.device.type, enabled=False):
            start, total = (x_t.new_tensor([seconds]) for seconds in timing)
            times = self.timer(start_seconds=start, end_seconds=total)
        # (1, 1, width)
        start, total = times.seconds_start_hidden_states, times.seconds_end_hidden_states
        # its null prompt is zeros; without biases, one does for all
        tokens = torch.zeros_like(start)
        if self.text is not None:    # padding stays, and is not masked, as in training
            tokens = torch.cat([self.text, start, total], dim=1)
            tokens = torch.cat([torch.zeros_like(tokens), tokens])    # (2, m + 2, width)
        copies = len(tokens)
        v = self.dit(x_t.repeat(copies, 1, 1), t.repeat(copies), tokens.repeat_interleave(B, dim=0),
                     torch.cat([start, total], dim=2).expand(copies * B, -1, -1),
                     self.positions(1 + x_t.shape[-1], x_t), return_dict=False)[0][..., :n].float()
        return v if copies == 1 else v[:B] + self.scale * (v[B:] - v[:B])

    def positions(self, n, like):
        """Rotary positions (n, half a head), cosines and sines; without them the transformer runs,
        but has none."""
        width = self.dit.config.attention_head_dim // 2
        angles = torch.outer(torch.arange(n), 10000 ** (-torch.arange(0, width, 2) / width)).repeat(1, 2).to(like)
        return angles.cos(), angles.sin()


class Autoencoder(nn.Module):
    """What sampling needs of a vae.VAE.

    The latents have about unit variance; there is no factor to scale them.
    """
    hop = 2048                                          # samples per latent frame
    # samples; frames on each side; for strides 2, 4, 4, 8, 8
    encoder_field, decoder_field = 14885, 10

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    @torch.no_grad()
    def encode(self, audio):
        """(B, 2, samples) -> posterior mean (B, C, ceil(samples / 2048))."""
        audio, reach = F.pad(audio, (0, -audio.shape[-1] % self.hop)), -(-self.encoder_field // self.hop)
        return torch.cat([self.vae.encode(audio[..., lo * self.hop:hi * self.hop]).latent_dist.mode()[..., keep]
                          for lo, hi, keep in chunks(audio.shape[-1] // self.hop, reach, CHUNK)], dim=-1)

    def decode(self, x):
        """(B, C, frames) -> (B, 2, samples).

        For a gradient, each chunk is computed again on the way back.
        """
        graph, parts = torch.is_grad_enabled() and x.requires_grad, []
        for lo, hi, keep in chunks(x.shape[-1], self.decoder_field, CHUNK):
            part = x[..., lo:hi]
            audio = (recompute(self.vae.decode, part, use_reentrant=False) if graph else self.vae.decode(part)).sample
            parts.append(audio[..., keep.start * self.hop:keep.stop * self.hop])
        return torch.cat(parts, dim=-1)


def open_pretrained(o, device):
    """The Checkpoint that --pretrained names.

    Its scheduler is not loaded, and its text encoder only for a prompt.
    """
    if o.checkpoint or o.model != "latent" or o.scale is not None and o.prompt is None:
        raise UserError("--checkpoint, --model, and --scale without --prompt, do nothing here: leave them out")
    unused = {"scheduler": None} | ({"text_encoder": None, "tokenizer": None} if o.prompt is None else {})
    try:
        from diffusers import StableAudioPipeline   # here, so that the flags can be read without it
        pipe = StableAudioPipeline.from_pretrained(o.pretrained, **unused).to(torch.float32)
    except ImportError:
        raise UserError("this example needs more packages: pip install diffusers transformers accelerate") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--pretrained {o.pretrained} does not load ({type(error).__name__}): accept the licence at "
                        f"{PAGE} and run hf auth login, online, or give a folder with these weights") from None
    if pipe.vae.hop_length != Autoencoder.hop:
        raise UserError(f"--pretrained {o.pretrained} has another autoencoder than Stable Audio Open 1.0")
    print("Stable Audio Open 1.0: Stability AI Community License, free for research, and for business under 1 M USD a "
          "year; it asks for attribution")
    # T5 stays
    text = None if o.prompt is None else pipe.encode_prompt(o.prompt, "cpu", False).detach().to(device)
    dit, vae, timer = (part.to(device).eval().requires_grad_(False)
                       for part in (pipe.transformer, Autoencoder(pipe.vae), pipe.projection_model))
    if o.recompute:
        dit.enable_gradient_checkpointing()
    # far from both ends
    silence = vae.encode(torch.zeros(1, 2, 32 * vae.hop, device=device))[..., 16:17]
    net = Net(dit, timer, silence, text, SCALE if o.scale is None else o.scale, o.timing)
    # the first, if it has parts
    path = min(Path(dit.config._name_or_path).glob("diffusion_pytorch_model*"))
    return Checkpoint("latent", net, vae, step=None, path=str(path))


def main(argv=None):
    sample.main(argv, add_flags, open_pretrained)


if __name__ == "__main__":
    run(main, "take --recompute, --precision bf16, a shorter --length or --context, or --device cpu")
