"""Figure 2, a blind test (Sect. 4.4): a page on which listeners compare systems, and their votes.

    python examples/figure2.py latent=runs/latent waveform=runs/waveform original=test/ --region 2 4
    python examples/figure2.py --votes votes-*.csv

The first command writes runs/figure2/figure2.html, which asks: which of two unnamed, equally loud
versions of a clip fits better? Only figure2.json, in the same folder, says which system is A and
which is B. Each listener saves a csv; the second command counts all wins, ties and losses.
"""
import argparse
import csv
import html
import io
import json
import math
import sys
from itertools import combinations
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sample
from evaluate import clips_in
from examples import page
from sample import SAMPLE_RATE, UserError, random_numbers, read_audio, to_stereo_44k

CONTEXT = 4.0                           # seconds to play on each side of the region
CLIPS = 100
OUT = Path("runs/figure2")
FIELDS = ["page", "listener", "question", "answer"]     # of a csv, as page.html writes it
ANSWERS = ("A", "neither", "B")
QUESTION = ("Two versions of the same music, which differ in the marked part. Which one fits the "
            "music around it better? Answers stay in this browser; save them at the end.")


# ---- the page ------------------------------------------------------------------------------------

def find_folders(systems):
    """["name=folder", ...] -> {name: folder}. UserError unless two or more have different names."""
    folders = {}
    for text in systems:
        name, _, folder = text.partition("=")
        if name and folder:
            folders[name] = folder
    if len(folders) < max(2, len(systems)):
        raise UserError("give two or more systems as NAME=FOLDER, with different names")
    return folders


def find_pairs(folders, random, limit):
    """[(clip, {name: file, name: file})] in random order, of up to `limit` clips.

    Any two systems that have a file for the clip (see evaluate.clips_in) are a pair; which of them
    comes first is random too.
    """
    files = {name: clips_in(folder) for name, folder in folders.items()}

    # Clips that at least two systems have.
    shared = set()
    for one, other in combinations(files.values(), 2):
        shared |= one.keys() & other.keys()
    clips = sorted(shared)
    if not clips:
        names = ", ".join(folders.values())
        raise UserError(f"no two of {names} are folders with files of the same name")

    # Every two of them, once for each clip.
    pairs = []
    for i in random.permutation(len(clips))[:limit]:
        having = [name for name in files if clips[i] in files[name]]
        for pair in combinations(having, 2):
            versions = {name: files[name][clips[i]] for name in random.permutation(pair)}
            pairs.append((clips[i], versions))
    return [pairs[i] for i in random.permutation(len(pairs))]


def read_versions(files, region):
    """Two files -> the parts to play, (2, 2, n) at 44.1 kHz, and the region in them, in seconds.

    region: seconds of the files, or None, all of what both have; CONTEXT lies on each side of it.
    """
    tracks = []
    for file in files:
        tracks.append(to_stereo_44k(*read_audio(file)))
        if not tracks[-1].isfinite().all():
            raise UserError(f"{file} has samples that are not finite: repair or export it again")
    n = min(track.shape[-1] for track in tracks)
    first, last = 0, n
    if region:
        first, last = (round(second * SAMPLE_RATE) for second in region)
    if not 0 <= first < last <= n:
        length = n / SAMPLE_RATE
        raise UserError(f"--region must lie within the {length:.3f} s of {' and '.join(files)}")
    # With some of the context; the mark is counted from there.
    context = round(CONTEXT * SAMPLE_RATE)
    begin, end = max(0, first - context), min(n, last + context)
    mark = (first - begin) / SAMPLE_RATE, (last - begin) / SAMPLE_RATE
    return torch.stack([track[:, begin:end] for track in tracks]), mark


def same_level(pair):
    """Two clips (2, 2, n): the louder one with the other's power; both within full scale."""
    power = pair.square().mean((1, 2), keepdim=True)
    # Silence has no level to match.
    if power.min() > 0:
        pair = pair * (power.min() / power).sqrt()
    return pair / pair.abs().max().clamp(min=1)


def write_test(out, systems, region=None, seed=0, limit=CLIPS):
    """Write figure2.html in `out`, and figure2.json, which alone says which system is which."""
    # Which clips, in which order, with which system first.
    folders = find_folders(systems)
    pairs = find_pairs(folders, random_numbers(seed, 0), limit)

    # Each pair is a question, and an item of the page with two versions.
    questions, items, audio = [], [], []
    for clip, files in pairs:
        versions, mark = read_versions([*files.values()], region)
        total = versions.shape[-1] / SAMPLE_RATE
        item = page.player(0, total, total, mark, "")
        item["versions"] = []
        for name, version in zip("AB", same_level(versions)):
            item["versions"].append({"name": name, "about": "", "sound": len(audio)})
            audio.append(version)
        items.append(item)
        questions.append({"clip": clip, **dict(zip("AB", files))})
    sample.prepare_folder(out, f"--out {out}")

    # FLAC, unless the page would grow too large.
    lossless = sum(x.shape[-1] for x in audio) <= page.LOSSLESS * SAMPLE_RATE
    sounds = [page.in_base64(x, lossless) for x in audio]
    key = {"page": sample.digest(questions, sounds), "systems": folders, "region": region,
           "seed": seed, "questions": questions}
    answers = "A, N and B answer, comma and point go to another pair, S saves the answers as a csv"
    data = {"kind": "test", "id": key["page"], "title": "Which version fits better?", "command": "",
            "about": QUESTION, "help": page.HELP.format("1 and 2", answers), "items": items}
    # The votes for an earlier page can be counted with its key alone.
    earlier = out / "figure2.json"
    if earlier.exists() and read_key(earlier)[0]["page"] != key["page"]:
        raise UserError(f"--out {out} holds another test, whose votes would be lost: "
                        "choose another")
    page.write_page(out / "figure2.html", data, sounds)
    write_text(out / "figure2.json", json.dumps(key, indent=1))
    print(f"wrote {out / 'figure2.html'}: {len(items)} pairs; which is which: figure2.json")


def write_text(path, text):
    sample.write_atomic(path, lambda file: file.write(text.encode()))


# ---- votes ---------------------------------------------------------------------------------------

def read_key(path):
    """figure2.json, and the pairs of systems in it. UserError if it is not one."""
    try:
        key = json.loads(path.read_text())
        asked = {frozenset((question["A"], question["B"])) for question in key["questions"]}
        pairs = [pair for pair in combinations(key["systems"], 2) if frozenset(pair) in asked]
        key["page"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} cannot be used: give --out the folder of the page") from None
    return key, pairs


def read_votes(path, key):
    """(listener, [an answer or "" per question]) of a csv that a page saved.

    UserError where it is not whole.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file, strict=True))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}") from None

    # The columns that the page writes.
    if lines[:1] != [FIELDS] or any(len(line) != len(FIELDS) for line in lines):
        columns = ", ".join(FIELDS)
        raise UserError(f"{path} is damaged: it must have the columns {columns} and nothing else")
    votes = [dict(zip(FIELDS, line)) for line in lines[1:]]

    # The right page, and no question twice.
    pages = {vote["page"] for vote in votes}
    if pages - {key["page"]}:
        raise UserError(f"{path} is of another page: {', '.join(sorted(pages))}, not {key['page']}")
    numbers = [vote["question"] for vote in votes]
    doubled = sorted({number for number in numbers if numbers.count(number) > 1})
    if doubled:
        raise UserError(f"{path} has doubled votes: of question {', '.join(doubled)}")

    # One listener's line for each question.
    expected = [str(i + 1) for i in range(len(key["questions"]))]
    listeners = {vote["listener"] for vote in votes}
    answers = [vote["answer"] for vote in votes]
    if numbers != expected or len(listeners) != 1 or set(answers) - {*ANSWERS, ""}:
        raise UserError(f"{path} is damaged: it must have a line for each of {len(expected)} "
                        f"questions, by one listener, with the answer {', '.join(ANSWERS)} or none")
    return listeners.pop(), answers


def tail(wins, n, p):
    """P(X >= wins) of a binomial X of n trials with probability 0 < p < 1."""
    total = 0.0
    for k in range(wins, n + 1):
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        total += math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))
    return total


def sign_test(wins, losses):
    """The two-sided p: how often a fair coin would be as one-sided. Ties do not count."""
    return min(1.0, 2 * tail(max(wins, losses), wins + losses, 0.5))


def lower_limit(wins, n):
    """The least share of wins for which so many of n, or more, have a probability above 2.5%."""
    low, high = 0.0, 1.0
    if wins == 0:
        return low
    for _ in range(50):
        middle = (low + high) / 2
        if tail(wins, n, middle) > 0.025:
            high = middle
        else:
            low = middle
    return low


def interval(wins, losses):
    """The exact 95% interval of the share of wins (Clopper and Pearson, 1934).

    It leaves out 1/2 where p < 0.05.
    """
    n = wins + losses
    return lower_limit(wins, n), 1 - lower_limit(losses, n)


def compare(pair, wins, ties, losses):
    """A row of figure2.csv: one system against another."""
    low, high = interval(wins, losses)
    share = None
    if wins + losses:
        share = wins / (wins + losses)
    return {"system": pair[0], "against": pair[1], "wins": wins, "ties": ties, "losses": losses,
            "share": share, "low": low, "high": high, "p": sign_test(wins, losses)}


def count_votes(out, paths):
    """Count the votes on the page in `out`: to the screen, figure2.csv and figure2.svg.

    Each vote counts as independent of the others; many by one listener, or on one clip, are not.
    """
    # Of each pair of systems, over all listeners.
    key, pairs = read_key(out / "figure2.json")
    counts = {pair: [0, 0, 0] for pair in pairs}                # wins, ties, losses
    files = {}
    for path in paths:
        listener, answers = read_votes(path, key)
        if listener in files:
            raise UserError(f"{path} has doubled votes: those of listener {listener} are in "
                            f"{files[listener]} too")
        files[listener] = path
        for question, answer in zip(key["questions"], answers):
            if answer:
                # A win of A is a loss of B where the pair is counted the other way round.
                place = ANSWERS.index(answer)
                pair = question["A"], question["B"]
                if pair not in counts:
                    pair, place = pair[::-1], 2 - place
                counts[pair][place] += 1

    # The same rows as csv, as a drawing and on the screen.
    rows = [compare(pair, *count) for pair, count in counts.items()]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "figure2.csv", text.getvalue())
    write_text(out / "figure2.svg", bars(rows))
    print_counts(rows)
    print(f"listeners: {len(files)}; the same in {out / 'figure2.csv'} and {out / 'figure2.svg'}")


def print_counts(rows):
    names = [f"{row['system']} against {row['against']}" for row in rows]
    width = max(len(name) for name in names)
    print(f"{'':{width}}  wins  ties  losses  share of wins, 95%  p of the sign test")
    for name, row in zip(names, rows):
        share = "-"
        if row["share"] is not None:
            share = "{share:.2f} [{low:.2f}, {high:.2f}]".format(**row)
        counts = f"{row['wins']:4}  {row['ties']:4}  {row['losses']:6}"
        print(f"{name:{width}}  {counts}  {share:18}  {row['p']:.3g}")


def bars(rows):
    """Figure 2 as SVG, a bar per pair of systems: wins of the one, ties, wins of the other."""
    most = max(1, *(row["wins"] + row["ties"] + row["losses"] for row in rows))
    parts = (("wins", "#a8402a", "#fff"), ("ties", "#d6d2ca", "#22232a"),
             ("losses", "#3b5f86", "#fff"))
    drawn = []

    def write(x, y, anchor, text, ink="#22232a"):
        text = html.escape(str(text))
        drawn.append(f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="{ink}">{text}</text>')

    write(400, 24, "middle", "wins, ties, and wins of the other, in blind comparisons")
    for i, row in enumerate(rows):
        x, y = 200.0, 40 + 40 * i
        write(190, y + 18, "end", row["system"])
        for name, colour, ink in parts:
            width = 400 * row[name] / most
            drawn.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="26" '
                         f'fill="{colour}"/>')
            write(x + width / 2, y + 18, "middle", row[name] or "", ink)
            x += width
        write(x + 10, y + 18, "start", row["against"])
    height = 60 + 40 * len(rows)
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="800" height="{height}" '
            'font-size="14" font-family="sans-serif">')
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *drawn, "</svg>", ""])


# ---- command line --------------------------------------------------------------------------------

def main(argv=None):
    parser = sample.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("systems", nargs="*", metavar="NAME=FOLDER", help="files of one name are the same clip")
    add("--region", type=sample.seconds, nargs=2, metavar=("START", "END"),
        help="seconds that were generated (all)")
    add("--clips", type=sample.within(1, 2**31, int), help=f"clips at most ({CLIPS})")
    add("--seed", type=sample.within(0, 2**63, int), help="another seed, another order (0)")
    add("--votes", nargs="+", metavar="FILE", help="count these files, which listeners saved")
    add("--out", type=Path, default=OUT, help="folder of the page (%(default)s)")
    options = parser.parse_args(argv)

    if not options.votes:
        write_test(options.out, options.systems, options.region, options.seed or 0,
                   options.clips or CLIPS)
        return
    for name in ("systems", "region", "clips", "seed"):
        if getattr(options, name) not in (None, []):
            raise UserError(f"--votes goes with --out alone: leave out {name}")
    count_votes(options.out, options.votes)


if __name__ == "__main__":
    sample.run(main)
