"""train.py: clips, resuming, several processes, bad input, full disks, what each model minimises.

Each on the real script with tiny models, as a user runs it: train.main([...]), then what lies in
the run's folder. A stopped run got SIGTERM; gradients are read from an optimizer's state.
"""
import csv
import io
import math
import os
import random
import resource
import shlex
import signal
import struct
import subprocess
import sys
import threading
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
from diffusion import add_noise, alpha_sigma, x0_from_v
from examples import synthetic

ROOT = Path(train.__file__).parent
MUSIC = ROOT.parent / "shared" / "music"
real_music = pytest.mark.skipif(not MUSIC.exists(), reason="no music beside the checkout")
RATE = sample.SAMPLE_RATE
SHORT = ("--windows", 0.2)


@pytest.fixture(autouse=True)
def few_statistics(monkeypatch):
    """5 clips are measured, not 50, and 2 validated, not 32, but where a test is about them; and
    a model that is played takes 3 steps, not 20."""
    monkeypatch.setitem(train.MEASURED, "tiny", 5)
    monkeypatch.setattr(train, "VALIDATED", 2)
    monkeypatch.setattr(train, "PLAY_STEPS", 3)


@pytest.fixture
def music(tmp_path):
    """Five wav files of two classes, 3 s each, made by the synthetic musician."""
    for k in range(5):
        path = tmp_path / "music" / ("loud" if k % 2 else "quiet") / f"{k}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, synthetic.clip(7, k, 3.0)[0].T, RATE)
    return tmp_path / "music"


@pytest.fixture
def vae_file(tmp_path):
    """A checkpoint with an untrained VAE."""
    save_checkpoint(tmp_path / "vae.pt", "vae", tiny("vae"))
    return tmp_path / "vae.pt"


@pytest.fixture
def latent_file(tmp_path):
    """A checkpoint with an untrained latent model."""
    save_checkpoint(tmp_path / "latent.pt", "latent", tiny("latent"), tiny("vae"))
    return tmp_path / "latent.pt"


def tiny(kind, **changes):
    """An untrained network of that kind."""
    make, _, presets = sample.NETS[kind]
    return make(train.replace(presets["tiny"], **changes))


def words(model, out, *more):
    """The arguments of a small run."""
    given = ["--model", model, "--batch", 2, "--device", "cpu", "--out", out, *more]
    if "--init" not in more:
        given += ["--size", "tiny"]
    return [str(word) for word in given]


def fit(model, out, *more):
    """Train; returns the state that the run leaves."""
    train.main(words(model, out, *more))
    return sample.load_state(out / "state.pt")


def fit_in_parts(model, out, *more):
    """As fit, but stopped by a signal after two steps or three, and resumed."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)         # should it come too late
    watcher = threading.Thread(target=terminate_after, args=(out / "log.csv", 2), daemon=True)
    watcher.start()
    stopped = fit(model, out, *more)["step"]
    watcher.join()
    signal.signal(signal.SIGTERM, before)
    assert stopped < sample.load_state(out / "state.pt")["settings"]["steps"]
    return fit(model, out, "--resume", "--workers", 3)


def terminate_after(log, steps):
    """SIGTERM for this process, when the log has so many steps."""
    while not log.exists() or len(log.read_bytes().splitlines()) <= steps:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


def script(*args, **kwargs):
    """Run train.py in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


def start(*args):
    """train.py running in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def column(out, name):
    """What log.csv has in a column, as text."""
    return [entry[name] for entry in csv.DictReader((out / "log.csv").open())]


def losses(out):
    return column(out, "loss")


def gradients(state):
    """The gradients of a run's first step, from AdamW's and Muon's first moments of them."""
    found = []
    for optimizer in state["optimizers"]:
        for moments in optimizer["state"].values():
            if "exp_avg" in moments:
                found.append(moments["exp_avg"] / 0.1)
            else:
                found.append(moments["momentum_buffer"] / 0.05)
    return flat(found)


def flat(tensors):
    return torch.cat([x.detach().flatten().float() for x in tensors])


def files_of(folder):
    """The audio files in a folder, as training takes them."""
    return train.AudioFiles({path: sample.probe(path) for path in sample.find_files([folder])})


def same(a, b):
    """Whether two nested checkpoints are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---- clips ---------------------------------------------------------------------------------------

def test_a_clip_is_a_function_of_seed_and_number(music):
    """Clip k is the same in any batch, after any other clip; another seed, stream or k gives
    another. A step takes `batch` clips of the longest window, or as many more of a shorter one as
    fit, and no clip is taken twice."""
    tracks = files_of(music)
    def make(seed, stream=train.TRAIN):
        draw = lambda rng, window: {"u": rng.random(), "n": window}
        return train.Clips(tracks, [2**12, 3000], draw, ["loud", "quiet"], seed, stream, batch=4)

    batch, alone = make(0)([6, 4, 5]), make(0)([4])
    assert torch.equal(batch["x"][1], alone["x"][0]) and batch["u"][1] == alone["u"][0]
    for other in (make(1)([4]), make(0, train.VALID)([4]), make(0)([1])):
        assert other["u"] != alone["u"] and not torch.equal(other["x"], alone["x"])
    spread = train.Clips(tracks, [2**12], lambda *_: {}, ["loud", "quiet"], 0, train.VALID, count=5)
    assert spread(range(5))["label"].tolist() == [0, 0, 1, 1, 1]        # one of each file
    spread = train.Clips(tracks, [2**12], lambda *_: {}, ["quiet"], 0, train.VALID, count=5)
    assert spread(range(5))["label"].tolist() == [-1, -1, 0, 0, 0]      # loud is no class
    clips = train.Clips(tracks, [2**10, 2**12, 3000], lambda rng, window: {"n": window}, [], 0,
                        batch=4)
    assert [len(clips.of_step(i)) for i in range(4)] == [16, 4, 4, 16]
    taken = [k for i in range(6) for k in clips.of_step(i)]
    assert len(set(taken)) == len(taken)
    for i in range(4):
        batch = clips(clips.of_step(i))
        window = clips.windows[i % len(clips.windows)]
        assert set(batch["n"].tolist()) == {batch["x"].shape[-1]} == {window}


def test_a_clip_is_what_lies_at_its_place_in_the_file(tmp_path):
    """Seeking, resampling and cutting give the same samples as decoding the whole file, at any
    rate, mono too."""
    for rate, channels in ((44100, 2), (48000, 2), (22050, 1), (96000, 2), (32000, 2), (88200, 2),
                           (176400, 1)):
        path = str(tmp_path / f"{rate}.wav")
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, (3 * rate, channels))
        sf.write(path, noise, rate, subtype="FLOAT")
        whole = sample.to_stereo_44k(*sample.read_audio(path)).numpy()
        assert whole.shape == (2, 3 * RATE)
        tracks = train.AudioFiles({path: sample.probe(path)})
        for start in (0, 1, 54321, 3 * RATE - 5000):
            clip = tracks.read(0, start, 5000)
            assert clip.shape == (2, 5000)
            assert np.abs(clip - whole[:, start:start + 5000]).max() < 1e-4


class Spy:
    """Notes what crop reads: (number of the track, first frame)."""

    def read(self, i, start, n):
        self.asked = i, start
        return super().read(i, start, n)


class SpiedFiles(Spy, train.AudioFiles):
    pass


class SpiedLatents(Spy, train.Latents):
    pass


def test_training_varies_audio_and_validation_does_not(music):
    """Half of the clips with their sides swapped, half of them quieter, by up to 10 dB."""
    source = files_of(music)
    trained = train.Clips(source, [2**10], lambda *_: {}, [], 0)
    held_out = train.Clips(source, [2**10], lambda *_: {}, [], 0, train.VALID)
    swapped, gains = [], []
    for k in range(200):
        for clips in (trained, held_out):
            place = sample.random_numbers(0, clips.stream, k).random()
            audio, heard = source.crop(place, 2**10)[0], clips.clip(k)["x"]
            if clips is held_out:
                assert np.array_equal(heard, audio)
                continue
            swaps = abs((heard * audio[::-1]).sum()) > abs((heard * audio).sum())
            audio = audio[::-1] if swaps else audio
            gain = (heard * audio).sum() / np.square(audio).sum()
            np.testing.assert_allclose(heard, gain * audio, rtol=1e-4, atol=1e-6)
            swapped.append(swaps)
            gains.append(gain)
    assert 0.4 < np.mean(swapped) < 0.6
    assert 0.4 < np.mean(np.array(gains) < 0.999) < 0.6
    assert 10**-0.5 - 1e-4 < min(gains) < 0.4 and max(gains) < 1.0001


def test_latents_from_the_cache_are_those_of_the_clip(music, tmp_path):
    """--cache: the normalised latents of the audio at that place, away from its ends; the loss is
    the same from either. Each file is encoded once, but again when it has changed, or for another
    VAE."""
    vae = tiny("vae").eval()
    vae.latent_mean.normal_()
    vae.latent_std.uniform_(0.5, 2)
    tracks = SpiedFiles({path: sample.probe(path) for path in sample.find_files([music])})
    cached = SpiedLatents(tracks, tmp_path / "cache", vae, 0, versions=1)
    files = sorted((tmp_path / "cache").iterdir())
    again = train.Latents(tracks, tmp_path / "cache", vae, 0, versions=1)
    assert sorted((tmp_path / "cache").iterdir()) == files and again.keys == cached.keys

    edge = -(-vae.encoder_field // vae.hop)
    for i, first in ((0, 0), (1, 200), (4, 700)):
        audio = torch.from_numpy(tracks.read(i, first * vae.hop, 256 * vae.hop))[None]
        fresh, kept = vae.encode(audio)[0], torch.tensor(cached.read(i, first, 256))
        assert kept.shape == (8, 256)
        torch.testing.assert_close(kept[:, edge:-edge], fresh[:, edge:-edge], rtol=5e-4, atol=1e-3)

    rest = cached.read(1, cached.lengths[1] - 5, 9)     # what follows is another track's
    assert rest.shape == (8, 5) and np.array_equal(rest, cached.read(1, 0, 2**15)[:, -5:])

    audio = torch.from_numpy(tracks.read(0, 0, 2**15))[None]
    rows = torch.tensor(cached.read(0, 0, 2**8))[None]
    objective = train.Denoising(tiny("latent").eval(), vae)
    draw = objective.draw(sample.random_numbers(0), 2**15)
    t, eps = torch.tensor([draw["t"]]), torch.from_numpy(draw["eps"])[None]
    fresh = objective(audio, t, eps)["loss"]
    encoded, kept = (objective(x, t, eps, encoded=torch.tensor([True]))["loss"]
                     for x in (vae.encode(audio), rows))
    assert fresh == encoded and abs(kept - fresh) < 0.01 * fresh

    for place in (0.0, 0.1, 0.35, 0.8, 1 - 1e-9):       # within a frame of the same second
        assert tracks.crop(place, 2**15)[0].shape == (2, 2**15)
        assert cached.crop(place, 2**15)[0].shape == (8, 2**8)
        (a, sample_number), (b, frame) = tracks.asked, cached.asked
        assert a == b and abs(sample_number - frame * vae.hop) <= vae.hop

    os.utime(tracks.paths[1], ns=(0, 0))
    changed = train.Latents(tracks, tmp_path / "cache", vae, 0, versions=1)
    assert len(set(changed.keys) - set(cached.keys)) == 1
    assert len(list((tmp_path / "cache").iterdir())) == len(files) + 2
    vae.latent_mean.add_(1)
    other = train.Latents(tracks, tmp_path / "cache", vae, 0, versions=1)
    assert not set(cached.keys) & set(other.keys)


def test_what_a_copied_cache_lacks_is_encoded_again(music, tmp_path):
    """A file that was cut as it was copied, within a row, and one that was not copied at all."""
    vae, folder = tiny("vae").eval(), tmp_path / "cache"
    tracks = train.AudioFiles({path: sample.probe(path) for path in sample.find_files([music])})
    first = train.Latents(tracks, folder, vae, 0, versions=1)
    expected = [first.read(i, 0, 2**15) for i in range(len(first.paths))]
    file, = folder.glob("*.f16")
    content = file.read_bytes()
    for kept in (content[:len(content) // 2 + 3], None):
        file.unlink()
        if kept:
            file.write_bytes(kept)
        again = train.Latents(tracks, folder, vae, 0, versions=1)
        assert not again.broken
        for i, latents in enumerate(expected):
            assert np.array_equal(again.read(i, 0, 2**15), latents)


@pytest.mark.slow
def test_the_cache_holds_versions_of_each_track(music, tmp_path):
    """Four of each, that count as tracks of their own: the first as it is, the others at speeds of
    5/6 to 6/5. They are made once, and those that are varied anew for another seed."""
    vae, tracks = tiny("vae").eval(), files_of(music)

    def latents(seed, **more):
        return train.Latents(tracks, tmp_path / "cache", vae, seed, **more)

    cached, plain = latents(0), latents(0, versions=1)
    files = sorted((tmp_path / "cache").iterdir())
    assert cached.keys[::4] == plain.keys and len(cached.keys) == 4 * len(tracks.paths)
    assert cached.paths[::4] == cached.paths[3::4] == tracks.paths
    assert cached.names[::4] == cached.names[3::4] == tracks.names
    speeds = cached.lengths[::4, None] / cached.lengths.reshape(-1, 4)
    assert (speeds[:, 0] == 1).all()
    assert 0.83 < speeds.min() and speeds.max() < 1.21 and speeds[:, 1:].std() > 0.04
    assert set(latents(1).keys) & set(cached.keys) == set(plain.keys)
    assert len(list((tmp_path / "cache").iterdir())) == len(files) + 2
    assert latents(0).keys == cached.keys
    assert len(list((tmp_path / "cache").iterdir())) == len(files) + 2


def test_a_version_is_faster_or_slower_swapped_and_quieter():
    """Heard on a tone of 1000 Hz at the left: its pitch, its side and its level, by (seed, path,
    version) alone. Version 0 is the track itself."""
    tone = torch.zeros(2, RATE)
    tone[0] = torch.sin(2000 * torch.pi * torch.arange(RATE) / RATE)
    assert torch.equal(train.encoded_as(tone, "a.wav", 0, 0), tone)
    pitches, sides, levels = [], [], []
    for version in range(1, 61):
        made = train.encoded_as(tone, "a.wav", 0, version)
        side = int(made[1].abs().max() > made[0].abs().max())
        assert made[1 - side].abs().max() < 1e-6
        power = torch.fft.rfft(made[side] * torch.hann_window(made.shape[1])).abs()
        pitch = power.argmax().item() * RATE / made.shape[1]
        assert made.shape[1] == pytest.approx(RATE * 1000 / pitch, rel=2e-3)
        pitches.append(pitch)
        sides.append(side)
        levels.append(made[side, 5000:-5000].abs().max().item())
    assert 830 < min(pitches) < 870 and 1150 < max(pitches) < 1201
    assert 0.3 < np.mean(sides) < 0.7 and 0.3 < np.mean(np.array(levels) < 0.98) < 0.7
    assert 0.31 < min(levels) < 0.45
    again = train.encoded_as(tone, "a.wav", 0, 5)
    assert torch.equal(again, train.encoded_as(tone, "a.wav", 0, 5))
    assert not torch.equal(again[:, :9], train.encoded_as(tone, "b.wav", 0, 5)[:, :9])
    assert not torch.equal(again[:, :9], train.encoded_as(tone, "a.wav", 1, 5)[:, :9])


def test_what_is_held_out_is_not_trained_on(music, tmp_path):
    """One file of twenty if there are four or more, each of them on one side; fewer are all trained
    on."""
    files = set(sample.find_files([music]))
    for some, held_out in ((files, 1), (sorted(files)[:4], 1), (sorted(files)[:3], 0)):
        options = Namespace(model="vae", data=some, valid=None, windows=[2**12], out=tmp_path)
        trained, valid = (set(tracks.paths) for tracks in train.music(options))
        assert trained | valid == set(some) and len(valid) == 1 and len(valid - trained) == held_out


def test_a_folder_within_the_music_can_be_held_out(music, tmp_path, capsys):
    """Its files are not trained on. If no others are there, they are, and it is said."""
    options = Namespace(model="vae", data=[str(music)], valid=[f"{music}/loud"], windows=[2**12],
                        out=tmp_path)
    trained, valid = (set(tracks.paths) for tracks in train.music(options))
    assert trained == {f"{music}/quiet/{k}.wav" for k in (0, 2, 4)}
    assert valid == {f"{music}/loud/{k}.wav" for k in (1, 3)}
    options.data = options.valid
    trained, valid = (set(tracks.paths) for tracks in train.music(options))
    assert trained == valid and "--valid has all files of --data" in "".join(capsys.readouterr())


def test_what_a_run_has_played_is_no_music(music, tmp_path):
    """A run's folder may lie within --data. A user's file that is called like that is music."""
    run = music / "runs" / "vae"
    fit("vae", run, "--steps", 1, *SHORT)
    played = run / "listen-000001.wav"
    assert played.exists() and train.played(str(played))
    (music / "loud" / "1.wav").rename(music / "loud" / "listen-000001.wav")
    options = Namespace(model="vae", data=[str(music)], valid=None, windows=[2**12], out=tmp_path)
    paths = set().union(*(tracks.paths for tracks in train.music(options)))
    assert str(music / "loud" / "listen-000001.wav") in paths
    assert str(played) not in paths and len(paths) == 5


def test_each_class_keeps_a_file_to_train_on(tmp_path):
    """One file in twenty is held out of classes of one, two and seven files, but no class's last;
    where all have only one, all are trained on."""
    def split(counts, model):
        folder = tmp_path / "-".join(map(str, counts))
        for label, count in zip("abcdefgh", counts):
            for k in range(count):
                path = folder / label / f"{k}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                sf.write(path, np.full((RATE, 2), 0.1), RATE)
        options = Namespace(model=model, data=[str(folder)], valid=None, windows=[2**12],
                            out=tmp_path)
        trained, held_out = train.music(options)
        return set(trained.names), set(trained.paths) & set(held_out.paths)

    for counts in ((1, 2, 7), (1, 1, 1, 2), (3, 1, 1, 1, 1, 1)):
        trained, both = split(counts, "classifier")
        assert trained == set("abcdef"[:len(counts)]) and not both
    trained, both = split((1, 1, 1, 1, 1), "classifier")
    assert trained == set("abcde") and len(both) == 1


def test_a_classifier_needs_two_classes(music, tmp_path):
    """All files in one folder: there is nothing to tell apart."""
    with pytest.raises(sample.UserError, match="--data has the single class loud: labels are"):
        fit("classifier", tmp_path / "run", "--data", music / "loud", "--steps", 1)


def damaged_flac(path):
    """A file that opens, at its beginning and its end, and cannot be decoded in between."""
    sf.write(path, synthetic.clip(7, 9, 3.0)[0].T, RATE)
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2] + bytes(4000) + data[len(data) // 2 + 4000:])
    return {str(path): sample.probe(str(path))}


def test_a_damaged_file_is_left_out_of_the_cache(music, tmp_path):
    """The other tracks keep their names and clips, as if it had not been there; with nothing else,
    that is an error."""
    whole = {str(p): sample.probe(str(p)) for p in sample.find_files([music])}
    damaged = damaged_flac(music / "loud" / "1.5.flac")
    assert damaged == {str(music / "loud" / "1.5.flac"): [3 * RATE, RATE, 2]}
    vae = tiny("vae").eval().requires_grad_(False)
    expected = train.Latents(train.AudioFiles(whole), tmp_path / "expected", vae, 0, versions=2)
    both = train.AudioFiles(dict(sorted((whole | damaged).items())))
    cached = train.Latents(both, tmp_path / "cache", vae, 0, versions=2)
    assert cached.broken == dict.fromkeys(damaged, "damaged") and expected.broken == {}
    for place in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1 - 1e-9):
        (a, i), (b, j) = (source.crop(place, 4096) for source in (cached, expected))
        assert np.array_equal(a, b)
        assert cached.paths[i] == expected.paths[j] and cached.names[i] == expected.names[j]
    with pytest.raises(sample.UserError, match="none of the 1 files"):
        train.Latents(train.AudioFiles(damaged), tmp_path / "cache", vae, 0)


def test_files_are_found_once_through_links_and_loops(music):
    """A folder that links to itself ends, and each file is found once; names need not be ASCII."""
    (music / "loop").symlink_to(music, target_is_directory=True)
    (music / "self.wav").symlink_to(music / "self.wav")
    sf.write(music / "träck ♪.wav", np.zeros((RATE, 2)), RATE)
    found = sample.find_files([music])
    assert len(found) == 7 and len({os.path.realpath(p) for p in found}) == 7
    assert sample.probe(str(music / "self.wav")) == "no such file"
    assert sample.probe(str(music / "träck ♪.wav")) == [RATE, RATE, 2]


def test_a_linked_folder_gives_its_class_its_own_name(music):
    """Classes are what the folders are called where they are found, not what the links point to."""
    (music / "classes").mkdir()
    (music / "classes" / "drums").symlink_to(music / "loud", target_is_directory=True)
    found = sample.find_files([music / "classes"])
    tracks = train.AudioFiles({path: sample.probe(path) for path in found})
    assert tracks.names == ["drums", "drums"]
    given = str(music / "classes" / "drums")
    assert train.parse(["--data", given]).data == [given]


def test_batches_arrive_in_order_whatever_the_workers():
    """Threads finish in any order; the loop gets batch after batch."""
    def slow(k):
        time.sleep(random.random() / 100)
        return k
    assert list(train.prefetch(slow, range(40), 4)) == list(range(40))


def test_synthetic_music_is_stereo_labelled_endless_and_cheap():
    """A function of (seed, k); all styles occur; sides differ; levels are those of music; far
    faster than real time."""
    began = time.process_time()
    clips = [synthetic.clip(0, k, 2.0) for k in range(40)]
    assert 80 / (time.process_time() - began) > 20
    assert {style for _, style in clips} == set(range(len(synthetic.STYLES)))
    for audio, _ in clips:
        assert audio.shape == (2, 2 * RATE) and audio.dtype == np.float32
        assert 0.02 < audio.std() < 0.4 and np.abs(audio).max() < 1
        assert np.corrcoef(audio)[0, 1] < 0.99
    assert np.array_equal(clips[5][0], synthetic.clip(0, 5, 2.0)[0])
    assert not np.array_equal(clips[5][0], synthetic.clip(1, 5, 2.0)[0])


# ---- resuming ------------------------------------------------------------------------------------

@pytest.mark.parametrize("model, more", [
    ("vae", ["--windows", 0.2, 0.4]),
    pytest.param("decoder", SHORT, marks=pytest.mark.slow),
    pytest.param("waveform", SHORT, marks=pytest.mark.slow),
    pytest.param("latent", ["--windows", 0.2, 0.4], marks=pytest.mark.slow),
    pytest.param("latent", ["--windows", 0.2, 0.4, "--cache"], marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_uninterrupted_one(model, more, music, vae_file, tmp_path):
    """Weights, averages, all optimizers and losses, bit for bit, with other workers; windows of two
    lengths go on in turn."""
    more = [*more, "--steps", 6]
    if model in ("decoder", "latent"):
        more += ["--vae", vae_file]
    if model in ("vae", "decoder") or "--cache" in more:
        more += ["--data", music]
    whole = fit(model, tmp_path / "whole", *more, "--workers", 1)
    parts = fit_in_parts(model, tmp_path / "parts", *more)
    assert whole["run_step"] == 6 and losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert len(whole["optimizers"]) == (2 if model in ("vae", "latent") else 1)
    for part in ("objective", "ema", "optimizers", "config"):
        assert same(whole[part], parts[part]), part
    seconds = [float(text) for text in column(tmp_path / "parts", "seconds")]
    assert seconds == sorted(seconds) and parts["seconds"] == pytest.approx(seconds[-1], abs=1e-3)


def test_muon_takes_the_matrices_of_blocks_and_vae_but_no_discriminator(vae_file):
    """AdamW takes the rest, and all of a decoder's run; neither lets weights decay."""
    options = Namespace(lr=1.0, beta2=0.97, muon=True)
    net, vae = tiny("latent"), tiny("vae")
    for objective, part in ((train.Denoising(net), net.blocks), (train.Autoencoding(vae), vae)):
        adamw, muon = train.make_optimizers(objective, options)
        linear = {m.weight for m in part.modules() if isinstance(m, torch.nn.Linear)}
        assert set(muon.param_groups[0]["params"]) == linear
        assert set(adamw.param_groups[0]["params"]) == set(objective.parameters()) - linear
        assert adamw.defaults["betas"] == (0.9, 0.97)
        assert adamw.defaults["weight_decay"] == muon.defaults["weight_decay"] == 0
        # Muon's steps are as large as AdamW's usually are, whatever the shape of a matrix.
        before = [p.detach().clone() for p in muon.param_groups[0]["params"]]
        for p in muon.param_groups[0]["params"]:
            p.grad = torch.randn_like(p)
        muon.step()
        for p, old in zip(muon.param_groups[0]["params"], before):
            assert 0.12 < (p - old).square().mean().sqrt() < 0.28
    for size, recipe in train.RECIPES["decoder"].items():
        assert not recipe.muon
        assert recipe.lr == pytest.approx(0.15 * train.RECIPES["vae"][size].lr)


@pytest.mark.slow
def test_the_average_follows_the_weights_and_is_what_is_validated(tmp_path):
    """By 1 - decay of the way in each step; the decay begins small, and grows up to the
    recipe's."""
    out = tmp_path / "run"
    fit("vae", out, "--steps", 1, "--lr", 0.1, *SHORT)
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (500, 0.95)):
        before = sample.load_state(out / "state.pt")
        torch.save(before | {"run_step": step}, tmp_path / "moved.pt")
        os.replace(tmp_path / "moved.pt", out / "state.pt")
        state = fit("vae", out, "--resume", "--steps", step + 1)
        for name, p in tiny("vae").named_parameters():
            expected = before["ema"][name].lerp(state["objective"][f"net.{name}"], 1 - decay)
            torch.testing.assert_close(state["ema"][name], expected, rtol=0, atol=1e-6)
    averaged = train.Autoencoding(sample.rebuild("vae", state["config"], state["ema"])).eval()
    held_out = train.Clips(train.Synthetic(1), state["settings"]["windows"], averaged.draw, [], 0,
                           train.VALID, count=2)
    expected = np.mean([averaged(**held_out([k]))["loss"].item() for k in range(2)])
    assert float(column(out, "validation")[-1]) == pytest.approx(expected)


def test_a_decoders_run_freezes_the_encoder(vae_file, tmp_path):
    """It begins with the VAE of --vae, trains its decoder and a discriminator, and nothing else.
    What it leaves is a VAE; its steps are those of both runs."""
    before = torch.load(vae_file)["ema"]
    one = fit("decoder", tmp_path / "run", "--vae", vae_file, "--steps", 1, *SHORT)
    two = fit("decoder", tmp_path / "run", "--resume", "--steps", 2)
    assert len(two["optimizers"]) == 1
    for name, weight in before.items():
        frozen = name.startswith(("encoder", "latent"))
        trained, averaged = two["objective"]["net." + name], two["ema"][name]
        assert torch.equal(weight, trained) == torch.equal(weight, averaged) == frozen, name
    judges = [[w for name, w in state["objective"].items() if name.startswith("discriminator")]
              for state in (one, two)]
    assert len(judges[0]) > 0 and not same(*judges)
    made = sample.open_checkpoint("vae", tmp_path / "run" / "model.pt")
    assert made.kind == "vae" and made.step == 3
    assert sample.load_state(tmp_path / "run" / "model.pt")["kind"] == "vae"


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    """kill -9 at random moments: the files on the disk always load, and the next run gets
    further."""
    log, steps = tmp_path / "run" / "log.csv", [0]
    args = words("vae", tmp_path / "run", "--steps", 1000, "--save-every", 3, *SHORT)

    def lines():
        return len(log.read_bytes().splitlines()) if log.exists() else 0

    for _ in range(2):
        before, logged = time.time(), lines()
        process = start(*args, *(["--resume"] if logged else []))
        # The names of the columns, and enough steps for a save.
        while time.time() - before < 60 and lines() < logged + 5:
            time.sleep(0.05)
        time.sleep(random.random() * 0.3)
        process.kill()
        process.wait()
        states = {file.name: sample.load_state(file) for file in (tmp_path / "run").glob("*.pt")}
        steps.append(states["state.pt"]["step"])
    assert steps == sorted(set(steps)), steps
    # What was done twice is in the log once.
    logged = [int(step) for step in column(tmp_path / "run", "step")]
    assert logged == list(range(1, len(logged) + 1))


@pytest.mark.slow
def test_interrupt_saves_and_ends_cleanly(tmp_path):
    """SIGTERM: exit status 0, a checkpoint of the last step, and the command that goes on."""
    process = start(*words("vae", tmp_path / "run", "--steps", 10000, *SHORT))
    log = tmp_path / "run" / "log.csv"
    while not log.exists() or len(log.read_bytes().splitlines()) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped; to go on" in out and out.strip().endswith("--resume")
    assert sample.load_state(tmp_path / "run" / "state.pt")["step"] == len(losses(tmp_path / "run"))


def test_a_run_is_not_overwritten_by_mistake(tmp_path):
    """A second run into the same folder needs --resume, which cannot change what the run is; nor
    does a new run go where only a model lies."""
    out = tmp_path / "run"
    fit("vae", out, "--steps", 2, *SHORT)

    def stamps():
        return [(out / name).stat().st_mtime_ns for name in ("state.pt", "model.pt", "log.csv")]

    before = stamps()
    with pytest.raises(sample.UserError, match="holds a model: choose another --out; or --resume"):
        fit("vae", out, "--steps", 2)
    with pytest.raises(sample.UserError, match="another --seed"):
        fit("vae", out, "--resume", "--seed", 5)
    assert stamps() == before
    (tmp_path / "alone").mkdir()
    (out / "model.pt").rename(tmp_path / "alone" / "model.pt")
    for more, says in (([], "alone holds a model: choose another --out"),
                       (["--resume"], "--resume: there is no .*alone/state.pt")):
        with pytest.raises(sample.UserError, match=says):
            fit("vae", tmp_path / "alone", "--steps", 2, *more)


def test_resuming_restores_the_settings(tmp_path):
    """--out and --resume are enough for a run with settings of its own; another --batch is refused,
    --steps not."""
    before = fit("vae", tmp_path, "--steps", 2, "--lr", 5e-4, "--windows", 0.2, 0.4)
    again = ["--model", "vae", "--device", "cpu", "--out", str(tmp_path), "--resume"]
    train.main([*again, "--steps", "3"])
    after = sample.load_state(tmp_path / "state.pt")
    assert after["size"] == "tiny" and after["step"] == 3
    assert after["settings"] == before["settings"] | {"steps": 3}
    with pytest.raises(sample.UserError, match="another --batch: leave it out"):
        train.main([*again, "--batch", "4"])
    # The model is the run's own, and what is given again may be the same.
    train.main([*again[2:], "--steps", "4", "--windows", "0.2", "0.4", "--micro-batch", "1"])
    after = sample.load_state(tmp_path / "state.pt")
    assert after["step"] == 4 and after["settings"]["micro_batch"] == 1
    fit("vae", tmp_path / "own", "--steps", 0)
    train.main(["--out", f"{tmp_path}/own", "--resume", "--windows", "0.3715", "--device", "cpu"])


def test_a_log_of_another_program_is_not_overwritten(tmp_path):
    """Nor by a new run; the log of a run that ended before its first save is begun anew."""
    log = tmp_path / "log.csv"
    log.write_text("time,temperature\n1,20\n")
    with pytest.raises(sample.UserError, match="log.csv lacks columns"):
        fit("vae", tmp_path, "--steps", 1, *SHORT)
    assert log.read_text() == "time,temperature\n1,20\n"
    log.write_text(",".join(train.LOG) + "\n7,1,2,3,4,\n")
    fit("vae", tmp_path, "--steps", 1, *SHORT)
    assert len(losses(tmp_path)) == 1


def test_a_full_disk_is_named(tmp_path):
    """Where no line can be added to the log: which file, and what to do."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    (tmp_path / "log.csv").symlink_to(full)
    with pytest.raises(sample.UserError, match="log.csv cannot be written .*: make room"):
        train.write_log(tmp_path, [{"step": 1}])


@pytest.mark.parametrize("model, following", [("vae", "decoder"), ("decoder", "latent")])
def test_a_vae_is_followed_by_what_needs_it(model, following, music, vae_file, tmp_path, capsys):
    """The command is printed, with the same music, as it can be given."""
    more = ["--vae", vae_file] if model == "decoder" else []
    fit(model, tmp_path / "my run", *more, "--data", music, "--steps", 0, *SHORT)
    command = capsys.readouterr().out.split("what comes next: python train.py ")[1]
    options = train.parse(shlex.split(command))
    assert options.model == following and options.data == [str(music)]
    assert options.vae == f"{tmp_path}/my run/model.pt" and Path(options.vae).exists()


def test_an_empty_path_is_refused():
    """As of a variable that is not set: it is not the current folder."""
    for flag in ("--data", "--valid", "--init"):
        with pytest.raises(sample.UserError, match=f"argument {flag}: an empty path"):
            train.parse([flag, ""])


def test_all_weights_learn_in_bf16():
    """Training on the model's own error runs the network twice, once without gradients. Of that
    one, autocast keeps copies of the weights, which the other must not use (torch < 2.11 does)."""
    net = tiny("latent")
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    vae = tiny("vae").eval().requires_grad_(False)
    objective = train.Denoising(net, vae, own_error=True)
    clips = train.Clips(train.Synthetic(0), [2**13], objective.draw, [], 0, batch=8)
    batch = clips(range(8))
    assert batch["moved"].any()
    with torch.autocast("cpu", torch.bfloat16):
        objective(**batch)["loss"].backward()
    without = [name for name, p in net.named_parameters() if p.grad is None]
    assert not without


def test_a_run_is_not_resumed_to_a_step_that_it_has_passed(tmp_path):
    """It would save itself as a run of so many steps. As many as it has are no fault."""
    fit("vae", tmp_path, "--steps", 2, *SHORT)
    with pytest.raises(sample.UserError, match="--steps 1: this run has made 2 steps already"):
        fit("vae", tmp_path, "--resume", "--steps", 1)
    assert fit("vae", tmp_path, "--resume", "--steps", 2)["settings"]["steps"] == 2


def test_a_log_of_another_program_is_kept(tmp_path):
    """A spreadsheet may have saved it with semicolons: its lines are not thrown away."""
    fit("vae", tmp_path, "--steps", 1, *SHORT)
    log = tmp_path / "log.csv"
    saved = log.read_text().replace(",", ";")
    log.write_text(saved)
    with pytest.raises(sample.UserError, match="log.csv lacks columns"):
        fit("vae", tmp_path, "--resume", "--steps", 2)
    assert log.read_text() == saved


@pytest.mark.parametrize("below", ["", "/deep"])
def test_an_out_that_is_no_folder_is_refused(tmp_path, below, capsys):
    """Exit status 2, and a line that names the flag."""
    (tmp_path / "song.wav").write_text("mine")
    with pytest.raises(SystemExit) as end:
        sample.run(lambda: fit("vae", f"{tmp_path}/song.wav{below}", "--steps", 1, *SHORT))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"error: --out {tmp_path}/song.wav{below} cannot be written")


def test_a_second_training_in_the_same_folder_is_refused(tmp_path):
    """While the first is at work; it leaves nothing there that would keep others out."""
    fcntl = pytest.importorskip("fcntl")
    first = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(first, fcntl.LOCK_EX)
    with pytest.raises(sample.UserError, match="in use by another training") as refused:
        fit("vae", tmp_path, "--steps", 1, *SHORT)
    assert not list(tmp_path.iterdir()) and refused.value.status == 2
    os.close(first)
    fit("vae", tmp_path, "--steps", 1, *SHORT)
    fit("vae", tmp_path, "--resume", "--steps", 2)


def test_what_cannot_be_resumed_is_named(tmp_path):
    """--resume in the folder of another model, or of an earlier version of train.py."""
    state = fit("vae", tmp_path, "--steps", 1, *SHORT)
    held = f"{tmp_path}/state.pt"
    for model, says in (("classifier", f"{held} holds a vae model, not a classifier"),
                        ("decoder", f"{held} has another --model")):
        with pytest.raises(sample.UserError, match=says):
            fit(model, tmp_path, "--resume")
    del state["run_step"]
    torch.save(state, tmp_path / "earlier.pt")
    os.replace(tmp_path / "earlier.pt", held)
    with pytest.raises(sample.UserError, match="of another version of this program"):
        fit("vae", tmp_path, "--resume")


def test_a_run_saves_ten_times_by_default(tmp_path):
    """But not more often than every 50 steps, and at least every 1000."""
    for steps, due in ((2000, 200), (90_000, 1000), (20, 50)):
        options = train.parse(words("vae", tmp_path, "--steps", steps))
        train.settle(options)
        assert options.save_every == due


@pytest.mark.parametrize("given", ["--model waveform --compile", "--valid music", "--cache",
                                   "--model vae --vae vae.pt", "--model classifier --cache",
                                   "--model decoder --init vae.pt", "--denoiser latent.pt"])
def test_a_flag_that_would_do_nothing_is_refused(given, tmp_path):
    """It belongs to another model, or needs --data."""
    flag = [word for word in given.split() if word.startswith("--")][-1]
    with pytest.raises(sample.UserError, match=f"^{flag} does nothing"):
        train.main([*given.split(), "--device", "cpu", "--out", str(tmp_path)])


# ---- several processes ---------------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    """torchrun, gloo: the gradient of the first step, over the same clips, and, but for what AdamW
    makes of rounding, the weights after five."""
    save_checkpoint(tmp_path / "first.pt", "waveform", tiny("waveform"))
    for steps, near in ((1, 1e-6), (5, 1e-4)):
        states = []
        for python in (TORCHRUN, [sys.executable]):
            out = tmp_path / f"{len(python)}-{steps}"
            more = ("--init", tmp_path / "first.pt", "--batch", 4, "--steps", steps)
            command = [*python, ROOT / "train.py", *words("waveform", out, *more, *SHORT)]
            subprocess.run([*map(str, command)], check=True, timeout=120, capture_output=True)
            states.append(sample.load_state(out / "state.pt"))
        a, b = (gradients(state) if steps == 1 else flat(state["objective"].values())
                for state in states)
        assert (a - b).norm() < near * b.norm()


def test_a_batch_is_shared_out_evenly(tmp_path, monkeypatch):
    """Each process takes as many clips as any other: another --batch is refused."""
    monkeypatch.setattr(train, "WORLD", 2)
    with pytest.raises(sample.UserError, match="^--batch 3 is no multiple of the 2 processes"):
        train.settle(train.parse(words("vae", tmp_path, "--batch", 3)))


STAGES = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import sample, train
train.MEASURED["tiny"], train.VALIDATED, out = 4, 2, Path(sys.argv[2])
validate = train.validate
train.validate = lambda *given: time.sleep(2) or validate(*given)     # on the first process only
tiny = ["--size", "tiny", "--batch", "2", "--device", "cpu", "--steps", "2"]
train.main(["--model", "vae", "--out", str(out / "vae"), *tiny])
train.main(["--model", "decoder", "--vae", str(out / "vae" / "model.pt"),
            "--out", str(out / "decoder"), *tiny])
assert sample.load_checkpoint(out / "decoder" / "model.pt").step == 4
train.main(["--model", "latent", "--vae", str(out / "decoder" / "model.pt"),
            "--out", str(out / "latent"), "--data", str(out / "music"), "--cache",
            "--windows", "0.2", "0.4", *tiny])
assert sample.load_checkpoint(out / "latent" / "model.pt").step == 2
(out / f"done.{sample.RANK}").touch()
"""


@pytest.mark.slow
def test_several_processes_end_together(music, tmp_path):
    """torchrun, gloo, a VAE, its decoder and a latent model: the checkpoint is there for every
    process when it leaves the run, although the first one alone validates and saves."""
    (tmp_path / "stages.py").write_text(STAGES)
    command = [*TORCHRUN, str(tmp_path / "stages.py"), str(ROOT), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "done.0").exists() and (tmp_path / "done.1").exists()


# ---- bad input and bad luck ----------------------------------------------------------------------

def test_bad_files_are_named_once_and_left_out(music, tmp_path, capsys):
    """Truncated, text, empty, unreadable, short, link without end: training runs, and each is in
    the report once."""
    sf.write(music / "loud" / "long.mp3", synthetic.clip(7, 9, 5.0)[0].T, RATE)
    data = (music / "loud" / "long.mp3").read_bytes()
    (music / "loud" / "cut.mp3").write_bytes(data[:500])
    (music / "loud" / "text.wav").write_text("this is not audio")
    (music / "loud" / "empty.ogg").touch()
    os.mkfifo(music / "loud" / "pipe.wav")
    (music / "loud" / "self.flac").symlink_to(music / "loud" / "self.flac")
    sf.write(music / "loud" / "short.wav", np.zeros((4410, 2)), RATE)
    train.main(words("vae", tmp_path / "run", "--data", music, "--steps", 2))
    out = capsys.readouterr().out
    bad = ["cut.mp3", "text.wav", "empty.ogg", "pipe.wav", "self.flac", "short.wav"]
    assert [out.count(name) for name in bad] == [1] * 6 and "--data: 6 of 12 files" in out
    assert (tmp_path / "run" / "model.pt").exists()


def test_a_truncated_file_is_as_long_as_what_can_be_decoded(tmp_path):
    """The header of a cut wav or mp3 promises more than there is: clips come from the part that
    exists."""
    for suffix in ("wav", "mp3"):
        path = tmp_path / f"cut.{suffix}"
        sf.write(path, synthetic.clip(7, 9, 6.0)[0].T, RATE)
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
        frames, _, _ = sample.probe(str(path))
        assert frames == sample.read_audio(path)[0].shape[1] and abs(frames / RATE - 3) < 0.3


def test_a_file_that_lost_its_audio_since_is_left_out(tmp_path):
    """Not one sample is left of it: clips come from another file, and it is named."""
    paths = [str(tmp_path / f"{name}.wav") for name in "ab"]
    for path in paths:
        sf.write(path, np.full((RATE, 2), 0.5), RATE)
    tracks = train.AudioFiles({path: sample.probe(path) for path in paths})
    sf.write(paths[0], np.zeros((0, 2)), RATE)
    clip, track = tracks.crop(0.1, 2**14)
    assert track == 1 and clip.shape == (2, 2**14) and clip.min() > 0.4
    assert tracks.broken == {paths[0]: "nothing is left of it"}


def endless_ogg(path):
    """An ogg cut after its first page, which has more samples than it says: libsndfile takes it for
    2^63 - 1 frames."""
    sf.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, (RATE, 1)), RATE)
    data = bytearray(path.read_bytes())
    pages = [i for i in range(len(data)) if data[i:i + 4] == b"OggS"]
    # The first page with audio in it: another number of samples, and the checksum for it.
    first, end = next((i, j) for i, j in zip(pages, pages[1:]) if any(data[i + 6:i + 14]))
    data[first + 6:first + 14] = struct.pack("<q", 32)
    data[first + 22:first + 26] = bytes(4)
    crc = 0
    for byte in data[first:end]:
        crc ^= byte << 24
        for _ in range(8):
            crc = crc << 1 ^ (0x104C11DB7 if crc >> 31 else 0)
    data[first + 22:first + 26] = struct.pack("<I", crc)
    path.write_bytes(data[:end + 100])


def test_a_cut_ogg_is_no_longer_than_what_can_be_read(music, tmp_path, capsys):
    """Its header claims 2^63 - 1 frames: it is used as far as it reaches, or left out, and training
    runs."""
    path = music / "loud" / "endless.ogg"
    endless_ogg(path)
    with sf.SoundFile(path) as file:
        assert file.frames == 2**63 - 1
    frames, rate, channels = sample.probe(str(path))
    assert frames == sample.read_audio(path)[0].shape[1] < RATE and (rate, channels) == (RATE, 1)
    train.main(words("vae", tmp_path / "run", "--data", music, "--steps", 1, "--windows", 1))
    assert "endless.ogg (too short" in capsys.readouterr().out
    clip = train.AudioFiles({str(path): [frames, rate, channels]}).read(0, 1000, 500)
    whole = sample.to_stereo_44k(*sample.read_audio(path)).numpy()
    assert np.array_equal(clip, whole[:, 1000:1500])


@pytest.mark.parametrize("name", ["nothing", "only text", "too short"])
def test_a_folder_without_usable_audio_ends_in_one_sentence(name, tmp_path, capsys):
    """Exit status 2, and one line on stderr."""
    (tmp_path / "data").mkdir()
    if name == "only text":
        (tmp_path / "data" / "a.wav").write_text("no audio")
    if name == "too short":
        sf.write(tmp_path / "data" / "a.wav", np.zeros((4410, 2)), RATE)
    with pytest.raises(SystemExit) as end:
        sample.run(lambda: fit("vae", tmp_path / "run", "--data", tmp_path / "data"))
    said = capsys.readouterr().err.splitlines()[-1]             # above it, tqdm's bars
    assert end.value.code == 2 and said.startswith("error: --data: no usable file")
    assert not (tmp_path / "run" / "model.pt").exists()


@real_music
def test_odd_files_can_be_trained_on(tmp_path):
    """Mono, 48 and 22.05 kHz, mp3, flac, 24 bits, float beyond 1, half a second, silence."""
    train.main(words("vae", tmp_path / "run", "--data", MUSIC / "odd", "--steps", 4))
    assert all(np.isfinite(float(loss)) for loss in losses(tmp_path / "run"))


@pytest.mark.slow
def test_a_full_disk_loses_no_checkpoint(tmp_path):
    """A write that fails leaves the earlier files as they are, and no partial one; exit status 1
    and a sentence."""
    args = words("vae", tmp_path / "run", "--steps", 2)
    train.main(args)
    content = lambda: {file.name: file.read_bytes() for file in (tmp_path / "run").glob("*.p*t")}
    before = content()
    limit = len(before["state.pt"]) // 2
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    result = script(*args, "--resume", "--steps", 4, "--save-every", 3, preexec_fn=full)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "state.pt cannot be read or written" in result.stderr.splitlines()[-1]
    assert before.keys() == {"state.pt", "model.pt"} and content() == before


def test_a_gradient_that_is_not_finite_counts_as_zero(tmp_path, monkeypatch):
    """One NaN, in the first step: weights and averages stay as they were, the log has it, and
    training goes on, also where it comes later."""
    fit("vae", tmp_path, "--steps", 0, *SHORT)
    before = sample.load_state(tmp_path / "state.pt")
    with monkeypatch.context() as patch:
        patch.setattr(train.autoencoder, "kl", lambda mean, logvar: mean.sum() * float("nan"))
        skipped = fit("vae", tmp_path, "--resume", "--steps", 1)
    after = fit("vae", tmp_path, "--resume", "--steps", 2)
    with monkeypatch.context() as patch:
        patch.setattr(train.autoencoder, "kl", lambda mean, logvar: mean.sum() * float("nan"))
        later = fit("vae", tmp_path, "--resume", "--steps", 3)
    assert [loss == "nan" for loss in losses(tmp_path)] == [True, False, True]
    assert same(before["objective"], skipped["objective"])
    torch.testing.assert_close(flat(before["ema"].values()), flat(skipped["ema"].values()))
    assert not same(skipped["ema"], after["ema"])
    assert flat(later["objective"].values()).isfinite().all()


def test_ten_losses_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    """With advice, and exit status 1."""
    net = tiny("vae")
    torch.nn.init.constant_(net.decoder[0].bias, float("nan"))
    save_checkpoint(tmp_path / "nan.pt", "vae", net)
    with pytest.raises(sample.UserError, match="ten steps up to 10 .* lower --lr") as error:
        fit("vae", tmp_path / "run", "--init", tmp_path / "nan.pt", "--steps", 40, *SHORT)
    assert error.value.status == 1 and set(losses(tmp_path / "run")) == {"nan"}


def test_a_good_gradient_begins_the_count_of_bad_ones_anew():
    """Nine, a good one, nine: training goes on. Ten, of two looks at the numbers: it ends."""
    def entries(text):
        return [{"step": i + 1, "gradient_norm": math.nan if letter == "x" else 1.0}
                for i, letter in enumerate(text)]

    assert train.count_bad(entries(9 * "x" + "." + 9 * "x"), 0) == 9
    assert train.count_bad(entries("xx.x"), 8 - 1) == 1
    with pytest.raises(sample.UserError, match="ten steps up to 2 "):
        train.count_bad(entries("xx"), 8)


def test_gradients_are_clipped(vae_file, tmp_path):
    """The log has their norm as it was; the optimizers get them with one of at most 1. A decoder's
    are clipped by themselves: its discriminator's, far smaller, stay as they are."""
    state = fit("vae", tmp_path / "vae", "--steps", 1, *SHORT)
    assert gradients(state).norm() == pytest.approx(1, abs=1e-3)
    state = fit("decoder", tmp_path / "decoder", "--steps", 1, "--vae", vae_file, *SHORT)
    first = sum(w.numel() for name, w in state["objective"].items() if "net.decoder" in name)
    assert gradients(state)[:first].norm() == pytest.approx(1, abs=1e-3)
    assert 1e-4 < gradients(state)[first:].norm() < 1.001
    for model in ("vae", "decoder"):
        assert float(column(tmp_path / model, "gradient_norm")[0]) > 2


@pytest.mark.parametrize("given", ["--batch 0", "--workers 0", "--save-every 0", "--steps -1",
                                   "--lr 0", "--lr nan", "--seed -1", "--windows 0.1",
                                   "--windows inf", "--cooldown 0"])
def test_numbers_out_of_range_are_refused(given, capsys):
    """Exit status 2, and one line that names the flag."""
    with pytest.raises(SystemExit) as end:
        sample.run(lambda: train.main(given.split()))
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: argument {given.split()[0]}: ") and err.count("\n") == 1


@pytest.mark.parametrize("error, status, says", [
    (sample.UserError("no such thing"), 2, "no such thing"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "--batch"), (MemoryError(), 1, "--batch"),
    (RuntimeError("std::bad_alloc"), 1, "--batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "--batch"),
    (OSError(28, "No space left", "x.pt"), 1, "x.pt")])
def test_errors_end_in_one_line(error, status, says, capsys):
    """run(main): the status, and one line on stderr that says what to do."""
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        sample.run(main)
    err = capsys.readouterr().err
    assert end.value.code == status and says in err and err.count("\n") == 1


def test_other_errors_keep_their_traceback():
    """"alloc" alone does not make one of memory."""
    def main():
        raise RuntimeError("Placeholder storage has not been allocated on MPS device!")
    with pytest.raises(RuntimeError, match="Placeholder"):
        sample.run(main)


@pytest.mark.parametrize("device", ["cuda:99", "gramophone", "meta"])
def test_a_device_that_is_not_there_is_refused(device, tmp_path, capsys):
    """Exit status 2, and one line that names the flag."""
    with pytest.raises(SystemExit) as end:
        sample.run(lambda: train.main(words("vae", tmp_path, "--device", device)))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"error: --device {device} cannot be used: ")


def test_names_that_stdout_cannot_encode_are_printed_escaped(monkeypatch):
    """Files may have any name, a terminal any encoding."""
    ascii = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", ascii)
    sample.run(lambda: sample.say("tr\u00e4ck \u266a \udce4.wav"))
    assert sys.stdout.buffer.getvalue() == rb"tr\xe4ck \u266a \udce4.wav" + b"\n"


class Touch:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name, says", [
    ("cut.pt", "is damaged"), ("text.pt", "is damaged"), ("empty.pt", "is damaged"),
    ("code.pt", "is damaged"), ("other.pt", "is damaged, or no checkpoint"),
    ("missing.pt", "does not exist"), ("later.pt", "holds a foreign model")])
def test_foreign_files_are_no_checkpoints(name, says, tmp_path):
    """Truncated, text, pickled code, or another program's dictionary: a sentence with the file's
    name."""
    save_checkpoint(tmp_path / "whole.pt", "vae", tiny("vae"))
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_bytes(b"hello")
    (tmp_path / "empty.pt").touch()
    torch.save({"kind": "vae", "weights": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save({"format": 2, "kind": "vae"}, tmp_path / "later.pt")
    code = Touch(tmp_path / "executed")
    torch.save({"format": 1, "kind": "vae", "code": code}, tmp_path / "code.pt")
    with pytest.raises(sample.UserError, match=f"{name} {says}"):
        sample.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()


# ---- models --------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", ["latent", "waveform", "classifier"])
def test_each_model_trains_and_loads(model, music, vae_file, tmp_path, monkeypatch, capsys):
    """A few steps from a folder; model.pt is the averaged model in half precision; the latent one
    carries its VAE. The scripts still take the shipped model; the last line is the command that
    takes the new one."""
    monkeypatch.chdir(tmp_path)
    more = ["--cache", "--vae", vae_file] if model == "latent" else []
    state = fit(model, Path("runs", model), "--data", music, "--steps", 2, *more)
    last = capsys.readouterr().out.splitlines()[-1]
    use = f"python sample.py --model {model} --checkpoint runs/{model}/model.pt"
    assert (use in last) == (model != "classifier")
    assert sample.open_checkpoint(model).path == str(ROOT / "checkpoints" / f"{model}.pt")

    small = sample.load_checkpoint(f"runs/{model}/model.pt")
    assert os.path.getsize(small.path) < os.path.getsize(f"runs/{model}/state.pt") / 4
    pairs = [(state["ema"], small.net)]
    if model == "latent":
        pairs.append((state["vae"]["weights"], small.vae))
        assert (small.vae.latent_mean != 0).all() and (small.vae.latent_std != 1).all()
    for whole, net in pairs:
        for name, weight in net.state_dict().items():
            expected = whole[name].half().float() if weight.dim() > 1 else whole[name]
            assert torch.equal(weight, expected)
    assert small.kind == model
    assert small.classes == (["loud", "quiet"] if model == "classifier" else None)
    if model != "classifier":
        audio = torch.randn(1, 2, small.window * small.hop)
        x = small.encode(audio)
        assert x.shape == (1, small.channels, small.window)
        assert small.decode(x).shape == audio.shape


@pytest.mark.parametrize("model", ["vae", "waveform", "latent"])
def test_each_save_plays_the_model(model, music, vae_file, tmp_path):
    """A wav beside log.csv, made without touching what is random in training: the model's own
    continuation of a held-out clip, or a VAE's reconstruction of it; the same clip each time."""
    more = ["--vae", vae_file] if model == "latent" else []
    more += ["--steps", 2, "--data", music, *SHORT]
    often = fit(model, tmp_path / "often", *more, "--save-every", 1)
    once = fit(model, tmp_path / "once", *more)
    assert same(often["ema"], once["ema"]) and same(often["objective"], once["objective"])
    heard = sorted(path.name for path in tmp_path.glob("*/listen-*.wav"))
    assert heard == ["listen-000001.wav", "listen-000002.wav", "listen-000002.wav"]
    first, second = (sf.read(tmp_path / "often" / name)[0] for name in heard[:2])
    assert np.array_equal(second, sf.read(tmp_path / "once" / heard[2])[0])
    assert first.shape == second.shape and not np.array_equal(first, second)
    assert len(first) == (4 * RATE // 128 * 128 if model == "vae" else 2**15)
    if model == "waveform":             # whose context is met, but for what the equaliser does
        held_out = train.music(Namespace(model="vae", data=[str(music)], valid=None,
                                         windows=[2**13], out=tmp_path))[1]
        context = held_out.crop(0.5 / 2, 2**15)[0].T[:2**13]
        assert np.corrcoef(second[:2**13].ravel(), context.ravel())[0, 1] > 0.9


@pytest.mark.slow
def test_half_precision_changes_a_loss_only_slightly(vae_file, tmp_path):
    """--precision bf16, of a VAE and of its decoder."""
    for model, more in (("vae", []), ("decoder", ["--vae", vae_file])):
        for precision in ("fp32", "bf16"):
            fit(model, tmp_path / model / precision, "--steps", 1, *SHORT, *more,
                "--precision", precision)
        plain, half = (float(losses(tmp_path / model / name)[0]) for name in ("fp32", "bf16"))
        assert plain != half and half == pytest.approx(plain, rel=0.02)


def test_a_latent_run_takes_the_vae_it_is_told(vae_file, tmp_path):
    """That of --vae, a VAE's file or a latent model's; else the shipped one, if it is of the run's
    size."""
    def taken(size, given=None):
        return train.vae_for(Namespace(size=size, vae=given), None, None)[0].state_dict()

    shipped = ROOT / "checkpoints" / "latent.pt"
    save_checkpoint(tmp_path / "classifier.pt", "classifier", tiny("classifier"))
    assert same(taken("tiny", vae_file), torch.load(vae_file)["ema"])
    of_shipped = sample.load_checkpoint(shipped).vae.state_dict()
    assert same(taken("small"), of_shipped) and same(taken("tiny", shipped), of_shipped)
    with pytest.raises(sample.UserError, match="not of size tiny: first train one, with --model"):
        taken("tiny")
    with pytest.raises(sample.UserError, match="holds a classifier model"):
        taken("tiny", tmp_path / "classifier.pt")


def test_a_decoder_run_without_a_vae_takes_the_shipped_one(tmp_path):
    """With the recipe of its size; another --size is refused."""
    options = train.parse(["--model", "decoder", "--device", "cpu", "--out", str(tmp_path)])
    _, taken = train.settle(options)
    assert taken.kind == "vae" and options.size == "small" and options.steps == 4000
    with pytest.raises(sample.UserError, match="latent.pt has another --size"):
        fit("decoder", tmp_path)


def test_a_classifier_begins_again_only_with_classes_that_it_knows(music, tmp_path):
    """--init: if no folder has the name of one of its classes, these are named. Clips fit into its
    positions."""
    given = "--init", tmp_path / "first.pt", "--data", music, "--steps", 0
    net = tiny("classifier", classes=2)
    save_checkpoint(tmp_path / "first.pt", "classifier", net, classes=["fado", "loud"])
    assert fit("classifier", tmp_path / "one", *given)["classes"] == ["fado", "loud"]
    save_checkpoint(tmp_path / "first.pt", "classifier", net, classes=["fado", "jazz"])
    with pytest.raises(sample.UserError, match="of its classes, fado, jazz"):
        fit("classifier", tmp_path / "none", *given)
    with pytest.raises(sample.UserError, match="--windows: a clip of this model has at most 10.00"):
        fit("classifier", tmp_path / "long", *given, "--windows", 10.1)


def test_half_of_the_clips_meet_the_models_own_error():
    """If asked: in one stretch, of up to the whole clip, and while training only; another share
    gives another loss. Times are spread evenly over (0, 1]."""
    vae, net = tiny("vae"), tiny("latent")
    assert "share" not in train.Denoising(net, vae).draw(np.random.default_rng(0), 2**12)
    objective = train.Denoising(net, vae, own_error=True)
    draws = [objective.draw(np.random.default_rng(k), 2**12) for k in range(400)]
    shares = [draw["share"][0].max() for draw in draws]
    assert 0.4 < np.mean([share > 0 for share in shares]) < 0.55 and 0.9 < max(shares) < 1
    assert np.histogram([draw["t"] for draw in draws], 4, (0, 1))[0].min() > 70
    for draw in draws:
        inside = draw["share"][0] > 0
        assert (np.diff(inside.astype(int)) != 0).sum() <= 2
        assert len(set(draw["share"][0][inside])) <= 1

    draw = next(draw for draw in draws if draw["share"].any() and draw["t"] < 0.5)
    batch = {name: torch.from_numpy(np.asarray(value))[None] for name, value in draw.items()}
    batch["encoded"] = torch.tensor([True])
    latents = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))

    def loss(share):
        return objective(latents, **batch | {"share": share})["loss"]

    share = batch["share"]
    assert loss(share) != loss(share / 2)
    objective.eval()
    assert loss(share) == loss(0 * share)


def test_the_share_of_its_own_error_goes_into_x_t_and_not_into_the_target():
    """x_t is alpha_t (x_0 + share (x0_hat - x_0)) + sigma_t eps, for a model whose x0_hat has a
    known error; v still leads to x_0. A share of zero, or a model without error, leaves eps. No
    gradient leads through the estimate."""
    g = torch.Generator().manual_seed(0)
    x_0, eps, first_eps, wrong = torch.randn(4, 3, 2, 16, generator=g, dtype=torch.float64)
    t = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
    share = torch.tensor([0.0, 0.7]).repeat_interleave(8)
    alpha_t, sigma_t = (c.reshape(-1, 1, 1) for c in alpha_sigma(t))
    wrong.requires_grad_()
    objective = train.Denoising(tiny("latent"))

    def right(x_t, t):
        return alpha_t * first_eps - sigma_t * x_0

    noise = objective.with_own_error(lambda x_t, t: right(x_t, t) - wrong / sigma_t, x_0, t, eps,
                                     first_eps, share)
    x_t, v = add_noise(x_0, noise, t)
    assert not noise.requires_grad
    torch.testing.assert_close(x_t, alpha_t * (x_0 + share * wrong) + sigma_t * eps)
    torch.testing.assert_close(x0_from_v(x_t, v, t), x_0)
    noise = objective.with_own_error(right, x_0, t, eps, first_eps, share)
    torch.testing.assert_close(noise, eps)


def test_the_unet_weighs_its_error():
    """The loss of a waveform model is the mean square of weigh(error of v)."""
    net = tiny("waveform")
    net.set_spectrum(torch.logspace(0, -2, 64))
    x, noise = torch.randn(2, 2, 2**12), torch.randn(2, 2, 2**12)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    x_t, v = add_noise(x / net.scale, noise, t)
    expected = net.weigh(v - net(x_t, t), t.float()).square().mean()
    torch.testing.assert_close(train.Denoising(net)(x, t, noise)["loss"], expected)


def test_a_classifier_learns_its_classes_from_a_part_of_the_patches():
    """Binary cross-entropy, label -1 being no class; while training without a quarter of the
    columns and two rows."""
    net, seen = tiny("classifier", classes=3), []
    net.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1] - 2))
    objective, x = train.Classifying(net).eval(), 0.1 * torch.randn(2, 2, RATE)
    batch = {"label": torch.tensor([2, -1]), "patchout": torch.tensor([1, 2])}
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    truth = torch.tensor([[0.0, 0, 1], [0, 0, 0]])
    torch.testing.assert_close(objective(x, **batch)["loss"], bce(net.listen(x, RATE)[0], truth))
    objective.train()(x, **batch)
    assert seen == [8 * 6, 8 * 6, 6 * 5]


def test_a_classifier_for_guidance_meets_estimates_of_noised_clips(latent_file):
    """Two thirds of the clips: x0_hat of the noised latents, decoded, each clip by itself; the
    others are left as they are, bit for bit. Nothing of the denoiser is trained or saved."""
    denoiser = sample.load_checkpoint(latent_file)
    objective = train.Classifying(tiny("classifier", classes=3), denoiser)
    assert all(name.startswith("net.") for name in objective.state_dict())

    # What is drawn for each clip.
    rng, window = np.random.default_rng(1), 2**14 + 50
    drawn = [objective.draw(rng, window) for _ in range(300)]
    times = np.array([one["t"] for one in drawn])
    assert 0.6 < (times > 0).mean() < 0.73 and times.max() > 0.97
    assert abs(times[times > 0].mean() - 0.5) < 0.06

    # Clips at three times, one of them 0.
    x = 0.1 * torch.randn(3, 2, window)
    t = torch.tensor([0.7, 0.0, 0.3], dtype=torch.float64)
    eps = torch.from_numpy(np.stack([one["eps"] for one in drawn[:3]]))
    made = objective.estimated(x, t, eps)
    assert torch.equal(made[1], x[1]) and made.shape == x.shape
    for i in (0, 2):
        x_0 = denoiser.encode(x[i:i + 1])
        x_t, _ = add_noise(x_0, eps[i:i + 1], t[i:i + 1])
        x0_hat = x0_from_v(x_t, denoiser.net(x_t, t[i:i + 1].float()), t[i:i + 1])
        expected = denoiser.decode(x0_hat)[0, :, :window]
        torch.testing.assert_close(made[i], expected, rtol=1e-4, atol=1e-5)

    # That is what the loss is about.
    batch = {"label": torch.tensor([2, 0, 1]), "patchout": torch.tensor([1, 2, 3])}
    plain = train.Classifying(objective.net).eval()
    expected = plain(made, **batch)["loss"]
    torch.testing.assert_close(objective.eval()(x, t=t, eps=eps, **batch)["loss"], expected)
    assert (plain(x, **batch)["loss"] - expected).abs() > 1e-6


def test_a_denoiser_may_move_but_not_come_later(music, latent_file, vae_file, tmp_path):
    """A resumed run takes it from where it is said to be; one that began without stays so. Clips
    are no longer than its window, and it is a latent model."""
    given = "--data", music, "--steps", 2
    out = tmp_path / "one"
    fit("classifier", out, *given, *SHORT, "--denoiser", latent_file)
    moved = latent_file.rename(tmp_path / "moved.pt")
    with pytest.raises(sample.UserError, match="latent.pt"):
        fit("classifier", out, "--resume", "--steps", 3)
    assert fit("classifier", out, "--resume", "--steps", 3, "--denoiser", moved)["step"] == 3

    fit("classifier", tmp_path / "two", *given, *SHORT)
    with pytest.raises(sample.UserError, match="another --denoiser"):
        fit("classifier", tmp_path / "two", "--resume", "--denoiser", moved)
    with pytest.raises(sample.UserError, match="^--windows: .* takes clips of at most"):
        fit("classifier", tmp_path / "three", *given, "--windows", 9, "--denoiser", moved)
    with pytest.raises(sample.UserError, match="holds a vae model"):
        fit("classifier", tmp_path / "four", *given, "--denoiser", vae_file)


def test_autoencoder_and_decoder_have_losses_of_their_own(monkeypatch):
    """Reconstruction and KL; and the contest, in which the discriminator minimises the hinge alone,
    the decoder all but the hinge."""
    vae, x, losses = tiny("vae"), 0.1 * torch.randn(2, 2, 2**12), train.autoencoder
    noise = torch.randn(2, 8, 32)
    share = torch.tensor([0.0, 0.2])
    reconstruction, mean, logvar = vae(x, noise, share)
    of_audio = losses.reconstruction_loss(reconstruction, x)
    expected = of_audio + losses.KL_WEIGHT * losses.kl(mean, logvar)
    torch.testing.assert_close(train.Autoencoding(vae)(x, noise, share)["loss"], expected)

    # An untrained discriminator moves the decoder too little to be seen.
    monkeypatch.setattr(losses, "ADVERSARIAL_WEIGHT", 1e6)
    monkeypatch.setattr(losses, "FEATURE_WEIGHT", 1e4)
    objective = train.Decoding(vae)
    objective(x, noise, share)["loss"].backward()
    made = vae(x, noise, share, posterior=False)[0]
    real, fake = objective.discriminator(x), objective.discriminator(made)
    of_decoder = (losses.reconstruction_loss(made, x)
                  + losses.ADVERSARIAL_WEIGHT * losses.adversarial_loss(fake)
                  + losses.FEATURE_WEIGHT * losses.feature_matching(real, fake))
    judged = objective.discriminator(made.detach())
    of_discriminator = losses.discriminator_loss(real, judged)
    for part, loss in ((vae.decoder, of_decoder), (objective.discriminator, of_discriminator)):
        expected = flat(torch.autograd.grad(loss, list(part.parameters())))
        assert (flat(p.grad for p in part.parameters()) - expected).norm() < 1e-4 * expected.norm()


def noisy_batch(objective):
    """Clips whose share of noise is none, the largest, and another, of 1000 draws; all shares."""
    draws = [objective.draw(sample.random_numbers(0, k), 2**12) for k in range(1000)]
    shares = np.array([draw["share"] for draw in draws])
    some = [np.argmin(shares), np.argmax(shares), np.argmax(shares > 0)]
    batch = {name: torch.from_numpy(np.stack([draws[k][name] for k in some]))
             for name in ("noise", "share")}
    return batch, shares


def test_the_decoder_meets_latents_with_noise():
    """In 70% of the clips white noise of up to 0.35 of the deviation that a channel has over batch
    and time; besides the posterior's while the encoder learns, which feels that deviation in its
    gradient; alone while only the decoder learns. None while validating."""
    vae, decoded = tiny("vae"), []
    vae.decoder.register_forward_pre_hook(
        lambda _, inputs: decoded.append(inputs[0].transpose(1, 2)))
    x = 0.1 * torch.randn(3, 2, 2**12)
    batch, shares = noisy_batch(train.Autoencoding(vae))
    assert 0.65 < np.mean(shares > 0) < 0.75 and shares.min() == 0 and 0.34 < shares.max() < 0.35
    mean, logvar = vae.posterior(x)
    white = batch["share"][:, None, None] * mean.std((0, 2), keepdim=True)
    expected = mean + (white + (logvar / 2).exp()) * batch["noise"]
    train.Autoencoding(vae)(x, **batch)
    torch.testing.assert_close(decoded[-1], expected)
    weights = list(vae.encoder.parameters())
    slopes = [flat(torch.autograd.grad(z.square().sum(), weights)) for z in (decoded[-1], expected)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3 * slopes[0].abs().max().item())

    objective = train.Decoding(vae)
    assert same(noisy_batch(objective)[0], batch)
    objective(x, **batch)
    torch.testing.assert_close(decoded[-1], mean + white * batch["noise"])
    for validated in (objective.eval(), train.Autoencoding(vae).eval()):
        validated(x, **batch)
        assert torch.equal(decoded[-1], mean)


def test_a_latent_model_can_be_given_another_vae(music, vae_file, tmp_path):
    """--init with --vae. Where only the decoder is another, from a run of --model decoder, encoder,
    statistics and transformer stay. Of another encoder, the latents are measured anew. Refused is a
    VAE of other channels."""
    latent = tmp_path / "latent" / "model.pt"
    first = "--data", music, *SHORT
    fit("latent", tmp_path / "latent", "--vae", vae_file, "--steps", 1, *first)
    fit("decoder", tmp_path / "tuned", "--vae", latent, "--steps", 1, *first)
    given = "--init", latent, "--steps", 0, *first, "--vae"
    fit("latent", tmp_path / "joined", *given, tmp_path / "tuned" / "model.pt")
    before, tuned, after = (sample.load_checkpoint(tmp_path / out / "model.pt")
                            for out in ("latent", "tuned", "joined"))
    assert same(after.net.state_dict(), before.net.state_dict())
    assert same(after.vae.decoder.state_dict(), tuned.net.decoder.state_dict())
    changed = {name.split(".")[0] for name, w in after.vae.state_dict().items()
               if not torch.equal(w, before.vae.state_dict()[name])}
    assert changed == {"decoder"}

    other = tiny("vae")
    save_checkpoint(tmp_path / "other.pt", "vae", other)
    fit("latent", tmp_path / "moved", *given, tmp_path / "other.pt")
    after = sample.load_checkpoint(tmp_path / "moved" / "model.pt")
    assert same(after.net.state_dict(), before.net.state_dict())
    halves = {name: w.half().float() if w.dim() > 1 else w
              for name, w in other.encoder.state_dict().items()}
    assert same(after.vae.encoder.state_dict(), halves)
    assert not torch.equal(after.vae.latent_std, before.vae.latent_std)
    assert after.vae.latent_std.max() != 1
    with pytest.raises(sample.UserError, match="--vae: .*model.pt has latents of 8 channels"):
        fit("latent", tmp_path / "wrong", *given, ROOT / "checkpoints" / "latent.pt")


def test_a_run_may_begin_with_the_weights_of_another(music, vae_file, tmp_path):
    """--init takes weights, VAE and statistics as they are; short clips see every position of the
    window."""
    first, second = tmp_path / "first", tmp_path / "second"
    fit("latent", first, "--data", music, "--vae", vae_file, "--steps", 3, "--windows", 0.3)
    fit("latent", second, "--data", music, "--init", first / "model.pt", "--steps", 0)
    one, two = (torch.load(run / "model.pt", weights_only=True) for run in (first, second))
    windows = [sample.load_state(run / "state.pt")["settings"]["windows"]
               for run in (first, second)]
    assert two["size"] == "tiny" and windows == [(103 * 128,), (2**15,)]
    for old, new in ((one["ema"], two["ema"]), (one["vae"]["weights"], two["vae"]["weights"])):
        assert all(torch.equal(old[name], new[name]) for name in old)
    fit("latent", second, "--resume", "--steps", 1)
    assert two["step"] == 3 and sample.load_checkpoint(second / "model.pt").step == 4   # of both

    objective = train.Denoising(tiny("latent"), tiny("vae"))
    starts = [objective.draw(np.random.default_rng(k), 103 * 128)["start"] for k in range(1000)]
    assert min(starts) == 0 and max(starts) == 256 - 103
    third = tmp_path / "third"
    with pytest.raises(sample.UserError, match="at most 0.74 s"):
        fit("latent", third, "--init", first / "model.pt", "--windows", 1)
    with pytest.raises(sample.UserError, match="holds a vae model"):
        fit("latent", third, "--init", vae_file)
    with pytest.raises(sample.UserError, match="first/model.pt has another --size"):
        fit("latent", third, "--init", first / "model.pt", "--size", "small")


def test_a_vae_out_of_a_latent_model_has_steps_of_its_own(tmp_path):
    """How long it was trained is not known; the steps of a latent model are the transformer's."""
    save_checkpoint(tmp_path / "latent.pt", "latent", tiny("latent"), tiny("vae"))
    state = torch.load(tmp_path / "latent.pt", weights_only=True)
    torch.save(state | {"step": 500}, tmp_path / "latent.pt")
    assert sample.open_checkpoint("vae", tmp_path / "latent.pt").step is None
    fit("vae", tmp_path / "run", "--init", tmp_path / "latent.pt", "--steps", 1, *SHORT)
    assert sample.load_checkpoint(tmp_path / "run" / "model.pt").step == 1


def test_short_windows_are_measured_and_validated_as_they_are(vae_file, tmp_path):
    """Files of 0.3 s, --windows of 0.2 s: the statistics come from clips that hold whole spectra;
    such files can be held out."""
    save_checkpoint(tmp_path / "first.pt", "latent", tiny("latent", hops=(64, 16)), tiny("vae"))
    (tmp_path / "data").mkdir()
    for k in range(5):
        sf.write(tmp_path / "data" / f"{k}.wav", synthetic.clip(7, k, 0.3)[0].T, RATE)
    fit("latent", tmp_path / "run", "--init", tmp_path / "first.pt", "--vae", vae_file,
        "--data", tmp_path / "data", "--steps", 1, *SHORT)
    power = sample.load_checkpoint(tmp_path / "run" / "model.pt").net.stages[0].power
    assert power.isfinite().all()
    assert np.isfinite(float(column(tmp_path / "run", "validation")[-1]))


def test_spectra_are_those_of_normalised_latents():
    """Whatever the mean and the scale of a VAE's latents: these are measured, and taken off."""
    found = []
    for scale, mean in ((1.0, 0.0), (3.0, 5.0)):
        random = np.random.default_rng(0)
        vae = Namespace(latent_mean=torch.zeros(8), latent_std=torch.ones(8),
                        posterior=lambda x: (scale * x[:, :, ::128].repeat(1, 4, 1) + mean, None))
        source = Namespace(crop=lambda place, n: (random.standard_normal((2, n), np.float32), 0))
        net = tiny("latent", hops=(64, 16))
        options = Namespace(size="tiny", workers=1, device=torch.device("cpu"))
        train.measure(options, net, vae, source)
        found.append(net.stages[0].power)
        assert vae.latent_mean.mean() == pytest.approx(mean, abs=0.2)
        assert vae.latent_std.mean() == pytest.approx(scale, rel=0.05)
    assert found[0].std() > 0
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_statistics_of_short_files_are_not_diluted(tmp_path):
    """Noise of deviation 0.1 in files of 0.3 s, shorter than the clips that are measured: that is
    the scale."""
    noise = np.random.default_rng(0).standard_normal((5, round(0.3 * RATE), 2))
    (tmp_path / "data").mkdir()
    for k in range(5):
        sf.write(tmp_path / "data" / f"{k}.wav", 0.1 * noise[k], RATE)
    fit("waveform", tmp_path / "run", "--data", tmp_path / "data", "--steps", 0, *SHORT)
    scale = sample.load_checkpoint(tmp_path / "run" / "model.pt").net.scale
    assert scale == pytest.approx(0.1, rel=0.1)


def test_the_frozen_vae_encodes_in_full_precision():
    """Whatever the autocast around it: --precision bf16 is for the network that is trained."""
    vae, net, seen = tiny("vae"), tiny("latent"), []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x, t = torch.randn(1, 2, 2**15), torch.tensor([0.5], dtype=torch.float64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        train.Denoising(net, vae)(x, t, torch.zeros(1, 8, 256))
    torch.testing.assert_close(seen[0], alpha_sigma(t)[0].float() * vae.encode(x))


@pytest.mark.slow
@real_music
@pytest.mark.parametrize("model", ["latent", "waveform"])
def test_what_the_diffusion_sees_has_variance_one(model, vae_file, tmp_path, monkeypatch):
    """Over real music, within 5%: each latent channel has mean 0 and variance 1, waveforms
    variance 1."""
    music = MUSIC / "train-0" / "action_cdogs"
    monkeypatch.setitem(train.MEASURED, "tiny", 250)
    more = ["--vae", vae_file] if model == "latent" else []
    fit(model, tmp_path / "run", "--data", music, "--steps", 0, *more)
    space = sample.load_checkpoint(tmp_path / "run" / "model.pt")
    tracks = train.music(Namespace(model="vae", data=[str(music)], valid=None, windows=[2**14],
                                   out=tmp_path))[0]
    # Other clips than those measured.
    clips = train.Clips(tracks, [2**14], lambda *_: {}, [], 1, train.VALID, count=257)
    with torch.no_grad():
        x_0 = torch.cat([space.encode(clips([k])["x"]) for k in range(257)], dim=-1)
    channels = x_0[0] if model == "latent" else x_0.reshape(1, -1)
    assert channels.mean(1).abs().max() < 0.05 and (channels.var(1) - 1).abs().max() < 0.05


def test_the_rate_is_constant_and_then_falls_to_zero():
    """Warm-up, a constant up to the last --cooldown share of the steps, from there to zero."""
    options = Namespace(steps=1000, warmup=50, lr=2.0, cooldown=0.4)
    rates = [train.learning_rate(options, i) for i in (0, 24, 49, 300, 599, 600, 700, 800, 999)]
    assert rates == pytest.approx([2 / 50, 1.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 2 / 400])
    assert train.turning_points(options) == (50, 600)
    options.warmup = 500                                # never more than a tenth of the steps
    assert train.turning_points(options) == (100, 600)
    options.steps = 3
    assert train.turning_points(options) == (1, 2) and train.learning_rate(options, 0) == 2
