"""unet1d.py: fold and unfold against their definitions, sizes, and that the U-Net is sound and learns a clip."""
import math
from dataclasses import replace

import pytest
import torch

import unet1d
from diffusion import add_noise, alpha_sigma, v_loss
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
    """The window and its shift by a hop add up to 1.08 everywhere."""
    assert torch.allclose(hamming()[:HOP] + hamming()[HOP:], torch.full((HOP,), 1.08), atol=1e-6)


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
    """Before training, and with no spectrum measured, v = 0, so that the first loss is E v^2 = 1."""
    assert UNet1D(TINY)(torch.randn(1, 2, 512), torch.ones(1)).abs().max() == 0


@pytest.mark.parametrize("t", [0.03, 0.5, 1.0])
def test_preconditioning_is_optimal_for_gaussian_coefficients(t, generator):
    """Of Gaussians of any deviation s: c_in x_t has variance 1, v - c_skip x_t deviation c_out and nothing of x_t."""
    model = UNet1D(TINY)
    model.spectrum.copy_(torch.logspace(-2, 1, CHANNELS))
    x_0 = model.spectrum[:, None] * torch.randn(CHANNELS, 20000, generator=generator)
    eps = torch.randn(CHANNELS, 20000, generator=generator)
    x_t, v_t = add_noise(x_0, eps, t)
    c_skip, c_in, c_out = (c[0] for c in model.preconditioning(torch.tensor([t])))
    rest = v_t - c_skip * x_t
    assert ((c_in * x_t).std(1) - 1).abs().max() < 0.03
    assert (rest.std(1, keepdim=True) / c_out - 1).abs().max() < 0.03
    assert (rest / c_out * c_in * x_t).mean(1).abs().max() < 0.03


def test_v_is_the_gaussian_estimate_before_training():
    """With a spectrum, v before training is c_skip x_t in each coefficient: x_t = a cosine of one is scaled by it."""
    model, t = UNet1D(TINY), torch.tensor([0.4])
    model.set_spectrum(torch.linspace(3, 0.1, CHANNELS))
    x_t = torch.ones(1, 2, 512)                             # mid, coefficient 0: deviation 3 / scale
    s = 3 / torch.linspace(3, 0.1, CHANNELS).square().mean().sqrt()
    alpha_t, sigma_t = alpha_sigma(0.4)
    expected = alpha_t * sigma_t * (1 - s**2) / (alpha_t**2 * s**2 + sigma_t**2)
    assert torch.allclose(model(x_t, t)[..., 64:-64], expected.float().expand(1, 2, 384), atol=1e-5)


def test_errors_weigh_by_what_is_expected_of_their_coefficient(generator):
    """With no spectrum the loss is the plain one; else a coefficient's squared error is divided by its c_out."""
    model, error, t = UNet1D(TINY), torch.randn(1, 2, 2**14, generator=generator), torch.tensor([0.5])
    assert abs(model.weigh(error, t).square().mean() / error.square().mean() - 1) < 0.02
    model.set_spectrum(torch.logspace(0, -2, CHANNELS))
    power, c_out = model.weigh(error, t).square().mean(-1)[0], model.preconditioning(t)[2][0, :, 0]
    assert ((power * c_out - 1).abs() < 0.2).all() and power[-1] > 25 * power[0]


def test_a_spectrum_can_be_set_on_any_device():
    """From deviations on the CPU, as training measures them; "meta" stands for a GPU."""
    UNet1D(TINY).to("meta").set_spectrum(torch.ones(CHANNELS))


def test_mono_music_has_a_finite_loss(generator):
    """Its sides have no difference, so that half of the deviations are 0."""
    model, error = UNet1D(TINY), torch.randn(1, 2, 512, generator=generator)
    model.set_spectrum(torch.cat([torch.ones(CHANNELS // 2), torch.zeros(CHANNELS // 2)]))
    assert model.weigh(error, torch.tensor([0.5])).isfinite().all() and model(error, torch.tensor([1.0])).isfinite().all()


def test_coefficients_are_orthonormal_and_exact_in_half_precision(generator):
    """Energy is kept, a mono clip has no side, and autocast leaves them as they are: no hiss from the loud lows."""
    model, x = UNet1D(TINY), torch.randn(2, 2, 512, generator=generator)
    c = model.coefficients(x)
    assert torch.allclose(c.square().sum(1), fold(x).square().sum(1), rtol=1e-5)
    assert model.coefficients(x[:, :1].expand(-1, 2, -1))[:, FRAME:].abs().max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.coefficients(x), c)


def test_every_parameter_reaches_v(generator):
    """No layer is left out: v has a gradient for each tensor of a trained model."""
    model = trained_looking(TINY).requires_grad_(True)
    model(torch.randn(2, 2, 1000, generator=generator), torch.tensor([0.2, 0.9])).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


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


def test_scale_and_spectrum_travel_with_the_weights(generator):
    """What was measured of the training audio is part of the state dict; the constant basis is not."""
    x = 0.15 * torch.randn(4, 2, 2**14, generator=generator)
    one, two = UNet1D(TINY), UNet1D(TINY)
    assert one.scale == 1
    one.set_spectrum(one.coefficients(x).std((0, 2)))
    assert abs(one.scale - 0.15) < 0.002 and (one.spectrum - 1).abs().max() < 0.1
    two.load_state_dict(one.state_dict())
    assert two.scale == one.scale and torch.equal(two.spectrum, one.spectrum) and "basis" not in one.state_dict()


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
    """300 updates on 512 samples of two chords: v-loss over all t below a quarter of the 1.0 of predicting zero."""
    torch.manual_seed(0)
    n, updates = 512, 300
    time = torch.arange(n) / 44100
    chords = [[220.0, 277.2, 329.6], [220.0, 261.6, 392.0]]
    x_0 = torch.stack([sum(torch.sin(2 * math.pi * f * time) for f in chord) for chord in chords])[None]
    x_0 = x_0 / x_0.std()
    model = UNet1D(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.99), weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=updates + 1)
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
