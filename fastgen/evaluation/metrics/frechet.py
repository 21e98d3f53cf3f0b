"""Distances between two sets of feature vectors [N, d]: pure functions, all in float64.

Frechet:  |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), S with 1 / (n - 1)  (Heusel 2017, arXiv 1706.08500)
MMD:      unbiased, kernel (x.y / d + 1)^3                   (KID, Binkowski 2018, arXiv 1801.01401)
Recall:   share of real samples inside a k-NN ball of a generated one; precision the reverse   (1904.06991)
"""

import torch
from torch import Tensor

CHUNK = 1000


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] with 1 / (n - 1)."""
    assert features.ndim == 2 and len(features) > 1, features.shape
    x = features.double()
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def frechet_from(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Frechet distance of two Gaussians; tr (S1 S2)^(1/2) is that of the symmetric S1^(1/2) S2 S1^(1/2)."""
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two feature sets."""
    return frechet_from(*statistics(a), *statistics(b))


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    d = a.shape[1]
    return sum(float((chunk @ b.T / d + 1).pow(3).sum()) for chunk in a.split(CHUNK))


def polynomial_mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD with the KID kernel; may be slightly negative for equal laws."""
    a, b = a.double(), b.double()
    assert a.shape[1] == b.shape[1] and min(len(a), len(b)) > 1, (a.shape, b.shape)
    n, m, d = len(a), len(b), a.shape[1]
    own_a = _kernel_sum(a, a) - float((a.square().sum(1) / d + 1).pow(3).sum())
    own_b = _kernel_sum(b, b) - float((b.square().sum(1) / d + 1).pow(3).sum())
    return own_a / (n * (n - 1)) + own_b / (m * (m - 1)) - 2 * _kernel_sum(a, b) / (n * m)


def kid(a: Tensor, b: Tensor, num_subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the MMD over random subsets, times 1000."""
    size = min(size, len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(num_subsets):
        rows, columns = (torch.randperm(len(x), generator=generator)[:size] for x in (a, b))
        values.append(1000 * polynomial_mmd(a[rows], b[columns]))
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std(correction=0))


def _radii(x: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest other row."""
    return torch.cat([torch.cdist(chunk, x).kthvalue(k + 1, dim=1).values for chunk in x.split(CHUNK)])


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of points inside at least one ball."""
    inside = [(torch.cdist(chunk, centres) <= radii).any(1) for chunk in points.split(CHUNK)]
    return float(torch.cat(inside).double().mean())


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """(precision, recall) from k-nearest-neighbour balls; give equal counts."""
    real, fake = real.double(), fake.double()
    if min(len(real), len(fake)) <= k:
        return float("nan"), float("nan")
    return _covered(fake, real, _radii(real, k)), _covered(real, fake, _radii(fake, k))


def evenly(x: Tensor, num: int) -> Tensor:
    """At most num rows of x, evenly spaced, so that every class of a sorted set is kept."""
    if num >= len(x):
        return x
    return x[(torch.arange(num, device=x.device) * len(x)) // num]
