"""Edit real tracks with CQTDiff [21], the baseline of Table 1, in place of the shipped model:
sample.py with its flags, and those below. Or make its row of Table 1: evaluate.py with its flags.

    python examples/cqtdiff.py --task infill --input song.wav --start 60 --end 62 --window 5.944
    python examples/cqtdiff.py evaluate --data path/to/test --reference path/to/train --window 5.944

A U-Net of 15.46 million parameters on a constant-Q transform: 22.05 kHz mono, 2.97 s at once,
trained on piano music, MAESTRO (Moliner et al., 2023). Its preconditioning (Karras et al., 2022)
is the diffusion of diffusion.py in other symbols, see Net. So Algorithms 1 and 2 run on it,
instead of its own sampler, with the step sizes of our latent model, which nobody has tuned for it.
New audio is mono and ends at 9 kHz. A guided step on 2.97 s takes 38 seconds of a CPU core and
9.2 GiB, with --recompute 56 seconds and 4.3 GiB. Run with random weights only.

The weights are your own download, from URL below; see there for their licence. This code is ours.
"""
import math
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate
import sample
from diffusion import add_noise, alpha_sigma
from sample import SAMPLE_RATE, Checkpoint, UserError, run, within
from tasks import resample

URL = "https://github.com/eloimoliner/CQTdiff/releases/download/weights_and_examples/cqt_weights.pt"
NAME = "CQTDiff (trained on piano)"
RATE = 22050                            # Hz
WINDOW = 65536                          # samples, that of its training
SHORTEST = 4096                         # samples; enough for two frames at the lowest level
SIGMA_DATA = 0.057                      # root mean square of the music of its training
SIGMAS = 1e-6, 10.0                     # noise levels of its training
BANDS, OCTAVES = 448, 7                 # of the transform, up to RATE / 2
WIDTHS = 32, 64, 64, 128, 128, 128      # channels of the U-Net's levels
DETOUR = 20000                          # Hz, see Autoencoder.decode


def add_flags(add):
    sample.Settings.add_flags(add)
    add("--pretrained", default="cqt_weights.pt", help="the official file (%(default)s)")
    add("--window", type=within(0.2, 60), default=WINDOW / RATE, help="seconds at once (2.97)")
    add("--level", type=within(1e-6, 1e6), help=f"root mean square of your music ({SIGMA_DATA})")
    add("--recompute", action="store_true", help="half the gradient memory, 1.5 times the work")


# ---- the constant-Q transform --------------------------------------------------------------------

class ConstantQ(nn.Module):
    """Invertible constant-Q transform (Velasco et al., 2011): (B, n) <-> (B, 2, BANDS + 2, T).

    A band is a part of the spectrum under a Hann window, shifted to 0 Hz: T samples in time, real
    and imaginary part. The window reaches from one neighbour's centre to the other's. The centres
    lie on a geometric scale; one more band at 0 Hz and one at RATE / 2 complete it.
    """

    def __init__(self, n):
        super().__init__()
        # Centres and widths of the bands in FFT bins. The outermost centres are neighbours only.
        # The last band of the scale falls on RATE / 2, where there is a band already: it moves
        # half way back.
        low, top = RATE / 2 / 2**OCTAVES, RATE / 2
        hertz = low * 2 ** (OCTAVES * torch.arange(BANDS, dtype=torch.float64) / (BANDS - 1))
        hertz = torch.cat([hertz.new_tensor([-low, 0]), hertz, hertz.new_tensor([top, top])])
        centre = hertz * n / RATE
        width = (centre[2:] - centre[:-2]).round().clamp(min=4)[:, None]        # (BANDS + 2, 1)
        centre = centre[1:-1].clone()
        centre[-2] = (centre[-3] + centre[-1]) / 2

        # The bins of each band, its centre first, as the inverse FFT expects them. All bands have
        # the size of the widest one, so that they share one rate in time.
        T = int(width.max())
        offset = torch.fft.fftfreq(T, 1 / T, dtype=torch.float64)               # 0, 1, ..., -2, -1
        bins = (centre.round()[:, None] + offset).long() % n                    # (BANDS + 2, T)
        inside = (2 * offset >= -width) & (2 * offset < width)
        hann = 0.5 + 0.5 * torch.cos(2 * math.pi * offset / width)
        window = torch.where(inside, hann, 0.0)

        # Windowed again on the way back, a bin would return times the sum of all squared windows
        # there: the dual windows divide by that sum.
        power = torch.zeros(n, dtype=torch.float64)
        power.index_add_(0, bins.flatten(), window.flatten() ** 2)
        dual = window / power[bins].clamp(min=1e-30)

        self.n = n
        self.register_buffer("bins", bins)
        self.register_buffer("window", window.float())
        self.register_buffer("dual", dual.float())

    def forward(self, audio):
        spectrum = torch.fft.fft(audio.float())                                 # (B, n)
        bands = torch.fft.ifft(spectrum[:, self.bins] * self.window)            # (B, BANDS + 2, T)
        return torch.view_as_real(bands).permute(0, 3, 1, 2)

    def inverse(self, c):
        bands = torch.view_as_complex(c.float().permute(0, 2, 3, 1).contiguous())
        bands = torch.fft.fft(bands) * self.dual
        spectrum = bands.new_zeros(len(c), self.n)
        spectrum = spectrum.index_add(1, self.bins.flatten(), bands.flatten(1))
        return torch.fft.irfft(spectrum[:, :self.n // 2 + 1], self.n)


@lru_cache(maxsize=2)
def constant_q(n, device):
    return ConstantQ(n).to(device)


# ---- the U-Net; its names are those of the official state dict -----------------------------------

class Resample(nn.Module):
    """The last axis at up / down times its rate: sincs, 6 zero crossings, in a squared cosine."""

    def __init__(self, down, up):
        super().__init__()
        self.down, self.up = down, up
        band = 0.99 * min(1.0, up / down)               # pass band as a share of the input's
        self.reach = math.ceil(6 / band)                # input samples on each side
        taps = torch.arange(-self.reach, self.reach + down, dtype=torch.float64)
        phases = torch.arange(up)[:, None] * down / up
        d = (band * (taps - phases)).clamp(-6, 6)       # (up, taps)
        kernel = band * torch.sinc(d) * torch.cos(math.pi * d / 12) ** 2
        self.register_buffer("kernel", kernel[:, None].float())

    def forward(self, x):
        padded = F.pad(x.reshape(-1, 1, x.shape[-1]), (self.reach, self.reach + self.down))
        y = F.conv1d(padded, self.kernel, stride=self.down)                     # (rows, up, blocks)
        y = y.transpose(1, 2).reshape(*x.shape[:-1], -1)
        return y[..., :math.ceil(x.shape[-1] * self.up / self.down)]


def conv(C_in, C, kernel=1, dilation=1):
    return nn.Conv2d(C_in, C, kernel, dilation=dilation, bias=False,
                     padding="same", padding_mode="reflect")


def fourier(x, frequencies):
    phases = 2 * math.pi * x * frequencies
    return torch.cat([phases.sin(), phases.cos()], dim=1)


class LevelEmbedding(nn.Module):
    """log(sigma) / 4, (B, 1) -> (B, 512)."""

    def __init__(self):
        super().__init__()
        self.RFF_freq = nn.Parameter(16 * torch.randn(1, 32), requires_grad=False)
        self.MLP = nn.ModuleList([nn.Linear(64, 128), nn.Linear(128, 256), nn.Linear(256, 512)])

    def forward(self, level):
        level = fourier(level, self.RFF_freq)
        for layer in self.MLP:
            level = F.relu(layer(level))
        return level


class BandCodes(nn.Module):
    """c (B, 2, bands, T) -> (B, 2 + 64, bands, T): convolutions are told which band is which."""

    def __init__(self):
        super().__init__()
        self.RFF_freq = nn.Parameter(16 * torch.randn(1, 32), requires_grad=False)
        codes = fourier(torch.arange(BANDS + 2), self.RFF_freq[..., None])
        self.embeddings = nn.Parameter(codes, requires_grad=False)              # (1, 64, bands)

    def forward(self, c):
        codes = self.embeddings[..., None].expand(len(c), -1, -1, c.shape[-1])
        return torch.cat([c, codes], dim=1)


class Block(nn.Module):
    """x (B, C_in, bands, T), level (B, 512) -> (B, C, bands, T): layers dilated in frequency."""

    def __init__(self, C_in, C):
        super().__init__()
        self.film = nn.ModuleDict({"output_layer": nn.Linear(512, C_in)})
        self.res_conv = conv(C_in, C) if C_in != C else nn.Identity()
        self.first_conv = nn.Sequential(nn.GELU(), conv(C_in, C))
        self.H = nn.ModuleList()
        for i in range(8):
            self.H.append(nn.ModuleDict({"conv": conv(C, C, (5, 3), (2**i, 1))}))

    def forward(self, x, level):
        x = x * self.film.output_layer(level)[..., None, None]
        y = self.first_conv(x)
        for layer in self.H:
            y = (y + layer.conv(F.gelu(y))) / 2**0.5
        return (y + self.res_conv(x)) / 2**0.5


class UNet(nn.Module):
    """F of Karras et al.: audio (B, n), log(sigma) / 4 (B, 1) -> (B, n).

    A level has half the time frames of the one above, and all bands. Next to its features x it has
    coefficients c at the same rate: added to x on the way down, summed to the result on the way up.
    """

    def __init__(self):
        super().__init__()
        self.recompute = False
        self.embedding, self.freq_encoding = LevelEmbedding(), BandCodes()
        self.init_conv = conv(2 + 64, WIDTHS[0], (5, 3))

        # A level is a block, a resampler, and a convolution between features and coefficients. The
        # lowest level on the way down and the highest on the way up are a block only.
        self.downs, self.middle, self.ups = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        C_in = WIDTHS[0]
        for C in WIDTHS:
            self.downs.append(self.stage(Block(C_in, C), Resample(2, 1), conv(2, C)))
            C_in = C
        self.downs[-1] = self.downs[-1][:1]
        self.middle.append(nn.ModuleList([Block(C_in, C_in)]))
        for C_skip, C in zip(WIDTHS[::-1], (*WIDTHS[-2::-1], WIDTHS[0])):
            self.ups.append(self.stage(Block(2 * C_skip, C), Resample(1, 2), conv(C, 2)))
        self.ups[-1] = self.ups[-1][:1]

    @staticmethod
    def stage(block, resampler, between):
        resampler = nn.ModuleDict({"resample": resampler})
        return nn.ModuleList([block, resampler, nn.ModuleDict({"conv1x1": between})])

    def through(self, block, x, level):
        if self.recompute and x.requires_grad:
            return recompute(block, x, level, use_reentrant=False)
        return block(x, level)

    def forward(self, audio, level):
        level = self.embedding(level)
        transform = constant_q(audio.shape[-1], audio.device)
        c = transform(audio)
        x = self.init_conv(self.freq_encoding(c))                               # (B, C, bands, T)

        # Down: half the frames at each level, with the coefficients at that rate.
        skips = []
        for block, *rest in self.downs:
            x = self.through(block, x, level)
            skips.append(x)
            if rest:
                halve, between = rest
                x, c = halve.resample(x), halve.resample(c)
                x = (x + between.conv1x1(c)) / 2**0.5
        x = self.through(self.middle[0][0], x, level)

        # Up: twice the frames; if that is one too many, it is cut off. The lowest level begins the
        # sum. The highest has no convolution to coefficients: it uses that of the level below.
        c = None
        for block, *rest in self.ups:
            skip = skips.pop()
            x = torch.cat([x[..., :skip.shape[-1]], skip], dim=1)
            x = self.through(block, x, level)
            if rest:
                double, between = rest
            made = between.conv1x1(x)
            c = made if c is None else (c[..., :made.shape[-1]] + made) / 2**0.5
            if rest:
                x, c = double.resample(x), double.resample(c)
        return transform.inverse(c)


# ---- as a model of ours --------------------------------------------------------------------------

class Net(nn.Module):
    """model(x_t, t) -> v; x_t (B, 1, n), t (B,).

    Karras et al. estimate the audio in x = audio + sigma eps by c_skip x + c_out F(c_in x, level),
    level = log(sigma) / 4. Take x_0 = audio / sigma_data and tan(pi t / 2) = sigma / sigma_data.
    Then c_in x is our x_t, and their estimate over sigma_data, alpha_t x_t + sigma_t F, is our
    x0_hat. So v = -F, exactly.
    """

    def __init__(self, unet, frames=WINDOW):
        super().__init__()
        self.unet, self.config = unet, SimpleNamespace(frames=frames, channels=1)

    def forward(self, x_t, t):
        # A clip that is too short is followed by silence as noisy as x_t, with the same noise in
        # each call.
        n, generator = x_t.shape[-1], torch.Generator().manual_seed(0)
        noise = torch.randn(1, 1, max(SHORTEST - n, 0), generator=generator).to(x_t)
        noise = noise.expand(len(x_t), -1, -1)
        silence, _ = add_noise(torch.zeros_like(noise), noise, t)
        x_t = torch.cat([x_t, silence], dim=-1)

        # At t = 1 sigma is infinite: it is limited to what F was trained on.
        alpha_t, sigma_t = alpha_sigma(t)
        sigma = (SIGMA_DATA * sigma_t / alpha_t).clamp(*SIGMAS)
        level = (sigma.log() / 4).to(x_t)[:, None]                              # (B, 1)
        return -self.unet(x_t[:, 0], level)[:, None, :n]


class Autoencoder(nn.Module):
    """What sampling needs of a vae.VAE: both channels' mean at 22.05 kHz, divided by `level`."""
    hop = SAMPLE_RATE // RATE           # samples at 44.1 kHz for one of ours
    encoder_field = 102                 # samples at 44.1 kHz that the resampler reads on each side

    def __init__(self, level):
        super().__init__()
        self.level = level

    def encode(self, audio):
        """(B, 2, n) -> (B, 1, ceil(n / 2))."""
        return resample(audio.mean(1, keepdim=True), SAMPLE_RATE, RATE) / self.level

    def decode(self, x):
        """(B, 1, n) -> (B, 2, 2 n). The inverse transform blows up errors near 11 kHz; going by
        way of a rate of 20 kHz removes them."""
        audio = resample(x * self.level, RATE, DETOUR)
        audio = resample(audio, DETOUR, SAMPLE_RATE)
        return audio[..., :self.hop * x.shape[-1]].expand(-1, 2, -1)


def load(unet, path):
    """Load the averaged weights of an official file into unet; returns its training steps."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    weights, average = state["model"], state["ema_weights"]

    # The averages are a list without names, in the order of "model": of all its parameters, or of
    # those that are trained.
    parameters = dict(unet.named_parameters())
    names = [name for name in weights if name in parameters]
    if len(average) != len(names):
        names = [name for name in names if parameters[name].requires_grad]
    averaged = dict(zip(names, average, strict=True))
    unet.load_state_dict(dict(weights) | averaged)
    return int(state["step"])


def open_pretrained(o, device):
    """The Checkpoint of --pretrained, for sample.py and evaluate.py."""
    if o.checkpoint or o.weak or o.away is not None or o.model != "latent":
        raise UserError("--checkpoint, --weak, --away and --model do nothing here: "
                        "leave them out")
    if not Path(o.pretrained).is_file():
        raise UserError(f"--pretrained {o.pretrained} is no file: download {URL} (124 MB)")
    unet = UNet()
    try:
        step = load(unet, o.pretrained)
    except Exception as error:          # a damaged or foreign file raises all sorts
        raise UserError(f"--pretrained {o.pretrained} cannot be loaded ({type(error).__name__}): "
                        f"it should be {URL}, or a file of the same program") from None
    unet.recompute = o.recompute
    unet.to(device).eval().requires_grad_(False)
    frames = 128 * round(o.window * RATE / 128)         # 5.944 s give the shipped models' window
    coder = Autoencoder(o.level or SIGMA_DATA)
    return Checkpoint("latent", Net(unet, frames), coder, step=step, path=o.pretrained)


# ---- its rows of Table 1 -------------------------------------------------------------------------

def spliced(make):
    """A row's audio in the region, with linear cross-fades into the originals around it.

    These keep their two channels and all frequencies.
    """
    def splice(batch):
        made = make(batch)[..., :batch.x.shape[-1]]
        at = torch.arange(made.shape[-1])
        outside = torch.maximum(batch.span.a - at, at - batch.span.b + 1)       # samples from it
        share = (1 - outside / (sample.SPLICE * SAMPLE_RATE)).clamp(0, 1)
        return torch.lerp(batch.x, made, share.to(made))
    return splice


def table_rows(checkpoint, judges, o):
    """CQTDiff, and its ceiling: real audio through encode and decode, mono and below 10 kHz."""
    facts = {"code": sample.file_digest(__file__), "level": o.level}
    rows = []
    named = (*sample.Settings.FLAGS, "as_printed", "level")             # what a row's name says
    o.given = {name: value for name, value in o.given.items() if name in named}
    for row in evaluate.sampled_rows(checkpoint, judges, o):
        name = f"{NAME}, {row.name.removeprefix('Latent ')}"
        rows.append(replace(row, name=name, make=spliced(row.make), facts=row.facts | facts))
    ceiling = evaluate.vae_row(checkpoint, o.tasks)
    rows.append(replace(ceiling, name="CQTDiff's ceiling", make=spliced(ceiling.make),
                        same=evaluate.by_task, facts=ceiling.facts | facts))
    return rows + evaluate.fixed_rows(o)


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["evaluate"]:
        evaluate.main(words[1:], add_flags, open_pretrained, table_rows)
    else:
        sample.main(argv, add_flags, open_pretrained)


if __name__ == "__main__":
    run(main, "take --recompute, a shorter --window, or --device cpu")
