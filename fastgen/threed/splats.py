""".splat files, which viewers in browsers read: 32 bytes for each Gaussian, the large and opaque ones first.

  position float32 [3], standard deviations float32 [3], colour and opacity as bytes [4], and a quaternion q
  (w first) as bytes [4], 128 (q + 1)                                       (the layout of antimatter15/splat)

A field becomes round Gaussians at the points of a grid of step h, those left out that nobody sees. Along a
ray they add up to its optical depth where (2 pi s^2 / h^3) Li2(o) = density, for standard deviations s and
opacities o, with the dilogarithm Li2(o) = -int_0^o log(1 - u) / u du = sum_k o^k / k^2.

Differs: a colour that changes with the view is that of its constant harmonic.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.threed.asset import Asset
from fastgen.threed.fields import FieldAsset
from fastgen.threed.gaussians import SH, GaussianAsset

CELLS, SPREAD = 32, 0.6
"""points of a side where a field is looked at; standard deviation of what stands there, in steps"""
FAINT, HIDDEN = 1 / 64, 3.0
"""opacity below which a Gaussian is left out; optical depth on every side from which on it is"""


@torch.no_grad()
def splats_of(field: FieldAsset, cells: int = CELLS) -> GaussianAsset:
    """A field as round Gaussians; one that shows nothing where it is empty."""
    h = 2 / cells
    line = (torch.arange(cells) + 0.5) * h - 1
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).to(next(field.parameters()))
    density, colour = field.at(points)
    depth = h * density
    before = [depth.cumsum(axis) - depth for axis in range(3)]
    behind = [depth.sum(axis, keepdim=True) - one - depth for axis, one in enumerate(before)]
    opacity = opacity_of(depth)
    where = (opacity > FAINT) & (torch.stack([*before, *behind]).amin(0) < HIDDEN)
    means, shown = points[where], bool(where.any())
    found = GaussianAsset(max(1, len(means)))
    found.put("logits", opacity[where].clamp(max=0.999).logit() if shown else torch.full((1,), -20.0))
    if shown:
        found.put("means", means)
        found.put("log_scales", torch.full((found.num, 3), math.log(SPREAD * h)))
        found.put("quaternions", torch.tensor([1.0, 0, 0, 0]).expand(found.num, 4))
        found.put("sh", (colour[where][:, None] - 0.5) / SH)
    return found


def opacity_of(depth: Tensor) -> Tensor:
    """Opacities of Gaussians at every point of a grid that add up to an optical depth for each step of it."""
    o = torch.linspace(0, 1, 513).to(depth)
    k = torch.arange(1, 400).to(depth)
    depths = 2 * math.pi * SPREAD**2 * (o[:, None] ** k / k**2).sum(1)
    return o[torch.bucketize(depth, depths).clamp(max=512)]


@torch.no_grad()
def splat_bytes(asset: Asset) -> bytes:
    """The file of an asset."""
    one = splats_of(asset) if isinstance(asset, FieldAsset) else asset
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
