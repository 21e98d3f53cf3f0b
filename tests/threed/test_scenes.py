"""Simulated scenes against their own geometry, and clouds as files."""

import numpy as np
import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.threed.clouds import read_cloud, seen_from_above, write_cloud
from fastgen.threed.scenes import (
    HALF,
    HEIGHT,
    Scenes,
    cast_rays,
    draw_scenes,
    farthest_points,
    make_scans,
    scanned,
    surface_points,
)

ONE = Scenes(
    torch.tensor([[[3.0, 0.0, 0.5, 1.0, 2.0, 0.0]] + [[0.0] * 6] * 3]),
    torch.tensor([[[0.0, 4.0, 0.5, 3.0]] + [[0.0] * 4] * 2]),
)
"""a box in front of the sensor and a cylinder to its left"""


def off_surface(scenes, points):
    """Distance [S, K] of points to the nearest surface of their scene, straight from its shapes."""
    p = points[:, None]
    b, c = scenes.boxes[:, :, None], scenes.cylinders[:, :, None]
    cos, sin = b[..., 5].cos(), b[..., 5].sin()
    x, y = p[..., 0] - b[..., 0], p[..., 1] - b[..., 1]
    u, v = (cos * x + sin * y).abs() - b[..., 2], (cos * y - sin * x).abs() - b[..., 3]
    z = (p[..., 2] - b[..., 4] / 2).abs() - b[..., 4] / 2
    box = torch.stack([u, v, z], -1)
    outside, inside = box.clamp(min=0).norm(dim=-1), box.amax(-1).clamp(max=0).abs()
    box = torch.where(b[..., 4] > 0, outside + inside, torch.inf).amin(1)
    far = torch.hypot(p[..., 0] - c[..., 0], p[..., 1] - c[..., 1]) - c[..., 2]
    tall = (p[..., 2] - c[..., 3] / 2).abs() - c[..., 3] / 2
    both = torch.stack([far, tall], -1)
    rod = both.clamp(min=0).norm(dim=-1) + both.amax(-1).clamp(max=0).abs()
    rod = torch.where(c[..., 3] > 0, rod, torch.inf).amin(1)
    return torch.minimum(torch.minimum(box, rod), points[..., 2].abs())


def test_truth_lies_on_surfaces_and_in_no_object():
    generator = torch.Generator().manual_seed(0)
    scenes = draw_scenes(8, generator)
    points = surface_points(scenes, 500, generator)
    assert off_surface(scenes, points).max() < 1e-4
    assert off_surface(scenes, points + 0.05).mean() > 0.02, "the distance sees a shift"
    assert not scenes.inside(points).any()
    assert scenes.inside(
        scenes.boxes[:, :, None, :3].flatten(1, 2) * torch.tensor([1.0, 1.0, 0.0]) + 0.01
    ).any()


def test_scans_lie_on_surfaces_but_for_their_noise():
    generator = torch.Generator().manual_seed(0)
    scenes = draw_scenes(8, generator)
    found = scanned(scenes, 60, generator)
    assert found.shape == (8, 60, 3) and off_surface(scenes, found).max() < 0.05
    assert found[..., :2].abs().max() <= HALF + 0.1


def test_rays_meet_what_stands_first():
    """Ahead the box's face at 2.5, left the cylinder at 3.5, down the ground, behind and up nothing."""
    ways = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, -1.0], [-1.0, 0, 0], [0, 0, 1.0]])
    found = cast_rays(ONE, ways)[0]
    torch.testing.assert_close(found[:3], torch.tensor([2.5, 3.5, HEIGHT]), rtol=1e-5, atol=1e-4)
    assert found[3:].isinf().all()
    steep = torch.tensor([[0.6, 0.0, -0.8]])  # the ground comes before the box
    assert float(cast_rays(ONE, steep)[0]) == pytest.approx(HEIGHT / 0.8, rel=1e-5)


def test_a_seed_stands_for_its_scenes():
    a, b, other = make_scans(2, 20, 50, 5), make_scans(3, 20, 50, 5), make_scans(2, 20, 50, 6)
    assert all(torch.equal(x, y[:2]) for x, y in zip(a, b)) and not torch.equal(a[1], other[1])


def test_farthest_points_of_a_line():
    """From the first point to the end, the middle, then the quarters; what is not valid is never chosen."""
    line = torch.stack([torch.arange(9.0), torch.zeros(9), torch.zeros(9)], 1)[None]
    valid = torch.ones(1, 9, dtype=torch.bool)
    assert farthest_points(line, valid, 3)[0, :, 0].tolist() == [0, 8, 4]
    valid[0, 8] = False
    assert farthest_points(line, valid, 2)[0, :, 0].tolist() == [0, 7]


def test_clouds_are_read_back_from_every_kind(tmp_path):
    points = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    write_cloud(points, tmp_path / "a.ply")
    np.save(tmp_path / "a.npy", points.numpy())
    np.concatenate([points.numpy(), np.ones((7, 1), "f4")], 1).astype("<f4").tofile(tmp_path / "a.bin")
    header = "ply\nformat ascii 1.0\ncomment x\nelement vertex 7\nproperty uchar red\n"
    header += "".join(f"property double {axis}\n" for axis in "zyx") + "end_header\n"
    rows = "\n".join(f"1 {z!r} {y!r} {x!r}" for x, y, z in points.double().tolist())
    (tmp_path / "b.ply").write_text(header + rows + "\n")
    for name in ("a.ply", "a.npy", "a.bin", "b.ply"):
        torch.testing.assert_close(read_cloud(tmp_path / name, "k"), points)


def broken(folder):
    """(file, words of what is wrong) of each mistake."""
    np.save(folder / "nan.npy", np.array([[0.0, np.nan, 1.0], [0, 0, 0]]))
    np.save(folder / "flat.npy", np.zeros(5))
    np.save(folder / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(folder / "empty.npy", np.zeros((0, 3)))
    (folder / "cut.bin").write_bytes(b"\0" * 17)
    (folder / "no.ply").write_text("obj")
    (folder / "short.ply").write_bytes(
        b"ply\nformat binary_little_endian 1.0\nelement vertex 9\nproperty float x\nproperty float y\n"
        b"property float z\nend_header\n\0\0"
    )
    (folder / "a.las").write_text("")
    return {
        "nan.npy": "1 of 2 points that are not finite",
        "flat.npy": "no .npy point cloud",
        "pickled.npy": "no .npy point cloud",
        "empty.npy": "holds no point",
        "cut.bin": "no .bin point cloud",
        "no.ply": "no .ply point cloud",
        "short.ply": "no .ply point cloud",
        "a.las": "a.las",
        "missing.bin": "does not exist",
    }


def test_what_is_no_cloud_is_one_line(tmp_path):
    for name, words in broken(tmp_path).items():
        with pytest.raises(UserError) as caught:
            read_cloud(tmp_path / name, "--scan")
        text = str(caught.value)
        assert "--scan" in text and words in text and "\n" not in text, (name, text)


def test_seen_from_above_the_highest_point_shows():
    cloud = torch.tensor([[[0.9, 0.9, 0.0], [-0.9, -0.9, 0.0], [-0.9, -0.9, 2.5], [9.0, 0.0, 0.0]]])
    picture = seen_from_above(cloud, 1.0, 8)[0]
    blue, yellow = torch.tensor([0.15, 0.2, 0.55]), torch.tensor([0.98, 0.8, 0.1])
    torch.testing.assert_close(picture[:, 0, 7], blue)  # right and up
    torch.testing.assert_close(picture[:, 7, 0], yellow)
    assert (picture == 1).all(0).sum() == 62
