"""Maximum mean discrepancies of two sets of features [N, d], all in float64.

KID:   unbiased, kernel (x.y / d + 1)^3, mean over subsets, x 1000     (Binkowski 2018, arXiv 1801.01401)
CMMD:  biased, kernel exp(-|x - y|^2 / (2 sigma^2)) with sigma 10 on unit-length CLIP embeddings, x 1000
       (Jayasumana 2024, arXiv 2401.09603, Sec. 4 and the authors' code)

The kernel's matrix is never held whole.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.evaluation.metrics.estimate import Estimate, around
from fastgen.evaluation.metrics.neighbours import evenly

CHUNK, MOST = 1000, 5000
"""rows of a kernel's matrix at a time; samples that each contribution of KID is a mean over"""
Kernel = Callable[[Tensor, Tensor], Tensor]


def polynomial(a: Tensor, b: Tensor) -> Tensor:
    """(x.y / d + 1)^3, [N, M]."""
    return (a @ b.T / a.shape[1] + 1).pow(3)


def gaussian(sigma: float) -> Kernel:
    """exp(-|x - y|^2 / (2 sigma^2))."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        gap = a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T
        return (-gap.clamp(min=0) / (2 * sigma**2)).exp()

    return kernel


def _row_means(kernel: Kernel, a: Tensor, b: Tensor) -> Tensor:
    """Mean over b of k(x, b) for each x of a, [N]."""
    return torch.cat([kernel(chunk, b).mean(1) for chunk in a.split(CHUNK)])


def _diagonal(kernel: Kernel, a: Tensor) -> Tensor:
    """k(x, x) for each x, [N]."""
    return torch.cat([kernel(chunk, chunk).diagonal() for chunk in a.split(CHUNK)])


def _others(kernel: Kernel, a: Tensor) -> Tensor:
    """Mean of k(x, x') over the other rows, for each x of a."""
    n = len(a)
    return (_row_means(kernel, a, a) * n - _diagonal(kernel, a)) / (n - 1)


def unbiased(kernel: Kernel, a: Tensor, b: Tensor) -> float:
    """Squared MMD without the diagonal; may be slightly negative for equal laws."""
    a, b = a.double(), b.double()
    assert a.shape[1] == b.shape[1] and min(len(a), len(b)) > 1, (a.shape, b.shape)
    own = _others(kernel, a).mean() + _others(kernel, b).mean()
    return float(own - 2 * _row_means(kernel, a, b).mean())


def biased(kernel: Kernel, a: Tensor, b: Tensor) -> float:
    """Squared MMD with the diagonal; zero for equal sets, never negative."""
    a, b = a.double(), b.double()
    own = _row_means(kernel, a, a).mean() + _row_means(kernel, b, b).mean()
    return max(float(own - 2 * _row_means(kernel, a, b).mean()), 0.0)


def influence(kernel: Kernel, a: Tensor, b: Tensor, most: int = 0) -> Tensor:
    """How the squared MMD moves with the weight of each row of a: 2 (E k(x, a') - E k(x, b)), centred. Where
    there are more than `most` rows, expectations are over so many of them.
    """
    a, b = a.double(), b.double()
    if most and len(a) > most:
        own = _row_means(kernel, a, evenly(a, most))
    else:
        own = _others(kernel, a)
    found = 2 * (own - _row_means(kernel, a, evenly(b, most) if most else b))
    return found - found.mean()


def polynomial_mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD of the whole sets with KID's kernel."""
    return unbiased(polynomial, a, b)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two sets are one: their distance is zero, which an unbiased estimate of it need not be."""
    return a.shape == b.shape and torch.equal(a, b)


def mmd_estimate(a: Tensor, b: Tensor) -> Estimate:
    """That, x 1000, with contributions."""
    if same(a, b):
        return around(0.0, lambda: torch.zeros(len(a)))
    return around(1000 * polynomial_mmd(a, b), lambda: 1000 * influence(polynomial, a, b))


def kid(a: Tensor, b: Tensor, num_subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the MMD over random subsets, x 1000."""
    size = min(size, len(a), len(b))
    if size == len(a) == len(b):
        return 1000 * polynomial_mmd(a, b), 0.0  # every subset is the whole
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(num_subsets):
        rows, columns = (torch.randperm(len(x), generator=generator)[:size] for x in (a, b))
        values.append(1000 * polynomial_mmd(a[rows], b[columns]))
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std(correction=0))


def kid_estimate(a: Tensor, b: Tensor) -> Estimate:
    """KID, with contributions."""
    if same(a, b):
        return around(0.0, lambda: torch.zeros(len(a)))
    return around(kid(a, b)[0], lambda: 1000 * influence(polynomial, a, b, MOST))


def cmmd_estimate(a: Tensor, b: Tensor, sigma: float = 10.0) -> Estimate:
    """CMMD of two sets of embeddings, which are scaled to unit length here."""
    a, b = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (a, b))
    kernel = gaussian(sigma)
    return around(1000 * biased(kernel, a, b), lambda: 1000 * influence(kernel, a, b))
