"""Play scores: a folder of MIDI files, a subfolder for each family, becomes music for train.py.

    apt-get install fluidsynth musescore-general-soundfont      # or another soundfont, --font
    pip install pretty_midi                                     # only this script needs it
    python examples/render.py scores/train audio/train --seconds 80
    python examples/render.py scores/valid audio/valid --plain
    python train.py --model vae --data audio/train

FAMILY/NAME.mid becomes INSTRUMENT/NAME.VARIANT.flac, 44.1 kHz stereo. The families are piano,
harpsichord, guitar, organ and ensemble (see INSTRUMENTS). A score has no performer, so one is made
up: loudness that rises and falls, a tempo that wanders, notes that come early or late, a pedal for
the piano, a room. Without --plain the piece is also transposed and its tempo changed. All of this
is drawn from (seed, family, name, variant): the same arguments give the same files, if fluidsynth
and soundfont are the same. Files that exist are kept: an interrupted run goes on when it is started
again, and other options need another folder.

scores.tsv lists 582 public-domain pieces of the Mutopia Project: split, family, name of the MIDI
file here, composer, title, path of the source in Mutopia's archive, and sha256, the first 16 hex
digits of the MIDI file's SHA-256. The archive's git repository has no MIDI files, only sources:
LilyPond compiles them. The hashes are those of the files that LilyPond 2.24.1 (Debian 12) makes. A
MIDI file that lies next to its source, as on Mutopia's site, is taken as it is. Files with another
hash are kept and named. To collect all pieces:

    apt-get install lilypond
    git clone --depth 1 https://github.com/MutopiaProject/MutopiaProject
    python examples/render.py MutopiaProject scores --collect
"""
import csv
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sample import Parser, UserError, prepare_folder, run, within, write_atomic

SAMPLE_RATE = 44100
FONT = "/usr/share/sounds/sf3/MuseScore_General.sf3"
TABLE = Path(__file__).with_name("scores.tsv")
INSTRUMENTS = {                                 # family: {instrument: how often it is chosen}
    "piano": {"piano": 1.0},
    "harpsichord": {"harpsichord": 0.7, "piano": 0.3},
    "guitar": {"guitar": 1.0},
    "organ": {"organ": 1.0},
    "ensemble": {"strings": 0.6, "choir": 0.4},
}
PROGRAMS = {"piano": 0, "harpsichord": 6, "organ": 19, "guitar": 24, "strings": 48, "choir": 52}
LOWEST, HIGHEST = 21, 108                       # MIDI pitches of a piano's keys
SOFTEST, LOUDEST = 25, 120                      # MIDI velocities
LEVEL = 0.1                                     # RMS of a file
PEAK = 0.95                                     # a file whose peak would be higher is softer
NAMED = 20                                      # pieces left out that are named, at most


class LeftOut(Exception):
    """One piece cannot be used, and why; the others can."""


# ---- the performer: plain tuples, times in seconds -----------------------------------------------

def random_numbers(seed, family, name, variant):
    """The generator of one performance. None needs another, so their order is free."""
    text = f"{seed} {family}/{name} {variant}"
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    return np.random.default_rng(int(digest[:16], 16))


def choose_instrument(family, rng):
    chances = INSTRUMENTS[family]
    return str(rng.choice(list(chances), p=list(chances.values())))


def perform(notes, rng, plain=False, seconds=np.inf):
    """Play a score as a person might.

    notes    [(pitch, start, end)], in the order of start
    plain    keep key and tempo
    seconds  leave out what starts later

    Returns ([(velocity, pitch, start, end)], end of the piece at this tempo). Pitches are within
    LOWEST and HIGHEST, velocities within SOFTEST and LOUDEST.
    """
    # Another key and tempo: the same piece trains the model on other notes.
    key, pace = 0, 1.0
    if not plain:
        key = int(rng.integers(-3, 4))          # semitones
        pace = rng.uniform(0.85, 1.15)

    # Random walks with a knot every four seconds. Loudness ends where it began: no piece fades.
    end = notes[-1][2]
    knots = max(3, int(end / 4))
    times = np.linspace(0, end, knots)
    loudness = np.cumsum(rng.normal(0, 7, knots))
    loudness = np.clip(loudness - np.linspace(0, loudness[-1], knots), -22, 22)
    delay = np.cumsum(rng.normal(0, 0.006, knots))

    played = []
    for pitch, start, stop in notes:
        # Each note strays a little from the walk. The order of draws and decisions makes the file.
        begin = start * pace + np.interp(start, times, delay) + rng.normal(0, 0.006)
        if start * pace > seconds:
            break
        if not LOWEST <= pitch + key <= HIGHEST:
            continue
        # High notes are a little louder: melodies mostly lie on top.
        velocity = 78 + np.interp(start, times, loudness) + rng.normal(0, 6) + 0.15 * (pitch - 60)
        velocity = int(np.clip(velocity, SOFTEST, LOUDEST))
        begin = max(0.0, begin)
        length = max(0.06, (stop - start) * pace * rng.uniform(0.9, 1.02))
        played.append((velocity, pitch + key, begin, begin + length))
    return played, end * pace


def press_pedal(rng, seconds):
    """Times at which a pianist lifts the pedal and presses it again; none in four pieces of ten."""
    if rng.random() >= 0.6:
        return []
    return list(np.arange(0, seconds, rng.choice([1.0, 1.5, 2.0])))


# ---- MIDI files in and out -----------------------------------------------------------------------

def midi_library():
    try:
        import pretty_midi
    except ImportError:
        raise UserError("MIDI files need one more package: pip install pretty_midi") from None
    return pretty_midi


def read_notes(path):
    """[(pitch, start, end)] of all parts but drums, by start, then pitch; or LeftOut."""
    try:
        score = midi_library().PrettyMIDI(str(path))
    except UserError:
        raise
    except Exception as error:          # a damaged file raises whatever its parser met first
        raise LeftOut(f"no readable MIDI file ({type(error).__name__})") from None

    # Which part plays a note does not matter: one instrument will play them all.
    notes = []
    for part in score.instruments:
        if not part.is_drum:
            notes += [(note.pitch, note.start, note.end) for note in part.notes]
    if not notes:
        raise LeftOut("no notes")
    return sorted(notes, key=lambda note: (note[1], note[0]))


def write_midi(path, instrument, played, pedal):
    """played: see perform; pedal: see press_pedal."""
    pretty_midi = midi_library()
    part = pretty_midi.Instrument(PROGRAMS[instrument])
    for note in played:
        part.notes.append(pretty_midi.Note(*note))
    for second in pedal:
        part.control_changes.append(pretty_midi.ControlChange(64, 0, second))
        part.control_changes.append(pretty_midi.ControlChange(64, 127, second + 0.06))
    midi = pretty_midi.PrettyMIDI()
    midi.instruments.append(part)
    midi.write(str(path))


# ---- from a score to a file of music -------------------------------------------------------------

def synthesize(midi, wav, font, room, level):
    """fluidsynth's audio (n, 2) of a MIDI file; room and level (0 to 1) of its reverberation."""
    settings = [
        "audio.file.format=float",
        "synth.chorus.active=0",
        "synth.dynamic-sample-loading=1",
        "synth.default-soundfont=",             # a damaged --font is silent, not replaced by this
        f"synth.reverb.room-size={room:.2f}",
        f"synth.reverb.level={level:.2f}",
    ]
    command = ["fluidsynth", "-ni", "-q", "-F", str(wav), "-r", str(SAMPLE_RATE), "-g", "0.5"]
    for setting in settings:
        command += ["-o", setting]
    try:
        subprocess.run([*command, font, str(midi)], check=True, capture_output=True, timeout=600)
        audio, _ = sf.read(wav, dtype="float32", always_2d=True)
    except (subprocess.SubprocessError, sf.LibsndfileError) as error:
        raise UserError(f"fluidsynth failed: {error}", status=1) from None
    return audio


@dataclass(frozen=True)
class Piece:
    """One performance to be made: of the score `path`, as the file `target`."""
    path: Path
    variant: int
    target: Path

    def __str__(self):
        return str(self.path)


def find_pieces(scores, out, variants, seed):
    """The pieces of a folder of FAMILY/NAME.mid. UserError if that is not what it holds."""
    paths = sorted(Path(scores).glob("*/*.mid"))
    families = ", ".join(INSTRUMENTS)
    if not paths:
        raise UserError(f"{scores} has no FAMILY/NAME.mid, where FAMILY is one of {families}")
    pieces = {}
    for path in paths:
        family = path.parent.name
        if family not in INSTRUMENTS:
            raise UserError(f"{path.parent} is no known family: name it as one of {families}")
        for variant in range(variants):
            # The first number drawn chooses the instrument, so the file's place is known early.
            rng = random_numbers(seed, family, path.stem, variant)
            target = out / choose_instrument(family, rng) / f"{path.stem}.{variant}.flac"
            if target in pieces:
                raise UserError(f"{pieces[target]} and {path} would both be {target}: rename one")
            pieces[target] = Piece(path, variant, target)
    return list(pieces.values())


def render(piece, options):
    """Make the file of one piece, or raise LeftOut."""
    # The performance: all random numbers of this piece, in a fixed order.
    notes = read_notes(piece.path)
    family = piece.path.parent.name
    rng = random_numbers(options.seed, family, piece.path.stem, piece.variant)
    instrument = choose_instrument(family, rng)
    played, end = perform(notes, rng, options.plain, options.seconds)
    pedal = []
    if instrument == "piano":
        pedal = press_pedal(rng, min(options.seconds, end))
    room = rng.uniform(0.2, 0.6)
    level = rng.uniform(0.1, 0.5)
    if not played:
        raise LeftOut("no notes within --seconds and a piano's range")

    # The sound.
    with tempfile.TemporaryDirectory() as folder:
        midi = Path(folder, "played.mid")
        write_midi(midi, instrument, played, pedal)
        audio = synthesize(midi, Path(folder, "played.wav"), options.font, room, level)

    # All pieces are equally loud, as far as their peaks allow. Silence would divide by zero.
    power = np.sqrt((audio**2).mean())
    if power < 1e-6:
        raise UserError(f"{options.font} plays no sound: give another soundfont with --font")
    audio *= LEVEL / power
    peak = np.abs(audio).max()
    if peak > PEAK:
        audio *= PEAK / peak

    def write(file):
        sf.write(file, audio, SAMPLE_RATE, "PCM_16", format="FLAC")

    piece.target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(piece.target, write)


# ---- collecting the pieces of scores.tsv ---------------------------------------------------------

def read_table():
    """Rows of scores.tsv as dictionaries, by the names of its first line."""
    with open(TABLE, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def fingerprint(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def compile_source(source, folder):
    """The MIDI files that LilyPond makes of a source, in a copy of its folder below `folder`."""
    # Old notation has to be converted, that of included files too.
    copy = shutil.copytree(source.parent, Path(folder, "source"))
    files = [file.name for file in copy.iterdir() if file.suffix in (".ly", ".ily")]
    commands = ["convert-ly", "-e", *files], ["lilypond", "-s", "-dno-print-pages", source.name]
    for command in commands:
        # Either may complain of what only printing needs: what counts is a MIDI file.
        try:
            subprocess.run(command, cwd=copy, capture_output=True, timeout=600)
        except subprocess.TimeoutExpired:
            raise LeftOut("LilyPond takes more than ten minutes") from None
    return sorted(copy.glob("*.midi"), key=lambda file: (len(file.name), file.name))


def find_midi(source, folder):
    """MIDI files of a source, likeliest first: those next to it, else LilyPond's; or LeftOut."""
    # What is there already.
    ready = [source.with_suffix(suffix) for suffix in (".mid", ".midi")]
    found = [file for file in ready if file.exists()]
    if found:
        return found

    # What can be made.
    if not source.exists():
        raise LeftOut("not in the archive")
    if not shutil.which("lilypond"):
        raise LeftOut("LilyPond is needed to compile it: apt-get install lilypond")
    found = compile_source(source, folder)
    if not found:
        raise LeftOut("LilyPond made no MIDI file of it")
    return found


def collect(row, archive, out):
    """Put one piece of scores.tsv in its place, or raise LeftOut. Says whether it has the hash."""
    with tempfile.TemporaryDirectory() as folder:
        # A source with several scores has several MIDI files: the hash tells which one is meant.
        found = find_midi(archive / row["path"], folder)
        same = [file for file in found if fingerprint(file) == row["sha256"]]
        midi = (same or found)[0].read_bytes()
    target = place(row, out)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, lambda file: file.write(midi))
    return bool(same)


def place(row, out):
    """Where render.py expects the MIDI file of a row of scores.tsv."""
    return out / row["split"] / row["family"] / f"{row['name']}.mid"


def collect_all(archive, out, processes):
    """The MIDI files of all rows of scores.tsv that `archive` has and `out` has not."""
    # The git repository has its pieces in ftp/.
    if (archive / "ftp").is_dir():
        archive = archive / "ftp"
    table = read_table()
    rows = {row["path"]: row for row in table if not place(row, out).exists()}

    work = lambda path: collect(rows[path], archive, out)
    same, missing = in_parallel(work, rows, processes, "collecting")
    if len(missing) == len(table):
        raise UserError(f"no piece can be had from {archive}: {missing[table[0]['path']]}")
    for path in sorted(same):
        if not same[path]:
            print(f"  another version, its hash differs: {path}")
    print(f"{out}: {len(same)} of {len(table)} pieces are new, {len(missing)} are missing")


# ---- command line --------------------------------------------------------------------------------

def in_parallel(work, jobs, processes, label):
    """({job: work(job)}, {job: reason}), the second of jobs that raise LeftOut; they are named."""
    done, left_out = {}, {}

    def attempt(job):
        try:
            done[job] = work(job)
        except LeftOut as error:
            left_out[job] = str(error)

    # Threads will do: other programs do the work. After an error or Ctrl-C nothing more is started.
    pool = ThreadPoolExecutor(processes)
    try:
        for _ in tqdm(pool.map(attempt, jobs), label, len(jobs), unit="piece"):
            pass
    finally:
        pool.shutdown(cancel_futures=True)

    names = sorted(left_out, key=str)
    for job in names[:NAMED]:
        print(f"  left out: {job} ({left_out[job]})")
    if len(names) > NAMED:
        print(f"  and {len(names) - NAMED} more")
    return done, left_out


def parse(argv):
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("input", type=Path, help="folder of FAMILY/NAME.mid; for --collect, of Mutopia's archive")
    add("output", type=Path, help="folder for the music; for --collect, for the MIDI files")
    add("--collect", action="store_true", help="collect the MIDI files of scores.tsv instead")
    add("--variants", type=within(1, 1000, int), default=1, metavar="N",
        help="performances of each score (%(default)s)")
    add("--plain", action="store_true", help="keep each score's key and tempo")
    add("--seconds", type=within(1, 1e5), default=150.0, help="leave out what starts later (150)")
    add("--seed", type=int, default=0, help="of the performances (%(default)s)")
    add("--font", default=FONT, help="soundfont, sf2 or sf3 (%(default)s)")
    add("--processes", type=within(1, 256, int), default=2, metavar="N",
        help="pieces at a time (%(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse(argv)
    if not options.input.is_dir():
        raise UserError(f"{options.input} is no folder")
    if options.collect:
        prepare_folder(options.output, options.output)
        return collect_all(options.input, options.output, options.processes)

    # LilyPond repeats the key signature in every track. pretty_midi warns of that for each file.
    warnings.filterwarnings("ignore", module="pretty_midi")

    # What is missing is said before anything is written.
    pieces = find_pieces(options.input, options.output, options.variants, options.seed)
    midi_library()
    if not shutil.which("fluidsynth"):
        raise UserError("fluidsynth is not installed: apt-get install fluidsynth")
    if not os.path.isfile(options.font):
        raise UserError(f"--font {options.font} does not exist: give another soundfont, or "
                        "apt-get install musescore-general-soundfont")
    prepare_folder(options.output, options.output)

    # Files of an earlier run stay.
    waiting = [piece for piece in pieces if not piece.target.exists()]
    work = lambda piece: render(piece, options)
    done, left_out = in_parallel(work, waiting, options.processes, "rendering")
    if len(left_out) == len(pieces):
        raise UserError(f"no MIDI file of {options.input} can be played: give others")
    print(f"{options.output}: {len(done)} files are new, {len(pieces) - len(waiting)} were there")


if __name__ == "__main__":
    run(main)
