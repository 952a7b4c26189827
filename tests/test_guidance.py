"""guidance.py: projection, gradients, independence of the clips, and samplers on exact sources."""
from dataclasses import replace

import pytest
import torch
from conftest import noise, seeded
from exact import C, N, Gaussian, Mixture, covariance, infill_errors, sine

import tasks
from diffusion import alpha_sigma, x0_from_v
from guidance import Task, Term, data_consistency, guided_estimate, sample


def flat_model(x_t, t):
    """Some smooth model, to be called in place of a network."""
    return torch.tanh(x_t) * t[:, None, None]


# ---- projection ----------------------------------------------------------------------------------

class Matrix:
    """A linear operator of one's own: a dense A (m, n) along the last axis; A A^T is not I."""

    def __init__(self, A):
        self.A = A

    def __call__(self, x):
        return x @ self.A.T

    def T(self, y):
        return y @ self.A

    def solve(self, r):
        return torch.linalg.solve(self.A @ self.A.T, r.mT).mT


mask = torch.zeros(2, 1, N, dtype=torch.bool)
mask[0, :, 10:30] = mask[1, :, 5:9] = mask[1, :, 50:90] = True
OPERATORS = {
    "matrix": Matrix(noise(12, N, seed=1)),
    "left": tasks.KeepEnds(N, 40),
    "right": tasks.KeepEnds(N, 0, 7),
    "ends": tasks.KeepEnds(N, 30, 20),
    "mask": tasks.KeepMask(mask),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_projection_is_exact_idempotent_and_the_smallest_correction(name):
    """y = A x afterwards; twice is once; the change is the pseudo-inverse's minimum-norm one."""
    A, x, x_bar = OPERATORS[name], noise(2, 2, N, seed=2), noise(2, 2, N, seed=3)
    y = A(x_bar)
    projected = data_consistency(x, y, A)
    assert (A(projected) - y).abs().max() < 1e-10
    assert (data_consistency(projected, y, A) - projected).abs().max() < 1e-10
    dense = torch.autograd.functional.jacobian(lambda x: A(x).flatten(), x)
    dense = dense.reshape(-1, x.numel())
    smallest = torch.linalg.pinv(dense) @ (y - A(x)).flatten()
    assert ((projected - x).flatten() - smallest).abs().max() < 1e-10


@pytest.mark.parametrize("name", OPERATORS)
def test_T_is_the_adjoint(name):
    """<A x, y> = <x, A^T y>."""
    A, x = OPERATORS[name], noise(2, 2, N, seed=4)
    y = A(noise(2, 2, N, seed=5))
    assert abs((A(x) * y).sum() - (x * A.T(y)).sum()) < 1e-10


def test_slices_and_dense_selection_agree():
    """KeepEnds as slices equals the same rows of the identity as a Matrix, and as a mask."""
    rows = torch.cat([torch.arange(30), torch.arange(N - 20, N)])
    dense = Matrix(torch.eye(N, dtype=torch.float64)[rows])
    slices = tasks.KeepEnds(N, 30, 20)
    kept = torch.zeros(N, dtype=torch.bool)
    kept[rows] = True
    x, x_bar = noise(2, 2, N, seed=2), noise(2, 2, N, seed=3)
    expected = data_consistency(x, slices(x_bar), slices)
    assert torch.allclose(data_consistency(x, dense(x_bar), dense), expected, atol=1e-12)
    masked = data_consistency(x, x_bar * kept, tasks.KeepMask(kept))
    assert torch.allclose(masked, expected, atol=1e-12)


# ---- the gradient step ---------------------------------------------------------------------------

@pytest.mark.parametrize("on", ["x0_hat", "x_t"])
@pytest.mark.parametrize("d", [tasks.l1, tasks.l2, tasks.bce])
def test_gradient_agrees_with_finite_differences(d, on):
    """The weighted distance's, with respect to x_t, through the model or not; L1 far from kinks."""
    x_t = noise(1, 1, 6, seed=6)
    A = Matrix(noise(3, 6, seed=7))
    t = torch.tensor(0.6)
    y = torch.tensor([[[0.0, 0.3, 1.0]]], dtype=torch.float64)
    terms = (Term(A, d, y, weight=0.7, on=on),)

    def J_2(x_t):
        x0_hat = x0_from_v(x_t, flat_model(x_t, t.expand(1).double()), t)
        return 0.7 * d(y, A(x0_hat if on == "x0_hat" else x_t)).item()

    gradient = guided_estimate(flat_model, x_t, t, terms)[1]
    h = 1e-6
    for i, unit in enumerate(torch.eye(6, dtype=torch.float64)):
        finite = (J_2(x_t + h * unit) - J_2(x_t - h * unit)) / (2 * h)
        assert abs(gradient[0, 0, i].item() - finite) < 1e-6


@pytest.mark.parametrize("d", [tasks.l1, tasks.l2])
def test_gradient_is_finite_where_the_measurement_is_met(d):
    """At y = A(x) the kinks of L1 and of the unsquared L2 give 0, not NaN."""
    x_t = noise(2, 1, 8, seed=8)
    terms = (Term(lambda x: x, d, x_t, on="x_t"),)
    gradient = guided_estimate(flat_model, x_t, torch.tensor(0.5), terms)[1]
    assert gradient.abs().max() == 0


def test_bce_is_finite_for_confident_logits():
    """Logits of +-200 give a finite distance and gradient for either label."""
    x_t = torch.tensor([[[200.0, -200.0]]])
    terms = (Term(lambda x: x[:, 0], tasks.bce, torch.tensor([[0.0, 1.0]]), on="x_t"),)
    gradient = guided_estimate(flat_model, x_t, torch.tensor(0.5), terms)[1]
    assert terms[0].distance(x_t).item() == 400 and gradient.flatten().tolist() == [1, -1]


class Net(torch.nn.Module):
    """A model, or an operator, that notes whether it runs with gradients and with free weights."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.linear.bias.requires_grad_(False)
        self.seen = set()

    def forward(self, x_t, t=None):
        self.seen.add((torch.is_grad_enabled(), self.linear.weight.requires_grad))
        return self.linear(x_t)


@pytest.mark.parametrize("terms, xi, graph", [
    ("none", None, False), ("on x0_hat", 0, False), ("on x0_hat", 0.1, True),
    ("on x_t", 0.1, False)])
def test_a_graph_is_built_only_where_a_term_needs_it(terms, xi, graph):
    """Parameters of model and operator are frozen meanwhile, and afterwards as they were."""
    z = noise(1, 1, 8).float()
    net, A = Net(), Net()
    task = None
    if terms == "on x0_hat":
        task = tasks.combine(tasks.continuation(z, 4, z), tasks.embedder_guidance(A, z, z))
    elif terms == "on x_t":
        task = tasks.continuation(z, 4, z, on="x_t")
    sample(net, z, task, steps=2, xi=xi)
    assert net.seen == {(graph, False)}
    assert net.linear.weight.requires_grad and not net.linear.bias.requires_grad
    assert A.seen == ({(True, False)} if graph else set()) and A.linear.weight.requires_grad


def test_two_terms_with_half_of_the_context_each_equal_one_with_all_of_it():
    """All terms share one backward pass through the summed distances: bit for bit the same."""
    source = Gaussian(covariance())
    z, x_bar = noise(3, 1, N, seed=9), noise(3, 1, N, seed=10)
    whole = tasks.infill(x_bar, C, C, z, project="none")
    left, right = tasks.KeepEnds(N, C, 0), tasks.KeepEnds(N, 0, C)
    halves = Task(z, tuple(Term(A, tasks.l1, A(x_bar)) for A in (left, right)))
    one = sample(source, z, whole, steps=10, xi=3e-2, generator=seeded())
    two = sample(source, z, halves, steps=10, xi=3e-2, generator=seeded())
    assert torch.equal(one, two)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_clip_does_not_depend_on_its_batch(sampler):
    """Four clips with their own y, k, weight and generator equal four batches of one."""
    source = Gaussian(covariance())
    z, x_bar = noise(4, 1, N, seed=11), noise(4, 1, N, seed=12)
    k = torch.tensor([0.3, 0.5, 0.85, 1.0])
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64)

    def run(clips, generator):
        task = tasks.regenerate(x_bar[clips], C, C, z[clips], k[clips], weight=weight[clips])
        return sample(source, task.x_T, task, steps=12, sampler=sampler, xi=3e-2,
                      generator=generator)

    together = run(slice(None), [seeded(i) for i in range(4)])
    for i in range(4):
        assert (run(slice(i, i + 1), [seeded(i)]) - together[i:i + 1]).abs().max() < 1e-12


def test_sampling_starts_at_the_tasks_time():
    """t_T of the task, one per clip, is the time of the first step; the steps to 0 are equal."""
    z, steps = noise(2, 1, N, seed=18), []
    task = tasks.regenerate(z, C, C, z, torch.tensor([0.5, 0.85]))
    sample(flat_model, task.x_T, task, steps=4, xi=0, callback=lambda s, x_s: steps.append(s))
    assert torch.allclose(torch.stack(steps), task.t_T * torch.tensor([[3], [2], [1], [0]]) / 4)


def test_xi_acts_through_its_product_with_the_weight():
    """xi 0.02 with weight 3 is xi 0.06 with weight 1."""
    source, z = Gaussian(covariance()), noise(1, 1, N, seed=13)
    task = tasks.continuation(noise(1, 1, N, seed=14), C, z)
    heavy = tasks.combine(task, weights=[3.0])
    a = sample(source, task.x_T, heavy, steps=10, xi=0.02, generator=seeded(0))
    b = sample(source, task.x_T, task, steps=10, xi=0.06, generator=seeded(0))
    assert torch.allclose(a, b, atol=1e-12)


def test_the_callback_gets_every_update():
    """In order, and what the last one made is the result."""
    source = Gaussian(covariance())
    task = tasks.continuation(noise(1, 1, N, seed=14), C, noise(1, 1, N))
    times, signals = [], []

    def note(s, x_s):
        times.append(s.item())
        signals.append(x_s)
    x_0 = sample(source, task.x_T, task, steps=5, xi=0.1, callback=note)
    assert times == pytest.approx([0.8, 0.6, 0.4, 0.2, 0]) and torch.equal(signals[-1], x_0)


# ---- the samplers on exact sources ---------------------------------------------------------------

@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_unguided_samples_have_the_covariance_of_the_source(sampler):
    """2000 samples, 200 steps: variance within 5%, covariance within 12% (true samples: 7-9%)."""
    S = covariance()
    z = noise(1, 2000, N)
    x_0 = sample(Gaussian(S), z, steps=200, sampler=sampler, generator=seeded(1))[0]
    got = torch.cov(x_0.T)
    assert abs(got.diagonal().mean() / S.diagonal().mean() - 1) < 0.05
    assert torch.linalg.norm(got - S) / torch.linalg.norm(S) < 0.12


def test_infill_with_the_papers_settings_matches_the_posterior():
    """DDPM, 50 steps, xi = 3e-2, L1 through x0_hat; each figure better than by projection alone."""
    error, ratio, context = infill_errors(sine(), "ddpm", 50, project="x_t", xi=3e-2)
    alone = infill_errors(sine(), "ddpm", 50, project="x_t", xi=0)
    assert error < 0.2 and 0.9 < ratio < 1.1 and context < 1e-6
    assert error < alone[0] and abs(ratio - 1) < abs(alone[1] - 1)


def test_infill_by_projecting_x0_hat_matches_the_posterior():
    """50 steps, xi = 0.1; the gradient mends the mean; the context is exact with or without it."""
    error, ratio, context = infill_errors(sine(), "ddpm", 50, project="x0_hat", xi=0.1)
    alone = infill_errors(sine(), "ddpm", 50, project="x0_hat", xi=0)
    assert error < 0.15 and 0.85 < ratio < 1.1 and context < 1e-6 and alone[2] < 1e-6
    assert error < alone[0]
    by_ddim = infill_errors(sine(), "ddim", 50, project="x0_hat", xi=0.1, draws=500)
    assert by_ddim[0] < 0.25


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_projecting_x0_hat_keeps_the_context_on_the_forward_process(sampler):
    """Whatever the model says, the context of x_s has mean alpha_s y and deviation sigma_s."""
    y = torch.full((4000, 1, 4), 3.0, dtype=torch.float64)
    task = tasks.continuation(y, 2, noise(4000, 1, 4, seed=20))
    seen = {}

    def model(x_t, t):
        seen[t[0].item()] = x_t[..., :2]
        return 10 * x_t
    sample(model, task.x_T, task, steps=5, sampler=sampler, xi=1e-3, generator=seeded(3))
    for t, context in seen.items():
        alpha_t, sigma_t = (c.item() for c in alpha_sigma(t))
        assert abs(context.mean().item() - 3 * alpha_t) < 0.05
        assert abs(context.std().item() - sigma_t) < 0.05


@pytest.mark.slow
def test_class_guidance_moves_samples_to_the_class_and_keeps_its_variance():
    """BCE through x0_hat, DDPM, 50 steps, xi = 0.1; two Gaussians with means +-0.7 sin(i / 8)."""
    source = Mixture(0.5 * covariance(), 0.7 * sine()[0, 0])
    z = noise(2000, 1, N, seed=17)
    free = sample(source, z, sampler="ddpm", generator=seeded(2))
    assert abs((source.logit(free) > 0).double().mean() - 0.5) < 0.05
    task = tasks.classifier_guidance(source.logit, torch.ones(2000, 1, dtype=torch.float64), z)
    guided = sample(source, z, task, sampler="ddpm", xi=0.1, generator=seeded(2))
    in_class = source.logit(guided)[:, 0] > 0
    assert in_class.double().mean() > 0.95
    assert abs(guided[in_class].var(0).mean() / source.S.diagonal().mean() - 1) < 0.15


# ---- bad arguments -------------------------------------------------------------------------------

CLIPS = noise(2, 1, 8)


@pytest.mark.parametrize("word, arguments", [
    ("xi", {}), ("xi", {"xi": -1}), ("steps", {"xi": 0.1, "steps": 0}),
    ("sampler", {"xi": 0.1, "sampler": "euler"}), ("generator", {"xi": 0.1, "generator": [None]}),
    ("generator", {"xi": 0.1, "generator": [None] * 3})])
def test_bad_arguments_are_named(word, arguments):
    """ValueError with a sentence that names the argument."""
    task = tasks.continuation(CLIPS, 4, CLIPS)
    with pytest.raises(ValueError, match=word):
        sample(flat_model, task.x_T, task, **arguments)


@pytest.mark.parametrize("words, fields", [
    ("project needs", {"A": lambda x: x, "project": "x_t"}),
    ("project must", {"project": True}), ("on must", {"on": "x_s"})])
def test_bad_terms_are_refused(words, fields):
    """Where they are made, before any sampling."""
    term = Term(tasks.KeepEnds(8, 4), tasks.l1, CLIPS)
    with pytest.raises(ValueError, match=words):
        replace(term, **fields)


def test_a_measurement_of_another_shape_is_refused():
    """Broadcasting would give a distance to something else."""
    term = Term(tasks.KeepEnds(8, 4), tasks.l1, CLIPS[..., :3])
    with pytest.raises(ValueError, match="y has the shape"):
        sample(flat_model, CLIPS, Task(CLIPS, (term,)), xi=0.1)


def test_two_projections_are_refused():
    """They would undo each other."""
    task = tasks.continuation(CLIPS, 4, CLIPS)
    with pytest.raises(ValueError, match="project can be set for one term"):
        Task(CLIPS, task.terms + task.terms)


def test_a_weight_is_a_number_or_one_for_each_clip():
    """Of another shape it would mix the clips."""
    x, y = noise(2, C, N), noise(2, C, N, seed=1)
    t = torch.tensor(0.5, dtype=torch.float64)
    term = Term(lambda x: x, tasks.l2, y)

    def gradient(weight):
        return guided_estimate(flat_model, x, t, [replace(term, weight=weight)])[1]

    one, two = gradient(1.0), gradient(2.0)
    each = gradient(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(each, torch.stack([one[0], two[1]]))
    with pytest.raises(RuntimeError, match="expand"):
        gradient(torch.tensor([[1.0], [2.0]]))


def test_guidance_in_inference_mode_is_refused():
    """It has no gradients. Projection alone needs none."""
    x, z = noise(2, C, N), noise(2, C, N, seed=1)
    task = tasks.infill(x, 30, 20, z)
    with torch.inference_mode():
        with pytest.raises(ValueError, match="outside torch.inference_mode"):
            sample(flat_model, task.x_T, task, steps=2, xi=0.1)
        assert sample(flat_model, task.x_T, task, steps=2, xi=0).isfinite().all()
