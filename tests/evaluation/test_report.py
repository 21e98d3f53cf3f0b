"""The report page: what it shows, that it needs nothing else, and that gaps do not break it."""

import json
import re

import pytest
import torch

from fastgen.evaluation.evaluator import table
from fastgen.evaluation.report import _number, _smooth, read_metrics, write_report
from fastgen.evaluation.sample_grids import save_grid, to_grid

CONFIG = """
teacher: {path: "assets:teachers/fashion", num_steps: 20, guidance: 2.0}
student: {kind: lora, num_steps: 1}
objective: {name: dmd2}
stages: []
"""
RESULTS = {
    "teacher": {"nfe": 40, "seconds_per_sample": 0.5, "fd_mini": 3.21, "agreement": 0.9},
    "student": {"nfe": 4, "seconds_per_sample": 0.05, "fd_mini": 4.56, "agreement": 0.875},
    "untrained_student": {"nfe": 4, "seconds_per_sample": 0.05, "fd_mini": 123.4, "agreement": 0.1},
    "student_by_steps": {"1": {"nfe": 1, "fd_mini": 7.89, "agreement": 0.7}},
    "floor": {"fd_mini": 0.5, "agreement": 0.95},
    "protocol": {
        "num_samples": 500,
        "teacher_samples": 100,
        "seed": 7,
        "extractor": "net",
        "note": "a mini metric",
        "student_times": [1.0, 0.75, 0.5, 0.25],
        "guidance": 2.0,
        "device": "cpu",
        "threads": 2,
    },
    "train": {"seconds": 12.0, "steps": 60, "peak_rss_mb": 1000.0},
}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "samples").mkdir()
    images = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for name in ("teacher", *(f"step_{k:06d}" for k in range(0, 100, 10))):
        save_grid(images, tmp_path / "samples" / f"{name}.png")
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "environment.json").write_text(
        json.dumps({"command": ["train.py", "--a", "<b>"], "torch": "2"})
    )
    lines = [{"step": k, "student/loss": 1 / (k + 1), "critic/loss": 2.0, "note": "x"} for k in range(40)]
    lines += [{"step": k, "validation/fd_mini": 100.0 / (k + 1)} for k in (0, 20, 39)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 41, "stu')
    return tmp_path


def test_report_shows_the_run_and_needs_no_other_file(run):
    page = write_report(run).read_text()
    for shown in (
        "fd_mini reads higher here",
        "assets:teachers/fashion (20 steps, guidance 2) distilled with dmd2 into a lora student of 4 steps",
        "10.0 times as fast",
        "3.21",
        "87.5 %",
        "student, 1 step<",
        "real images (floor)",
        "500 samples (100 of the teacher)",
        "a mini metric",
        "Quality during training",
        "Curves of the student",
        "Curves of the critic",
        "at step 90",
        "python train.py --a &lt;b&gt;",
    ):
        assert shown in page, shown
    images = re.findall(r'<img src="([^"]*)"', page)
    assert len(images) == 3 + 7 and all(i.startswith("data:image/png;base64,") for i in images)
    assert "http" not in page and "<script" not in page and "<link" not in page
    assert (
        page.index("Quality during")
        < page.index("Curves of the student")
        < page.index("Curves of the critic")
    )


def test_report_of_a_bare_run_folder(tmp_path):
    page = write_report(tmp_path).read_text()
    assert tmp_path.name in page and "Result" not in page and "<img" not in page


def test_metrics_of_a_killed_and_resumed_run(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('\n{"step": 3, "student/loss": 9.0}\n')
    records = read_metrics(run / "metrics.jsonl")
    from fastgen.evaluation.report import _series

    steps, values = _series(records, "student/loss")
    assert steps == list(range(40)) and values[3] == 9.0 and values[2] == pytest.approx(1 / 3)


def test_numbers_and_smoothing():
    assert _number(0.5, "recall") == "50.0 %" and _number(None, "recall") == ""
    assert _number(0.00123456, "seconds_per_sample") == "0.0012" and _number(3.14159, "fd_mini") == "3.142"
    assert _smooth([1.0] * 60) == [1.0] * 60 and _smooth([0.0, 3.0, 0.0])[1] == 1.0


def test_final_table_lines_up():
    lines = table(RESULTS).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 6
    assert lines[0].split() == ["fd_mini", "agreement", "nfe", "seconds/sample"]
    assert lines[1].split() == ["teacher", "3.21", "0.9", "40", "0.5"]
    assert lines[4].split()[:3] == ["student,", "1", "step"]


def test_grid_places_images_in_rows(tmp_path):
    images = torch.zeros(12, 3, 2, 2)
    images[11] = 1
    picture = to_grid(images)
    assert picture.shape == (2 * 4, 10 * 4, 3) and picture.dtype == torch.uint8
    assert (picture[5:7, 5:7] == 255).all() and (picture[1:3, 1:3] == 0).all()
    save_grid(torch.randn(50, 1), tmp_path / "points.png")
    assert (tmp_path / "points.png").stat().st_size > 500
