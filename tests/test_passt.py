"""The resampler and PaSST (tasks.py): operators that listen."""
import math

import pytest
import torch

from tasks import PASST_FILE, PASST_PRESETS, PaSST, drop_patches, load_official, resample


def tone(frequency, rate, seconds=1.0):
    t = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    return torch.sin(2 * math.pi * frequency * t)


def tiny(seed=0):
    torch.manual_seed(seed)
    net = PaSST(PASST_PRESETS["tiny"]).eval()
    for p in net.parameters():                             # as initialised, tokens hardly differ
        torch.nn.init.normal_(p, std=0.2)
    return net


@pytest.mark.parametrize("rates", [
    (44100, 32000), (44100, 16000), (48000, 44100), (22050, 44100), (11127, 44100)])
def test_resampled_tone_is_the_tone_at_the_new_rate(rates):
    """A 1 kHz sine sampled at one rate becomes the same sine sampled at the other, in place and to
    -100 dB."""
    y = resample(tone(1000, rates[0]), *rates)
    assert y.shape == (rates[1],)
    inner = slice(rates[1] // 8, -rates[1] // 8)
    torch.testing.assert_close(y[inner], tone(1000, rates[1])[inner], atol=1e-5, rtol=0)


def test_what_the_new_rate_cannot_hold_is_removed():
    """A sine at 0.5625 of the new rate would alias; -80 dB of it are left, while 0.40 passes
    unchanged."""
    inner = slice(4000, -4000)
    assert resample(tone(0.5625 * 16000, 44100), 44100, 16000)[inner].abs().max() < 1e-4
    kept = resample(tone(6400, 44100), 44100, 16000)
    torch.testing.assert_close(kept[inner], tone(6400, 16000)[inner], atol=1e-4, rtol=0)


def test_resampling_keeps_leading_axes_and_rows_apart():
    """(B, C, n) gives (B, C, ceil(n out / in)), each row as if it were alone."""
    x = torch.randn(3, 2, 1001, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = resample(x, 44100, 32000)
    assert y.shape == (3, 2, 727)
    torch.testing.assert_close(y[1, 1], resample(x[1, 1], 44100, 32000), atol=1e-12, rtol=0)
    assert resample(x, 44100, 44100) is x


def test_blocks_of_phases_join_without_a_seam():
    """3 -> 1000 has more phases than one block holds; the result is what the sinc series says,
    sample by sample."""
    x = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = resample(x, 3, 1000)
    at = torch.arange(0, len(y), 37)                       # no divisor of 160 or 1000
    d = 0.945 * (at[:, None].double() * 3 / 1000 - torch.arange(400))
    window = torch.i0(12 * (1 - (d / 48) ** 2).clamp(min=0).sqrt())
    window = window / torch.i0(torch.tensor(12.0, dtype=torch.float64))
    expected = (0.945 * torch.sinc(d) * window * (d.abs() < 48)) @ x
    torch.testing.assert_close(y[at], expected, atol=1e-9, rtol=0)


def test_gradient_of_the_resampler_is_its_adjoint():
    """<resample(x), y> = <x, gradient>: the operator is linear, and autograd gives its transpose.
    """
    g = torch.Generator().manual_seed(2)
    x = torch.randn(500, dtype=torch.float64, generator=g, requires_grad=True)
    y = torch.randn(363, dtype=torch.float64, generator=g)
    gradient, = torch.autograd.grad(resample(x, 44100, 32000), x, y)
    w = torch.randn(500, dtype=torch.float64, generator=g)
    torch.testing.assert_close(resample(w, 44100, 32000) @ y, w @ gradient, atol=1e-9, rtol=0)


def test_paper_preset_has_the_official_tensors():
    """159 tensors, 86,153,758 numbers, among them the names and shapes of the official checkpoint.
    """
    with torch.device("meta"):
        state = PaSST(PASST_PRESETS["paper"]).state_dict()
    assert len(state) == 159 and sum(tensor.numel() for tensor in state.values()) == 86_153_758
    expected = {
        "time_new_pos_embed": (1, 768, 1, 99),
        "freq_new_pos_embed": (1, 768, 12, 1),
        "new_pos_embed": (1, 2, 768),
        "patch_embed.proj.weight": (768, 1, 16, 16),
        "blocks.11.attn.qkv.weight": (2304, 768),
        "blocks.0.mlp.fc2.bias": (768,),
        "head.0.weight": (768,),
        "head.1.weight": (527, 768),
        "head_dist.bias": (527,),
    }
    assert {key: tuple(state[key].shape) for key in expected} == expected


def test_small_preset_is_small():
    """About two million parameters."""
    assert 1.5e6 < sum(p.numel() for p in PaSST(PASST_PRESETS["small"]).parameters()) < 2.6e6


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state}])
def test_official_file_loads_flat_or_nested(tmp_path, wrap):
    """Both forms of the file give the network that was saved, frozen and in evaluation mode."""
    net, path = tiny(), tmp_path / "passt.pt"
    torch.save(wrap(net.state_dict()), path)
    loaded = load_official(PaSST(PASST_PRESETS["tiny"]), path, PASST_FILE)
    mel = torch.randn(1, 128, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(mel)[1], net(mel)[1])
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("damage", [
    "missing", "truncated", "text", "list", "one tensor less", "one tensor more", "other size"])
def test_unusable_official_file_ends_in_a_sentence(tmp_path, damage):
    """The sentence names the file, and where the right one is published."""
    path, state = tmp_path / "passt.pt", tiny().state_dict()
    if damage == "one tensor less":
        del state["head_dist.bias"]
    elif damage == "one tensor more":
        state["pos_embed"] = torch.zeros(1)
    elif damage == "other size":
        state = PaSST(PASST_PRESETS["small"]).state_dict()
    if damage == "text":
        path.write_text("not a checkpoint")
    elif damage != "missing":
        torch.save([1, 2] if damage == "list" else state, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    wanted = r"passt\.pt .*passt-s-f128-p16-s10-ap\.476-swa\.pt.*v0\.0\.1-audioset"
    with pytest.raises(ValueError, match=wanted):
        load_official(PaSST(PASST_PRESETS["tiny"]), path, PASST_FILE)


def test_mel_of_silence_and_its_length():
    """Silence is (ln 1e-5 + 4.5) / 5 in every band; 10 s of 32 kHz are 1000 frames."""
    mel = tiny().mel(torch.zeros(1, 320_000))
    assert mel.shape == (1, 128, 1000)
    torch.testing.assert_close(mel, torch.full_like(mel, (math.log(1e-5) + 4.5) / 5))


def test_nothing_is_heard_in_half_precision():
    """Under autocast the resampler, the front end and the network as it listens give the same
    float32 numbers."""
    x, net = torch.randn(1, 2, 8000, generator=torch.Generator().manual_seed(0)), tiny()

    def heard():
        return resample(x, 44100, 32000), net.mel(x[:, 0]), *net.listen(x, 44100)

    with torch.autocast("cpu", torch.bfloat16):
        inside = heard()
    assert all(map(torch.equal, inside, heard()))


def test_patchout_drops_whole_rows_and_columns():
    """Of patches numbered by row and column, what is left is a full grid of the rows and columns
    kept."""
    rows, columns = 8, 20
    grid = (100.0 * torch.arange(rows)[:, None] + torch.arange(columns)).expand(4, 1, rows, columns)
    kept = drop_patches(grid, 12, 3, [torch.Generator().manual_seed(i) for i in range(4)])
    assert kept.shape == (4, 1, 5, 8)
    for clip in kept[:, 0]:
        row, column = clip // 100, clip % 100
        assert (row == row[:, :1]).all() and (column == column[:1]).all()
        assert len(row[:, 0].unique()) == 5 and len(column[0].unique()) == 8
    assert not torch.equal(kept[0], kept[1])               # each clip draws its own


def test_patchout_of_a_clip_does_not_depend_on_its_batch():
    """With a generator per clip, a clip alone gives what it gives among others; and patchout
    changes the result."""
    net, mel = tiny(), torch.randn(3, 128, 200, generator=torch.Generator().manual_seed(3))
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    together, _ = net(mel, generators, (5, 3))
    alone, _ = net(mel[2:], [torch.Generator().manual_seed(2)], (5, 3))
    torch.testing.assert_close(together[2:], alone)
    assert not torch.allclose(alone, net(mel[2:])[0])


def test_listening_beyond_ten_seconds_is_the_mean_of_its_windows():
    """12 s are heard as two windows of 6 s."""
    net = tiny()
    audio = torch.randn(1, 2, 12 * 32000, generator=torch.Generator().manual_seed(4)) / 10
    mel = net.mel(audio.mean(1))
    halves = [net(half)[1] for half in mel.chunk(2, -1)]
    torch.testing.assert_close(net.listen(audio, 32000)[1], sum(halves) / 2)


def test_listening_to_mono_stereo_short_and_silent_audio():
    """Mono equals two equal channels; half a tenth of a second and digital silence give finite
    embeddings."""
    net, audio = tiny(), torch.randn(1, 1, 22050, generator=torch.Generator().manual_seed(5)) / 10
    stereo = audio.expand(-1, 2, -1)
    torch.testing.assert_close(net.listen(audio, 44100)[1], net.listen(stereo, 44100)[1])
    assert net.listen(audio[..., :2205], 44100)[1].isfinite().all()
    assert net.listen(torch.zeros(1, 2, 44100), 44100)[1].isfinite().all()


def test_embedding_distance_has_the_gradient_that_finite_differences_show():
    """From the waveform at 44.1 kHz, through resampler, front end and transformer, in float64."""
    net, g = tiny().double(), torch.Generator().manual_seed(6)
    audio = (torch.randn(1, 2, 8820, dtype=torch.float64, generator=g) / 10).requires_grad_()
    y = torch.randn(1, 32, dtype=torch.float64, generator=g)

    def distance(x):
        return torch.linalg.vector_norm(net.listen(x, 44100)[1] - y)

    gradient, = torch.autograd.grad(distance(audio), audio)
    for _ in range(3):
        direction = torch.randn(audio.shape, dtype=torch.float64, generator=g)
        h = 1e-6
        difference = (distance(audio + h * direction) - distance(audio - h * direction)) / (2 * h)
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-9)


def test_silence_has_a_finite_gradient():
    """Guidance may start from silence: the logarithm has its offset."""
    audio = torch.zeros(1, 2, 8820, requires_grad=True)
    tiny().listen(audio, 44100)[1].sum().backward()
    assert audio.grad.isfinite().all()


def test_all_trainable_parameters_get_a_gradient():
    """The second head of the official file is unused, and so not offered to the optimizer."""
    net = tiny()
    net(torch.randn(1, 128, 100, generator=torch.Generator().manual_seed(7)))[0].sum().backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not net.head_dist.weight.requires_grad
