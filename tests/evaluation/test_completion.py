"""Metrics of completed scans in closed form, and a run measured by them."""

import json
import math

import pytest
import torch
import yaml

from fastgen.cli.train import main
from fastgen.core.errors import UserError
from fastgen.evaluation.metrics.completion import CloudMeasurer, scores
from tests.support.clouds import NET, SCHEDULER

LINE = torch.stack([torch.arange(8.0), torch.zeros(8), torch.zeros(8)], 1) + 0.25


def test_a_cloud_is_itself_and_a_shift_is_a_shift():
    same, near = scores(LINE, LINE), scores(LINE, LINE + torch.tensor([0.0, 0.1, 0.0]))
    assert same == {"chamfer": 0, "jsd": 0, "jsd_bev": 0, "iou": 1, "f_score": 1}
    assert near["chamfer"] == pytest.approx(0.1, rel=1e-5) and near["f_score"] == 1 and near["iou"] == 1


def test_disjoint_clouds_and_clouds_above_each_other():
    far, above = scores(LINE, LINE + 100), scores(LINE, LINE + torch.tensor([0.0, 0.0, 3.0]))
    assert far["jsd"] == far["jsd_bev"] == pytest.approx(math.log(2) ** 0.5)
    assert far["iou"] == far["f_score"] == 0
    assert above["jsd"] == pytest.approx(math.log(2) ** 0.5) and above["jsd_bev"] == 0
    assert above["chamfer"] == pytest.approx(3)


def test_half_of_a_cloud():
    """Precision 1, recall a half: F = 2/3; half the cells are held by both; shares 1/4 against 1/8."""
    found = scores(LINE[:4], LINE)
    assert found["f_score"] == pytest.approx(2 / 3) and found["iou"] == 0.5
    assert found["chamfer"] == pytest.approx(0.5 * (1 + 2 + 3 + 4) / 8)
    m = 3 / 16
    wanted = 0.5 * (math.log(0.25 / m) + 0.5 * math.log(0.125 / m) + 0.5 * math.log(0.125 / (1 / 16)))
    assert found["jsd"] == pytest.approx(wanted**0.5)


def test_each_cloud_is_held_against_its_own_scene():
    truth = torch.stack([LINE, LINE + 50])
    measurer = CloudMeasurer(truth, again=truth + torch.tensor([0.0, 0.1, 0.0]))
    right = measurer.compare(truth.flip(0), {"scene": torch.tensor([1, 0])})
    wrong = measurer.compare(truth.flip(0), {"scene": torch.tensor([0, 1])})
    assert right["chamfer"] == 0 and wrong["chamfer"] > 10
    assert measurer.floor(2)["chamfer"] == pytest.approx(0.1, rel=1e-4)
    assert CloudMeasurer(truth).floor(2) == {}
    assert "the run's own" in CloudMeasurer(truth).describe()["reference"]
    with pytest.raises(UserError, match="clouds"):
        measurer.compare(torch.zeros(2, 3, 8, 8), {"scene": torch.tensor([0, 1])})


def test_a_run_measures_teacher_untrained_student_and_student(tmp_path):
    values = {
        "teacher": {
            "blueprint": {"net": NET, "scheduler": SCHEDULER, "info": {"measure": "scenes"}},
            "num_steps": 2,
        },
        "data": {"name": "scenes", "limit": 4},
        "objective": {"name": "distillation_dpo"},
        "optim": {"student": {"lr": 1e-2}},
        "train": {"max_train_steps": 2, "train_batch_size": 2, "validation_steps": 2},
        "eval": {
            "num_samples": 3,
            "grid": 2,
            "batch_size": 2,
            "validation_samples": 2,
            "student_steps": [1, 2],
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run/results.json").read_text())
    for who in ("teacher", "untrained_student", "student", "floor"):
        assert found[who]["chamfer"] > 0 and 0 <= found[who]["iou"] <= 1, who
    assert found["student"]["chamfer"] != found["untrained_student"]["chamfer"]
    assert found["floor"]["chamfer"] < found["teacher"]["chamfer"]
    assert set(found["student_by_steps"]) == {"1", "2"} and "simulated scenes of 60" in str(found["protocol"])
    assert found["curve"].keys() == {"0", "2"}
    for name in ("teacher", "student", "untrained", "step_000002"):
        assert (tmp_path / f"run/samples/{name}.png").stat().st_size > 300
    assert (tmp_path / "run/report/index.html").is_file()
