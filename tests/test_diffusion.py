"""Properties of diffusion.py: the schedule's exact ends, conversions, and both steps against closed forms."""
import math

import pytest
import torch

import diffusion
from diffusion import alpha_sigma, ddim_step, ddpm_step, time_steps


def test_schedule_is_variance_preserving_and_exact_at_both_ends():
    """alpha^2 + sigma^2 = 1 to 1e-15, alpha = cos(pi t / 2), alpha(1) = 0 and sigma(0) = 0 exactly."""
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha, sigma = alpha_sigma(t)
    assert (alpha**2 + sigma**2 - 1).abs().max() <= 1e-15
    assert torch.allclose(alpha, torch.cos(math.pi / 2 * t), atol=1e-15)
    assert alpha[-1] == 0 and sigma[0] == 0 and alpha[0] == 1 and sigma[-1] == 1


def test_time_steps_are_equal_and_end_at_zero():
    """N + 1 times from t_T to exactly 0, per clip if t_T is."""
    times = time_steps(4, torch.tensor([1.0, 0.5]))
    assert times.tolist() == [[1, 0.5], [0.75, 0.375], [0.5, 0.25], [0.25, 0.125], [0, 0]]
    assert (time_steps(500) - torch.arange(500, -1, -1).double() / 500).abs().max() < 1e-15
    for steps, t_T in ((0, 1.0), (10, 0.0), (10, 1.5)):
        with pytest.raises(ValueError, match="steps|t_T"):
            time_steps(steps, t_T)


def test_v_contains_the_signal():
    """From x_t and the true v x_0 comes back, with one time or one per clip."""
    x_0, eps = torch.randn(2, 3, 2, 16, dtype=torch.float64)
    for t in (torch.tensor(0.37), torch.tensor([0.0, 0.4, 1.0])):
        x_t, v = diffusion.add_noise(x_0, eps, t)
        assert torch.allclose(diffusion.x0_from_v(x_t, v, t), x_0, atol=1e-12)


def test_loss_is_zero_for_the_true_v_and_one_for_predicting_zero():
    """v_loss compares with v_t = alpha eps - sigma x_0, whose elements have variance 1; one number per clip."""
    g = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 4, 2, 4096, generator=g)
    t = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    alpha, sigma = (c.float().reshape(-1, 1, 1) for c in alpha_sigma(t))
    assert diffusion.v_loss(lambda x_t, t: alpha * eps - sigma * x_0, x_0, t, eps).abs().max() < 1e-10
    zero = diffusion.v_loss(lambda x_t, t: torch.zeros_like(x_t), x_0, t, eps)
    assert (zero - 1).abs().max() < 0.1
    ramp = diffusion.v_loss(lambda x_t, t: alpha * eps - sigma * x_0 + t[:, None, None], x_0, t, eps)
    assert torch.allclose(ramp.double(), t**2, atol=1e-5)


@pytest.mark.parametrize("steps", [50, 500, 5000])
def test_last_step_returns_x0_hat(steps):
    """At s = 0 nothing of x_t or the noise is left, in float32, for any number of steps."""
    x_t, x0_hat, noise = torch.randn(3, 2, 2, 64, generator=torch.Generator().manual_seed(1))
    t, s = time_steps(steps)[-2:]
    assert (ddpm_step(x_t, x0_hat, t, s, noise) - x0_hat).abs().max() <= 1e-6
    assert (ddim_step(x_t, x0_hat, t, s) - x0_hat).abs().max() <= 1e-6


@pytest.mark.parametrize("t, s", [(1.0, 0.98), (0.5, 0.3), (0.9, 0.1), (0.02, 0.0)])
def test_ddpm_step_with_the_true_x0_lands_on_the_forward_process(t, s):
    """If x0_hat = x_0, a step from q(x_t | x_0) lands on q(x_s | x_0): mean alpha_s x_0, variance sigma_s^2."""
    zero, one = torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
    mean = ddpm_step(alpha_t * one, one, torch.tensor(t), torch.tensor(s), zero)
    from_x_t = ddpm_step(one, zero, torch.tensor(t), torch.tensor(s), zero)
    from_noise = ddpm_step(zero, zero, torch.tensor(t), torch.tensor(s), one)
    assert abs(mean.item() - alpha_s) < 1e-7
    assert abs((from_x_t * sigma_t).item() ** 2 + from_noise.item() ** 2 - sigma_s**2) < 1e-7


def test_ddim_closed_form_for_a_standard_normal():
    """If p_data = N(0, I) then x0_hat = alpha_t x_t, and N equal steps scale x_T by cos(pi / 2N)^N."""
    x_t = torch.randn(2, 1, 8, dtype=torch.float64)
    x_T, times = x_t, time_steps(20)
    for t, s in zip(times, times[1:]):
        x_t = ddim_step(x_t, alpha_sigma(t)[0] * x_t, t, s)
    assert torch.allclose(x_t, math.cos(math.pi / 40) ** 20 * x_T, atol=1e-12)


def test_guidance_enters_as_the_algorithms_print_it():
    """Algorithm 1 takes xi grad off x_s; Algorithm 2 takes xi sigma_t grad off eps_hat, so sigma_s sigma_t xi grad off x_s."""
    x_t, x0_hat, noise, gradient = torch.randn(4, 2, 1, 8, dtype=torch.float64)
    t, s = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    moved = ddpm_step(x_t, x0_hat, t, s, noise) - ddpm_step(x_t, x0_hat, t, s, noise, 0.1 * gradient)
    assert torch.allclose(moved, 0.1 * gradient)
    moved = ddim_step(x_t, x0_hat, t, s) - ddim_step(x_t, x0_hat, t, s, 0.1 * gradient)
    assert torch.allclose(moved, alpha_sigma(s)[1] * alpha_sigma(t)[1] * 0.1 * gradient)
