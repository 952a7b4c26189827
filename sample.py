"""Edit a real track with one command: the creative applications of Sect. 4.3 on files of any length, rate and format.

    python sample.py --task continuation --input song.mp3 --start 61.5 --length 8
    python sample.py --task infill --input song.wav --start 1:01.5 --end 1:03.5 --num 4
    python sample.py --task transition --input a.flac --input2 b.flac

The result is the whole track in its own sample rate and channels. Only the requested region is new; beside it lie
cross-fades of at most 50 ms, in known audio; everything else is the input's own samples, bit for bit.

Inside, time is counted from an anchor, the left border of the region, so that this border lies exactly on a frame of
the model; the right border is rounded up to the next frame.
"""
import argparse
import hashlib
import io
import json
import math
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import soundfile as sf
import torch
import torch.nn.functional as F
from tqdm import tqdm

import tasks
from guidance import Task, draw_noise, sample
from train import (SAMPLE_RATE, UserError, open_checkpoint, pick_device, random_numbers, read_audio, run, within,
                   write_atomic)

TASKS = ("unconditional", "continuation", "infill", "regenerate", "transition", "embedding", "classifier")
EDITS = TASKS[1:5]                                           # those with a track to edit
FROM_X_BAR = ("regenerate", "transition")                    # those that start from what is there
XI = {"latent": 0.2, "waveform": 0.05}                       # for the L1 sum, by measurement; App. C.3: 0.03, 0.003
GAMMA = {"latent": 0.6, "waveform": 0.0}                     # of ddpm_step, by measurement; the paper's is 0
XI_GUIDE = {"embedding": 1.0, "classifier": 1.0}             # for L2 and BCE, by measurement (README)
FFT = 2048                                                   # samples, in `spectrum`
CONTEXT, GAP, FADE = 2.4, 2.0, 2.5                           # seconds (Sect. 4.3)
PCM_BITS = {"PCM_16": 16, "PCM_24": 24}
PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BARELY_TRAINED = 2000                                        # steps
PER_CALL = ("output", "force", "replay", "num", "first", "device")           # options that do not enter a result


# ---- in the model's space: generate between known contexts, window after window -------------------------------------

@dataclass
class Settings:
    """How to sample; the defaults are the README's, by measurement. xi, the step size towards the context, is meant for
    xi_ref_steps steps: more and smaller steps of guidance lead as far. k and start_from: see tasks.regenerate."""
    sampler: str = "ddim"
    steps: int = 50
    xi: float = XI["latent"]
    xi_ref_steps: int = 50
    gamma: float = GAMMA["latent"]
    k: float = 0.6
    start_from: str = "matched"
    project: str = "x0_hat"
    on: str = "x0_hat"
    precision: str = "float32"
    equalise: bool = True

    @staticmethod
    def add_flags(add):
        """The flags for all fields but sampler and steps; add is a parser's add_argument."""
        add("--xi", type=within(0, math.inf), help="step size towards the context (0.2 latent, 0.05 waveform)")
        add("--xi-ref-steps", type=within(1, 100000, int), default=Settings.xi_ref_steps,
            help="the number of steps that xi is meant for; with others it is scaled by this over --steps")
        add("--gamma", type=within(0, 0.99), help="ddpm: more noise in each step than the paper's, 0 (0.6 latent)")
        add("--k", type=within(0.01, 1), default=Settings.k, help="regenerate, transition: share of noise")
        add("--start-from", choices=("paper", "matched"), default=Settings.start_from, help="regenerate, transition")
        add("--project", choices=("x0_hat", "x_t", "none"), default=Settings.project, help="what is made to meet y")
        add("--on", choices=("x0_hat", "x_t"), default=Settings.on, help="what the measurements see")
        add("--precision", choices=PRECISIONS, default=Settings.precision, help="of the diffusion network")
        add("--equalise", action=argparse.BooleanOptionalAction, default=True, help="undo the VAE's colour")

    @classmethod
    def given(cls, options, kind):
        """What those flags gave, {field: value}; xi and gamma are else those for the kind of model."""
        values = {field.name: getattr(options, field.name) for field in fields(cls)[2:]}
        defaults = {"xi": XI[kind], "gamma": GAMMA[kind]}
        return values | {name: default for name, default in defaults.items() if values[name] is None}


def windows(C_L, gap, C_R, window, overlap):
    """The spans (first, last) of frames in which to fill `gap` frames, each from where the one before it ended.

    One window if everything fits. Else equal shares, each behind `overlap` frames or more; the last one hears C_R too.
    """
    if C_L + gap + C_R <= window:
        return [(0, C_L + gap + C_R)]
    overlap = min(overlap, (window - C_R) // 2)
    count = math.ceil(gap / (window - overlap - C_R))
    ends = [C_L + gap * (i + 1) // count for i in range(count - 1)] + [C_L + gap + C_R]
    return [(max(0, end - window), end) for end in ends]


def generate(checkpoint, x_bar, C_L, C_R, settings, generator, *, spans=None, guides=(), callback=None):
    """Replace what lies between the first C_L and the last C_R frames of x_bar (1, C, n); returns (1, C, n).

    spans       see windows(); default: one window for all
    guides      functions z -> Task: their terms, whose weights are step sizes as settings.xi is, join in every window
    """
    dtype = PRECISIONS[settings.precision]
    xi = settings.xi_ref_steps / settings.steps if settings.xi or guides else 0.0        # each term brings its own size

    def model(x_t, t):
        with torch.autocast(x_t.device.type, dtype, enabled=dtype is not None):
            return checkpoint.net(x_t, t).float()

    x, n, done = x_bar.clone(), x_bar.shape[-1], C_L
    for first, last in spans or [(0, n)]:
        left, right = done - first, C_R if last == n else 0
        z = draw_noise(x[..., first:last], generator)
        if left + right == 0:
            task = Task(z, ())
        else:
            task = tasks.regenerate(x[..., first:last], left, right, z, settings.k, settings.start_from,
                                    weight=settings.xi, on=settings.on, project=settings.project)
        task = tasks.combine(task, *[guide(z) for guide in guides])
        x[..., first:last] = sample(model, task.x_T, task, steps=settings.steps, sampler=settings.sampler, xi=xi,
                                    gamma=settings.gamma, generator=generator, callback=callback)
        done = last
    return x


# ---- between a track and the model's space --------------------------------------------------------------------------

def excerpt(x, first, last, lo, hi):
    """Samples [first, last) of x (..., n), of which only [lo, hi) are read: beyond them the signal is mirrored."""
    i = (torch.arange(first, last) - lo) % (2 * (hi - lo))
    return x[..., lo + torch.minimum(i, 2 * (hi - lo) - 1 - i)]


def encode_known(checkpoint, audio, C_L, C_R):
    """The first C_L and the last C_R frames of audio (B, 2, n) -> model space (B, C, n / hop), zeros in between.

    Each side is encoded by itself, so that nothing in between leaks; the encoder sees it mirrored beyond its ends.
    """
    hop, frames = checkpoint.hop, audio.shape[-1] // checkpoint.hop
    reach = math.ceil(checkpoint.vae.encoder_field / hop) if checkpoint.vae else 0     # frames
    x = torch.zeros(len(audio), checkpoint.channels, frames, device=audio.device)
    for first, last in ((0, C_L), (frames - C_R, frames)):
        if first < last:
            wide = excerpt(audio, (first - reach) * hop, (last + reach) * hop, first * hop, last * hop)
            x[..., first:last] = checkpoint.encode(wide)[..., reach:reach + last - first]
    return x


def convert(x, rate_in, rate_out, anchor, first, last, lo, hi):
    """x (channels, n) at rate_in -> its samples [first, last) at rate_out, counted from the sample `anchor` of x.

    Reads x in [lo, hi) only. The two grids meet at the anchor and every gcd-th of a second from it, where blocks start.
    """
    common = math.gcd(rate_in, rate_out)
    down, up = rate_in // common, rate_out // common
    reach = math.ceil(64 * max(1, rate_in / rate_out) / down)                          # blocks, of the filter
    block, end = first // up - reach, math.ceil(last / up) + reach
    wide = excerpt(x, anchor + block * down, anchor + end * down, lo, hi)
    return tasks.resample(wide, rate_in, rate_out)[:, first - block * up:last - block * up]


def spectrum(audio):
    """Power of audio (B, channels, n) at 0 to 22050 Hz in 1025 steps, averaged over a sixth of an octave: (B, 1025)."""
    frames = F.pad(audio, (FFT, FFT)).unfold(-1, FFT, FFT // 2) * torch.hann_window(FFT, device=audio.device)
    power = torch.fft.rfft(frames).abs().square().sum((1, 2))                          # (B, 1025)
    octave = torch.arange(power.shape[-1], device=audio.device).clamp(min=0.5).log2()
    weights = torch.exp(-18 * (octave[:, None] - octave).square())
    return power @ (weights / weights.sum(1, keepdim=True)).T


def decode(checkpoint, x_0, known, C_L, C_R, equalise=True):
    """x_0 (B, C, frames) -> audio (B, 2, n), filtered so that its first C_L and last C_R frames, together, have the
    spectrum of the audio `known` (B, 2, n) that they were encoded from; of this, only they are read.

    A VAE leaves out some of what it cannot predict: the shipped one, 9 dB at 2.5 kHz. What is missing where the answer
    is known is missing in between, too. Gains are within 12 dB, and phases stay.
    """
    audio, n, left, right = checkpoint.decode(x_0), known.shape[-1], C_L * checkpoint.hop, C_R * checkpoint.hop
    if checkpoint.vae is None or not equalise:
        return audio
    wanted, found = (spectrum(x[..., :left]) + spectrum(x[..., n - right:]) + 1e-9 for x in (known, audio))
    gain = (wanted / found).sqrt().clamp(10 ** (-12 / 20), 10 ** (12 / 20))
    size = n + FFT                                                                     # the filter's tails do not wrap
    gain = F.interpolate(gain[:, None], size // 2 + 1, mode="linear", align_corners=True)
    return torch.fft.irfft(torch.fft.rfft(audio, size) * gain, size)[..., :n]


def fill(checkpoint, known, C_L, C_R, settings, generator, *, from_x_bar=False, **how):
    """Audio `known` (B, 2, n) with a new middle, between its first C_L and last C_R frames: encode, generate, decode.

    from_x_bar  start from what is there (Table 2's Regenerate and Transition), instead of not reading it at all
    how         spans, guides, callback: see generate
    """
    if from_x_bar:
        x_bar = encode_known(checkpoint, known, known.shape[-1] // checkpoint.hop, 0)
    else:
        x_bar, settings = encode_known(checkpoint, known, C_L, C_R), replace(settings, k=1.0)
    x_0 = generate(checkpoint, x_bar, C_L, C_R, settings, generator, **how)
    return decode(checkpoint, x_0, known, C_L, C_R, settings.equalise)


@dataclass
class Track:
    """Decoded audio (channels, n), its rate in Hz, and the subtype it was stored in."""
    audio: torch.Tensor
    rate: int
    subtype: str = "FLOAT"

    @classmethod
    def read(cls, path):
        audio, rate = read_audio(path)
        if len(audio) > 2:
            raise UserError(f"{path} has {len(audio)} channels; only mono and stereo can be edited: mix it down first")
        if not audio.isfinite().all():
            raise UserError(f"{path} holds samples that are not finite; repair or export it again")
        return cls(audio, rate, sf.info(path).subtype)

    @property
    def n(self):
        return self.audio.shape[-1]


class Edit:
    """The region [a, b) of a track, in its own samples, laid on a model's frames: C_L known, `gap` free, C_R known."""

    def __init__(self, checkpoint, track, a, b, context=None):
        self.checkpoint, self.track, self.a, self.b = checkpoint, track, a, b
        window = checkpoint.window
        self.frame = checkpoint.hop * track.rate / SAMPLE_RATE                         # native samples per frame
        self.gap = math.ceil((b - a) / self.frame - 1e-6)
        before, behind = int(a / self.frame), max(0, int((track.n - a) / self.frame) - self.gap)
        spare = max(window - self.gap, window // 2)         # a side takes what the other does not have
        each = min(int(context * SAMPLE_RATE / checkpoint.hop), window // 2) if context else spare
        self.C_R = min(behind, each, spare // 2)
        self.C_L = min(before, each, spare - self.C_R)
        self.C_R = min(behind, each, spare - self.C_L)
        self.spans = windows(self.C_L, self.gap, self.C_R, window, min(each, spare // 2))

    def known(self, whole):
        """What the model may know, as audio (1, 2, samples) at 44.1 kHz: each side made by itself, so that nothing of
        the region leaks, and zeros in the gap; or, if `whole`, the region too."""
        hop, (C_L, gap, C_R), track = self.checkpoint.hop, (self.C_L, self.gap, self.C_R), self.track
        audio = torch.zeros(2, (C_L + gap + C_R) * hop)
        parts = ((-C_L, gap + C_R, 0, track.n),) if whole else ((-C_L, 0, 0, self.a), (gap, gap + C_R, self.b, track.n))
        for first, last, lo, hi in parts:
            if first < last:
                audio[:, (C_L + first) * hop:(C_L + last) * hop] = convert(
                    spread(track.audio, 2), track.rate, SAMPLE_RATE, self.a, first * hop, last * hop, lo, hi)
        return audio[None]

    def splice(self, decoded, seconds):
        """Decoded audio (2, hop * frames) laid into the track: (channels, n). Cross-fades of `seconds` lie outside
        [a, b); with 0 all of it, contexts included, stands as it is."""
        audio, (a, b) = self.track.audio, (self.a, self.b)
        fade = round(seconds * self.track.rate) if seconds else self.track.n
        before, behind = min(fade, int(self.C_L * self.frame)), min(fade, int(self.C_R * self.frame))
        new = spread(convert(decoded, SAMPLE_RATE, self.track.rate, self.C_L * self.checkpoint.hop,
                             -before, b - a + behind, 0, decoded.shape[-1]), len(audio))
        if seconds:
            new[:, :before] = blend(audio[:, a - before:a], new[:, :before])
            new[:, new.shape[-1] - behind:] = blend(new[:, new.shape[-1] - behind:], audio[:, b:b + behind])
        return torch.cat([audio[:, :a - before], new, audio[:, b + behind:]], dim=-1)

    def times(self, seconds):
        """One line: where things lie, in seconds of the track, after rounding to the model's frames."""
        a, b, *frames = (clock(x / self.track.rate) for x in (
            self.a, self.b, *(self.a + i * self.frame for i in (-self.C_L, self.gap, self.gap + self.C_R))))
        return (f"new audio {a} to {b}; the model fills {a} to {frames[1]} and hears {frames[0]} to {frames[2]}; "
                f"cross-fades of {1000 * seconds:.0f} ms outside")


def spread(audio, channels):
    """Mono or stereo audio as mono or stereo: mono goes to both sides, stereo becomes its mean."""
    return audio.expand(2, -1) if channels == 2 else audio.mean(0, keepdim=True)


def blend(old, new):
    """Fade from old to new (channels, n). The power stays level whatever the correlation of the two is."""
    w = torch.sin(math.pi / 2 * (torch.arange(old.shape[-1]) + 0.5) / old.shape[-1]) ** 2
    rho = F.cosine_similarity(old.flatten(), new.flatten(), dim=0).clamp(min=0)
    return ((1 - w) * old + w * new) / (w**2 + (1 - w) ** 2 + 2 * rho * w * (1 - w)).sqrt()


def clock(seconds):
    return f"{int(seconds // 60)}:{seconds % 60:06.3f}"


# ---- files ----------------------------------------------------------------------------------------------------------

def write_track(path, track, subtype=None):
    """Write a Track as wav or flac, by the ending of path, atomically; returns the subtype used.

    A PCM input comes back in its own word length. Integers are made here: libsndfile scales floats by 2^15 - 1 on the
    way out and 2^15 on the way in. What does not fit (lossy inputs, peaks above full scale in wav) is written as float.
    """
    peak, kind = track.audio.abs().max().item(), path.suffix[1:].lower()
    if subtype is None:
        keeps = track.subtype in PCM_BITS and peak <= 1
        subtype = track.subtype if keeps else "FLOAT" if kind == "wav" else "PCM_24"
    if peak > 1:
        clipped, kept = ": clipped, use --subtype FLOAT with wav", "; written as float, nothing is clipped"
        print(f"note: the peak is {20 * math.log10(peak):+.1f} dB above full scale"
              + (clipped if subtype in PCM_BITS else kept))
    samples = track.audio.T                                                            # (n, channels)
    if subtype in PCM_BITS:
        full = 2 ** (PCM_BITS[subtype] - 1)
        samples = (samples.double() * full).round().clamp(-full, full - 1).int() << (32 - PCM_BITS[subtype])
    buffer = io.BytesIO()
    sf.write(buffer, samples.numpy(), track.rate, format=kind.upper(), subtype=subtype)
    write_atomic(path, lambda file: file.write(buffer.getvalue()))
    return subtype


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def output_paths(o):
    """One path per variation; checked before any work is done."""
    source = Path(o.input or o.reference or o.task)
    name = f"{source.stem}.{o.task}.wav" if source.suffix else f"{o.task}.wav"
    first = Path(o.output or source.with_name(name))
    if first.suffix.lower() not in (".wav", ".flac"):
        raise UserError(f"--output {first} must end in .wav or .flac")
    if first.suffix.lower() == ".flac" and o.subtype == "FLOAT":
        raise UserError("--subtype FLOAT does not fit into flac; use PCM_16 or PCM_24, or write wav")
    paths = [first] + [first.with_name(f"{first.stem}-{i + 1}{first.suffix}") for i in range(1, o.num)]
    for path in (path for audio in paths for path in (audio, audio.with_suffix(".json"))):
        if path.exists() and not o.force:
            raise UserError(f"{path} exists; choose another --output, or overwrite it with --force")
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        probe = first.with_name(first.name + ".part")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output {first} cannot be written: {error.strerror}") from None
    return paths


# ---- the command line -----------------------------------------------------------------------------------------------

def seconds(text):
    """"61.5" or "1:01.5" -> 61.5."""
    minutes, _, rest = text.rpartition(":")
    value = 60 * float(minutes or 0) + float(rest)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def duration(text):
    value = seconds(text)
    if value < 0.01:
        raise argparse.ArgumentTypeError(f"{text} is under 0.01 s")
    return value


def pairs(text):
    """"drums=1,voice=0" -> {"drums": 1.0, "voice": 0.0}."""
    return {name.strip(): float(value) for name, value in (item.split("=") for item in text.split(","))}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (all flags: python sample.py --help)")


def parse(argv):
    p = Parser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--task", choices=TASKS, help="what to do")
    add("--input", help="the track to edit: wav, flac, ogg, mp3; any rate, mono or stereo")
    add("--input2", help="transition: the track to go over to")
    add("--start", type=seconds, help="where the new audio begins, in seconds or m:ss (continuation: the end)")
    add("--end", type=seconds, help="infill, regenerate: where it ends (with neither flag: the middle 2 s)")
    add("--length", type=duration, help="continuation, or without --input: how much to make (what the window holds)")
    add("--context", type=duration, help="how much to hear on each side (continuation: 2.4; else what fits)")
    add("--fade", type=duration, default=FADE, help="transition: length of the cross-fade in seconds")
    add("--reference", help="audio whose style to approach: embedder guidance, for every task")
    add("--classes", type=pairs, help="name=1,other=0, wanted and unwanted: classifier guidance, for every task")
    add("--weights", type=pairs, default={}, help="embedding=2,classifier=0.5: more or less of a guiding term")
    add("--model", choices=tuple(XI), default="latent")
    add("--checkpoint", help="of the model (the one shipped, else that of the default run)")
    add("--listener", help="checkpoint of the classifier that --reference and --classes use")
    add("--sampler", choices=("ddpm", "ddim"), default=Settings.sampler)
    add("--steps", type=within(1, 100000, int), default=Settings.steps)
    Settings.add_flags(add)
    add("--splice", type=within(0, 50), default=30.0, help="cross-fade in ms; 0: the model's output as it is")
    add("--num", type=within(1, 1000, int), default=1, help="variations")
    add("--seed", type=within(0, 2**63, int), default=0)
    add("--device", default="auto")
    add("--output", help="wav or flac (beside the input)")
    add("--subtype", choices=("PCM_16", "PCM_24", "FLOAT"), help="(the input's; FLOAT where that would lose something)")
    add("--force", action="store_true", help="overwrite")
    add("--explain", action="store_true", help="print what guidance does, and advice")
    add("--replay", help="the json beside an earlier result: make it again")
    o = p.parse_args(argv)
    o.first = 0
    return replayed(o) if o.replay else o


def replayed(o):
    """The options in a result's json, with the --output and --force of this call."""
    try:
        stored = json.loads(Path(o.replay).read_text())
        again = argparse.Namespace(**{**vars(o), **stored["options"], "num": 1, "first": stored["variation"]})
        changed = [path for path, was in stored["sha256"].items() if digest(path) != was]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--replay {o.replay} cannot be used: {error}") from None
    if changed:
        raise UserError(f"{', '.join(changed)} changed since {o.replay} was written: the result would be another one")
    again.output, again.force = o.output or stored["output"], o.force
    return again


def region(o, checkpoint):
    """The track to edit and the region [a, b) in its samples, by the task's flags or the paper's choices, Sect. 4.3."""
    window = checkpoint.window * checkpoint.hop / SAMPLE_RATE
    if o.task not in EDITS:
        nothing = Track(torch.zeros(2, 0), SAMPLE_RATE, "PCM_16")
        return nothing, 0, round((o.length or window) * SAMPLE_RATE)
    track = Track.read(o.input)
    if o.task == "transition":
        return join(track, Track.read(o.input2), o.fade)
    start, end, total, rate = o.start, o.end, track.n / track.rate, track.rate
    if o.task == "continuation":
        a = track.n if start is None else round(start * rate)
        if not 0 < a <= track.n:
            raise UserError(f"--start {clock(start)} leaves nothing to continue: {o.input} lasts {clock(total)}")
        o.context = o.context or CONTEXT
        b = a + round((o.length or window - min(o.context, window / 2, a / rate)) * rate)
        return Track(track.audio[:, :a], rate, track.subtype), a, b
    if start is None and end is None:
        start, end = (total - GAP) / 2, (total + GAP) / 2
    a, b = round((start or 0) * rate), track.n if end is None else round(end * rate)
    if not 0 <= a < b <= track.n or b - a == track.n:
        raise UserError(f"--start and --end must enclose a part of {o.input} (it lasts {clock(total)}), not all of it")
    return track, a, b


def join(one, two, fade):
    """The end of one track faded into the start of another, at constant power: (Track, first and last sample of it)."""
    second = tasks.resample(spread(two.audio, len(one.audio)), two.rate, one.rate)
    fade = round(fade * one.rate)
    C_L, C_R = one.n - fade, second.shape[-1] - fade
    if fade < 1 or C_L < 1 or C_R < 1:
        raise UserError(f"--fade {fade / one.rate:g} s must be shorter than both tracks, and not 0")
    audio = tasks.crossfade(F.pad(one.audio, (0, C_R))[None], F.pad(second, (C_L, 0))[None], C_L, C_R)[0]
    return Track(audio, one.rate, one.subtype if one.subtype == two.subtype else "FLOAT"), C_L, C_L + fade


def guide_terms(o, checkpoint, listener, device):
    """Functions z -> Task for --reference and --classes. An embedder hears audio: A(x) = PaSST(resample(decode(x)))."""
    hear = lambda x: listener.net.listen(checkpoint.decode(x), SAMPLE_RATE)            # logits, embedding
    weight = {name: XI_GUIDE[name] * o.weights.get(name, 1.0) for name in XI_GUIDE}
    guides = []
    if o.reference:
        example = Track.read(o.reference)
        y = listener.net.listen(example.audio[None].to(device), example.rate)[1]
        guides.append(lambda z: tasks.embedder_guidance(lambda x: hear(x)[1], y, z, weight["embedding"]))
    if o.classes:
        unknown, known = [name for name in o.classes if name not in listener.classes], ", ".join(listener.classes)
        if unknown:
            raise UserError(f"--classes {', '.join(unknown)}: unknown; the listener knows {known}")
        if not all(0 <= label <= 1 for label in o.classes.values()):
            raise UserError("--classes: the number after a name is 1 for wanted, 0 for unwanted, or between them")
        logits = lambda x: hear(x)[0][:, [listener.classes.index(name) for name in o.classes]]
        labels = torch.tensor([list(o.classes.values())], device=device)
        guides.append(lambda z: tasks.classifier_guidance(logits, labels, z, weight["classifier"]))
    return guides


class Listening:
    """A callback of guidance.sample: the progress bar, and what --explain prints."""

    def __init__(self, total, explain):
        self.bar, self.explain, self.shares = tqdm(total=total, unit="step", dynamic_ncols=True), explain, []

    def __call__(self, step):
        self.bar.update()
        self.shares.append(step.share)
        if self.explain and (step.i == 1 or step.i % max(1, step.steps // 10) == 0):
            self.bar.write(str(step))

    def close(self):
        self.bar.close()
        share = sum(self.shares) / len(self.shares)
        if self.explain and share:
            verdict = "in balance with the model"
            if share < 0.005:
                verdict = "far too weak to matter: raise --xi or --weights"
            elif share > 1:
                verdict = "far too strong for the model: lower --xi or --weights"
            print(f"guidance was {verdict} (its step was {share:.3f} of the sampler's, on average)")


def check(o):
    """UserError for flags that are missing, or would be ignored."""
    if not o.task:
        raise UserError(f"--task is missing: {', '.join(TASKS)}")
    for flag, needed in {"input": EDITS, "input2": ("transition",), "reference": ("embedding",),
                         "classes": ("classifier",)}.items():
        if o.task in needed and not getattr(o, flag):
            raise UserError(f"--{flag} is missing: --task {o.task} needs it")
    for flag, taken in {"input": EDITS, "input2": ("transition",), "start": ("continuation", "infill", "regenerate"),
                        "end": ("infill", "regenerate"), "context": EDITS,
                        "length": ("continuation", "unconditional", "embedding", "classifier")}.items():
        if o.task not in taken and getattr(o, flag) is not None:
            raise UserError(f"--{flag} says nothing to --task {o.task}: leave it out")
    unknown = o.weights.keys() - XI_GUIDE.keys()
    if unknown:
        raise UserError(f"--weights {', '.join(unknown)}: unknown; there are {', '.join(XI_GUIDE)}")


def main(argv=None):
    o = parse(argv)
    check(o)
    paths, device = output_paths(o), pick_device(o.device)
    checkpoint = open_checkpoint(o.model, o.checkpoint, device)
    print(f"model: {checkpoint.path}, trained for {checkpoint.step} steps"
          + (": expect noise rather than music" if checkpoint.step < BARELY_TRAINED else ""))
    edit, fade = Edit(checkpoint, *region(o, checkpoint), o.context), o.splice / 1000               # seconds
    print(edit.times(fade))
    settings, guides = Settings(o.sampler, o.steps, **Settings.given(o, checkpoint.kind)), []
    used = [path for path in (o.input, o.input2, o.reference, checkpoint.path) if path]
    if o.reference or o.classes:
        listener = open_checkpoint("classifier", o.listener, device)
        guides, used = guide_terms(o, checkpoint, listener, device), [*used, listener.path]
    record = {"options": {name: value for name, value in (vars(o) | asdict(settings)).items() if name not in PER_CALL},
              "times": edit.times(fade), "sha256": {path: digest(path) for path in used},
              "versions": {"torch": torch.__version__, "checkpoint step": checkpoint.step}}
    from_x_bar = o.task in FROM_X_BAR
    known = edit.known(whole=from_x_bar).to(device)
    for i, path in enumerate(paths, start=o.first):
        began, generator = time.time(), torch.Generator().manual_seed(int(random_numbers(o.seed, i).integers(2**63)))
        listening = Listening(o.steps * len(edit.spans), o.explain)
        audio = fill(checkpoint, known, edit.C_L, edit.C_R, settings, generator, from_x_bar=from_x_bar,
                     spans=edit.spans, guides=guides, callback=listening)
        listening.close()
        track = Track(edit.splice(audio[0].cpu(), fade), edit.track.rate, edit.track.subtype)
        subtype = write_track(path, track, o.subtype)
        text = json.dumps(record | {"variation": i, "output": str(path)}, indent=1)
        write_atomic(path.with_suffix(".json"), lambda file: file.write(text.encode()))
        took, made = time.time() - began, (edit.b - edit.a) / track.rate
        print(f"wrote {path}: {clock(track.n / track.rate)} at {track.rate} Hz, {subtype}, of which {made:.2f} s are "
              f"new; {took:.1f} s, {took / made:.1f} times real time")


if __name__ == "__main__":
    run(main, "choose a shorter --length or --context, or --device cpu")
