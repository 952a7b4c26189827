"""examples/page.py and figure2.py: their pages, in a browser too where there is one, and counting votes."""
import base64
import contextlib
import csv
import io
import json
import re
import shutil
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

import evaluate
import sample
from conftest import save_checkpoint
from dit import PRESETS as DIT, DiT
from examples import figure2, page
from vae import PRESETS as VAES, VAE

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
         "disable-component-update", "disable-sync", "autoplay-policy=no-user-gesture-required"]
NAME = "Ünï <b>x<b> &.wav"


class Browser:
    """Headless Chromium, by the W3C WebDriver protocol and, for what that lacks, by Chromium's own."""

    def __init__(self, folder):
        self.downloads = folder / "downloads"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        options = {"binary": CHROMIUM, "args": [f"--{flag}" for flag in FLAGS] + [f"--user-data-dir={folder / 'profile'}"],
                   "prefs": {"download.default_directory": str(self.downloads)}}
        self.url = f"http://127.0.0.1:{port}/session"
        for _ in range(100):
            with contextlib.suppress(urllib.error.URLError):
                made = self.post("", capabilities={"alwaysMatch": {
                    "browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}})
                break
            time.sleep(0.1)
        self.url += "/" + made["sessionId"]

    def post(self, path, **body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=120))["value"]

    def run(self, script, *args):
        return self.post("/execute/sync", script=script, args=args)

    def cdp(self, command, **params):
        return self.post("/goog/cdp/execute", cmd=command, params=params)

    def open(self, path):
        self.post("/url", url=path.resolve().as_uri())

    def press(self, key):
        down = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": down}])

    def until(self, script):
        """The value of a JavaScript expression, once it is true."""
        for _ in range(300):
            if value := self.run(f"return {script}"):
                return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {script}; {self.run('return document.body.innerText')}")

    def complaints(self):
        return [entry["message"] for entry in self.post("/se/log", type="browser")]

    def close(self):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(self.url, method="DELETE"), timeout=30)
        self.process.terminate()
        self.process.wait()


TAP = """{
const connect = AudioNode.prototype.connect
let tap = null
window.blocks = []
AudioNode.prototype.connect = function (target, ...rest) {
  if (target !== this.context.destination) return connect.call(this, target, ...rest)
  if (!tap) {
    tap = this.context.createScriptProcessor(16384, 2, 2)
    tap.onaudioprocess = ({inputBuffer, playbackTime}) => blocks.push(
      [Math.round(playbackTime * 44100 / 16384), ...[0, 1].map(i => Array.from(inputBuffer.getChannelData(i)))])
    connect.call(tap, target)
  }
  return connect.call(this, tap)
}}"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("there is no chromium and chromedriver")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def record(browser, path, listen):
    """What goes to the loudspeakers, (n, 2), while listen() works on the page; where the machine is too busy to record
    all of it, again."""
    script = browser.cdp("Page.addScriptToEvaluateOnNewDocument", source=TAP)
    try:
        for _ in range(4):
            browser.open(path)
            listen()
            time.sleep(0.8)                                  # a block is 0.4 s
            blocks = browser.run("return blocks")
            if np.all(np.diff([place for place, *_ in blocks]) == 1):
                return np.concatenate([np.array(sound, float).T for _, *sound in blocks])
        pytest.skip("this machine is too busy to record in real time")
    finally:
        browser.cdp("Page.removeScriptToEvaluateOnNewDocument", **script)
        browser.complaints()                                 # the recorder's own


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """Two variations of an infill of 3 to 4 s of a clip of 8 s, with their page. In all, the left channel tells the time,
    from -0.4 to 0.4; the right one tells the version: 0.01, 0.02 and 0.03."""
    folder = tmp_path_factory.mktemp("edited")
    (folder / "models").mkdir()
    return make_edit(folder, np.linspace(-0.4, 0.4, 8 * 44100, endpoint=False), 0.01)


def make_edit(folder, left, right, *flags):
    """An edit of a track of these channels by a model that goes on with `left`, and whose `right` grows by 0.01."""
    right = np.broadcast_to(right, left.shape)
    sf.write(folder / NAME, np.stack([left, right], 1), 44100, subtype="FLOAT")
    torch.manual_seed(0)
    save_checkpoint(folder / "latent.pt", "latent", DiT(DIT["tiny"]), VAE(VAES["tiny"]))
    made = []

    def fill(checkpoint, known, C_L, C_R, *_, **__):
        made.append(1)
        start = np.flatnonzero(left >= float(known[0, 0, 0]) - 1e-6)[0]
        new = np.stack([left, right + 0.01 * len(made)])[:, start:start + known.shape[-1]]
        return torch.from_numpy(new[None]).to(known)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "fill", fill)
        sample.main(["--task", "infill", "--input", str(folder / NAME), "--start", "3", "--end", "4", "--num", "2", "--page",
                     "--checkpoint", str(folder / "latent.pt"), "--steps", "1", "--context", "1", "--force", *flags])
    return folder / NAME.replace(".wav", ".infill.html")


def data_of(path):
    return json.loads(re.search(r'id="data">(.*)</script>', path.read_text(encoding="utf-8")).group(1))


def sounds_of(path):
    """Its sounds, decoded: [(2, n)]"""
    found = re.findall(r'id="sound\d+">(.*)</script>', path.read_text(encoding="utf-8"))
    return [sf.read(io.BytesIO(base64.b64decode(sound)), always_2d=True)[0].T for sound in found]


# ---- the page of an edit --------------------------------------------------------------------------------------------

def test_the_page_of_an_edit_holds_all_versions_and_loads_nothing(edited):
    """Before and each variation, lossless; what made them; names as text; and no address to load anything from."""
    data, text = data_of(edited), edited.read_text(encoding="utf-8")
    item, = data["items"]
    assert [version["name"] for version in item["versions"]] == ["Before", "Variation 1", "Variation 2"]
    assert NAME.replace(".wav", ".infill-2.wav") in item["versions"][2]["about"] and "seed 0" in item["versions"][2]["about"]
    assert "--task infill" in data["command"] and data["title"] == NAME.replace(".wav", ".infill")
    assert item["mark"] == pytest.approx([3, 4], abs=0.003) and item["loop"] == pytest.approx([2, 5], abs=0.003)
    for i, sound in enumerate(sounds_of(edited)):
        assert sound.shape == (2, 8 * 44100) and np.allclose(sound[0], np.linspace(-0.4, 0.4, 8 * 44100), atol=1e-3)
        assert np.allclose(sound[1, 140000:170000], 0.01 * (i + 1), atol=1e-4) and np.allclose(sound[1, :88200], 0.01, atol=1e-4)
    assert "<b>" not in text and not re.search(r"https?://|src=|href=\"|@import|url\(", text)
    assert len(page.TEMPLATE.read_text().splitlines()) <= 250


@pytest.mark.parametrize("names, task, seconds, mark", [
    ("Variation 1", ["unconditional", "--length", "1"], 1, (0, 1)),
    ("Before Variation 1", ["continuation", "--input", "mono.flac", "--start", "1.5", "--length", "1"], 2.5, (1.5, 2.5)),
    ("Before Variation 1", ["continuation", "--input", "mono.flac", "--length", "1", "--output", "out.flac"], 3, (2, 3)),
    ("Before Variation 1", ["infill", "--input", "mono.flac", "--start", "1", "--end", "1.2", "--splice", "0"], 2, (1, 1.2)),
    ("Before Variation 1", ["transition", "--input", "mono.flac", "--input2", "mono.flac", "--fade", "0.5"], 3.5, (1.5, 2))])
def test_every_task_has_a_page(names, task, seconds, mark, edited, tmp_path, monkeypatch):
    """Mono at 48 kHz, flac, longer than before, and with no track before at all; a page that is there is not lost."""
    t = np.arange(2 * 48000) / 48000
    sf.write(tmp_path / "mono.flac", 0.2 * np.sin(2 * np.pi * 220 * t) * np.sin(9 * t) + 0.1 * np.sin(2 * np.pi * 331 * t), 48000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "LOSSLESS", 1.0)
    monkeypatch.setattr(page, "BESIDE", 0.1)
    arguments = ["--task", *task, "--checkpoint", str(edited.with_name("latent.pt")), "--steps", "1", "--page"]
    sample.main(arguments)
    made, = tmp_path.glob("*.html")
    item, = data_of(made)["items"]
    assert [version["name"] for version in item["versions"]] == re.findall(r"Before|Variation \d", names)
    assert item["total"] == pytest.approx(seconds) and item["mark"] == pytest.approx(mark, abs=0.004)
    lengths = [sound.shape[-1] / 44100 for sound in sounds_of(made)]
    assert lengths[:len(item["versions"])] == pytest.approx([item["to"] - item["from"]] * len(item["versions"]), abs=1e-3)
    assert lengths[len(item["versions"]):] == pytest.approx([seconds] * len(item["outside"]), abs=1e-3)
    if "--splice" in task:                                   # then all that the model heard is new too
        assert item["from"] < 0.83 and item["to"] > 1.36
    elif item["outside"]:
        assert item["to"] - item["from"] < 1.3
    before, after = (sounds_of(made)[i][0] for i in (0, len(item["versions"]) - 1))
    if len(item["versions"]) > 1:
        a = round((item["mark"][0] - item["from"]) * 44100)
        assert not np.array_equal(before[a + 100:a + 5000], after[a + 100:a + 5000])
        assert "1.5" not in task or np.abs(before[a:a + 20000]).max() > 0.1              # what was there, though cut off
        assert "--splice" in task or np.allclose(before[:a - 1500], after[:a - 1500], atol=0.02)
    for path in {*tmp_path.iterdir()} - {made, tmp_path / "mono.flac"}:
        path.unlink()
    with pytest.raises(sample.UserError, match="html exists"):
        sample.main(arguments)


def test_a_tone_is_bright_at_its_label_and_loud_in_its_outline(tmp_path):
    """1 kHz in the right row of the picture, which comes back from the PNG; the outline reaches as far as the samples."""
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(44100) / 44100).expand(2, -1) * torch.linspace(0, 1, 44100)
    level = page.spectrogram(tone.T.numpy(), 44100, 1)
    share = dict(page.FREQUENCIES)["1 kHz"]
    assert level[:, 800].argmax() == pytest.approx(share * len(level), abs=3)
    entries = page.picture(level, level.max())
    data = page.png(entries, page.palette())
    width, height = struct.unpack(">II", data[16:24])
    start = data.index(b"IDAT") + 4
    rows = np.frombuffer(zlib.decompress(data[start:data.index(b"IEND") - 8]), np.uint8).reshape(height, width + 1)
    assert np.array_equal(rows[:, 1:], entries) and entries.max() >= 250 and not rows[:, 0].any()
    heights = np.array([float(y) for y in re.findall(r",([\d.]+)", page.outline(tone, 1.0))])
    assert heights.min() == pytest.approx(2, abs=0.2) and heights.max() == pytest.approx(98, abs=0.2)
    assert len(heights) == 2000 and abs(heights[0] - 50) < 0.5 and np.argmin(heights) > 950


def test_versions_switch_at_the_same_sample_and_the_region_loops(edited, browser):
    """Recorded from the loudspeakers while keys are pressed: the time goes on through every switch, without a gap, and
    at the end of the loop jumps back to its start."""
    def listen():
        browser.press(" ")
        browser.until("since !== null && blocks.length > 1")
        for key in "312":
            browser.press(key)
            browser.until(f"version === {int(key) - 1}")
            time.sleep(0.6)
        time.sleep(2)
        assert browser.run("return document.querySelector('[data-key=space]').textContent") == "Pause"
        browser.press(" ")
        browser.until("since === null")
    sound = record(browser, edited, listen)
    on = np.flatnonzero(sound[:, 1] > 0.001)
    left, right = sound[on[0]:on[-1] + 1].T                                            # nowhere silent in between:
    assert right[500:-500].min() > 0.009
    assert on[-1] - on[0] + 1 == len(on) and len(on) > 3.5 * 44100
    heard = (left[500:-500] + 0.4) * 10                                                # seconds of the track
    jumps = np.flatnonzero(np.abs(np.diff(heard)) > 0.01)
    assert len(jumps) >= 1 and np.allclose(heard[jumps], 5, atol=0.01) and np.allclose(heard[jumps + 1], 2, atol=0.01)
    for part in np.split(heard, jumps + 1):
        late = part - part[0] - np.arange(len(part)) / 44100
        assert np.abs(late[(part < 2.96) | (part > 3)]).max() < 0.001                  # what lies between is a cross-fade
    inside = (heard > 3.1) & (heard < 3.9)
    assert set(np.round(100 * right[500:-500][inside]).astype(int)) >= {1, 2} and browser.complaints() == []


def test_beyond_the_excerpt_the_track_goes_on_in_step(tmp_path, browser, monkeypatch):
    """Where the whole track is in the page as MP3 only, beside lossless excerpts, a tone goes through both borders."""
    monkeypatch.setattr(page, "LOSSLESS", 16.5)
    t = np.arange(8 * 44100) / 44100
    path = make_edit(tmp_path, 0.4 * np.sin(2 * np.pi * 220 * t), 0.0)
    item, = data_of(path)["items"]
    assert item["from"] > 0.5 and item["to"] < 7.5 and item["outside"] == [3]
    def listen():
        browser.press("l")
        browser.run("move(item().from - 0.4, true)")
        browser.until("since !== null && where() > item().from + 0.4")
        browser.run("move(item().to - 0.4, true)")
        browser.until("where() > item().to + 0.5")
        browser.press(" ")
    sound = record(browser, path, listen)
    on = np.flatnonzero(np.abs(sound[:, 0]) > 0.05)
    for part in np.split(on, np.flatnonzero(np.diff(on) > 500) + 1):
        tone = sound[part[0] + 1000:part[-1] - 1000, 0]
        assert len(tone) > 0.7 * 44100
        assert np.abs(np.diff(tone)).max() < 1.1 * 0.4 * 2 * np.pi * 220 / 44100


def test_a_choice_survives_a_reload_and_every_button_has_a_name(edited, browser):
    """By keyboard alone: choose, reload, tab to a button and press it. Names are text, never html."""
    browser.open(edited)
    browser.press("3")
    browser.press("c")
    browser.open(edited)
    assert NAME.replace(".wav", ".infill-2.wav") in browser.run("return document.querySelector('#status').textContent")
    assert browser.run("return document.querySelector('h1').textContent") == NAME.replace(".wav", ".infill")
    assert browser.run("return document.querySelectorAll('b').length") == 0
    focused = []
    for _ in range(7):
        browser.press("\ue004")
        focused.append(browser.run("return document.activeElement.textContent"))
    assert focused[:3] == ["Play", "Loop the marked part", "Choose this one"] and focused[4:] == [
        "Before", "Variation 1", "Variation 2"]
    browser.press("\ue007")
    assert browser.run("return version") == 2
    browser.run("const all = document.querySelector('#overview'); all.onclick({offsetX: 0.9 * all.clientWidth})")
    browser.until("!looping && since !== null && where() > 7")                         # beyond the loop, which ends
    browser.run("move(0, false)")
    assert names(browser) >= {"Play", "Loop the marked part", "Choose this one", "Before", "Variation 1", "Variation 2"}
    assert browser.complaints() == []


def names(browser):
    """What a screen reader calls the buttons and sliders; each has a name."""
    nodes = browser.cdp("Accessibility.getFullAXTree")["nodes"]
    found = [node["name"]["value"] for node in nodes if node.get("role", {}).get("value") in ("button", "slider")]
    assert all(found)
    return set(found)


def test_pages_fit_narrow_and_wide_windows_in_dark_and_light(edited, tests, browser):
    """Nothing sticks out at 400 and 1280 pixels; the background follows the preference."""
    for path in (edited, tests / "out" / "figure2.html"):
        for width in (400, 1280):
            browser.cdp("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
            shades = []
            for scheme in ("light", "dark"):
                browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                browser.open(path)
                assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
                shade = browser.run("return getComputedStyle(document.documentElement).backgroundColor")
                shades.append(sum(map(int, re.findall(r"\d+", shade)[:3])))
            assert shades[0] > 600 > 200 > shades[1]
    browser.cdp("Emulation.clearDeviceMetricsOverride")


@pytest.mark.slow
def test_eight_variations_of_four_minutes_stay_under_30_mb_and_open_in_2_s(tmp_path, browser, monkeypatch):
    """Of noise, which no codec makes small."""
    left, right = 0.25 * np.random.default_rng(0).standard_normal((2, 240 * 44100)).clip(-3, 3)
    left[0] = 0.75
    path = make_edit(tmp_path, left, right, "--num", "8")
    assert path.stat().st_size < 30e6
    began = time.time()
    browser.open(path)
    browser.until("document.querySelectorAll('article img').length === 9")
    assert time.time() - began < 2
    browser.press(" ")
    browser.until("since !== null")


# ---- the blind test -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tests(tmp_path_factory):
    """Three systems' folders, of three clips each, the second one louder; out/ has their page, of nine pairs."""
    root = tmp_path_factory.mktemp("test")
    for k, system in enumerate(("quiet system", "loud system", "original")):
        (root / system).mkdir()
        for clip in range(3):
            sound = np.random.default_rng([clip, k]).standard_normal((3 * 44100, 2)) * (0.05, 0.2, 0.05)[k]
            sound[:44100] = 0.1 * np.random.default_rng(clip).standard_normal((44100, 2))
            sf.write(root / system / f"{clip}.wav", sound, 44100)
    write_test(root, root / "out")
    return root


def write_test(root, out, *flags):
    systems = [f"{name}={root / name}" for name in ("quiet system", "loud system", "original")]
    evaluate.main(["--figure2", *systems, "--region", "1", "2", "--out", str(out), *flags])
    return json.loads((out / "figure2.json").read_text())


def test_the_blind_test_is_blind_level_matched_and_in_random_order(tests, tmp_path):
    """Each two systems meet once per clip; no name of one is in the page; both are as loud; the seed sets the order."""
    key, path = json.loads((tests / "out" / "figure2.json").read_text()), tests / "out" / "figure2.html"
    asked = [(question["clip"], frozenset((question["A"], question["B"]))) for question in key["questions"]]
    assert len(asked) == len(set(asked)) == 9 and {len(pair) for _, pair in asked} == {2}
    text, sounds = path.read_text(encoding="utf-8"), sounds_of(path)
    assert not any(name in text for name in (*key["systems"], str(tests)))
    items = data_of(path)["items"]
    assert len(items) == 9 and all(item["mark"] == [1, 2] for item in items)
    for item, question in zip(items, key["questions"]):
        A, B = (sounds[version["sound"]] for version in item["versions"])
        assert 20 * np.log10(A.std() / B.std()) == pytest.approx(0, abs=0.02)
        for name, sound in (("A", A), ("B", B)):
            file = sf.read(tests / question[name] / f"{question['clip']}.wav")[0].T
            assert np.corrcoef(sound[0], file[0])[0, 1] > 0.999
    again, other = write_test(tests, tmp_path / "again"), write_test(tests, tmp_path / "other", "--seed", "1")
    assert again == key and (tmp_path / "again" / "figure2.html").read_bytes() == path.read_bytes()
    order = [question["A"] for question in key["questions"]]
    assert other["page"] != key["page"] and [question["A"] for question in other["questions"]] != order
    systems, clips = list(key["systems"]), [clip for clip, _ in asked]
    assert {systems.index(question["A"]) < systems.index(question["B"]) for question in key["questions"]} == {True, False}
    assert sum(one != two for one, two in zip(clips, clips[1:])) > 2                   # not clip after clip
    assert len(write_test(tests, tmp_path / "few", "--clips", "1")["questions"]) == 3


def test_of_long_files_the_region_and_its_context_are_heard(tests, tmp_path, monkeypatch):
    """The same seconds of both."""
    monkeypatch.setattr(figure2, "CONTEXT", 0.5)
    key = write_test(tests, tmp_path, "--clips", "1")
    sounds, items = sounds_of(tmp_path / "figure2.html"), data_of(tmp_path / "figure2.html")["items"]
    for item, question in zip(items, key["questions"]):
        assert item["mark"] == [0.5, 1.5] and item["total"] == 2
        for name, version in zip("AB", item["versions"]):
            file = sf.read(tests / question[name] / f"{question['clip']}.wav")[0].T[0, 22050:22050 + 88200]
            assert np.corrcoef(sounds[version["sound"]][0], file)[0, 1] > 0.999


def test_a_listener_votes_reloads_and_saves_what_votes_reads(tests, browser, capsys):
    """In the browser, by keyboard: a vote before both were heard is refused; answers survive a reload; the saved csv
    comes back through --votes, and counts for the systems that were behind A and B."""
    key = json.loads((tests / "out" / "figure2.json").read_text())
    browser.open(tests / "out" / "figure2.html")
    browser.press("a")
    assert "both" in browser.run("return document.querySelector('#status').textContent")
    for i, (letter, value) in enumerate((("a", "A"), ("b", "B"), ("n", "neither"))):
        browser.press(" ")
        browser.until("heard.size === 1 && since !== null")
        browser.press("2")
        browser.until("heard.size === 2")
        browser.press(letter)
        browser.until(f"kept.answers[{i}] === '{value}'")
        browser.press(".")
        browser.until(f"number === {i + 1}")
    browser.open(tests / "out" / "figure2.html")
    assert browser.run("return document.querySelector('[data-answer=A]').getAttribute('aria-pressed')") == "true"
    assert names(browser) >= {"A", "B", "A fits better", "Neither", "B fits better", "Next pair", "Save the answers"}
    browser.press("s")
    for _ in range(100):
        if files := [path for path in browser.downloads.glob("votes-*.csv")]:
            break
        time.sleep(0.1)
    file, = files
    evaluate.main(["--votes", str(file), "--out", str(tests / "out")])
    assert "listeners: 1" in capsys.readouterr().out
    rows = list(csv.DictReader((tests / "out" / "figure2.csv").open()))
    won = {(row["system"], row["against"]): [int(row[name]) for name in ("wins", "ties", "losses")] for row in rows}
    expected = {pair: [0, 0, 0] for pair in won}
    for question, answer in zip(key["questions"], "ABn"):
        pair = (question["A"], question["B"])
        turned = pair not in expected
        expected[pair[::-1] if turned else pair][1 if answer == "n" else 2 * ((answer == "B") != turned)] += 1
    assert won == expected and browser.complaints() == []


# ---- votes ----------------------------------------------------------------------------------------------------------

def votes(root, name, listener, answers):
    """A file as the page saves it."""
    key = json.loads((root / "figure2.json").read_text())
    lines = [f"{key['page']},{listener},{i + 1},{answer}" for i, answer in enumerate(answers)]
    (root / name).write_text("\n".join(["page,listener,question,answer", *lines, ""]))
    return str(root / name)


@pytest.fixture
def key(tmp_path):
    """figure2.json of eight questions between two systems, one of which is A in the first four."""
    questions = [{"clip": str(i), **dict(zip("AB", ("ours", "a <b>&") if i < 4 else ("a <b>&", "ours")))} for i in range(8)]
    (tmp_path / "figure2.json").write_text(json.dumps({"page": "0badcafe", "systems": {"ours": "x", "a <b>&": "y"},
                                                       "questions": questions}))
    return tmp_path


def test_votes_are_counted_for_the_systems_behind_the_letters(key, capsys):
    """Two listeners; unanswered questions do not count; table, csv and SVG agree."""
    one = votes(key, "one.csv", 1, ["A", "A", "neither", "", "B", "B", "B", "A"])        # ours: 5 wins, 1 tie, 1 loss
    two = votes(key, "two.csv", 2, ["A", "", "", "", "", "", "", ""])
    evaluate.main(["--votes", one, two, "--out", str(key)])
    printed = capsys.readouterr().out
    row, = csv.DictReader((key / "figure2.csv").open())
    assert [row[name] for name in ("system", "against", "wins", "ties", "losses")] == ["ours", "a <b>&", "6", "1", "1"]
    assert float(row["share"]) == pytest.approx(6 / 7) and float(row["p"]) == pytest.approx(2 * 8 / 2**7)
    assert "ours against a <b>&     6     1       1  0.86 [0.42, 1.00]   0.125" in printed and "listeners: 2" in printed
    drawing = (key / "figure2.svg").read_text()
    assert "a &lt;b&gt;&amp;" in drawing and "<b>" not in drawing and ">6</text>" in drawing
    widths = [float(width) for width in re.findall(r'<rect x="[\d.]+" y="\d+" width="([\d.]+)"', drawing)]
    assert widths == [300, 50, 50]


def test_the_sign_test_and_its_interval_are_exact():
    """Closed forms; the interval leaves out one half exactly where p < 0.05; thousands of votes are fine."""
    assert figure2.sign_test(5, 0) == pytest.approx(2 / 2**5) and figure2.sign_test(1, 9) == pytest.approx(2 * 11 / 2**10)
    assert figure2.sign_test(0, 0) == figure2.sign_test(3, 3) == 1 and figure2.interval(0, 0) == (0, 1)
    assert figure2.interval(0, 10) == pytest.approx((0, 1 - 0.025 ** (1 / 10)))
    assert figure2.interval(7, 3) == pytest.approx((0.3475, 0.9333), abs=1e-4)            # of tables
    for wins in range(21):
        low, high = figure2.interval(wins, 20 - wins)
        assert (low <= 0.5 <= high) == (figure2.sign_test(wins, 20 - wins) >= 0.05)
    assert figure2.interval(3000, 2000) == pytest.approx((0.586, 0.614), abs=1e-3)


def test_votes_that_are_damaged_doubled_or_foreign_are_refused_by_name(key, capsys):
    """One sentence that names the file and what is wrong, status 2; nothing is counted."""
    good = votes(key, "good.csv", 1, "AAAAAAAA")
    text = Path(good).read_text()

    def bad(name, content):
        (key / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(key / name)
    lines = text.splitlines(keepends=True)
    for named, wrong, files in (
            ("cut.csv", "damaged", [bad("cut.csv", text[:-12])]),
            ("short.csv", "damaged", [bad("short.csv", "".join(lines[:-1]))]),
            ("empty.csv", "damaged", [bad("empty.csv", "")]),
            ("zip.csv", "damaged", [bad("zip.csv", b"PK\x03\x04\xff\xfe")]),
            ("answer.csv", "damaged", [bad("answer.csv", text.replace("8,A", "8,C"))]),
            ("mixed.csv", "damaged", [bad("mixed.csv", text.replace(",1,8,", ",2,8,"))]),
            ("twice.csv", "doubled votes: of question 8", [bad("twice.csv", text + lines[-1])]),
            ("copy.csv", "doubled votes: those of listener 1", [good, bad("copy.csv", text)]),
            ("foreign.csv", "another page: feedf00d", [good, bad("foreign.csv", text.replace("0badcafe", "feedf00d"))]),
            ("missing.csv", "cannot be read", [str(key / "missing.csv")])):
        with pytest.raises(SystemExit) as end:
            sample.run(lambda: evaluate.main(["--votes", *files, "--out", str(key)]))
        said = capsys.readouterr().err.strip()
        assert end.value.code == 2 and named in said and wrong in said and "\n" not in said, said
    with pytest.raises(sample.UserError, match="figure2.json cannot be used"):
        evaluate.main(["--votes", good, "--out", str(key / "elsewhere")])
    assert not (key / "figure2.csv").exists()
    spreadsheet = bad("spreadsheet.csv", b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    evaluate.main(["--votes", spreadsheet, "--out", str(key)])


def test_clips_are_paired_by_their_place_in_the_folder(tmp_path):
    """Two albums may both have a track 01; two files of one name in one place are refused."""
    for path in ("a/01.wav", "b/01.wav"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).touch()
    assert figure2.clips_in(tmp_path) == {f"{album}/01": str(tmp_path / album / "01.wav") for album in "ab"}
    (tmp_path / "a" / "01.mp3").touch()
    with pytest.raises(sample.UserError, match="01.mp3 and .*01.wav have the same name"):
        figure2.clips_in(tmp_path)


def test_systems_that_cannot_be_compared_end_in_a_sentence(tests, tmp_path):
    """One folder, a name twice, no common file, a region beyond the clips."""
    quiet, loud = f"q={tests / 'quiet system'}", f"l={tests / 'loud system'}"
    for systems, said in (([quiet], "two or more"), ([quiet, quiet], "two or more"), ([quiet, "folder"], "two or more"),
                          ([quiet, f"x={tmp_path}"], "the same name"), ([quiet, loud, "--region", "2", "9"], "--region")):
        with pytest.raises(sample.UserError, match=said):
            evaluate.main(["--figure2", *systems, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
