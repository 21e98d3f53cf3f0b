"""The CUDA rasteriser of gsplat, where it is installed, compiles and there is a GPU; else none."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from fastgen.core.errors import first_line, warn
from fastgen.threed.asset import Render


def gsplat_or_none(device: torch.device) -> Callable[..., Render] | None:
    """A renderer (asset, cameras, size, background) -> Render on this device; None for plain torch."""
    return _compiled() if device.type == "cuda" else None


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Render] | None:
    """Tried once, on one Gaussian: gsplat builds its CUDA code when it is first called."""
    try:
        import gsplat
    except ImportError:
        return None
    try:
        gsplat.rasterization(
            torch.zeros(1, 3, device="cuda"),
            torch.tensor([[1.0, 0, 0, 0]], device="cuda"),
            torch.ones(1, 3, device="cuda"),
            torch.ones(1, device="cuda"),
            torch.ones(1, 3, device="cuda"),
            torch.eye(4, device="cuda")[None],
            torch.eye(3, device="cuda")[None],
            8,
            8,
        )
    except Exception as error:  # whatever a compiler that is missing raises
        warn(f"gsplat is installed and does not run ({first_line(error)}): plain torch renders instead")
        return None
    return lambda *args: _render(gsplat.rasterization, *args)


def _render(rasterization: Any, asset, cameras, size: int, background) -> Render:
    colours = asset.colours(cameras)
    image, alpha, _ = rasterization(
        asset.value("means"),
        asset.value("quaternions"),
        asset.value("log_scales").exp(),
        asset.value("logits").sigmoid(),
        colours,
        cameras.viewmat.to(colours),
        cameras.intrinsics(size, size).to(colours),
        size,
        size,
        near_plane=0.05,
        render_mode="RGB+ED",
    )
    image, alpha = image.permute(0, 3, 1, 2), alpha.permute(0, 3, 1, 2)
    return Render(image[:, :3] + (1 - alpha) * background.to(image)[..., None, None], alpha, image[:, 3:])
