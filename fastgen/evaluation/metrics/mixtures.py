"""Measures for points [N, D] against an exact Gaussian mixture: what the analytic teachers are judged by.

Energy distance:  2 E|x - y| - E|x - x'| - E|y - y'|, unbiased (Szekely & Rizzo 2013)
KL:  E_x [log q(x) - log p(x)], p the mixture and q a leave-one-out kernel density estimate of the samples
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.evaluation.items import Items
from fastgen.evaluation.metrics.estimate import Estimate, around, mean_of, without_interval
from fastgen.evaluation.metrics.metric import Metric


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased energy distance of two point sets; zero in expectation for equal laws."""
    a, b = a.double(), b.double()
    n, m = len(a), len(b)
    own_a = torch.cdist(a, a).sum() / (n * (n - 1))
    own_b = torch.cdist(b, b).sum() / (m * (m - 1))
    return float(2 * torch.cdist(a, b).mean() - own_a - own_b)


def gaussian_mmd(a: Tensor, b: Tensor, width: float = 0.5) -> float:
    """Unbiased squared MMD with kernel exp(-|x - y|^2 / (2 width^2))."""
    a, b = a.double(), b.double()
    n, m = len(a), len(b)

    def total(x: Tensor, y: Tensor) -> Tensor:
        return (-torch.cdist(x, y).square() / (2 * width**2)).exp().sum()

    return float(
        (total(a, a) - n) / (n * (n - 1)) + (total(b, b) - m) / (m * (m - 1)) - 2 * total(a, b) / (n * m)
    )


def component_log_likelihood(x: Tensor, mixture) -> Tensor:
    """log w_k N(x; mu_k, s_k^2 I), [N, K]; point masses get a width of 0.05."""
    x, stds = x.double(), mixture.stds.clamp(min=0.05)
    gap = (x[:, None] - mixture.means).square().sum(-1) / stds**2
    return mixture.weights.log() - 0.5 * gap - x.shape[1] * (stds.log() + 0.5 * math.log(2 * math.pi))


def mode_histogram(x: Tensor, mixture) -> Tensor:
    """Share of samples that each component explains best, [K]."""
    owner = component_log_likelihood(x, mixture).argmax(1)
    return torch.bincount(owner, minlength=len(mixture.means)).double() / len(x)


def mode_coverage(x: Tensor, mixture, least: float = 0.2, reach: float = 4.0) -> float:
    """Share of components holding at least `least` of their weight in samples within `reach` deviations."""
    owner = component_log_likelihood(x, mixture).argmax(1)
    stds = mixture.stds.clamp(min=0.05)
    dim = x.shape[1]
    near = (x.double() - mixture.means[owner]).norm(dim=1) <= reach * stds[owner] * max(1.0, (dim / 2) ** 0.5)
    held = torch.bincount(owner[near], minlength=len(mixture.means)).double() / len(x)
    return float((held >= least * mixture.weights).double().mean())


def kl_to_mixture(x: Tensor, mixture, width: float = 0.0) -> float:
    """KL(samples || mixture): log p exact, log q by a leave-one-out kernel estimate."""
    return float(_log_ratios(x, mixture, width).mean())


def _log_ratios(x: Tensor, mixture, width: float = 0.0) -> Tensor:
    """log q - log p of each sample, [N]."""
    x = x.double()
    n, dim = x.shape
    if not width:  # the tightest direction of the tightest mode decides, not the spread over modes
        width = float(mixture.stds.clamp(min=0.05).min()) * n ** (-1 / (dim + 4))
    log_kernel = -torch.cdist(x, x).square() / (2 * width**2)
    log_kernel.fill_diagonal_(-math.inf)
    log_q = log_kernel.logsumexp(1) - math.log(n - 1) - dim * (math.log(width) + 0.5 * math.log(2 * math.pi))
    # A sample without neighbours would have log q = -inf: its own kernel stands in.
    log_q = log_q.clamp(min=-math.log(n) - dim * (math.log(width) + 0.5 * math.log(2 * math.pi)))
    return log_q - component_log_likelihood(x, mixture).logsumexp(1)


class ToyMeasurer:
    """Measures students of an analytic teacher; same interface as `fd_mini.Measurer`."""

    name, primary = "analytic", "energy_distance"
    least = 2
    """samples that every score is defined for"""

    def __init__(self, mixture, num_reference: int = 4000):
        self.mixture = mixture
        self.reference, self.reference_labels = mixture.sample(
            num_reference, torch.Generator().manual_seed(2)
        )

    def compare(self, points: Tensor, attributes: dict[str, Tensor]) -> dict[str, float]:
        """Energy distance, MMD, KL, modes, and with labels the share that landed in a mode of their label."""
        points = points.double().cpu()
        found = {
            "energy_distance": energy_distance(points, self.reference),
            "mmd": 1000 * gaussian_mmd(points, self.reference),
            "kl": kl_to_mixture(points, self.mixture),
            "modes": mode_coverage(points, self.mixture),
            "mode_error": float(
                (mode_histogram(points, self.mixture) - self.mixture.weights).abs().sum() / 2
            ),
        }
        if "class" in attributes:
            owner = component_log_likelihood(points, self.mixture).argmax(1)
            found["agreement"] = float(
                (self.mixture.labels[owner] == attributes["class"].cpu()).double().mean()
            )
        return found

    def floor(self, num: int) -> dict[str, float]:
        """The same numbers for exact draws."""
        points, labels = self.mixture.sample(num, torch.Generator().manual_seed(3))
        return self.compare(points, {"class": labels} if self.mixture.num_classes else {})

    def describe(self) -> dict[str, str]:
        return {"extractor": "none (exact law)", "reference": f"{len(self.reference)} exact draws"}


# -- by name
def energy_estimate(a: Tensor, b: Tensor) -> Estimate:
    """With the influence of each sample: twice the mean distance to b less that to a."""
    a, b = a.double(), b.double()

    def influence() -> Tensor:
        return 2 * (torch.cdist(a, b).mean(1) - torch.cdist(a, a).sum(1) / (len(a) - 1))

    return around(energy_distance(a, b), influence)


def mode_error_estimate(x: Tensor, mixture) -> Estimate:
    """Total variation of the shares of samples in each mode from its weight."""
    owner = component_log_likelihood(x, mixture).argmax(1)
    held = mode_histogram(x, mixture)
    sign = (held - mixture.weights).sign() / 2
    value = float((held - mixture.weights).abs().sum() / 2)
    return around(value, lambda: sign[owner] - (sign * held).sum())


def draws(mixture, name: str, key: str, num: int = 4000) -> Items:
    """Exact draws of a mixture as a reference: those that a run on it is measured against."""
    points, _ = mixture.sample(num, torch.Generator().manual_seed(2))
    return Items(list(points), "points", f"{num} exact draws of {name}", key)


def _points(material: Any, dim: int) -> Tensor:
    """[N, dim]; UserError of points of another dimension than what they are compared with."""
    found = torch.stack(list(material.samples())).double()
    if found.shape[1] != dim:
        wrong = f"points of {dim} dimensions for samples of {found.shape[1]}"
        raise UserError("--against", wrong, "give those of the samples' dimension")
    return found


def _energy(material: Any, encoder: str) -> Estimate:
    originals = torch.stack(list(material.originals()))
    return energy_estimate(_points(material, originals.shape[1]), originals)


def _of_mixture(score: Callable[[Tensor, Any], Estimate]) -> Callable[[Any, str], Estimate]:
    def compute(material: Any, encoder: str) -> Estimate:
        mixture = material.mixture
        return score(_points(material, mixture.means.shape[1]), mixture)

    return compute


def _metric(name: str, what: str, better, compute, needs, source: str = "definition") -> Metric:
    return Metric(name, what, better, source, compute, needs, "", 2, "points")


METRICS = (
    _metric("energy_distance", "energy distance", "lower", _energy, ("reference",), "Szekely & Rizzo 2013"),
    _metric(
        "modes",
        "share of modes that samples reach",
        "higher",
        _of_mixture(lambda x, m: without_interval(mode_coverage(x, m))),
        ("mixture",),
    ),
    _metric(
        "mode_error",
        "total variation of the modes' shares",
        "lower",
        _of_mixture(mode_error_estimate),
        ("mixture",),
    ),
    _metric(
        "kl",
        "KL divergence from the mixture",
        "lower",
        _of_mixture(lambda x, m: mean_of(_log_ratios(x, m))),
        ("mixture",),
    ),
)
