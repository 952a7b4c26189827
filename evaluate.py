"""Table 1 and Figures 1 and 2 for any model, and the metrics behind them: Sect. 4.2 to 4.4.

    python evaluate.py --model latent --data path/to/test --reference path/to/train
    python evaluate.py --generated edited/ --originals test/ --reference path/to/train     # any other system's files
    python evaluate.py --figure2 ours=edited/ original=test/                # Figure 2: examples/figure2.py

Each clip's measurements are a small file under --out: an interrupted run goes on where it stopped, processes share the
work, and neither the order of clips nor the size of batches enters a figure. A run measures one sampler; runs of one
checkpoint with the same --out add up to one table.
"""
import argparse
import functools
import hashlib
import json
import math
import os
import statistics
from collections import namedtuple
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

import sample
import tasks
from examples import figure2
from tasks import PASST_FILE, PASST_PRESETS, PaSST, full_precision, load_official, mel_triangles, resample
from sample import SAMPLE_RATE, UserError

VGGISH_FILE = "vggish-10086976.pth, published on GitHub by harritaylor/torchvggish, release v0.1"
say_once = functools.cache(sample.say)


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
        """audio (B, channels, n) at rate Hz -> embeddings (B, P, 128), differentiable. UserError below 0.975 s."""
        mono = resample(audio.mean(1), rate, self.rate)
        if mono.shape[-1] < self.shortest:
            raise UserError(f"audio of {audio.shape[-1] / rate:.3f} s is too short for VGGish, which needs 0.975 s")
        with full_precision(audio):
            patches = self.patches(mono)
            return self(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])


# ---- metrics --------------------------------------------------------------------------------------------------------

def gaussian(embeddings):
    """Mean (d,) and covariance (d, d), over n - 1, of embeddings (n, d), float64. ValueError for fewer than two."""
    if len(embeddings) < 2:
        raise ValueError(f"a covariance needs at least 2 embeddings, not {len(embeddings)}")
    embeddings = embeddings.cpu().double()
    return embeddings.mean(0), embeddings.T.cov()


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

    p is the reference. Table 1's is of the mean class posteriors (softmax) of two sets of clips.
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
    with prune, only over the half with the smaller radii. Plain distances, as in the formula; the code of [32] squares.
    """
    reference, generated = reference.cpu().double(), generated.cpu().double()
    if not 0 < k < len(reference):
        raise ValueError(f"realism needs more than k = {k} reference points, not {len(reference)}")
    def distances(points):                                 # exact ones: near points are what matters
        for some in points.split(512):
            yield torch.cdist(some, reference, compute_mode="donot_use_mm_for_euclid_dist")         # (512, n_reference)
    radius = torch.cat([d.kthvalue(k + 1).values for d in distances(reference)])           # the nearest is r itself
    kept = radius <= radius.quantile(0.5) if prune else radius >= 0
    return torch.cat([(radius / d.clamp(min=1e-12))[:, kept].amax(1) for d in distances(generated)])


# ---- listeners, and the training set as they hear it ----------------------------------------------------------------

class Listeners:
    """Who judges: `fad` gives the embeddings of FAD, `passt` the classes of KLD and the embeddings of realism. Official
    networks, where their files are given; else the small PaSST of train.py --model classifier is both."""

    def __init__(self, options, device):
        try:
            if options.passt:
                path, passt = options.passt, load_official(PaSST(PASST_PRESETS["paper"]), options.passt, PASST_FILE)
            else:
                checkpoint = sample.open_checkpoint("classifier", options.listener)
                path, passt = checkpoint.path, checkpoint.net
            self.fad = self.passt = passt.to(device)
            self.names = 2 * [f"PaSST {sample.file_digest(path)[:8]}"]                               # of fad, of passt
            if options.vggish:
                self.fad = load_official(VGGish(), options.vggish, VGGISH_FILE).to(device)
                self.names[0] = f"VGGish {sample.file_digest(options.vggish)[:8]}"
        except ValueError as error:
            raise UserError(str(error)) from None

    @torch.no_grad()
    def hear(self, audio):
        """audio (B, 2, n) at 44.1 kHz -> per clip a record of fad (P, d), posterior (classes,), embedding (width,)."""
        logits, embedding = self.passt.listen(audio, SAMPLE_RATE)
        patches = embedding[:, None] if self.fad is self.passt else self.fad.listen(audio, SAMPLE_RATE)
        heard = {"fad": patches.cpu(), "posterior": logits.cpu().double().softmax(-1), "embedding": embedding.cpu()}
        return [{key: value[i].clone() for key, value in heard.items()} for i in range(len(audio))]


def gather(records):
    """Of a set of records: fad (all P, d), the mean posterior (classes,), embedding (n, width)."""
    return {"fad": torch.cat([record["fad"] for record in records]),
            "posterior": torch.stack([record["posterior"] for record in records]).mean(0),
            "embedding": torch.stack([record["embedding"] for record in records])}


def hear_reference(lengths, listeners, options, out, device):
    """{n: what the listeners hear in excerpts of n samples of the training music}; heard once, and kept in `out`."""
    files = [path for path in sample.find_files([options.reference]) if os.path.exists(path)]
    versions = [(path, os.stat(path).st_mtime_ns) for path in files]
    facts = code_hash(), versions, lengths, listeners.names, options.reference_clips, options.seed
    path = out / f"reference-{sample.digest(*facts)}.pt"
    if sample.RANK == 0 and not path.exists():
        excerpts, heard = find_excerpts(options.reference, max(lengths), options.reference_clips, options.seed), []
        for batch in sample.progress(batches(excerpts, options.batch), "reference", unit="batch"):
            if audio := [found[0] for excerpt in batch if (found := read_or_skip(excerpt))]:
                audio = torch.stack(audio).to(device)
                heard += zip(*(listeners.hear(audio[..., :n]) for n in lengths))
        if len(heard) < 5:                                 # realism needs more than k = 3
            raise UserError(f"--reference {options.reference} has under 5 excerpts of {max(lengths)} samples")
        path.parent.mkdir(parents=True, exist_ok=True)
        sample.save_atomic(path, {n: gather(records) for n, records in zip(lengths, zip(*heard))})
    sample.barrier()
    return torch.load(path, weights_only=True)


# ---- excerpts, (path, first sample, samples) at 44.1 kHz ------------------------------------------------------------

@functools.cache
def code_hash():
    """Of the modules beside this one: what other code has measured is measured again."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()


def find_excerpts(folder, n, limit, seed):
    """Up to `limit` excerpts of n samples that do not overlap, in the order of the files: one at random of every file,
    then a second of every file that has one, and so on; where the limit falls within a turn, of files at random."""
    drawn = []
    found = sample.survey([folder], n, str(folder), "give others")
    for i, (path, (frames, rate, _)) in enumerate(found.items()):
        rng, whole = sample.random_numbers(seed, i), frames * SAMPLE_RATE // rate // n
        drawn += [(turn, rng.random(), (path, int(k) * n, n)) for turn, k in enumerate(rng.permutation(whole))]
    return sorted(excerpt for *_, excerpt in sorted(drawn)[:limit])


def with_another(excerpts, seed):
    """[(excerpt, excerpt of another track)]"""
    def another(j, path):
        others = [excerpt for excerpt in excerpts if excerpt[0] != path] or excerpts
        return others[sample.random_numbers(seed, j, 2).integers(len(others))]
    return [(excerpt, another(j, excerpt[0])) for j, excerpt in enumerate(excerpts)]


@functools.lru_cache(maxsize=1)
def read_track(path):
    return sample.to_stereo_44k(*sample.read_audio(path))


@functools.lru_cache(maxsize=256)                         # 0.5 GB at 6 s
def read_excerpt(path, start, n):
    """(2, n) float32; UserError if the file cannot be read there, or holds samples that are not numbers."""
    audio = read_track(path)[:, start:start + n].clone()
    if audio.shape[-1] < n or not audio.isfinite().all():
        raise UserError(f"{path} is shorter than {(start + n) / SAMPLE_RATE:.2f} s, or some samples are not numbers")
    return audio


def read_or_skip(*excerpts):
    """[audio, ...] of the excerpts; None, and a line that says why, if one of them cannot be read."""
    try:
        return [read_excerpt(*excerpt) for excerpt in excerpts]
    except UserError as error:
        say_once(f"skipped: {error}")


def generator(seed, j):
    """The random numbers of clip j, the same for every row."""
    return torch.Generator().manual_seed(int(sample.random_numbers(seed, j, 0).integers(2**62)))


def batches(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


# ---- the tasks of Sect. 4.3 and the rows of Table 1 -----------------------------------------------------------------

TASKS = ("unconditional", "infill", "regenerate", "continuation", "transition", "embedding")
HEARD_WHOLE, EDITED = ("unconditional", "embedding"), ("infill", "regenerate", "continuation")


# Within the model's window, in samples: region [a, b) is generated, [c, d) is what the listeners hear.
Span = namedtuple("Span", "a b c d")


def layout(window, hop):
    """{task: Span} for a model whose window is so many samples long, in frames of `hop` samples.

    Sect. 4.3's times, contexts rounded inwards to whole frames; "6 s" is the window where that is 5.94 s. Windows under
    5.9 s (tiny models) get everything in proportion; in longer ones the clip of 6 s lies around the region.
    """
    clip = min(window, 6 * SAMPLE_RATE)
    one_second = SAMPLE_RATE * (1 if clip >= 5.9 * SAMPLE_RATE else clip / (6 * SAMPLE_RATE))

    def centred(seconds):
        a = int((window - seconds * one_second) / 2 // hop) * hop
        c = (window - clip) // 2
        return Span(a, window - a, c, c + clip)

    whole = Span(0, window, 0, round(5 * one_second))
    after_prompt = Span(int(2.4 * one_second // hop) * hop, window, 0, clip)
    return {"unconditional": whole, "embedding": whole, "continuation": after_prompt, "transition": centred(2.5),
            "infill": centred(2), "regenerate": centred(2)}


# A batch for a row to work on. x (B, 2, window) are the originals, of transitions the raw cross-fades, other (B, 2,
# window) are of other tracks; generators: each clip's own random numbers.
Batch = namedtuple("Batch", "task span x other generators")


def unspliced(checkpoint, clips, settings, passt=None):
    """The model's own, unspliced audio (B, 2, window); passt is needed for guidance by example ("embedding")."""
    guides, span, example = (), clips.span, None
    if clips.task == "embedding":
        y = passt.listen(example := clips.x[..., span.c:span.d], SAMPLE_RATE)[1]
        A = lambda x_0: sample.hear(passt, checkpoint, x_0, slice(span.c, span.d))[1]
        guides = (lambda z: tasks.embedder_guidance(A, y, z, sample.XI_GUIDE["embedding"], above=sample.ABOVE),)
    C_L, C_R = span.a // checkpoint.hop, checkpoint.window - span.b // checkpoint.hop
    return sample.fill(checkpoint, clips.x, C_L, C_R, settings, clips.generators,
                       from_x_bar=clips.task in sample.FROM_X_BAR, guides=guides, example=example)


@dataclass(frozen=True)
class Row:
    """A line of Table 1. produce(Batch) -> audio (B, 2, window); made_with: what that depends on, besides the clips."""
    name: str
    tasks: tuple
    produce: Callable
    made_with: dict = field(default_factory=dict)


def filler(name, measured, content):
    """The row that has content(Batch) in the region, and the original around it."""
    def produce(clips):
        x, a, b = clips.x, clips.span.a, clips.span.b
        return torch.cat([x[..., :a], content(clips)[..., a:b], x[..., b:]], -1)
    return Row(name, measured, produce)


def white_noise(clips):
    """(B, 2, window) at each clip's level."""
    drawn = torch.stack([torch.randn(clips.x.shape[1:], generator=generator) for generator in clips.generators])
    return drawn.to(clips.x.device) * clips.x.square().mean((1, 2), keepdim=True).sqrt()


GENERATED = Row("Generated", ("files",), lambda clips: clips.other)
TEST_SET = Row("Test set", (*TASKS, "files"), lambda clips: clips.x)
FILLERS = (
    filler("Silence", TASKS, lambda clips: torch.zeros_like(clips.x)), filler("White noise", TASKS, white_noise),
    filler("Context repeated", EDITED, lambda clips: clips.x[..., torch.arange(clips.x.shape[-1]) % clips.span.a]),
    filler("Another track", EDITED, lambda clips: clips.other))


def model_rows(checkpoint, listeners, options):
    """The model with the sampler and the flags of the options, which name it, and its VAE's reconstruction."""
    rows, file = [], {"checkpoint": sample.file_digest(checkpoint.path)}
    if options.sampler != "none":
        settings = sample.Settings.of(options, checkpoint)
        flags = {flag.name: getattr(options, flag.name) for flag in fields(settings) if flag.metadata}
        name = f"{options.model.title()} {settings.sampler.upper()} {settings.steps}" + ", printed" * options.as_printed
        name += "".join(f", {flag} {value}" for flag, value in flags.items() if value is not None)
        produce = functools.partial(unspliced, checkpoint, settings=settings, passt=listeners.passt)
        rows.append(Row(name, tuple(options.tasks), produce, file | asdict(settings)))
    if checkpoint.kind == "latent":
        rows.append(Row("VAE", TASKS, lambda clips: checkpoint.decode(checkpoint.encode(clips.x)), file))
    return rows


# ---- measuring, and Table 1 ------------------------------------------------------------------------------------------

class Evaluation:
    """Measures rows clip by clip, each clip's record a file of its own, and makes figures of the records.
    pairs: {task: [(excerpt, excerpt of another track)]}; spans: {task: Span}; reference: what hear_reference gives."""

    def __init__(self, out, pairs, spans, listeners, reference, options, device):
        self.out, self.pairs, self.spans, self.listeners = out, pairs, spans, listeners
        self.reference, self.options, self.device = reference, options, device
        self.facts = {task: [(spans[task], pair, [os.stat(path).st_mtime_ns for path, *_ in pair], listeners.names,
                              options.seed) for pair in some] for task, some in pairs.items()}

    def file(self, row, task, j):
        """Of the record of clip j; its name changes with all that the record depends on."""
        folder = self.out / "records" / row.name.lower().replace(" ", "-") / task
        facts = code_hash(), row.made_with, self.facts[task][j]
        return folder / f"{j:06d}-{sample.digest(*facts)}.pt"

    def run(self, rows):
        """Measure every clip of every row that has no record yet; the processes share them."""
        jobs = [(row, task, [j for j in batch if not self.file(row, task, j).exists()])
                for task, pairs in self.pairs.items()
                for batch in batches(range(sample.RANK, len(pairs), sample.WORLD), self.options.batch)
                for row in rows if task in row.tasks]    # innermost: each clip is decoded for all rows at once
        for row, task, js in sample.progress([job for job in jobs if job[2]], "clips", unit="batch"):
            self.measure(row, task, js)
        sample.barrier()

    @torch.no_grad()
    def measure(self, row, task, js):
        loaded = {j: audio for j in js if (audio := read_or_skip(*self.pairs[task][j]))}
        if not loaded:
            return
        first, other = (torch.stack(audio).to(self.device) for audio in zip(*loaded.values()))        # (B, 2, window)
        span, window = self.spans[task], first.shape[-1]
        x = tasks.crossfade(first, other, span.a, window - span.b) if task == "transition" else first
        clips = Batch(task, span, x, other, [generator(self.options.seed, j) for j in loaded])
        for j, record in zip(loaded, self.judge(row.produce(clips)[..., :window], clips, first)):
            path = self.file(row, task, j)
            path.parent.mkdir(parents=True, exist_ok=True)
            sample.save_atomic(path, record)

    def judge(self, made, clips, first):
        """One record per clip: what was heard, MR on the region, whether all is finite; of transitions, Figure 1."""
        finite, made = made.isfinite().flatten(1).all(1), made.nan_to_num()
        a, b, c, d = clips.span
        region = slice(max(a, c), min(b, d))
        values = {"MR": mel_distance(made[..., region], clips.x[..., region], SAMPLE_RATE), "finite": finite}
        if clips.task == "transition":
            width = max(2, (b - a) // 10)                  # 19 windows, overlapping by half
            along = [z[..., region].unfold(-1, width, width // 2).transpose(1, 2)[:, :19] for z in (made, first)]
            values["curve"] = mel_distance(*along, SAMPLE_RATE)
        records = self.listeners.hear(made[..., c:d])
        return [record | {key: value[i].cpu() for key, value in values.items()} for i, record in enumerate(records)]

    def records(self, row, task):
        """{j: record}, in order, without the clips in which some sample is not a number."""
        files = {j: self.file(row, task, j) for j in range(len(self.pairs.get(task, ())))}
        records = {j: torch.load(file, weights_only=True) for j, file in files.items() if file.exists()}
        return {j: record for j, record in records.items() if record["finite"]}

    def figures(self, row, task):
        """{metric: [value, standard deviation or None, count]} of a row, for one task."""
        records = self.records(row, task)
        if len(records) < 2:
            return {}
        music, heard = self.reference[self.spans[task].d - self.spans[task].c], gather(records.values())
        n, d = heard["fad"].shape
        if n <= d:
            say_once(f"warning: FAD from n = {n} embeddings of {d} dimensions is far too high: compare at equal n only")
        found = {"FAD": [frechet_distance(*gaussian(music["fad"]), *gaussian(heard["fad"])), None, n],
                 "KLD": [kl_divergence(music["posterior"], heard["posterior"]).item(), None, len(records)]}
        if task == "transition":                           # as a share of the raw cross-fade's, which is the test set
            raw = self.records(TEST_SET, task)
            both = [j for j in records if j in raw]
            ours, its = (realism(music["embedding"], torch.stack([group[j]["embedding"] for j in both]))
                         for group in (records, raw))
            found["Realism"] = [(ours / its).mean().item(), (ours / its).std().item(), len(both)]
            curve = torch.stack([record["curve"] for record in records.values()]).mean(0)
            found["Figure 1"] = [curve.tolist(), None, len(records)]
        elif task not in HEARD_WHOLE:
            found["MR"] = [sum(record["MR"].item() for record in records.values()) / len(records), None, len(records)]
        return found


COLUMNS = (("Files", ("files",), ("FAD", "KLD", "MR")),
           ("Unconditional", ("unconditional",), ("FAD", "KLD")),
           ("Infill/Regeneration", ("infill", "regenerate"), ("FAD", "KLD", "MR")),
           ("Continuation", ("continuation",), ("FAD", "KLD", "MR")),
           ("Transitions", ("transition",), ("Realism",)),
           ("Cl. Guidance", ("embedding",), ("FAD", "KLD")))


def as_text(results):
    """Table 1 as lines of text, in the paper's order of columns; results: {row: {task: {metric: [value, std, n]}}}."""
    def cell(by_task, names, metric):
        def text(value=None, std=None, _=0):
            return "-" if value is None else f"{round(value, 2) + 0.0:.2f}" + (f"±{std:.2f}" if std else "")
        texts = [text(*by_task.get(task, {}).get(metric, ())) for task in names]
        return "/".join(texts if len(set(texts)) > 1 else texts[:1])

    columns = [["", *results]]
    for title, names, metrics in COLUMNS:
        for i, metric in enumerate(metrics):
            cells = [cell(by_task, names, metric) for by_task in results.values()]
            if set(cells) != {"-"}:
                columns.append([metric if i else f"{title} {metric}", *cells])
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in zip(*columns)]


def write_results(out, results, settings):
    """Print Table 1 and write table.json: every figure, and the settings. What an earlier run with the same settings
    left there, of another sampler or task for instance, stays; else it goes."""
    clips = sorted({f"{found['KLD'][2]} {task}" for row in results.values() for task, found in row.items() if found})
    if not clips:
        raise UserError("nothing could be measured: at least two clips are needed", 1)
    file = out / "table.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    old = earlier["rows"] if earlier.get("settings") == settings else {}
    rows = [row for row in old if row not in results] + [*results]
    results = {row: old.get(row, {}) | results.get(row, {}) for row in rows}
    text = json.dumps({"settings": settings, "metric": "[value, standard deviation, count]", "rows": results}, indent=1)
    sample.write_atomic(file, lambda out: out.write(text.encode()))
    fad, passt = settings["listeners"]
    print("\n".join(as_text(results)))
    print(f"clips: {', '.join(clips)}; training music: {settings['excerpts']} excerpts\n"
          f"FAD by {fad}; KLD (of the sets) and realism by {passt}\nall figures: {file}")


# ---- command line ---------------------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add, whole = parser.add_argument, sample.within(1, 2**31, int)
    add("--model", choices=("latent", "waveform"), default="latent")
    add("--checkpoint", help="of the model (the one shipped)")
    add("--data", help="folder of test music")
    add("--reference", help="folder of training music")
    add("--generated", help="folder of clips that any system edited, named as those in --originals")
    add("--originals", help="folder of what they were made from")
    add("--region", type=sample.seconds, nargs=2, metavar=("START", "END"),
        help="seconds that were generated, in the files of --generated or --figure2")
    add("--tasks", nargs="+", choices=TASKS, default=TASKS)
    add("--sampler", choices=("ddpm", "ddim", "none"), help="none: only the rows that need no sampling (ddpm)")
    add("--steps", type=whole, help="sampling steps (50)")
    add("--clips", type=whole, default=100, help="excerpts of the test music, for each task; clips in --figure2 (100)")
    add("--listener", help="checkpoint of train.py --model classifier, who judges by default")
    add("--passt", help=f"official PaSST file, {PASST_FILE}".replace("%", "%%"))
    add("--vggish", help=f"official VGGish file, {VGGISH_FILE}")
    sample.Settings.add_flags(add)
    add("--reference-clips", type=whole, default=10_000, help="at most so many excerpts of the training music (10000)")
    add("--batch", type=whole, default=8)
    add("--seed", type=sample.within(0, 2**63, int), default=0)
    add("--device", default="auto")
    add("--figure2", nargs="+", metavar="NAME=FOLDER", help="a page to compare these systems' clips by ear, blindly")
    add("--votes", nargs="+", metavar="FILE", help="files that listeners saved there: who was preferred")
    add("--out", type=Path, help="default runs/evaluate-MODEL, runs/figure2; what is measured there already is kept")
    options = parser.parse_args(argv)
    blind, files = options.figure2 or options.votes, bool(options.generated)
    if not blind and (not options.reference or files != bool(options.originals) or files == bool(options.data)):
        raise UserError("give either --data, test music for the model to edit, or both --generated and --originals: "
                        "files that any system edited, and what they were made from; and --reference, training music")
    sampling = ["checkpoint", "sampler", "steps", *(this.name for this in fields(sample.Settings) if this.metadata)]
    idle = sampling if blind or files else ["region"]
    given = [name for name in idle if getattr(options, name) is not None]
    for name in given + ["as_printed"] * (idle is sampling and options.as_printed):
        raise UserError(f"--{name.replace('_', '-')} does nothing here: leave it out")
    return options


def plan_files(options):
    """(pairs, spans) to score files that any system made: clips of the same name in --originals and --generated."""
    originals, made = (figure2.clips_in(folder) for folder in (options.originals, options.generated))
    names = sorted(originals.keys() & made.keys())
    facts = [found for found in (sample.probe(made[name]) for name in names) if not isinstance(found, str)]
    if not facts:
        raise UserError(f"--generated {options.generated} has no audio file in the place of one in --originals")
    n = statistics.mode(frames * SAMPLE_RATE // rate for frames, rate, _ in facts)     # reading skips shorter ones
    a, b = (round(seconds * SAMPLE_RATE) for seconds in options.region or (0, n / SAMPLE_RATE))
    if not 0 <= a < b <= n:
        raise UserError(f"--region must lie within the clips' {n / SAMPLE_RATE:.3f} s")
    return {"files": [((originals[name], 0, n), (made[name], 0, n)) for name in names]}, {"files": Span(a, b, 0, n)}


def plan_tasks(options, checkpoint):
    """(pairs, spans) for the tasks of Sect. 4.3 on excerpts of --data."""
    window = checkpoint.window * checkpoint.hop
    excerpts = find_excerpts(options.data, window, options.clips, options.seed)
    spans = layout(window, checkpoint.hop)
    for task in options.tasks:
        times = spans[task].a, min(spans[task].b, spans[task].d), window
        sample.say("{}: {:.3f} to {:.3f} s of {:.3f} s".format(task, *(n / SAMPLE_RATE for n in times)))
    return dict.fromkeys(options.tasks, with_another(excerpts, options.seed)), spans


def main(argv=None):
    options = parse(argv)
    if options.figure2 or options.votes:
        return figure2.run(options)
    device = sample.pick_device(options.device)
    sample.join_processes(device)
    listeners = Listeners(options, device)
    if options.generated:
        (pairs, spans), rows, name, digest = plan_files(options), [GENERATED, TEST_SET], "files", None
    else:
        checkpoint = sample.open_checkpoint(options.model, options.checkpoint, device)
        (pairs, spans), name, digest = plan_tasks(options, checkpoint), options.model, sample.file_digest(checkpoint.path)
        rows = [*model_rows(checkpoint, listeners, options), TEST_SET, *FILLERS]
    out = options.out or Path("runs") / f"evaluate-{name}"
    lengths = sorted({span.d - span.c for span in spans.values()})          # of all tasks: one reference for all runs
    reference = hear_reference(lengths, listeners, options, out, device)
    evaluation = Evaluation(out, pairs, spans, listeners, reference, options, device)
    evaluation.run(rows)
    if sample.RANK == 0:
        asked = "data clips generated originals region reference seed".split()
        settings = {flag: getattr(options, flag) for flag in asked}
        settings |= {"checkpoint": digest, "listeners": listeners.names, "code": code_hash(),
                     "excerpts": len(reference[lengths[0]]["embedding"])}
        write_results(out, {row.name: {task: evaluation.figures(row, task) for task in pairs if task in row.tasks}
                            for row in rows}, settings)


if __name__ == "__main__":
    sample.run(main)
