"""Numbers of point clouds [P, 3] that need no network: Chamfer distance, and the Jensen-Shannon divergence of
where two sets of clouds lie in space (Achlioptas 2018, arXiv 1707.02392).
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.evaluation.metrics.estimate import Estimate, around, mean_of
from fastgen.evaluation.metrics.metric import Metric

CHUNK = 2048


def _nearest(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of each point of a to the nearest of b."""
    return torch.cat([torch.cdist(chunk, b).amin(1) for chunk in a.split(CHUNK)]).square()


def chamfer(a: Tensor, b: Tensor) -> float:
    """Mean squared distance to the nearest point of the other cloud, both ways added."""
    a, b = a.double(), b.double()
    return float(_nearest(a, b).mean() + _nearest(b, a).mean())


def occupancy(clouds: list[Tensor], low: Tensor, high: Tensor, resolution: int) -> Tensor:
    """Share of all points in each cell of a resolution^3 grid between two corners, [resolution^3]."""
    points = torch.cat(clouds).double()
    cells = ((points - low) / (high - low).clamp(min=1e-12) * resolution).long().clamp(0, resolution - 1)
    flat = (cells[:, 0] * resolution + cells[:, 1]) * resolution + cells[:, 2]
    return torch.bincount(flat, minlength=resolution**3).double() / len(points)


RESOLUTION = 28
"""cells of the grid along each axis, as published"""


def box(a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Two corners [3] that hold all points."""
    points = torch.cat([*a, *b]).double()
    return points.amin(0), points.amax(0)


def jensen_shannon(a: list[Tensor], b: list[Tensor], resolution: int = RESOLUTION) -> float:
    """Divergence in bits, 0 to 1, of the points of two sets of clouds over the grid that holds both."""
    low, high = box(a, b)
    p, q = (occupancy(clouds, low, high, resolution) for clouds in (a, b))
    mean = (p + q) / 2

    def divergence(x: Tensor) -> Tensor:
        held = x > 0
        return (x[held] * (x[held] / mean[held]).log()).sum()

    return float((divergence(p) + divergence(q)) / 2 / math.log(2))


def jensen_shannon_estimate(a: list[Tensor], b: list[Tensor], resolution: int = RESOLUTION) -> Estimate:
    """With the influence of each cloud of a: d JSD / d p_i = log2(p_i / m_i) / 2, m the mean of p and q."""

    def influence() -> Tensor:
        low, high = box(a, b)
        p, q = (occupancy(clouds, low, high, resolution) for clouds in (a, b))
        slope = torch.where(p > 0, (2 * p / (p + q)).clamp(min=1e-300).log2() / 2, 0)
        share = torch.tensor([len(cloud) for cloud in a], dtype=torch.float64)
        moved = torch.stack([occupancy([cloud], low, high, resolution) @ slope for cloud in a])
        return share / share.mean() * (moved - p @ slope)

    return around(jensen_shannon(a, b, resolution), influence)


def _chamfer(material: Any, encoder: str) -> Estimate:
    own, originals = list(material.samples()), list(material.originals())
    if len(own) != len(originals):
        found = f"{len(originals)} originals for {len(own)} clouds"
        raise UserError("--against", found, "give one original per cloud, in the same order")
    return mean_of(torch.tensor([chamfer(a, b) for a, b in zip(own, originals)], dtype=torch.float64))


def _jensen_shannon(material: Any, encoder: str) -> Estimate:
    return jensen_shannon_estimate(list(material.samples()), list(material.originals()))


SOURCE = "arXiv 1707.02392"
METRICS = (
    Metric(
        "chamfer", "squared distance to the original", "lower", SOURCE, _chamfer, ("pairs",), "", 1, "clouds"
    ),
    Metric(
        "jsd",
        "divergence of where points lie, bits",
        "lower",
        SOURCE,
        _jensen_shannon,
        ("reference",),
        "",
        2,
        "clouds",
    ),
)
