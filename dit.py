"""The latent diffusion transformer: v = model(x_t, t) over sequences of latent frames (App. C.1).

DiT is the paper's: the architecture of [24] (Peebles and Xie) without patches, since each latent
frame is one token, plus the relative positions of [44] (Shaw et al.) on the keys. The fixed sin-cos
positions of [24] stay: relative ones alone cannot tell where in the window a frame lies. Unlike
[24] it takes no class, predicts no variance, and starts from torch's initialisation.

    model = build(PRESETS["small"])
    v = model(x_t, t)        # x_t, v: (B, C, n) latents, n <= config.frames;  t: (B,) in (0, 1]

SpectralDiT, the second half of this file, is ours: its tokens are bins of short-time spectra of the
latents, where a tone is a line. In about equal time on a CPU core, with a recipe made for it, its
v-loss came to 0.568, that of a DiT with patches to 0.809 (tests/patched_dit.py; the model card).

`python tests/benchmark.py --only presets` prints sizes and cost of the presets.
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from diffusion import cosine_schedule


@dataclass(frozen=True)
class DiTConfig:
    channels: int  # C, channels of the latents
    frames: int  # longest sequence, in latent frames
    width: int
    depth: int
    heads: int
    max_distance: int = 64  # relative positions further apart than this share one vector
    hops: tuple[int, ...] = ()  # of a SpectralDiT: latent frames between spectra, for each stage


PRESETS = {
    "tiny": DiTConfig(channels=8, frames=256, width=96, depth=3, heads=3),
    "small": DiTConfig(channels=16, frames=2048, width=224, depth=8, heads=7, hops=(64, 16)),
    "paper": DiTConfig(channels=32, frames=2048, width=1536, depth=32, heads=24),
}


def build(config):
    """The network of a configuration: a DiT, or with `hops` a SpectralDiT."""
    if config.hops:
        return SpectralDiT(config)
    return DiT(config)


# ---- Relative attention [44] ---------------------------------------------------------------------

def relative_attention(q, k, v, r, block=None):
    """Softmax attention with relative positions on the keys: Eq. 4 of [44], distances clipped at c.

        logit(i, j) = q_i . (k_j + r_{clip(j - i, -c, c)}) / sqrt(d)

    q, k, v (B, heads, L, d); r (2 c + 1, d), the vectors of distances -c .. c for all heads.
    Returns (B, heads, L, d).

    Queries are taken in blocks. Most keys lie c or further from all queries of a block: those on
    the left share one vector, which is simply added to the key (k_j + r_{-c}), and so do those on
    the right (k_j + r_c). Only the keys of a band of block + 2 c have other vectors: there, q r^T
    with its row i shifted right by i is added to the logits. Nothing larger than
    (B heads, block, L) exists, and the backward pass recomputes it.
    """
    # Ten lines do the same but for rounding: for 256 queries at a time, q r^T gathered into a bias
    # of scaled_dot_product_attention, under torch.utils.checkpoint. With them a guided step of two
    # layers of the paper preset took 1.6 times the CPU time (one thread, four interleaved pairs),
    # and 1.16 times the peak memory.
    on_cpu = q.device.type == "cpu"
    if block is None:
        block = 256 if on_cpu else 512
    # On a GPU all heads at once. On a CPU one for each thread, or as many as keep their logits in
    # the cache (2 MB).
    group = q.shape[0] * q.shape[1]
    if on_cpu:
        group = max(torch.get_num_threads(), 2**19 // (block * q.shape[2]))
    q_groups = (q / math.sqrt(q.shape[-1])).flatten(0, 1).split(group)
    k_groups = k.flatten(0, 1).split(group)
    v_groups = v.flatten(0, 1).split(group)
    out = []
    for q_group, k_group, v_group in zip(q_groups, k_groups, v_groups):
        out.append(RelativeAttention.apply(q_group, k_group, v_group, r, block))
    return torch.cat(out).view(q.shape)


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
        grad_q = q.new_empty(q.shape)
        grad_k = k.new_zeros(k.mT.shape)  # (N, d, L), in which products are faster
        grad_v = v.new_zeros(v.mT.shape)
        grad_r = None
        if ctx.needs_input_grad[3]:
            grad_r = torch.zeros_like(r)
        # What the backward of softmax subtracts in each row: (N, L, 1).
        mean = (grad_out * out).sum(-1, keepdim=True)
        with torch.autocast(q.device.type, enabled=False):
            for rows, band, weights in block_weights(q, k, r, ctx.block):
                grad_v.baddbmm_(grad_out[:, rows].mT, weights)
                grad_logits = (grad_out[:, rows] @ v.mT).sub_(mean[:, rows]).mul_(weights)
                grad_k.baddbmm_(q[:, rows].mT, grad_logits)
                # The same by distance, for the part of q r^T: (N, rows, 2 c + 1).
                by_distance = sum_by_distance(grad_logits, rows, band, len(r) // 2)
                grad_q[:, rows] = grad_logits @ k + by_distance @ r.to(q.dtype)
                if grad_r is not None:
                    grad_r += (by_distance.mT @ q[:, rows]).sum(0, dtype=r.dtype)
        return grad_q, grad_k.mT, grad_v.mT, grad_r, None


def block_weights(q, k, r, block):
    """For each block of queries: slices of its rows and its band, and weights (N, rows, L)."""
    length = k.shape[1]
    c = len(r) // 2
    r = r.to(q.dtype)
    left = k + r[0]
    right = k + r[-1]
    for start in range(0, length, block):
        rows = slice(start, min(start + block, length))
        band = slice(max(start - c, 0), min(rows.stop + c, length))
        keys = torch.cat([left[:, : band.start], k[:, band], right[:, band.stop :]], 1)
        logits = q[:, rows] @ keys.mT
        logits[..., band] += spread_over_band(q[:, rows] @ r.mT, rows, band)
        yield rows, band, torch.softmax(logits, -1, out=logits)


def spread_over_band(by_distance, rows, band):
    """Values by distance (N, rows, 2 c + 1) -> values by key of the band (N, rows, band)."""
    n = by_distance.shape[1]
    c = by_distance.shape[2] // 2
    left = by_distance[..., :1].expand(-1, -1, n - 1)
    right = by_distance[..., -1:].expand(-1, -1, n - 1)
    return band_view(torch.cat([left, by_distance, right], -1), c, rows, band)


def sum_by_distance(grad_logits, rows, band, c):
    """The transpose: sums over keys of equal distance, (N, rows, L) -> (N, rows, 2 c + 1)."""
    n = grad_logits.shape[1]
    table = grad_logits.new_zeros(len(grad_logits), n, 2 * (n + c) - 1)
    band_view(table, c, rows, band).copy_(grad_logits[..., band])
    by_distance = table[..., n - 1 : n + 2 * c].clone()
    by_distance[..., 0] += table[..., : n - 1].sum(-1) + grad_logits[..., : band.start].sum(-1)
    by_distance[..., -1] += table[..., n + 2 * c :].sum(-1) + grad_logits[..., band.stop :].sum(-1)
    return by_distance


def band_view(table, c, rows, band):
    """A table of distances -(n - 1 + c) .. n - 1 + c for n rows, viewed by key: (N, n, band)."""
    n, w = table.shape[1:]
    # Row i starts i places earlier.
    by_key = table.as_strided((len(table), n, n + 2 * c), (n * w, w - 1, 1), n - 1)
    return by_key[..., band.start - rows.start + c : band.stop - rows.start + c]


# ---- The transformer of [24] --------------------------------------------------------------------

def sincos(positions, width):
    """Sines and cosines of positions (n,), in float32: (n, width).

    Half the width are sines, half cosines, at frequencies from 1 down to 1e-4.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(1e4) / half * torch.arange(half, device=positions.device))
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


def time_features(t):
    """(B,) -> (B, 256). [24] counts time in 1000 steps: its frequencies suit that range."""
    return sincos(1000 * t.float(), 256)


def time_mlp(width):
    return nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())


def mlp(width):
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"),
                         nn.Linear(4 * width, width))


def modulated_norm(h, shift, scale):
    """LayerNorm over the last axis, then times 1 + scale, plus shift."""
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=1e-6), 1 + scale)


def zero(layer):
    """The same layer with weights and bias 0."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def check_length(x_t, config):
    n = x_t.shape[-1]
    if n > config.frames:
        raise ValueError(f"x_t has {n} frames, the model at most {config.frames}: "
                         "give it a shorter one.")


class Block(nn.Module):
    """Attention and MLP. Each has a shift, a scale (after its LayerNorm) and a gate, made from t.

    One layer, DiT.modulation, computes them for all blocks, and each block adds a learned offset.
    Both start at zero, and the block as the identity. Departure: in [24] each block has such a
    layer of its own, which would make the paper's "1B" parameters 1.37 billion.
    """

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.qkv = nn.Linear(width, 3 * width)
        vectors = torch.randn(2 * config.max_distance + 1, width // config.heads)
        self.relative = nn.Parameter(0.02 * vectors)
        self.proj = nn.Linear(width, width)
        self.mlp = mlp(width)
        self.offset = nn.Parameter(torch.zeros(6 * width))

    def forward(self, h, modulation):
        """h: (B, n, width); modulation: (B, 6 width)."""
        modulation = (modulation + self.offset)[:, None]  # (B, 1, 6 width)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        h = h + gate1 * self.attention(modulated_norm(h, shift1, scale1))
        h = h + gate2 * self.mlp(modulated_norm(h, shift2, scale2))
        return h

    def attention(self, h):
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, -1))  # (B, n, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, n, d) each
        mixed = relative_attention(q, k, v, self.relative)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class DiT(nn.Module):
    """v = model(x_t, t): the diffusion transformer of App. C.1. Before training its output is 0."""

    def __init__(self, config):
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"width {config.width} is not a multiple of the {config.heads} heads: "
                             "change either.")
        width = config.width
        self.config = config
        self.embed = nn.Linear(config.channels, width)
        positions = sincos(torch.arange(config.frames), width)
        self.register_buffer("positions", positions, persistent=False)
        self.time = time_mlp(width)
        self.modulation = zero(nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_modulation = zero(nn.Linear(width, 2 * width))
        self.out = zero(nn.Linear(width, config.channels))

    def forward(self, x_t, t, start=None):
        """x_t: (B, C, n), n <= config.frames; t: (B,) in (0, 1]. Returns v (B, C, n).

        start: (B,) where in the window each sequence begins, in frames; None: at 0. Training on
        short clips draws it, so that every position is learned.
        """
        check_length(x_t, self.config)
        n = x_t.shape[-1]

        # The time sets the shifts, scales and gates of all blocks.
        time = self.time(time_features(t.to(x_t.device)).to(self.embed.weight.dtype))  # (B, width)
        modulation = self.modulation(time)  # (B, 6 width)

        # A token is a latent frame, plus the fixed vector of its position in the window.
        if start is None:
            positions = self.positions[:n]  # (n, width)
        else:
            positions = self.positions.unfold(0, n, 1)[start].mT  # (B, n, width)
        h = self.embed(x_t.mT) + positions  # (B, n, width)
        for block in self.blocks:
            h = block(h, modulation)

        # Back to latent channels.
        shift, scale = self.final_modulation(time)[:, None].chunk(2, -1)
        return self.out(modulated_norm(h, shift, scale)).mT


# ---- The transformer on spectra (ours) ----------------------------------------------------------

def spectra(x, hop):
    """Spectra of frames of 2 hop under a sine window: (B, C, n) -> (B, n / hop + 1, hop + 1, C).

    Complex; n is a multiple of hop. A tight frame: from_spectra gives x back, and white noise keeps
    its variance, except in the first and last frame.
    """
    frames = F.pad(x, (hop, hop)).unfold(-1, 2 * hop, hop)  # (B, C, n / hop + 1, 2 hop)
    X = torch.fft.rfft(frames * sine_window(hop, x.device), norm="ortho")
    return math.sqrt(2) * X.permute(0, 2, 3, 1)


def from_spectra(X, hop):
    """The inverse of spectra: (B, T, hop + 1, C) complex -> (B, C, (T - 1) hop)."""
    frames = torch.fft.irfft(X.permute(0, 3, 1, 2), 2 * hop, norm="ortho") / math.sqrt(2)
    first, second = (frames * sine_window(hop, X.device)).split(hop, -1)
    # The second half of a frame overlaps the first half of the next.
    return (second[:, :, :-1] + first[:, :, 1:]).flatten(2)


def sine_window(hop, device):
    return torch.sin(math.pi * (torch.arange(2 * hop, device=device) + 0.5) / (2 * hop))


class SpectralBlock(nn.Module):
    """A block on tokens with two axes: attention along one, then a convolution over both and MLP.

    Shifts, scales and gates are made as in Block. But the gates start at 1, and the weights (not
    the biases) of the layers before them at 0.
    """

    def __init__(self, config, hop, axis):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.axis = axis  # 1: time, 2: frequency
        # The largest distance between two tokens of the axis.
        self.longest = config.frames // hop if axis == 1 else hop
        self.relative = nn.Parameter(torch.zeros(config.heads, 2 * self.longest + 1))
        self.offset = nn.Parameter(torch.zeros(6 * width))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = mlp(width)
        self.conv = nn.Conv2d(width, width, (5, 7), padding=(2, 3), groups=width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.mlp[-1].weight)

    def forward(self, h, modulation):
        """h: (B, T, F, width); modulation: (B, 6 width)."""
        modulation = (modulation + self.offset)[:, None, None]  # (B, 1, 1, 6 width)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        h = h + (1 + gate1) * self.attention(modulated_norm(h, shift1, scale1))
        # The MLP sees 5 frames by 7 bins around each token.
        local = self.conv(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        h = h + (1 + gate2) * self.mlp(modulated_norm(local, shift2, scale2))
        return h

    def attention(self, h):
        """Attention along the axis. Each head adds a learned number per distance to its logits."""
        qkv = self.qkv(h)
        if self.axis == 1:
            qkv = qkv.transpose(1, 2)
        B, rows, L, _ = qkv.shape  # a row: the tokens of one bin, or of one frame
        position = torch.arange(L, device=h.device)
        bias = self.relative[:, position - position[:, None] + self.longest]  # (heads, L, L)
        qkv = qkv.reshape(B * rows, L, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B rows, heads, L, d) each
        mixed = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))
        mixed = mixed.transpose(1, 2).reshape(B, rows, L, -1)
        if self.axis == 1:
            mixed = mixed.transpose(1, 2)
        return self.proj(mixed)


class SpectralStage(nn.Module):
    """An estimate of v from the spectra of x_t: a Wiener filter whose gains a transformer decides.

    A tone is a line in the spectra of the latents, above the noise of x_t where in single frames it
    is far below. `modes` and `power` are the eigenvectors and eigenvalues of the latents' C x C
    cross-spectra in each bin, over all music. X is x_t's spectrum in this eigenbasis, divided by
    its standard deviation at time t. If all music were one Gaussian, E[v | x_t] would be `linear`
    times X, and its error would have the standard deviation `error`. What the transformer adds is
    in units of `error`.
    """

    def __init__(self, config, hop):
        super().__init__()
        width = config.width
        C = config.channels
        self.hop = hop
        self.register_buffer("power", torch.ones(hop + 1, C))
        modes = torch.eye(C, dtype=torch.cfloat).repeat(hop + 1, 1, 1)
        self.register_buffer("modes", torch.view_as_real(modes))
        self.embed = nn.Parameter(torch.randn(hop + 1, 6 * C, width) / math.sqrt(6 * C))
        self.positions = nn.Parameter(torch.zeros(hop + 1, width))
        self.time = time_mlp(width)
        self.modulation = zero(nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList()
        for i in range(config.depth):
            self.blocks.append(SpectralBlock(config, hop, axis=1 + i % 2))
        self.out = nn.Parameter(torch.zeros(hop + 1, width, 4 * C))

    def forward(self, x_t, t, v=None):
        """x_t (B, C, n), n a multiple of the hop; v: an estimate to improve, or None. Returns v."""
        # The Gaussian estimate: what to multiply x_t by, and how large the error will be.
        alpha_t, sigma_t = cosine_schedule(t.to(x_t)[:, None, None, None])  # (B, 1, 1, 1)
        inverse_std = (alpha_t**2 * self.power + sigma_t**2).rsqrt()  # (B, 1, F, C)
        linear = alpha_t * sigma_t * (1 - self.power) * inverse_std
        error = self.power.sqrt() * inverse_std

        # x_t, and the difference of the estimate from the Gaussian one. Both complex (B, T, F, C).
        X = inverse_std * self.to_modes(x_t)
        V = linear * X if v is None else self.to_modes(v)
        change = (V - linear * X) / (error + 0.1)  # bounded where error is small

        # The transformer decides a gain for each of the two, and an offset.
        gain_X, gain_change, real, imaginary = self.transformer(X, change, t)
        V = V + error * (gain_X * X + gain_change * change + torch.complex(real, imaginary))
        return self.from_modes(V)

    def to_modes(self, x):
        """x (B, C, n) -> its spectra in the eigenbasis of each bin, complex (B, T, F, C)."""
        modes = torch.view_as_complex(self.modes)  # (F, C, C)
        return torch.einsum("btfc,fcd->btfd", spectra(x, self.hop), modes.conj())

    def from_modes(self, X):
        """The inverse of to_modes."""
        modes = torch.view_as_complex(self.modes)
        return from_spectra(torch.einsum("btfd,fcd->btfc", X, modes), self.hop)

    def transformer(self, X, change, t):
        """Gains for X and change, and the real and imaginary part of an offset.

        X and change are complex. All, in and out, are (B, T, F, C).
        """
        time = self.time(time_features(t.to(X.device)).to(self.positions.dtype))
        modulation = self.modulation(time)
        # A token is one bin of one frame; each bin has an embedding layer of its own.
        features = []
        for Z in (X, change):
            features += [(Z.real**2 + Z.imag**2 + 0.01).log(), Z.real, Z.imag]
        h = torch.einsum("btfc,fcw->btfw", torch.cat(features, -1), self.embed) + self.positions
        for block in self.blocks:
            h = block(h, modulation)
        h = F.layer_norm(h, h.shape[-1:])
        out = torch.einsum("btfw,fwc->btfc", h, self.out)  # (B, T, F, 4 C)
        return out.to(self.power.dtype).chunk(4, -1)


class SpectralDiT(nn.Module):
    """v = model(x_t, t), by SpectralStages in a row: long frames for tones, then short for onsets.

    Unlike DiT it needs no positions in the window: a token is told its bin, and how far other
    tokens are.
    """

    def __init__(self, config):
        super().__init__()
        for hop in config.hops:
            assert config.frames % hop == 0, "every hop must divide frames"
            assert max(config.hops) % hop == 0, "every hop must divide the longest"
        self.config = config
        self.stages = nn.ModuleList(SpectralStage(config, hop) for hop in config.hops)

    @torch.no_grad()
    def set_spectrum(self, latents):
        """Measure each stage's power and modes on normalised latents, a list of (B, C, n)."""
        for stage in self.stages:
            X = []
            for x in latents:
                whole = x[..., : x.shape[-1] // stage.hop * stage.hop].cpu().double()
                inner = spectra(whole, stage.hop)[:, 1:-1]  # the outer frames are half empty
                X.append(inner.flatten(0, 1))
            X = torch.cat(X)  # (frames, F, C)
            covariance = torch.einsum("tfc,tfd->fcd", X, X.conj()) / len(X)
            power, modes = torch.linalg.eigh(covariance)
            stage.power.copy_(power.clamp(min=1e-5))
            stage.modes.copy_(torch.view_as_real(modes))

    def forward(self, x_t, t):
        """x_t: (B, C, n), n <= config.frames; t: (B,) in (0, 1]. Returns v (B, C, n)."""
        check_length(x_t, self.config)
        n = x_t.shape[-1]
        x_t = F.pad(x_t, (0, -n % max(self.config.hops)))  # every hop divides the longest
        v = None
        for stage in self.stages:
            v = stage(x_t, t, v)
        return v[..., :n]
