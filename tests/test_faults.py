"""train.py with files, folders and processes as people have them: what is damaged is left out by
its name, a resumed run is the run that was meant, and what is logged and printed is true.

As in test_train.py, on the real script with tiny models.
"""
import os
import re
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

import sample
import train
from examples import synthetic
from test_train import (MUSIC, RATE, ROOT, SHORT, column, few_statistics, files_of, fit, losses,
                        music, same, save_checkpoint, tiny, vae_file, words)

PAPER = MUSIC.parent / "paper.md"


def write_float(path, audio):
    sf.write(path, audio, RATE, subtype="FLOAT")


def spoil(path, value=np.inf):
    """One bad sample in each tenth of a second of a file: no clip is free of them."""
    audio, rate = sf.read(path)
    audio[::rate // 10, 0] = value
    sf.write(path, audio, rate, subtype="FLOAT")


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """A signal while that step is made."""
    rate = train.learning_rate

    def interrupted(o, i):
        if i == step - 1:
            os.kill(os.getpid(), number)
        return rate(o, i)

    monkeypatch.setattr(train, "learning_rate", interrupted)


# ---- bad samples ---------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e29])
def test_a_clip_with_a_bad_sample_is_left_out(value, tmp_path):
    """Not finite, or beyond any scale: the clip comes from another place, the file is named."""
    paths = [str(tmp_path / f"{name}.wav") for name in "ab"]
    for path in paths:
        write_float(path, np.full((RATE, 2), 0.5))
    spoil(paths[0], value)
    tracks = train.AudioFiles({path: sample.probe(path) for path in paths})
    clip, track = tracks.crop(0.1, 2**14)
    assert track == 1 and clip.min() > 0.4 and clip.max() < 0.6
    assert list(tracks.broken) == paths[:1] and "samples" in tracks.broken[paths[0]]


def test_a_loud_file_is_no_bad_one(tmp_path):
    """Float files may be beyond full scale, and some hold 16-bit numbers as they are."""
    write_float(tmp_path / "loud.wav", np.full((RATE, 2), 32768.0))
    tracks = files_of(tmp_path)
    assert tracks.crop(0.1, 2**14)[0].max() > 3e4 and not tracks.broken


def test_a_file_with_a_bad_sample_is_left_out_of_the_cache(music, tmp_path):
    """Latents depend on the samples around them: the whole track is left out, as a damaged one."""
    spoil(music / "loud" / "1.wav")
    cached = train.Latents(files_of(music), tmp_path / "cache", tiny("vae").eval(), 0, versions=2)
    assert list(cached.broken) == [str(music / "loud" / "1.wav")]
    assert all(np.isfinite(cached.crop(place, 4096)[0]).all() for place in (0, 0.2, 0.3, 0.7))


def test_training_and_validation_go_on_beside_bad_files(music, tmp_path, capsys):
    """A file to train on, and the one that would be held out: both are named, and no number of the
    run is other than finite."""
    options = Namespace(model="vae", data=[str(music)], valid=None, windows=[2**13], out=tmp_path)
    trained, held_out = train.music(options)
    bad = trained.paths[1], held_out.paths[0]
    for path in bad:
        spoil(path)
    fit("vae", tmp_path / "run", "--data", music, "--steps", 4, *SHORT)
    out = capsys.readouterr().out
    assert all(f": {path} (samples that are" in out for path in bad), out
    assert np.isfinite(np.array(losses(tmp_path / "run"), float)).all()
    assert np.isfinite(float(column(tmp_path / "run", "validation")[-1]))


def test_bad_files_of_valid_are_named(music, tmp_path, capsys):
    """--valid: its clips come from its other files."""
    (tmp_path / "valid").mkdir()
    for name in "ab":
        sf.write(tmp_path / "valid" / f"{name}.wav", synthetic.clip(7, 8, 1.0)[0].T, RATE)
    spoil(tmp_path / "valid" / "a.wav")
    fit("vae", tmp_path / "run", "--data", music, "--valid", tmp_path / "valid", "--steps", 1,
        *SHORT)
    assert f"could not be read: {tmp_path}/valid/a.wav (" in capsys.readouterr().out
    assert np.isfinite(float(column(tmp_path / "run", "validation")[-1]))


@pytest.mark.parametrize("model", ["vae", "waveform"])
def test_a_folder_of_silence_is_refused(model, tmp_path):
    """Before training, in one sentence; one sound in it is enough."""
    (tmp_path / "data").mkdir()
    for k in range(5):
        sf.write(tmp_path / "data" / f"{k}.wav", np.zeros((RATE, 2)), RATE)
    given = "--data", tmp_path / "data", "--steps", 1, *SHORT
    with pytest.raises(sample.UserError, match="^--data: .* silence") as error:
        fit(model, tmp_path / "run", *given)
    assert error.value.status == 2 and not list(tmp_path.glob("run/*.pt"))
    sf.write(tmp_path / "data" / "5.wav", synthetic.clip(7, 8, 1.0)[0].T, RATE)
    fit("vae", tmp_path / "run", *given)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_validation_that_is_no_number_is_no_success(value, tmp_path, monkeypatch, capsys):
    """What was trained is saved; status 1, and no command to use it."""
    monkeypatch.setattr(train, "validate", lambda *_: {"loss": value})
    with pytest.raises(sample.UserError, match="step 2 .*not finite.* --lr") as error:
        fit("vae", tmp_path / "run", "--steps", 2, *SHORT)
    assert error.value.status == 1 and (tmp_path / "run" / "state.pt").exists()
    assert "model.pt" not in capsys.readouterr().out


def test_names_that_are_not_utf8_are_trained_on(tmp_path, capsys):
    """Of files and of folders, which are classes; a resumed run finds them again."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/m\xfcsic")
    for k, name in enumerate((b"l\xe4rm", b"ruhe")):
        os.makedirs(os.fsencode(folder) + b"/" + name)
        path = os.fsencode(folder) + b"/" + name + b"/n\xe4me.wav"
        with sf.SoundFile(path, "w", RATE, 2, format="WAV") as file:
            file.write(synthetic.clip(7, k, 1.0)[0].T)
    more = "--data", folder, "--steps", 1, *SHORT
    state = fit("classifier", tmp_path / "run", *more)
    assert "could not be read" not in capsys.readouterr().out
    assert [os.fsencode(name) for name in state["classes"]] == [b"l\xe4rm", b"ruhe"]
    assert fit("classifier", tmp_path / "run", "--resume", "--steps", 2)["step"] == 2


# ---- resuming ------------------------------------------------------------------------------------

def test_resume_needs_a_state(tmp_path):
    """A mistyped --out is no new run; nothing is made there."""
    with pytest.raises(sample.UserError, match="^--resume: .*mistyped/state.pt") as error:
        fit("vae", tmp_path / "mistyped", "--resume", "--steps", 1, *SHORT)
    assert error.value.status == 2 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_moved_folder_is_followed(music, tmp_path, monkeypatch):
    """--resume --data: the same clips in training, the same file held out, whatever the folder is
    called now; without it, the old one is named."""
    for path in music.glob("*/*.wav"):
        path.rename(music / path.name)
    first = "--data", music, *SHORT
    whole = fit("vae", tmp_path / "whole", "--steps", 4, *first)
    stop_at(monkeypatch, 2)
    assert fit("vae", tmp_path / "parts", "--steps", 4, *first)["step"] == 2
    options = Namespace(model="vae", data=[str(music)], valid=None, windows=[2**13], out=tmp_path)
    held_out = train.music(options)[1].paths
    for name in ("moved", "elsewhere", "again"):
        music = music.rename(tmp_path / name)
        if name == "moved":
            with pytest.raises(sample.UserError, match="--data: no usable file"):
                fit("vae", tmp_path / "parts", "--resume")
        options = train.parse(words("vae", tmp_path / "parts", "--resume", "--data", music))
        train.settle(options)
        now = train.music(options, options.origin)[1].paths
        assert [Path(path).name for path in now] == [Path(path).name for path in held_out]
    parts = fit("vae", tmp_path / "parts", "--resume", "--data", music)
    assert parts["settings"]["data"] == [str(music)]
    for part in ("objective", "ema", "optimizers"):
        assert same(whole[part], parts[part]), part
    assert column(tmp_path / "whole", "validation")[-1] == column(tmp_path / "parts",
                                                                  "validation")[-1]


@pytest.mark.slow
def test_what_a_run_can_do_without_may_change(music, vae_file, tmp_path):
    """--cache, --compile, --precision and --valid on --resume, on and off; the run keeps what was
    given last."""
    out = tmp_path / "run"
    fit("latent", out, "--data", music, "--valid", music, "--vae", vae_file, "--steps", 1, *SHORT)

    def resumed(*given):
        options = train.parse(words("latent", out, "--resume", *given))
        train.settle(options)
        return options

    options = resumed("--cache", "--compile", "--precision", "bf16", "--workers", 3)
    assert options.cache and options.compile and options.precision == "bf16"
    assert options.data == options.valid == [str(music)]
    state = fit("latent", out, "--resume", "--cache", "--precision", "bf16", "--steps", 2,
                "--valid", music / "loud")
    assert state["settings"]["cache"] and state["settings"]["valid"] == [str(music / "loud")]
    assert resumed().cache and resumed().precision == "bf16" and not resumed("--no-cache").cache
    assert not resumed("--no-compile").compile


@pytest.mark.parametrize("given", ["--lr 1", "--batch 4", "--size small", "--windows 0.3",
                                   "--seed 1", "--cooldown 0.1", "--init x.pt", "--data x",
                                   "--valid x", "--vae x.pt"])
def test_what_a_run_is_cannot_change(given, tmp_path):
    """The flag is named. Music cannot take the place of the program's."""
    fit("vae", tmp_path / "run", "--steps", 1, *SHORT)
    flag = given.split()[0]
    with pytest.raises(sample.UserError, match=f"{flag}\\b"):
        train.main(["--model", "vae", "--device", "cpu", "--out", str(tmp_path / "run"),
                    "--resume", *given.split()])


def test_as_many_folders_as_before(music, tmp_path):
    """Which file is held out depends on its folder: two cannot follow one."""
    fit("vae", tmp_path / "run", "--steps", 1, "--data", music, *SHORT)
    with pytest.raises(sample.UserError, match="^--data: .* 1 folder"):
        fit("vae", tmp_path / "run", "--resume", "--data", music / "loud", music / "quiet")


def test_idle_flags_are_refused_on_resume_too(tmp_path):
    """What a new run refuses."""
    fit("vae", tmp_path / "run", "--steps", 1, *SHORT)
    with pytest.raises(sample.UserError, match="^--compile does nothing with --model vae"):
        fit("vae", tmp_path / "run", "--resume", "--compile")


# ---- what is logged and printed ------------------------------------------------------------------

@pytest.mark.parametrize("signalled", [True, False])
def test_the_last_validation_is_of_the_last_step(signalled, tmp_path, monkeypatch, capsys):
    """After a signal between two saves too; in the log and on the screen."""
    if signalled:
        stop_at(monkeypatch, 5)
    values = iter(range(1, 100))
    monkeypatch.setattr(train, "validate", lambda *_: {"loss": float(next(values))})
    steps = 9 if signalled else 5
    state = fit("vae", tmp_path / "run", "--steps", steps, "--save-every", 3, *SHORT)
    assert state["step"] == 5
    assert column(tmp_path / "run", "validation") == ["", "", "1.0", "", "2.0"]
    assert "validation loss 2" in capsys.readouterr().out


def test_a_run_without_a_step_shows_its_validation(tmp_path, capsys):
    """--steps 0, and a resumed run that was at its end."""
    fit("vae", tmp_path / "run", "--steps", 0, *SHORT)
    fit("vae", tmp_path / "run", "--resume")
    out = capsys.readouterr().out
    assert out.count("step 0 of 0 in") == out.count("; validation loss ") == 2


@pytest.mark.parametrize("ends", ["well", "stopped", "badly"])
def test_signals_are_handled_as_before_afterwards(ends, tmp_path, monkeypatch):
    """However the run ends: the next Ctrl-C is the caller's."""
    if ends == "stopped":
        stop_at(monkeypatch, 1, signal.SIGINT)
    if ends == "badly":
        monkeypatch.setattr(train, "save", lambda *_: 1 / 0)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        fit("vae", tmp_path / "run", "--steps", 2, *SHORT)
    except ZeroDivisionError:
        assert ends == "badly"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_while_the_end_is_written_is_caught(tmp_path, monkeypatch):
    """SIGTERM during the last save does not end the process before it is done."""
    save, seen = train.save, []

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*given)
        seen.append(given)

    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("not caught"))
    monkeypatch.setattr(train, "save", interrupted)
    try:
        fit("vae", tmp_path / "run", "--steps", 1, *SHORT)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(seen) == 1


@pytest.mark.slow
def test_steps_of_earlier_runs_count_in_the_state_too(tmp_path):
    """state.pt and model.pt say the same; the log counts the run's own."""
    first, second = tmp_path / "first", tmp_path / "second"
    fit("vae", first, "--steps", 2, *SHORT)
    fit("vae", second, "--init", first / "model.pt", "--steps", 2, *SHORT)
    fit("vae", second, "--resume", "--steps", 3)
    for name in ("state.pt", "model.pt"):
        assert sample.load_checkpoint(second / name).step == 5
    assert column(second, "step") == ["1", "2", "3"]
    fit("vae", tmp_path / "third", "--init", second / "state.pt", "--steps", 1, *SHORT)
    assert sample.load_checkpoint(tmp_path / "third" / "model.pt").step == 6


def test_latents_of_two_channels_are_no_audio(music, tmp_path):
    """Whether a clip is audio is said, not guessed from its channels."""
    vae = tiny("vae", latent_channels=2).eval()
    cached = train.Latents(files_of(music), tmp_path / "cache", vae, 0, versions=1)
    objective = train.Denoising(tiny("latent", channels=2).eval(), vae)
    seen = []
    objective.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for source in (cached, files_of(music)):
        clips = train.Clips(source, [2**12], objective.draw, [], 0, train.VALID, count=2)
        batch = clips([0, 1])
        batch["t"] = torch.full((2,), 1e-9, dtype=torch.float64)        # x_t is x_0
        objective(**batch)
        expected = batch["x"] if source is cached else vae.encode(batch["x"])
        torch.testing.assert_close(seen[-1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_crash_leaves_no_row_twice(tmp_path):
    """Rows after the last save are made again; one that was half written is dropped."""
    out = tmp_path / "run"
    fit("vae", out, "--steps", 2, *SHORT)
    lost = "3,1.5,0.5,0.1,1.0,\n4,1.6,0."
    (out / "log.csv").write_text((out / "log.csv").read_text() + lost)
    fit("vae", out, "--resume", "--steps", 5)
    assert column(out, "step") == ["1", "2", "3", "4", "5"]
    assert "0.5" not in losses(out)
    # And a log that is gone begins again with its columns.
    (out / "log.csv").unlink()
    fit("vae", out, "--resume", "--steps", 6)
    assert column(out, "step") == ["6"]


# ---- several processes ---------------------------------------------------------------------------

def test_processes_that_differ_are_told_how(monkeypatch):
    """One sentence, the same in all of them."""
    mine = {"step": 3, "--lr": 0.1, "files of --data": 8}
    monkeypatch.setattr(train, "gathered", lambda facts: [facts, mine | {"files of --data": 7}])
    with pytest.raises(sample.UserError, match="files of --data: 8 in process 0, 7 in process 1"):
        train.agree(mine)
    monkeypatch.setattr(train, "gathered", lambda facts: [facts, dict(facts)])
    train.agree(mine)


def test_a_file_that_one_machine_lacks_is_counted(music, tmp_path):
    """What there is on its own disk, whatever the first process has found."""
    def counted():
        return train.files_here(*tracks)["files of --data"]

    tracks = files_of(music), files_of(music)
    before = counted()
    next(music.glob("*/*.wav")).unlink()
    assert (before, counted()) == (5, 4)


def together(*commands):
    """A process for each list of arguments, which meet: [(exit status, stderr)]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for rank, arguments in enumerate(commands):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(commands)),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(ROOT / "train.py"), *arguments]
        running.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE))
    try:
        said = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, err) for process, err in zip(running, said)]


@pytest.mark.slow
@pytest.mark.parametrize("differs, says", [("no state", "1/state.pt"), ("step", "step: 2 in"),
                                           ("rate", "--lr")])
def test_two_machines_begin_together_or_not_at_all(differs, says, music, tmp_path):
    """Each has a folder of its own. One without a state, of another step, with other flags: exit
    status 2 and the same sentence on both, no hang."""
    given = ["--steps", 9, "--data", music, *SHORT]
    arguments = []
    for rank in (0, 1):
        out = tmp_path / str(rank)
        if differs in ("no state", "step"):
            if (differs, rank) != ("no state", 1):
                fit("vae", out, *given[2:], "--steps", 2 + rank)
            arguments.append(words("vae", out, "--resume", "--steps", 9))
        else:
            arguments.append(words("vae", out, *given, "--lr", 0.1 * (1 + rank)))
    ended = together(*arguments)
    for status, err in ended:
        assert status == 2 and says in err.splitlines()[-1] and "Traceback" not in err, ended


@pytest.mark.slow
def test_the_log_has_the_loss_of_all_clips(tmp_path):
    """Two processes log what one does, within rounding."""
    given = "--batch", 4, "--steps", 2, *SHORT
    save_checkpoint(tmp_path / "first.pt", "waveform", tiny("waveform"))
    for count in (1, 2):
        out = tmp_path / str(count)
        one = words("waveform", out, "--init", tmp_path / "first.pt", *given)
        assert all(status == 0 for status, _ in together(*[one] * count))
    one, two = (np.array(losses(tmp_path / name), float) for name in "12")
    np.testing.assert_allclose(one, two, rtol=1e-4)


# ---- faults that no test had seen ----------------------------------------------------------------

def test_training_clips_come_from_all_of_the_music(tmp_path):
    """Evenly, within each file too, up to its end."""
    n = 2**12
    for k in range(3):
        ramp = np.linspace(0, 1, 2 * RATE)                      # a sample says where it is
        write_float(tmp_path / f"{k}.wav", np.stack([ramp, ramp], 1))
    source = files_of(tmp_path)
    places = []
    crop = source.crop

    def noted(place, window):
        clip, i = crop(place, window)
        places.append((i, clip[0, 0]))
        return clip, i

    source.crop = noted
    clips = train.Clips(source, [n], lambda *_: {}, [], 0)
    for k in range(600):
        clips.clip(k)
    last = 1 - n / (2 * RATE)
    for i in range(3):
        begins = np.array([begin for track, begin in places if track == i])
        assert 150 < len(begins) < 250
        share, _ = np.histogram(begins, 4, (0, last))
        assert share.min() > 25, share
        assert begins.min() < 0.05 and last - 0.05 < begins.max() <= last + 1e-4


def test_validation_is_at_times_spread_evenly():
    """The middles of as many equal parts of (0, 1) as there are clips, and always the same."""
    class Spy:
        count = 8
        times = []

        def __call__(self, ks):
            return {"k": torch.tensor(ks), "t": torch.rand(1, dtype=torch.float64)}

    spied = Spy()

    def averaged(k, t):
        spied.times.append(t.item())
        return {"loss": t[0]}

    device = torch.device("cpu")
    for _ in range(2):
        shown = train.validate(averaged, spied, torch.autocast("cpu", enabled=False), device)
        assert shown == {"loss": pytest.approx(0.5)}
    even = (np.arange(8) + 0.5) / 8
    np.testing.assert_allclose(sorted(spied.times[:8]), even)
    assert spied.times[:8] == spied.times[8:]


def test_what_is_held_out_is_drawn_by_hash(monkeypatch):
    """The first or last by name are no more likely than others: a folder's first file is often the
    longest, or a mix. The choice stays where the folder moves, and as files are added."""
    def held_out(names, root="/music"):
        files = {f"{root}/{name}": [RATE, RATE, 2] for name in names}
        monkeypatch.setattr(train, "survey", lambda *_, **__: dict(files))
        monkeypatch.setattr(train, "readable", lambda files, paths, count, window: paths[:count])
        trained, held = train.music(Namespace(model="vae", data=[root], valid=None,
                                              windows=[2**12], out="."))
        assert set(trained.paths) | set(held.paths) == files.keys()
        return {path[len(root) + 1:] for path in held.paths}

    places = []
    for album in range(40):
        names = [f"album {album}/{k:02}.wav" for k in range(20)]
        chosen = held_out(names)
        assert len(chosen) == 1 and chosen == held_out(names, "/elsewhere/moved")
        places.append(names.index(chosen.pop()))
    assert len(set(places)) > 12 and 5 < np.mean(places) < 14
    assert len(held_out([f"{k:02}.wav" for k in range(39)])) == 2       # the nearest to a twentieth
    names = [f"a/{k:03}.wav" for k in range(100)]
    alone = held_out(names)
    among = held_out([f"0/{k:03}.wav" for k in range(100)] + names) & set(names)
    assert len(alone) == 5 and among and (alone <= among or among <= alone)


# App. C.2: steps, and clips in one of them.
OF_THE_PAPER = {"waveform": (600_000, 384), "latent": (300_000, 96)}


@pytest.mark.skipif(not PAPER.exists(), reason="the paper is not beside the checkout")
def test_the_numbers_above_are_in_the_paper():
    """In its own words."""
    text = PAPER.read_text()
    for model, (steps, batch) in OF_THE_PAPER.items():
        thousands = steps // 1000
        assert re.search(f"{model} model (is trained )?for {thousands}k steps "
                         f"with a batch size of {batch} ", text)
    assert "a warmup of 5000 steps" in text


@pytest.mark.parametrize("model", ["latent", "waveform"])
def test_the_papers_size_is_trained_as_in_the_paper(model, tmp_path):
    """What the loop takes: clips in a step, the number of steps, a rate that rises for 5000 steps
    and never again, the optimizer."""
    options = train.parse(["--model", model, "--size", "paper", "--device", "cpu",
                           "--out", str(tmp_path / "run")])
    train.settle(options)
    clips = train.Clips(train.Synthetic(0), options.windows or [2**12], lambda *_: {}, [], 0,
                        batch=options.batch)
    assert (options.steps, len(clips.of_step(0))) == OF_THE_PAPER[model]
    rates = [train.learning_rate(options, i) for i in range(5002)]
    rises = np.diff(rates)
    assert (rises[:4999] > 0).all() and (rises[4999:] <= 0).all()
    assert rates[2499] == pytest.approx(options.lr / 2)
    objective = train.Denoising(tiny(model), tiny("vae") if model == "latent" else None)
    adamw, *others = train.make_optimizers(objective, options)
    assert isinstance(adamw, torch.optim.AdamW) and not others
    assert adamw.defaults["betas"] == (0.9, 0.999) and adamw.defaults["weight_decay"] == 0
