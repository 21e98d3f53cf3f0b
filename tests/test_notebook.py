"""docs/first_student.ipynb was run as it stands, from its first cell to its last."""

import json
import re
import shutil

import pytest

from tools.notebook import NOTEBOOK, run

CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_every_cell_was_run_in_order_and_none_failed():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3  # teacher, sheet, plain diffusers


def test_it_shows_a_student_that_is_better_than_the_teacher_cut_short():
    text = "".join("".join(o.get("text", "")) for cell in CODE for o in cell["outputs"])
    found = dict(re.findall(r"^(\w+) .*'fd_mini': ([\d.]+)", text, re.M))
    assert float(found["student"]) < float(found["untrained_student"]), found


def test_it_names_no_place_of_the_machine_that_ran_it():
    text = NOTEBOOK.read_text()
    assert not re.search(r"(?<![\w.])/(work|tmp|home|root|opt)/", text)
    assert len(text) < 400_000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_it_runs_again(tmp_path):
    pytest.importorskip("nbclient", reason="pip install -e '.[docs]'")
    again = shutil.copy(NOTEBOOK, tmp_path / "again.ipynb")
    run(again)
    assert [c["execution_count"] for c in json.loads(again.read_text())["cells"] if "execution_count" in c]
