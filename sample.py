"""Edit a real track with one command: the creative applications of Sect. 4.3 on files of any length, rate and format.

    python sample.py --task continuation --input song.mp3 --start 61.5 --length 8
    python sample.py --task infill --input song.wav --start 1:01.5 --end 1:03.5 --num 4

The result is the whole track in its own sample rate, channels and word length. New are the requested region and
cross-fades of at most 50 ms beside it; all else is the input's own samples, bit for bit (but with --splice 0).
"""
import argparse
import hashlib
import json
import math
import os
import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import dit
import guidance
import tasks
import unet1d
import vae as autoencoder
from diffusion import alpha_sigma, x0_from_v
from tasks import PASST_PRESETS, PaSST, PaSSTConfig, resample, to_resample
from vae import VAE

SAMPLE_RATE = 44100                     # Hz, of all audio inside
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))     # under torchrun; else 0, 1
NETS = {"vae": (VAE, autoencoder.VAEConfig, autoencoder.PRESETS), "latent": (dit.build, dit.DiTConfig, dit.PRESETS),
        "waveform": (unet1d.UNet1D, unet1d.UNetConfig, unet1d.PRESETS),
        "classifier": (PaSST, PaSSTConfig, PASST_PRESETS)}
TASKS = ("unconditional", "continuation", "infill", "regenerate", "transition", "embedding", "classifier")
EDITS, FROM_X_BAR = TASKS[1:5], ("regenerate", "transition")     # with a track to edit; that start from what is there
NEEDED = {"input": EDITS, "input2": ("transition",), "reference": ("embedding",), "classes": ("classifier",)}
USED = {"start": ("continuation", "infill", "regenerate"), "end": ("infill", "regenerate"), "input2": ("transition",),
        "fade": ("transition",), "length": ("unconditional", "continuation", "embedding", "classifier"),
        "k": FROM_X_BAR, **dict.fromkeys(("input", "context", "splice", "xi"), EDITS)}          # flags, and their tasks
XI, XI_STEPS = {"latent": 0.12, "waveform": 0.05}, 50        # for the L1 sum; what matters is their product
XI_GUIDE, ABOVE = {"embedding": 3.0, "classifier": 3.0}, 0.4     # for L2 and BCE, at times t above
XI_AS_PRINTED = {"latent": 3e-2, "waveform": 3e-3}           # App. C.3, as k is below; the rest: Algorithms, Table 2
AS_PRINTED = dict(k=0.85, start_from="paper", project="x_t", equalise=False, keep_level=False)
CONTEXT, GAP, FADE = 2.4, 2.0, 2.5                           # seconds (Sect. 4.3)
LITTLE, SPLICE, LIMITER = 0.25, 0.03, 0.05                   # seconds: too little context; a cross-fade; beside a peak
LEVEL, NEAR = 0.1, 0.25              # of music from nothing: its root mean square; seconds: see level_kept
PCM_BITS = {"PCM_S8": 8, "PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32}


EQUALISER_FFT = 2048                                        # samples, in `spectrum`


# ---- what goes wrong, and processes --------------------------------------------------------------

class UserError(Exception):
    """One sentence for the user: what is wrong, and the remedy. Exit status 2, unusable input, or 1, failed at work."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


def run(main, need_memory="lower --batch"):
    """Call a script's main(): errors that the user can do something about end in one line on stderr, no traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")       # as stderr: not every name of a file can be printed
    try:
        return main()
    except UserError as error:
        message, status = error, error.status
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (MemoryError, RuntimeError) as error:
        words = "out of memory", "can't allocate", "bad_alloc", "ALLOC_FAILED"  # of CUDA and MPS, the CPU, cuBLAS
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
            raise
        message, status = f"out of memory: {need_memory}", 1
    except OSError as error:
        place = error.filename or "a file"
        message, status = f"{place} cannot be read or written ({error.strerror}): free some space, or choose another", 1
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def within(low, high, kind=float):
    """A type for argparse: a number in [low, high]."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value
    return number


def seconds(text):
    """"61.5" or "1:01.5" -> 61.5."""
    match = re.fullmatch(r"(?:(\d+):)?(\d+\.?\d*|\.\d+)", text)
    if not match or match[1] and float(match[2]) >= 60:
        raise argparse.ArgumentTypeError(f"{text} is no time: write seconds, 61.5, or minutes and seconds, 1:01.5")
    return 60 * int(match[1] or 0) + float(match[2])


def say(text):
    if RANK == 0:
        tqdm.write(text)


def progress(*args, **kwargs):
    return tqdm(*args, **kwargs, mininterval=0.5 if sys.stderr.isatty() else 30, disable=RANK > 0)


def barrier():
    if WORLD > 1:
        dist.barrier()


def pick_device(name):
    """ "auto" is CUDA, else MPS, else the CPU. Under torchrun each process has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def join_processes(device):
    """Meet the other processes, if torchrun started any."""
    if WORLD > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))


# ---- audio files ---------------------------------------------------------------------------------

def audio_blocks(file):
    """Blocks (n, channels) from the start to where decoding ends: SoundFile.blocks repeats the last block up to the
    length that the header of a cut mp3 promises, and seeking in ogg through libsndfile can land elsewhere."""
    while len(block := file.read(2**18, dtype="float32", always_2d=True)):
        yield block


def read_audio(path):
    """The whole file: (audio (channels, n) float32, rate in Hz). UserError naming the file if it cannot be read."""
    try:
        with sf.SoundFile(path) as file:
            blocks = list(audio_blocks(file))
    except (OSError, RuntimeError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); wav, flac, ogg and mp3 can be") from None
    if not blocks:
        raise UserError(f"{path} holds no audio")
    return torch.from_numpy(np.concatenate(blocks).T.copy()), file.samplerate


def to_stereo_44k(audio, rate):
    """audio (channels, n) at `rate` Hz -> (2, n') at 44.1 kHz. Mono goes to both sides; of many channels two remain."""
    return resample(audio[:2] if len(audio) > 1 else audio.expand(2, -1), rate, SAMPLE_RATE)


def reason(error):
    """What libsndfile says, without the path."""
    return str(error).rsplit(": ", 1)[-1].rstrip(".")


def find_files(folders):
    """Paths of all audio files in the folders, at any depth, sorted. Links are followed, loops are not."""
    found, seen = [folder for folder in map(str, folders) if not os.path.isdir(folder)], set()
    for folder in map(str, folders):
        for root, below, names in os.walk(folder, followlinks=True):
            if os.path.realpath(root) in seen:
                below.clear()
            else:
                found += [os.path.join(root, name) for name in names if name.lower().endswith(SUFFIXES)]
            seen.add(os.path.realpath(root))
    return sorted(found)


def probe(path):
    """[frames, rate, channels] of a file, or the reason why it cannot be used."""
    try:
        if not os.path.isfile(path):            # opening a pipe would wait for ever
            return "no such file"
        with sf.SoundFile(path) as file:
            frames = file.frames
            file.seek(max(frames - 2**15, 0))
            whole = len(file.read(2**15)) == min(frames, 2**15)
        if not whole:                           # the header promises more than there is: a cut ogg, 2^63 - 1 frames
            with sf.SoundFile(path) as file:
                frames = sum(map(len, audio_blocks(file)))
        return [frames, file.samplerate, file.channels]
    except (OSError, RuntimeError, UnicodeError) as error:
        return reason(error)


def survey(folders, window, flag, remedy="give others, or shorter --windows"):
    """{path: [frames, rate, channels]} of the files that have `window` samples; says which are left out, and why."""
    paths = find_files(folders)
    with ThreadPoolExecutor(8) as pool:
        facts = dict(zip(paths, progress(pool.map(probe, paths), flag, len(paths), unit="file", leave=False)))
    seconds = {path: fact[0] / fact[1] for path, fact in facts.items() if isinstance(fact, list)}
    usable = {path: facts[path] for path in seconds if seconds[path] >= window / SAMPLE_RATE}
    for path in sorted(facts.keys() - usable.keys()):
        why = f"too short, {seconds[path]:.2f} s" if path in seconds else facts[path]
        say(f"  left out: {path} ({why})")
    if not usable:
        raise UserError(f"{flag}: no usable file of {window / SAMPLE_RATE:.2f} s or more: {remedy}")
    say(f"{flag}: {len(usable)} of {len(paths)} files, {sum(map(seconds.get, usable)) / 60:.1f} minutes")
    return usable


def random_numbers(seed, *counters):
    """The generator of random numbers that belongs to (seed, counters)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *counters])))


# ---- checkpoints: dictionaries of primitives and tensors -----------------------------------------

@dataclass
class Checkpoint:
    """What sampling and evaluation need. net: averaged weights, frozen. Model space: latents (B, C, frames) of the
    latent model, audio / scale (B, 2, samples) of the waveform model."""
    kind: str
    net: nn.Module
    vae: VAE | None = None              # of a latent model
    classes: list | None = None         # of a classifier
    step: int = 0                       # of model.pt, with those of the weights that the run began with; None: unknown
    size: str = ""
    path: str = ""                      # of its file

    def __post_init__(self):
        latent, config = self.kind == "latent", self.net.config
        self.hop = self.vae.hop if latent else 1                                # samples in a frame of model space
        self.window = config.frames if latent else getattr(config, "samples", None)     # frames in the model's window
        self.channels = config.channels if latent else 2

    def encode(self, audio):
        return self.vae.encode(audio) if self.kind == "latent" else audio / self.net.scale

    def decode(self, x):
        return self.vae.decode(x) if self.kind == "latent" else x * self.net.scale


def write_atomic(path, write):
    """write(file) to a temporary file beside `path`, which takes its place once it is on the disk: at any moment `path`
    is the old file or the new one, whole. Raises OSError with the path's name."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except Exception as error:
        part.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__      # torch.save hides what the file raised
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def save_atomic(path, state):
    write_atomic(path, lambda file: torch.save(state, file))


def load_state(path, kinds=tuple(NETS)):
    """The dictionary in a checkpoint of one of the kinds; else UserError. Tensors stay in the file until used."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        kind = state["kind"] if state["format"] == 1 else "foreign"
    except Exception as error:          # a damaged or foreign file raises whatever its parser met first
        what = "does not exist" if isinstance(error, FileNotFoundError) else "is damaged, or no checkpoint of train.py"
        raise UserError(f"{path} {what} ({type(error).__name__})") from None
    if kind not in kinds:
        raise UserError(f"{path} holds a {kind} model, not a {' or '.join(kinds)}: give another file")
    return state


def rebuild(kind, config, weights):
    """A network from a checkpoint; settings of it that no longer exist are passed over."""
    make, config_class, _ = NETS[kind]
    net = make(config_class(**{f.name: config[f.name] for f in fields(config_class) if f.name in config}))
    try:
        net.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"the checkpoint's {kind} model is of another version of this program: train again") from None
    return net.eval().requires_grad_(False)


def load_checkpoint(path, device="cpu", kinds=tuple(NETS)):
    """Read what train.py wrote, model.pt or state.pt. Raises UserError if the file cannot be used."""
    state = load_state(path, kinds)
    net = rebuild(state["kind"], state["config"], state["ema"]).to(device)
    vae = rebuild("vae", **state["vae"]).to(device) if state["vae"] else None
    return Checkpoint(state["kind"], net, vae, state["classes"], state["step"], state["size"], str(path))


def open_checkpoint(kind, path=None, device="cpu"):
    """The one rule of all scripts: the file given, else the one beside this module. A latent model's VAE is a VAE."""
    kinds = ("vae", "latent") if kind == "vae" else (kind,)
    found = load_checkpoint(path or Path(__file__).parent / "checkpoints" / f"{kinds[-1]}.pt", device, kinds)
    return found if found.kind == kind else replace(found, kind=kind, net=found.vae, vae=None, step=None)


# ---- levels and spectra --------------------------------------------------------------------------

def level_kept(model, C_L, C_R, reach, above=0.25, most=4.0):
    """A model like `model`, whose x0_hat at times t > above has in the gap, between the first C_L and the last C_R
    positions, the power that it has beside it: each position gets the gain that the mean over `reach` positions on
    either side of it asks for (ours). Else a weak model's notes hardly begin there, fade out, or grow without bounds.
    The gains, 1 / most to most, count as constants in the gradients of terms.
    """
    def kept(x_t, t):
        v = model(x_t, t)
        x0_hat, gap = x0_from_v(x_t, v, t), slice(C_L, x_t.shape[-1] - C_R)
        power = x0_hat.detach().square().mean(1, keepdim=True)                                      # (B, 1, n)
        beside = torch.cat([power[..., :gap.start], power[..., gap.stop:]], -1).mean(-1, keepdim=True)  # (B, 1, 1)
        near = F.avg_pool1d(power[..., gap], 2 * reach + 1, 1, reach, count_include_pad=False)          # (B, 1, gap)
        gain = (beside / near.clamp(min=1e-20)).sqrt().clamp(1 / most, most)
        change = torch.zeros_like(power)
        change[..., gap] = torch.where(t[:, None, None] > above, gain - 1, 0.0)
        return v - change * x0_hat / alpha_sigma(t)[1].to(x_t)[:, None, None]
    return kept


def windows(C_L, gap, C_R, window, overlap):
    """Spans [first, last) of at most `window` positions that one after the other fill a gap of `gap` positions.

    C_L positions are known before the gap and C_R behind it. One span if everything fits. Else equal shares of the gap,
    each behind `overlap` positions or more, if there are as many, and room for them; the last one hears C_R too. From
    right to left where fewer are known before the gap than that, and more behind it.
    """
    if C_L + gap + C_R <= window:
        return [(0, C_L + gap + C_R)]
    if C_L < min(overlap, C_R):
        n = C_L + gap + C_R
        return [(n - last, n - first) for first, last in windows(C_R, gap, C_L, window, overlap)]
    overlap = min(overlap, (window - C_R) // 2)
    count = math.ceil(gap / (window - overlap - C_R))
    ends = [C_L + gap * (i + 1) // count for i in range(count - 1)] + [C_L + gap + C_R]
    return [(max(0, end - window), end) for end in ends]


def spectrum(audio, weight):
    """Mean power, up to a constant factor, of audio (B, channels, n) times weight (n,) at 0 to 22050 Hz: (B, 1025);
    smoothed by a Gaussian with a deviation of a sixth of an octave."""
    size, window = EQUALISER_FFT, torch.hann_window(EQUALISER_FFT, device=audio.device)
    frames = F.pad(audio * weight, (size, size)).unfold(-1, size, size // 2) * window
    power = torch.fft.rfft(frames).abs().square().sum((1, 2)) / weight.square().sum().clamp(min=1)
    octave = torch.arange(power.shape[-1], device=audio.device).clamp(min=0.5).log2()
    smooth = torch.exp(-18 * (octave[:, None] - octave).square())           # 18 = 6^2 / 2
    return power @ (smooth / smooth.sum(1, keepdim=True)).T + 1e-12


def equalise(audio, weight, wanted):
    """Audio (B, channels, n) through a filter of gains from 1/4 to 4, those that give audio times weight (n,) the
    spectrum `wanted` (B, 1025)."""
    n, size = audio.shape[-1], audio.shape[-1] + EQUALISER_FFT          # the filter's tails do not wrap
    gain = (wanted / spectrum(audio, weight)).sqrt().clamp(1 / 4, 4)
    gain = F.interpolate(gain[:, None], size // 2 + 1, mode="linear", align_corners=True)
    return torch.fft.irfft(torch.fft.rfft(audio, size) * gain, size)[..., :n]


def limited(audio, reach):
    """Audio (channels, n) within full scale: turned down around each peak above it, smoothly, `reach` samples a side.

    Each of the gains that are averaged for a sample comes from a stretch that holds it, so no peak passes."""
    peak = F.max_pool1d(audio.abs().amax(0, keepdim=True), 2 * reach + 1, 1, reach)                 # (1, n)
    gain = F.pad((1 / peak).clamp(max=1), (reach + 1, reach), mode="replicate").double().cumsum(-1)
    return audio * ((gain[:, 2 * reach + 1:] - gain[:, :-2 * reach - 1]) / (2 * reach + 1)).to(audio)


# ---- excerpts and fades --------------------------------------------------------------------------

def excerpt(x, first, last, lo, hi):
    """Samples [first, last) of x (..., n), of which only [lo, hi) are read: beyond them the signal is mirrored."""
    i = (torch.arange(first, last) - lo) % (2 * (hi - lo))
    return x[..., lo + torch.minimum(i, 2 * (hi - lo) - 1 - i)]


def resample_part(x, rate_in, rate_out, anchor, first, last, lo, hi):
    """x (channels, n) at rate_in -> its samples [first, last) at rate_out, counted from the sample `anchor` of x, where
    both rates have one. Only [lo, hi) of x is read: see excerpt."""
    begin, end = to_resample(rate_in, rate_out, first, last)
    part, before = excerpt(x, anchor + begin, anchor + end, lo, hi), begin * rate_out // rate_in
    return resample(part, rate_in, rate_out)[:, first - before:last - before]


def blend(old, new):
    """Fade from old to new (channels, n), at level power if they are uncorrelated or alike; opposite ones dip."""
    w = torch.sin(math.pi / 2 * (torch.arange(old.shape[-1]) + 0.5) / old.shape[-1]) ** 2
    rho = F.cosine_similarity(old.flatten(), new.flatten(), dim=0).clamp(min=0)
    return ((1 - w) * old + w * new) / (w**2 + (1 - w) ** 2 + 2 * rho * w * (1 - w)).sqrt()


# ---- in the model's space: generate between known contexts, window after window -------------------------------------

def flag(default, text, **kind):
    """A field of Settings with what its flag on the command line needs."""
    return field(default=default, metadata={"help": f"{text} ({default})", **kind})


@dataclass
class Settings:
    """How to sample. The defaults, by measurement, are said here; xi is by kind of model, see `of`."""
    sampler: str = "ddpm"
    steps: int = 50
    xi: float = flag(XI["latent"], "step size towards the context, for 50 steps; waveform: 0.05", type=within(0, 1e9))
    k: float = flag(0.6, "regenerate, transition: share of noise", type=within(0.01, 1))
    start_from: str = "matched"                              # regenerate, transition: see tasks.regenerate
    project: str = "x0_hat"                                  # what is made to meet y: see guidance.Term
    precision: str = flag("fp32", "of the diffusion network", choices=("fp32", "bf16"))
    equalise: bool = flag(True, "give new audio the spectrum beside it", action=argparse.BooleanOptionalAction)
    keep_level: bool = True                                  # as loud as what is beside it, or as music is

    @classmethod
    def add_flags(cls, add):
        """Flags for the fields that have one, None if not given, and --as-printed. add: a parser's method."""
        for this in filter(lambda this: this.metadata, fields(cls)):
            add("--" + this.name.replace("_", "-"), **this.metadata)
        add("--as-printed", action="store_true", help="the paper's algorithms, constants and start instead")

    @classmethod
    def of(cls, options, checkpoint):
        """The settings that flags (None: not given) ask of a model. UserError for one that would do nothing."""
        given = {this.name: value for this in fields(cls) if (value := getattr(options, this.name, None)) is not None}
        kind = checkpoint.kind
        preset = {"xi": XI[kind], "keep_level": kind == "latent" and checkpoint.size in ("tiny", "small")}
        if options.as_printed:
            preset = AS_PRINTED | {"xi": XI_AS_PRINTED[kind] * given.get("steps", cls.steps) / XI_STEPS}  # see generate
            for name in sorted(given.keys() & preset.keys()):
                raise UserError(f"--{name.replace('_', '-')} is set by --as-printed: leave one of them out")
        return cls(**preset | given)


def generate(checkpoint, x_bar, C_L, C_R, settings, generator, *, spans=None, guides=(), callback=None):
    """Replace what lies between the first C_L and the last C_R frames of x_bar (B, C, n); returns (B, C, n).
    spans       see `windows`; default: one window for all
    guides      functions z -> Task: their terms, whose weights are step sizes as settings.xi is, join in all windows"""
    xi = XI_STEPS / settings.steps if settings.xi or guides else 0.0                   # each term brings its own size
    def model(x_t, t):
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            return checkpoint.net(x_t, t).float()
    x, n, lo, hi = x_bar.clone(), x_bar.shape[-1], C_L, x_bar.shape[-1] - C_R            # [lo, hi) is yet to be filled
    for first, last in spans or [(0, n)]:
        left, right = max(lo - first, 0), max(last - hi, 0)
        z = guidance.draw_noise(x[..., first:last], generator)
        task, estimator = guidance.Task(z, ()), model
        if left + right or settings.k < 1:
            known = torch.cat([x[..., first:first + left], x[..., last - right:last]], -1)
            level = known.square().mean((1, 2)).sqrt() if settings.keep_level else 1.0   # L1's gradient has no level
            task = tasks.regenerate(x[..., first:last], left, right, z, settings.k, settings.start_from,
                                    weight=settings.xi * level, project=settings.project)
            if settings.keep_level and settings.k == 1:
                estimator = level_kept(model, left, right, round(NEAR * SAMPLE_RATE / checkpoint.hop))
        task = tasks.combine(task, *[guide(z) for guide in guides])
        x[..., first:last] = guidance.sample(estimator, task.x_T, task, steps=settings.steps, sampler=settings.sampler,
                                             xi=xi, generator=generator, callback=callback)
        lo, hi = (last, hi) if first <= lo else (lo, first)
    return x


# ---- between a track and the model's space --------------------------------------------------------------------------

def encode_known(checkpoint, audio, C_L, C_R):
    """The first C_L and the last C_R frames of audio (B, 2, n) -> model space (B, C, n / hop), zeros in between. Each
    side is encoded by itself, mirrored beyond its ends, so that nothing in between leaks."""
    hop, frames = checkpoint.hop, audio.shape[-1] // checkpoint.hop
    reach = math.ceil(checkpoint.vae.encoder_field / hop) if checkpoint.vae else 0     # frames
    x = torch.zeros(len(audio), checkpoint.channels, frames, device=audio.device)
    for first, last in ((0, C_L), (frames - C_R, frames)):
        if first < last:
            wide = excerpt(audio, (first - reach) * hop, (last + reach) * hop, first * hop, last * hop)
            x[..., first:last] = checkpoint.encode(wide)[..., reach:reach + last - first]
    return x


def decode_like(checkpoint, x_0, known, C_L, C_R, from_x_bar=False, example=None):
    """x_0 (B, C, frames) -> audio (B, 2, n), equalised. The first C_L and last C_R frames get the spectrum they have in
    the audio `known` (B, 2, n). New frames get the same one; with from_x_bar, that of what stood there; with an
    `example` (B, 2, m), the example's, at their power. With less than LITTLE known, all get the example's, if any."""
    audio, left, right = checkpoint.decode(x_0), C_L * checkpoint.hop, known.shape[-1] - C_R * checkpoint.hop
    shape = None if example is None else spectrum(example, torch.ones_like(example[0, 0]))
    if left + known.shape[-1] - right < LITTLE * SAMPLE_RATE:
        return audio if shape is None else equalise(audio, torch.ones_like(audio[0, 0]), shape)
    ramp, at = round(SPLICE * SAMPLE_RATE), torch.arange(known.shape[-1], device=known.device)
    new = (1 - torch.maximum(left - at, at - right + 1) / ramp).clamp(0, 1)            # (n,): 1 there, 0 beside it
    beside = spectrum(known, 1 - new)
    wanted = spectrum(known, new) if from_x_bar else beside
    wanted = wanted if shape is None else shape * (wanted.sum(1) / shape.sum(1))[:, None]
    return torch.lerp(equalise(audio, 1 - new, beside), equalise(audio, new, wanted), new)


def fill(checkpoint, known, C_L, C_R, settings, generator, *, from_x_bar=False, guides=(), example=None, **how):
    """Audio `known` (B, 2, n) with a new middle, between its first C_L and last C_R frames: encode, generate, decode.
    from_x_bar  start from what is there (Table 2's Regenerate and Transition), instead of not reading it at all
    guides, how see generate; with guides, only an `example` equalises. Else latent music from nothing gets LEVEL
    """
    read, k = ((known.shape[-1] // checkpoint.hop, 0), settings.k) if from_x_bar else ((C_L, C_R), 1.0)
    x_bar = encode_known(checkpoint, known, *read)
    x_0 = generate(checkpoint, x_bar, C_L, C_R, replace(settings, k=k), generator, guides=guides, **how)
    matched = settings.equalise and (example is not None or not guides)
    audio = decode_like(checkpoint, x_0, known, C_L, C_R, from_x_bar, example) if matched else checkpoint.decode(x_0)
    if settings.keep_level and not (C_L or C_R or from_x_bar or (matched and example is not None)):
        audio = audio * LEVEL / audio.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-6)
    return audio


def hear(listener, checkpoint, x, part=slice(None)):
    """A(x) = PaSST(resample(decode(x))), Sect. 4.3: logits and embedding of x (B, C, n), of a `part` of its samples."""
    return listener.listen(checkpoint.decode(x)[..., part], SAMPLE_RATE)


@dataclass
class Track:
    """Audio (channels, n), float64 where float32 would lose something, its rate in Hz, and the subtype of its file."""
    audio: torch.Tensor
    rate: int
    subtype: str = "FLOAT"
    n = property(lambda self: self.audio.shape[-1])

    @classmethod
    def read(cls, path):
        audio, rate = read_audio(path)
        if len(audio) > 2:
            raise UserError(f"{path} has {len(audio)} channels; only mono and stereo can be edited: mix it down first")
        subtype = sf.info(path).subtype
        if subtype in ("PCM_32", "DOUBLE"):
            audio = torch.from_numpy(sf.read(path, always_2d=True)[0].T.copy())
        if not audio.isfinite().all():
            raise UserError(f"{path} holds samples that are not finite; repair or export it again")
        return cls(audio, rate, subtype)


class Edit:
    """The region [a, b) of a track, in its own samples, laid on a model's frames: C_L known, `gap` free, C_R known.

    Time is counted from a, which lies exactly on a frame. The right border is rounded up to the next frame: what is new
    ends at `end`, where the audio that the model knows begins (at b, if it knows none there)."""

    def __init__(self, checkpoint, track, a, b, context=None):
        self.checkpoint, self.track, self.a = checkpoint, track, a
        window = checkpoint.window
        self.frame = checkpoint.hop * track.rate / SAMPLE_RATE                         # native samples per frame
        self.gap = math.ceil((b - a) / self.frame - 1e-6)
        before, behind = int(a / self.frame), max(0, int((track.n - a) / self.frame) - self.gap)
        spare = max(window - self.gap, window // 2)         # a side takes what the other does not have
        each = min(int(context * SAMPLE_RATE / checkpoint.hop), window // 2) if context else spare
        self.C_R = min(behind, each, spare // 2)
        self.C_L = min(before, each, spare - self.C_R)
        self.C_R = min(behind, each, spare - self.C_L)
        self.b, self.end = b, a + math.ceil(self.gap * self.frame - 1e-6) if self.C_R else b
        if track.n and not self.C_L + self.C_R:
            raise UserError("--input has less than one frame beside the new part: take less of it, or a longer file")
        self.spans = windows(self.C_L, self.gap, self.C_R, window, min(each, spare // 2))

    def known(self, whole):
        """What the model may know, as audio (1, 2, samples) at 44.1 kHz: each side made by itself, so that nothing of
        the region leaks, and zeros in the gap; or, if `whole`, the region too."""
        hop, (C_L, gap, C_R), track = self.checkpoint.hop, (self.C_L, self.gap, self.C_R), self.track
        audio = torch.zeros(2, (C_L + gap + C_R) * hop)
        parts = ((-C_L, gap + C_R, 0, track.n),) if whole else ((-C_L, 0, 0, self.a), (gap, gap + C_R, self.b, track.n))
        for first, last, lo, hi in parts:
            if first < last:
                audio[:, (C_L + first) * hop:(C_L + last) * hop] = resample_part(
                    track.audio.float().expand(2, -1), track.rate, SAMPLE_RATE, self.a, first * hop, last * hop, lo, hi)
        return audio[None]

    def splice(self, decoded, seconds, top=math.inf):
        """Decoded audio (2, hop * frames) laid into the track: (channels, n). Cross-fades of `seconds` lie outside
        [a, end), or shorter ones where less is known; with 0 all of it, contexts included, stands as it is.
        top: it is turned down around higher peaks, before it is faded in (where the sum may still be higher)."""
        audio, (a, end) = self.track.audio, (self.a, self.end)
        fade = round(seconds * self.track.rate) if seconds else self.track.n
        last = a + int((self.gap + self.C_R) * self.frame + 1e-6)                      # where decoded ends
        before, behind = min(fade, int(self.C_L * self.frame)), max(0, min(fade, last - end, self.track.n - end))
        new = resample_part(decoded, SAMPLE_RATE, self.track.rate, self.C_L * self.checkpoint.hop,
                                  -before, end - a + behind, 0, decoded.shape[-1])
        new = new[:len(audio)]                  # for mono, one channel: the mean of two that differ would be quieter
        if (over := new.abs().max() / top) > 1:
            print(f"note: peaks of the new audio are turned down, by {20 * over.log10():.1f} dB at most")
            new = limited(new / top, round(LIMITER * self.track.rate)) * top
        if seconds:
            new = torch.cat([blend(audio[:, a - before:a], new[:, :before]), new[:, before:before + end - a],
                             blend(new[:, before + end - a:], audio[:, end:end + behind])], dim=-1)
        return torch.cat([audio[:, :a - before], new, audio[:, end + behind:]], dim=-1)

    def times(self):
        """One line: where things lie, in seconds, after rounding to the model's frames."""
        rate, passes = self.track.rate, len(self.spans)
        before, after = (C * self.frame / rate for C in (self.C_L, self.C_R))
        heard = f"; the model hears {before:.2f} s before it and {after:.2f} s after it" * bool(before + after)
        made = f"new audio {clock(self.a / rate)} to {clock(self.end / rate)}"
        return made + f", in {passes} passes" * (passes > 1) + heard


def clock(seconds):
    return f"{int(round(seconds, 3) // 60)}:{round(seconds, 3) % 60:06.3f}"


# ---- files ----------------------------------------------------------------------------------------------------------

def word_length(path, track):
    """The subtype to write at path: the track's own where the format has it, else floats, or the 24 bits of flac."""
    kind = path.suffix[1:].upper()
    if track.subtype in (*PCM_BITS, "FLOAT", "DOUBLE") and sf.check_format(kind, track.subtype):
        return track.subtype
    return "PCM_24" if kind == "FLAC" else "DOUBLE" if track.audio.dtype == torch.float64 else "FLOAT"


def write_track(path, track):
    """Write a Track as wav or flac, by the ending of path, atomically. Integers are made here: libsndfile scales floats
    by 2^15 - 1 on the way out and 2^15 on the way in."""
    bits, kind = PCM_BITS.get(track.subtype, 0), path.suffix[1:].upper()
    full = 2.0 ** (bits - 1)
    def write(file):
        with sf.SoundFile(file, "w", track.rate, len(track.audio), track.subtype, format=kind) as out:
            for samples in track.audio.T.split(2**20):                                 # (n, channels)
                if bits:
                    samples = (samples.double() * full).round().clamp(-full, full - 1).int() << (32 - bits)
                out.write(samples.numpy())
    write_atomic(path, write)


def digest(*facts):
    """8 hex digits of whatever json can hold."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


def file_digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def output_paths(o):
    """One path per variation; checked before any work is done."""
    source = o.input or o.reference
    first = Path(o.output or (Path(source).with_suffix(f".{o.task}.wav") if source else f"{o.task}.wav"))
    if first.suffix.lower() not in (".wav", ".flac") or first.suffix.lower() == ".flac" and o.subtype == "FLOAT":
        raise UserError(f"--output {first} must end in .wav" + " or in .flac" * (o.subtype != "FLOAT"))
    paths = [first] + [first.with_name(f"{first.stem}-{i + 1}{first.suffix}") for i in range(1, o.num)]
    for path in paths + [path.with_suffix(".json") for path in paths] + [first.with_suffix(".html")] * o.page:
        if any(path.exists() and path.samefile(used) for used in (o.input, o.input2, o.reference) if used):
            raise UserError(f"{path} is also what is read: choose another --output")
        if path.is_dir() or path.exists() and not o.force:
            raise UserError(f"{path} exists; choose another --output, or overwrite a file with --force")
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        (probe := Path(f"{first}.part")).touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output {first} cannot be written: {error.strerror}") from None
    return paths


# ---- the command line -----------------------------------------------------------------------------------------------

def pairs(text):
    """"drums=1,voice=0" -> {"drums": 1.0, "voice": 0.0}."""
    try:
        return {name.strip(): within(-1e9, 1e9)(value) for name, value in (item.split("=") for item in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not of the form name=1,other=0") from None


def parse(argv, add_flags=Settings.add_flags):
    """The options. None: not given; then the default is that of Settings, of `region` or of `main`."""
    def refuse(message):
        raise UserError(f"{message} (all flags: --help)")
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.error, add, length = refuse, p.add_argument, within(0.01, 1e6, seconds)
    add("--task", choices=TASKS, required=True, help="embedding: by example; classifier: by class")
    add("--input", help="the track to edit: wav, flac, ogg, mp3; any rate, mono or stereo")
    add("--input2", help="transition: the track to go over to")
    add("--start", type=seconds, help="where the new audio begins, in seconds or m:ss (continuation: the end)")
    add("--end", type=seconds, help="infill, regenerate: where it ends (2 s later; with neither, the middle 2 s)")
    add("--length", type=length, help="continuation, or without --input: how much to make (what the window holds)")
    add("--context", type=length, help="seconds to hear on each side, half a window at most (continuation: 2.4)")
    add("--fade", type=length, help="transition: length of the cross-fade in seconds (2.5)")
    add("--reference", help="audio whose style to approach: embedder guidance, for every task")
    add("--classes", type=pairs, help="name=1,other=0, wanted and unwanted: classifier guidance, for every task")
    add("--weights", type=pairs, help="embedding=2,classifier=0.5: more or less of a guiding term (1)")
    add("--model", choices=tuple(XI), default="latent", help="one of the two shipped models (latent)")
    add("--checkpoint", help="of the model, one that you trained (the one shipped)")
    add("--listener", help="checkpoint of the classifier that --reference and --classes use (the one shipped)")
    add("--sampler", choices=("ddpm", "ddim"), help=f"Algorithm 1 or 2 ({Settings.sampler})")
    add("--steps", type=within(1, 100000, int), help=f"sampling steps ({Settings.steps})")
    add_flags(add)
    add("--splice", type=within(0, 50), help="cross-fade in ms (30); 0: the model's output as it is")
    add("--num", type=within(1, 1000, int), default=1, help="variations (1)")
    add("--seed", type=within(0, 2**63, int), default=0, help="another seed makes other music (0)")
    add("--device", default="auto", help="cpu, cuda or mps (auto: cuda, else mps, else cpu)")
    add("--output", help="wav or flac (beside the input)")
    add("--subtype", choices=("PCM_16", "PCM_24", "FLOAT"), help="(the input's; FLOAT if it was compressed)")
    add("--page", action="store_true", help="write a page too, to see, hear and choose: the same name, .html")
    add("--force", action="store_true", help="overwrite")
    return p.parse_args(argv)


def check(o):
    """UserError for flags that are missing, or would do nothing."""
    guided = {"embedding": o.reference, "classifier": o.classes}
    for path in filter(None, (o.input, o.input2, o.reference)):
        if not Path(path).is_file():
            raise UserError(f"{path} is no file: check its name")
    for name, takers in NEEDED.items():
        if o.task in takers and not getattr(o, name):
            raise UserError(f"--{name} is missing: --task {o.task} needs it")
    idle = [name for name, takers in USED.items() if o.task not in takers] + ["listener"] * (not any(guided.values()))
    idle += ["equalise"] * (not o.reference and (o.task not in EDITS or bool(o.classes)))
    idle += ["classes"] * (o.k is not None and math.atan2(o.k, 1 - o.k) <= ABOVE * math.pi / 2)    # t_T, in regenerate
    for name in idle:
        if getattr(o, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} does nothing beside the other flags: leave it out")
    for name in o.weights or {}:
        if not guided.get(name):
            raise UserError(f"--weights {name} does nothing: embedding is for --reference, classifier for --classes")


def region(o, checkpoint):
    """The track to edit, the region [a, b) in its samples, and the context to hear in seconds (None: what fits), by the
    task's flags or the paper's choices, Sect. 4.3."""
    window = checkpoint.window * checkpoint.hop / SAMPLE_RATE
    if o.task not in EDITS:
        return Track(torch.zeros(2, 0), SAMPLE_RATE, "PCM_16"), 0, round((o.length or window) * SAMPLE_RATE), None
    track = Track.read(o.input)
    if o.task == "transition":
        return *crossfaded(track, Track.read(o.input2), o.fade or FADE), o.context
    rate, lasts = track.rate, f"{o.input} lasts {clock(track.n / track.rate)}"
    if o.task == "continuation":
        a = track.n if o.start is None else round(o.start * rate)
        if not 0 < a <= track.n:
            raise UserError(f"--start {clock(o.start)} leaves nothing to continue: {lasts}")
        context = o.context or CONTEXT
        b = a + round((o.length or window - min(context, window / 2, a / rate)) * rate)
        return Track(track.audio[:, :a], rate, track.subtype), a, b, context
    if (start := o.start) is None:
        start = max(0, (track.n / rate - GAP) / 2 if o.end is None else o.end - GAP)
    a, b = round(start * rate), min(track.n, round((start + GAP) * rate)) if o.end is None else round(o.end * rate)
    if not 0 <= a < b <= track.n or b - a == track.n:
        raise UserError(f"{lasts}: --start {clock(a / rate)} to --end {clock(b / rate)} must be a part of it")
    return track, a, b, o.context


def crossfaded(one, two, fade):
    """The end of one track faded into the start of another, at constant power: (Track, first and last sample of it)."""
    other = two.audio.mean(0, keepdim=True) if len(one.audio) == 1 else two.audio.expand(2, -1)
    other = resample(other, two.rate, one.rate)
    fade = round(fade * one.rate)
    C_L, C_R = one.n - fade, other.shape[-1] - fade
    if fade < 1 or C_L < 1 or C_R < 1:
        lengths = f"{clock(one.n / one.rate)} and {clock(two.n / two.rate)}"
        raise UserError(f"--fade {fade / one.rate:g} s must be above 0 and shorter than both tracks, of {lengths}")
    audio = tasks.crossfade(F.pad(one.audio, (0, C_R))[None], F.pad(other, (C_L, 0))[None], C_L, C_R)[0]
    return Track(audio, one.rate, one.subtype if one.subtype == two.subtype else "mixed"), C_L, C_L + fade


def guide_terms(o, checkpoint, listener, device):
    """Functions z -> Task for --reference and --classes; and the reference, (1, 2, n) at 44.1 kHz, or None."""
    weight = {name: step * (o.weights or {}).get(name, 1.0) for name, step in XI_GUIDE.items()}
    guides, example = [], None
    if o.reference:
        example = to_stereo_44k(*read_audio(o.reference))[None].to(device)
        if not (example.any() and example.isfinite().all()):
            raise UserError(f"--reference {o.reference} is silent, or holds samples that are not finite: give another")
        y = listener.net.listen(example, SAMPLE_RATE)[1]
        embedding = lambda x: hear(listener.net, checkpoint, x)[1]
        guides.append(lambda z: tasks.embedder_guidance(embedding, y, z, weight["embedding"], above=ABOVE))
    if o.classes:
        wrong = [name for name, label in o.classes.items() if name not in listener.classes or not 0 <= label <= 1]
        if wrong:
            raise UserError(f"--classes {', '.join(wrong)}: give labels from 0 to 1 to {', '.join(listener.classes)}")
        chosen = [listener.classes.index(name) for name in o.classes]
        logits = lambda x: hear(listener.net, checkpoint, x)[0][:, chosen]
        labels = torch.tensor([list(o.classes.values())], device=device)
        guides.append(lambda z: tasks.classifier_guidance(logits, labels, z, weight["classifier"], above=ABOVE))
    return guides, example


def main(argv=None, add_flags=Settings.add_flags, open_model=None):       # both for examples/stable_audio_open.py
    o = parse(argv, add_flags)
    check(o)
    paths, device, fade = output_paths(o), pick_device(o.device), SPLICE if o.splice is None else o.splice / 1000
    checkpoint = open_model(o, device) if open_model else open_checkpoint(o.model, o.checkpoint, device)
    print(f"model: {checkpoint.path}" + ("" if checkpoint.step is None else f", trained for {checkpoint.step} steps"))
    settings, edit = Settings.of(o, checkpoint), Edit(checkpoint, *region(o, checkpoint))
    print(edit.times())
    listener = open_checkpoint("classifier", o.listener, device) if o.reference or o.classes else None
    guides, example = guide_terms(o, checkpoint, listener, device)
    files = o.input, o.input2, o.reference, checkpoint.path, listener and listener.path
    record = {"command": shlex.join(["python", *(sys.argv if argv is None else ["sample.py", *argv])]),
              "settings": asdict(settings), "sha256": {path: file_digest(path) for path in files if path},
              "times": edit.times(), "versions": {"torch": torch.__version__, "checkpoint step": checkpoint.step}}
    from_x_bar, subtype, rate = o.task in FROM_X_BAR, o.subtype or word_length(paths[0], edit.track), edit.track.rate
    beside = edit.track.audio.tensor_split((edit.a, edit.end), -1)[::2]                # what stays as it is
    top = max([1.0] + [part.abs().max().item() for part in beside if part.numel()])
    if subtype in PCM_BITS and top > 1:
        raise UserError(f"{o.input} has peaks above full scale, which {subtype} cuts off: take .wav, --subtype FLOAT")
    known = edit.known(whole=from_x_bar).to(device)
    for i, path in enumerate(paths):
        generator = torch.Generator().manual_seed(int(random_numbers(o.seed, i).integers(2**63)))
        with progress(total=settings.steps * len(edit.spans), unit="step") as bar:
            audio = fill(checkpoint, known, edit.C_L, edit.C_R, settings, generator, from_x_bar=from_x_bar,
                         spans=edit.spans, guides=guides, example=example, callback=lambda *_: bar.update())
        if not audio.isfinite().all():
            raise UserError(f"{checkpoint.path} made samples that are not finite: take other settings or another", 1)
        track = Track(edit.splice(audio[0].cpu(), fade, top), rate, subtype)
        write_track(path, track)
        text = json.dumps(record | {"variation": i, "seed": o.seed, "output": str(path)}, indent=1)
        write_atomic(path.with_suffix(".json"), lambda file: file.write(text.encode()))
        print(f"wrote {path}: {clock(track.n / rate)} at {rate} Hz, {subtype}")
    if o.page:
        from examples import page       # here: it imports this module
        page.edit_page(paths, Track.read(o.input) if o.task == "continuation" else edit.track, edit, fade)


if __name__ == "__main__":
    run(main, "choose a shorter --length or --context, or --device cpu")
