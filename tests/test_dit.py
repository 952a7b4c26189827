"""Properties of dit.py: attention against its definition, the models' contract, precision, training."""
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import benchmark
import dit
from diffusion import alpha_sigma, v_loss
from dit import PRESETS, DiT, relative_attention

TINY = replace(PRESETS["tiny"], width=48, depth=2, heads=3, max_distance=8, frames=64)
SPECTRAL = replace(TINY, hops=(8, 2))
both = pytest.mark.parametrize("config", [TINY, SPECTRAL], ids=["DiT", "SpectralDiT"])


def naive_attention(q, k, v, r):
    """Eq. 3 and 4 of [44] as they are written, with an L x L x d tensor of vectors."""
    logits = naive_logits(q, k, r)
    return logits.softmax(-1) @ v


def naive_logits(q, k, r):
    length, c = q.shape[2], len(r) // 2
    distance = torch.arange(length) - torch.arange(length)[:, None]  # j - i in row i
    vectors = r[distance.clamp(-c, c) + c]  # (L, L, d)
    return (torch.einsum("bhid,bhjd->bhij", q, k) + torch.einsum("bhid,ijd->bhij", q, vectors)) / math.sqrt(q.shape[-1])


def heads_by_definition(block, h, logits):
    """Attention over h (..., L, width), a head being a slice of the channels of q, k, v and of what proj takes in."""
    q, k, v = (x.chunk(block.heads, -1) for x in block.qkv(h).chunk(3, -1))
    return block.proj(torch.cat([logits(q[i], k[i], i).softmax(-1) @ v[i] for i in range(block.heads)], -1))


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


def test_relative_attention_stores_no_matrix_of_all_positions():
    """For the backward pass no logits are kept, not even those of one block: they are computed again."""
    inputs = random_qkvr(300, 8, torch.float32)
    stored = []

    def pack(x):
        stored.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        relative_attention(*inputs, block=100)
    assert max(stored) < 2 * 3 * 100 * 300  # logits of one block


def test_relative_attention_does_not_depend_on_how_heads_are_grouped():
    """Many heads, computed a few at a time, equal the same heads one by one."""
    q, k, v, r = random_qkvr(700, 8, torch.float32, batch=2, heads=4)
    alone = [[relative_attention(*(x[b, h][None, None] for x in (q, k, v)), r) for h in range(4)] for b in range(2)]
    expected = torch.cat([torch.cat(heads, 1) for heads in alone])
    assert torch.allclose(relative_attention(q, k, v, r), expected, atol=1e-6)


def test_attention_of_a_block_equals_its_definition():
    """Of each head by itself, all with the same relative vectors."""
    block, h = trained_like(TINY).blocks[0], torch.randn(2, 20, 48)
    logits = lambda q, k, i: naive_logits(q[:, None], k[:, None], block.relative)[:, 0]
    torch.testing.assert_close(block.attention(h), heads_by_definition(block, h, logits), rtol=1e-4, atol=1e-5)


def test_attention_logits_do_not_change_under_a_shift():
    """logit(i, j) = logit(i + s, j + s) in an attention layer, if the same content returns s frames later."""
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


def test_gates_open_attention_and_mlp():
    """A block is the identity at first; an open gate adds its branch, of the normalised, scaled and shifted input."""
    block, h = dit.Block(TINY), torch.randn(2, 20, 48)
    assert torch.equal(block(h, torch.zeros(2, 6 * 48)), h)
    for first, branch in ((0, block.attention), (3, block.mlp)):
        modulation = torch.zeros(2, 6, 48)
        modulation[:, first:first + 3] = torch.randn(2, 3, 48)
        shift, scale, gate = modulation[:, first:first + 3, None].unbind(1)                # (2, 1, 48) each
        expected = h + gate * branch(shift + (1 + scale) * F.layer_norm(h, (48,), eps=1e-6))
        torch.testing.assert_close(block(h, modulation.flatten(1)), expected, rtol=1e-4, atol=1e-4)


@both
def test_output_is_zero_before_training(config):
    """The zero-initialised output layer predicts v = 0, of the shape of x_t; on spectra while none is measured."""
    v = dit.build(config)(torch.randn(2, 8, 50), torch.rand(2))
    assert v.shape == (2, 8, 50) and (v == 0).all()


@both
def test_every_parameter_reaches_v(config):
    """No layer, of any stage, is left out: v has a gradient for each tensor of a trained model."""
    model = trained_like(config)
    model(torch.randn(2, 8, 64), torch.tensor([0.2, 0.9])).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@both
def test_clips_of_a_batch_do_not_mix(config):
    """A clip's v is the same alone and in a batch with other clips and times."""
    model = trained_like(config)
    x_t, t = torch.randn(3, 8, 40), torch.tensor([0.1, 0.5, 1.0])
    v = model(x_t, t)
    assert (v[1] - v[0]).abs().max() > 0.1
    for i in range(3):
        assert torch.allclose(model(x_t[i : i + 1], t[i : i + 1]), v[i : i + 1], atol=1e-5)


@pytest.mark.parametrize("silent", ["modulation", "final_modulation"])
def test_v_depends_on_time_and_on_absolute_position(silent):
    """The output changes with t, on a fine scale too, through the blocks alone and through the last scale and shift
    alone; and the same content is told apart by where it lies."""
    model = trained_like(TINY)
    dit.zero(getattr(model, silent))
    x_t = torch.ones(1, 8, 64)
    v = [model(x_t, torch.tensor([t])) for t in (0.5, 0.51, 1.0)]
    assert (v[0] - v[1]).abs().max() > 1e-3 and (v[0] - v[2]).abs().max() > 1e-2
    assert (v[0][..., 24] - v[0][..., 40]).abs().max() > 1e-2  # both 24 frames from an end, three times max_distance


def test_a_sequence_may_begin_anywhere_in_the_window():
    """start shifts the positions and nothing else, for each clip by its own; here in float64."""
    model = trained_like(TINY).double()
    x_t, t = torch.randn(3, 8, 20, dtype=torch.float64), torch.rand(3)
    v = model(x_t, t, start=torch.tensor([0, 7, 44]))
    assert torch.allclose(v[:1], model(x_t[:1], t[:1]), atol=1e-5)
    assert not torch.allclose(v[1:2], model(x_t[1:2], t[1:2]), atol=1e-3)
    model.positions = model.positions.roll(-7, 0)
    assert torch.allclose(v[1:2], model(x_t[1:2], t[1:2]), atol=1e-5)
    model.positions = model.positions.roll(-37, 0)
    assert torch.allclose(v[2:], model(x_t[2:], t[2:]), atol=1e-5)


@both
def test_any_length_up_to_the_window_and_none_beyond(config):
    """1 .. config.frames frames work, multiples of a hop or not, and with t in float64; one more is refused."""
    model = trained_like(config)
    for n in (1, 2, 17, 64):
        assert model(torch.randn(1, 8, n), torch.rand(1, dtype=torch.float64)).shape == (1, 8, n)
    with pytest.raises(ValueError, match="65 frames"):
        model(torch.randn(1, 8, 65), torch.rand(1))


def test_impossible_configurations_are_refused():
    """A width that the heads do not divide is named."""
    with pytest.raises(ValueError, match="48 .* 5 heads"):
        DiT(replace(TINY, heads=5))


@both
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_agrees_with_float32(config, dtype, tolerance):
    """Under autocast v and the gradients of x_t and r are those of float32, to the type's precision."""
    model = trained_like(config)
    relative = next(p for name, p in model.named_parameters() if name.endswith("relative"))
    x_t, t = torch.randn(2, 8, 64).requires_grad_(), torch.tensor([0.2, 0.9])

    def value_and_gradients(enabled):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            v = model(x_t, t)
        return v.float(), *torch.autograd.grad(v.float().square().sum(), [x_t, relative])

    for half, full in zip(value_and_gradients(True), value_and_gradients(False)):
        assert half.dtype == torch.float32
        assert 0 < (half - full).norm() / full.norm() <= tolerance


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_silence_and_full_scale_noise_stay_finite(config, dtype):
    """Zeros, and noise far above unit variance, give finite v and finite gradients at both ends of time."""
    model = trained_like(config)
    for x_t in (torch.zeros(2, 8, 64), 30 * torch.randn(2, 8, 64)):
        x_t.requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            v = model(x_t, torch.tensor([1e-4, 1.0]))
        assert v.isfinite().all()
        assert torch.autograd.grad(v.float().mean(), x_t)[0].isfinite().all()


@both
def test_frozen_parameters_leave_the_gradient_of_the_input_as_it_is(config):
    """The guidance gradient, for which parameters are frozen, is that of the model as it trains."""
    model = trained_like(config)
    x_t, t = torch.randn(1, 8, 64).requires_grad_(), torch.tensor([0.5])
    expected = torch.autograd.grad(model(x_t, t).square().sum(), x_t)[0]
    model.requires_grad_(False)
    assert torch.allclose(torch.autograd.grad(model(x_t, t).square().sum(), x_t)[0], expected, atol=1e-6)


def test_one_clip_can_be_learned():
    """Overfitting one clip of 16 frames brings the v-loss, averaged over t, below a quarter of predicting zero."""
    torch.manual_seed(0)
    model, x_0 = DiT(replace(TINY, depth=1)), torch.randn(1, 8, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(150):
        t = (torch.arange(8, dtype=torch.float64) + torch.rand(8, dtype=torch.float64)) / 8
        loss = v_loss(model, x_0.expand(8, -1, -1), t, torch.randn(8, 8, 16)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    t, eps = (torch.arange(64, dtype=torch.float64) + 0.5) / 64, torch.randn(64, 8, 16)
    with torch.no_grad():
        learned = v_loss(model, x_0.expand(64, -1, -1), t, eps).mean()
        of_zero = v_loss(lambda x_t, t: 0 * x_t, x_0.expand(64, -1, -1), t, eps).mean()
    assert learned < of_zero / 4


def test_paper_preset_has_the_papers_size():
    """About 1B parameters: 32 layers of 1536 over 2048 frames (App. C.1); its work is that of its products, to 0.1%."""
    c, n = PRESETS["paper"], 2048
    with torch.device("meta"):
        model = DiT(c)
        work = benchmark.flops(lambda: model(torch.empty(1, c.channels, n), torch.empty(1)))[1]
    assert c.depth == 32 and c.width == 1536 and c.frames == n
    assert 0.9e9 < sum(p.numel() for p in model.parameters()) < 1.0e9
    a_block = 12 * c.width**2 + c.width * (2 * n + 2 * c.max_distance + 1)  # multiply-adds of a frame
    assert work == pytest.approx(2 * n * (c.depth * a_block + 2 * c.channels * c.width), rel=1e-3)


# ---- SpectralDiT ----------------------------------------------------------------------------------------------------

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
    mix = torch.randn(8, 8, dtype=torch.float64)
    x_0 = mix @ torch.randn(2000, 8, 64, dtype=torch.float64)
    model = dit.build(SPECTRAL)
    model.set_spectrum([x_0.float()])
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    alpha_t, sigma_t = (c[:, None, None] for c in alpha_sigma(t))
    S, one = mix @ mix.T, torch.eye(8, dtype=torch.float64)
    x_t = alpha_t * x_0[:3] + sigma_t * torch.randn(3, 8, 64, dtype=torch.float64)
    expected = alpha_t * sigma_t * (one - S) @ torch.linalg.inv(alpha_t**2 * S + sigma_t**2 * one) @ x_t
    assert (model(x_t.float(), t) - expected).square().mean() < 1e-3 * expected.square().mean()


def test_a_stage_begins_as_the_estimate_of_the_stage_before():
    """A model whose second stage is untrained gives the v of its first."""
    model, x_t, t = trained_like(SPECTRAL), torch.randn(2, 8, 64), torch.rand(2)
    model.stages[1] = dit.build(SPECTRAL).stages[1]
    torch.testing.assert_close(model(x_t, t), model.stages[0](x_t, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [1, 2])
def test_attention_of_a_spectral_block_equals_its_definition(axis):
    """Along time or frequency, of each head by itself, with its own number for each distance added to the logit."""
    block, h = trained_like(SPECTRAL).stages[0].blocks[axis - 1], torch.randn(2, 7, 9, 48)
    distance = torch.arange(h.shape[axis]) - torch.arange(h.shape[axis])[:, None]  # j - i in row i
    logits = lambda q, k, i: q @ k.mT / math.sqrt(16) + block.relative[i, distance + block.longest]
    by_definition = heads_by_definition(block, h.transpose(axis, 2), logits).transpose(axis, 2)
    torch.testing.assert_close(block.attention(h), by_definition, rtol=1e-4, atol=1e-5)


def test_the_mlp_of_a_spectral_block_sees_the_surroundings_of_a_token():
    """Both gates closed it is the identity; with the MLP's open, a token moves those within 2 frames and 3 bins."""
    block, h, condition = dit.SpectralBlock(SPECTRAL, 8, axis=1), torch.randn(1, 9, 9, 48), torch.zeros(1, 6, 48)
    torch.nn.init.normal_(block.mlp[-1].weight)
    condition[:, 2] = condition[:, 5] = -1
    assert torch.equal(block(h, condition.flatten(1)), h)
    other = h.clone()
    other[:, 4, 4] = torch.randn(48)
    condition[:, 5] = 0
    moved = (block(h, condition.flatten(1)) - block(other, condition.flatten(1))).abs().amax((0, -1)) > 1e-6
    assert moved[2:7, 1:8].all() and moved.sum() == 5 * 7


@both
def test_a_forward_pass_waits_for_no_gpu(config):
    """It reads no value back, not even of t: it runs on the meta device, which has none."""
    with torch.device("meta"):
        model, x_t, t = dit.build(config), torch.empty(1, config.channels, 37), torch.empty(1)
        assert benchmark.flops(lambda: model(x_t, t))[1] > 0


def test_spectral_dit_sees_the_whole_window():
    """Through attention along time, the last frame of x_t moves the first frame of v."""
    model, x_t, t = trained_like(replace(SPECTRAL, frames=512)), torch.randn(1, 8, 512), torch.tensor([0.5]).double()
    other = x_t.clone()
    other[..., -1] += 3
    assert (model(x_t, t) - model(other, t))[..., 0].abs().max() > 1e-6
