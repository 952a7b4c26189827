"""Sect. 4: the metrics, and Table 1 and Figure 1 for any model.

    python evaluate.py --model latent --data path/to/test --reference path/to/train
    python evaluate.py --generated edited/ --originals test/ --reference path/to/train

The second command evaluates any other system: its files are named like the originals.
Figure 2, the blind test, is examples/figure2.py.

All measurements are kept under --out, batch by batch: an interrupted run goes on where it stopped.
What depends on another file or setting is measured again. What depends on the code is not: after
a change of it, take another --out.

Under torchrun the processes share the clips. A clip's random numbers depend on --seed and its place
in the list alone, so the size of the batches and the number of processes change only roundings.
"""
import argparse
import functools
import json
import math
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import sample
import tasks
from sample import SAMPLE_RATE, UserError, from_one_process
from tasks import PASST_FILE, PASST_PRESETS, PaSST
from tasks import full_precision, load_official, mel_triangles, resample, to_resample

VGGISH_FILE = "vggish-10086976.pth, published on GitHub by harritaylor/torchvggish, release v0.1"
TASKS = ("unconditional", "infill", "regenerate", "continuation", "transition", "embedding")
CLIPS, REFERENCE_CLIPS, BATCH = 100, 10_000, 8
NEIGHBOUR = 3                                       # k of the realism score [32]
RECORDS = 1                                         # to be raised when other things are measured


# ---- metrics -------------------------------------------------------------------------------------

def gaussian(embeddings):
    """Mean (d,) and unbiased covariance (d, d) of embeddings (n, d), in float64.

    ValueError for fewer than two.
    """
    if len(embeddings) < 2:
        raise ValueError(f"a covariance needs at least 2 embeddings, not {len(embeddings)}")
    embeddings = embeddings.cpu().double()
    return embeddings.mean(0), embeddings.T.cov()


def frechet_distance(mu1, cov1, mu2, cov2):
    """FAD [26]: |mu1 - mu2|^2 + tr cov1 + tr cov2 - 2 tr (cov1 cov2)^(1/2), a float.

    float64 tensors (d,) and (d, d). The trace of the root is the sum of the singular values of
    cov1^(1/2) cov2^(1/2): exact and real for any rank, without the usual code's epsilon and complex
    roots.
    """
    def root(cov):
        values, vectors = torch.linalg.eigh(cov)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    cross = torch.linalg.svdvals(root(cov1) @ root(cov2)).sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return distance.clamp(min=0).item()             # rounding can give -1e-14


def kl_divergence(p, q):
    """KLD [28]: KL(p || q) in nats along the last axis; p, q (..., classes) sum to 1.

    p is the reference; 1e-6 is added to q in the logarithm. [28] compares clips in pairs. The
    "reference statistics" of Sect. 4.2 are read as the mean class posteriors (softmax) of a set, so
    Table 1 compares two of these.
    """
    return (torch.special.xlogy(p, p) - p * (q + 1e-6).log()).sum(-1)


@functools.lru_cache(maxsize=8)
def slaney_filters(rate, n_fft, bands):
    """Mel filters (bands, n_fft / 2 + 1) of Slaney: triangles of equal area.

    The scale is linear up to 1 kHz; from there on 27 bands are a factor of 6.4.
    """
    def to_hz(mel):
        above = 1000 * torch.exp((mel - 15) * math.log(6.4) / 27)
        return torch.where(mel < 15, mel * 200 / 3, above)

    top = 15 + 27 * math.log(rate / 2000) / math.log(6.4)
    edges = to_hz(torch.linspace(0, top, bands + 2, dtype=torch.float64))[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    f = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    rising = (f - left) / (centre - left)
    falling = (right - f) / (right - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (right - left)).float()


def mel_magnitudes(x, rate, n_fft, bands):
    """Audio x (..., C, n) at rate Hz -> mel magnitudes (..., C, bands, frames)."""
    filters = slaney_filters(rate, n_fft, bands).to(x.device)
    window = torch.hann_window(n_fft, device=x.device)
    # The STFT mirrors the audio at its ends, for which it must have more than half a window.
    x = F.pad(x, (0, max(0, n_fft // 2 + 1 - x.shape[-1])))
    rows = x.reshape(-1, x.shape[-1])
    X = torch.stft(rows, n_fft, n_fft // 4, window=window, return_complex=True)
    return (filters @ X.abs()).unflatten(0, x.shape[:-1])


def mel_distance(x, y, rate):
    """MR, the mel-reconstruction distance [31]: x, y (..., C, n) at rate Hz -> (...).

    The sum over two STFTs, with windows of 2048 and 512 samples and 150 and 80 bands, of the mean
    |difference| of log10 mel power and the mean |difference| of mel magnitudes. Means are over
    channels, bands and frames.
    """
    total = 0
    for n_fft, bands in ((2048, 150), (512, 80)):
        M_x = mel_magnitudes(x, rate, n_fft, bands)
        M_y = mel_magnitudes(y, rate, n_fft, bands)
        log_part = (M_x.clamp(min=1e-5).log10() - M_y.clamp(min=1e-5).log10()).abs() * 2
        total = total + (log_part + (M_x - M_y).abs()).mean((-3, -2, -1))
    return total


def distances(points, reference):
    """Yield Euclidean distances (up to 512, n) of points (m, d) to reference points (n, d)."""
    for some in points.split(512):
        # Matrix products would be faster, but inexact for near points, which matter most here.
        yield torch.cdist(some, reference, compute_mode="donot_use_mm_for_euclid_dist")


def neighbour_radii(reference, k=NEIGHBOUR):
    """Distance of each reference point (n, d) to its k-th nearest neighbour, (n,) float64.

    ValueError unless n > k.
    """
    if not 0 < k < len(reference):
        raise ValueError(f"realism needs more than k = {k} reference points, not {len(reference)}")
    reference = reference.cpu().double()
    # The nearest point of all is the point itself.
    radii = [d.kthvalue(k + 1).values for d in distances(reference, reference)]
    return torch.cat(radii)


def realism(reference, generated, k=NEIGHBOUR, prune=True, radii=None):
    """Realism score [32] of generated embeddings (m, d): (m,) float64; above 1: in the manifold.

    The maximum over reference points r (n, d) of radius_r / |g - r|; with prune, only over the half
    with the smaller radii. Plain distances, as in the formula; the code of [32] squares them.
    radii: neighbour_radii(reference, k), where they are known already.
    """
    if radii is None:
        radii = neighbour_radii(reference, k)
    reference, generated = reference.cpu().double(), generated.cpu().double()
    if prune:
        kept = radii <= radii.quantile(0.5)
        reference, radii = reference[kept], radii[kept]
    scores = [(radii / d.clamp(min=1e-12)).amax(1) for d in distances(generated, reference)]
    return torch.cat(scores)


# ---- VGGish [27], the embedding of FAD -----------------------------------------------------------

class VGGish(nn.Module):
    """VGGish with the official state dict's keys: load_official(VGGish(), path, VGGISH_FILE)."""
    rate = 16000                                    # Hz
    shortest = 15600                                # samples that give one patch, of 0.96 s

    def __init__(self):
        super().__init__()
        layers = []
        channels = 1
        for width in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool"):
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(12288, 4096), nn.ReLU(),
            nn.Linear(4096, 4096), nn.ReLU(),
            nn.Linear(4096, 128))
        self.register_buffer("window", torch.hann_window(400), persistent=False)
        triangles = mel_triangles(64, 125, 7500, 257)
        self.register_buffer("triangles", triangles, persistent=False)

    def patches(self, mono):
        """mono (B, n) at 16 kHz -> log-mel (B, P, 96, 64), without what follows the last patch."""
        mono = F.pad(mono, (0, max(0, 400 - mono.shape[-1])))
        frames = mono.unfold(-1, 400, 160) * self.window                # (B, frames, 400)
        mel = torch.fft.rfft(frames, 512).abs() @ self.triangles.T      # (B, frames, 64)
        whole = mel.shape[1] // 96
        return (mel[:, :96 * whole] + 0.01).log().unflatten(1, (whole, 96))

    def forward(self, patches):
        """patches (P, 96, 64) -> (P, 128), without the last ReLU that some ports have."""
        x = self.features(patches[:, None])                             # (P, 512, 6, 4)
        return self.embeddings(x.permute(0, 2, 3, 1).flatten(1))

    def embed(self, audio, rate):
        """audio (B, channels, n) at rate Hz -> (B, P, 128), differentiable.

        UserError below 0.975 s.
        """
        mono = resample(audio.mean(1), rate, self.rate)
        if mono.shape[-1] < self.shortest:
            length = audio.shape[-1] / rate
            raise UserError(f"audio of {length:.3f} s is too short for VGGish, which needs 0.975 s")
        with full_precision(audio):
            patches = self.patches(mono)
            return self(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])


# ---- the judges, and reference statistics of the training music ----------------------------------

class Judges:
    """The networks that evaluate audio, frozen.

    passt   its class posteriors give KLD, its embeddings realism: the official PaSST with --passt,
            else one of train.py --model classifier
    fad     its embeddings give FAD: VGGish with --vggish, else `passt`
    names   what the two are, for the table

    UserError for files that cannot be used.
    """

    def __init__(self, options, device):
        try:
            if options.passt:
                path = options.passt
                passt = load_official(PaSST(PASST_PRESETS["paper"]), path, PASST_FILE)
            else:
                checkpoint = sample.open_checkpoint("classifier", options.classifier)
                path, passt = checkpoint.path, checkpoint.net
            self.passt = self.fad = passt.to(device)
            passt_name = fad_name = f"PaSST {sample.file_digest(path)[:8]}"
            if options.vggish:
                self.fad = load_official(VGGish(), options.vggish, VGGISH_FILE).to(device)
                fad_name = f"VGGish {sample.file_digest(options.vggish)[:8]}"
        except ValueError as error:
            raise UserError(str(error)) from None
        self.names = [fad_name, passt_name]

    @torch.no_grad()
    def evaluate(self, audio):
        """audio (B, 2, n) at 44.1 kHz -> fad (B, P, d), posterior (B, classes), embedding (B, m).

        P is the number of patches of VGGish, or 1.
        """
        logits, embedding = self.passt.listen(audio, SAMPLE_RATE)
        if self.fad is self.passt:
            fad = embedding[:, None]                # one for the whole clip: P = 1
        else:
            fad = self.fad.embed(audio, SAMPLE_RATE)
        posterior = logits.cpu().double().softmax(-1)
        return {"fad": fad.cpu(), "posterior": posterior, "embedding": embedding.cpu()}


def gather(records, name):
    """One measurement of all records: (n, ...)."""
    return torch.stack([record[name] for record in records])


def fad_gaussian(records):
    """Mean and covariance of the FAD embeddings of all records, P of each."""
    return gaussian(torch.cat([record["fad"] for record in records]))


class Reference:
    """Reference statistics (Sect. 4.2) of records of the training music, made once for all rows.

    UserError unless there are more than k, each of which needs k neighbours, and unless most differ
    from these.
    """

    def __init__(self, records):
        if len(records) <= NEIGHBOUR:
            raise UserError(f"--reference has {len(records)} usable excerpts that are as long as "
                            f"the clips, and {NEIGHBOUR + 1} are needed: give more or longer "
                            "files, or more --reference-clips")
        self.fad = fad_gaussian(records)
        self.count = sum(len(record["fad"]) for record in records)      # of FAD's embeddings
        self.posterior = gather(records, "posterior").mean(0)
        self.embedding = gather(records, "embedding")
        self.radii = neighbour_radii(self.embedding)
        if self.radii.median() == 0:
            raise UserError(f"--reference has the same music, or silence, more than {NEIGHBOUR} "
                            "times, in half of its excerpts: give other files")


# ---- excerpts of audio files ---------------------------------------------------------------------

class Excerpt(NamedTuple):
    """n samples of a file from sample `start` on, at 44.1 kHz."""
    path: str
    start: int
    n: int


def find_excerpts(folder, n, limit, seed):
    """Up to `limit` excerpts of n samples that do not overlap, in the order of the files.

    One at random of every file, then a second of every file that has one, and so on. Where the
    limit falls within such a turn, the files are drawn at random. UserError if there is no music.
    """
    # All places of each file, in random order.
    drawn = []
    files = sample.survey([folder], n, str(folder), "give others")
    for i, (path, (frames, rate, _)) in enumerate(files.items()):
        random = sample.random_numbers(seed, i)
        places = random.permutation(frames * SAMPLE_RATE // rate // n)
        for turn, place in enumerate(places):
            drawn.append((turn, random.random(), Excerpt(path, int(place) * n, n)))
    # The first turns of all files come first.
    drawn.sort()
    return sorted(excerpt for _, _, excerpt in drawn[:limit])


def with_another(excerpts, seed):
    """[(excerpt, excerpt of another track)]; of its own track, where there is only one."""
    pairs = []
    for j, excerpt in enumerate(excerpts):
        others = [other for other in excerpts if other.path != excerpt.path] or excerpts
        chosen = sample.random_numbers(seed, j, 2).integers(len(others))
        pairs.append((excerpt, others[chosen]))
    return pairs


def read_part(file, first, last):
    """Samples [first, last) of an open SoundFile, fewer where it ends: (channels, n) float32."""
    if file.format == "OGG":
        # Seeking in ogg can end hundreds of samples away (libsndfile 1.2.2): decode what precedes.
        while file.tell() < first:
            if not len(file.read(min(2**18, first - file.tell()))):
                break
    elif first < file.frames:
        file.seek(first)
    else:
        return torch.zeros(file.channels, 0)
    samples = file.read(last - first, dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T.copy())


def read_excerpt(excerpt):
    """An Excerpt as audio (2, n) float32, decoding no more of the file than it needs.

    UserError if the file cannot be read or ends too early, or if a sample is not finite.
    """
    path, start, n = excerpt
    try:
        with sample.open_audio(path) as file:
            rate = file.samplerate
            # Resampling needs the filter's margins on both sides; outside the file it has zeros.
            first, last = start, start + n
            if rate != SAMPLE_RATE:
                first, last = to_resample(rate, SAMPLE_RATE, start, start + n)
            begin = max(0, first)
            audio = read_part(file, begin, last)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({sample.reason(error)})") from None
    # What was promised may not be there.
    end = begin + audio.shape[-1]
    if math.ceil(end * SAMPLE_RATE / rate) < start + n:
        raise UserError(f"{path} is shorter than {(start + n) / SAMPLE_RATE:.2f} s")
    # to_resample's first sample lies on both grids of time.
    audio = sample.to_stereo_44k(F.pad(audio, (begin - first, last - end)), rate)
    audio = audio[:, start - first * SAMPLE_RATE // rate:][:, :n].clone()
    if not audio.isfinite().all():
        raise UserError(f"{path} has samples that are not finite")
    return audio


def read_or_skip(excerpts):
    """The audio of each Excerpt of a clip, or None, with a line that says why, if one is bad."""
    try:
        return [read_excerpt(excerpt) for excerpt in excerpts]
    except UserError as error:
        first = excerpts[0].path
        of = "" if str(error).startswith(f"{first} ") else f"{first}, because "
        tqdm.write(f"left out: {of}{error}")


def read_ahead(jobs):
    """For each job {number: [Excerpt, ...]}, yield {number: [audio, ...]} of what can be read.

    Threads decode the next job while the caller works on this one.
    """
    def readable(job, audio):
        return {number: clip for number, clip in zip(job, audio) if clip is not None}

    with ThreadPoolExecutor(4) as pool:
        waiting = None
        for job in jobs:
            # pool.map begins at once; its results are waited for one turn later.
            ready, waiting = waiting, (job, pool.map(read_or_skip, job.values()))
            if ready:
                yield readable(*ready)
        if waiting:
            yield readable(*waiting)


# ---- records: measurements that outlive a run, made by several processes -------------------------

def intact(path, read):
    """read(), of a file that an earlier run wrote. UserError if it is damaged."""
    try:
        return read()
    except Exception as error:          # whatever was met first
        raise UserError(f"{path} is damaged ({type(error).__name__}): delete it, and what it held "
                        "is measured again") from None


class Records:
    """Measurements of numbered clips in a folder, a file for each batch."""

    def __init__(self, folder):
        self.folder = folder

    def read(self):
        """{number: its measurements}, in order."""
        records = {}
        for path in sorted(self.folder.glob("*.pt")):
            records.update(intact(path, lambda: torch.load(path, weights_only=True)))
        return dict(sorted(records.items()))

    def write(self, numbers, measured):
        """Keep what was measured for a batch: {name: (B, ...)}."""
        records = {}
        for i, number in enumerate(numbers):
            records[number] = {name: value[i] for name, value in measured.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{numbers[0]:06d}-{sample.digest(*numbers)}.pt"
        sample.save_atomic(self.folder / name, records)


def batches(lengths, size):
    """{number: samples} -> lists of up to `size` numbers with equally many samples."""
    made = []
    # By length first, so that equal ones follow each other.
    for n, number in sorted((n, number) for number, n in lengths.items()):
        if not made or len(made[-1]) == size or lengths[made[-1][0]] != n:
            made.append([])
        made[-1].append(number)
    return made


def versions(paths):
    """[(path, its size and time of change)]"""
    return [(path, sample.stamp(path)) for path in paths]


def measure_reference(lengths, judges, options, out, device):
    """{n: Records of the training music in excerpts of n samples}, for each of the lengths n.

    The shorter ones are the beginnings of the longest. The processes share the work.
    """
    longest = max(lengths)

    def plan():
        # The same files, judges and options have the same folder. Its list of excerpts saves a
        # second look at all files.
        paths = sample.find_files([options.reference])
        facts = [versions(paths), lengths, judges.names, options.reference_clips, options.seed]
        folder = out / f"reference-{sample.digest(RECORDS, *facts)}"
        index = folder / "excerpts.json"
        if not index.exists():
            drawn = find_excerpts(options.reference, longest, options.reference_clips, options.seed)
            folder.mkdir(parents=True, exist_ok=True)
            sample.write_atomic(index, lambda file: file.write(json.dumps(drawn).encode()))
        drawn = intact(index, lambda: json.loads(index.read_text()))
        excerpts = [Excerpt(*values) for values in drawn]
        # What is missing has no record of some length.
        records = {n: Records(folder / str(n)) for n in lengths}
        missing = {}
        for kept in records.values():
            done = kept.read()
            for j, excerpt in enumerate(excerpts):
                if j not in done:
                    missing[j] = excerpt
        return records, missing

    # Each process has its share of what is missing.
    records, missing = from_one_process(plan)
    todo = batches(dict.fromkeys(missing, longest), options.batch)[sample.RANK::sample.WORLD]
    jobs = [{j: [missing[j]] for j in numbers} for numbers in todo]
    for loaded in sample.progress(read_ahead(jobs), "reference", len(jobs), unit="batch"):
        if loaded:
            audio = torch.stack([excerpt for excerpt, in loaded.values()]).to(device)
            for n in lengths:
                records[n].write([*loaded], judges.evaluate(audio[..., :n]))
    sample.barrier()
    return records


# ---- the tasks of Sect. 4.3, and clips -----------------------------------------------------------

class Span(NamedTuple):
    """Samples of a clip: [a, b) is generated, [c, d) is evaluated."""
    a: int
    b: int
    c: int
    d: int


def layout(window, hop):
    """{task: Span} for a model whose window is so many samples long, in frames of `hop` samples.

    Sect. 4.3's times, with contexts rounded inwards to whole frames. "6 s" is the window where that
    is 5.94 s; in a longer window, the clip of 6 s lies around the region. Windows under 5.9 s, of
    tiny models, get all times in proportion.
    """
    # In samples: the clip of "6 s", and a second.
    clip = min(window, 6 * SAMPLE_RATE)
    second = SAMPLE_RATE
    if clip < 5.9 * SAMPLE_RATE:
        second = SAMPLE_RATE * clip / (6 * SAMPLE_RATE)

    def centred(seconds):
        a = int((window - seconds * second) / 2 // hop) * hop
        c = (window - clip) // 2
        return Span(a, window - a, c, c + clip)

    whole = Span(0, window, 0, round(5 * second))
    after_prompt = Span(int(2.4 * second // hop) * hop, window, 0, clip)
    return {"unconditional": whole, "infill": centred(2), "regenerate": centred(2),
            "continuation": after_prompt, "transition": centred(2.5), "embedding": whole}


@dataclass
class Clip:
    excerpt: Excerpt                # to edit
    other: Excerpt                  # of another track; of "files", the file to evaluate
    spans: dict                     # {task: Span}


@dataclass
class Batch:
    """Clips of one length for a row to work on, all audio (B, 2, n) at 44.1 kHz."""
    task: str
    span: Span
    first: torch.Tensor             # the excerpts
    other: torch.Tensor             # of other tracks, or the files to evaluate
    generators: list                # each clip's own random numbers

    def __post_init__(self):
        # x is what rows work on and are compared with; of transitions, the raw cross-fade.
        self.x = self.first
        if self.task == "transition":
            C_R = self.first.shape[-1] - self.span.b
            self.x = tasks.crossfade(self.first, self.other, self.span.a, C_R)


def generator_of(seed, number):
    """The random numbers of a clip, the same for every row and task."""
    drawn = sample.random_numbers(seed, number, 0).integers(2**62)
    return torch.Generator().manual_seed(int(drawn))


# ---- the rows of Table 1 -------------------------------------------------------------------------

def by_task(batch):
    """Key for Row.same: every task has audio of its own."""
    return batch.task


def by_region(batch):
    """Key for Row.same: the audio depends on x and the region."""
    return batch.task == "transition", batch.span


def by_x(batch):
    """Key for Row.same: the audio depends on x, which only transitions change."""
    return batch.task == "transition"


@dataclass(frozen=True)
class Row:
    """A row of Table 1.

    make    Batch -> audio (B, 2, n or more)
    same    Batch -> a key: tasks with equal keys have the same audio, which is made once
    facts   what the audio depends on, besides the clips
    """
    name: str
    tasks: tuple
    make: Callable
    same: Callable = by_task
    facts: dict = field(default_factory=dict)


def filler(name, task_names, content):
    """The row that has content(Batch), (B, 2, n), in the region, and the original around it."""
    def make(batch):
        a, b = batch.span.a, batch.span.b       # the region
        middle = content(batch)[..., a:b]
        return torch.cat([batch.x[..., :a], middle, batch.x[..., b:]], -1)
    return Row(name, task_names, make, by_region)


def silence(batch):
    return torch.zeros_like(batch.x)


def white_noise(batch):
    """At each clip's level."""
    shape = batch.x.shape[1:]
    noise = torch.stack([torch.randn(shape, generator=g) for g in batch.generators])
    return noise.to(batch.x.device) * batch.x.square().mean((1, 2), keepdim=True).sqrt()


def repeated_prompt(batch):
    """All that precedes the region, over and over."""
    return batch.x[..., torch.arange(batch.x.shape[-1]) % batch.span.a]


def other_track(batch):
    return batch.other


def original(batch):
    return batch.x


FILES = (Row("Generated", ("files",), other_track), Row("Test set", ("files",), original))
TEST_SET = Row("Test set", TASKS, original, by_x)
EDITED = ("infill", "regenerate", "continuation")
FILLERS = (filler("Silence", TASKS, silence),
           filler("White noise", TASKS, white_noise),
           filler("Prompt repeated", EDITED, repeated_prompt),
           filler("Another track", EDITED, other_track))


def unspliced(checkpoint, batch, settings, passt=None):
    """The model's own audio (B, 2, n), with the contexts as it reconstructs them.

    The paper does not say what guides its "Cl. Guidance". Here passt guides, with the clip itself
    as the example; and as passt then judges, this task's figures look better than its music is.
    """
    a, b, c, d = batch.span
    example, guides = None, ()
    # What the judges get of the sample is guided towards the same part of the clip.
    if batch.task == "embedding":
        example = batch.x[..., c:d]
        guides = (sample.example_guide(checkpoint, passt, example, part=slice(c, d)),)
    C_L = a // checkpoint.hop
    C_R = checkpoint.window - b // checkpoint.hop
    return sample.fill(checkpoint, batch.task, batch.x, C_L, C_R, settings, batch.generators,
                       guides=guides, example=example)


def model_row(checkpoint, settings, given, judges, task_names):
    """The row of a model with these settings; it is named by its sampler and the flags `given`."""
    def make(batch):
        return unspliced(checkpoint, batch, settings, judges.passt)

    name = f"{checkpoint.kind.title()} {settings.sampler.upper()} {settings.steps}"
    for flag, value in given.items():
        name += ", printed" if flag == "as_printed" else f", {flag} {value}"
    facts = {"checkpoint": sample.file_digest(checkpoint.path), **asdict(settings)}
    if checkpoint.weak:
        name += f", away from {Path(checkpoint.weak.path).stem}"
        facts["weak"] = sample.file_digest(checkpoint.weak.path)
    return Row(name, tuple(task_names), make, by_task, facts)


def vae_row(checkpoint, task_names):
    """The row "VAE": its reconstruction, the upper bound of the latent model."""
    def make(batch):
        return checkpoint.decode(checkpoint.encode(batch.x))
    facts = {"checkpoint": sample.file_digest(checkpoint.path)}
    return Row("VAE", tuple(task_names), make, by_x, facts)


# ---- measuring rows ------------------------------------------------------------------------------

def compare(batch, audio):
    """What is measured against the originals: a dictionary of tensors (B, ...).

    MR on the region; of transitions, Figure 1: the distance to the first track in 19 windows of a
    tenth of the region, which overlap by half.
    """
    # Of the region, what lies in the clip of 6 s.
    a, b, c, d = batch.span
    region = slice(max(a, c), min(b, d))
    made = audio[..., region]
    measured = {"MR": mel_distance(made, batch.x[..., region], SAMPLE_RATE)}
    if batch.task == "transition":
        width = max(2, (b - a) // 10)
        along = made.unfold(-1, width, width // 2).transpose(1, 2)[:, :19]      # (B, 19, 2, width)
        first = batch.first[..., region].unfold(-1, width, width // 2).transpose(1, 2)[:, :19]
        measured["curve"] = mel_distance(along, first, SAMPLE_RATE)             # (B, 19)
    return {name: value.cpu() for name, value in measured.items()}


class Evaluation:
    """Measures rows on clips, and keeps the records below `folder`.

    records: {(row's name, task): Records}. A folder's name changes with the files and settings that
    its records depend on.
    """

    def __init__(self, rows, clips, judges, folder, seed=0, device="cpu"):
        self.rows, self.clips, self.judges = rows, clips, judges
        self.seed, self.device = seed, device
        self.records = {}
        files = [versions([clip.excerpt.path, clip.other.path]) for clip in clips]
        common = RECORDS, judges.names, seed, files
        for row in rows:
            for task in row.tasks:
                used = [(clip.excerpt, clip.other, clip.spans[task]) for clip in clips]
                name = row.name.lower().replace(" ", "-")
                key = sample.digest(row.facts, used, *common)
                self.records[row.name, task] = Records(folder / name / f"{task}-{key}")

    def run(self, size=BATCH):
        """Measure what has no record yet, `size` clips at a time; the processes share them."""
        def find_missing():
            everything = set(range(len(self.clips)))
            return {key: everything - kept.read().keys() for key, kept in self.records.items()}

        # What is left to do, in batches of clips of one length; each process has its share.
        missing = from_one_process(find_missing)
        lengths = {j: self.clips[j].excerpt.n for j in set().union(*missing.values())}
        todo = batches(lengths, size)[sample.RANK::sample.WORLD]
        jobs = [{j: [self.clips[j].excerpt, self.clips[j].other] for j in js} for js in todo]
        # Rows are the inner loop, so that a clip is decoded once for all of them.
        work = len(jobs) * len(self.rows)
        with sample.progress(desc="clips", total=work, unit="batch") as bar:
            for loaded in read_ahead(jobs):
                for row in self.rows:
                    numbers = loaded.keys()
                    left = [task for task in row.tasks if missing[row.name, task] & numbers]
                    if left and loaded:
                        self.measure(row, left, loaded)
                    bar.update()
        sample.barrier()

    @torch.no_grad()
    def measure(self, row, names, loaded):
        """Write a row's records in the tasks `names`, of clips {number: (audio, other audio)}."""
        numbers = [*loaded]
        first = torch.stack([audio for audio, _ in loaded.values()]).to(self.device)
        other = torch.stack([audio for _, audio in loaded.values()]).to(self.device)
        made, evaluated = {}, {}
        for task in names:
            span = self.clips[numbers[0]].spans[task]
            generators = [generator_of(self.seed, number) for number in numbers]
            batch = Batch(task, span, first, other, generators)
            # Tasks with the same audio share it. If the same part of it is evaluated, they share
            # the judges' work too.
            key = row.same(batch)
            if key not in made:
                made[key] = row.make(batch)[..., :first.shape[-1]]
            part = key, span.c, span.d
            if part not in evaluated:
                evaluated[part] = self.judges.evaluate(made[key][..., span.c:span.d])
            measured = evaluated[part] | compare(batch, made[key])
            # A model that diverges makes samples, or figures, that are not finite.
            finite = [value.isfinite().reshape(len(value), -1) for value in measured.values()]
            measured["finite"] = torch.cat(finite, 1).all(1)
            self.records[row.name, task].write(numbers, measured)
            for number, finite in zip(numbers, measured["finite"]):
                if not finite:
                    path = self.clips[number].excerpt.path
                    tqdm.write(f"left out: {row.name}, {task}, {path}: samples are not finite, or "
                               "too large")

    def finite(self, row, task):
        """{number: measurements} of a row in a task, of the clips that could be measured."""
        records = self.records[row.name, task].read()
        return {number: record for number, record in records.items() if record["finite"]}

    def results(self, references):
        """{row: {task: {metric: [value, standard deviation, count]}}}; references: by task."""
        crossfades = None
        if ("Test set", "transition") in self.records:
            crossfades = self.finite(TEST_SET, "transition")
        results = {}
        for row in self.rows:
            results[row.name] = {}
            for task in row.tasks:
                records = self.finite(row, task)
                results[row.name][task] = figures(task, records, references[task], crossfades)
        return results


# ---- Table 1 -------------------------------------------------------------------------------------

def figures(task, records, reference, crossfades=None):
    """{metric: [value, standard deviation or None, count]} of a row in a task.

    records     {number: measurements} of the row; with fewer than two there are no figures
    reference   the training music's Reference
    crossfades  of a transition, the records of the raw cross-fades, which normalise realism
    """
    if len(records) < 2:
        return {}
    # FAD and KLD compare two sets.
    clips = [*records.values()]
    fad = frechet_distance(*reference.fad, *fad_gaussian(clips))
    kld = kl_divergence(reference.posterior, gather(clips, "posterior").mean(0))
    metrics = {"FAD": [fad, None, sum(len(clip["fad"]) for clip in clips)],
               "KLD": [kld.item(), None, len(clips)]}
    # MR compares each clip with its original, where there is one.
    if task in (*EDITED, "files"):
        metrics["MR"] = [gather(clips, "MR").double().mean().item(), None, len(clips)]
    # Of transitions: realism, track by track, as a share of the cross-fade's; and Figure 1.
    if task == "transition":
        both = sorted(records.keys() & crossfades.keys())
        if len(both) > 1:
            scores = []
            for group in (records, crossfades):
                embedding = gather([group[number] for number in both], "embedding")
                scores.append(realism(reference.embedding, embedding, radii=reference.radii))
            share = scores[0] / scores[1]
            metrics["Realism"] = [share.mean().item(), share.std().item(), len(both)]
        metrics["Figure 1"] = [gather(clips, "curve").mean(0).tolist(), None, len(clips)]
    return metrics


# Title, tasks of which a column has the figures, separated by "/", and metrics.
COLUMNS = (("Files", ("files",), ("FAD", "KLD", "MR")),
           ("Unconditional", ("unconditional",), ("FAD", "KLD")),
           ("Infill/Regeneration", ("infill", "regenerate"), ("FAD", "KLD", "MR")),
           ("Continuation", ("continuation",), ("FAD", "KLD", "MR")),
           ("Transitions", ("transition",), ("Realism",)),
           ("Cl. Guidance", ("embedding",), ("FAD", "KLD")))


def as_text(figure):
    """[value, standard deviation, count] -> "0.42" or "0.95±0.12"; "-" for None."""
    if figure is None:
        return "-"
    value, deviation, _ = figure
    text = f"{round(value, 2) + 0.0:.2f}"           # + 0.0, because -0.0 would be "-0.00"
    if deviation is not None:
        text += f"±{deviation:.2f}"
    return text


def cell(by_task, names, metric):
    """A metric of a row in one or two tasks: "0.39/0.42"; once if they are equal; "-" for none."""
    texts = [as_text(by_task.get(task, {}).get(metric)) for task in names]
    if len(set(texts)) == 1:
        return texts[0]
    return "/".join(texts)


def table_lines(results):
    """Table 1 as lines of text, its columns in the paper's order, without those that are empty.

    results: {row: {task: {metric: [value, standard deviation, count]}}}
    """
    columns = [["", *results]]
    for title, names, metrics in COLUMNS:
        heading = f"{title} "
        for metric in metrics:
            cells = [cell(by_task, names, metric) for by_task in results.values()]
            if set(cells) != {"-"}:
                columns.append([heading + metric, *cells])
                heading = ""
    # Each column as wide as its widest text.
    widths = [max(len(text) for text in column) for column in columns]
    lines = []
    for texts in zip(*columns):
        padded = [text.ljust(width) for text, width in zip(texts, widths)]
        lines.append("  ".join(padded).rstrip())
    return lines


def write_results(path, results, settings):
    """Print Table 1, and write it to `path` with every figure, count and setting."""
    # How many clips each task's figures come from.
    counts = {}
    for by_task in results.values():
        for task, metrics in by_task.items():
            if metrics:
                counts.setdefault(task, set()).add(metrics["KLD"][2])
    if not counts:
        raise UserError("nothing could be measured: at least two clips are needed", 1)

    # To the file, whole or not at all, and to the screen.
    figure = "[value, standard deviation, count]"
    table = {"settings": settings, "metric": figure, "rows": results}
    text = json.dumps(table, indent=1, allow_nan=False)
    sample.write_atomic(path, lambda file: file.write(text.encode()))
    print("\n".join(table_lines(results)))
    clips = [f"{'/'.join(map(str, sorted(counts[task])))} {task}" for task in sorted(counts)]
    fad, passt = settings["judges"]
    print(f"clips: {', '.join(clips)}; training music: {settings['excerpts']} excerpts")
    print(f"FAD by {fad}; KLD (of the sets) and realism by {passt}")
    print(f"all figures: {path}")


def warn(results, reference):
    """Say so if FAD comes from too few embeddings, on either side, for their dimensions."""
    counts = [reference.count]
    for by_task in results.values():
        counts += [metrics["FAD"][2] for metrics in by_task.values() if metrics]
    dimensions = len(reference.fad[0])
    if min(counts) <= dimensions:
        print(f"warning: FAD from n = {min(counts)} embeddings of {dimensions} dimensions is "
              "far too high: compare at equal n only")


# ---- what to evaluate ----------------------------------------------------------------------------

def clips_in(folder):
    """{name: path} of a folder's audio files, at any depth.

    A name is the path below the folder without its ending. UserError if two files have the same.
    """
    clips = {}
    for path in sample.find_files([folder]):
        name = os.path.splitext(os.path.relpath(path, folder))[0]
        if name in clips:
            raise UserError(f"{clips[name]} and {path} have the same name: remove one of them")
        clips[name] = path
    return clips


def count_samples(path):
    """Samples of a file at 44.1 kHz. UserError if it cannot be read."""
    facts = sample.probe(path)
    if isinstance(facts, str):                      # the reason why not
        raise UserError(f"{path} cannot be read ({facts})")
    frames, rate, _ = facts
    return frames * SAMPLE_RATE // rate


def pair_files(options):
    """[Clip] of the files with the same name in --originals and --generated.

    Each pair is cut to the length that both have. What cannot be read, ends within --region, or
    has no partner is left out, by name. Without --region, all of a file is the region.
    """
    originals, generated = clips_in(options.originals), clips_in(options.generated)
    for files, others, flag in ((generated, originals, "--originals"),
                                (originals, generated, "--generated")):
        for name in sorted(files.keys() - others.keys()):
            sample.say(f"left out: {files[name]}: {flag} has no file of that name")
    # The samples that a pair needs: the region, and what the judges need.
    region = options.region
    needed = 1
    if options.vggish:
        needed = math.ceil(VGGish.shortest * SAMPLE_RATE / VGGish.rate)
    if region:
        region = [round(second * SAMPLE_RATE) for second in region]
        needed = max(needed, region[1])
        if region[0] >= region[1]:
            raise UserError("--region must be two times, the first before the second")
    # What both files of a pair have.
    clips = []
    for name in sorted(originals.keys() & generated.keys()):
        try:
            n = min(count_samples(originals[name]), count_samples(generated[name]))
        except UserError as error:
            sample.say(f"left out: {error}")
            continue
        if n < needed:
            sample.say(f"left out: {generated[name]} (or its original) ends after "
                       f"{n / SAMPLE_RATE:.3f} s; {needed / SAMPLE_RATE:.3f} s are needed")
            continue
        span = Span(*(region or (0, n)), 0, n)
        pair = Excerpt(originals[name], 0, n), Excerpt(generated[name], 0, n)
        clips.append(Clip(*pair, {"files": span}))
    if not clips:
        raise UserError(f"--generated {options.generated} has no file that can be evaluated: give "
                        "files with the names of those in --originals, and a --region within them")
    return clips


def cut_clips(options, checkpoint):
    """[Clip] for the tasks of Sect. 4.3, excerpts of --data as long as the model's window."""
    window = checkpoint.window * checkpoint.hop
    spans = layout(window, checkpoint.hop)
    excerpts = find_excerpts(options.data, window, options.clips, options.seed)
    # Times as they are, rounded to the model's frames.
    for task in options.tasks:
        first, last = spans[task].a / SAMPLE_RATE, min(spans[task].b, spans[task].d) / SAMPLE_RATE
        sample.say(f"{task}: {first:.3f} to {last:.3f} s of {window / SAMPLE_RATE:.3f} s")
    return [Clip(*pair, spans) for pair in with_another(excerpts, options.seed)]


def model_rows(checkpoint, judges, options):
    """The model, its VAE, and the rows that need no model."""
    rows = sampled_rows(checkpoint, judges, options)
    if checkpoint.kind == "latent":
        rows.append(vae_row(checkpoint, options.tasks))
    return rows + fixed_rows(options)


def sampled_rows(checkpoint, judges, options):
    """The model with each sampler and number of steps, with the settings that sample.py has."""
    rows = []
    for sampler in options.sampler:
        for steps in options.steps:
            if sampler != "none":
                one = argparse.Namespace(**vars(options) | {"sampler": sampler, "steps": steps})
                settings = sample.Settings.of(one, checkpoint)
                rows.append(model_row(checkpoint, settings, options.given, judges, options.tasks))
    return rows


def fixed_rows(options):
    """The test set and the fillers, in the chosen tasks."""
    rows = []
    for row in (TEST_SET, *FILLERS):
        chosen = tuple(task for task in row.tasks if task in options.tasks)
        if chosen:
            rows.append(replace(row, tasks=chosen))
    return rows


# ---- command line --------------------------------------------------------------------------------

# Defaults of the flags that go with --data alone. The flags of sample.Settings go with it alone,
# too; --region goes with --generated alone, and the rest with both.
FOR_MODEL = {"model": "latent", "checkpoint": None, "weak": None, "tasks": TASKS, "clips": CLIPS,
             "sampler": [sample.Settings.sampler], "steps": [sample.Settings.steps]}
# The tasks in which a setting does something. One that is not listed acts in all tasks.
# Unconditional music is not guided here.
USED = sample.USED | {"trials": ("embedding",),
                      "equalise": (*sample.EDITS, "embedding")}


def make_parser(add_flags):
    """The parser, and the names of its options that are sample.Settings'."""
    parser = sample.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = sample.within(1, 2**31, int)

    # Flags that do not go with everything are None if they are not given; see FOR_MODEL.
    add = parser.add_argument_group("what to evaluate: a model, or files").add_argument
    add("--data", help="folder of test music, excerpts of which the model edits")
    add("--model", choices=("latent", "waveform"), help=f"which of the two ({FOR_MODEL['model']})")
    add("--checkpoint", help="of the model (the one shipped)")
    add("--weak", help="a weaker model to move away from (as in sample.py)")
    add("--tasks", nargs="+", choices=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)} (all)")
    add("--clips", type=number, help=f"excerpts of the test music, for each task ({CLIPS})")
    add("--generated", help="folder of files that any system edited, named like the originals")
    add("--originals", help="folder of the files that they were made from")
    add("--region", type=sample.seconds, nargs=2, metavar=("START", "END"),
        help="seconds of these files that were generated, for MR (all); FAD and KLD are of all")

    add = parser.add_argument_group("what it is compared with, and by").add_argument
    add("--reference", required=True, help="folder of training music")
    add("--reference-clips", type=number, default=REFERENCE_CLIPS,
        help="at most so many excerpts of it (%(default)s)")
    add("--classifier", help="checkpoint of train.py --model classifier (the one shipped)")
    add("--passt", help=f"official PaSST file, {PASST_FILE}".replace("%", "%%"))
    add("--vggish", help=f"official VGGish file, {VGGISH_FILE}")

    settings = []
    add = parser.add_argument_group("how the model samples").add_argument
    add("--sampler", nargs="+", choices=("ddpm", "ddim", "none"), metavar="SAMPLER",
        help="ddpm and ddim have a row each; none: only the rows that need no sampling "
        f"({sample.Settings.sampler})")
    add("--steps", nargs="+", type=number, help=f"a row each ({sample.Settings.steps})")

    def add_setting(*names, **kind):
        settings.append(add(*names, **kind).dest)
    add_flags(add_setting)

    add = parser.add_argument_group("how it runs").add_argument
    add("--batch", type=number, default=BATCH, help="clips at a time (%(default)s)")
    add("--seed", type=sample.within(0, 2**63, int), default=0, help="(%(default)s)")
    add("--device", default="auto", help="cpu, cuda or mps (%(default)s)")
    add("--out", type=Path,
        help="folder, on a disk that all processes share (runs/evaluate-latent, "
        "-waveform or -files)")
    return parser, settings


def parse(argv, add_flags=sample.Settings.add_flags):
    """The options; `given`: those of sample.Settings that the user gave, but sampler and steps.

    UserError for flags that are missing, or would do nothing.
    """
    parser, settings = make_parser(add_flags)
    options = parser.parse_args(argv)

    # One of the two ways to call it.
    files = options.generated or options.originals
    if bool(options.data) == bool(files) or bool(options.generated) != bool(options.originals):
        raise UserError("give either --data, test music for the model to edit, or both --generated "
                        "and --originals: files that any system edited, and what they were made "
                        "from")
    mode = "--generated" if files else "--data"
    uses = {"region": ["--generated"], **dict.fromkeys([*FOR_MODEL, *settings], ["--data"])}
    sample.refuse_idle(options, uses, mode, mode)
    if options.passt and options.classifier:
        raise UserError("--classifier does nothing with --passt: leave it out")

    # Without sampling, its settings do nothing.
    if options.sampler and set(options.sampler) == {"none"}:
        uses = dict.fromkeys(["steps", "weak", *settings], ["ddpm", "ddim"])
        sample.refuse_idle(options, uses, "none", "--sampler none")

    # What was given of the settings names a row; other flags get their defaults.
    options.given = {}
    for name in settings:
        if getattr(options, name) is not None:
            options.given[name] = getattr(options, name)
    for name, default in FOR_MODEL.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    for name in ("tasks", "sampler", "steps"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))     # each once
    for name in options.given:
        if not set(USED.get(name, TASKS)) & set(options.tasks):
            raise UserError(f"{sample.flag_of(name)} does nothing with --tasks "
                            f"{' '.join(options.tasks)}: leave it out")
    if options.given.get("xi") == 0 and "embedding" in options.tasks:
        raise UserError("--xi 0 turns off all guidance: leave it out, or give --tasks without "
                        "embedding")
    return options


def main(argv=None, add_flags=sample.Settings.add_flags, open_model=None, rows_of=model_rows):
    """An example brings its own model and rows, as with sample.main: see examples/cqtdiff.py."""
    options = parse(argv, add_flags)
    device = sample.pick_device(options.device)
    sample.join_processes(device)
    judges = Judges(options, device)

    # What to evaluate: files of any system, or a model on excerpts of the test music.
    if options.generated:
        name, digest = "files", None
        rows, clips = FILES, from_one_process(lambda: pair_files(options))
    else:
        if open_model:
            checkpoint = open_model(options, device)
            name = Path(checkpoint.path).stem
        else:
            checkpoint = sample.open_for_sampling(options, device)
            name = options.model
        digest = sample.file_digest(checkpoint.path)
        rows = rows_of(checkpoint, judges, options)
        clips = from_one_process(lambda: cut_clips(options, checkpoint))
    out = options.out or Path("runs") / f"evaluate-{name}"
    sample.prepare_folder(out, f"--out {out}")
    if len(clips) < 2:
        raise UserError("a single clip has no FAD: give more --clips, or more files")

    # The training music is measured in excerpts that are as long as what the judges get of a clip,
    # task by task, also for tasks that a later run may add; of files of several lengths, as long as
    # the median.
    length = {}
    for task in clips[0].spans:
        evaluated = [clip.spans[task].d - clip.spans[task].c for clip in clips]
        length[task] = statistics.median_low(evaluated)
    lengths = sorted(set(length.values()))
    music = measure_reference(lengths, judges, options, out, device)
    if sample.RANK == 0:
        references = {n: Reference([*music[n].read().values()]) for n in lengths}

    # All rows in all tasks; the processes share the work.
    evaluation = Evaluation(rows, clips, judges, out / "records", options.seed, device)
    evaluation.run(options.batch)

    # One process makes the table.
    if sample.RANK == 0:
        results = evaluation.results({task: references[n] for task, n in length.items()})
        named = ["reference", "reference_clips", "passt", "vggish", "classifier", "seed"]
        if options.data:
            named += ["data", "clips", "tasks"]
        else:
            named += ["generated", "originals", "region"]
        settings = {flag: getattr(options, flag) for flag in named}
        settings |= {"checkpoint": digest, "judges": judges.names,
                     "excerpts": len(references[lengths[0]].embedding),
                     "made with": {row.name: row.facts for row in rows if row.facts}}
        write_results(out / "table.json", results, settings)
        warn(results, references[lengths[0]])


if __name__ == "__main__":
    sample.run(main)
