"""The table of families: made from what the battery recorded, and current in the docs."""

import json
from pathlib import Path

from fastgen.families.__main__ import COLUMNS, RECORD, table, verdict, written
from fastgen.families.registry import FAMILIES
from tests.families.cases import CASES

DOCS = Path(__file__).resolve().parents[2] / "docs/families.md"
RECORDED = json.loads(RECORD.read_text())["cases"]
CHECKS = {check for checks in COLUMNS.values() for check in checks}


def test_every_case_is_recorded_whole_and_nothing_failed():
    assert set(RECORDED) == set(CASES)
    for name, row in RECORDED.items():
        assert row["family"] == CASES[name].family and row["sampler"] == CASES[name].sampler, name
        assert set(row["checks"]) >= CHECKS and row["scheduler"], name
        excuses = {f.removeprefix("excused: ") for f in row["checks"].values() if f != "passed"}
        assert excuses == set(CASES[name].excused.values()), f"{name}: run python -m tests.families again"


def test_the_docs_hold_the_table():
    assert DOCS.read_text() == written(DOCS.read_text()), (
        "run python -m fastgen.families --write docs/families.md"
    )
    assert all(f"| {name} |" in table() for name in FAMILIES)


def test_verdicts_are_read_strictly():
    row = lambda **checks: {"checks": checks}  # noqa: E731
    notes = []
    assert verdict([row(a="passed", b="passed")], ("a", "b"), notes) == "yes"
    assert verdict([row(a="passed"), row(a="failed")], ("a",), notes) == "no"
    assert verdict([row(a="passed")], ("a", "b"), notes) == "no", "a check that did not run is no yes"
    assert verdict([row(a="passed", b="excused: why")], ("a", "b"), notes) == "yes (1)" and notes == ["why"]
    assert verdict([row(b="excused: why")], ("b",), notes) == "no (1)"
