"""Do the outputs of a checkpoint follow their inputs? Figures about generated music that Table 1 does not have.

    python tests/sanity.py --data path/to/test --train path/to/train --clips 18
    python tests/sanity.py --data path/to/test --train path/to/train --second runs/classifier-1/model.pt --cases 20

First: continuations (Sect. 4.3, the model's unspliced output), of which only the generated part is judged: is it nearer
to its own prompt than to other clips' prompts, has it the spectrum and the level of the music that really follows, do
the clips differ among each other as real ones do, and is one of them an excerpt of the training music?
Then: does guidance by example and by class do what it is for, against samples of the same seeds without it, and does a
classifier agree that never guided (--second)?
"""
import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import sample
import tasks
import train
from train import SAMPLE_RATE

BANDS = [1000 * 2 ** (k / 3) for k in range(-13, 11)]       # middles of the third-octave bands from 50 Hz to 12 kHz
SLOW_RATE = 11025                                           # Hz, at which waveforms are compared


# ---- what is measured -----------------------------------------------------------------------------------------------

@torch.no_grad()
def embed(listener, clips):
    """The listener's embeddings (n, width) of clips (2, samples)."""
    return torch.stack([listener.listen(clip[None], SAMPLE_RATE)[1][0] for clip in clips])


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


# ---- continuations --------------------------------------------------------------------------------------------------

def continuations(checkpoint, clips, settings, seed):
    """(generated parts, prompts, real continuations), lists of (2, samples)."""
    span = evaluate.layout(checkpoint.window * checkpoint.hop, checkpoint.hop)["continuation"]
    made = []
    for j, clip in enumerate(train.progress(clips, "continuations", unit="clip")):
        generator = torch.Generator().manual_seed(int(train.random_numbers(seed, j).integers(2**62)))
        with torch.no_grad():
            made.append(evaluate.edit(checkpoint, "continuation", clip[None], span, None, settings, [generator],
                                      None)[0, :, span.a:span.b])
    return made, [clip[:, :span.a] for clip in clips], [clip[:, span.a:span.b] for clip in clips]


def about_continuations(made, prompts, real, listener):
    heard, before = embed(listener, made), embed(listener, prompts)
    repeated = [prompt[:, torch.arange(clip.shape[1]) % prompt.shape[1]] for prompt, clip in zip(prompts, real)]
    print("own prompt wins: nearest of all, and against one other (chance "
          f"{1 / len(made):.2f} and 0.50)")
    for name, embeddings in (("generated", heard), ("context repeated", embed(listener, repeated)),
                             ("real continuation", embed(listener, real))):
        print("  {:18} {:.2f}  {:.2f}".format(name, *own_prompt_wins(embeddings, before)))
    print("mean distance among the clips' embeddings: generated "
          f"{torch.pdist(heard).mean():.3f}, real {torch.pdist(embed(listener, real)).mean():.3f}")
    difference = torch.stack([band_levels(a) - band_levels(b) for a, b in zip(made, real)])           # (clips, bands)
    distance = torch.stack([evaluate.mel_distance(a, b, SAMPLE_RATE) for a, b in zip(made, real)]).mean()
    print(f"mel distance to the real continuation: {distance:.2f}")
    mean, each = difference.mean(0), torch.stack([level(a) - level(b) for a, b in zip(made, real)])
    print(f"level against the real continuation: {each.mean():+.1f} dB on average, {each.abs().mean():.1f} dB in size")
    print("third-octave bands against the real continuation, on average, dB:")
    print("  " + "  ".join(f"{middle:.0f} Hz {value:+.1f}" for middle, value in zip(BANDS, mean)))
    print(f"  largest: {mean.abs().max():.1f} dB; mean size for a single clip: {difference.abs().mean():.1f} dB")


def about_memory(made, real, listener, folders):
    """Nearest training music, to the listener (windows of the same length) and as waveforms."""
    n = made[0].shape[1]
    excerpts = [slow(clip) for clip in (*made, *real)]
    best, heard = torch.zeros(len(excerpts)), []
    for path in train.progress(train.find_files(folders), "training music", unit="track"):
        track = train.to_stereo_44k(*train.read_audio(path))
        if track.shape[1] < n:
            continue
        best = torch.maximum(best, best_correlation(excerpts, slow(track)))
        heard.append(embed(listener, track.unfold(1, n, n // 2).transpose(0, 1)))
    heard = torch.cat(heard)
    print(f"nearest of {len(heard)} training windows: waveform correlation (median, highest); "
          "embedding distance (median)")
    for name, correlations, clips in (("generated", best[:len(made)], made), ("real", best[len(made):], real)):
        nearest = torch.cdist(embed(listener, clips), heard).min(1).values
        print(f"  {name:18} {correlations.median():.2f} {correlations.max():.2f}   {nearest.median():.3f}")
    return heard


# ---- guidance by example and by class -------------------------------------------------------------------------------

def guided_pairs(checkpoint, cases, settings, seconds, seed):
    """For each case (a function z -> Task): audio (2, samples) without and with it, from the same random numbers; and
    how large the steps of guidance were on average, as a share of the sampler's own."""
    frames = round(seconds * SAMPLE_RATE / checkpoint.hop)
    x_bar = torch.zeros(1, checkpoint.channels, frames)
    plain, guided, shares = [], [], []
    for j, guide in enumerate(train.progress(cases, "guidance", unit="case")):
        for out, guides in ((plain, ()), (guided, (guide,))):
            generator = torch.Generator().manual_seed(int(train.random_numbers(seed, j).integers(2**62)))
            listening = (lambda step: shares.append(step.share)) if guides else None
            with torch.no_grad():
                x_0 = sample.generate(checkpoint, x_bar, 0, 0, settings, generator, guides=guides, callback=listening)
                out.append(checkpoint.decode(x_0)[0])
    return plain, guided, sum(shares) / len(shares)


def changed(plain, guided, judge, heard):
    """Mel distance that guidance made, and FAD to the training windows without and with it, as text."""
    moved = torch.stack([evaluate.mel_distance(b[None], a[None], SAMPLE_RATE)[0] for a, b in zip(plain, guided)]).mean()
    text = f"mel distance to the unguided {moved:.2f}"
    if heard is not None:
        music = evaluate.GaussianStatistics([heard])
        fads = [evaluate.frechet_distance(music.mean, music.covariance, group.mean, group.covariance)
                for group in (evaluate.GaussianStatistics([embed(judge, clips)]) for clips in (plain, guided))]
        text += f"; FAD without {fads[0]:.1f}, with {fads[1]:.1f}"
    return text


def about_examples(checkpoint, listener, references, settings, options, heard):
    hear = lambda x: listener.listen(checkpoint.decode(x), SAMPLE_RATE)[1]
    aims, step = embed(listener, references), options.steps_of[0]
    guides = [lambda z, y=y[None]: tasks.embedder_guidance(hear, y, z, step) for y in aims]
    plain, guided, share = guided_pairs(checkpoint, guides, settings, options.seconds, options.seed)
    before, after = ((embed(listener, clips) - aims).norm(dim=1) for clips in (plain, guided))
    print(f"by example, step {step:g}, share {share:.2f}: distance to the example, median "
          f"{before.median():.3f} -> {after.median():.3f} ({100 * (after.median() / before.median() - 1):+.0f}%), "
          f"nearer in {(after < before).sum()} of {len(aims)}; {changed(plain, guided, listener, heard)}")


def about_classes(checkpoint, listener, second, classes, settings, options, heard):
    wanted, step = [j % len(classes) for j in range(options.cases)], options.steps_of[1]
    hear = lambda x, i: listener.listen(checkpoint.decode(x), SAMPLE_RATE)[0][:, i:i + 1]
    guides = [lambda z, i=i: tasks.classifier_guidance(lambda x: hear(x, i), torch.ones(1, 1), z, step) for i in wanted]
    plain, guided, share = guided_pairs(checkpoint, guides, settings, options.seconds, options.seed)

    def gain(judge):
        logits = lambda clip, i: judge.listen(clip[None], SAMPLE_RATE)[0][0, i]
        with torch.no_grad():
            return torch.stack([logits(b, i) - logits(a, i) for a, b, i in zip(plain, guided, wanted)])
    own = gain(listener)
    text = (f"by class, step {step:g}, share {share:.2f}: log-odds {own.mean():+.2f} on average, "
            f"up in {(own > 0).sum()} of {len(own)}")
    if second:
        text += f"; the second classifier's {gain(second).mean():+.2f}, up in {(gain(second) > 0).sum()}"
    print(f"{text}; {changed(plain, guided, listener, heard)}")


# ---- command line ---------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", choices=("latent", "waveform"), default="latent")
    add("--checkpoint")
    add("--listener")
    add("--data", required=True, help="folder of test music")
    add("--train", nargs="*", default=[], help="folders of the training music: looks for memorised excerpts")
    add("--second", help="a classifier that never guides")
    add("--clips", type=int, default=18)
    add("--cases", type=int, default=0, help="of guidance by example, and by class")
    add("--seconds", type=float, default=2.0, help="length of the guided samples")
    add("--samplers", nargs=1, type=evaluate.sampler_and_steps, default=[("ddim", 50)])
    sample.Settings.add_flags(add)
    add("--steps-of", type=float, nargs=2, default=[sample.XI_GUIDE["embedding"], sample.XI_GUIDE["classifier"]],
        metavar=("EXAMPLE", "CLASS"), help="guidance step sizes")
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    checkpoint = train.open_checkpoint(options.model, options.checkpoint)
    classifier = train.open_checkpoint("classifier", options.listener)
    listener, second = classifier.net, options.second and train.open_checkpoint("classifier", options.second).net
    (sampler, steps), = options.samplers
    chosen = argparse.Namespace(**vars(options), sampler=sampler, steps=steps)
    settings = sample.Settings.of(chosen, checkpoint.kind)
    window = checkpoint.window * checkpoint.hop
    excerpts = evaluate.find_excerpts(options.data, window, max(options.clips, options.cases), options.seed)
    clips = [evaluate.read_excerpt(*excerpt) for excerpt in excerpts]
    heard = None
    if options.clips:
        made, prompts, real = continuations(checkpoint, clips[:options.clips], settings, options.seed)
        about_continuations(made, prompts, real, listener)
        if options.train:
            heard = about_memory(made, real, listener, options.train)
    if options.cases:
        about_examples(checkpoint, listener, clips[:options.cases], settings, options, heard)
        about_classes(checkpoint, listener, second, classifier.classes, settings, options, heard)


if __name__ == "__main__":
    train.run(main)
