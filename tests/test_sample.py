"""sample.py end to end, with tiny untrained networks: lengths, borders, leaks, seeds, formats, and what goes wrong."""
import inspect
import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch

import diffusion
import guidance
import sample
import tasks
from conftest import save_checkpoint
from dit import PRESETS as DIT, DiT
from sample import load_checkpoint, run
from unet1d import PRESETS as UNET, UNet1D
from sample import limited, spectrum
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
    if {"--reference", "--classes"} & set(arguments):
        arguments += ["--listener", str(folder / "classifier.pt")]
    sample.main(["--model", model, "--checkpoint", str(folder / f"{model}.pt"), "--steps", str(steps), "--force",
                 "--output", str(folder / out), *arguments])
    return sf.read(folder / out, always_2d=True)[0]


@pytest.mark.parametrize("model, sampler, splice", [("latent", "ddpm", 30), ("waveform", "ddim", 10)])
@pytest.mark.parametrize("name", ["long", "mono"])
@pytest.mark.parametrize("task", ["infill", "regenerate"])
def test_an_edit_fits_back_into_its_track(folder, task, name, model, sampler, splice):
    """Same length and rate, finite, new inside, bit-identical outside the region, in whole frames, and the fades."""
    before, rate = sf.read(folder / f"{name}.wav", always_2d=True)
    after = call(folder, "--task", task, "--input", folder / f"{name}.wav", "--start", 1.5, "--end", "0:01.7",
                 "--sampler", sampler, "--splice", splice, model=model)
    a, b, fade = round(1.5 * rate), round(1.7 * rate) + math.ceil(128 * rate / 44100), math.ceil(splice / 1000 * rate)
    assert after.shape == before.shape and np.isfinite(after).all() and sf.info(folder / "out.wav").samplerate == rate
    assert np.array_equal(after[:a - fade], before[:a - fade]) and np.array_equal(after[b + fade:], before[b + fade:])
    assert np.isclose(after[a:b], before[a:b]).mean() < 0.05


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
    """Noise in the place of the region changes nothing of the result, bit for bit."""
    audio, rate = sf.read(folder / f"{name}.wav", always_2d=True)
    outs = []
    for noisy in (False, True):
        if noisy:
            last = len(audio) if flags[0] == "continuation" else round(1.3 * rate)
            audio[rate:last] = 0.5 * np.random.default_rng(1).standard_normal((last - rate, audio.shape[1])).clip(-1, 1)
        sf.write(folder / "leak.wav", audio, rate)
        leak = "--input", folder / "leak.wav", "--device", "cpu"           # on a GPU, sums can differ from run to run
        outs.append(call(folder, "--task", *flags, *leak, model=model))
    assert np.array_equal(*outs)


def test_transition_joins_two_tracks(folder):
    """The end of the first goes over to the start of the second; both keep their own samples outside the fade."""
    one, other = (sf.read(folder / f"{name}.wav", always_2d=True)[0] for name in ("long", "other"))
    after = call(folder, "--task", "transition", "--input", folder / "long.wav", "--input2", folder / "other.wav", "--fade", 0.2)
    fade, cross = round(0.2 * 44100), math.ceil(0.03 * 44100) + 128
    assert len(after) == len(one) + len(other) - fade
    assert np.array_equal(after[:len(one) - fade - cross], one[:-fade - cross])
    assert np.array_equal(after[len(one) + cross:], other[fade + cross:])


def test_regions_longer_than_the_window_are_filled_without_a_seam():
    """By the exact denoiser of smooth Gaussian signals: where windows meet each other and the known sides, steps are as
    large as elsewhere; if they hear nothing of each other, they are not."""
    at = torch.arange(180.0)
    K = torch.exp(-((at[:, None] - at) / 4).square() / 2)                   # covariance of two positions

    def net(x_t, t):
        (alpha_t, sigma_t), n = (c.float().reshape(-1, 1, 1) for c in diffusion.alpha_sigma(t)), x_t.shape[-1]
        wiener = torch.linalg.solve(alpha_t**2 * K[:n, :n] + sigma_t**2 * torch.eye(n), alpha_t * K[:n, :n])
        return (alpha_t * x_t - x_t @ wiener) / sigma_t                     # v

    generator = torch.Generator().manual_seed(0)
    x_bar = torch.randn(1, 64, 180, generator=generator) @ torch.linalg.cholesky(K + 1e-4 * torch.eye(180)).T
    settings, spans = sample.Settings(xi=0.1, k=1.0, keep_level=False), sample.windows(16, 148, 16, 64, 16)
    ends = [15, 163] + [last - 1 for _, last in spans[:-1]]
    deaf = [spans[0]] + [(last, end) for (_, last), (_, end) in zip(spans, spans[1:])]
    leftwards = sample.windows(0, 164, 16, 64, 16)        # nothing is known on the left
    edges = [edge - 1 for span in leftwards for edge in span if 0 < edge < 180]
    for C_L, spans, ends, meet in ((16, spans, ends, True), (16, deaf, ends, False), (0, leftwards, edges, True)):
        x = sample.generate(SimpleNamespace(net=net), x_bar, C_L, 16, settings, generator, spans=spans)
        steps = x.diff(dim=-1).square().mean((0, 1)).sqrt()
        assert (steps[ends].max() < 1.2 * steps.mean()) == meet and len(spans) >= 4


def test_windows_cover_the_gap_in_order():
    """Each window starts where enough is known, the last hears the right context, and none is longer than the window."""
    for C_L, gap, C_R, overlap in ((10, 20, 10, 16), (16, 300, 16, 16), (0, 200, 0, 16), (27, 500, 0, 27), (32, 100, 3, 32)):
        done = C_L
        spans = sample.windows(C_L, gap, C_R, 64, overlap)
        for first, last in spans:
            end = last - C_R if last == C_L + gap + C_R else last
            assert last - first <= 64 and first <= max(0, done - min(overlap, 16)) and end > done
            done = end
        assert done == C_L + gap


@pytest.mark.parametrize("C_L", [0, 3])
def test_a_gap_at_the_start_is_filled_from_the_right(C_L):
    """Where less is known before the gap than behind it, every window hears what lies behind what it fills."""
    todo = C_L + 200
    for first, last in sample.windows(C_L, 200, 16, 64, 16):
        assert last - first <= 64 and last >= todo + 16 and first < todo
        todo = first
    assert todo == 0


def test_two_seconds_are_edited_where_one_end_is_given(tmp_path):
    """After --start, before --end, or in the middle; less at the edges of the track."""
    sf.write(tmp_path / "x.wav", 0.1 * np.ones((8000, 1)), 1000)
    checkpoint = SimpleNamespace(window=64, hop=128)
    for flags, expected in ((["--start", "3"], (3000, 5000)), (["--end", "5.5"], (3500, 5500)), ([], (3000, 5000)),
                            (["--start", "7"], (7000, 8000)), (["--end", "1"], (0, 1000)),
                            (["--start", "1", "--end", "7"], (1000, 7000))):
        options = sample.parse(["--task", "infill", "--input", str(tmp_path / "x.wav"), *flags])
        assert sample.region(options, checkpoint)[1:3] == expected


def test_xi_is_the_step_towards_the_context_alone(folder):
    """Guidance by example has its own step, which --xi 0 does not end."""
    infill = ("--task", "infill", "--input", folder / "long.wav", "--start", 1, "--end", 1.2, "--xi", 0)
    assert not np.array_equal(call(folder, *infill), call(folder, *infill, "--reference", folder / "other.wav"))


def test_the_step_towards_the_context_is_as_small_as_the_context(monkeypatch):
    """The gradient of an L1 norm is as large for quiet music as for loud: xi is times the level of what is known."""
    weights, x_bar = [], torch.ones(2, 4, 64) * torch.tensor([0.01, 3.0])[:, None, None]
    monkeypatch.setattr(guidance, "sample", lambda model, x_T, task, **_: weights.append(task.terms[0].weight) or x_T)
    x_bar[..., 16:40] = 7.0                                 # not known
    for keep_level in (True, False):
        settings = sample.Settings(xi=0.2, k=1.0, keep_level=keep_level)
        sample.generate(SimpleNamespace(net=None, hop=128), x_bar, 16, 24, settings, torch.Generator())
    assert torch.allclose(weights[0], torch.tensor([0.002, 0.6])) and weights[1] == 0.2
    default = lambda kind, size: sample.Settings.of(
        SimpleNamespace(as_printed=False), SimpleNamespace(kind=kind, size=size)).keep_level
    assert default("latent", "small") and not default("waveform", "small") and not default("latent", "paper")


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside an infill"])
def test_guidance_leads_where_it_should(folder, alone):
    """The distance to the reference falls; the wanted class's log-odds rise, and the unwanted one's fall."""
    net = load_checkpoint(folder / "classifier.pt").net
    infill = ("--input", folder / "long.wav", "--start", 1, "--end", 1.5, "--splice", 0)
    first, task = (0, ("--length", 0.5)) if alone else (35900, infill)                 # where the model's output begins

    @torch.no_grad()
    def heard(name, *flags):
        audio = call(folder, "--task", name if alone else "infill", *task, *flags, steps=4)[first:first + 38600]
        return net.listen(torch.from_numpy(audio.T[None]).float(), 44100)

    target = net.listen(torch.from_numpy(sf.read(folder / "other.wav")[0].T[None]).float(), 44100)[1]
    logits, embedding = heard("unconditional", *["--no-equalise"] * (not alone))        # as it is under guidance
    near = heard("embedding", "--reference", folder / "other.wav", "--weights", "embedding=30", "--no-equalise")[1]
    classed = heard("classifier", "--classes", "a=1,c=0", "--weights", "classifier=1000")[0]
    assert (near - target).norm() < 0.98 * (embedding - target).norm()
    assert (classed - logits)[0, 0] > 0 > (classed - logits)[0, 2]


def test_variations_and_seeds(folder):
    """The same seed makes the same file; --num 2 begins with the file of --num 1; the json has the command line."""
    edit = ["--task", "infill", "--input", folder / "long.wav", "--start", 1, "--end", 1.2, "--seed", 7]
    once = call(folder, *edit)
    again = call(folder, *edit, "--num", 2)
    second = sf.read(folder / "out-2.wav", always_2d=True)[0]
    assert np.array_equal(once, again) and not np.array_equal(once, second)
    assert not np.array_equal(once, call(folder, *edit, "--seed", 8, out="eight.wav"))
    stored, bytes_before = json.loads((folder / "out-2.json").read_text()), (folder / "out-2.wav").read_bytes()
    assert stored["variation"] == 1 and stored["settings"]["xi"] == sample.XI["latent"]
    program, script, *arguments = shlex.split(stored["command"])
    sample.main(arguments)
    assert [program, script] == ["python", "sample.py"] and (folder / "out-2.wav").read_bytes() == bytes_before


@pytest.mark.parametrize("suffix, subtype", [
    ("wav", "PCM_U8"), ("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "PCM_32"), ("wav", "FLOAT"), ("wav", "DOUBLE"),
    ("flac", "PCM_16"), ("flac", "PCM_24")])
def test_files_keep_every_bit(folder, subtype, suffix):
    """Any word length comes back, with the same values outside the edit, full scale included."""
    rng, source = np.random.default_rng(0), folder / f"deep.{suffix}"
    audio = rng.uniform(-1, 1, (44100, 2))
    audio[0] = -1
    sf.write(source, audio, 44100, subtype=subtype)
    before = sf.read(source)[0]
    after = call(folder, "--task", "infill", "--input", source, "--start", 0.5, "--end", 0.6, out=f"out.{suffix}")
    assert sf.info(folder / f"out.{suffix}").subtype == subtype and np.array_equal(after[:20000], before[:20000])
    assert np.array_equal(after[30000:], before[30000:])


def test_new_audio_above_full_scale_is_turned_down_and_nothing_else(folder, monkeypatch, capsys):
    """The word length stays 16 bits, the track stays as it is, and what is new gets one gain if all of it is loud,
    without clipping; in a float track it is held at the track's own peaks."""
    def loud(checkpoint, known, *_, **__):
        return 2 * torch.sin(torch.arange(known.shape[-1]) / 20).expand(1, 2, -1)
    before = sf.read(folder / "long.wav")[0]
    edit = ["--task", "infill", "--input", folder / "long.wav", "--start", 1, "--end", 2, "--context", 0.5]
    monkeypatch.setattr(sample, "fill", loud)
    kept, held = call(folder, *edit, "--subtype", "FLOAT"), call(folder, *edit)
    assert sf.info(folder / "out.wav").subtype == "PCM_16" and "turned down, by 6.0 dB" in capsys.readouterr().out
    assert np.array_equal(held[:44100 - 1400], before[:44100 - 1400])
    assert np.array_equal(held[88200 + 1600:], before[88200 + 1600:])
    sf.write(folder / "peak.wav", np.concatenate([before, [[1.5, 0]]]), 44100, subtype="FLOAT")
    peaks = call(folder, *edit, "--input", folder / "peak.wav")
    for audio, top in ((held, 1), (kept, 1), (peaks, 1.5)):
        assert np.abs(np.abs(audio[44100:88200]).max() - top) < 1e-3
        assert np.abs(held[44100:88200] - audio[44100:88200] / top).max() < 1e-3


def test_what_no_integers_can_hold_is_written_as_floats():
    """What was compressed, and two tracks of different word lengths; flac has 24 bits."""
    for file, subtype, dtype, written in (("x.wav", "VORBIS", torch.float32, "FLOAT"), ("x.flac", "FLOAT", torch.float32, "PCM_24"),
                                          ("x.wav", "mixed", torch.float64, "DOUBLE"), ("x.wav", "PCM_16", torch.float32, "PCM_16")):
        assert sample.word_length(Path(file), sample.Track(torch.zeros(2, 9, dtype=dtype), 44100, subtype)) == written


def test_peaks_of_what_is_replaced_do_not_count(folder):
    """Two loud tracks, whose cross-fade passes full scale before it is regenerated, keep their word length."""
    for name in ("loud", "louder"):
        sf.write(folder / f"{name}.wav", np.full((44100, 2), 0.99), 44100)
    after = call(folder, "--task", "transition", "--input", folder / "loud.wav", "--input2", folder / "louder.wav", "--fade", 0.2)
    assert sf.info(folder / "out.wav").subtype == "PCM_16" and np.abs(after).max() <= 1


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_a_long_file_is_written_whole(subtype, tmp_path):
    """It is written in blocks of 2^20 samples."""
    audio = torch.randint(-2**15, 2**15, (2, 2**20 + 9), generator=torch.Generator().manual_seed(0)) / 2**15
    sample.write_track(tmp_path / "long.flac" if subtype == "PCM_16" else tmp_path / "long.wav", sample.Track(audio, 44100, subtype))
    assert np.array_equal(sf.read(*tmp_path.iterdir())[0].T, audio.numpy())


def test_the_limiter_holds_full_scale_and_leaves_the_rest():
    """A burst of noise and single peaks come below 1; further than two reaches from them nothing changes; the level
    moves in small steps; a stretch shorter than the reach works."""
    x = 0.3 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    x[0, 3000] = 3.0
    x[:, 5000:5200] *= 10
    y = limited(x, 100)
    assert y.abs().max() <= 1 + 1e-6 and y[0, 3000] > 0.8
    far = torch.cat([torch.arange(2700), torch.arange(3300, 4700), torch.arange(5500, 8000)])
    assert torch.allclose(y[:, far], x[:, far], atol=1e-6)
    assert (y / x)[0].diff().abs().max() < 1.5 / 201
    assert limited(x[:, 2990:3010], 100).abs().max() <= 1 + 1e-6


def test_mono_keeps_the_level_of_what_was_generated(folder):
    """Two channels that differ would lose 3 dB in their mean."""
    checkpoint = load_checkpoint(folder / "waveform.pt")
    edit = sample.Edit(checkpoint, sample.Track.read(str(folder / "mono.wav")), 48000, 72000)
    n = (edit.C_L + edit.gap + edit.C_R) * checkpoint.hop
    decoded = 0.1 * torch.randn(2, n, generator=torch.Generator().manual_seed(0))
    middle = edit.splice(decoded, 0.03)[:, 50000:70000]
    assert middle.shape == (1, 20000) and abs(20 * math.log10(middle.std() / decoded.std())) < 0.5


@pytest.mark.parametrize("hop", [128, 2048])
def test_the_splice_is_smooth_and_its_fades_lie_in_known_audio(hop):
    """A model that returns what it knows, and another sound in the gap: outside of the gap's frames nothing changes, so
    both fades lie in known audio. One that returns a shifted sound everywhere: no step larger than the sounds' own."""
    tone = lambda phase: 0.5 * torch.sin(torch.arange(3 * 44100) / 20 + phase).expand(2, -1)
    model = SimpleNamespace(hop=hop, window=2**18 // hop)
    edit = sample.Edit(model, sample.Track(tone(0), 44100), 50000, 60001)
    a, b = edit.a - edit.C_L * hop, edit.a + (edit.gap + edit.C_R) * hop
    right = edit.a + edit.gap * hop
    knows = tone(0)[:, a:b].clone()
    knows[:, edit.a - a:right - a] = 0
    spliced = edit.splice(knows, 0.03)
    assert torch.equal(spliced[:, edit.a:right], torch.zeros(2, right - edit.a)) and edit.end == right
    for known in (slice(0, edit.a), slice(right, None)):
        assert torch.allclose(spliced[:, known], tone(0)[:, known])
    largest = tone(0).diff().abs().max()
    assert edit.splice(tone(2)[:, a:b], 0.03).diff().abs().max() < 1.1 * largest
    hard_cut = torch.cat([tone(0)[:, :edit.a], tone(2)[:, edit.a:]], dim=1)
    assert hard_cut.diff().abs().max() > 5 * largest


def test_little_context_is_said_and_none_refused(folder, capsys):
    """130 samples are a frame, so the music goes on; 100 are not: one sentence, status 2."""
    for n in (130, 100):
        sf.write(folder / f"n{n}.wav", 0.1 * np.random.default_rng(0).standard_normal((n, 2)), 44100)
    assert len(call(folder, "--task", "continuation", "--input", folder / "n130.wav", "--length", 0.2)) == 130 + 8820
    assert "hears 0.00 s before" in capsys.readouterr().out
    with pytest.raises(sample.UserError, match="--input has less than one frame"):
        call(folder, "--task", "continuation", "--input", folder / "n100.wav", "--length", 0.2)


@pytest.mark.parametrize("kind, xi", [("latent", 3e-2), ("waveform", 3e-3)])
def test_as_printed_sets_the_papers_constants(kind, xi):
    """One switch for App. C.3's xi and k, and all of the paper's other choices; beside a flag for any of them it is
    refused."""
    model, edit = SimpleNamespace(kind=kind, size="small"), ["--task", "regenerate", "--input", "x.wav", "--as-printed", "--steps", "5"]
    settings = sample.Settings.of(sample.parse(edit), model)
    assert settings == sample.Settings("ddpm", 5, xi * 5 / 50, 0.85, "paper", "x_t", equalise=False, keep_level=False)
    for flag in (["--xi", "1"], ["--k", "0.5"], ["--equalise"]):
        with pytest.raises(sample.UserError, match=f"{flag[0]} is set by --as-printed"):
            sample.Settings.of(sample.parse(edit + flag), model)


@pytest.mark.parametrize("steps", [5, 500])
def test_the_steps_of_guidance_add_up_alike_for_any_number_of_steps(steps, monkeypatch):
    """xi times a term's weight is the setting for 50 steps, times 50 over their number; as printed, xi itself."""
    asked, x_bar = [], torch.ones(1, 4, 64)
    monkeypatch.setattr(guidance, "sample", lambda _, x_T, task, xi, **__: asked.append(xi * task.terms[0].weight) or x_T)
    printed = sample.Settings.of(sample.parse(["--task", "infill", "--as-printed", "--steps", str(steps)]),
                                 SimpleNamespace(kind="latent", size="small"))
    for settings in (sample.Settings(steps=steps, xi=0.2, k=1.0), printed):
        sample.generate(SimpleNamespace(net=None, hop=128), x_bar, 16, 16, settings, torch.Generator())
    assert [float(step) for step in asked] == pytest.approx([0.2 * 50 / steps, 0.03])


def test_regenerate_starts_from_what_is_there_and_infill_from_nothing(folder, monkeypatch):
    """What the model is given: all of the track, or zeros in the gap."""
    one, seen, known = load_checkpoint(folder / "waveform.pt"), [], torch.randn(1, 2, 4096)
    monkeypatch.setattr(sample, "generate", lambda checkpoint, x_bar, *_, **__: seen.append(x_bar) or x_bar)
    for from_x_bar in (True, False):
        sample.fill(one, known, 1000, 1000, sample.Settings(equalise=False), None, from_x_bar=from_x_bar)
    whole, gap = seen
    assert torch.allclose(whole, known / one.net.scale) and torch.equal(gap[..., :1000], whole[..., :1000])
    assert not gap[..., 1000:-1000].any()


def test_context_and_length(folder):
    """--context is what is heard on either side; a continuation fills what the window has left behind it, 2.4 s if
    nothing is said. Minutes may be given."""
    one, track = SimpleNamespace(hop=128, window=2048), str(folder / "mono.wav")
    def edit(*flags):
        return sample.Edit(one, *sample.region(sample.parse(["--task", *flags, "--input", track]), one))
    infill = edit("infill", "--start", "1.4", "--end", "1.6", "--context", "0.5")
    assert infill.C_L == infill.C_R == int(0.5 * 44100 / 128)
    for flags, context in (([], 2.4), (["--context", "1"], 1)):
        on = edit("continuation", *flags)
        assert on.C_L == int(context * 44100 / 128) and (on.b - on.a) / 48000 == pytest.approx(2048 * 128 / 44100 - context, abs=1e-4)
    assert sample.parse(["--task", "continuation", "--length", "1:30"]).length == 90


def test_defaults_are_said_once():
    """guidance.sample's sampler and tasks.regenerate's start are those of Settings; k has no other default."""
    default = lambda function, name: inspect.signature(function).parameters[name].default
    assert default(guidance.sample, "sampler") == sample.Settings.sampler
    assert default(tasks.regenerate, "start_from") == sample.Settings.start_from
    assert default(tasks.regenerate, "k") is default(tasks.transition, "k") is inspect.Parameter.empty


def test_half_precision_works(folder):
    """--precision bf16 changes a result only slightly."""
    edit = ["--task", "infill", "--input", folder / "long.wav", "--start", 1, "--end", 1.2]
    plain, half = call(folder, *edit), call(folder, *edit, "--precision", "bf16")
    assert 0 < np.abs(plain - half).max() < 0.05 * np.abs(plain).max()


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


def test_decoded_audio_gets_the_spectrum_of_what_is_known():
    """Beside the region, and in it; at most 12 dB; the region of the known audio is read only for from_x_bar."""
    x, n = 0.1 * torch.randn(2, 2, 2**17, generator=torch.Generator().manual_seed(0)), 2**17
    C_L, C_R, new = 200, 100, slice(2**15, 2**16)
    known = x.clone()
    known[..., C_L * 128:n - C_R * 128] *= 0.5
    decoded = lambda x: torch.cat([dull(x)[..., :C_L * 128], x[..., C_L * 128:] * 2], -1)    # 6 dB too loud from there on
    vae = SimpleNamespace(vae=True, hop=128, decode=decoded)
    bins = [*range(5, 70), *range(120, 1025)]                # away from 0 Hz, and from the step at 2 kHz
    heard = lambda audio, part: spectrum(audio[..., part], torch.ones_like(audio[0, 0, part]))[:, bins]
    change = lambda made, part: 10 * torch.log10(heard(made, part) / heard(x, part))
    made = sample.decode_like(vae, x, known, C_L, C_R)
    assert change(made, new).abs().max() < 1 and made.shape == x.shape
    assert change(sample.decode_like(vae, x, known, C_L, C_R, from_x_bar=True), new).add(6.02).abs().max() < 1
    same = sample.decode_like(vae, x, x, C_L, C_R)
    assert torch.allclose(made, same, atol=1e-6)
    assert torch.allclose(made[:1], sample.decode_like(vae, x[:1], known[:1], C_L, C_R), atol=1e-6)
    dulled = sample.decode_like(SimpleNamespace(vae=True, hop=128, decode=dull), x, x, C_L, C_R)
    assert change(dulled, slice(C_L * 128 - 8192)).abs().max() < 1
    faint = sample.decode_like(SimpleNamespace(vae=True, hop=128, decode=lambda x: x / 100), x, known, C_L, C_R)
    assert torch.allclose(faint, x / 100 * 4, atol=1e-5)


@pytest.mark.parametrize("C_L, C_R", [(200, 100), (0, 0)])
def test_an_example_gives_new_audio_its_spectrum(C_L, C_R):
    """The shape, at the level that it would have without; where nothing is known, the level too."""
    draw, n = torch.Generator().manual_seed(0), 2**17
    x, other = 0.1 * torch.randn(2, 2, n, generator=draw), 0.1 * torch.randn(2, 2, 2**16, generator=draw)
    example, copy = 2 * dull(other), SimpleNamespace(vae=True, hop=128, decode=lambda x: x)
    made = sample.decode_like(copy, x, x, C_L, C_R, example=example)
    heard = lambda audio: spectrum(audio, torch.ones(audio.shape[-1]))
    new = made[..., C_L * 128 + 4096:n - C_R * 128 - 4096]
    change = 10 * torch.log10(heard(new) / heard(example))[:, [*range(5, 70), *range(120, 1025)]]
    power = lambda audio: 10 * audio.square().mean((1, 2)).log10()
    assert (change - change.mean(1, keepdim=True)).abs().max() < 1
    assert (power(new) - power(x if C_L else example)).abs().max() < 0.5
    beside = slice(max(0, C_L * 128 - 8192))
    assert torch.allclose(made[..., beside], x[..., beside], atol=0.01)


def test_a_reference_gives_its_spectrum(folder):
    """From the command line: not with --no-equalise."""
    heard = lambda audio: spectrum(torch.from_numpy(audio.T[None].copy()).float(), torch.ones(len(audio)))[:, 5:].log10()
    wanted = heard(sf.read(folder / "other.wav")[0])
    matched, plain = (heard(call(folder, "--task", "embedding", "--reference", folder / "other.wav", "--length", 0.5, *flag))
                      for flag in ((), ("--no-equalise",)))
    assert (matched - wanted).abs().mean() < 0.5 * (plain - wanted).abs().mean()


def test_music_from_nothing_is_as_loud_as_music(folder, monkeypatch):
    """Each clip by itself, and silence stays silent; not where something is known, heard as an example or started from,
    nor with --as-printed or the waveform model."""
    checkpoint, known = load_checkpoint(folder / "latent.pt"), torch.zeros(3, 2, 2**14)
    loudness = torch.tensor([1e-3, 3.0, 0.0])[:, None, None]
    decoded = loudness * torch.randn(known.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(sample, "generate", lambda *_, **__: None)
    monkeypatch.setattr(checkpoint, "decode", lambda _: decoded)
    monkeypatch.setattr(sample, "decode_like", lambda *_: decoded)
    def level(C_L=0, keep_level=True, equalise=True, **how):
        settings = sample.Settings(keep_level=keep_level, equalise=equalise)
        return sample.fill(checkpoint, known, C_L, 0, settings, None, **how).square().mean((1, 2)).sqrt()
    as_it_was = pytest.approx([1e-3, 3.0, 0.0], rel=0.05)
    for how in ({}, {"guides": (1,)}, {"example": known, "equalise": False}):
        assert level(**how).tolist() == pytest.approx([0.1, 0.1, 0.0])
    for how in ({"C_L": 8}, {"keep_level": False}, {"example": known}, {"from_x_bar": True}):
        assert level(**how).tolist() == as_it_was


def test_where_the_level_is_kept(monkeypatch):
    """In infills and continuations of the latent model, in each window between what is known there; not where the start
    is x_bar, which has a level of its own, nor from nothing, nor with --as-printed or the waveform model."""
    asked, x_bar = [], torch.ones(1, 4, 64)
    monkeypatch.setattr(guidance, "level_kept", lambda *given: asked.append(given[1:]))
    monkeypatch.setattr(guidance, "sample", lambda model, x_T, task, **_: x_T)
    for k, C_L, C_R, keep_level in ((1.0, 16, 24, True), (1.0, 0, 0, True), (0.6, 16, 24, True), (1.0, 16, 24, False)):
        settings = sample.Settings(k=k, keep_level=keep_level)
        spans = [(0, 30), (20, 64)] if C_L else None
        sample.generate(SimpleNamespace(net=None, hop=128), x_bar, C_L, C_R, settings, torch.Generator(), spans=spans)
    assert asked == [(16, 0, 86), (10, 24, 86)]             # a quarter of a second, in frames of 128 samples


def test_regenerating_the_start_of_a_track_begins_with_what_stood_there(monkeypatch):
    """Also where nothing beside it is known, in the first of several windows: x_T is x_bar but for k = 0.01 of noise."""
    starts, x_bar = [], torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(guidance, "sample", lambda model, x_T, task, **_: starts.append(x_T) or x_T)
    for start in ("paper", "matched"):
        settings = sample.Settings(k=0.01, start_from=start)
        sample.generate(SimpleNamespace(net=None, hop=128), x_bar, 0, 0, settings, torch.Generator(), spans=[(0, 32), (16, 64)])
    assert len(starts) == 4 and all((x_T - x_bar[..., :32]).abs().mean() < 0.05 for x_T in starts[::2])


def test_a_reference_may_have_any_number_of_channels(folder):
    """It is heard, not edited."""
    sf.write(folder / "six.wav", 0.1 * np.random.default_rng(0).standard_normal((44100, 6)), 44100)
    edit = ("--task", "infill", "--input", folder / "long.wav", "--start", 1, "--end", 1.2)
    assert np.isfinite(call(folder, *edit, "--reference", folder / "six.wav")).all()


def test_where_the_spectrum_is_as_decoded():
    """From nothing, and with less than 0.25 s known."""
    tone = torch.sin(60 * 2 * math.pi * torch.arange(2**15) / 44100).expand(1, 2, -1)
    vae = SimpleNamespace(vae=True, hop=128, decode=lambda x: x)
    for C_L, C_R in ((0, 0), (1, 0), (0, 1), (40, 40)):
        assert sample.decode_like(vae, tone, 3 * tone, C_L, C_R) is tone
    assert not torch.allclose(sample.decode_like(vae, tone, 3 * tone, 50, 40), tone)


@pytest.mark.parametrize("model", ["latent", "waveform"])
def test_fill_gives_what_is_new_the_spectrum_beside_it(folder, model):
    """Not without `equalise`, nor beside guides, which choose another."""
    one, draw = load_checkpoint(folder / f"{model}.pt"), lambda seed: torch.Generator().manual_seed(seed)
    known = 0.1 * torch.randn(1, 2, min(2**15, one.window * one.hop), generator=draw(0))
    frames = known.shape[-1] // one.hop
    where, guide = (frames * 3 // 8, frames * 3 // 8), lambda z: guidance.Task(z, ())
    x_bar = sample.encode_known(one, known, *where)
    for equalise, guides in ((True, ()), (False, ()), (True, (guide,))):
        settings = sample.Settings(steps=2, equalise=equalise)
        made = sample.fill(one, known, *where, settings, draw(1), guides=guides)
        x_0 = sample.generate(one, x_bar, *where, sample.replace(settings, k=1.0), draw(1), guides=guides)
        matched = sample.decode_like(one, x_0, known, *where)
        assert torch.equal(made, matched if equalise and not guides else one.decode(x_0))
        assert not torch.allclose(matched, one.decode(x_0), atol=1e-3)


def test_silence_and_short_clips_work(folder):
    """Half a second of sound, and digital silence, can be continued and filled."""
    sf.write(folder / "short.wav", 0.1 * np.random.default_rng(0).standard_normal((22050, 2)), 44100)
    sf.write(folder / "silent.wav", np.zeros((44100, 2)), 44100)
    for name in ("short", "silent"):
        for flags in (["continuation"], ["infill", "--start", 0.2, "--end", 0.3]):
            assert np.isfinite(call(folder, "--task", *flags, "--input", folder / f"{name}.wav")).all()


@pytest.mark.skipif(not ODD.exists(), reason="the collection of odd files is not beside this checkout")
@pytest.mark.parametrize("task", ["continuation", pytest.param("infill", marks=pytest.mark.slow)])
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
    sf.write(folder / "silence.wav", np.zeros((44100, 2)), 44100)
    sf.write(folder / "broken.wav", np.full((44100, 2), np.nan), 44100, subtype="FLOAT")
    (folder / "cut.pt").write_bytes((folder / "latent.pt").read_bytes()[:5000])
    torch.save({"format": 1, "kind": "latent", "trick": Path("x")}, folder / "pickled.pt")
    sf.write(folder / "over.wav", np.linspace(-1, 1.1, 2**17), 44100, subtype="FLOAT")
    (folder / "there.wav").write_text("mine")
    (folder / "session.json").write_text("mine")
    (folder / "session.wav").unlink(missing_ok=True)
    edit = ["--task", "infill", "--input", clip, "--checkpoint", latent, "--steps", "1", "--output", str(tmp_path / "no.wav")]
    for culprit, arguments in (
            ("--task", ["--input", clip]), ("unknown", ["--task", "unknown"]), ("--input", ["--task", "infill"]),
            ("missing.wav", [*edit, "--input", "missing.wav"]), (str(folder), [*edit, "--input", str(folder)]),
            ("text.wav", [*edit, "--input", str(folder / "text.wav")]), ("lasts 0:03.000: --start 0:09.000", [*edit, "--start", "9", "--end", "10"]),
            ("--end", [*edit, "--start", "2", "--end", "1"]), ("--start", [*edit, "--start", "x"]),
            ("--input2", ["--task", "transition", *edit[2:]]), (".mp3", [*edit, "--output", "a.mp3"]),
            ("zither", [*edit, "--classes", "zither=1", "--listener", str(folder / "classifier.pt")]),
            ("over.wav has peaks above full scale", [*edit, "--input", str(folder / "over.wav"), "--subtype", "PCM_16"]),
            ("--classes a", [*edit, "--classes", "a=2", "--listener", str(folder / "classifier.pt")]),
            ("latent", [*edit, "--model", "waveform"]), ("cut.pt", [*edit, "--checkpoint", str(folder / "cut.pt")]),
            ("pickled.pt", [*edit, "--checkpoint", str(folder / "pickled.pt")]),
            ("there.wav", [*edit, "--output", str(folder / "there.wav")]),
            ("also what is read", [*edit, "--output", clip, "--force"]), ("--weights", [*edit, "--weights", "embedding=nan"]),
            ("long.wav", [*edit, "--output", str(folder / "long.wav" / "deep.wav"), "--force"]),
            ("session.json", [*edit, "--output", str(folder / "session.wav")]),
            ("clip.wav is no file", ["--task", "infill", "--input", str(folder / "nowhere" / "clip.wav")]),
            *[("--length", ["--task", "unconditional", "--length", length]) for length in ("0.00001", "inf", "nan")], ("--context", [*edit, "--context", "0"]),
            ("--k", [*edit, "--k", "2"]), ("--steps", [*edit, "--steps", "0"]), ("--replay", [*edit, "--replay", "none.json"]),
            # what would do nothing
            ("--length", [*edit, "--length", "2"]), ("--input", ["--task", "unconditional", "--input", clip]),
            ("--k", [*edit, "--k", "0.5"]), ("1:75 is no time", [*edit, "--start", "1:75"]),
            ("--weights", [*edit, "--weights", "embedding=3"]), ("--listener", [*edit, "--listener", "x.pt"]),
            ("name=1,other=0", [*edit, "--classes", "a"]), ("--classes does nothing", ["--task", "regenerate", *edit[2:], "--k", "0.42", "--classes", "a=1"]),
            ("classifier", [*edit, "--reference", clip, "--weights", "classifier=3"]),
            ("embeding", [*edit, "--reference", clip, "--weights", "embeding=3"]), ("--fade", [*edit, "--fade", "1"]),
            ("--xi", ["--task", "unconditional", "--xi", "0.1"]), ("--equalise", [*edit, "--classes", "a=1", "--no-equalise"]),
            ("--equalise", ["--task", "unconditional", "--no-equalise"]),
            *[(f"{name}.wav is silent", [*edit, "--reference", str(folder / f"{name}.wav"), "--listener",
                                         str(folder / "classifier.pt")]) for name in ("silence", "broken")],
            ("--splice", ["--task", "unconditional", "--splice", "9"])):
        with pytest.raises(SystemExit) as end:
            run(lambda: sample.main(arguments))
        said = capsys.readouterr().err.strip()
        assert end.value.code == 2 and culprit in said and "\n" not in said and "Traceback" not in said
    assert (folder / "there.wav").read_text() == (folder / "session.json").read_text() == "mine"
    assert not list(tmp_path.iterdir()) and not any((folder / name).exists() for name in ("session.wav", "nowhere"))


def test_music_that_is_not_finite_is_not_written(folder, tmp_path):
    """A damaged model: a sentence with its name, and no file."""
    state = torch.load(folder / "latent.pt", weights_only=True)
    torch.save(state | {"ema": {name: w * torch.nan for name, w in state["ema"].items()}}, folder / "lost.pt")
    with pytest.raises(sample.UserError, match="lost.pt made samples that are not finite"):
        sample.main(["--task", "unconditional", "--steps", "1", "--checkpoint", str(folder / "lost.pt"),
                     "--output", str(tmp_path / "out.wav")])
    assert not list(tmp_path.iterdir())


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
