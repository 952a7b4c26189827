"""train.py: clips, resuming, several processes, bad input, full disks; each on the real script with tiny models."""
import csv
import io
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
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


@pytest.fixture(autouse=True)
def few_statistics(monkeypatch):
    """20 clips are measured instead of 1000 and 4 validated instead of 32, but where a test is about the statistics."""
    monkeypatch.setattr(train, "MEASURED", 20)
    monkeypatch.setattr(train, "VALIDATED", 4)


@pytest.fixture
def music(tmp_path):
    """Five wav files of two classes, 3 s each, made by the synthetic musician."""
    for k in range(5):
        path = tmp_path / "music" / ("loud" if k % 2 else "quiet") / f"{k}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, synthetic.clip(7, k, 3.0)[0].T, RATE)
    return tmp_path / "music"


def vae_args(out, *more):
    return ["--model", "vae", "--size", "tiny", "--batch", "2", "--device", "cpu", "--out", str(out), *map(str, more)]


def script(*args, **kwargs):
    """Run train.py in a process of its own."""
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, args)], capture_output=True, text=True,
                          timeout=120, **kwargs)


def start(*args):
    """train.py running in a process of its own."""
    words = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    return subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def losses(out):
    return [row["loss"] for row in csv.DictReader((out / "log.csv").open())]


def same(a, b):
    """Whether two nested checkpoints are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---- clips ----------------------------------------------------------------------------------------------------------

def test_a_clip_is_a_function_of_seed_and_number(music):
    """Clip k is the same in any batch, after any other clip; another seed, stream or k gives another. A step takes
    `batch` clips of the longest window, or as many more of a shorter one as fit, and no clip is taken twice."""
    tracks = train.AudioFiles({str(p): sample.probe(str(p)) for p in sample.find_files([music])})
    def make(seed, stream=train.TRAIN):
        draw = lambda rng, window: {"u": rng.random(), "n": window}
        return train.Clips(tracks, [2**12, 3000], draw, ["loud", "quiet"], seed, stream, batch=4)

    batch, alone = make(0)([6, 4, 5]), make(0)([4])
    assert torch.equal(batch["x"][1], alone["x"][0]) and batch["u"][1] == alone["u"][0]
    for other in (make(1)([4]), make(0, train.VALID)([4]), make(0)([1])):
        assert other["u"] != alone["u"] and not torch.equal(other["x"], alone["x"])
    spread = train.Clips(tracks, [2**12], lambda *_: {}, ["loud", "quiet"], 0, train.VALID, count=5)
    assert spread(range(5))["label"].tolist() == [0, 0, 1, 1, 1]            # one of each file, all as long
    clips = train.Clips(tracks, [2**10, 2**12, 3000], lambda rng, window: {"n": window}, [], 0, batch=4)
    assert [len(clips.of_step(i)) for i in range(4)] == [16, 4, 4, 16]
    taken = [k for i in range(6) for k in clips.of_step(i)]
    assert len(set(taken)) == len(taken)
    for i in range(4):
        batch = clips(clips.of_step(i))
        assert set(batch["n"].tolist()) == {batch["x"].shape[-1]} == {clips.windows[i % len(clips.windows)]}


def test_a_clip_is_what_lies_at_its_place_in_the_file(tmp_path):
    """Seeking, resampling and cutting give the same samples as decoding the whole file, at any rate, mono too."""
    for rate, channels in ((44100, 2), (48000, 2), (22050, 1), (96000, 2), (32000, 2), (88200, 2), (176400, 1)):
        path = str(tmp_path / f"{rate}.wav")
        sf.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, (3 * rate, channels)), rate, subtype="FLOAT")
        whole = sample.to_stereo_44k(*sample.read_audio(path)).numpy()
        assert whole.shape == (2, 3 * RATE)
        tracks = train.AudioFiles({path: sample.probe(path)})
        for start in (0, 1, 54321, 3 * RATE - 5000):
            clip = tracks.read(0, start, 5000)
            assert clip.shape == (2, 5000) and np.abs(clip - whole[:, start:start + 5000]).max() < 1e-4


def test_latents_from_the_cache_are_those_of_the_clip(music, tmp_path, monkeypatch):
    """--cache: the normalised latents of the audio at that place, away from its ends; the loss is the same from either.
    Each file is encoded once, but again when it has changed, or for another VAE."""
    vae = train.VAE(train.autoencoder.PRESETS["tiny"]).eval()
    vae.latent_mean.normal_(), vae.latent_std.uniform_(0.5, 2)
    tracks = train.AudioFiles({str(p): sample.probe(str(p)) for p in sample.find_files([music])})
    cached = train.Latents(tracks, tmp_path / "cache", vae)
    stamps = [file.stat().st_mtime_ns for file in cached.files]
    assert [file.stat().st_mtime_ns for file in train.Latents(tracks, tmp_path / "cache", vae).files] == stamps
    edge = -(-vae.encoder_field // vae.hop)
    for track, start in ((0, 0), (1, 200), (4, 700)):
        fresh = vae.encode(torch.from_numpy(tracks.read(track, start * vae.hop, 256 * vae.hop))[None])[0]
        kept = torch.tensor(cached.read(track, start, 256))
        assert kept.shape == (8, 256) and (kept - fresh)[:, edge:-edge].abs().max() < 1e-3
    audio, rows = tracks.read(0, 0, 2**15), torch.tensor(cached.read(0, 0, 2**8))
    objective = train.Denoising(train.dit.build(train.dit.PRESETS["tiny"]).eval(), vae)
    x_0, draw = vae.encode(torch.from_numpy(audio)[None]), objective.draw(sample.random_numbers(0), 2**15)
    t, noise = torch.tensor([draw["t"]]), torch.from_numpy(draw["noise"])[None]
    fresh, same_clip, kept = (objective(x, t, noise)["loss"] for x in (torch.from_numpy(audio)[None], x_0, rows[None]))
    assert fresh == same_clip and abs(kept - fresh) < 0.01 * fresh
    for place in (0.0, 0.1, 0.35, 0.8, 1 - 1e-9):               # the same track, within a frame of the same second
        found = []
        for source in (tracks, cached):
            with monkeypatch.context() as spying:
                read = source.read
                spying.setattr(source, "read", lambda *asked: found.append(asked) or read(*asked))
                assert source.crop(place, 2**15)[0].shape == ((8 if source is cached else 2), 2**15 // source.unit)
        (a, start, _), (b, frame, _) = found
        assert a == b and abs(start - frame * vae.hop) <= vae.hop
    os.utime(tracks.paths[1], ns=(0, 0))
    assert len(set(train.Latents(tracks, tmp_path / "cache", vae).files) - set(cached.files)) == 1
    vae.latent_mean.add_(1)
    assert not set(cached.files) & set(train.Latents(tracks, tmp_path / "cache", vae).files)


def test_what_is_held_out_is_not_trained_on(music):
    """One file of twenty if there are four or more, each of them on one side; fewer are all trained on."""
    files = set(sample.find_files([music]))
    for some, held_out in ((files, 1), (sorted(files)[:4], 1), (sorted(files)[:3], 0)):
        options = train.argparse.Namespace(data=some, valid=None, windows=[2**12])
        trained, valid = (set(tracks.paths) for tracks in train.music(options))
        assert trained | valid == set(some) and len(valid) == 1 and len(valid - trained) == held_out


def damaged_flac(path):
    """A file that opens, at its beginning and its end, and cannot be decoded in between."""
    sf.write(path, synthetic.clip(7, 9, 3.0)[0].T, RATE)
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2] + bytes(4000) + data[len(data) // 2 + 4000:])
    return {str(path): sample.probe(str(path))}


def test_a_damaged_file_is_left_out_of_the_cache(music, tmp_path):
    """The other tracks keep their names and clips, as if it had not been there; with nothing else, that is an error."""
    whole = {str(p): sample.probe(str(p)) for p in sample.find_files([music])}
    damaged = damaged_flac(music / "loud" / "1.5.flac")
    assert damaged == {str(music / "loud" / "1.5.flac"): [3 * RATE, RATE, 2]}
    vae = train.VAE(train.autoencoder.PRESETS["tiny"]).eval().requires_grad_(False)
    expected = train.Latents(train.AudioFiles(whole), tmp_path / "expected", vae)
    cached = train.Latents(train.AudioFiles(dict(sorted((whole | damaged).items()))), tmp_path / "cache", vae)
    assert cached.broken == dict.fromkeys(damaged, "damaged") and expected.broken == {}
    for place in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1 - 1e-9):
        (a, i), (b, j) = (source.crop(place, 4096) for source in (cached, expected))
        assert np.array_equal(a, b)
        assert cached.paths[i] == expected.paths[j] and cached.names[i] == expected.names[j]
    with pytest.raises(sample.UserError, match="none of the 1 files"):
        train.Latents(train.AudioFiles(damaged), tmp_path / "cache", vae)


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
    assert train.AudioFiles({path: sample.probe(path) for path in found}).names == ["drums", "drums"]
    given = str(music / "classes" / "drums")
    assert train.parse(["--data", given]).data == [given]


def test_batches_arrive_in_order_whatever_the_workers():
    """Threads finish in any order; the loop gets batch after batch."""
    def slow(k):
        time.sleep(random.random() / 100)
        return k
    assert list(train.prefetch(slow, range(40), 4)) == list(range(40))


def test_synthetic_music_is_stereo_labelled_endless_and_cheap():
    """A function of (seed, k); all styles occur; sides differ; levels are those of music; far faster than real time."""
    began = time.process_time()
    clips = [synthetic.clip(0, k, 2.0) for k in range(40)]
    assert 80 / (time.process_time() - began) > 20
    assert {style for _, style in clips} == set(range(len(synthetic.STYLES)))
    for audio, _ in clips:
        assert audio.shape == (2, 2 * RATE) and audio.dtype == np.float32
        assert 0.02 < audio.std() < 0.4 and np.abs(audio).max() < 1 and np.corrcoef(audio)[0, 1] < 0.99
    assert np.array_equal(clips[5][0], synthetic.clip(0, 5, 2.0)[0])
    assert not np.array_equal(clips[5][0], synthetic.clip(1, 5, 2.0)[0])


# ---- resuming -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("data", ["folder", pytest.param("synthetic", marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_uninterrupted_one(data, music, tmp_path, monkeypatch):
    """Weights, averages, optimizer and losses, bit for bit, over both of the VAE's stages, with other workers."""
    more = ["--steps", 4, "--finetune-steps", 2, "--windows", 0.2] + (["--data", music] if data == "folder" else [])
    train.main(vae_args(tmp_path / "whole", *more, "--workers", 1))
    stopping = train.Trainer.stopping
    for stop in (2, 4, 5, None):                                # 4: between the stages
        monkeypatch.setattr(train.Trainer, "stopping", lambda self: stopping(self) or self.step == stop)
        train.main(vae_args(tmp_path / "parts", *more, "--workers", 3, *(["--resume"] if stop != 2 else [])))
    whole, parts = (sample.load_state(tmp_path / name / "state.pt") for name in ("whole", "parts"))
    assert whole["step"] == 6 and losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert (whole["ema"]["latent_std"] == 1).all()              # measured by a latent run
    for part in ("objective", "ema", "optimizers", "config"):
        assert same(whole[part], parts[part]), part


def test_a_run_with_two_optimizers_resumes(tmp_path, monkeypatch):
    """The states of Muon and of AdamW are kept, and matter. The windows of two lengths go on in turn."""
    save_checkpoint(tmp_path / "vae.pt", "vae", train.VAE(train.autoencoder.PRESETS["tiny"]))
    args = ["--model", "latent", "--size", "tiny", "--vae", tmp_path / "vae.pt", "--batch", 2, "--device", "cpu",
            "--windows", 0.2, 0.6]
    run = lambda out, *more: train.main([str(word) for word in [*args, "--out", tmp_path / out, *more]])
    run("whole", "--steps", 8)
    stopping = train.Trainer.stopping
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "stopping", lambda self: stopping(self) or self.step == 5)
        run("parts", "--steps", 8)
    run("parts", "--resume")
    whole, parts = (sample.load_state(tmp_path / name / "state.pt") for name in ("whole", "parts"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert all(same(whole[part], parts[part]) for part in ("objective", "ema", "optimizers"))


def test_muon_takes_the_matrices_of_blocks_and_vae_but_no_critic():
    """AdamW takes the rest; neither lets weights decay."""
    options = train.argparse.Namespace(lr=1.0, beta2=0.97)
    net, vae = train.dit.build(train.dit.PRESETS["tiny"]), train.VAE(train.autoencoder.PRESETS["tiny"])
    for objective, part in ((train.Denoising(net), net.blocks), (train.Autoencoding(vae), vae)):
        adamw, muon = train.make_optimizers(objective, options, muon=True)
        linear = {module.weight for module in part.modules() if isinstance(module, torch.nn.Linear)}
        assert set(muon.param_groups[0]["params"]) == linear
        assert set(adamw.param_groups[0]["params"]) == set(objective.parameters()) - linear
        assert adamw.defaults["betas"] == (0.9, 0.97)
        assert adamw.defaults["weight_decay"] == muon.defaults["weight_decay"] == 0


def test_the_average_follows_the_weights_and_is_what_is_validated(tmp_path, monkeypatch):
    """By 1 - decay of the way in each step; the decay begins small and grows up to the recipe's."""
    made = []
    monkeypatch.setattr(train.Trainer, "fit", lambda self: made.append(self))
    train.main(vae_args(tmp_path, "--steps", 1000, "--lr", 0.1, "--windows", 0.2, "--batch", 1))
    trainer, = made
    flat = lambda net: torch.cat([p.detach().flatten() for p in net.parameters()])
    for trainer.step, decay in ((0, 0.1), (5, 0.4), (500, 0.95)):
        before = flat(trainer.ema)
        trainer.update(iter([trainer.clips([trainer.step])]))
        weights = flat(trainer.objective.net)
        torch.testing.assert_close(flat(trainer.ema), before.lerp(weights, 1 - decay), rtol=0, atol=1e-6)
    averaged = train.Autoencoding(trainer.ema).eval()
    expected = np.mean([averaged(**trainer.held_out([k]))["loss"].item() for k in range(4)])
    assert trainer.validate() == pytest.approx(expected)


def test_finetuning_freezes_the_averaged_encoder(tmp_path):
    """The second stage starts from the averaged weights; it trains the decoder and the discriminator, nothing else, and
    by AdamW alone."""
    args = vae_args(tmp_path, "--steps", 4, "--windows", 0.2, "--batch", 1)
    train.main(args + ["--finetune-steps", "0"])
    before = sample.load_state(tmp_path / "state.pt")
    train.main(args + ["--finetune-steps", "2", "--resume"])
    after = sample.load_state(tmp_path / "state.pt")
    assert len(before["optimizers"]) == 2 and len(after["optimizers"]) == 1
    for name, weight in before["ema"].items():
        frozen = name.startswith(("encoder", "latent"))
        trained, averaged = after["objective"]["net." + name], after["ema"][name]
        assert torch.equal(weight, trained) == torch.equal(weight, averaged) == frozen
    assert not same([w for name, w in before["objective"].items() if name.startswith("critic")],
                    [w for name, w in after["objective"].items() if name.startswith("critic")])


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    """kill -9 at random moments: the files on the disk always load, and the next run gets further."""
    log, steps = tmp_path / "run" / "log.csv", [0]
    args = vae_args(tmp_path / "run", "--batch", 1, "--steps", 1000, "--save-every", 3, "--resume")
    lines = lambda: len(log.read_bytes().splitlines()) if log.exists() else 0
    for _ in range(2):
        process, before, known = start(*args), time.time(), lines()
        while time.time() - before < 60 and lines() < known + 5:        # the header, and enough steps for a save
            time.sleep(0.05)
        time.sleep(random.random() * 0.3)
        process.kill()
        process.wait()
        states = {file.name: sample.load_state(file) for file in (tmp_path / "run").glob("*.pt")}
        steps.append(states["state.pt"]["step"])
    assert steps == sorted(set(steps)), steps
    logged = {int(row["step"]) for row in csv.DictReader(log.open())}       # what was done twice is in the log twice
    assert logged == set(range(1, len(logged) + 1))


def test_interrupt_saves_and_ends_cleanly(tmp_path):
    """SIGTERM: exit status 0, a checkpoint of the last step, and the command that goes on."""
    process, log = start(*vae_args(tmp_path / "run", "--steps", 10000)), tmp_path / "run" / "log.csv"
    while not log.exists() or len(log.read_bytes().splitlines()) < 4:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped; to go on" in out and out.strip().endswith("--resume")
    assert sample.load_state(tmp_path / "run" / "state.pt")["step"] == len(losses(tmp_path / "run"))


def test_a_run_is_not_overwritten_by_mistake(tmp_path):
    """A second run into the same folder needs --resume, which cannot change what the run is; nor does a new run go
    where only a model lies."""
    args = vae_args(tmp_path, "--steps", 2, "--finetune-steps", 0)
    train.main(args)
    stamps = lambda: [(tmp_path / name).stat().st_mtime_ns for name in ("state.pt", "model.pt", "log.csv")]
    before = stamps()
    with pytest.raises(sample.UserError, match="holds a model: choose another --out; or --resume"):
        train.main(args)
    with pytest.raises(sample.UserError, match="another --seed"):
        train.main(args + ["--resume", "--seed", "5"])
    assert stamps() == before
    (tmp_path / "alone").mkdir()
    (tmp_path / "model.pt").rename(tmp_path / "alone" / "model.pt")
    for more in ([], ["--resume"]):
        with pytest.raises(sample.UserError, match="alone holds a model: choose another --out"):
            train.main(vae_args(tmp_path / "alone", "--steps", 2, *more))


def test_resuming_restores_the_settings(tmp_path):
    """--out and --resume are enough for a run with settings of its own; another --batch is refused, --steps not."""
    train.main(vae_args(tmp_path, "--steps", 2, "--finetune-steps", 0, "--lr", 5e-4, "--windows", 0.2, 0.4))
    before = sample.load_state(tmp_path / "state.pt")
    again = ["--model", "vae", "--device", "cpu", "--out", str(tmp_path), "--resume"]
    train.main(again + ["--steps", "3"])
    after = sample.load_state(tmp_path / "state.pt")
    assert after["size"] == "tiny" and after["step"] == 3
    assert after["settings"] == before["settings"] | {"steps": 3}
    with pytest.raises(sample.UserError, match="another --batch: leave it out"):
        train.main(again + ["--batch", "4"])


def test_what_cannot_be_resumed_is_named(tmp_path):
    """--resume in the folder of another kind of model."""
    train.main(vae_args(tmp_path, "--steps", 1, "--finetune-steps", 0))
    with pytest.raises(sample.UserError, match=f"{tmp_path}/state.pt holds a vae model, not a classifier"):
        train.main(["--model", "classifier", "--device", "cpu", "--out", str(tmp_path), "--resume"])


def test_a_second_stage_is_prolonged_by_its_own_flag(tmp_path):
    """Another --steps would make the rate of a VAE's second stage negative; it takes --finetune-steps only."""
    train.main(vae_args(tmp_path, "--steps", 2, "--finetune-steps", 1))
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(sample.UserError, match="another --steps: leave it out"):
        train.main(vae_args(tmp_path, "--resume", "--steps", 9))
    assert (tmp_path / "state.pt").read_bytes() == before
    train.main(vae_args(tmp_path, "--resume", "--finetune-steps", 2))
    assert sample.load_state(tmp_path / "state.pt")["step"] == 4


def test_a_run_saves_in_its_second_stage_too(tmp_path):
    """By default ten times in all steps, those of both stages together."""
    asked = lambda *steps: train.parse(vae_args(tmp_path, "--steps", steps[0], "--finetune-steps", steps[1]))
    for steps, due in (((0, 2000), 200), ((3000, 2000), 500), ((90_000, 0), 1000), ((10, 10), 50)):
        options = asked(*steps)
        train.settle(options)
        assert options.save_every == due


@pytest.mark.parametrize("words", ["--model latent --finetune-steps 5", "--model waveform --compile", "--valid music",
                                   "--model vae --vae vae.pt", "--model classifier --cache", "--cache"])
def test_a_flag_that_would_do_nothing_is_refused(words, tmp_path):
    """It belongs to another model, or needs --data."""
    flag = next(word for word in words.split()[::-1] if word.startswith("--"))
    with pytest.raises(sample.UserError, match=f"^{flag} does nothing"):
        train.main([*words.split(), "--device", "cpu", "--out", str(tmp_path)])


# ---- several processes ----------------------------------------------------------------------------------------------

WORKER = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
import train
train.MEASURED = 20
train.time.process_time = lambda: 3600.0
recipes = train.RECIPES["vae"]
recipes["tiny"] = train.replace(recipes["tiny"], muon=False)      # which makes whole steps of rounding, in bfloat16
gradients, seen, first = train.Trainer.gradients, [], []
def spy(self, stream):
    loss = gradients(self, (seen.append(batch["k"].tolist()) or batch for batch in stream))
    first or first.append([p.grad.clone() for p in self.objective.parameters() if p.grad is not None])
    return loss
train.Trainer.gradients = spy
train.main(sys.argv[3:])
rank = os.environ.get("RANK", "0")
torch.save({"seen": seen, "gradient": first[0]}, f"{sys.argv[2]}.{rank}")
"""


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    """torchrun, gloo: first gradient and, but for what AdamW makes of rounding, weights of two processes; no clip is
    read twice; the core-hours of both are logged."""
    (tmp_path / "worker.py").write_text(WORKER)
    more = ("--batch", 4, "--steps", 5, "--finetune-steps", 0)

    def run(python, name):
        words = [*python, tmp_path / "worker.py", ROOT, tmp_path / name, *vae_args(tmp_path / f"out-{name}", *more)]
        subprocess.run([*map(str, words)], check=True, timeout=120, capture_output=True)

    run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], "two")
    run([sys.executable], "one")
    ranks, one = [torch.load(tmp_path / f"two.{r}") for r in (0, 1)], torch.load(tmp_path / "one.0")
    for i in range(5):                                          # each step takes two clips on each process
        taken = [rank["seen"][i] for rank in ranks]
        assert np.shape(taken) == (2, 2) and sorted(np.ravel(taken)) == list(range(4 * i, 4 * i + 4))
    flat = lambda tensors: torch.cat([g.flatten() for g in tensors])
    a, b = flat(ranks[0]["gradient"]), flat(one["gradient"])
    assert (a - b).norm() < 1e-6 * b.norm()
    a, b = (flat(sample.load_state(tmp_path / out / "state.pt")["objective"].values()) for out in ("out-two", "out-one"))
    assert (a - b).norm() < 1e-4 * b.norm()
    for name, processes in (("two", 2), ("one", 1)):
        rows = list(csv.DictReader((tmp_path / f"out-{name}" / "log.csv").open()))
        assert {float(row["core_hours"]) for row in rows} == {processes}


def test_a_batch_is_shared_out_evenly(tmp_path, monkeypatch):
    """Each process takes as many clips as any other: another --batch is refused."""
    monkeypatch.setattr(sample, "WORLD", 2)
    with pytest.raises(sample.UserError, match="--batch 3 is no multiple of the 2 processes"):
        train.main(vae_args(tmp_path, "--batch", 3))


STAGES = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import train
train.MEASURED, train.VALIDATED, out = 4, 2, Path(sys.argv[2])
validate = train.Trainer.validate
train.Trainer.validate = lambda self: time.sleep(2) or validate(self)         # on the first process only
tiny = ["--size", "tiny", "--batch", "2", "--device", "cpu", "--steps", "2"]
train.main(["--model", "vae", "--finetune-steps", "2", "--out", str(out / "vae"), *tiny])
assert sample.load_state(out / "vae" / "state.pt")["step"] == 4
train.main(["--model", "latent", "--vae", str(out / "vae" / "model.pt"), "--out", str(out / "latent"),
            "--data", str(out / "music"), "--cache", "--windows", "0.2", "0.4", *tiny])
assert sample.load_checkpoint(out / "latent" / "model.pt").step == 2
(out / f"done.{sample.RANK}").touch()
"""


@pytest.mark.slow
def test_several_processes_end_together(music, tmp_path):
    """torchrun, gloo, both stages of a VAE and a latent model: the checkpoint is there for every process when it
    leaves the run, although the first one alone validates and saves."""
    (tmp_path / "stages.py").write_text(STAGES)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += [str(tmp_path / "stages.py"), str(ROOT), str(tmp_path)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "done.0").exists() and (tmp_path / "done.1").exists()


# ---- bad input and bad luck -----------------------------------------------------------------------------------------

def test_bad_files_are_named_once_and_left_out(music, tmp_path, capsys):
    """Truncated, text, empty, unreadable, short, link without end: training runs, and each is in the report once."""
    sf.write(music / "loud" / "long.mp3", synthetic.clip(7, 9, 5.0)[0].T, RATE)
    data = (music / "loud" / "long.mp3").read_bytes()
    (music / "loud" / "cut.mp3").write_bytes(data[:500])
    (music / "loud" / "text.wav").write_text("this is not audio")
    (music / "loud" / "empty.ogg").touch()
    os.mkfifo(music / "loud" / "pipe.wav")
    (music / "loud" / "self.flac").symlink_to(music / "loud" / "self.flac")
    sf.write(music / "loud" / "short.wav", np.zeros((4410, 2)), RATE)
    train.main(vae_args(tmp_path / "run", "--data", music, "--steps", 2, "--finetune-steps", 0))
    out = capsys.readouterr().out
    bad = ["cut.mp3", "text.wav", "empty.ogg", "pipe.wav", "self.flac", "short.wav"]
    assert [out.count(name) for name in bad] == [1] * 6 and "--data: 6 of 12 files" in out
    assert (tmp_path / "run" / "model.pt").exists()


def test_a_truncated_file_is_as_long_as_what_can_be_decoded(tmp_path):
    """The header of a cut wav or mp3 promises more than there is: clips come from the part that exists."""
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
    """An ogg cut after its first page, which has more samples than it says: libsndfile takes it for 2^63 - 1 frames."""
    sf.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, (RATE, 1)), RATE)
    data = bytearray(path.read_bytes())
    pages = [i for i in range(len(data)) if data[i:i + 4] == b"OggS"]
    first, end = next((i, j) for i, j in zip(pages, pages[1:]) if any(data[i + 6:i + 14]))       # with audio in it
    data[first + 6:first + 14], data[first + 22:first + 26], crc = struct.pack("<q", 32), bytes(4), 0
    for byte in data[first:end]:
        crc ^= byte << 24
        for _ in range(8):
            crc = crc << 1 ^ (0x104C11DB7 if crc >> 31 else 0)
    data[first + 22:first + 26] = struct.pack("<I", crc)
    path.write_bytes(data[:end + 100])


def test_a_cut_ogg_is_no_longer_than_what_can_be_read(music, tmp_path, capsys):
    """Its header claims 2^63 - 1 frames: it is used as far as it reaches, or left out, and training runs."""
    path = music / "loud" / "endless.ogg"
    endless_ogg(path)
    with sf.SoundFile(path) as file:
        assert file.frames == 2**63 - 1
    frames, rate, channels = sample.probe(str(path))
    assert frames == sample.read_audio(path)[0].shape[1] < RATE and (rate, channels) == (RATE, 1)
    train.main(vae_args(tmp_path / "run", "--data", music, "--steps", 1, "--finetune-steps", 0, "--windows", 1))
    assert "endless.ogg (too short" in capsys.readouterr().out
    clip = train.AudioFiles({str(path): [frames, rate, channels]}).read(0, 1000, 500)
    assert np.array_equal(clip, sample.to_stereo_44k(*sample.read_audio(path)).numpy()[:, 1000:1500])


@pytest.mark.parametrize("name", ["nothing", "only text", "too short"])
def test_a_folder_without_usable_audio_ends_in_one_sentence(name, tmp_path, capsys):
    """Exit status 2, and one line on stderr."""
    (tmp_path / "data").mkdir()
    if name == "only text":
        (tmp_path / "data" / "a.wav").write_text("no audio")
    if name == "too short":
        sf.write(tmp_path / "data" / "a.wav", np.zeros((4410, 2)), RATE)
    with pytest.raises(SystemExit) as end:
        sample.run(lambda: train.main(vae_args(tmp_path / "run", "--data", tmp_path / "data", "--steps", 2)))
    said = capsys.readouterr().err.splitlines()[-1]             # above it, tqdm's bars
    assert end.value.code == 2 and said.startswith("error: --data: no usable file")
    assert not (tmp_path / "run" / "model.pt").exists()


@real_music
def test_odd_files_can_be_trained_on(tmp_path):
    """Mono, 48 and 22.05 kHz, mp3, flac, 24 bits, float beyond 1, half a second, silence."""
    train.main(vae_args(tmp_path / "run", "--data", MUSIC / "odd", "--steps", 4, "--finetune-steps", 1))
    assert all(np.isfinite(float(loss)) for loss in losses(tmp_path / "run"))


def test_a_full_disk_loses_no_checkpoint(tmp_path):
    """A write that fails leaves the earlier files as they are, and no partial one; exit status 1 and a sentence."""
    args = vae_args(tmp_path / "run", "--steps", 2, "--finetune-steps", 0)
    train.main(args)
    content = lambda: {file.name: file.read_bytes() for file in (tmp_path / "run").glob("*.p*t")}
    before = content()
    limit = len(before["state.pt"]) // 2
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    result = script(*args, "--resume", "--steps", 4, "--save-every", 3, preexec_fn=full)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "state.pt cannot be read or written" in result.stderr.splitlines()[-1]
    assert before.keys() == {"state.pt", "model.pt"} and content() == before


def test_a_loss_that_is_not_finite_skips_the_step(tmp_path, monkeypatch):
    """One NaN: weights and averages stay as they were, the log has it. Ten in a row: the run ends with advice."""
    gradients, kept = train.Trainer.gradients, {}

    def poisoned(self, stream):
        loss = gradients(self, stream)
        if self.step in poison:
            kept["before"] = [p.detach().clone() for p in (*self.objective.net.parameters(), *self.ema.parameters())]
            next(self.objective.net.parameters()).grad.fill_(float("nan"))
            return float("nan")
        if self.step - 1 in poison:
            kept["after"] = [p.detach().clone() for p in (*self.objective.net.parameters(), *self.ema.parameters())]
        return loss
    monkeypatch.setattr(train.Trainer, "gradients", poisoned)
    poison = {2}
    train.main(vae_args(tmp_path / "a", "--steps", 4, "--finetune-steps", 0, "--windows", 0.2, "--batch", 1))
    assert [loss == "nan" for loss in losses(tmp_path / "a")] == [False, False, True, False]
    assert same(kept["before"], kept["after"])
    poison = set(range(1, 100))
    with pytest.raises(sample.UserError, match="lower --lr") as error:
        train.main(vae_args(tmp_path / "b", "--steps", 40, "--finetune-steps", 0, "--windows", 0.2, "--batch", 1))
    assert error.value.status == 1


def test_gradients_are_clipped(tmp_path, monkeypatch):
    """The log has their norm as it was; the optimizer gets them with one of at most 1.0, for the network and the
    discriminator by themselves."""
    squares = []

    def spied(step):
        def spy(self):
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            squares.append(sum(grad.square().sum().item() for grad in grads))
            return step(self)
        return spy
    for kind in torch.optim.AdamW, torch.optim.Muon:
        monkeypatch.setattr(kind, "step", spied(kind.step))
    train.main(vae_args(tmp_path, "--steps", 2, "--finetune-steps", 1))
    logged = [float(row["gradient_norm"]) for row in csv.DictReader((tmp_path / "log.csv").open())]
    seen = [sum(squares[i:i + 2])**0.5 for i in (0, 2, 4)]             # of the last step, AdamW's alone
    assert min(logged) > 2 and max(seen[:2]) < 1.001 and 1 < seen[2] < 2**0.5 + 0.001


@pytest.mark.parametrize("words", ["--batch 0", "--workers 0", "--save-every 0", "--steps -1",
                                   "--lr 0", "--lr nan", "--seed -1", "--windows 0.1", "--windows inf",
                                   "--cooldown 0"])
def test_numbers_out_of_range_are_refused(words, capsys):
    """Exit status 2, and a line that names the flag."""
    with pytest.raises(SystemExit) as end:
        train.main(words.split())
    assert end.value.code == 2 and f"error: argument {words.split()[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("error, status, words", [
    (sample.UserError("no such thing"), 2, "no such thing"), (KeyboardInterrupt(), 130, "interrupted"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "--batch"), (MemoryError(), 1, "--batch"),
    (RuntimeError("std::bad_alloc"), 1, "--batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 1, "--batch"),
    (OSError(28, "No space left", "x.pt"), 1, "x.pt")])
def test_errors_end_in_one_line(error, status, words, capsys):
    """run(main): the status, and one line on stderr that says what to do."""
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        sample.run(main)
    err = capsys.readouterr().err
    assert end.value.code == status and words in err and err.count("\n") == 1


def test_other_errors_keep_their_traceback():
    """"alloc" alone does not make one of memory."""
    def main():
        raise RuntimeError("Placeholder storage has not been allocated on MPS device!")
    with pytest.raises(RuntimeError, match="Placeholder"):
        sample.run(main)


@pytest.mark.parametrize("device", ["cuda:99", "gramophone"])
def test_a_device_that_is_not_there_is_refused(device, tmp_path, capsys):
    """Exit status 2, and one line that names the flag."""
    with pytest.raises(SystemExit) as end:
        sample.run(lambda: train.main(vae_args(tmp_path, "--device", device)))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith(f"error: --device {device} cannot be used: ") and err.count("\n") == 1


def test_names_that_stdout_cannot_encode_are_printed_escaped(monkeypatch):
    """Files may have any name, a terminal any encoding."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    sample.run(lambda: sample.say("tr\u00e4ck \u266a \udce4.wav"))
    assert sys.stdout.buffer.getvalue() == rb"tr\xe4ck \u266a \udce4.wav" + b"\n"


class Touch:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_foreign_files_are_no_checkpoints(tmp_path):
    """Truncated, text, pickled code, or another program's dictionary: a sentence with the file's name."""
    train.main(vae_args(tmp_path / "run", "--steps", 1, "--finetune-steps", 0))
    whole = (tmp_path / "run" / "model.pt").read_bytes()
    for name, content in {"cut.pt": whole[:len(whole) // 2], "text.pt": b"hello", "empty.pt": b""}.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"kind": "vae", "weights": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save({"format": 2, "kind": "vae"}, tmp_path / "later.pt")
    torch.save({"format": 1, "kind": "vae", "code": Touch(tmp_path / "executed")}, tmp_path / "code.pt")
    messages = {"cut.pt": "is damaged", "text.pt": "is damaged", "empty.pt": "is damaged", "code.pt": "is damaged",
                "other.pt": "is damaged, or no checkpoint", "missing.pt": "does not exist",
                "later.pt": "holds a foreign model"}
    for name, words in messages.items():
        with pytest.raises(sample.UserError, match=f"{name} {words}"):
            sample.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()


# ---- models ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", ["latent", "waveform", "classifier"])
def test_each_model_trains_and_loads(model, music, tmp_path, monkeypatch, capsys):
    """A few steps from a folder; model.pt is the averaged model in half precision; the latent one carries its VAE. The
    scripts still take the shipped model; the last line is the command that takes the new one."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint("vae.pt", "vae", train.VAE(train.autoencoder.PRESETS["tiny"]))
    args = ["--model", model, "--size", "tiny", "--data", str(music), "--steps", "2", "--batch", "2", "--device", "cpu"]
    train.main(args + (["--cache", "--vae", "vae.pt"] if model == "latent" else []))
    last = capsys.readouterr().out.splitlines()[-1]
    assert (f"python sample.py --model {model} --checkpoint runs/{model}/model.pt" in last) == (model != "classifier")
    assert sample.open_checkpoint(model).path == str(ROOT / "checkpoints" / f"{model}.pt")
    state, small = sample.load_state(f"runs/{model}/state.pt"), sample.load_checkpoint(f"runs/{model}/model.pt")
    assert os.path.getsize(small.path) < os.path.getsize(f"runs/{model}/state.pt") / 4
    pairs = [(state["ema"], small.net)] + ([(state["vae"]["weights"], small.vae)] if model == "latent" else [])
    for whole, net in pairs:
        for name, weight in net.state_dict().items():
            assert torch.equal(weight, whole[name].half().float() if weight.dim() > 1 else whole[name])
    assert small.kind == model and small.classes == (["loud", "quiet"] if model == "classifier" else None)
    if model != "classifier":
        audio = torch.randn(1, 2, small.window * small.hop)
        x = small.encode(audio)
        assert x.shape == (1, small.channels, small.window) and small.decode(x).shape == audio.shape
    if model == "latent":
        assert (small.vae.latent_mean != 0).all() and (small.vae.latent_std != 1).all()


def test_half_precision_changes_a_loss_only_slightly(tmp_path):
    """--precision bf16, in both stages of a VAE."""
    for precision in ("fp32", "bf16"):
        train.main(vae_args(tmp_path / precision, "--steps", 1, "--finetune-steps", 1, "--windows", 0.2, "--batch", 1,
                            "--precision", precision))
    plain, half = ([float(loss) for loss in losses(tmp_path / precision)] for precision in ("fp32", "bf16"))
    assert all(a != b for a, b in zip(plain, half)) and half == pytest.approx(plain, rel=0.02)


def test_a_latent_run_takes_the_vae_it_is_told(tmp_path):
    """That of --vae, a VAE's file or a latent model's; else the shipped one, if it is of the run's size."""
    asked = lambda size, given: train.argparse.Namespace(size=size, vae=given)
    taken = lambda size, given=None: train.vae_for(asked(size, given), None, None)[0].state_dict()
    own, shipped = train.VAE(train.autoencoder.PRESETS["tiny"]), ROOT / "checkpoints" / "latent.pt"
    save_checkpoint(tmp_path / "vae.pt", "vae", own)
    save_checkpoint(tmp_path / "classifier.pt", "classifier", train.PaSST(train.PASST_PRESETS["tiny"]))
    assert same(taken("tiny", tmp_path / "vae.pt"), own.state_dict())
    of_shipped = sample.load_checkpoint(shipped).vae.state_dict()
    assert same(taken("small"), of_shipped) and same(taken("tiny", shipped), of_shipped)
    with pytest.raises(sample.UserError, match="not of size tiny: first train one, with --model vae"):
        taken("tiny")
    with pytest.raises(sample.UserError, match="holds a classifier model"):
        taken("tiny", tmp_path / "classifier.pt")


def test_a_classifier_begins_again_only_with_classes_that_it_knows(music, tmp_path):
    """--init: if no folder has the name of one of its classes, these are named. Clips fit into its positions."""
    net = train.PaSST(train.replace(train.PASST_PRESETS["tiny"], classes=2))
    args = ["--model", "classifier", "--init", tmp_path / "first.pt", "--data", music, "--steps", 0, "--device", "cpu"]
    run = lambda out: train.main([str(word) for word in [*args, "--out", tmp_path / out]])
    save_checkpoint(tmp_path / "first.pt", "classifier", net, classes=["fado", "loud"])
    run("one known")
    assert sample.load_state(tmp_path / "one known" / "state.pt")["classes"] == ["fado", "loud"]
    save_checkpoint(tmp_path / "first.pt", "classifier", net, classes=["fado", "jazz"])
    with pytest.raises(sample.UserError, match="of its classes, fado, jazz"):
        run("none known")
    with pytest.raises(sample.UserError, match="--windows: a clip of this model has at most 10.00 s"):
        args += ["--windows", 10.1]
        run("longer than its positions")


def test_half_of_the_clips_meet_the_models_own_error():
    """If asked: in one stretch, of up to the whole clip, and while training only; another share gives another loss.
    Times are spread evenly over (0, 1]."""
    vae, net = train.VAE(train.autoencoder.PRESETS["tiny"]), train.dit.build(train.dit.PRESETS["tiny"])
    assert "own" not in train.Denoising(net, vae).draw(np.random.default_rng(0), 2**12)
    objective = train.Denoising(net, vae, own_error=True)
    draws = [objective.draw(np.random.default_rng(k), 2**12) for k in range(400)]
    shares = [draw["own"][0].max() for draw in draws]
    assert 0.4 < np.mean([share > 0 for share in shares]) < 0.55 and 0.9 < max(shares) < 1
    assert np.histogram([draw["t"] for draw in draws], 4, (0, 1))[0].min() > 70
    for draw in draws:
        inside = draw["own"][0] > 0
        assert (np.diff(inside.astype(int)) != 0).sum() <= 2 and len(set(draw["own"][0][inside])) <= 1
    draw = next(draw for draw in draws if draw["own"].any() and draw["t"] < 0.5)
    batch = {name: torch.from_numpy(np.asarray(value))[None] for name, value in draw.items()}
    own, latents = batch["own"], torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    loss = lambda own: objective(latents, **batch | {"own": own})
    assert loss(own)["loss"] != loss(own / 2)["loss"]
    objective.eval()
    assert loss(own)["loss"] == loss(0 * own)["loss"]


def test_the_share_of_its_own_error_goes_into_x_t_and_not_into_the_target():
    """x_t is alpha (x_0 + share (x0_hat - x_0)) + sigma fresh, for a model whose x0_hat has a known error; v still leads
    to x_0. A share of zero, or a model without error, leaves the fresh noise. No gradient leads through the guess."""
    g = torch.Generator().manual_seed(0)
    x_0, eps, fresh, wrong = torch.randn(4, 3, 2, 16, generator=g, dtype=torch.float64)
    t, share = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64), torch.tensor([0.0, 0.7]).repeat_interleave(8)
    alpha, sigma = (c.reshape(-1, 1, 1) for c in alpha_sigma(t))
    wrong.requires_grad_()
    model = lambda x_t, t: alpha * eps - sigma * x_0 - wrong / sigma            # x0_hat = x_0 + wrong
    objective = train.Denoising(train.dit.build(train.dit.PRESETS["tiny"]))
    noise = objective.with_own_error(model, x_0, t, eps, fresh, share)
    x_t, v = add_noise(x_0, noise, t)
    assert not noise.requires_grad
    torch.testing.assert_close(x_t, alpha * (x_0 + share * wrong) + sigma * fresh)
    torch.testing.assert_close(x0_from_v(x_t, v, t), x_0)
    right = objective.with_own_error(lambda x_t, t: alpha * eps - sigma * x_0, x_0, t, eps, fresh, share)
    torch.testing.assert_close(right, fresh)


def test_the_unet_weighs_its_error():
    """The loss of a waveform model is the mean square of weigh(error of v)."""
    net = train.unet1d.UNet1D(train.unet1d.PRESETS["tiny"])
    net.set_spectrum(torch.logspace(0, -2, 64))
    x, noise, t = torch.randn(2, 2, 2**12), torch.randn(2, 2, 2**12), torch.tensor([0.3, 0.8], dtype=torch.float64)
    x_t, v = add_noise(x / net.scale, noise, t)
    expected = net.weigh(v - net(x_t, t), t.float()).square().mean()
    torch.testing.assert_close(train.Denoising(net)(x, t, noise)["loss"], expected)


def test_a_classifier_learns_its_classes_from_a_part_of_the_patches():
    """Binary cross-entropy, label -1 being no class; while training without a quarter of the columns and two rows."""
    net, seen = train.PaSST(train.replace(train.PASST_PRESETS["tiny"], classes=3)), []
    net.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1] - 2))
    objective, x = train.Classifying(net).eval(), 0.1 * torch.randn(2, 2, RATE)
    batch = {"label": torch.tensor([2, -1]), "patchout": torch.tensor([1, 2])}
    bce, truth = torch.nn.functional.binary_cross_entropy_with_logits, torch.tensor([[0.0, 0, 1], [0, 0, 0]])
    torch.testing.assert_close(objective(x, **batch)["loss"], bce(net.listen(x, RATE)[0], truth))
    objective.train()(x, **batch)
    assert seen == [8 * 6, 8 * 6, 6 * 5]


def test_each_stage_of_the_autoencoder_has_a_loss_of_its_own(monkeypatch):
    """First reconstruction and KL. Then the critic minimises the hinge alone, and the decoder all but the hinge."""
    objective, x = train.Autoencoding(train.VAE(train.autoencoder.PRESETS["tiny"])), 0.1 * torch.randn(2, 2, 2**12)
    given = x, torch.randn(2, 8, 32), torch.tensor([0.0, 0.2])
    net, critic, losses = objective.net, objective.critic, train.autoencoder
    made, mean, logvar = net(*given[:2])
    expected = losses.reconstruction_loss(made, x) + losses.KL_WEIGHT * losses.kl(mean, logvar)
    torch.testing.assert_close(objective(*given)["loss"], expected)
    monkeypatch.setattr(losses, "ADVERSARIAL_WEIGHT", 1e6)          # an untrained critic moves the decoder too little
    monkeypatch.setattr(losses, "FEATURE_WEIGHT", 1e4)
    objective.adversarial = True
    objective(*given)["loss"].backward()
    made = net(*given)[0]
    real, fake = critic(x), critic(made)
    of_decoder = (losses.reconstruction_loss(made, x) + losses.ADVERSARIAL_WEIGHT * losses.adversarial_loss(fake)
                  + losses.FEATURE_WEIGHT * losses.feature_matching(real, fake))
    of_critic = losses.discriminator_loss(real, critic(made.detach()))
    flat = lambda tensors: torch.cat([x.flatten() for x in tensors])
    for part, loss in ((net.decoder, of_decoder), (critic, of_critic)):
        expected = flat(torch.autograd.grad(loss, list(part.parameters())))
        assert (flat(p.grad for p in part.parameters()) - expected).norm() < 1e-4 * expected.norm()


def test_the_second_stage_decodes_latents_with_noise():
    """In 60% of the clips the mean with white noise, up to 0.3 of its deviation, the same in any batch; a draw from the
    posterior in the first stage; the mean itself while validating."""
    objective, decoded = train.Autoencoding(train.VAE(train.autoencoder.PRESETS["tiny"])), []
    vae = objective.net
    vae.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0].detach().transpose(1, 2)))
    draws = [objective.draw(sample.random_numbers(0, k), 2**12) for k in range(1000)]
    shares = np.array([draw["share"] for draw in draws])
    assert 0.55 < np.mean(shares > 0) < 0.65 and shares.min() == 0 and 0.29 < shares.max() < 0.3
    x, some = 0.1 * torch.randn(3, 2, 2**12), [np.argmin(shares), np.argmax(shares), np.argmax(shares > 0)]
    batch = {name: torch.from_numpy(np.stack([draws[k][name] for k in some])) for name in ("noise", "share")}
    mean, logvar = vae.posterior(x)
    objective(x, **batch)
    torch.testing.assert_close(decoded[-1], mean + (logvar / 2).exp() * batch["noise"])
    objective.adversarial = True
    objective(x, **batch)
    made = decoded[-1]
    assert torch.equal(made[0], mean[0])
    sizes = ((made - mean) / mean.std(2, keepdim=True)).square().mean((1, 2)).sqrt()
    torch.testing.assert_close(sizes, batch["share"], rtol=0.15, atol=0)
    objective(x[1:2], **{name: value[1:2] for name, value in batch.items()})
    torch.testing.assert_close(decoded[-1], made[1:2])
    objective.eval()(x, **batch)
    assert torch.equal(decoded[-1], mean)


def test_the_decoder_of_a_latent_model_can_be_exchanged(music, tmp_path, monkeypatch):
    """Fine-tuned by a vae run that begins with the latent model, and put back by --init with --vae: the decoder is
    another, while the encoder, the latents' statistics and the transformer are as they were. Of another encoder, the
    latents are measured anew. Refused is a VAE of other channels."""
    monkeypatch.setattr(train.Trainer, "validate", lambda self: 0.0)
    train.main(vae_args(tmp_path / "vae", "--steps", 1, "--finetune-steps", 0))
    args = ["--size", "tiny", "--data", music, "--batch", 2, "--device", "cpu"]
    run = lambda out, *more: train.main([str(word) for word in [*args, "--out", tmp_path / out, *more]])
    run("latent", "--model", "latent", "--vae", tmp_path / "vae/model.pt", "--steps", 1)
    run("tuned", "--model", "vae", "--init", tmp_path / "latent/model.pt", "--steps", 0, "--finetune-steps", 1)
    run("joined", "--model", "latent", "--init", tmp_path / "latent/model.pt", "--vae", tmp_path / "tuned/model.pt",
        "--steps", 0)
    before, tuned, after = (sample.load_checkpoint(tmp_path / out / "model.pt") for out in ("latent", "tuned", "joined"))
    assert same(after.net.state_dict(), before.net.state_dict())
    assert same(after.vae.decoder.state_dict(), tuned.net.decoder.state_dict())
    changed = {name.split(".")[0] for name, w in after.vae.state_dict().items()
               if not torch.equal(w, before.vae.state_dict()[name])}
    assert changed == {"decoder"}
    train.main(vae_args(tmp_path / "other", "--steps", 1, "--finetune-steps", 0, "--seed", 1))
    moved = "--model", "latent", "--init", tmp_path / "latent/model.pt", "--steps", 0, "--vae"
    run("moved", *moved, tmp_path / "other/model.pt")
    other, after = (sample.load_checkpoint(tmp_path / out / "model.pt") for out in ("other", "moved"))
    assert same(after.net.state_dict(), before.net.state_dict())
    assert same(after.vae.encoder.state_dict(), other.net.encoder.state_dict())
    assert not torch.equal(after.vae.latent_std, before.vae.latent_std) and after.vae.latent_std.max() != 1
    with pytest.raises(sample.UserError, match="--vae: .*latent/model.pt has latents of 8 channels"):
        run("wrong", *moved, ROOT / "checkpoints" / "latent.pt")


def test_a_run_may_begin_with_the_weights_of_another(music, tmp_path, monkeypatch):
    """--init takes weights, VAE and statistics as they are; short clips see every position of the window."""
    monkeypatch.setattr(train.Trainer, "validate", lambda self: 0.0)
    train.main(vae_args(tmp_path / "vae", "--steps", 1, "--finetune-steps", 0))
    args = ["--model", "latent", "--size", "tiny", "--data", music, "--batch", 2, "--device", "cpu"]
    first, second = tmp_path / "first", tmp_path / "second"
    given = ["--vae", tmp_path / "vae/model.pt", "--steps", 3, "--windows", 0.3, "--out", first]
    train.main([str(a) for a in [*args, *given]])
    train.main([str(a) for a in [*args[:2], *args[4:], "--init", first / "model.pt", "--steps", 0, "--out", second]])
    one, two = (torch.load(run / "model.pt", weights_only=True) for run in (first, second))
    windows = [sample.load_state(run / "state.pt")["settings"]["windows"] for run in (first, second)]
    assert two["size"] == "tiny" and windows == [[103 * 128], [2**15]]
    for old, new in ((one["ema"], two["ema"]), (one["vae"]["weights"], two["vae"]["weights"])):
        assert all(torch.equal(old[name], new[name]) for name in old)
    train.main([str(a) for a in [*args, "--resume", "--steps", 1, "--out", second]])
    assert two["step"] == 3 and sample.load_checkpoint(second / "model.pt").step == 4        # of both runs
    objective = train.Denoising(sample.rebuild("latent", one["config"], one["ema"]),
                                sample.rebuild("vae", **one["vae"]))
    starts = [objective.draw(np.random.default_rng(k), 103 * 128)["start"] for k in range(1000)]
    assert min(starts) == 0 and max(starts) == 256 - 103
    with pytest.raises(sample.UserError, match="at most 0.74 s"):
        train.main([str(a) for a in [*args, "--init", first / "model.pt", "--windows", 1, "--out", tmp_path / "third"]])
    with pytest.raises(sample.UserError, match="holds a vae model"):
        train.main([str(a) for a in [*args, "--init", tmp_path / "vae/model.pt", "--out", tmp_path / "third"]])
    with pytest.raises(sample.UserError, match="first/model.pt has another --size"):
        train.main(["--init", str(first / "model.pt"), "--size", "small", "--out", str(tmp_path / "third")])


def test_a_vae_out_of_a_latent_model_has_steps_of_its_own(tmp_path):
    """How long it was trained is not known; the steps of a latent model are the transformer's."""
    vae = train.VAE(train.autoencoder.PRESETS["tiny"])
    config = train.dit.PRESETS["tiny"]
    save_checkpoint(tmp_path / "latent.pt", "latent", train.dit.build(config), vae)
    state = torch.load(tmp_path / "latent.pt", weights_only=True)
    torch.save(state | {"step": 500, "size": "tiny"}, tmp_path / "latent.pt")
    assert sample.open_checkpoint("vae", tmp_path / "latent.pt").step is None
    train.main(vae_args(tmp_path / "run", "--init", tmp_path / "latent.pt", "--steps", 1, "--finetune-steps", 0))
    assert sample.load_checkpoint(tmp_path / "run" / "model.pt").step == 1


def test_short_windows_are_measured_and_validated_as_they_are(music, tmp_path, monkeypatch):
    """--windows of 0.2 s: the statistics come from clips that hold whole spectra; held-out files may be as short."""
    seen = []
    monkeypatch.setattr(train.Trainer, "validate", lambda self: seen.append(self.held_out([0])["x"].shape) or 0.0)
    save_checkpoint(tmp_path / "vae.pt", "vae", train.VAE(train.autoencoder.PRESETS["tiny"]))
    config = train.replace(train.dit.PRESETS["tiny"], hops=(64, 16))
    monkeypatch.setitem(train.dit.PRESETS, "tiny", config)
    train.main(["--size", "tiny", "--data", str(music), "--vae", str(tmp_path / "vae.pt"), "--windows", "0.2",
                "--steps", "1", "--batch", "2", "--device", "cpu", "--out", str(tmp_path / "run")])
    power = sample.load_checkpoint(tmp_path / "run" / "model.pt").net.stages[0].power
    assert power.isfinite().all() and seen == [(1, 2, round(0.2 * RATE / 128) * 128)]


def test_statistics_of_short_files_are_not_diluted(tmp_path, monkeypatch):
    """Noise of deviation 0.1 in files of 0.3 s, shorter than the clips that are measured: that is the scale."""
    monkeypatch.setattr(train.Trainer, "validate", lambda self: 0.0)
    noise = np.random.default_rng(0).standard_normal((5, round(0.3 * RATE), 2))
    (tmp_path / "data").mkdir()
    for k in range(5):
        sf.write(tmp_path / "data" / f"{k}.wav", 0.1 * noise[k], RATE)
    args = ["--model", "waveform", "--size", "tiny", "--windows", 0.2, "--steps", 1, "--batch", 1, "--device", "cpu"]
    train.main([str(word) for word in [*args, "--data", tmp_path / "data", "--out", tmp_path / "run"]])
    assert sample.load_checkpoint(tmp_path / "run" / "model.pt").net.scale == pytest.approx(0.1, rel=0.1)


def test_the_frozen_vae_encodes_in_full_precision(monkeypatch):
    """Whatever the autocast around it: --precision bf16 is for the network that is trained."""
    vae, net = (sample.NETS[kind][0](sample.NETS[kind][2]["tiny"]) for kind in ("vae", "latent"))
    objective, found = train.Denoising(net, vae), []
    monkeypatch.setattr(train, "v_error", lambda net, x_0, *_: found.append(x_0) or x_0)
    x, noise = torch.randn(1, 2, 2**15), torch.randn(1, 16, 256)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        objective(x, torch.tensor([0.5]), noise)
    assert torch.equal(found[0], vae.encode(x))


@pytest.mark.slow
@real_music
@pytest.mark.parametrize("model", ["latent", "waveform"])
def test_what_the_diffusion_sees_has_variance_one(model, tmp_path, monkeypatch):
    """Over real music, within 5%: each latent channel has mean 0 and variance 1, waveforms variance 1."""
    music = MUSIC / "train-0" / "action_cdogs"
    monkeypatch.setattr(train, "MEASURED", 250)
    monkeypatch.setattr(train.Trainer, "validate", lambda self: 0.0)
    more = ["--vae", tmp_path / "vae" / "model.pt"] if model == "latent" else []
    if more:
        torch.manual_seed(0)
        vae = train.VAE(train.autoencoder.PRESETS["tiny"])
        (tmp_path / "vae").mkdir()
        save_checkpoint(tmp_path / "vae" / "model.pt", "vae", vae)
    run = ["--model", model, "--size", "tiny", "--data", music, "--steps", 1, "--batch", 1, "--out", tmp_path, *more]
    train.main([str(word) for word in run])
    space = sample.load_checkpoint(tmp_path / "model.pt")
    tracks = train.music(train.argparse.Namespace(data=[str(music)], valid=None, out=tmp_path, windows=[2**14]))[0]
    clips = train.Clips(tracks, [2**14], lambda *_: {}, [], 1, train.VALID, count=257)      # not the clips measured
    with torch.no_grad():
        x_0 = torch.cat([space.encode(clips([k])["x"]) for k in range(257)], dim=-1)
    channels = x_0[0] if model == "latent" else x_0.reshape(1, -1)
    assert channels.mean(1).abs().max() < 0.05 and (channels.var(1) - 1).abs().max() < 0.05


def test_the_recipe_is_the_papers():
    """App. C.2: steps, batch sizes, warm-up."""
    for model, steps, batch in (("latent", 300_000, 96), ("waveform", 600_000, 384)):
        recipe = train.RECIPES[model]["paper"]
        assert (recipe.steps, recipe.batch, recipe.warmup, recipe.beta2) == (steps, batch, 5000, 0.999)


def test_the_rate_is_constant_and_then_falls_to_zero():
    """Warm-up, a constant up to the last --cooldown share of the steps, from there a line to zero."""
    trainer = train.Trainer.__new__(train.Trainer)
    trainer.options, trainer.adversarial = train.argparse.Namespace(steps=1000, warmup=50, lr=2.0, cooldown=0.4), False
    rates = []
    for trainer.step in (0, 24, 49, 300, 599, 600, 700, 800, 999):
        rates.append(trainer.learning_rate())
    assert rates == pytest.approx([2 / 50, 1.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 2 / 400])
    trainer.adversarial, trainer.step, trainer.options.finetune_steps = True, 1100, 200
    assert trainer.learning_rate() == pytest.approx(0.15 * 2.0)
