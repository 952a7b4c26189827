"""What a checkpoint's music is like, where Table 1 is silent: six tables, each by itself or together.

    python tests/sanity.py likeness v-loss --data path/to/test
    python tests/sanity.py likeness --task infill --data path/to/test --sampler ddpm
    python tests/sanity.py prompts memory --data path/to/test --train path/to/train --clips 18
    python tests/sanity.py example class --data path/to/test --train path/to/train

likeness   Does it sound like music? Four measures of the generated part alone, not spliced, beside those of what really
           stood there, of its reconstruction by the VAE, of the context repeated and of white noise. tonal: the share
           of the power between 80 and 5000 Hz that lies at spectral peaks. pitch: how much more alike the notes are to
           those of the clip's own context than to those of other clips'. beat: how regular the onsets are. flux: how
           uneven, onsets against a steady wash. To be read beside the real row: more is not better.
v-loss     The objective of App. B.1 on whole windows of the test music, two of each track, each at a time in every
           quarter of (0, 1), the noise fixed. Comparable between models of one kind.
prompts    Of continuations: is each nearer to its own prompt than to other clips' prompts, has it the spectrum and the
           level of the music that really follows, and do the clips differ among each other as real ones do?
memory     Is a continuation an excerpt of the training music? Its highest correlation with any place there, and its
           distance to the nearest window; both to be compared with those of real music that was not trained on.
example    Guidance by example against samples of the same seeds without it: does the distance fall? And to a listener
           that never guides and is no network (tests/judge.py): the cosine of a sample's embedding with that of its own
           reference and with those of the others, how often the nearest reference is its own, and all of that for
           samples that have only their reference's spectrum, and for other seconds of the references' own tracks.
class      Guidance by class, likewise: do the log-odds rise, for the guide and for the other listener?
"""
import argparse
import functools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import sample
import tasks
from diffusion import v_loss
from judge import Judge
from sample import ABOVE
from sample import SAMPLE_RATE

BANDS = [1000 * 2 ** (k / 3) for k in range(-13, 11)]       # middles of the third-octave bands from 50 Hz to 12 kHz
SLOW_RATE = 11025                                           # Hz, at which waveforms are compared


class Study:
    """The models, the clips of the test music, and what the model made of them; audio is a list of (2, samples)."""

    def __init__(self, options):
        self.options, device = options, sample.pick_device(options.device)
        self.checkpoint = sample.open_checkpoint(options.model, options.checkpoint, device)
        classifier = sample.open_checkpoint("classifier", options.listener, device)
        self.listener, self.classes = classifier.net, classifier.classes
        self.settings = sample.Settings.of(options, self.checkpoint)
        self.window, self.device = self.checkpoint.window * self.checkpoint.hop, device
        self.spans, self.known = evaluate.layout(self.window, self.checkpoint.hop), {}

    @functools.cached_property
    def clips(self):
        return self.excerpts(self.options.clips)

    @functools.cached_property
    def judge(self):
        return Judge(self.options.train, self.options.seconds)

    def excerpts(self, limit):
        """Whole windows of the test music: one of each track, then a second of each, and so on, up to the limit."""
        found = evaluate.find_excerpts(self.options.data, self.window, limit, self.options.seed)
        return [audio[0] for excerpt in found if (audio := evaluate.read_or_skip([excerpt]))]

    @torch.no_grad()
    def made(self, task):
        """The part of each clip that the model generates in this task."""
        if task not in self.known:
            span, self.known[task] = self.spans[task], []
            for j, clip in enumerate(sample.progress(self.clips, task, unit="clip")):
                clips = evaluate.Batch(task, span, clip[None].to(self.device), None,
                                       [evaluate.generator_of(self.options.seed, j)])
                audio = evaluate.unspliced(self.checkpoint, clips, self.settings)[0].cpu()
                self.known[task].append(audio[:, span.a:span.b])
        return self.known[task]


@torch.no_grad()
def embed(listener, clips):
    """The listener's embeddings (n, width) of clips (2, samples)."""
    device = next(listener.parameters()).device
    return torch.stack([listener.listen(clip[None].to(device), SAMPLE_RATE)[1][0].cpu() for clip in clips])


# ---- likeness -------------------------------------------------------------------------------------------------------

def power(x, n, hop):
    """x (samples,) -> power spectra (frames, n / 2 + 1) under a symmetric Hann window."""
    frames = F.pad(x, (0, max(0, n - len(x)))).unfold(-1, n, hop) * torch.hann_window(n, periodic=False, dtype=x.dtype)
    return torch.fft.rfft(frames).abs().square() + 1e-12


def around(S, width):
    """The `width` bins around each bin of S (frames, bins), mirrored at the ends: (frames, bins, width)."""
    return F.pad(S, (width // 2, width // 2), mode="reflect").unfold(-1, width, 1)


def peaks(x):
    """Power (frames, bins) from 80 to 5000 Hz in frames of 186 ms, as it is and only within two bins of peaks that
    stand 12 dB above the median of 61 bins; and the frequencies of the bins."""
    S, f = power(x, 8192, 2048), torch.arange(4097, dtype=x.dtype) * SAMPLE_RATE / 8192
    S, f = S[:, (f >= 80) & (f < 5000)], f[(f >= 80) & (f < 5000)]
    top = (S == around(S, 5).amax(-1)) & (S > 10**1.2 * around(S, 61).median(-1).values)
    return S, S * around(top.to(x.dtype), 5).amax(-1), f


def chroma(at_peaks, f):
    """Of the power at peaks (frames, bins) and the frequencies (bins,) that `peaks` gives: amplitudes in the twelve
    classes of pitch, as a vector of length 1."""
    classes = torch.zeros(12, dtype=f.dtype)
    classes.index_add_(0, (12 * (f / 440).log2()).round().long() % 12, at_peaks.sqrt().sum(0))
    return classes / (classes.norm() + 1e-9)


def likeness(x, context, others):
    """tonal, pitch, beat and flux (4,) of audio (2, samples); context: chroma of its own, others: (n, 12)."""
    x = x.mean(0).double()
    S, at_peaks, f = peaks(x)
    notes = chroma(at_peaks, f)
    rise = (power(x, 1024, 512) + 1e-6).log().diff(dim=0).clamp(min=0).mean(1)                 # (frames - 1,)
    onsets = rise - rise.mean()
    spectrum = torch.fft.rfft(onsets, 2 * len(onsets)).abs().square()
    lags = torch.fft.irfft(spectrum)[:len(onsets)]                                              # autocorrelation
    beat = lags[SAMPLE_RATE // 2048:SAMPLE_RATE // 512].max() / (lags[0] + 1e-9)                # 0.25 to 1 s
    return torch.stack([at_peaks.sum() / S.sum(), notes @ context - (others @ notes).mean(), beat,
                        rise.std(correction=0) / rise.mean()])


@torch.no_grad()
def about_likeness(study):
    task = study.options.task
    a, b, checkpoint = study.spans[task].a, study.spans[task].b, study.checkpoint
    systems = {"model": study.made(task), "real": [clip[:, a:b] for clip in study.clips]}
    if checkpoint.kind == "latent":
        systems["VAE"] = [checkpoint.decode(checkpoint.encode(clip[None].to(study.device)))[0, :, a:b].cpu()
                          for clip in study.clips]
    systems["context repeated"] = [clip[:, torch.arange(a, b) % a] for clip in study.clips]
    systems["white noise"] = [torch.randn(2, b - a, generator=evaluate.generator_of(study.options.seed, j)) * clip.std()
                              for j, clip in enumerate(study.clips)]
    beside = [torch.cat([clip[:, :a], clip[:, b:]], 1).mean(0).double() for clip in study.clips]
    contexts = torch.stack([chroma(*peaks(x)[1:]) for x in beside])                             # (clips, 12)
    print(f"likeness, {task}, {len(study.clips)} clips\n{'':18} tonal  pitch   beat   flux")
    for name, clips in systems.items():
        values = torch.stack([likeness(clip, contexts[j], contexts[torch.arange(len(clips)) != j])
                              for j, clip in enumerate(clips)]).mean(0)
        print(f"  {name:16}" + " ".join(f"{value:6.3f}" for value in values))


# ---- v-loss ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def about_v_loss(study):
    clips = study.excerpts(2 * len(sample.find_files([study.options.data])))
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(0))        # a track's times lie apart
    losses = []
    for j, clip in enumerate(sample.progress(clips, "v-loss", unit="window")):
        x_0 = study.checkpoint.encode(clip[None].to(study.device))
        eps = torch.randn(x_0.shape, generator=evaluate.generator_of(0, j)).to(study.device)
        t = (torch.arange(4, dtype=torch.float64) + (order[j] + 0.5) / len(clips)) / 4
        losses.append(torch.cat([v_loss(study.checkpoint.net, x_0, t[i:i + 1], eps) for i in range(4)]))
    quarters = torch.stack(losses).mean(0)
    print(f"v-loss on {len(clips)} whole windows: {quarters.mean():.4f}; by quarter of t: "
          + " ".join(f"{loss:.4f}" for loss in quarters))


# ---- prompts --------------------------------------------------------------------------------------------------------

def own_prompt_wins(made, prompts):
    """Embeddings (n, width) -> how often made[i] is nearest to prompts[i] of all, and nearer than to another one."""
    distance = torch.cdist(made, prompts)
    own = distance.diag()[:, None]
    n = len(made)
    nearest = distance.argmin(1) == torch.arange(n)
    return nearest.double().mean().item(), ((own < distance).sum() / (n * (n - 1))).item()


def band_levels(clip):
    """Power of (2, n) in the third-octave bands, in dB: (bands,)."""
    spectrum = torch.stft(clip, 8192, window=torch.hann_window(8192), return_complex=True).abs().square().mean((0, 2))
    frequency = torch.linspace(0, SAMPLE_RATE / 2, len(spectrum))
    inside = [(frequency >= middle * 2 ** (-1 / 6)) & (frequency < middle * 2 ** (1 / 6)) for middle in BANDS]
    return 10 * torch.log10(torch.stack([spectrum[band].sum() for band in inside]) + 1e-9)


def level(clip):
    return 10 * torch.log10(clip.square().mean() + 1e-9)


def about_prompts(study):
    a, made = study.spans["continuation"].a, study.made("continuation")
    prompts, real = [clip[:, :a] for clip in study.clips], [clip[:, a:] for clip in study.clips]
    repeated = [prompt[:, torch.arange(clip.shape[1]) % a] for prompt, clip in zip(prompts, real)]
    before, heard = embed(study.listener, prompts), embed(study.listener, made)
    print(f"own prompt wins: nearest of all, and against one other (chance {1 / len(made):.2f} and 0.50)")
    for name, embeddings in (("generated", heard), ("context repeated", embed(study.listener, repeated)),
                             ("real continuation", embed(study.listener, real))):
        print("  {:18} {:.2f}  {:.2f}".format(name, *own_prompt_wins(embeddings, before)))
    print("mean distance among the clips' embeddings: generated "
          f"{torch.pdist(heard).mean():.3f}, real {torch.pdist(embed(study.listener, real)).mean():.3f}")
    difference = torch.stack([band_levels(x) - band_levels(y) for x, y in zip(made, real)])           # (clips, bands)
    distance = torch.stack([evaluate.mel_distance(x, y, SAMPLE_RATE) for x, y in zip(made, real)]).mean()
    print(f"mel distance to the real continuation: {distance:.2f}")
    mean, each = difference.mean(0), torch.stack([level(x) - level(y) for x, y in zip(made, real)])
    print(f"level against the real continuation: {each.mean():+.1f} dB on average, {each.abs().mean():.1f} dB in size")
    print("third-octave bands against the real continuation, on average, dB:")
    print("  " + "  ".join(f"{middle:.0f} Hz {value:+.1f}" for middle, value in zip(BANDS, mean)))
    print(f"  largest: {mean.abs().max():.1f} dB; mean size for a single clip: {difference.abs().mean():.1f} dB")


# ---- memory ---------------------------------------------------------------------------------------------------------

def slow(clip):
    return tasks.resample(clip.mean(0, keepdim=True), SAMPLE_RATE, SLOW_RATE)[0]


def best_correlation(excerpts, track):
    """Highest normalised correlation of each excerpt (n,) with any place of the track (m,), m >= n: (excerpts,).
    Places that are next to silent are taken as 40 dB under the track, so that they resemble nothing."""
    n = len(excerpts[0])
    size = 2 ** math.ceil(math.log2(n + len(track)))
    spectrum = torch.fft.rfft(track, size)
    energy = torch.cat([torch.zeros(1, dtype=torch.double), track.double().square().cumsum(0)])
    norm = (energy[n:] - energy[:-n]).clamp(min=1e-4 * energy[-1] * n / len(track) + 1e-9).sqrt()
    best = []
    for excerpt in excerpts:
        products = torch.fft.irfft(spectrum * torch.fft.rfft(excerpt, size).conj(), size)[:len(norm)]
        best.append((products.abs() / norm).max() / (excerpt.norm() + 1e-9))
    return torch.stack(best).float()


def about_memory(study):
    """Nearest training music, to the listener (windows of the same length) and as waveforms."""
    made, a = study.made("continuation"), study.spans["continuation"].a
    real = [clip[:, a:] for clip in study.clips]
    n, excerpts = made[0].shape[1], [slow(clip) for clip in (*made, *real)]
    best, heard = torch.zeros(len(excerpts)), []
    for path in sample.progress(sample.find_files(study.options.train), "training music", unit="track"):
        track = sample.to_stereo_44k(*sample.read_audio(path))
        if track.shape[1] >= n:
            best = torch.maximum(best, best_correlation(excerpts, slow(track)))
            heard.append(embed(study.listener, track.unfold(1, n, n // 2).transpose(0, 1)))
    heard = torch.cat(heard)
    print(f"nearest of {len(heard)} training windows: waveform correlation (median, highest); "
          "embedding distance (median)")
    for name, correlations, clips in (("generated", best[:len(made)], made), ("real", best[len(made):], real)):
        nearest = torch.cdist(embed(study.listener, clips), heard).min(1).values
        print(f"  {name:18} {correlations.median():.2f} {correlations.max():.2f}   {nearest.median():.3f}")


# ---- guidance by example and by class -------------------------------------------------------------------------------

@torch.no_grad()
def guided_pairs(study, guides, examples=None):
    """For each guide (a function z -> Task): audio without and with it (and with the spectrum of its example), from the
    same random numbers."""
    checkpoint, plain, guided = study.checkpoint, [], []
    frames = round(study.options.seconds * SAMPLE_RATE / checkpoint.hop)
    nothing = torch.zeros(1, 2, frames * checkpoint.hop, device=study.device)
    for j, guide in enumerate(sample.progress(guides, "guidance", unit="case")):
        example = examples[j][None].to(study.device) if examples else None
        for out, how in ((plain, {}), (guided, {"guides": (guide,), "example": example})):
            numbers = evaluate.generator_of(study.options.seed, j)
            out.append(sample.fill(checkpoint, nothing, 0, 0, study.settings, numbers, **how)[0].cpu())
    moved = torch.stack([evaluate.mel_distance(b, a, SAMPLE_RATE) for a, b in zip(plain, guided)]).mean()
    return plain, guided, f"mel distance to the unguided {moved:.2f}"


def about_examples(study):
    references, step = study.clips, sample.XI_GUIDE["embedding"]
    hear = lambda x: sample.hear(study.listener, study.checkpoint, x)[1]
    wanted = embed(study.listener, references)
    guides = [lambda z, y=y[None].to(study.device): tasks.embedder_guidance(hear, y, z, step, above=ABOVE)
              for y in wanted]
    plain, guided, facts = guided_pairs(study, guides, references)
    before, after = ((embed(study.listener, clips) - wanted).norm(dim=1) for clips in (plain, guided))
    print(f"by example, {len(wanted)} cases, step {step:g}, {facts}: distance to the example, median "
          f"{before.median():.3f} -> {after.median():.3f}, nearer in {(after < before).sum()}")
    listen = lambda clips: F.normalize(torch.cat([study.judge.listen(clip[None])[1] for clip in clips]))
    n, spectra = plain[0].shape[1], [sample.spectrum(x[None], torch.ones(x.shape[1])) for x in references]
    coloured = [sample.equalise(x[None], torch.ones(n), spectrum)[0] for x, spectrum in zip(plain, spectra)]
    print(f"  the judge: {'':22} cosine with its own, with others; nearest is its own (chance {1 / len(wanted):.2f})")
    own = listen([clip[:, n:] for clip in references])             # of the first seconds, `real` below is made
    for name, clips in (("unguided", plain), ("with its spectrum alone", coloured), ("guided", guided),
                        ("real", [clip[:, :n] for clip in references])):
        print("    {:24} {:.3f}  {:.3f}  {:.2f}".format(name, *own_and_others(listen(clips), own)))


def own_and_others(made, aims):
    """Unit vectors (n, width) twice: mean cosine with the own aim, with the others, and how often the nearest is the
    own."""
    cosine, n = made @ aims.T, len(made)
    own = cosine.diag()
    right = (cosine.argmax(1) == torch.arange(n)).double().mean()
    return own.mean().item(), ((cosine.sum() - own.sum()) / max(1, n * (n - 1))).item(), right.item()


def about_classes(study):
    wanted, step = [j % len(study.classes) for j in range(study.options.clips)], sample.XI_GUIDE["classifier"]
    if missing := {study.classes[i] for i in wanted} - set(study.judge.classes):
        raise sample.UserError(f"--train has no folder {', '.join(sorted(missing))}: the listener knows these classes")
    hear = lambda x, i: sample.hear(study.listener, study.checkpoint, x)[0][:, i:i + 1]
    y = torch.ones(1, 1, device=study.device)
    guides = [lambda z, i=i: tasks.classifier_guidance(lambda x: hear(x, i), y, z, step, above=ABOVE) for i in wanted]
    plain, guided, facts = guided_pairs(study, guides)
    print(f"by class, {len(wanted)} cases, step {step:g}, {facts}")
    for name, listen, classes in (("the guide", lambda x: study.listener.listen(x, SAMPLE_RATE), study.classes),
                                  ("the judge", lambda x: study.judge.listen(x.cpu()), study.judge.classes)):
        with torch.no_grad():
            before, after = (torch.stack([listen(clip[None].to(study.device))[0][0].log_softmax(0)[
                classes.index(study.classes[i])] for clip, i in zip(clips, wanted)]) for clips in (plain, guided))
        print(f"  log-probability to {name}: {(after - before).mean():+.2f} on average, up in {(after > before).sum()}")


# ---- command line ---------------------------------------------------------------------------------------------------

TABLES = {"likeness": about_likeness, "v-loss": about_v_loss, "prompts": about_prompts, "memory": about_memory,
          "example": about_examples, "class": about_classes}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("tables", nargs="+", choices=TABLES)
    add("--model", choices=("latent", "waveform"), default="latent")
    add("--checkpoint")
    add("--listener", help="the classifier that listens, and guides")
    add("--data", required=True, help="folder of test music")
    add("--train", nargs="+", help="memory, example, class: folders of the training music")
    add("--task", choices=("continuation", "infill", "regenerate"), default="continuation", help="of likeness")
    add("--clips", type=sample.within(2, 100000, int), default=18, help="excerpts of the test music, or guided cases")
    add("--seconds", type=sample.within(0.1, 2.9), default=2.0, help="example, class: length of a sample")
    add("--sampler", choices=("ddim", "ddpm"))
    add("--steps", type=sample.within(1, 100000, int))
    sample.Settings.add_flags(add)
    add("--seed", type=sample.within(0, 2**63, int), default=0)
    add("--device", default="auto")
    options = parser.parse_args(argv)
    if {"memory", "example", "class"} & set(options.tables) and not options.train:
        raise sample.UserError("--train is missing: memory, example and class need folders of training music")
    study = Study(options)
    for table in options.tables:
        TABLES[table](study)


if __name__ == "__main__":
    sample.run(main, "take shorter --seconds, or --device cpu")
