"""The latent diffusion transformer: v = model(x_t, t) over sequences of latent frames (App. C.1).

DiT is the paper's: the architecture of [24] (Peebles and Xie) without patches, since each latent frame is one token,
plus the relative positions of [44] (Shaw et al.) on the keys. The fixed sin-cos positions of [24] stay: relative ones
alone cannot tell where in the window a frame lies. SpectralDiT is ours: its tokens are bins of short-time spectra of
the latents, where a tone is a line. On two CPU cores it came as far as a DiT in a quarter of the time.

    model = build(PRESETS["small"])
    v = model(x_t, t)                # x_t, v: (B, C, n) latent frames, any n <= config.frames; t: (B,) in (0, 1]

`python tests/benchmark.py --only presets` prints sizes and cost of the presets.
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from unet1d import zero


@dataclass(frozen=True)
class DiTConfig:
    channels: int  # C, channels of the latents
    frames: int  # longest sequence, in latent frames
    width: int
    depth: int
    heads: int
    max_distance: int = 64  # relative positions further apart than this share one vector
    hops: tuple[int, ...] = ()  # latent frames between spectra, for each stage of a SpectralDiT; (): a DiT


PRESETS = {
    "tiny": DiTConfig(channels=8, frames=256, width=96, depth=3, heads=3),
    "small": DiTConfig(channels=16, frames=2048, width=224, depth=8, heads=7, hops=(64, 16)),
    "paper": DiTConfig(channels=32, frames=2048, width=1536, depth=32, heads=24),
}


# ---- Relative attention [44] ----------------------------------------------------------------------------------------

def relative_attention(q, k, v, r, block=None):
    """Softmax attention with relative positions on the keys: Eq. 4 of [44], distances clipped at c.

        logit(i, j) = q_i . (k_j + r_{clip(j - i, -c, c)}) / sqrt(d)

    q, k, v (B, heads, L, d); r (2 c + 1, d), the vectors of distances -c .. c for all heads. Returns (B, heads, L, d).

    Queries are taken in blocks. Most keys lie c or further from all queries of a block: those on the left share one
    vector, which is simply added to the key (k_j + r_{-c}), and so do those on the right (k_j + r_c). Only a band of
    block + 2 c keys sees other vectors: there, q r^T with its row i shifted right by i is added to the logits. Nothing
    larger than (B heads, block, L) exists, and the backward pass recomputes it.
    """
    on_cpu = q.device.type == "cpu"
    block = block or (256 if on_cpu else 512)
    # On a CPU one head for each thread, or as many as keep their logits in the cache (2 MB); on a GPU all at once.
    group = max(torch.get_num_threads(), 2**19 // (block * q.shape[2])) if on_cpu else q.shape[0] * q.shape[1]
    groups = zip(*(x.flatten(0, 1).split(group) for x in (q / math.sqrt(q.shape[-1]), k, v)))
    return torch.cat([RelativeAttention.apply(*qkv, r, block) for qkv in groups]).view(q.shape)


class RelativeAttention(torch.autograd.Function):
    """relative_attention of N heads, with q, k, v (N, L, d), q already divided by sqrt(d)."""

    @staticmethod
    def forward(ctx, q, k, v, r, block):
        out = q.new_empty(q.shape)
        with torch.autocast(q.device.type, enabled=False):  # all products here are of q's type
            for rows, _, weights in block_weights(q, k, r, block):
                out[:, rows] = weights @ v
        ctx.save_for_backward(q, k, v, r, out)
        ctx.block = block
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, r, out = ctx.saved_tensors
        grad_q, grad_r = q.new_empty(q.shape), torch.zeros_like(r)
        grad_k, grad_v = k.new_zeros(k.mT.shape), v.new_zeros(v.mT.shape)  # (N, d, L), in which products are faster
        mean = (grad_out * out).sum(-1, keepdim=True)  # (N, L, 1): what softmax's backward subtracts in each row
        with torch.autocast(q.device.type, enabled=False):
            for rows, band, weights in block_weights(q, k, r, ctx.block):
                grad_v.baddbmm_(grad_out[:, rows].mT, weights)
                grad_logits = (grad_out[:, rows] @ v.mT).sub_(mean[:, rows]).mul_(weights)  # (N, rows, L)
                grad_k.baddbmm_(q[:, rows].mT, grad_logits)
                by_distance = sum_by_distance(grad_logits, rows, band, len(r) // 2)  # (N, rows, 2 c + 1)
                grad_q[:, rows] = grad_logits @ k + by_distance @ r.to(q.dtype)
                if ctx.needs_input_grad[3]:
                    grad_r += (by_distance.mT @ q[:, rows]).sum(0, dtype=r.dtype)
        return grad_q, grad_k.mT, grad_v.mT, grad_r if ctx.needs_input_grad[3] else None, None


def block_weights(q, k, r, block):
    """For each block of queries: the slice of its rows, the slice of its band of keys, its weights (N, rows, L)."""
    length, c = k.shape[1], len(r) // 2
    r = r.to(q.dtype)
    left, right = k + r[0], k + r[-1]
    for start in range(0, length, block):
        rows = slice(start, min(start + block, length))
        band = slice(max(start - c, 0), min(rows.stop + c, length))
        logits = q[:, rows] @ torch.cat([left[:, : band.start], k[:, band], right[:, band.stop :]], 1).mT
        logits[..., band] += spread_over_band(q[:, rows] @ r.mT, rows, band)
        yield rows, band, torch.softmax(logits, -1, out=logits)


def spread_over_band(by_distance, rows, band):
    """Values of each distance (N, rows, 2 c + 1) -> values of each key of the band (N, rows, band)."""
    n, c = by_distance.shape[1], by_distance.shape[2] // 2
    left, right = by_distance[..., :1].expand(-1, -1, n - 1), by_distance[..., -1:].expand(-1, -1, n - 1)
    return band_view(torch.cat([left, by_distance, right], -1), c, rows, band)


def sum_by_distance(grad_logits, rows, band, c):
    """The transpose: sums of (N, rows, L) over the keys of equal clipped distance, (N, rows, 2 c + 1)."""
    n = grad_logits.shape[1]
    table = grad_logits.new_zeros(len(grad_logits), n, 2 * (n + c) - 1)
    band_view(table, c, rows, band).copy_(grad_logits[..., band])
    by_distance = table[..., n - 1 : n + 2 * c].clone()
    by_distance[..., 0] += table[..., : n - 1].sum(-1) + grad_logits[..., : band.start].sum(-1)
    by_distance[..., -1] += table[..., n + 2 * c :].sum(-1) + grad_logits[..., band.stop :].sum(-1)
    return by_distance


def band_view(table, c, rows, band):
    """A table of distances -(n - 1 + c) .. n - 1 + c for each of n rows, as a view by key: (N, n, band)."""
    n, w = table.shape[1:]
    by_key = table.as_strided((len(table), n, n + 2 * c), (n * w, w - 1, 1), n - 1)  # row i starts i places earlier
    return by_key[..., band.start - rows.start + c : band.stop - rows.start + c]


# ---- The transformer [24] -------------------------------------------------------------------------------------------

def sincos(positions, width):
    """Sines and cosines of (n,) positions at width / 2 frequencies, from 1 down to 1e-4: (n, width), float32."""
    half = width // 2
    frequencies = torch.exp(-math.log(1e4) / half * torch.arange(half, device=positions.device))
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


class Block(nn.Module):
    """Attention and MLP, each with a shift, a scale (after its LayerNorm) and a gate that depend on t.

    One layer, DiT.modulation, computes them for all blocks, and each block adds a learned offset; all start at zero:
    the block is then the identity. Departure: in [24] each block has such a layer of its own, which would make the
    paper's "1B" parameters 1.37 billion.
    """

    def __init__(self, config):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.qkv = nn.Linear(width, 3 * width)
        self.relative = nn.Parameter(0.02 * torch.randn(2 * config.max_distance + 1, width // config.heads))
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.offset = nn.Parameter(torch.zeros(6 * width))

    def forward(self, h, modulation):
        """h: (B, n, width); modulation: (B, 6 width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.offset)[:, None].chunk(6, -1)  # (B, 1, width)
        h = h + gate1 * self.attention(modulated_norm(h, shift1, scale1))
        return h + gate2 * self.mlp(modulated_norm(h, shift2, scale2))

    def attention(self, h):
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, n, d)
        return self.proj(relative_attention(q, k, v, self.relative).transpose(1, 2).flatten(2))


def modulated_norm(h, shift, scale):
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=1e-6), 1 + scale)


def time_mlp(width):
    return nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())


def time_features(t):
    """(B,) -> (B, 256). [24] counts time in 1000 steps, and its frequencies are made for that range."""
    return sincos(1000 * t.float(), 256)


def frames_of(x_t, config):
    if x_t.shape[-1] > config.frames:
        raise ValueError(f"x_t has {x_t.shape[-1]} frames, the model at most {config.frames}: give it a shorter one.")
    return x_t.shape[-1]


class DiT(nn.Module):
    """v = model(x_t, t): the diffusion transformer of App. C.1. Its output is zero until it is trained."""

    def __init__(self, config):
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"width {config.width} is not a multiple of the {config.heads} heads: change either.")
        self.config, width = config, config.width
        self.embed = nn.Linear(config.channels, width)
        self.register_buffer("positions", sincos(torch.arange(config.frames), width), persistent=False)
        self.time = time_mlp(width)
        self.modulation = zero(nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_modulation = zero(nn.Linear(width, 2 * width))
        self.out = zero(nn.Linear(width, config.channels))

    def forward(self, x_t, t, start=None):
        """x_t: (B, C, n), n <= config.frames; t: (B,) in (0, 1]. Returns v (B, C, n).

        start: (B,) where in the window each sequence begins, in frames; None: at 0. Training on short clips draws it,
        so that every position is learned."""
        n = frames_of(x_t, self.config)
        time = self.time(time_features(t.to(x_t.device)).to(self.embed.weight.dtype))  # (B, width)
        modulation = self.modulation(time)  # (B, 6 width)
        positions = self.positions[:n] if start is None else self.positions.unfold(0, n, 1)[start].mT
        h = self.embed(x_t.mT) + positions  # (B, n, width)
        for block in self.blocks:
            h = block(h, modulation)
        shift, scale = self.final_modulation(time)[:, None].chunk(2, -1)
        return self.out(modulated_norm(h, shift, scale)).mT


# ---- The transformer on spectra -------------------------------------------------------------------------------------

def spectra(x, hop):
    """x (B, C, n), n a multiple of hop -> spectra of frames of 2 hop under a sine window, (B, n / hop + 1, hop + 1, C).

    Complex. A tight frame: from_spectra gives x back. White noise of variance 1 keeps it, but in the outer frames.
    """
    frames = F.pad(x, (hop, hop)).unfold(-1, 2 * hop, hop) * sine_window(hop, x.device)  # (B, C, n / hop + 1, 2 hop)
    return math.sqrt(2) * torch.fft.rfft(frames, norm="ortho").permute(0, 2, 3, 1)


def from_spectra(X, hop):
    """The inverse of spectra: (B, T, hop + 1, C) complex -> (B, C, (T - 1) hop)."""
    frames = torch.fft.irfft(X.permute(0, 3, 1, 2), 2 * hop, norm="ortho") / math.sqrt(2) * sine_window(hop, X.device)
    first, second = frames.split(hop, -1)
    return (second[:, :, :-1] + first[:, :, 1:]).flatten(2)  # a frame's second half lies over the next one's first


def sine_window(hop, device):
    return torch.sin(math.pi * (torch.arange(2 * hop, device=device) + 0.5) / (2 * hop))


class SpectralBlock(Block):
    """Block on tokens with two axes: attention along one of them, then a convolution over both before the MLP."""

    def __init__(self, config, hop, axis):
        super().__init__(config)
        self.axis, self.longest = axis, config.frames // hop if axis == 1 else hop  # 1: time, 2: frequency
        self.relative = nn.Parameter(torch.zeros(config.heads, 2 * self.longest + 1))
        self.conv = nn.Conv2d(config.width, config.width, (5, 7), padding=(2, 3), groups=config.width)
        for last in (self.proj, self.mlp[-1]):
            nn.init.zeros_(last.weight)

    def forward(self, h, condition):
        """h: (B, T, F, width); condition: (B, 6 width). Gates start at 1, and the weights before them at 0."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (condition + self.offset)[:, None, None].chunk(6, -1)
        h = h + (1 + gate1) * self.attention(modulated_norm(h, shift1, scale1))
        local = self.conv(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return h + (1 + gate2) * self.mlp(modulated_norm(local, shift2, scale2))

    def attention(self, h):
        """Along the axis. A relative position is one learned number for each head, added to the logit."""
        h = h.transpose(1, 2) if self.axis == 1 else h  # (B, rows, L, width)
        place = torch.arange(h.shape[2], device=h.device)
        bias = self.relative[:, place - place[:, None] + self.longest]  # (heads, L, L)
        q, k, v = self.qkv(h).flatten(0, 1).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))  # (B rows, heads, L, d)
        out = self.proj(mixed.transpose(1, 2).reshape(h.shape))
        return out.transpose(1, 2) if self.axis == 1 else out


class SpectralStage(nn.Module):
    """An estimate of v from the spectra of x_t: a Wiener filter whose gains a transformer decides.

    A tone is a line in the spectra of the latents, above the noise of x_t where in single frames it is far below.
    `modes` and `power` are the eigenvectors and eigenvalues of the latents' C x C cross-spectra in each bin, over all
    music. X, the spectra in these coordinates, over the deviation that x_t has there, has variance 1 at every t. If all
    music were one Gaussian, E[v | x_t] would be `linear` X, and its error would have the deviation `error`. The
    transformer's gain and offset are in that unit.
    """

    def __init__(self, config, hop):
        super().__init__()
        width, C, self.hop = config.width, config.channels, hop
        self.register_buffer("power", torch.ones(hop + 1, C))
        self.register_buffer("modes", torch.view_as_real(torch.eye(C, dtype=torch.cfloat).repeat(hop + 1, 1, 1)))
        self.embed = nn.Parameter(torch.randn(hop + 1, 6 * C, width) / math.sqrt(6 * C))
        self.positions = nn.Parameter(torch.zeros(hop + 1, width))
        self.time, self.modulation = time_mlp(width), zero(nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(SpectralBlock(config, hop, axis=1 + i % 2) for i in range(config.depth))
        self.out = nn.Parameter(torch.zeros(hop + 1, width, 4 * C))

    def forward(self, x_t, t, v=None):
        """x_t (B, C, n), n a multiple of the hop; v: the estimate to improve, or None. Returns v (B, C, n)."""
        modes = torch.view_as_complex(self.modes)  # (F, C, C)
        angle = math.pi / 2 * t.to(x_t)[:, None, None, None]  # here, not by diffusion.py: a GPU need not wait
        alpha_t, sigma_t = torch.sin(math.pi / 2 - angle), torch.sin(angle)  # (B, 1, 1, 1)
        over_deviation = (alpha_t**2 * self.power + sigma_t**2).rsqrt()  # (B, 1, F, C)
        linear, error = alpha_t * sigma_t * (1 - self.power) * over_deviation, self.power.sqrt() * over_deviation
        to_modes = lambda x: torch.einsum("btfc,fcd->btfd", spectra(x, self.hop), modes.conj())  # (B, T, F, C)
        X = over_deviation * to_modes(x_t)
        known = linear * X if v is None else to_modes(v)
        beyond = (known - linear * X) / (error + 0.1)  # bounded where error is small
        gain, again, real, imaginary = self.transformer(X, beyond, t)
        V = known + error * (gain * X + again * beyond + torch.complex(real, imaginary))
        return from_spectra(torch.einsum("btfd,fcd->btfc", V, modes), self.hop)

    def transformer(self, X, beyond, t):
        """From X and `beyond`, complex (B, T, F, C): a gain for either, and an offset's real and imaginary part."""
        condition = self.modulation(self.time(time_features(t.to(X.device))))
        features = [part for z in (X, beyond) for part in ((z.real**2 + z.imag**2 + 0.01).log(), z.real, z.imag)]
        h = torch.einsum("btfc,fcw->btfw", torch.cat(features, -1), self.embed) + self.positions
        for block in self.blocks:
            h = block(h, condition)
        return torch.einsum("btfw,fwc->btfc", F.layer_norm(h, h.shape[-1:]), self.out).float().chunk(4, -1)


class SpectralDiT(nn.Module):
    """v = model(x_t, t), by one SpectralStage after the other: long frames for tones, then short ones for onsets."""

    def __init__(self, config):
        super().__init__()
        assert all(config.frames % hop == max(config.hops) % hop == 0 for hop in config.hops), "hops must divide frames"
        self.config = config
        self.stages = nn.ModuleList(SpectralStage(config, hop) for hop in config.hops)

    @torch.no_grad()
    def set_spectrum(self, latents):
        """Measure each stage's power and modes on normalised latents, a list of (B, C, n)."""
        for stage in self.stages:
            whole = [x[..., : x.shape[-1] // stage.hop * stage.hop].cpu().double() for x in latents]
            X = torch.cat([spectra(x, stage.hop)[:, 1:-1].flatten(0, 1) for x in whole])  # (frames, F, C)
            power, modes = torch.linalg.eigh(torch.einsum("tfc,tfd->fcd", X, X.conj()) / len(X))
            stage.power.copy_(power.clamp(min=1e-5))
            stage.modes.copy_(torch.view_as_real(modes))

    def forward(self, x_t, t, start=None):
        """As DiT.forward, but start has no effect: a token knows its bin, and how far others are, not its place."""
        n, v = frames_of(x_t, self.config), None
        x_t = F.pad(x_t, (0, -n % max(self.config.hops)))
        for stage in self.stages:
            v = stage(x_t, t, v)
        return v[..., :n]


def build(config):
    """The network of a configuration: a DiT, or with `hops` a SpectralDiT."""
    return SpectralDiT(config) if config.hops else DiT(config)
