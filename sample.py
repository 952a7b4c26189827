"""Edit a real track with one command: the applications of Sect. 4.3 on files of any kind or length.

    python sample.py --task continuation --input song.mp3 --start 61.5 --length 8
    python sample.py --task infill --input song.wav --start 1:01.5 --end 1:03.5 --num 4

The result is the track, edited, in its own sample rate, channels and, where the output's format has
it, word length. New are the requested region and cross-fades of 30 ms at its borders (--splice, at
most 50). All else is the input's own samples, bit for bit, except with --splice 0; of a transition,
the second track is converted to the first one's rate and channels.

Top to bottom: what all scripts share (errors, devices, audio files, checkpoints); from a context
to new audio (`generate`, `fill`); from a track to an edited track (`Edit`); the command line.
"""
import argparse
import errno
import hashlib
import io
import json
import math
import os
import re
import secrets
import shlex
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

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
from diffusion import ddpm_step, time_steps
from tasks import PASST_PRESETS, PaSST, PaSSTConfig, resample, to_resample
from vae import VAE

SAMPLE_RATE = 44100                     # Hz, of all audio inside
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
COMPRESSED = (".ogg", ".mp3")
SHIPPED = Path(__file__).resolve().parent / "checkpoints"

# The weak model of each shipped latent model is the other one: see with_weak_model.
WEAK = {"latent.pt": "scores.pt", "scores.pt": "latent.pt"}

# For each kind of model: the constructor of its network, its configuration, and the presets of
# --size.
NETS = {
    "vae": (VAE, autoencoder.VAEConfig, autoencoder.PRESETS),
    "latent": (dit.build, dit.DiTConfig, dit.PRESETS),
    "waveform": (unet1d.UNet1D, unet1d.UNetConfig, unet1d.PRESETS),
    "classifier": (PaSST, PaSSTConfig, PASST_PRESETS),
}

# Processes that torchrun started; without it, one.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


# ---- errors, and words to the user ---------------------------------------------------------------

class UserError(Exception):
    """One sentence for the user: what is wrong, and the remedy.

    Exit status 2 if the input cannot be used, 1 if the work failed.
    """

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


def run(main, need_memory="lower --batch"):
    """Call a script's main(); an error that the user can mend ends in one line, not a traceback."""
    # A caller may have closed the streams; and not every file name can be printed.
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        result = main()
        sys.stdout.flush()
        leave_processes()
        return result
    except UserError as error:
        message, status = str(error), error.status
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except BrokenPipeError:
        # The reader of stdout has closed it: write nothing more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        # Messages of CUDA and MPS, of the CPU's allocator, of cuBLAS.
        words = ("out of memory", "can't allocate", "bad_alloc", "ALLOC_FAILED")
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
            raise
        message, status = f"out of memory: {need_memory}", 1
    except OSError as error:
        place = error.filename or "a file"
        message = f"{place} cannot be read or written: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"{message}; free some space, or choose another folder"
        status = 1
    # One line, also if a file's name has several.
    print("error:", "\\n".join(message.splitlines()), file=sys.stderr)
    leave_processes(failed=True)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """A parser of flags whose errors are one sentence, as all others."""

    def error(self, message):
        raise UserError(f"{message} (all flags: --help)")


def within(low, high, kind=float):
    """A type for argparse: a number in [low, high]."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value
    return number


def seconds(text):
    """A type for argparse: "61.5" or "1:01.5" -> 61.5."""
    match = re.fullmatch(r"(?:(\d+):)?(\d+\.?\d*|\.\d+)", text)
    time = math.inf                     # which hundreds of digits are, too
    if match and not (match[1] and float(match[2]) >= 60):
        time = 60 * float(match[1] or 0) + float(match[2])
    if time == math.inf:
        raise argparse.ArgumentTypeError(
            f"{text} is no time: write seconds, 61.5, or minutes and seconds, 1:01.5")
    return time


def clock(time):
    """Seconds as m:ss.mmm."""
    time = round(time, 3)
    return f"{int(time // 60)}:{time % 60:06.3f}"


def flag_of(name):
    return "--" + name.replace("_", "-")


def refuse_idle(options, uses, mode, text):
    """UserError for a flag that was given, and so is not None, but does nothing here.

    uses    {name of an option: the modes in which it does something}
    mode    the current one, which `text` names for the user, as in "--task infill"
    """
    for name, modes in uses.items():
        if getattr(options, name) is not None and mode not in modes:
            raise UserError(f"{flag_of(name)} does nothing with {text}: leave it out")


def say(text):
    """Print a line, once for all processes, above a progress bar."""
    if RANK == 0:
        tqdm.write(text)


def progress(*args, **kwargs):
    """A progress bar with the time left; a line every half minute where stderr is a file."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(*args, **kwargs, mininterval=interval, disable=RANK > 0)


def digest(*facts):
    """8 hex digits of whatever json can hold."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


def file_digest(path):
    """16 hex digits of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def random_numbers(seed, *counters):
    """The generator of random numbers that belongs to (seed, counters).

    SeedSequence fills up with zeros, so that (s, j) and (s, j, 0) would be the same: the number of
    counters above one is made part of the key.
    """
    key = counters
    if len(counters) > 1:
        key = (*counters, len(counters))
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key])))


# ---- devices and processes -----------------------------------------------------------------------

def pick_device(name):
    """The device of a name; "auto" is CUDA, else MPS, else the CPU.

    Under torchrun each process has its own GPU.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"

    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} cannot be used: it is none of cpu, cuda and mps")

    # Try it: an allocation fails where there is no such device.
    full_name = name
    if name == "cuda":
        full_name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(full_name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first_sentence = re.split(r"\n|\. ", str(error))[0]            # it may go on for a page
        raise UserError(f"--device {name} cannot be used: {first_sentence}") from None
    return device


def join_processes(device):
    """Join the process group, if torchrun started several processes."""
    if WORLD > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))


def leave_processes(failed=False):
    """Leave the process group, if there is one.

    A thread of gloo that is still there when Python ends may abort the process, so that its exit
    status is lost. NCCL has no such thread, and after a failure it would wait for the others.
    """
    if dist.is_initialized() and (dist.get_backend() == "gloo" or not failed):
        dist.destroy_process_group()


def barrier():
    """Wait until every process is here."""
    if WORLD > 1:
        dist.barrier()


def from_one_process(make):
    """make(), called in one process; all get its result."""
    result = [make() if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(result)
    return result[0]


def gathered(value):
    """A list of what each process gives here, the same in all of them."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


# ---- audio files ---------------------------------------------------------------------------------

def open_audio(source):
    """An open SoundFile of a path or of a binary file. Names of files need not be UTF-8."""
    if isinstance(source, (str, os.PathLike)):
        source = os.fsencode(source)
    return sf.SoundFile(source)


def audio_blocks(file):
    """Blocks (n, channels) of an open SoundFile, from its start to where decoding ends.

    Not SoundFile.blocks, which repeats the last block up to the length that a cut mp3's header
    promises; and no seeking, which in ogg can land elsewhere (libsndfile 1.2).
    """
    while True:
        block = file.read(2**18, dtype="float32", always_2d=True)
        if not len(block):
            return
        yield block


def read_audio(path):
    """The whole file: (audio (channels, n) float32, rate in Hz). UserError naming it if that fails.

    Whole also where files were joined end to end, as recorders of radio do, and where an mp3 does
    not say how long it is: libsndfile alone stops early there, silently.
    """
    try:
        parts = [decode(source) for source in streams(path)]
    except (OSError, RuntimeError, UnicodeError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); "
                        "wav, flac, ogg and mp3 can be") from None
    parts = [(audio, rate) for audio, rate in parts if audio.shape[1]]
    if not parts:
        raise UserError(f"{path} holds no audio")
    first, rate = parts[0]
    if any(len(audio) != len(first) or other != rate for audio, other in parts):
        raise UserError(f"{path} is several recordings of different rates or channels, joined: "
                        "convert it to one wav file")
    if len(parts) > 1:
        first = np.concatenate([audio for audio, _ in parts], 1)
    return torch.from_numpy(first), rate


def decode(source):
    """(audio (channels, n) float32, rate) of one stream, in little more memory than the result."""
    with open_audio(source) as file:
        # The header may promise too much (a cut file: up to 2^63 - 1 frames), or too little.
        promised = min(file.frames, 2**28)
        audio = np.empty((file.channels, promised), np.float32)
        n = 0
        for block in audio_blocks(file):
            if n + len(block) > audio.shape[1]:
                more = np.empty((file.channels, audio.shape[1] // 2 + len(block)), np.float32)
                audio = np.concatenate([audio[:, :n], more], 1)
            audio[:, n:n + len(block)] = block.T
            n += len(block)
        return audio[:, :n], file.samplerate


def streams(path):
    """What a file holds, one after the other, for `decode`: the path itself if it is one stream."""
    with open(path, "rb") as file:
        start = file.read(4)
        if not start:
            raise ValueError("it is empty")
        suffix = os.path.splitext(os.fsdecode(path))[1].lower()
        if start == b"OggS":
            data = start + file.read()
            cuts = ogg_cuts(data)
            if len(cuts) > 2:
                return [io.BytesIO(data[a:b]) for a, b in zip(cuts, cuts[1:])]
        elif suffix == ".mp3":
            data = start + file.read()
            parts = mp3_parts(data)
            first_start, _, first_counted = parts[0] if parts else (0, 0, True)
            if len(parts) > 1 or first_start > 0 or not first_counted:
                return [mp3_source(data[a:b], counted) for a, b, counted in parts]
    return [path]


def ogg_cuts(data):
    """Where the chained streams of an Ogg file begin, and its end: bytes."""
    cuts = []
    position, in_headers = 0, False
    while data[position:position + 4] == b"OggS" and len(data) >= position + 27:
        begins = bool(data[position + 5] & 2)               # the page that begins a stream
        if begins and not in_headers:
            cuts.append(position)                           # streams side by side begin together
        in_headers = begins
        segments = data[position + 26]
        position += 27 + segments + sum(data[position + 27:position + 27 + segments])
    return [*cuts, len(data)]


def mp3_parts(data):
    """[(start, stop, counted)] of the mp3 files in data, bytes, with junk between them left out.

    A file begins with an ID3 tag, or with a frame that holds a Xing, Info or VBRI header.
    counted: it has such a header, which says how long it is.
    """
    parts = []
    position, open_part = 0, False
    while position + 4 <= len(data):
        tag = data[position:position + 3]
        if tag == b"ID3":
            sizes = data[position + 6:position + 10]
            size = 0
            for byte in sizes:
                size = size << 7 | byte & 127
            position += 10 + size
            open_part = False
            continue
        frame = mp3_frame(data, position)
        if not frame:
            # Junk, or the tag at the end of a file: on to the next place where two frames follow.
            position = data.find(b"\xff", position + 1)
            while position >= 0:
                frame = mp3_frame(data, position)
                if frame and mp3_frame(data, position + frame[0]):
                    break
                position = data.find(b"\xff", position + 1)
            if position < 0:
                break
        length, header_at = frame
        header = data[position + header_at:position + header_at + 4] in (b"Xing", b"Info")
        header = header or data[position + 36:position + 40] == b"VBRI"
        if header or not open_part:
            parts.append([position, position, header])
            open_part = True
        position = min(position + length, len(data))
        parts[-1][1] = position
    return parts


def mp3_frame(data, position):
    """(bytes, offset of a Xing header) of the layer III frame there, or None if there is none."""
    head = int.from_bytes(data[position:position + 4], "big")
    version, layer = head >> 19 & 3, head >> 17 & 3
    bitrate, rate, padding = head >> 12 & 15, head >> 10 & 3, head >> 9 & 1
    if head >> 21 != 0x7FF or version == 1 or layer != 1 or bitrate in (0, 15) or rate == 3:
        return None
    mono = head >> 6 & 3 == 3
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    if version == 3:
        kilobits = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[bitrate - 1]
        return 144000 * kilobits // hertz + padding, 4 + (17 if mono else 32)
    kilobits = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)[bitrate - 1]
    return 72000 * kilobits // hertz + padding, 4 + (9 if mono else 17)


def mp3_source(data, counted):
    """A file of these bytes; without a header that counts its frames, a pipe.

    libsndfile estimates the length of an mp3 that it can seek in from its first frames, and stops
    there. What comes through a pipe it decodes to the end.
    """
    if counted:
        return io.BytesIO(data)
    end, start = os.pipe()

    def feed():
        with open(start, "wb") as pipe:
            try:
                pipe.write(data)
            except BrokenPipeError:
                pass                                        # not decodable: `decode` says so
    threading.Thread(target=feed, daemon=True).start()
    return end


def to_stereo_44k(audio, rate):
    """audio (channels, n) at `rate` Hz -> (2, n') at 44.1 kHz.

    Mono goes to both sides; of many channels two remain.
    """
    if len(audio) == 1:
        audio = audio.expand(2, -1)
    return resample(audio[:2], rate, SAMPLE_RATE)


def reason(error):
    """What is wrong with a file, without its name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).rsplit(": ", 1)[-1].rstrip(".")
    vague = ("does not exist or is not a regular file", "Unspecified internal error", "Format not")
    if any(words in text for words in vague):
        return "damaged, or not audio"
    return text


def find_files(folders):
    """Paths of all audio files in the folders, at any depth, sorted.

    Links are followed, each folder once.
    """
    paths = []
    visited = set()
    for folder in map(str, folders):
        if not os.path.isdir(folder):
            paths.append(folder)                # a file, or a name that `probe` will find missing
        for root, below, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(root)
            if real in visited:
                below.clear()                   # a link back: do not go deeper
                continue
            visited.add(real)
            paths += [os.path.join(root, name) for name in names if name.lower().endswith(SUFFIXES)]
    return sorted(paths)


def probe(path):
    """[frames, rate, channels] of a file; else the reason why it cannot be used, as text."""
    try:
        if not os.path.isfile(path):            # opening a pipe would wait for ever
            return "no such file"
        if not os.path.getsize(path):
            return "it is empty"
        with open_audio(path) as file:
            frames = file.frames
            file.seek(max(frames - 2**15, 0))
            whole = len(file.read(2**15)) == min(frames, 2**15)
        if not whole:
            # The header promises more than there is: a cut ogg, for example, says 2^63 - 1 frames.
            with open_audio(path) as file:
                frames = sum(len(block) for block in audio_blocks(file))
        return [frames, file.samplerate, file.channels]
    except (OSError, RuntimeError, UnicodeError, TypeError) as error:   # TypeError: of a .raw
        return reason(error)


def probe_all(paths, flag):
    """{path: what `probe` says of it}"""
    headers = {}
    with ThreadPoolExecutor(8) as pool:
        with progress(total=len(paths), desc=flag, unit="file", leave=False) as bar:
            for path, header in zip(paths, pool.map(probe, paths)):
                headers[path] = header
                bar.update()
    return headers


def probe_new(folders, flag, index):
    """As probe_all, for the files in the folders, but an unchanged file is opened only once.

    All processes call this together and share the work. `index` is a file that remembers what was
    found: json, {path: [size, time of change, frames, rate, channels]}.
    """
    # One process looks which files there are, and which of them are as the index has them.
    known = from_one_process(lambda: read_index(index))
    stamps = from_one_process(lambda: {path: stamp(path) for path in find_files(folders)})
    headers, new = {}, []
    for path, now in stamps.items():
        if path in known and known[path][:2] == now:
            headers[path] = known[path][2:]
        else:
            new.append(path)

    # Each process opens its share of the others.
    for share in gathered(probe_all(new[RANK::WORLD], flag)):
        headers.update(share)

    # The index keeps what can be used; a file that cannot is looked at again next time.
    if RANK == 0 and new:
        for path in new:
            if isinstance(headers[path], list):
                known[path] = stamps[path] + headers[path]
        write_atomic(index, lambda file: file.write(json.dumps(known).encode()))
    return dict(sorted(headers.items()))


def read_index(path):
    """What an index holds; {} if it is not there, or damaged. What is no entry is left out."""
    try:
        index = json.loads(Path(path).read_bytes())
        entries = index.items()
    except (OSError, ValueError, AttributeError):
        return {}

    def is_entry(value):
        whole = isinstance(value, list) and [type(number) for number in value] == 5 * [int]
        return whole and min(value[2:]) > 0

    return {path: value for path, value in entries if is_entry(value)}


def stamp(path):
    """[size, time of change] of a file; [] if it is not there."""
    try:
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]
    except OSError:
        return []


def survey(folders, samples, flag, remedy="give others, or shorter --windows", index=None):
    """{path: [frames, rate, channels]} of the files that last `samples` at 44.1 kHz or longer.

    With an index, see probe_new. Says which files are left out, and why. UserError naming the flag
    if none is left.
    """
    if index:
        headers = probe_new(folders, flag, index)
    else:
        headers = probe_all(find_files(folders), flag)

    # What is long enough; and why the rest is left out.
    needed = samples / SAMPLE_RATE
    usable = {}
    total = 0.0
    for path, header in headers.items():
        if not isinstance(header, list):
            say(f"  left out: {path} ({header})")
            continue
        lasts = header[0] / header[1]
        if lasts < needed:
            say(f"  left out: {path} (too short, {lasts:.2f} s)")
            continue
        usable[path] = header
        total += lasts
    if not usable:
        raise UserError(f"{flag}: no usable file of {needed:.2f} s or more: {remedy}")
    say(f"{flag}: {len(usable)} of {len(headers)} files, {total / 60:.1f} minutes")
    return usable


# ---- checkpoints: dictionaries of primitives and tensors -----------------------------------------

@dataclass
class Checkpoint:
    """What sampling and evaluation need of a trained model; an example may make its own.

    net is model(x_t, t) -> v, with net.config: `frames` and `channels` of a latent model, `samples`
    of a waveform model, whose audio is divided by net.scale. A VAE has hop (samples in a frame),
    encoder_field (samples that a frame depends on, at each side), encode and decode.
    The model's own space: latents (B, C, frames) of the latent model, audio / scale (B, 2, samples)
    of the waveform model.
    """
    kind: str
    net: nn.Module                      # averaged weights, frozen
    vae: VAE | None = None              # of a latent model
    classes: list | None = None         # of a classifier
    step: int | None = 0                # steps trained, those before --init included; None: unknown
    size: str = ""
    path: str = ""                      # of its file
    weak: "Checkpoint | None" = None    # what sampling moves away from: see with_weak_model

    def __post_init__(self):
        config = self.net.config
        if self.kind == "latent":
            self.hop = self.vae.hop             # samples in a frame of the model's space
            self.window = config.frames         # frames in the model's window
            self.channels = config.channels
        else:
            self.hop = 1
            self.window = getattr(config, "samples", None)
            self.channels = 2

    def estimate(self, x_t, t, settings):
        """v, float32; below T_AWAY it is v + away (v - v_weak), ours: see with_weak_model.

        One time t for all clips. The gradients of terms take the difference as a constant.
        """
        half = settings.precision == "bf16"
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=half):
            v = self.net(x_t, t).float()
            if settings.away and t[0] <= T_AWAY:
                with torch.no_grad():
                    difference = v - self.weak.net(x_t, t).float()
                v = v + settings.away * difference
        return v

    def encode(self, audio):
        """Audio (B, 2, n) -> the model's space (B, C, n / hop)."""
        return self.vae.encode(audio) if self.kind == "latent" else audio / self.net.scale

    def decode(self, x):
        """The inverse: (B, C, frames) -> audio (B, 2, frames * hop)."""
        return self.vae.decode(x) if self.kind == "latent" else x * self.net.scale


class Checked:
    """A file opened for writing that keeps the first error; libsndfile and torch.save hide it.

    To seek is to write too: what waits in the buffer.
    """

    def __init__(self, file):
        self.file = file
        self.error = None

    def write(self, data):
        return self.keeping_errors(self.file.write, data)

    def seek(self, *place):
        return self.keeping_errors(self.file.seek, *place)

    def keeping_errors(self, work, *given):
        try:
            return work(*given)
        except OSError as error:
            self.error = self.error or error
            return 0

    def __getattr__(self, name):
        return getattr(self.file, name)


def write_atomic(path, write):
    """write(file) to a temporary file, which takes the place of `path` once it is on the disk.

    At any moment `path` is the old file or the new one, whole. Raises OSError with the path's name.
    """
    part = temporary_name(path)
    try:
        with open(part, "xb") as file:
            checked = Checked(file)
            try:
                write(checked)
                file.flush()
                os.fsync(file.fileno())
            finally:
                if checked.error:
                    raise checked.error
        os.replace(part, path)
    except BaseException as error:              # Ctrl-C too leaves nothing behind
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def temporary_name(path):
    """A name in the folder of `path` that no file has."""
    return Path(path).parent / f".{secrets.token_hex(8)}.part"


def prepare_folder(folder, named):
    """Make a folder for output, and see that it takes files before any work is done.

    named: it, in words for the user, as "--out runs/mine".
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe_file = temporary_name(Path(folder) / "any")
        probe_file.touch()
        probe_file.unlink()
    except OSError as error:
        raise UserError(f"{named} cannot be written: {error.strerror}; choose another") from None


def save_atomic(path, state):
    """torch.save, atomically."""
    write_atomic(path, lambda file: torch.save(state, file))


def load_state(path, kinds=tuple(NETS)):
    """The dictionary in a checkpoint of one of the kinds; else UserError.

    Tensors stay in the file until used.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        kind = state["kind"] if state["format"] == 1 else "foreign"
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check its name") from None
    except Exception as error:          # a damaged or foreign file raises whatever was met first
        raise UserError(
            f"{path} is damaged, or no checkpoint of train.py ({type(error).__name__})") from None
    if kind not in kinds:
        wanted = " or ".join(kinds)
        raise UserError(f"{path} holds a {kind} model, not a {wanted}: give another file")
    return state


def rebuild(kind, config, weights):
    """A frozen network from a checkpoint.

    Entries of its configuration that no longer exist are ignored.
    """
    make, config_class, _ = NETS[kind]
    names = {field.name for field in fields(config_class)}
    net = make(config_class(**{name: value for name, value in config.items() if name in names}))
    try:
        net.load_state_dict(weights)
    except RuntimeError:
        raise UserError(
            f"the {kind} model is of another version of this program: train it again") from None
    return net.eval().requires_grad_(False)


def load_checkpoint(path, device="cpu", kinds=tuple(NETS)):
    """Read what train.py wrote, model.pt or state.pt. UserError if the file cannot be used."""
    state = load_state(path, kinds)
    net = rebuild(state["kind"], state["config"], state["ema"]).to(device)
    vae = None
    if state["vae"]:
        vae = rebuild("vae", **state["vae"]).to(device)
    return Checkpoint(state["kind"], net, vae, state["classes"], state["step"], state["size"],
                      str(path))


def open_checkpoint(kind, path=None, device="cpu"):
    """The checkpoint in a file, or the shipped one of that kind.

    For a VAE, a latent model's file will do.
    """
    shipped = "latent" if kind == "vae" else kind
    if path is None:
        path = SHIPPED / f"{shipped}.pt"
    kinds = (kind,) if kind == shipped else (kind, shipped)
    checkpoint = load_checkpoint(path, device, kinds)
    if checkpoint.kind != kind:
        checkpoint = replace(checkpoint, kind=kind, net=checkpoint.vae, vae=None, step=None)
    return checkpoint


def open_for_sampling(o, device):
    """The model of --model and --checkpoint, with a weak one to move away from.

    The weak one is --weak's; else, for one of the two shipped latent models, the other one. There
    is none with --as-printed or --away 0, nor for other models.
    """
    alone = o.as_printed or o.away == 0
    if alone and o.weak:
        raise UserError("--weak does nothing with --as-printed or --away 0: leave one of them out")
    checkpoint = open_checkpoint(o.model, o.checkpoint, device)
    if alone:
        return checkpoint
    path = Path(checkpoint.path)
    weak = o.weak
    if not weak and path.name in WEAK and path.parent.resolve() == SHIPPED:
        weak = SHIPPED / WEAK[path.name]
    if weak:
        checkpoint = with_weak_model(checkpoint, weak, device)
    return checkpoint


def with_weak_model(checkpoint, path, device="cpu"):
    """The checkpoint with a weak model, of the file `path`: one that does the same less well.

    It may be the model that the checkpoint was trained from, or one for other music. What both do
    badly, the weak one does worse. So the difference between them points to what is better than
    either (Karras et al., 2024, "Guiding a diffusion model with a bad version of itself").
    UserError if the file has a network of another shape, or the same weights.

    The weak model takes the checkpoint's buffers, such as the spectra measured on its latents: so
    it serves for them, even if it was trained on those of another VAE.
    """
    weak = load_checkpoint(path, device, (checkpoint.kind,))
    if weak.net.config != checkpoint.net.config:
        raise UserError(f"the weak model {path} has another size than {checkpoint.path}: "
                        "give --weak one of the same size, or --away 0")
    if all(map(torch.equal, weak.net.parameters(), checkpoint.net.parameters())):
        raise UserError(f"the weak model {path} holds the same weights as {checkpoint.path}: "
                        "give --weak another, such as the one that it was trained from")
    for its, ours in zip(weak.net.buffers(), checkpoint.net.buffers()):
        its.copy_(ours)
    weak.vae = None                     # not needed: the latents are the checkpoint's
    return replace(checkpoint, weak=weak)


# ---- settings ------------------------------------------------------------------------------------

# The step size of the L1 sum, for each kind of model; its product with the steps is what matters.
XI = {"latent": 0.03, "waveform": 0.05}
XI_STEPS = 50
GUIDE_STEP = 1.0                        # step size of a guiding term, L2 or BCE
T_END = 0.28                            # below it a small model draws details at random
AWAY = 1.0                              # how far v is moved away from a weak model's
T_AWAY = 0.7                            # only below this time: at higher noise it costs the key
TRIALS = 16                             # a guide alone is fooled: see best_beginning
T_TRIALS = (0.9, 0.8, 0.66)             # the times at which they are compared
XI_AS_PRINTED = {"latent": 3e-2, "waveform": 3e-3}                      # App. C.3
AS_PRINTED = {
    "k": 0.85,                          # App. C.3
    "repeats": False,                   # ours
    "start_from": "paper",              # Table 2, x_T
    "project": "x_t",                   # Algorithms 1 and 2, the last line
    "t_end": 0.0,                       # ours
    "away": 0.0,                        # ours
    "trials": 1,                        # ours
    "equalise": False,                  # ours
    "keep_level": False,                # ours
}


@dataclass
class Settings:
    """How to sample. Departures that only some models need are off here; `of` turns them on."""
    sampler: str = "ddpm"
    steps: int = 50
    xi: float = 0.03            # guidance step size, at 50 steps
    k: float = 0.6              # regenerate, transition: share of noise in x_T
    repeats: bool = False       # continuation, infill: likewise; the rest is the context, repeated
    start_from: str = "matched"                 # below k = 1: see tasks.regenerate
    project: str = "x0_hat"     # what the data consistency step projects: see guidance.Term
    t_end: float = 0.0          # the time from which sampling ends in one step: see guidance.sample
    away: float = 0.0           # how far to move away from the weak model, if there is one
    trials: int = 1             # guided, from nothing: see best_beginning
    precision: str = "fp32"     # of the diffusion network
    equalise: bool = True       # new audio gets the spectrum of its context
    keep_level: bool = False    # xi is multiplied by the context's level; LEVEL, from nothing

    # The fields that have a flag in add_flags.
    FLAGS: ClassVar = ("xi", "k", "away", "trials", "precision", "equalise")

    @staticmethod
    def add_flags(add):
        """Flags, None if not given. add: the add_argument of a parser or a group."""
        add("--xi", type=within(0, 1e9),
            help="guidance step size at 50 steps "
                 "(default: {latent} latent, {waveform} waveform)".format(**XI))
        add("--k", type=within(0.01, 1),
            help="share of noise to start from; the rest is what stands there or, in continuation, "
                 "infill, intro, and loop without --k, the context repeated. 1: noise alone "
                 f"(default: {Settings.k}; in these, by other models than small latent ones: 1)")
        add("--away", type=within(0, 10),
            help="how far to move away from the weak model; 0: not at all, which is faster "
                 f"(default: {AWAY:g} if there is one)")
        add("--trials", type=within(1, 1000, int),
            help="guided, from nothing: unguided beginnings, of which the best is guided; fewer "
                 f"are faster (default: {TRIALS} for small models)")
        add("--precision", choices=("fp32", "bf16"),
            help=f"of the diffusion network (default: {Settings.precision})")
        add("--equalise", action=argparse.BooleanOptionalAction,
            help="give new audio the spectrum of its context (default: on)")
        add("--as-printed", action="store_true", default=None,
            help="the paper's algorithms, constants and starting point instead")

    @classmethod
    def of(cls, options, checkpoint):
        """The settings for a model.

        Options that are None take the default. UserError for one without effect.
        """
        given = {}
        for setting in fields(cls):
            value = getattr(options, setting.name, None)
            if value is not None:
                given[setting.name] = value
        if "k" in given:
            given["repeats"] = given["k"] < 1

        # Defaults that depend on the model. Large ones keep level and beat, and draw details, well.
        preset = {"xi": XI[checkpoint.kind]}
        if checkpoint.weak:
            preset["away"] = AWAY
        if checkpoint.kind == "latent" and checkpoint.size in ("tiny", "small"):
            preset |= {"keep_level": True, "t_end": T_END, "repeats": True, "trials": TRIALS}
        if options.as_printed:
            # App. C.3 has one xi whatever the number of steps; `generate` divides by them.
            steps = given.get("steps", cls.steps)
            preset = AS_PRINTED | {"xi": XI_AS_PRINTED[checkpoint.kind] * steps / XI_STEPS}
            for name in sorted(given.keys() & preset.keys()):
                flag = "--no-equalise" if given[name] is False else flag_of(name)
                raise UserError(f"{flag} is set by --as-printed: leave one of them out")
        settings = cls(**preset | given)
        if settings.away and not checkpoint.weak:
            raise UserError("--away has no weak model to move away from: give --weak too")
        return settings


# ---- levels and spectra of new audio -------------------------------------------------------------

LEVEL = 0.1                             # root mean square of music from nothing
EQUALISER_FFT = 2048                    # samples


def spectrum(audio, weight):
    """Power of left and right, and what they share: audio (B, 2, n) -> (B, 1025, 2, 2).

    Covariances at 1025 frequencies from 0 to 22050 Hz, of audio weighted by `weight` (n,). Up to a
    constant factor; smoothed by a Gaussian with a standard deviation of a sixth of an octave.
    """
    size = EQUALISER_FFT
    window = torch.hann_window(size, device=audio.device)
    frames = F.pad(audio * weight, (size, size)).unfold(-1, size, size // 2) * window
    X = torch.fft.rfft(frames)                                          # (B, 2, frames, 1025)
    covariance = torch.einsum("bitf,bjtf->bijf", X, X.conj()).real
    covariance = covariance / weight.square().sum().clamp(min=1)

    octave = torch.arange(covariance.shape[-1], device=audio.device).clamp(min=0.5).log2()
    smooth = torch.exp(-18 * (octave[:, None] - octave).square())       # 18 = 6^2 / 2
    covariance = covariance @ (smooth / smooth.sum(1, keepdim=True)).T  # (B, 2, 2, 1025)
    return covariance.permute(0, 3, 1, 2) + 1e-12 * torch.eye(2, device=audio.device)


def both_sides(covariance):
    """The power of left and right together: (B, 1025, 2, 2) -> (B, 1025)."""
    return covariance.diagonal(dim1=-2, dim2=-1).sum(-1)


def equalise(audio, weight, wanted):
    """Filter audio (B, 2, n) so that its spectrum, see above, becomes `wanted` (B, 1025, 2, 2).

    Powers change by 12 dB at most. The image, how the power is shared by left, right and both,
    becomes the wanted one: what is silent on one side stays so.
    """
    given = spectrum(audio, weight)
    gain = (both_sides(wanted) / both_sides(given)).sqrt().clamp(1 / 4, 4)      # (B, 1025)
    filters = gain[..., None, None] * image_map(given, wanted)                  # (B, 1025, 2, 2)

    # Gains between the 1025 frequencies are interpolated. Padding: the filters' tails do not wrap.
    n = audio.shape[-1]
    size = n + EQUALISER_FFT
    filters = F.interpolate(filters.flatten(2).mT, size // 2 + 1, mode="linear", align_corners=True)
    filters = filters.unflatten(1, (2, 2))                                      # (B, 2, 2, bins)
    X = torch.fft.rfft(audio, size)
    return torch.fft.irfft((filters * X[:, None]).sum(2), size)[..., :n]


def image_map(given, wanted):
    """M (..., 2, 2), symmetric, that turns a signal of covariance `given` into one of `wanted`.

    Both are scaled to a power of 1, so that M changes the image alone. It is the least change that
    does so (optimal transport): the geometric mean of given^-1 and wanted. What `given` hardly has,
    such as a side channel, is raised by 25 dB at most.
    """
    device = given.device
    given, wanted = given.cpu().double(), wanted.cpu().double()         # not all have float64
    eye = torch.eye(2, dtype=torch.float64)
    given = given / both_sides(given)[..., None, None] + 0.003 * eye
    wanted = wanted / both_sides(wanted)[..., None, None] + 1e-7 * eye
    a = torch.linalg.det(given).sqrt()[..., None, None]
    b = torch.linalg.det(wanted).sqrt()[..., None, None]
    # Their inverse, times the determinant.
    adjugate = both_sides(given)[..., None, None] * eye - given
    # The geometric mean of 2 x 2 matrices A and B, of the determinants alpha^2 and beta^2, is
    # sqrt(alpha beta / det(C)) C with C = A / alpha + B / beta. Here A = given^-1, B = wanted.
    M = adjugate / a + wanted / b
    M = M * (b / a / torch.linalg.det(M)[..., None, None]).sqrt()
    return M.float().to(device)


def no_louder(audio, original, new, loudest=1.6):
    """Audio (B, 2, n), its new part turned down where it is over 2 dB louder than the original.

    new     weights (n,), 1 in the new part; the original is measured where they are 0
    """
    made = (audio * new).square().sum((1, 2)) / new.square().sum()
    kept = (original * (1 - new)).square().sum((1, 2)) / (1 - new).square().sum()
    gain = (loudest * kept / made.clamp(min=1e-20)).clamp(max=1).sqrt()
    return torch.lerp(audio, audio * gain[:, None, None], new)


def limited(audio, reach):
    """Audio (channels, n) turned down smoothly, `reach` samples a side, around peaks above 1.

    The gain is a moving average of local minima, so it is never above what a peak allows.
    """
    # The gain that brings the highest peak within reach to 1; then, by running sums, its moving
    # average over 2 reach + 1 samples.
    peak = audio.abs().amax(0, keepdim=True)                            # (1, n)
    peak = F.max_pool1d(peak, 2 * reach + 1, 1, reach)
    gain = F.pad((1 / peak).clamp(max=1), (reach + 1, reach), mode="replicate")
    total = gain.double().cumsum(-1)
    mean = (total[:, 2 * reach + 1:] - total[:, :-2 * reach - 1]) / (2 * reach + 1)
    return audio * mean.to(audio)


# ---- the context, repeated -----------------------------------------------------------------------

SHORTEST = 0.8                          # seconds: of a repeat, and of what decides on its length
PERIOD_FFT, PERIOD_HOP = 2048, 256      # samples
PERIOD_LOWEST, PERIOD_OCTAVES = 100, 6  # Hz; and up to 6.4 kHz


def context_repeated(audio, left, right):
    """Audio (B, 2, n) with its contexts, `left` and `right` samples, repeated in the gap between.

    The left context's last period goes on, over and over. It is cross-faded into the right one's
    first period, which precedes it over and over. A context that is not long `enough` is left out;
    if both are, the gap is silent. What stood in the gap is not read.
    """
    n = audio.shape[-1]
    end = n - right
    at = torch.arange(end - left, device=audio.device)
    clips = []
    for clip in audio:
        clip = clip.clone()
        clip[:, left:end] = 0
        forwards, backwards = clip.clone(), clip.clone()
        if enough(left):
            lag = period(clip[:, :left])
            forwards[:, left:end] = clip[:, left - lag + at % lag]
        if enough(right):
            lag = period(clip[:, end:])
            backwards[:, left:end] = clip[:, end + (at - len(at)) % lag]
        if not enough(right):
            clips.append(forwards)
        elif not enough(left):
            clips.append(backwards)
        else:
            clips.append(tasks.crossfade(forwards[None], backwards[None], left, right)[0])
    return torch.stack(clips)


def enough(samples):
    """Whether a context of so many samples holds a period, and as much again to find it."""
    return samples >= 2 * round(SHORTEST * SAMPLE_RATE)


def period(audio):
    """The lag, in samples, at which audio (2, n) is most like itself: some beats, or a phrase.

    Compared are the power in sixths of an octave (which notes sound), and its rises (when they
    begin); then, to find the sample, the waveforms. At least SHORTEST, and as much of the audio
    must be left over to compare.
    """
    def best(x, lags):
        """The lag at which x (..., n) correlates most with itself."""
        match = [F.cosine_similarity(x[..., :-lag].flatten(), x[..., lag:].flatten(), dim=0)
                 for lag in lags]
        return lags[torch.stack(match).argmax().item()]

    # Log power (bands, frames), without what lasts, such as the timbre.
    size = PERIOD_FFT
    mono = to_mono(audio)[0].to("cpu", torch.float32)
    S = torch.stft(mono, size, PERIOD_HOP, window=torch.hann_window(size), return_complex=True)
    f = torch.arange(size // 2 + 1) * SAMPLE_RATE / size
    edges = PERIOD_LOWEST * 2 ** (torch.arange(6 * PERIOD_OCTAVES + 1) / 6)
    inside = ((f >= edges[:-1, None]) & (f < edges[1:, None])).float()          # (bands, bins)
    P = inside @ S.abs().square()
    P = (P + 1e-4 * P.mean() + 1e-12).log()
    P = P - P.mean(1, keepdim=True)
    rise = F.pad(P.diff(dim=1), (1, 0)).clamp(min=0)

    # In frames, then in samples.
    X = torch.cat([P / (P.std() + 1e-6), rise / (rise.std() + 1e-6)])
    least = round(SHORTEST * SAMPLE_RATE)
    first = math.ceil(least / PERIOD_HOP)
    lag = best(X, range(first, X.shape[1] - first + 1)) * PERIOD_HOP
    longest = len(mono) - least
    return best(mono, range(max(least, lag - PERIOD_HOP), min(longest, lag + PERIOD_HOP) + 1))


def start_of(checkpoint, name, audio, C_L, C_R, settings):
    """What `generate` is given for a task: (row of TABLE_2, x_bar (B, C, n / hop)).

    With its context repeated, a task of REPEATING is Regenerate. A row that starts from x_bar reads
    all of the audio (B, 2, n); the others read nothing of the gap.
    """
    hop = checkpoint.hop
    if name in REPEATING and settings.repeats and enough(max(C_L, C_R) * hop):
        audio = context_repeated(audio, C_L * hop, C_R * hop)
        name = "regenerate"
    if name in FROM_X_BAR:
        C_L, C_R = audio.shape[-1] // hop, 0
    return name, encode_context(checkpoint, audio, C_L, C_R)


# ---- from a context to new audio -----------------------------------------------------------------

# The row of Table 2 that each task takes: functions of x_bar, C_L, C_R, z, the settings, and a
# Term's fields. A new task has a line here, in FROM_X_BAR if it reads the region, and in USED for
# its flags.
TABLE_2 = {
    "continuation": lambda x_bar, C_L, C_R, z, settings, **term:
        tasks.continuation(x_bar, C_L, z, **term),
    "infill": lambda x_bar, C_L, C_R, z, settings, **term:
        tasks.infill(x_bar, C_L, C_R, z, **term),
    "regenerate": lambda x_bar, C_L, C_R, z, settings, **term:
        tasks.regenerate(x_bar, C_L, C_R, z, settings.k, settings.start_from, **term),
    "transition": lambda x_bar, C_L, C_R, z, settings, **term:
        tasks.transition(x_bar, C_L, C_R, z, settings.k, settings.start_from, **term),
}
FROM_X_BAR = ("regenerate", "transition")       # these start from what is there; others ignore it
REPEATING = ("continuation", "infill")          # these start from their context, repeated


def windows(C_L, gap, C_R, window, overlap):
    """Spans [first, last) of at most `window` positions that one after the other fill a long gap.

    C_L and C_R positions of context lie left and right of `gap` positions. One span if everything
    fits. Otherwise split the gap equally. Each window starts with at least `overlap` positions that
    are filled already, where they exist and fit; the last one holds the right context too. From
    right to left where the left context is shorter than that, and than the right one.
    """
    n = C_L + gap + C_R
    if n <= window:
        return [(0, n)]

    # From right to left: as the mirrored problem.
    if C_L < min(overlap, C_R):
        mirrored = windows(C_R, gap, C_L, window, overlap)
        return [(n - last, n - first) for first, last in mirrored]

    # Equal shares of the gap; each window ends with its share.
    overlap = min(overlap, (window - C_R) // 2)
    count = math.ceil(gap / (window - overlap - C_R))
    ends = [C_L + gap * (i + 1) // count for i in range(count - 1)] + [n]
    return [(max(0, end - window), end) for end in ends]


def generate(checkpoint, name, x_bar, C_L, C_R, settings, generator, *,
             spans=None, guides=(), callback=None):
    """x_bar (B, C, n) with new content between its first C_L and its last C_R frames.

    name        a row of TABLE_2; or another name (embedding, unconditional): only guides apply
    spans       see `windows`; default: one window for all
    guides      functions z -> Task, whose terms join in every window; a term's weight is its step
                size at 50 steps
    callback    see guidance.sample
    """
    def model(x_t, t):
        return checkpoint.estimate(x_t, t, settings)

    # A term's step is xi times its weight. A guide brings its own step, so xi is divided out of it.
    xi = settings.xi * XI_STEPS / settings.steps
    if guides and not settings.xi:
        raise ValueError("xi must be above 0 with guides: a step size of 0 turns them off")
    weights = [1.0] + [1 / settings.xi for _ in guides]

    x, n = x_bar.clone(), x_bar.shape[-1]
    lo, hi = C_L, n - C_R                                               # [lo, hi) is still empty
    for first, last in spans or [(0, n)]:
        # The window, and how many of its frames are context: given, or made in an earlier window.
        window = x[..., first:last]
        left, right = max(lo - first, 0), max(last - hi, 0)
        z = guidance.draw_noise(window, generator)

        # Its row of Table 2. L1's gradient has no level, so the context's own is the term's weight.
        row = row_for(name, left, right)
        level = 1.0
        if settings.keep_level and left + right:
            context = torch.cat([window[..., :left], window[..., window.shape[-1] - right:]], -1)
            level = context.square().mean((1, 2)).sqrt()                        # (B,)
        task = guidance.Task(z, ())
        if row:
            task = TABLE_2[row](window, left, right, z, settings,
                                weight=level, project=settings.project)
        task = tasks.combine(task, *[guide(z) for guide in guides], weights=weights)
        steps = settings.steps
        if tries_beginnings(row, settings, guides):
            task = best_beginning(model, task, settings, generator, callback)
            steps = round(steps * task.t_T)                             # as long as in the trials

        # Sample it. The result is context for the next window.
        x[..., first:last] = guidance.sample(
            model, task.x_T, task, steps=steps, sampler=settings.sampler,
            xi=xi, t_end=settings.t_end, generator=generator, callback=callback)
        if first <= lo:
            lo = last
        else:
            hi = first
    return x


def row_for(name, left, right):
    """The row of TABLE_2 for one window of a task, by its frames of context; None without any.

    A long infill begins with continuations; the window that reaches its right context is an infill.
    """
    if name in TABLE_2 and name not in REPEATING:
        return name
    if right:
        return "infill"
    if left:
        return "continuation"
    return None


def tries_beginnings(row, settings, guides):
    """Whether a window begins with trials: guided, and without a context."""
    return bool(guides) and row not in TABLE_2 and settings.trials > 1


@torch.no_grad()
def best_beginning(model, task, settings, generator, callback=None):
    """The task from the last of T_TRIALS on, from the best of unguided beginnings (ours).

    A classifier that guides a sample from noise is easily fooled: it finds its class where nobody
    hears it. It judges well what it has not guided. So settings.trials beginnings are sampled by
    DDPM without it, and compared, at each of T_TRIALS, by J_2 of Eq. 1 at x0_hat. The best quarter
    goes on, each in four ways; of the last comparison, the best one, which is then guided. For each
    clip alone. It is a particle filter that keeps the best.

    task    x_T (B, C, n), noise at time 1, is the first beginning; its terms make J_2
    """
    trials, clips = settings.trials, torch.arange(len(task.x_T), device=task.x_T.device)
    noises = [guidance.draw_noise(task.x_T, generator) for _ in range(trials - 1)]
    x_t = torch.stack([task.x_T, *noises])                                      # (trials, B, C, n)
    times = time_steps(settings.steps)
    for t, s in zip(times, times[1:]):
        x0_hat = torch.stack([guidance.guided_estimate(model, x, t, ())[0] for x in x_t])

        # Compare, in the last step that begins at or above one of T_TRIALS.
        due = [time for time in T_TRIALS if s < time - 1e-9 <= t]
        if due:
            J_2 = [guidance.objective(task.terms, x, x_0) for x, x_0 in zip(x_t, x0_hat)]
            order = torch.stack(J_2).argsort(0)                                 # (trials, B)
            if T_TRIALS[-1] in due:
                return guidance.Task(x_t[order[0], clips], task.terms, float(t))
            kept = order[torch.arange(trials) % math.ceil(trials / 4)]
            x_t, x0_hat = x_t[kept, clips], x0_hat[kept, clips]

        # Algorithm 1, without guidance.
        updated = []
        for x, x_0 in zip(x_t, x0_hat):
            updated.append(ddpm_step(x, x_0, t, s, guidance.draw_noise(x, generator)))
            if callback:
                callback(s, updated[-1])
        x_t = torch.stack(updated)


def steps_of(row, settings, spans=1, guides=()):
    """The steps that sampling takes in so many windows, those of trials included."""
    t_T = 1.0
    if row in FROM_X_BAR and settings.start_from == "matched":
        t_T = tasks.matched_time(settings.k)
    steps = spans * (len(time_steps(settings.steps, t_T, settings.t_end)) - 1)
    if tries_beginnings(row, settings, guides):
        # One of the trials makes the first steps of the sample.
        steps += (settings.trials - 1) * (len(time_steps(settings.steps, 1.0, T_TRIALS[-1])) - 2)
    return steps


def fill(checkpoint, name, audio, C_L, C_R, settings, generator, *,
         start=None, spans=None, guides=(), example=None, callback=None):
    """Audio (B, 2, n) with a new part between its first C_L and its last C_R frames.

    Encode, generate, decode, equalise. With settings.repeats (ours), a continuation or an infill
    starts from its context, repeated, if that is long enough.

    generator   one, or a list: of B for B clips, or of B for one clip, which gets B new parts
    start       what start_of makes of the audio, if that is at hand
    example     audio (B, 2, m) whose spectrum the new part gets; None with guides: no equalising
    name, spans, guides, callback: see generate
    """
    row, x_bar = start or start_of(checkpoint, name, audio, C_L, C_R, settings)
    if isinstance(generator, list):
        x_bar = x_bar.expand(len(generator), -1, -1)
    x_0 = generate(checkpoint, row, x_bar, C_L, C_R, settings, generator,
                   spans=spans, guides=guides, callback=callback)
    new = checkpoint.decode(x_0)

    # Guidance by class should be free to change the sound.
    from_x_bar = name in FROM_X_BAR
    equalised = settings.equalise and (example is not None or not guides)
    if equalised:
        a, b = C_L * checkpoint.hop, audio.shape[-1] - C_R * checkpoint.hop
        new = like_original(new, audio, a, b, from_x_bar, example)

    # Music from nothing has no context to take its level from, but perhaps an example.
    from_nothing = not (C_L or C_R or from_x_bar)
    as_the_example = equalised and example is not None
    if settings.keep_level and from_nothing and not as_the_example:
        mean_square = new.square().mean((1, 2), keepdim=True)
        new = new * LEVEL / mean_square.sqrt().clamp(min=1e-6)
    return new


def encode_context(checkpoint, audio, C_L, C_R):
    """Encode the first C_L and the last C_R frames of audio (B, 2, n): (B, C, n / hop), else zeros.

    Each side is encoded by itself, mirrored beyond its ends, so that nothing in between leaks.
    """
    hop = checkpoint.hop
    frames = audio.shape[-1] // hop
    reach = 0                                                           # frames
    if checkpoint.vae:
        reach = math.ceil(checkpoint.vae.encoder_field / hop)
    x = torch.zeros(len(audio), checkpoint.channels, frames, device=audio.device)
    for first, last in ((0, C_L), (frames - C_R, frames)):
        if first < last:
            wide = excerpt(audio, (first - reach) * hop, (last + reach) * hop,
                           first * hop, last * hop)
            x[..., first:last] = checkpoint.encode(wide)[..., reach:reach + last - first]
    return x


def like_original(audio, original, a, b, from_x_bar=False, example=None):
    """Decoded audio (B, 2, n), equalised like `original` (B, 2, n); samples a to b are new.

    The contexts get the spectrum that they have in `original`. The new part gets theirs, and is at
    most 2 dB louder than they are; with from_x_bar it gets that of what stood there. With an
    `example` (B, 2, m) it gets the example's spectrum, at the level that it would have without.
    With less than LITTLE seconds of context nothing but an example's spectrum, as loud as that, is
    applied, to all of the audio; and the limit of 2 dB to the new part.
    """
    n = original.shape[-1]
    colour = None
    if example is not None:
        colour = both_sides(spectrum(example, torch.ones_like(example[0, 0])))

    # Weights (n,) of the new part, 1 there and 0 in the contexts, with a ramp outside it.
    ramp = round(SPLICE * SAMPLE_RATE)
    at = torch.arange(n, device=original.device)
    new = (1 - torch.maximum(a - at, at - b + 1) / ramp).clamp(0, 1)
    if a + n - b < LITTLE * SAMPLE_RATE:
        if colour is not None:
            everywhere = torch.ones_like(audio[0, 0])
            audio = equalise(audio, everywhere, recoloured(spectrum(audio, everywhere), colour))
        if (new < 1).any() and not from_x_bar:
            audio = no_louder(audio, original, new)
        return audio

    # Equalise the contexts and the new part, each to its own spectrum.
    of_context = spectrum(original, 1 - new)
    wanted = spectrum(original, new) if from_x_bar else of_context
    if colour is not None:
        loudness = both_sides(wanted).sum(1) / colour.sum(1)                    # (B,)
        wanted = recoloured(wanted, colour * loudness[:, None])
    made = equalise(audio, new, wanted)
    if not from_x_bar:
        made = no_louder(made, original, new)
    return torch.lerp(equalise(audio, 1 - new, of_context), made, new)


def recoloured(covariance, colour):
    """A spectrum (B, 1025, 2, 2) with other powers, `colour` (B, 1025), and the same image."""
    return covariance * (colour / both_sides(covariance))[..., None, None]


def listen(passt, checkpoint, x, part=slice(None)):
    """A(x) of Sect. 4.3: PaSST of the decoded x (B, C, n), or of a `part` of its samples.

    Returns logits and embedding.
    """
    return passt.listen(checkpoint.decode(x)[..., part], SAMPLE_RATE)


def example_guide(checkpoint, passt, example, weight=1.0, part=slice(None)):
    """Embedder guidance towards an example (B, 2, m), or one (1, 2, m) for all clips of a batch.

    A function z -> Task for `generate`.
    """
    # y, A(x), and the row of Table 2.
    y = passt.listen(example, SAMPLE_RATE)[1]

    def embedding(x):
        return listen(passt, checkpoint, x, part)[1]

    def guide(z):
        return tasks.embedder_guidance(embedding, y.expand(len(z), -1), z, GUIDE_STEP * weight)
    return guide


def class_guide(checkpoint, classifier, labels, weight=1.0):
    """Classifier guidance towards {class: label from 0 to 1}; other classes are free.

    A function z -> Task.
    """
    # y, A(x), and the row of Table 2.
    chosen = [classifier.classes.index(name) for name in labels]
    y = torch.tensor([list(labels.values())], device=next(classifier.net.parameters()).device)

    def logits(x):
        return listen(classifier.net, checkpoint, x)[0][:, chosen]

    def guide(z):
        return tasks.classifier_guidance(logits, y.expand(len(z), -1), z, GUIDE_STEP * weight)
    return guide


# ---- excerpts and fades, in samples --------------------------------------------------------------

LITTLE = 0.25                           # seconds: too little context to take a spectrum from
SPLICE = 0.03                           # seconds of a cross-fade between old and new
LIMITER = 0.05                          # seconds that a high peak is turned down at either side


def excerpt(x, first, last, lo, hi):
    """Samples [first, last) of x (..., n). Only [lo, hi) are read; beyond, x is mirrored."""
    # The mirrored signal has the period 2 (hi - lo): up, then down.
    i = (torch.arange(first, last) - lo) % (2 * (hi - lo))
    return x[..., lo + torch.minimum(i, 2 * (hi - lo) - 1 - i)]


def resample_part(x, rate_in, rate_out, anchor, first, last, lo, hi):
    """x (channels, n) at rate_in -> its samples [first, last) at rate_out.

    Both rates have a sample at `anchor`, a sample of x, from where first and last count. Only [lo,
    hi) of x is read: see excerpt.
    """
    begin, end = to_resample(rate_in, rate_out, first, last)
    part = resample(excerpt(x, anchor + begin, anchor + end, lo, hi), rate_in, rate_out)
    before = begin * rate_out // rate_in
    return part[:, first - before:last - before]


def blend(old, new):
    """Fade from old to new (channels, n), at constant power; only signals in antiphase dip."""
    w = torch.sin(math.pi / 2 * (torch.arange(old.shape[-1]) + 0.5) / old.shape[-1]) ** 2
    rho = F.cosine_similarity(old.flatten(), new.flatten(), dim=0).clamp(min=0)
    return ((1 - w) * old + w * new) / (w**2 + (1 - w) ** 2 + 2 * rho * w * (1 - w)).sqrt()


# ---- a track, and its edit -----------------------------------------------------------------------

PCM_BITS = {"PCM_S8": 8, "PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32}


@dataclass
class Track:
    """A file's audio (channels, n), in float64 where float32 would lose something.

    origin: the sample of the file at which it begins; below 0, silence precedes the file.
    """
    audio: torch.Tensor
    rate: int
    subtype: str = "FLOAT"
    origin: int = 0

    @property
    def n(self):
        return self.audio.shape[-1]

    @property
    def seconds(self):
        return self.n / self.rate

    @classmethod
    def read(cls, path):
        """UserError naming the file if it cannot be edited."""
        audio, rate = read_audio(path)
        if len(audio) > 2:
            raise UserError(f"{path} has {len(audio)} channels; only mono and stereo can be "
                            "edited: mix it down first")
        subtype = "FLOAT"                       # what was compressed becomes floats
        if os.path.splitext(path)[1].lower() not in COMPRESSED:
            with open_audio(path) as file:
                subtype = file.subtype
                if subtype in ("PCM_32", "ALAC_32", "DOUBLE"):
                    audio = torch.from_numpy(file.read(always_2d=True).T.copy())
        if not audio.isfinite().all():
            raise UserError(f"{path} holds samples that are not finite; repair or export it again")
        return cls(audio, rate, subtype)


class Edit:
    """The region [a, b) of a track on a model's frames: C_L of context, the gap, C_R of context.

    a and b are samples of the track. Time is counted from a, which lies exactly on a frame. The
    right border is rounded up to the next frame: what is new ends at `end`, where the right context
    begins (at b, if there is none).
    """

    def __init__(self, checkpoint, track, a, b, context=None, repeats=None):
        """repeats: of a loop, its length in samples; the track goes on with its beginning."""
        self.checkpoint, self.track, self.repeats = checkpoint, track, repeats
        # The track's samples in a frame; and frames: of the gap, and whole ones on either side.
        self.frame = checkpoint.hop * track.rate / SAMPLE_RATE
        self.gap = math.ceil((b - a) / self.frame - 1e-6)
        before = int(a / self.frame)
        after = max(0, int((track.n - a) / self.frame) - self.gap)

        # At most `longest` frames of context a side; what one side lacks goes to the other.
        window = checkpoint.window
        room = max(window - self.gap, window // 2)
        longest = room
        if context:
            longest = min(int(context * SAMPLE_RATE / checkpoint.hop), window // 2)
        self.C_R = min(after, longest, room // 2)
        self.C_L = min(before, longest, room - self.C_R)
        self.C_R = min(after, longest, room - self.C_L)
        if track.n and not self.C_L + self.C_R:
            raise UserError("--input has less than one frame of context around the new part: "
                            "give a longer file, a shorter new part, or a longer --context")

        self.a, self.b, self.end = a, b, b
        if self.C_R:
            self.end = a + math.ceil(self.gap * self.frame - 1e-6)

        # The contexts' mean, a constant that some recorders add. The model works without it.
        left = track.audio[:, a - int(self.C_L * self.frame):a]
        right = track.audio[:, self.end:self.end + int(self.C_R * self.frame)]
        self.offset = torch.cat([left, right], -1).mean(-1, keepdim=True).nan_to_num()
        self.spans = windows(self.C_L, self.gap, self.C_R, window, min(longest, room // 2))

    def context(self, whole):
        """What the model may read, (1, 2, samples) at 44.1 kHz. Zeros in the gap, unless `whole`.

        Each side is resampled by itself, so that nothing of the gap leaks.
        """
        hop, C_L, gap, C_R = self.checkpoint.hop, self.C_L, self.gap, self.C_R
        if whole:
            parts = [(-C_L, gap + C_R, 0, self.track.n)]
        else:
            parts = [(-C_L, 0, 0, self.a), (gap, gap + C_R, self.b, self.track.n)]
        audio = torch.zeros(2, (C_L + gap + C_R) * hop)
        stereo = (self.track.audio - self.offset).float().expand(2, -1)
        # Frames [first, last) from a on, of which the track's samples [lo, hi) may be read.
        for first, last, lo, hi in parts:
            if first < last:
                audio[:, (C_L + first) * hop:(C_L + last) * hop] = resample_part(
                    stereo, self.track.rate, SAMPLE_RATE, self.a, first * hop, last * hop, lo, hi)
        return audio[None]

    def splice(self, decoded, fade, top=math.inf):
        """Decoded audio (2, hop * frames) laid into the track: (channels, n).

        fade    seconds of the cross-fades, outside [a, end), shorter where there is less context.
                0: none, and the contexts stand as they were decoded
        top     higher peaks are turned down, before the cross-fades (whose sum may still be higher)
        """
        audio, a, end, rate = self.track.audio, self.a, self.end, self.track.rate
        reach = round(fade * rate) if fade else self.track.n
        decoded_end = a + int((self.gap + self.C_R) * self.frame + 1e-6)
        before = min(reach, int(self.C_L * self.frame))
        after = max(0, min(reach, decoded_end - end, self.track.n - end))

        # The new part and its cross-fades, at the track's rate. A mono track takes one channel: the
        # mean of two that differ would be quieter.
        length = end - a
        new = resample_part(decoded, SAMPLE_RATE, rate, self.C_L * self.checkpoint.hop,
                            -before, length + after, 0, decoded.shape[-1])
        new = new[:len(audio)] + self.offset
        over = new.abs().max() / top
        if over > 1:
            decibels = 20 * over.log10()
            print(f"note: peaks of the new audio are turned down, by {decibels:.1f} dB at most")
            new = limited(new / top, round(LIMITER * rate)) * top

        if fade:
            fade_in = blend(audio[:, a - before:a], new[:, :before])
            fade_out = blend(new[:, before + length:], audio[:, end:end + after])
            new = torch.cat([fade_in, new[:, before:before + length], fade_out], dim=-1)
        result = torch.cat([audio[:, :a - before], new, audio[:, end + after:]], dim=-1)
        if self.repeats:
            # The end of the cross-fade lies where the loop begins again.
            over = result[:, self.repeats:end + after]
            result = torch.cat([over, result[:, over.shape[-1]:self.repeats]], dim=-1)
        return result

    def silence(self):
        """Seconds before the new part that are 60 dB or more below the highest peak before it."""
        before = self.track.audio[:, :self.a].abs().amax(0)                         # (a,)
        if not before.any():
            return 0.0
        last = torch.nonzero(before > before.max() / 1000)[-1].item()
        return (self.a - 1 - last) / self.track.rate

    def kept(self):
        """The parts of the track, left and right of the new one, that stay as they are."""
        return self.track.audio[:, :self.a], self.track.audio[:, self.end:]

    def times(self):
        """One line: where things lie, in seconds, after rounding to the model's frames."""
        rate = self.track.rate
        text = f"new audio {clock(self.a / rate)} to {clock(self.end / rate)}"
        if len(self.spans) > 1:
            text += f", in {len(self.spans)} passes"
        if self.C_L + self.C_R:
            before, after = self.C_L * self.frame / rate, self.C_R * self.frame / rate
            text += f"; context {before:.2f} s before it and {after:.2f} s after it"
        return text


def to_mono(audio):
    """(channels, n) -> (1, n): the mean of the channels; the first, where they cancel out."""
    mono = audio.mean(0, keepdim=True)
    if mono.square().mean() < audio.square().mean() / 8:
        mono = audio[:1]
    return mono


def crossfaded(one, two, fade):
    """The end of one track faded into the start of another: (Track, start and end of the fade)."""
    # The second track in the first one's channels and rate.
    other = two.audio.expand(2, -1)
    if len(one.audio) == 1:
        other = to_mono(two.audio)
    other = resample(other, two.rate, one.rate)
    if two.subtype in PCM_BITS:
        other = other.clamp(-1, 1)                  # what the resampler's filter overshoots
    fade = round(fade * one.rate)
    C_L, C_R = one.n - fade, other.shape[-1] - fade
    if fade < 1 or C_L < 1 or C_R < 1:
        raise UserError(f"--fade {fade / one.rate:g} s must be above 0 and shorter than both "
                        f"tracks, of {clock(one.seconds)} and {clock(two.seconds)}")

    # Both on one axis of time, on which they overlap by the fade.
    left, right = F.pad(one.audio, (0, C_R)), F.pad(other, (C_L, 0))
    audio = tasks.crossfade(left[None], right[None], C_L, C_R)[0]
    subtype = one.subtype if one.subtype == two.subtype else "mixed"
    return Track(audio, one.rate, subtype), C_L, C_L + fade


def shifted(track, origin):
    """A Track as it is from its sample `origin` on; below 0, after so much silence."""
    audio = F.pad(track.audio[:, max(origin, 0):], (max(-origin, 0), 0))
    return replace(track, audio=audio, origin=origin)


def repeated(stretch, fade):
    """(Track, a) of a loop: the stretch, then its beginning. From a on, `fade` samples are new.

    They lie between their two contexts: what stands before them, and the beginning.
    """
    a = stretch.n - fade
    return replace(stretch, audio=torch.cat([stretch.audio, stretch.audio[:, :a]], dim=-1)), a


def whole_frames(time, checkpoint, rate):
    """Samples at `rate` in so many seconds, rounded up to the model's frames."""
    frame = checkpoint.hop * rate / SAMPLE_RATE
    return int(math.ceil(time * rate / frame - 1e-6) * frame)


def word_length(path, track):
    """The subtype to write: the track's own if the format has it, else floats (flac: 24 bits)."""
    kind = path.suffix[1:].upper()
    if track.subtype in (*PCM_BITS, "FLOAT", "DOUBLE") and sf.check_format(kind, track.subtype):
        return track.subtype
    if kind == "FLAC":
        return "PCM_24"
    return "DOUBLE" if track.audio.dtype == torch.float64 else "FLOAT"


WAV_LIMIT = 2**32 - 2**12                       # bytes: a wav header counts no more; RF64's does


def check_format(path, track):
    """UserError if the format of path does not have the track's rate."""
    try:
        write_samples(io.BytesIO(), path, replace(track, audio=track.audio[:, :0]))
    except (RuntimeError, ValueError):
        raise UserError(f"{path}: this format has no {track.rate} Hz: choose --output .wav, "
                        "or resample the input") from None


def write_track(path, track):
    """Write a Track as wav or flac, by the ending of path, atomically."""
    write_atomic(path, lambda file: write_samples(file, path, track))


def write_samples(file, path, track):
    """Encode a Track into a binary file.

    Integers are made here: libsndfile scales floats by 2^15 - 1 on the way out and 2^15 on the way
    in.
    """
    bits = PCM_BITS.get(track.subtype, 0)
    full_scale = 2.0 ** (bits - 1)

    # The size that the header would have to count.
    kind = path.suffix[1:].upper()
    width = (bits or {"DOUBLE": 64}.get(track.subtype, 32)) // 8
    if kind == "WAV" and track.audio.numel() * width > WAV_LIMIT:
        kind = "RF64"

    # Block by block.
    channels = len(track.audio)
    with sf.SoundFile(file, "w", track.rate, channels, track.subtype, format=kind) as out:
        for block in track.audio.T.split(2**20):                                # (n, channels)
            if bits:
                block = (block.double() * full_scale).round().clamp(-full_scale, full_scale - 1)
                block = block.int() << (32 - bits)
            out.write(block.numpy())
            if getattr(file, "error", None):
                raise file.error                # the disk is full: encoding the rest is no use


# ---- command line --------------------------------------------------------------------------------

EDITS = (*TABLE_2, "loop", "intro")             # the tasks that edit a track
TASKS = ("unconditional", *EDITS, "embedding", "classifier")
GAP = 2.0                                       # seconds (Sect. 4.3): of infill and regenerate
CONTEXT = 2.4                                   # of a continuation
FADE = {"transition": 2.5, "loop": 2.0}
# Variations at a time, at most, on this kind of device; on others one. A batch keeps a GPU busy.
# On a CPU it is no faster, and the first variation would be ready last.
AT_ONCE = {"cuda": 8}

# Flags without which a task cannot run, and the tasks in which a flag does something (the others:
# in all).
NEEDED = {
    "input": EDITS,
    "input2": ("transition",),
    "reference": ("embedding",),
    "classes": ("classifier",),
}
USED = {
    "input": EDITS,
    "input2": ("transition",),
    "start": ("continuation", "infill", "regenerate", "loop"),
    "end": ("infill", "regenerate", "loop"),
    "length": ("unconditional", "continuation", "intro", "embedding", "classifier"),
    "context": EDITS,
    "fade": ("transition", "loop"),
    "k": EDITS,
    "xi": EDITS,
    "splice": EDITS,
    "trials": ("unconditional", "embedding", "classifier"),
}


def pairs(text):
    """A type for argparse: "drums=1,voice=0" -> {"drums": 1.0, "voice": 0.0}."""
    numbers = {}
    items = text.split(",")
    try:
        for item in items:
            name, value = item.split("=")
            numbers[name.strip()] = within(-1e9, 1e9)(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not of the form name=1,other=0") from None
    if len(numbers) < len(items):
        raise argparse.ArgumentTypeError(f"{text} has a name twice")
    return numbers


def parse(argv, add_flags=Settings.add_flags):
    """The options. None is "not given": the default is then in Settings, `region` or `main`."""
    parser = Parser(description=__doc__.split("\n")[0])
    length = within(0.01, 1e6, seconds)

    add = parser.add_argument_group("what to make").add_argument
    add("--task", choices=TASKS, required=True,
        help="embedding: by example; classifier: by class")
    add("--input", help="the track to edit: wav, flac, ogg, mp3; any rate, mono or stereo")
    add("--input2", help="transition: the track to go over to")
    add("--reference", help="audio to approach in style: embedder guidance, for any task")
    add("--classes", type=pairs,
        help="name=1,other=0, wanted and unwanted: classifier guidance, for any task")
    add("--weights", type=pairs,
        help="embedding=2,classifier=0.5: strength of either guidance (default: 1)")
    add("--num", type=within(1, 1000, int), default=1, help="variations (default: %(default)s)")
    add("--seed", type=within(0, 2**63, int), default=0,
        help="another seed makes other music (default: %(default)s)")

    add = parser.add_argument_group("where, in seconds or m:ss").add_argument
    add("--start", type=seconds,
        help="where the new audio begins (default: the end in continuation, else the middle); "
             "loop: where the stretch begins (default: 0)")
    add("--end", type=seconds,
        help=f"infill, regenerate: where it ends (default: {GAP:g} s later); "
             "loop: where the stretch ends (default: the end)")
    add("--length", type=length,
        help="continuation, intro, or without --input: how much to make "
             "(default: what the window holds; intro: half of it)")
    add("--context", type=length,
        help="context on each side, half a window at most "
             f"(default: {CONTEXT} in continuation, else what the window holds)")
    add("--fade", type=length,
        help="transition: length of the cross-fade; loop: how much of its end is new "
             "(default: {transition}; {loop})".format(**FADE))
    add("--splice", type=within(0, 50), metavar="MS",
        help="cross-fade at the borders, in ms; 0: the model's output as it is "
             f"(default: {1000 * SPLICE:g})")

    add = parser.add_argument_group("how").add_argument
    add("--model", choices=tuple(XI), default="latent",
        help="one of the two kinds (default: %(default)s)")
    add("--checkpoint", help="its file, such as one that you trained (default: the shipped one)")
    add("--weak",
        help="a weaker model of the same size to move away from, such as the one that it was "
             "trained from (default: for the two shipped latent models, the other one)")
    add("--classifier",
        help="a classifier for --reference and --classes (default: the shipped one)")
    add("--sampler", choices=("ddpm", "ddim"),
        help=f"Algorithm 1 or 2 (default: {Settings.sampler})")
    add("--steps", type=within(1, 100000, int), help="sampling steps from t_T to 0; small latent "
        f"models end earlier, and so take fewer (default: {Settings.steps})")
    add_flags(add)
    add("--device", default="auto",
        help="cpu, cuda or mps; auto is cuda, else mps, else cpu (default: %(default)s)")

    add = parser.add_argument_group("output").add_argument
    add("--output", help="wav or flac (default: .TASK.wav, in the folder of the input)")
    add("--subtype", choices=("PCM_16", "PCM_24", "FLOAT"),
        help="word length (default: the input's; FLOAT if it was compressed)")
    add("--page", action="store_true",
        help="also write a page to see, hear and choose, with the ending .html")
    add("--force", action="store_true", help="overwrite")
    return parser.parse_args(argv)


def check(o):
    """UserError for flags that are missing, or would do nothing."""
    # Files, and flags that the task needs. (A variable of the shell that is not set is empty.)
    for name in ("input", "input2", "reference", "output", "checkpoint", "weak", "classifier"):
        if getattr(o, name) == "":
            raise UserError(f"{flag_of(name)} is empty: give a file, or leave it out")
    for path in (o.input, o.input2, o.reference):
        if path and not Path(path).is_file():
            raise UserError(f"{path} is no file: check its name")
    for name, takers in NEEDED.items():
        if o.task in takers and not getattr(o, name):
            raise UserError(f"{flag_of(name)} is missing: --task {o.task} needs it")
    refuse_idle(o, USED, o.task, f"--task {o.task}")

    # Flags that need each other.
    guided = {"embedding": o.reference, "classifier": o.classes}
    if o.classifier and not (o.reference or o.classes):
        raise UserError("--classifier does nothing without --reference or --classes: leave it out")
    for name, weight in (o.weights or {}).items():
        if not guided.get(name):
            raise UserError(f"--weights {name} does nothing: "
                            "embedding is for --reference, classifier for --classes")
        if weight <= 0:
            raise UserError(f"--weights {name}={weight:g} must be above 0: without that guidance, "
                            "leave its flag out")
    if o.trials and not (o.reference or o.classes):
        raise UserError("--trials does nothing without --reference or --classes: leave it out")
    if o.xi == 0 and (o.reference or o.classes):
        raise UserError("--xi 0 turns off all guidance: leave it out, or --reference and --classes")
    if o.equalise is not None and not o.reference and (o.task not in EDITS or o.classes):
        raise UserError("--equalise does nothing without a context or a --reference, "
                        "or with --classes: leave it out")


def region(o, checkpoint):
    """The arguments of an Edit, but the checkpoint, by name.

    From the task's flags, or the paper's choices (Sect. 4.3).
    """
    window = checkpoint.window * checkpoint.hop / SAMPLE_RATE
    if o.task not in EDITS:
        nothing = Track(torch.zeros(2, 0), SAMPLE_RATE, "PCM_16")
        return {"track": nothing, "a": 0, "b": round((o.length or window) * SAMPLE_RATE)}

    track = Track.read(o.input)
    if o.task == "transition":
        faded, a, b = crossfaded(track, Track.read(o.input2), o.fade or FADE["transition"])
        return {"track": faded, "a": a, "b": b, "context": o.context}
    if o.task == "intro":
        n = whole_frames(o.length or window / 2, checkpoint, track.rate)
        return {"track": shifted(track, -n), "a": 0, "b": n, "context": o.context}

    rate = track.rate
    lasts = f"{o.input} lasts {clock(track.seconds)}"
    if o.task == "loop":
        a = round((o.start or 0) * rate)
        b = track.n
        if o.end is not None:
            b = round(o.end * rate)
        fade = whole_frames(o.fade or FADE["loop"], checkpoint, rate)
        if not 0 <= a < b <= track.n or b - a < fade + LITTLE * rate:
            raise UserError(f"{lasts}: the stretch from --start to --end must be a part of it, "
                            f"and longer than --fade by {LITTLE} s")
        stretch = shifted(replace(track, audio=track.audio[:, :b]), a)
        track, new = repeated(stretch, fade)
        return {"track": track, "a": new, "b": stretch.n, "context": o.context,
                "repeats": stretch.n}
    if o.task == "continuation":
        a = track.n if o.start is None else round(o.start * rate)
        if not 0 < a <= track.n:
            raise UserError(f"--start {clock(o.start)} leaves nothing to continue: {lasts}")
        context = o.context or CONTEXT
        length = o.length or window - min(context, window / 2, a / rate)
        return {"track": replace(track, audio=track.audio[:, :a]), "a": a,
                "b": a + round(length * rate), "context": context}

    # Infill and regenerate: in the middle, where no time is given.
    start = o.start
    if start is None and o.end is None:
        start = max(0, (track.seconds - GAP) / 2)
    elif start is None:
        start = max(0, o.end - GAP)
    a = round(start * rate)
    if o.end is None:
        b = min(track.n, round((start + GAP) * rate))
    else:
        b = round(o.end * rate)
    if not 0 <= a < b <= track.n or b - a == track.n:
        raise UserError(f"{lasts}: --start {clock(a / rate)} to --end {clock(b / rate)} "
                        "must be a part of it")
    return {"track": track, "a": a, "b": b, "context": o.context}


def row_of(o):
    """The row of TABLE_2 that --task names.

    A loop and an intro are infills whose contexts stand in another place. With --k a loop starts
    from what stood there; where an intro comes, there was nothing.
    """
    if o.task == "loop" and o.k not in (None, 1):
        return "regenerate"
    if o.task in ("loop", "intro"):
        return "infill"
    return o.task


def make_guides(o, checkpoint, classifier, device):
    """(functions z -> Task, for --reference and --classes; the reference (1, 2, n) or None)."""
    weights = o.weights or {}
    guides, example = [], None
    if o.reference:
        example = to_stereo_44k(*read_audio(o.reference))[None].to(device)
        if not (example.any() and example.isfinite().all()):
            raise UserError(f"--reference {o.reference} is silent, or holds samples that are not "
                            "finite: give another")
        weight = weights.get("embedding", 1.0)
        guides.append(example_guide(checkpoint, classifier.net, example, weight))
    if o.classes:
        for name, label in o.classes.items():
            if name not in classifier.classes or not 0 <= label <= 1:
                names = ", ".join(classifier.classes)
                raise UserError(f"--classes {name}={label:g}: give labels from 0 to 1 to {names}")
        weight = weights.get("classifier", 1.0)
        guides.append(class_guide(checkpoint, classifier, o.classes, weight))
    return guides, example


def output_paths(o):
    """One path for each variation; checked before any work is done."""
    source = o.input or o.reference
    if o.output:
        first = Path(o.output)
    elif source:
        first = Path(source).with_suffix(f".{o.task}.wav")
    else:
        first = Path(f"{o.task}.wav")
    endings = (".wav",) if o.subtype == "FLOAT" else (".wav", ".flac")
    if first.suffix.lower() not in endings:
        raise UserError(f"--output {first} must end in {' or in '.join(endings)}")

    paths = [first]
    for i in range(1, o.num):
        paths.append(first.with_name(f"{first.stem}-{i + 1}{first.suffix}"))
    written = paths + [path.with_suffix(".json") for path in paths]
    if o.page:
        written.append(first.with_suffix(".html"))
    try:
        refuse_loss(o, written)
    except OSError as error:                    # a name that is too long
        raise UserError(f"--output {first} cannot be written: {error.strerror}") from None
    prepare_folder(first.parent, f"--output {first}")
    return paths


def refuse_loss(o, written):
    """UserError for a file that is to be written and is read, or, without --force, exists."""
    for path in written:
        for source in (o.input, o.input2, o.reference, o.checkpoint, o.weak, o.classifier):
            if source and path.exists() and path.samefile(source):
                raise UserError(f"{path} is also what is read: choose another --output")
        if path.is_dir():
            raise UserError(f"{path} is a folder: choose another --output")
        if os.path.lexists(path) and not o.force:           # also a link to what is away
            raise UserError(f"{path} exists; choose another --output, or use --force")


def as_many_as_fit(make, items, at_once):
    """One result for each item, by make(items) -> results: at_once, or fewer if memory is short."""
    done = 0
    while done < len(items):
        try:
            results = make(items[done:done + at_once])
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            at_once //= 2
            continue
        yield from results
        done += len(results)


def format_of_result(o, path, edit):
    """(subtype, highest peak of new audio): below full scale, or below the track's own peaks."""
    subtype = o.subtype or word_length(path, edit.track)
    check_format(path, replace(edit.track, subtype=subtype))
    top = max([1.0] + [part.abs().max().item() for part in edit.kept() if part.numel()])
    if subtype in PCM_BITS and top > 1:
        whose = f"{o.input} or {o.input2}" if o.input2 else o.input
        raise UserError(f"{whose} has peaks above full scale, which {subtype} cuts off: "
                        "take .wav, --subtype FLOAT")
    return subtype, top


def facts(o, checkpoint, classifier, settings, edit, fade):
    """What all variations of an edit share, for their .json: examples/page.py reads it."""
    sources = [o.input, o.input2, o.reference, checkpoint.path]
    if checkpoint.weak:
        sources.append(checkpoint.weak.path)
    if classifier:
        sources.append(classifier.path)
    return {
        "task": o.task, "input": o.input, "input2": o.input2,
        "fade": (o.fade or FADE[o.task]) if o.task in FADE else None,
        "origin": edit.track.origin,                    # see Track
        "start": edit.a, "end": edit.end,               # samples of the result
        "context": 0 if fade else round(max(edit.C_L, edit.C_R) * edit.frame),
        "settings": asdict(settings),
        "sha256": {path: file_digest(path) for path in sources if path},
        "times": edit.times(),
        "versions": {"torch": torch.__version__, "checkpoint step": checkpoint.step},
    }


def main(argv=None, add_flags=Settings.add_flags, open_model=None):
    """Run the command. add_flags and open_model let examples/ bring another model."""
    # Refuse what cannot be done before any work begins.
    o = parse(argv, add_flags)
    check(o)
    paths = output_paths(o)
    device = pick_device(o.device)

    # The model, and the region of the track on its frames.
    if open_model:
        checkpoint = open_model(o, device)
    else:
        checkpoint = open_for_sampling(o, device)
    trained = "" if checkpoint.step is None else f", trained for {checkpoint.step} steps"
    away = f", away from {Path(checkpoint.weak.path).name}" if checkpoint.weak else ""
    print(f"model: {checkpoint.path}{trained}{away}")
    settings = Settings.of(o, checkpoint)
    edit = Edit(checkpoint, **region(o, checkpoint))
    print(edit.times())
    if o.task == "continuation":
        silence = edit.silence()
        if silence > LITTLE:
            sound = clock(edit.a / edit.track.rate - silence)
            print(f"note: the last {silence:.2f} s are silent, and silence may go on: "
                  f"--start {sound} continues the sound")

    # Guidance by example and by class.
    classifier = None
    if o.reference or o.classes:
        classifier = open_checkpoint("classifier", o.classifier, device)
    guides, example = make_guides(o, checkpoint, classifier, device)

    # What is written: the result's format, and what the .json of each variation says.
    fade = SPLICE if o.splice is None else o.splice / 1000
    rate = edit.track.rate
    subtype, top = format_of_result(o, paths[0], edit)
    words = ["python", *sys.argv] if argv is None else ["python", "sample.py", *argv]
    record = {"command": shlex.join(words)}
    record |= facts(o, checkpoint, classifier, settings, edit, fade)

    # What all variations begin with. A variation has random numbers of its own: whatever else is
    # made, it is the same, up to rounding where several are made at a time.
    row = row_of(o)
    context = edit.context(whole=row in FROM_X_BAR).to(device)
    if o.task in EDITS and not context.any():
        print("note: all of the context is silent, and so the new part will be: choose another "
              "place, or a longer --context")
    start = start_of(checkpoint, row, context, edit.C_L, edit.C_R, settings)
    seeds = [int(random_numbers(o.seed, i).integers(2**63)) for i in range(o.num)]
    started, _ = start
    steps = steps_of(started, settings, len(edit.spans), guides)
    if row in REPEATING and settings.repeats and started == row:
        print(f"note: a context of less than {2 * SHORTEST:g} s is not repeated: the new part "
              "starts from noise alone; more music around it, or a longer --context, helps")

    def make(seeds):
        """The model's audio (B, 2, n), a clip for each seed."""
        with progress(total=steps, unit="step") as bar:
            return fill(checkpoint, row, context, edit.C_L, edit.C_R, settings,
                        [torch.Generator().manual_seed(seed) for seed in seeds],
                        start=start, guides=guides, example=example, spans=edit.spans,
                        callback=lambda s, x_s: bar.update())

    for i, audio in enumerate(as_many_as_fit(make, seeds, AT_ONCE.get(device.type, 1))):
        if not audio.isfinite().all():
            raise UserError(f"{checkpoint.path} made samples that are not finite: "
                            "take other settings, or another model", 1)
        # Another run may have written there meanwhile.
        path = paths[i]
        refuse_loss(o, [path, path.with_suffix(".json")])
        result = Track(edit.splice(audio.cpu(), fade, top), rate, subtype)
        write_track(path, result)
        text = json.dumps(record | {"variation": i, "seed": o.seed, "output": str(path)}, indent=1)
        write_atomic(path.with_suffix(".json"), lambda file: file.write(text.encode()))
        print(f"wrote {path}: {clock(result.seconds)} at {rate} Hz, {subtype}")

    # A page to compare them.
    if o.page:
        from examples import page               # here, since it imports this module
        refuse_loss(o, [paths[0].with_suffix(".html")])
        before = Track.read(o.input) if o.task == "continuation" else edit.track
        page.edit_page(paths, before, edit, fade)


if __name__ == "__main__":
    run(main, "choose a shorter --length or --context, or --device cpu")
