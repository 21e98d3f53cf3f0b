"""A run whose student is assets: trained, resumed bit for bit, exported, sampled, reported; bad settings."""

import json
import shutil

import pytest
import torch

from fastgen.cli import export, sample
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.evaluation.diagnostics import warnings
from fastgen.export.assets import load_assets, read_info
from fastgen.threed import gsplat
from fastgen.threed.gaussians import GaussianAsset
from tests.support.scenes import run_assets

VALUES = {
    "student": {"asset": {"kind": "gaussians", "points": 30, "num": 2, "move_every": 2}},
    "critic": {"kind": "lora", "lora": {"rank": 2}},
    "data": {"views": {"prompt": "a red bag"}},
    "objective": {"name": "vsd"},
    "optim": {"student": {"lr": 1e-2}, "critic": {"lr": 1e-3}},
    "train": {"max_train_steps": 4, "train_batch_size": 4, "validation_steps": 0, "checkpointing_steps": 2},
    "eval": {"num_samples": 0, "grid": 4},
}


def run(tiny, folder, *more, **changes):
    return run_assets(tiny, folder, VALUES | changes, *more)


def test_a_run_ends_in_files_that_open_and_resumes_where_it_was(tiny, tmp_path, capsys):
    assert run(tiny, tmp_path / "a") == 0
    folder = tmp_path / "a" / "export"
    assert {"asset0.ply", "asset1.ply", "asset0.gif", "cameras.json", "README.md"} <= {
        p.name for p in folder.iterdir()
    }
    assert "data:image/gif" in (tmp_path / "a" / "report" / "index.html").read_text()
    info = read_info(folder)
    one, two = load_assets(folder, info)
    assert info.prompt == "a red bag" and not torch.equal(one.means, two.means)

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "checkpoint-4")
    assert run(tiny, tmp_path / "b", "--resume") == 0
    again, _ = load_assets(tmp_path / "b" / "export", info)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), again.parameters()))

    kept = tmp_path / "kept"
    assert export.main(["--run", str(tmp_path / "a"), "--checkpoint", "2", "--out", str(kept)]) == 0
    early, _ = load_assets(kept, read_info(kept))
    assert read_info(kept).training_steps == 2 and not torch.equal(early.means, one.means)

    out = tmp_path / "views"
    argv = ["--model", str(tmp_path / "a"), "--out", str(out), "--turntable", "6", "--steps", "3"]
    assert sample.main(argv) == 0 and "--steps has no effect" in capsys.readouterr().err
    assert (out / "asset0.gif").exists() and len(
        json.loads((out / "cameras.json").read_text())["frames"]
    ) == 6
    capsys.readouterr()
    both = ["--turntable", "6", "--camera", "0", "0", "2", "50"]
    for wrong, said in (
        (both, "--turntable: found 6"),
        (["--height", "64", "--width", "32"], "--width: found 32"),
    ):
        assert sample.main(["--model", str(folder), "--out", str(tmp_path / "no"), *wrong]) == 2
        assert said in capsys.readouterr().err
    inside = ["--camera", "0", "0", "0.01", "50"]
    assert sample.main(["--model", str(folder), "--out", str(tmp_path / "no"), *inside]) == 2
    assert "inside the asset" in capsys.readouterr().err


def test_views_on_a_network_are_refused(tiny, tmp_path, capsys):
    flags = ["--model", str(tiny("sd")), "--out", str(tmp_path / "no"), "--turntable", "6", "--prompt", "a"]
    assert sample.main(flags) == 2
    assert "--turntable" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes,key",
    [
        ({"data": {"views": {"prompt": "a", "distance": [0.5, 2.0]}}}, "distance"),
        ({"data": {"views": {"prompt": "a", "fovy": [50, 40]}}}, "fovy"),
        ({"data": {"views": {"prompt": "a", "fovy": [50, 180]}}}, "fovy"),
        ({"data": {"views": {"prompt": "a", "elevation": [0, 90]}}}, "elevation"),
        ({"data": {"views": {"prompt": ""}}}, "prompt"),
        ({"data": {"name": "fashion"}}, "data.views"),
        ({"student": {}}, "student.asset"),
        ({"student": {**VALUES["student"], "num_steps": 2}}, "student.num_steps"),
        ({"student": {**VALUES["student"], "kind": "lora"}}, "student.kind"),
        ({"objective": {"name": "sft"}}, "objective.name"),
        ({"student": {"asset": {"kind": "cubes"}}}, "kind"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(tiny, changes, key):
    with pytest.raises(UserError, match=key):
        validate({"teacher": {"path": str(tiny("sd"))}, **VALUES, **changes})


def test_a_teacher_without_prompts_is_refused(tiny, tmp_path, capsys):
    assert run(tiny, tmp_path / "a", teacher={"path": "assets:teachers/digits"}) == 2
    assert "data.views" in capsys.readouterr().err


@pytest.mark.parametrize("opacity,word", [(0.001, "empty"), (0.995, "fills"), (0.4, "")])
def test_an_empty_or_full_box_is_told(opacity, word):
    found = warnings([{"step": i, "student/opacity": opacity} for i in range(20)], {})
    assert bool(found) == bool(word) and all(word in seen for seen, _ in found)


def test_gsplat_that_does_not_compile_falls_back_with_a_warning(monkeypatch, capsys):
    """As where there is no nvcc: importing works, the first call raises."""
    import sys
    import types

    def broken(*args, **kwargs):
        raise RuntimeError("CUDA_HOME environment variable is not set")

    fake = types.ModuleType("gsplat")
    fake.rasterization = broken
    monkeypatch.setitem(sys.modules, "gsplat", fake)
    gsplat._compiled.cache_clear()
    try:
        assert gsplat._compiled() is None
    finally:
        gsplat._compiled.cache_clear()
    assert "plain torch renders" in capsys.readouterr().err
    assert gsplat.gsplat_or_none(GaussianAsset(1).means.device) is None
