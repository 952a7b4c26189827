"""Properties of dit.py: relative attention against its definition, the model's contract, precision, training."""
import math
from dataclasses import replace

import pytest
import torch

import benchmark
import dit
from diffusion import alpha_sigma
from dit import PRESETS, DiT, relative_attention

TINY = replace(PRESETS["tiny"], width=48, depth=2, heads=3, max_distance=8, frames=64)


def naive_attention(q, k, v, r):
    """Eq. 3 and 4 of [44] as they are written, with an L x L x d tensor of vectors."""
    logits = naive_logits(q, k, r)
    return logits.softmax(-1) @ v


def naive_logits(q, k, r):
    length, c = q.shape[2], len(r) // 2
    distance = torch.arange(length) - torch.arange(length)[:, None]  # j - i in row i
    vectors = r[distance.clamp(-c, c) + c]  # (L, L, d)
    return (torch.einsum("bhid,bhjd->bhij", q, k) + torch.einsum("bhid,ijd->bhij", q, vectors)) / math.sqrt(q.shape[-1])


def random_qkvr(length, c, dtype, batch=2, heads=3, d=16):
    g = torch.Generator().manual_seed(length + c)
    shapes = [(batch, heads, length, d)] * 3 + [(2 * c + 1, d)]
    return [torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for shape in shapes]


def trained_like(config):
    """A model whose zero-initialised layers are random, so that its output depends on everything."""
    torch.manual_seed(0)
    model = dit.build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    "length, c, block",
    [(5, 8, 16), (1, 3, 4), (37, 64, 8), (128, 16, 32), (130, 4, 32), (129, 64, 128), (300, 64, None), (40, 0, 16)],
)
def test_relative_attention_equals_its_definition(length, c, block, dtype, tolerance):
    """Values and all four gradients, for lengths below c, off the block's multiples, and over many blocks."""
    inputs = random_qkvr(length, c, dtype)
    fast, naive = relative_attention(*inputs, block=block), naive_attention(*inputs)
    grad_out = torch.randn_like(fast)
    assert (fast - naive).abs().max() <= tolerance
    of_fast, of_naive = (torch.autograd.grad(out, inputs, grad_out) for out in (fast, naive))
    for name, a, b in zip("qkvr", of_fast, of_naive):
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max()), name


def test_relative_attention_passes_gradcheck():
    """Analytic and numerical Jacobians agree in float64."""
    inputs = random_qkvr(7, 2, torch.float64, batch=1, heads=2, d=3)
    assert torch.autograd.gradcheck(lambda *x: relative_attention(*x, block=3), inputs)


def test_relative_attention_does_not_depend_on_how_heads_are_grouped():
    """Many heads, computed a few at a time, equal the same heads one by one."""
    q, k, v, r = random_qkvr(700, 8, torch.float32, batch=2, heads=4)
    alone = [[relative_attention(*(x[b, h][None, None] for x in (q, k, v)), r) for h in range(4)] for b in range(2)]
    expected = torch.cat([torch.cat(heads, 1) for heads in alone])
    assert torch.allclose(relative_attention(q, k, v, r), expected, atol=1e-6)


def test_attention_logits_do_not_change_under_a_shift():
    """logit(i, j) = logit(i + s, j + s) in an attention layer that hears the same content s frames later."""
    s = 24
    layer = dit.Block(replace(TINY, heads=1, width=2 * s)).double()
    torch.nn.init.normal_(layer.relative)
    h = torch.randn(1, s, 2 * s, dtype=torch.float64).repeat(1, 2, 1)
    q, k, _ = layer.qkv(h)[:, None].chunk(3, -1)  # (1, 1, 2 s, 2 s)
    weights = relative_attention(q, k, torch.eye(2 * s, dtype=h.dtype)[None, None], layer.relative, block=16)
    logits = weights.log()  # but for a constant of each row
    early, late = logits[..., :s, :s], logits[..., s:, s:]
    assert (early - early[..., :1] - (late - late[..., :1])).abs().max() <= 1e-10
    assert (early - early[..., :1]).std() > 0.1


def test_output_is_zero_before_training():
    """The zero-initialised output layer predicts v = 0, of the shape of x_t."""
    v = DiT(TINY)(torch.randn(2, 8, 50), torch.rand(2))
    assert v.shape == (2, 8, 50) and (v == 0).all()


def test_clips_of_a_batch_do_not_mix():
    """A clip's v is the same alone and in a batch with other clips and times."""
    model = trained_like(TINY)
    x_t, t = torch.randn(3, 8, 40), torch.tensor([0.1, 0.5, 1.0])
    v = model(x_t, t)
    assert (v[1] - v[0]).abs().max() > 0.1
    for i in range(3):
        assert torch.allclose(model(x_t[i : i + 1], t[i : i + 1]), v[i : i + 1], atol=1e-5)


def test_v_depends_on_time_and_on_absolute_position():
    """The output changes with t, on a fine scale too, and the same content is told apart by where it lies."""
    model = trained_like(TINY)
    x_t = torch.ones(1, 8, 64)
    v = [model(x_t, torch.tensor([t])) for t in (0.5, 0.51, 1.0)]
    assert (v[0] - v[1]).abs().max() > 1e-3 and (v[0] - v[2]).abs().max() > 1e-2
    assert (v[0][..., 24] - v[0][..., 40]).abs().max() > 1e-2  # both 24 frames from an end, three times max_distance


def test_a_sequence_may_begin_anywhere_in_the_window():
    """start shifts the positions and nothing else, for each clip by its own."""
    model = trained_like(TINY)
    x_t, t = torch.randn(3, 8, 20), torch.rand(3)
    v = model(x_t, t, start=torch.tensor([0, 7, 44]))
    assert torch.allclose(v[:1], model(x_t[:1], t[:1]), atol=1e-5)
    assert not torch.allclose(v[1:2], model(x_t[1:2], t[1:2]), atol=1e-3)
    model.positions = model.positions.roll(-7, 0)
    assert torch.allclose(v[1:2], model(x_t[1:2], t[1:2]), atol=1e-5)
    model.positions = model.positions.roll(-37, 0)
    assert torch.allclose(v[2:], model(x_t[2:], t[2:]), atol=1e-5)


def test_any_length_up_to_the_window_and_none_beyond():
    """1 .. config.frames frames work, in float64 too and with t in float64; one more is refused with a sentence."""
    model = trained_like(TINY)
    for n in (1, 2, 17, 64):
        assert model(torch.randn(1, 8, n), torch.rand(1, dtype=torch.float64)).shape == (1, 8, n)
    assert model.double()(torch.randn(1, 8, 9).double(), torch.rand(1)).dtype == torch.float64
    with pytest.raises(ValueError, match="65 frames"):
        model(torch.randn(1, 8, 65), torch.rand(1))


def test_impossible_configurations_are_refused():
    """A width that the heads do not divide is named."""
    with pytest.raises(ValueError, match="48 .* 5 heads"):
        DiT(replace(TINY, heads=5))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_agrees_with_float32(dtype, tolerance):
    """Under autocast v and the gradients of x_t and r are those of float32, to the type's precision."""
    model = trained_like(TINY)
    x_t, t = torch.randn(2, 8, 64).requires_grad_(), torch.tensor([0.2, 0.9])

    def value_and_gradients(enabled):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            v = model(x_t, t)
        return v.float(), *torch.autograd.grad(v.float().square().sum(), [x_t, model.blocks[0].relative])

    for half, full in zip(value_and_gradients(True), value_and_gradients(False)):
        assert half.dtype == torch.float32
        assert 0 < (half - full).norm() / full.norm() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_silence_and_full_scale_noise_stay_finite(dtype):
    """Zeros, and noise far above unit variance, give finite v and finite gradients at both ends of time."""
    model = trained_like(TINY)
    for x_t in (torch.zeros(2, 8, 64), 30 * torch.randn(2, 8, 64)):
        x_t.requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            v = model(x_t, torch.tensor([1e-4, 1.0]))
        assert v.isfinite().all()
        assert torch.autograd.grad(v.float().mean(), x_t)[0].isfinite().all()


def test_frozen_parameters_leave_the_gradient_of_the_input_as_it_is():
    """The guidance gradient, for which parameters are frozen, is that of the model as it trains."""
    model = trained_like(TINY)
    x_t, t = torch.randn(1, 8, 64).requires_grad_(), torch.tensor([0.5])
    expected = torch.autograd.grad(model(x_t, t).square().sum(), x_t)[0]
    model.requires_grad_(False)
    assert torch.allclose(torch.autograd.grad(model(x_t, t).square().sum(), x_t)[0], expected, atol=1e-6)


def test_frozen_relative_vectors_cost_nothing_in_the_backward_pass():
    """Freezing r saves the products of its gradient, 2 N L (2 c + 1) d operations, and nothing else."""
    q, k, v, r = random_qkvr(20, 4, torch.float32)

    def backward_flops(vectors, inputs):
        out = relative_attention(q, k, v, vectors, block=8)
        return benchmark.flops(lambda: torch.autograd.grad(out.sum(), inputs))[1]

    assert backward_flops(r.detach(), [q, k, v]) == backward_flops(r, [q, k, v, r]) - 2 * 6 * 20 * 9 * 16


def test_one_clip_can_be_learned():
    """Overfitting one clip of 32 frames brings the v-loss, averaged over t, below a quarter of predicting zero."""
    from diffusion import v_loss

    torch.manual_seed(0)
    model = DiT(replace(TINY, frames=32))
    x_0 = torch.randn(1, 8, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = 16
    for _ in range(250):
        t = (torch.arange(batch, dtype=torch.float64) + torch.rand(batch, dtype=torch.float64)) / batch
        loss = v_loss(model, x_0.expand(batch, -1, -1), t, torch.randn(batch, 8, 32)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    t = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    eps = torch.randn(64, 8, 32)
    with torch.no_grad():
        learned = v_loss(model, x_0.expand(64, -1, -1), t, eps).mean()
        of_zero = v_loss(lambda x_t, t: 0 * x_t, x_0.expand(64, -1, -1), t, eps).mean()
    assert learned < of_zero / 4


def test_paper_preset_has_the_papers_size():
    """About 1B parameters: 32 layers of 1536 over 2048 frames (App. C.1)."""
    with torch.device("meta"):
        model = DiT(PRESETS["paper"])
    assert len(model.blocks) == 32 and model.config.width == 1536 and model.config.frames == 2048
    assert 0.9e9 < sum(p.numel() for p in model.parameters()) < 1.0e9


def test_the_presets_are_counted_without_memory(capsys):
    """The work of the paper's preset on the meta device is that of its products, counted by hand, to 0.1%."""
    benchmark.main(["--only", "presets"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "DiT paper" in line)
    c, n = PRESETS["paper"], 2048
    a_block = 12 * c.width**2 + c.width * (2 * n + 2 * c.max_distance + 1)  # multiply-adds of a frame
    by_hand = 2 * n * (c.depth * a_block + 2 * c.channels * c.width)
    assert "928.71 M" in line and float(line.split()[-4]) == pytest.approx(by_hand / 1e9, rel=1e-3)


# ---- SpectralDiT ----------------------------------------------------------------------------------------------------

SPECTRAL = dit.DiTConfig(channels=4, frames=64, width=16, depth=2, heads=2, hops=(8, 2))


@pytest.mark.parametrize("hop", [1, 2, 16])
def test_spectra_are_a_tight_frame(hop):
    """from_spectra inverts spectra, also at both ends, and white noise has variance 1 in each bin of each whole frame."""
    x = torch.randn(200, 3, 4 * hop, dtype=torch.float64)
    X = dit.spectra(x, hop)
    assert X.shape == (200, 5, hop + 1, 3)
    torch.testing.assert_close(dit.from_spectra(X, hop), x, atol=1e-5, rtol=0)
    assert (X[:, 1:-1].abs().square().mean((0, 1, 3)) - 1).abs().max() < 0.2


def test_spectral_dit_starts_as_the_best_estimate_for_a_gaussian():
    """Before training, v is E[v | x_t] for music that is Gaussian with the measured spectrum, here white in time."""
    mix = torch.randn(4, 4, dtype=torch.float64)
    x_0 = mix @ torch.randn(2000, 4, 64, dtype=torch.float64)
    model = dit.build(SPECTRAL)
    model.set_spectrum([x_0.float()])
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    alpha_t, sigma_t = (c[:, None, None] for c in alpha_sigma(t))
    S, one = mix @ mix.T, torch.eye(4, dtype=torch.float64)
    x_t = alpha_t * x_0[:3] + sigma_t * torch.randn(3, 4, 64, dtype=torch.float64)
    expected = alpha_t * sigma_t * (one - S) @ torch.linalg.inv(alpha_t**2 * S + sigma_t**2 * one) @ x_t
    assert (model(x_t.float(), t) - expected).square().mean() < 1e-3 * expected.square().mean()


def test_spectral_dit_takes_any_length_and_keeps_clips_apart():
    """v has the shape of x_t also where n is no multiple of a hop, and a clip's v does not depend on its batch."""
    model, x_t, t = trained_like(SPECTRAL), torch.randn(3, 4, 37), torch.rand(3, dtype=torch.float64)
    v = model(x_t, t)
    assert v.shape == x_t.shape
    torch.testing.assert_close(v[1:2], model(x_t[1:2], t[1:2]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="at most 64"):
        model(torch.randn(1, 4, 65), t[:1])


@pytest.mark.parametrize("config", [TINY, SPECTRAL], ids=["DiT", "SpectralDiT"])
def test_a_forward_pass_waits_for_no_gpu(config):
    """It reads no value back, not even of t: it runs on the meta device, which has none."""
    with torch.device("meta"):
        model, x_t, t = dit.build(config), torch.empty(1, config.channels, 37), torch.empty(1)
        assert benchmark.flops(lambda: model(x_t, t))[1] > 0


def test_spectral_dit_hears_the_whole_window():
    """Through attention along time, the last frame of x_t moves the first frame of v."""
    model, x_t, t = trained_like(replace(SPECTRAL, frames=512)), torch.randn(1, 4, 512), torch.tensor([0.5]).double()
    other = x_t.clone()
    other[..., -1] += 3
    assert (model(x_t, t) - model(other, t))[..., 0].abs().max() > 1e-6
