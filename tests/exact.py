"""The exact bench: sources whose denoiser and posterior have a closed form, so that guided sampling can be checked
without any trained network.

    python tests/exact.py        # what xi, the projection and the number of steps do; some minutes

For x_0 ~ N(m, S), the denoiser is E[x_0 | x_t] = m + alpha S (alpha^2 S + sigma^2 I)^-1 (x_t - alpha m), and the
posterior given y = A x_0 is Gaussian with mean m + S A^T (A S A^T)^-1 (y - A m).

The table is about infill of the middle third of clips of 96 positions, against the true posterior: the error of the
mean over the posterior's standard deviation, for the clip sin(i / 8) and for random draws of the source, which the
context says less about; the ratio of the variances; and the largest error in the context. It says: projection alone
meets the context but joins it badly, with the mean off and too much variance (DDPM, 50 steps, projecting x_t: 0.20 and
1.09); the gradient mends both (xi = 3e-2: 0.18 and 1.00). What counts is xi times the number of steps: what is right at
50 is too strong at 500 (0.84). Projecting x0_hat joins the context less by itself and takes a larger step to advantage:
xi = 0.2 brings a typical clip's mean nearer to the posterior's (0.28) than anything else at 50 steps of DDPM. Without a
projection 3e-2 is too little for 50 steps.
The last lines are what k = 0.85 leaves of the original in regenerate, by start: from t = 1 ("paper") nothing by DDPM
(correlation -0.01; "matched" 0.21), by DDIM as much as from the matched time (0.45 and 0.44).

These sources are tame: all positions have variance 1, and the denoiser is exact whatever it is shown. On trained
networks the two projections differ far more.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import guidance
import tasks
from diffusion import alpha_sigma

N = 96                                             # positions of a clip
C = N // 3                                         # left and right context of the infill task


def covariance():
    """0.9 exp(-(i-j)^2 / 72) + 0.1 exp(-|i-j| / 3) + 1e-6 on the diagonal: smooth, with a rough part."""
    lag = (torch.arange(N)[:, None] - torch.arange(N)).abs().double()
    return 0.9 * torch.exp(-lag**2 / 72) + 0.1 * torch.exp(-lag / 3) + 1e-6 * torch.eye(N, dtype=torch.float64)


class Gaussian:
    """The exact v-model of N(mean, S), for x_t (B, C, N) float64; diagonal in the eigenbasis of S."""

    def __init__(self, S, mean=None):
        self.S, self.mean = S, torch.zeros(len(S), dtype=S.dtype) if mean is None else mean
        self.eigenvalues, self.basis = torch.linalg.eigh(S)
        self.eigenvalues.clamp_(min=0)

    def noised(self, x_t, t):
        """alpha_t and sigma_t (B, 1, 1), the variances of x_t along the eigenvectors, and x_t - E[x_t] along them."""
        alpha, sigma = (c.reshape(-1, 1, 1) for c in alpha_sigma(t))
        return alpha, sigma, alpha**2 * self.eigenvalues + sigma**2, (x_t - alpha * self.mean) @ self.basis

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
    """The exact v-model of an equal mixture of N(mean, S) and N(-mean, S), with its exact classifier."""

    def __init__(self, S, mean):
        super().__init__(S, mean)
        self.parts = Gaussian(S, mean), Gaussian(S, -mean)

    def x0_hat(self, x_t, t):
        share = torch.softmax(torch.stack([p.log_density(x_t, t) for p in self.parts]), dim=0)    # (2, B, 1)
        return sum(w[..., None] * p.x0_hat(x_t, t) for w, p in zip(share, self.parts))

    def logit(self, x):
        """log p(first | x) - log p(second | x) for a clean x (B, 1, N): (B, 1)."""
        t = torch.zeros(len(x))
        return self.parts[0].log_density(x, t) - self.parts[1].log_density(x, t)


def sine():
    """The bench's fixed clip, sin(i / 8), (1, 1, N). Its own draws vary: the error grows with what the context says."""
    return torch.sin(torch.arange(N, dtype=torch.float64) / 8).reshape(1, 1, N)


def infill_posterior(source, x_bar):
    """Mean (B, 1, N) and standard deviation (N,) of x_0 given its first and last C positions, exactly."""
    known = torch.cat([torch.arange(C), torch.arange(N - C, N)])
    gain = torch.linalg.solve(source.S[known][:, known], source.S[known])                          # (2C, N)
    covariance = source.S - source.S[:, known] @ gain
    return x_bar[..., known] @ gain, covariance.diagonal().clamp(min=0).sqrt()


def infill_errors(x_bar, sampler="ddpm", steps=50, project="x_t", xi=3e-2, draws=2000, seed=0):
    """Infill of the middle third of each clip of x_bar (clips, 1, N), sampled `draws` times, against the posterior.

    Returns the error of the mean over the posterior sd (rms over clips and positions, both over the middle third),
    the ratio of the variances, and the largest error in the context.
    """
    g = torch.Generator().manual_seed(seed)
    source, middle = Gaussian(covariance()), slice(C, N - C)
    mean, sd = infill_posterior(source, x_bar)
    many = x_bar.expand(-1, draws, -1)              # (clips, draws, N): a draw in each channel, which L1 keeps apart
    task = tasks.infill(many, C, C, torch.randn(many.shape, dtype=many.dtype, generator=g), project=project)
    x_0 = guidance.sample(source, task.x_T, task, steps=steps, sampler=sampler, xi=xi, generator=g)
    got = x_0[..., middle]
    variance = got.var(1)
    # draws are finite: the variance of their mean is not an error of the sampler
    error = ((got.mean(1) - mean[:, 0, middle]).square() - variance / draws) / sd[middle] ** 2
    context = (task.terms[0].A(x_0) - task.terms[0].y).abs().max()
    return error.mean().clamp(min=0).sqrt().item(), (variance.mean() / (sd[middle] ** 2).mean()).item(), context.item()


def regenerate_correlation(start_from, sampler, k=0.85, draws=2000, seed=0):
    """Correlation of the regenerated middle with the original's: what is left of x_bar."""
    g = torch.Generator().manual_seed(seed)
    source = Gaussian(covariance())
    x_bar = source.draw(draws, g)
    z = torch.randn(x_bar.shape, dtype=x_bar.dtype, generator=g)
    task = tasks.regenerate(x_bar, 1, 1, z, k=k, start_from=start_from, project="none")
    x_0 = guidance.sample(source, task.x_T, task, steps=50, sampler=sampler, xi=0, generator=g)
    middle = slice(C, N - C)
    return torch.corrcoef(torch.stack([x_0[..., middle].flatten(), x_bar[..., middle].flatten()]))[0, 1].item()


def main():
    source = Gaussian(covariance())
    random = source.draw(16, torch.Generator().manual_seed(0))
    print("| sampler | steps | projection | xi | mean error / sd, sine | mean error / sd, 16 random clips "
          "| variance ratio | context error |")
    print("|---|---|---|---|---|---|---|---|")
    for sampler, steps in (("ddpm", 50), ("ddpm", 500), ("ddim", 50), ("ddim", 500)):
        for project, xi in (("x_t", 0), ("x_t", 3e-3), ("x_t", 3e-2), ("x_t", 3e-1), ("x0_hat", 0), ("x0_hat", 3e-2),
                            ("x0_hat", 0.2), ("none", 3e-2), ("none", 0)):
            error, ratio, context = infill_errors(sine(), sampler, steps, project, xi, draws=500)
            typical = infill_errors(random, sampler, steps, project, xi, draws=50)[0]
            print(f"| {sampler.upper()} | {steps} | {project} | {xi:g} | {error:.2f} | {typical:.2f} "
                  f"| {ratio:.2f} | {context:.0e} |", flush=True)
    print()
    for start_from in ("paper", "matched"):
        row = ", ".join(f"{s.upper()} {regenerate_correlation(start_from, s):.2f}" for s in ("ddpm", "ddim"))
        print(f"Regenerate, k = 0.85, start_from={start_from!r}: correlation with the original: {row}")


if __name__ == "__main__":
    main()
