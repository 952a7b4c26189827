"""unet1d.py: folding against its definition, sizes, preconditioning, soundness of the U-Net."""
import math
from dataclasses import replace

import pytest
import torch

import unet1d
from diffusion import add_noise, alpha_sigma, v_loss
from unet1d import CHANNELS, FRAME, HOP, PRESETS, UNet1D, fold, hamming, unfold

TINY = PRESETS["tiny"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def trained_looking(config):
    """A model whose zero-initialised layers are random too: every part of it reaches the output."""
    model = UNet1D(config)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model.requires_grad_(False)


# ---- Fold and unfold ----------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 7, 16, 17, 1003, 4096])
def test_unfold_undoes_fold(n):
    """unfold(fold(x)) == x to 1e-6 up to the very edges, whether or not the hop divides n."""
    x = torch.randn(3, 2, n)
    assert fold(x).shape == (3, CHANNELS, math.ceil(n / HOP))
    assert (unfold(fold(x), n) - x).abs().max() < 1e-6


def test_fold_places_each_sample():
    """Channel 32 c + j of frame k is sample 16 k - 8 + j of channel c, 0 outside the clip."""
    n = 100
    x = torch.arange(1.0, 2 * n + 1).reshape(1, 2, n)
    frames = fold(x)
    for c in range(2):
        for k in range(frames.shape[-1]):
            for j in range(FRAME):
                i = HOP * k - 8 + j
                expected = x[0, c, i] if 0 <= i < n else 0
                assert frames[0, FRAME * c + j, k] == expected


def test_window_overlaps_to_a_constant():
    """The window and its shift by a hop add up to 1.08 everywhere."""
    overlapped = hamming()[:HOP] + hamming()[HOP:]
    assert torch.allclose(overlapped, torch.full((HOP,), 1.08), atol=1e-6)


def test_unfold_weights_frames_by_the_window():
    """A frame of ones among zeros unfolds to the Hamming window over 1.08, at its place."""
    frames = torch.zeros(1, CHANNELS, 8)
    frames[0, FRAME:, 3] = 1
    left, right = unfold(frames, 128)[0]
    assert (left == 0).all()
    assert (right[:40] == 0).all()
    assert torch.allclose(right[40:72], hamming() / 1.08, atol=1e-6)
    assert (right[72:] == 0).all()


# ---- Sizes --------------------------------------------------------------------------------------

def test_the_papers_window_folds_to_32768_frames():
    """2^19 stereo samples are 64 channels x 32768 frames."""
    assert fold(torch.empty(1, 2, 2**19, device="meta")).shape == (1, 64, 32768)


@pytest.mark.parametrize("size, least, most", [("paper", 430e6, 450e6), ("small", 3e6, 5e6),
                                               ("tiny", 0, 0.3e6)])
def test_presets_have_the_sizes_that_are_stated(size, least, most):
    """The paper's U-Net has 440M parameters, and ours are small."""
    with torch.device("meta"):
        model = UNet1D(PRESETS[size])
    assert least < sum(p.numel() for p in model.parameters()) < most


@pytest.mark.parametrize("n", [1, 15, 33, 1000, TINY.samples])
def test_any_length_up_to_the_window(n):
    """The output has the input's length, whatever the levels need."""
    x_t = torch.randn(1, 2, n)
    v = trained_looking(TINY)(x_t, torch.tensor([0.5]))
    assert v.shape == x_t.shape
    assert v.isfinite().all()
    assert v.std() > 0


def test_too_long_a_clip_is_refused():
    """One sample more than the window is a ValueError that names both lengths."""
    named = f"{TINY.samples + 1} samples.*window of {TINY.samples}"
    with pytest.raises(ValueError, match=named):
        UNet1D(TINY)(torch.zeros(1, 2, TINY.samples + 1), torch.ones(1))


# ---- Coefficients and preconditioning -----------------------------------------------------------

def test_output_starts_at_zero():
    """Before training, and with no spectrum measured, v = 0: the first loss is E v^2 = 1."""
    v = UNet1D(TINY)(torch.randn(1, 2, 512), torch.ones(1))
    assert v.abs().max() == 0


@pytest.mark.parametrize("t", [0.03, 0.5, 1.0])
def test_preconditioning_is_optimal_for_gaussian_coefficients(t):
    """For any deviation s, c_skip x_t is the mean of v given x_t, c_out the error's deviation."""
    model = UNet1D(TINY)
    model.spectrum.copy_(torch.logspace(-2, 1, CHANNELS))
    x_0 = model.spectrum[:, None] * torch.randn(CHANNELS, 20000)
    x_t, v_t = add_noise(x_0, torch.randn(CHANNELS, 20000), t)
    c_skip, c_in, c_out = model.preconditioning(torch.tensor([t]))  # (1, 64, 1) each
    network_in = c_in[0] * x_t
    network_out = (v_t - c_skip[0] * x_t) / c_out[0]
    assert (network_in.std(1) - 1).abs().max() < 0.03
    assert (network_out.std(1) - 1).abs().max() < 0.03
    # What is left for the network is not correlated with its input.
    assert (network_out * network_in).mean(1).abs().max() < 0.03


def test_v_is_the_gaussian_estimate_before_training():
    """With a spectrum, v before training is c_skip x_t; here x_t lies in one coefficient alone."""
    model = UNet1D(TINY)
    deviations = torch.linspace(3, 0.1, CHANNELS)
    model.set_spectrum(deviations)
    x_t = torch.ones(1, 2, 512)  # mid, coefficient 0
    v = model(x_t, torch.tensor([0.4]))
    s = deviations[0] / deviations.square().mean().sqrt()
    alpha_t, sigma_t = alpha_sigma(0.4)
    expected = alpha_t * sigma_t * (1 - s**2) / (alpha_t**2 * s**2 + sigma_t**2)
    inner = v[..., 64:-64]  # the outermost frames are not constant
    assert torch.allclose(inner, expected.float().expand_as(inner), atol=1e-5)


def test_errors_are_weighted_by_the_root_of_c_out():
    """Without a spectrum the loss is the plain one; else squared errors are divided by c_out."""
    model = UNet1D(TINY)
    error = torch.randn(1, 2, 2**14)
    t = torch.tensor([0.5])
    weighted = model.weigh(error, t)
    assert abs(weighted.square().mean() / error.square().mean() - 1) < 0.02

    model.set_spectrum(torch.logspace(0, -2, CHANNELS))
    power = model.weigh(error, t).square().mean(-1)[0]  # (64,)
    _, _, c_out = model.preconditioning(t)
    assert ((power * c_out[0, :, 0] - 1).abs() < 0.2).all()
    assert power[-1] > 25 * power[0]


def test_a_spectrum_can_be_set_on_any_device():
    """Deviations come from the CPU, where training measures them; "meta" stands for a GPU."""
    UNet1D(TINY).to("meta").set_spectrum(torch.ones(CHANNELS))


def test_mono_music_has_a_finite_loss():
    """Its side is silent: half of the deviations are 0."""
    model = UNet1D(TINY)
    x = torch.randn(1, 2, 512)
    half = CHANNELS // 2
    model.set_spectrum(torch.cat([torch.ones(half), torch.zeros(half)]))
    assert model.weigh(x, torch.tensor([0.5])).isfinite().all()
    assert model(x, torch.tensor([1.0])).isfinite().all()


def test_coefficients_are_orthonormal():
    """The energy of each frame is kept, and a mono clip has no side."""
    model = UNet1D(TINY)
    x = torch.randn(2, 2, 512)
    energy = model.coefficients(x).square().sum(1)
    assert torch.allclose(energy, fold(x).square().sum(1), rtol=1e-5)
    mono = x[:, :1].expand(-1, 2, -1)
    assert model.coefficients(mono)[:, FRAME:].abs().max() < 1e-5


def test_coefficients_are_exact_under_autocast():
    """They are computed in float32: rounding of loud low notes would be heard as hiss."""
    model = UNet1D(TINY)
    x = torch.randn(2, 2, 512)
    c = model.coefficients(x)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model.coefficients(x)
    # Compared out here: autocast would round both sides of the comparison.
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, c)


def test_scale_and_spectrum_travel_with_the_weights():
    """What was measured of the training audio is in the state dict; the constant basis is not."""
    measured = UNet1D(TINY)
    assert measured.scale == 1
    x = 0.15 * torch.randn(4, 2, 2**14)
    measured.set_spectrum(measured.coefficients(x).std((0, 2)))
    assert abs(measured.scale - 0.15) < 0.002
    assert (measured.spectrum - 1).abs().max() < 0.1

    weights = measured.state_dict()
    assert "basis" not in weights
    loaded = UNet1D(TINY)
    loaded.load_state_dict(weights)
    assert loaded.scale == measured.scale
    assert torch.equal(loaded.spectrum, measured.spectrum)


# ---- The network --------------------------------------------------------------------------------

def test_every_parameter_reaches_v():
    """No layer is left out: v has a gradient for each tensor of a trained model."""
    model = trained_looking(TINY).requires_grad_(True)
    model(torch.randn(2, 2, 1000), torch.tensor([0.2, 0.9])).square().sum().backward()
    left_out = []
    for name, p in model.named_parameters():
        if p.grad is None or not p.grad.any():
            left_out.append(name)
    assert left_out == []


def test_clips_of_a_batch_do_not_mix():
    """A clip with its own t gives the same v alone and in a batch with others."""
    model = trained_looking(TINY)
    x_t = torch.randn(3, 2, 1000)
    t = torch.tensor([0.1, 0.5, 0.9])
    v = model(x_t, t)
    for i in range(3):
        alone = model(x_t[i : i + 1], t[i : i + 1])
        assert torch.allclose(alone, v[i : i + 1], atol=1e-5)
    # Each clip's own time matters.
    assert (model(x_t, t.flip(0)) - v).abs().max() > 1e-3


def test_input_gradient_matches_finite_differences():
    """The gradient that guidance takes equals a central difference along a random line."""
    model = trained_looking(TINY).double()
    t = torch.tensor([0.3])
    x_t, direction, weight = torch.randn(3, 1, 2, 300, dtype=torch.float64)

    def f(x):
        return (weight * model(x, t)).sum()

    x_t.requires_grad_()
    (gradient,) = torch.autograd.grad(f(x_t), x_t)
    with torch.no_grad():
        difference = (f(x_t + 1e-3 * direction) - f(x_t - 1e-3 * direction)) / 2e-3
    assert abs((gradient * direction).sum() - difference) < 1e-4 * difference.abs()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_half_precision_agrees_with_float32(dtype, tolerance):
    """v under autocast is float32, and within the type's rounding of v without."""
    model = trained_looking(TINY)
    x_t = torch.randn(2, 2, 1000)
    t = torch.tensor([0.2, 0.8])
    v = model(x_t, t)
    with torch.autocast("cpu", dtype):
        half = model(x_t, t)
    assert half.dtype == torch.float32
    assert 0 < (half - v).norm() / v.norm() < tolerance


@pytest.mark.parametrize("level", [0.0, 1.0], ids=["silence", "full-scale noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_audio_stays_finite(level, dtype):
    """v and its gradient are finite, even if the training audio was quiet (scale 0.05)."""
    model = trained_looking(TINY)
    audio = level * torch.randn(1, 2, 2048).sign()
    x_t = (audio / 0.05).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        v = model(x_t, torch.tensor([0.5]))
    (gradient,) = torch.autograd.grad(v.sum(), x_t)
    assert v.isfinite().all()
    assert gradient.isfinite().all()


def test_attention_equals_its_definition():
    """softmax(q k^T / sqrt(d)) v of each head, over the normalised input, added to the input."""
    attention = unet1d.Attention(48, head_width=24, groups=8)
    torch.nn.init.normal_(attention.out.weight)
    h = torch.randn(2, 48, 20)
    q, k, v = attention.qkv(attention.norm(h)).chunk(3, dim=1)  # (B, 48, K) each
    heads = []
    for d in (slice(0, 24), slice(24, 48)):
        logits = torch.einsum("bdi,bdj->bij", q[:, d], k[:, d]) / math.sqrt(24)
        heads.append(torch.einsum("bij,bdj->bdi", logits.softmax(-1), v[:, d]))
    expected = h + attention.out(torch.cat(heads, dim=1))
    assert torch.allclose(attention(h), expected, atol=1e-4)


def test_attention_is_on_the_lowest_levels():
    """`attention` levels from the bottom attend, in each of their stages."""
    model = UNet1D(replace(TINY, multipliers=(1, 1, 1), attention=2))
    attends = []
    for stages in [*model.down, *model.up]:
        for stage in stages:
            attends.append(isinstance(stage.attention, unet1d.Attention))
    # Three levels down, with one stage each; three up again, with two.
    assert attends == [False, True, True, True, True, True, True, False, False]


def test_attention_reaches_the_output():
    """Silencing one attention changes v."""
    model = trained_looking(TINY)
    x_t = torch.randn(1, 2, 1000)
    t = torch.tensor([0.5])
    v = model(x_t, t)
    model.up[0][0].attention.out.weight.zero_()
    assert (model(x_t, t) - v).abs().max() > 1e-6


# ---- Training -----------------------------------------------------------------------------------

def chord(frequencies, n):
    time = torch.arange(n) / 44100
    return sum(torch.sin(2 * math.pi * frequency * time) for frequency in frequencies)


@pytest.mark.slow
def test_learns_one_clip():
    """300 updates on 512 samples of two chords: the v-loss falls from 1 to below a quarter."""
    n = 512
    updates = 300
    x_0 = torch.stack([chord([220.0, 277.2, 329.6], n), chord([220.0, 261.6, 392.0], n)])
    x_0 = (x_0 / x_0.std()).expand(8, 2, n)
    model = UNet1D(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.99),
                                  weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=updates + 1)
    for _ in range(updates):
        # Eight times at equal distances, shifted at random.
        t = (torch.rand(1, dtype=torch.float64) + torch.arange(8) / 8) % 1
        loss = v_loss(model, x_0, t, torch.randn(8, 2, n)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    t = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    x_0 = x_0[:1].expand(16, 2, n)
    with torch.no_grad():
        assert v_loss(model, x_0, t, torch.randn(16, 2, n)).mean() < 0.25
