"""A student too small for its teacher: one Gaussian against two modes, exact scores and exact ratio.

What it ends up with is the choice of the divergence alone; nothing is learned badly.
"""

import torch

from fastgen.diffusion import divergences, losses
from fastgen.diffusion.schedules import EDM
from fastgen.networks.analytic import GaussianMixture
from tests.support import gaussians
from tests.support.toys import gaussian_role

LEVELS = 8


def two_modes():
    means = torch.tensor([[-1.5], [1.5]])
    return GaussianMixture(means, torch.full((2,), 0.3), torch.ones(2), EDM())


def log_teacher(mixture, x_t, t):
    """log p_t [B] of the noised mixture."""
    var = mixture.stds**2 + t[:, None] ** 2
    log_p = -0.5 * (x_t - mixture.means[:, 0]) ** 2 / var - 0.5 * (2 * torch.pi * var).log()
    return (mixture.weights.log() + log_p).logsumexp(1)


def far_share(name, expanded, steps=300, lr=0.05, start=(0.7, 0.6)):
    """Share of an affine student's samples nearer to the left mode, after descent from the right one."""
    S, mixture = EDM(), two_modes()
    u, w = gaussians.nodes(16)
    z, eps = (v.flatten().repeat(LEVELS)[:, None] for v in torch.meshgrid(u, u, indexing="ij"))
    weight = (w[:, None] * w[None]).flatten().repeat(LEVELS) / LEVELS
    t = S.from_unit(torch.linspace(0.1, 0.35, LEVELS, dtype=torch.float64)).repeat_interleave(len(u) ** 2)
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr, betas=(0.0, 0.9))
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - k / steps)
        x = theta[0] + theta[1] * z
        x_t = S.noise(x, eps, t)
        m, s = theta.detach()
        real, fake = mixture(x_t, t, {}), gaussian_role(S, m, s)(x_t, t, {})
        r = (log_teacher(mixture, x_t, t) - gaussians.log_density(x_t[:, 0], m, s, t)).exp()
        h, kappa, _ = divergences.weights(name, r, 0.1, 20.0)
        level = (weight * h).sum().detach()
        if expanded:
            loss = (weight * divergences.expanded(x, real, fake, h / level, kappa / level)).sum()
        else:
            scaled = (weight * len(weight) * h / level).detach()
            loss = losses.score_difference(x, real.detach(), fake.detach(), scaled)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    m, s = theta.detach()
    return float(torch.distributions.Normal(m, s.abs()).cdf(torch.zeros(())))


def value(name, m, s, t):
    """D_f(teacher || N(m, s^2)) of the laws noised to level t, by summation."""
    x = torch.linspace(-8, 8, 3201, dtype=torch.float64)
    t, m, s = (torch.tensor(v, dtype=torch.float64) for v in (t, m, s))
    log_p = log_teacher(two_modes(), x[:, None], t.expand(len(x)))
    log_q = gaussians.log_density(x, m, s, t).clamp(min=-600)
    f = divergences.TABLE[name].f((log_p - log_q).clamp(-500, 500).exp())
    return float((log_q.exp() * f).sum() * (x[1] - x[0]))


def prefers_covering(name, t):
    """Whether the divergence itself ranks the best covering Gaussian before the best single mode."""
    covering = min(value(name, 0.0, s, t) for s in (1.2, 1.3, 1.4, 1.5, 1.6))
    return covering < min(value(name, 1.5, s, t) for s in (0.25, 0.3, 0.35, 0.4))
