"""A page to look at and listen to the versions of an edit, in any browser, straight from the disk.

    python sample.py --task infill --input examples/clip.wav --num 4 --page
    python examples/page.py examples/clip.infill*.wav       # later, from the .json of each edit

page.html in this folder is the template, of figure2.py's pages too; `write_page` adds the data.
Sound is FLAC, or MP3 where a page would grow too large: every browser decodes both by itself, so a
page is one file that loads nothing else.
"""
import argparse
import base64
import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sample
from examples.spectrograms import HIGHEST, LOWEST, palette, picture, png, spectrogram
from sample import SAMPLE_RATE, Track, UserError, open_audio, to_stereo_44k

TEMPLATE = Path(__file__).with_name("page.html")
LOSSLESS = 60                           # seconds, of all versions together, that go in as FLAC
CONTEXT = 2.0                           # seconds on each side of the new audio: shown, at least
LOOP = 1.0                              # seconds on each side of the new audio: in the loop
HELP = ("Keys: space plays and pauses, {} switch versions on the spot, L loops, arrows go a second "
        "back or forth, {}.")
# What the .json of an edit says: what was edited, and where it is new; and about the version.
OF_EDIT = ["task", "input", "input2", "fade", "origin", "start", "end", "context"]
OF_VERSION = ["command", "times", "output", "seed", "variation", "sha256"]
SCALE = ("Spectrograms: 50 Hz to 16 kHz, logarithmic; 80 dB from black to white, the same for all.")


def place(frequency):
    """Of a frequency in Hz in a spectrogram: share of the height, from the top."""
    return 1 - math.log(frequency / LOWEST) / math.log(HIGHEST / LOWEST)


FREQUENCIES = [("10 kHz", place(1e4)), ("1 kHz", place(1e3)), ("100 Hz", place(1e2))]


# ---- a page --------------------------------------------------------------------------------------

def write_page(path, data, sounds):
    """Write `path`: the template with data, a dictionary for its script, and sounds in base64."""
    text = json.dumps(data).replace("<", "\\u003c")          # no file's name can end the element
    elements = [f'<script type="application/json" id="data">{text}</script>']
    for i, sound in enumerate(sounds):
        elements.append(f'<script type="text/plain" id="sound{i}">{sound}</script>')
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("<!-- data -->\n")
    page = "\n".join([head, *elements, tail])
    sample.write_atomic(path, lambda file: file.write(page.encode()))


def in_base64(audio, lossless):
    """Audio (2, n) at 44.1 kHz, within full scale, in base64: FLAC or the best VBR MP3."""
    kind = {"format": "MP3", "compression_level": 0, "bitrate_mode": "VARIABLE"}
    if lossless:
        kind = {"format": "FLAC", "subtype": "PCM_16"}
    buffer = io.BytesIO()
    sf.write(buffer, audio.T.numpy(), SAMPLE_RATE, **kind)
    return base64.b64encode(buffer.getvalue()).decode()


def outline(audio, peak, columns=1000):
    """The waveform of audio (2, n) as an SVG path in a square of 100; `peak` is the full height.

    The highest samples of each column from left to right, and the lowest from right to left.
    """
    columns = min(columns, audio.shape[-1])
    starts = np.linspace(0, audio.shape[-1], columns, endpoint=False).astype(int)
    highest = np.maximum.reduceat(audio.amax(0).numpy(), starts)
    lowest = np.minimum.reduceat(audio.amin(0).numpy(), starts)
    points = [*enumerate(highest), *reversed([*enumerate(lowest)])]
    texts = [f"{100 * x / columns:.1f},{50 - 48 / peak * y:.1f}" for x, y in points]
    return "M" + " ".join(texts) + "Z"


def player(begin, end, total, mark, wave):
    """What the template calls an item, without its versions.

    These last from second `begin` to `end` of a track of `total` seconds and differ in `mark`. wave
    is the outline of the whole track, whose sound may be added to "outside".
    """
    loop = max(begin, mark[0] - LOOP), min(end, mark[1] + LOOP)
    return {"from": begin, "to": end, "total": total, "mark": mark, "loop": loop, "wave": wave,
            "outside": []}


# ---- the page of an edit -------------------------------------------------------------------------

@dataclass
class Region:
    """Where the results of an edit are new, in samples of their files."""
    start: int
    end: int
    context: int = 0        # on each side, what the model replaced too (--splice 0); else 0


def edit_page(results, before, edit, fade):
    """Write the page of the results of a sample.Edit, files with a .json each; see write_edit_page.

    before: the Track as it was, or one of no samples. fade: seconds of the cross-fades, or 0.
    """
    context = 0
    if not fade:
        context = round(max(edit.C_L, edit.C_R) * edit.frame)
    write_edit_page(results, before, Region(edit.a, edit.end, context))


def read_samples(path, rate, begin=0, end=None):
    """Samples [begin, end) of a wav or flac file -> (2, n) at 44.1 kHz."""
    with open_audio(path) as file:
        file.seek(begin)
        count = -1 if end is None else end - begin
        samples = file.read(count, dtype="float32", always_2d=True)
    return to_stereo_44k(torch.from_numpy(samples.T.copy()), rate)


def read_versions(results, records, before, rate, begin, end):
    """[(name, where it is from, audio (2, n) at 44.1 kHz)] of each version's [begin, end)."""
    versions = []
    for result, record in zip(results, records):
        about = f"{Path(record['output']).name}, seed {record['seed']}"
        audio = read_samples(result, rate, begin, end)
        versions.append((f"Variation {record['variation'] + 1}", about, audio))
    if before.n:
        # The track may have ended before the new audio does.
        old = to_stereo_44k(before.audio[:, begin:end].float(), rate)
        old = F.pad(old, (0, audio.shape[-1] - old.shape[-1]))
        versions.insert(0, ("Before", "what stood there", old))
    return versions


def write_edit_page(results, before, region):
    """Write a page next to the results, to see, hear and choose: the first one's name, with .html.

    Versions differ near the new audio only. So the rest is in the page once, as MP3, and of each
    version the new audio, with as much of its context as LOSSLESS allows.
    """
    path = results[0].with_suffix(".html")
    with open_audio(results[0]) as file:
        rate, n = file.samplerate, file.frames
    records = [read_record(result, OF_VERSION) for result in results]

    # The excerpt of all versions, in samples of the files.
    count = len(results)
    if before.n:
        count += 1
    room = LOSSLESS * rate / count - (region.end - region.start)
    context = max(CONTEXT * rate, region.context, room / 2)
    begin = max(0, int(region.start - context))
    end = min(n, math.ceil(region.end + context))
    names, abouts, audio = zip(*read_versions(results, records, before, rate, begin, end))
    whole = audio[-1]
    if (begin, end) != (0, n):
        whole = read_samples(results[0], rate)

    # Pictures, all on the same scales.
    peak = max(float(x.abs().max()) for x in (whole, *audio)) or 1.0
    levels = [spectrogram(x.T.numpy(), SAMPLE_RATE, x.shape[-1] / SAMPLE_RATE) for x in audio]
    top = max(level.max() for level in levels)
    mark = region.start / rate, region.end / rate
    item = player(begin / rate, end / rate, n / rate, mark, outline(whole, peak))
    item["versions"] = []
    for i in range(count):
        image = base64.b64encode(png(picture(levels[i], top), palette())).decode()
        item["versions"].append({"name": names[i], "about": abouts[i], "sound": i,
                                 "wave": outline(audio[i], peak), "picture": image})

    # Sounds, within full scale.
    lossless = sum(x.shape[-1] for x in audio) <= (LOSSLESS + 1) * SAMPLE_RATE
    sounds = [in_base64(x / max(1, peak), lossless) for x in audio]
    if whole is not audio[-1]:
        item["outside"].append(len(sounds))
        sounds.append(in_base64(whole / max(1, peak), lossless=False))

    # The page, with the words that are around the pictures.
    keys = HELP.format(f"1 to {min(count, 9)}", "C chooses the version that is playing")
    data = {"kind": "edits", "id": sample.digest(sounds), "title": path.stem,
            "about": records[0]["times"], "command": records[0]["command"],
            "help": f"{keys} {SCALE}", "frequencies": FREQUENCIES, "items": [item]}
    write_page(path, data, sounds)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB")


# ---- command line: from what sample.py wrote -----------------------------------------------------

def read_record(path, keys):
    """The .json of an edit. UserError if there is none, or if it has not all of these keys."""
    file = path.with_suffix(".json")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in keys if key not in record]
    except FileNotFoundError:
        raise UserError(f"{file} is missing: give edits with the .json that sample.py wrote with "
                        "each") from None
    except (OSError, ValueError, TypeError):
        raise UserError(f"{file} is damaged, or not sample.py's: edit again") from None
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}: it is of another version of "
                        "sample.py, or not its own; edit again")
    return record


def track_before(record):
    """The Track as it was before an edit, as sample.py has it; of no samples if there was none.

    UserError if it is no longer there.
    """
    task, path, other = record["task"], record["input"], record["input2"]
    if path is None:
        return Track(torch.zeros(2, 0), SAMPLE_RATE)
    for name in filter(None, (path, other)):
        if not Path(name).is_file():
            raise UserError(f"{name}, which was edited, is not there: go to the folder in which "
                            "sample.py was called, or put it back")
        if record["sha256"].get(name) != sample.file_digest(name):
            raise UserError(f"{name} has changed since it was edited: put the old one back, or "
                            "edit again")
    if task == "transition":
        track, _, _ = sample.crossfaded(Track.read(path), Track.read(other), record["fade"])
        return track
    return sample.shifted(Track.read(path), record["origin"])


def read_edits(paths):
    """(the .json of the first, frames, rate) of files that must be versions of one edit.

    So the track is the same, and new in the same place.
    """
    first = None
    for path in paths:
        if path.suffix.lower() not in (".wav", ".flac"):
            raise UserError(f"{path} is no .wav or .flac file: give edits alone")
        record = read_record(path, OF_EDIT + OF_VERSION)
        shape = sample.probe(path)                                  # [frames, rate, channels]
        if isinstance(shape, str):
            raise UserError(f"{path} cannot be read ({shape}): edit again")
        edit = {key: record[key] for key in OF_EDIT}, shape
        if first is None:
            first, first_record = edit, record
        if edit != first:
            raise UserError(f"{path} and {paths[0]} are not versions of one edit: make a page of "
                            "each")
    return first_record, *shape[:2]


def main(argv=None):
    parser = sample.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("edits", nargs="+", type=Path, metavar="EDIT.wav",
                        help="versions of one edit, each with its .json")
    options = parser.parse_args(argv)

    record, frames, rate = read_edits(options.edits)

    # What is there must be what they were made from, and made into. (Rounding may put the end of a
    # loop's new audio on the sample after its last.)
    before = track_before(record)
    if frames < record["end"] - 1 or before.n and rate != before.rate:
        raise UserError(f"{options.edits[0]} is shorter, or of another rate, than its .json says: "
                        "edit again")
    made = options.edits[0].with_suffix(".html")
    if made.is_dir() or made.is_file() and b'id="data"' not in made.read_bytes():
        raise UserError(f"{made} is no page of edits, and would be lost: move it elsewhere")
    region = Region(record["start"], record["end"], record["context"])
    write_edit_page(options.edits, before, region)


if __name__ == "__main__":
    sample.run(main)
