"""Numbers of the pixels alone, which need no network: colour, contrast and sharpness of images, and how near
restored images are to their originals.

Saturation:  mean of (max - min) over the channels of a pixel, in [0, 1]
Contrast:    mean over images of the standard deviation of luminance
Sharpness:   mean absolute Laplacian of luminance
PSNR, SSIM:  against the image of the same place in the reference (Wang 2004); borders are not cropped
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from fastgen.core.errors import UserError
from fastgen.evaluation.metrics.estimate import Estimate, mean_of
from fastgen.evaluation.metrics.metric import Metric


def luminance(images: Tensor) -> Tensor:
    """[B, H, W] of images [B, C, H, W] in [0, 1]; one channel is itself (Rec. 601 weights)."""
    if images.shape[1] == 1:
        return images[:, 0]
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype, device=images.device)
    return (images[:, :3] * weights.reshape(3, 1, 1)).sum(1)


def saturation(images: Tensor) -> Tensor:
    """[B] of images [B, C, H, W] in [0, 1]."""
    return (images.amax(1) - images.amin(1)).flatten(1).mean(1)


def contrast(images: Tensor) -> Tensor:
    return luminance(images).flatten(1).std(1)


def sharpness(images: Tensor) -> Tensor:
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=images.dtype, device=images.device)
    return conv2d(luminance(images)[:, None], kernel[None, None]).abs().flatten(1).mean(1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Decibels [B] of images in [0, 1]; equal ones count as 100 dB."""
    error = (a - b).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """[B] of images in [0, 1], at least 11 pixels wide: Gaussian window of 11, sigma 1.5."""
    at = torch.arange(11, dtype=a.dtype, device=a.device) - 5
    line = (-(at**2) / (2 * 1.5**2)).exp()
    window = torch.outer(line, line) / line.sum() ** 2

    def blur(x: Tensor) -> Tensor:
        return conv2d(x.flatten(0, 1)[:, None], window[None, None]).unflatten(0, x.shape[:2])[:, :, 0]

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    found = found / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return found.flatten(1).mean(1)


def fidelity(images: Tensor, originals: Tensor) -> dict[str, float]:
    """Mean PSNR in dB and SSIM of restored images [N, C, H, W] in [0, 1]; SSIM for 11 pixels or more."""
    scores = {"psnr": psnr} | ({"ssim": ssim} if min(images.shape[2:]) >= 11 else {})
    return {k: float(score(images.double(), originals.double()).mean()) for k, score in scores.items()}


def _scores(images: Iterable[Tensor], score: Callable[[Tensor], Tensor]) -> Estimate:
    return mean_of(torch.cat([score(batch.float() / 255) for batch in images]))


def _of_images(score: Callable[[Tensor], Tensor]) -> Callable[[Any, str], Estimate]:
    return lambda material, encoder: _scores(material.images(), score)


def _of_pairs(score: Callable[[Tensor, Tensor], Tensor], side: int = 1) -> Callable[[Any, str], Estimate]:
    """The mean over pairs of a score of images of `side` pixels or more."""

    def compute(material: Any, encoder: str) -> Estimate:
        found = []
        for a, b in material.pairs():
            check_side(a, side)
            found.append(score(a.double() / 255, b.double() / 255))
        return mean_of(torch.cat(found))

    return compute


def check_side(images: Tensor, least: int, key: str = "--images") -> None:
    """Refuse images [B, C, H, W] with a side that is too short for a metric."""
    if min(images.shape[2:]) < least:
        found = f"images of {images.shape[3]} x {images.shape[2]} pixels"
        raise UserError(key, found, f"give {least} or more a side, or leave that metric out")


def drift(own: dict[str, float], teacher: dict[str, float]) -> dict[str, float]:
    """Each of saturation, contrast and sharpness as a ratio to the teacher's; 1 is no drift."""
    return {f"{k}_ratio": own[k] / teacher[k] for k in own if teacher.get(k)}


def appearance(images: Tensor) -> dict[str, float]:
    """Mean saturation, contrast and sharpness of images [N, C, H, W] in [0, 1] (clips: of all their
    frames).
    """
    if images.ndim == 5:
        images = images.transpose(1, 2).flatten(0, 1)
    scores = {"saturation": saturation, "contrast": contrast, "sharpness": sharpness}
    if images.shape[1] == 1:
        del scores["saturation"]
    return {k: float(score(images).mean()) for k, score in scores.items()}


METRICS = (
    Metric(
        "saturation", "mean spread of a pixel's channels", "none", "own", _of_images(saturation), (), "", 1
    ),
    Metric("contrast", "deviation of luminance", "none", "own", _of_images(contrast), (), "", 1),
    Metric("sharpness", "mean Laplacian of luminance", "none", "own", _of_images(sharpness), (), "", 1),
    Metric("psnr", "signal to noise, dB", "higher", "definition", _of_pairs(psnr), ("pairs",), "", 1),
    Metric("ssim", "structural similarity", "higher", "Wang 2004", _of_pairs(ssim, 11), ("pairs",), "", 1),
)
