"""Distances of point clouds in closed form."""

import math

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.threed import metrics
from fastgen.threed.metrics import chamfer, f_score, jsd, nearest, voxel_iou

LINE = torch.stack([torch.arange(10.0), torch.zeros(10), torch.zeros(10)], 1) + 0.5


def test_chamfer_of_a_shift_is_the_shift():
    assert chamfer(LINE, LINE) == 0
    assert chamfer(LINE, LINE + torch.tensor([0.0, 0.3, 0.0])) == pytest.approx(0.3, rel=1e-5)
    far = torch.cat([LINE, LINE[:1] + torch.tensor([0.0, 11.0, 0.0])])  # one stray among eleven
    assert chamfer(LINE, far) == pytest.approx(0.5 * 11 / 11, rel=1e-5)


def test_chunks_change_nothing(monkeypatch):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 3, generator=g), torch.randn(40, 3, generator=g)
    whole = nearest(a, b)
    monkeypatch.setattr(metrics, "CHUNK", 90)
    torch.testing.assert_close(nearest(a, b), whole)


def test_f_score_of_half_a_line():
    """Half of the line: precision 1, recall 5 / 10 within 0.5; all of it within 5."""
    assert f_score(LINE[:5], LINE, 0.5) == pytest.approx(2 * 0.5 / 1.5)
    assert f_score(LINE[:5], LINE, 5.0) == 1.0
    assert f_score(LINE, LINE + 100, 0.5) == 0.0


def test_iou_of_shifted_cells():
    assert voxel_iou(LINE, LINE + torch.tensor([4.0, 0, 0]), 1.0) == pytest.approx(6 / 14)
    assert voxel_iou(LINE, LINE + torch.tensor([4.0, 0, 0]), 100.0) == 1.0


def test_jsd_of_equal_and_of_disjoint_clouds():
    assert jsd(LINE, LINE.repeat(3, 1), 1.0) == pytest.approx(0.0, abs=1e-12)
    assert jsd(LINE, LINE + 100, 1.0) == pytest.approx(math.log(2))
    above = LINE + torch.tensor([0.0, 0.0, 5.0])
    assert jsd(LINE, above, 1.0) == pytest.approx(math.log(2)) and jsd(LINE, above, 1.0, dims=2) == 0
    a, b = LINE[[0, 0, 0, 1]], LINE[[0, 1, 1, 1]]  # shares 3/4, 1/4 and 1/4, 3/4
    assert jsd(a, b, 1.0) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


@pytest.mark.parametrize("cloud", [torch.zeros(0, 3), torch.full((2, 3), math.nan)])
def test_clouds_that_measure_nothing_are_refused(cloud):
    with pytest.raises(UserError, match="points"):
        chamfer(LINE, cloud)
    with pytest.raises(UserError, match="cell"):
        jsd(LINE, LINE, 0.0)
