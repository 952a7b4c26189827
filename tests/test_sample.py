"""sample.py with tiny untrained networks, and with models of a line that come in by its door.

In the order of sample.py: errors and files, levels and spectra, from a context to new audio, from a
track to its edit, the command line; then the shipped models.
"""
import argparse
import inspect
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch
import torch.nn.functional as F
from conftest import neighbours, noise, save_checkpoint, seeded, toy, wake

import guidance
import sample
import tasks
from diffusion import alpha_sigma
from dit import PRESETS as DIT, DiT
from sample import Edit, Settings, Track, UserError, load_checkpoint
from unet1d import PRESETS as UNET, UNet1D
from vae import PRESETS as VAES, VAE

ROOT = Path(__file__).resolve().parents[1]
ODD = ROOT.parent / "shared" / "music" / "odd"
SHIPPED = sorted((ROOT / "checkpoints").glob("*.pt"))


def write_music(path, seconds, rate, channels, **how):
    """A chord with a beat and some hiss."""
    t = np.arange(round(seconds * rate))[:, None] / rate
    phase = np.arange(channels)
    chord = sum(np.sin(2 * np.pi * f * t + phase) for f in (220, 277.2, 329.6, 1760))
    hiss = np.random.default_rng(0).standard_normal(chord.shape)
    sf.write(path, 0.1 * chord * (1 + np.sin(4 * np.pi * t)) + 0.01 * hiss, rate, **how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny checkpoints of three kinds, and three clips: long (3 s), other (2 s), mono at 48 kHz."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sample")
    vae = VAE(VAES["tiny"])
    vae.latent_std.fill_(0.3)
    unet = wake(UNet1D(UNET["tiny"]))
    unet.scale.fill_(0.15)
    save_checkpoint(folder / "latent.pt", "latent", wake(DiT(DIT["tiny"])), vae)
    save_checkpoint(folder / "waveform.pt", "waveform", unet)
    save_checkpoint(folder / "classifier.pt", "classifier",
                    tasks.PaSST(tasks.PASST_PRESETS["tiny"]), classes=list("abcdefghi"))
    write_music(folder / "long.wav", 3, 44100, 2)
    write_music(folder / "other.wav", 2, 44100, 2)
    write_music(folder / "mono.wav", 3, 48000, 1)
    return folder


def read(path):
    """(n, channels) float64."""
    return sf.read(path, always_2d=True)[0]


def call(folder, *arguments, model="latent", out="out.wav", steps=2):
    """Run sample.py and return what it wrote, (n, channels).

    model   the name of a tiny checkpoint, or a model that comes in by the door
    """
    arguments = [str(argument) for argument in arguments]
    arguments += ["--steps", str(steps), "--force", "--output", str(folder / out)]
    if {"--reference", "--classes"} & set(arguments):
        arguments += ["--classifier", str(folder / "classifier.pt")]
    if isinstance(model, str):
        sample.main(["--model", model, "--checkpoint", str(folder / f"{model}.pt"), *arguments])
    else:
        sample.main(arguments, open_model=lambda options, device: model)
    return read(folder / out)


def rms(audio, dim):
    return audio.square().mean(dim).sqrt()


# ---- errors, words and files ---------------------------------------------------------------------

@pytest.mark.parametrize("error, status, words", [
    (UserError("no such thing"), 2, "error: no such thing"),
    (UserError("not done", 1), 1, "error: not done"),
    (UserError("a\nb.wav is silent"), 2, "error: a\\nb.wav is silent"),
    (KeyboardInterrupt(), 130, "error: interrupted"),
    (MemoryError(), 1, "error: out of memory: take less"),
    (RuntimeError("CUDA out of memory. Tried"), 1, "error: out of memory: take less"),
    (OSError(28, "No space left on device", "x.wav"), 1, "error: x.wav cannot be"),
], ids=lambda value: type(value).__name__)
def test_an_error_ends_in_one_sentence(error, status, words, capsys):
    """On stderr, with its exit status and without a traceback."""
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        sample.run(main, "take less")
    said = capsys.readouterr().err
    assert end.value.code == status and said.startswith(words) and said.count("\n") == 1


@pytest.mark.parametrize("backend, error, left", [
    ("gloo", None, True), ("nccl", None, True), ("gloo", UserError("no"), True),
    ("gloo", KeyboardInterrupt(), True), ("nccl", UserError("no"), False)])
def test_the_process_group_is_left_before_python_ends(backend, error, left, monkeypatch):
    """By gloo's after any end; by NCCL's, which would wait for the others, after a good one."""
    calls = []
    monkeypatch.setattr(sample.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(sample.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(sample.dist, "destroy_process_group", lambda: calls.append("left"))

    def main():
        if error:
            raise error

    if error:
        with pytest.raises(SystemExit):
            sample.run(main)
    else:
        sample.run(main)
    assert bool(calls) == left


def test_a_fault_of_the_program_keeps_its_traceback():
    """A RuntimeError about anything but memory is not the user's."""
    def main():
        raise RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        sample.run(main)


@pytest.mark.parametrize("time, text", [
    (0, "0:00.000"), (61.5, "1:01.500"), (59.9996, "1:00.000"), (3599.9999, "60:00.000")])
def test_a_time_is_rounded_before_it_is_split_into_minutes(time, text):
    """So that 60 seconds are never printed."""
    assert sample.clock(time) == text


@pytest.mark.parametrize("text, value", [
    ("61.5", 61.5), ("1:01.5", 61.5), ("0:07", 7), (".5", 0.5), ("75", 75)])
def test_a_time_is_read_in_seconds_or_minutes(text, value):
    """Above a minute too, if there is no colon."""
    assert sample.seconds(text) == value


def test_labels_are_read_as_pairs():
    """Spaces around a name are not part of it; anything but name=number is refused."""
    assert sample.pairs("drums=1, voice=0.5") == {"drums": 1.0, "voice": 0.5}
    for text in ("drums", "drums=x", "drums=nan", "drums=1=2"):
        with pytest.raises(argparse.ArgumentTypeError):
            sample.pairs(text)


def test_what_fails_in_writing_leaves_the_old_file(tmp_path):
    """No part of the new one stays, and the error names the file."""
    path = tmp_path / "model.pt"
    path.write_text("old")

    def write(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError) as caught:
        sample.write_atomic(path, write)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_any_file_becomes_stereo_at_44100_hz(channels):
    """Mono on both sides; of many channels the first two; each as if it were resampled alone."""
    audio = noise(channels, 2205, dtype=torch.float32)
    stereo = sample.to_stereo_44k(audio, 22050)
    assert stereo.shape == (2, 4410)
    for side in (0, 1):
        source = audio[min(side, channels - 1)]
        torch.testing.assert_close(stereo[side], tasks.resample(source, 22050, 44100))


# ---- checkpoints ---------------------------------------------------------------------------------

def test_an_older_checkpoint_with_more_configuration_opens(folder):
    """Entries that no longer exist are ignored; weights that do not fit are refused."""
    state = sample.load_state(folder / "latent.pt")
    config = state["config"] | {"given_up": 3}
    net = sample.rebuild("latent", config, state["ema"])
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    weights = dict(state["ema"])
    weights.popitem()
    with pytest.raises(UserError, match="latent model is of another version"):
        sample.rebuild("latent", config, weights)


def test_a_latent_model_brings_its_autoencoder(folder):
    """open_checkpoint("vae") takes it from there; a waveform model has none."""
    latent = load_checkpoint(folder / "latent.pt")
    vae = sample.open_checkpoint("vae", folder / "latent.pt")
    assert vae.kind == "vae" and vae.vae is None
    audio = noise(1, 2, 1280, dtype=torch.float32)
    assert torch.equal(vae.net.encode(audio), latent.encode(audio))
    with pytest.raises(UserError, match="waveform.pt holds a waveform model, not a vae or latent"):
        sample.open_checkpoint("vae", folder / "waveform.pt")


# ---- a weak model --------------------------------------------------------------------------------

def test_an_estimate_moves_away_from_the_weak_model(folder):
    """v + away (v - v_weak), whose derivative is v's own: the weak model is a constant."""
    checkpoint = load_checkpoint(folder / "waveform.pt")
    x_t, t = noise(1, 2, 512, dtype=torch.float32), torch.full((1,), 0.5)
    v = checkpoint.net(x_t, t)
    settings = Settings()
    assert torch.equal(checkpoint.estimate(x_t, t, settings), v)

    checkpoint.weak = SimpleNamespace(net=lambda x_t, t: x_t**3)
    assert torch.equal(checkpoint.estimate(x_t, t, settings), v)
    settings = replace(settings, away=1.5)
    early = torch.full((1,), 0.71)
    assert torch.equal(checkpoint.estimate(x_t, early, settings), checkpoint.net(x_t, early))
    x_t.requires_grad_()
    away = checkpoint.estimate(x_t, t, settings)
    torch.testing.assert_close(away.detach(), v + 1.5 * (v - x_t.detach()**3))
    gradient, = torch.autograd.grad(away.sum(), x_t)
    alone, = torch.autograd.grad(checkpoint.net(x_t, t).sum(), x_t)
    torch.testing.assert_close(gradient, alone)


def changed(path, new, **how):
    """A copy of a checkpoint with other parameters and spectra, and other entries."""
    state = dict(torch.load(path, weights_only=True)) | how
    state["ema"] = {name: 2 * value + 1 for name, value in state["ema"].items()}
    torch.save(state, new)
    return new


def test_a_weak_model_has_the_weights_of_its_file_and_the_scale_of_the_checkpoint(folder, tmp_path):
    """So an earlier model serves whose latents, or whose music, were others."""
    checkpoint = load_checkpoint(folder / "waveform.pt")
    earlier = changed(folder / "waveform.pt", tmp_path / "earlier.pt")
    weak = sample.with_weak_model(checkpoint, earlier).weak
    for mine, its in zip(checkpoint.net.parameters(), weak.net.parameters()):
        torch.testing.assert_close(its, 2 * mine + 1)
        assert not its.requires_grad
    assert torch.equal(weak.net.scale, checkpoint.net.scale)
    assert weak.path == str(earlier)


def test_a_weak_model_that_does_not_serve_is_refused(folder, tmp_path):
    """The same weights, another shape, another kind; and where it would do nothing."""
    checkpoint = load_checkpoint(folder / "waveform.pt")
    with pytest.raises(UserError, match="holds the same weights"):
        sample.with_weak_model(checkpoint, folder / "waveform.pt")
    with pytest.raises(UserError, match="holds a latent model"):
        sample.with_weak_model(checkpoint, folder / "latent.pt")
    save_checkpoint(tmp_path / "deeper.pt", "waveform", UNet1D(replace(UNET["tiny"], blocks=2)))
    with pytest.raises(UserError, match="has another size"):
        sample.with_weak_model(checkpoint, tmp_path / "deeper.pt")
    command = ["--model", "waveform", "--checkpoint", str(folder / "waveform.pt"),
               "--task", "unconditional", "--output", str(tmp_path / "out.wav")]
    weak = ["--weak", str(tmp_path / "deeper.pt")]
    for flags in (["--as-printed"], ["--away", "0"]):
        with pytest.raises(UserError, match="--weak does nothing with --as-printed or --away 0"):
            sample.main([*command, *weak, *flags])
    with pytest.raises(UserError, match="--away has no weak model"):
        sample.main([*command, "--away", "0.5"])


def test_the_command_moves_away_from_a_weak_model(folder, tmp_path):
    """The result differs, and the .json names both files."""
    earlier = changed(folder / "latent.pt", tmp_path / "earlier.pt")
    command = ["--checkpoint", str(folder / "latent.pt"), "--task", "continuation",
               "--input", str(folder / "long.wav"), "--steps", "2"]
    results = []
    for name, flags in (("alone", []), ("away", ["--weak", str(earlier)])):
        output = tmp_path / f"{name}.wav"
        sample.main([*command, *flags, "--output", str(output)])
        results.append(sf.read(output)[0])
    assert np.isfinite(results[1]).all() and not np.allclose(*results)
    record = json.loads((tmp_path / "away.json").read_text())
    assert {str(earlier), str(folder / "latent.pt")} <= record["sha256"].keys()


@pytest.mark.parametrize("name, other", [("latent", "scores"), ("scores", "latent")])
def test_the_shipped_latent_models_move_away_from_each_other(name, other, tmp_path):
    """Unless that is turned off; a copy elsewhere, as one's own model, has no weak one."""
    def opened(*flags):
        options = sample.parse(["--task", "unconditional", *flags])
        checkpoint = sample.open_for_sampling(options, "cpu")
        return checkpoint.weak, Settings.of(options, checkpoint).away

    path = sample.SHIPPED / f"{name}.pt"
    weak, away = opened("--checkpoint", str(path))
    assert weak.path == str(sample.SHIPPED / f"{other}.pt") and away == sample.AWAY
    for flag in (["--away", "0"], ["--as-printed"]):
        assert opened("--checkpoint", str(path), *flag) == (None, 0)
    (tmp_path / path.name).symlink_to(path)
    assert opened("--checkpoint", str(tmp_path / path.name)) == (None, 0)
    assert opened("--model", "waveform") == (None, 0)


# ---- settings ------------------------------------------------------------------------------------

APP_C3 = {"latent": 3e-2, "waveform": 3e-3}                     # xi, App. C.3


@pytest.mark.parametrize("kind", APP_C3)
def test_as_printed_sets_the_papers_constants(kind):
    """One switch for App. C.3's xi and k, and all of the paper's other choices."""
    options = sample.parse(
        ["--task", "regenerate", "--input", "x.wav", "--as-printed", "--steps", "5"])
    settings = Settings.of(options, SimpleNamespace(kind=kind, size="small", weak=None))
    assert settings.xi * 50 / 5 == pytest.approx(APP_C3[kind])
    assert (settings.sampler, settings.k, settings.start_from) == ("ddpm", 0.85, "paper")
    assert not settings.repeats
    assert settings.project == "x_t" and not settings.equalise and not settings.keep_level


@pytest.mark.parametrize("flag", [["--xi", "1"], ["--k", "0.5"], ["--equalise"],
                                  ["--no-equalise"]])
def test_a_flag_beside_as_printed_is_refused(flag):
    """One of them would do nothing."""
    options = sample.parse(["--task", "regenerate", "--input", "x.wav", "--as-printed", *flag])
    with pytest.raises(UserError, match=f"{flag[0]} is set by --as-printed"):
        Settings.of(options, SimpleNamespace(kind="latent", size="small", weak=None))


@pytest.mark.parametrize("kind, size, kept", [
    ("latent", "small", True), ("waveform", "small", False), ("latent", "paper", False)])
def test_small_latent_models_alone_are_held_at_a_level(kind, size, kept):
    """Large models keep it by themselves, and the waveform model's works in audio."""
    checkpoint = SimpleNamespace(kind=kind, size=size, weak=None)
    settings = Settings.of(SimpleNamespace(as_printed=False), checkpoint)
    assert settings.keep_level == kept and settings.xi == sample.XI[kind]
    assert settings.t_end == (sample.T_END if kept else 0)      # nor do large ones lack details
    assert settings.repeats == kept
    for k in (0.8, 1.0):                                # whoever gives --k wants it to do something
        given = Settings.of(SimpleNamespace(as_printed=False, k=k), checkpoint)
        assert given.k == k and given.repeats == (k < 1)


def test_each_setting_with_a_flag_is_a_field_of_that_name():
    """Settings.FLAGS names what add_flags adds; what is not given stays None."""
    options = sample.parse(["--task", "infill", "--input", "x.wav"])
    names = {field.name for field in sample.fields(Settings)}
    assert set(Settings.FLAGS) <= names
    parser = argparse.ArgumentParser()
    Settings.add_flags(parser.add_argument)
    assert vars(parser.parse_args([])) == dict.fromkeys([*Settings.FLAGS, "as_printed"])
    assert all(getattr(options, name) is None for name in Settings.FLAGS)


def default_of(function, name):
    return inspect.signature(function).parameters[name].default


def test_defaults_are_said_once():
    """guidance.sample and tasks.regenerate have those of Settings; k has no other default."""
    assert default_of(guidance.sample, "sampler") == Settings.sampler
    assert default_of(guidance.sample, "steps") == Settings.steps
    assert default_of(tasks.regenerate, "start_from") == Settings.start_from
    for row in (tasks.regenerate, tasks.transition):
        assert default_of(row, "k") is inspect.Parameter.empty


def test_help_has_groups_and_defaults(capsys):
    """What, where, how, output; every number from the code."""
    with pytest.raises(SystemExit):
        sample.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for group in ("what to make:", "where, in seconds or m:ss:", "how:", "output:"):
        assert group in said
    for default in (Settings.steps, Settings.sampler, "latent", "auto"):
        assert f"(default: {default})" in said
    assert f"(default: {Settings.k}; in these, by other models than small latent ones: 1)" in said
    assert "(default: {latent} latent, {waveform} waveform)".format(**sample.XI) in said
    assert "(default: {transition}; {loop})".format(**sample.FADE) in said


# ---- levels and spectra --------------------------------------------------------------------------

def test_the_tails_of_the_equaliser_do_not_wrap():
    """Noise at the end, through a filter with a steep flank: the beginning stays silent."""
    audio = F.pad(noise(1, 2, 64, dtype=torch.float32), (2**14 - 64, 0))
    weight = torch.ones(2**14)
    flank = torch.tensor([16, 1 / 16]).repeat_interleave(torch.tensor([200, 825]))
    wanted = sample.spectrum(audio, weight) * flank[:, None, None]
    made = sample.equalise(audio, weight, wanted).abs().amax((0, 1))
    assert made[:2048].max() < 0.01 * made.max()


def test_the_limiter_holds_full_scale_and_leaves_the_rest():
    """Peaks come below 1; two reaches away nothing changes; the gain moves in small steps."""
    x = 0.3 * noise(2, 8000, dtype=torch.float32).clamp(-2, 2)
    x[0, 3000] = 3.0
    x[:, 5000:5200] *= 10
    y = sample.limited(x, 100)
    assert y.abs().max() <= 1 + 1e-6 and y[0, 3000] > 0.8
    far = torch.cat([torch.arange(2700), torch.arange(3300, 4700), torch.arange(5500, 8000)])
    assert torch.allclose(y[:, far], x[:, far], atol=1e-6)
    assert (y / x)[0].diff().abs().max() < 1.5 / 201
    assert sample.limited(x[:, 2990:3010], 100).abs().max() <= 1 + 1e-6     # shorter than the reach


# ---- Table 2, by name ----------------------------------------------------------------------------

def by_hand(row, x_bar, C_L, C_R, settings, generator):
    """One window of a row of Table 2, from tasks.py and guidance.py alone; hop is 2048 samples."""
    z = guidance.draw_noise(x_bar, generator)
    level = 1.0
    if settings.keep_level:
        contexts = torch.cat([x_bar[..., :C_L], x_bar[..., x_bar.shape[-1] - C_R:]], -1)
        level = rms(contexts, (1, 2))                                               # (B,)
    term = {"weight": level, "project": settings.project}
    k, start = settings.k, settings.start_from
    if row == "continuation":
        task = tasks.continuation(x_bar, C_L, z, **term)
    elif row == "infill":
        task = tasks.infill(x_bar, C_L, C_R, z, **term)
    elif row == "regenerate":
        task = tasks.regenerate(x_bar, C_L, C_R, z, k, start, **term)
    elif row == "transition":
        task = tasks.transition(x_bar, C_L, C_R, z, k, start, **term)
    return guidance.sample(
        neighbours, task.x_T, task, steps=settings.steps, sampler=settings.sampler,
        xi=settings.xi * 50 / settings.steps, generator=generator)


SETTINGS = {
    "default": Settings(steps=4, xi=0.2),
    "level": Settings(steps=4, xi=0.2, keep_level=True),
    "many steps": Settings(steps=25, xi=0.2),
    "ddim": Settings("ddim", steps=4, xi=0.2, k=0.3),
    "as printed": Settings(steps=4, xi=0.03 * 4 / 50, k=0.85, start_from="paper", project="x_t"),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("row", sample.TABLE_2)
def test_each_task_is_its_row_of_table_2(row, name):
    """generate() is guidance.sample on tasks.NAME, at the step of xi * 50 / steps.

    The step is larger for louder contexts, clip by clip: L1's gradient has no level of its own.
    """
    x_bar = noise(2, 4, 64, dtype=torch.float32) * torch.tensor([0.3, 2.0])[:, None, None]
    C_R = 0 if row == "continuation" else 24
    settings = SETTINGS[name]
    made = sample.generate(toy(hop=2048), row, x_bar, 16, C_R, settings, seeded(1))
    expected = by_hand(row, x_bar, 16, C_R, settings, seeded(1))
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)

    # The step itself shows in the result.
    other = by_hand(row, x_bar, 16, C_R, sample.replace(settings, xi=2 * settings.xi), seeded(1))
    assert not torch.allclose(made, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("row", sample.TABLE_2)
def test_each_name_leads_to_the_constructor_of_that_name(row):
    """A reader who follows --task NAME arrives at tasks.NAME."""
    assert row in sample.TABLE_2[row].__code__.co_names


@pytest.mark.parametrize("task, left, right, row", [
    ("continuation", 3, 0, "continuation"), ("infill", 3, 0, "continuation"),
    ("infill", 3, 2, "infill"), ("infill", 0, 2, "infill"), ("embedding", 0, 0, None),
    ("unconditional", 0, 0, None), ("unconditional", 3, 0, "continuation"),
    ("regenerate", 3, 0, "regenerate"), ("regenerate", 0, 0, "regenerate"),
    ("transition", 3, 2, "transition")])
def test_a_window_takes_the_row_of_its_context(task, left, right, row):
    """Tasks that start from x_bar keep their own row, whatever is around the window."""
    assert sample.row_for(task, left, right) == row


@pytest.mark.parametrize("task, C_R, rows", [
    ("continuation", 0, ("continuation", "continuation")),
    ("infill", 8, ("continuation", "infill")),
    ("regenerate", 8, ("regenerate", "regenerate"))])
def test_later_windows_take_what_was_made_as_their_context(task, C_R, rows):
    """A long continuation goes on with continuations; a long infill ends with an infill."""
    x = noise(2, 4, 64, dtype=torch.float32)
    settings = Settings(steps=4, xi=0.2)
    spans = [(0, 40), (24, 64)]
    made = sample.generate(toy(hop=2048), task, x, 16, C_R, settings, seeded(1), spans=spans)
    generator = seeded(1)
    x[..., 0:40] = by_hand(rows[0], x[..., 0:40], 16, 0, settings, generator)
    x[..., 24:64] = by_hand(rows[1], x[..., 24:64], 16, C_R, settings, generator)
    torch.testing.assert_close(made, x, atol=1e-4, rtol=1e-4)


def test_windows_fill_the_gap_in_equal_shares():
    """For any lengths: in windows that fit, behind the overlap, where so much is there.

    The last one reaches the right context. From the right where more is known there, as in a
    mirror.
    """
    lengths = torch.randint(0, 100, (500, 5), generator=seeded()).tolist()
    for C_L, gap, C_R, window, overlap in lengths:
        gap, window, C_R, overlap = 5 * (gap + 1), window + 100, min(C_R, 50), overlap + 1
        n = C_L + gap + C_R
        spans = sample.windows(C_L, gap, C_R, window, overlap)
        if C_L < min(overlap, C_R) and n > window:
            spans = [(n - last, n - first) for first, last in spans]
            C_L, C_R = C_R, C_L
        done, shares = C_L, []
        for first, last in spans:
            assert 0 <= first and last - first <= window
            assert done - first >= min(done, overlap, (window - C_R) // 2)
            end = last if last < n else n - C_R
            shares.append(end - done)
            done = last
        assert done == n and max(shares) - min(shares) <= 1
    assert len(sample.windows(16, 96, 16, 64, 16)) == 3         # of 64 - 16 - 16 each, and no more


@pytest.mark.parametrize("C_L", [0, 3])
def test_a_gap_at_the_start_is_filled_from_the_right(C_L):
    """With less context before the gap than behind it, each window has what lies behind its own."""
    todo = C_L + 200
    for first, last in sample.windows(C_L, 200, 16, 64, 16):
        assert last - first <= 64 and last >= todo + 16 and first < todo
        todo = first
    assert todo == 0


POSITIONS = 180
LAG = torch.arange(POSITIONS)[:, None] - torch.arange(POSITIONS)
SMOOTH = torch.exp(-(LAG / 4).square() / 2)                 # covariance of two positions


def smooth_signals(x_t, t):
    """v of the exact denoiser of Gaussian signals with the covariance SMOOTH."""
    n = x_t.shape[-1]
    alpha_t, sigma_t = (c.float().reshape(-1, 1, 1) for c in alpha_sigma(t))
    K = SMOOTH[:n, :n]
    wiener = torch.linalg.solve(alpha_t**2 * K + sigma_t**2 * torch.eye(n), alpha_t * K)
    return (alpha_t * x_t - x_t @ wiener) / sigma_t


@pytest.mark.parametrize("case, seamless", [
    ("to the right", True), ("to the left", True), ("without an overlap", False)])
def test_regions_longer_than_the_window_are_filled_without_a_seam(case, seamless):
    """Where windows meet, the signal's steps are as large as elsewhere; without overlap not so."""
    C_L = 0 if case == "to the left" else 16
    spans = sample.windows(C_L, POSITIONS - C_L - 16, 16, 64, 16)
    if case == "to the left":
        meet = [edge - 1 for span in spans for edge in span if 0 < edge < POSITIONS]
    else:
        meet = [15, 163] + [last - 1 for _, last in spans[:-1]]
    if case == "without an overlap":
        ends = [last for _, last in spans]
        spans = [spans[0], *zip(ends, ends[1:])]
    root = torch.linalg.cholesky(SMOOTH + 1e-4 * torch.eye(POSITIONS))
    x_bar = noise(1, 64, POSITIONS, dtype=torch.float32) @ root.T
    settings = Settings(xi=0.1)
    x = sample.generate(toy(smooth_signals), "infill", x_bar, C_L, 16, settings, seeded(1),
                        spans=spans)
    steps = rms(x.diff(dim=-1), (0, 1))
    assert len(spans) >= 4 and (steps[meet].max() < 1.2 * steps.mean()) == seamless


@pytest.mark.parametrize("start", ["paper", "matched"])
@pytest.mark.parametrize("row", sample.TABLE_2)
def test_the_bar_has_as_many_steps_as_are_made(row, start):
    """Those of one window; fewer from a matched start, and fewer to an early end."""
    settings, made = Settings(steps=20, k=0.5, start_from=start, t_end=0.3), []
    sample.generate(toy(), row, noise(1, 4, 64, dtype=torch.float32), 16, 8, settings, seeded(),
                    callback=lambda s, x_s: made.append(s))
    assert len(made) == sample.steps_of(row, settings) <= 15 and made[-1] == 0
    assert len(made) == 1 or made[-2] >= 0.3 - 1e-9


@pytest.mark.parametrize("start", ["paper", "matched"])
def test_regenerating_the_start_of_a_track_begins_with_what_stood_there(start):
    """Also without any context, in the first of several windows: x_T is x_bar but for k = 0.01."""
    seen = []

    def model(x_t, t):
        seen.append(x_t)
        return 0 * x_t
    x_bar = noise(1, 4, 64, dtype=torch.float32)
    settings = Settings(k=0.01, start_from=start, steps=1)
    sample.generate(toy(model), "regenerate", x_bar, 0, 0, settings, seeded(),
                    spans=[(0, 32), (16, 64)])
    assert len(seen) == 2 and (seen[0] - x_bar[..., :32]).abs().mean() < 0.05


# ---- the context, repeated -----------------------------------------------------------------------

LONG = round(2.4 * 44100)                            # samples: long enough to be repeated


def tune(seconds, samples, start=0):
    """A tune (1, 2, samples) that lasts so many seconds, over and over, from a sample of it on."""
    n = round(seconds * 44100)
    notes = torch.linspace(0, 7, n).floor()
    pitch = 220 * 2 ** (torch.tensor([0.0, 7, 4, 12, 5, 9, 2, 2])[notes.long()] / 12)
    phase = 2 * math.pi * pitch.cumsum(0) / 44100
    fading = torch.exp(-8 * (torch.linspace(0, 7, n) - notes))
    once = 0.2 * fading * torch.sin(phase)
    return once[(start + torch.arange(samples)) % n].expand(1, 2, -1)


@pytest.mark.parametrize("seconds", [0.9, 1.23, 1.6])
def test_the_period_of_a_tune_is_how_long_it_lasts(seconds):
    """To the sample; also at another level, in another timbre, and in a little noise."""
    audio = tune(seconds, round(2.5 * 44100))[0]        # no room for twice the shortest of them
    opposite = audio * torch.tensor([[1.0], [-1.0]])
    noisy = audio + 0.003 * torch.randn(audio.shape, generator=seeded())
    for other in (audio, 1e-3 * audio, dull(audio), opposite, noisy):
        assert abs(sample.period(other) - seconds * 44100) <= 1
    assert sample.period(0 * audio) >= sample.SHORTEST * 44100              # silence has one, too
    shortest = audio[:, :2 * round(sample.SHORTEST * 44100)]
    assert sample.enough(shortest.shape[1]) and not sample.enough(shortest.shape[1] - 1)
    assert sample.period(shortest) == shortest.shape[1] / 2


def test_a_context_goes_on_as_it_was_repeated():
    """From the left, from the right, or both, cross-faded; and what stood there is not read."""
    gap = 60000
    whole = torch.cat([tune(1.1, 2 * LONG + gap), tune(1.3, 2 * LONG + gap)])           # 2 clips
    one_tune = {"left": (LONG, 0), "right": (0, LONG), "both": (LONG, LONG)}
    for left, right in one_tune.values():
        audio = whole[..., :left + gap + right].clone()
        expected = audio.clone()
        audio[..., left:left + gap] = 9.0
        made = sample.context_repeated(audio, left, right)
        assert torch.equal(made[..., :left], audio[..., :left])
        assert torch.equal(made[..., left + gap:], audio[..., left + gap:])
        new, old = made[..., left:left + gap], expected[..., left:left + gap]
        assert (new - old).square().mean() < 0.3 * old.square().mean()


def test_a_context_that_is_too_short_is_not_repeated():
    """Then the other is, alone; and the period of each is found within it."""
    audio = tune(1.1, 3 * LONG)
    short = LONG // 2                               # 1.2 s
    alone = sample.context_repeated(audio, LONG, 0)
    assert torch.equal(sample.context_repeated(audio, LONG, short)[..., :-short],
                       alone[..., :-short])
    neither = sample.context_repeated(audio, short, short)
    assert not neither[..., short:-short].any()             # nor is what stood there given away
    model, audio = toy(hop=2048), torch.zeros(1, 2, 80 * 2048)
    for task, C_L, C_R, repeats in (("infill", 36, 0, True), ("infill", 1, 36, True),
                                    ("infill", 34, 34, False), ("continuation", 36, 0, True),
                                    ("regenerate", 36, 36, False), ("embedding", 36, 0, False)):
        def row_with(**settings):
            row, x_bar = sample.start_of(model, task, audio, C_L, C_R, Settings(**settings))
            assert x_bar.shape[-1] == 80
            return row

        assert row_with(k=0.5, repeats=True) == ("regenerate" if repeats else task)
        assert row_with(k=0.5) == task


def test_a_command_says_that_its_context_is_too_short_to_repeat(folder, capsys):
    """Not if the user wants noise alone."""
    def said(*flags):
        call(folder, "--task", "infill", "--input", folder / "long.wav", "--start", 1, "--end", 2,
             *flags)
        return "is not repeated: the new part starts from noise alone" in capsys.readouterr().out
    assert said() and said("--k", 0.5) and not said("--k", 1)
    assert not said("--as-printed")


@pytest.mark.parametrize("seconds, said", [(0.5, True), (0.2, False), (0, False)])
def test_a_command_says_where_the_sound_ends(folder, tmp_path, capsys, seconds, said):
    """Of a track that ends in silence; silence itself has no sound to go back to."""
    audio = read(folder / "long.wav")[:44100 * 2]
    audio[len(audio) - round(44100 * seconds):] = 0
    for track, note in ((audio, said), (0 * audio, False)):
        sf.write(tmp_path / "ends.wav", track, 44100)
        call(folder, "--task", "continuation", "--input", tmp_path / "ends.wav", "--length", 0.3)
        printed = capsys.readouterr().out
        assert ("are silent, and silence may go on: --start 0:01.500" in printed) == note


@pytest.mark.parametrize("task", sample.REPEATING)
def test_a_continuation_and_an_infill_regenerate_their_context_repeated(task):
    """As Table 2's Regenerate; without repeats, from noise alone, as their own row."""
    hop, C = 2048, 40
    model = toy(hop=hop)
    audio = torch.cat([tune(1.1, 128 * hop), tune(1.3, 128 * hop, 999)])
    C_R = 0 if task == "continuation" else C
    settings = Settings(steps=4, xi=0.2, k=0.7, repeats=True, equalise=False)
    repeated = sample.context_repeated(audio, C * hop, C_R * hop)
    x_bar = sample.encode_context(model, repeated, 128, 0)
    expected = by_hand("regenerate", x_bar, C, C_R, settings, seeded(1))
    made = sample.fill(model, task, audio, C, C_R, settings, seeded(1))
    torch.testing.assert_close(made, model.decode(expected), atol=1e-4, rtol=1e-4)

    alone = sample.replace(settings, repeats=False)
    x_bar = sample.encode_context(model, audio, C, C_R)
    expected = by_hand(task, x_bar, C, C_R, alone, seeded(1))
    made = sample.fill(model, task, audio, C, C_R, alone, seeded(1))
    torch.testing.assert_close(made, model.decode(expected), atol=1e-4, rtol=1e-4)


# ---- fill: encode, generate, decode, equalise ----------------------------------------------------

@pytest.mark.parametrize("task, reads", [
    ("continuation", False), ("infill", False), ("regenerate", True), ("transition", True)])
@pytest.mark.parametrize("C", [100, 600], ids=["short context", "repeated context"])
def test_tasks_from_x_bar_read_the_gap_and_no_others_do(task, reads, C):
    """Other audio in the place of the gap changes the result, or no bit of it."""
    n = 2**15 if C == 100 else 2**18
    audio = 0.1 * noise(1, 2, n, dtype=torch.float32)
    C_R = 0 if task == "continuation" else C
    other = audio.clone()
    other[..., C * 128:n - C_R * 128] = 0.3
    settings = Settings(steps=2, repeats=True)
    made = [sample.fill(toy(), task, x, C, C_R, settings, seeded(1)) for x in (audio, other)]
    assert torch.equal(*made) != reads


def mirrored(audio):
    """Three times as long: back, forth and back."""
    return torch.cat([audio.flip(-1), audio, audio.flip(-1)], -1)


def test_a_context_is_encoded_as_if_it_went_on_as_its_mirror_image(folder):
    """Each side by itself, at both of its ends; between them are zeros."""
    latent = load_checkpoint(folder / "latent.pt")
    wake(latent.vae)                                # as initialised, an encoder sees no neighbours
    n, C = 2**14, 32
    audio = 0.1 * noise(2, 2, n, dtype=torch.float32)
    x = sample.encode_context(latent, audio, C, C)
    assert x.shape == (2, latent.channels, n // 128) and not x[..., C:-C].any()
    for side, got in ((audio[..., :C * 128], x[..., :C]), (audio[..., -C * 128:], x[..., -C:])):
        wanted = latent.encode(mirrored(side))[..., C:2 * C]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        assert (latent.encode(side) - wanted).abs().max() > 1e-3         # the margin matters


def test_music_from_nothing_is_as_loud_as_music():
    """Each clip by itself, and silence stays silent."""
    loudness = torch.tensor([1e-3, 3.0, 0.0])[:, None, None]
    decoded = loudness * noise(3, 2, 2**14, dtype=torch.float32)
    model = toy(decode=lambda x: decoded)

    def level(task="unconditional", C_L=0, keep_level=True, equalise=True, **how):
        settings = Settings(steps=1, keep_level=keep_level, equalise=equalise)
        made = sample.fill(model, task, decoded, C_L, 0, settings, seeded(), **how)
        return rms(made, (1, 2)).tolist()
    from_nothing = pytest.approx([0.1, 0.1, 0.0])
    assert level() == from_nothing
    assert level(guides=[lambda z: guidance.Task(z, ())]) == from_nothing
    assert level(example=decoded, equalise=False) == from_nothing

    # With a context or a start, without keep_level, or by the spectrum of an example, it is theirs.
    as_decoded = pytest.approx([1e-3, 3.0, 0.0], rel=0.05)
    assert level("continuation", C_L=8) == as_decoded
    assert level("regenerate") == as_decoded
    assert level(keep_level=False) == as_decoded
    assert level(example=2 * decoded) == pytest.approx([2e-3, 6.0, 0.0], rel=0.05)


@pytest.mark.parametrize("equalise, guided", [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("model", ["latent", "waveform"])
def test_fill_gives_what_is_new_the_spectrum_of_its_context(folder, model, equalise, guided):
    """Not without `equalise`, nor with guides, which choose another."""
    checkpoint = load_checkpoint(folder / f"{model}.pt")
    audio = 0.1 * noise(1, 2, min(2**15, checkpoint.window * checkpoint.hop), dtype=torch.float32)
    C = audio.shape[-1] // checkpoint.hop * 3 // 8
    guides = [lambda z: guidance.Task(z, ())] if guided else []
    settings = Settings(steps=1, equalise=equalise)
    made = sample.fill(checkpoint, "infill", audio, C, C, settings, seeded(1), guides=guides)
    x_bar = sample.encode_context(checkpoint, audio, C, C)
    x_0 = sample.generate(checkpoint, "infill", x_bar, C, C, settings, seeded(1), guides=guides)
    decoded = checkpoint.decode(x_0)
    matched = sample.like_original(decoded, audio, C * checkpoint.hop,
                                   audio.shape[-1] - C * checkpoint.hop)
    assert torch.equal(made, matched if equalise and not guided else decoded)
    assert not torch.allclose(matched, decoded, atol=1e-3)


def dull(x):
    """A decoder that takes 9 dB off everything above 2 kHz."""
    X = torch.fft.rfft(x)
    passed = torch.linspace(0, 22050, X.shape[-1]) < 2000
    return torch.fft.irfft(X * torch.where(passed, 1.0, 10 ** (-9 / 20)), x.shape[-1])


BINS = [*range(5, 70), *range(120, 1025)]           # away from 0 Hz, and from dull's step at 2 kHz


def decibels_between(audio, reference):
    """(B, bins): by how much the spectrum of audio is above the reference's."""
    one, other = powers(audio), powers(reference)
    return 10 * torch.log10(one / other)[:, BINS]


def powers(audio):
    """(B, 1025): the power spectrum of both channels together."""
    return sample.both_sides(sample.spectrum(audio, torch.ones(audio.shape[-1])))


def test_decoded_audio_gets_the_spectrum_of_the_contexts():
    """By at most 12 dB; what stood in the gap is read for from_x_bar alone."""
    n, new = 2**17, slice(2**15, 2**16)
    a, b = 200 * 128, n - 100 * 128
    x = 0.1 * noise(2, 2, n, dtype=torch.float32)
    original = x.clone()
    original[..., a:b] *= 0.5

    # 9 dB too dull before the gap, 6 dB too loud from there on.
    decoded = torch.cat([dull(x)[..., :a], x[..., a:] * 2], -1)
    made = sample.like_original(decoded, original, a, b)
    assert made.shape == x.shape and decibels_between(made[..., new], x[..., new]).abs().max() < 1
    same = sample.like_original(decoded, x, a, b)
    assert torch.allclose(made, same, atol=1e-6)
    of_gap = sample.like_original(decoded, original, a, b, from_x_bar=True)
    halved = decibels_between(of_gap[..., new], x[..., new]) + 6.02
    assert halved.abs().max() < 1

    # And what stood there may be louder than the contexts.
    loud = x.clone()
    loud[..., a:b] *= 3
    of_gap = sample.like_original(loud, loud, a, b, from_x_bar=True)
    assert (decibels_between(of_gap[..., new], x[..., new]) - 9.54).abs().max() < 1

    # A clip does not depend on its batch.
    alone = sample.like_original(decoded[:1], original[:1], a, b)
    assert torch.allclose(made[:1], alone, atol=1e-6)

    # The contexts get their own spectrum too; gains end at 4.
    dulled = sample.like_original(dull(x), x, a, b)
    context = slice(a - 8192)
    assert decibels_between(dulled[..., context], x[..., context]).abs().max() < 1
    faint = sample.like_original(x / 100, original, a, b)
    assert (decibels_between(faint, x) - 20 * math.log10(4 / 100)).abs().max() < 0.5


@pytest.mark.parametrize("left, right", [(25600, 12800), (0, 0)])
def test_an_example_gives_new_audio_its_spectrum(left, right):
    """The shape, at the level that it would have without; without a context, the level too."""
    n = 2**17
    x = 0.1 * noise(2, 2, n, dtype=torch.float32)
    example = 2 * dull(0.1 * noise(2, 2, 2**16, seed=1, dtype=torch.float32))
    made = sample.like_original(x, x, left, n - right, example=example)
    new = made[..., left + 4096:n - right - 4096]
    change = decibels_between(new, example)
    assert (change - change.mean(1, keepdim=True)).abs().max() < 1
    level = rms(new, (1, 2)) / rms(x if left else example, (1, 2))
    assert (20 * level.log10()).abs().max() < 0.5
    context = slice(max(0, left - 8192))
    assert torch.allclose(made[..., context], x[..., context], atol=0.01)


def test_little_context_gives_no_spectrum():
    """From nothing, and with less than 0.25 s of context, audio is as decoded."""
    tone = torch.sin(60 * 2 * math.pi * torch.arange(2**15) / 44100).expand(1, 2, -1)
    for left, right in ((0, 0), (128, 0), (0, 128), (5120, 5120)):
        made = sample.like_original(tone, 3 * tone, left, 2**15 - right)
        assert torch.allclose(made, tone)
    enough = sample.like_original(tone, 3 * tone, 6400, 2**15 - 5120)
    assert not torch.allclose(enough, tone)

    # It says how loud new audio may be; with from_x_bar, what stood there does.
    for from_x_bar in (False, True):
        made = sample.like_original(tone, tone / 3, 5120, 2**15 - 5120, from_x_bar)
        assert torch.allclose(made, tone) == from_x_bar


# ---- guides --------------------------------------------------------------------------------------

def test_a_class_guide_asks_for_its_classes_alone(folder):
    """In the order of the labels; the others are free."""
    classifier = load_checkpoint(folder / "classifier.pt")
    x = 0.1 * noise(2, 256, 60, dtype=torch.float32)
    task = sample.class_guide(toy(), classifier, {"c": 1.0, "a": 0.0}, weight=2)(x)
    term, = task.terms
    logits, _ = classifier.net.listen(toy().decode(x), 44100)
    assert term.d is tasks.bce and term.y.tolist() == [[1.0, 0.0]] * 2
    torch.testing.assert_close(term.A(x), logits[:, [2, 0]])
    plain, = sample.class_guide(toy(), classifier, {"a": 1.0})(x).terms
    assert term.weight == 2 * plain.weight > 0


def test_an_example_guide_compares_embeddings_of_a_part(folder):
    """y is the example's embedding; nothing outside the part is listened to."""
    net = load_checkpoint(folder / "classifier.pt").net
    example = 0.1 * noise(1, 2, 22050, dtype=torch.float32)
    x = 0.1 * noise(1, 256, 80, seed=1, dtype=torch.float32)
    other = x.clone()
    other[..., :10] = 3
    term, = sample.example_guide(toy(), net, example, part=slice(1280, 9000))(x).terms
    assert term.d is tasks.l2
    torch.testing.assert_close(term.y, net.listen(example, 44100)[1])
    torch.testing.assert_close(term.A(x), net.listen(toy().decode(x)[..., 1280:9000], 44100)[1])
    assert torch.equal(term.A(other), term.A(x))


def test_weights_reach_their_guides(folder):
    """--weights, each to the term of its name; 1 where none is given."""
    classifier = load_checkpoint(folder / "classifier.pt")
    command = ["--task", "classifier", "--reference", str(folder / "other.wav"), "--classes", "a=1"]
    for flags, factors in (([], [1, 1]), (["--weights", "embedding=2,classifier=3"], [2, 3])):
        guides, _ = sample.make_guides(sample.parse([*command, *flags]), toy(), classifier, "cpu")
        weights = [guide(noise(1, 256, 60)).terms[0].weight for guide in guides]
        assert weights == [sample.GUIDE_STEP * factor for factor in factors]


def test_an_example_guide_alone_leads_towards_the_example(folder):
    """The distance of the embeddings falls, by a model in audio."""
    net = load_checkpoint(folder / "classifier.pt").net
    example = noise(1, 2, 22050, dtype=torch.float32).cumsum(-1)
    guide = sample.example_guide(toy(), net, 0.1 * example / example.std(), weight=10)
    distances = []
    for guides in ([], [guide]):
        x = sample.generate(toy(), "embedding", torch.zeros(1, 256, 60), 0, 0, Settings(steps=12),
                            seeded(1), guides=guides)
        term, = guide(x).terms
        distances.append(term.distance(x).item())
    assert distances[1] < 0.95 * distances[0]


@pytest.mark.parametrize("task", ["alone", "infill"])
def test_guidance_leads_where_it_should(folder, task):
    """Nearer to the reference; the wanted class's log-odds rise, and the unwanted one's fall."""
    net = load_checkpoint(folder / "classifier.pt").net
    infill = ("--task", "infill", "--input", folder / "long.wav", "--start", 1, "--end", 1.5,
              "--splice", 0)

    @torch.no_grad()
    def made(name, *flags):
        """Logits and embedding of the model's output."""
        if task == "infill":
            audio = call(folder, *infill, *flags, steps=4)[35900:74500]
        else:
            audio = call(folder, "--task", name, "--length", 0.5, *flags, steps=4)
        return net.listen(torch.from_numpy(audio.T[None]).float(), 44100)
    other = torch.from_numpy(read(folder / "other.wav").T[None]).float()
    target = net.listen(other, 44100)[1]
    plain = ["--no-equalise"] if task == "infill" else []               # as it is under guidance
    logits, embedding = made("unconditional", *plain)
    classed = made("classifier", "--classes", "a=1,c=0", "--weights", "classifier=1000")[0]
    assert (classed - logits)[0, 0] > 0 > (classed - logits)[0, 2]
    if task == "infill":
        near = made("embedding", "--reference", folder / "other.wav", "--weights", "embedding=30",
                    "--no-equalise")[1]
        assert (near - target).norm() < 0.98 * (embedding - target).norm()


def test_guides_have_a_step_of_their_own():
    """Whatever xi is, and for any number of steps: xi is the step towards the context alone."""
    x_bar = noise(1, 4, 64, dtype=torch.float32)

    def guide(z):
        return tasks.embedder_guidance(lambda x: x.mean(-1), torch.ones(1, 4), z, weight=3.0)

    def made(xi, guides):
        settings = Settings(steps=4, xi=xi)
        return sample.generate(toy(), "embedding", x_bar, 0, 0, settings, seeded(1), guides=guides)
    torch.testing.assert_close(made(0.1, [guide]), made(0.4, [guide]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(made(0.1, [guide]), made(0.1, []), atol=1e-2)
    generator = seeded(1)
    z = guidance.draw_noise(x_bar, generator)
    expected = guidance.sample(neighbours, z, guide(z), steps=4, xi=50 / 4, generator=generator)
    torch.testing.assert_close(made(0.1, [guide]), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="xi must be above 0 with guides"):
        made(0, [guide])


def two_kinds(x_t, t):
    """v of the exact denoiser of signals that are +1 or -1 throughout."""
    alpha_t, sigma_t = (c.float().reshape(-1, 1, 1) for c in alpha_sigma(t))
    kind = torch.tanh(x_t.sum((1, 2), keepdim=True) * alpha_t / sigma_t.square().clamp(min=1e-6))
    return (alpha_t * x_t - kind.expand_as(x_t)) / sigma_t.clamp(min=1e-6)


def towards_plus_one(z):
    """By their last position alone, with small steps."""
    return tasks.embedder_guidance(lambda x: x[..., -1:].mean(1), torch.ones(len(z), 1), z, 0.01)


def test_trials_find_what_a_guide_alone_does_not_reach():
    """The gradient is too small to change the kind of signal; one of eight beginnings has it."""
    x_bar = torch.zeros(1, 4, 16)
    shares = {}
    for trials in (1, 8):
        settings = Settings(steps=20, trials=trials)
        made = [sample.generate(toy(two_kinds), "classifier", x_bar, 0, 0, settings, seeded(j),
                                guides=[towards_plus_one]) for j in range(24)]
        shares[trials] = (torch.cat(made).mean((1, 2)) > 0).float().mean()
    assert shares[1] < 0.75 and shares[8] > 0.95


def test_the_best_beginning_has_the_smallest_distance_of_its_clip(monkeypatch):
    """For each clip alone, whatever its batch; and it is guided from there on."""
    monkeypatch.setattr(sample, "T_TRIALS", (0.65,))
    made = []

    def begun(generators):
        x_T = guidance.draw_noise(torch.zeros(len(generators), 4, 16), generators)
        return sample.best_beginning(neighbours, towards_plus_one(x_T),
                                     Settings(steps=20, trials=5), generators,
                                     callback=lambda s, x_s: made.append(x_s))

    task = begun([seeded(j) for j in range(3)])
    assert task.t_T == pytest.approx(0.65) and len(task.terms) == 1
    last = made[-5:]                                                    # of each trial, (3, 4, 16)
    assert len(made) == 7 * 5
    far = []
    for x_t in last:
        x0_hat, _ = guidance.guided_estimate(neighbours, x_t, torch.tensor(task.t_T), ())
        far.append((1 - x0_hat[..., -1].mean(1)).abs())
    best = torch.stack(far).argmin(0)
    assert len(set(best.tolist())) > 1                                  # not one for all clips
    for j in range(3):
        assert torch.equal(task.x_T[j], last[best[j]][j])
        torch.testing.assert_close(begun([seeded(j)]).x_T[0], task.x_T[j])


def test_the_best_quarter_goes_on_in_four_ways(monkeypatch):
    """At the second time, from the two best of eight at the first."""
    seen = []

    def begun(*times):
        monkeypatch.setattr(sample, "T_TRIALS", times)
        x_T = noise(1, 4, 16, dtype=torch.float32)
        return sample.best_beginning(neighbours, towards_plus_one(x_T),
                                     Settings(steps=20, trials=8), seeded(),
                                     callback=lambda s, x_s: seen.append(x_s)).x_T
    best = begun(0.9)
    at_first = torch.cat(seen[-8:])
    begun(0.9, 0.85)
    after = torch.cat(seen[-8:])                                        # one step later
    came_from = torch.cdist(after.flatten(1), at_first.flatten(1)).argmin(1)
    assert len(after.unique(dim=0)) == 8 and sorted(came_from.bincount().tolist())[-2:] == [4, 4]
    assert torch.equal(at_first[came_from[0]], best[0])


@pytest.mark.parametrize("flags, trials", [
    ([], sample.TRIALS), (["--trials", "3"], 3), (["--as-printed"], 1)])
def test_only_guided_music_from_nothing_has_trials(flags, trials):
    """By default in small models; counted in the bar, of the first of several windows."""
    options = sample.parse(["--task", "classifier", "--classes", "a=1", *flags])
    checkpoint = SimpleNamespace(kind="latent", size="small", weak=None)
    assert Settings.of(options, checkpoint).trials == trials
    settings = Settings(steps=20, trials=trials)
    for name, guides in (("classifier", [towards_plus_one]), ("classifier", []),
                         ("infill", [towards_plus_one])):
        made = []
        C = 16 if name == "infill" else 0
        sample.generate(toy(), name, noise(1, 4, 96, dtype=torch.float32), C, C, settings,
                        seeded(), spans=[(0, 64), (32, 96)], guides=guides,
                        callback=lambda s, x_s: made.append(s))
        assert len(made) == sample.steps_of(name, settings, 2, guides)
        tried = trials > 1 and name == "classifier" and guides
        assert len(made) > 40 if tried else len(made) == 40


def test_a_reference_gives_its_spectrum(folder):
    """From the command line; not with --no-equalise."""
    def shape(audio):
        audio = torch.from_numpy(audio.T[None].copy()).float()
        return powers(audio)[:, 5:].log10()
    wanted = shape(read(folder / "other.wav"))

    def distance(*flags):
        made = call(folder, "--task", "embedding", "--reference", folder / "other.wav",
                    "--length", 0.5, *flags)
        return (shape(made) - wanted).abs().mean()
    assert distance() < 0.5 * distance("--no-equalise")


def test_a_reference_may_have_any_number_of_channels(folder):
    """It is listened to, not edited."""
    write_music(folder / "six.wav", 1, 44100, 6)
    edit = ("--task", "infill", "--input", folder / "long.wav", "--start", 1, "--end", 1.2)
    assert np.isfinite(call(folder, *edit, "--reference", folder / "six.wav")).all()


# ---- excerpts and fades --------------------------------------------------------------------------

def test_an_excerpt_is_mirrored_beyond_its_ends():
    """Back and forth, as far as needed, with each end twice; nothing outside [lo, hi) is read."""
    got = sample.excerpt(torch.arange(10), -1, 12, lo=2, hi=6)
    assert got.tolist() == [4, 3, 2, 2, 3, 4, 5, 5, 4, 3, 2, 2, 3]


@pytest.mark.parametrize("rate_in, rate_out", [(48000, 44100), (44100, 48000), (22050, 44100)])
def test_a_part_is_resampled_in_its_place(rate_in, rate_out):
    """Both rates have a sample at the anchor; nothing outside [lo, hi) is read."""
    def tone(time):
        return torch.sin(2 * math.pi * 500 * time)
    x = tone(torch.arange(20000).double() / rate_in)[None]
    lo, hi = 9001 - 2000 * rate_in // rate_out, 9001 + 2500 * rate_in // rate_out
    x[:, :lo] = x[:, hi:] = math.nan
    part = sample.resample_part(x, rate_in, rate_out, 9001, -2000, 2500, lo, hi)
    at = 9001 / rate_in + torch.arange(-2000, 2500).double() / rate_out
    inner = slice(200, -200)                        # at its ends, the filter meets the mirror image
    assert part.shape == (1, 4500) and part.isfinite().all()
    torch.testing.assert_close(part[0, inner], tone(at)[inner], atol=1e-4, rtol=0)


def test_a_blend_is_level_but_of_opposite_signals():
    """One with itself stays, unrelated ones keep their power, opposite ones pass through 0."""
    one = torch.tensor([[3.0], [0.0]]).expand(-1, 25)
    other = torch.tensor([[0.0], [3.0]]).expand(-1, 25)
    torch.testing.assert_close(sample.blend(one, one), one)
    torch.testing.assert_close(sample.blend(one, other).square().sum(0), torch.full((25,), 9.0))
    turned = sample.blend(one, -one)[0]
    assert turned[12].abs() < 1e-5 and (turned.diff() < 0).all()


# ---- a track, and its edit -----------------------------------------------------------------------

def region_of(*flags, window=512):
    """(a, b, context) of the flags, by a model with frames of 128 samples."""
    options = sample.parse([str(flag) for flag in flags])
    arguments = sample.region(options, toy(window=window))
    return arguments["a"], arguments["b"], arguments["context"]


@pytest.mark.parametrize("flags, a, b", [
    ("--start 3", 3, 5), ("--end 5.5", 3.5, 5.5), ("", 3, 5), ("--start 7", 7, 8),
    ("--end 1", 0, 1), ("--start 1 --end 7", 1, 7)])
def test_two_seconds_are_edited_where_one_end_is_given(folder, flags, a, b):
    """After --start, before --end, or in the middle; less at the edges of the track."""
    sf.write(folder / "eight.wav", 0.1 * np.ones((8000, 1)), 1000)
    got = region_of("--task", "infill", "--input", folder / "eight.wav", *flags.split())
    assert got[:2] == (1000 * a, 1000 * b)


@pytest.mark.parametrize("flags, context", [((), 2.4), (("--context", "1"), 1)])
def test_a_continuation_fills_what_its_context_leaves_of_the_window(folder, flags, context):
    """2.4 s of context if none is given."""
    a, b, got = region_of("--task", "continuation", "--input", folder / "mono.wav", *flags,
                          window=2048)
    assert got == context and a == 3 * 48000
    assert (b - a) / 48000 == pytest.approx(2048 * 128 / 44100 - context, abs=1e-4)


def test_what_follows_a_short_track_fills_the_window_too(folder):
    """Half a second of music leaves more of the window than 2.4 s would."""
    sf.write(folder / "half.wav", np.zeros((24000, 1)), 48000)
    a, b, _ = region_of("--task", "continuation", "--input", folder / "half.wav", window=2048)
    assert a == 24000 and b / 48000 == pytest.approx(2048 * 128 / 44100, abs=1e-4)


def test_an_intro_is_half_a_window_long(folder):
    """In whole frames."""
    a, b, _ = region_of("--task", "intro", "--input", folder / "long.wav", window=512)
    assert (a, b) == (0, 256 * 128)


@pytest.mark.parametrize("flags, row", [
    ("loop", "infill"), ("loop --k 1", "infill"), ("loop --k 0.9", "regenerate"),
    ("intro", "infill"), ("intro --k 0.7", "infill"),
    ("regenerate --k 1", "regenerate"), ("infill", "infill")])
def test_a_loop_and_an_intro_are_infills(flags, row):
    """But for a loop that keeps a part of what stood there: less noise than all.

    Before an intro there was silence, of which nothing is to be kept.
    """
    assert sample.row_of(sample.parse(["--task", *flags.split(), "--input", "x.wav"])) == row


def test_context_is_what_the_model_reads_on_either_side(folder):
    """In whole frames."""
    track = Track.read(folder / "mono.wav")
    edit = Edit(toy(window=2048), track, round(1.4 * 48000), round(1.6 * 48000), context=0.5)
    assert edit.C_L == edit.C_R == int(0.5 * 44100 / 128)


def edit_of(rate, first, last, context=None, hop=128, window=512):
    """The Edit of a noisy track of 4 s, where the model's window holds 1.5 s."""
    track = Track(0.1 * noise(2, 4 * rate, dtype=torch.float32), rate)
    return Edit(toy(hop=hop, window=window), track, first, last, context)


@pytest.mark.parametrize("rate", [44100, 48000, 22050])
def test_what_is_new_is_rounded_up_to_whole_frames(rate):
    """All that was asked for, and less than a frame more; nothing more where frames fit exactly."""
    frame = 128 * rate / 44100
    for length in (1, 1000, 1000 + round(frame / 4), 1000 + round(frame / 2), round(0.7 * rate)):
        edit = edit_of(rate, rate, rate + length)
        assert 0 <= edit.end - (rate + length) < math.ceil(frame)
        assert -1e-6 < edit.end - (rate + edit.gap * frame) < 1
    exact = 147 * 128 * rate // 44100                   # 147 frames are whole samples at each rate
    assert edit_of(rate, rate, rate + exact).gap == 147
    assert edit_of(rate, rate, rate + exact).end == rate + exact


def test_contexts_share_what_the_window_leaves():
    """Half of it each; what one side of the track lacks goes to the other."""
    middle = edit_of(44100, 2 * 44100, 2 * 44100 + 112 * 128)
    assert (middle.C_L, middle.gap, middle.C_R) == (200, 112, 200)
    early = edit_of(44100, 50 * 128, 162 * 128)
    assert (early.C_L, early.C_R) == (50, 350)
    late = edit_of(44100, 4 * 44100 - 162 * 128, 4 * 44100 - 50 * 128)
    assert (late.C_L, late.C_R) == (350, 50)


def test_a_context_is_half_of_a_window_at_most():
    """However much is asked for: the rest of the window is for what is new."""
    edit = edit_of(44100, 4 * 44100, 4 * 44100 + 128, context=10)
    assert edit.C_L == 256 and edit.C_R == 0


@pytest.mark.parametrize("whole", [False, True])
def test_an_offset_stays_in_the_track_and_away_from_the_model(whole):
    """A constant, of each channel its own, is in the new audio too; the model reads none."""
    edit, offset = edit_of(48000, 48000, 52000), torch.tensor([[0.3], [-0.1]])
    other = Edit(edit.checkpoint, Track(edit.track.audio + offset, 48000), 48000, 52000)
    torch.testing.assert_close(other.context(whole), edit.context(whole), atol=1e-5, rtol=0)
    decoded = 0.1 * noise(2, 512 * 128, seed=1, dtype=torch.float32)
    plain, moved = (one.splice(decoded, 0.03)[:, edit.a:edit.end] for one in (edit, other))
    torch.testing.assert_close(moved, plain + offset, atol=1e-5, rtol=0)


def test_a_fade_is_as_short_as_its_context():
    """With three frames of context, the cross-fades of 30 ms end where the model's audio does."""
    edit = edit_of(44100, 44100, 44100 + 1280, context=0.01)
    first, last = edit.a - 3 * 128, edit.end + 3 * 128
    spliced = edit.splice(0.1 * noise(2, 16 * 128, seed=1, dtype=torch.float32), 0.03)
    changed = (spliced != edit.track.audio).any(0).nonzero()
    assert changed.min() == first and changed.max() == last - 1


def test_mono_keeps_the_level_of_what_was_generated(folder):
    """Two channels that differ would lose 3 dB in their mean."""
    edit = Edit(toy(window=2048), Track.read(folder / "mono.wav"), 48000, 72000)
    frames = edit.C_L + edit.gap + edit.C_R
    decoded = 0.1 * noise(2, frames * 128, dtype=torch.float32)
    middle = edit.splice(decoded, 0.03)[:, 50000:70000]
    assert middle.shape == (1, 20000)
    assert abs(20 * math.log10(middle.std() / decoded.std())) < 0.5


def tone(phase):
    return 0.5 * torch.sin(torch.arange(3 * 44100) / 20 + phase).expand(2, -1)


@pytest.mark.parametrize("hop", [128, 2048])
def test_the_fades_of_a_splice_lie_in_the_contexts(hop):
    """A model that returns its contexts, and silence in the gap, changes nothing outside of it."""
    edit = Edit(toy(hop=hop, window=2**18 // hop), Track(tone(0), 44100), 50000, 60001)
    first, end = edit.a - edit.C_L * hop, edit.a + edit.gap * hop
    decoded = (tone(0) - edit.offset)[:, first:end + edit.C_R * hop]
    decoded[:, edit.a - first:end - first] = 0
    spliced = edit.splice(decoded, 0.03)
    assert edit.end == end and torch.allclose(spliced[:, edit.a:end], edit.offset)
    for context in (slice(0, edit.a), slice(end, None)):
        assert torch.allclose(spliced[:, context], tone(0)[:, context], atol=1e-6)


@pytest.mark.parametrize("hop", [128, 2048])
def test_a_splice_is_smooth(hop):
    """Another sound everywhere: no step is larger than the sounds' own, as in a hard cut."""
    edit = Edit(toy(hop=hop, window=2**18 // hop), Track(tone(0), 44100), 50000, 60001)
    first, last = edit.a - edit.C_L * hop, edit.a + (edit.gap + edit.C_R) * hop
    largest = tone(0).diff().abs().max()
    assert edit.splice(tone(2)[:, first:last], 0.03).diff().abs().max() < 1.1 * largest
    hard_cut = torch.cat([tone(0)[:, :edit.a], tone(2)[:, edit.a:]], dim=1)
    assert hard_cut.diff().abs().max() > 5 * largest


@pytest.mark.parametrize("one, two", [(1, 2), (2, 1), (1, 1), (2, 2)])
def test_a_transition_has_the_channels_of_its_first_track(one, two):
    """Mono takes the mean of a stereo track, stereo has a mono track on both sides."""
    first = Track(noise(one, 1000), 1000)
    second = Track(noise(two, 800, seed=1), 1000)
    faded, a, b = sample.crossfaded(first, second, 0.1)
    assert faded.audio.shape == (one, 1700) and (a, b) == (900, 1000)
    wanted = second.audio.mean(0, keepdim=True) if one == 1 else second.audio.expand(2, -1)
    torch.testing.assert_close(faded.audio[:, :a], first.audio[:, :a])
    torch.testing.assert_close(faded.audio[:, b:], wanted[:, 100:])


@pytest.mark.parametrize("subtype, joined", [("PCM_16", "PCM_16"), ("PCM_24", "mixed")])
def test_a_transition_has_the_word_length_of_both_or_floats(subtype, joined):
    """A 16-bit track does not cut the other one's 24 bits off."""
    one, other = (Track(noise(1, 1000), 1000, kind) for kind in ("PCM_16", subtype))
    for tracks in ((one, other), (other, one)):
        assert sample.crossfaded(*tracks, 0.1)[0].subtype == joined


@pytest.mark.parametrize("rate", [22050, 48000])
def test_the_second_track_of_a_transition_is_resampled(rate):
    """It keeps its pitch and its length at the rate of the first."""
    at = torch.arange(rate).double() / rate
    second = Track(torch.sin(2 * math.pi * 440 * at)[None], rate)
    faded, _, b = sample.crossfaded(Track(torch.zeros(1, 44100), 44100), second, 0.25)
    assert faded.rate == 44100 and faded.n == round(1.75 * 44100) and b == 44100
    at = torch.arange(11025, 40000).double() / 44100                    # far from its end
    wanted = torch.sin(2 * math.pi * 440 * at)
    torch.testing.assert_close(faded.audio[0, b:b + len(at)].double(), wanted, atol=1e-3, rtol=0)


def test_a_loud_second_track_stays_within_full_scale():
    """The resampler overshoots a square wave; a float track's own peaks stay."""
    square = torch.sign(noise(1, 48000, dtype=torch.float32))
    one = Track(torch.zeros(1, 44100), 44100, "PCM_16")
    for subtype, within in (("PCM_16", True), ("FLOAT", False)):
        faded, _, _ = sample.crossfaded(one, Track(square, 48000, subtype), 0.25)
        assert (faded.audio.abs().max() <= 1) == within


@pytest.mark.parametrize("file, subtype, dtype, written", [
    ("x.wav", "VORBIS", torch.float32, "FLOAT"), ("x.flac", "FLOAT", torch.float32, "PCM_24"),
    ("x.wav", "mixed", torch.float64, "DOUBLE"), ("x.wav", "PCM_16", torch.float32, "PCM_16")])
def test_what_no_integers_can_hold_is_written_as_floats(file, subtype, dtype, written):
    """What was compressed, and two tracks of different word lengths; flac has 24 bits."""
    track = Track(torch.zeros(2, 9, dtype=dtype), 44100, subtype)
    assert sample.word_length(Path(file), track) == written


@pytest.mark.parametrize("subtype, bits", [("PCM_16", 16), ("PCM_24", 24), ("PCM_32", 32)])
def test_full_scale_is_the_largest_integer(subtype, bits, tmp_path):
    """1.0 is one step above it, and must not become the lowest; nor what lies beyond."""
    path = tmp_path / "loud.wav"
    sample.write_track(path, Track(torch.tensor([[1.0, -1.0, 1.5, -1.5, 0.5]]), 44100, subtype))
    step = 2.0 ** (1 - bits)
    assert read(path)[:, 0].tolist() == [1 - step, -1, 1 - step, -1, 0.5]


@pytest.mark.parametrize("ending, subtype", [("flac", "PCM_16"), ("wav", "FLOAT")])
def test_a_long_file_is_written_whole(ending, subtype, tmp_path):
    """It is written in blocks of 2^20 samples."""
    audio = torch.randint(-2**15, 2**15, (2, 2**20 + 9), generator=seeded()) / 2**15
    path = tmp_path / f"long.{ending}"
    sample.write_track(path, Track(audio, 44100, subtype))
    assert np.array_equal(read(path).T, audio.numpy()) and list(tmp_path.iterdir()) == [path]


# ---- edits from the command line -----------------------------------------------------------------

@pytest.mark.parametrize("model, sampler, splice", [
    ("latent", "ddpm", 30), ("waveform", "ddim", 10)])
@pytest.mark.parametrize("name", ["long", "mono"])
@pytest.mark.parametrize("task", ["infill", "regenerate"])
def test_an_edit_fits_back_into_its_track(folder, task, name, model, sampler, splice):
    """Same length and rate; new inside, and bit for bit the input's own outside the fades."""
    before = read(folder / f"{name}.wav")
    rate = sf.info(folder / f"{name}.wav").samplerate
    after = call(folder, "--task", task, "--input", folder / f"{name}.wav", "--start", 1.5,
                 "--end", "0:01.7", "--sampler", sampler, "--splice", splice, model=model)
    a, b = round(1.5 * rate), round(1.7 * rate) + math.ceil(128 * rate / 44100)    # whole frames
    fade = math.ceil(splice / 1000 * rate)
    assert after.shape == before.shape and np.isfinite(after).all()
    assert sf.info(folder / "out.wav").samplerate == rate
    assert np.array_equal(after[:a - fade], before[:a - fade])
    assert np.array_equal(after[b + fade:], before[b + fade:])
    assert np.isclose(after[a:b], before[a:b]).mean() < 0.05


@pytest.mark.parametrize("model", ["latent", "waveform"])
def test_continuation_has_the_requested_length(folder, model):
    """--start cuts, --length is met to the sample, beyond the window too."""
    before, rate = read(folder / "mono.wav"), 48000
    after = call(folder, "--task", "continuation", "--input", folder / "mono.wav", "--start", 2,
                 "--length", 1.5, model=model)
    untouched = 2 * rate - math.ceil(0.03 * rate)
    assert after.shape == (round(3.5 * rate), 1) and after[2 * rate:].std() > 1e-4
    assert np.array_equal(after[:untouched], before[:untouched])


@pytest.mark.parametrize("model", ["latent", "waveform"])
@pytest.mark.parametrize("task", ["continuation", "infill"])
@pytest.mark.parametrize("name", ["long", "mono"])
def test_the_region_to_be_generated_does_not_leak(folder, model, task, name):
    """Noise in the place of the region changes nothing of the result, bit for bit."""
    flags = ("--start", 1, "--end", 1.3)
    if task == "continuation":
        flags = ("--start", 1, "--length", 0.3)
    audio = read(folder / f"{name}.wav")
    rate = sf.info(folder / f"{name}.wav").samplerate
    made = []
    for noisy in (False, True):
        if noisy:
            last = len(audio) if task == "continuation" else round(1.3 * rate)
            shape = audio[rate:last].shape
            audio[rate:last] = np.random.default_rng(1).uniform(-0.5, 0.5, shape)
        sf.write(folder / "leak.wav", audio, rate)
        # On a GPU, sums can differ from run to run.
        made.append(call(folder, "--task", task, "--input", folder / "leak.wav", *flags,
                         "--device", "cpu", model=model, steps=1))
    assert np.array_equal(*made)


LOOPS = [("long.wav", 44100), ("mono.wav", 48000), ("slow.wav", 22050)]


@pytest.fixture(scope="module")
def slow(folder):
    """A clip at 22.05 kHz, beside those of `folder`."""
    write_music(folder / "slow.wav", 3, 22050, 2)


@pytest.mark.parametrize("name, rate", LOOPS)
@pytest.mark.parametrize("k", [[], ["--k", "0.5"]])
def test_a_loop_is_new_before_its_jump_alone(folder, slow, name, rate, k):
    """All but the last half second and two fades is the stretch's own, bit for bit, and as long."""
    before = read(folder / name)[round(0.5 * rate):round(2.5 * rate)]
    after = call(folder, "--task", "loop", "--input", folder / name, "--start", 0.5, "--end", 2.5,
                 "--fade", 0.5, *k)
    assert after.shape == before.shape
    changed = np.flatnonzero((after != before).any(1)) / rate
    head, tail = changed[changed < 1], changed[changed > 1]
    assert head.max() < 0.031 and tail.min() > 2 - 0.5 - 0.031 - 0.003
    assert tail.max() > 1.99 and len(tail) > 0.4 * rate


@pytest.mark.parametrize("name, rate", LOOPS)
def test_a_loop_does_not_read_what_it_replaces(folder, slow, name, rate):
    """Scrambled, the last half second gives the same loop."""
    audio = read(folder / name)[:2 * rate]
    loops = []
    for i in range(2):
        part = audio[-rate // 2 + 300:]
        part[:] = np.random.default_rng(i).uniform(-0.5, 0.5, part.shape)
        sf.write(folder / "stretch.wav", audio, rate, subtype="DOUBLE")
        loops.append(call(folder, "--task", "loop", "--input", folder / "stretch.wav",
                          "--fade", 0.5))
    assert np.array_equal(*loops)


def test_a_loop_goes_on_where_it_begins(folder):
    """With a model that knows the music, the jump of a loop is no larger than its other steps."""
    t = np.arange(2 * 44100) / 44100
    period = np.sin(2 * np.pi * 441 * t)                        # 100 samples
    stretch = 0.3 * np.stack([period, period], 1)[:88_150]      # ends in the middle of a period
    sf.write(folder / "tone.wav", stretch, 44100, subtype="FLOAT")
    after = call(folder, "--task", "loop", "--input", folder / "tone.wav", "--fade", 0.5)
    steps = np.abs(np.diff(np.concatenate([after, after[:1]]), axis=0)).max(1)
    assert steps[-1] <= steps[:-1].max()


def test_a_stretch_that_is_too_short_for_its_fade_is_refused(folder, capsys):
    """In one sentence."""
    with pytest.raises(UserError, match="longer than --fade by 0.25 s"):
        call(folder, "--task", "loop", "--input", folder / "long.wav", "--end", 0.6, "--fade", 0.5)


@pytest.mark.parametrize("name, rate", LOOPS)
@pytest.mark.parametrize("length", [0.4, 1.9])
def test_an_intro_leads_into_the_track(folder, slow, name, rate, length):
    """In one pass or several; the track follows, bit for bit after its first 30 ms."""
    before = read(folder / name)
    after = call(folder, "--task", "intro", "--input", folder / name, "--length", length)
    n = len(after) - len(before)
    assert length * rate <= n <= length * rate + 140
    assert np.array_equal(after[n + math.ceil(0.031 * rate):], before[math.ceil(0.031 * rate):])
    assert np.abs(after[:n]).max(0).min() > 0


@pytest.mark.parametrize("model", ["latent", toy()], ids=["latent", "toy"])
def test_transition_joins_two_tracks(folder, model):
    """Both keep their own samples outside the fade."""
    one, other = read(folder / "long.wav"), read(folder / "other.wav")
    after = call(folder, "--task", "transition", "--input", folder / "long.wav",
                 "--input2", folder / "other.wav", "--fade", 0.2, model=model)
    fade, cross = round(0.2 * 44100), math.ceil(0.03 * 44100) + 128
    assert len(after) == len(one) + len(other) - fade
    assert np.array_equal(after[:len(one) - fade - cross], one[:-fade - cross])
    assert np.array_equal(after[len(one) + cross:], other[fade + cross:])


def test_little_noise_leaves_what_stood_there(folder):
    """--task reaches the row of its name: by --k 0.01 the track stays, and an infill is new."""
    track = read(folder / "long.wav")
    region = ("--input", folder / "long.wav", "--start", 1, "--end", 1.2, "--no-equalise")
    light = call(folder, "--task", "regenerate", *region, "--k", 0.01, model=toy(), steps=1)
    new = call(folder, "--task", "infill", *region, model=toy(), steps=1)
    inside = slice(44100, round(1.2 * 44100))
    assert (light - track)[inside].std() < 0.1 * track[inside].std()
    assert (new - track)[inside].std() > track[inside].std()


def test_variations_and_seeds(folder):
    """The same seed makes the same file; --num 2 begins with that of --num 1; others differ."""
    edit = ["--task", "infill", "--input", folder / "long.wav", "--start", 1, "--end", 1.2]
    once = call(folder, *edit, "--seed", 7, steps=1)
    again = call(folder, *edit, "--seed", 7, "--num", 2, steps=1)
    second = read(folder / "out-2.wav")
    eighth = call(folder, *edit, "--seed", 8, out="eight.wav", steps=1)
    assert np.array_equal(once, again)
    assert not np.array_equal(once, second) and not np.array_equal(once, eighth)
    assert not np.array_equal(second, eighth)           # seed 8 is not the next variation of seed 7

    # The .json has the settings, and the command that makes the same file again.
    stored = json.loads((folder / "out-2.json").read_text())
    before = (folder / "out-2.wav").read_bytes()
    assert stored["variation"] == 1 and stored["settings"]["xi"] == sample.XI["latent"]
    program, script, *arguments = shlex.split(stored["command"])
    assert [program, script] == ["python", "sample.py"]
    (folder / "out-2.wav").unlink()
    sample.main(arguments)
    assert (folder / "out-2.wav").read_bytes() == before


@pytest.mark.parametrize("model", ["latent", "waveform"])
@pytest.mark.parametrize("task", [
    ("continuation", "--start", 2, "--length", 0.4), ("regenerate", "--start", 1, "--end", 1.2),
    ("infill", "--start", 1, "--end", 1.2, "--context", 0.2, "--reference", "other.wav",
     "--classes", "a=1")],
    ids=lambda task: task[0])
def test_a_variation_is_the_same_alone_or_among_others(folder, model, task, monkeypatch):
    """Three variations, one by one, and in batches of 2 and 1: equal but for rounding."""
    arguments = [folder / word if word == "other.wav" else word for word in task]
    arguments = ["--task", *arguments, "--input", folder / "long.wav", "--num", 3]
    names = ["out.wav", "out-2.wav", "out-3.wav"]
    call(folder, *arguments, model=model)
    alone = [read(folder / name) for name in names]
    batches, make = [], sample.generate

    def count(checkpoint, name, x_bar, *more, **options):
        batches.append(len(x_bar))
        return make(checkpoint, name, x_bar, *more, **options)

    monkeypatch.setattr(sample, "generate", count)
    monkeypatch.setitem(sample.AT_ONCE, "cpu", 2)
    call(folder, *arguments, model=model)
    assert batches == [2, 1]
    for name, expected in zip(names, alone):
        np.testing.assert_allclose(read(folder / name), expected, atol=2e-4)


def test_the_context_is_encoded_once_for_all_variations(folder, monkeypatch):
    encoded, encode = [], VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda net, x: encoded.append(len(x)) or encode(net, x))
    infill = ("--task", "infill", "--input", folder / "long.wav", "--start", 1, "--end", 1.2)
    call(folder, *infill, "--num", 4)
    assert encoded == [1, 1]                                    # the left context, and the right


def test_a_batch_is_halved_until_it_fits(folder, monkeypatch):
    """Where memory holds three clips, 8, 4, then 2 at a time. Not even one: the error stays."""
    make, tried = sample.generate, []

    def generate(checkpoint, name, x_bar, *more, **options):
        tried.append(len(x_bar))
        if len(x_bar) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(checkpoint, name, x_bar, *more, **options)

    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setitem(sample.AT_ONCE, "cpu", 8)
    infill = ("--task", "infill", "--input", folder / "long.wav", "--start", 1, "--end", 1.2)
    room = 3
    call(folder, *infill, "--num", 9, out="many.wav", steps=1)
    assert tried == [8, 4, 2, 2, 2, 2, 1] and (folder / "many-9.wav").exists()
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        call(folder, *infill, steps=1)


def test_an_example_brings_its_own_flags_and_model(folder, capsys):
    """The door: add_flags adds to Settings' own, open_model gets what was given."""
    got = []

    def add_flags(add):
        Settings.add_flags(add)
        add("--colour")

    def open_model(options, device):
        got.append((options.colour, device.type))
        return toy()
    sample.main(["--task", "continuation", "--input", str(folder / "long.wav"), "--length", "0.3",
                 "--steps", "1", "--force", "--output", str(folder / "out.wav"), "--device", "cpu",
                 "--colour", "red"], add_flags, open_model)
    assert got == [("red", "cpu")] and len(read(folder / "out.wav")) == round(3.3 * 44100)
    assert "trained for" not in capsys.readouterr().out                 # its steps are unknown


def test_half_precision_works(folder):
    """--precision bf16 changes a result only slightly."""
    edit = ["--task", "infill", "--input", folder / "long.wav", "--start", 1, "--end", 1.2]
    plain, half = call(folder, *edit), call(folder, *edit, "--precision", "bf16")
    assert 0 < np.abs(plain - half).max() < 0.05 * np.abs(plain).max()


def test_unspliced_output_is_the_models_own(folder):
    """--splice 0 writes decode(x_0) over the whole window, contexts included."""
    edit = ["--task", "infill", "--input", folder / "long.wav", "--start", 1.5, "--end", 1.7]
    spliced, raw = call(folder, *edit), call(folder, *edit, "--splice", 0)
    region = slice(round(1.5 * 44100), round(1.7 * 44100))
    assert spliced.shape == raw.shape and np.allclose(spliced[region], raw[region], atol=1e-6)
    assert not np.allclose(spliced[64000:66000], raw[64000:66000], atol=1e-3)


def loud():
    """A model that makes a tone of twice full scale, whatever it is given."""
    return toy(decode=lambda x: 2 * torch.sin(torch.arange(x.shape[-1]) / 20).expand(1, 2, -1))


@pytest.mark.parametrize("name, subtype, top", [
    ("long", "PCM_16", 1), ("long", "FLOAT", 1), ("peak", "FLOAT", 1.5)])
def test_new_audio_above_full_scale_is_turned_down(folder, capsys, name, subtype, top):
    """All of it by one gain if all is loud; in a float track to its own peaks; no clipping."""
    before = read(folder / "long.wav")
    peak = np.concatenate([before, [[1.5, 0]]])
    sf.write(folder / "peak.wav", peak, 44100, subtype="FLOAT")
    after = call(folder, "--task", "infill", "--input", folder / f"{name}.wav", "--start", 1,
                 "--end", 2, "--context", 0.2, "--no-equalise", "--subtype", subtype, model=loud())
    assert f"turned down, by {20 * math.log10(2 / top):.1f} dB" in capsys.readouterr().out
    assert sf.info(folder / "out.wav").subtype == subtype
    assert np.abs(np.abs(after[44100:88200]).max() - top) < 1e-3
    peaks = np.abs(after[44100:88200, 0])
    ends = (peaks[1:-1] > peaks[:-2]) & (peaks[1:-1] > peaks[2:])
    assert np.abs(peaks[1:-1][ends] - top).max() < 0.01 * top           # every wave as high
    assert np.allclose(after[:44100 - 1400], before[:44100 - 1400], atol=1e-7)
    assert np.allclose(after[88200 + 1600:132000], before[88200 + 1600:132000], atol=1e-7)


def test_peaks_of_what_is_replaced_do_not_count(folder):
    """Two loud tracks, whose cross-fade passes full scale, keep their word length."""
    for name in ("loud", "louder"):
        sf.write(folder / f"{name}.wav", np.full((44100, 2), 0.99), 44100)
    after = call(folder, "--task", "transition", "--input", folder / "loud.wav",
                 "--input2", folder / "louder.wav", "--fade", 0.2, model=toy())
    assert sf.info(folder / "out.wav").subtype == "PCM_16" and np.abs(after).max() <= 1


def test_little_context_is_said_and_none_refused(folder, capsys):
    """130 samples hold a frame, so the music goes on; 100 do not."""
    for n in (130, 100):
        sf.write(folder / f"n{n}.wav", np.random.default_rng(0).uniform(-0.1, 0.1, (n, 2)), 44100)
    after = call(folder, "--task", "continuation", "--input", folder / "n130.wav",
                 "--length", 0.2, model=toy())
    assert len(after) == 130 + 8820 and "context 0.00 s before" in capsys.readouterr().out
    with pytest.raises(UserError, match="--input has less than one frame"):
        call(folder, "--task", "continuation", "--input", folder / "n100.wav", "--length", 0.2,
             model=toy())


@pytest.mark.parametrize("flags", [["continuation"], ["infill", "--start", 0.2, "--end", 0.3]])
@pytest.mark.parametrize("name, audio", [
    ("short", 0.1 * np.random.default_rng(0).standard_normal((22050, 2))),
    ("silent", np.zeros((44100, 2)))])
def test_silence_and_short_clips_work(folder, name, audio, flags, capsys):
    """Half a second of sound, and digital silence, can be continued and filled."""
    sf.write(folder / f"{name}.wav", audio, 44100)
    after = call(folder, "--task", *flags, "--input", folder / f"{name}.wav", steps=1)
    assert np.isfinite(after).all() and len(after) >= len(audio)
    assert ("all of the context is silent" in capsys.readouterr().out) == (not np.any(audio))


# ---- formats -------------------------------------------------------------------------------------

ENDINGS = {"WAV": "wav", "WAVEX": "wav", "RF64": "wav", "W64": "w64", "AIFF": "aiff", "AU": "au",
           "CAF": "caf", "FLAC": "flac", "OGG": "ogg", "MP3": "mp3"}
FORMATS = []
for kind in ENDINGS:
    for subtype in sf.available_subtypes(kind):
        if not subtype.startswith("DWVW"):              # soundfile cannot read what it wrote
            FORMATS.append((kind, subtype))
RATES = (44100, 48000, 22050, 96000, 11025, 8000)


def write_as(path, kind, subtype, turn):
    """Write 1.2 s of music; of the rates and channels, the first that this format has.

    turn    with which of them to begin, so that different formats take different ones
    """
    choices = [(rate, channels) for rate in RATES for channels in (2, 1)]
    for rate, channels in choices[turn:] + choices[:turn]:
        try:
            write_music(path, 1.2, rate, channels, format=kind, subtype=subtype)
            return round(1.2 * rate)
        except (sf.LibsndfileError, ValueError):
            continue
    pytest.skip(f"this libsndfile writes no {kind} of {subtype}")


@pytest.mark.parametrize("name, data", [
    ("junk.mp3", lambda mp3: np.random.default_rng(0).bytes(100_000) + mp3),
    ("joined.mp3", lambda mp3: mp3 + mp3),
    ("n\udce4me.mp3", lambda mp3: mp3),
])
def test_files_as_people_have_them_are_edited(folder, tmp_path, name, data):
    """From file to result and page: junk before it, joined, a name that is not UTF-8."""
    write_music(tmp_path / "x.mp3", 2, 44100, 2)
    source = tmp_path / name
    source.write_bytes(data((tmp_path / "x.mp3").read_bytes()))
    (tmp_path / "x.mp3").unlink()
    n = sample.read_audio(source)[0].shape[1]
    sample.main(["--task", "infill", "--input", str(source), "--start", "1", "--end", "1.3",
                 "--steps", "2", "--page", "--checkpoint", str(folder / "latent.pt")])
    made = source.with_suffix(".infill.wav")
    with sample.open_audio(made) as file:
        assert file.frames == n and n >= 2 * 44100
    assert made.with_suffix(".html").exists() and made.with_suffix(".json").exists()


@pytest.mark.parametrize("kind, subtype", [
    pytest.param(*format) for format in FORMATS])
def test_every_format_keeps_its_samples_outside_the_region(folder, kind, subtype):
    """Bit for bit what libsndfile reads, in full length, whatever it was written as."""
    path = folder / f"{kind}.{ENDINGS[kind]}"
    n = write_as(path, kind, subtype, FORMATS.index((kind, subtype)) % 12)
    before, info = read(path), sf.info(path)
    after = call(folder, "--task", "infill", "--input", path, "--start", 0.5, "--end", 0.7,
                 model=toy())
    rate = info.samplerate
    fade = round(sample.SPLICE * rate)
    a = round(0.5 * rate) - fade
    b = round(0.7 * rate) + math.ceil(128 * rate / 44100) + fade
    assert after.shape == before.shape and len(after) >= n
    assert sf.info(folder / "out.wav").samplerate == rate
    assert np.array_equal(after[:a], before[:a]) and np.array_equal(after[b:], before[b:])
    assert not np.allclose(after[a:b], before[a:b], atol=1e-3)


@pytest.mark.parametrize("ending, subtype", [
    ("wav", "PCM_U8"), ("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "PCM_32"), ("wav", "FLOAT"),
    ("wav", "DOUBLE"), ("flac", "PCM_16"), ("flac", "PCM_24")])
def test_a_word_length_comes_back(folder, subtype, ending):
    """With the same values outside the edit, full scale included."""
    source = folder / f"deep.{ending}"
    audio = np.random.default_rng(0).uniform(-1, 1, (44100, 2))
    audio[0] = -1
    sf.write(source, audio, 44100, subtype=subtype)
    before = read(source)
    after = call(folder, "--task", "infill", "--input", source, "--start", 0.5, "--end", 0.6,
                 out=f"out.{ending}", model=toy())
    assert sf.info(folder / f"out.{ending}").subtype == subtype
    assert np.array_equal(after[:20000], before[:20000])
    assert np.array_equal(after[30000:], before[30000:])


@pytest.mark.skipif(not ODD.exists(), reason="the collection of odd files is not there")
@pytest.mark.parametrize("task", ["continuation", "infill"])
def test_odd_files_work_or_end_with_a_sentence(folder, task):
    """mp3, ogg, flac, 24-bit, float, mono, other rates, half a second, leading silence."""
    for path in sorted(ODD.iterdir()):
        try:
            after = call(folder, "--task", task, "--input", path, model=toy(), steps=1)
            assert np.isfinite(after).all() and after.shape[1] == sf.info(path).channels
        except UserError as error:
            assert path.name in str(error) and "0s5" in path.name


# ---- bad input -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bad(folder):
    """Files in the folder that cannot be used, and two that must not be overwritten."""
    (folder / "text.wav").write_text("not audio")
    sf.write(folder / "silence.wav", np.zeros((44100, 2)), 44100)
    sf.write(folder / "broken.wav", np.full((44100, 2), np.nan), 44100, subtype="FLOAT")
    sf.write(folder / "over.wav", np.linspace(-1, 1.1, 2**17), 44100, subtype="FLOAT")
    sf.write(folder / "three.wav", np.zeros((44100, 3)), 44100)
    (folder / "cut.pt").write_bytes((folder / "latent.pt").read_bytes()[:5000])
    torch.save({"format": 1, "kind": "latent", "trick": Path("x")}, folder / "pickled.pt")
    (folder / "there.wav").write_text("mine")
    (folder / "away.wav").unlink(missing_ok=True)
    (folder / "away.wav").symlink_to("/not/mounted/away.wav")
    (folder / "folder.wav").mkdir(exist_ok=True)
    (folder / "session.json").write_text("mine")
    (folder / "session.wav").unlink(missing_ok=True)
    return folder


EDIT = ("--task infill --input {folder}/long.wav --checkpoint {folder}/latent.pt --steps 1 "
        "--output {tmp}/no.wav ")
CLASSIFIER = " --classifier {folder}/classifier.pt"
BAD = [
    # what the error must name, and the command
    ("--task", "--input {folder}/long.wav"),
    ("unknown", "--task unknown"),
    ("--replay", EDIT + "--replay none.json"),
    # files that cannot be read
    ("--input", "--task infill"),
    ("--input2", "--task transition --input {folder}/long.wav"),
    ("missing.wav", EDIT + "--input missing.wav"),
    ("nowhere/clip.wav is no file", "--task infill --input {folder}/nowhere/clip.wav"),
    ("is no file", EDIT + "--input {folder}"),
    ("text.wav", EDIT + "--input {folder}/text.wav"),
    ("three.wav has 3 channels", EDIT + "--input {folder}/three.wav"),
    ("broken.wav holds samples that are not finite", EDIT + "--input {folder}/broken.wav"),
    ("silence.wav is silent", EDIT + "--reference {folder}/silence.wav" + CLASSIFIER),
    ("broken.wav is silent", EDIT + "--reference {folder}/broken.wav" + CLASSIFIER),
    ("a latent model", EDIT + "--model waveform"),
    ("cut.pt", EDIT + "--checkpoint {folder}/cut.pt"),
    ("pickled.pt", EDIT + "--checkpoint {folder}/pickled.pt"),
    ("no.pt does not exist", EDIT + "--checkpoint {folder}/no.pt"),
    # numbers out of range
    ("lasts 0:03.000: --start 0:09.000", EDIT + "--start 9 --end 10"),
    ("must be a part of it", EDIT + "--start 2 --end 1"),
    ("must be a part of it", EDIT + "--start 0 --end 3"),
    ("--start 0:09.000 leaves nothing", EDIT + "--task continuation --start 9"),
    ("--start", EDIT + "--start x"),
    ("1:60 is no time", EDIT + "--start 1:60"),
    ("9 is no time", EDIT + "--end " + 400 * "9"),
    ("9:01 is no time", EDIT + f"--start {400 * '9'}:01"),
    ("--length", "--task unconditional --length 0.00001"),
    ("--length", "--task unconditional --length inf"),
    ("--length", "--task unconditional --length nan"),
    ("--context", EDIT + "--context 0"),
    ("--fade 9 s", EDIT + "--task transition --input2 {folder}/other.wav --fade 9"),
    ("--k", EDIT + "--task regenerate --k 2"),
    ("--steps", EDIT + "--steps 0"),
    ("--weights", EDIT + "--weights embedding=nan"),
    ("--device tpu cannot be used", EDIT + "--device tpu"),
    ("--device meta cannot be used", EDIT + "--device meta"),
    # guides
    ("--xi 0 turns off all guidance", EDIT + "--xi 0 --reference {folder}/other.wav"),
    ("zither", EDIT + "--classes zither=1" + CLASSIFIER),
    ("--classes a=2", EDIT + "--classes a=2" + CLASSIFIER),
    ("name=1,other=0", EDIT + "--classes a"),
    ("a name twice", EDIT + "--classes a=1,a=0"),
    # outputs
    (".mp3 must end in", EDIT + "--output {tmp}/a.mp3"),
    ("a.flac must end in .wav", EDIT + "--subtype FLOAT --output {tmp}/a.flac"),
    ("over.wav has peaks above full scale", EDIT + "--input {folder}/over.wav --subtype PCM_16"),
    ("there.wav exists", EDIT + "--output {folder}/there.wav"),
    ("away.wav exists", EDIT + "--output {folder}/away.wav"),
    ("folder.wav is a folder", EDIT + "--output {folder}/folder.wav --force"),
    ("session.json exists", EDIT + "--output {folder}/session.wav"),
    ("also what is read", EDIT + "--output {folder}/long.wav --force"),
    ("also what is read",
     EDIT + "--reference {folder}/other.wav --output {folder}/other.wav --force" + CLASSIFIER),
    ("long.wav/deep.wav cannot be written", EDIT + "--output {folder}/long.wav/deep.wav --force"),
    # what would do nothing
    ("--length", EDIT + "--length 2"),
    ("--input does nothing", "--task unconditional --input {folder}/long.wav"),
    ("--k does nothing", "--task unconditional --k 0.5"),
    ("--fade does nothing", EDIT + "--fade 1"),
    ("--xi does nothing", "--task unconditional --xi 0.1"),
    ("--splice does nothing", "--task unconditional --splice 9"),
    ("--trials does nothing with --task infill", EDIT + "--trials 4 --classes a=1"),
    ("--trials does nothing without", "--task unconditional --trials 4"),
    ("--classifier does nothing", EDIT + "--classifier x.pt"),
    ("--weights embedding does nothing", EDIT + "--weights embedding=3"),
    ("--weights classifier does nothing",
     EDIT + "--reference {folder}/other.wav --weights classifier=3"),
    ("embeding", EDIT + "--reference {folder}/other.wav --weights embeding=3"),
    ("--weights embedding=0 must be above 0",
     EDIT + "--reference {folder}/other.wav --weights embedding=0"),
    ("--equalise does nothing", EDIT + "--classes a=1 --no-equalise"),
    ("--equalise does nothing", "--task unconditional --no-equalise"),
]


@pytest.mark.parametrize("culprit, command", BAD)
def test_bad_input_ends_in_one_sentence_and_status_2(bad, tmp_path, capsys, culprit, command):
    """No traceback, no file written, the culprit named."""
    arguments = command.format(folder=bad, tmp=tmp_path).split()
    with pytest.raises(SystemExit) as end:
        sample.run(lambda: sample.main(arguments))
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and culprit in said
    assert "\n" not in said and "Traceback" not in said
    assert (bad / "there.wav").read_text() == (bad / "session.json").read_text() == "mine"
    assert not list(tmp_path.iterdir())
    assert not (bad / "session.wav").exists() and not (bad / "nowhere").exists()
    assert (bad / "away.wav").is_symlink()


@pytest.mark.parametrize("flag", ["--input", "--reference", "--output", "--checkpoint", "--weak"])
def test_an_empty_name_of_a_file_is_refused(folder, flag):
    """As of a variable of the shell that is not set: it is not as if the flag were not there."""
    given = ["--task", "infill", "--input", str(folder / "long.wav"), flag, ""]
    with pytest.raises(sample.UserError, match=f"{flag} is empty: give a file"):
        sample.main(given)


def test_a_model_is_not_overwritten(folder, tmp_path):
    """Nor by the .json of a result."""
    (tmp_path / "m.json").write_bytes((folder / "latent.pt").read_bytes())
    with pytest.raises(sample.UserError, match="m.json is also what is read"):
        sample.main(["--task", "infill", "--input", str(folder / "long.wav"), "--force",
                     "--checkpoint", f"{tmp_path}/m.json", "--output", f"{tmp_path}/m.wav"])


def test_a_file_without_a_header_is_refused(tmp_path):
    """soundfile cannot know what is in a .raw."""
    (tmp_path / "song.raw").write_bytes(bytes(4000))
    with pytest.raises(sample.UserError, match="song.raw cannot be read"):
        sample.read_audio(tmp_path / "song.raw")
    assert isinstance(sample.probe(tmp_path / "song.raw"), str)


@pytest.mark.parametrize("ending", [".wav", ".json", ".html"])
def test_what_came_while_the_model_worked_is_not_overwritten(folder, ending, monkeypatch):
    """Two runs may have one output: what the first has written stays."""
    path = folder / f"meanwhile{ending}"
    fill = sample.fill

    def slow(*args, **kwargs):
        path.write_text("another's")
        return fill(*args, **kwargs)

    monkeypatch.setattr(sample, "fill", slow)
    with pytest.raises(UserError, match=f"meanwhile{ending} exists"):
        sample.main(["--task", "infill", "--input", str(folder / "long.wav"), "--steps", "1",
                     "--checkpoint", str(folder / "latent.pt"), "--page",
                     "--output", str(folder / "meanwhile.wav")])
    assert path.read_text() == "another's"
    for other in folder.glob("meanwhile*"):
        other.unlink()


def test_music_that_is_not_finite_is_not_written(folder, tmp_path):
    """A damaged model: a sentence with its name, and no file."""
    state = torch.load(folder / "latent.pt", weights_only=True)
    state["ema"] = {name: weight * torch.nan for name, weight in state["ema"].items()}
    torch.save(state, folder / "lost.pt")
    with pytest.raises(UserError, match="lost.pt made samples that are not finite"):
        sample.main(["--task", "unconditional", "--steps", "1", "--output",
                     str(tmp_path / "out.wav"), "--checkpoint", str(folder / "lost.pt")])
    assert not list(tmp_path.iterdir())


# ---- the shipped models --------------------------------------------------------------------------

@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_checkpoints_load_and_work(path, folder):
    """Weights only; the diffusion models generate, the classifier tells classes apart."""
    checkpoint = load_checkpoint(path)
    if checkpoint.kind == "classifier":
        logits, _ = checkpoint.net.listen(torch.zeros(1, 2, 44100), 44100)
        assert logits.shape == (1, len(checkpoint.classes)) and logits.isfinite().all()
        return
    sample.main(["--task", "infill", "--model", checkpoint.kind, "--checkpoint", str(path),
                 "--steps", "1", "--start", "1", "--end", "1.2", "--force",
                 "--input", str(folder / "long.wav"), "--output", str(folder / "out.wav")])
    assert np.isfinite(read(folder / "out.wav")).all()


# 64 samples, left and right in turn, spread over what two steps of the README's first command make.
FIRST_COMMAND = [
    -0.0608, 0.0205, -0.0219, 0.0907, -0.0674, -0.019, -0.4186, -0.3378, 0.0735, 0.0019,
    -0.0485, -0.0981, 0.0668, -0.0629, 0.046, -0.0027, -0.0046, -0.0063, -0.1161, 0.1411,
    0.0955, 0.0111, 0.1834, 0.0839, -0.0273, -0.0063, 0.0012, -0.0881, 0.0208, 0.1181, -0.0514,
    0.0813, 0.0395, -0.0778, -0.084, -0.1109, -0.0894, -0.1031, -0.0436, -0.013, 0.1062,
    0.0146, 0.06, 0.0208, 0.0186, 0.0278, 0.2376, -0.0352, 0.0378, 0.0423, 0.0676, -0.0594,
    -0.0273, -0.1525, 0.0527, -0.0197, -0.1259, -0.05, -0.0706, 0.0876, -0.0356, -0.1364,
    -0.0235, -0.024
]


def test_the_first_command_sounds_as_it_did(tmp_path):
    """Two steps of it, on a CPU: nothing that can be heard changes unnoticed."""
    sample.main(["--task", "continuation", "--input", str(ROOT / "examples" / "clip.wav"),
                 "--steps", "2", "--device", "cpu", "--output", str(tmp_path / "out.wav")])
    new = read(tmp_path / "out.wav")[len(read(ROOT / "examples" / "clip.wav")):]
    at = np.linspace(100, len(new) - 100, 64).astype(int)
    got = new[at, np.arange(64) % 2]
    assert np.abs(got - FIRST_COMMAND).max() < 1e-3
