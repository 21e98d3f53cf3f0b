"""Pure functions from tensors to a scalar loss. Images are [B, ...]; every loss is a mean over the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.schedules import Schedule, expand


def per_sample_mean(x: Tensor) -> Tensor:
    """Mean over everything but the batch: [B, ...] -> [B]."""
    return x.flatten(1).mean(1)


def mse(pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """mean w |pred - target|^2, with an optional per-sample weight [B]."""
    loss = per_sample_mean((pred - target) ** 2)
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


def distribution_matching(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Surrogate whose gradient in x is (D_fake - D_real) / mean|x - D_real|, over numel (DMD2, eq. 5-7 of
    2311.18828).

    x carries the gradient; real and fake are denoised estimates at the same x_t, without gradient.
    """
    with torch.no_grad():
        scale = per_sample_mean((x - real).abs()).clamp(min=1e-6)
        target = x - (fake - real) / expand(scale, x)
    return 0.5 * F.mse_loss(x, target)


def denoising(
    schedule: Schedule, D: Tensor, x0: Tensor, t: Tensor, weighting: str = "eps", sigma_data: float = 0.5
) -> Tensor:
    """Denoising score matching w(t) |D - x0|^2, per sample.

    weighting: "x0" w = 1; "eps" w = SNR, the noise-prediction loss; "snr1" w = max(SNR, 1);
    "flow" w = ((alpha + sigma) / sigma)^2; "edm" w = 1/sigma^2 + 1/sigma_data^2 (alpha = 1);
    "v" w = (alpha^2 + sigma^2) SNR-like v-prediction loss.
    """
    a, s = schedule.alpha(t), schedule.sigma(t)
    weights = {
        "x0": lambda: torch.ones_like(a),
        "eps": lambda: (a / s) ** 2,
        "snr1": lambda: ((a / s) ** 2).clamp(min=1),
        "flow": lambda: ((a + s) / s) ** 2,
        "edm": lambda: (a / s) ** 2 + 1 / sigma_data**2,
        "v": lambda: ((a**2 + s**2) / s) ** 2,
    }
    return mse(D, x0, weights[weighting]())


def gan_generator(logits: list[Tensor], kind: str = "softplus") -> Tensor:
    """Generator side of the GAN pair, averaged over heads: softplus(-l), or -l for the hinge pair."""
    f = {"softplus": lambda y: F.softplus(-y), "hinge": lambda y: -y}[kind]
    return torch.stack([f(y).mean() for y in logits]).mean()


def gan_discriminator(fake: list[Tensor], real: list[Tensor], kind: str = "softplus") -> Tensor:
    """Discriminator side: softplus(l_fake) + softplus(-l_real), or half the sum of the two hinges."""
    if kind == "softplus":
        pairs = [F.softplus(f).mean() + F.softplus(-r).mean() for f, r in zip(fake, real)]
    else:
        pairs = [0.5 * (F.relu(1 + f).mean() + F.relu(1 - r).mean()) for f, r in zip(fake, real)]
    return torch.stack(pairs).mean()
