"""The waveform model of App. C.1: a 1-D U-Net on folded stereo audio.

44.1 kHz samples are too many for a U-Net to step through one by one. `fold` cuts them into
overlapping frames and puts the 32 samples of a frame, of both channels, into the channel axis; the
U-Net, built like the one of [40] (Rombach et al.) with one axis instead of two, works on the
frames; `unfold` adds its output frames up again under a Hamming window.

    model = UNet1D(PRESETS["tiny"])
    v = model(x_t, t)        # x_t, v: (B, 2, n), x_t from audio / model.scale;  t: (B,) in (0, 1]

`python tests/benchmark.py --only presets` prints sizes and cost of the presets.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import cosine_schedule

FRAME = 32              # samples of one stereo channel in a folded frame
HOP = 16
CHANNELS = 2 * FRAME    # of a folded frame: both channels of the stereo signal
EDGE = (FRAME - HOP) // 2


# ---- Fold and unfold ----------------------------------------------------------------------------


def hamming(device=None):
    """The periodic Hamming window (32,): overlapped by half it adds up to 1.08.

    The symmetric one ripples.
    """
    return torch.hamming_window(FRAME, periodic=True, device=device)


def fold(x):
    """Audio x (B, 2, n) -> frames (B, 64, ceil(n / 16)).

    Channel 32 c + j is sample j of a frame of stereo channel c. Frame k starts at sample 16 k - 8:
    with 8 zeros on either side 2^19 samples are exactly 32768 frames. The window is applied by
    `unfold` (App. C.1).
    """
    B, C, n = x.shape
    frames = math.ceil(n / HOP)
    x = F.pad(x, (EDGE, HOP * frames - n + EDGE))
    hops = x.reshape(B, C, frames + 1, HOP)
    x = torch.cat([hops[:, :, :-1], hops[:, :, 1:]], dim=-1)        # (B, 2, frames, 32)
    return x.transpose(2, 3).reshape(B, C * FRAME, frames)          # (B, 64, frames)


def unfold(frames, n):
    """Frames (B, 64, K) -> audio (B, 2, n), n <= 16 K: the inverse of `fold`, by overlap-add.

    A sample is the average of the two frames that hold it, weighted by the window and divided by
    the window's overlap sum. That sum is 1.08 everywhere but in the outermost 8 samples on either
    side of the K frames: these lie in one frame only, under a weight of at least 0.54. Nothing is
    divided by a small number.
    """
    B, _, K = frames.shape
    window = hamming(frames.device)[:, None]                        # (32, 1)
    audio = overlap_add(frames.reshape(B, -1, FRAME, K) * window)
    weight = overlap_add(window.expand(FRAME, K))
    return audio[..., EDGE:EDGE + n] / weight[EDGE:EDGE + n]


def overlap_add(frames):
    """Frames (..., 32, K) -> (..., 16 (K + 1)).

    The second half of a frame falls on the first half of the next.
    """
    first, second = frames.split(HOP, dim=-2)
    hops = F.pad(first, (0, 1)) + F.pad(second, (1, 0))             # (..., 16, K + 1)
    return hops.transpose(-1, -2).flatten(-2)


def cosines():
    """The orthonormal DCT-II of a frame, (32, 32): row k is a cosine of k half periods."""
    j = torch.arange(FRAME)
    basis = torch.cos(math.pi / FRAME * (j + 0.5) * j[:, None]) * math.sqrt(2 / FRAME)
    basis[0] /= math.sqrt(2)
    return basis


# ---- Configuration ------------------------------------------------------------------------------


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet1D. Each level has half the frames of the one above."""
    samples: int                        # longest clip, in samples per channel
    width: int                          # channels of the first level
    multipliers: tuple[int, ...]        # channels of each level, in units of width
    blocks: int                         # residual blocks a level on the way down; up: one more
    emb_width: int                      # of the time embedding
    attention: int = 2                  # how many levels attend, counted from the lowest resolution
    head_width: int = 64
    groups: int = 32                    # of GroupNorm


PRESETS = {
    "tiny": UNetConfig(samples=2**15, width=48, multipliers=(1, 1), blocks=1, emb_width=64,
                       attention=1, head_width=24, groups=8),
    "small": UNetConfig(samples=2**18, width=80, multipliers=(1, 1, 1, 1, 1, 2), blocks=1,
                        emb_width=256, head_width=40, groups=16),
    "paper": UNetConfig(samples=2**19, width=320, multipliers=(1, 2, 2, 4, 4), blocks=3,
                        emb_width=1280),
}


# ---- Blocks -------------------------------------------------------------------------------------


def zero(layer):
    """The same layer with weights and bias 0: a residual branch that starts as nothing."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def time_features(t, width):
    """Sinusoids of 1000 t, (B,) -> (B, width).

    The frequencies, 1 down to 1e-4, are those that [40] has for its step index.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(1e4) * torch.arange(half, device=t.device) / half)
    phase = 1000 * t[:, None] * frequencies
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


class ResidualBlock(nn.Module):
    """Two times GroupNorm, SiLU and convolution, added to a skip; the time embedding in between."""

    def __init__(self, channels_in, channels_out, emb_width, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in)
        self.conv1 = nn.Conv1d(channels_in, channels_out, 3, padding=1)
        self.emb = nn.Linear(emb_width, channels_out)
        self.norm2 = nn.GroupNorm(groups, channels_out)
        self.conv2 = zero(nn.Conv1d(channels_out, channels_out, 3, padding=1))
        self.skip = nn.Identity()
        if channels_in != channels_out:
            self.skip = nn.Conv1d(channels_in, channels_out, 1)

    def forward(self, h, emb):
        """h (B, channels_in, K), emb (B, emb_width) -> (B, channels_out, K)."""
        r = self.conv1(F.silu(self.norm1(h)))
        r = r + self.emb(emb)[:, :, None]
        r = self.conv2(F.silu(self.norm2(r)))
        return self.skip(h) + r


class Attention(nn.Module):
    """Self-attention over all frames of a clip, as a residual branch."""

    def __init__(self, channels, head_width, groups):
        super().__init__()
        self.heads = channels // head_width
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, h):
        """h (B, channels, K) -> the same shape."""
        B, C, K = h.shape
        qkv = self.qkv(self.norm(h)).reshape(B, 3, self.heads, -1, K)
        # Fused kernels want the channels of a head adjacent in memory: without the copy all K x K
        # weights are stored.
        q, k, v = qkv.transpose(-1, -2).contiguous().unbind(1)      # (B, heads, K, head_width) each
        r = F.scaled_dot_product_attention(q, k, v)
        return h + self.out(r.transpose(-1, -2).reshape(B, C, K))


class Stage(nn.Module):
    """A residual block and, on the levels that attend, attention."""

    def __init__(self, channels_in, channels_out, attends, config):
        super().__init__()
        self.residual = ResidualBlock(channels_in, channels_out, config.emb_width, config.groups)
        self.attention = nn.Identity()
        if attends:
            self.attention = Attention(channels_out, config.head_width, config.groups)

    def forward(self, h, emb):
        return self.attention(self.residual(h, emb))


# ---- The model ----------------------------------------------------------------------------------


class UNet1D(nn.Module):
    """The U-Net of App. C.1, similar to [40]: model(x_t (B, 2, n), t (B,)) -> v (B, 2, n).

    n is any length up to config.samples. Unlike [40] it takes no conditioning but the time.

    Departure: inside, a frame's channels are the cosine coefficients of its mid and side, and each
    is preconditioned. Most coefficients of music are near zero. A small network learns this slowly,
    and what it leaves is heard as hiss.

    Two buffers travel with the weights. `scale` is the standard deviation of the training audio:
    the diffusion assumes unit variance, so the caller divides audio by it before, and multiplies
    after. `spectrum` (64,) is the standard deviation of each coefficient of audio / scale.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("spectrum", torch.ones(CHANNELS))
        mid_side = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
        self.register_buffer("basis", torch.kron(mid_side, cosines()), persistent=False)
        self.embed = nn.Sequential(nn.Linear(config.width, config.emb_width), nn.SiLU(),
                                   nn.Linear(config.emb_width, config.emb_width), nn.SiLU())

        levels = len(config.multipliers)
        widths = [config.width * m for m in config.multipliers]
        attends = [levels - level <= config.attention for level in range(levels)]

        # Down: enter[i] leads into level i, from the folded frames or from a level of twice as many
        # frames. `skips` lists the channels of what the way up will concatenate.
        self.enter = nn.ModuleList()
        self.down = nn.ModuleList()
        skips = []
        channels = CHANNELS
        for level, width in enumerate(widths):
            if level == 0:
                enter = nn.Conv1d(channels, width, 3, padding=1)
                channels = width
            else:
                enter = nn.Conv1d(channels, channels, 3, stride=2, padding=1)
            self.enter.append(enter)
            skips.append(channels)
            stages = nn.ModuleList()
            for _ in range(config.blocks):
                stages.append(Stage(channels, width, attends[level], config))
                skips.append(width)
                channels = width
            self.down.append(stages)

        self.middle = nn.ModuleList()
        for attend in (True, False):
            self.middle.append(Stage(channels, channels, attend, config))

        # Up, from the lowest level: leave[i] leads to twice as many frames, the last to the output.
        self.up = nn.ModuleList()
        self.leave = nn.ModuleList()
        for level in reversed(range(levels)):
            width = widths[level]
            stages = nn.ModuleList()
            for _ in range(config.blocks + 1):
                stages.append(Stage(channels + skips.pop(), width, attends[level], config))
                channels = width
            self.up.append(stages)
            if level > 0:
                conv = nn.Conv1d(width, width, 3, padding=1)
                self.leave.append(nn.Sequential(nn.Upsample(scale_factor=2), conv))
        head = zero(nn.Conv1d(channels, CHANNELS, 3, padding=1))    # v = c_skip x_t before training
        self.leave.append(nn.Sequential(nn.GroupNorm(config.groups, channels), nn.SiLU(), head))

    def coefficients(self, x):
        """Cosine coefficients of the frames' mid and side: (B, 2, n) -> (B, 64, ceil(n / 16)).

        The transform of a frame is orthonormal.
        """
        with torch.autocast(x.device.type, enabled=False):          # in half precision it hisses
            return self.basis.to(x) @ fold(x)

    def set_spectrum(self, deviations):
        """Set both buffers. deviations (64,): of the coefficients of training audio."""
        # Coefficients have the power of samples.
        self.scale.copy_(deviations.square().mean().sqrt())
        # The side channel of mono is silent: no deviation may be 0.
        self.spectrum.copy_(deviations).div_(self.scale).clamp_(min=1e-4)

    def preconditioning(self, t):
        """c_skip, c_in and c_out, (B, 64, 1) each.

        v = c_skip x_t + c_out F(c_in x_t), where F is the method `network`.

        As in EDM (Karras et al., 2022), for each coefficient. If it were Gaussian with standard
        deviation s, then c_skip x_t would be the mean of v given x_t, c_out the standard deviation
        of v about that mean, and c_in x_t would have variance 1.
        """
        s = self.spectrum[:, None]                                  # (64, 1)
        alpha_t, sigma_t = cosine_schedule(t[:, None, None])
        inverse_std = ((alpha_t * s).square() + sigma_t.square()).rsqrt()       # of x_t; (B, 64, 1)
        c_skip = alpha_t * sigma_t * (1 - s.square()) * inverse_std.square()
        c_in = inverse_std
        c_out = s * inverse_std
        return c_skip, c_in, c_out

    def weigh(self, error, t):
        """The weighted error that the training loss squares: (B, 2, n) -> (B, 64, ceil(n / 16)).

        Each coefficient of the error of v is divided by the root of its c_out. The minimum stays
        where it is. Unweighted, the loud coefficients near t = 1, which cannot be predicted,
        dominate those that can be learned.
        """
        _, _, c_out = self.preconditioning(t)
        return self.coefficients(error) / c_out.sqrt()

    def forward(self, x_t, t):
        """x_t (B, 2, n), t (B,) in (0, 1] -> v (B, 2, n), in x_t's type.

        ValueError if n > config.samples.
        """
        n = x_t.shape[-1]
        if n > self.config.samples:
            window = self.config.samples
            raise ValueError(f"x_t has {n} samples, more than this U-Net's window of {window}: "
                             "shorten it")
        t = t.to(x_t)
        emb = self.embed(time_features(t, self.config.width))       # (B, emb_width)

        # Every level halves the frames: fill up with zeros to a whole number of the lowest level's.
        step = HOP * 2 ** (len(self.config.multipliers) - 1)
        c = self.coefficients(F.pad(x_t, (0, -n % step)))           # (B, 64, K)

        c_skip, c_in, c_out = self.preconditioning(t)
        h = self.network(c_in * c, emb)
        with torch.autocast(x_t.device.type, enabled=False):
            v = c_skip * c + c_out * h.to(c)                        # (B, 64, K)
            return unfold(self.basis.T @ v, n)

    def network(self, h, emb):
        """F: h (B, 64, K) and emb (B, emb_width) -> like h.

        K is a multiple of the frames that become one in the lowest level.
        """
        # Down: keep what enters each level, and what each stage makes of it.
        skips = []
        for enter, stages in zip(self.enter, self.down):
            h = enter(h)
            skips.append(h)
            for stage in stages:
                h = stage(h, emb)
                skips.append(h)

        for stage in self.middle:
            h = stage(h, emb)

        # Up: each stage takes the last of them that is left.
        for stages, leave in zip(self.up, self.leave):
            for stage in stages:
                h = stage(torch.cat([h, skips.pop()], dim=1), emb)
            h = leave(h)
        return h
