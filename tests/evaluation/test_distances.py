"""Distances of feature sets: closed forms, brute force, and a published implementation where there is one."""

import math

import numpy as np
import pytest
import torch

from fastgen.evaluation.metrics import frechet, mmd, neighbours, variety


def draw(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(dim: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of this rank."""
    root = draw(dim, rank, seed)
    return draw(1, dim, seed + 1)[0], root @ root.T / rank


# -- frechet
def test_frechet_closed_form():
    eye = torch.eye(3, dtype=torch.float64)
    mean = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    assert frechet.frechet_from(0 * mean, eye, mean, 4 * eye) == pytest.approx(9 + 3, abs=1e-9)
    assert frechet.frechet_from(mean, 4 * eye, 0 * mean, eye) == pytest.approx(12, abs=1e-9)
    assert frechet.frechet_from(mean, 4 * eye, mean, 4 * eye) == pytest.approx(0, abs=1e-9)


def test_frechet_equals_the_matrix_root_of_scipy():
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    for seed in (0, 10):
        (mean_a, cov_a), (mean_b, cov_b) = gaussian(60, 200, seed), gaussian(60, 90, seed + 5)
        root = sqrtm(cov_a.numpy() @ cov_b.numpy()).real
        by_root = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * np.trace(root)
        assert frechet.frechet_from(mean_a, cov_a, mean_b, cov_b) == pytest.approx(float(by_root), rel=1e-6)


def test_frechet_of_rank_deficient_gaussians():
    """In one line: (sqrt(a) - sqrt(b))^2 for parallel directions, a + b for orthogonal ones."""
    e = torch.eye(40, dtype=torch.float64)
    zero = torch.zeros(40, dtype=torch.float64)

    def line(i: int, variance: float) -> torch.Tensor:
        return variance * torch.outer(e[i], e[i])

    assert frechet.frechet_from(zero, line(0, 9), zero, line(0, 4)) == pytest.approx(1, rel=1e-9)
    assert frechet.frechet_from(zero, line(0, 9), zero, line(1, 4)) == pytest.approx(13, rel=1e-9)
    a, b = draw(20, 200), draw(30, 200, 1)  # of 20 samples in 200 dimensions: by singular values of X1 X2'
    centred = [x - x.mean(0) for x in (a, b)]
    shared = torch.linalg.svdvals(centred[0] @ centred[1].T / math.sqrt(19 * 29)).sum()
    (m1, s1), (m2, s2) = frechet.statistics(a), frechet.statistics(b)
    wanted = (m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * shared
    assert frechet.frechet(a, b) == pytest.approx(float(wanted), rel=1e-6)


def test_frechet_is_symmetric_rotation_invariant_and_zero_on_equal_sets():
    a, b = draw(50, 6), 2 * draw(50, 6, 1) + 1
    turn = torch.linalg.qr(draw(6, 6, 2)).Q
    assert frechet.frechet(a @ turn, b @ turn) == pytest.approx(frechet.frechet(a, b), rel=1e-9)
    assert frechet.frechet(a, b) == pytest.approx(frechet.frechet(b, a), rel=1e-9)
    assert frechet.frechet(a, b) == pytest.approx(frechet.frechet(a.flip(0), b), rel=1e-9)
    assert frechet.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet.frechet(a[:4], a[:4]) == pytest.approx(0, abs=1e-6)


def test_moments_are_exact_in_any_batches_and_far_from_zero():
    x = draw(5001, 7) + 1e6
    found = frechet.statistics_of(x.split(613))
    assert torch.allclose(found.cov, torch.cov(x.T), rtol=1e-9, atol=1e-9) and found.num == 5001
    assert torch.allclose(found.mean, x.mean(0), rtol=1e-12)
    left, right = frechet.Moments(), frechet.Moments()
    left.add(x[:1000])
    right.add(x[1000:])
    left.join(right)
    assert torch.allclose(left.statistics().cov, found.cov, rtol=1e-9)
    with pytest.raises(AssertionError, match="a covariance needs two"):
        frechet.statistics_of([x[:1]])


def test_torchmetrics_agrees_on_random_features():
    fid = pytest.importorskip("torchmetrics.image.fid")
    kid = pytest.importorskip("torchmetrics.image.kid")

    class Extractor(torch.nn.Module):
        num_features = 5

        def forward(self, x):
            return x.double().flatten(1)[:, :5] / 255

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(lo, 256, (60, 3, 4, 4), generator=generator).to(torch.uint8) for lo in (0, 90))
    flat = [x.double().flatten(1)[:, :5] / 255 for x in (a, b)]
    theirs = {
        "fid": fid.FrechetInceptionDistance(feature=Extractor(), input_img_size=(3, 4, 4)),
        "kid": kid.KernelInceptionDistance(feature=Extractor(), subsets=1, subset_size=60),
    }
    for metric in theirs.values():
        metric.set_dtype(torch.float64)
        metric.update(a, real=True)
        metric.update(b, real=False)
    assert float(theirs["fid"].compute()) == pytest.approx(frechet.frechet(*flat), rel=1e-5)
    assert float(theirs["kid"].compute()[0]) == pytest.approx(mmd.polynomial_mmd(*flat), rel=1e-5)


def test_the_bias_falls_as_one_over_n_and_extrapolation_takes_it_away():
    """Both laws are N(0, I), whose distance is zero."""
    reference = frechet.Statistics(torch.zeros(30, dtype=torch.float64), torch.eye(30, dtype=torch.float64))
    found = [frechet.extrapolated(draw(2000, 30, seed), reference) for seed in range(4)]
    for value, by_count in found:
        assert by_count[400] > 4 * by_count[2000] > 0.3
        assert abs(value) < by_count[2000] / 4
    assert min(value for value, _ in found) < 0.02


# -- kernels
def test_mmd_equals_its_definition():
    a, b = draw(7, 3), draw(9, 3, 1) + 1

    def kernel(x, y):
        return (x @ y.T / 3 + 1) ** 3

    own = sum(kernel(x, x).fill_diagonal_(0).sum() / (len(x) * (len(x) - 1)) for x in (a, b))
    assert mmd.polynomial_mmd(a, b) == pytest.approx(float(own - 2 * kernel(a, b).mean()), rel=1e-9)
    assert mmd.kid(a, b, 20, 5)[0] == pytest.approx(1000 * mmd.polynomial_mmd(a, b), rel=0.8)


def test_kid_is_unbiased():
    """N(0, 1) against N(m, 1) in one dimension: (x y + 1)^3 has an expectation in closed form."""
    shift = 0.7
    moments = (
        {k: (1, 0, 1, 0)[k] for k in range(4)},
        {0: 1, 1: shift, 2: 1 + shift**2, 3: shift**3 + 3 * shift},
    )

    def expected(p, q):
        return sum(c * p[k] * q[k] for k, c in enumerate((1, 3, 3, 1)))

    a, b = moments
    true = expected(a, a) + expected(b, b) - 2 * expected(a, b)
    for shifted, wanted in ((0.0, 0.0), (shift, true)):
        found = [mmd.polynomial_mmd(draw(40, 1, s), draw(40, 1, 9000 + s) + shifted) for s in range(600)]
        values = torch.tensor(found)
        assert abs(float(values.mean()) - wanted) < 3.5 * float(values.std()) / math.sqrt(600)
    assert true > 1


def test_cmmd_equals_its_definition():
    a, b = draw(12, 5), draw(8, 5, 3) + 0.3
    unit = [x / x.norm(dim=1, keepdim=True) for x in (a, b)]

    def mean(x, y):
        gaps = [[float((p - q).square().sum()) for q in y] for p in x]
        return sum(math.exp(-g / 200) for row in gaps for g in row) / (len(x) * len(y))

    wanted = 1000 * (mean(unit[0], unit[0]) + mean(unit[1], unit[1]) - 2 * mean(*unit))
    assert mmd.cmmd_estimate(a, b).value == pytest.approx(wanted, rel=1e-8)


def test_equal_sets_have_no_distance():
    a = draw(50, 6)
    assert mmd.kid_estimate(a, a).value == 0 and mmd.cmmd_estimate(a, a).value == pytest.approx(0, abs=1e-9)
    assert mmd.mmd_estimate(a, a).value == 0 and mmd.mmd_estimate(a, a + 1).value > 0


# -- neighbours
def test_neighbours_equal_brute_force():
    real, fake, k = draw(30, 3), 0.8 * draw(25, 3, 1) + 0.4, 4

    def radius(x, i):
        return sorted(float((x[i] - x[j]).norm()) for j in range(len(x)) if j != i)[k - 1]

    def inside(points, centres, radii):
        return [[float((p - c).norm()) <= r for c, r in zip(centres, radii)] for p in points]

    balls, others = [radius(real, i) for i in range(30)], [radius(fake, i) for i in range(25)]
    held = torch.tensor(inside(fake, real, balls))  # [25, 30]
    assert neighbours.precision(fake, real, k).value == pytest.approx(float(held.any(1).double().mean()))
    assert neighbours.density(fake, real, k).value == pytest.approx(float(held.sum(1).double().mean()) / k)
    assert neighbours.coverage(fake, real, k).value == pytest.approx(float(held.any(0).double().mean()))
    reached = torch.tensor(inside(real, fake, others))
    assert neighbours.recall(fake, real, k).value == pytest.approx(float(reached.any(1).double().mean()))


def test_equal_sets_are_covered():
    a = draw(40, 3)
    assert neighbours.precision(a, a).value == neighbours.recall(a, a).value == 1
    assert neighbours.coverage(a, a).value == 1


def test_precision_and_recall_see_different_failures():
    real = torch.cat([draw(200, 2), draw(200, 2, 1) + 30])
    half = draw(400, 2, 2)  # one of the two clusters, all plausible
    precision, recall = neighbours.precision_recall(real, half)
    assert precision > 0.85 and 0.35 < recall < 0.55
    wide = torch.cat([real[::2] + 0.01 * draw(200, 2, 3), draw(200, 2, 4) * 0.1 - 60])  # half is nonsense
    precision, recall = neighbours.precision_recall(real, wide)
    assert 0.4 < precision < 0.6 and recall > 0.7
    assert all(math.isnan(v) for v in neighbours.precision_recall(real[:3], real[:3]))


def test_evenly_keeps_the_spread():
    assert neighbours.evenly(torch.arange(10), 5).tolist() == [0, 2, 4, 6, 8]
    assert len(neighbours.evenly(torch.arange(10), 99)) == 10


# -- variety
def test_inception_score_of_known_posteriors():
    sure = 50 * torch.eye(8).repeat(25, 1)
    assert variety.inception_score(sure).value == pytest.approx(8, rel=1e-9)
    assert variety.inception_score(torch.zeros(40, 8)).value == pytest.approx(1)
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)  # KL to (1/2, 1/2) by hand
    wanted = math.exp(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))
    assert variety.inception_score(p.log()).value == pytest.approx(wanted, rel=1e-9)
    assert variety.inception_score_splits(sure, 5)[0] <= 8 + 1e-9
    assert variety.inception_score_splits(5 * torch.eye(8)[torch.arange(91) % 8])[0] > 2, "no part of one"


def test_inception_score_agrees_with_torchmetrics():
    inception = pytest.importorskip("torchmetrics.image.inception")

    class Logits(torch.nn.Module):
        def forward(self, x):
            return x.float().flatten(1)[:, :6] / 40

    images = torch.randint(0, 256, (80, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    theirs = inception.InceptionScore(feature=Logits(), splits=1)
    theirs.update(images)
    ours = variety.inception_score(Logits()(images)).value
    assert float(theirs.compute()[0]) == pytest.approx(ours, rel=1e-5)


def test_vendi_score_counts_different_samples():
    assert variety.vendi_score(torch.eye(7).repeat(3, 1)).value == pytest.approx(7, rel=1e-9)
    assert variety.vendi_score(torch.eye(7)).value == pytest.approx(7, rel=1e-9)
    assert variety.vendi_score(torch.ones(9, 4)).value == pytest.approx(1, rel=1e-9)
    few, many = draw(6, 20), draw(60, 5)  # both sides of n > d
    for x in (few, many):
        unit = x / x.norm(dim=1, keepdim=True)
        values = torch.linalg.eigvalsh(unit @ unit.T / len(x)).clamp(min=1e-300)
        assert variety.vendi_score(x).value == pytest.approx(float((-(values * values.log()).sum()).exp()))


def test_within_groups_compares_no_two_groups():
    x = torch.tensor([0.0, 1, 2, 100, 100, 100])[:, None]
    found = variety.within_groups(x, 3, lambda a, b: (a - b).abs().flatten())
    assert found.value == pytest.approx((4 / 3 + 0) / 2) and found.contributions().tolist() == [4 / 3, 0]
