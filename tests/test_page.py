"""examples/page.py and figure2.py: their pages, in a browser too where there is one, and votes."""
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

import sample
from examples import figure2, page, spectrograms

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
         "disable-background-networking", "disable-component-update", "disable-sync",
         "autoplay-policy=no-user-gesture-required"]
NAME = "Ünï <b>x<b> &"


class Browser:
    """Headless Chromium, by the W3C WebDriver protocol and Chromium's own for what that lacks."""

    def __init__(self, folder):
        self.downloads = folder / "downloads"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([DRIVER, f"--port={port}"], **quiet)
        flags = [*FLAGS, f"user-data-dir={folder / 'profile'}"]
        options = {"binary": CHROMIUM, "args": [f"--{flag}" for flag in flags],
                   "prefs": {"download.default_directory": str(self.downloads)}}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options,
                  "goog:loggingPrefs": {"browser": "ALL"}}
        self.url = f"http://127.0.0.1:{port}/session"
        for _ in range(100):
            with contextlib.suppress(urllib.error.URLError):
                made = self.post("", capabilities={"alwaysMatch": wanted})
                break
            time.sleep(0.1)
        self.url += "/" + made["sessionId"]

    def post(self, path, **body):
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), kind)
        return json.load(urllib.request.urlopen(request, timeout=120))["value"]

    def run(self, script, *args):
        return self.post("/execute/sync", script=script, args=args)

    def text(self, selector):
        return self.run(f"return document.querySelector('{selector}').textContent")

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
            request = urllib.request.Request(self.url, method="DELETE")
            urllib.request.urlopen(request, timeout=30)
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
    tap.onaudioprocess = ({inputBuffer, playbackTime}) => blocks.push([
      Math.round(playbackTime * 44100 / 16384),
      ...[0, 1].map(i => Array.from(inputBuffer.getChannelData(i)))])
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
    """What goes to the loudspeakers, (n, 2), while listen() works on the page.

    Where the machine is too busy to record all of it, again.
    """
    script = browser.cdp("Page.addScriptToEvaluateOnNewDocument", source=TAP)
    try:
        for _ in range(4):
            browser.open(path)
            listen()
            time.sleep(0.8)                 # a block is 0.4 s
            blocks = browser.run("return blocks")
            if np.all(np.diff([place for place, *_ in blocks]) == 1):
                return np.concatenate([np.array(sound, float).T for _, *sound in blocks])
        pytest.skip("this machine is too busy to record in real time")
    finally:
        browser.cdp("Page.removeScriptToEvaluateOnNewDocument", **script)
        browser.complaints()                # the recorder's own


def make_edit(folder, left, right, count=2):
    """The page of an infill of 3 to 4 s, as if sample.py had made `count` variations of it.

    left, right: the channels of the track before. In the region, `right` grows by 0.01 each time.
    """
    before = np.stack([left, np.broadcast_to(right, left.shape)], 1)
    source = folder / f"{NAME}.wav"
    sf.write(source, before, 44100, subtype="FLOAT")
    start, end = 3 * 44100, 4 * 44100
    paths = []
    for i in range(count):
        paths.append(folder / f"{NAME}.infill{f'-{i + 1}' if i else ''}.wav")
        after = before.copy()
        after[start:end, 1] += 0.01 * (i + 1)
        sf.write(paths[i], after, 44100, subtype="FLOAT")
        facts = {"command": "python sample.py --task infill", "times": "new audio 0:03 to 0:04",
                 "output": str(paths[i]), "seed": 0, "variation": i, "task": "infill",
                 "input": str(source), "input2": None, "fade": None, "start": start, "end": end,
                 "context": 0, "origin": 0,
                 "sha256": {str(source): sample.file_digest(source)}}
        paths[i].with_suffix(".json").write_text(json.dumps(facts))
    page.main([str(path) for path in paths])
    return paths[0].with_suffix(".html")


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """The page of an edit of 8 s whose left channel tells the time, from -0.4 to 0.4.

    The right channel tells the version: 0.01, 0.02 and 0.03.
    """
    folder = tmp_path_factory.mktemp("edited")
    return make_edit(folder, np.linspace(-0.4, 0.4, 8 * 44100, endpoint=False), 0.01)


def data_of(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*)</script>', text).group(1))


def sounds_of(path):
    """Its sounds, decoded: [(2, n)]"""
    sounds = []
    for text in re.findall(r'id="sound\d+">(.*)</script>', path.read_text(encoding="utf-8")):
        file = io.BytesIO(base64.b64decode(text))
        sounds.append(sf.read(file, always_2d=True)[0].T)
    return sounds


def rows_of(data):
    """What a PNG of spectrograms.py holds: (height, 1 + width), with the filter of each row."""
    width, height = struct.unpack(">II", data[16:24])
    start, end = data.index(b"IDAT") + 4, data.index(b"IEND") - 8
    return np.frombuffer(zlib.decompress(data[start:end]), np.uint8).reshape(height, width + 1)


# ---- the page of an edit -------------------------------------------------------------------------

def test_the_page_of_an_edit_holds_all_versions_and_loads_nothing(edited):
    """Before and each variation, lossless; what made them; names as text; no address to load."""
    data, text = data_of(edited), edited.read_text(encoding="utf-8")
    item, = data["items"]
    names = [version["name"] for version in item["versions"]]
    assert names == ["Before", "Variation 1", "Variation 2"]
    assert item["versions"][2]["about"] == f"{NAME}.infill-2.wav, seed 0"
    assert "--task infill" in data["command"] and data["title"] == f"{NAME}.infill"
    assert item["mark"] == [3, 4] and item["loop"] == [2, 5]
    for i, sound in enumerate(sounds_of(edited)):
        assert sound.shape == (2, 8 * 44100)
        assert np.allclose(sound[0], np.linspace(-0.4, 0.4, 8 * 44100), atol=1e-3)
        assert np.allclose(sound[1, 140000:170000], 0.01 * (i + 1), atol=1e-4)
        assert np.allclose(sound[1, :88200], 0.01, atol=1e-4)
    assert "<b>" not in text
    assert not re.search(r"https?://|src=|href=\"|@import|url\(", text)
    assert len(page.TEMPLATE.read_text().splitlines()) <= 250


MONO = ["--input", "mono.flac"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with 2 s of mono at 48 kHz; pages hold little more than the new audio."""
    t = np.arange(2 * 48000) / 48000
    tones = 0.2 * np.sin(2 * np.pi * 220 * t) * np.sin(9 * t) + 0.1 * np.sin(2 * np.pi * 331 * t)
    sf.write(tmp_path / "mono.flac", tones, 48000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "LOSSLESS", 1.0)
    monkeypatch.setattr(page, "CONTEXT", 0.1)
    return tmp_path


def arguments(studio, task):
    return ["--task", *task, "--checkpoint", str(studio / "latent.pt"), "--steps", "1", "--page"]


@pytest.mark.parametrize("task, seconds, mark", [
    (["unconditional", "--length", "1"], 1, (0, 1)),
    (["continuation", *MONO, "--start", "1.5", "--length", "1"], 2.5, (1.5, 2.5)),
    (["continuation", *MONO, "--length", "1", "--output", "out.flac"], 3, (2, 3)),
    (["infill", *MONO, "--start", "1", "--end", "1.2", "--splice", "0"], 2, (1, 1.2)),
    (["transition", *MONO, "--input2", "mono.flac", "--fade", "0.5"], 3.5, (1.5, 2))],
    ids=["unconditional", "continuation", "longer", "infill", "transition"])
def test_every_task_has_a_page(task, seconds, mark, studio, folder):
    """Mono at 48 kHz, flac, longer than before, and with no track before at all.

    A page that is there is not lost.
    """
    sample.main(arguments(studio, task))
    made, = folder.glob("*.html")
    item, = data_of(made)["items"]
    names = [version["name"] for version in item["versions"]]
    assert names == ["Before", "Variation 1"][task[0] == "unconditional":]
    assert item["total"] == pytest.approx(seconds)
    assert item["mark"] == pytest.approx(mark, abs=0.004)

    sounds, count = sounds_of(made), len(names)
    lengths = [sound.shape[-1] / 44100 for sound in sounds]
    assert lengths[:count] == pytest.approx([item["to"] - item["from"]] * count, abs=1e-3)
    assert lengths[count:] == pytest.approx([seconds] * len(item["outside"]), abs=1e-3)
    if "--splice" in task:                  # then the contexts that the model had are new too
        assert item["from"] < 0.83 and item["to"] > 1.36
    elif item["outside"]:
        assert item["to"] - item["from"] < 1.3
    if count > 1:
        before, after = sounds[0][0], sounds[1][0]
        a = round((item["mark"][0] - item["from"]) * 44100)
        assert not np.array_equal(before[a + 100:a + 5000], after[a + 100:a + 5000])
        if "1.5" in task:                   # what stood there, though it was cut off
            assert np.abs(before[a:a + 20000]).max() > 0.1
        if "--splice" not in task:
            assert np.allclose(before[:a - 1500], after[:a - 1500], atol=0.02)

    for path in {*folder.iterdir()} - {made, folder / "mono.flac"}:
        path.unlink()
    with pytest.raises(sample.UserError, match="html exists"):
        sample.main(arguments(studio, task))


@pytest.mark.parametrize("task", [
    ["unconditional", "--length", "1"],
    ["continuation", *MONO, "--start", "1.5", "--length", "1", "--num", "2"],
    ["infill", *MONO, "--start", "1", "--end", "1.2", "--splice", "0"],
    ["loop", *MONO, "--start", "0.5", "--end", "1.9", "--fade", "0.4"],
    ["intro", *MONO, "--length", "0.5"],
    ["transition", *MONO, "--input2", "mono.flac", "--fade", "0.5"]], ids=lambda task: task[0])
def test_a_page_that_is_made_later_is_the_same(task, studio, folder):
    """page.py with the edits gives, byte for byte, what sample.py --page had written."""
    sample.main(arguments(studio, task))
    made, = folder.glob("*.html")
    text = made.read_bytes()
    made.unlink()
    page.main([str(path) for path in sorted(folder.glob("*.wav"), key=lambda path: path.stem)])
    assert made.read_bytes() == text


@pytest.fixture
def short_pages(monkeypatch):
    """Pages hold a third of a second around the new audio, and the rest as one MP3."""
    monkeypatch.setattr(page, "LOSSLESS", 4.0)
    monkeypatch.setattr(page, "CONTEXT", 0.1)


@pytest.mark.parametrize("second", [1, 3.4], ids=["outside", "inside"])
def test_peaks_above_full_scale_turn_the_whole_page_down(second, tmp_path, short_pages):
    """Of a float track, wherever they are: the excerpts and the rest by the same gain."""
    left = np.zeros(8 * 44100)
    left[int(second * 44100):][:8000] = 2.0
    *versions, whole = sounds_of(make_edit(tmp_path, left, 0.4))
    assert len(versions) == 3 and whole.shape[-1] > 7.9 * 44100
    for i, sound in enumerate(versions):
        assert np.allclose(sound[1, :4000], 0.2, atol=1e-3)
        assert np.allclose(sound[1, 20000:30000], 0.2 + 0.005 * i, atol=1e-3)
    assert np.median(whole[1]) == pytest.approx(0.2, abs=0.01)
    assert np.median(whole[0, int(second * 44100):][1000:7000]) == pytest.approx(1, abs=0.05)


def test_a_louder_version_is_brighter(tmp_path, short_pages):
    """Pictures of all versions are on one scale: the track before is 26 dB below the new audio."""
    tone = np.sin(2 * np.pi * 1000 * np.arange(8 * 44100) / 44100)
    made = make_edit(tmp_path, 0.01 * tone, 0.0, count=1)
    loud = 0.01 * tone
    loud[3 * 44100:4 * 44100] *= 20
    sf.write(made.with_suffix(".wav"), np.stack([loud, loud], 1), 44100, subtype="FLOAT")
    page.main([str(made.with_suffix(".wav"))])
    pictures = [base64.b64decode(version["picture"])
                for version in data_of(made)["items"][0]["versions"]]
    before, after = (int(rows_of(data)[:, 1:].max()) for data in pictures)
    assert after >= 250 and before < 200


def test_silence_has_a_page(tmp_path, short_pages):
    """Its outline is a line in the middle."""
    made = make_edit(tmp_path, np.zeros(8 * 44100), 0.0, count=1)
    silent = made.with_suffix(".wav")
    sf.write(silent, np.zeros((8 * 44100, 2)), 44100)
    page.main([str(silent)])
    heights = re.findall(r",([\d.-]+)", data_of(made)["items"][0]["wave"])
    assert {float(y) for y in heights} == {50}


@pytest.mark.parametrize("count, keys", [(1, "1 to 2"), (9, "1 to 9")])
def test_the_help_names_the_keys_that_there_are(count, keys, tmp_path, short_pages):
    """One for each version, the track before among them, but no more than nine."""
    data = data_of(make_edit(tmp_path, np.zeros(5 * 44100), 0.1, count))
    assert len(data["items"][0]["versions"]) == count + 1 and f"{keys} switch" in data["help"]


def test_a_choice_is_remembered_by_what_was_heard(tmp_path, short_pages):
    """Pages of one name, of other sounds, do not share it."""
    ids = []
    for right in (0.1, 0.2, 0.1):
        ids.append(data_of(make_edit(tmp_path, np.zeros(5 * 44100), right, count=1))["id"])
    assert ids[0] == ids[2] != ids[1]


def test_edits_that_have_no_page_end_in_a_sentence(edited, tmp_path):
    """A file without its .json, a .json that is damaged or lacks a key, two edits, a lost track."""
    first, second = (edited.with_name(f"{NAME}.infill{i}.wav") for i in ("", "-2"))
    facts = json.loads(second.with_suffix(".json").read_text())

    def edit(name, text):
        shutil.copy(second, tmp_path / name)
        if text:
            (tmp_path / name).with_suffix(".json").write_text(text)
        return str(tmp_path / name)

    without_end = {key: value for key, value in facts.items() if key != "end"}
    for paths, said in (
            ([edit("alone.wav", None)], "alone.json is missing"),
            ([edit("words.wav", "words")], "words.json is damaged"),
            ([edit("list.wav", "3")], "list.json is damaged"),
            ([edit("old.wav", json.dumps(without_end))], "old.json lacks end"),
            ([str(first), edit("other.wav", json.dumps(facts | {"start": 5}))],
             "other.wav and .*infill.wav are not versions of one edit"),
            ([edit("lost.wav", json.dumps(facts | {"input": "no.wav"}))],
             "no.wav, .* is not there")):
        with pytest.raises(sample.UserError, match=said):
            page.main(paths)
    assert not list(tmp_path.glob("*.html"))


def test_a_page_is_of_what_was_edited(edited, tmp_path):
    """What is no edit, is gone, cut or replaced ends in a sentence, and so does a lost track.

    As `page.py clip.infill*` gives all files; and a page of the user's own stays.
    """
    make_edit(tmp_path, 0.1 * np.ones(8 * 44100), 0.01).unlink()
    one, two = (tmp_path / f"{NAME}.infill{i}.wav" for i in ("", "-2"))

    def refused(paths, said):
        with pytest.raises(sample.UserError, match=said):
            page.main([str(path) for path in paths])

    refused([one.with_suffix(".json")], "infill.json is no .wav or .flac file")
    refused(["."], "no .wav or .flac file")
    one.with_suffix(".html").write_text("my own page")
    refused([one, two], "infill.html is no page of edits")
    two.unlink()
    refused([one, two], "infill-2.wav cannot be read .no such file")
    two.write_text("no audio")
    refused([one, two], "infill-2.wav cannot be read .damaged, or not audio")
    sf.write(two, np.zeros((100, 2)), 44100)
    refused([one, two], "are not versions of one edit")
    refused([two], "infill-2.wav is shorter, or of another rate")
    sf.write(two, np.zeros((8 * 44100, 2)), 8000)
    refused([two], "infill-2.wav is shorter, or of another rate")
    track = Path(json.loads(one.with_suffix(".json").read_text())["input"])
    sf.write(track, np.zeros((8 * 44100, 2)), 44100)
    refused([one], "has changed since it was edited")
    assert one.with_suffix(".html").read_text() == "my own page"


def test_a_tone_is_bright_at_its_label_and_loud_in_its_outline(tmp_path):
    """1 kHz in the right row of the picture, as the PNG has it; the outline reaches its peaks."""
    t = torch.arange(44100) / 44100
    tone = (torch.sin(2 * torch.pi * 1000 * t) * torch.linspace(0, 1, 44100)).expand(2, -1)
    level = page.spectrogram(tone.T.numpy(), 44100, 1)
    share = dict(page.FREQUENCIES)["1 kHz"]
    assert level[:, 800].argmax() == pytest.approx(share * len(level), abs=3)
    entries = page.picture(level, level.max())
    data = page.png(entries, page.palette())
    rows = rows_of(data)
    assert np.array_equal(rows[:, 1:], entries) and entries.max() >= 250 and not rows[:, 0].any()
    outline = page.outline(tone, 1.0)
    heights = np.array([float(y) for y in re.findall(r",([\d.]+)", outline)])
    assert heights.min() == pytest.approx(2, abs=0.2)
    assert heights.max() == pytest.approx(98, abs=0.2)
    assert len(heights) == 2000 and abs(heights[0] - 50) < 0.5 and np.argmin(heights) > 950


def test_versions_switch_at_the_same_sample_and_the_region_loops(edited, browser):
    """Recorded from the loudspeakers while keys are pressed.

    The time goes on through every switch, without a gap; the loop's end jumps back to its start.
    """
    def listen():
        browser.press(" ")
        browser.until("since !== null && blocks.length > 1")
        for key in "312":
            browser.press(key)
            browser.until(f"version === {int(key) - 1}")
            time.sleep(0.6)
        time.sleep(2)
        assert browser.text("[data-key=space]") == "Pause"
        browser.press(" ")
        browser.until("since === null")
    sound = record(browser, edited, listen)

    # Nowhere silent in between.
    on = np.flatnonzero(sound[:, 1] > 0.001)
    left, right = sound[on[0]:on[-1] + 1].T
    assert right[500:-500].min() > 0.009
    assert on[-1] - on[0] + 1 == len(on) and len(on) > 3.5 * 44100

    # Seconds of the track, with a jump at the end of the loop.
    second = (left[500:-500] + 0.4) * 10
    jumps = np.flatnonzero(np.abs(np.diff(second)) > 0.01)
    assert len(jumps) >= 1 and np.allclose(second[jumps], 5, atol=0.01)
    assert np.allclose(second[jumps + 1], 2, atol=0.01)
    for part in np.split(second, jumps + 1):
        late = part - part[0] - np.arange(len(part)) / 44100
        assert np.abs(late).max() < 0.001
    inside = (second > 3.1) & (second < 3.9)
    versions = set(np.round(100 * right[500:-500][inside]).astype(int))
    assert versions >= {1, 2} and browser.complaints() == []


def test_beyond_the_excerpt_the_track_goes_on_in_step(tmp_path, browser, monkeypatch):
    """A tone passes both borders of a lossless excerpt into the whole track, which is MP3."""
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
    """By keyboard alone: choose, reload, tab to a button and press it. Names are never html."""
    browser.open(edited)
    browser.press("3")
    browser.press("c")
    browser.open(edited)
    assert f"{NAME}.infill-2.wav" in browser.text("#status")
    assert browser.text("h1") == f"{NAME}.infill"
    assert browser.run("return document.querySelectorAll('b').length") == 0
    focused = []
    for _ in range(7):
        browser.press("\ue004")
        focused.append(browser.run("return document.activeElement.textContent"))
    assert focused[:3] == ["Play", "Loop the marked part", "Choose this one"]
    assert focused[4:] == ["Before", "Variation 1", "Variation 2"]
    browser.press("\ue007")
    assert browser.run("return version") == 2
    browser.run("const all = document.querySelector('#overview'); "
                "all.onclick({offsetX: 0.9 * all.clientWidth})")
    browser.until("!looping && since !== null && where() > 7")      # beyond the loop, which ends
    browser.run("move(0, false)")
    assert names(browser) >= {"Play", "Loop the marked part", "Choose this one", "Before",
                              "Variation 1", "Variation 2"}
    assert browser.complaints() == []


def names(browser):
    """What a screen reader calls the buttons and sliders; each has a name."""
    nodes = browser.cdp("Accessibility.getFullAXTree")["nodes"]
    controls = [node for node in nodes
                if node.get("role", {}).get("value") in ("button", "slider")]
    found = [node["name"]["value"] for node in controls]
    assert all(found)
    return set(found)


def test_pages_fit_narrow_and_wide_windows_in_dark_and_light(edited, tests, browser):
    """Nothing sticks out at 400 and 1280 pixels; the background follows the preference."""
    screen = {"height": 900, "deviceScaleFactor": 1, "mobile": False}
    for path in (edited, tests / "out" / "figure2.html"):
        for width in (400, 1280):
            browser.cdp("Emulation.setDeviceMetricsOverride", width=width, **screen)
            shades = []
            for scheme in ("light", "dark"):
                feature = {"name": "prefers-color-scheme", "value": scheme}
                browser.cdp("Emulation.setEmulatedMedia", features=[feature])
                browser.open(path)
                assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
                shade = browser.run(
                    "return getComputedStyle(document.documentElement).backgroundColor")
                shades.append(sum(map(int, re.findall(r"\d+", shade)[:3])))
            assert shades[0] > 600 > 200 > shades[1]
    browser.cdp("Emulation.clearDeviceMetricsOverride")


@pytest.mark.slow
def test_eight_variations_of_four_minutes_stay_under_30_mb_and_open_in_2_s(tmp_path, browser):
    """Of noise, which no codec makes small."""
    noise = np.random.default_rng(0).standard_normal((2, 240 * 44100)).clip(-3, 3)
    path = make_edit(tmp_path, *(0.25 * noise), count=8)
    assert path.stat().st_size < 30e6
    began = time.time()
    browser.open(path)
    browser.until("document.querySelectorAll('article img').length === 9")
    assert time.time() - began < 2
    browser.press(" ")
    browser.until("since !== null")


# ---- the blind test ------------------------------------------------------------------------------

SYSTEMS = ("quiet system", "loud system", "original")


@pytest.fixture(scope="module")
def tests(tmp_path_factory):
    """Three systems' folders, of three clips each, the second one louder.

    out/ has their page, of nine pairs.
    """
    root = tmp_path_factory.mktemp("test")
    for k, system in enumerate(SYSTEMS):
        (root / system).mkdir()
        for clip in range(3):
            sound = np.random.default_rng([clip, k]).standard_normal((3 * 44100, 2))
            sound *= (0.05, 0.2, 0.05)[k]
            sound[:44100] = 0.1 * np.random.default_rng(clip).standard_normal((44100, 2))
            sf.write(root / system / f"{clip}.wav", sound, 44100)
    write_test(root, root / "out")
    return root


def write_test(root, out, *flags):
    systems = [f"{name}={root / name}" for name in SYSTEMS]
    figure2.main([*systems, "--region", "1", "2", "--out", str(out), *flags])
    return json.loads((out / "figure2.json").read_text())


def first_channel(tests, question, letter):
    """Of the file behind A or B"""
    return sf.read(tests / question[letter] / f"{question['clip']}.wav")[0].T[0]


def test_the_blind_test_is_blind_and_level_matched(tests):
    """Any two systems meet once per clip; the page names none of them; both are equally loud."""
    path = tests / "out" / "figure2.html"
    key = json.loads(path.with_suffix(".json").read_text())
    asked = {(question["clip"], frozenset((question["A"], question["B"])))
             for question in key["questions"]}
    assert len(key["questions"]) == len(asked) == 9 and {len(pair) for _, pair in asked} == {2}
    text, sounds = path.read_text(encoding="utf-8"), sounds_of(path)
    assert not any(name in text for name in (*key["systems"], str(tests)))
    items = data_of(path)["items"]
    assert len(items) == 9 and all(item["mark"] == [1, 2] for item in items)
    for item, question in zip(items, key["questions"]):
        A, B = (sounds[version["sound"]] for version in item["versions"])
        assert 20 * np.log10(A.std() / B.std()) == pytest.approx(0, abs=0.02)
        for letter, sound in (("A", A), ("B", B)):
            assert np.corrcoef(sound[0], first_channel(tests, question, letter))[0, 1] > 0.999


def test_the_order_of_the_blind_test_is_the_seeds(tests, tmp_path):
    """The same seed, the same page; either system of a pair comes first; not clip after clip."""
    path = tests / "out" / "figure2.html"
    key = json.loads(path.with_suffix(".json").read_text())
    again = write_test(tests, tmp_path / "again")
    assert again == key
    assert (tmp_path / "again" / "figure2.html").read_bytes() == path.read_bytes()
    with pytest.raises(sample.UserError, match="again holds another test"):
        write_test(tests, tmp_path / "again", "--seed", "1")
    assert write_test(tests, tmp_path / "again") == again
    other = write_test(tests, tmp_path / "other", "--seed", "1")
    first = [question["A"] for question in key["questions"]]
    assert other["page"] != key["page"]
    assert [question["A"] for question in other["questions"]] != first
    turned = {SYSTEMS.index(question["A"]) > SYSTEMS.index(question["B"])
              for question in key["questions"]}
    assert turned == {True, False}
    clips = [question["clip"] for question in key["questions"]]
    assert sum(one != two for one, two in zip(clips, clips[1:])) > 2
    assert len(write_test(tests, tmp_path / "few", "--clips", "1")["questions"]) == 3


def test_of_long_files_the_region_and_its_context_are_played(tests, tmp_path, monkeypatch):
    """The same seconds of both."""
    monkeypatch.setattr(figure2, "CONTEXT", 0.5)
    key = write_test(tests, tmp_path, "--clips", "1")
    sounds, data = sounds_of(tmp_path / "figure2.html"), data_of(tmp_path / "figure2.html")
    for item, question in zip(data["items"], key["questions"]):
        assert item["mark"] == [0.5, 1.5] and item["total"] == 2
        for letter, version in zip("AB", item["versions"]):
            part = first_channel(tests, question, letter)[22050:22050 + 88200]
            assert np.corrcoef(sounds[version["sound"]][0], part)[0, 1] > 0.999


def test_a_listener_votes_reloads_and_saves_what_votes_reads(tests, browser, capsys):
    """In the browser, by keyboard; a vote before both were played is refused.

    Answers survive a reload. The saved csv comes back through --votes, and counts for the systems
    that were behind A and B.
    """
    key = json.loads((tests / "out" / "figure2.json").read_text())
    browser.open(tests / "out" / "figure2.html")
    browser.press("a")
    assert "both" in browser.text("#status")
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
    pressed = "return document.querySelector('[data-answer=A]').getAttribute('aria-pressed')"
    assert browser.run(pressed) == "true"
    assert names(browser) >= {"A", "B", "A fits better", "Neither", "B fits better", "Next pair",
                              "Save the answers"}
    browser.press("s")
    for _ in range(100):
        files = list(browser.downloads.glob("votes-*.csv"))
        if files:
            break
        time.sleep(0.1)
    file, = files
    figure2.main(["--votes", str(file), "--out", str(tests / "out")])
    assert "listeners: 1" in capsys.readouterr().out

    rows = list(csv.DictReader((tests / "out" / "figure2.csv").open()))
    won, expected = {}, {}
    for row in rows:
        pair = row["system"], row["against"]
        won[pair] = [int(row[name]) for name in ("wins", "ties", "losses")]
        expected[pair] = [0, 0, 0]
    for question, place in zip(key["questions"], (0, 2, 1)):        # A, B, neither
        pair = question["A"], question["B"]
        if pair not in expected:
            pair, place = pair[::-1], 2 - place
        expected[pair][place] += 1
    assert won == expected and browser.complaints() == []


def test_systems_that_cannot_be_compared_end_in_a_sentence(tests, tmp_path):
    """One folder, a name twice, no common file, a region beyond the clips, flags for nothing."""
    quiet, loud = f"q={tests / 'quiet system'}", f"l={tests / 'loud system'}"
    for flags, said in (
            ([], "two or more"), ([quiet], "two or more"), ([quiet, quiet], "two or more"),
            ([quiet, "folder"], "two or more"), ([quiet, f"x={tmp_path}"], "the same name"),
            ([quiet, loud, "--region", "2", "9"], "--region"),
            (["--clips", "0"], "--clips"), (["--votes", "x.csv", "--seed", "0"], "leave out seed"),
            (["--votes", "x.csv", "--region", "1", "2"], "leave out region")):
        with pytest.raises(sample.UserError, match=said):
            figure2.main([*flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_file_with_samples_that_are_not_finite_is_refused_by_name(tests, tmp_path):
    """Such a file would abort the MP3 encoder, and with it the process."""
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in (tests / "loud system").iterdir():
        sf.write(bad / path.name, np.full((44100, 2), np.nan), 44100, "FLOAT", format="WAV")
    with pytest.raises(sample.UserError, match="bad.* has samples that are not finite"):
        figure2.main([f"b={bad}", f"l={tests / 'loud system'}", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_picture_takes_no_tracks_place(tmp_path, capsys):
    """spectrograms.py ends in a sentence where its output is no .png, or a mark is outside."""
    track = tmp_path / "a.wav"
    sf.write(track, 0.1 * np.ones((4410, 2)), 44100)
    before = track.read_bytes()
    picture = str(tmp_path / "a.png")
    for flags, said in (([track], "must end in .png"), ([tmp_path / "no" / "a.png"], "be written"),
                        ([picture, "--mark", "0.2"], "--mark"), ([picture, "--mark=-1"], "--mark"),
                        ([picture, "--mark", "nan"], "--mark")):
        with pytest.raises(SystemExit) as ended:
            spectrograms.main([str(track), str(track), *map(str, flags)])
        assert ended.value.code == 2 and said in capsys.readouterr().err
    assert track.read_bytes() == before and not Path(picture).exists()
    spectrograms.main([str(track), str(track), picture, "--mark", "0", "0.1", "--gap"])
    assert Path(picture).read_bytes().startswith(b"\x89PNG")


# ---- votes ---------------------------------------------------------------------------------------

def votes(root, name, listener, answers):
    """A file as the page saves it."""
    key = json.loads((root / "figure2.json").read_text())
    lines = [f"{key['page']},{listener},{i + 1},{answer}" for i, answer in enumerate(answers)]
    (root / name).write_text("\n".join(["page,listener,question,answer", *lines, ""]))
    return str(root / name)


@pytest.fixture
def key(tmp_path):
    """The folder of a figure2.json: eight questions, in the first four of which "ours" is A."""
    pair = ["ours", "a <b>&"]
    questions = []
    for i in range(8):
        if i == 4:
            pair.reverse()
        questions.append({"clip": str(i), "A": pair[0], "B": pair[1]})
    systems = {"ours": "x", "a <b>&": "y"}
    key = {"page": "0badcafe", "systems": systems, "questions": questions}
    (tmp_path / "figure2.json").write_text(json.dumps(key))
    return tmp_path


def test_votes_are_counted_for_the_systems_behind_the_letters(key, capsys):
    """Two listeners; unanswered questions do not count; table, csv and SVG agree."""
    answers = ["A", "A", "neither", "", "B", "B", "B", "A"]
    one = votes(key, "one.csv", 1, answers)             # ours: 5 wins, 1 tie, 1 loss
    two = votes(key, "two.csv", 2, ["A", "", "", "", "", "", "", ""])
    figure2.main(["--votes", one, two, "--out", str(key)])
    printed = capsys.readouterr().out
    row, = csv.DictReader((key / "figure2.csv").open())
    assert (row["system"], row["against"]) == ("ours", "a <b>&")
    assert (row["wins"], row["ties"], row["losses"]) == ("6", "1", "1")
    assert float(row["share"]) == pytest.approx(6 / 7)
    assert float(row["p"]) == pytest.approx(2 * 8 / 2**7)
    assert "ours against a <b>&     6     1       1  0.86 [0.42, 1.00]   0.125" in printed
    assert "listeners: 2" in printed
    drawing = (key / "figure2.svg").read_text()
    assert "a &lt;b&gt;&amp;" in drawing and "<b>" not in drawing and ">6</text>" in drawing
    widths = re.findall(r'<rect x="[\d.]+" y="\d+" width="([\d.]+)"', drawing)
    assert [float(width) for width in widths] == [300, 50, 50]


def test_the_sign_test_and_its_interval_are_exact():
    """Closed forms; the interval leaves out 1/2 exactly where p < 0.05; thousands of votes."""
    assert figure2.sign_test(5, 0) == pytest.approx(2 / 2**5)
    assert figure2.sign_test(1, 9) == pytest.approx(2 * 11 / 2**10)
    assert figure2.sign_test(0, 0) == figure2.sign_test(3, 3) == 1
    assert figure2.interval(0, 0) == (0, 1)
    assert figure2.interval(0, 10) == pytest.approx((0, 1 - 0.025 ** (1 / 10)))
    assert figure2.interval(7, 3) == pytest.approx((0.3475, 0.9333), abs=1e-4)      # of tables
    for wins in range(21):
        low, high = figure2.interval(wins, 20 - wins)
        assert (low <= 0.5 <= high) == (figure2.sign_test(wins, 20 - wins) >= 0.05)
    assert figure2.interval(3000, 2000) == pytest.approx((0.586, 0.614), abs=1e-3)


HEAD = "page,listener,question,answer\n"
GOOD = HEAD + "".join(f"0badcafe,1,{i},A\n" for i in range(1, 9))


@pytest.mark.parametrize("said, content", [
    ("damaged", GOOD[:-12]),
    ("damaged", GOOD.replace("0badcafe,1,8,A\n", "")),
    ("damaged", ""),
    ("damaged", "PK\x03\x04\udcff\udcfe"),
    ("damaged", GOOD.replace("8,A", "8,C")),
    ("damaged", GOOD.replace(",1,8,", ",2,8,")),
    ("doubled votes: of question 8", GOOD + "0badcafe,1,8,A\n"),
    ("doubled votes: those of listener 1", GOOD),
    ("another page: feedf00d", GOOD.replace("0badcafe", "feedf00d")),
    ("cannot be read", None)],
    ids=["cut", "short", "empty", "zip", "answer", "mixed", "twice", "copy", "foreign", "missing"])
def test_votes_that_are_damaged_doubled_or_foreign_are_refused_by_name(said, content, key, capsys):
    """One sentence that names the file and what is wrong, status 2; nothing is counted."""
    files = [key / "bad.csv"]
    if content is not None:
        files[0].write_bytes(content.encode(errors="surrogateescape"))
    if content == GOOD:
        files.insert(0, Path(votes(key, "good.csv", 1, "AAAAAAAA")))
    with pytest.raises(SystemExit) as end:
        command = ["--votes", *map(str, files), "--out", str(key)]
        sample.run(lambda: figure2.main(command))
    printed = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "bad.csv" in printed and said in printed, printed
    assert "\n" not in printed and not (key / "figure2.csv").exists()


def test_votes_need_their_page_and_may_come_from_a_spreadsheet(key):
    """The folder of another page is refused; a byte order mark and line ends of Windows are not."""
    good = votes(key, "good.csv", 1, "AAAAAAAA")
    with pytest.raises(sample.UserError, match="figure2.json cannot be used"):
        figure2.main(["--votes", good, "--out", str(key / "elsewhere")])
    text = Path(good).read_text().replace("\n", "\r\n")
    (key / "spreadsheet.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    figure2.main(["--votes", str(key / "spreadsheet.csv"), "--out", str(key)])
    assert (key / "figure2.csv").exists()
