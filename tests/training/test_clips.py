"""A whole run on the bundled clips: trained, exported, measured by what clips are measured by."""

import json

import pytest
import yaml
from PIL import Image

from fastgen.cli.train import main
from fastgen.data import moving
from fastgen.evaluation.metrics import fvd_mini
from fastgen.export.load import load_export
from tests.support.clips import clip_teacher

TINY = {
    "student": {"num_steps": 2},
    "objective": {"name": "dmd2", "gan_weight": 0.1},
    "data": {"name": "moving"},
    "train": {"max_train_steps": 1, "train_batch_size": 2, "validation_steps": 0},
    "eval": {"num_samples": 6, "teacher_samples": 4, "student_steps": [1], "grid": 4},
}


@pytest.fixture
def few(monkeypatch):
    """A reference of few clips, for time."""
    monkeypatch.setattr(fvd_mini, "HELD", 100)
    monkeypatch.setattr(fvd_mini, "RECONSTRUCTED", 100)
    fvd_mini._reference.cache_clear()
    yield
    fvd_mini._reference.cache_clear()


def test_a_run_on_clips_measures_and_shows_them(tmp_path, few):
    teacher = {"path": str(clip_teacher(tmp_path / "teacher")), "num_steps": 2, "guidance": 2.0}
    (tmp_path / "in.yaml").write_text(yaml.safe_dump({"teacher": teacher, **TINY}))
    assert main(["--config", str(tmp_path / "in.yaml"), "--output_dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    rows = [results[k] for k in ("teacher", "untrained_student", "student", "floor")]
    for row in (*rows, results["student_by_steps"]["1"]):
        assert {"fvd_mini", "fd_mini", "agreement_motion", "frame_consistency", "dynamic_degree"} <= set(row)
    assert results["floor"]["fvd_mini"] < results["untrained_student"]["fvd_mini"]
    assert results["autoencoder"]["fvd_mini"] > 0 and "fvd_mini_recon" in results["student"]
    assert "not comparable with a published FVD" in results["protocol"]["note"]
    for who in ("teacher", "student", "untrained"):
        with Image.open(tmp_path / f"run/samples/{who}.gif") as clip:
            assert clip.n_frames > 1, who
        with Image.open(tmp_path / f"run/samples/{who}.png") as strip:
            assert strip.width > moving.FRAMES * moving.SIZE, who
    page = (tmp_path / "run/report/index.html").read_text()
    assert "fvd_mini" in page and "dynamic degree" in page


def test_clips_begin_with_the_frame_they_are_shown(tmp_path, few):
    """Of every contender, as exactly as the autoencoder repeats it; no loss is of that frame."""
    teacher = {"path": str(clip_teacher(tmp_path / "teacher", first_frame=True)), "num_steps": 2}
    data = {"name": "moving", "limit": 6, "stream": "never"}
    (tmp_path / "in.yaml").write_text(yaml.safe_dump({**TINY, "teacher": teacher, "data": data}))
    assert main(["--config", str(tmp_path / "in.yaml"), "--output_dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    rows = [results[k] for k in ("teacher", "untrained_student", "student")]
    assert all(28 < row["first_frame_psnr"] < 35 for row in rows), rows  # 8 to 12 of another clip's frame


@pytest.mark.slow
def test_seedance_is_one_run_on_clips(tmp_path, few):
    """Four stages of one adapter, each from what the one before left, by rewards of motion and look that
    measure nothing; a picture's reward judges frames of the same clips.
    """
    rewards = [{"name": "motion"}, {"name": "look"}, {"name": "contrast"}]
    plan = [
        {"name": "tscd", "grid_steps": 4, "segments": 2},
        {"name": "tdm"},
        {"name": "ladd", "preference_weight": 1.0, "rewards": rewards, "gan": {"disc_depths": 2}},
        {"name": "feedback", "rewards": rewards, "ref_weight": 1.0},
    ]
    teacher = {"path": str(clip_teacher(tmp_path / "teacher")), "num_steps": 2, "guidance": 2.0}
    values = {
        **TINY,
        "teacher": teacher,
        "student": {"kind": "lora", "num_steps": 2, "sampler": "ode", "lora": {"rank": 2}},
        "critic": {"kind": "lora", "lora": {"rank": 2}},
        "stages": [{"name": one["name"], "objective": one, "max_train_steps": 1} for one in plan],
        "train": {"train_batch_size": 2, "validation_steps": 9},
        "eval": {**TINY["eval"], "student_steps": [], "validation_samples": 4},
    }
    values.pop("objective")
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "in.yaml"), "--output_dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [one["objective"] for one in results["stages"]] == ["", "tscd", "tdm", "ladd", "feedback"]
    assert all("agreement_motion" in one and "fvd_mini" in one for one in results["stages"])
    assert results["protocol"]["tuned_by"] == ["motion", "look", "contrast"]
    assert load_export(str(tmp_path / "run/export")).info.objective == "tscd+tdm+ladd+feedback"
