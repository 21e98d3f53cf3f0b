""".splat files, which viewers in browsers read: 32 bytes for each Gaussian, the large and opaque ones first.

  position float32 [3], standard deviations float32 [3], colour and opacity as bytes [4], and a quaternion q
  (w first) as bytes [4], 128 (q + 1)                                       (the layout of antimatter15/splat)

Differs: a colour that changes with the view is that of its constant harmonic. A field becomes round Gaussians
at the points of a grid where it is inside its surface and one of the six neighbours is not.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.threed.asset import Asset
from fastgen.threed.fields import FieldAsset
from fastgen.threed.files import DENSITY
from fastgen.threed.gaussians import SH, GaussianAsset

CELLS = 40
"""points of a side where a field is looked at"""


@torch.no_grad()
def shell_of(field: FieldAsset, cells: int = CELLS) -> GaussianAsset:
    """The surface of a field as round Gaussians; one that shows nothing where the field is empty."""
    line = (torch.arange(cells) + 0.5) * (2 / cells) - 1
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).to(next(field.parameters()))
    density, colour = field.at(points)
    inside = density >= DENSITY
    padded = F.pad(inside[None, None].float(), (1,) * 6)[0, 0]
    around = torch.stack([padded.roll(by, axis) for axis in range(3) for by in (-1, 1)])[:, 1:-1, 1:-1, 1:-1]
    where = inside & (around.amin(0) == 0)
    means, shown = points[where], bool(where.any())
    found = GaussianAsset(max(1, len(means)))
    found.put("logits", torch.full((found.num,), 3.0 if shown else -20.0))
    if shown:
        found.put("means", means)
        found.put("log_scales", torch.full((found.num, 3), math.log(0.6 * 2 / cells)))
        found.put("quaternions", torch.tensor([1.0, 0, 0, 0]).expand(found.num, 4))
        found.put("sh", (colour[where][:, None] - 0.5) / SH)
    return found


@torch.no_grad()
def splat_bytes(asset: Asset) -> bytes:
    """The file of an asset."""
    one = shell_of(asset) if isinstance(asset, FieldAsset) else asset
    assert isinstance(one, GaussianAsset), type(one)
    scales, opacity = one.value("log_scales").exp(), one.value("logits").sigmoid()
    colour = torch.cat([SH * one.value("sh")[:, 0] + 0.5, opacity[:, None]], 1)
    order = (scales.prod(1) * opacity).argsort(descending=True)
    parts = [
        _little(torch.cat([one.value("means"), scales], 1)[order]),
        _bytes(255 * colour[order]),
        _bytes(128 * (F.normalize(one.value("quaternions"), dim=-1)[order] + 1)),
    ]
    return np.concatenate(parts, 1).tobytes()


def _little(values: Tensor) -> np.ndarray:
    """float32 [N, K] as bytes [N, 4 K]."""
    return np.ascontiguousarray(values.float().cpu().numpy().astype("<f4")).view(np.uint8)


def _bytes(values: Tensor) -> np.ndarray:
    return values.round().clamp(0, 255).byte().cpu().numpy()
