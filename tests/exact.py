"""The exact bench: sources with a closed-form denoiser and posterior.

Guided sampling can be checked on them without any trained network.

    python tests/exact.py        # what xi, the projection and the number of steps do; some minutes

For x_0 ~ N(m, S), the denoiser is E[x_0 | x_t] = m + alpha S (alpha^2 S + sigma^2 I)^-1 (x_t -
alpha m). The posterior given y = A x_0 is Gaussian with mean m + S A^T (A S A^T)^-1 (y - A m).

The table is about infill of the middle third of clips of 96 positions. Its columns compare samples
with the true posterior: the error of the mean, over the posterior's standard deviation, for the
clip sin(i / 8) and for random draws of the source, which the context determines less; the ratio of
the variances; and the largest error in the context. What it shows:

- Projection alone meets the context but joins it badly, with a wrong mean and too much variance
  (DDPM, 50 steps, projecting x_t: 0.20 and 1.09). The gradient improves both (xi = 3e-2: 0.18 and
  1.00).
- What counts is xi times the number of steps: what is right at 50 is too strong at 500 (0.84).
- Projecting x0_hat joins the context less by itself, and profits from a larger step: at xi = 0.2 a
  typical clip's mean is nearer to the posterior's (0.28) than with any other row of 50 DDPM steps.
- Without a projection 3e-2 is too little for 50 steps.

The last lines are what k = 0.85 leaves of the original in regenerate, by start. From t = 1
("paper"), DDPM leaves nothing (correlation -0.01; "matched" 0.21), DDIM as much as from the matched
time (0.45 and 0.44).

These sources are tame: all positions have variance 1, and the denoiser is exact for any input. On
trained networks the two projections differ far more.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import guidance
import tasks
from diffusion import alpha_sigma

N = 96                                              # positions of a clip
C = N // 3                                          # left and right context of the infill task


def covariance():
    """0.9 exp(-(i-j)^2 / 72) + 0.1 exp(-|i-j| / 3), + 1e-6 on the diagonal: (N, N).

    Smooth, with a rough part.
    """
    lag = (torch.arange(N)[:, None] - torch.arange(N)).abs().double()
    smooth, rough = torch.exp(-lag**2 / 72), torch.exp(-lag / 3)
    return 0.9 * smooth + 0.1 * rough + 1e-6 * torch.eye(N, dtype=torch.float64)


class Gaussian:
    """The exact v-model of N(mean, S), for x_t (B, C, N) float64; diagonal in S's eigenbasis."""

    def __init__(self, S, mean=None):
        self.S = S
        self.mean = torch.zeros(len(S), dtype=S.dtype) if mean is None else mean
        self.eigenvalues, self.basis = torch.linalg.eigh(S)
        self.eigenvalues.clamp_(min=0)

    def noised(self, x_t, t):
        """alpha_t and sigma_t (B, 1, 1); along the eigenvectors, variances and x_t - E[x_t]."""
        alpha, sigma = (c.reshape(-1, 1, 1) for c in alpha_sigma(t))
        variance = alpha**2 * self.eigenvalues + sigma**2
        return alpha, sigma, variance, (x_t - alpha * self.mean) @ self.basis

    def x0_hat(self, x_t, t):
        alpha, _, variance, centred = self.noised(x_t, t)
        return self.mean + (alpha * self.eigenvalues / variance * centred) @ self.basis.T

    def log_density(self, x_t, t):
        """log p(x_t), (B, C), up to a constant that all Gaussians of the same S share."""
        _, _, variance, centred = self.noised(x_t, t)
        return -0.5 * (centred**2 / variance).sum(-1)

    def __call__(self, x_t, t):
        alpha, sigma = (c.reshape(-1, 1, 1) for c in alpha_sigma(t))
        return (alpha * x_t - self.x0_hat(x_t, t)) / sigma

    def draw(self, count, generator):
        z = torch.randn(count, 1, len(self.S), dtype=self.S.dtype, generator=generator)
        return self.mean + (z * self.eigenvalues.sqrt()) @ self.basis.T


class Mixture(Gaussian):
    """The exact v-model of an equal mixture of N(mean, S) and N(-mean, S), and its classifier."""

    def __init__(self, S, mean):
        super().__init__(S, mean)
        self.parts = Gaussian(S, mean), Gaussian(S, -mean)

    def x0_hat(self, x_t, t):
        densities = torch.stack([part.log_density(x_t, t) for part in self.parts])      # (2, B, 1)
        first, second = torch.softmax(densities, dim=0)[..., None]                  # (B, 1, 1) each
        return first * self.parts[0].x0_hat(x_t, t) + second * self.parts[1].x0_hat(x_t, t)

    def logit(self, x):
        """log p(first | x) - log p(second | x) for a clean x (B, 1, N): (B, 1)."""
        t = torch.zeros(len(x))
        return self.parts[0].log_density(x, t) - self.parts[1].log_density(x, t)


def sine():
    """The bench's fixed clip, sin(i / 8), (1, 1, N).

    Draws of the source vary: the less their context determines, the larger the error.
    """
    return torch.sin(torch.arange(N, dtype=torch.float64) / 8).reshape(1, 1, N)


def infill_posterior(source, x_bar):
    """Mean (B, 1, N) and standard deviation (N,) of x_0 given its first and last C positions."""
    context = torch.cat([torch.arange(C), torch.arange(N - C, N)])
    S = source.S
    gain = torch.linalg.solve(S[context][:, context], S[context])                       # (2C, N)
    posterior = S - S[:, context] @ gain
    return x_bar[..., context] @ gain, posterior.diagonal().clamp(min=0).sqrt()


def infill_errors(x_bar, sampler="ddpm", steps=50, project="x_t", xi=3e-2, draws=2000, seed=0):
    """Infill of the middle third of each clip of x_bar (clips, 1, N), against the posterior.

    Returns the error of the mean over the posterior sd (rms over clips and positions, both over the
    middle third), the ratio of the variances, and the largest error in the context.
    """
    generator = torch.Generator().manual_seed(seed)
    source = Gaussian(covariance())
    mean, sd = infill_posterior(source, x_bar)

    # Sample each clip many times: a draw in each channel, which L1 keeps apart.
    many = x_bar.expand(-1, draws, -1)                                          # (clips, draws, N)
    z = torch.randn(many.shape, dtype=many.dtype, generator=generator)
    task = tasks.infill(many, C, C, z, project=project)
    x_0 = guidance.sample(source, task.x_T, task, steps=steps, sampler=sampler, xi=xi,
                          generator=generator)

    # Compare. Draws are finite: the variance of their mean is not an error of the sampler.
    middle = slice(C, N - C)
    variance = x_0[..., middle].var(1)                                          # (clips, N / 3)
    error = x_0[..., middle].mean(1) - mean[:, 0, middle]
    share = (error.square() - variance / draws) / sd[middle] ** 2
    ratio = variance.mean() / (sd[middle] ** 2).mean()
    term = task.terms[0]
    in_context = (term.A(x_0) - term.y).abs().max()
    return share.mean().clamp(min=0).sqrt().item(), ratio.item(), in_context.item()


def regenerate_correlation(start_from, sampler, k=0.85, draws=2000, seed=0):
    """Correlation of the regenerated middle with the original's: what is left of x_bar."""
    generator = torch.Generator().manual_seed(seed)
    source = Gaussian(covariance())
    x_bar = source.draw(draws, generator)
    z = torch.randn(x_bar.shape, dtype=x_bar.dtype, generator=generator)
    task = tasks.regenerate(x_bar, 1, 1, z, k=k, start_from=start_from, project="none")
    x_0 = guidance.sample(source, task.x_T, task, steps=50, sampler=sampler, xi=0,
                          generator=generator)
    middle = slice(C, N - C)
    both = torch.stack([x_0[..., middle].flatten(), x_bar[..., middle].flatten()])
    return torch.corrcoef(both)[0, 1].item()


def main():
    random = Gaussian(covariance()).draw(16, torch.Generator().manual_seed(0))
    print("| sampler | steps | projection | xi | mean error / sd, sine "
          "| mean error / sd, 16 random clips | variance ratio | context error |")
    print("|---|---|---|---|---|---|---|---|")
    settings = (("x_t", 0), ("x_t", 3e-3), ("x_t", 3e-2), ("x_t", 3e-1),
                ("x0_hat", 0), ("x0_hat", 3e-2), ("x0_hat", 0.2), ("none", 3e-2), ("none", 0))
    for sampler, steps in (("ddpm", 50), ("ddpm", 500), ("ddim", 50), ("ddim", 500)):
        for project, xi in settings:
            how = (sampler, steps, project, xi)
            error, ratio, context = infill_errors(sine(), *how, draws=500)
            typical, _, _ = infill_errors(random, *how, draws=50)
            print(f"| {sampler.upper()} | {steps} | {project} | {xi:g} | {error:.2f} "
                  f"| {typical:.2f} | {ratio:.2f} | {context:.0e} |", flush=True)

    print()
    for start_from in ("paper", "matched"):
        ddpm = regenerate_correlation(start_from, "ddpm")
        ddim = regenerate_correlation(start_from, "ddim")
        print(f"Regenerate, k = 0.85, start_from={start_from!r}: "
              f"correlation with the original: DDPM {ddpm:.2f}, DDIM {ddim:.2f}")


if __name__ == "__main__":
    main()
