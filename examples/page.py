"""A page to look at and listen to the versions of an edit, in any browser, straight from the disk.

    python sample.py --task infill --input examples/clip.wav --num 4 --page

page.html, beside this file, is its template, and that of figure2.py; `write_page` puts in what is seen and heard.
Sound is FLAC, or MP3 where a page would grow too large: every browser decodes both by itself, so a page is one file
that loads nothing else.
"""
import base64
import io
import json
import math
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
import torch.nn.functional as F

from examples.spectrograms import HIGHEST, LOWEST, palette, picture, png, spectrogram
from sample import SAMPLE_RATE, digest, to_stereo_44k, write_atomic

TEMPLATE = Path(__file__).with_name("page.html")
LOSSLESS = 60                                                # seconds, of all versions together, that go in as FLAC
BESIDE, IN_LOOP = 2.0, 1.0                                   # seconds beside what is new: shown, at least; in the loop
FREQUENCIES = [(text, 1 - math.log(f / LOWEST) / math.log(HIGHEST / LOWEST))         # share of the height, from the top
               for text, f in (("10 kHz", 1e4), ("1 kHz", 1e3), ("100 Hz", 1e2))]
HELP = "Keys: space plays and pauses, {} switch versions on the spot, L loops, arrows go a second back or forth, {}."


# ---- a page ---------------------------------------------------------------------------------------------------------

def write_page(path, data, sounds):
    """Write `path`: the template with data, a dict for its script, and sounds, texts in base64, which data numbers."""
    text = json.dumps(data).replace("<", "\\u003c")          # no name of a file can end the element
    elements = [f'<script type="application/json" id="data">{text}</script>']
    elements += [f'<script type="text/plain" id="sound{i}">{sound}</script>' for i, sound in enumerate(sounds)]
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("<!-- data -->\n")
    write_atomic(path, lambda file: file.write("\n".join([head, *elements, tail]).encode()))


def in_base64(audio, lossless):
    """Audio (2, n) at 44.1 kHz, within full scale, as FLAC or as the best MP3 of variable rate, in base64."""
    buffer, samples = io.BytesIO(), audio.T.numpy()
    if lossless:
        sf.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    else:
        sf.write(buffer, samples, SAMPLE_RATE, format="MP3", compression_level=0, bitrate_mode="VARIABLE")
    return base64.b64encode(buffer.getvalue()).decode()


def outline(audio, peak, columns=1000):
    """An SVG path in a square of 100: the highest samples of audio (2, n) from left to right, and back the lowest."""
    columns = min(columns, audio.shape[-1])
    starts = np.linspace(0, audio.shape[-1], columns, endpoint=False).astype(int)
    high, low = (50 - 48 / peak * take.reduceat(edge, starts) for take, edge in (
        (np.maximum, audio.amax(0).numpy()), (np.minimum, audio.amin(0).numpy())))
    points = [*enumerate(high), *reversed([*enumerate(low)])]
    return "M" + " ".join(f"{100 * x / columns:.1f},{y:.1f}" for x, y in points) + "Z"


def player(begin, end, total, mark, wave):
    """What the template calls an item, all but its versions: those last from second `begin` to `end` of a track of
    `total` seconds and differ in `mark`; wave: the outline of the whole, whose sound may be added to "outside"."""
    loop = max(begin, mark[0] - IN_LOOP), min(end, mark[1] + IN_LOOP)
    return {"from": begin, "to": end, "total": total, "mark": mark, "loop": loop, "wave": wave, "outside": []}


# ---- sample.py --page -----------------------------------------------------------------------------------------------

def edit_page(results, before, edit, fade):
    """Write a page beside the results of an Edit, files with a .json each, and the Track before: see, hear and choose.

    Versions differ near the new audio alone. So what lies further away is in the page once, as MP3, and of each version
    the new audio, with as much beside it as LOSSLESS allows.
    """
    path, rate, n = results[0].with_suffix(".html"), edit.track.rate, sf.info(results[0]).frames
    records = [json.loads(result.with_suffix(".json").read_text()) for result in results]
    texts = [(f"Variation {record['variation'] + 1}", f"{Path(record['output']).name}, seed {record['seed']}")
             for record in records]
    versions = len(results) + bool(before.n)
    heard = 0 if fade else max(edit.C_L, edit.C_R) * edit.frame                        # then contexts are new too
    beside = max(BESIDE * rate, heard, (LOSSLESS * rate / versions - (edit.end - edit.a)) / 2)
    begin, end = max(0, int(edit.a - beside)), min(n, math.ceil(edit.end + beside))

    def read(file, start=0, stop=None):
        samples = sf.read(file, start=start, stop=stop, dtype="float32", always_2d=True)[0]
        return to_stereo_44k(torch.from_numpy(samples.T.copy()), rate)
    audio = [read(result, begin, end) for result in results]
    if before.n:
        known = to_stereo_44k(before.audio[:, begin:end].float(), rate)
        audio = [F.pad(known, (0, audio[0].shape[-1] - known.shape[-1])), *audio]
        texts = [("Before", "what stood there"), *texts]
    whole = audio[-1] if (begin, end) == (0, n) else read(results[0])
    peak = max(float(x.abs().max()) for x in (whole, *audio)) or 1.0
    levels = [spectrogram(x.T.numpy(), SAMPLE_RATE, x.shape[-1] / SAMPLE_RATE) for x in audio]
    top = max(level.max() for level in levels)
    item = player(begin / rate, end / rate, n / rate, (edit.a / rate, edit.end / rate), outline(whole, peak))
    item["versions"] = [
        {"name": name, "about": about, "sound": i, "wave": outline(x, peak),
         "picture": base64.b64encode(png(picture(level, top), palette())).decode()}
        for i, (x, level, (name, about)) in enumerate(zip(audio, levels, texts))]
    lossless = sum(x.shape[-1] for x in audio) <= (LOSSLESS + 1) * SAMPLE_RATE
    sounds = [in_base64(x / max(1, peak), lossless) for x in audio]
    if whole is not audio[-1]:
        item["outside"].append(len(sounds))
        sounds.append(in_base64(whole / max(1, peak), lossless=False))
    keys = HELP.format(f"1 to {min(versions, 9)}", "C chooses the version that is heard")
    scale = "Spectrograms: 50 Hz to 16 kHz, logarithmic; 80 dB from black to white, the same for all."
    write_page(path, {"kind": "edits", "id": digest(sounds), "title": path.stem, "about": records[0]["times"],
                      "command": records[0]["command"], "help": f"{keys} {scale}", "frequencies": FREQUENCIES,
                      "items": [item]}, sounds)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB")
