"""How far apart two point clouds are, [N, 3] and [M, 3] in the same units."""

import torch
from torch import Tensor

from fastgen.core.errors import UserError

CHUNK = 2**24
"""pairs of points that are compared at once"""


def nearest(a: Tensor, b: Tensor) -> Tensor:
    """Distance [N] of each point of a to the nearest of b."""
    _check(a, b)
    rows = max(1, CHUNK // len(b))
    return torch.cat([torch.cdist(part, b).amin(1) for part in a.split(rows)])


def chamfer(a: Tensor, b: Tensor) -> float:
    """Mean of the two mean distances to the nearest point of the other, not squared."""
    return chamfer_of(nearest(a, b), nearest(b, a))


def chamfer_of(to_b: Tensor, to_a: Tensor) -> float:
    """The same of distances that are known: of a's points to b, and of b's to a."""
    return float(0.5 * (to_b.mean() + to_a.mean()))


def f_score(a: Tensor, b: Tensor, within: float) -> float:
    """Harmonic mean of the shares of a near b (precision) and of b near a (recall)."""
    return f_score_of(nearest(a, b), nearest(b, a), within)


def f_score_of(to_b: Tensor, to_a: Tensor, within: float) -> float:
    """The same of distances that are known: of a's points to b, and of b's to a."""
    precision, recall = ((distance <= within).double().mean() for distance in (to_b, to_a))
    return float(2 * precision * recall / (precision + recall)) if precision + recall > 0 else 0.0


def voxel_iou(a: Tensor, b: Tensor, cell: float) -> float:
    """Cells that both occupy over cells that any does."""
    counts = _cells(a, b, cell)
    return float((counts > 0).all(1).double().sum() / len(counts))


def jsd(a: Tensor, b: Tensor, cell: float, dims: int = 3) -> float:
    """Jensen-Shannon divergence in nats, 0 to log 2, of the shares of points in each cell; dims 2 looks from
    above.
    """
    p, q = (_cells(a[:, :dims], b[:, :dims], cell).double().T / torch.tensor([[len(a)], [len(b)]])).unbind(0)
    m = 0.5 * (p + q)
    return float(0.5 * (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum())


def _cells(a: Tensor, b: Tensor, cell: float) -> Tensor:
    """Points of a and of b [K, 2] in each of the K cells that hold some."""
    _check(a, b)
    if not cell > 0:
        raise UserError("cell", f"found {cell:g}", "give the side of a cell, above 0")
    where = torch.cat([a, b]).div(cell).floor().long()
    _, index = where.unique(dim=0, return_inverse=True)
    num = int(index.max()) + 1
    parts = index.split([len(a), len(b)])
    return torch.stack([torch.bincount(part, minlength=num) for part in parts], 1)


def _check(a: Tensor, b: Tensor) -> None:
    for name, cloud in (("first", a), ("second", b)):
        if not len(cloud):
            raise UserError("points", f"the {name} cloud is empty", "give one point or more")
        if not cloud.isfinite().all():
            raise UserError("points", f"the {name} cloud holds values that are not finite", "leave them out")
