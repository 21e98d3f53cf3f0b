"""Random changes of pictures before a discriminator sees them, differentiable: real and fake alike.

Paper: Zhao et al. 2020 (DiffAugment), arXiv 2006.10738. Pictures are [N, C, H, W] in [0, 1].
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Literal["colour", "translation", "cutout"]
Rand = Callable[[int], Tensor]
"""uniform numbers in [0, 1), [N]"""


def augment(images: Tensor, kinds: tuple[Augmentation, ...], rand: Rand) -> Tensor:
    """Each picture changed by each kind, in this order."""
    change = {"colour": _colour, "translation": _translated, "cutout": _cut}
    for kind in kinds:
        images = change[kind](images, rand)
    return images


def _drawn(images: Tensor, rand: Rand) -> Tensor:
    return rand(len(images)).to(images).reshape(-1, 1, 1, 1)


def _colour(images: Tensor, rand: Rand) -> Tensor:
    """Brightness by up to a quarter of the range, saturation by 0 to 2, contrast by 0.5 to 1.5."""
    x = images + (_drawn(images, rand) - 0.5) / 2
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 * _drawn(images, rand)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (_drawn(images, rand) + 0.5)


def _places(images: Tensor, rand: Rand, low: int, high: int, side: int) -> Tensor:
    """Whole numbers in [low, high) of each picture as rows or columns, [N, side], counted from there."""
    start = low + (rand(len(images)) * (high - low)).long().to(images.device)
    return start[:, None] + torch.arange(side, device=images.device)


def _translated(images: Tensor, rand: Rand) -> Tensor:
    """Shifted by up to an eighth of each side; what comes in is 0."""
    n, _, h, w = images.shape
    dy, dx = h // 8, w // 8
    padded = F.pad(images, (dx, dx, dy, dy))
    rows, columns = _places(images, rand, 0, 2 * dy + 1, h), _places(images, rand, 0, 2 * dx + 1, w)
    every = torch.arange(n, device=images.device)[:, None, None]
    return padded[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cut(images: Tensor, rand: Rand) -> Tensor:
    """Without a rectangle of half of each side somewhere, in part outside."""
    n, _, h, w = images.shape
    keep = []
    for side in (h, w):
        first = _places(images, rand, -(side // 4), side - side // 4, 1)
        at = torch.arange(side, device=images.device)[None]
        keep.append((at < first) | (at >= first + side // 2))
    outside = keep[0][:, :, None] | keep[1][:, None, :]
    return images * outside[:, None].to(images)
