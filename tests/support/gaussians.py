"""Exact expectations for an affine Gaussian student x = m + s z of a teacher N(0.5, 1), by quadrature."""

import math

import numpy as np
import torch

from fastgen.diffusion.schedules import EDM
from tests.support.toys import gaussian_role

TEACHER, STUDENT, T = (0.5, 1.0), (0.1, 0.9), 0.7


def nodes(num=40):
    """Gauss-Hermite nodes and weights of N(0, 1), float64."""
    x, w = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(num))
    return x, w / w.sum()


def theta():
    """The student's mean and deviation, to be differentiated."""
    return tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in STUDENT)


def log_density(x, m, s, t):
    """log N(x; m, s^2 + t^2)."""
    var = s**2 + t**2
    return -0.5 * (x - m) ** 2 / var - 0.5 * torch.log(2 * math.pi * var)


def exact(integrand, t=T):
    """d/d(m, s) of E_q [ integrand(x_t, m, s) ], the student's own law and score moving with (m, s)."""
    u, w = nodes()
    m, s = theta()
    x_t = m + (s**2 + t**2).sqrt() * u
    return torch.stack(torch.autograd.grad((w * integrand(x_t, m, s)).sum(), (m, s)))


def surrogate(loss, t=T, teacher=TEACHER):
    """d/d(m, s) of E [ loss(x, x_t, D_real, D_fake, ratio) ] with all functions frozen at (m, s)."""
    u, w = nodes()
    z, eps = (v.flatten() for v in torch.meshgrid(u, u, indexing="ij"))
    weight = (w[:, None] * w[None]).flatten()
    m, s = theta()
    x = (m + s * z)[:, None]
    x_t = x + t * eps[:, None]
    tt = torch.full((len(x),), t, dtype=torch.float64)
    real = gaussian_role(EDM(), *teacher)(x_t, tt, {})
    fake = gaussian_role(EDM(), *STUDENT)(x_t, tt, {})
    p, q = (torch.tensor(v, dtype=torch.float64) for v in (teacher, STUDENT))
    log_r = (log_density(x_t, *p, t) - log_density(x_t, *q, t))[:, 0]
    value = (weight * loss(x, x_t, tt, real, fake, log_r)).sum()
    return value.detach(), torch.stack(torch.autograd.grad(value, (m, s)))


def denoiser(x_t, m, s, t=T):
    """D of N(m, s^2), differentiable in m and s."""
    return m + s**2 / (s**2 + t**2) * (x_t - m)
