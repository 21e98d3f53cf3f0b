"""Precision, recall, density and coverage of two sets of features [N, d] by nearest neighbours, in float64.

A ball around each sample reaches to its k-th nearest other one.
Precision: share of generated samples in at least one ball of a real one; recall: the reverse, with the balls
of generated ones   (Kynkaanniemi 2019, arXiv 1904.06991; k = 3)
Density:   mean number of real balls that hold a generated sample, over k
Coverage:  share of real balls that hold a generated sample        (Naeem 2020, arXiv 2002.09797; k = 5)
Counts should be equal: recall and coverage depend on them.
"""

import torch
from torch import Tensor

from fastgen.evaluation.metrics.estimate import Estimate, mean_of, share_of

CHUNK = 1000


def _radii(x: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest other row."""
    return torch.cat([torch.cdist(chunk, x).kthvalue(k + 1, dim=1).values for chunk in x.split(CHUNK)])


def _counts(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Number of balls that hold each point, [N]."""
    return torch.cat([(torch.cdist(chunk, centres) <= radii).sum(1) for chunk in points.split(CHUNK)])


def _holding(centres: Tensor, radii: Tensor, points: Tensor) -> Tensor:
    """Whether each ball holds any point, [N]."""
    balls = zip(centres.split(CHUNK), radii.split(CHUNK))
    return torch.cat([(torch.cdist(c, points) <= r[:, None]).any(1) for c, r in balls])


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """(precision, recall); nan where there are not more than k samples."""
    real, fake = real.double(), fake.double()
    if min(len(real), len(fake)) <= k:
        return float("nan"), float("nan")
    return float(precision(fake, real, k).value), float(recall(fake, real, k).value)


def precision(fake: Tensor, real: Tensor, k: int = 3) -> Estimate:
    """Over generated samples."""
    fake, real = fake.double(), real.double()
    return share_of(_counts(fake, real, _radii(real, k)) > 0)


def recall(fake: Tensor, real: Tensor, k: int = 3) -> Estimate:
    """Over real samples."""
    fake, real = fake.double(), real.double()
    return share_of(_counts(real, fake, _radii(fake, k)) > 0, "references")


def density(fake: Tensor, real: Tensor, k: int = 5) -> Estimate:
    """Over generated samples; may exceed 1."""
    fake, real = fake.double(), real.double()
    return mean_of(_counts(fake, real, _radii(real, k)).double() / k)


def coverage(fake: Tensor, real: Tensor, k: int = 5) -> Estimate:
    """Over real samples."""
    fake, real = fake.double(), real.double()
    return share_of(_holding(real, _radii(real, k), fake), "references")


def evenly(x: Tensor, num: int) -> Tensor:
    """At most num rows of x, evenly spaced, so that every class of a sorted set is kept."""
    if num >= len(x):
        return x
    return x[(torch.arange(num, device=x.device) * len(x)) // num]
