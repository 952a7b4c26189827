"""The rows of Table 2: what each measures, where it starts from, and what it refuses."""
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import noise

import guidance
import tasks
from diffusion import add_noise, alpha_sigma

n, C_L, C_R = 24, 8, 6
middle = slice(C_L, n - C_R)


def signals(count, seed=0):
    """(count, 3, 2, n): for each of them, three clips of two channels."""
    return noise(count, 3, 2, n, seed=seed)


# ---- continuation and infill ---------------------------------------------------------------------

@pytest.mark.parametrize("row, right", [("continuation", 0), ("infill", C_R)])
def test_continuation_and_infill_keep_their_context(row, right):
    """As printed: y = A x_bar and x_T = A^T y + (I - A^T A) z; the gap is never read."""
    def make(x_bar):
        if row == "continuation":
            return tasks.continuation(x_bar, C_L, z, project="x_t")
        return tasks.infill(x_bar, C_L, C_R, z, project="x_t")
    x_bar, z = signals(2)
    task = make(x_bar)
    term, = task.terms
    kept = torch.cat([x_bar[..., :C_L], x_bar[..., n - right:]], dim=-1)
    assert torch.equal(term.y, kept) and term.d is tasks.l1 and task.t_T == 1
    assert torch.equal(task.x_T[..., C_L:n - right], z[..., C_L:n - right])
    assert torch.allclose(term.A(task.x_T), kept, atol=1e-12)

    hidden = x_bar.clone()
    hidden[..., C_L:n - right] = 1e6
    again = make(hidden)
    assert torch.equal(again.x_T, task.x_T) and torch.equal(again.terms[0].y, term.y)


def test_where_x0_hat_is_projected_the_start_is_noise_alone():
    """As noisy in the context as elsewhere: the departure of reconstruct."""
    x_bar, z = signals(2)
    assert torch.equal(tasks.infill(x_bar, C_L, C_R, z).x_T, z)
    assert torch.equal(tasks.continuation(x_bar, C_L, z).x_T, z)


def test_a_mask_keeps_several_gaps_open_per_clip():
    """KeepMask is the general case: x_T is x_bar where the mask is set, for each clip its own."""
    x_bar, z = signals(2)
    mask = noise(3, 1, n, seed=1) < 0
    task = tasks.reconstruct(x_bar, tasks.KeepMask(mask), z, project="x_t")
    assert torch.allclose(task.x_T, torch.where(mask, x_bar, z), atol=1e-12)


# ---- regenerate and transition -------------------------------------------------------------------

K = torch.tensor([0.0, 0.85, 1.0], dtype=torch.float64)                     # one for each clip


def test_regenerate_starts_as_table_2_prints_it():
    """start_from="paper": k z + (1 - k) x_bar in the middle at t = 1, and y in the context."""
    x_bar, z = signals(2)
    mixed = K[:, None, None] * z + (1 - K[:, None, None]) * x_bar
    task = tasks.regenerate(x_bar, C_L, C_R, z, K, start_from="paper", project="x_t")
    assert task.t_T == 1 and torch.allclose(task.x_T[..., middle], mixed[..., middle])
    assert torch.allclose(task.x_T[..., :C_L], x_bar[..., :C_L])
    assert torch.allclose(task.x_T[..., -C_R:], x_bar[..., -C_R:])

    # If x0_hat is projected, the context is noise.
    noisy = tasks.regenerate(x_bar, C_L, C_R, z, K, start_from="paper").x_T
    assert torch.equal(noisy[..., middle], mixed[..., middle])
    assert torch.allclose(noisy[..., :C_L], z[..., :C_L])


@pytest.mark.parametrize("start_from", ["paper", "matched"])
def test_regenerate_with_all_noise_is_infill(start_from):
    """k = 1, by either start."""
    x_bar, z = signals(2)
    task = tasks.regenerate(x_bar, C_L, C_R, z, 1.0, start_from)
    assert torch.allclose(task.x_T, tasks.infill(x_bar, C_L, C_R, z).x_T) and task.t_T == 1


@pytest.mark.parametrize("k", [0.85, torch.tensor([0.1, 0.5, 1.0])], ids=["one", "per clip"])
def test_matched_start_lies_on_the_forward_process(k):
    """start_from="matched": x_T is alpha_t x_bar + sigma_t z at t = t_T."""
    x_bar, z = signals(2)
    task = tasks.regenerate(x_bar, C_L, C_R, z, k, start_from="matched")
    x_t, _ = add_noise(x_bar, z, task.t_T)
    assert torch.allclose(task.x_T, x_t, atol=1e-12)


def test_the_matched_time_has_the_mixtures_proportion():
    """alpha_t : sigma_t is (1 - k) : k, so that half of either is t = 0.5."""
    x_bar, z = signals(2)
    k = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    t_T = tasks.regenerate(x_bar, C_L, C_R, z, k).t_T
    alpha, sigma = alpha_sigma(t_T)
    torch.testing.assert_close(alpha * k, sigma * (1 - k))
    assert t_T[1].item() == pytest.approx(0.5) and t_T[2] == 1
    expected = 2 / math.pi * math.atan2(0.7, 0.3)
    assert tasks.matched_time(0.7).item() == pytest.approx(expected, 1e-12)


def test_crossfade_has_constant_power_and_keeps_both_sides():
    """f_in^2 + f_out^2 = 1, monotonous, from the first signal to the second."""
    one, zero = torch.ones(1, 1, n), torch.zeros(1, 1, n)
    f_out = tasks.crossfade(one, zero, C_L, C_R)
    f_in = tasks.crossfade(zero, one, C_L, C_R)
    assert torch.allclose(f_out**2 + f_in**2, one) and (f_out.diff() <= 0).all()
    assert (f_out[..., :C_L] == 1).all() and (f_in[..., n - C_R:] == 1).all()


def test_a_crossfade_turned_round_is_a_crossfade():
    """Backwards, the second signal goes over to the first."""
    x, y = signals(2)
    turned = tasks.crossfade(y.flip(-1), x.flip(-1), C_R, C_L).flip(-1)
    assert torch.allclose(turned, tasks.crossfade(x, y, C_L, C_R), atol=1e-12)


def test_transition_regenerates_the_crossfade():
    """Table 2, Transition: contexts from either track, the middle from the fade."""
    left, right = signals(2)
    z, = signals(1, seed=1)
    faded = tasks.crossfade(left, right, C_L, C_R)
    task = tasks.transition(faded, C_L, C_R, z, k=0.5, start_from="paper")
    contexts = torch.cat([left[..., :C_L], right[..., n - C_R:]], dim=-1)
    assert torch.equal(task.terms[0].y, contexts)
    assert torch.allclose(task.x_T[..., middle], (0.5 * z + 0.5 * faded)[..., middle])


# ---- distances and combinations ------------------------------------------------------------------

def test_distances_are_sums_over_each_clip():
    """L1 = sum, L2 = unsquared norm; one number per clip."""
    y, x = signals(2)
    assert torch.allclose(tasks.l1(y, x), (y - x).abs().sum(dim=(1, 2)))
    assert torch.allclose(tasks.l2(y, x) ** 2, (y - x).square().sum(dim=(1, 2)))


def test_bce_of_logits_is_a_sum_over_classes():
    """-(y ln p + (1 - y) ln(1 - p))."""
    y, logits = torch.tensor([[0.0, 1.0, 0.3]]), torch.tensor([[0.5, 2.0, -1.0]])
    p = logits.sigmoid()
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).sum(1)
    assert torch.allclose(tasks.bce(y, logits), expected)


def test_combination_takes_its_start_from_the_reconstruction_and_all_terms():
    """x_T and t_T come from the task with a linear A, wherever it stands; weights multiply."""
    x_bar, z = signals(2)
    edit = tasks.regenerate(x_bar, C_L, C_R, z, 0.5)
    target = torch.zeros(3, 2, dtype=torch.float64)
    embed = tasks.embedder_guidance(lambda x: x.mean(-1), target, z, weight=2.0)
    both = tasks.combine(embed, edit, weights=[3.0, 0.5])
    assert both.x_T is edit.x_T and both.t_T is edit.t_T
    assert [term.weight for term in both.terms] == [6.0, 0.5]
    assert [term.project for term in both.terms] == ["none", "x0_hat"]
    x_0 = guidance.sample(lambda x_t, t: 0.1 * x_t, both.x_T, both, steps=3, xi=1e-2)
    assert x_0.isfinite().all() and torch.allclose(x_0[..., :C_L], x_bar[..., :C_L], atol=1e-12)


X_BAR, Z = signals(2)


def test_a_regenerate_without_contexts_is_a_start():
    """It has no term: guidance that stands before it starts from its mixture all the same."""
    x_bar, z = signals(2)
    start = tasks.regenerate(x_bar, 0, 0, z, 0.6)
    guide = tasks.embedder_guidance(lambda x: x.mean(-1), z.mean(-1), z)
    for both in (tasks.combine(guide, start), tasks.combine(start, guide)):
        assert torch.equal(both.x_T, start.x_T) and both.t_T == start.t_T < 1
        assert both.terms == guide.terms


def test_labels_may_be_whole_numbers_or_truths():
    """As written by hand: the same distance as of floats."""
    logits = noise(2, 3)
    truth = torch.tensor([[True, False, True]]).expand(2, 3)
    expected = tasks.bce(truth.double(), logits)
    for y in (truth, truth.long()):
        torch.testing.assert_close(tasks.bce(y, logits), expected)


def test_a_resampler_first_used_without_gradients_has_them_later():
    """Its weights are kept: they must not be those of inference mode."""
    x = noise(1, 700).float()
    with torch.inference_mode():
        tasks.resample(x, 44100, 31000)
    x.requires_grad_()
    tasks.resample(x, 44100, 31000).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("word, call", [
    ("C_L", lambda: tasks.infill(X_BAR, n, 0, Z)),
    ("C_R", lambda: tasks.infill(X_BAR, 20, 4, Z)),
    ("C_L", lambda: tasks.infill(X_BAR, -1, 4, Z)),
    ("C_L", lambda: tasks.crossfade(X_BAR, Z, 20, 4)),
    ("k must", lambda: tasks.regenerate(X_BAR, 4, 4, Z, 1.2)),
    ("k must", lambda: tasks.regenerate(X_BAR, 4, 4, Z, torch.tensor([0.2, -0.1, 1.0]))),
    ("k must", lambda: tasks.regenerate(X_BAR, 4, 4, Z, 0.0)),
    ("start_from", lambda: tasks.regenerate(X_BAR, 4, 4, Z, 0.5, start_from="x")),
    ("z must", lambda: tasks.continuation(X_BAR[..., :5], 4, Z)),
    ("mask", lambda: tasks.KeepMask(torch.ones(n, dtype=torch.bool))),
    ("weights", lambda: tasks.combine(weights=[1.0])),
    ("labels", lambda: tasks.classifier_guidance(lambda x: x, torch.tensor([[1.5]]), Z)),
    ("labels", lambda: tasks.classifier_guidance(lambda x: x, torch.tensor([[-0.5]]), Z)),
])
def test_bad_arguments_are_named(word, call):
    """ValueError with a sentence that names the argument."""
    with pytest.raises(ValueError, match=word):
        call()


# ---- the resampler -------------------------------------------------------------------------------

@pytest.mark.parametrize("rate_in, rate_out", [
    (48000, 44100), (44100, 48000), (22050, 44100), (88200, 44100), (44100, 16000)])
def test_a_part_with_its_margins_is_resampled_as_the_whole(rate_in, rate_out):
    """Wherever it begins and ends within the blocks of the two rates."""
    x = noise(1, 5000)
    whole = tasks.resample(x, rate_in, rate_out)
    for first in range(700, 1000, 7):
        last = first + 100 + first % 13
        begin, end = tasks.to_resample(rate_in, rate_out, first, last)
        part = tasks.resample(x[:, begin:end], rate_in, rate_out)
        part = part[:, first - begin * rate_out // rate_in:][:, :last - first]
        torch.testing.assert_close(part, whole[:, first:last], atol=1e-9, rtol=0)


# ---- precision -----------------------------------------------------------------------------------

@pytest.mark.parametrize("is_cuda", [True, False])
def test_full_precision_switches_tf32_off_for_a_gpu_alone_and_back_on(is_cuda):
    """A flag of the process, which work on the CPU leaves alone; afterwards it is what it was."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    with tasks.full_precision(SimpleNamespace(is_cuda=is_cuda, device=torch.device("cpu"))):
        assert cudnn.allow_tf32 == (before and not is_cuda)
    assert cudnn.allow_tf32 == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_resamples_as_the_cpu_does():
    """To float32's precision; with TF32 the difference is 1e-3."""
    x = noise(1, 2, 44100, dtype=torch.float32)
    on_gpu = tasks.resample(x.cuda(), 44100, 32000).cpu()
    assert (on_gpu - tasks.resample(x, 44100, 32000)).abs().max() < 1e-5
