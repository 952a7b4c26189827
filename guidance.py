"""Sampling with guidance gradients: Sect. 3, Algorithms 1 and 2.

    task = tasks.infill(x_bar, C_L, C_R, z)
    x_0 = sample(model, task.x_T, task, steps=50, sampler="ddpm", xi=0.03)

`model(x_t, t) -> v` is any callable with x_t (B, C, n) and t (B,). A task (tasks.py builds them) is
a list of terms d(y, A(x)) to minimise. Where A is linear, a term may also be met exactly, by
projection.
"""
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor, nn

from diffusion import ddim_step, ddpm_step, time_steps, x0_from_v


@dataclass(frozen=True)
class Term:
    """One objective d(y, A(x)) of Eq. 1.

    A       measurement operator, x (B, C, n) -> (B, ...); a linear one also has T(y) = A^T y and
            solve(r) = (A A^T)^-1 r
    d       distance, (y, A(x)) -> one number per clip, (B,)
    y       the measurement, in the shape of A(x)
    weight  its effective step is xi * weight; a number, or (B,)
    on      A's input: "x0_hat" ("alternatively" in Algorithms 1 and 2), or "x_t" as first
            printed there
    project what the data consistency step projects onto y = A x: "x_t" at the end of each
            iteration, as in Sect. 3; or "x0_hat" before the update, so that x_s has
            the noise of time s in the kept positions too (as in DDNM, Wang et al., 2022); "none"
    """
    A: Callable[[Tensor], Tensor]
    d: Callable[[Tensor, Tensor], Tensor]
    y: Tensor
    weight: float | Tensor = 1.0
    on: str = "x0_hat"
    project: str = "none"

    def __post_init__(self):
        if self.on not in ("x0_hat", "x_t"):
            raise ValueError(f'on must be "x0_hat" or "x_t", not {self.on!r}')
        if self.project not in ("x0_hat", "x_t", "none"):
            raise ValueError(f'project must be "x0_hat", "x_t" or "none", not {self.project!r}')
        if self.project != "none" and not is_linear(self.A):
            raise ValueError('project needs a linear operator A with T and solve; '
                             'this one has none: use "none"')

    def distance(self, x):
        """d(y, A(x)), (B,)."""
        measured = self.A(x)
        if measured.shape != self.y.shape:
            raise ValueError(f"y has the shape {tuple(self.y.shape)}, "
                             f"but A(x) gives {tuple(measured.shape)}")
        return self.d(self.y, measured)


@dataclass(frozen=True)
class Task:
    """Where sampling starts, x_T (B, C, n) at time t_T, a number or (B,); and the terms."""
    x_T: Tensor
    terms: tuple[Term, ...]
    t_T: float | Tensor = 1.0

    def __post_init__(self):
        if sum(term.project != "none" for term in self.terms) > 1:
            raise ValueError("project can be set for one term at most: "
                             "two projections would undo each other")


def is_linear(A):
    return hasattr(A, "T") and hasattr(A, "solve")


def data_consistency(x, y, A):
    """Sect. 3's projection x + A^T (A A^T)^-1 (y - A x): the point with y = A x nearest to x."""
    return x + A.T(A.solve(y - A(x)))


def objective(terms, x_t, x0_hat):
    """J_2 of Eq. 1, the weighted sum of all terms' distances, for each clip: (B,)."""
    J_2 = 0
    for term in terms:
        d = term.distance(x0_hat if term.on == "x0_hat" else x_t)                   # (B,)
        J_2 = J_2 + torch.as_tensor(term.weight).to(d).expand_as(d) * d
    return J_2


def guided_estimate(model, x_t, t, terms):
    """x0_hat, and the gradient of the terms' weighted sum of distances with respect to x_t.

    t is a tensor, () or (B,).
    Clips never mix: each distance is a number per clip, summed only for the one backward pass that
    all terms share. The network is differentiated only if some term has on="x0_hat"; without
    terms the gradient is 0.
    """
    times = t.to(x_t).expand(len(x_t))
    if not terms:
        return x0_from_v(x_t, model(x_t, times), t), torch.zeros_like(x_t)
    # A graph from x_t to x0_hat, if some term needs it.
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        with torch.set_grad_enabled(any(term.on == "x0_hat" for term in terms)):
            x0_hat = x0_from_v(x_t, model(x_t, times), t)

        J_2 = objective(terms, x_t, x0_hat)
        gradient, = torch.autograd.grad(J_2.sum(), x_t)
    return x0_hat.detach(), gradient


@torch.no_grad()
def sample(model, x_T, task=None, *, steps=50, sampler="ddpm", xi=None, t_end=0.0, generator=None,
           callback=None):
    """Algorithm 1 (sampler="ddpm") or Algorithm 2 ("ddim"); without a task, unconditional sampling.

    x_T        (B, C, n), the starting sample, usually task.x_T; the result x_0 has the same shape
    xi         gradient step size; must be given if the task has terms. 0: projection only; nothing
               is differentiated
    t_end      the last step goes straight to x0_hat from the smallest time that is not below it
               (ours); 0: as printed
    generator  a torch.Generator; or a list, one per clip: then a clip does not depend on its batch
    callback   called as callback(s, x_s) after each update
    Raises ValueError for bad arguments. The parameters of a model or operator that is an nn.Module
    are frozen meanwhile.

    Terms with project="x_t" run the algorithms as printed. The tasks' default, "x0_hat", departs
    from them twice; a comment stands at each of the two.
    """
    terms = task.terms if task else ()
    _check(x_T, terms, sampler, xi, generator)
    xi = xi or 0.0
    times = time_steps(steps, task.t_T if task else 1.0, t_end)
    x_t = x_T
    with frozen(model, *[term.A for term in terms]):
        for t, s in zip(times, times[1:]):                              # the paper's i = N .. 1
            # The estimate of x_0, and the gradient of the distances.
            x0_hat, gradient = guided_estimate(model, x_t, t, terms if xi else ())
            for term in terms:
                if term.project == "x0_hat":
                    # Departure: x0_hat is projected, before the update, instead of x_s after it. So
                    # the update adds the noise due at s in the contexts too.
                    x0_hat = data_consistency(x0_hat, term.y, term.A)
                    # Departure: the gradient loses its part along the rows of A, so that guidance
                    # does not move what the projection has set.
                    gradient = data_consistency(gradient, torch.zeros_like(term.y), term.A)
            # The update t -> s, moved against the gradient.
            if sampler == "ddpm":
                x_s = ddpm_step(x_t, x0_hat, t, s, draw_noise(x_t, generator), xi * gradient)
            else:
                x_s = ddim_step(x_t, x0_hat, t, s, xi * gradient)
            # The data consistency step of Sect. 3.
            for term in terms:
                if term.project == "x_t":
                    x_s = data_consistency(x_s, term.y, term.A)
            if callback:
                callback(s, x_s)
            x_t = x_s
    return x_t


def draw_noise(like, generator=None):
    """Standard normal noise in the shape of `like` (B, C, n). generator: None, one, or B of them.

    One draw per clip, where the generator lives, then moved: a CPU generator gives the same noise
    on every device.
    """
    generators = generator if isinstance(generator, (list, tuple)) else [generator] * len(like)
    draws = []
    for g in generators:
        device = g.device if g else like.device
        draws.append(torch.randn(like.shape[1:], generator=g, dtype=like.dtype, device=device))
    return torch.stack(draws).to(like.device)


@contextmanager
def frozen(*modules):
    """Within the context, no parameter of the modules requires a gradient."""
    parameters = []
    for module in modules:
        if isinstance(module, nn.Module):
            parameters += [p for p in module.parameters() if p.requires_grad]
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _check(x_T, terms, sampler, xi, generator):
    if sampler not in ("ddpm", "ddim"):
        raise ValueError(f'sampler must be "ddpm" or "ddim", not {sampler!r}')
    if terms and xi is None:
        raise ValueError("xi is missing: a task with guidance terms needs a step size "
                         "(0 for projection alone)")
    if terms and xi and torch.is_inference_mode_enabled():
        raise ValueError("guidance needs gradients: call sample outside torch.inference_mode()")
    if xi is not None and not xi >= 0:
        raise ValueError(f"xi must be 0 or more, not {xi}")
    if isinstance(generator, (list, tuple)) and len(generator) != len(x_T):
        raise ValueError("generator must be one, or one per clip: "
                         f"{len(generator)} for {len(x_T)} clips")
