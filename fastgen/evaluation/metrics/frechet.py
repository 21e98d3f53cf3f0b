"""Frechet distance of the Gaussians fitted to two sets of features [N, d], all in float64.

|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), S with 1 / (n - 1)        (Heusel 2017, arXiv 1706.08500)

tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of F' S2 F for any F with F F' = S1: a Cholesky
factor, or where S1 has not full rank the root from its eigenvectors.
The distance is biased upwards, by about c / n: compare at equal counts, or extrapolate to infinitely many
samples (FID_inf, Chong & Forsyth 2020, arXiv 1911.07023).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.evaluation.metrics.estimate import Estimate, around

CHUNK = 1000


@dataclass
class Statistics:
    """Mean [d] and covariance [d, d] (1 / (n - 1)) of n features, float64; num 0: not recorded."""

    mean: Tensor
    cov: Tensor
    num: int = 0


class Moments:
    """Mean and covariance of features that come in batches: memory of d x d whatever their number.

    Batches are joined by the pairwise update (Chan, Golub & LeVeque 1979), which is exact where sums of
    squares would cancel.
    """

    def __init__(self) -> None:
        self.num, self.mean, self.scatter = 0, torch.zeros(0), torch.zeros(0)

    def add(self, features: Tensor) -> None:
        """[B, d] more."""
        assert features.ndim == 2, features.shape
        for chunk in features.split(CHUNK):
            x = chunk.double()
            n, mean = len(x), x.mean(0)
            centred = x - mean
            if not self.num:
                self.num, self.mean, self.scatter = n, mean, centred.T @ centred
                continue
            total, gap = self.num + n, mean - self.mean
            self.scatter.addmm_(centred.T, centred)
            self.scatter.addr_(gap, gap, alpha=self.num * n / total)
            self.mean = self.mean + gap * (n / total)
            self.num = total

    def join(self, other: Moments) -> None:
        """Take in the samples of another."""
        if not other.num:
            return
        if not self.num:
            self.num, self.mean, self.scatter = other.num, other.mean, other.scatter.clone()
            return
        total, gap = self.num + other.num, other.mean - self.mean
        self.scatter = self.scatter + other.scatter
        self.scatter.addr_(gap, gap, alpha=self.num * other.num / total)
        self.mean = self.mean + gap * (other.num / total)
        self.num = total

    def statistics(self) -> Statistics:
        """Of everything so far, two samples or more."""
        assert self.num > 1, f"{self.num} sample; a covariance needs two"
        return Statistics(self.mean, self.scatter / (self.num - 1), self.num)


def statistics_of(features: Iterable[Tensor]) -> Statistics:
    """Of batches [B, d]."""
    moments = Moments()
    for batch in features:
        moments.add(batch)
    return moments.statistics()


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] with 1 / (n - 1)."""
    found = statistics_of([features])
    return found.mean, found.cov


def _factor(cov: Tensor) -> Tensor:
    """F with F F' = cov: Cholesky's where it exists, else the root from the eigenvectors."""
    lower, failed = torch.linalg.cholesky_ex(cov)
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(cov)
    return vectors * _clean(values).sqrt()


def _clean(values: Tensor) -> Tensor:
    """Eigenvalues of a covariance, those below rounding set to zero."""
    values = values.clamp(min=0)
    return torch.where(values < len(values) * torch.finfo(values.dtype).eps * values.max(), 0, values)


def frechet_from(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Frechet distance of two Gaussians."""
    factor = _factor(cov_a)
    cross = _clean(torch.linalg.eigvalsh(factor.T @ cov_b @ factor)).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two feature sets."""
    return frechet_from(*statistics(a), *statistics(b))


def influence(features: Tensor, own: Statistics, other: Statistics) -> Tensor:
    """How the distance from `own`, the statistics of features [N, d], to `other` moves with the weight of
    each sample, [N] of mean zero: 2 (m1 - m2)'z + z'(I - T)z - tr((I - T) S1), z = x - m1.

    T = S1^(-1/2) (S1^(1/2) S2 S1^(1/2))^(1/2) S1^(-1/2), with which d tr (S1 S2)^(1/2) = tr(T dS1) / 2.
    """
    values, vectors = torch.linalg.eigh(own.cov)
    values = _clean(values)
    root = (vectors * values.sqrt()) @ vectors.T
    inverse = (vectors * torch.where(values > 0, values, torch.inf).rsqrt()) @ vectors.T
    inner, turned = torch.linalg.eigh(root @ other.cov @ root)
    carry = inverse @ (turned * _clean(inner).sqrt()) @ turned.T @ inverse
    rest = torch.eye(len(values), dtype=carry.dtype) - carry
    found = []
    for chunk in features.split(CHUNK):
        z = chunk.double() - own.mean
        found.append(2 * z @ (own.mean - other.mean) + ((z @ rest) * z).sum(1))
    total = torch.cat(found)
    return total - total.mean()


def frechet_estimate(features: Tensor, reference: Statistics) -> Estimate:
    """The distance of features [N, d] to a reference, with its contributions."""
    own = statistics_of([features])
    value = frechet_from(own.mean, own.cov, reference.mean, reference.cov)
    return around(value, lambda: influence(features, own, reference))


def extrapolated(
    features: Tensor, reference: Statistics, num_sizes: int = 6, seed: int = 0
) -> tuple[float, dict[int, float]]:
    """(value for infinitely many samples, the distance at each count that the line was fitted to).

    Least squares of the distance against 1 / n over random subsets, their sizes evenly spaced in 1 / n from a
    fifth of the samples to all; FID_inf of arXiv 1911.07023 spaces them evenly in n. The reference's own
    count still counts.
    """
    n = len(features)
    shuffled = features[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    shares = torch.linspace(5, 1, num_sizes, dtype=torch.float64)
    found: dict[int, float] = {}
    for share in shares.tolist():
        size = round(n / share)
        if size > 1:
            own = statistics_of([shuffled[:size]])
            found[size] = frechet_from(own.mean, own.cov, reference.mean, reference.cov)
    x = torch.tensor([1 / size for size in found], dtype=torch.float64)
    y = torch.tensor(list(found.values()), dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(y.mean() - slope * x.mean()), found
