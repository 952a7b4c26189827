"""Table 1 and Figure 1 for any model, and the metrics behind them: Sect. 4.2 and 4.3.

    python evaluate.py --model latent --data path/to/test --reference path/to/train --samplers ddim-50 ddpm-50
    python evaluate.py --generated edited/ --originals test/ --reference path/to/train        # any other system's files

Each clip's measurements are a small file under --out: an interrupted run goes on where it stopped, processes share the
work, and neither the order of clips nor the size of batches enters a figure.
"""
import argparse
import csv
import functools
import hashlib
import io
import json
import math
import os
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import sample
import tasks
import train
from tasks import PASST_FILE, PASST_PRESETS, PaSST, load_official, mel_triangles, resample
from train import SAMPLE_RATE, UserError

RESAMPLER = "sinc 48, roll-off 0.945, kaiser 12"       # tasks.resample
VGGISH_FILE = "vggish-10086976.pth, published on GitHub by harritaylor/torchvggish, release v0.1"


# ---- VGGish [27], the listener of FAD -------------------------------------------------------------------------------

class VGGish(nn.Module):
    """VGGish with the official state dict's keys: load_official(VGGish(), path, VGGISH_FILE). A patch is 0.96 s."""
    rate, shortest = 16000, 15600                          # Hz, samples that give one patch

    def __init__(self):
        super().__init__()
        layers, channels = [], 1
        for width in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool"):
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(nn.Linear(12288, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(),
                                        nn.Linear(4096, 128))
        self.register_buffer("window", torch.hann_window(400), persistent=False)
        self.register_buffer("triangles", mel_triangles(64, 125, 7500, 257), persistent=False)

    def patches(self, mono):
        """mono (B, n) at 16 kHz -> log-mel (B, P, 96, 64); what is left after the last whole patch is dropped."""
        mono = F.pad(mono, (0, max(0, 400 - mono.shape[-1])))
        frames = mono.unfold(-1, 400, 160) * self.window                                        # (B, frames, 400)
        mel = torch.fft.rfft(frames, 512).abs() @ self.triangles.T                              # (B, frames, 64)
        whole = mel.shape[1] // 96
        return (mel[:, :96 * whole] + 0.01).log().unflatten(1, (whole, 96))

    def forward(self, patches):
        """patches (P, 96, 64) -> (P, 128), the value before the last ReLU that some ports have: FAD wants that one."""
        x = self.features(patches[:, None])                                                     # (P, 512, 6, 4)
        return self.embeddings(x.permute(0, 2, 3, 1).flatten(1))

    def listen(self, audio, rate):
        """audio (B, channels, n) at rate Hz -> embeddings (B, P, 128), differentiable. ValueError below 0.975 s."""
        mono = resample(audio.mean(1), rate, self.rate)
        if mono.shape[-1] < self.shortest:
            raise ValueError(f"audio of {audio.shape[-1] / rate:.3f} s is too short for VGGish, which needs 0.975 s")
        patches = self.patches(mono)
        return self(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])


# ---- metrics --------------------------------------------------------------------------------------------------------

class GaussianStatistics:
    """Count, mean (d,) and covariance (d, d) of chunks (n, d) of embeddings, gathered one by one in float64."""

    def __init__(self, chunks):
        self.n, self.mean, self.scatter = 0, 0.0, 0.0
        for chunk in chunks:
            chunk = chunk.detach().to("cpu", torch.float64)
            k, mean = len(chunk), chunk.mean(0)
            delta, centred = mean - self.mean, chunk - mean
            self.scatter += centred.T @ centred + torch.outer(delta, delta) * (self.n * k / (self.n + k))
            self.mean = self.mean + delta * (k / (self.n + k))
            self.n += k

    @property
    def covariance(self):                                                                       # (d, d), over n - 1
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 embeddings, not {self.n}")
        return self.scatter / (self.n - 1)


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr cov1 + tr cov2 - 2 tr (cov1 cov2)^(1/2), a float; float64 tensors (d,) and (d, d).

    The trace of the root is the sum of the singular values of cov1^(1/2) cov2^(1/2): exact and real for any rank,
    without the epsilon and the complex roots of the usual code [26].
    """

    def root(cov):
        values, vectors = torch.linalg.eigh(cov)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    cross = torch.linalg.svdvals(root(cov1) @ root(cov2)).sum()
    return max(0.0, ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross).item())


def kl_divergence(p, q):
    """KL(p || q) in nats along the last axis, with 1e-6 inside the logarithm of q; p, q (..., classes) sum to 1.

    p is the reference. Table 1's is the set-level form, of the mean class posteriors (softmax) of two sets of clips;
    for pairs of clips, take the mean of the result.
    """
    return (torch.special.xlogy(p, p) - p * (q + 1e-6).log()).sum(-1)


@functools.lru_cache(maxsize=8)
def _slaney_filters(rate, n_fft, bands):
    """(bands, n_fft / 2 + 1): Slaney's mel, linear up to 1 kHz, then 27 to a factor of 6.4; triangles of equal area."""
    def to_hz(mel):
        return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))
    top = 15 + 27 * math.log(rate / 2000) / math.log(6.4)
    edges = to_hz(torch.linspace(0, top, bands + 2, dtype=torch.float64))[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    f = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    triangles = torch.minimum((f - left) / (centre - left), (right - f) / (right - centre)).clamp(min=0)
    return (triangles * 2 / (right - left)).float()


def mel_distance(x, y, rate):
    """MR, the mel-reconstruction distance of VampNet [31]: x, y (..., C, n) at rate Hz -> (...), means over the rest.

    Windows of 2048 and 512 samples (150 and 80 bands): |difference| of log10 mel power + |difference| of mel magnitude.
    """
    total = 0
    for n_fft, bands in ((2048, 150), (512, 80)):
        filters, window = _slaney_filters(rate, n_fft, bands).to(x.device), torch.hann_window(n_fft, device=x.device)

        def mel(z):
            z = F.pad(z, (0, max(0, n_fft // 2 + 1 - z.shape[-1])))                             # reflection needs that
            Z = torch.stft(z.reshape(-1, z.shape[-1]), n_fft, n_fft // 4, window=window, return_complex=True)
            return (filters @ Z.abs()).unflatten(0, z.shape[:-1])                           # (..., C, bands, frames)

        M_x, M_y = mel(x), mel(y)
        log_part = (M_x.clamp(min=1e-5).log10() - M_y.clamp(min=1e-5).log10()).abs() * 2
        total = total + (log_part + (M_x - M_y).abs()).mean((-3, -2, -1))
    return total


def realism(reference, generated, k=3, prune=True):
    """Realism score [32] of each generated embedding, (n_generated,) float64: above 1 is inside the reference manifold.

    max over reference points r of radius_r / |g - r|, where radius_r is r's distance to its k-th nearest neighbour;
    with prune, only over the half with the smaller radii. Plain distances, as in the formula of [32]; its code has
    squared ones, whose ratio of two scores is the square of this one's.
    """
    reference, generated = reference.double().cpu(), generated.double().cpu()
    if not 0 < k < len(reference):
        raise ValueError(f"realism needs more than k = {k} reference points, not {len(reference)}")

    def distances(points):                                 # exact ones: near points are what matters
        for some in points.split(512):
            yield torch.cdist(some, reference, compute_mode="donot_use_mm_for_euclid_dist")         # (512, n_reference)

    radius = torch.cat([d.kthvalue(k + 1).values for d in distances(reference)])           # the nearest is r itself
    kept = radius <= radius.quantile(0.5) if prune else radius >= 0
    return torch.cat([(radius / d.clamp(min=1e-12))[:, kept].amax(1) for d in distances(generated)])


# ---- listeners, and the training set as they hear it ----------------------------------------------------------------

@dataclass
class Listeners:
    """Who judges: `fad` gives the embeddings of FAD, `passt` the classes of KLD and the embeddings of realism."""
    fad: nn.Module
    passt: PaSST
    fad_name: str
    passt_name: str

    @torch.no_grad()
    def hear(self, audio):
        """audio (B, 2, n) at 44.1 kHz -> per clip a record of fad (P, d), posterior (classes,), embedding (width,)."""
        logits, embedding = self.passt.listen(audio, SAMPLE_RATE)
        patches = embedding[:, None] if self.fad is self.passt else self.fad.listen(audio, SAMPLE_RATE)
        heard = {"fad": patches.cpu(), "posterior": logits.cpu().double().softmax(-1), "embedding": embedding.cpu()}
        return [{key: value[i].clone() for key, value in heard.items()} for i in range(len(audio))]


def load_listeners(options, device):
    """The official networks, where their files are given; else the small PaSST of train.py --model classifier."""
    try:
        if options.passt:
            path, size = options.passt, "official"
            passt = load_official(PaSST(PASST_PRESETS["paper"]), path, PASST_FILE)
        else:
            checkpoint = train.open_checkpoint("classifier", options.listener)
            path, size, passt = checkpoint.path, checkpoint.size, checkpoint.net
        fad, fad_name = passt, passt_name = passt.to(device), f"PaSST {size} {sample.digest(path)[:8]}"
        if options.vggish:
            fad = load_official(VGGish(), options.vggish, VGGISH_FILE).to(device)
            fad_name = f"VGGish {sample.digest(options.vggish)[:8]}"
    except ValueError as error:
        raise UserError(str(error)) from None
    return Listeners(fad, passt, fad_name, passt_name)


def hear_reference(folder, lengths, listeners, options, device):
    """What the listeners hear in excerpts of the training music, at each length in samples: arrays for np.savez."""
    excerpts = find_excerpts(folder, max(lengths), options.reference_clips, options.seed)
    heard = {n: [] for n in lengths}
    for chunk in train.progress(chunks(excerpts, options.batch), "reference", unit="batch"):
        clips = [clip for clip, in read_all({excerpt: [excerpt] for excerpt in chunk}).values()]
        for n in lengths if clips else ():
            heard[n] += listeners.hear(torch.stack(clips)[..., :n].to(device))
    arrays = {"fad_listener": listeners.fad_name, "passt_listener": listeners.passt_name, "resampler": RESAMPLER,
              "folder": str(folder), "lengths": lengths, "count": len(heard[lengths[0]])}
    if arrays["count"] < 5:                                # realism needs more than k = 3
        raise UserError(f"--reference {folder} has under 5 usable excerpts of {lengths[-1] / SAMPLE_RATE:.2f} s")
    for n, records in heard.items():
        fad = GaussianStatistics(record["fad"] for record in records)
        arrays |= {f"{n}_fad_n": fad.n, f"{n}_fad_mean": fad.mean, f"{n}_fad_covariance": fad.covariance,
                   f"{n}_posterior": torch.stack([record["posterior"] for record in records]).mean(0),
                   f"{n}_embeddings": torch.stack([record["embedding"] for record in records])}
    return {key: np.asarray(value) for key, value in arrays.items()}


def load_reference(path, lengths, listeners):
    """The arrays of hear_reference, as tensors; UserError if they do not fit the listeners or the clips' lengths."""
    again = "give --reference the folder of training music to make it again"
    try:
        with np.load(path) as file:
            reference = {key: str(value) if value.dtype.kind == "U" else torch.from_numpy(value)
                         for key, value in file.items()}
        made_with = [reference[key] for key in ("fad_listener", "passt_listener", "resampler")]
        lengths_made = reference["lengths"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} does not hold statistics of evaluate.py ({type(error).__name__}): {again}") from None
    for found, wanted in zip(made_with, (listeners.fad_name, listeners.passt_name, RESAMPLER)):
        if found != wanted:
            raise UserError(f"{path} was made with {found}, not with {wanted}: {again}")
    for n in set(lengths) - set(lengths_made):
        raise UserError(f"{path} was made of clips of {[round(m / SAMPLE_RATE, 3) for m in lengths_made]} s, "
                        f"and {n / SAMPLE_RATE:.3f} s are needed: {again}")
    return reference


def prepare_reference(source, out, lengths, listeners, options, device):
    """`source` is a .npz file, or the folder of which such a file is made, once, in `out`."""
    if not Path(source).is_dir():
        return load_reference(source, lengths, listeners)
    path = out / "reference-{}.npz".format(short_hash(
        lengths, listeners.fad_name, listeners.passt_name, options.reference_clips, options.seed,
        [(path, os.stat(path).st_mtime_ns) for path in train.find_files([source])]))
    if train.RANK == 0 and not path.exists():
        buffer = io.BytesIO()
        np.savez(buffer, **hear_reference(source, lengths, listeners, options, device))
        path.parent.mkdir(parents=True, exist_ok=True)
        train.write_atomic(path, lambda file: file.write(buffer.getvalue()))
        train.say(f"{path} holds the statistics of {source}; it can be given as --reference")
    train.barrier()
    return load_reference(path, lengths, listeners)


# ---- clips: an excerpt is (path, first sample, samples) at 44.1 kHz -------------------------------------------------

@functools.cache
def say_once(text):
    train.say(text)


def short_hash(*facts):
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


def find_excerpts(folder, n, limit, seed):
    """Up to `limit` excerpts of n samples that do not overlap, in the order of the files: one at random of every file,
    then a second of every file that has one, and so on; where the limit falls within a turn, of files at random."""
    drawn = []
    for i, path in enumerate(train.find_files([folder])):
        facts = train.probe(path)
        whole = 0 if isinstance(facts, str) else facts[0] * SAMPLE_RATE // facts[1] // n
        if not whole:
            reason = facts if isinstance(facts, str) else f"shorter than {n / SAMPLE_RATE:.2f} s"
            say_once(f"skipped {train.show(path)}: {reason}")
        rng = train.random_numbers(seed, i)
        drawn += [(turn, rng.random(), (path, int(k) * n, n)) for turn, k in enumerate(rng.permutation(whole))]
    if not drawn:
        raise UserError(f"{folder} has no audio file of {n / SAMPLE_RATE:.2f} s or more")
    return sorted(excerpt for *_, excerpt in sorted(drawn)[:limit])


@functools.lru_cache(maxsize=1)
def read_track(path):
    return train.to_stereo_44k(*train.read_audio(path))


@functools.lru_cache(maxsize=256)                         # 0.5 GB at 6 s
def read_excerpt(path, start, n):
    """(2, n) float32; UserError if the file cannot be read there, or holds samples that are not numbers."""
    audio = read_track(path)[:, start:start + n].clone()
    if audio.shape[-1] < n or not audio.isfinite().all():
        raise UserError(f"shorter than {(start + n) / SAMPLE_RATE:.2f} s, or some samples are not numbers")
    return audio


def read_all(groups):
    """{key: [audio, ...]} of {key: [excerpt, ...]}, without the groups of which an excerpt cannot be read."""
    loaded = {}
    for key, excerpts in groups.items():
        try:
            loaded[key] = [read_excerpt(*excerpt) for excerpt in excerpts]
        except UserError as error:
            say_once(f"skipped {train.show(excerpts[0][0])}: {error} (or the track paired with it)")
    return loaded


def draw_pairs(excerpts, seed, count=None):
    """[(excerpt, excerpt of another track)]: of each excerpt in turn, or of `count` drawn at random."""
    pairs = []
    for j in range(count or len(excerpts)):
        rng = train.random_numbers(seed, j, 2)
        first = excerpts[rng.integers(len(excerpts))] if count else excerpts[j]
        others = [excerpt for excerpt in excerpts if excerpt[0] != first[0]] or excerpts
        pairs.append((first, others[rng.integers(len(others))]))
    return pairs


def chunks(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


# ---- the tasks of Sect. 4.3 -----------------------------------------------------------------------------------------

TASKS = ("unconditional", "infill", "regenerate", "continuation", "transition", "embedding")


@dataclass(frozen=True)
class Span:
    """Within the model's window, in samples: region [a, b) is generated, [c, d) is what the listeners hear."""
    a: int
    b: int
    c: int
    d: int


def layout(window, hop):
    """{task: Span} for a model whose window is so many samples long, in frames of `hop` samples.

    Sect. 4.3's times, contexts rounded inwards to whole frames; "6 s" is the window where that is 5.94 s. Windows under
    5.9 s (tiny models) get everything in proportion; in longer ones the clip of 6 s lies around the region.
    """
    clip = min(window, 6 * SAMPLE_RATE)
    second = SAMPLE_RATE * (1 if clip >= 5.9 * SAMPLE_RATE else clip / (6 * SAMPLE_RATE))

    def centred(seconds):
        a = int((window - seconds * second) / 2 // hop) * hop
        c = (window - clip) // 2
        return Span(a, window - a, c, c + clip)

    whole = Span(0, window, 0, round(5 * second))
    after_prompt = Span(int(2.4 * second // hop) * hop, window, 0, clip)
    return {"unconditional": whole, "embedding": whole, "continuation": after_prompt, "transition": centred(2.5),
            "infill": centred(2), "regenerate": centred(2)}


def edit(checkpoint, task, x, span, passt, settings, generators, callback):
    """The model's own, unspliced audio (B, 2, window) for x (B, 2, window); a transition's x is the raw cross-fade."""
    guides = ()
    if task == "embedding":
        def listen(audio):
            return passt.listen(audio[..., span.c:span.d], SAMPLE_RATE)[1]
        y, step = listen(x), sample.XI_GUIDE["embedding"]
        guides = (lambda z: tasks.embedder_guidance(lambda x_0: listen(checkpoint.decode(x_0)), y, z, step),)
    return sample.fill(checkpoint, x, span.a // checkpoint.hop, checkpoint.window - span.b // checkpoint.hop, settings,
                       generators, from_x_bar=task in sample.FROM_X_BAR, guides=guides, callback=callback)


# ---- rows -----------------------------------------------------------------------------------------------------------

WHOLE, EDITED = ("unconditional",), ("infill", "continuation")
EVERY = (*WHOLE, *EDITED, "transition")
STAND_IN = {"regenerate": "infill", "embedding": "unconditional"}      # for rows that would give the same


@dataclass(frozen=True)
class Row:
    """A line of Table 1. produce(task, x, other, [j], tick) -> audio (B, 2, window), where x (B, 2, window) is the
    original (of a transition, the raw cross-fade), other is of another track, and j are the clips' numbers; it calls
    tick() as many times as `cost` says, or not at all."""
    name: str
    tasks: tuple
    produce: Callable
    cost: int = 1


TEST_SET = Row("Test set", (*EVERY, "files"), lambda task, x, *_: x)


def simple_rows(evaluation):
    """The rows that keep the others honest: what fills the region, or is done to a whole clip, without any model."""
    def noise(x, js):                                    # white, at the clip's level
        drawn = torch.stack([torch.randn(x.shape[1:], generator=evaluation.generator(j, 1)) for j in js]).to(x.device)
        return drawn * x.square().mean((1, 2), keepdim=True).sqrt()

    def fill(content):
        def produce(task, x, other, js, tick):
            a, b = evaluation.spans[task].a, evaluation.spans[task].b
            return torch.cat([x[..., :a], content(x, other, js, a)[..., a:b], x[..., b:]], -1)
        return produce

    def low_pass(task, x, *_):
        return resample(resample(x, SAMPLE_RATE, 8000), 8000, SAMPLE_RATE)[..., :x.shape[-1]]

    return [TEST_SET,
            Row("Silence", EVERY, fill(lambda x, *_: torch.zeros_like(x))),
            Row("White noise", EVERY, fill(lambda x, other, js, a: noise(x, js))),
            Row("Context repeated", EDITED, fill(lambda x, other, js, a: x[..., torch.arange(x.shape[-1]) % a])),
            Row("Another track", EDITED, fill(lambda x, other, *_: other)),
            Row("Low-pass 4 kHz", WHOLE, low_pass),
            Row("Noise at 0 dB", WHOLE, lambda task, x, other, js, tick: x + noise(x, js))]


def model_rows(evaluation, checkpoint):
    """The VAE's reconstruction, for a latent model, and a row for each sampler."""
    options, rows = evaluation.options, []
    if checkpoint.kind == "latent":
        rows.append(Row("VAE", EVERY, lambda task, x, *_: checkpoint.decode(checkpoint.encode(x))))
    for sampler, steps in options.samplers:
        chosen = argparse.Namespace(**vars(options), sampler=sampler, steps=steps)
        settings = sample.Settings.of(chosen, checkpoint.kind)

        def produce(task, x, other, js, tick, settings=settings):
            return edit(checkpoint, task, x, evaluation.spans[task], evaluation.listeners.passt, settings,
                        [evaluation.generator(j) for j in js], lambda step: tick())

        rows.append(Row(f"{checkpoint.kind.title()} {sampler.upper()} {steps}", options.tasks, produce, steps))
    return rows


# ---- measuring ------------------------------------------------------------------------------------------------------

class Evaluation:
    """Measures rows clip by clip, each clip's record a file of its own, and makes figures of the records."""

    def __init__(self, out, settings, pairs, spans, listeners, reference, options, device):
        """settings: all that a record depends on, besides its row and task; pairs: {task: [(excerpt, excerpt of another
        track)]}; spans: {task: Span}; reference: see load_reference."""
        self.folder = out / "records" / short_hash(settings)
        self.names = {task: [f"{j:06d}-{short_hash(pair, [os.stat(path).st_mtime_ns for path, *_ in pair])}.pt"
                             for j, pair in enumerate(clips)] for task, clips in pairs.items()}
        self.pairs, self.spans, self.listeners = pairs, spans, listeners
        self.reference, self.options, self.device = reference, options, device

    def file(self, row, task, j):
        return self.folder / row.lower().replace(" ", "-") / task / self.names[task][j]

    def generator(self, j, stream=0):
        """The random numbers of clip j, the same for every row."""
        return torch.Generator().manual_seed(int(train.random_numbers(self.options.seed, j, stream).integers(2**62)))

    def run(self, rows):
        """Measure every clip of every row that has no record yet; the processes share them."""
        jobs = [(row, task, [j for j in chunk if not self.file(row.name, task, j).exists()])
                for task, pairs in self.pairs.items()
                for chunk in chunks(range(train.RANK, len(pairs), train.WORLD), self.options.batch)
                for row in rows if task in row.tasks]    # innermost: each clip is decoded for all rows at once
        total = sum(row.cost * len(chunk) for row, _, chunk in jobs)
        with train.progress(total=total, unit="step") as bar:
            for row, task, chunk in filter(lambda job: job[2], jobs):
                bar.set_description(f"{row.name}, {task}")
                target = bar.n + row.cost * len(chunk)
                self.measure(row, task, chunk, lambda: bar.update(len(chunk)))
                bar.update(target - bar.n)
        train.barrier()

    @torch.no_grad()
    def measure(self, row, task, chunk, tick):
        loaded = read_all({j: self.pairs[task][j] for j in chunk})
        if not loaded:
            return
        first, other = (torch.stack(clips).to(self.device) for clips in zip(*loaded.values()))        # (B, 2, window)
        span, window = self.spans[task], first.shape[-1]
        x = tasks.crossfade(first, other, span.a, window - span.b) if task == "transition" else first
        made = row.produce(task, x, other, list(loaded), tick)[..., :window]
        for j, record in zip(loaded, self.judge(made, x, first, span)):
            path = self.file(row.name, task, j)
            path.parent.mkdir(parents=True, exist_ok=True)
            train.save_atomic(path, record)

    def judge(self, made, x, first, span):
        """One record per clip: what was heard, MR on the region and on the clip, Figure 1's curve, two flags."""
        finite, made = made.isfinite().all(-1).all(-1), made.nan_to_num()
        clip, region = slice(span.c, span.d), slice(max(span.a, span.c), min(span.b, span.d))
        width = max(2, (region.stop - region.start) // 10)   # Figure 1: 19 windows, overlapping by half
        along = [z[..., region].unfold(-1, width, width // 2).transpose(1, 2)[:, :19] for z in (made, first)]
        values = {"MR": mel_distance(made[..., region], x[..., region], SAMPLE_RATE),
                  "MR clip": mel_distance(made[..., clip], x[..., clip], SAMPLE_RATE),
                  "curve": mel_distance(*along, SAMPLE_RATE),
                  "silent": made[..., clip].abs().amax((1, 2)) < 1e-4, "finite": finite}
        records = self.listeners.hear(made[..., clip])
        return [record | {key: value[i].cpu() for key, value in values.items()} for i, record in enumerate(records)]

    def records(self, row, task):
        """{j: record}, in order, without the clips in which some sample is not a number."""
        files = {j: self.file(row, task, j) for j in range(len(self.pairs.get(task, ())))}
        records = {j: torch.load(file, weights_only=True) for j, file in files.items() if file.exists()}
        return {j: record for j, record in records.items() if record["finite"]}

    def figures(self, row, task):
        """{metric: (value, standard deviation or None, count)} of a row, for one task."""
        records, originals = self.records(row, task), self.records("Test set", STAND_IN.get(task, task))
        both = sorted(records.keys() & originals.keys())
        if len(both) < 2:
            return {}
        keys = ("posterior", "embedding", "MR", "MR clip", "silent")
        of, original = ({key: torch.stack([group[j][key].double() for j in both]) for key in keys}
                        for group in (records, originals))
        length = self.spans[task].d - self.spans[task].c
        mean, covariance, posterior, embeddings = (
            self.reference[f"{length}_{key}"] for key in ("fad_mean", "fad_covariance", "posterior", "embeddings"))
        heard = GaussianStatistics(records[j]["fad"] for j in both)
        if heard.n <= len(mean):
            say_once(f"warning: FAD from n = {heard.n} embeddings of {len(mean)} dimensions is biased far upwards; "
                     "compare at equal n only")
        made = {"FAD": (frechet_distance(mean, covariance, heard.mean, heard.covariance), None, heard.n),
                "KLD": (kl_divergence(posterior, of["posterior"].mean(0)).item(), None, len(both)),
                "KLD paired": (kl_divergence(original["posterior"], of["posterior"]).mean().item(), None, len(both)),
                "silent": (of["silent"].mean().item(), None, len(both))}
        if task not in ("unconditional", "embedding", "transition"):
            made |= {key: (of[key].mean().item(), None, len(both)) for key in ("MR", "MR clip")}
        if task == "transition":
            ratio = realism(embeddings, of["embedding"]) / realism(embeddings, original["embedding"])
            made["Realism"] = (ratio.mean().item(), ratio.std().item(), len(both))
        return made


# ---- Table 1 and Figure 1 -------------------------------------------------------------------------------------------

COLUMNS = (("Files", ("files",), ("FAD", "KLD", "MR")),
           ("Unconditional", ("unconditional",), ("FAD", "KLD")),
           ("Infill/Regeneration", ("infill", "regenerate"), ("FAD", "KLD", "MR")),
           ("Continuation", ("continuation",), ("FAD", "KLD", "MR")),
           ("Transitions", ("transition",), ("Realism",)),
           ("Cl. Guidance", ("embedding",), ("FAD", "KLD")))


def row_figures(evaluation, row, tasks_wanted):
    """{task: figures} of a row; a task that it was not measured for takes those of its stand-in."""
    sources = {task: task if task in row.tasks else STAND_IN.get(task) for task in tasks_wanted}
    return {task: evaluation.figures(row.name, source) for task, source in sources.items() if source in row.tasks}


def table(results):
    """Table 1 as lines of text, in the paper's order of columns; results: {row: {task: {metric: (value, std, n)}}}."""
    def text(value, std, n):
        return f"{round(value, 2) + 0.0:.2f}" + (f"±{std:.2f}" if std is not None else "")          # never -0.00

    def cell(row, names, metric):
        texts = [text(*found[metric]) for found in map(results[row].get, names) if found and metric in found] or ["-"]
        return "/".join(texts if len(set(texts)) > 1 else texts[:1])

    columns = [["", *results]]
    for title, names, metrics in COLUMNS:
        for i, metric in enumerate(metrics):
            cells = [cell(row, names, metric) for row in results]
            if set(cells) != {"-"}:
                columns.append([metric if i else f"{title} {metric}", *cells])
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in zip(*columns)]


def write_results(out, results, settings):
    """table.csv, a line for each figure, and table.json, the same with the settings; prints the table."""
    listeners = {"FAD": settings["fad_listener"],
                 **dict.fromkeys(("KLD", "KLD paired", "Realism"), settings["passt_listener"])}
    lines = [dict(row=row, task=task, metric=metric, value=value, std=std, n=n, listener=listeners.get(metric, ""))
             for row, by_task in results.items() for task, found in by_task.items()
             for metric, (value, std, n) in found.items()]
    if not lines:
        raise UserError("nothing could be measured: at least two clips are needed", 1)
    (out / "table.json").write_text(json.dumps({"settings": settings, "figures": lines}, indent=1))
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    clips = sorted({f"{line['n']} {line['task']}" for line in lines if line["metric"] == "KLD"})
    print("\n".join(table(results)))
    print(f"clips: {', '.join(clips)}; reference: {settings['reference_count']} excerpts\n"
          f"FAD by {settings['fad_listener']}; KLD (of the sets) and realism by {settings['passt_listener']}\n"
          f"all figures: {out / 'table.csv'}")


def figure1(evaluation, rows, out):
    """Figure 1 as figure1.csv and figure1.svg: mean mel distance to the first track, along the transition."""
    found = {row.name: evaluation.records(row.name, "transition").values() for row in rows}
    curves = {name: torch.stack([record["curve"] for record in records]).mean(0).tolist()
              for name, records in found.items() if records}
    length = (evaluation.spans["transition"].b - evaluation.spans["transition"].a) / SAMPLE_RATE
    seconds = [(k + 1) / 20 * length for k in range(19)]                                        # middles of the windows
    with open(out / "figure1.csv", "w", newline="") as file:
        csv.writer(file).writerows([["seconds", *curves], *zip(seconds, *curves.values())])
    (out / "figure1.svg").write_text(plot(seconds, curves))


def plot(seconds, curves):
    """The curves {name: values} as a plain SVG of 720 x 360."""
    top = max(map(max, curves.values())) * 1.05
    svg = ['<svg xmlns="http://www.w3.org/2000/svg" width="720" height="360" font-family="sans-serif" font-size="12">',
           '<path d="M50 20V310H530" fill="none" stroke="black"/>',
           '<text x="50" y="12">mel distance to the first track</text>',
           '<text x="220" y="350">seconds into the transition</text>']
    for i in range(5):
        svg += [f'<text x="{40 + 120 * i}" y="328">{seconds[-1] * i / 4:.2f}</text>',
                f'<text x="44" y="{314 - 72.5 * i}" text-anchor="end">{top * i / 4:.1f}</text>']
    for i, (name, values) in enumerate(curves.items()):
        colour = f"hsl({360 * i // len(curves)} 70% 40%)"
        points = [f"{50 + 480 * x / seconds[-1]:.1f},{310 - 290 * y / top:.1f}" for x, y in zip(seconds, values)]
        svg += [f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>',
                f'<text x="545" y="{30 + 16 * i}" fill="{colour}">{name}</text>']
    return "\n".join([*svg, "</svg>", ""])


# ---- command line ---------------------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add, whole = parser.add_argument, train.within(1, 2**31, int)
    add("--model", choices=("latent", "waveform"), default="latent")
    add("--checkpoint", help="default: the shipped one, else that of the default training run")
    add("--data", help="folder of test music")
    add("--reference", required=True, help="folder of training music, or the .npz file made of it")
    add("--generated", help="folder of edited clips made by any system, to be compared with those of the same name in")
    add("--originals", help="this folder")
    add("--region", type=float, nargs=2, metavar=("START", "END"), help="seconds of --generated that were generated")
    add("--tasks", nargs="+", choices=TASKS, default=TASKS)
    add("--samplers", nargs="*", type=sampler_and_steps, default=[("ddim", 50)],
        help="for instance ddim-50 ddpm-500; none: only the rows that need no sampling")
    add("--clips", type=whole, default=100, help="excerpts of the test music for each task")
    add("--transitions", type=whole, default=100)
    add("--figure1", action="store_true", help="write figure1.csv and figure1.svg")
    add("--listener", help="checkpoint of train.py --model classifier, who judges by default")
    add("--passt", help=f"official PaSST file, {PASST_FILE}".replace("%", "%%"))
    add("--vggish", help=f"official VGGish file, {VGGISH_FILE}")
    sample.Settings.add_flags(add)
    add("--reference-clips", type=whole, default=10_000, help="at most so many excerpts of the training music")
    add("--batch", type=whole, default=8)
    add("--seed", type=train.within(0, 2**63, int), default=0)
    add("--device", default="auto")
    add("--out", type=Path, help="default runs/evaluate-MODEL; what is measured there already is kept")
    return parser.parse_args(argv)


def sampler_and_steps(text):
    name, _, steps = text.partition("-")
    if name not in ("ddim", "ddpm") or not steps.isdigit() or int(steps) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ddim-50 or ddpm-500")
    return name, int(steps)


def plan_files(options):
    """(pairs, spans) to score files that any system made: clips of the same name in --originals and --generated."""
    originals = {Path(path).stem: path for path in train.find_files([options.originals])}
    lengths = {}
    for path in train.find_files([options.generated]):
        facts = train.probe(path) if Path(path).stem in originals else "--originals has no file of this name"
        if isinstance(facts, str):
            say_once(f"skipped {train.show(path)}: {facts}")
        else:
            lengths[path] = facts[0] * SAMPLE_RATE // facts[1]
    if not lengths:
        raise UserError(f"--generated {options.generated} has no audio file with the name of one in --originals")
    n = max(set(lengths.values()), key=list(lengths.values()).count)                       # the usual length
    a, b = (round(seconds * SAMPLE_RATE) for seconds in options.region or (0, n / SAMPLE_RATE))
    if not 0 <= a < b <= n:
        raise UserError(f"--region must lie within the clips' {n / SAMPLE_RATE:.3f} s")
    pairs = [((originals[Path(path).stem], 0, n), (path, 0, n)) for path in lengths]       # reading skips shorter ones
    return {"files": pairs}, {"files": Span(a, b, 0, n)}


def plan_tasks(options, checkpoint):
    """(pairs, spans) for the tasks of Sect. 4.3 on excerpts of --data."""
    window = checkpoint.window * checkpoint.hop
    excerpts = find_excerpts(options.data, window, options.clips, options.seed)
    spans = layout(window, checkpoint.hop)
    for task in options.tasks:
        a, b = spans[task].a / SAMPLE_RATE, min(spans[task].b, spans[task].d) / SAMPLE_RATE
        train.say(f"{task}: {a:.3f} to {b:.3f} s of {window / SAMPLE_RATE:.3f} s")
    pairs = dict.fromkeys([*options.tasks, *(STAND_IN.get(task, task) for task in options.tasks)],
                          draw_pairs(excerpts, options.seed))
    if "transition" in pairs:
        pairs["transition"] = draw_pairs(excerpts, options.seed, options.transitions)
    return pairs, spans


def main(argv=None):
    options = parse(argv)
    device, checkpoint = train.pick_device(options.device), None
    train.join_processes(device)
    torch.backends.cudnn.allow_tf32 = False              # its 10 bits would show in the resampler and in embeddings
    listeners = load_listeners(options, device)
    kept = {name: getattr(options, name) for name in ("seed", "clips", "transitions", "data", "generated", "originals",
                                                      "region")}
    kept |= {"fad_listener": listeners.fad_name, "passt_listener": listeners.passt_name, "resampler": RESAMPLER}
    if options.figure1 and (options.generated or "transition" not in options.tasks):
        raise UserError("--figure1 draws transitions: give it --data and a --tasks with transition")
    if options.generated and options.originals:
        pairs, spans = plan_files(options)
    elif not options.data:
        raise UserError("--data is missing: give a folder of test music (or both --generated and --originals)")
    else:
        checkpoint = train.open_checkpoint(options.model, options.checkpoint, device)
        kept |= {"checkpoint": sample.digest(checkpoint.path)[:8], "kind": checkpoint.kind, "step": checkpoint.step}
        chosen = argparse.Namespace(**vars(options), sampler=None, steps=None)
        kept |= asdict(sample.Settings.of(chosen, checkpoint.kind))
        pairs, spans = plan_tasks(options, checkpoint)
    out = options.out or Path("runs") / f"evaluate-{checkpoint.kind if checkpoint else 'files'}"
    lengths = sorted({span.d - span.c for task, span in spans.items() if task in pairs})
    reference = prepare_reference(options.reference, out, lengths, listeners, options, device)
    evaluation = Evaluation(out, kept, pairs, spans, listeners, reference, options, device)
    if checkpoint:
        rows = model_rows(evaluation, checkpoint) + simple_rows(evaluation)
    else:
        rows = [Row("Generated", ("files",), lambda task, x, other, *_: other), TEST_SET]
    evaluation.run(rows)
    if train.RANK == 0:
        results = {row.name: row_figures(evaluation, row, options.tasks if checkpoint else pairs) for row in rows}
        write_results(out, results, kept | {"reference_count": int(reference["count"])})
        if options.figure1:
            figure1(evaluation, rows, out)


if __name__ == "__main__":
    train.run(main)
