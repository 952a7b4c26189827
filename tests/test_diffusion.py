"""diffusion.py: the schedule's exact ends, the v-parameterisation, both steps in closed form."""
import math

import pytest
import torch

from diffusion import add_noise, alpha_sigma, ddim_step, ddpm_step, time_steps, v_loss, x0_from_v


def normal(*shape, dtype=torch.float64):
    """Standard normal numbers, the same in every test."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def float64(number):
    return torch.tensor(number, dtype=torch.float64)


# ---- The schedule -------------------------------------------------------------------------------

def test_schedule_is_variance_preserving_and_exact_at_both_ends():
    """alpha = cos(pi t / 2) and alpha^2 + sigma^2 = 1 to 1e-15; at t = 0 and t = 1 no rounding."""
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha, sigma = alpha_sigma(t)
    assert (alpha**2 + sigma**2 - 1).abs().max() <= 1e-15
    assert torch.allclose(alpha, torch.cos(math.pi / 2 * t), atol=1e-15)
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert alpha[-1] == 0
    assert sigma[-1] == 1


def test_times_in_float32_become_float64():
    """The schedule at a time in float32 is as exact as at the same time in float64."""
    t = torch.tensor([0.02, 0.98])
    alpha, sigma = alpha_sigma(t)
    assert torch.equal(alpha, alpha_sigma(t.double())[0])
    assert torch.equal(sigma, alpha_sigma(t.double())[1])


def test_time_steps_are_equal_and_end_at_zero():
    """N + 1 times lead from t_T to exactly 0, for each clip if t_T is (B,)."""
    times = time_steps(4, torch.tensor([1.0, 0.5]))
    assert times.tolist() == [[1, 0.5], [0.75, 0.375], [0.5, 0.25], [0.25, 0.125], [0, 0]]
    expected = torch.arange(500, -1, -1).double() / 500
    assert (time_steps(500) - expected).abs().max() < 1e-15


@pytest.mark.parametrize("steps, t_T, t_end, named", [
    (0, 1.0, 0, "steps"), (10, 0.0, 0, "t_T"), (10, 1.5, 0, "t_T"),
    (10, torch.tensor([1.0, 0.3]), 0.28, "t_end")])
def test_impossible_time_steps_are_refused(steps, t_T, t_end, named):
    """A ValueError that names the argument: no steps, a first time outside (0, 1], or clips that
    would end in different steps.
    """
    with pytest.raises(ValueError, match=named):
        time_steps(steps, t_T, t_end)


# ---- The v-parameterisation and its loss --------------------------------------------------------

@pytest.mark.parametrize("t", [0.37, [0.0, 0.4, 1.0]], ids=["one time", "a time per clip"])
def test_v_contains_the_signal(t):
    """x0_from_v gives x_0 back from x_t and the true v."""
    x_0, eps = normal(2, 3, 2, 16)
    t = torch.tensor(t)
    x_t, v_t = add_noise(x_0, eps, t)
    assert torch.allclose(x0_from_v(x_t, v_t, t), x_0, atol=1e-12)


def test_loss_is_the_mean_squared_error_of_v_for_each_clip():
    """v_loss is 0 for v_t = alpha eps - sigma x_0, 1 for v = 0, and t^2 if v is off by t."""
    x_0, eps = normal(2, 4, 2, 4096, dtype=torch.float32)
    t = float64([0.1, 0.4, 0.7, 1.0])
    alpha, sigma = alpha_sigma(t)
    v_t = alpha.float()[:, None, None] * eps - sigma.float()[:, None, None] * x_0

    of_truth = v_loss(lambda x_t, t: v_t, x_0, t, eps)
    assert of_truth.shape == (4,)
    assert of_truth.abs().max() < 1e-10
    of_zero = v_loss(lambda x_t, t: 0 * x_t, x_0, t, eps)
    assert (of_zero - 1).abs().max() < 0.1
    of_ramp = v_loss(lambda x_t, t: v_t + t[:, None, None], x_0, t, eps)
    assert torch.allclose(of_ramp.double(), t**2, atol=1e-5)


# ---- The samplers' steps ------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [50, 500, 5000])
def test_last_step_returns_x0_hat(steps):
    """At s = 0 nothing of x_t or of the noise is left, in float32, for any number of steps."""
    x_t, x0_hat, noise = normal(3, 2, 2, 64, dtype=torch.float32)
    t, s = time_steps(steps)[-2:]
    assert (ddpm_step(x_t, x0_hat, t, s, noise) - x0_hat).abs().max() <= 1e-6
    assert (ddim_step(x_t, x0_hat, t, s) - x0_hat).abs().max() <= 1e-6


@pytest.mark.parametrize("t, s", [(1.0, 0.98), (0.5, 0.3), (0.9, 0.1), (0.02, 0.0)])
def test_ddpm_step_with_the_true_x0_lands_on_the_forward_process(t, s):
    """From q(x_t | x_0) to q(x_s | x_0): the mean is alpha_s x_0, the variance sigma_s^2."""
    alpha_t, sigma_t = alpha_sigma(t)
    alpha_s, sigma_s = alpha_sigma(s)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    zero = 0 * one

    # With x_0 = 1 and no noise at all, in x_t or in the step, the result is the mean.
    mean = ddpm_step(alpha_t * one, one, t, s, zero).item()
    assert abs(mean - alpha_s) < 1e-7

    # The factors of the noise in x_t and of the step's own noise: their variances add up.
    of_x_t = ddpm_step(sigma_t * one, zero, t, s, zero).item()
    of_noise = ddpm_step(zero, zero, t, s, one).item()
    assert abs(of_x_t**2 + of_noise**2 - sigma_s**2) < 1e-7


def test_ddim_closed_form_for_a_standard_normal():
    """If p_data = N(0, I), x0_hat = alpha_t x_t and N equal steps scale x_T by cos(pi / 2N)^N."""
    x_T = normal(2, 1, 8)
    x_t = x_T
    times = time_steps(20)
    for t, s in zip(times, times[1:]):
        alpha_t, _ = alpha_sigma(t)
        x_t = ddim_step(x_t, alpha_t * x_t, t, s)
    assert torch.allclose(x_t, math.cos(math.pi / 40) ** 20 * x_T, atol=1e-12)


def test_guidance_moves_x_s_in_algorithm_1():
    """ddpm_step takes xi times the gradient off x_s."""
    x_t, x0_hat, noise, gradient = normal(4, 2, 1, 8)
    x_s = ddpm_step(x_t, x0_hat, 0.6, 0.5, noise)
    guided = ddpm_step(x_t, x0_hat, 0.6, 0.5, noise, 0.1 * gradient)
    assert torch.allclose(x_s - guided, 0.1 * gradient)


def test_guidance_moves_eps_hat_in_algorithm_2():
    """ddim_step takes xi sigma_t times the gradient off eps_hat, which x_s holds sigma_s times."""
    x_t, x0_hat, gradient = normal(3, 2, 1, 8)
    _, sigma_t = alpha_sigma(0.6)
    _, sigma_s = alpha_sigma(0.5)
    x_s = ddim_step(x_t, x0_hat, 0.6, 0.5)
    guided = ddim_step(x_t, x0_hat, 0.6, 0.5, 0.1 * gradient)
    assert torch.allclose(x_s - guided, sigma_s * sigma_t * 0.1 * gradient)
