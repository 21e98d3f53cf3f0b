"""Hostile names, prompts and paths on model cards and in reports: text, and nothing else."""

import json
from html.parser import HTMLParser

import pytest
import torch

from fastgen.evaluation.report import write_report
from fastgen.evaluation.report_runs import runs_page
from fastgen.evaluation.sample_grids import save_grid, save_requests
from fastgen.export.markdown import code, escape, fenced, visible
from fastgen.export.model_card import _numbers, license_of

HOSTILE = (
    "a<script>alert(1)</script> | `x` ``` \n# b [c](javascript:d) *e* _f_ $g$ &lt; \u202egnp\u202c\u200b"
)


def test_escaped_text_holds_no_markup():
    shown = escape(HOSTILE)
    assert "<" not in shown and "\n" not in shown and "\u202e" not in shown and "\u200b" not in shown
    for mark in "|`[]*$":
        assert shown.count(mark) == shown.count("\\" + mark), mark
    assert "&lt;script&gt;" in shown and "&amp;lt;" in shown and "\\_f\\_" in shown
    assert escape("f_distill-2step, 0.5") == "f_distill-2step, 0.5", "plain names stay as they are"
    assert escape("# a") == "\\# a" and escape("1. a") == "1\\. a" and escape("- a") == "\\- a"
    assert visible("a\tb\r\nc\x1b[31m") == "a b c[31m"


def test_code_cannot_be_left():
    assert code("a.safetensors") == "`a.safetensors`"
    assert code("a`b``c") == "```a`b``c```" and code("`a") == "`` `a ``"
    assert code("a|b\nc") == "`a\\|b c`"
    lines = fenced("sh", "echo '\n```\n<script>\n````'\u202e")
    assert lines[0] == "`````sh" and lines[2] == "`````" and "\u202e" not in lines[1]
    assert fenced("python", "a\n\tb") == ["```python", "a\n\tb", "```"]


def test_the_numbers_of_a_card_escape_what_they_were_measured_with():
    row = {"fd_mini": 1.0, "a|b": 2.0}
    lines = _numbers(
        {"student": row, "student_by_steps": {"<b>": row}, "protocol": {"note": HOSTILE, "x": HOSTILE}}
    )
    table = [line for line in lines if line.startswith("|")]
    assert [line.replace("\\|", "").count("|") for line in table] == [4] * 4
    assert "<script>" not in "\n".join(lines) and "<b>" not in "\n".join(lines)


def test_the_licence_of_a_hostile_card(tmp_path):
    card = tmp_path / "README.md"
    for data in (b"---\n", b"---", b"\xff\xfe---\nlicense: x", b""):
        card.write_bytes(data)
        assert license_of(str(tmp_path)) == ""
    card.write_text("---\nlicense: mit\u202e\x1b" + "x" * 500 + "\n---\n")
    assert license_of(str(tmp_path)) == "mit" + "x" * 97


class Tags(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self):
        super().__init__()
        self.found, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def hostile_run(run):
    """A run folder in which everything that can be text is hostile."""
    run.mkdir()
    row = {"fd_mini": 1.0, "seconds_per_sample": 0.1}
    results = {
        "student": row,
        "teacher": row,
        "protocol": {
            k: HOSTILE for k in ("num_samples", "seed", "guidance", "extractor", "reference", "note")
        },
    }
    teacher = {"path": HOSTILE, "num_steps": 2, "guidance": 1.0}
    config = {
        "objective": {"name": HOSTILE},
        "train": {"max_train_steps": 4},
        "teacher": teacher,
        "student": {"kind": "full", "num_steps": 1},
    }
    (run / "results.json").write_text(json.dumps(results))
    (run / "config.yaml").write_text(json.dumps(config))
    (run / "environment.json").write_text(json.dumps({"command": ["train.py", HOSTILE], "python": HOSTILE}))
    (run / "metrics.jsonl").write_text('{"step": 1}\n[]\n{"step": "x"}\n{"step": 2, "a/b": 1}\nnonsense\n')
    images = torch.rand(2, 3, 4, 4)
    for name in ("teacher", "student"):
        save_grid(images, run / "samples" / f"{name}.png")
    save_requests(images, [HOSTILE, HOSTILE], run / "samples" / "requests.json")
    return run


@pytest.mark.parametrize("num", [1, 2])
def test_a_report_shows_hostile_text_as_text(num, tmp_path):
    runs = [hostile_run(tmp_path / f"{i} <script>alert(0)") for i in range(num)]
    page = write_report(runs[0]).read_text() if num == 1 else runs_page(runs)
    tags = Tags()
    tags.feed(page)
    assert [tag for tag, _ in tags.found].count("script") == 1, "the page's own"
    assert not [a for _, attrs in tags.found for a in attrs if a.startswith("on")]
    assert "<script>alert(1)</script>" in tags.text, "the reader sees what was written"
    assert "\u202e" not in page and "\u200b" not in page


@pytest.mark.parametrize("name", ["results.json", "environment.json"])
def test_a_broken_file_of_a_run_is_one_line(name, tmp_path):
    from fastgen.core.errors import UserError

    (tmp_path / name).write_text("[]")
    with pytest.raises(UserError, match=name):
        write_report(tmp_path)
