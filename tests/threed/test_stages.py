"""ProlificDreamer's stages: normals of a surface, geometry and colours trained alone, and a run of all."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import VP
from fastgen.networks.denoiser import Denoiser
from fastgen.objectives.sds import SDS, SDSConfig
from fastgen.objectives.vsd import VSD, ProlificDreamerConfig
from fastgen.roles.roles import Role
from fastgen.threed.cameras import Ranges, random_cameras, turntable
from fastgen.threed.fields import DenseGrid, FieldAsset
from fastgen.threed.gaussians import GaussianAsset
from fastgen.training.checkpoint import load
from tests.support.heavier import first_of
from tests.support.scenes import SIZE, SceneTeacher, asset_student, fitted, psnr, role, run_assets, seen_from
from tests.support.toys import rng


def ball(kind="grid", size=12, **more):
    """The surface of radius one half that zeros are."""
    asset = FieldAsset(kind, size, surface=True, samples=48, **more)
    for parameter in asset.parameters():
        parameter.data.zero_()
    return asset


def egg(size=16):
    """An ellipsoid that stands upright, in colours that change along it."""
    asset = ball("grid", size, separate=True)
    line = torch.linspace(-1, 1, size)
    p = torch.stack(torch.meshgrid(line, line, line, indexing="ij")[::-1], -1)  # as tables hold it: z first
    axes = torch.tensor([0.38, 0.5, 0.68])
    k = (p / axes).norm(dim=-1)
    distance = k * (k - 1) / (p / axes**2).norm(dim=-1).clamp(min=1e-6)
    asset.field.table.data[0, 0] = (distance - p.norm(dim=-1) + 0.5) / 0.1 / DenseGrid.UNIT
    asset.paint.table.data[0] = 0.6 * (4 * p).sin().permute(3, 0, 1, 2)
    return asset.requires_grad_(False)


def test_p1_normals_of_a_ball_are_its_radii():
    """At every point of the surface, and in the image where a ray meets it."""
    g = torch.Generator().manual_seed(0)
    way = torch.nn.functional.normalize(torch.randn(100, 3, generator=g), dim=-1)
    for kind in ("grid", "triplane", "hash"):
        torch.testing.assert_close(ball(kind).normal(0.5 * way), way, rtol=0, atol=5e-3)
    cameras, size = random_cameras(4, Ranges(), g), 32
    seen = ball().render_normals(cameras, size, torch.zeros(4, 3))
    origins, ways = cameras.rays(size, size)
    b = (origins * ways).sum(-1)
    root = b.square() - origins.square().sum(-1) + 0.25
    hit = root > 0.04  # not at its edge, where a ray passes through what is half clear
    points = origins + (-b - root.clamp(min=0).sqrt())[..., None] * ways
    found = 2 * seen.rgb.permute(0, 2, 3, 1) - 1
    cosine = torch.nn.functional.cosine_similarity(found[hit], points[hit], dim=-1)
    assert hit.sum() > 300 and cosine.min() > 0.97 and cosine.mean() > 0.99
    behind = torch.nn.functional.cosine_similarity(found[hit], -points[hit], dim=-1)
    assert behind.max() < -0.9, "the negative: they point outwards"
    assert seen.rgb[:, :, 0, 0].max() < 1e-5, "the background stays what it is"


def test_p1_gradients_flow_where_they_should():
    """Of geometry, shown as normals or not, into the distance alone, of colours into the paint alone."""
    schedule = VP.scaled_linear()
    base = asset_student([FieldAsset("grid", 8, True, 12, seed=i, separate=True) for i in range(2)]).backbone
    t, batch = torch.tensor(schedule.steps(1)[0]).expand(6), seen_from(6, 0)
    noise = torch.linspace(-2, 2, 6)[:, None, None, None] + 0 * batch.noise
    for train, view, learned in (
        ("geometry", "normals", "field"),
        ("geometry", "colours", "field"),
        ("colours", "colours", "paint"),
    ):
        net = base.staged(train, view)
        own = Role(net).trainable()
        assert sorted(own) == [f"assets.{i}.{learned}.table" for i in range(2)]
        for parameter in own.values():
            parameter.requires_grad_(True)
        weight = torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
        (weight * net(noise, t, batch.cond)).sum().backward()
        for name, parameter in base.named_parameters():
            touched = parameter.grad is not None and bool(parameter.grad.abs().sum())
            assert touched == (name in own), (train, view, name)
            parameter.grad = None
    assert len(Role(base.staged("all", "colours")).trainable()) == len(Role(base).trainable()) == 4
    assert not torch.allclose(base(noise, t, batch.cond), base.staged("all", "normals")(noise, t, batch.cond))


def test_p1_gaussians_move_only_where_all_is_trained():
    asset = GaussianAsset(30, move_every=1)
    asset.put("logits", torch.cat([torch.full((10,), -9.0), torch.ones(20)]))
    base = asset_student([asset]).backbone
    assert list(Role(base.staged("colours", "colours")).trainable()) == ["assets.0.sh"]
    before = asset.means.clone()
    base.staged("colours", "colours").settle(0)
    assert torch.equal(asset.means, before)
    base.staged("all", "colours").settle(0)
    assert not torch.equal(asset.means, before), "the negative"


class Point(Denoiser):
    """The exact critic of one asset seen from one camera: all of its distribution is the render."""

    prediction, of = "x0", None

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t, t, cond):
        return (2 * self.of().seen.rgb - 1).detach()


@pytest.mark.slow
def test_p2_the_stages_of_an_exact_scene():
    """SDS on normals brings normals nearer, VSD on the fixed geometry then colours; each leaves the other."""
    S, target = VP.scaled_linear(), egg()
    shaped = SimpleNamespace(render=target.render_normals)
    asset = FieldAsset("grid", 16, True, 32, separate=True)
    student = asset_student([asset])
    teachers = {view: SceneTeacher(S, [scene]) for view, scene in (("normals", shaped), ("colours", target))}

    def scores():
        return {v: psnr(student.backbone.staged("all", v), teacher) for v, teacher in teachers.items()}

    found, copies = [scores()], [{n: p.clone() for n, p in asset.named_parameters()}]
    for train, view in (("geometry", "normals"), ("colours", "colours")):
        own = student.with_network(Role(student.backbone.staged(train, view)))
        parts = {"student": own, "teacher": role(teachers[view])}
        if view == "normals":
            objective = SDS(SDSConfig(), parts, rng())
        else:
            critic = Point(S)
            critic.of = lambda: own.backbone  # noqa: B023
            objective = VSD(ProlificDreamerConfig(), parts | {"critic": Role(critic)}, rng())
        fitted(objective, 100)
        found.append(scores())
        copies.append({n: p.clone() for n, p in asset.named_parameters()})
    for k, name in ((0, "paint.table"), (1, "field.table")):
        assert torch.equal(copies[k][name], copies[k + 1][name])
    assert found[1]["normals"] > found[0]["normals"] + 4 and found[1]["normals"] > 24, found
    assert found[2]["normals"] == found[1]["normals"], "the geometry of the last stage is fixed"
    assert found[2]["colours"] > found[1]["colours"] + 4 and found[2]["colours"] > 26, found


STAGES = [
    {"name": "field", "objective": {"name": "vsd"}, "max_train_steps": 2},
    {
        "name": "geometry",
        "objective": {"name": "sds", "real_guidance": 20.0},
        "max_train_steps": 2,
        "asset": {"train": "geometry", "view": "normals"},
    },
    {"name": "texture", "objective": {"name": "vsd"}, "max_train_steps": 2, "asset": {"train": "colours"}},
]
ASSET = {"kind": "grid", "size": 8, "samples": 12, "surface": True, "separate": True}
VALUES = {
    "student": {"asset": ASSET},
    "critic": {"kind": "lora", "lora": {"rank": 2}},
    "data": {"views": {"prompt": "a red bag"}},
    "stages": [
        {**stage, "optim": {"student": {"lr": 1e-2}, "critic": {"lr": 1e-3}} if "vsd" in str(stage) else {}}
        for stage in STAGES
    ],
    "train": {
        "train_batch_size": 4,
        "validation_steps": 0,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 9,
    },
    "eval": {"num_samples": 0, "grid": 4},
}


def weights(folder, step):
    """{geometry, colours} of the asset in a checkpoint."""
    tensors, _ = load(folder / "checkpoints" / f"checkpoint-{step}")
    names = {"geometry": "part/student.assets.0.field.table", "colours": "part/student.assets.0.paint.table"}
    return {k: tensors[name].clone() for k, name in names.items()}


@pytest.mark.parametrize("kept", first_of([3, 2, 4]))
def test_three_stages_of_one_run_train_what_they_say_and_resume_bit_for_bit(tiny, tmp_path, kept):
    """From where the geometry begins, from inside of it, and from where the texture begins."""
    assert run_assets(tiny, tmp_path / "a", VALUES) == 0
    at = {step: weights(tmp_path / "a", step) for step in range(1, 7)}
    for key, moving in (("geometry", {1, 2, 3, 4}), ("colours", {1, 2, 5, 6})):
        for step in range(2, 7):
            same = torch.equal(at[step][key], at[step - 1][key])
            assert same != (step in moving), (key, step)
    every = load(tmp_path / "a" / "checkpoints" / "checkpoint-6")[0]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for step in range(kept + 1, 7):
        shutil.rmtree(tmp_path / "b" / "checkpoints" / f"checkpoint-{step}")
    assert run_assets(tiny, tmp_path / "b", VALUES, "--resume") == 0
    again = load(tmp_path / "b" / "checkpoints" / "checkpoint-6")[0]
    assert set(again) == set(every) and all(torch.equal(again[n], every[n]) for n in every)


def test_the_mesh_of_such_a_field_is_read_by_trimesh(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("mcubes")
    from fastgen.threed.files import read_asset, write_asset

    asset = egg()
    assert write_asset(asset, tmp_path, "asset") == ["asset.safetensors", "asset.glb"]
    mesh = trimesh.load(tmp_path / "asset.glb", force="mesh", process=False)
    assert mesh.extents.tolist() == pytest.approx([0.76, 1.0, 1.36], abs=0.06)
    assert mesh.visual.vertex_colors[:, :3].std(0).min() > 10
    settings = {"kind": "grid", "size": 16, "surface": True, "samples": 48, "separate": True}
    again, grey = read_asset(tmp_path, "asset", settings), torch.full((2, 3), 0.5)
    assert torch.equal(again.render(turntable(2), 12, grey).rgb, asset.render(turntable(2), 12, grey).rgb)


@pytest.mark.parametrize(
    "student,stage,key",
    [
        ({"separate": False}, {"train": "geometry"}, "stages.0.asset.train: found geometry"),
        ({"surface": False}, {"view": "normals"}, "stages.0.asset.view: found normals"),
        ({"kind": "gaussians"}, {"view": "normals"}, "stages.0.asset.view: found normals"),
        ({}, {"train": "colours", "view": "normals"}, "stages.0.asset.train: found colours"),
        ({"separate": False, "generator": {}}, {}, "stages.0.asset: found for student.asset.generator"),
        ({"generator": {}}, None, "separate: found true with a generator"),
        (None, {"train": "geometry"}, "stages.0.asset: found for a student that is no asset"),
    ],
)
def test_stages_that_cannot_be_are_refused_by_their_key(tiny, student, stage, key):
    one = {"name": "one", "objective": {"name": "sds"}, **({} if stage is None else {"asset": stage})}
    values = {"teacher": {"path": str(tiny("sd"))}, **VALUES, "stages": [one]}
    values["student"] = {} if student is None else {"asset": {**ASSET, **student}}
    if student is None:
        values["data"] = {"prompts": "any"}
    with pytest.raises(UserError, match=key):
        validate(values)


def test_a_stage_of_a_method_without_terms_of_assets_is_refused(tiny):
    one = {"name": "one", "objective": {"name": "swiftbrush"}, "asset": {"train": "geometry"}}
    with pytest.raises(UserError, match="stages.0.asset: found for swiftbrush"):
        validate({"teacher": {"path": str(tiny("sd"))}, **VALUES, "stages": [one]})
