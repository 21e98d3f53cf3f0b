"""The battery in half precision: every family with frozen weights in bf16 and fp16, under autocast and
outside it, against the same teacher in float32.
"""

import copy
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from fastgen.cli import sample
from fastgen.export.model_card import UNDER_AUTOCAST
from fastgen.families.parts import compute_dtype
from fastgen.networks.jvp import TangentConfig, tangent
from fastgen.networks.linear_attention import linear_attention
from fastgen.networks.load import load_teacher
from fastgen.roles.roles import Role
from fastgen.training.exporting import export_run
from tests.families.cases import CASES, PROMPTS
from tests.families.world import label_loop, open_pipeline, plain_call

each = pytest.mark.parametrize("name", sorted(CASES))
half = pytest.mark.parametrize("dtype", ["bf16", "fp16"])
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CLOSE = {"bf16": 0.1, "fp16": 0.03}
"""largest relative error of a network of two blocks whose every layer rounds"""
CLOSE_CALL = {"bf16": 0.25, "fp16": 0.08}
"""largest error of a pipeline's pictures over their spread, after two steps; other noise gives 1.4"""
CLOSE_FILES = 0.25
"""the same of files: those of videos have 256 colours"""
_TEACHERS: dict[tuple[str, str], object] = {}
_EXPORTS: dict[str, tuple[Path, torch.Tensor]] = {}


def teacher_of(world, dtype: str):
    """The world's teacher with its frozen weights in `dtype`."""
    key = (str(world.folder), dtype)
    if key not in _TEACHERS:
        _TEACHERS[key] = load_teacher(str(world.folder), **world.options, dtype=dtype)
        _TEACHERS[key].backbone.requires_grad_(False)
    return _TEACHERS[key]


def autocast(on: bool, dtype: str):
    return torch.autocast("cpu", DTYPES[dtype]) if on else nullcontext()


def excuse(world, check: str) -> None:
    if check in world.case.excused:
        pytest.skip(world.case.excused[check])


def near(found, wanted, dtype: str) -> None:
    assert found.dtype == torch.float32 and found.isfinite().all()
    error = float((found - wanted).norm() / wanted.norm())
    assert error < CLOSE[dtype], error


def check_denoiser(world, dtype: str, under: bool) -> None:
    """D, guidance, features and the gradient by x, near those of the float32 network."""
    backbone, t = teacher_of(world, dtype).backbone, world.level()
    assert compute_dtype(backbone.net) == DTYPES[dtype]
    x_t = world.schedule.noise(world.x0, world.noise, t)
    w = torch.full((2,), 2.0)
    taps = world.family.default_taps(backbone.net)
    with torch.no_grad():
        wanted = world.backbone(x_t, t, world.cond)
        with autocast(under, dtype):
            near(backbone(x_t, t, world.cond), wanted, dtype)
            guided = Role(backbone).guided(x_t, t, world.cond, world.uncond, w)
            maps, D = backbone.features(x_t, t, world.cond, taps, score=True)
        near(D, wanted, dtype)
        assert guided.isfinite().all() and all(m.isfinite().all() for m in maps)
    x = x_t.clone().requires_grad_(True)
    with autocast(under, dtype):
        loss = (backbone(x, t, world.cond) * world.noise).sum()
    loss.backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


@each
def test_denoiser_outside_autocast(world):
    check_denoiser(world, "bf16", False)


@pytest.mark.slow
@each
@half
@pytest.mark.parametrize("under", [False, True], ids=["plain", "autocast"])
def test_denoiser(world, dtype, under):
    check_denoiser(world, dtype, under)


@pytest.mark.slow
@each
@half
@pytest.mark.parametrize("under", [False, True], ids=["plain", "autocast"])
def test_checkpointing(world, dtype, under):
    """Recomputed activations give the gradient of the plain pass."""
    excuse(world, "checkpointing")
    t, found = world.times(2), []
    for recompute in (False, True):
        backbone = copy.deepcopy(teacher_of(world, dtype).backbone)
        if recompute:
            backbone.enable_gradient_checkpointing()
        x = world.schedule.noise(world.x0, world.noise, t).requires_grad_(True)
        with autocast(under, dtype):
            loss = (backbone(x, t, world.cond) * world.noise).sum()
        loss.backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2 * float(found[0].abs().max()))


@pytest.mark.slow
@each
@half
def test_tangent(world, dtype):
    """Forward-mode derivative of D along x; autocast is off in derivatives."""
    excuse(world, "jvp")
    backbone, t = teacher_of(world, dtype).backbone, world.level()
    with torch.no_grad():
        found, wanted = (
            tangent(lambda x, b=b: b(x, t, world.cond), (world.x0,), (world.noise,), TangentConfig())
            for b in (backbone, world.backbone)
        )
    near(found, wanted, dtype)


@pytest.mark.slow
@each
@half
@pytest.mark.parametrize("under", [False, True], ids=["plain", "autocast"])
def test_conditions_and_latents(world, dtype, under):
    """Prompts and images are encoded and samples decoded, finite and in float32."""
    codec = teacher_of(world, dtype).codec
    with torch.no_grad(), autocast(under, dtype):
        if world.family.kind == "text":
            cond = codec.prompts(PROMPTS, world.images)
            assert all(v.isfinite().all() for v in cond.values() if v.is_floating_point())
            assert all(v.dtype == torch.float32 for v in cond.values() if v.is_floating_point())
        if world.case.latent:
            return
        seen = codec.decode(world.x0)
        assert seen.isfinite().all() and seen.dtype == torch.float32
        if "encode" not in world.case.excused:
            assert codec.encode(seen * 2 - 1).isfinite().all()


def exported(world, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A two-step student's export, and the pictures of its call in float32."""
    key = str(world.folder)
    if key not in _EXPORTS:
        trainer = world.trainer("full", 2, world.case.sampler)
        folder = export_run(trainer, tmp_path_factory.mktemp("export") / "full", {})
        _EXPORTS[key] = folder, call_pipeline(world, folder, torch.float32)
    return _EXPORTS[key]


@torch.no_grad()
def call_pipeline(world, folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """The call that the card shows, with the pipeline loaded in this precision."""
    info = json.loads((folder / "fastgen.json").read_text())["export"]
    how = world.case.plain or (label_loop if world.family.kind == "labels" else plain_call)
    pipe = open_pipeline(folder, torch_dtype=dtype)
    return torch.as_tensor(how(world, pipe, info, world.noise.to(dtype))).float()


@pytest.mark.slow
@each
@half
@pytest.mark.parametrize("under", [False, True], ids=["plain", "autocast"])
def test_exported_pipeline(world, dtype, under, tmp_path_factory):
    """An export in plain diffusers: half precision gives the pictures of float32."""
    folder, wanted = exported(world, tmp_path_factory)
    if under and dtype == "fp16" and linear_attention(world.backbone.net):
        assert UNDER_AUTOCAST in (folder / "README.md").read_text()
        pytest.skip("plain diffusers divides 0 by 0 in float16 autocast; the export's card says so")
    with autocast(under, dtype):
        found = call_pipeline(world, folder, DTYPES[dtype])
    assert found.isfinite().all()
    error = float((found - wanted).norm() / (wanted - wanted.mean()).norm())
    assert error < CLOSE_CALL[dtype], error


def draw(world, folder: Path, dtype: str, out: Path, tmp_path: Path) -> torch.Tensor:
    """What sample.py writes of two images, in [0, 1]."""
    argv = ["--model", str(folder), "--dtype", dtype, "--num_images", "2", "--out", str(out)]
    if world.family.takes_text and world.family.kind == "text":
        argv += [word for text in PROMPTS for word in ("--prompt", text)]
    if world.family.needs_image:
        shown = tmp_path / "shown.png"
        Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5).save(shown)
        argv += ["--image", str(shown)]
        argv += ["--last_image", str(shown)] if world.family.needs_last_image else []
    assert sample.main(argv) == 0
    files = sorted(f for f in out.rglob("*") if f.suffix in (".png", ".gif") and f.name != "grid.png")
    assert files
    frames = [
        np.array(frame.convert("RGB")) for f in files for frame in ImageSequence.Iterator(Image.open(f))
    ]
    return torch.from_numpy(np.stack(frames)) / 255


@pytest.mark.slow
@each
@half
def test_sample_command(world, dtype, tmp_path_factory, tmp_path):
    """sample.py draws an export in half precision as it does in float32."""
    if world.case.latent:
        pytest.skip("decoding takes too long for a test")
    folder, _ = exported(world, tmp_path_factory)
    wanted, found = (draw(world, folder, d, tmp_path / d, tmp_path) for d in ("fp32", dtype))
    apart = ((found - wanted).abs() - 1.01 / 255).clamp(min=0)  # files are rounded to one grey level
    error = float(apart.norm() / (wanted - wanted.mean()).norm())
    assert error < CLOSE_FILES, error
