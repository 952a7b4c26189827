"""Gaussian diffusion, App. B.1: cosine schedule, v-parameterisation, loss, one DDPM or DDIM step.

    x_t = alpha_t * x_0 + sigma_t * eps                    # alpha_t, sigma_t = alpha_sigma(t)
    x0_hat = x0_from_v(x_t, model(x_t, t), t)
    x_s = ddpm_step(x_t, x0_hat, t, s, noise)              # or ddim_step(x_t, x0_hat, t, s)

A time is a float, or a (B,) tensor with one time per clip. The schedule is computed in float64 on
the CPU and only the final coefficients are cast: in float32 the x0_hat coefficient of the last of
500 steps would be 1.0025 instead of 1.
"""
import math

import torch


# ---- The schedule -------------------------------------------------------------------------------

def cosine_schedule(t):
    """Signal and noise level (alpha_t, sigma_t) at times t in [0, 1] (App. B.1).

    t: a tensor; alpha_t and sigma_t have its shape, type and device. Networks call this one, which
    stays on t's device; samplers call alpha_sigma, in float64.
    """
    # alpha_t = cos(pi t / 2), written as a sine so that alpha(1) is exactly 0.
    alpha_t = torch.sin(math.pi / 2 * (1 - t))
    sigma_t = torch.sin(math.pi / 2 * t)
    return alpha_t, sigma_t


def alpha_sigma(t):
    """The cosine_schedule in float64 on the CPU, for a float or a tensor t, in the shape of t."""
    return cosine_schedule(_on_cpu(t))


def time_steps(steps, t_T=1.0, t_end=0.0):
    """The times t_N = t_T > ... > t_0 = 0 of `steps` equal steps, in float64.

    Returns (steps + 1,), or (steps + 1, B) if t_T is (B,). With t_end, for one t_T, the times below
    it are left out, so that there are fewer, and the last step goes from there straight to 0.
    ValueError unless steps >= 1 and 0 < t_T <= 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    t_T = _on_cpu(t_T)
    if not ((t_T > 0) & (t_T <= 1)).all():
        raise ValueError(f"t_T must lie in (0, 1], not {t_T.tolist()}")
    fractions = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if t_T.ndim == 1:
        if t_end:
            raise ValueError("t_end needs one t_T for all clips: they would end in other steps")
        return fractions[:, None] * t_T
    times = fractions * t_T
    kept = times >= t_end - 1e-9
    kept[0] = kept[-1] = True
    return times[kept]


def _on_cpu(t):
    """A time in float64, on the CPU. A tensor is moved first: some devices have no float64."""
    if torch.is_tensor(t):
        return t.cpu().double()
    return torch.tensor(t, dtype=torch.float64)


def _for_clips(c, x):
    """A coefficient c, () or (B,), as a factor of x (B, ...) that does not change its type."""
    if c.ndim == 0:
        return c.item()
    # Do not wait for a GPU: CUDA copies c aside at once. Other devices might read it too late.
    return c.to(x, non_blocking=x.is_cuda).reshape(-1, *[1] * (x.ndim - 1))


# ---- The v-parameterisation and its loss --------------------------------------------------------

def x0_from_v(x_t, v, t):
    """x0_hat = alpha_t x_t - sigma_t v (Algorithms 1 and 2)."""
    alpha_t, sigma_t = alpha_sigma(t)
    return _for_clips(alpha_t, x_t) * x_t - _for_clips(sigma_t, x_t) * v


def add_noise(x_0, eps, t):
    """The forward process x_t and the network's target v_t at time t, like x_0 (B, C, n) each.

    x_t = alpha_t x_0 + sigma_t eps
    v_t = alpha_t eps - sigma_t x_0
    """
    alpha_t, sigma_t = alpha_sigma(t)
    alpha_t, sigma_t = _for_clips(alpha_t, x_0), _for_clips(sigma_t, x_0)
    return alpha_t * x_0 + sigma_t * eps, alpha_t * eps - sigma_t * x_0


def v_loss(model, x_0, t, eps, weigh=None):
    """L(theta) of App. B.1 for each clip: ||v_t - v_theta(x_t, t)||^2 per element, (B,).

    x_0, eps (B, C, n); t (B,) on the CPU. The mean over elements makes the loss independent of the
    clip's length. weigh(error, t), (B, C, n) -> (B, C, n): what is squared is its result (ours).
    """
    error = v_error(model, x_0, t, eps)
    if weigh:
        error = weigh(error, t.to(error))
    return error.square().flatten(1).mean(1)


def v_error(model, x_0, t, eps):
    """The error v_t - v_theta(x_t, t) of a model at time t, (B, C, n). Arguments as in v_loss."""
    x_t, v_t = add_noise(x_0, eps, t)
    return v_t - model(x_t, t.to(x_t, non_blocking=x_t.is_cuda))


# ---- The samplers' steps ------------------------------------------------------------------------

def ddpm_step(x_t, x0_hat, t, s, noise, xi_gradient=0.0):
    """Algorithm 1, one update t -> s: a draw from p(x_s | x_t), moved by guidance.

    x_t, x0_hat, noise (B, C, n); 0 <= s < t <= 1; xi_gradient is xi times the gradient of d, 0
    without guidance. Returns x_s (B, C, n).
    """
    alpha_t, sigma_t = alpha_sigma(t)
    alpha_s, sigma_s = alpha_sigma(s)
    added = 1 - (alpha_t / alpha_s) ** 2          # variance of the noise that q adds from s to t

    # The mean of p(x_s | x_t), between x0_hat and x_t.
    c_x0 = alpha_s / sigma_t**2 * added
    c_xt = alpha_t * sigma_s**2 / (alpha_s * sigma_t**2)
    mean = _for_clips(c_x0, x_t) * x0_hat + _for_clips(c_xt, x_t) * x_t

    # App. B.1 prints sigma_{t->s} as the variance; Algorithm 1 multiplies eps by it. Take the root.
    sigma_ts = sigma_s / sigma_t * added.sqrt()
    x_s = mean + _for_clips(sigma_ts, x_t) * noise
    return x_s - xi_gradient


def ddim_step(x_t, x0_hat, t, s, xi_gradient=0.0):
    """Algorithm 2, one update t -> s: deterministic, the guidance gradient moves eps_hat.

    Arguments and result as in ddpm_step.
    """
    alpha_t, sigma_t = alpha_sigma(t)
    alpha_s, sigma_s = alpha_sigma(s)
    eps_hat = (x_t - _for_clips(alpha_t, x_t) * x0_hat) / _for_clips(sigma_t, x_t)

    # The paper prints d(y - A(x_t)); read d(y, A(x_t)). x0_hat is left as it is, so that the minus
    # sign moves x_s against the gradient.
    eps_hat = eps_hat - _for_clips(sigma_t, x_t) * xi_gradient
    return _for_clips(alpha_s, x_t) * x0_hat + _for_clips(sigma_s, x_t) * eps_hat
