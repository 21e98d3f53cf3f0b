"""A metric's value with the contributions it is made of, and the intervals that follow from them.

Every metric here is, or behaves for small changes like, a mean of one contribution per sample: a score
itself, or the influence function of a distance (Hampel 1974), which says how the value moves when that
sample gets more weight. So one rule gives the interval of any metric, and two metrics of the same requests
and noise are compared by the differences of their contributions, sample by sample.

Intervals: bootstrap-t over the contributions (Efron & Tibshirani 1993, ch. 12.5), Wilson's interval where the
value is a share. They cover what other samples of the same generator, equally many, would give; a bias that
depends on the count alone (Frechet distances) is part of the value and not of the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

LEVEL, NUM_RESAMPLES, CHUNK = 0.95, 1000, 2**22
"""of the intervals; resamples of the bootstrap; numbers drawn at a time"""


class Interval(NamedTuple):
    """Ends of a confidence interval."""

    low: float
    high: float


@dataclass
class Estimate:
    """A value; `contributions` makes the float64 tensor [M] whose mean is the value, when it is asked for
    (that of a Frechet distance costs as much as the distance). M is the number of samples it is a mean over.
    """

    value: float
    contributions: Callable[[], Tensor]
    over: str = "samples"
    """what a contribution belongs to: samples, groups, references or generators"""
    share: bool = False
    """whether the value is a share, of which each contribution is 0 or 1"""

    def interval(self, level: float = LEVEL, seed: int = 0) -> Interval:
        """Where the metric lies for other samples, with this confidence."""
        found = self.contributions()
        if self.share and len(found) > 1:
            return wilson(float(found.sum()), len(found), level)
        return mean_interval(found, level, seed)


def mean_of(scores: Tensor, over: str = "samples") -> Estimate:
    """The mean of one score per sample."""
    kept = scores.detach().double().flatten().cpu()
    return Estimate(float(kept.mean()), lambda: kept, over)


def share_of(hits: Tensor, over: str = "samples") -> Estimate:
    """The share of samples for which something holds, hits being 0 or 1 (or boolean)."""
    return replace(mean_of(hits, over), share=True)


def around(value: float, influence: Callable[[], Tensor], over: str = "samples") -> Estimate:
    """A value whose contributions are itself plus an influence [M] of mean zero."""

    def contributions() -> Tensor:
        found = influence().double().cpu()
        return value + found - found.mean()

    return Estimate(value, contributions, over)


def without_interval(value: float, over: str = "generators") -> Estimate:
    """A value that is no mean over samples, so that its one contribution gives no interval."""
    return Estimate(value, lambda: torch.tensor([value], dtype=torch.float64), over)


def mean_interval(x: Tensor, level: float = LEVEL, seed: int = 0) -> Interval:
    """Confidence interval of the mean of contributions [M]; (nan, nan) of fewer than two."""
    x = x.double().flatten()
    n = len(x)
    if n < 2:
        return Interval(math.nan, math.nan)
    mean, std = float(x.mean()), float(x.std())
    if std == 0:
        return Interval(mean, mean)
    if n in FEW:  # of which many resamples have no spread at all
        half = FEW[n](level) * std / math.sqrt(n)
        return Interval(mean - half, mean + half)
    t = _studentised(x, seed)
    tail = (1 - level) / 2
    low, high = (float(torch.quantile(t, q)) for q in (1 - tail, tail))
    return Interval(mean - low * std / math.sqrt(n), mean - high * std / math.sqrt(n))


FEW = {2: lambda level: math.tan(math.pi * level / 2), 3: lambda level: level * math.sqrt(2 / (1 - level**2))}
"""quantile of Student's t by the number of values, of one and two degrees of freedom"""


def _studentised(x: Tensor, seed: int) -> Tensor:
    """(mean* - mean) / (std* / sqrt n) of resamples, [NUM_RESAMPLES]."""
    n, mean = len(x), x.mean()
    generator = torch.Generator().manual_seed(seed)
    found = []
    rows = max(1, CHUNK // n)
    for first in range(0, NUM_RESAMPLES, rows):
        num = min(rows, NUM_RESAMPLES - first)
        drawn = x[torch.randint(n, (num, n), generator=generator)]
        found.append((drawn.mean(1) - mean) / (drawn.std(1) / math.sqrt(n)))
    t = torch.cat(found)
    return t[t.isfinite()]


def wilson(successes: float, n: int, level: float = LEVEL) -> Interval:
    """Wilson's interval of a share (1927): sensible also for none or all of n."""
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = (centre - half) / scale if successes else 0.0
    return Interval(max(0.0, low), min(1.0, (centre + half) / scale))


class Difference(NamedTuple):
    """a - b with its interval; paired: contribution i of both belongs to the same request and noise."""

    value: float
    low: float
    high: float
    paired: bool

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def difference(a: Estimate, b: Estimate, level: float = LEVEL, seed: int = 0) -> Difference:
    """How far two estimates are apart: paired where they have equally many contributions of one kind."""
    value = a.value - b.value
    x, y = a.contributions(), b.contributions()
    if min(len(x), len(y)) < 2:
        return Difference(value, math.nan, math.nan, False)
    if a.over == b.over and len(x) == len(y):
        gap = x - y
        low, high = mean_interval(gap, level, seed) if not _binary(gap) else _normal(gap, level)
        shift = value - float(gap.mean())
        return Difference(value, low + shift, high + shift, True)
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
    half = z * math.sqrt(sum(float(v.var()) / len(v) for v in (x, y)))
    return Difference(value, value - half, value + half, False)


def _binary(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _normal(x: Tensor, level: float) -> Interval:
    """A difference of two shares can be below zero, where Wilson's interval cannot go."""
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
    half = z * float(x.std()) / math.sqrt(len(x))
    return Interval(float(x.mean()) - half, float(x.mean()) + half)


def pooled(estimates: list[Estimate]) -> Estimate:
    """The mean over seeds: contributions of their samples are joined, those of the one reference that all
    are compared with are averaged.
    """
    value = sum(e.value for e in estimates) / len(estimates)
    if len(estimates) == 1:
        return estimates[0]
    if estimates[0].over == "generators":
        return without_interval(value)

    def contributions() -> Tensor:
        found = [e.contributions() for e in estimates]
        return torch.stack(found).mean(0) if estimates[0].over == "references" else torch.cat(found)

    share = estimates[0].share and estimates[0].over != "references"
    return Estimate(value, contributions, estimates[0].over, share)
