"""How far a student went from its teacher's contrast to that of the pictures, from what its run measured."""

import json

import pytest
import yaml

from eval.look import record, study
from eval.studies import look
from fastgen.config.parse import read_files
from fastgen.config.run import dump, validate
from fastgen.core.errors import UserError
from fastgen.core.paths import config

KEYS = ("contrast", "agreement_motion", "dynamic_degree", "fvd_mini")


def a_run(folder, recipe, contrasts):
    """A run folder that measured these contrasts."""
    folder.mkdir()
    cfg = validate(read_files([str(config(f"recipes/{recipe}.yaml"))]))
    (folder / "config.yaml").write_text(dump(cfg))
    rows = {name: dict.fromkeys(KEYS, 0.5) | {"contrast": value} for name, value in contrasts.items()}
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


def test_what_is_taken_over_is_a_share_of_the_way(tmp_path):
    contrasts = {"teacher": 0.1, "student": 0.16, "floor": 0.15}
    run = a_run(tmp_path / "one", "moving-wan_mcm", contrasts)
    wanted = study(run)["pictures"]["contrast"]
    assert 0.17 < wanted < 0.22, "of the recipe's own pictures"
    assert study(run)["taken_over"] == pytest.approx(0.06 / (wanted - 0.1))
    (tmp_path / "benchmarks").mkdir()
    file = record(str(run), tmp_path / "benchmarks")
    assert file.name == "look_one.json" and yaml.safe_load(file.read_text())["model"] == "one"
    table = look([], tmp_path).splitlines()
    assert table[2].startswith("| `one` | 0.160 | 50.0 | 0.50 | 0.5 |")
    assert [row.split(" | ")[0] for row in table[3:]] == ["| the teacher", "| real clips", "| the pictures"]


def test_a_run_without_a_look_is_refused(tmp_path):
    run = a_run(tmp_path / "plain", "moving-wan_lcm", {"teacher": 0.1, "student": 0.1})
    with pytest.raises(UserError, match="takes over no look"):
        study(run)
    with pytest.raises(UserError, match="does not exist"):
        study(tmp_path / "none")
