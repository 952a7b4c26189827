"""The rows of Table 2: what each constructor measures, where it starts from, and what it refuses."""
from types import SimpleNamespace

import pytest
import torch

import guidance
import sample
import tasks
from diffusion import add_noise

n, C_L, C_R = 24, 8, 6


def signals(count, seed=0):
    return torch.randn(count, 3, 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_continuation_and_infill_keep_their_context_and_start_from_noise_elsewhere():
    """y = A x_bar and x_T = A^T y + (I - A^T A) z, or z alone if x0_hat is projected; the region is never read."""
    x_bar, z = signals(2)
    assert torch.equal(tasks.infill(x_bar, C_L, C_R, z).x_T, z)
    for task, right in ((tasks.continuation(x_bar, C_L, z, project="x_t"), 0),
                        (tasks.infill(x_bar, C_L, C_R, z, project="x_t"), C_R)):
        kept = torch.cat([x_bar[..., :C_L], x_bar[..., n - right:]], dim=-1)
        assert torch.equal(task.terms[0].y, kept) and task.t_T == 1
        assert torch.equal(task.x_T[..., C_L:n - right], z[..., C_L:n - right])
        assert torch.allclose(task.terms[0].A(task.x_T), kept, atol=1e-12)
        hidden = x_bar.clone()
        hidden[..., C_L:n - right] = 1e6
        again = tasks.infill(hidden, C_L, right, z, project="x_t")
        assert torch.equal(again.x_T, task.x_T) and torch.equal(again.terms[0].y, task.terms[0].y)


def test_a_mask_keeps_several_gaps_open_per_clip():
    """KeepMask is the general case: x_T is x_bar where the mask is set and z elsewhere, for each clip its own."""
    x_bar, z = signals(2)
    mask = torch.rand(3, 1, n, generator=torch.Generator().manual_seed(1)) < 0.5
    task = tasks.reconstruct(x_bar, tasks.KeepMask(mask), z, project="x_t")
    assert torch.allclose(task.x_T, torch.where(mask, x_bar, z), atol=1e-12)


def test_regenerate_starts_as_table_2_prints_it():
    """start_from="paper": k z + (1 - k) x_bar in the middle at t = 1, with one k or one per clip; k = 1 is infill. The
    context is y if x_t is projected, noise if x0_hat is."""
    x_bar, z = signals(2)
    k = torch.tensor([0.0, 0.85, 1.0], dtype=torch.float64)
    task = tasks.regenerate(x_bar, C_L, C_R, z, k, start_from="paper", project="x_t")
    middle = slice(C_L, n - C_R)
    mixed = k[:, None, None] * z + (1 - k[:, None, None]) * x_bar
    assert task.t_T == 1 and torch.allclose(task.x_T[..., middle], mixed[..., middle])
    assert torch.allclose(task.x_T[..., :C_L], x_bar[..., :C_L]) and torch.allclose(task.x_T[..., -C_R:], x_bar[..., -C_R:])
    assert torch.allclose(tasks.regenerate(x_bar, C_L, C_R, z, 1.0).x_T, tasks.infill(x_bar, C_L, C_R, z).x_T)
    noisy = tasks.regenerate(x_bar, C_L, C_R, z, k, start_from="paper").x_T
    assert torch.equal(noisy[..., middle], mixed[..., middle]) and torch.allclose(noisy[..., :C_L], z[..., :C_L])


def test_matched_start_lies_on_the_forward_process():
    """start_from="matched": x_T is alpha_t x_bar + sigma_t z at t = t_T, in the proportion (1 - k) : k."""
    x_bar, z = signals(2)
    for k in (0.85, torch.tensor([0.1, 0.5, 1.0])):
        task = tasks.regenerate(x_bar, C_L, C_R, z, k, start_from="matched")
        x_t, _ = add_noise(x_bar, z, task.t_T)
        assert torch.allclose(task.x_T, x_t, atol=1e-12)
    assert task.t_T[1].item() == pytest.approx(0.5) and task.t_T[2] == 1


def test_crossfade_has_constant_power_and_keeps_both_sides():
    """f_in^2 + f_out^2 = 1, monotonous, from the first signal to the second; both turned round fade alike."""
    left, right = tasks.crossfade(torch.ones(1, 1, n), torch.zeros(1, 1, n), C_L, C_R), \
        tasks.crossfade(torch.zeros(1, 1, n), torch.ones(1, 1, n), C_L, C_R)
    assert torch.allclose(left**2 + right**2, torch.ones(1, 1, n))
    assert (left[..., :C_L] == 1).all() and (right[..., n - C_R:] == 1).all() and (left.diff() <= 0).all()
    x, y = signals(2)
    turned = tasks.crossfade(y.flip(-1), x.flip(-1), C_R, C_L).flip(-1)
    assert torch.allclose(turned, tasks.crossfade(x, y, C_L, C_R), atol=1e-12)


def test_transition_regenerates_the_crossfade():
    """Table 2, Transition: contexts from either track, the middle from the fade."""
    (left, right), z = signals(2), signals(1, seed=1)[0]
    task = tasks.transition(left, right, C_L, C_R, z, k=0.5, start_from="paper")
    faded = tasks.crossfade(left, right, C_L, C_R)
    assert torch.equal(task.terms[0].y, torch.cat([left[..., :C_L], right[..., n - C_R:]], dim=-1))
    assert torch.allclose(task.x_T[..., C_L:n - C_R], (0.5 * z + 0.5 * faded)[..., C_L:n - C_R])


def test_distances_are_sums_over_each_clip():
    """L1 = sum, L2 = unsquared norm, BCE of logits = sum over classes; one number per clip."""
    y, x = signals(2)
    assert torch.allclose(tasks.l1(y, x), (y - x).abs().sum(dim=(1, 2)))
    assert torch.allclose(tasks.l2(y, x) ** 2, (y - x).square().sum(dim=(1, 2)))
    labels, logits = torch.tensor([[0.0, 1.0, 0.3]]), torch.tensor([[0.5, 2.0, -1.0]])
    p = logits.sigmoid()
    assert torch.allclose(tasks.bce(labels, logits), -(labels * p.log() + (1 - labels) * (1 - p).log()).sum(1))


def test_combination_takes_its_start_from_the_reconstruction_and_all_terms():
    """x_T and t_T come from the task with a linear A, wherever it stands; weights multiply."""
    x_bar, z = signals(2)
    edit = tasks.regenerate(x_bar, C_L, C_R, z, 0.5)
    embed = tasks.embedder_guidance(lambda x: x.mean(-1), torch.zeros(3, 2, dtype=torch.float64), z, weight=2.0)
    both = tasks.combine(embed, edit, weights=[3.0, 0.5])
    assert both.x_T is edit.x_T and both.t_T is edit.t_T
    assert [term.weight for term in both.terms] == [6.0, 0.5] and [term.project for term in both.terms] == ["none", "x0_hat"]
    x_0 = guidance.sample(lambda x_t, t: 0.1 * x_t, both.x_T, both, steps=3, xi=1e-2)
    assert torch.allclose(x_0[..., :C_L], x_bar[..., :C_L], atol=1e-12) and x_0.isfinite().all()


def test_bad_arguments_are_named():
    """ValueError with a sentence that names the argument."""
    x_bar, z = signals(2)
    for word, call in (("C_L", lambda: tasks.infill(x_bar, n, 0, z)), ("C_R", lambda: tasks.infill(x_bar, 20, 4, z)),
                       ("C_L", lambda: tasks.infill(x_bar, -1, 4, z)), ("C_L", lambda: tasks.crossfade(x_bar, z, 20, 4)),
                       ("k must", lambda: tasks.regenerate(x_bar, 4, 4, z, 1.2)),
                       ("k must", lambda: tasks.regenerate(x_bar, 4, 4, z, torch.tensor([0.2, -0.1, 1.0]))),
                       ("k must", lambda: tasks.regenerate(x_bar, 4, 4, z, 0.0)),
                       ("start_from", lambda: tasks.regenerate(x_bar, 4, 4, z, 0.5, start_from="x")),
                       ("z must", lambda: tasks.continuation(x_bar[..., :5], 4, z)),
                       ("mask", lambda: tasks.KeepMask(torch.ones(n, dtype=torch.bool))),
                       ("weights", lambda: tasks.combine(weights=[1.0])),
                       ("labels", lambda: tasks.classifier_guidance(lambda x: x, torch.tensor([[1.5]]), z))):
        with pytest.raises(ValueError, match=word):
            call()


def test_full_precision_switches_tf32_off_for_a_gpu_alone_and_back_on():
    """A flag of the process, which work on the CPU leaves alone; afterwards it is what it was."""
    cudnn = torch.backends.cudnn
    for is_cuda in (True, False):
        before = cudnn.allow_tf32
        with tasks.full_precision(SimpleNamespace(is_cuda=is_cuda, device=torch.device("cpu"))):
            assert cudnn.allow_tf32 == (before and not is_cuda)
        assert cudnn.allow_tf32 == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_resamples_as_the_cpu_does():
    """To float32's precision; with TF32 the difference is 1e-3."""
    x = torch.randn(1, 2, 44100, generator=torch.Generator().manual_seed(0))
    assert (tasks.resample(x.cuda(), 44100, 32000).cpu() - tasks.resample(x, 44100, 32000)).abs().max() < 1e-5
