"""Pictures whose look a video student's frames take over, apart from the clips it is trained on."""

from pathlib import Path

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.data import moving
from fastgen.data.bundled import load_images
from fastgen.data.folders import check_folder, gather, scan
from fastgen.data.media import describe, read_files
from fastgen.networks.codecs import TextCodec

NAMES = ("tinted", moving.NAME)
STRIDE = 7
"""clips between two whose frame is taken: no divisor of the colours, backgrounds or frames"""


def check_appearance(cfg) -> None:
    """Refuse a section that names no pictures, or two kinds of them."""
    key = "data.appearance"
    if bool(cfg.images) == bool(cfg.name):
        found = "images and name" if cfg.images else "neither images nor name"
        raise UserError(key, f"found {found}", "give one of them")
    if cfg.images:
        check_folder(Path(cfg.images).expanduser(), f"{key}.images")
    elif cfg.name not in NAMES:
        raise UserError(f"{key}.name", f"found {cfg.name!r}", f"allowed: {', '.join(NAMES)}")


def check_clips(codec) -> None:
    """Refuse a section beside a teacher whose samples have no frames."""
    if not isinstance(codec, TextCodec) or not codec.family.temporal:
        raise UserError("data.appearance", "found for a teacher that makes no clips", "leave it out")


def load_appearance(cfg, codec, on_bad: str = "skip") -> Tensor | None:
    """uint8 [M, 3, H, W] at the size of a frame of the teacher's; None without a section."""
    if cfg is None:
        return None
    check_appearance(cfg)
    check_clips(codec)
    if cfg.images:
        samples = gather(scan(Path(cfg.images)))
        size = (3, *codec.pixels)
        images, kept = read_files(samples, size, on_bad, cfg.limit, "data.appearance.images")
        print(describe(samples.listing, {"pictures": len(kept.files)}, "data.appearance: "))
    else:
        images = _bundled(cfg.name, cfg.limit)
        if tuple(images.shape[-2:]) != tuple(codec.pixels):
            found = f"{cfg.name} holds pictures of {images.shape[-1]} pixels, frames have {codec.pixels[-1]}"
            raise UserError("data.appearance.name", found, "set images to a folder of your own")
    return contrasted(images, cfg.contrast)


def _bundled(name: str, limit: int) -> Tensor:
    if name != moving.NAME:
        return load_images(name, "train").images[:limit]
    num = min(limit, moving.count())
    index = [i * STRIDE % moving.count() for i in range(num)]
    parts = []
    for first in range(0, num, 250):
        some = index[first : first + 250]
        at = torch.arange(first, first + len(some)) * 5 % moving.FRAMES
        parts.append(moving.compose(some)[torch.arange(len(some)), :, at])
    return torch.cat(parts)


def contrasted(images: Tensor, factor: float) -> Tensor:
    """uint8 pictures with their values moved away from mid-grey, 127.5, by a factor."""
    if factor == 1:
        return images
    return (127.5 + (images.float() - 127.5) * factor).round().clamp(0, 255).byte()
