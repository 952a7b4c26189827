"""Figure 2, a blind test (Sect. 4.4): a page on which listeners compare systems' clips, and the count of their votes.

    python evaluate.py --figure2 latent=runs/latent waveform=runs/waveform original=test/ --region 2 4
    python evaluate.py --votes votes-*.csv
"""
import csv
import html
import io
import json
import math
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from examples import page
from sample import (SAMPLE_RATE, UserError, digest, find_files, random_numbers, read_audio, to_stereo_44k,
                    write_atomic)

CONTEXT = 4.0                                                # seconds to hear beside what is new
FIELDS, ANSWERS = ["page", "listener", "question", "answer"], ("A", "neither", "B")  # of a csv, as page.html writes it


def run(options):
    """evaluate.py --figure2 and --votes."""
    out = options.out or Path("runs/figure2")
    if options.votes:
        count_votes(out, options.votes)
    else:
        write_test(out, options.figure2, options.region, options.seed, options.clips)


def clips_in(folder):
    """{name: path} of a folder's audio files, at any depth; a name is the path below the folder, without its ending."""
    found = {}
    for path in find_files([folder]):
        name = os.path.splitext(os.path.relpath(path, folder))[0]
        if name in found:
            raise UserError(f"{found[name]} and {path} have the same name: remove one of them")
        found[name] = path
    return found


def find_pairs(systems, rng, limit):
    """{name: folder} of the texts "name=folder", and [(clip, {name: file})] in random order: each two systems' files of
    the same name (see clips_in), of up to `limit` clips; which of the two comes first is random too."""
    folders = dict(text.partition("=")[::2] for text in systems)
    if len(folders) < max(2, len(systems)) or not all(folders) or not all(folders.values()):
        raise UserError("--figure2 needs two or more of NAME=FOLDER, with different names")
    files = {name: clips_in(folder) for name, folder in folders.items()}
    clips = sorted({clip for one, two in combinations(files.values(), 2) for clip in one.keys() & two.keys()})
    if not clips:
        raise UserError(f"--figure2: no two of {', '.join(folders.values())} are folders with files of the same name")
    asked = [(clips[i], {name: files[name][clips[i]] for name in rng.permutation(pair)})
             for i in rng.permutation(len(clips))[:limit]
             for pair in combinations([name for name in files if clips[i] in files[name]], 2)]
    return folders, [asked[i] for i in rng.permutation(len(asked))]


def write_test(out, systems, region=None, seed=0, limit=100):
    """Write figure2.html in `out`, and beside it figure2.json, which alone knows who is A and who is B.

    systems, limit: see find_pairs. region: seconds (first, last) that were generated, else all; with CONTEXT beside it
    the same part of both files is heard, at the same level.
    """
    folders, asked = find_pairs(systems, random_numbers(seed, 0), limit)
    questions, items, audio = [], [], []
    for clip, files in asked:
        tracks = [to_stereo_44k(*read_audio(file)) for file in files.values()]
        n = min(track.shape[-1] for track in tracks)
        first, last = (round(second * SAMPLE_RATE) for second in region or (0, n / SAMPLE_RATE))
        if not 0 <= first < last <= n:
            raise UserError(f"--region must lie within the {n / SAMPLE_RATE:.3f} s of {' and '.join(files.values())}")
        beside = round(CONTEXT * SAMPLE_RATE)
        begin, end = max(0, first - beside), min(n, last + beside)
        mark = (first - begin) / SAMPLE_RATE, (last - begin) / SAMPLE_RATE
        versions = [{"name": name, "about": "", "sound": len(audio) + i} for i, name in enumerate("AB")]
        total = (end - begin) / SAMPLE_RATE
        items.append(page.player(0, total, total, mark, "") | {"versions": versions})
        questions.append({"clip": clip, **dict(zip("AB", files))})
        audio += same_level(torch.stack([track[:, begin:end] for track in tracks]))
    lossless = sum(x.shape[-1] for x in audio) <= page.LOSSLESS * SAMPLE_RATE
    sounds = [page.in_base64(x, lossless) for x in audio]
    key = {"page": digest(questions, sounds), "systems": folders, "region": region, "seed": seed,
           "questions": questions}
    answers = "A, N and B answer, comma and point go to another pair, S saves the answers as a csv"
    keys = page.HELP.format("1 and 2", answers)
    out.mkdir(parents=True, exist_ok=True)
    page.write_page(out / "figure2.html", {
        "kind": "test", "id": key["page"], "title": "Which version fits better?", "command": "", "items": items,
        "about": "Two versions of the same music, which differ in the marked part. Which one fits the music around it "
                 "better? Answers stay in this browser; save them at the end.", "help": keys}, sounds)
    write_atomic(out / "figure2.json", lambda file: file.write(json.dumps(key, indent=1).encode()))
    print(f"wrote {out / 'figure2.html'}: {len(items)} pairs; who is who is in figure2.json, beside it")


def same_level(pair):
    """Two clips (2, 2, n), the louder one turned down to the other's power, and both into full scale where need be."""
    power = pair.square().mean((1, 2), keepdim=True)
    pair = pair * (power.min() / power.clamp(min=1e-12)).sqrt().clamp(max=1) if power.min() > 0 else pair
    return pair / pair.abs().max().clamp(min=1)


# ---- evaluate.py --votes --------------------------------------------------------------------------------------------

def read_votes(path, key):
    """(listener, [an answer or "" per question]) of a file that a page wrote; UserError where it is not whole."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, strict=True))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if rows[:1] != [FIELDS] or any(len(row) != len(FIELDS) for row in rows):
        raise UserError(f"{path} is damaged: it must have the columns {', '.join(FIELDS)} and nothing else")
    pages, listeners, numbers, answers = zip(*rows[1:]) if rows[1:] else 4 * [()]
    expected = [str(i + 1) for i in range(len(key["questions"]))]
    if set(pages) - {key["page"]}:
        raise UserError(f"{path} is of another page: {', '.join(sorted(set(pages)))}, not {key['page']}")
    if doubled := sorted({number for number in numbers if numbers.count(number) > 1}):
        raise UserError(f"{path} has doubled votes: of question {', '.join(doubled)}")
    if list(numbers) != expected or len(set(listeners)) != 1 or set(answers) - {*ANSWERS, ""}:
        raise UserError(f"{path} is damaged: it must have a line for each of {len(expected)} questions, by one listener"
                        f", with the answer {', '.join(ANSWERS)} or none")
    return listeners[0], answers


def tail(wins, n, p):
    """P(X >= wins) of a binomial X of n trials with probability 0 < p < 1."""
    k = np.arange(wins, n + 1)
    chosen = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k]
    return float(np.exp(np.array(chosen) + k * math.log(p) + (n - k) * math.log1p(-p)).sum())


def sign_test(wins, losses):
    """The two-sided p: how often a fair coin would be as one-sided. Ties do not count."""
    return min(1.0, 2 * tail(max(wins, losses), wins + losses, 0.5))


def interval(wins, losses):
    """The exact 95% interval of the share of wins (Clopper and Pearson, 1934): it leaves out 1/2 where p < 0.05."""
    def least(wins, n):
        low, high = 0.0, 1.0
        for _ in range(50 if wins else 0):
            middle = (low + high) / 2
            low, high = (low, middle) if tail(wins, n, middle) > 0.025 else (middle, high)
        return low
    return least(wins, wins + losses), 1 - least(losses, wins + losses)


def count_votes(out, paths):
    """Print who won against whom, and write it to figure2.csv and figure2.svg in `out`, where figure2.json lies.
    Each vote counts as independent of the others; many by one listener, or on one clip, are less than that."""
    try:
        key = json.loads((out / "figure2.json").read_text())
        questions = [(question["A"], question["B"]) for question in key["questions"]]
        pairs = [pair for pair in combinations(key["systems"], 2) if pair in questions or pair[::-1] in questions]
        key["page"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out / 'figure2.json'} cannot be used: give --out the folder of --figure2's page") from None
    counts, files = {pair: [0, 0, 0] for pair in pairs}, {}                            # wins, ties, losses
    for path in paths:
        listener, answers = read_votes(path, key)
        if listener in files:
            raise UserError(f"{path} has doubled votes: those of listener {listener} are in {files[listener]} too")
        files[listener] = path
        for pair, answer in zip(questions, answers):
            if answer:
                place = ANSWERS.index(answer)
                if pair not in counts:
                    pair, place = pair[::-1], 2 - place
                counts[pair][place] += 1
    rows = [row_of(pair, *count) for pair, count in counts.items()]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    for suffix, content in (("csv", text.getvalue()), ("svg", bars(rows))):
        write_atomic(out / f"figure2.{suffix}", lambda file: file.write(content.encode()))
    names = [f"{row['system']} against {row['against']}" for row in rows]
    width = max(map(len, names))
    print(f"{'':{width}}  wins  ties  losses  share of wins, 95%  p of the sign test")
    for name, row in zip(names, rows):
        share = "-" if row["share"] is None else "{share:.2f} [{low:.2f}, {high:.2f}]".format(**row)
        print(f"{name:{width}}  {row['wins']:4}  {row['ties']:4}  {row['losses']:6}  {share:18}  {row['p']:.3g}")
    print(f"listeners: {len(files)}; the same in {out / 'figure2.csv'}, drawn in {out / 'figure2.svg'}")


def row_of(pair, wins, ties, losses):
    """The figures of one system against another."""
    low, high = interval(wins, losses)
    share = wins / (wins + losses) if wins + losses else None
    return {"system": pair[0], "against": pair[1], "wins": wins, "ties": ties, "losses": losses,
            "share": share, "low": low, "high": high, "p": sign_test(wins, losses)}


def bars(rows):
    """Figure 2 as SVG, a bar per pair of systems: wins of the one, ties, wins of the other."""
    most, drawn = max(1, *(row["wins"] + row["ties"] + row["losses"] for row in rows)), []

    def write(x, y, anchor, text, ink="#22232a"):
        drawn.append(f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="{ink}">{html.escape(str(text))}</text>')
    write(400, 24, "middle", "wins, ties, and wins of the other, in blind comparisons")
    for i, row in enumerate(rows):
        x, y = 200.0, 40 + 40 * i
        write(190, y + 18, "end", row["system"])
        for name, colour, ink in (
                ("wins", "#a8402a", "#fff"), ("ties", "#d6d2ca", "#22232a"), ("losses", "#3b5f86", "#fff")):
            width = 400 * row[name] / most
            drawn.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="26" fill="{colour}"/>')
            write(x + width / 2, y + 18, "middle", row[name] or "", ink)
            x += width
        write(x + 10, y + 18, "start", row["against"])
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="800" height="{60 + 40 * len(rows)}" font-size="14" '
            'font-family="sans-serif"><rect width="100%" height="100%" fill="#fff"/>\n'
            + "\n".join(drawn) + "\n</svg>\n")
