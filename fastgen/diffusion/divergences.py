"""f-divergences between teacher p and student q, the density ratio they need, and their gradients.

  D_f(p || q) = E_q f(r);   r = p / q;   h(r) = r^2 f''(r)
  Delta = s_p - s_q;   e = s_q - grad log q(x_t | x0)

  f-distill, arXiv 2502.15681:     grad D_f(p_t || q_t) = -E [ h(r) Delta dx_t/dtheta ]
  Uni-Instruct, arXiv 2505.20755:  D_f(p_0 || q_0) - D_f(p_T || q_T) = int g^2/2 E_q [ h(r) |Delta|^2 ] dt
        grad E_q [ h |Delta|^2 ] = d/dtheta E [ 2 h(r) Delta.e + (h - r h') |Delta|^2 ]
  where on the last line r, s_p and s_q are fixed functions and the derivative is taken through x_t and x0.

In terms of denoisers Delta = alpha (D_real - D_fake) / sigma^2 and e = alpha (D_fake - x0) / sigma^2; the
losses below are written in D, that is with the weight sigma^4 / alpha^2.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastgen.diffusion.losses import per_sample_mean
from fastgen.diffusion.schedules import Schedule, expand

Name = Literal["rkl", "kl", "jeffreys", "js", "softened", "hellinger", "chi2", "neyman"]


class Divergence(NamedTuple):
    """One divergence: f, h = r^2 f'', k = h - r h' and r2h = r^2 h'', each a function of the ratio r."""

    f: Callable[[Tensor], Tensor]
    h: Callable[[Tensor], Tensor]
    k: Callable[[Tensor], Tensor]
    r2h: Callable[[Tensor], Tensor]


one, zero = torch.ones_like, torch.zeros_like
TABLE: dict[str, Divergence] = {
    "rkl": Divergence(lambda r: -r.log(), one, one, zero),
    "kl": Divergence(lambda r: r * r.log(), lambda r: r, zero, zero),
    "jeffreys": Divergence(lambda r: (r - 1) * r.log(), lambda r: 1 + r, one, zero),
    "js": Divergence(
        lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
        lambda r: r / (1 + r),
        lambda r: (r / (1 + r)) ** 2,
        lambda r: -2 * r**2 / (1 + r) ** 3,
    ),
    "softened": Divergence(
        lambda r: (1 + r) * ((1 + r) / (2 * r)).log(),
        lambda r: 1 / (1 + r),
        lambda r: (1 + 2 * r) / (1 + r) ** 2,
        lambda r: 2 * r**2 / (1 + r) ** 3,
    ),
    "hellinger": Divergence(
        lambda r: 1 - r.sqrt(), lambda r: r.sqrt() / 4, lambda r: r.sqrt() / 8, lambda r: -r.sqrt() / 16
    ),
    "chi2": Divergence(lambda r: (r - 1) ** 2, lambda r: 2 * r**2, lambda r: -2 * r**2, lambda r: 4 * r**2),
    "neyman": Divergence(lambda r: 1 / r - 1, lambda r: 2 / r, lambda r: 4 / r, lambda r: 4 / r),
}


def log_ratio(logits: list[Tensor], limit: float = 10.0) -> Tensor:
    """log p/q [B] from discriminator logits (real = 1): their mean over heads and positions, clamped."""
    return torch.stack([per_sample_mean(y[:, None]) for y in logits]).mean(0).float().clamp(-limit, limit)


def weights(name: str, r: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """(h, h - r h', r^2 h'') of the clamped ratio; where r is clamped, its derivatives are 0."""
    f, c = TABLE[name], r.clamp(low, high)
    free = ((r >= low) & (r <= high)).to(r)
    h = f.h(c)
    return h, h - free * (h - f.k(c)), free * f.r2h(c)


def score_identity(
    x: Tensor, real: Tensor, fake: Tensor, alpha: float, distance: str = "l2", c: float = 0.01
) -> Tensor:
    """d'(Delta).(D_fake - x) + 2 (1 - alpha) d(Delta), [B], a mean over pixels (SiD, SIM).

    alpha = 1/2 is the gradient of E d(Delta) for an exact critic, alpha = 1 keeps the first term only (SIM).
    l2: d = |Delta|^2 / 2;  huber: sqrt(|Delta|^2 + c^2) - c per sample;  smooth: the same per pixel.
    """
    gap, e = real - fake, fake - x
    if distance == "l2":
        return per_sample_mean(gap * e) + (1 - alpha) * per_sample_mean(gap**2)
    if distance == "huber":
        norm = (per_sample_mean(gap**2) + c**2).sqrt()
        return per_sample_mean(gap * e) / norm + 2 * (1 - alpha) * (norm - c)
    norm = (gap**2 + c**2).sqrt()
    return per_sample_mean(gap * e / norm) + 2 * (1 - alpha) * per_sample_mean(norm - c)


def expanded(x: Tensor, real: Tensor, fake: Tensor, h: Tensor, k: Tensor) -> Tensor:
    """2 h Delta.e + k |Delta|^2 with k = h - r h', [B], a mean over pixels; h and k may carry gradient."""
    gap = real - fake
    return 2 * h * per_sample_mean(gap * (fake - x)) + k * per_sample_mean(gap**2)


def ratio_path(
    schedule: Schedule,
    x: Tensor,
    x_t: Tensor,
    t: Tensor,
    real: Tensor,
    fake: Tensor,
    h: Tensor,
    k: Tensor,
    r2h: Tensor,
) -> Tensor:
    """The gradient through the ratio, which `expanded` with constant h and k leaves out: with
    grad r = r Delta, the linear surrogate sg[2 r h' (Delta.e) Delta - r^2 h'' |Delta|^2 Delta].x_t, [B].
    """
    with torch.no_grad():
        gap = real - fake
        dot, norm = ((gap * v).flatten(1).sum(1) for v in (fake - x, gap))
        Delta = expand(schedule.alpha(t) / schedule.sigma(t) ** 2, gap) * gap
        direction = expand(2 * (h - k) * dot - r2h * norm, gap) * Delta
    return per_sample_mean(direction * x_t)


def global_sum(x: Tensor) -> Tensor:
    """Elementwise sum over all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        x = x.clone()
        torch.distributed.all_reduce(x)
    return x


def global_mean(x: Tensor) -> Tensor:
    """Mean of [B] over the batches of all processes."""
    total, num = global_sum(torch.stack([x.sum(), x.new_tensor(float(len(x)))]))
    return total / num


def running_means(values: Tensor, where: Tensor, sums: Tensor, memory: int) -> tuple[Tensor, Tensor]:
    """(the running mean of each sample's bin, [B]; the updated sums).

    where [B] is the bin of each of the values [B]; sums [2, bins], 0 at first, hold the bins' sums and counts
    over this batch of all processes and the samples before it, which fade so that about `memory` of them
    count. A batch of at least that size is its own mean.
    """
    batch = sums.new_zeros(sums.shape).index_add(1, where, torch.stack([values, torch.ones_like(values)]))
    batch = global_sum(batch)
    sums = (1 - batch[1].sum() / memory).clamp(min=0) * sums + batch
    return (sums[0] / sums[1].clamp(min=1e-12))[where], sums
