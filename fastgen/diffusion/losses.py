"""Losses: pure functions from tensors to a scalar. Samples are [B, ...]; a loss is a mean over the batch."""

from functools import reduce
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.diffusion.schedules import Schedule, expand

Weighting = Literal["x0", "eps", "snr1", "snr_plus_1", "flow", "edm", "v"]
"""names of w(t), see `error_weight`"""


def per_sample_mean(x: Tensor) -> Tensor:
    """Mean over all axes but the batch: [B, ...] -> [B]."""
    return x.flatten(1).mean(1)


def mse(pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """mean w |pred - target|^2, with an optional per-sample weight [B]."""
    loss = per_sample_mean((pred - target) ** 2)
    return (loss if weight is None else loss * weight.to(loss)).mean()


def l1(pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """mean w |pred - target|."""
    loss = per_sample_mean((pred - target).abs())
    return (loss if weight is None else loss * weight.to(loss)).mean()


def feature_distance(pred: list[Tensor], target: list[Tensor], weight: Tensor | None = None) -> Tensor:
    """Squared differences of feature maps [B, C, h, w] normalised to unit length along C, summed over maps
    (LPIPS without its learned weights, Zhang et al. 2018, arXiv 1801.03924, eq. 1).
    """
    unit = [(F.normalize(p, dim=1), F.normalize(q, dim=1)) for p, q in zip(pred, target)]
    loss = reduce(torch.add, [((p - q) ** 2).sum(1).flatten(1).mean(1) for p, q in unit])
    return (loss if weight is None else loss * weight.to(loss)).mean()


def pseudo_huber(pred: Tensor, target: Tensor, c: float, weight: Tensor | None = None) -> Tensor:
    """Elementwise sqrt(d^2 + c^2) - c (LCM, arXiv 2310.04378, Sec. 4)."""
    loss = per_sample_mean(((pred - target) ** 2 + c**2).sqrt() - c)
    return (loss if weight is None else loss * weight.to(loss)).mean()


def sample_huber(pred: Tensor, target: Tensor, c: float, weight: Tensor | None = None) -> Tensor:
    """Per-sample sqrt(|d|^2 + C^2) - C with C = c sqrt(dim), over sqrt(dim).

    c = 0.00054 gives the constant of iCT (arXiv 2310.14189, Sec. 3.3).
    """
    dim = pred[0].numel()
    norm2 = ((pred - target) ** 2).flatten(1).sum(1)
    loss = ((norm2 + c**2 * dim).sqrt() - c * dim**0.5) / dim**0.5
    return (loss if weight is None else loss * weight.to(loss)).mean()


def score_difference(x: Tensor, real: Tensor, fake: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Surrogate loss whose gradient in x is w (D_fake - D_real) / numel(x), the gradient of score
    distillation; methods differ in the weight w, a number or [B].

    Only x carries gradient; real and fake are denoised estimates at the same x_t.
    """
    with torch.no_grad():
        w = expand(weight, x) if isinstance(weight, Tensor) else weight
        target = x - w * (fake - real)
    return 0.5 * F.mse_loss(x, target)


def linear(x: Tensor, gradient: Tensor) -> Tensor:
    """mean(sg[g] x), whose gradient in x is g / numel(x)."""
    return (gradient.detach() * x).mean()


def distribution_matching(x: Tensor, real: Tensor, fake: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """score_difference with w = weight / mean|x - D_real| per sample (DMD2, eq. 5-7 of 2311.18828)."""
    return score_difference(
        x, real, fake, weight / per_sample_mean((x - real).abs()).detach().clamp(min=1e-6)
    )


def error_weight(schedule: Schedule, t: Tensor, weighting: Weighting) -> Tensor:
    """Weight w(t) [B] of a squared error in D: "x0" 1; "snr1" max(SNR, 1); "snr_plus_1" SNR + 1.

    A prediction kind gives the weight that makes it the squared error of such a network's output: "eps" SNR,
    "flow" ((alpha + sigma) / sigma)^2, "v" ((alpha^2 + sigma^2) / sigma)^2, "edm" SNR + 1 / sigma_data^2.
    """
    snr = (schedule.alpha(t) / schedule.sigma(t)) ** 2
    if weighting == "snr1":
        return snr.clamp(min=1)
    if weighting in ("snr_plus_1", "edm"):
        return snr + (1 if weighting == "snr_plus_1" else schedule.sigma_data**-2)
    zero = torch.zeros_like(t, dtype=torch.float64)
    return schedule.from_x0(weighting, zero + 1, zero, t) ** 2  # outputs are affine in D: the slope


def denoising(
    schedule: Schedule,
    D: Tensor,
    x0: Tensor,
    t: Tensor,
    weighting: Weighting = "eps",
    weight: Tensor | None = None,
) -> Tensor:
    """Denoising score matching, mean w(t) |D - x0|^2; `weight` [B] multiplies w(t)."""
    w = error_weight(schedule, t, weighting)
    return mse(D, x0, w if weight is None else w * weight)


def noise_moments(eps: Tensor) -> Tensor:
    """mean(e)^2 + (std(e) - 1)^2 of each sample of predicted noise [B, ...] (LiDiff, 2403.13470, eq. 9)."""
    flat = eps.flatten(1)
    return (flat.mean(1).square() + (flat.std(1) - 1).square()).mean()


def clamped(cos: Tensor, margin: float) -> Tensor:
    """Hinge loss mean max(0, margin - cos), no gradient above the margin (SwiftBrush v2, 2408.14176)."""
    return F.relu(margin - cos).mean()


@torch.no_grad()
def tempered_ratio(schedule: Schedule, x: Tensor, x_t: Tensor, t: Tensor, n: Tensor) -> Tensor:
    """Likelihood ratio exp(-mean n'^2 / 2) / exp(-mean n^2 / 2), [B], tempered by the dimension (TDM, arXiv
    2503.06674): n is the noise that x_t was made with, n' = (x_t - alpha x) / sigma the noise that makes it
    from x.
    """
    implied = (x_t - expand(schedule.alpha(t), x) * x) / expand(schedule.sigma(t), x)
    return (0.5 * (per_sample_mean(n**2) - per_sample_mean(implied**2))).exp()


def gan_generator(logits: list[Tensor], kind: str = "softplus", weight: Tensor | None = None) -> Tensor:
    """Generator loss of a GAN, averaged over heads: softplus(-l), or -l with the hinge loss.

    Logits are [B] or maps [B, h, w]; weight [B] multiplies each sample's term.
    """
    f = {"softplus": lambda y: F.softplus(-y), "hinge": lambda y: -y}[kind]
    terms = [per_sample_mean(f(y)[:, None]) for y in logits]
    return torch.stack([(term if weight is None else term * weight).mean() for term in terms]).mean()


def gan_discriminator(fake: list[Tensor], real: list[Tensor], kind: str = "softplus") -> Tensor:
    """Discriminator loss: softplus(l_fake) + softplus(-l_real), or half the sum of the two hinges."""
    if kind == "softplus":
        pairs = [F.softplus(f).mean() + F.softplus(-r).mean() for f, r in zip(fake, real)]
    else:
        pairs = [0.5 * (F.relu(1 + f).mean() + F.relu(1 - r).mean()) for f, r in zip(fake, real)]
    return torch.stack(pairs).mean()


def preference(preferred: list[Tensor], other: list[Tensor], counted: Tensor) -> Tensor:
    """Bradley-Terry loss of pairs, mean -log sigmoid(l_preferred - l_other) over heads and the pairs that are
    counted [B], 0 without any; a head's logit of a sample is the mean of its tokens'.
    """
    counted = counted.float()
    gaps = [per_sample_mean((a - b)[:, None]) for a, b in zip(preferred, other)]
    total = torch.stack([(F.softplus(-gap) * counted).sum() for gap in gaps]).mean()
    return total / counted.sum().clamp(min=1)


def r1(logits: list[Tensor], x: Tensor) -> Tensor:
    """R1 penalty: mean squared norm of d logit / d x, the logit averaged over heads and tokens (arXiv
    1801.04406).

    x is the tensor (noised sample) that the discriminator was evaluated at, and requires grad. Attention
    needs a second derivative here, which of PyTorch's kernels only "math" has.
    """
    score = torch.stack([y.flatten(1).mean(1) if y.ndim > 1 else y for y in logits]).mean(0)
    (grad,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return grad.flatten(1).square().sum(1).mean()


def approximate_r1(logits: list[Tensor], perturbed: list[Tensor]) -> Tensor:
    """Mean squared change of the logits under a small perturbation of their input (APT, arXiv 2501.08316)."""
    return torch.stack([F.mse_loss(p, y) for y, p in zip(logits, perturbed)]).mean()
