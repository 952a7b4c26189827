"""dit.py: attention against its definition, the models' contract, precision, training."""
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import benchmark
import dit
import patched_dit
import sample
from diffusion import add_noise, alpha_sigma, v_loss
from dit import PRESETS, DiT, relative_attention

TINY = replace(PRESETS["tiny"], width=48, depth=2, heads=3, max_distance=8, frames=64)
SPECTRAL = replace(TINY, hops=(8, 2))
both = pytest.mark.parametrize("config", [TINY, SPECTRAL], ids=["DiT", "SpectralDiT"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def trained_like(config):
    """A model whose zero-initialised layers are random too: its output depends on everything."""
    model = dit.build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def distances(length):
    """j - i in row i and column j: (length, length)."""
    position = torch.arange(length)
    return position - position[:, None]


def logits_by_definition(q, k, r):
    """Eq. 4 of [44] as it is written, with an L x L x d tensor of vectors: (B, heads, L, L)."""
    c = len(r) // 2
    vectors = r[distances(q.shape[2]).clamp(-c, c) + c]  # (L, L, d)
    of_content = torch.einsum("bhid,bhjd->bhij", q, k)
    of_position = torch.einsum("bhid,ijd->bhij", q, vectors)
    return (of_content + of_position) / math.sqrt(q.shape[-1])


def split_heads(x, heads):
    """(..., L, width) -> (..., heads, L, d): a head is a slice of the channels."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def random_qkvr(length, c, dtype=torch.float32, batch=2, heads=3, d=16):
    shapes = [(batch, heads, length, d)] * 3 + [(2 * c + 1, d)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


# ---- Relative attention -------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("length, c, block", [(5, 8, 16), (1, 3, 4), (37, 64, 8), (128, 16, 32),
                                              (130, 4, 32), (129, 64, 128), (300, 64, None),
                                              (40, 0, 16)])
def test_relative_attention_equals_its_definition(length, c, block, dtype, tolerance):
    """Values and all four gradients do, for lengths below c, off the blocks and over many."""
    q, k, v, r = random_qkvr(length, c, dtype)
    fast = relative_attention(q, k, v, r, block=block)
    slow = logits_by_definition(q, k, r).softmax(-1) @ v
    assert (fast - slow).abs().max() <= tolerance

    grad_out = torch.randn_like(fast)
    of_fast = torch.autograd.grad(fast, (q, k, v, r), grad_out)
    of_slow = torch.autograd.grad(slow, (q, k, v, r), grad_out)
    for name, a, b in zip("qkvr", of_fast, of_slow):
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max()), name


def test_relative_attention_passes_gradcheck():
    """Analytic and numerical Jacobians agree in float64."""
    inputs = random_qkvr(7, 2, torch.float64, batch=1, heads=2, d=3)
    assert torch.autograd.gradcheck(lambda *x: relative_attention(*x, block=3), inputs)


def test_relative_attention_stores_no_matrix_of_all_positions():
    """For the backward pass no logits are kept, not even those of one block."""
    inputs = random_qkvr(300, 8)
    stored = []

    def pack(x):
        stored.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        relative_attention(*inputs, block=100)
    assert max(stored) < 2 * 3 * 100 * 300  # logits of one block


def test_relative_attention_does_not_depend_on_how_heads_are_grouped():
    """Many heads, computed a few at a time, equal the same heads one by one."""
    q, k, v, r = random_qkvr(700, 8, batch=2, heads=4)
    together = relative_attention(q, k, v, r)
    for clip in range(2):
        for head in range(4):
            one = slice(clip, clip + 1), slice(head, head + 1)
            alone = relative_attention(q[one], k[one], v[one], r)
            assert torch.allclose(together[one], alone, atol=1e-6)


def test_attention_logits_do_not_change_under_a_shift():
    """logit(i, j) = logit(i + s, j + s) in a layer, if the same content returns s frames later."""
    s = 24
    layer = dit.Block(replace(TINY, heads=1, width=2 * s)).double()
    torch.nn.init.normal_(layer.relative)
    h = torch.randn(1, s, 2 * s, dtype=torch.float64).repeat(1, 2, 1)
    q, k, _ = layer.qkv(h)[:, None].chunk(3, -1)  # (1, 1, 2 s, 2 s) each
    # With the identity as values the output is the weights. Their logarithms are the logits, but
    # for a constant in each row.
    identity = torch.eye(2 * s, dtype=torch.float64)[None, None]
    logits = relative_attention(q, k, identity, layer.relative, block=16).log()
    early = logits[..., :s, :s]
    late = logits[..., s:, s:]
    early = early - early[..., :1]
    late = late - late[..., :1]
    assert (early - late).abs().max() <= 1e-10
    assert early.std() > 0.1


# ---- Blocks of the DiT --------------------------------------------------------------------------

def test_attention_of_a_block_equals_its_definition():
    """Each head is computed by itself, all with the same relative vectors."""
    block = trained_like(TINY).blocks[0]
    h = torch.randn(2, 20, 48)
    q, k, v = block.qkv(h).chunk(3, -1)
    q, k, v = split_heads(q, 3), split_heads(k, 3), split_heads(v, 3)
    mixed = logits_by_definition(q, k, block.relative).softmax(-1) @ v
    expected = block.proj(torch.cat(mixed.unbind(1), -1))
    torch.testing.assert_close(block.attention(h), expected, rtol=1e-4, atol=1e-5)


def test_a_block_starts_as_the_identity():
    """Its gates are closed while the modulation is 0."""
    h = torch.randn(2, 20, 48)
    assert torch.equal(dit.Block(TINY)(h, torch.zeros(2, 6 * 48)), h)


@pytest.mark.parametrize("branch, first", [("attention", 0), ("mlp", 3)])
def test_a_gate_opens_its_branch(branch, first):
    """The branch gets the normalised, scaled and shifted input; the gate weights what it adds."""
    block = dit.Block(TINY)
    h = torch.randn(2, 20, 48)
    modulation = torch.zeros(2, 6, 48)
    modulation[:, first : first + 3] = torch.randn(2, 3, 48)
    shift, scale, gate = modulation[:, first : first + 3, None].unbind(1)  # (2, 1, 48) each
    normalised = F.layer_norm(h, (48,), eps=1e-6)
    expected = h + gate * getattr(block, branch)((1 + scale) * normalised + shift)
    torch.testing.assert_close(block(h, modulation.flatten(1)), expected, rtol=1e-4, atol=1e-4)


# ---- The contract of both models ----------------------------------------------------------------

@both
def test_output_is_zero_before_training(config):
    """v = 0, of the shape of x_t; of a SpectralDiT too while no spectrum is measured."""
    v = dit.build(config)(torch.randn(2, 8, 50), torch.rand(2))
    assert v.shape == (2, 8, 50)
    assert (v == 0).all()


@both
def test_every_parameter_reaches_v(config):
    """No layer, of any stage, is left out: v has a gradient for each tensor of a trained model."""
    model = trained_like(config)
    model(torch.randn(2, 8, 64), torch.tensor([0.2, 0.9])).square().sum().backward()
    left_out = []
    for name, p in model.named_parameters():
        if p.grad is None or not p.grad.any():
            left_out.append(name)
    assert left_out == []


@both
def test_clips_of_a_batch_do_not_mix(config):
    """A clip's v is the same alone and in a batch with other clips and times."""
    model = trained_like(config)
    x_t = torch.randn(3, 8, 40)
    t = torch.tensor([0.1, 0.5, 1.0])
    v = model(x_t, t)
    assert (v[1] - v[0]).abs().max() > 0.1
    for i in range(3):
        alone = model(x_t[i : i + 1], t[i : i + 1])
        assert torch.allclose(alone, v[i : i + 1], atol=1e-5)


@both
def test_any_length_up_to_the_window(config):
    """1 .. config.frames frames work, multiples of a hop or not, and with t in float64."""
    model = trained_like(config)
    for n in (1, 2, 17, 64):
        v = model(torch.randn(1, 8, n), torch.rand(1, dtype=torch.float64))
        assert v.shape == (1, 8, n)


@both
def test_too_long_a_clip_is_refused(config):
    """One frame more than the window is a ValueError that names its length."""
    with pytest.raises(ValueError, match="65 frames"):
        dit.build(config)(torch.randn(1, 8, 65), torch.rand(1))


def test_impossible_configurations_are_refused():
    """A width that is no multiple of the heads is a ValueError that names both."""
    with pytest.raises(ValueError, match="48 .* 5 heads"):
        DiT(replace(TINY, heads=5))


@both
def test_a_forward_pass_waits_for_no_gpu(config):
    """It reads no value back, not even of t: it runs on the meta device, which has none."""
    with torch.device("meta"):
        model = dit.build(config)
        x_t = torch.empty(1, config.channels, 37)
        t = torch.empty(1)
        assert benchmark.flops(lambda: model(x_t, t))[1] > 0


@both
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_agrees_with_float32(config, dtype, tolerance):
    """v and the gradients of x_t and r under autocast are within the type's rounding."""
    model = trained_like(config)
    x_t = torch.randn(2, 8, 64, requires_grad=True)
    t = torch.tensor([0.2, 0.9])
    if config.hops:
        relative = model.stages[0].blocks[0].relative
    else:
        relative = model.blocks[0].relative

    def value_and_gradients(autocast):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            v = model(x_t, t).float()
        return v, *torch.autograd.grad(v.square().sum(), [x_t, relative])

    for half, full in zip(value_and_gradients(True), value_and_gradients(False)):
        assert half.dtype == torch.float32
        assert 0 < (half - full).norm() / full.norm() <= tolerance


@both
@pytest.mark.parametrize("level", [0.0, 30.0], ids=["zeros", "loud noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_latents_stay_finite(config, level, dtype):
    """For zeros and for loud noise v and its gradient are finite, at both ends of time."""
    model = trained_like(config)
    x_t = (level * torch.randn(2, 8, 64)).requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        v = model(x_t, torch.tensor([1e-4, 1.0]))
    (gradient,) = torch.autograd.grad(v.float().mean(), x_t)
    assert v.isfinite().all()
    assert gradient.isfinite().all()


@both
def test_frozen_parameters_leave_the_gradient_of_the_input_as_it_is(config):
    """The guidance gradient, for which parameters are frozen, is that of the model in training."""
    model = trained_like(config)
    x_t = torch.randn(1, 8, 64, requires_grad=True)
    t = torch.tensor([0.5])
    (in_training,) = torch.autograd.grad(model(x_t, t).square().sum(), x_t)
    model.requires_grad_(False)
    (frozen,) = torch.autograd.grad(model(x_t, t).square().sum(), x_t)
    assert torch.allclose(frozen, in_training, atol=1e-6)


# ---- DiT ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("silent", ["modulation", "final_modulation"])
def test_v_depends_on_time(silent):
    """It does on a fine scale too, through the blocks alone and through the last norm alone."""
    model = trained_like(TINY)
    dit.zero(getattr(model, silent))
    x_t = torch.ones(1, 8, 64)
    v = model(x_t, torch.tensor([0.5]))
    assert (model(x_t, torch.tensor([0.51])) - v).abs().max() > 1e-3
    assert (model(x_t, torch.tensor([1.0])) - v).abs().max() > 1e-2


def test_v_depends_on_absolute_position():
    """Relative positions cannot tell two frames of constant x_t apart, far from both ends."""
    v = trained_like(TINY)(torch.ones(1, 8, 64), torch.tensor([0.5]))
    # Each lies 24 frames or more from an end, three times max_distance.
    assert (v[..., 24] - v[..., 39]).abs().max() > 1e-2


def test_a_sequence_may_begin_anywhere_in_the_window():
    """`start` shifts each clip's positions by its own number of frames, and nothing else."""
    model = trained_like(TINY).double()
    x_t = torch.randn(3, 8, 20, dtype=torch.float64)
    t = torch.rand(3)
    starts = [0, 7, 44]
    v = model(x_t, t, start=torch.tensor(starts))
    assert not torch.allclose(v[1], model(x_t, t)[1], atol=1e-3)

    positions = model.positions
    for i, start in enumerate(starts):
        model.positions = positions[start:]
        expected = model(x_t[i : i + 1], t[i : i + 1])
        assert torch.allclose(v[i : i + 1], expected, atol=1e-5)


def test_paper_preset_has_the_papers_size():
    """32 layers of 1536 over 2048 frames are about 1B parameters (App. C.1)."""
    config = PRESETS["paper"]
    assert (config.depth, config.width, config.frames) == (32, 1536, 2048)
    with torch.device("meta"):
        model = DiT(config)
    assert 0.9e9 < sum(p.numel() for p in model.parameters()) < 1.0e9


def test_paper_presets_work_is_that_of_its_products():
    """The floating-point operations of a forward pass are those of the formula, to 0.1%."""
    config = PRESETS["paper"]
    n = config.frames
    with torch.device("meta"):
        model = DiT(config)
        x_t = torch.empty(1, config.channels, n)
        t = torch.empty(1)
        work = benchmark.flops(lambda: model(x_t, t))[1]
    # Multiply-adds of a frame: linear layers, then q k^T, weights times v and q r^T.
    linear = 12 * config.width**2
    attention = config.width * (2 * n + 2 * config.max_distance + 1)
    ends = 2 * config.channels * config.width
    assert work == pytest.approx(2 * n * (config.depth * (linear + attention) + ends), rel=1e-3)


def test_one_clip_can_be_learned():
    """150 updates on 16 frames bring the v-loss below a quarter of that of predicting zero."""
    model = DiT(replace(TINY, depth=1))
    x_0 = torch.randn(1, 8, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(150):
        # A random time in each eighth of (0, 1).
        t = (torch.arange(8, dtype=torch.float64) + torch.rand(8, dtype=torch.float64)) / 8
        loss = v_loss(model, x_0.expand(8, -1, -1), t, torch.randn(8, 8, 16)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    x_0 = x_0.expand(64, -1, -1)
    t = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    eps = torch.randn(64, 8, 16)
    with torch.no_grad():
        learned = v_loss(model, x_0, t, eps).mean()
        of_zero = v_loss(lambda x_t, t: 0 * x_t, x_0, t, eps).mean()
    assert learned < of_zero / 4


# ---- SpectralDiT --------------------------------------------------------------------------------

@pytest.mark.parametrize("hop", [1, 2, 16])
def test_from_spectra_inverts_spectra(hop):
    """x comes back, at both ends too."""
    x = torch.randn(2, 3, 4 * hop, dtype=torch.float64)
    X = dit.spectra(x, hop)
    assert X.shape == (2, 5, hop + 1, 3)
    torch.testing.assert_close(dit.from_spectra(X, hop), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("hop", [1, 2, 16])
def test_spectra_of_white_noise_have_variance_one(hop):
    """They do in each bin, in all frames but the first and the last."""
    inner = dit.spectra(torch.randn(200, 3, 4 * hop), hop)[:, 1:-1]
    assert (inner.abs().square().mean((0, 1, 3)) - 1).abs().max() < 0.2


def test_spectral_dit_starts_as_the_best_estimate_for_a_gaussian():
    """Before training v is E[v | x_t] for Gaussian music of the measured spectrum, here white."""
    mix = torch.randn(8, 8, dtype=torch.float64)
    x_0 = mix @ torch.randn(2000, 8, 64, dtype=torch.float64)
    model = dit.build(SPECTRAL)
    model.set_spectrum([x_0.float()])
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x_t, _ = add_noise(x_0[:3], torch.randn(3, 8, 64, dtype=torch.float64), t)

    # The closed form: the covariance of v and x_t over that of x_t.
    alpha_t, sigma_t = alpha_sigma(t)
    alpha_t, sigma_t = alpha_t[:, None, None], sigma_t[:, None, None]
    covariance = mix @ mix.T
    identity = torch.eye(8, dtype=torch.float64)
    of_x_t = alpha_t**2 * covariance + sigma_t**2 * identity
    of_v_and_x_t = alpha_t * sigma_t * (identity - covariance)
    expected = of_v_and_x_t @ torch.linalg.inv(of_x_t) @ x_t
    error = model(x_t.float(), t) - expected
    assert error.square().mean() < 1e-3 * expected.square().mean()


def test_a_stage_begins_as_the_estimate_of_the_stage_before():
    """A model whose second stage is untrained gives the v of its first."""
    model = trained_like(SPECTRAL)
    model.stages[1] = dit.build(SPECTRAL).stages[1]
    x_t = torch.randn(2, 8, 64)
    t = torch.rand(2)
    torch.testing.assert_close(model(x_t, t), model.stages[0](x_t, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [1, 2], ids=["time", "frequency"])
def test_attention_of_a_spectral_block_equals_its_definition(axis):
    """Each head adds its own number for each distance to q k^T / sqrt(d), along either axis."""
    block = trained_like(SPECTRAL).stages[0].blocks[axis - 1]
    h = torch.randn(2, 7, 9, 48)
    along = h.transpose(axis, 2)  # (B, rows, L, width)
    q, k, v = block.qkv(along).chunk(3, -1)
    q, k, v = split_heads(q, 3), split_heads(k, 3), split_heads(v, 3)  # (B, rows, heads, L, d)
    bias = block.relative[:, distances(h.shape[axis]) + block.longest]  # (heads, L, L)
    mixed = (q @ k.mT / math.sqrt(16) + bias).softmax(-1) @ v
    expected = block.proj(torch.cat(mixed.unbind(2), -1)).transpose(axis, 2)
    torch.testing.assert_close(block.attention(h), expected, rtol=1e-4, atol=1e-5)


def test_the_mlp_of_a_spectral_block_sees_the_surroundings_of_a_token():
    """With both gates closed nothing changes; the MLP's reaches 2 frames and 3 bins each way."""
    block = dit.SpectralBlock(SPECTRAL, 8, axis=1)
    torch.nn.init.normal_(block.mlp[-1].weight)
    h = torch.randn(1, 9, 9, 48)
    modulation = torch.zeros(1, 6, 48)
    modulation[:, 2] = -1  # attention's gate, which starts at 1
    modulation[:, 5] = -1  # the MLP's
    assert torch.equal(block(h, modulation.flatten(1)), h)

    modulation[:, 5] = 0
    other = h.clone()
    other[:, 4, 4] = torch.randn(48)
    change = block(other, modulation.flatten(1)) - block(h, modulation.flatten(1))
    moved = change[0].abs().amax(-1) > 1e-6  # (frames, bins)
    assert moved[2:7, 1:8].all()
    assert moved.sum() == 5 * 7


def test_spectral_dit_sees_the_whole_window():
    """Through attention along time, the last frame of x_t moves the first frame of v."""
    model = trained_like(replace(SPECTRAL, frames=512))
    t = torch.tensor([0.5], dtype=torch.float64)
    x_t = torch.randn(1, 8, 512)
    other = x_t.clone()
    other[..., -1] += 3
    assert (model(x_t, t) - model(other, t))[..., 0].abs().max() > 1e-6


# ---- The paper's DiT with patches, for the comparison (tests/patched_dit.py) ---------------------

def test_a_token_of_a_patched_dit_is_a_patch_of_frames(monkeypatch):
    """Token i holds frames 4 i .. 4 i + 3, padded with silence; v has the frames of x_t again."""
    seen = {}

    def as_it_is(self, tokens, t, start):
        seen.update(tokens=tokens, start=start)
        return tokens

    monkeypatch.setattr(DiT, "forward", as_it_is)
    x_t = torch.randn(2, 8, 50)
    v = patched_dit.PatchedDiT(TINY, 4)(x_t, torch.rand(2), torch.tensor([3, 9]))
    assert torch.equal(v, x_t)
    assert seen["tokens"].shape == (2, 32, 13)
    assert torch.equal(seen["tokens"][:, :, 2].unflatten(1, (8, 4)), x_t[..., 8:12])
    assert (seen["tokens"][:, :, -1].unflatten(1, (8, 4))[..., 2:] == 0).all()
    assert seen["start"].tolist() == [0, 2]


def test_with_patches_of_one_frame_it_is_the_papers_dit():
    """The same weights give the same v."""
    model = trained_like(TINY)
    patched = patched_dit.PatchedDiT(TINY, 1)
    patched.load_state_dict(model.state_dict())
    x_t, t, start = torch.randn(2, 8, 20), torch.rand(2), torch.tensor([5, 44])
    assert torch.equal(patched(x_t, t, start), model(x_t, t, start))


def test_a_patched_dit_is_trained_by_train_py(tmp_path, monkeypatch):
    """`patched_dit.py 4` and the arguments of train.py leave a model with tokens of four frames."""
    monkeypatch.setitem(sample.NETS, "latent", sample.NETS["latent"])       # put back afterwards
    patched_dit.main(["4", "--model", "latent", "--size", "tiny", "--steps", "2", "--batch", "1",
                      "--vae", str(sample.SHIPPED / "latent.pt"), "--windows", "0.5", "--device",
                      "cpu", "--out", str(tmp_path)])
    weights = sample.load_state(tmp_path / "model.pt")["ema"]
    assert weights["embed.weight"].shape == (96, 4 * 16)
    with pytest.raises(sample.UserError, match="give --model latent"):
        patched_dit.main(["4", "--model", "waveform"])


@both
def test_a_model_in_float64_is_that_in_float32(config):
    """More precisely."""
    model = trained_like(config).eval()
    x_t = torch.randn(2, config.channels, 16)
    t = torch.tensor([0.3, 0.9])
    with torch.no_grad():
        expected = model(x_t, t)
        v = model.double()(x_t.double(), t)
    assert v.dtype == torch.float64
    torch.testing.assert_close(v.float(), expected, rtol=1e-3, atol=1e-3)
