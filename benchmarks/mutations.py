"""One-line mistakes put into the methods on purpose, counted: how many of them a method's own tests notice.

The table is `tests/objectives/mutations/*.yaml`: for each method and each shared piece the kinds of mistake
(`KINDS`), as the text of a source line and what it becomes. A kind that a method cannot have says why.

An attempt is a process forked from this one, which imports the libraries that attempts before it used. It
imports one module from its changed text, which is written nowhere, and runs the default tests of the method
until the first failure. Caught means that a test failed; a changed module that cannot be imported, or that
uses a name which does not exist, is a mistake of the table and not counted as caught; nor is one whose test
fails as well when nothing is changed, which is tried in the end.
"""

import gc
import importlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.page import ROOT, put

TABLE = ROOT / "tests/objectives/mutations"
RECORD = ROOT / "assets/results/benchmarks/mutations.json"
KINDS = ("sign", "detach", "guidance", "time", "normaliser")
SECONDS = 900
"""most that the tests of one attempt may take"""
NOT_A_CATCH = ("NameError", "UnboundLocalError", "ImportError", "ModuleNotFoundError", "SyntaxError")
OURS = ("fastgen", "tests", "benchmarks", "conftest", "__main__")


class Mutation(NamedTuple):
    """One changed line."""

    subject: str
    """the method, or the shared piece"""
    kind: str
    file: Path
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def module(self) -> str:
        return ".".join(self.file.relative_to(ROOT).with_suffix("").parts)

    def source(self) -> str:
        """The text of the module with the line changed."""
        text = self.file.read_text()
        assert text.count(self.old) == 1, f"{self.file}: {self.old!r} occurs {text.count(self.old)} times"
        return text.replace(self.old, self.new)


def subjects() -> dict[str, dict[str, Any]]:
    """The table as it is written: subject -> file, tests, and for each kind changes or why there are none."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(TABLE.glob("*.yaml")):
        rows = yaml.safe_load(file.read_text())
        assert not found.keys() & rows.keys(), f"{file}: a subject that another file has too"
        found |= rows
    return found


def mutations(only: Sequence[str] = ()) -> Iterator[Mutation]:
    """All of the table, or those of some subjects."""
    for subject, row in subjects().items():
        if only and subject not in only:
            continue
        file = row.get("file", f"fastgen/objectives/{subject}.py")
        tests = tuple(row.get("tests", [f"tests/objectives/test_{subject}.py"]))
        for kind in KINDS:
            changes = row[kind]
            for old, new, *other in [] if isinstance(changes, str) else changes:
                yield Mutation(subject, kind, ROOT / (other[0] if other else file), old, new, tests)


class Changed(MetaPathFinder, SourceFileLoader):
    """Imports one module from its changed text, every other as usual."""

    def __init__(self, mutation: Mutation):
        SourceFileLoader.__init__(self, mutation.module, str(mutation.file))
        self.mutation = mutation

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname != self.mutation.module:
            return None
        return importlib.util.spec_from_file_location(fullname, self.mutation.file, loader=self)

    def get_code(self, fullname):
        return compile(self.mutation.source(), str(self.mutation.file), "exec")


def rung(test: str) -> int:
    """Where a test stands in the order of an attempt: the step's own formula, the rest, P2, P4."""
    order = {"_p1_step": 0, "_p2_": 2, "_p4_": 3}
    return next((place for part, place in order.items() if part in test), 1)


class Watch:
    """Plugin of pytest: quick rungs first or alone, and the first failure is noted in a file."""

    def __init__(self, note: Path, quick: bool):
        self.note, self.quick = note, quick

    def pytest_collection_modifyitems(self, items) -> None:
        items.sort(key=lambda item: rung(item.name))
        if self.quick:
            items[:] = [item for item in items if rung(item.name) < 2]

    def pytest_exception_interact(self, node, call) -> None:
        if not self.note.exists():
            self.note.write_text(f"{call.excinfo.type.__name__} {node.nodeid}")


def attempt(mutation: Mutation, quick: bool) -> tuple[str, str | None]:
    """(the exception, the test that failed by it, or None where none did)."""
    code, (error, _, test), log = tests_fail(mutation, mutation.tests, quick)
    if code == 1 and test and error not in NOT_A_CATCH:
        return error, test
    if code != 0:
        where = f"{mutation.subject}: {mutation.kind}: {mutation.new}"
        print(f"{where}: exit code {code} {error} {test}\n{log}", file=sys.stderr)
    return "", None


def fail_anyway(tests: Sequence[str]) -> list[str]:
    """Those of some tests that fail although nothing is changed."""
    left, failing = list(tests), []
    while left and (test := tests_fail(None, left, False)[1][2]):
        failing.append(test)
        left.remove(test)
    return failing


def tests_fail(mutation: Mutation | None, tests: Sequence[str], quick: bool) -> tuple:
    """(exit code of pytest in a forked process, the first failure as (exception, " ", test), last words)."""
    with tempfile.TemporaryDirectory() as folder:
        note, log, modules = (Path(folder, name) for name in ("note", "log", "modules"))
        gc.freeze()  # what is here is collected in no attempt
        pid = os.fork()
        if pid == 0:
            try:
                code = _run(mutation, tests, note, log, quick)
                modules.write_text("\n".join(sys.modules))
            except BaseException:
                log.write_text(traceback.format_exc())
                code = 3
            os._exit(code)
        code, first = _wait(pid), (note.read_text() if note.exists() else "").partition(" ")
        _load(modules)
        return code, first, log.read_text()[-3000:]


def _wait(pid: int) -> int | None:
    """Exit code, or None after too long."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _load(modules: Path) -> None:
    """Import here what an attempt has imported of the libraries, for those that follow."""
    for name in modules.read_text().split() if modules.exists() else []:
        if name.partition(".")[0] not in OURS and name not in sys.modules:
            with suppress(Exception):
                importlib.import_module(name)


def _run(mutation: Mutation | None, tests: Sequence[str], note: Path, log: Path, quick: bool) -> int:
    """In the forked process: the exit code of pytest."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(ROOT)
    for name in [n for n in sys.modules if n.partition(".")[0] in ("fastgen", "tests")]:
        del sys.modules[name]  # imported anew, one of them changed
    if mutation:
        sys.meta_path.insert(0, Changed(mutation))
    import pytest

    options = ["-n", "0", "-x", "-q", "-p", "no:cacheprovider", f"--basetemp={note.parent / 'tests'}"]
    code = pytest.main([*options, *tests], plugins=[Watch(note, quick)])
    sys.stdout.flush()
    return int(code)


def attempts(only: Sequence[str] = (), quick: bool = False) -> dict[str, dict[str, list[str | None]]]:
    """Subject -> kind -> for each change the test that caught it, or None."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "Agg"}
    sys.dont_write_bytecode = False  # the tests are compiled once
    found: dict[str, dict[str, list[str | None]]] = {}
    for mutation in mutations(only):
        start, (error, test) = time.monotonic(), attempt(mutation, quick)
        found.setdefault(mutation.subject, {}).setdefault(mutation.kind, []).append(test)
        head = f"{mutation.subject:22} {mutation.kind:10} {time.monotonic() - start:5.0f} s"
        ended = f"{test} ({error})" if test else f"SURVIVED: {mutation.new.strip()!r}"
        print(f"{head}  {ended}", file=sys.stderr, flush=True)
    every = [test for row in found.values() for tests in row.values() for test in tests if test]
    broken = fail_anyway(sorted(set(every)))
    for test in broken:
        print(f"SURVIVED all that {test} caught: it fails without a change too", file=sys.stderr)

    def name(test: str | None) -> str | None:
        return None if test is None or test in broken else test.partition("::")[2]

    return {s: {k: [name(test) for test in tests] for k, tests in row.items()} for s, row in found.items()}


def mutated(only: str = "", quick: bool = False, write: bool = False) -> dict:
    """What is recorded; of some subjects alone, the record keeps what it says of the others."""
    names = [name for name in only.split(",") if name]
    unknown = set(names) - subjects().keys()
    if unknown:
        raise SystemExit(
            f"--only: {', '.join(sorted(unknown))} not in the table; it has {', '.join(subjects())}"
        )
    kept = json.loads(RECORD.read_text())["caught_by"] if names and RECORD.exists() else {}
    tried = attempts(names, quick)
    found = report({name: {**kept, **tried}[name] for name in subjects() if name in {**kept, **tried}})
    if write:
        write_page(found)
    return found


def report(caught_by: dict[str, dict[str, list[str | None]]]) -> dict:
    """What is recorded: counts, and which test caught what."""
    kinds = {k: [test for row in caught_by.values() for test in row.get(k, [])] for k in KINDS}
    by_kind = {k: {"tried": len(v), "caught": len(v) - v.count(None)} for k, v in kinds.items()}
    total = {n: sum(v[n] for v in by_kind.values()) for n in ("tried", "caught")}
    return {**total, "by_kind": by_kind, "caught_by": caught_by}


def write_page(found: dict) -> None:
    """The table of docs/reliability.md."""
    lines = ["| one-line mistake | tried | caught |", "|---|---|---|"]
    rows = {**found["by_kind"], "all": found}
    lines += [f"| {name} | {row['tried']} | {row['caught']} |" for name, row in rows.items()]
    missed = [(s, k) for s, row in found["caught_by"].items() for k, tests in row.items() if None in tests]
    lines += ["", "Not caught:" if missed else "All caught."]
    put("mutations", "\n".join([*lines, *(f"- {subject}: {kind}" for subject, kind in missed)]))
