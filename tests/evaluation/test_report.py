"""The report page: what it shows, that it needs nothing else, and that gaps do not break it."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.core.errors import UserError
from fastgen.evaluation import registry
from fastgen.evaluation.explained import direction, meaning, number, title
from fastgen.evaluation.final_table import table
from fastgen.evaluation.plots import MOST_POINTS, Line, axis, line_plot, short, smooth, thinned
from fastgen.evaluation.report import write_report
from fastgen.evaluation.report_pictures import picture_sets
from fastgen.evaluation.report_runs import runs_page, unique_names
from fastgen.evaluation.run_files import read_run
from fastgen.evaluation.sample_grids import save_grid, save_requests, to_grid

CONFIG = """
teacher: {path: "assets:teachers/fashion", num_steps: 20, guidance: 2.0}
student: {kind: lora, num_steps: 1}
stages:
- {name: warm, objective: {name: ode_pairs}, max_train_steps: 30}
- {name: match, objective: {name: dmd2}, max_train_steps: 10}
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
    images = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for name in ("teacher", "student", *(f"step_{k:06d}" for k in range(0, 100, 10))):
        save_grid(images, tmp_path / "samples" / f"{name}.png")
    save_requests(images, [f"a <b>{i}</b>" for i in range(12)], tmp_path / "samples" / "requests.json")
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "environment.json").write_text(
        json.dumps({"command": ["train.py", "--a", "<b>"], "torch": "2"})
    )
    lines = [{"step": k, "student/loss": 1 / (k + 1), "critic/loss": 2.0, "note": "x"} for k in range(1, 41)]
    lines += [{"step": k, "validation/fd_mini": 100.0 / (k + 1)} for k in (0, 20, 40)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 41, "stu')
    return tmp_path


def test_report_shows_the_run_and_needs_no_other_file(run):
    page = write_report(run).read_text()
    for shown in (
        "fd_mini reads higher here",
        "assets:teachers/fashion (20 steps, guidance 2) distilled with ode_pairs, then dmd2 into a lora "
        "student of 4 steps",
        "10.0 times as fast",
        "finished",
        "3.21",
        "87.5 %",
        "student, 1 step<",
        "real images (floor)",
        "500 samples (100 of the teacher)",
        "a mini metric",
        "Quality during training",
        "Stage 1 of 2: warm (ode_pairs), steps 1 to 30",
        "Stage 2 of 2: match (dmd2), steps 31 to 40",
        "end of warm",
        "critic loss",
        "step 90",
        "python train.py --a &lt;b&gt;",
        "a &lt;b&gt;11&lt;/b&gt;</figcaption>",
    ):
        assert shown in page, shown
    images = re.findall(r'<img [^>]*src="([^"]*)"', page)
    assert len(images) == 2 * 12 + 7 and all(i.startswith("data:image/webp;base64,") for i in images)
    assert not re.search(r'(src|href)="(?!data:)', page) and "@import" not in page and "data-live" not in page
    assert page.index("Quality during") < page.index("Stage 1") < page.index("Stage 2")


def test_a_grid_is_cut_into_the_pictures_it_was_made_of(tmp_path):
    """Pixel for pixel, in the order of the requests; pictures after the last text are left out."""
    images = torch.rand(13, 3, 70, 66, generator=torch.Generator().manual_seed(1))
    save_grid(images, tmp_path / "samples" / "student.png")
    save_requests(images, [str(i) for i in range(12)], tmp_path / "samples" / "requests.json")
    texts, (student,) = picture_sets(tmp_path)
    assert texts == [str(i) for i in range(12)] and len(student.pictures) == 12
    for i in (0, 9, 10, 11):
        data = base64.b64decode(student.pictures[i].partition("base64,")[2])
        shown = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(shown, (images[i] * 255).round().byte())


def test_clips_move_and_points_stay_one_picture(tmp_path):
    clips = torch.rand(3, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    save_grid(clips, tmp_path / "samples" / "student.png")
    save_requests(clips, ["a", "b", "c"], tmp_path / "samples" / "requests.json")
    _, (student,) = picture_sets(tmp_path)
    data = base64.b64decode(student.pictures[2].partition("base64,")[2])
    assert Image.open(io.BytesIO(data)).n_frames == 4 and len(student.pictures) == 3
    points = tmp_path / "points"
    save_grid(torch.randn(50, 2), points / "samples" / "student.png")
    save_requests(torch.randn(50, 2), [""] * 50, points / "samples" / "requests.json")
    texts, (student,) = picture_sets(points)
    assert texts == [""] and len(student.pictures) == 1


def test_the_page_of_a_run_that_goes_on(run):
    (run / "results.json").unlink()
    for name in ("student", "step_000090"):
        (run / "samples" / f"{name}.png").unlink()
    page = write_report(run, running=True).read_text()
    for shown in ('data-live="15"', ">training<", "of 40", "student at step 80", "student before training"):
        assert (shown in page) == (shown != ">training<"), shown
    assert ">measuring<" in page, "the last step is logged"
    text = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(text[:20]))
    assert ">training<" in write_report(run, running=True).read_text()
    assert "stopped at step 20" in write_report(run).read_text()


def test_report_of_a_bare_run_folder(tmp_path):
    page = write_report(tmp_path).read_text()
    assert tmp_path.name in page and ">Result<" not in page and "<img" not in page and "not started" in page


@pytest.mark.parametrize(
    "name, text",
    [("student.png", "no picture"), ("requests.json", "{}"), ("requests.json", '{"texts": [1]}')],
)
def test_a_broken_picture_or_layout_is_one_line(run, name, text):
    (run / "samples" / name).write_text(text)
    with pytest.raises(UserError, match=name):
        write_report(run)


def test_metrics_of_a_killed_and_resumed_run(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('\n{"step": 3, "student/loss": 9.0}\n')
    steps, values = read_run(run).series("student/loss")
    assert steps == list(range(1, 41)) and values[2] == 9.0 and values[1] == pytest.approx(1 / 3)


def test_numbers_and_their_meaning():
    assert number(0.5, "recall") == "50.0 %" and number(None, "recall") == ""
    assert number(0.00123456, "seconds_per_sample") == "0.0012" and number(3.14159, "fd_mini") == "3.142"
    assert "Higher" in meaning("agreement_colour") and "colour" in meaning("agreement_colour")
    assert "arXiv 1706.08500" in meaning("fid") and direction("fid") == "lower"
    assert "teacher's" in meaning("sharpness_ratio") and meaning("some_term") == direction("some_term") == ""
    for name in registry.names():
        assert meaning(name) and title(name), name


def test_runs_side_by_side(run, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / run.name
    shutil.copytree(run, other)
    (other / "config.yaml").write_text(CONFIG.replace("kind: lora", "kind: full"))
    better = {**RESULTS, "student": {**RESULTS["student"], "fd_mini": 4.0, "agreement": 0.8}}
    (other / "results.json").write_text(json.dumps(better))
    page = runs_page([run, other])
    rows = [re.sub("<[^>]*>", " ", row).split() for row in re.findall("<tr.*?</tr>", page, flags=re.S)]
    assert ["student.kind", "lora", "full"] in rows and sum("teacher" in row[:1] for row in rows) == 1
    assert re.findall('class="best">([^<]*)<', page) == ["87.5 %", "4"]
    assert page.count("<polyline") == 2 * 3, "fd_mini and two losses, of two runs"
    names = unique_names([run, other])
    assert len(set(names)) == 2 and all(name.endswith(run.name) for name in names)
    apart = {**better, "protocol": {**RESULTS["protocol"], "num_samples": 50}}
    (other / "results.json").write_text(json.dumps(apart))
    assert "different num samples: 500, 50" in runs_page([run, other])


def test_plots():
    assert line_plot([]) == line_plot([Line([], [])]) == ""
    assert smooth([1.0] * 60) == [1.0] * 60 and smooth([0.0, 3.0, 0.0])[1] == 1.0
    pairs = [(float(i), 0.0) for i in range(1000)]
    pairs[500] = (500.0, 9.0)
    few = thinned(pairs)
    assert len(few) <= MOST_POINTS and (500.0, 9.0) in few and few == sorted(few)
    scale = axis([0.13, 97.0], 0, 100)
    assert scale.ticks == [0, 20, 40, 60, 80, 100] and scale.low == 0 and scale.at(scale.high) == 100
    logs = axis([1, 1000], 0, 100, log=True)
    assert logs.ticks == [1, 10, 100, 1000] and logs.at(10) - logs.at(1) == pytest.approx(
        logs.at(100) - logs.at(10)
    )
    assert [short(v) for v in (0.0, 0.02, 350, 1500, 2e6, 1e-5)] == ["0", "0.02", "350", "1.5k", "2M", "1e-5"]
    hostile = line_plot([Line([1, 2], [1, 2], name='"><script>')], label="<script>")
    assert "<script" not in hostile
    for values in ([5.0], [0.0, 0.0], [-1.0, -1.0], [1e-30, 2e-30]):
        assert "nan" not in line_plot([Line(range(len(values)), values)])


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
