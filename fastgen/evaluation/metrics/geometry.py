"""First numbers of point clouds [P, 3] that need no network: Chamfer distance, and the Jensen-Shannon
divergence of where two sets of clouds lie in space (Achlioptas 2018, arXiv 1707.02392).
"""

import math

import torch
from torch import Tensor

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


def jensen_shannon(a: list[Tensor], b: list[Tensor], resolution: int = 28) -> float:
    """Divergence in bits, 0 to 1, of the points of two sets of clouds over the grid that holds both."""
    points = torch.cat([*a, *b]).double()
    low, high = points.amin(0), points.amax(0)
    p, q = (occupancy(clouds, low, high, resolution) for clouds in (a, b))
    mean = (p + q) / 2

    def divergence(x: Tensor) -> Tensor:
        held = x > 0
        return (x[held] * (x[held] / mean[held]).log()).sum()

    return float((divergence(p) + divergence(q)) / 2 / math.log(2))
