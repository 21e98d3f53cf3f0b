"""Exports: a splat read back and by another program, a turntable, cameras, what is no asset."""

import json

import pytest
import torch
from PIL import Image

from fastgen.core.errors import UserError
from fastgen.threed.cameras import turntable
from fastgen.threed.files import cameras_json, ply_names, read_ply, write_gif, write_ply
from fastgen.threed.gaussians import SH, GaussianAsset
from tests.support.scenes import blobs


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_a_splat_is_read_back_and_renders_the_same(tmp_path, degree):
    asset = GaussianAsset(20, degree, seed=1)
    with torch.no_grad():
        asset.sh.add_(0.3 * torch.randn(asset.sh.shape, generator=torch.Generator().manual_seed(2)))
    write_ply(asset, tmp_path / "a.ply")
    again = read_ply(tmp_path / "a.ply")
    views, grey = turntable(3), torch.full((3, 3), 0.5)
    a, b = (x.render(views, 20, grey).rgb for x in (asset, again))
    assert (a - b).abs().max() < 1e-5
    shown = again.render(turntable(3, elevation=60), 20, grey).rgb
    assert (a - shown).abs().max() > 0.05, "the negative: another view differs"


def test_a_splat_has_the_published_layout(tmp_path):
    """Logits, log scales, (colour - 0.5) / 0.2821 and wxyz quaternions, as trimesh reads them."""
    trimesh = pytest.importorskip("trimesh")
    scene = blobs()
    write_ply(scene, tmp_path / "a.ply")
    rows = trimesh.load(tmp_path / "a.ply").metadata["_ply_raw"]["vertex"]["data"]
    assert list(rows.dtype.names) == ply_names(0)
    assert rows["x"].tolist() == pytest.approx([0.35, -0.3, -0.2])
    assert rows["opacity"].tolist() == pytest.approx([3.0] * 3)
    assert (0.5 + SH * rows["f_dc_0"]).tolist() == pytest.approx([0.9, 0.1, 0.2], abs=1e-6)
    assert torch.tensor(rows["scale_1"]).exp().tolist() == pytest.approx([0.2, 0.22, 0.18])
    lengths = sum(torch.tensor(rows[f"rot_{i}"]) ** 2 for i in range(4))
    assert lengths.tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("damage", [b"", b"ply\nend_header\n", "cut", "nan"])
def test_other_files_are_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "a.ply"
    write_ply(blobs(), path)
    raw = path.read_bytes()
    if damage == "nan":
        damage = raw[:-4] + b"\x00\x00\xc0\x7f"
    path.write_bytes(raw[:-5] if damage == "cut" else damage)
    with pytest.raises(UserError, match="--model"):
        read_ply(path)


def test_a_turntable_is_a_clip_and_its_cameras_are_known(tmp_path):
    views = turntable(5)
    write_gif(torch.rand(5, 3, 8, 8), tmp_path / "a.gif", scale=3)
    with Image.open(tmp_path / "a.gif") as clip:
        assert clip.n_frames == 5 and clip.size == (24, 24)
    found = json.loads(cameras_json(views, 8))
    first = torch.tensor(found["frames"][1]["transform_matrix"])
    torch.testing.assert_close(first, views.c2w[1])
