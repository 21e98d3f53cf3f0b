"""Intervals hold what they promise: coverage in simulations, against a plain bootstrap, and on known
shares.
"""

import math

import pytest
import torch

from fastgen.evaluation.metrics import frechet, mmd, neighbours, variety
from fastgen.evaluation.metrics.estimate import (
    Estimate,
    difference,
    mean_interval,
    mean_of,
    pooled,
    share_of,
    wilson,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share_covered(intervals, truth: float) -> float:
    return sum(i[0] <= truth <= i[1] for i in intervals) / len(intervals)


def test_the_interval_of_a_mean_covers_it_also_when_skewed():
    exponential = -torch.rand(500, 60, generator=torch.Generator().manual_seed(1)).double().log()
    found = [mean_interval(x, seed=i) for i, x in enumerate(exponential)]
    assert 0.92 < share_covered(found, 1.0) < 0.98
    narrow = [mean_interval(x, level=0.5, seed=i) for i, x in enumerate(exponential[:200])]
    assert 0.4 < share_covered(narrow, 1.0) < 0.6, "another level, another share"


def test_few_values_have_wide_intervals():
    """Of two and of three, most of whose resamples have no spread: Student's t."""
    for num in (2, 3):
        found = [mean_interval(x) for x in draw(600, num, seed=4)]
        assert 0.92 < share_covered(found, 0.0) < 0.98, num
    low, high = mean_interval(torch.tensor([0.5, 1.0]))
    assert (high - low) / 2 == pytest.approx(12.706 * 0.25, rel=1e-3)


def test_shares_have_wilsons_interval():
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-3)
    assert wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-3)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    assert share_of(torch.ones(10)).interval() == wilson(10, 10)
    assert mean_of(torch.full((10,), 3.0)).interval() == (3.0, 3.0)
    assert math.isnan(mean_of(torch.ones(1)).interval().low)


METRICS = {
    "frechet": lambda x, ref: frechet.frechet_estimate(x, frechet.statistics_of([ref])),
    "mmd": lambda x, ref: mmd.mmd_estimate(x, ref),
    "cmmd": lambda x, ref: mmd.cmmd_estimate(x, ref, sigma=1.0),
    "inception score": lambda x, ref: variety.inception_score(3 * x),
    "vendi": lambda x, ref: variety.vendi_score(x),
    "precision": lambda x, ref: neighbours.precision(x, ref),
}


@pytest.mark.parametrize("name", METRICS)
def test_contributions_predict_the_spread_of_other_draws(name):
    """Value = mean of contributions, and their standard error is the deviation between independent sets."""
    reference, found = draw(400, 4, seed=77), []
    for seed in range(60):
        found.append(METRICS[name](0.8 * draw(250, 4, seed=seed) + 0.5, reference))
    spread = torch.tensor([e.value for e in found]).std()
    errors = torch.tensor([e.contributions().std() / math.sqrt(250) for e in found])
    for e in found[:3]:
        assert float(e.contributions().mean()) == pytest.approx(e.value, abs=1e-9)
    assert float(errors.mean() / spread) == pytest.approx(1, abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frechet", "mmd", "inception score", "vendi"])
def test_distances_are_covered_in_simulation(name):
    """The truth is what sets of this size give on average."""
    reference = draw(400, 4, seed=77)
    found = [METRICS[name](0.8 * draw(250, 4, seed=seed) + 0.5, reference) for seed in range(400)]
    truth = sum(e.value for e in found) / len(found)
    assert 0.92 < share_covered([e.interval() for e in found], truth) < 0.98


def test_paired_differences_find_what_unpaired_ones_cannot():
    """Two students of the same noise: one 0.05 better on every sample that both find hard."""
    shared = draw(200, seed=3)
    a, b = mean_of(shared + 0.05 + 0.01 * draw(200, seed=4)), mean_of(shared)
    paired = difference(a, b)
    assert paired.paired and paired.decided and paired.low < 0.05 < paired.high
    alone = difference(a, mean_of(shared[:199]))
    assert not alone.paired and not alone.decided and alone.high - alone.low > 10 * (paired.high - paired.low)


def test_paired_differences_are_covered_and_keep_the_exact_value():
    held = 0
    for seed in range(200):
        x, y = draw(40, seed=seed), draw(40, seed=1000 + seed)
        found = difference(mean_of(x + 0.3), mean_of(0.5 * x + y))
        held += found.low <= 0.3 <= found.high
    assert 0.9 < held / 200 < 0.99
    a = Estimate(5.0, lambda: draw(30, seed=1))
    assert difference(a, Estimate(3.0, lambda: draw(30, seed=2))).value == 2
    same = mean_of(torch.tensor([0.0, 1, 1, 1]))
    assert difference(same, same)[:3] == (0, 0, 0) and not difference(same, same).decided


def test_shares_differ_on_both_sides_of_zero():
    a, b = mean_of(torch.tensor([0.0] * 30 + [1.0] * 10)), mean_of(torch.tensor([0.0] * 10 + [1.0] * 30))
    found = difference(a, b)
    assert found.value == -0.5 and found.high < 0 and difference(b, a).low > 0


def test_pooled_over_seeds():
    a, b = mean_of(torch.tensor([1.0, 2])), mean_of(torch.tensor([3.0, 6]))
    both = pooled([a, b])
    assert both.value == 3 and both.contributions().tolist() == [1, 2, 3, 6] and pooled([a]) is a
    reached = [mean_of(torch.tensor(x), "references") for x in ([0.0, 1, 1], [0.0, 0, 1])]
    assert pooled(reached).contributions().tolist() == [0, 0.5, 1], "the reference is one"
