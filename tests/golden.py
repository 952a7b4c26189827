"""Golden vectors: what the metrics and their networks must give, computed a second time.

    python tests/golden.py          # writes tests/golden.npz, which tests/test_evaluate.py reads

Everything here is written from the formulas of the papers and the constants of the official
networks, in plain numpy and float64, and shares no line with evaluate.py and tasks.py: no torch,
direct sums instead of library filters, another form of the same equation where there is one (the
trace of the root by eigenvalues, neighbours by sorting). Inputs are made by a recipe.
"""
import math
import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".npz")
PASST = {"classes": 7, "width": 48, "depth": 2, "heads": 3}     # a small network of that shape


# ---- the recipe ----------------------------------------------------------------------------------

def draw(name, *shape):
    """Standard normal numbers that depend on the name and the shape only."""
    return np.random.Generator(np.random.Philox(zlib.crc32(name.encode()))).standard_normal(shape)


def signal(name, rate, seconds, channels=2):
    """(channels, n): a rising tone, noise 20 dB below it and a moment of silence."""
    t = np.arange(round(rate * seconds)) / rate
    rise = 0.15 * rate * t**2 / seconds
    tone = np.sin(2 * np.pi * np.stack([(200 + 100 * c) * t + rise for c in range(channels)]))
    sounding = (t < 0.4 * seconds) | (t > 0.45 * seconds)
    return (0.3 * tone + 0.03 * draw(name, channels, len(t))) * sounding


def weights(shapes):
    """{key: float32 array} for {key: shape}.

    Matrices keep the variance of a ReLU network, gains lie around 1.
    """
    def array(key, shape):
        z = draw(key, *shape)
        if len(shape) == 1:
            return 0.1 * z if key.endswith("bias") else 1 + 0.2 * z
        if key.endswith(("_token", "_embed")):
            return 0.3 * z
        return z * math.sqrt(2 / np.prod(shape[1:]))
    return {key: array(key, shape).astype(np.float32) for key, shape in shapes.items()}


def vggish_shapes():
    layers = {}
    for i, m, n in ((0, 1, 64), (3, 64, 128), (6, 128, 256), (8, 256, 256), (11, 256, 512),
                    (13, 512, 512)):
        layers[f"features.{i}"] = (n, m, 3, 3)
    for i, m, n in ((0, 12288, 4096), (2, 4096, 4096), (4, 4096, 128)):
        layers[f"embeddings.{i}"] = (n, m)
    return {f"{name}.{part}": shape if part == "weight" else shape[:1]
            for name, shape in layers.items() for part in ("weight", "bias")}


def passt_shapes(classes, width, depth, heads):
    shapes = {"cls_token": (1, 1, width), "dist_token": (1, 1, width),
              "new_pos_embed": (1, 2, width), "freq_new_pos_embed": (1, width, 12, 1),
              "time_new_pos_embed": (1, width, 1, 99)}
    layers = {"patch_embed.proj": (width, 1, 16, 16), "norm": (width,), "head.0": (width,),
              "head.1": (classes, width), "head_dist": (classes, width)}
    block = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width),
             "norm2": (width,), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for i in range(depth):
        layers |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes | {f"{name}.{part}": shape if part == "weight" else shape[:1]
                     for name, shape in layers.items() for part in ("weight", "bias")}


# ---- VGGish and PaSST ----------------------------------------------------------------------------

def triangles(edges, at):
    """(bands, points): triangles of peak 1 at the points `at`, from an edge to the next but one."""
    return np.array([np.interp(at, edges[i:i + 3], [0, 1, 0]) for i in range(len(edges) - 2)])


def htk(hertz):
    return 1127 * np.log(1 + np.asarray(hertz) / 700)


def vggish_patches(mono):
    """(n,) at 16 kHz -> log-mel (P, 96, 64)."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.array([mono[i:i + 400] * window for i in range(0, len(mono) - 399, 160)])
    bands = triangles(np.linspace(htk(125), htk(7500), 66), htk(np.arange(257) * 31.25))
    mel = np.log(np.abs(np.fft.rfft(frames, 512)) @ bands.T + 0.01)
    return mel[:len(mel) // 96 * 96].reshape(-1, 96, 64)


def vggish(w, patches):
    """(P, 96, 64) -> (P, 128), before the last ReLU."""
    x = patches[:, None]
    for i, pool in ((0, True), (3, True), (6, False), (8, True), (11, False), (13, True)):
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        near = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
        x = np.tensordot(near, w[f"features.{i}.weight"], ((1, 4, 5), (1, 2, 3)))
        x = np.maximum(x + w[f"features.{i}.bias"], 0)                           # channels last
        x = x.transpose(0, 3, 1, 2)                                     # (P, channels, t, f)
        if pool:
            x = x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2).max((3, 5))
    x = x.transpose(0, 2, 3, 1).reshape(len(x), -1)                             # channels last
    for i in (0, 2, 4):
        x = np.maximum(x, 0) @ w[f"embeddings.{i}.weight"].T.astype(float)
        x = x + w[f"embeddings.{i}.bias"]
    return x


def passt_mel(mono):
    """(n,) at 32 kHz -> (128, T)."""
    x = np.pad(mono[1:] - 0.97 * mono[:-1], 512, "reflect")
    window = np.zeros(1024)
    window[112:912] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(800) / 799)      # symmetric
    frames = np.array([x[i:i + 1024] * window for i in range(0, len(x) - 1023, 320)])
    bands = triangles(np.linspace(htk(0), htk(15000), 130), htk(np.arange(513) * 31.25))
    return ((np.log(np.abs(np.fft.rfft(frames)) ** 2 @ bands.T + 1e-5) + 4.5) / 5).T


def passt(w, mel, classes, width, depth, heads):
    """(128, T) -> logits (classes,), embedding (width,)."""
    def linear(name, x):
        return x @ w[name + ".weight"].T.astype(float) + w[name + ".bias"]

    def norm(name, x, eps=1e-6):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * w[name + ".weight"] + w[name + ".bias"]

    every = np.lib.stride_tricks.sliding_window_view(mel, (16, 16))
    patches = every[::10, ::10]                                                 # (12, t, 16, 16)
    grid = np.tensordot(patches, w["patch_embed.proj.weight"][:, 0], ((2, 3), (1, 2)))
    grid = grid + w["patch_embed.proj.bias"]
    grid = grid + w["time_new_pos_embed"][0, :, 0].T[:grid.shape[1]]
    grid = grid + w["freq_new_pos_embed"][0, :, :, 0].T[:, None]
    ends = np.stack([w["cls_token"][0, 0], w["dist_token"][0, 0]]) + w["new_pos_embed"][0]
    x = np.concatenate([ends, grid.reshape(-1, width)])
    for i in range(depth):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
        q, k, v = qkv.reshape(len(x), 3, heads, -1).transpose(1, 2, 0, 3)       # (heads, tokens, d)
        a = np.exp(q @ k.transpose(0, 2, 1) / math.sqrt(width // heads))
        a = (a / a.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(x), width)
        x = x + linear(f"blocks.{i}.attn.proj", a)
        h = linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))
        h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        x = x + linear(f"blocks.{i}.mlp.fc2", h)
    embedding = norm("norm", x)[:2].mean(0)
    return linear("head.1", norm("head.0", embedding, 1e-5)), embedding


# ---- metrics -------------------------------------------------------------------------------------

def embeddings():
    """Two sets (40, 12), (30, 12): one Gaussian, and one moved, stretched and turned."""
    turned = draw("two", 30, 12) @ draw("turn", 12, 12)
    return draw("one", 40, 12), 1.3 * turned / math.sqrt(12) + 0.2


def frechet(x, y):
    """With the trace of the root of the product as the sum of the roots of its eigenvalues."""
    (m1, S1), (m2, S2) = ((z.mean(0), np.cov(z.T)) for z in (x, y))
    root = np.sqrt(np.maximum(np.linalg.eigvals(S1 @ S2).real, 0)).sum()
    return ((m1 - m2) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * root


def posteriors():
    """The mean posteriors (20,) of two sets of clips."""
    odds = np.exp(2 * draw("logits", 2, 9, 20))
    return (odds / odds.sum(-1, keepdims=True)).mean(1)


def kl(p, q):
    return (p * np.log(p / (q + 1e-6))).sum()


def mel_distance(x, y, rate=44100):
    """The mean over channels, bands and frames, summed over two windows."""
    def mels(z, n, bands):
        step = math.log(6.4) / 27
        top = 15 + math.log(rate / 2 / 1000) / step
        points = np.linspace(0, top, bands + 2)
        # Slaney's scale, and triangles of equal area.
        edges = np.where(points < 15, points * 200 / 3, 1000 * np.exp((points - 15) * step))
        filters = triangles(edges, np.linspace(0, rate / 2, n // 2 + 1))
        filters = filters * 2 / (edges[2:] - edges[:-2])[:, None]
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)
        z = np.pad(z, ((0, 0), (n // 2, n // 2)), "reflect")
        frames = np.stack([z[:, i:i + n] * window for i in range(0, z.shape[1] - n + 1, n // 4)], 1)
        return np.abs(np.fft.rfft(frames)) @ filters.T                          # (C, frames, bands)

    total = 0
    for n, bands in ((2048, 150), (512, 80)):
        X, Y = mels(x, n, bands), mels(y, n, bands)
        logarithms = np.log10(np.maximum(X, 1e-5) ** 2) - np.log10(np.maximum(Y, 1e-5) ** 2)
        total += np.abs(logarithms).mean() + np.abs(X - Y).mean()
    return total


def realism(reference, generated, k, prune):
    def distances(x):
        return np.sqrt(((x[:, None] - reference) ** 2).sum(-1))
    radius = np.sort(distances(reference))[:, k]                                # 0: a point itself
    kept = radius <= np.median(radius) if prune else slice(None)
    return (radius[kept] / distances(generated)[:, kept]).max(1)


def compute():
    one, two = embeddings()
    x, y = signal("x", 44100, 0.3), signal("y", 44100, 0.3)
    patches = vggish_patches(signal("v", 16000, 1.0).mean(0))
    mel = passt_mel(signal("p", 32000, 0.5).mean(0))
    logits, embedding = passt(weights(passt_shapes(**PASST)), mel, **PASST)
    return {"vggish_patches": patches[:, ::8], "vggish": vggish(weights(vggish_shapes()), patches),
            "passt_mel": mel[:, ::5], "passt_logits": logits, "passt_embedding": embedding,
            "frechet": frechet(one, two), "kl": kl(*posteriors()),
            "mel_distance": [mel_distance(x, y), mel_distance(x, x / 2), mel_distance(x, 0 * x)],
            "realism": realism(one, two, 3, True), "realism_all": realism(one, two, 5, False)}


if __name__ == "__main__":
    arrays = {}
    for name, value in compute().items():
        kind = np.float32 if np.size(value) > 200 else np.float64
        arrays[name] = np.asarray(value, kind)
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size / 1000:.1f} kB")
