"""Cameras: axes, rays against projection, ranges, words of views."""

import math

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.threed.cameras import Cameras, Ranges, middle, random_cameras, rig, turntable


def some(num=6):
    return random_cameras(num, Ranges(), torch.Generator().manual_seed(0))


def test_azimuth_turns_from_x_to_y_and_elevation_rises():
    c = Cameras.of(torch.tensor([[0.0, 0, 2, 50], [90.0, 0, 2, 50], [0.0, 60, 2, 50]]))
    want = [[2, 0, 0], [0, 2, 0], [2 * math.cos(math.pi / 3), 0, 2 * math.sin(math.pi / 3)]]
    torch.testing.assert_close(c.position, torch.tensor(want), atol=1e-6, rtol=0)


def test_axes_are_a_right_handed_frame_that_looks_at_the_origin():
    c = some()
    R = c.c2w[:, :3, :3]
    torch.testing.assert_close(R @ R.transpose(1, 2), torch.eye(3).expand(6, 3, 3), atol=1e-6, rtol=0)
    assert torch.allclose(torch.linalg.det(R), torch.ones(6))
    toward = -R[:, :, 2] * c.distance[:, None]  # backward is away from what it looks at
    torch.testing.assert_close(c.position + toward, torch.zeros(6, 3), atol=1e-5, rtol=0)
    assert (R[:, 2, 1] > 0).all(), "up is up"


def test_viewmat_has_opencv_axes():
    c = some()
    origin = c.viewmat @ torch.tensor([0.0, 0, 0, 1])
    torch.testing.assert_close(
        origin[:, :3], torch.stack([0 * c.distance, 0 * c.distance, c.distance], 1), atol=1e-5, rtol=0
    )
    above = c.viewmat @ torch.tensor([0.0, 0, 0.1, 1])
    assert (above[:, 1] < 0).all(), "y points down"
    flip = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    torch.testing.assert_close(c.viewmat @ c.c2w, flip.expand(6, 4, 4), atol=1e-5, rtol=0)


def test_a_point_on_a_ray_projects_to_its_pixel():
    c = some()
    origins, ways = c.rays(8, 8)
    points = origins + 1.7 * ways
    local = torch.einsum("bij,bhwj->bhwi", c.viewmat[:, :3, :3], points) + c.viewmat[:, None, None, :3, 3]
    at = torch.einsum("bij,bhwj->bhwi", c.intrinsics(8, 8), local)
    at = at[..., :2] / at[..., 2:]
    y, x = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(8) + 0.5, indexing="ij")
    torch.testing.assert_close(at, torch.stack([x, y], -1).expand_as(at), atol=1e-4, rtol=0)


def test_azimuths_are_stratified_and_all_lie_in_their_ranges():
    ranges = Ranges((-5, 40), (2, 3), (40, 60))
    c = random_cameras(64, ranges, torch.Generator().manual_seed(1))
    slot = ((c.azimuth + 180) / (360 / 64)).floor().long()
    assert slot.tolist() == list(range(64))
    for key in ("elevation", "distance", "fovy"):
        low, high = getattr(ranges, key)
        value = getattr(c, key)
        assert low <= value.min() and value.max() <= high and value.std() > 0.1 * (high - low)
    free = torch.rand(64) * 360 - 180
    assert ((free + 180) / (360 / 64)).floor().long().unique().numel() < 64, "the negative: drawn freely"


def test_a_rig_stands_around_the_object():
    c = rig(3, Ranges(), torch.Generator().manual_seed(2))
    assert len(c) == 12
    for group in c.rows().split(4):
        assert (group[:, 1:] == group[:1, 1:]).all()
        gaps = (group[1:, 0] - group[:-1, 0]) % 360
        torch.testing.assert_close(gaps, torch.full((3,), 90.0), atol=1e-4, rtol=0)


def test_a_turntable_goes_round_once():
    c = turntable(8)
    assert c.azimuth[0] == 0 and c.azimuth.unique().numel() == 8
    assert middle(Ranges((0, 20), (2, 4), (40, 60)), 3).rows()[0].tolist() == [0, 10, 3, 50]


def test_views_by_their_words():
    rows = [[0.0, 0], [44.0, 0], [46.0, 0], [-100.0, 0], [136.0, 0], [-179.0, 0], [0.0, 61]]
    c = Cameras.of(torch.tensor([[az, el, 2, 50] for az, el in rows]))
    assert c.names() == ["front", "front", "side", "side", "back", "back", "overhead"]
    assert c.names(front=30)[1] == "side"


@pytest.mark.parametrize(
    "row,key",
    [
        ([0, 0, 0, 50], "distance"),
        ([0, 0, 2, 0], "fovy"),
        ([0, 0, 2, 180], "fovy"),
        ([0, 0, math.nan, 50], "distance"),
        ([0, 0, math.inf, 50], "distance"),
        ([math.nan, 0, 2, 50], "azimuth"),
        ([0, math.inf, 2, 50], "elevation"),
    ],
)
def test_what_is_out_of_range_is_named(row, key):
    with pytest.raises(UserError, match=f"cameras.{key}"):
        Cameras.of(torch.tensor([row]).float())
