"""train.py on much music and in many processes, played on two cores.

Files without audio stand for a large collection, processes of gloo for GPUs, folders for disks.
"""
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

import sample
import train
from conftest import save_checkpoint

ROOT = Path(train.__file__).parent
RATE = sample.SAMPLE_RATE


# ---- the index of files --------------------------------------------------------------------------

def opened(monkeypatch):
    """The paths that are probed from now on, in a list that grows."""
    paths = []
    probe = sample.probe
    monkeypatch.setattr(sample, "probe", lambda path: paths.append(path) or probe(path))
    return paths


def test_a_file_is_probed_again_only_when_it_has_changed(tmp_path, monkeypatch, capsys):
    """Changed are size or time; new files are found, lost ones forgotten, and one that could not be
    used is looked at each time. A damaged index is made anew."""
    music, index = tmp_path / "music", tmp_path / "files.json"
    music.mkdir()
    for name in "abc":
        sf.write(music / f"{name}.wav", np.zeros((RATE, 2)), RATE)
    (music / "empty.wav").touch()
    paths = opened(monkeypatch)

    def names(samples=RATE):
        paths.clear()
        files = sample.survey([music], samples, "--data", index=index)
        return "".join(path[-5] for path in files), "".join(path[-5] for path in sorted(paths))

    assert names() == ("abc", "abcy")
    assert names() == ("abc", "y") and capsys.readouterr().out.count("it is empty") == 2
    os.utime(music / "b.wav", ns=(0, 0))
    (music / "c.wav").unlink()
    sf.write(music / "d.wav", np.zeros((RATE // 2, 1)), 48000)
    assert names() == ("ab", "bdy")
    assert names(RATE // 4) == ("abd", "y")
    key, entry = list(json.loads(index.read_text()).items())[0]
    for damaged in ("no json", "[1]", "{}", json.dumps({key: entry[:4]}), json.dumps({key: 3}),
                    json.dumps({key: [*entry[:3], 0, 2]}),
                    json.dumps({key: [*entry[:2], "1", 1, 1]})):
        index.write_text(damaged)
        assert names(RATE // 4) == ("abd", "abdy"), damaged


def test_at_most_eighty_hours_are_held_out(monkeypatch, tmp_path):
    """And never more than one file in twenty: of 800, 40 of 4 minutes each, but 20 of 4 hours."""
    for minutes, held_out in ((4, 40), (240, 20)):
        files = {f"/music/{i}.wav": [minutes * 60 * RATE, RATE, 2] for i in range(800)}
        monkeypatch.setattr(train, "survey", lambda *args, files=files, **more: files)
        trained, valid = train.music(Namespace(model="vae", data=["/music"], valid=None,
                                               windows=[1], out=tmp_path))
        assert len(valid.paths) == held_out and len(trained.paths) == 800 - held_out


@pytest.mark.slow
def test_a_hundred_thousand_known_files_are_soon_ready(tmp_path, monkeypatch):
    """Under 5 s of CPU from the options to the clips, and no file is opened; a clip costs no look
    at all files, and is the same after a resume."""
    index, known = tmp_path / "files.json", {}
    for folder in range(100):
        (tmp_path / "music" / str(folder)).mkdir(parents=True)
        for i in range(1000):
            path = tmp_path / "music" / str(folder) / f"{i:06d}.mp3"
            path.touch()
            known[str(path)] = [*sample.stamp(path), 240 * RATE + i, RATE, 2]
    index.write_text(json.dumps(known))
    paths = opened(monkeypatch)
    monkeypatch.setattr(train.AudioFiles, "read", lambda self, i, start, n: np.full(
        (2, n), i + start / 1e9, np.float32))
    options = Namespace(model="vae", data=[str(tmp_path / "music")], valid=None, windows=[2**17],
                        out=tmp_path)

    def ready():
        source, held_out = train.music(options)
        assert len(source.paths) + len(held_out.paths) == 100_000
        return train.Clips(source, options.windows, lambda *_: {}, [], 0)

    before = time.process_time()
    clips = ready()
    spent = time.process_time() - before
    print(f"start: {spent:.2f} s of CPU")
    assert paths == [] and spent < 5

    before = time.process_time()
    with monkeypatch.context() as patch:
        patch.setattr(np, "cumsum", None)
        for k in range(200):
            clips.source.crop(k / 200, 16)
    print(f"crop: {(time.process_time() - before) / 200 * 1e6:.0f} us of CPU")
    assert np.array_equal(ready().clip(12345)["x"], clips.clip(12345)["x"])


# ---- one update, whatever the processes and micro-batches ----------------------------------------

# Three steps in float64, of windows in turns: in float32, AdamW makes rounding into steps.
UPDATES = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import torch
import train
to_device, make_objective = train.to_device, train.make_objective
train.MEASURED["tiny"] = train.VALIDATED = 2
train.play = lambda *given: None
train.make_objective = lambda o, net, vae, denoiser: make_objective(
    o, net, vae and vae.to(kind), denoiser).to(kind)
train.to_device = lambda batch, device: {
    name: x.to(kind) if x.is_floating_point() else x
    for name, x in to_device(batch, device).items()}
folder, micro_batch, models = sys.argv[2], sys.argv[3], sys.argv[4:]
for model in models:
    kind = torch.float32 if model == "decoder" else torch.float64   # its discriminator has float32
    more = ["--vae", folder + "/vae.pt"] if model in ("latent", "decoder") else []
    train.main(["--model", model, "--size", "tiny", "--steps", "3", "--batch", "8", "--out",
                f"{folder}/{train.WORLD}-{micro_batch}/{model}", "--device", "cpu",
                "--micro-batch", micro_batch, "--windows", "0.2", "0.4", "--workers", "1", *more])
train.sample.leave_processes()
"""


def updates(folder, processes, micro_batch, models):
    """{model: its weights after a run of UPDATES}"""
    (folder / "updates.py").write_text(UPDATES)
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*python, folder / "updates.py", ROOT, folder, micro_batch, *models]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[:3000]
    weights = {}
    for model in models:
        state = sample.load_state(folder / f"{processes}-{micro_batch}" / model / "state.pt")
        assert state["run_step"] == 3
        weights[model] = torch.cat([w.flatten() for w in state["objective"].values()])
    return weights


@pytest.fixture
def vae_folder(tmp_path):
    make, _, presets = sample.NETS["vae"]
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "vae.pt", "vae", make(presets["tiny"]))
    return tmp_path


def difference(a, b):
    return {model: ((a[model] - b[model]).norm() / b[model].norm()).item() for model in a}


@pytest.mark.slow
def test_micro_batches_change_nothing(vae_folder):
    """Of 3 clips of the longest window, in batches of 8: the weights after three steps are the
    same, also of a latent model that meets its own error, in only some of the micro-batches."""
    models = ["latent", "waveform", "classifier"]
    found = difference(updates(vae_folder, 1, 3, models), updates(vae_folder, 1, 8, models))
    print(found)
    assert max(found.values()) < 1e-6


@pytest.mark.slow
def test_eight_processes_make_the_update_of_one(vae_folder):
    """Two clips or one of each in turns, in micro-batches of one, against one process and all clips
    at once: weights after three steps, in norm. Every model runs; a VAE and its decoder differ,
    since they take a deviation, and a ratio, over one micro-batch."""
    models = ["latent", "waveform", "classifier", "vae", "decoder"]
    found = difference(updates(vae_folder, 8, 1, models), updates(vae_folder, 1, 8, models))
    print(found)
    assert max(found[model] for model in models[:3]) < 1e-6
    assert max(found.values()) < 0.05


# ---- the loop ------------------------------------------------------------------------------------

def test_numbers_are_looked_at_together_and_logged_one_by_one(tmp_path, monkeypatch):
    """On a device whose numbers are looked at every fourth step, at each save and at the end: the
    same lines of log.csv, but for the seconds, and the same weights."""
    def fit(out):
        train.main(["--model", "classifier", "--size", "tiny", "--batch", "2", "--steps", "9",
                    "--save-every", "6", "--device", "cpu", "--windows", "0.2", "--out", str(out)])
        lines = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
        weights = sample.load_state(out / "state.pt")["objective"]
        return [line[:1] + line[2:] for line in lines], weights

    monkeypatch.setattr(train, "VALIDATED", 2)
    lines, weights = fit(tmp_path / "each")
    looks, look = [], train.looked_at
    monkeypatch.setattr(train, "looked_at", lambda entries: looks.append(len(entries))
                        or look(entries))
    monkeypatch.setitem(train.LOOK, "cpu", 4)
    again, same_weights = fit(tmp_path / "rarely")
    assert looks == [4, 2, 2, 1] and again == lines and len(lines) == 10
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)


def test_threads_that_load_compute_alone():
    """No team of threads in each of them; the thread that trains keeps its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert set(train.prefetch(lambda k: torch.get_num_threads(), range(4), 2)) == {1}
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_a_run_says_what_it_does_and_how_fast(tmp_path, capsys):
    """Before the first step: model, parameters, device, precision, data, clips, windows, rate, what
    to expect. At the end: seconds a step and clips a second."""
    music_of(tmp_path / "music")
    train.main(["--model", "vae", "--size", "tiny", "--batch", "2", "--steps", "2", "--device",
                "cpu", "--windows", "0.2", "0.4", "--micro-batch", "1", "--data",
                str(tmp_path / "music"), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    net = sample.load_checkpoint(tmp_path / "run" / "model.pt").net
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    for words in (f"vae, size tiny: {millions:.3g} million parameters, on cpu in fp32, 1 process",
                  "data: 4 files, 0.00222 hours; held out: 1 files, 0.000556 hours",
                  "a step: 4 clips of 0.20 s, then 2 clips of 0.40 s; at once 1 of the longest",
                  "learning rate: up to 0.001 in step 1, towards zero from step 1 to 2",
                  "a healthy run: the loss falls"):
        assert words in said
    seconds = float(said.split(" seconds a step")[0].split()[-1])
    clips = float(said.split(" clips a second")[0].split()[-1])
    assert seconds * clips == pytest.approx(3, rel=0.02)            # 4 and 2 clips


def test_a_resumed_run_counts_its_own_seconds(tmp_path, capsys, monkeypatch):
    """What earlier calls took is in log.csv, not in the pace of this one."""
    monkeypatch.setattr(train, "VALIDATED", 2)
    run = ["--model", "vae", "--device", "cpu", "--out", str(tmp_path)]
    train.main([*run, "--size", "tiny", "--batch", "2", "--steps", "2", "--windows", "0.2"])
    state = sample.load_state(tmp_path / "state.pt")
    torch.save(state | {"seconds": 5000.0}, tmp_path / "long.pt")
    os.replace(tmp_path / "long.pt", tmp_path / "state.pt")
    capsys.readouterr()
    train.main([*run, "--resume", "--steps", "3"])
    said = capsys.readouterr().out
    seconds = float(said.split(" seconds a step")[0].split()[-1])
    clips = float(said.split(" clips a second")[0].split()[-1])
    assert seconds < 1000 and seconds * clips == pytest.approx(2, rel=0.02)
    assert float((tmp_path / "log.csv").read_text().splitlines()[-1].split(",")[1]) > 5000


# ---- the cache of latents ------------------------------------------------------------------------

def music_of(folder, count=5):
    """Wav files of two seconds of noise."""
    folder.mkdir(parents=True)
    for i in range(count):
        noise = np.random.default_rng(i).uniform(-0.5, 0.5, (2 * RATE, 2))
        sf.write(folder / f"{i}.wav", noise, RATE)
    return train.AudioFiles({path: sample.probe(path) for path in sample.find_files([folder])})


def tiny_vae():
    make, _, presets = sample.NETS["vae"]
    torch.manual_seed(0)
    return make(presets["tiny"]).eval().requires_grad_(False)


class Killed(BaseException):
    pass


def test_a_stopped_cache_goes_on_where_it_was(tmp_path, monkeypatch):
    """Killed in the third of five tracks, after a part of its rows, and of a line of the index:
    each version is encoded once, but those of that track; the latents are those of a cache made at
    one go, in two large files and not in one for each track."""
    tracks, vae, folder = music_of(tmp_path / "music"), tiny_vae(), tmp_path / "cache"
    expected = train.Latents(tracks, tmp_path / "expected", vae, 0, versions=2)
    encode, done = vae.encode, []

    def count(audio):
        if len(done) == 5:
            raise Killed
        done.append(audio)
        return encode(audio)

    monkeypatch.setattr(vae, "encode", count)
    with pytest.raises(Killed):
        train.Latents(tracks, folder, vae, 0, workers=2, versions=2)
    index, = folder.glob("*.txt")
    index.write_text(index.read_text() + "0123456789abc")
    done.clear()
    with pytest.raises(Killed):
        train.Latents(tracks, folder, vae, 0, versions=2)
    done.clear()
    cached = train.Latents(tracks, folder, vae, 0, versions=2)
    assert len(done) == 10 - 4 - 4 and len(list(folder.glob("*.f16"))) == 3
    for i in range(10):
        assert np.array_equal(cached.read(i, 3, 99), expected.read(i, 3, 99))
    assert cached.crop(0.5, 2**14)[0].dtype == np.float32
    size = sum(path.stat().st_size for path in folder.glob("*.f16"))
    assert size >= 2 * 8 * cached.lengths.sum()


NODES = """
import os, sys
sys.path[:0] = sys.argv[1:3]
import torch
import sample, train
import test_scale
sample.join_processes(torch.device("cpu"))
node = sample.RANK // 2 if sys.argv[4] == "apart" else 0
folder = test_scale.Path(sys.argv[3])
files = train.survey([folder / "music"], 1, "--data", index=folder / f"{node}.json")
tracks = train.AudioFiles(files)
vae = test_scale.tiny_vae()
encode, vae.encoded = vae.encode, 0
def count(audio):
    vae.encoded += 1
    return encode(audio)
vae.encode = count
cached = train.Latents(tracks, folder / sys.argv[4] / str(node), vae, 0, versions=2)
found = [vae.encoded, cached.keys, [cached.read(i, 0, 999) for i in range(10)]]
torch.save(found, folder / f"{sys.argv[4]}-{sample.RANK}.pt")
sample.leave_processes()
"""


@pytest.mark.slow
@pytest.mark.parametrize("disk, work", [("shared", 10), ("apart", 20)])
def test_machines_need_not_share_a_disk(disk, work, tmp_path):
    """Four processes on two machines, which are two folders, or one: those that see the same folder
    share the work, and all get the same latents."""
    music_of(tmp_path / "music")
    sf.write(tmp_path / "music" / "short.wav", np.zeros((0, 2)), RATE)
    (tmp_path / "nodes.py").write_text(NODES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4",
               tmp_path / "nodes.py", ROOT, ROOT / "tests", tmp_path, disk]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[:3000]
    found = [torch.load(tmp_path / f"{disk}-{rank}.pt", weights_only=False) for rank in range(4)]
    encoded = [one[0] for one in found]
    assert sum(encoded) == work and min(encoded) >= 2 and "short.wav" in result.stdout
    for one in found[1:]:
        assert one[1] == found[0][1]
        assert all(map(np.array_equal, one[2], found[0][2]))
    assert len(json.loads((tmp_path / "0.json").read_text())) == 6
