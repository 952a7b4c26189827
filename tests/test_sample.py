"""sample.py end to end, with tiny untrained networks: lengths, borders, leaks, seeds, formats, and what goes wrong."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch

import sample
import tasks
from conftest import save_checkpoint
from dit import PRESETS as DIT, DiT
from train import load_checkpoint, run
from unet1d import PRESETS as UNET, UNet1D
from vae import PRESETS as VAES, VAE

ODD = Path(__file__).resolve().parents[2] / "shared" / "music" / "odd"


def wake(net, seed=0):
    """Zero-initialised layers get small weights, so that an untrained network does something."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=0.02, generator=g)
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tiny checkpoints of the three kinds and three clips: long (3 s), other (2 s), mono at 48 kHz."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sample")
    vae = VAE(VAES["tiny"])
    vae.latent_std.fill_(0.3)
    unet = wake(UNet1D(UNET["tiny"]))
    unet.scale.fill_(0.15)
    save_checkpoint(folder / "latent.pt", "latent", wake(DiT(DIT["tiny"])), vae)
    save_checkpoint(folder / "waveform.pt", "waveform", unet)
    save_checkpoint(folder / "classifier.pt", "classifier", tasks.PaSST(tasks.PASST_PRESETS["tiny"]),
                    classes=list("abcdefghi"))
    rng = np.random.default_rng(0)
    for name, seconds, rate, channels in (("long", 3, 44100, 2), ("other", 2, 44100, 2), ("mono", 3, 48000, 1)):
        t = np.arange(seconds * rate)[:, None] / rate
        chord = sum(np.sin(2 * np.pi * f * t + np.arange(channels)) for f in (220, 277.2, 329.6, 1760))
        sf.write(folder / f"{name}.wav", 0.1 * chord * (1 + np.sin(4 * np.pi * t)) + 0.01 * rng.standard_normal(chord.shape), rate)
    return folder


def call(folder, *arguments, model="latent", out="out.wav", steps=2):
    """Run sample.py and return the written audio (n, channels)."""
    arguments = [str(a) for a in arguments]
    sample.main(["--model", model, "--checkpoint", str(folder / f"{model}.pt"), "--listener", str(folder / "classifier.pt"),
                 "--steps", str(steps), "--output", str(folder / out), "--force", *arguments])
    return sf.read(folder / out, always_2d=True)[0]


def largest_step(audio, around, reach, rate):
    first, last = max(0, around - int(reach * rate)), around + int(reach * rate)
    return np.abs(np.diff(audio[first:last], axis=0)).max()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("model", ["latent", "waveform"])
@pytest.mark.parametrize("name", ["long", "mono"])
@pytest.mark.parametrize("task", ["infill", "regenerate"])
def test_an_edit_fits_back_into_its_track(folder, task, name, model, sampler):
    """Same length and rate, finite, new inside, bit-identical outside region and cross-fades, no click at the borders."""
    before, rate = sf.read(folder / f"{name}.wav", always_2d=True)
    after = call(folder, "--task", task, "--input", folder / f"{name}.wav", "--start", 1.5, "--end", "0:01.7",
                 "--sampler", sampler, model=model)
    a, b, fade = round(1.5 * rate), round(1.7 * rate), math.ceil(0.03 * rate)
    assert after.shape == before.shape and np.isfinite(after).all() and sf.info(folder / "out.wav").samplerate == rate
    assert np.array_equal(after[:a - fade], before[:a - fade]) and np.array_equal(after[b + fade:], before[b + fade:])
    assert np.isclose(after[a:b], before[a:b]).mean() < 0.05
    for border in (a, b):
        assert largest_step(after, border, 0.005, rate) <= 1.5 * largest_step(after, border, 0.1, rate) + 1e-3


@pytest.mark.parametrize("model", ["latent", "waveform"])
def test_continuation_has_the_requested_length(folder, model):
    """--start cuts, --length is met to the sample, beyond the window too; what came before is the input's own."""
    before, rate = sf.read(folder / "mono.wav", always_2d=True)
    after = call(folder, "--task", "continuation", "--input", folder / "mono.wav", "--start", 2, "--length", 1.5, model=model)
    kept = 2 * rate - math.ceil(0.03 * rate)
    assert after.shape == (round(3.5 * rate), 1) and np.array_equal(after[:kept], before[:kept])
    assert after[2 * rate:].std() > 1e-4


@pytest.mark.parametrize("model", ["latent", "waveform"])
@pytest.mark.parametrize("flags", [["continuation", "--start", "1.0", "--length", "0.3"], ["infill", "--start", "1", "--end", "1.3"]])
@pytest.mark.parametrize("name", ["long", "mono"])
def test_the_region_to_be_generated_does_not_leak(folder, model, flags, name):
    """Noise or silence in the place of the region changes nothing of the result, bit for bit."""
    audio, rate = sf.read(folder / f"{name}.wav", always_2d=True)
    outs = []
    for i, fill in enumerate((None, 0.0, 1.0)):
        if fill is not None:
            last = len(audio) if flags[0] == "continuation" else round(1.3 * rate)
            audio[rate:last] = fill * 0.5 * np.random.default_rng(1).standard_normal((last - rate, audio.shape[1])).clip(-1, 1)
        sf.write(folder / "leak.wav", audio, rate)
        outs.append(call(folder, "--task", *flags, "--input", folder / "leak.wav", model=model))
    assert np.array_equal(outs[0], outs[1]) and np.array_equal(outs[0], outs[2])


def test_transition_joins_two_tracks(folder):
    """The end of the first goes over to the start of the second; both keep their own samples outside the fade."""
    one, other = (sf.read(folder / f"{name}.wav", always_2d=True)[0] for name in ("long", "other"))
    after = call(folder, "--task", "transition", "--input", folder / "long.wav", "--input2", folder / "other.wav", "--fade", 0.2)
    fade, cross = round(0.2 * 44100), math.ceil(0.03 * 44100)
    assert len(after) == len(one) + len(other) - fade
    assert np.array_equal(after[:len(one) - fade - cross], one[:-fade - cross])
    assert np.array_equal(after[len(one) + cross:], other[fade + cross:])


def test_regions_longer_than_the_window_are_filled_without_a_seam(folder):
    """Windows follow each other; inside there is no step that stands out."""
    for task in ("infill", "regenerate"):
        after = call(folder, "--task", task, "--input", folder / "long.wav", "--start", 0.5, "--end", 2.5)
        middle = after[round(0.6 * 44100):round(2.4 * 44100)]
        steps = np.abs(np.diff(middle, axis=0)).max(axis=1)
        assert middle.std() > 1e-4 and steps.max() <= 3 * np.quantile(steps, 0.999) + 1e-3


def test_windows_cover_the_gap_in_order():
    """Each window starts where enough is known, the last hears the right context, and none is longer than the window."""
    for C_L, gap, C_R, overlap in ((10, 20, 10, 16), (16, 300, 16, 16), (0, 200, 0, 16), (27, 500, 0, 27), (3, 100, 32, 32)):
        done = C_L
        spans = sample.windows(C_L, gap, C_R, 64, overlap)
        for first, last in spans:
            end = last - C_R if last == C_L + gap + C_R else last
            assert last - first <= 64 and first <= max(0, done - min(overlap, 16)) and end > done
            done = end
        assert done == C_L + gap


def test_xi_is_scaled_to_the_number_of_steps(folder):
    """xi is meant for --xi-ref-steps steps, 50 by default: meant for twice as many, it is twice as large in each."""
    infill = ("--task", "infill", "--input", folder / "long.wav", "--start", 1.4, "--end", 1.6)
    plain = call(folder, *infill, "--xi", 0.1)
    assert np.array_equal(plain, call(folder, *infill, "--xi", 0.05, "--xi-ref-steps", 100))
    assert not np.array_equal(plain, call(folder, *infill, "--xi", 0.1, "--xi-ref-steps", 100))


def test_xi_is_the_step_towards_the_context_alone(folder):
    """Guidance by example has its own step: --xi changes nothing where no context is given, and 0 does not end it."""
    styled = ("--task", "embedding", "--reference", folder / "other.wav", "--length", 0.3)
    assert np.array_equal(call(folder, *styled), call(folder, *styled, "--xi", 3))
    infill = ("--task", "infill", "--input", folder / "long.wav", "--start", 1, "--end", 1.2, "--xi", 0)
    assert not np.array_equal(call(folder, *infill), call(folder, *infill, "--reference", folder / "other.wav"))


def test_guidance_by_example_and_by_class(folder):
    """Both kinds of guidance run alone and beside a reconstruction, and change the result."""
    free = call(folder, "--task", "unconditional", "--length", 0.3)
    styled = call(folder, "--task", "embedding", "--reference", folder / "other.wav", "--length", 0.3, "--weights", "embedding=50")
    classed = call(folder, "--task", "classifier", "--classes", "a=1,c=0", "--length", 0.3, "--weights", "classifier=50")
    assert free.shape == styled.shape == classed.shape == (round(0.3 * 44100), 2)
    assert not np.allclose(free, styled) and not np.allclose(free, classed)
    edit = ["--task", "infill", "--input", folder / "long.wav", "--start", 1, "--end", 1.2]
    plain = call(folder, *edit)
    both = call(folder, *edit, "--classes", "a=1", "--reference", folder / "other.wav", "--weights", "classifier=50,embedding=50")
    assert not np.allclose(plain, both)


def test_variations_seeds_and_replay(folder):
    """The same seed makes the same file; --num 2 begins with the file of --num 1; --replay makes it again."""
    edit = ["--task", "infill", "--input", folder / "long.wav", "--start", 1, "--end", 1.2, "--seed", 7]
    once = call(folder, *edit)
    again = call(folder, *edit, "--num", 2)
    second = sf.read(folder / "out-2.wav", always_2d=True)[0]
    assert np.array_equal(once, again) and not np.array_equal(once, second)
    sample.main(["--replay", str(folder / "out-2.json"), "--output", str(folder / "replayed.wav"), "--force"])
    assert (folder / "replayed.wav").read_bytes() == (folder / "out-2.wav").read_bytes()
    stored = json.loads((folder / "out-2.json").read_text())
    assert stored["variation"] == 1 and stored["options"]["xi"] == sample.XI["latent"]


def test_replay_wants_the_same_listener(folder, capsys):
    """A result that a listener guided is not made again with another one: one sentence, nothing written."""
    call(folder, "--task", "embedding", "--reference", folder / "other.wav", "--length", 0.3)
    listener = folder / "classifier.pt"
    before = listener.read_bytes()
    save_checkpoint(listener, "classifier", tasks.PaSST(tasks.PASST_PRESETS["tiny"]), classes=list("abcdefghi"))
    with pytest.raises(SystemExit):
        run(lambda: sample.main(["--replay", str(folder / "out.json"), "--output", str(folder / "other-ear.wav")]))
    listener.write_bytes(before)
    assert "classifier.pt" in capsys.readouterr().err and not (folder / "other-ear.wav").exists()


@pytest.mark.parametrize("suffix, subtype", [("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "FLOAT"),
                                             ("flac", "PCM_16"), ("flac", "PCM_24")])
def test_files_keep_every_sample(folder, subtype, suffix):
    """What was read from a 16-bit, 24-bit or float file is written back with the same values, full scale included."""
    rng, source = np.random.default_rng(0), folder / f"deep.{suffix}"
    audio = rng.uniform(-1, 1, (44100, 2))
    audio[0] = -1
    sf.write(source, audio, 44100, subtype=subtype)
    before = sf.read(source)[0]
    after = call(folder, "--task", "infill", "--input", source, "--start", 0.5, "--end", 0.6, out=f"out.{suffix}")
    assert sf.info(folder / f"out.{suffix}").subtype == subtype and np.array_equal(after[:20000], before[:20000])


def test_unspliced_output_is_the_models_own(folder):
    """--splice 0 writes decode(x_0) where the model listened, contexts included."""
    edit = ["--task", "infill", "--input", folder / "long.wav", "--start", 1.5, "--end", 1.7]
    spliced, raw = call(folder, *edit), call(folder, *edit, "--splice", 0)
    region = slice(round(1.5 * 44100), round(1.7 * 44100))
    assert np.allclose(spliced[region], raw[region], atol=1e-6) and spliced.shape == raw.shape
    assert not np.allclose(spliced[64000:66000], raw[64000:66000], atol=1e-3)


def dull(x):
    """A decoder that takes 9 dB off everything above 2 kHz."""
    X = torch.fft.rfft(x)
    kept = torch.linspace(0, 22050, X.shape[-1]) < 2000
    return torch.fft.irfft(X * torch.where(kept, 1.0, 10 ** (-9 / 20)), x.shape[-1])


def test_what_decoding_takes_off_known_audio_is_given_back_everywhere():
    """The region gets its level back below and above 2 kHz; at most 12 dB; of the known audio only the ends are read."""
    x, n = 0.1 * torch.randn(2, 2, 2**17, generator=torch.Generator().manual_seed(0)), 2**17
    vae = SimpleNamespace(vae=True, hop=128, decode=dull)
    known, C_L, C_R = x.clone(), 200, 100
    known[..., 200 * 128:n - 100 * 128] = math.nan
    made = sample.decode(vae, x, known, C_L, C_R)
    change = 10 * torch.log10(sample.spectrum(made[..., 2**15:2**16]) / sample.spectrum(x[..., 2**15:2**16]))     # (2, 1025)
    assert change[:, 5:70].abs().max() < 1 and change[:, 120:].abs().max() < 1 and made.shape == x.shape
    faint = sample.decode(SimpleNamespace(vae=True, hop=128, decode=lambda x: x / 100), x, known, C_L, C_R)
    assert torch.allclose(faint, x / 100 * 10 ** (12 / 20), atol=1e-5)
    assert torch.allclose(made[:1], sample.decode(vae, x[:1], known[:1], C_L, C_R), atol=1e-6)
    untouched = [sample.decode(vae, x, known, 0, 0), sample.decode(vae, x, known, C_L, C_R, equalise=False),
                 sample.decode(SimpleNamespace(vae=None, hop=128, decode=dull), x, known, C_L, C_R)]
    assert all(torch.allclose(audio, dull(x), atol=1e-5) for audio in untouched)


def test_silence_and_short_clips_work(folder):
    """Half a second of sound, and digital silence, can be continued and filled."""
    sf.write(folder / "short.wav", 0.1 * np.random.default_rng(0).standard_normal((22050, 2)), 44100)
    sf.write(folder / "silent.wav", np.zeros((44100, 2)), 44100)
    for name in ("short", "silent"):
        for flags in (["continuation"], ["infill", "--start", 0.2, "--end", 0.3]):
            assert np.isfinite(call(folder, "--task", *flags, "--input", folder / f"{name}.wav")).all()


@pytest.mark.skipif(not ODD.exists(), reason="the collection of odd files is not beside this checkout")
@pytest.mark.parametrize("task", ["continuation", "infill"])
def test_odd_files_work_or_end_with_a_sentence(folder, task):
    """mp3, ogg, flac, 24-bit, float, mono, other rates, half a second, leading silence."""
    for path in sorted(ODD.iterdir()):
        try:
            after = call(folder, "--task", task, "--input", path)
            assert np.isfinite(after).all() and after.shape[1] == sf.info(path).channels
        except sample.UserError as error:
            assert path.name in str(error) and "0s5" in path.name


def test_bad_input_ends_in_one_sentence_and_status_2(folder, capsys, tmp_path):
    """No traceback, no file written, the culprit named."""
    clip, latent = str(folder / "long.wav"), str(folder / "latent.pt")
    (folder / "text.wav").write_text("not audio")
    (folder / "cut.pt").write_bytes((folder / "latent.pt").read_bytes()[:5000])
    torch.save({"format": 1, "kind": "latent", "trick": Path("x")}, folder / "pickled.pt")
    (folder / "there.wav").write_text("mine")
    (folder / "session.json").write_text("mine")
    (folder / "session.wav").unlink(missing_ok=True)
    edit = ["--task", "infill", "--input", clip, "--checkpoint", latent, "--steps", "1", "--output", str(tmp_path / "no.wav")]
    for culprit, arguments in (
            ("--task", ["--input", clip]), ("unknown", ["--task", "unknown"]), ("--input", ["--task", "infill"]),
            ("missing.wav", [*edit, "--input", "missing.wav"]), (str(folder), [*edit, "--input", str(folder)]),
            ("text.wav", [*edit, "--input", str(folder / "text.wav")]), ("--end", [*edit, "--start", "9", "--end", "10"]),
            ("--end", [*edit, "--start", "2", "--end", "1"]), ("--start", [*edit, "--start", "x"]),
            ("--input2", [*edit, "--task", "transition"]), ("zither", [*edit, "--classes", "zither=1", "--listener", str(folder / "classifier.pt")]),
            ("latent", [*edit, "--model", "waveform"]), ("cut.pt", [*edit, "--checkpoint", str(folder / "cut.pt")]),
            ("pickled.pt", [*edit, "--checkpoint", str(folder / "pickled.pt")]), ("there.wav", [*edit, "--output", str(folder / "there.wav")]),
            ("long.wav", [*edit, "--output", str(folder / "long.wav" / "deep.wav"), "--force"]), (".mp3", [*edit, "--output", "a.mp3"]),
            ("session.json", [*edit, "--output", str(folder / "session.wav")]), ("embeding", [*edit, "--weights", "embeding=3"]),
            ("--length", [*edit, "--length", "2"]), ("--input", ["--task", "unconditional", "--input", clip]),
            ("--length", ["--task", "unconditional", "--length", "0.00001"]), ("--context", [*edit, "--context", "0"]),
            ("--classes", [*edit, "--classes", "a=2", "--listener", str(folder / "classifier.pt")]), ("--k", [*edit, "--k", "0"]),
            ("--k", [*edit, "--k", "2"]), ("--steps", [*edit, "--steps", "0"]), ("none.json", ["--replay", "none.json"])):
        with pytest.raises(SystemExit) as end:
            run(lambda: sample.main(arguments))
        said = capsys.readouterr().err.strip()
        assert end.value.code == 2 and culprit in said and "\n" not in said and "Traceback" not in said
    assert (folder / "there.wav").read_text() == (folder / "session.json").read_text() == "mine"
    assert not list(tmp_path.iterdir()) and not (folder / "session.wav").exists()


SHIPPED = sorted((Path(__file__).resolve().parents[1] / "checkpoints").glob("*.pt"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_checkpoints_load_and_work(path, folder):
    """Weights only; the diffusion models generate, the listener hears."""
    checkpoint = load_checkpoint(path)
    if checkpoint.kind == "classifier":
        logits, _ = checkpoint.net.listen(torch.zeros(1, 2, 44100), 44100)
        assert logits.shape == (1, len(checkpoint.classes)) and logits.isfinite().all()
    else:
        sample.main(["--task", "infill", "--model", checkpoint.kind, "--checkpoint", str(path), "--steps", "2", "--start", "1",
                     "--end", "1.2", "--input", str(folder / "long.wav"), "--output", str(folder / "out.wav"), "--force"])
        assert np.isfinite(sf.read(folder / "out.wav")[0]).all()
