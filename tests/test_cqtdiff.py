"""examples/cqtdiff.py with a narrow U-Net of random weights, in the format of the official file."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch
from torch.autograd.graph import saved_tensors_hooks

import evaluate
import golden
import guidance
import tasks
from conftest import save_checkpoint
from examples import cqtdiff
from examples.cqtdiff import RATE, SAMPLE_RATE, SHORTEST, SIGMA_DATA, ConstantQ, run

ROOT = Path(__file__).resolve().parents[1]
NARROW = 2, 2, 4, 4, 4, 4
SHORT = "--window", "0.4", "--steps", "2"


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(cqtdiff, "WIDTHS", NARROW)


def save_official(path, trained_only=False, order=reversed):
    """Write a file as CQTDiff's train.py does. The averages differ from the weights; returns the
    two dictionaries."""
    torch.manual_seed(0)
    unet = cqtdiff.UNet()
    parameters, state = dict(unet.named_parameters()), unet.state_dict()
    weights = {name: state[name] for name in order(list(state))}
    for name in parameters:
        weights[name] = torch.randn_like(state[name])
    averaged = [name for name in weights if name in parameters]
    if trained_only:
        averaged = [name for name in averaged if parameters[name].requires_grad]
    average = {name: 0.05 * torch.randn_like(weights[name]) for name in averaged}
    state = {"model": weights, "ema_weights": list(average.values()), "step": 7, "optimizer": {}}
    torch.save(state, path)
    return weights, average


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "cqt_weights.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cqtdiff, "WIDTHS", NARROW)
        save_official(path)
    return path


def open_tiny(official, **given):
    flags = dict(checkpoint=None, weak=None, away=None, model="latent", window=0.4, level=None,
                 recompute=False) | given
    o = SimpleNamespace(pretrained=str(official), **flags)
    return cqtdiff.open_pretrained(o, torch.device("cpu"))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# ---- the map from Karras et al. to model(x_t, t) -> v --------------------------------------------

@pytest.mark.parametrize("variance", [0.5, 1.0, 3.0])
def test_v_is_exact_for_a_gaussian(variance):
    """For audio ~ N(0, variance sigma_data^2), whose best denoiser is known: F of the paper's
    preconditioning becomes the v of our diffusion, v = (alpha_t x_t - E[x_0 | x_t]) / sigma_t, at
    all t."""
    s = SIGMA_DATA

    def best_F(scaled, level):
        sigma = (4 * level).exp()
        c_skip = s**2 / (sigma**2 + s**2)
        c_out = sigma * s / (sigma**2 + s**2).sqrt()
        c_in = 1 / (sigma**2 + s**2).sqrt()
        x = scaled / c_in
        denoised = variance * s**2 / (variance * s**2 + sigma**2) * x
        return (denoised - c_skip * x) / c_out

    t = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98], dtype=torch.float64)
    x_t = normal(len(t), 1, SHORTEST, dtype=torch.float64)
    alpha_t = torch.cos(math.pi * t / 2)[:, None, None]
    sigma_t = torch.sin(math.pi * t / 2)[:, None, None]
    x0_hat = alpha_t * variance / (alpha_t**2 * variance + sigma_t**2) * x_t
    v = cqtdiff.Net(best_F)(x_t, t)
    torch.testing.assert_close(v, (alpha_t * x_t - x0_hat) / sigma_t, atol=1e-6, rtol=1e-6)


def test_noise_levels_stay_within_those_of_training():
    """At t = 1, where sigma is infinite, the network is told 10; at t = 0, 1e-6."""
    told = []
    net = cqtdiff.Net(lambda x, level: told.append(level) or x)
    net(normal(2, 1, SHORTEST), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close((4 * told[0]).exp(), torch.tensor([[1e-6], [10.0]]))


def test_a_short_clip_goes_on_with_silence_as_noisy_as_it_is():
    """What lies after it has the noise level sigma_t, is the same in each call, and is cut off
    again."""
    heard = []
    net = cqtdiff.Net(lambda x, level: heard.append(x) or x)
    x_t, t = normal(2, 1, 1000), torch.tensor([0.2, 0.9])
    assert torch.equal(net(x_t, t), -x_t) and torch.equal(net(x_t, t), -x_t)
    assert heard[0].shape[-1] == SHORTEST and torch.equal(heard[0], heard[1])
    sigma_t = (math.pi / 2 * t).sin()
    torch.testing.assert_close(heard[0][:, 1000:].std(1), sigma_t, atol=0.02, rtol=0.05)


# ---- transform, resampler, U-Net -----------------------------------------------------------------

@pytest.mark.parametrize("n", [4096, 8820, 8821, 65536, 65537, 131072])
def test_the_transform_inverts(n):
    """At the level of music. Near 11 kHz its windows are so small that errors of rounding grow."""
    audio, transform = 0.1 * normal(2, n), ConstantQ(n)
    torch.testing.assert_close(transform.inverse(transform(audio)), audio, atol=1e-5, rtol=0)


@pytest.mark.parametrize("band", [60, 250, 430])
def test_a_tone_is_constant_in_its_band(band):
    """64 bands to an octave (but for one in 448) up to half the rate. A tone at a band's centre is
    a constant there, half its amplitude times n / T, and is not in bands further away than the
    next."""
    n, low = 65536, RATE / 2 / 2**7
    k = round(low * 2 ** (7 * (band - 1) / 447) * n / RATE)                # band 0 is at 0 Hz
    tone = torch.cos(2 * math.pi * k * torch.arange(n, dtype=torch.float64) / n)
    c = ConstantQ(n)(tone[None].float())
    assert c.shape == (1, 2, 450, 704)
    size = c[0].norm(dim=0)                                                # (bands, T)
    torch.testing.assert_close(size[band], torch.full((704,), n / 2 / 704), atol=1e-3, rtol=1e-4)
    assert c[0, :, band].std(dim=-1).max() < 1e-3
    far = torch.cat([size[:band - 1], size[band + 2:]])
    assert far.max() < 1e-3


def test_the_resampler_keeps_a_slow_wave():
    """To half and to double the rate: the wave itself, at the other rate, but for the ends."""
    wave = lambda n: torch.cos(2 * math.pi * torch.arange(n) / n * 5)
    half, double = cqtdiff.Resample(2, 1)(wave(201)[None]), cqtdiff.Resample(1, 2)(wave(201)[None])
    assert half.shape[-1] == 101 and double.shape[-1] == 402
    torch.testing.assert_close(half[0, 13:-13], wave(201)[::2][13:-13], atol=3e-3, rtol=0)
    torch.testing.assert_close(double[0, ::2][13:-13], wave(201)[13:-13], atol=3e-3, rtol=0)
    torch.testing.assert_close(double[0, :-2][26:-26], wave(402)[:-2][26:-26], atol=1e-2, rtol=0)


def test_the_network_has_the_official_names_and_sizes(monkeypatch):
    """171 tensors of parameters, of which those of the two encodings are not trained, and ten
    kernels."""
    monkeypatch.undo()
    unet = cqtdiff.UNet()
    parameters, state = dict(unet.named_parameters()), unet.state_dict()
    fixed = {name for name, p in parameters.items() if not p.requires_grad}
    assert fixed == {"embedding.RFF_freq", "freq_encoding.RFF_freq", "freq_encoding.embeddings"}
    assert len(parameters) == 171 and sum(p.numel() for p in parameters.values()) == 15_487_232
    assert sum(parameters[name].numel() for name in parameters.keys() - fixed) == 15_458_368
    kernels = {f"{way}.{i}.1.resample.kernel" for way in ("downs", "ups") for i in range(5)}
    assert state.keys() - parameters.keys() == kernels
    shapes = {
        "embedding.MLP.2.weight": (512, 256),
        "init_conv.weight": (32, 66, 5, 3),
        "downs.1.0.film.output_layer.weight": (32, 512),
        "downs.1.0.res_conv.weight": (64, 32, 1, 1),
        "downs.5.0.H.7.conv.weight": (128, 128, 5, 3),
        "downs.4.2.conv1x1.weight": (128, 2, 1, 1),
        "middle.0.0.first_conv.1.weight": (128, 128, 1, 1),
        "ups.0.0.first_conv.1.weight": (128, 256, 1, 1),
        "ups.4.2.conv1x1.weight": (2, 32, 1, 1),
        "ups.5.0.res_conv.weight": (32, 64, 1, 1),
        "downs.0.1.resample.kernel": (1, 1, 28),
        "ups.0.1.resample.kernel": (2, 1, 15),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_the_network_computes_what_the_original_class_does(monkeypatch):
    """Expected: some samples of a version that agreed with the original class to the last bit."""
    monkeypatch.setattr(cqtdiff, "WIDTHS", (4, 4, 8, 8, 8, 8))
    unet = cqtdiff.UNet()
    shapes = {name: tuple(p.shape) for name, p in unet.named_parameters()}
    del shapes["freq_encoding.embeddings"]
    weights = {name: torch.from_numpy(w) for name, w in golden.weights(shapes).items()}
    unet.load_state_dict(weights, strict=False)
    codes = cqtdiff.fourier(torch.arange(450), unet.freq_encoding.RFF_freq[..., None])
    unet.freq_encoding.embeddings.data = codes
    audio = torch.from_numpy(golden.signal("cqtdiff", RATE, 0.4, 1)).float()
    with torch.no_grad():
        made = unet(audio.expand(2, -1), torch.tensor([[-0.5], [0.3]]))[:, ::1000]
    expected = [[3.4580, 0.0482, -0.0472, 0.4538, -0.9628, 0.1948, -0.7527, 0.1923, 0.7208],
                [1.7671, -0.4707, -0.0428, 0.3713, -0.2613, -0.5318, -0.4596, 0.0779, -0.0258]]
    torch.testing.assert_close(made, torch.tensor(expected), atol=1e-3, rtol=1e-3)


# ---- the official file ---------------------------------------------------------------------------

@pytest.mark.parametrize("trained_only", [False, True])
@pytest.mark.parametrize("order", [list, reversed])
def test_the_averaged_weights_are_taken_in_the_order_of_the_file(tmp_path, trained_only, order):
    """Of all parameters, or of the trained ones; what has no average is the weight itself."""
    weights, average = save_official(tmp_path / "file.pt", trained_only, order)
    checkpoint = open_tiny(tmp_path / "file.pt")
    state = checkpoint.net.unet.state_dict()
    assert checkpoint.step == 7 and state.keys() == weights.keys()
    for name, value in (weights | average).items():
        assert torch.equal(state[name], value), name


def test_without_the_file_one_sentence_says_where_it_is(tmp_path, official, capsys):
    """Missing, damaged, foreign, incomplete: one sentence, exit status 2, nothing written."""
    state = torch.load(official, weights_only=True)
    torch.save({"weights": state["model"]}, tmp_path / "foreign.pt")
    save_official(tmp_path / "short.pt", trained_only=True)
    short = torch.load(tmp_path / "short.pt", weights_only=True)
    torch.save(short | {"ema_weights": short["ema_weights"][:-1]}, tmp_path / "short.pt")
    fewer = dict(list(state["model"].items())[1:])
    torch.save(state | {"model": fewer}, tmp_path / "incomplete.pt")
    (tmp_path / "damaged.pt").write_bytes(official.read_bytes()[:1000])
    (tmp_path / "text.pt").write_text("words")
    task = "--task", "unconditional", "--output", str(tmp_path / "out.wav"), *SHORT
    before = set(tmp_path.iterdir())
    for name in ("missing", "foreign", "short", "incomplete", "damaged", "text"):
        path = str(tmp_path / f"{name}.pt")
        message = refused(capsys, *task, "--pretrained", path)
        assert path in message and cqtdiff.URL in message
        assert ("124 MB" in message) == (name == "missing")
    for flags in (("--model", "waveform"), ("--checkpoint", "model.pt")):
        message = refused(capsys, *task, "--pretrained", str(official), *flags)
        assert "leave them out" in message
    assert set(tmp_path.iterdir()) == before


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as end:
        run(lambda: cqtdiff.main(list(flags)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_help_needs_no_file(capsys):
    for words in (["--help"], ["evaluate", "--help"]):
        with pytest.raises(SystemExit) as end:
            cqtdiff.main(words)
        shown = capsys.readouterr().out
        assert end.value.code == 0 and "--pretrained" in shown and "--window" in shown
        assert ("--data" in shown) == (words[0] == "evaluate")


# ---- between 44.1 kHz stereo and 22.05 kHz mono --------------------------------------------------

def tone(hertz, rate, n=16384):
    at = torch.arange(n, dtype=torch.float64) / rate
    return torch.sin(2 * math.pi * hertz * at).float()[None, None]


def test_real_audio_comes_back_as_mono_below_9_khz():
    coder, middle = cqtdiff.Autoencoder(0.2), slice(2000, -2000)
    stereo = torch.cat([tone(440, SAMPLE_RATE), tone(5000, SAMPLE_RATE)], dim=1)
    x = coder.encode(stereo[..., :-1])
    assert x.shape == (1, 1, 8192) and x.std() * 0.2 == pytest.approx(0.5, rel=0.01)
    made, mono = coder.decode(x), stereo.mean(1)[0, middle]
    assert made.shape == (1, 2, 16384) and torch.equal(made[:, 0], made[:, 1])
    torch.testing.assert_close(made[0, 0, middle], mono, atol=1e-3, rtol=0)
    for hertz, kept in ((8000, 1.0), (10900, 0.0)):
        made = coder.decode(tone(hertz, RATE) / 0.2)[..., middle]
        assert made.square().mean().sqrt() * 2**0.5 == pytest.approx(kept, abs=5e-3), hertz


def test_the_encoder_reaches_no_further_than_is_said():
    audio = torch.zeros(1, 2, 2000)
    audio[..., 1000] = math.nan
    wrong = 2 * cqtdiff.Autoencoder(1.0).encode(audio)[0, 0].isnan().nonzero()
    assert wrong.min() >= 1000 - cqtdiff.Autoencoder.encoder_field
    assert wrong.max() <= 1000 + cqtdiff.Autoencoder.encoder_field


# ---- whole commands ------------------------------------------------------------------------------

def edit(official, tmp_path, track, *flags):
    """Two steps of the example's command on audio (n, channels) at 44.1 kHz: what it wrote."""
    sf.write(tmp_path / "in.wav", track, SAMPLE_RATE, subtype="FLOAT")
    cqtdiff.main(["--pretrained", str(official), "--input", str(tmp_path / "in.wav"), "--force",
                  "--output", str(tmp_path / "out.wav"), "--device", "cpu", *SHORT, *flags])
    return sf.read(tmp_path / "out.wav", always_2d=True)[0]


@pytest.mark.parametrize("flags, a, b", [
    (("--task", "infill", "--start", "0.15", "--end", "0.25"), 0.15, 0.25),
    (("--task", "continuation", "--start", "0.3", "--context", "0.3", "--length", "0.1"),
     0.3, 0.4)],
    ids=["infill", "continuation"])
def test_an_edit_is_new_inside_and_the_inputs_own_outside(official, tmp_path, capsys, flags, a, b):
    """Outside the region and its fades all bits are the input's; inside is new audio, which has the
    context's balance; and noise in place of the region changes nothing."""
    n, fade = round(0.4 * SAMPLE_RATE), math.ceil(0.03 * SAMPLE_RATE)
    track = sf.read(ROOT / "examples" / "clip.wav", always_2d=True)[0][SAMPLE_RATE:][:n]
    after = edit(official, tmp_path, track, *flags)
    assert "trained for 7 steps" in capsys.readouterr().out
    a, b = round(a * SAMPLE_RATE), round(b * SAMPLE_RATE)
    assert after.shape == (n, 2) and np.isfinite(after).all()
    assert np.array_equal(after[:a - fade], track[:a - fade])
    assert np.array_equal(after[b + 2 + fade:], track[b + 2 + fade:])
    assert np.isclose(after[a:b], track[a:b]).mean() < 0.05
    assert np.corrcoef(after[a:b].T)[0, 1] > 0.9, "one channel of new audio, spread over two"
    track[a:b] = 0.5 * np.random.default_rng(1).uniform(-1, 1, (b - a, 2))
    assert np.array_equal(edit(official, tmp_path, track, *flags), after)


def test_long_edits_go_window_by_window(official, tmp_path, monkeypatch):
    """However long, the network gets at most --window seconds, and two transforms are kept."""
    lengths, forward = [], cqtdiff.UNet.forward

    def counted(unet, audio, level):
        lengths.append(audio.shape[-1])
        return forward(unet, audio, level)

    monkeypatch.setattr(cqtdiff.UNet, "forward", counted)
    track = sf.read(ROOT / "examples" / "clip.wav", always_2d=True)[0][:SAMPLE_RATE // 2]
    flags = "--task", "continuation", "--length", "0.7", "--context", "0.2"
    made = edit(official, tmp_path, track, *flags)
    assert len(made) == round(1.2 * SAMPLE_RATE) and len(lengths) >= 3 * 2
    assert max(lengths) <= 8832
    for n in range(3):
        cqtdiff.constant_q(SHORTEST + n, torch.device("cpu"))
    assert cqtdiff.constant_q.cache_info().currsize <= 2


def test_recomputed_blocks_save_memory_and_change_nothing(official):
    """Of a guided step less than half as much is kept for the gradient, which is the same."""
    x_t, y = normal(1, 1, 8832), normal(1, 1, 8832, seed=1)
    task, t = tasks.infill(y, 3000, 3000, x_t), torch.tensor(0.5, dtype=torch.float64)
    found = []
    for recompute in (False, True):
        net, kept = open_tiny(official, recompute=recompute).net, []

        def pack(tensor):
            kept.append(tensor.numel() * tensor.element_size())
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            x0_hat, gradient = guidance.guided_estimate(net, x_t, t, task.terms)
        found.append((x0_hat, gradient, sum(kept)))
    (x0_hat, gradient, plain), (*again, less) = found
    assert torch.equal(again[0], x0_hat) and gradient.abs().max() > 0
    torch.testing.assert_close(again[1], gradient, atol=1e-6, rtol=1e-4)
    assert less < plain / 2


@pytest.fixture(scope="module")
def listener(tmp_path_factory):
    path = tmp_path_factory.mktemp("listener") / "classifier.pt"
    torch.manual_seed(1)
    net = tasks.PaSST(tasks.PASST_PRESETS["tiny"])
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    save_checkpoint(path, "classifier", net, classes=list("abcdefghi"))
    return path


def test_guidance_by_example_joins_an_infill(official, listener, tmp_path):
    track = sf.read(ROOT / "examples" / "clip.wav", always_2d=True)[0][:round(0.4 * SAMPLE_RATE)]
    flags = "--task", "infill", "--start", "0.15", "--end", "0.25", "--no-equalise"
    plain = edit(official, tmp_path, track, *flags)
    guided = edit(official, tmp_path, track, *flags, "--recompute", "--reference",
                  str(ROOT / "examples" / "other.flac"), "--classifier", str(listener))
    assert np.isfinite(guided).all() and not np.array_equal(guided, plain)


# ---- its row of Table 1 --------------------------------------------------------------------------

@pytest.mark.parametrize("sampler, names", [
    ("ddpm", ["CQTDiff (trained on piano), DDPM 2", "CQTDiff's ceiling"]),
    ("ddim", ["CQTDiff (trained on piano), DDIM 2", "CQTDiff's ceiling"]),
    ("none", ["CQTDiff's ceiling"])])
def test_a_row_of_table_1_is_spliced_into_the_originals(official, sampler, names):
    """Outside the region and its fades a row is the original, both channels and all frequencies;
    the ceiling has the coded original in the region."""
    checkpoint = open_tiny(official)
    unset = dict.fromkeys(("xi", "k", "precision", "equalise", "level"))
    o = SimpleNamespace(sampler=[sampler], tasks=["infill"], steps=[2], as_printed=False, given={},
                        **unset)
    rows = cqtdiff.table_rows(checkpoint, SimpleNamespace(passt=None), o)[:len(names)]
    assert [row.name for row in rows] == names
    o.level = 0.2
    again = cqtdiff.table_rows(checkpoint, SimpleNamespace(passt=None), o)
    assert all(row.facts != other.facts for row, other in zip(rows, again))
    window, fade = checkpoint.window * checkpoint.hop, round(0.03 * SAMPLE_RATE)
    x, span = 0.1 * normal(2, 2, window), evaluate.layout(window, checkpoint.hop)["infill"]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    for row in rows:
        with torch.no_grad():
            made = row.make(evaluate.Batch("infill", span, x, None, generators))
        a, b = span.a, span.b
        assert made.shape == x.shape and torch.equal(made[..., :a - fade], x[..., :a - fade])
        assert torch.equal(made[..., b + fade:], x[..., b + fade:])
        assert not torch.equal(made[..., a:b], x[..., a:b])
    assert torch.equal(made[..., a:b], checkpoint.decode(checkpoint.encode(x))[..., a:b])


def test_evaluate_prints_its_row_beside_its_ceiling(official, listener, tmp_path, capsys):
    """The whole command; its file of results does not lie where the shipped model's does."""
    for folder, count in (("test", 2), ("train", 5)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            noise = np.random.default_rng([i, count]).standard_normal((SAMPLE_RATE // 2, 2))
            sf.write(tmp_path / folder / f"{i}.wav", 0.1 * noise, SAMPLE_RATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        cqtdiff.main(["evaluate", "--data", "test", "--reference", "train", "--tasks", "infill",
                      "--classifier", str(listener), "--device", "cpu", "--level", "0.1",
                      "--pretrained", str(official), *SHORT])
    table = json.loads((tmp_path / "runs/evaluate-cqt_weights/table.json").read_text())
    rows = {name: row["infill"] for name, row in table["rows"].items()}
    name = "CQTDiff (trained on piano), DDPM 2, level 0.1"
    assert list(rows)[:3] == [name, "CQTDiff's ceiling", "Test set"]
    assert name in capsys.readouterr().out
    MR = {name: row["MR"][0] for name, row in rows.items()}
    assert 0 == MR["Test set"] < MR["CQTDiff's ceiling"] < MR["Silence"]
