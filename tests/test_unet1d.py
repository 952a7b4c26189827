"""unet1d.py: fold and unfold against their definitions, sizes, and that the U-Net is sound and learns a clip."""
import math
from dataclasses import replace

import pytest
import torch

import unet1d
from diffusion import v_loss
from unet1d import CHANNELS, FRAME, HOP, PRESETS, UNet1D, fold, hamming, unfold

TINY = PRESETS["tiny"]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def trained_looking(config, seed=0):
    """A model whose zero-initialised layers are random too, so that every part of it reaches the output."""
    torch.manual_seed(seed)
    model = UNet1D(config)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model.requires_grad_(False)


@pytest.mark.parametrize("n", [1, 7, 16, 17, 1003, 4096])
def test_unfold_undoes_fold(n, generator):
    """unfold(fold(x)) == x to 1e-6, whether or not the hop divides the length, up to the very edges."""
    x = torch.randn(3, 2, n, generator=generator)
    assert fold(x).shape == (3, CHANNELS, math.ceil(n / HOP))
    assert (unfold(fold(x), n) - x).abs().max() < 1e-6


def test_fold_places_each_sample():
    """Channel 32 c + j of frame k is sample 16 k - 8 + j of stereo channel c, 0 outside the clip."""
    n = 100
    x = torch.arange(1.0, 2 * n + 1).reshape(1, 2, n)
    frames = fold(x)
    for c in range(2):
        for k in range(frames.shape[-1]):
            for j in range(FRAME):
                i = HOP * k - 8 + j
                assert frames[0, FRAME * c + j, k] == (x[0, c, i] if 0 <= i < n else 0)


def test_window_overlaps_to_a_constant():
    """The window and its shift by a hop add up to 1.08 everywhere, which the symmetric window does not."""
    assert torch.allclose(hamming()[:HOP] + hamming()[HOP:], torch.full((HOP,), 1.08), atol=1e-6)
    symmetric = torch.hamming_window(FRAME, periodic=False)
    assert (symmetric[:HOP] + symmetric[HOP:] - 1.08).abs().max() > 1e-3


def test_unfold_weights_frames_by_the_window():
    """A single frame of ones among zeros unfolds to the Hamming window over 1.08: linear, and where it should be."""
    frames = torch.zeros(1, CHANNELS, 8)
    frames[0, FRAME:, 3] = 1
    audio = unfold(frames, 128)
    assert audio[0, 0].abs().max() == 0
    assert torch.allclose(audio[0, 1, 40:72], hamming() / 1.08, atol=1e-6)
    assert audio[0, 1, :40].abs().max() == 0 and audio[0, 1, 72:].abs().max() == 0


def test_paper_preset_has_the_papers_size():
    """2^19 stereo samples fold to 64 x 32768; 430-450M parameters; the other presets are small."""
    with torch.device("meta"):
        assert fold(torch.empty(1, 2, 2**19)).shape == (1, 64, 32768)
        counts = {name: sum(p.numel() for p in UNet1D(config).parameters()) for name, config in PRESETS.items()}
    assert 430e6 < counts["paper"] < 450e6
    assert 3e6 < counts["small"] < 5e6
    assert counts["tiny"] < 0.3e6


def test_output_starts_at_zero():
    """Before training v = 0, so that the first loss is E v^2 = 1."""
    assert UNet1D(TINY)(torch.randn(1, 2, 512), torch.ones(1)).abs().max() == 0


@pytest.mark.parametrize("n", [1, 15, 33, 1000, TINY.samples])
def test_any_length_up_to_the_window(n, generator):
    """Output has the input's length, whatever the levels need."""
    x_t = torch.randn(1, 2, n, generator=generator)
    v = trained_looking(TINY)(x_t, torch.tensor([0.5]))
    assert v.shape == x_t.shape and v.isfinite().all() and v.std() > 0


def test_too_long_a_clip_is_refused():
    """One sample more than the window is a ValueError that names both lengths."""
    with pytest.raises(ValueError, match=f"{TINY.samples + 1} samples.*window of {TINY.samples}"):
        UNet1D(TINY)(torch.zeros(1, 2, TINY.samples + 1), torch.ones(1))


def test_clips_of_a_batch_do_not_mix(generator):
    """A clip with its own t gives the same v alone and beside others."""
    model = trained_looking(TINY)
    x_t, t = torch.randn(3, 2, 1000, generator=generator), torch.tensor([0.1, 0.5, 0.9])
    together = model(x_t, t)
    alone = torch.cat([model(x_t[i:i + 1], t[i:i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert (model(x_t, t.flip(0)) - together).abs().max() > 1e-3


def test_input_gradient_matches_finite_differences(generator):
    """The gradient that guidance takes, of v with respect to x_t, against a central difference along a random line."""
    model, t = trained_looking(TINY).double(), torch.tensor([0.3])
    x_t, d = torch.randn(2, 1, 2, 300, generator=generator, dtype=torch.float64)
    w = torch.randn(1, 2, 300, generator=generator, dtype=torch.float64)
    x_t.requires_grad_(True)
    gradient, = torch.autograd.grad((w * model(x_t, t)).sum(), x_t)
    with torch.no_grad():
        difference = ((w * model(x_t + 1e-3 * d, t)).sum() - (w * model(x_t - 1e-3 * d, t)).sum()) / 2e-3
    assert abs((gradient * d).sum() - difference) < 1e-4 * difference.abs()


def test_checkpointing_changes_nothing(generator):
    """config.checkpointing recomputes activations: the same values, parameter and input gradients, to the bit."""
    x, t, results = torch.randn(1, 2, 700, generator=generator), torch.tensor([0.4]), []
    calls = []
    for flag in (False, True):
        model = trained_looking(replace(TINY, checkpointing=flag)).requires_grad_(True)
        model.middle[0].residual.conv1.register_forward_hook(lambda *_: calls.append(flag))
        x_t = x.clone().requires_grad_(True)
        v = model(x_t, t)
        v.square().sum().backward()
        results.append([v.detach(), x_t.grad, *[p.grad for p in model.parameters()]])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*results))
    assert calls == [False, True, True]                                    # and it did recompute


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_half_precision_agrees(dtype, tolerance, generator):
    """v under autocast is float32 and within the type's rounding of the fp32 forward."""
    model, x_t, t = trained_looking(TINY), torch.randn(2, 2, 1000, generator=generator), torch.tensor([0.2, 0.8])
    v = model(x_t, t)
    with torch.autocast("cpu", dtype):
        half = model(x_t, t)
    assert half.dtype == torch.float32
    assert 0 < (half - v).norm() / v.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_silence_and_full_scale_noise_stay_finite(dtype, generator):
    """Digital silence and full-scale noise of quiet training audio (scale 0.05): v and its gradient are finite."""
    model = trained_looking(TINY)
    for audio in (torch.zeros(1, 2, 2048), torch.randn(1, 2, 2048, generator=generator).sign()):
        x_t = (audio / 0.05).requires_grad_(True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            v = model(x_t, torch.tensor([0.5]))
        gradient, = torch.autograd.grad(v.sum(), x_t)
        assert v.isfinite().all() and gradient.isfinite().all()


def test_scale_travels_with_the_weights():
    """The training audio's standard deviation is part of the state dict; the constant basis is not."""
    model = UNet1D(TINY)
    assert model.scale == 1
    state = model.state_dict()
    state["scale"] = torch.tensor(0.15)
    model.load_state_dict(state)
    assert model.scale == torch.tensor(0.15) and "basis" not in state


def test_attention_equals_its_definition(generator):
    """softmax(q k^T / sqrt(d)) v of each head, over the normalised input, added to the input."""
    torch.manual_seed(0)
    attention, h = unet1d.Attention(48, head_width=24, groups=8), torch.randn(2, 48, 20, generator=generator)
    torch.nn.init.normal_(attention.out.weight)
    q, k, v = attention.qkv(attention.norm(h)).chunk(3, dim=1)              # (B, 48, K)
    heads = []
    for d in (slice(0, 24), slice(24, 48)):
        weights = torch.softmax(torch.einsum("bdi,bdj->bij", q[:, d], k[:, d]) / math.sqrt(24), dim=-1)
        heads.append(torch.einsum("bij,bdj->bdi", weights, v[:, d]))
    assert torch.allclose(attention(h), h + attention.out(torch.cat(heads, dim=1)), atol=1e-4)


def test_attention_is_on_the_lowest_levels_and_reaches_the_output(generator):
    """`attention` levels from the bottom attend, each of their stages; silencing one of these changes v."""
    model = trained_looking(replace(TINY, multipliers=(1, 1, 1), attention=2))
    attends = [isinstance(s.attention, unet1d.Attention) for stages in [*model.down, *model.up] for s in stages]
    assert attends == [False, True, True, True, True, True, True, False, False]
    x_t, t = torch.randn(1, 2, 1000, generator=generator), torch.tensor([0.5])
    v = model(x_t, t)
    model.up[0][0].attention.out.weight.zero_()
    assert (model(x_t, t) - v).abs().max() > 1e-6


def test_learns_one_clip():
    """350 updates on 2048 samples of two chords: v-loss over all t below a quarter of the 1.0 of predicting zero."""
    torch.manual_seed(0)
    n, updates = 2048, 350
    time = torch.arange(n) / unet1d.SAMPLE_RATE
    chords = [[220.0, 277.2, 329.6], [220.0, 261.6, 392.0]]
    x_0 = torch.stack([sum(torch.sin(2 * math.pi * f * time) for f in chord) for chord in chords])[None]
    x_0 = x_0 / x_0.std()
    model = UNet1D(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=updates + 1)
    for _ in range(updates):
        t = (torch.rand(1, dtype=torch.float64) + torch.arange(8) / 8) % 1
        loss = v_loss(model, x_0.expand(8, -1, -1), t, torch.randn(8, 2, n)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    t = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    with torch.no_grad():
        assert v_loss(model, x_0.expand(16, -1, -1), t, torch.randn(16, 2, n)).mean() < 0.25
