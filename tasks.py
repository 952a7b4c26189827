"""Table 2: measurement operators A, distances d, and one constructor for each task of Sect. 4.3.

    task = regenerate(x_bar, C_L, C_R, z, k=0.6)
    task = combine(task, embedder_guidance(embed, embed(example), z), weights=(1, 5))
    x_0 = guidance.sample(model, task.x_T, task, xi=0.03)

Signals are (B, C, n) in the model's own space (samples or latent frames). C_L and C_R count
positions along n. z is standard normal noise in the shape of x_bar. y, k, weights and labels may
differ from clip to clip. At the end: the resampler, and PaSST [30], the embedder and classifier.
"""
import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import add_noise
from guidance import Task, Term, data_consistency, is_linear


# ---- linear operators: A(x), the adjoint T(y) = A^T y, and solve(r) = (A A^T)^-1 r ---------------

class KeepEnds:
    """A = [A_L; A_R] of Table 2: the first C_L and the last C_R of n positions. A A^T = I.

    Any class with these three methods will do as a linear A of a Term: see Matrix in
    tests/test_guidance.py.
    """

    def __init__(self, n, C_L, C_R=0):
        if C_L < 0 or C_R < 0 or not 0 < C_L + C_R < n:
            raise ValueError("C_L and C_R must not be negative, with 0 < C_L + C_R < n; "
                             f"not {C_L}, {C_R} with n = {n}")
        self.n = n
        self.C_L = C_L
        self.C_R = C_R

    def __call__(self, x):
        left, right = x[..., :self.C_L], x[..., self.n - self.C_R:]
        return torch.cat([left, right], dim=-1)                         # (B, C, C_L + C_R)

    def T(self, y):
        left, right = y[..., :self.C_L], y[..., self.C_L:]
        gap = y.new_zeros(*y.shape[:-1], self.n - self.C_L - self.C_R)
        return torch.cat([left, gap, right], dim=-1)                    # (B, C, n)

    def solve(self, r):
        return r


class KeepMask:
    """The general case: keep the positions where mask (n,), (B, 1, n) or (B, C, n) is True.

    Clips may keep different numbers of positions. So y stays in the shape of x, with zeros where
    nothing is kept; on the kept rows A A^T = I.
    """

    def __init__(self, mask):
        if mask.dtype != torch.bool or not mask.any() or mask.all():
            raise ValueError("mask must be boolean, with kept (True) and free (False) positions")
        self.mask = mask

    def __call__(self, x):
        return torch.where(self.mask, x, 0.0)

    T = __call__

    def solve(self, r):
        return r


# ---- distances: one number per clip, (B,), never divided by the batch ----------------------------

def l1(y, Ax):
    """||y - A x||_1, a sum over a clip's elements: for a mean the paper's xi would be too small."""
    return (y - Ax).abs().flatten(1).sum(1)


def l2(y, Ax):
    """||y - A x||_2, not squared. Its gradient at y = A x is taken as 0."""
    return torch.linalg.vector_norm((y - Ax).flatten(1), dim=1)


def bce(y, logits):
    """BCE(y, p), summed over classes.

    Takes the logits of p, since log(1 - p) of a confident p is -inf in float32.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, y.to(logits), reduction="none")
    return entropy.flatten(1).sum(1)


# ---- the rows of Table 2 -------------------------------------------------------------------------

def reconstruct(x_bar, A, z, project="x0_hat", d=l1, **term):
    """The reconstruction rows of Table 2, for any linear A and distance d: y = A x_bar.

    x_T = A^T y + (I - A^T A) z as printed. Departure: with project="x0_hat" (see Term) x_T is pure
    noise z, in the contexts too.
    """
    if x_bar.shape != z.shape:
        raise ValueError("x_bar and z must have the same shape, "
                         f"not {tuple(x_bar.shape)} and {tuple(z.shape)}")
    y = A(x_bar)
    x_T = z
    if project != "x0_hat":
        x_T = data_consistency(z, y, A)             # the printed x_T, for A A^T != I as well
    return Task(x_T, (Term(A, d, y, project=project, **term),))


def continuation(x_bar, C_L, z, **term):
    """Table 2, Continuation: keep the first C_L positions of x_bar (the rest of it is not read)."""
    return reconstruct(x_bar, KeepEnds(z.shape[-1], C_L), z, **term)


def infill(x_bar, C_L, C_R, z, **term):
    """Table 2, Infill: keep the first C_L and last C_R positions of x_bar; the rest is not read."""
    return reconstruct(x_bar, KeepEnds(z.shape[-1], C_L, C_R), z, **term)


def regenerate(x_bar, C_L, C_R, z, k, start_from="matched", **term):
    """Table 2, Regenerate: Infill that starts from a mixture of noise and x_bar; k = 1 is Infill.

    k           share of noise, in [0, 1]; a number, or (B,); App. C.3 has 0.85
    start_from  "paper": from k z + (1 - k) x_bar at t = 1, as Table 2 prints it.
                "matched": the same mixture scaled to unit variance, at the time t_T whose alpha_t :
                sigma_t is (1 - k) : k, which is Sect. 4.3's "partially noised using the forward
                process". Started at t = 1, DDPM treats x_bar as noise and loses it.
    """
    k = torch.as_tensor(k, dtype=torch.float64)
    if start_from not in ("paper", "matched"):
        raise ValueError(f'start_from must be "paper" or "matched", not {start_from!r}')
    if not ((k >= 0) & (k <= 1)).all() or start_from == "matched" and (k == 0).any():
        raise ValueError('k must lie in [0, 1], above 0 with start_from="matched" '
                         f"(0 has no noise), not {k.tolist()}")

    # The mixture, everywhere; and the time at which it is what x_t should be.
    if start_from == "matched":
        t_T = matched_time(k)
        mixed, _ = add_noise(x_bar, z, t_T)
    else:
        t_T = 1.0
        share = k.to(z).reshape(-1, 1, 1)
        mixed = share * z + (1 - share) * x_bar
    if not C_L + C_R:
        return Task(mixed, (), t_T)                 # without a context there is no term

    # At t = 1 the contexts hold z, not the mixture. (With project="x_t" infill then puts y there.)
    if start_from == "paper":
        A = KeepEnds(z.shape[-1], C_L, C_R)
        mixed = data_consistency(mixed, A(z), A)
    return replace(infill(x_bar, C_L, C_R, mixed, **term), t_T=t_T)


def matched_time(k):
    """The time t at which sigma_t : alpha_t is k : (1 - k)."""
    k = torch.as_tensor(k, dtype=torch.float64)
    return 2 / math.pi * torch.atan2(k, 1 - k)


def crossfade(x_bar_L, x_bar_R, C_L, C_R):
    """x_bar of Table 2, Transition: [A_L x_bar_L; F_out x_bar_L + F_in x_bar_R; A_R x_bar_R].

    Both signals are (B, C, n). The fade has constant power, f_in^2 + f_out^2 = 1.
    """
    n = x_bar_L.shape[-1]
    KeepEnds(n, C_L, C_R)                           # raises ValueError for a bad C_L or C_R

    # f_out and f_in are a cosine and a sine, sampled in the middles of the steps.
    fade = math.pi / 2 * (torch.arange(n - C_L - C_R, dtype=torch.float64) + 0.5) / (n - C_L - C_R)
    f_out, f_in = fade.cos().to(x_bar_L), fade.sin().to(x_bar_L)
    middle = f_out * x_bar_L[..., C_L:n - C_R] + f_in * x_bar_R[..., C_L:n - C_R]
    return torch.cat([x_bar_L[..., :C_L], middle, x_bar_R[..., n - C_R:]], dim=-1)


def transition(x_bar, C_L, C_R, z, k, start_from="matched", **term):
    """Table 2, Transition: Regenerate with x_bar = crossfade(x_bar_L, x_bar_R, C_L, C_R).

    With a latent model the cross-fade is made in audio: a sum of latents is not the latents of a
    sum.
    """
    return regenerate(x_bar, C_L, C_R, z, k, start_from, **term)


def embedder_guidance(A, y, z, weight=1.0, **term):
    """Table 2, Embedder guidance: pull the embedding A(x) (B, m) towards y = A(example)."""
    return Task(z, (Term(A, l2, y, weight, **term),))


def classifier_guidance(A, y, z, weight=1.0, **term):
    """Table 2, Classifier guidance: A(x) gives logits (B, m) of p(c_i | x); y in [0, 1]."""
    if not ((y >= 0) & (y <= 1)).all():
        raise ValueError("y must hold labels in [0, 1]")
    return Task(z, (Term(A, bce, y, weight, **term),))


def combine(*tasks, weights=None):
    """Several tasks at once: all their terms, each times its task's weight (1 each, by default).

    x_T and t_T come from the first task that says where to start: one with a linear A, or one
    without terms, as Regenerate without contexts. If none does, from the first.
    """
    if weights is None:
        weights = [1.0] * len(tasks)
    if not tasks or len(weights) != len(tasks):
        raise ValueError(f"weights must be one per task: {len(weights)} for {len(tasks)} tasks")
    # All terms, with their tasks' weights.
    terms = []
    for task, weight in zip(tasks, weights):
        terms += [replace(term, weight=weight * term.weight) for term in task.terms]

    # Guidance alone starts from any noise.
    starts = [task for task in tasks
              if not task.terms or any(is_linear(term.A) for term in task.terms)]
    start = starts[0] if starts else tasks[0]
    return Task(start.x_T, tuple(terms), start.t_T)


# ---- the resampler, a linear operator ------------------------------------------------------------

@contextmanager
def full_precision(x):
    """Within the context, float32 stays float32 on the device of x.

    No autocast around it; and on NVIDIA GPUs no TF32 in convolutions, which have it by default: its
    10 bits give errors of -60 dB. Matrix products follow torch's own setting, which is off.
    """
    cudnn = torch.backends.cudnn
    if x.is_cuda:           # the flag is the whole process's: threads that work on a CPU leave it
        before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        with torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        if x.is_cuda:
            cudnn.allow_tf32 = before


@lru_cache(maxsize=16)
@torch.inference_mode(False)            # what is kept must do for a later call with a gradient
def _sinc_filters(up, down, dtype, device):
    """Weights for output samples j = 0 .. up - 1, which lie at the input times j down / up.

    A sinc with 48 zero crossings and a roll-off of 0.945 in a Kaiser window (beta 12), made in
    float64. Returns (reach, [(first tap, weight (phases, 1, taps)), ...]), 160 phases at a time:
    44.1 kHz -> 16 kHz is a single convolution, and rates without a common factor need no giant
    matrix.
    """
    crossings = 48
    band = 0.945 * min(1.0, up / down)              # pass band as a share of the input's own
    reach = math.ceil(crossings / band)             # input samples on each side
    groups = []
    for phases in torch.arange(up).split(160):
        # Distances of the taps from the output samples, in zero crossings.
        centre = phases.double() * down / up        # (phases,) in input samples
        first, last = int(centre[0]) - reach, int(centre[-1]) + reach + 1
        taps = torch.arange(first, last + 1, dtype=torch.float64)
        d = band * (taps - centre[:, None])         # (phases, taps)
        kaiser = torch.i0(12 * (1 - (d / crossings) ** 2).clamp(min=0).sqrt())
        weight = band * torch.sinc(d) * kaiser / kaiser.new_tensor(12).i0() * (d.abs() < crossings)
        groups.append((first + reach, weight[:, None].to(dtype).to(device)))
    return reach, groups


def resample(x, rate_in, rate_out):
    """x (..., n) at rate_in -> (..., ceil(n rate_out / rate_in)) at rate_out, whole Hz.

    Outside x there is silence. Linear and differentiable. Flat up to 0.40 of the lower rate,
    aliases under -80 dB from 0.5625 of it on.
    """
    if rate_in == rate_out:
        return x
    # Blocks of `down` samples in become blocks of `up` samples out.
    common = math.gcd(rate_in, rate_out)
    up, down, n = rate_out // common, rate_in // common, x.shape[-1]
    n_out = -(-n * up // down)
    blocks = -(-n_out // up)

    # Each output sample of a block has its own filter: one convolution with stride `down`.
    reach, groups = _sinc_filters(up, down, x.dtype, x.device)
    padded = F.pad(x.reshape(-1, 1, n), (reach, max(0, blocks * down - n) + reach + 1))
    with full_precision(x):
        parts = [F.conv1d(padded[..., first:], weight, stride=down)[..., :blocks]
                 for first, weight in groups]

    # Interleave the filters' outputs.
    y = torch.cat(parts, 1).transpose(1, 2)         # (rows, blocks, up)
    return y.reshape(*x.shape[:-1], -1)[..., :n_out]


def to_resample(rate_in, rate_out, first, last):
    """The samples [begin, end) at rate_in from which samples [first, last) at rate_out are made.

    The filter's margin is included. Both are whole blocks of `down` samples, which become `up`; so
    begin * rate_out / rate_in is a whole number, the place of resample's first output.
    """
    common = math.gcd(rate_in, rate_out)
    down, up = rate_in // common, rate_out // common
    reach = 64 * max(1, rate_in / rate_out)         # samples: 48 crossings / 0.945, and some more
    margin = math.ceil(reach / down)                # blocks
    return (first // up - margin) * down, (math.ceil(last / up) + margin) * down


# ---- PaSST, the Patchout transformer [30]: embedder and classifier -------------------------------

@dataclass(frozen=True)
class PaSSTConfig:
    classes: int
    width: int
    depth: int
    heads: int
    stride: int = 10          # of the 16 x 16 patches, both in mel bands and in frames


PASST_PRESETS = {
    "tiny": PaSSTConfig(classes=9, width=32, depth=2, heads=2, stride=16),
    "small": PaSSTConfig(classes=9, width=192, depth=5, heads=3, stride=16),
    "paper": PaSSTConfig(classes=527, width=768, depth=12, heads=12),       # the official passt_s
}
PASST_RATE = 32000                                  # Hz
PASST_BANDS = 128                                   # of the mel spectrogram
PASST_SHORTEST = 4801                               # samples that give one patch
PASST_LONGEST = 1005                                # mel frames that fit, 10 s
PASST_FILE = ("passt-s-f128-p16-s10-ap.476-swa.pt, published on GitHub by kkoutini/PaSST, "
              "release v0.0.1-audioset")


def mel_triangles(bands, low, high, bins):
    """(bands, bins) float32: triangles of peak 1, equally spaced in mel = 1127 ln(1 + f / 700).

    From low to high Hz, linear in mel; FFT bins 31.25 Hz apart (32 kHz / 1024 for PaSST, 16 kHz /
    512 for VGGish).
    """
    mel_low, mel_high = (1127 * math.log1p(hertz / 700) for hertz in (low, high))
    edges = torch.linspace(mel_low, mel_high, bands + 2, dtype=torch.float64)
    left, centre, right = (edges[i:bands + i, None] for i in range(3))
    mel = 1127 * torch.log1p(31.25 * torch.arange(bins, dtype=torch.float64) / 700)
    rising, falling = (mel - left) / (centre - left), (right - mel) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0).float()


def load_official(net, path, published):
    """Load an official checkpoint file strictly into net and freeze it.

    ValueError, one sentence, if the file is missing, damaged or another model's; `published` says
    in it which file is needed, and where it is.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(state.get("model", state))
    except Exception as error:      # a damaged or foreign file raises whatever was met first
        name = type(net).__name__
        raise ValueError(f"{path} cannot be loaded into {name} ({type(error).__name__}); "
                         f"it should be {published}") from None
    return net.eval().requires_grad_(False)


class PaSSTBlock(nn.Module):
    """Pre-norm transformer block, with the official checkpoint's names and LayerNorm eps."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({
            "qkv": nn.Linear(width, 3 * width),
            "proj": nn.Linear(width, width),
        })
        self.mlp = nn.ModuleDict({
            "fc1": nn.Linear(width, 4 * width),
            "fc2": nn.Linear(4 * width, width),
        })

    def forward(self, x):                                               # (B, tokens, width)
        qkv = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, heads, tokens, d) each
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.attn.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


def drop_patches(x, columns, rows, generators):
    """Structured patchout [30]: x (B, width, F, T) without `columns` of T, without `rows` of F.

    Each clip draws its own, from its own one of B generators.
    """
    assert rows < x.shape[2] and columns < x.shape[3], \
        f"no patch is left without {columns} columns and {rows} rows"
    kept = []
    for patches, g in zip(x, generators):                               # (width, F, T)
        row = torch.randperm(patches.shape[1], generator=g)[rows:].to(x.device)
        column = torch.randperm(patches.shape[2], generator=g)[columns:].to(x.device)
        kept.append(patches[:, row[:, None], column])
    return torch.stack(kept)


class PaSST(nn.Module):
    """The audio transformer of guidance (Table 2) and evaluation (Sect. 4.2).

    The paper preset has the official state dict's keys:
    load_official(PaSST(PASST_PRESETS["paper"]), path, PASST_FILE).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.width
        rows = (PASST_BANDS - 16) // config.stride + 1
        columns = (PASST_LONGEST - 16) // config.stride + 1
        # Two tokens more than patches, and learned positions: of the tokens, of rows, of columns.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.new_pos_embed = nn.Parameter(torch.zeros(1, 2, width))
        self.freq_new_pos_embed = nn.Parameter(torch.zeros(1, width, rows, 1))
        self.time_new_pos_embed = nn.Parameter(torch.zeros(1, width, 1, columns))
        # Patches, transformer, classifier.
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, width, 16, config.stride)})
        self.blocks = nn.ModuleList(PaSSTBlock(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.classes))
        # In the official file, but unused.
        self.head_dist = nn.Linear(width, config.classes).requires_grad_(False)
        # The initialisation of vision transformers.
        for name, p in self.named_parameters():
            if name.endswith(("token", "embed")) or p.dim() == 2:
                nn.init.trunc_normal_(p, std=0.02)
        # Of the mel spectrogram.
        window = torch.hann_window(800, periodic=False)
        triangles = mel_triangles(PASST_BANDS, 0, 15000, 513)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("triangles", triangles, persistent=False)

    def mel(self, mono):
        """mono (B, n) at 32 kHz in [-1, 1], n > 513 -> log-mel (B, 128, 1 + (n - 1) // 320)."""
        with full_precision(mono):                                      # powers overflow float16
            x = mono[:, 1:] - 0.97 * mono[:, :-1]                       # pre-emphasis
            X = torch.stft(x, 1024, 320, 800, self.window, pad_mode="reflect", return_complex=True)
            power = X.real**2 + X.imag**2                               # (B, 513, T)
            return ((self.triangles @ power + 1e-5).log() + 4.5) / 5

    def forward(self, mel, generators=(), patchout=(0, 0)):
        """mel (B, 128, T), 16 <= T <= 1005 -> logits (B, classes), embedding (B, width).

        For training, patchout = (time columns, frequency rows) are dropped at random by B
        generators: see drop_patches.
        """
        # Patches with their positions, some of them dropped in training.
        x = self.patch_embed.proj(mel[:, None])                         # (B, width, rows, columns)
        x = x + self.time_new_pos_embed[..., :x.shape[-1]] + self.freq_new_pos_embed
        if any(patchout):
            x = drop_patches(x, *patchout, generators)
        patches = x.flatten(2).transpose(1, 2)                          # (B, patches, width)

        # The two tokens, then the patches, through the transformer.
        heads = torch.cat([self.cls_token, self.dist_token], 1) + self.new_pos_embed
        x = torch.cat([heads.expand(len(x), -1, -1), patches], 1)       # (B, 2 + patches, width)
        for block in self.blocks:
            x = block(x)

        # The embedding is the mean of the two tokens.
        embedding = self.norm(x[:, :2]).mean(1)
        return self.head(embedding), embedding

    def listen(self, audio, rate):
        """audio (B, channels, n) at rate Hz, n > 0 -> logits (B, classes), embedding (B, width).

        Differentiable. Below 0.15 s zeros are appended; beyond 10 s both results are means over
        equal consecutive windows of at most 10 s.
        """
        with full_precision(audio):
            mono = resample(audio.mean(1), rate, PASST_RATE)
            mel = self.mel(F.pad(mono, (0, max(0, PASST_SHORTEST - mono.shape[-1]))))
            windows = mel.tensor_split(-(-mel.shape[-1] // PASST_LONGEST), dim=-1)
            logits, embeddings = zip(*(self(window) for window in windows))
        return torch.stack(logits).mean(0), torch.stack(embeddings).mean(0)
