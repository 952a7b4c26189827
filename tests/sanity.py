"""What a checkpoint's music is like, where Table 1 says nothing: ten tables, alone or together.

    python tests/sanity.py likeness attacks v-loss --data path/to/test
    python tests/sanity.py likeness --task infill --data path/to/test --sampler ddim
    python tests/sanity.py prompts memory --data path/to/test --train path/to/train --clips 18
    python tests/sanity.py example class --data path/to/test --train path/to/train

likeness   Four measures of the generated part alone, unspliced, with the same measures of real
           audio, of its reconstruction by the VAE, of the repeated context and of white noise.
           tonal: share of the power between 80 and 5000 Hz that lies at spectral peaks. pitch: how
           much more the notes agree with the clip's own context than with other clips' contexts.
           beat: how regular the spectral flux is. flux: how uneven it is. The real row is the aim:
           more is not better.
attacks    How many notes and strokes begin in a second, and how regularly (see `attacks`), for the
           rows of likeness.
noised     The attacks of real latents that are noised to a time t and denoised again, by DDPM from
           there down to t = 0, or in one step. Shows at which times the model loses attacks.
v-loss     The objective of App. B.1 on whole windows of the test music, two for each track, each at
           one time in every quarter of (0, 1), with fixed noise. Comparable between waveform
           models, and between latent models with one VAE.
prompts    Of continuations: is each nearer to its own context than to those of other clips? Does it
           have the spectrum and level of the real continuation? Do the clips differ from each other
           as real ones do?
memory     Is a continuation a copy of training music? Its highest correlation with any place there,
           and its distance to the nearest window, with those of real music that was not trained on.
example    Guidance by example against unguided samples of the same seeds. Does the distance fall?
           And for a judge that never guides and is no network (tests/judge.py): cosine of a sample
           with its own example and with the others, and how often its own is the nearest. Also for
           unguided samples that get the example's spectrum, and for the beginnings of the examples
           themselves; the judge knows their ends.
class      Guidance by class, likewise: do log-probabilities rise, for the guide and for the judge?
defaults   Each default of sampling against what it was chosen over, one change at a time, on the
           same clips and two seeds: measures of the tables above. A difference counts only where it
           is larger than what a seed does, the last line.
seams      Loops of five seconds, by --task loop, played twice: the rank of the spectral flux at the
           jump among all flux inside, which is 0.5 where there is no seam. Also of the same stretch
           untreated, and of one that is cross-faded over two seconds, and so shorter.
"""
import argparse
import functools
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import guidance
import sample
from diffusion import add_noise, v_loss, x0_from_v
from judge import Judge, read_track
from sample import SAMPLE_RATE, resample

SLOW_RATE = 11025                                   # Hz, at which waveforms are compared
# Centres of the third-octave bands from 50 Hz to 12 kHz.
THIRD_OCTAVES = [1000 * 2 ** (k / 3) for k in range(-13, 11)]


class Study:
    """The models, the test clips, and what the model makes of them: lists of audio (2, samples)."""

    def __init__(self, options):
        self.options = options
        self.device = sample.pick_device(options.device)
        self.checkpoint = sample.open_for_sampling(options, self.device)
        self.settings = sample.Settings.of(options, self.checkpoint)
        self.classifier = sample.open_checkpoint("classifier", options.classifier, self.device)
        self.window = self.checkpoint.window * self.checkpoint.hop              # samples
        self.spans = evaluate.layout(self.window, self.checkpoint.hop)
        self.generated = {}                         # by task, see `made`

    @functools.cached_property
    def clips(self):
        clips = self.excerpts(self.options.clips)
        if len(clips) < 2:
            raise sample.UserError(f"--data {self.options.data} has a single excerpt of "
                                   f"{self.window / SAMPLE_RATE:.2f} s: give more music")
        return clips

    @functools.cached_property
    def judge(self):
        return Judge(self.options.train, self.options.seconds)

    def excerpts(self, limit):
        """Up to `limit` whole windows of test music: one of each track, then a second of each.

        UserError if none can be read.
        """
        found = evaluate.find_excerpts(self.options.data, self.window, limit, self.options.seed)
        clips = []
        for excerpt in found:
            audio = evaluate.read_or_skip([excerpt])
            if audio:
                clips += audio
        if not clips:
            raise sample.UserError(f"--data {self.options.data} has no excerpt that can be read: "
                                   "give others")
        return clips

    def random(self, j):
        """The random numbers of clip j."""
        return evaluate.generator_of(self.options.seed, j)

    def predict(self, x_t, t):
        """v, as sample.generate has it."""
        return self.checkpoint.estimate(x_t, t, self.settings)

    def made(self, task):
        """The part of each clip that the model generates in this task."""
        if task not in self.generated:
            self.generated[task] = self.sampled(task, self.settings, self.options.seed)
        return self.generated[task]

    @torch.no_grad()
    def sampled(self, task, settings, seed):
        """The same with other settings, or another seed."""
        a, b = self.spans[task].a, self.spans[task].b
        C_L = a // self.checkpoint.hop
        C_R = (self.window - b) // self.checkpoint.hop
        parts = []
        for j, clip in enumerate(sample.progress(self.clips, task, unit="clip")):
            audio = sample.fill(self.checkpoint, task, clip[None].to(self.device), C_L, C_R,
                                settings, evaluate.generator_of(seed, j))
            parts.append(audio[0, :, a:b].cpu())
        return parts

    def real(self, task):
        """What really stood there, of each clip."""
        a, b = self.spans[task].a, self.spans[task].b
        return [clip[:, a:b] for clip in self.clips]

    @functools.cache
    def contexts(self, task):
        """The chroma of each clip's context, (clips, 12)."""
        a, b = self.spans[task].a, self.spans[task].b
        chromas = []
        for clip in self.clips:
            context = torch.cat([clip[:, :a], clip[:, b:]], 1)
            _, at_peaks, f = peaks(context.mean(0).double())
            chromas.append(chroma(at_peaks, f))
        return torch.stack(chromas)

    @functools.cache
    def prompts(self, task):
        """Embeddings of what precedes the generated part, (clips, width)."""
        a = self.spans[task].a
        return embed(self.classifier.net, [clip[:, :a] for clip in self.clips])

    @torch.no_grad()
    def through_vae(self, task):
        """The same part of each whole clip that was encoded and decoded."""
        a, b = self.spans[task].a, self.spans[task].b
        parts = []
        for clip in self.clips:
            x = self.checkpoint.encode(clip[None].to(self.device))
            parts.append(self.checkpoint.decode(x)[0, :, a:b].cpu())
        return parts

    def fillers(self, task):
        """{name: the part of each clip} of two ways to fill it without a model."""
        a, b = self.spans[task].a, self.spans[task].b
        repeated, noise = [], []
        for clip in self.clips:
            whole = sample.context_repeated(clip[None], a, self.window - b)
            repeated.append(whole[0, :, a:b])
        for j, clip in enumerate(self.clips):
            noise.append(torch.randn(2, b - a, generator=self.random(j)) * clip.std())
        return {"context repeated": repeated, "white noise": noise}

    def systems(self, task):
        """{name: the part of each clip}: real, the model's, through the VAE, and the fillers."""
        found = {"real": self.real(task), "model": self.made(task)}
        if self.checkpoint.kind == "latent":
            found["VAE"] = self.through_vae(task)
        return found | self.fillers(task)


@torch.no_grad()
def embed(classifier, clips):
    """The classifier's embeddings (n, width) of clips (2, samples)."""
    device = next(classifier.parameters()).device
    embeddings = []
    for clip in clips:
        _, embedding = classifier.listen(clip[None].to(device), SAMPLE_RATE)
        embeddings.append(embedding[0].cpu())
    return torch.stack(embeddings)


def autocorrelation(x):
    """x (n,) without its mean -> its correlation with itself at lags 0 .. n - 1, 1 at lag 0."""
    x = x - x.mean()
    spectrum = torch.fft.rfft(x, 2 * len(x)).abs().square()
    products = torch.fft.irfft(spectrum)[:len(x)]
    return products / (products[0] + 1e-9)


# ---- likeness ------------------------------------------------------------------------------------

def power(x, n, hop):
    """x (samples,) -> power spectra (frames, n / 2 + 1) under a symmetric Hann window."""
    window = torch.hann_window(n, periodic=False, dtype=x.dtype)
    frames = F.pad(x, (0, max(0, n - len(x)))).unfold(-1, n, hop) * window
    return torch.fft.rfft(frames).abs().square() + 1e-12


def around(S, width):
    """The `width` bins around each bin of S, mirrored at the ends: (frames, bins, width)."""
    return F.pad(S, (width // 2, width // 2), mode="reflect").unfold(-1, width, 1)


def peaks(x):
    """Power spectra S (frames, bins), the same at peaks only, and the bins' frequencies.

    From 80 to 5000 Hz, in frames of 186 ms. A peak stands 12 dB above the median of 61 bins; it
    includes two bins on each side.
    """
    S = power(x, 8192, 2048)
    f = torch.arange(4097, dtype=x.dtype) * SAMPLE_RATE / 8192
    inside = (f >= 80) & (f < 5000)
    S, f = S[:, inside], f[inside]
    top = (S == around(S, 5).amax(-1)) & (S > 10**1.2 * around(S, 61).median(-1).values)
    near_top = around(top.to(x.dtype), 5).amax(-1)
    return S, S * near_top, f


def chroma(at_peaks, f):
    """Amplitudes in the twelve pitch classes, a vector of length 1; inputs are from `peaks`."""
    pitch = (12 * (f / 440).log2()).round().long() % 12
    classes = torch.zeros(12, dtype=f.dtype)
    classes.index_add_(0, pitch, at_peaks.sqrt().sum(0))
    return classes / (classes.norm() + 1e-9)


def likeness(x, context, others):
    """tonal, pitch, beat and flux (4,) of audio (2, samples).

    context     the chroma of its own context, (12,); others: of other clips', (n, 12)
    """
    x = x.mean(0).double()
    S, at_peaks, f = peaks(x)
    tonal = at_peaks.sum() / S.sum()
    notes = chroma(at_peaks, f)
    pitch = notes @ context - (others @ notes).mean()

    # Spectral flux, and its highest autocorrelation at lags of 0.25 to 1 s.
    log_power = (power(x, 1024, 512) + 1e-6).log()
    rise = log_power.diff(dim=0).clamp(min=0).mean(1)                           # (frames - 1,)
    beat = autocorrelation(rise)[SAMPLE_RATE // 2048:SAMPLE_RATE // 512].max()
    flux = rise.std(correction=0) / (rise.mean() + 1e-9)                        # silence has 0
    return torch.stack([tonal, pitch, beat, flux])


def mean_likeness(clips, contexts):
    """Of clips, each with its own of the contexts (clips, 12): means over the clips, (4,)."""
    measured = []
    for j, clip in enumerate(clips):
        others = contexts[torch.arange(len(clips)) != j]
        measured.append(likeness(clip, contexts[j], others))
    return torch.stack(measured).mean(0)


@torch.no_grad()
def about_likeness(study):
    task = study.options.task
    print(f"likeness, {task}, {len(study.clips)} clips\n{'':18} tonal  pitch   beat   flux")
    contexts = study.contexts(task)
    for name, clips in study.systems(task).items():
        values = mean_likeness(clips, contexts)
        print(f"  {name:16}" + " ".join(f"{value:6.3f}" for value in values))


# ---- attacks -------------------------------------------------------------------------------------

FRAME, HOP = 2048, 256                  # samples
LOWEST, OCTAVES = 250, 5                # the bands: Hz, and up to 8 kHz
BEFORE, AFTER = 0.08, 0.06              # seconds whose mean powers are compared
AROUND = 0.25                           # seconds a side, of the mean rise
APART = 0.04                            # seconds between onsets in a band, at least
RISE = 0.7                              # the least rise: a factor of 2
CHANCE = 3                              # standard deviations that noise must not reach
FLOOR, QUIETEST = 1e-3, 1e-6            # of the band's own mean power, of that of all bands
NOISED = (0.1, 0.2, 0.35, 0.5, 0.8)     # times t


def in_frames(seconds):
    return max(1, round(seconds * SAMPLE_RATE / HOP))


def semitones(x):
    """x (samples,) -> power (60, frames) in each semitone from 250 Hz to 8 kHz; widths in Hz."""
    S = power(x, FRAME, HOP)
    f = torch.arange(FRAME // 2 + 1) * SAMPLE_RATE / FRAME
    edges = LOWEST * 2 ** (torch.arange(12 * OCTAVES + 1) / 12)
    inside = ((f >= edges[:-1, None]) & (f < edges[1:, None])).to(x.dtype)      # (60, bins)
    return inside @ S.T, inside.sum(1) * SAMPLE_RATE / FRAME


def onsets(x):
    """x (samples,) -> where sounds begin, in each third of an octave: (15, frames) boolean.

    An attack is a rise in power that lasts: the mean of the next 60 ms against that of the last 80
    ms, as a log ratio, in one semitone. So a note in a sounding chord counts, too. It must exceed
    the rises around it, so that a slow swell has none; and what noise of that bandwidth does by
    chance. Gain changes nothing and equalisation little, since only ratios within a band count.
    """
    P, width = semitones(x)
    P = P + FLOOR * P.mean(1, keepdim=True) + QUIETEST * P.mean() + 1e-12

    # The rise, and by how much it exceeds the mean rise around it.
    before, after, around = in_frames(BEFORE), in_frames(AFTER), in_frames(AROUND)
    past = F.avg_pool1d(F.pad(P, (before, 0), mode="replicate"), before, 1)[:, :P.shape[1]]
    coming = F.avg_pool1d(F.pad(P, (0, after - 1), mode="replicate"), after, 1)
    rise = (coming / past).log().clamp(min=0)                                   # (60, frames)
    usual = F.avg_pool1d(rise, 2 * around + 1, 1, around, count_include_pad=False)

    # The mean power of noise over T seconds and B Hz varies by about 1 / sqrt(1 + B T) of itself.
    deviation = (1 / (1 + width * BEFORE) + 1 / (1 + width * AFTER)).sqrt()
    excess = (rise - usual) / (RISE + CHANCE * deviation)[:, None]
    excess = excess.unflatten(0, (-1, 4)).amax(1)                               # (15, frames)

    # Onsets are peaks above 1; the first frame of a level one.
    excess = excess - 1e-6 * torch.arange(excess.shape[1])
    apart = in_frames(APART)
    return (excess > 1) & (excess == F.max_pool1d(excess, 2 * apart + 1, 1, apart))


def regularity(marks):
    """Of onsets (bands, frames): 0 to 1, how well they match themselves one and two beats later.

    The mean of the autocorrelations at a lag and at twice that lag, for the best of lags from 0.2
    to 1 s; onsets count as equal when they are less than about 40 ms apart.
    """
    t = torch.arange(-in_frames(0.06), in_frames(0.06) + 1) * HOP / SAMPLE_RATE
    bell = torch.exp(-(t / 0.02) ** 2 / 2)
    density = F.conv1d(marks.float().sum(0)[None, None], bell[None, None], padding="same")[0, 0]
    match = autocorrelation(density)
    near = in_frames(0.02)
    again = F.max_pool1d(match[None], 2 * near + 1, 1, near)[0]
    longest = min(in_frames(1.0), (len(match) - 1) // 2)
    if longest < in_frames(0.2):
        return 0.0
    lags = torch.arange(in_frames(0.2), longest + 1)
    return max(0.0, ((match[lags] + again[2 * lags]) / 2).max().item())


def attacks(x):
    """Audio (2, samples) -> onsets a second, the mean over third-octave bands; their regularity."""
    marks = onsets(x.mean(0).double())
    seconds = marks.shape[1] * HOP / SAMPLE_RATE
    return marks.sum(1).double().mean().item() / seconds, regularity(marks)


@torch.no_grad()
def noised(study, t, in_one_step):
    """The generated part of whole clips, noised to time t in the model's space and denoised.

    By sampling from there, with DDPM in steps as long as those of a whole run; or x0_hat.
    """
    span = study.spans[study.options.task]
    parts = []
    for j, clip in enumerate(sample.progress(study.clips, f"t = {t:g}", unit="clip")):
        random = study.random(j)
        x_0 = study.checkpoint.encode(clip[None].to(study.device))
        x_t, _ = add_noise(x_0, guidance.draw_noise(x_0, random), t)
        if in_one_step:
            v = study.predict(x_t, torch.full((1,), t, device=study.device))
            x_0 = x0_from_v(x_t, v, t)
        else:
            x_0 = guidance.sample(study.predict, x_t, guidance.Task(x_t, (), t), sampler="ddpm",
                                  steps=max(1, round(t * study.settings.steps)),
                                  generator=random)
        parts.append(study.checkpoint.decode(x_0)[0, :, span.a:span.b].cpu())
    return parts


def about_attacks(study):
    show_attacks(study, "attacks", study.systems(study.options.task))


def about_noised(study):
    systems = {"real": study.real(study.options.task)}
    for t in NOISED:
        systems[f"from t = {t:g}, in steps"] = noised(study, t, in_one_step=False)
    for t in NOISED:
        systems[f"from t = {t:g}, in one step"] = noised(study, t, in_one_step=True)
    show_attacks(study, "noised", systems)


def show_attacks(study, table, systems):
    """A row for each of systems {name: the part of each clip}; real is the first."""
    print(f"{table}, {study.options.task}, {len(study.clips)} clips")
    print(f"{'':28} onsets/s  of real  regularity  of real")
    for name, clips in systems.items():
        rate, regular = torch.tensor([attacks(clip) for clip in clips]).mean(0).tolist()
        if name == "real":
            real_rate, real_regular = rate, regular
        print(f"  {name:26} {rate:8.2f} {share(rate, real_rate):>8} "
              f"{regular:11.2f} {share(regular, real_regular):>8}")


def share(value, real):
    """Of what real music has, as text; a dash if that has none."""
    return f"{value / real:.2f}" if real else "-"


# ---- v-loss --------------------------------------------------------------------------------------

@torch.no_grad()
def about_v_loss(study):
    tracks = len(sample.find_files([study.options.data]))
    clips = study.excerpts(2 * tracks)
    # In random order, so that the times of a track's two windows are not alike.
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(0))
    losses = []
    for j, clip in enumerate(sample.progress(clips, "v-loss", unit="window")):
        x_0 = study.checkpoint.encode(clip[None].to(study.device))
        eps = torch.randn(x_0.shape, generator=evaluate.generator_of(0, j)).to(study.device)
        for quarter in range(4):
            t = (quarter + (order[j:j + 1].double() + 0.5) / len(clips)) / 4
            losses.append(v_loss(study.checkpoint.net, x_0, t, eps))
    quarters = torch.cat(losses).reshape(-1, 4).mean(0)
    print(f"v-loss on {len(clips)} whole windows: {quarters.mean():.4f}; by quarter of t: "
          + " ".join(f"{loss:.4f}" for loss in quarters))


# ---- prompts -------------------------------------------------------------------------------------

def own_prompt_wins(made, prompts):
    """How often made[i] is nearest to prompts[i] of all prompts, and nearer than to another one.

    Both are embeddings (n, width).
    """
    distance = torch.cdist(made, prompts)
    own = distance.diag()[:, None]
    n = len(made)
    nearest = distance.argmin(1) == torch.arange(n)
    return nearest.double().mean().item(), ((own < distance).sum() / (n * (n - 1))).item()


def band_levels(clip):
    """Power of (2, n) in the third-octave bands, in dB: (bands,)."""
    window = torch.hann_window(8192)
    spectrum = torch.stft(clip, 8192, window=window, return_complex=True).abs().square()
    spectrum = spectrum.mean((0, 2))
    f = torch.linspace(0, SAMPLE_RATE / 2, len(spectrum))
    powers = []
    for centre in THIRD_OCTAVES:
        inside = (f >= centre * 2 ** (-1 / 6)) & (f < centre * 2 ** (1 / 6))
        powers.append(spectrum[inside].sum())
    return 10 * torch.log10(torch.stack(powers) + 1e-9)


def level(clip):
    """In dB."""
    return 10 * torch.log10(clip.square().mean() + 1e-9)


def about_prompts(study):
    made = study.made("continuation")
    real = study.real("continuation")
    repeated = study.fillers("continuation")["context repeated"]

    # Does each follow from its own prompt?
    embeddings = {"generated": embed(study.classifier.net, made),
                  "context repeated": embed(study.classifier.net, repeated),
                  "real continuation": embed(study.classifier.net, real)}
    of_prompts = study.prompts("continuation")
    print("own prompt wins: nearest of all, and against one other "
          f"(chance {1 / len(made):.2f} and 0.50)")
    for name, of_clips in embeddings.items():
        nearest, nearer = own_prompt_wins(of_clips, of_prompts)
        print(f"  {name:18} {nearest:.2f}  {nearer:.2f}")

    # How much of it is the repeated context, from which a small model starts?
    means = []
    for clips in (made, real):
        pairs = zip(clips, repeated)
        alike = [F.cosine_similarity(x.flatten(), y.flatten(), dim=0) for x, y in pairs]
        means.append(torch.stack(alike).mean())
    print("waveform correlation with the context repeated: "
          "generated {:.2f}, real {:.2f}".format(*means))

    # Do they differ from each other as real ones do?
    spread = torch.pdist(embeddings["generated"]).mean()
    real_spread = torch.pdist(embeddings["real continuation"]).mean()
    print("mean distance among the clips' embeddings: "
          f"generated {spread:.3f}, real {real_spread:.3f}")

    # Have they the sound of what follows?
    pairs = list(zip(made, real))
    distance = torch.stack([evaluate.mel_distance(x, y, SAMPLE_RATE) for x, y in pairs]).mean()
    louder = torch.stack([level(x) - level(y) for x, y in pairs])                   # (clips,)
    difference = torch.stack([band_levels(x) - band_levels(y) for x, y in pairs])   # (clips, bands)
    mean = difference.mean(0)
    print(f"mel distance to the real continuation: {distance:.2f}")
    print(f"level against the real continuation: {louder.mean():+.1f} dB on average, "
          f"{louder.abs().mean():.1f} dB in size")
    print("third-octave bands against the real continuation, on average, dB:")
    by_band = zip(THIRD_OCTAVES, mean)
    print("  " + "  ".join(f"{centre:.0f} Hz {value:+.1f}" for centre, value in by_band))
    print(f"  largest: {mean.abs().max():.1f} dB; "
          f"mean size for a single clip: {difference.abs().mean():.1f} dB")


# ---- memory --------------------------------------------------------------------------------------

def slow(clip):
    """(2, n) at 44.1 kHz -> mono at SLOW_RATE, (n',)."""
    return resample(clip.mean(0, keepdim=True), SAMPLE_RATE, SLOW_RATE)[0]


def best_correlation(excerpts, track):
    """Highest normalised correlation of each excerpt (n,) with any place of the track (m,), m >= n.

    Places that are nearly silent count as 40 dB below the track, so that they resemble nothing.
    """
    n = len(excerpts[0])
    size = 2 ** math.ceil(math.log2(n + len(track)))
    spectrum = torch.fft.rfft(track, size)
    energy = F.pad(track.double().square().cumsum(0), (1, 0))
    least = 1e-4 * energy[-1] * n / len(track) + 1e-9
    norm = (energy[n:] - energy[:-n]).clamp(min=least).sqrt()       # of the track, at each place
    best = []
    for excerpt in excerpts:
        products = torch.fft.irfft(spectrum * torch.fft.rfft(excerpt, size).conj(), size)
        best.append((products[:len(norm)].abs() / norm).max() / (excerpt.norm() + 1e-9))
    return torch.stack(best).float()


def about_memory(study):
    """Nearest training music, by embeddings of windows of the same length and as waveforms."""
    # What is too short to be compared is left out, and said, before any work is done.
    span = study.spans["continuation"]
    n = span.b - span.a
    paths = sample.survey(study.options.train, n, "--train", "give others")

    made = study.made("continuation")
    real = study.real("continuation")
    excerpts = [slow(clip) for clip in (*made, *real)]
    best = torch.zeros(len(excerpts))
    windows = []                                    # embeddings of the training music
    for path in sample.progress(paths, "memory", unit="track"):
        track = read_track(path)
        if track.shape[1] >= n:
            best = torch.maximum(best, best_correlation(excerpts, slow(track)))
            parts = track.unfold(1, n, n // 2).transpose(0, 1)                  # (windows, 2, n)
            windows.append(embed(study.classifier.net, parts))
    windows = torch.cat(windows)

    print(f"nearest of {len(windows)} training windows: waveform correlation (median, highest); "
          "embedding distance (median)")
    both = {"generated": (made, best[:len(made)]), "real": (real, best[len(made):])}
    for name, (clips, correlations) in both.items():
        nearest = torch.cdist(embed(study.classifier.net, clips), windows).min(1).values
        print(f"  {name:18} {correlations.median():.2f} {correlations.max():.2f}   "
              f"{nearest.median():.3f}")


# ---- guidance by example and by class ------------------------------------------------------------

@torch.no_grad()
def guided_pairs(study, guides, examples=None):
    """(audio without guidance, audio with it), for each guide (a function z -> Task).

    Both from the same random numbers. With its example, if any, guidance gives the spectrum, too.
    """
    frames = round(study.options.seconds * SAMPLE_RATE / study.checkpoint.hop)
    nothing = torch.zeros(1, 2, frames * study.checkpoint.hop, device=study.device)
    plain, guided = [], []
    for j, guide in enumerate(sample.progress(guides, "guidance", unit="case")):
        example = None
        if examples:
            example = examples[j][None].to(study.device)
        fixed = (study.checkpoint, "unconditional", nothing, 0, 0, study.settings)
        without = sample.fill(*fixed, study.random(j))
        plain.append(without[0].cpu())
        along = sample.fill(*fixed, study.random(j), guides=(guide,), example=example)
        guided.append(along[0].cpu())
    return plain, guided


def change(plain, guided):
    """Mean mel distance between samples without and with guidance."""
    pairs = zip(plain, guided)
    return torch.stack([evaluate.mel_distance(y, x, SAMPLE_RATE) for x, y in pairs]).mean()


def own_and_others(made, aims):
    """Mean cosine of made[i] with aims[i], with the others, and how often the nearest is its own.

    Both are unit vectors (n, width).
    """
    cosine, n = made @ aims.T, len(made)
    own = cosine.diag()
    right = (cosine.argmax(1) == torch.arange(n)).double().mean()
    others = (cosine.sum() - own.sum()) / max(1, n * (n - 1))
    return own.mean().item(), others.item(), right.item()


def about_examples(study):
    examples, passt, judge = study.clips, study.classifier.net, study.judge
    guides = []
    for clip in examples:
        example = clip[None].to(study.device)
        guides.append(sample.example_guide(study.checkpoint, passt, example))
    plain, guided = guided_pairs(study, guides, examples)

    # For the guide: distances to the example.
    wanted = embed(passt, examples)
    before = (embed(passt, plain) - wanted).norm(dim=1)
    after = (embed(passt, guided) - wanted).norm(dim=1)
    print(f"by example, {len(examples)} cases, mel distance to the unguided "
          f"{change(plain, guided):.2f}: distance to the example, median "
          f"{before.median():.3f} -> {after.median():.3f}, nearer in {(after < before).sum()}")

    # For the judge: the end of each example is the aim, its start the row "real". Another row is
    # unguided music with the example's spectrum.
    n = plain[0].shape[1]
    flat = torch.ones(n)
    equalised = []
    for x, example in zip(plain, examples):
        wanted_spectrum = sample.spectrum(example[None], torch.ones(example.shape[1]))
        equalised.append(sample.equalise(x[None], flat, wanted_spectrum)[0])
    rows = {"unguided": plain, "with its spectrum alone": equalised, "guided": guided,
            "real": [clip[:, :n] for clip in examples]}

    def judged(clips):
        return F.normalize(torch.cat([judge.embedding(clip[None]) for clip in clips]))

    own_aims = judged([clip[:, n:] for clip in examples])
    print(f"  the judge: {'':22} cosine with its own, with others; "
          f"nearest is its own (chance {1 / len(examples):.2f})")
    for name, clips in rows.items():
        own, others, right = own_and_others(judged(clips), own_aims)
        print(f"    {name:24} {own:.3f}  {others:.3f}  {right:.2f}")


def wanted_class(scores, aims):
    """Of scores (cases, classes): in how many cases the wanted class is the likeliest, and its
    log-probabilities (cases,). aims: the indices of the wanted classes.
    """
    logp = scores.log_softmax(1).gather(1, aims[:, None])[:, 0]
    return (scores.argmax(1) == aims).sum().item(), logp


@torch.no_grad()
def about_classes(study):
    classifier, judge = study.classifier, study.judge
    wanted = [classifier.classes[j % len(classifier.classes)] for j in range(study.options.clips)]
    missing = sorted(set(wanted) - set(judge.classes))
    if missing:
        raise sample.UserError(f"--train has no folder {', '.join(missing)}: "
                               "the classifier has these classes")
    guides = [sample.class_guide(study.checkpoint, classifier, {name: 1.0}) for name in wanted]
    plain, guided = guided_pairs(study, guides)
    print(f"by class, {len(wanted)} cases, mel distance to the unguided "
          f"{change(plain, guided):.2f}")

    def guide_scores(audio):
        return classifier.net.listen(audio.to(study.device), SAMPLE_RATE)[0].cpu()

    evaluators = {"the guide": (guide_scores, classifier.classes),
                  "the judge": (judge.scores, judge.classes)}
    for evaluator, (scores, classes) in evaluators.items():
        aims = torch.tensor([classes.index(name) for name in wanted])
        before = torch.cat([scores(clip[None]) for clip in plain])              # (cases, classes)
        after = torch.cat([scores(clip[None]) for clip in guided])
        right, logp = wanted_class(before, aims)
        right_now, logp_now = wanted_class(after, aims)
        gain = logp_now - logp
        print(f"  to {evaluator} the wanted class is the likeliest in {right}, guided in "
              f"{right_now}; log-probability {gain.mean():+.2f}, up in {(gain > 0).sum()}")


# ---- seams of loops ------------------------------------------------------------------------------

def looped(study, stretch, random):
    """A stretch (2, n) as --task loop makes it."""
    fade = sample.whole_frames(sample.FADE["loop"], study.checkpoint, SAMPLE_RATE)
    track, a = sample.repeated(sample.Track(stretch, SAMPLE_RATE), fade)
    n = stretch.shape[-1]
    edit = sample.Edit(study.checkpoint, track, a, n, repeats=n)
    audio = sample.fill(study.checkpoint, "infill", edit.context(whole=False).to(study.device),
                        edit.C_L, edit.C_R, study.settings, random, spans=edit.spans)
    return edit.splice(audio[0].cpu(), sample.SPLICE)


def cross_faded(stretch):
    """The stretch without its first two seconds, which its end fades into."""
    fade = round(sample.FADE["loop"] * SAMPLE_RATE)
    end = sample.blend(stretch[:, -fade:], stretch[:, :fade])
    return torch.cat([stretch[:, fade:-fade], end], 1)


def rank_of_jump(loop):
    """Of the flux where a loop (2, n) begins again, among all flux inside it: from 0 to 1."""
    n = loop.shape[-1]
    twice = torch.cat([loop, loop], 1).mean(0).double()

    def flux(x):
        """The larger of two successive rises, of frames of 1024 samples every 512."""
        log_power = (power(x, 1024, 512) + 1e-6).log()
        rise = log_power.diff(dim=0).clamp(min=0).mean(1)
        return torch.maximum(rise[1:], rise[:-1])

    # Of three frames the first ends at the jump, the second has it in its middle.
    at_jump = flux(twice[n - 1024:n + 1024])[0]
    inside = flux(twice[:n])
    return (inside < at_jump).double().mean().item()


@torch.no_grad()
def about_seams(study):
    ranks = {"loop": [], "untreated": [], "cross-faded": []}
    for j, clip in enumerate(sample.progress(study.clips, "loops", unit="clip")):
        stretch = clip[:, :5 * SAMPLE_RATE]
        ranks["loop"].append(rank_of_jump(looped(study, stretch, study.random(j))))
        ranks["untreated"].append(rank_of_jump(stretch))
        ranks["cross-faded"].append(rank_of_jump(cross_faded(stretch)))
    print(f"rank of the flux at the jump, {len(study.clips)} loops: median, highest")
    for name, values in ranks.items():
        values = torch.tensor(values)
        print(f"  {name:12} {values.quantile(0.5):.2f}  {values.max():.2f}")


# ---- the defaults --------------------------------------------------------------------------------

def alternatives(study, task):
    """{what is done instead of a default: the settings}; only what makes a difference."""
    settings = study.settings
    printed = argparse.Namespace(as_printed=True, sampler=settings.sampler, steps=settings.steps,
                                 precision=settings.precision)
    found = {
        "x_t is projected": replace(settings, project="x_t"),
        "ends at t = 0": replace(settings, t_end=0.0),
        "no weak model": replace(settings, away=0.0),
        "not equalised": replace(settings, equalise=False),
        "xi without level": replace(settings, keep_level=False),
        "DDIM": replace(settings, sampler="ddim"),
        "a quarter of xi": replace(settings, xi=settings.xi / 4),
        "four times xi": replace(settings, xi=4 * settings.xi),
        "as printed": sample.Settings.of(printed, study.checkpoint),
    }
    if task in sample.REPEATING:
        found |= {
            "from noise alone": replace(settings, repeats=False),
            "k = 0.7": replace(settings, repeats=True, k=0.7),
            "k = 0.8": replace(settings, repeats=True, k=0.8),
        }
    if task in sample.FROM_X_BAR:
        found |= {
            "k = 0.85": replace(settings, k=0.85),
            "starts at t = 1": replace(settings, start_from="paper"),
        }
    return {name: other for name, other in found.items() if other != settings}


def qualities(clips, study, task):
    """Measures of the clips' generated parts, {name: number}, means over the clips."""
    tonal, pitch, beat, flux = mean_likeness(clips, study.contexts(task)).tolist()
    onsets, regular = torch.tensor([attacks(clip) for clip in clips]).mean(0).tolist()
    nearest, _ = own_prompt_wins(embed(study.classifier.net, clips), study.prompts(task))
    pairs = list(zip(clips, study.real(task)))
    louder = torch.stack([level(x) - level(y) for x, y in pairs]).abs().mean()
    bands = torch.stack([band_levels(x) - band_levels(y) for x, y in pairs]).abs().mean()
    distance = torch.stack([evaluate.mel_distance(x, y, SAMPLE_RATE) for x, y in pairs]).mean()
    return {"tonal": tonal, "pitch": pitch, "beat": beat, "flux": flux,
            "onsets/s": onsets, "regular": regular, "prompt": nearest, "MR": distance.item(),
            "dB": louder.item(), "bands dB": bands.item()}


@torch.no_grad()
def about_defaults(study):
    task = study.options.task
    rows = {"as it is": study.settings} | alternatives(study, task)
    real = qualities(study.real(task), study, task)
    print(f"defaults, {task}, {len(study.clips)} clips, means of two seeds\n{'':18}"
          + "".join(f"{name:>9}" for name in real))

    def line(name, values):
        print(f"  {name:16}" + "".join(f"{value:9.3f}" for value in values), flush=True)

    line("real", real.values())
    differences = []
    for name, settings in rows.items():
        both = []
        for seed in (study.options.seed, study.options.seed + 1):
            clips = study.sampled(task, settings, seed)
            both.append(list(qualities(clips, study, task).values()))
        one, two = torch.tensor(both)
        line(name, (one + two) / 2)
        differences.append(one - two)
    # A mean of two seeds deviates by half of their difference, as a root mean square over the rows.
    line("a seed's share", torch.stack(differences).square().mean(0).sqrt() / 2)


# ---- command line --------------------------------------------------------------------------------

TABLES = {
    "likeness": about_likeness,
    "attacks": about_attacks,
    "noised": about_noised,
    "v-loss": about_v_loss,
    "prompts": about_prompts,
    "memory": about_memory,
    "example": about_examples,
    "class": about_classes,
    "seams": about_seams,
    "defaults": about_defaults,
}
NEED_TRAIN = ("memory", "example", "class")


def main(argv=None):
    parser = sample.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tables", nargs="+", choices=TABLES, metavar="TABLE", help="of those above")
    add("--model", choices=("latent", "waveform"), default="latent", help="(%(default)s)")
    add("--checkpoint", help="of the model (the one shipped)")
    add("--weak", help="a weaker model to move away from (as in sample.py)")
    add("--classifier", help="guides, and embeds for prompts and memory (the one shipped)")
    add("--data", required=True, help="folder of test music")
    add("--train", nargs="+", help="memory, example, class: folders of the training music")
    add("--task", choices=("continuation", "infill", "regenerate"), default="continuation",
        help="likeness, attacks, noised, defaults: what the model makes (%(default)s)")
    add("--clips", type=sample.within(2, 100000, int), default=18,
        help="excerpts of the test music, or guided cases (%(default)s)")
    add("--seconds", type=sample.within(0.1, 2.9), default=2.0,
        help="example, class: length of a sample (%(default)s)")
    add("--sampler", choices=("ddim", "ddpm"), help=f"({sample.Settings.sampler})")
    add("--steps", type=sample.within(1, 100000, int), help=f"({sample.Settings.steps})")
    sample.Settings.add_flags(add)
    add("--seed", type=sample.within(0, 2**63, int), default=0, help="(%(default)s)")
    add("--device", default="auto", help="cpu, cuda or mps (%(default)s)")
    options = parser.parse_args(argv)
    for table in options.tables:
        if table in NEED_TRAIN and not options.train:
            raise sample.UserError(f"--train is missing: {table} needs folders of training music")
    if options.trials and not {"example", "class"} & set(options.tables):
        raise sample.UserError("--trials does nothing without example or class: leave it out")

    study = Study(options)
    for table in options.tables:
        TABLES[table](study)


if __name__ == "__main__":
    sample.run(main, "take shorter --seconds, or --device cpu")
