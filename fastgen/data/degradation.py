"""Low-resolution pictures, made of those of a data set, for super-resolution.

A picture of factor 2n is the one of factor n halved again, so that a stronger degradation is a function of a
milder one: what scale distillation rests on (YONOS-SR, arXiv 2401.17258). All are of 8 bits, as files are.
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, pad

from fastgen.core.errors import UserError

MOST_BLUR, MOST_NOISE = 1.5, 10.0
"""of the kind camera: standard deviations of the blur, in pixels of the original, and of the noise, of 255"""
SEED = 2_654_435_761
"""image i of a set is degraded by random numbers of the seed SEED + i"""


def degrade(images: Tensor, factor: int, kind: str = "bicubic", first: int = 0) -> Tensor:
    """uint8 [N, C, H / factor, W / factor] of uint8 images [N, C, H, W], which are number `first` and on of
    their set; factor is a power of two.

    bicubic and area halve with that filter; camera adds a blur and noise of random strength before them.
    UserError where a side cannot be halved so often.
    """
    if any(side % factor or side < 2 * factor for side in images.shape[2:]):
        found = f"found {factor} for images of {images.shape[2]} x {images.shape[3]} pixels"
        raise UserError("data.degradation.factor", found, "give images whose sides it divides, twice or more")
    if kind == "camera":
        images = torch.stack([_camera(image, SEED + first + i) for i, image in enumerate(images)])
    while factor > 1:
        images, factor = _halved(images, kind), factor // 2
    return images


def enlarge(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 images [N, C, *size] by bicubic interpolation, as Pillow's BICUBIC does it."""
    large = interpolate(images.float(), size, mode="bicubic", antialias=True)
    return large.round().clamp(0, 255).byte()


def shown(images: Tensor, factor: int, kind: str, first: int = 0) -> Tensor:
    """What a network is shown of uint8 images [N, C, H, W]: degraded, and enlarged to their own size."""
    return enlarge(degrade(images, factor, kind, first), (images.shape[2], images.shape[3]))


def _halved(images: Tensor, kind: str) -> Tensor:
    if kind == "area":
        return avg_pool2d(images.float(), 2).round().byte()
    size = images.shape[2] // 2, images.shape[3] // 2
    small = interpolate(images.float(), size, mode="bicubic", antialias=True)
    return small.round().clamp(0, 255).byte()


def _camera(image: Tensor, seed: int) -> Tensor:
    """One image [C, H, W], out of focus and noisy."""
    generator = torch.Generator().manual_seed(seed)
    blur, noise = torch.rand(2, generator=generator) * torch.tensor([MOST_BLUR, MOST_NOISE])
    at = torch.arange(-4.0, 5.0)
    line = torch.exp(-(at**2) / (2 * blur.clamp(min=0.1) ** 2))
    line = line / line.sum()
    wide = pad(image[:, None].float(), (4, 4, 4, 4), mode="replicate")
    soft = conv2d(conv2d(wide, line.reshape(1, 1, 1, 9)), line.reshape(1, 1, 9, 1))[:, 0]
    return (soft + noise * torch.randn(image.shape, generator=generator)).round().clamp(0, 255).byte()
