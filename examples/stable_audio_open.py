"""Edit real tracks with Stable Audio Open 1.0 in place of the shipped model, by sample.py's flags.

    pip install diffusers transformers accelerate       # for this example only
    python examples/stable_audio_open.py --task infill --input song.wav --start 60 --end 64
    python examples/stable_audio_open.py --task continuation --input song.wav --prompt "warm pads"

1.06 billion parameters, 44.1 kHz stereo, 47.6 s at once (Evans et al., 2024), trained with the
diffusion of diffusion.py: its transformer is model(x_t, t) -> v as it stands. The scheduler's time
atan(sigma) 2 / pi is our t, and the input that it scales is our x_t. So every task runs, with the
step sizes of our own latent model, which nobody has tuned for this one. For another sound than the
track's, give --no-equalise. A step takes 4.6 TFLOP (with a prompt 9.4) and 8 GiB.

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
from sample import SAMPLE_RATE, Checkpoint, Settings, UserError, run, seconds, within
from vae import chunks

PAGE = "https://huggingface.co/stabilityai/stable-audio-open-1.0"
PIPELINE = "stabilityai/stable-audio-open-1.0"
LICENCE = ("Stable Audio Open 1.0: Stability AI Community License, free for research, and for "
           "business under 1 M USD a year; it asks for attribution")
SCALE = 7.0
# Latent frames that the autoencoder works on at a time: 3.5 GiB with gradients; all 1024 take 40.
CHUNK = 64


def add_flags(add):
    """sample.py's own settings, and those of this model."""
    Settings.add_flags(add)
    add("--pretrained", default=PIPELINE,
        help="folder or hub id of the pipeline (default: %(default)s)")
    add("--prompt", help="what to play (default: the model is unconditional)")
    add("--scale", type=within(0, 100),
        help=f"classifier-free guidance towards --prompt, at twice the work (default: {SCALE})")
    add("--timing", type=seconds, nargs=2, metavar=("START", "TOTAL"),
        help="tell the model that its window lies there in a track so long "
             "(default: that it is all of the track)")
    add("--recompute", action="store_true", help="less memory, 1.4 times the work")


# ---- the model -----------------------------------------------------------------------------------

class Net(nn.Module):
    """model(x_t, t) -> v; x_t (B, C, n), with n at most config.frames; t (B,).

    dit, timer  the pipeline's transformer, and its projection model, which makes tokens of seconds
    silence     (1, C, 1), a latent frame of it
    text        (1, m, width), an encoded prompt; None: unconditional
    timing      start and total in seconds; None: the window is a whole track, with silence behind
                it as in training
    """

    def __init__(self, dit, timer, silence, text=None, scale=SCALE, timing=None):
        super().__init__()
        self.dit = dit
        self.timer = timer
        self.silence = silence
        self.text = text
        self.scale = scale
        self.timing = timing
        config = dit.config
        self.config = SimpleNamespace(frames=config.sample_size, channels=config.in_channels)
        # The noise behind a short window is the same in each step, and for each seed.
        noise = torch.randn(1, self.config.channels, self.config.frames,
                            generator=torch.Generator().manual_seed(0))
        self.noise = noise.to(silence)
        # In bf16 the phases of the time features would be off by 0.07 rad.
        exact = torch.autocast(silence.device.type, enabled=False)
        dit.time_proj.forward = exact(dit.time_proj.forward)

    def forward(self, x_t, t):
        B, C, n = x_t.shape
        if self.timing is None:
            x_t = self.with_silence(x_t, t)                             # (B, C, frames)

        # What the model is told: seconds, and the prompt. Its null prompt is zeros; without biases,
        # one zero token does for all. Padding of a prompt stays, and is not masked, as in training.
        start, total = self.time_tokens(x_t, n)                         # (1, 1, width) each
        tokens = torch.zeros_like(start)
        if self.text is not None:
            tokens = torch.cat([self.text, start, total], dim=1)
            tokens = torch.cat([torch.zeros_like(tokens), tokens])      # (2, m + 2, width)
        times = torch.cat([start, total], dim=2)                        # (1, 1, 2 width)

        # With a prompt each clip runs twice, without it and with it.
        copies = len(tokens)
        v = self.dit(
            x_t.repeat(copies, 1, 1), t.repeat(copies), tokens.repeat_interleave(B, dim=0),
            times.expand(copies * B, -1, -1), self.positions(1 + x_t.shape[-1], x_t),
            return_dict=False)[0]
        v = v[..., :n].float()
        if copies == 1:
            return v
        without, prompted = v[:B], v[B:]
        return without + self.scale * (prompted - without)

    def with_silence(self, x_t, t):
        """x_t (B, C, n), going on with silence at the noise level of t: (B, C, frames)."""
        noise = self.noise[..., x_t.shape[-1]:].expand(len(x_t), -1, -1)
        silence, _ = add_noise(self.silence.expand_as(noise), noise, t)
        return torch.cat([x_t, silence], dim=-1)

    def time_tokens(self, like, n):
        """The tokens (1, 1, width) of the start and of the total; by default those of n frames."""
        start, total = self.timing or (0.0, n * Autoencoder.hop / SAMPLE_RATE)
        with torch.autocast(like.device.type, enabled=False):
            times = self.timer(start_seconds=like.new_tensor([start]),
                               end_seconds=like.new_tensor([total]))
        return times.seconds_start_hidden_states, times.seconds_end_hidden_states

    def positions(self, n, like):
        """Rotary positions (n, half a head), cosines and sines.

        Without them the transformer runs, but has none.
        """
        width = self.dit.config.attention_head_dim // 2
        frequencies = 10000 ** (-torch.arange(0, width, 2) / width)
        angles = torch.outer(torch.arange(n), frequencies).repeat(1, 2).to(like)
        return angles.cos(), angles.sin()


class Autoencoder(nn.Module):
    """What sampling needs of a vae.VAE. The latents have about unit variance, without a factor."""
    hop = 2048                                      # samples per latent frame
    encoder_field = 14885                           # samples on each side
    decoder_field = 10                              # frames on each side; for strides 2, 4, 4, 8, 8

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    @torch.no_grad()
    def encode(self, audio):
        """(B, 2, samples) -> posterior mean (B, C, ceil(samples / 2048))."""
        hop = self.hop
        audio = F.pad(audio, (0, -audio.shape[-1] % hop))
        reach = -(-self.encoder_field // hop)       # frames
        parts = []
        for lo, hi, keep in chunks(audio.shape[-1] // hop, reach, CHUNK):
            posterior = self.vae.encode(audio[..., lo * hop:hi * hop]).latent_dist
            parts.append(posterior.mode()[..., keep])
        return torch.cat(parts, dim=-1)

    def decode(self, x):
        """(B, C, frames) -> (B, 2, samples).

        For a gradient, each chunk is computed again on the way back.
        """
        graph = torch.is_grad_enabled() and x.requires_grad
        parts = []
        for lo, hi, keep in chunks(x.shape[-1], self.decoder_field, CHUNK):
            if graph:
                decoded = recompute(self.vae.decode, x[..., lo:hi], use_reentrant=False)
            else:
                decoded = self.vae.decode(x[..., lo:hi])
            parts.append(decoded.sample[..., keep.start * self.hop:keep.stop * self.hop])
        return torch.cat(parts, dim=-1)


# ---- the door to sample.py -----------------------------------------------------------------------

def load_pipeline(name, with_text):
    """A StableAudioPipeline in float32, without its scheduler; UserError if there is none."""
    unused = {"scheduler": None}
    if not with_text:
        unused |= {"text_encoder": None, "tokenizer": None}
    try:
        from diffusers import StableAudioPipeline   # here, so that the flags can be read without it
        pipe = StableAudioPipeline.from_pretrained(name, **unused).to(torch.float32)
    except ImportError:
        raise UserError("this example needs more packages: "
                        "pip install diffusers transformers accelerate") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"--pretrained {name} does not load ({type(error).__name__}): accept the licence at "
            f"{PAGE} and run hf auth login, online, or give a folder with these weights") from None
    if pipe.vae.hop_length != Autoencoder.hop:
        raise UserError(f"--pretrained {name} has another autoencoder than Stable Audio Open 1.0: "
                        "give its folder or hub id")
    return pipe


def open_pretrained(o, device):
    """The Checkpoint that --pretrained names; its text encoder is loaded for a prompt only."""
    if o.checkpoint or o.weak or o.away is not None or o.model != "latent":
        raise UserError("--checkpoint, --weak, --away and --model do nothing here: "
                        "leave them out")
    if o.scale is not None and o.prompt is None:
        raise UserError("--scale does nothing without --prompt: leave it out")
    pipe = load_pipeline(o.pretrained, with_text=o.prompt is not None)
    print(LICENCE)

    # The prompt is encoded once, on the CPU, where the text encoder stays.
    text = None
    if o.prompt is not None:
        text = pipe.encode_prompt(o.prompt, "cpu", False).detach().to(device)

    # The other parts are frozen, on the device.
    dit = pipe.transformer.to(device).eval().requires_grad_(False)
    timer = pipe.projection_model.to(device).eval().requires_grad_(False)
    vae = Autoencoder(pipe.vae).to(device).eval().requires_grad_(False)
    if o.recompute:
        dit.enable_gradient_checkpointing()

    # A frame of silence, far from both ends of a stretch of it.
    silence = vae.encode(torch.zeros(1, 2, 32 * vae.hop, device=device))[..., 16:17]
    scale = SCALE if o.scale is None else o.scale
    net = Net(dit, timer, silence, text, scale, o.timing)
    # The file of the transformer; the first, if it has parts.
    path = min(Path(dit.config._name_or_path).glob("diffusion_pytorch_model*"))
    return Checkpoint("latent", net, vae, step=None, path=str(path))


def main(argv=None):
    sample.main(argv, add_flags, open_pretrained)


if __name__ == "__main__":
    run(main, "take --recompute, --precision bf16, a shorter --length or --context, "
              "or --device cpu")
