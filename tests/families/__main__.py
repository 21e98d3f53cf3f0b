"""python -m tests.families [-k NAME]: run the battery (of one family, beside what is on record of others) and
record what it found, for the table of families.
"""

import json
import os
import sys
from importlib.metadata import version

import pytest

from fastgen.families.__main__ import RECORD
from tests.families.cases import CASES


class Recorder:
    """Outcome of every check by case."""

    def __init__(self):
        self.cases = {}

    def pytest_runtest_logreport(self, report):
        name, _, arguments = report.nodeid.rpartition("::")[2].partition("[")
        *kind, case = (
            arguments.removesuffix("]").split("-", 1) if name.endswith("step") else (arguments[:-1],)
        )
        if case not in CASES or not (report.when == "call" or report.outcome == "skipped"):
            return
        check = name.removeprefix("test_") + (f"[{kind[0]}]" if kind else "")
        declared = CASES[case]
        empty = {"family": declared.family, "sampler": declared.sampler, "scheduler": "", "checks": {}}
        row = self.cases.setdefault(case, empty)
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.outcome == "skipped" else ""
        row["checks"][check] = f"excused: {reason}" if reason else report.outcome
        row["scheduler"] = dict(report.user_properties).get("scheduler", row["scheduler"])


def main() -> int:
    recorder = Recorder()
    os.environ["OMP_NUM_THREADS"] = "1"
    code = pytest.main(
        ["-n", "0", "-q", "tests/families/test_families.py", *sys.argv[1:]], plugins=[recorder]
    )
    versions = {n: version(n) for n in ("torch", "diffusers", "transformers", "peft")}
    before = json.loads(RECORD.read_text())
    if len(recorder.cases) < len(CASES) and before["versions"] == versions:  # beside what ran before
        recorder.cases = before["cases"] | recorder.cases
    if len(recorder.cases) == len(CASES):
        RECORD.write_text(
            json.dumps({"versions": versions, "cases": recorder.cases}, indent=1, sort_keys=True)
        )
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
