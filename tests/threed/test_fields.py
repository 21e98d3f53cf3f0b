"""Fields: compositing in closed form, each representation learns, the surface form, meshes, an empty box."""

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.threed.asset import Render, opaqueness, sparsity
from fastgen.threed.cameras import Ranges, random_cameras, turntable
from fastgen.threed.fields import SHARPNESS, FieldAsset, composited
from fastgen.threed.solids import SHAPES, Solid


def test_a_constant_density_absorbs_exponentially():
    weights, alpha = composited(
        torch.full((1, 500), 2.0, dtype=torch.float64), torch.tensor(0.002, dtype=torch.float64)
    )
    assert float(alpha) == pytest.approx(1 - torch.e**-2.0, rel=1e-9)
    assert float(weights.sum()) == pytest.approx(float(alpha), rel=1e-9)
    assert float(weights[0, 0] / weights[0, -1]) == pytest.approx(
        float(torch.tensor(2 * 0.002 * 499).exp()), rel=1e-6
    )


@pytest.mark.parametrize(
    "kind,surface",
    [("grid", False), ("grid", True), ("triplane", False), ("triplane", True), ("hash", False)],
)
def test_every_representation_learns_a_view(kind, surface):
    asset = FieldAsset(kind, 16, surface, samples=16)
    cameras = random_cameras(3, Ranges(), torch.Generator().manual_seed(0))
    grey = torch.full((3, 3), 0.5)
    target = Solid("sphere", (0.9, 0.2, 0.1)).render(cameras, 12, grey, samples=1)
    optimizer, errors = torch.optim.Adam(asset.parameters(), 0.02), []
    for _ in range(30):
        loss = (asset.render(cameras, 12, grey).rgb - target).square().mean()
        errors.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert errors[-1] < 0.5 * errors[0], errors[::10]


def test_a_surface_is_dense_inside_and_clear_outside():
    asset = FieldAsset("grid", 8, surface=True)
    with torch.no_grad():
        asset.field.table.zero_()  # a ball of radius one half
    p = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0.9, 0, 0], [1.5, 0, 0]])
    density = asset.at(p)[0].detach()
    assert density[0] == pytest.approx(SHARPNESS, rel=1e-4) and density[1] == pytest.approx(
        SHARPNESS / 2, rel=1e-4
    )
    assert density[2] < 1e-3 * SHARPNESS and density[3] == 0


def test_an_untrained_field_is_a_blob():
    out = FieldAsset("grid", 16).render(turntable(2), 16, torch.zeros(2, 3))
    assert out.alpha[:, 0, 8, 8].min() > 0.9 and out.alpha[:, 0, 0, 0].max() < 0.1
    assert 1.2 < float(out.depth[0, 0, 8, 8]) < 2.2


@pytest.mark.parametrize("fill", [-200.0, 200.0])
def test_empty_and_opaque_boxes_stay_finite(fill):
    asset = FieldAsset("grid", 8, samples=8)
    with torch.no_grad():
        asset.field.table.fill_(fill)
    out = asset.render(turntable(2), 8, torch.full((2, 3), 0.3))
    (out.rgb.sum() + out.depth.sum() + sparsity(out) + opaqueness(out)).backward()
    assert asset.field.table.grad.isfinite().all()
    assert float(out.alpha.mean()) == pytest.approx(0.0 if fill < 0 else 1.0, abs=0.4)


def test_regularisers_in_closed_form():
    half = Render(torch.zeros(1, 3, 2, 2), torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 1, 2, 2))
    assert float(opaqueness(half)) == pytest.approx(0.693147, rel=1e-4)
    assert float(sparsity(half)) == pytest.approx(0.26**0.5, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_solids_lie_in_the_unit_ball_and_are_marked_in_front(shape):
    solid = Solid(shape, (0.9, 0.1, 0.1))
    g = torch.Generator().manual_seed(0)
    p = 1.2 * (2 * torch.rand(4000, 3, generator=g) - 1)
    outside = p.norm(dim=-1) > 1
    assert (solid.distance(p[outside]) > 0).all() and (solid.distance(p) < 0).any()
    images = solid.render(turntable(2), 32, torch.zeros(2, 3))
    white = (images.amin(1) > 0.4).float().mean((1, 2))
    assert white[0] > 0.004 and white[1] == 0, "the ball shows in front and not from behind"


def test_a_mesh_is_closed_and_read_by_trimesh(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("mcubes")
    from fastgen.threed.files import mesh_of

    asset = FieldAsset("grid", 8, surface=True)
    with torch.no_grad():
        asset.field.table.zero_()
        asset.field.table[:, 1] = 9  # red
        asset.field.table[:, 2:] = -9
    for suffix in ("glb", "obj"):
        mesh_of(asset).export(tmp_path / f"ball.{suffix}")
        mesh = trimesh.load(tmp_path / f"ball.{suffix}", force="mesh", process=False)
        assert mesh.vertices.shape[0] > 100
        radius = torch.tensor(mesh.vertices).norm(dim=-1)
        assert (radius - 0.5).abs().max() < 0.05
    whole = mesh_of(asset)
    assert whole.is_watertight and whole.volume == pytest.approx(4 / 3 * torch.pi * 0.125, rel=0.03)
    assert whole.visual.vertex_colors[:, 0].min() > 250 and whole.visual.vertex_colors[:, 1].max() < 5


def test_a_thin_field_has_the_surface_of_half_its_density():
    """Nowhere as dense as 10: densities that fall from 5 to 0 at 0.5, so that the surface is near 0.25."""
    pytest.importorskip("trimesh")
    pytest.importorskip("mcubes")
    from fastgen.threed.files import mesh_of

    asset = FieldAsset("grid", 8)
    asset.at = lambda p: ((5 - 10 * p.norm(dim=-1)).clamp(min=0), torch.ones_like(p))
    radius = torch.tensor(mesh_of(asset).vertices).norm(dim=-1)
    assert (radius - 0.25).abs().max() < 0.02


def test_a_field_without_a_surface_says_so():
    pytest.importorskip("trimesh")
    pytest.importorskip("mcubes")
    from fastgen.threed.files import mesh_of

    asset = FieldAsset("grid", 8)
    with torch.no_grad():
        asset.field.table.fill_(-200)
    with pytest.raises(UserError, match="no surface at 2"):
        mesh_of(asset, 16)
