"""The table of one-line mistakes fits the source and leaves nothing out; slow: all of them are caught."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from benchmarks.mutations import KINDS, RECORD, ROOT, Changed, Mutation, mutations, subjects
from fastgen.objectives import REGISTRY

OURS = [n for n, c in REGISTRY.items() if c.__module__.startswith("fastgen.")]
ALL = list(mutations())


def test_every_method_has_every_kind_or_says_why_not():
    rows = subjects()
    assert set(OURS) <= rows.keys(), set(OURS) - rows.keys()
    for subject, row in rows.items():
        assert set(KINDS) <= row.keys() <= {*KINDS, "file", "tests"}, subject
        for kind in KINDS:
            changes = row[kind]
            assert changes, f"{subject}: {kind} is empty"
            assert isinstance(changes, list) or len(changes.split()) >= 4, f"{subject}: {kind} needs a reason"


@pytest.mark.parametrize("subject", subjects())
def test_every_change_applies_to_the_source_as_it_is(subject):
    """Its line stands there exactly once, one line differs, and what comes out compiles."""
    mine = [m for m in ALL if m.subject == subject]
    for mutation in mine:
        text = mutation.source()
        assert text != mutation.file.read_text(), mutation
        compile(text, str(mutation.file), "exec")
        pairs = zip(mutation.old.split("\n"), mutation.new.split("\n"))
        assert sum(a != b for a, b in pairs) <= 1 and mutation.new.count("\n") >= mutation.old.count("\n")
        assert all((ROOT / test).exists() for test in mutation.tests), mutation.tests
    same = Counter((m.file, m.old, m.new) for m in mine).most_common(1)
    assert not same or same[0][1] == 1, same


def test_a_change_that_does_not_apply_is_named():
    real = ALL[0]
    with pytest.raises(AssertionError, match="'no such line' occurs 0 times"):
        real._replace(old="no such line").source()


def test_the_changed_module_is_what_is_imported(tmp_path, monkeypatch):
    """One module from its changed text; every other, and the file itself, as they are."""
    file = ROOT / "fastgen/core/rng.py"
    mutation = Mutation("rng", "sign", file, "return int(torch.randint(", "return -int(torch.randint(", ())
    code = (
        "import sys; from benchmarks.mutations import *; from pathlib import Path\n"
        f"sys.meta_path.insert(0, Changed(Mutation('rng', 'sign', Path({str(file)!r}), {mutation.old!r}, "
        f"{mutation.new!r}, ())))\n"
        "from fastgen.core.rng import Rng; print(Rng(0).shared_randint(1000))"
    )
    before = file.read_bytes()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0 and file.read_bytes() == before
    assert Changed(mutation).find_spec("fastgen.core.batch") is None


def test_the_record_is_of_this_table_and_all_were_caught():
    """`python -m benchmarks mutations --only NAME --write` records anew what was changed."""
    found = json.loads(RECORD.read_text())
    wanted = Counter((m.subject, m.kind) for m in ALL)
    tried = {(s, k): len(tests) for s, row in found["caught_by"].items() for k, tests in row.items()}
    assert tried == wanted, set(tried.items()) ^ set(wanted.items())
    assert found["caught"] == found["tried"] == len(ALL)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("subject", subjects())
def test_every_mistake_is_caught(subject):
    command = [sys.executable, "-m", "benchmarks", "mutations", "--only", subject]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "SURVIVED" not in done.stderr, done.stderr[-3000:]
    assert done.stderr.count(f"{subject} ") >= sum(m.subject == subject for m in ALL)
