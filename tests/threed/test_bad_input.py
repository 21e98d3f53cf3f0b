"""What cannot be shown or exported: empty and full boxes, cameras amid an asset, fields without surface. All
is finite, one line, or a warning. Scans are in tests/export/test_scans.py, settings in test_run.py.
"""

import pytest
import torch

from fastgen.cli import sample
from fastgen.export.assets import AssetInfo, export_assets
from fastgen.threed.asset import opaqueness, sparsity
from fastgen.threed.cameras import Cameras
from fastgen.threed.fields import FieldAsset
from fastgen.threed.gaussians import GaussianAsset
from fastgen.threed.student import AssetStudent
from tests.support.scenes import asset_student, run_assets


def info_of(settings):
    views = {"elevation": (-10, 45), "distance": (2, 2.4), "fovy": (45, 50)}
    return AssetInfo("a bag", "sds", 1, 16, {"num": 1, **settings}, views)


def filled(value):
    asset = FieldAsset("grid", 8, samples=8)
    asset.field.table.data.fill_(value)
    return asset


@pytest.mark.parametrize("logit", [-40.0, 40.0])
@pytest.mark.parametrize("distance", [2.2, 0.3])
def test_empty_and_opaque_gaussians_stay_finite_from_outside_and_amid_them(logit, distance):
    asset = GaussianAsset(40, move_every=1)
    asset.put("logits", torch.full((40,), logit))
    cameras = Cameras.of(torch.tensor([[0.0, 0.0, distance, 50.0], [170.0, 40.0, distance, 50.0]]))
    seen = asset.render(cameras, 16, torch.full((2, 3), 0.5))
    (seen.rgb.sum() + seen.depth.sum() + sparsity(seen) + opaqueness(seen)).backward()
    assert all(torch.isfinite(v).all() for v in (seen.rgb, seen.depth, seen.alpha))
    assert all(p.grad.isfinite().all() for p in asset.parameters())
    asset.settle(0)
    assert all(p.isfinite().all() for p in asset.parameters())
    assert (float(seen.alpha.detach().mean()) < 1e-6) == (logit < 0)


@pytest.mark.parametrize("asset", ["field", "gaussians"])
def test_an_empty_asset_is_exported_with_a_warning(tmp_path, capsys, asset):
    """The turntable, the viewer and what can be read back are there; of a field no mesh, which is told."""
    if asset == "field":
        one, settings = filled(-200.0), {"kind": "grid", "size": 8, "surface": False, "samples": 8}
    else:
        one, settings = GaussianAsset(10), {"kind": "gaussians"}
        one.put("logits", torch.full((10,), -40.0))
    net = asset_student([one]).backbone
    assert isinstance(net, AssetStudent)
    folder = export_assets(net, info_of(settings), tmp_path / "export")
    names = {p.name for p in folder.iterdir()}
    assert {"asset.gif", "asset.splat", "viewer.html", "asset.json"} <= names and "asset.glb" not in names
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(told) == (asset == "field") and all("no mesh of asset: no surface" in t for t in told)


def test_the_mesh_of_a_full_box_is_closed():
    """A surface that the box cuts off would be open; the negative is the same without the cut closed."""
    pytest.importorskip("trimesh")
    mcubes = pytest.importorskip("mcubes")
    import trimesh

    from fastgen.threed.files import mesh_of

    for surface in (False, True):
        asset = filled(200.0)
        asset.surface = surface
        if surface:  # a half space, cut off by the box
            asset.distance = lambda p: p[..., 2]
        mesh = mesh_of(asset, 16)
        assert mesh.is_watertight and mesh.volume > 3
    line = torch.linspace(-1, 1, 16)
    half = -torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1)[..., 2].numpy()
    assert not trimesh.Trimesh(*mcubes.marching_cubes(half, 0.0)).is_watertight


@pytest.mark.parametrize(
    "camera,key",
    [
        (("nan", "0", "2.2", "50"), "cameras.azimuth"),
        (("0", "nan", "2.2", "50"), "cameras.elevation"),
        (("0", "0", "-1", "50"), "cameras.distance"),
        (("0", "0", "2.2", "180"), "cameras.fovy"),
        (("0", "0", "0.5", "50"), "--camera"),
    ],
)
def test_cameras_that_cannot_be_are_one_line_of_sample(tmp_path, capsys, camera, key):
    net = asset_student([filled(0.0)]).backbone
    settings = {"kind": "grid", "size": 8, "surface": False, "samples": 8}
    folder = export_assets(net, info_of(settings), tmp_path / "export")
    capsys.readouterr()
    flags = ["--model", str(folder), "--out", str(tmp_path / "no"), "--camera", *camera]
    assert sample.main(flags) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and key in said[0] and not (tmp_path / "no").exists(), said


def test_a_camera_inside_the_object_is_one_line_of_train(tiny, tmp_path, capsys):
    values = {
        "student": {"asset": {"kind": "gaussians", "points": 10}},
        "data": {"views": {"prompt": "a bag", "distance": [0.5, 2.0]}},
        "objective": {"name": "sds"},
    }
    assert run_assets(tiny, tmp_path / "a", values) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "data.views.distance" in said[0] and "inside the object" in said[0], said
