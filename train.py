"""Training (App. C.2, Sect. 4.2): from a folder of music to the checkpoint that sample.py takes.

    python train.py --model latent                             # no data given: built-in synthetic music
    python train.py --model latent --data path/to/music        # wav flac ogg mp3, at any depth; or --model vae ...
    torchrun --nproc_per_node=8 train.py --model latent --size paper --data path/to/fma_full

All that is random about clip k of a run (where it is cut, t, noise, patchout) is a function of (seed, k) and nothing
else, and step i takes the clips from i * batch on. So a resumed run needs no state of random numbers, and neither the
number of threads nor that of processes changes what is trained.
"""
import argparse
import copy
import csv
import errno
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import soundfile as sf
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import dit
import unet1d
import vae as autoencoder
from diffusion import v_loss
from examples import synthetic
from guidance import frozen, sample
from tasks import PASST_PRESETS, PASST_RATE, PaSST, PaSSTConfig, resample
from vae import VAE

SAMPLE_RATE = 44100                     # Hz, of all audio inside
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
MIN_SECONDS = 0.25                      # shorter files are never used
TRAIN, VALID, MEASURE = range(3)        # streams of random numbers
MEASURED = 1000                         # clips that statistics are taken of
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))     # under torchrun; else 0, 1
NETS = {"vae": (VAE, autoencoder.VAEConfig, autoencoder.PRESETS), "latent": (dit.build, dit.DiTConfig, dit.PRESETS),
        "waveform": (unet1d.UNet1D, unet1d.UNetConfig, unet1d.PRESETS),
        "classifier": (PaSST, PaSSTConfig, PASST_PRESETS)}
HEALTHY = {"vae": "the loss falls steadily, and the SNR ends near 10 dB or above",
           "latent": "the validation loss is below 0.8 after some hundred steps, and falls slowly from there",
           "waveform": "the validation loss is below 0.35 after a thousand steps, and falls slowly from there",
           "classifier": "the mean average precision is far above one over the number of classes"}


@dataclass(frozen=True)
class Recipe:
    """How one size of a model is trained. Steps, batch and warm-up of the two diffusion models in the paper's size are
    App. C.2's; learning rates, the averages of the weights and all other sizes are ours."""
    steps: int
    batch: int
    lr: float
    warmup: int                         # steps; never more than a tenth of them
    ema: float                          # decay of the moving average of the weights
    finetune_steps: int = 0             # VAE: decoder against discriminator, after `steps`
    window: int = 0                     # samples in a clip; 0: the model's own window
    muon: bool = False                  # see make_optimizers
    beta2: float = 0.999                # of AdamW


RECIPES = {
    "vae": {"tiny": Recipe(100, 4, 1e-3, 10, 0.95, 10, window=2**14),
            "small": Recipe(20_000, 8, 1e-3, 500, 0.999, 4_000, window=2**15),
            "paper": Recipe(400_000, 32, 2e-4, 5000, 0.9999, 50_000, window=2**16)},
    "latent": {"tiny": Recipe(300, 8, 2e-3, 20, 0.98, muon=True),
               "small": Recipe(20_000, 16, 2e-3, 200, 0.999, muon=True),
               "paper": Recipe(300_000, 96, 1e-4, 5000, 0.9999)},
    "waveform": {"tiny": Recipe(300, 8, 2e-3, 20, 0.98, beta2=0.99),
                 "small": Recipe(20_000, 8, 1e-3, 200, 0.999, beta2=0.99),
                 "paper": Recipe(600_000, 384, 1e-4, 5000, 0.9999)},
    "classifier": {"tiny": Recipe(200, 8, 1e-3, 20, 0.98, window=2**16),
                   "small": Recipe(4_000, 16, 1e-3, 100, 0.99, window=3 * SAMPLE_RATE, muon=True),
                   "paper": Recipe(100_000, 96, 1e-4, 5000, 0.999, window=10 * SAMPLE_RATE)},
}


# ---- what goes wrong, and processes ---------------------------------------------------------------------------------

class UserError(Exception):
    """One sentence for the user: what is wrong, and the remedy. Exit status 2, unusable input, or 1, failed at work."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


def run(main, need_memory="lower --batch (or, when training, raise --accumulate)"):
    """Call a script's main(): errors that the user can do something about end in one line on stderr, no traceback."""
    try:
        return main()
    except UserError as error:
        message, status = error, error.status
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "alloc" not in str(error):
            raise
        message, status = f"out of memory: {need_memory}", 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS,
                               errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise
        message = (f"{error.filename or 'a file'} cannot be written: {error.strerror}. Free some space, or write "
                   "elsewhere; what was saved before is whole")
        status = 1
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


def say(text):
    if RANK == 0:
        tqdm.write(text)


def show(path):
    """A path as printable text: names need not be valid UTF-8."""
    return str(path).encode(errors="backslashreplace").decode()


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


# ---- audio files ----------------------------------------------------------------------------------------------------

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
        raise UserError(f"{show(path)} cannot be read ({reason(error)}); wav, flac, ogg and mp3 can be") from None
    if not blocks:
        raise UserError(f"{show(path)} holds no audio")
    return torch.from_numpy(np.concatenate(blocks).T.copy()), file.samplerate


def to_stereo_44k(audio, rate):
    """audio (channels, n) at `rate` Hz -> (2, n') at 44.1 kHz. Mono goes to both sides; of many channels two remain."""
    return resample(audio[:2] if len(audio) > 1 else audio.expand(2, -1), rate, SAMPLE_RATE)


def reason(error):
    """What libsndfile says, without the path."""
    return show(error).rsplit(": ", 1)[-1].rstrip(".")


def find_files(folders):
    """Paths of all audio files in the folders, at any depth, sorted. Links are followed, loops are not."""
    found, seen = [], set()
    for folder in map(str, folders):
        if not os.path.isdir(folder):
            found.append(folder)
        for root, below, names in os.walk(folder, followlinks=True):
            if os.path.realpath(root) in seen:
                below.clear()
                continue
            seen.add(os.path.realpath(root))
            found += [os.path.join(root, name) for name in names if name.lower().endswith(SUFFIXES)]
    return sorted(found)


def probe(path):
    """[frames, rate, channels] of a file, or the reason why it cannot be used."""
    try:
        if not os.path.isfile(path):            # opening a pipe would wait for ever
            return "no such file"
        if not os.path.getsize(path):
            return "empty file"
        with sf.SoundFile(path) as file:
            file.seek(max(file.frames - 2**15, 0))
            whole, frames = len(file.read()) == min(file.frames, 2**15), file.frames
        if not whole:                           # the header promises more than there is
            with sf.SoundFile(path) as file:
                frames = sum(map(len, audio_blocks(file)))
        return [frames, file.samplerate, file.channels]
    except (OSError, RuntimeError, UnicodeError) as error:
        return reason(error)


def index(folders, store):
    """{path: [frames, rate, channels] or a reason} for all audio files in the folders. What is known is kept in the
    file `store`; only new and changed files are opened."""
    known = json.loads(store.read_text()) if store.exists() else {}
    stamps = {}
    for path in find_files(folders):
        stat = os.stat(path) if os.path.exists(path) else None
        stamps[path] = [stat.st_size, stat.st_mtime_ns] if stat else None
    new = [path for path, stamp in stamps.items() if path not in known or known[path][0] != stamp]
    with ThreadPoolExecutor(8) as pool:
        facts = list(progress(pool.map(probe, new), "index", len(new), unit="file")) if new else []
    known |= {path: [stamps[path], fact] for path, fact in zip(new, facts)}
    barrier()                                   # each process has read the store before one of them writes it
    if new and RANK == 0:
        write_atomic(store, lambda file: file.write(json.dumps(known).encode()))
    return {path: known[path][1] for path in stamps}


# ---- clips ----------------------------------------------------------------------------------------------------------

def random_numbers(seed, *counters):
    """The generator of random numbers that belongs to (seed, counters)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *counters])))


class Tracks:
    """Clips of audio files, read by seeking. facts: {path: [frames, rate, channels]}."""
    unit = 1                                    # samples at 44.1 kHz in a frame of `lengths`, and of a clip

    def __init__(self, facts):
        self.paths, self.rates = list(facts), [rate for _, rate, _ in facts.values()]
        self.lengths = np.array([frames * SAMPLE_RATE // rate for frames, rate, _ in facts.values()], dtype=np.int64)
        self.names = [Path(path).resolve().parent.name for path in facts]
        self.broken = {}                        # what could be opened when indexed, but not read

    def crop(self, rng, window, place=None):
        """(clip (C, window / unit) float32, track number). place: where in all the music, 0 to 1; None: anywhere."""
        n, ends = window // self.unit, np.cumsum(self.lengths)
        for _ in range(10):
            second = (rng.random() if place is None else place) * ends[-1]
            track = int(np.searchsorted(ends, second, side="right"))
            into = 1 - (ends[track] - second) / self.lengths[track]
            start = int(into * max(self.lengths[track] - n + 1, 1))
            try:
                clip = self.read(track, start, n)
                return np.pad(clip, ((0, 0), (0, n - clip.shape[1]))), track
            except (OSError, RuntimeError) as error:
                self.broken[self.paths[track]], place = reason(error), None
        raise UserError(f"ten clips in a row could not be read, the last in {show(self.paths[track])}", status=1)

    def read(self, track, start, n):
        rate = self.rates[track]
        step = rate // math.gcd(rate, SAMPLE_RATE)              # every so many samples the two grids of time meet
        margin = 0 if rate == SAMPLE_RATE else 64 + 64 * rate // SAMPLE_RATE      # the resampler looks around
        first = max(start * rate // SAMPLE_RATE - margin, 0) // step * step
        before = first * SAMPLE_RATE // rate
        with sf.SoundFile(self.paths[track]) as file:
            file.seek(min(first, file.frames))
            audio = file.read((start - before + n) * rate // SAMPLE_RATE + 1 + margin, dtype="float32", always_2d=True)
        audio = to_stereo_44k(torch.from_numpy(audio.T.copy()), rate).numpy()
        return audio[:, start - before:][:, :n]


class Cached(Tracks):
    """Clips of prepared tracks, each kept in a file of the folder as rows (n / unit, C): decoded audio or, with a VAE,
    the mean of its posterior."""
    peak = 16383                                # int16 for amplitude 1: decoded peaks may exceed it

    def __init__(self, tracks, folder, vae=None):
        self.__dict__.update(vars(tracks))
        key = "audio"
        if vae:
            self.unit, vae = VAE.hop, copy.deepcopy(vae)
            vae.latent_mean.zero_(), vae.latent_std.fill_(1)
            weights = b"".join(p.detach().cpu().numpy().tobytes() for p in vae.encoder.parameters())
            key = hashlib.sha256(weights).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        versions = [f"{key} {show(path)} {os.stat(path).st_mtime_ns}" for path in self.paths]
        self.files = [folder / f"{hashlib.sha256(version.encode()).hexdigest()[:32]}.npy" for version in versions]
        for path, file in progress(list(zip(self.paths, self.files))[RANK::WORLD], "cache", unit="track"):
            if not file.exists():
                try:
                    rows = self.prepare(to_stereo_44k(*read_audio(path)), vae)
                except UserError:
                    continue                    # damaged in its middle, where `probe` did not look
                write_atomic(file, lambda out: np.save(out, rows))
        barrier()
        self.broken = {path: "damaged" for path, file in zip(self.paths, self.files) if not file.exists()}
        kept = [track for track in zip(self.paths, self.rates, self.names, self.files) if track[-1].exists()]
        if not kept:
            raise UserError(f"none of the {len(self.files)} files of --data can be decoded: give others")
        self.paths, self.rates, self.names, self.files = zip(*kept)
        self.lengths = np.array([len(np.load(file, mmap_mode="r")) for file in self.files], dtype=np.int64)

    def prepare(self, audio, vae):
        if vae:
            return vae.encode(audio[None].to(vae.latent_mean.device))[0].T.half().cpu().numpy()
        return (audio.clamp(-2, 2) * self.peak).short().T.numpy()

    def read(self, track, start, n):
        rows = np.load(self.files[track], mmap_mode="r")[start:start + n].T
        return rows / np.float32(self.peak) if rows.dtype == np.int16 else rows.astype(np.float32)


class Synthetic:
    """Clips of endless music made by a program."""
    names, broken, unit = list(synthetic.STYLES), {}, 1

    def __init__(self, seed):
        self.seed = seed

    def crop(self, rng, window, place=None):
        return synthetic.clip(self.seed, int(rng.integers(2**40)), window / SAMPLE_RATE)


class Clips:
    """clips(ks) -> batch of tensors: clip k and all that is random about it, a function of (seed, stream, k). `count`
    clips spread evenly over the music, or, without a count, endlessly many from anywhere."""

    def __init__(self, source, window, draw, classes, seed, stream=TRAIN, count=None):
        self.source, self.window, self.draw = source, window, draw
        self.seed, self.stream, self.count = seed, stream, count
        self.labels = [classes.index(name) if name in classes else -1 for name in source.names]

    def clip(self, k):
        rng = random_numbers(self.seed, self.stream, k)
        x, track = self.source.crop(rng, self.window, (k + 0.5) / self.count if self.count else None)
        return {"k": np.int64(k), "x": x, "label": np.int64(self.labels[track]), **self.draw(rng)}

    def __call__(self, ks):
        clips = [self.clip(k) for k in ks]
        return {name: torch.from_numpy(np.stack([clip[name] for clip in clips])) for name in clips[0]}


def prefetch(load, schedule, workers):
    """load(ks) for each ks of the schedule, in order, prepared by threads (libsndfile and numpy let others run)."""
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for ks in schedule:
            waiting.append(pool.submit(load, ks))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@torch.no_grad()
def moments(clips, encode, count):
    """Mean and standard deviation (C,) of encode(x) (B, C, n), over short clips from all over the training set."""
    n, total, squares = 0, 0.0, 0.0
    short = Clips(clips.source, min(clips.window, 2**15), lambda rng: {}, [], clips.seed, MEASURE, count)
    batches = prefetch(short, [[k] for k in range(count)], workers=2)
    for batch in progress(batches, "statistics", count, unit="clip", leave=False):
        z = encode(batch["x"]).cpu().double()            # MPS has no float64
        n, total, squares = n + z[:, 0].numel(), total + z.sum((0, 2)), squares + z.square().sum((0, 2))
    return (total / n).float(), (squares / n - (total / n).square()).clamp(min=1e-8).sqrt().float()


# ---- checkpoints: dictionaries of primitives and tensors ------------------------------------------------------------

@dataclass
class Checkpoint:
    """What sampling and evaluation need. net: averaged weights, frozen. Model space: latents (B, C, frames) of the
    latent model, audio / scale (B, 2, samples) of the waveform model."""
    kind: str
    net: nn.Module
    vae: VAE | None = None              # of a latent model
    classes: list | None = None         # of a classifier
    step: int = 0
    seed: int = 0
    size: str = ""
    path: str = ""                      # of its file

    @property
    def hop(self):
        """Samples in a frame of model space."""
        return VAE.hop if self.kind == "latent" else 1

    @property
    def window(self):
        """Frames in the model's window."""
        return self.net.config.frames if self.kind == "latent" else self.net.config.samples

    @property
    def channels(self):
        return self.net.config.channels if self.kind == "latent" else 2

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


def load_state(path):
    """The dictionary in a checkpoint file; UserError if it is none. Tensors stay in the file until they are used."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{show(path)} does not exist") from None
    except Exception as error:          # a damaged or foreign file raises whatever its parser met first
        raise UserError(f"{show(path)} is damaged, or no checkpoint of train.py ({type(error).__name__})") from None
    if not isinstance(state, dict) or state.get("format") != 1 or state.get("kind") not in NETS:
        raise UserError(f"{show(path)} is no checkpoint of train.py")
    return state


def rebuild(kind, config, weights):
    make, config_class, _ = NETS[kind]
    known = {field.name for field in fields(config_class)}
    net = make(config_class(**{name: value for name, value in config.items() if name in known}))
    try:
        net.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"the checkpoint's {kind} model is of another version of this program: train again") from None
    return net.eval().requires_grad_(False)


def load_checkpoint(path, device="cpu"):
    """Read what train.py wrote, a run's checkpoint or an export. Raises UserError if the file cannot be used."""
    state = load_state(path)
    net = rebuild(state["kind"], state["config"], state["ema"]).to(device)
    vae = rebuild("vae", **state["vae"]).to(device) if state["vae"] else None
    facts = {name: state[name] for name in ("kind", "classes", "seed", "size")}
    return Checkpoint(net=net, vae=vae, path=str(path), step=steps_made(state), **facts)


def steps_made(state):
    """Of the run and of the runs whose weights it began with."""
    return state["step"] + state.get("before", 0)


def find_checkpoint(kind, path=None):
    """The file given, else the one shipped beside this module, else that of the default run."""
    places = [Path(__file__).parent / "checkpoints" / f"{kind}.pt", Path("runs") / kind / "model.pt"]
    for place in [Path(path)] if path else places:
        if place.exists():
            return place
    raise UserError(f"{show(path)} does not exist" if path else
                    f"there is no checkpoint {places[0]} and no {places[1]}: run python train.py --model {kind}")


def open_checkpoint(kind, path=None, device="cpu"):
    """The checkpoint of that kind that find_checkpoint finds. UserError if what it finds is of another kind."""
    found = load_checkpoint(find_checkpoint(kind, path), device)
    if found.kind != kind:
        raise UserError(f"{show(found.path)} holds a {found.kind} model, not a {kind}: give a file that train.py "
                        f"--model {kind} wrote")
    return found


def export(run_folder, file):
    """The small checkpoint for sampling: averaged weights in half precision, and no optimizer."""
    state = load_state(Path(run_folder) / "model.pt")
    halve = lambda weights: {name: w.half() if w.dim() > 1 else w for name, w in weights.items()}
    small = {name: state[name] for name in ("format", "kind", "size", "config", "classes", "seed", "vae")}
    small["step"] = steps_made(state)
    small["ema"] = halve(state["ema"])
    if small["vae"]:
        small["vae"] = {**small["vae"], "weights": halve(small["vae"]["weights"])}
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    save_atomic(file, small)
    say(f"{show(file)}: {small['kind']} model, {os.path.getsize(file) / 1e6:.1f} MB")


# ---- objectives: forward(**batch) -> (loss, values of each clip for summary) ----------------------------------------

class Autoencoding(nn.Module):
    """Reconstruction; then (`adversarial`) the decoder against a discriminator, with the encoder frozen (App. C.1)."""

    def __init__(self, net, autocast):
        super().__init__()
        self.net, self.autocast, self.adversarial = net, autocast, False
        self.critic = autoencoder.Discriminator(net.config)

    def set_stage(self, adversarial):
        self.adversarial = adversarial
        self.net.encoder.requires_grad_(not adversarial)
        self.critic.requires_grad_(adversarial)

    def draw(self, rng, window):
        shape = self.net.config.latent_channels, -(-window // VAE.hop)
        return {"noise": rng.standard_normal(shape, dtype=np.float32)}

    def forward(self, x, noise, **_):
        with self.autocast():
            reconstruction, mean, logvar = self.net(x, noise if self.training else None)
        loss = autoencoder.reconstruction_loss(reconstruction, x)
        if self.adversarial and self.training:
            loss = loss + self.contest(reconstruction, x)
        elif self.training:
            loss = loss + autoencoder.KL_WEIGHT * autoencoder.kl(mean, logvar)
        signal, error = (y.square().flatten(1).sum(1) + 1e-6 for y in (x, reconstruction.float() - x))
        return loss, 10 * torch.log10(signal / error)

    def contest(self, reconstruction, x):
        """Both sides in one backward pass: the discriminator judges a constant, the decoder meets a frozen judge."""
        with self.autocast():
            real, fake = self.critic(x), self.critic(reconstruction.detach())
            with frozen(self.critic):
                judged = self.critic(reconstruction)
        return (autoencoder.discriminator_loss(real, fake)
                + autoencoder.ADVERSARIAL_WEIGHT * autoencoder.adversarial_loss(judged)
                + autoencoder.FEATURE_WEIGHT * autoencoder.feature_matching(real, judged))

    def summary(self, snr, labels, classes):
        return {"SNR in dB": snr.mean().item()}


class Denoising(nn.Module):
    """The v-objective of App. B.1, on latents (the VAE is frozen) or on waveforms."""

    def __init__(self, net, autocast, vae=None):
        super().__init__()
        self.net, self.autocast = net, autocast
        self.space = Checkpoint("latent" if vae else "waveform", net, vae)      # a plain object: the VAE is not trained
        self.weigh = getattr(net, "weigh", None)                                # the U-Net has one

    def draw(self, rng, window):
        n = window // self.space.hop
        drawn = {"t": np.float64(1 - rng.random()),                             # in (0, 1]
                 "noise": rng.standard_normal((self.space.channels, n), dtype=np.float32)}
        if n < self.space.window and self.space.kind == "latent":               # a U-Net has no positions
            drawn["start"] = np.int64(rng.integers(self.space.window - n + 1))
        return drawn

    def encode(self, x):
        """Audio, or latents from the cache, which are not normalised -> model space."""
        vae = self.space.vae
        if vae and x.shape[1] == vae.config.latent_channels:
            return (x - vae.latent_mean[:, None]) / vae.latent_std[:, None]
        return self.space.encode(x)

    def forward(self, x, t, noise, start=None, **_):
        net = self.net if start is None else partial(self.net, start=start)
        with self.autocast():
            loss = v_loss(net, self.encode(x), t, noise, self.weigh)
        return loss.mean(), loss

    def summary(self, loss, labels, classes):
        return {}


class Classifying(nn.Module):
    """Binary cross-entropy of each class, with structured patchout [30]."""

    def __init__(self, net, autocast):
        super().__init__()
        self.net, self.autocast = net, autocast

    def draw(self, rng, window):
        return {"patchout": np.int64(rng.integers(2**62))}

    def forward(self, x, label, patchout, **_):
        with self.autocast():
            mel = self.net.mel(resample(x.mean(1), SAMPLE_RATE, PASST_RATE))                # (B, 128, frames)
            generators = [torch.Generator().manual_seed(int(seed)) for seed in patchout]
            dropped = (mel.shape[-1] // self.net.config.stride // 4, 2) if self.training else (0, 0)
            logits = self.net(mel, generators, dropped)[0].float()
        truth = (label[:, None] == torch.arange(logits.shape[1], device=label.device)).float()     # label -1: no class
        return F.binary_cross_entropy_with_logits(logits, truth), logits

    def summary(self, logits, labels, classes):
        """Mean average precision, and that of each class of which there are clips."""
        each = {name: average_precision(logits[:, i], labels == i) for i, name in enumerate(classes) if i in labels}
        return {"mean average precision": sum(each.values()) / max(1, len(each)), **each}


def average_precision(scores, truth):
    """Mean, over the true clips, of the share of true ones among the clips that score at least as high."""
    hits = truth[scores.argsort(descending=True)].double()
    return ((hits.cumsum(0) / torch.arange(1, len(hits) + 1) * hits).sum() / hits.sum()).item()


# ---- the loop -------------------------------------------------------------------------------------------------------

def make_optimizers(objective, o):
    """AdamW (App. C.2) for all that is to be trained. With `muon`, the weight matrices of transformer blocks get Muon
    (Jordan et al., 2024) instead, whose steps here have the size of AdamW's: our small transformers learn in two thirds
    of the time."""
    wanted = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in wanted.items()
                if o.muon and "blocks" in name and name.endswith("weight") and p.dim() == 2}
    rest = [p for name, p in wanted.items() if name not in matrices]
    optimizers = [torch.optim.AdamW(rest, o.lr, betas=(0.9, o.beta2), weight_decay=0.0,
                                    fused=o.device.type in ("cpu", "cuda"))]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices.values(), o.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


class Trainer:
    """Trains an objective; the four models share every line. header: what a checkpoint holds besides the training
    state; state: the checkpoint of the run to go on with, or None."""

    def __init__(self, options, objective, clips, held_out, header, state=None):
        self.options, self.objective, self.clips, self.held_out = options, objective, clips, held_out
        self.header, self.out, self.total = header, Path(options.out), options.steps + options.finetune_steps
        self.ema = copy.deepcopy(objective.net).requires_grad_(False).eval()
        self.step, self.skipped, self.bad_in_a_row, self.waited, self.stop, self.found = 0, 0, 0, 0.0, None, {}
        if not state:
            return self.begin_stage(adversarial=False)
        self.step, self.skipped = state["step"], state["skipped"]
        self.objective.load_state_dict(state["objective"])
        self.ema.load_state_dict(state["ema"])
        self.begin_stage(state["adversarial"])
        for optimizer, known in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(known)
        self.scaler.load_state_dict(state["scaler"])

    def begin_stage(self, adversarial):
        """Freeze what this stage does not train, and make an optimizer for the rest."""
        o, objective, self.adversarial = self.options, self.objective, adversarial
        if o.model == "vae":
            objective.set_stage(adversarial)
        groups = [[p for p in part.parameters() if p.requires_grad] for part in objective.children()]
        self.groups = [group for group in groups if group]
        self.optimizers = make_optimizers(objective, o)
        self.scaler = torch.amp.GradScaler(o.device.type, init_scale=2.0**13, enabled=o.precision == "fp16")
        parallel = partial(nn.parallel.DistributedDataParallel, broadcast_buffers=False)
        self.model = parallel(objective) if WORLD > 1 else objective

    def schedule(self):
        """For each step, and each part of it, the clips that this process takes."""
        o = self.options
        for step in range(self.step, self.total):
            mine = range(step * o.batch + RANK, (step + 1) * o.batch, WORLD)
            yield from (mine[part::o.accumulate] for part in range(o.accumulate))

    def learning_rate(self):
        """Warm-up, then cosine to zero; each stage has its own."""
        o = self.options
        done, steps = (self.step - o.steps, o.finetune_steps) if self.adversarial else (self.step, o.steps)
        warmup = max(1, min(o.warmup, steps // 10))
        return o.lr * min(1, (done + 1) / warmup) * (1 + math.cos(math.pi * done / steps)) / 2

    def gradients(self, stream):
        """Gradient of the mean loss over the step's clips, all processes together. Returns that loss."""
        parts = self.options.accumulate
        self.objective.train()
        total = torch.zeros((), device=self.options.device)
        for part in range(parts):
            began = time.perf_counter()
            batch = next(stream)
            self.waited += time.perf_counter() - began
            with self.model.no_sync() if WORLD > 1 and part < parts - 1 else nullcontext():
                loss, _ = self.model(**self.on_device(batch))
                self.scaler.scale(loss / parts).backward()
            total += loss.detach() / parts
        if WORLD > 1:
            dist.all_reduce(total)
        return total.item() / WORLD

    def on_device(self, batch):
        """Times (float64, which some devices lack) and seeds stay on the CPU."""
        return {name: x.to(self.options.device) if name in ("x", "noise", "label") else x for name, x in batch.items()}

    def update(self, stream):
        """One step; returns its row of the log."""
        loss, lr = self.gradients(stream), self.learning_rate()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.stack([nn.utils.clip_grad_norm_(group, 1.0) for group in self.groups]).max().item()
        usable = math.isfinite(loss) and math.isfinite(norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if usable:                      # scaler.step would decide for each optimizer by itself
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()                # halves its scale where unscale_ met an overflow
        if usable:
            decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), list(self.objective.net.parameters()), 1 - decay)
        overflow = math.isfinite(loss) and self.scaler.get_scale() > 1     # fp16: the next scale may do; else it is 1
        self.bad_in_a_row = 0 if usable or overflow else self.bad_in_a_row + 1
        self.skipped += not usable
        if self.bad_in_a_row == 10:
            raise UserError(f"ten losses or gradients in a row were not finite, up to step {self.step}: lower --lr, or "
                            "take --precision bf16 or fp32. The last checkpoint is whole", status=1)
        self.step += 1
        return {"step": self.step, "loss": loss, "lr": lr, "gradient_norm": norm}

    def fit(self):
        """Train to the end, the time limit or a signal; save, and say how it went. True if the run is complete."""
        o, first, began = self.options, self.step, time.perf_counter()
        self.deadline = began + 60 * o.minutes if o.minutes is not None else math.inf
        stream = prefetch(self.clips, self.schedule(), o.workers)
        with stop_signals(self), open_log(self.out / "log.csv", first) as log, progress(
                total=self.total, initial=first, desc=o.model, unit="step") as bar:
            while self.step < self.total and not self.stopping():
                if self.step >= o.steps and not self.adversarial:
                    self.objective.net.load_state_dict(self.ema.state_dict())       # whose encoder is final
                    self.begin_stage(adversarial=True)
                row = self.update(stream)
                if self.step == first + 1:
                    began, self.waited = time.perf_counter(), 0.0       # the first clips had no time to be ready
                self.now_and_then(row)
                rate = (self.step - first - 1) * o.batch / (time.perf_counter() - began)
                bar.set_postfix_str(f"loss {row['loss']:.4f}, lr {row['lr']:.1e}, {rate:.2f} clips/s, "
                                    f"{rate * o.window / SAMPLE_RATE:.1f} s of audio/s", refresh=False)
                bar.update()
                log(row | {"clips_per_s": round(rate, 3)})
        stream.close()
        self.save()
        self.farewell(time.perf_counter() - began)
        return self.step == self.total

    def stopping(self):
        """Whether to end now, because of a signal or the time limit; all processes agree."""
        if time.perf_counter() > self.deadline:
            self.stop = self.stop or f"--minutes {self.options.minutes:g}"
        if WORLD > 1:
            flag = torch.tensor(float(bool(self.stop)), device=self.options.device)
            dist.all_reduce(flag)
            self.stop = self.stop or ("another process" if flag.item() else None)
        return bool(self.stop)

    def now_and_then(self, row):
        """Validation, demo and checkpoint, each every so many steps; and at the end, where fit saves."""
        o, last = self.options, self.step == self.total
        if RANK == 0 and (self.step % o.every == 0 or last):
            self.found = self.validate()
            row["validation"] = self.found["validation loss"]
            if o.model != "classifier":
                self.demo()
        if self.step % o.save_every == 0 and not last:
            self.save()

    @torch.no_grad()
    def validate(self):
        """Loss and more on held-out clips, with the averaged weights; each time the same clips, noise and times."""
        net, self.objective.net = self.objective.net, self.ema
        self.objective.eval()
        losses, reports, labels, count = [], [], [], self.options.valid_clips
        for i in range(count):
            batch = self.held_out([i])
            if "t" in batch:                            # evenly spaced times: a steadier figure
                batch["t"] = torch.full_like(batch["t"], (i + 0.5) / count)
            loss, report = self.objective(**self.on_device(batch))
            losses.append(loss.item()), reports.append(report.cpu()), labels.append(batch["label"])
        self.objective.net = net
        more = self.objective.summary(torch.cat(reports), torch.cat(labels), self.header["classes"])
        return {"validation loss": sum(losses) / count, **more}

    @torch.no_grad()
    def demo(self):
        """demos/step_N.wav, by the averaged weights: two held-out clips, each before its reconstruction (VAE), or two
        generated clips."""
        o = self.options
        with self.objective.autocast():
            if o.model == "vae":
                x = self.held_out([0, 1])["x"].to(o.device)
                audio = torch.stack([x, self.ema(x)[0]], dim=1).flatten(0, 1)
            else:
                space, generator = replace(self.objective.space, net=self.ema), torch.Generator().manual_seed(o.seed)
                x_T = torch.randn(2, space.channels, space.window, generator=generator).to(o.device)
                audio = space.decode(sample(self.ema, x_T, steps=20, generator=generator))
        path = self.out / "demos" / f"step_{self.step:07}.wav"
        path.parent.mkdir(exist_ok=True)
        sf.write(path, audio.float().clamp(-1, 1).cpu().numpy().transpose(0, 2, 1).reshape(-1, 2), SAMPLE_RATE)

    def save(self):
        o = self.options
        if RANK == 0:
            save_atomic(self.out / "model.pt", {
                **self.header, "format": 1, "kind": o.model, "size": o.size, "step": self.step, "seed": o.seed,
                "adversarial": self.adversarial, "skipped": self.skipped, "ema": self.ema.state_dict(),
                "objective": self.objective.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "scaler": self.scaler.state_dict(),
                "settings": {name: value for name, value in vars(o).items() if name not in PER_CALL}})

    def farewell(self, seconds):
        say(f"{self.options.model}: step {self.step} of {self.total} in {self.out / 'model.pt'}; waited for data "
            f"{100 * self.waited / max(seconds, 1e-9):.2f}% of {seconds:.0f} s; {self.skipped} steps skipped")
        for name, value in self.found.items():
            say(f"  {name}: {value:.4g}")
        say(f"  healthy if {HEALTHY[self.options.model]}")
        for path, why in self.clips.source.broken.items():
            say(f"  could not be read: {show(path)} ({why})")
        if self.stop:
            words = [word for word in sys.argv if word not in ("--resume", "--force")]
            say(f"stopped by {self.stop}; to go on: python {' '.join(words)} --resume")


@contextmanager
def stop_signals(trainer):
    """Within the context Ctrl-C and SIGTERM end the run after the current step; a second Ctrl-C, at once."""
    def handle(number, frame):
        trainer.stop = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def open_log(path, step):
    """The CSV log: log(row) adds a row. Rows beyond `step`, which a killed run left, are dropped."""
    columns = ["step", "loss", "lr", "gradient_norm", "clips_per_s", "validation"]
    rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    with open(os.devnull if RANK else path, "w", newline="", buffering=1) as file:
        log = csv.DictWriter(file, columns, lineterminator="\n")
        log.writeheader()
        log.writerows(row for row in rows if row["validation"] is not None and int(row["step"]) <= step)
        yield log.writerow


def standardise(vae, clips, count):
    """Set the statistics with which latents of the training set have mean 0 and variance 1."""
    encode = lambda x: vae.posterior(x.to(vae.latent_mean.device))[0]
    mean, std = moments(clips, encode if clips.source.unit == 1 else lambda latents: latents, count)
    vae.latent_mean.copy_(mean), vae.latent_std.copy_(std)


# ---- command line ---------------------------------------------------------------------------------------------------

PER_CALL = ("resume", "force", "minutes", "dry_run", "device", "workers", "out")       # not part of what a run is
DEFAULTS = {"data": None, "valid": None, "vae": None, "init": None, "accumulate": 1, "seed": 0, "device": "auto",
            "precision": None, "cache": False, "minutes": None, "resume": False, "force": False}
FIXED = ("size", "data", "valid", "seed", "batch", "lr", "cache", "vae", "init", "window")     # --resume keeps these


def clip_length(seconds):
    """A type for argparse: samples in so many seconds, a multiple of a latent frame. PaSST needs 0.15 s."""
    return round(within(0.16, 3600)(seconds) * SAMPLE_RATE / VAE.hop) * VAE.hop


def parse(argv):
    """The arguments that were given and no others: the rest comes from the run to go on with, or from the recipe."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--model", choices=NETS, default="latent")
    add("--size", choices=("tiny", "small", "paper"), help="default: small")
    count, steps = within(1, 10**9, int), within(0, 10**9, int)
    folders = {"nargs": "+", "metavar": "FOLDER", "type": os.path.realpath}
    add("--data", **folders, help="music to train on; without it, synthetic music")
    add("--valid", **folders, help="held-out music; without it, one file in twenty is held out")
    add("--out", help="folder of the run; default: runs/MODEL")
    add("--vae", metavar="FILE", help="latent: a checkpoint with a VAE; default: of the same size, that of runs/vae, "
        "else the shipped one, else one that is trained first")
    add("--init", metavar="FILE", help="begin with the weights, and the VAE, of this checkpoint")
    add("--window", type=clip_length, metavar="SECONDS", help="length of a clip; default: the recipe's")
    add("--steps", type=steps)
    add("--finetune-steps", type=steps, help="vae: steps of the second stage")
    add("--batch", type=count, help="clips in a step, all processes together")
    add("--accumulate", type=count, help="parts that a process does its clips in, to save memory")
    add("--lr", type=within(1e-9, 1))
    add("--seed", type=within(0, 2**63, int))
    add("--precision", choices=("fp32", "fp16", "bf16"), help="default: fp16 on CUDA, else fp32")
    add("--device", help="auto, cpu, cuda, mps")
    add("--workers", type=count, help="threads that prepare clips")
    add("--cache", action="store_true", help="decode (latent: encode) all music once, into the run's folder")
    add("--minutes", type=within(0, math.inf), help="save and stop after so long; --resume goes on")
    add("--save-every", type=count, metavar="STEPS")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--force", action="store_true", help="begin again in an --out that holds a run")
    add("--export", metavar="FILE", help="write the run's small checkpoint, for sampling, and end")
    add("--dry-run", action="store_true", help="print what the run would need, and end")
    return vars(parser.parse_args(argv))


def settle(given):
    """(options, checkpoint of the run to go on with or None). Options: what was given, else what the run was begun
    with, else the recipe's."""
    init, out = given.get("init"), Path(given.get("out", f"runs/{given['model']}"))
    size = given.get("size", load_state(init)["size"] if init else "small")
    file, state = out / "model.pt", None
    if given.get("resume") and file.exists():
        state = load_state(file)
        if state["kind"] != given["model"]:
            raise UserError(f"the run in {show(out)} is of --model {state['kind']}: add that, or choose another --out")
        if "settings" not in state:
            raise UserError(f"{show(file)} is an export, no run to go on with: choose another --out, and --init this")
        for name in FIXED:
            if name in given and given[name] != state["settings"][name]:
                raise UserError(f"the run in {show(out)} has another --{name}: leave it out, or choose another --out")
    elif given.get("resume"):
        say(f"no checkpoint in {show(out)} yet: beginning at step 0")
    elif file.exists() and not given.get("force"):
        raise UserError(f"{show(file)} exists: --resume goes on with it, --force begins again; or choose another --out")
    recipe = asdict(RECIPES[given["model"]][size])
    if "steps" in given:
        recipe["finetune_steps"] = given["steps"] * recipe["finetune_steps"] // recipe["steps"]
    begun_with = state["settings"] if state else {}
    workers = max(1, min(8, (os.cpu_count() or 2) // 2))
    here = {"size": size, "out": str(out), "workers": workers}
    o = argparse.Namespace(**{**DEFAULTS, **recipe, **here, **begun_with, **given})
    o.every = getattr(o, "every", max(50, min(1000, o.steps // 10)))        # steps between validations
    o.save_every = getattr(o, "save_every", o.every)
    o.device = pick_device(o.device)
    o.precision = o.precision or ("fp16" if o.device.type == "cuda" else "fp32")
    if o.batch % (o.accumulate * WORLD):
        raise UserError(f"--batch {o.batch} is no multiple of {WORLD} processes x --accumulate {o.accumulate}")
    return o, state


def survey(folders, window, store, flag):
    """{path: [frames, rate, channels]} of the files that clips of `window` samples can come from; says which are left
    out, and why. Files shorter than the window are taken, and filled up with zeros, only if there are no others."""
    facts = index(folders, store)
    seconds = {path: fact[0] / fact[1] for path, fact in facts.items() if isinstance(fact, list)}
    usable = [path for path in seconds if seconds[path] >= window / SAMPLE_RATE]
    usable = usable or [path for path in seconds if seconds[path] >= MIN_SECONDS]
    say(f"{flag}: {len(usable)} files, {sum(seconds[path] for path in usable) / 60:.1f} minutes")
    if len(usable) < len(facts):
        say(f"{len(facts) - len(usable)} of {len(facts)} files are left out:")
    for path in sorted(set(facts) - set(usable)):
        say(f"  {show(path)}: {f'too short ({seconds[path]:.2f} s)' if path in seconds else facts[path]}")
    if not usable:
        raise UserError(f"{flag} {' '.join(map(show, folders))}: no usable wav, flac, ogg or mp3 file of at least "
                        f"{MIN_SECONDS} s")
    return {path: facts[path] for path in usable}


def music(o):
    """Where clips come from, for training and for validation."""
    if not o.data:
        return Synthetic(o.seed), Synthetic(o.seed + 1)
    train = survey(o.data, o.window, Path(o.out) / "index.json", "--data")
    if o.valid:
        return Tracks(train), Tracks(survey(o.valid, o.window, Path(o.out) / "index-valid.json", "--valid"))
    if len(train) < 4:
        say("fewer than four files: validation takes other clips of the same files")
        return Tracks(train), Tracks(train)
    digest = lambda path: hashlib.sha256(show("/".join(Path(path).parts[-2:])).encode()).digest()
    held_out = sorted(train, key=digest)[:max(1, round(len(train) / 20))]
    return Tracks({p: f for p, f in train.items() if p not in held_out}), Tracks({p: train[p] for p in held_out})


def vae_for(o, given):
    """The VAE of a latent run: that of --vae (a latent model's will do), else, if of the run's size, that of runs/vae,
    else the shipped latent model's; else one trained now, None if that was interrupted."""
    places = [Path("runs") / "vae" / "model.pt", Path(__file__).parent / "checkpoints" / "latent.pt"]
    path = o.vae or next((place for place in places if place.exists() and load_state(place)["size"] == o.size), None)
    if not path:
        say(f"there is no VAE of size {o.size} yet: training one first")
        path = Path(o.out) / "vae" / "model.pt"
        same = ("data", "valid", "seed", "device", "workers", "minutes", "force")
        passed_on = {name: given[name] for name in same if name in given}
        if not train({"model": "vae", "size": o.size, "out": str(path.parent), "resume": not o.force, **passed_on}):
            return None
    found, state = load_checkpoint(path), load_state(path)
    if found.kind not in ("vae", "latent"):
        raise UserError(f"--vae {show(path)} holds a {found.kind} model; a VAE's or a latent model's is needed")
    say(f"VAE: from {show(path)}, a {found.kind} checkpoint of size {found.size}")
    if found.kind == "vae" and "settings" in state:            # an export has none
        total = state["settings"]["steps"] + state["settings"]["finetune_steps"]
        if state["step"] < total:
            say(f"  its own training is at step {state['step']} of {total} only")
    return found.vae or found.net


def dry_run(o, net_class, config):
    """Parameters, memory and work of a run, from a model without memory (the meta device)."""
    with torch.device("meta"):
        net = net_class(config)
        inputs = {"vae": lambda: (torch.empty(1, 2, o.window),),
                  "latent": lambda: (torch.empty(1, config.channels, o.window // VAE.hop), torch.empty(1)),
                  "waveform": lambda: (torch.empty(1, 2, o.window), torch.empty(1)),
                  "classifier": lambda: (torch.empty(1, 128, o.window * PASST_RATE // SAMPLE_RATE // 320),)}[o.model]()
    kept = {}

    def pack(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    no_autocast = patch("torch.autocast", lambda *_, **__: nullcontext())       # it does not know the meta device
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with no_autocast, hooks, FlopCounterMode(display=False) as counter:
        net(*inputs)
    parameters, clip_flops = sum(p.numel() for p in net.parameters()), 3 * counter.get_total_flops()
    steps, half = o.steps + o.finetune_steps, 1 if o.precision == "fp32" else 2
    say(f"{o.model}, size {o.size}: {parameters / 1e6:.1f} M parameters; clips of {o.window / SAMPLE_RATE:.2f} s")
    say(f"memory: {20 * parameters / 2**30:.1f} GiB for weights, gradients, AdamW and averaged weights, and about "
        f"{sum(kept.values()) / half / 2**30:.2f} GiB in {o.precision} for each clip that a "
        "process does at a time (--batch / --accumulate)")
    say(f"work: {clip_flops / 1e12:.2f} TFLOP a clip, {o.batch * clip_flops / 1e12:.1f} a step of {o.batch} clips, "
        f"{steps * o.batch * clip_flops / 1e18:.3g} EFLOP for {steps} steps: "
        f"{steps * o.batch * clip_flops / 1e14 / 3600:.4g} hours at 100 TFLOP/s in all")


def beginning(o):
    """The checkpoint that --init names, or None."""
    if not o.init:
        return None
    if o.vae:
        raise UserError("--vae does not go with --init, whose checkpoint brings its own VAE: leave one of them out")
    state = load_state(o.init)
    if state["kind"] != o.model:
        raise UserError(f"--init {show(o.init)} holds a {state['kind']} model; --model {o.model} needs one of its kind")
    return state


def make_objective(o, config, vae):
    """A new network of that configuration, and what it is trained to do."""
    torch.manual_seed(o.seed)
    net = NETS[o.model][0](config)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(o.precision)
    autocast = partial(torch.autocast, o.device.type, dtype, enabled=dtype is not None)
    if o.model == "vae":
        objective = Autoencoding(net, autocast)
    elif o.model == "classifier":
        objective = Classifying(net, autocast)
    else:
        objective = Denoising(net, autocast, vae)
    return objective.to(o.device)


def train(given):
    """Prepare a run, and train. True if it is complete."""
    o, state = settle(given)
    net_class, config_class, presets = NETS[o.model]
    known = state or beginning(o)               # what gives the network's configuration, the VAE and the classes
    config = config_class(**known["config"]) if known else presets[o.size]
    longest = config.frames * VAE.hop if o.model == "latent" else getattr(config, "samples", math.inf)
    o.window = o.window or longest
    if o.window > longest:
        raise UserError(f"--window is {o.window / SAMPLE_RATE:.2f} s; the model's is at most "
                        f"{longest / SAMPLE_RATE:.2f} s")
    if given.get("dry_run"):
        return dry_run(o, net_class, config)
    join_processes(o.device)
    Path(o.out).mkdir(parents=True, exist_ok=True)
    vae, classes = None, None
    if o.model == "latent":
        vae = rebuild("vae", **known["vae"]) if known else vae_for(o, given)
        if not vae:
            return False
        vae.to(o.device)
        config = replace(config, channels=vae.config.latent_channels)
    source, held_out = music(o)
    if o.model == "classifier":
        classes = known["classes"] if known else sorted(set(source.names))
        unknown = set(source.names) - set(classes)
        if unknown == set(source.names):
            raise UserError("no folder of the music has the name of one of the model's classes: rename the folders, or "
                            f"leave out --init; the classes are {', '.join(map(show, classes))}")
        if unknown:
            say(f"not among the model's classes, and trained as none of them: {', '.join(map(show, sorted(unknown)))}")
        config = replace(config, classes=len(classes))
    o.valid_clips = min(4 * len(held_out.names), 400) if classes else 16
    if o.cache and o.data:
        source = Cached(source, Path(o.out) / "cache", vae)

    objective = make_objective(o, config, vae)
    if known:
        objective.net.load_state_dict(known["ema"])
    draw = partial(objective.draw, window=o.window)
    make_clips = partial(Clips, window=o.window, draw=draw, classes=classes or [], seed=o.seed)
    clips = make_clips(source)
    if vae and not known:
        standardise(vae, clips, MEASURED)
    elif o.model == "waveform" and not known:
        net = objective.net
        net.set_spectrum(moments(clips, lambda x: net.coefficients(x.to(o.device)), MEASURED)[1])
    if o.force:
        (Path(o.out) / "model.pt").unlink(missing_ok=True)
    before = state.get("before", 0) if state else steps_made(known) if known else 0
    header = {"config": asdict(config), "classes": classes, "before": before,
              "vae": {"config": asdict(vae.config), "weights": vae.state_dict()} if vae else None}
    return Trainer(o, objective, clips, make_clips(held_out, stream=VALID, count=o.valid_clips), header, state).fit()


def main(argv=None):
    given = parse(argv)
    if "export" in given:
        export(given.get("out", f"runs/{given['model']}"), given["export"])
    else:
        train(given)


if __name__ == "__main__":
    run(main)
