"""Scoring completed scans against the truth of their scenes.

chamfer:  mean distance to the nearest point of the other cloud, both ways, halved
jsd:      root of the Jensen-Shannon divergence, in nats, of the shares of points in cubes of 0.5
jsd_bev:  the same seen from above
iou:      share of the cubes of 0.5 held by any cloud that both hold
f_score:  harmonic mean of the shares of points within 0.2 of the other cloud

Lengths are in the scans' own unit. Those of LiDiff and its successors, but for their distances of cars and
streets: cells of 0.1 to 0.5 m and an F-score within 0.05 to 0.1 m.
"""

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.threed import metrics

CELL, WITHIN = 0.5, 0.2


class CloudMeasurer:
    """Metrics of clouds [B, N, 3]; the same interface as `fd_mini.Measurer`."""

    primary = "chamfer"
    least = 1

    def __init__(self, truth: Tensor, again: Tensor | None = None):
        """truth [R, N, 3] of each request; again: other points of the same scenes, of simulated ones"""
        self.truth, self.again = truth, again

    def compare(self, clouds: Tensor, attributes: dict[str, Tensor]) -> dict[str, float]:
        """Means over clouds, each against the truth of its scene: attributes["scene"] [B]."""
        if clouds.ndim != 3 or clouds.shape[2] != 3:
            raise UserError("clouds", f"shape {tuple(clouds.shape)}", "give clouds [B, N, 3]")
        pairs = zip(clouds.cpu().float(), self.truth[attributes["scene"]])
        rows = [scores(a, b) for a, b in pairs]
        return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}

    def floor(self, num: int) -> dict[str, float]:
        """The same scores of other points of the same scenes: what a perfect completion would get."""
        if self.again is None:
            return {}
        return self.compare(self.again[:num], {"scene": torch.arange(min(num, len(self.again)))})

    def describe(self) -> dict[str, str]:
        """What a number must be quoted with."""
        whose = "the run's own" if self.again is None else "held-out simulated"
        what = f"{len(self.truth)} {whose} scenes of {self.truth.shape[1]} points"
        return {"extractor": "none", "reference": f"{what}; cells of {CELL:g}, F-score within {WITHIN:g}"}


def scores(a: Tensor, b: Tensor) -> dict[str, float]:
    """All numbers of one cloud [N, 3] against its truth [M, 3]."""
    to_b, to_a = metrics.nearest(a, b), metrics.nearest(b, a)
    return {
        "chamfer": metrics.chamfer_of(to_b, to_a),
        "jsd": metrics.jsd(a, b, CELL) ** 0.5,
        "jsd_bev": metrics.jsd(a, b, CELL, dims=2) ** 0.5,
        "iou": metrics.voxel_iou(a, b, CELL),
        "f_score": metrics.f_score_of(to_b, to_a, WITHIN),
    }
