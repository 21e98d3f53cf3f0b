"""The tables of fastgen/objectives/README.md, built from evidence and from the tests that exist.

Ladder: P1 identities, P2 distils an exact mixture, P3 distils a trained mini teacher (evidence), P4 exported
and sampled by plain diffusers. P1, P2 and P4 ask for test functions named `test_p1_*` and so on in
tests/objectives/test_<method>.py, and `test_p4_<method>*` in any other test file; skipped ones do not count.
"""

import ast
import importlib
import math
import re
from pathlib import Path

from eval import evidence, orderings
from eval.orderings import cell
from fastgen.checkpoint import write_text
from fastgen.errors import UserError
from fastgen.objectives import REGISTRY
from fastgen.paths import PACKAGE

README = PACKAGE / "objectives" / "README.md"
TESTS = PACKAGE.parent / "tests"
GUIDE = PACKAGE.parent / "docs" / "methods.md"
SKELETON = """# Objectives

One file per method. The tables below are written by `python -m eval leaderboard`; do not edit them by hand.

## Where each method stands

<!-- ladder:begin -->
<!-- ladder:end -->

## Measured

<!-- leaderboard:begin -->
<!-- leaderboard:end -->

## Published orderings

<!-- orderings:begin -->
<!-- orderings:end -->
"""
NOTES = """fd_mini is a Frechet distance in the features of a small net of our own, against held-out real
images. It orders generators of one image set among each other and is not comparable with any published FID.
"of teacher" is the ratio to the teacher at as many samples, since fewer enlarge a Frechet distance: of the
same run, or where that measured its teacher on fewer, of another run of the same teacher and protocol; a "~"
says that there is none, so that the ratio flatters the student. With several seeds: mean +- standard
deviation. "teacher (NFE)" names the network calls of one teacher sample."""


# -- measured numbers
def _numbers(documents: list[dict], *path: str) -> list[float]:
    """One value per document, where it has it."""
    found = []
    for document in documents:
        value = document["results"]
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, (int, float)) and math.isfinite(value):
            found.append(float(value))
    return found


def _metric(documents: list[dict]) -> str:
    """The distance these results are ordered by."""
    return "energy_distance" if _numbers(documents, "student", "energy_distance") else "fd_mini"


def _key(document: dict, samples: str) -> tuple:
    """What a teacher's number depends on, with the count of samples named."""
    protocol = document["results"].get("protocol", {})
    about = ("guidance", "teacher_steps", "seed", "extractor", samples)
    return (document["teacher"], *(protocol.get(name) for name in about))


def teacher_value(document: dict, documents: list[dict], metric: str) -> tuple[float, bool] | None:
    """(the teacher's distance, whether it is of as many samples as the student's); None without a teacher."""
    for other in (document, *documents):
        found = _numbers([other], "teacher", metric)
        if found and _key(other, "teacher_samples") == _key(document, "num_samples"):
            return found[0], True
    found = _numbers([document], "teacher", metric)
    return (found[0], False) if found else None


def _row(group: list[dict], path: tuple[str, ...], nfe: str, documents: list[dict]) -> list[str]:
    first, metric = group[0], _metric(group)
    own, teachers = _numbers(group, *path, metric), [teacher_value(d, documents, metric) for d in group]
    teacher = [t[0] for t in teachers if t]
    paired = [a / b for a, b in zip(own, teacher) if b] if len(own) == len(teacher) else []
    calls = _numbers(group, "teacher", "nfe")
    reference = f"{cell(teacher)} ({calls[0]:.0f})" if teacher and calls else ""
    mark = "" if all(t[1] for t in teachers if t) else "~"
    protocol = first["results"].get("protocol", {})
    return [
        f"`{first['recipe']}`",
        first["objective"],
        first["student"],
        nfe,
        cell(own),
        reference,
        mark + cell(paired, ".2f"),
        cell(_numbers(group, "untrained_student", metric)),
        cell(_numbers(group, *path, "agreement"), ".1f", 100),
        cell(_numbers(group, *path, "recall"), ".2f"),
        cell(_numbers(group, "floor", metric)),
        str(protocol.get("num_samples", "")),
        str(len(group)),
        cell([v / 60 for v in _numbers(group, "train", "seconds")], ".0f").split(" ")[0],
    ]


HEADER = (
    "recipe", "method", "student", "NFE", "fd_mini", "teacher (NFE)", "of teacher", "untrained",
    "agreement %", "recall", "floor", "samples", "seeds", "minutes",
)  # fmt: skip


def _markdown(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def measured(documents: list[dict]) -> str:
    """One table per teacher; one row per recipe and step count, seeds merged."""
    if not documents:
        return "No evidence yet."
    lines = NOTES.splitlines()
    for teacher in dict.fromkeys(d["teacher"] for d in documents):
        rows = []
        for recipe in dict.fromkeys(d["recipe"] for d in documents if d["teacher"] == teacher):
            group = [d for d in documents if (d["teacher"], d["recipe"]) == (teacher, recipe)]
            by_steps = group[0]["results"].get("student_by_steps", {})
            own = _numbers(group, "student", "nfe")
            if own and not any(row.get("nfe") == own[0] for row in by_steps.values()):
                rows.append(_row(group, ("student",), f"{own[0]:.0f}", documents))
            for steps, row in by_steps.items():
                path = ("student_by_steps", steps)
                rows.append(_row(group, path, f"{row.get('nfe', steps)}", documents))
        metric = _metric([d for d in documents if d["teacher"] == teacher])
        header = tuple(metric if name == "fd_mini" else name for name in HEADER)
        lines += ["", f"### {teacher}", "", *_markdown(header, rows)]
    return "\n".join(lines)


# -- the ladder
def _tests(file: Path) -> list[str]:
    """Names of the test functions of a file that are not skipped."""
    if not file.is_file():
        return []
    found = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = " ".join(ast.unparse(d) for d in node.decorator_list)
            if "mark.skip" not in marks and "xfail" not in marks:
                found.append(node.name)
    return found


def proofs(method: str, tests: Path) -> dict[str, str]:
    """The test file (relative to tests/) behind P1, P2 and P4 of a method; empty where there is none."""
    own = tests / "objectives" / f"test_{method}.py"
    found = {}
    for proof in ("P1", "P2", "P4"):
        named = any(n.startswith(f"test_{proof.lower()}_") for n in _tests(own))
        found[proof] = f"objectives/{own.name}" if named else ""
    for file in sorted(tests.glob("test_*.py")):
        if not found["P4"] and any(re.match(rf"test_p4_{method}(_|$)", n) for n in _tests(file)):
            found["P4"] = file.name
    return found


def paper(method: str) -> str:
    """The first arXiv id that the method's module names."""
    text = importlib.import_module(REGISTRY[method].__module__).__doc__ or ""
    found = re.search(r"(?:arXiv:? ?)?\b(\d{4}\.\d{5})\b", text)
    return f"[{found[1]}](https://arxiv.org/abs/{found[1]})" if found else ""


def _p3(method: str, documents: list[dict]) -> str:
    """Per teacher, the best student this method has made: its distance and the teacher's."""
    best: dict[str, tuple[float, str]] = {}
    for document in documents:
        if method not in document["objective"].split("+"):
            continue
        metric = _metric([document])
        rows = [
            document["results"].get("student", {}),
            *document["results"].get("student_by_steps", {}).values(),
        ]
        values = [(row[metric], row.get("nfe")) for row in rows if metric in row]
        if not values or metric != "fd_mini":
            continue
        value, nfe = min(values, key=lambda v: v[0])
        teacher = teacher_value(document, documents, metric)
        beside = f", teacher {teacher[0]:.3g}" if teacher else ""
        shown = f"{document['teacher']} {value:.3g} at NFE {nfe}{beside}"
        if value < best.get(document["teacher"], (math.inf, ""))[0]:
            best[document["teacher"]] = (value, shown)
    return "; ".join(shown for _, shown in best.values())


def ladder(documents: list[dict], tests: Path = TESTS) -> str:
    """Method by method, the proofs that exist."""
    rows = []
    for method, cls in sorted(REGISTRY.items()):
        file = f"{cls.__module__.rsplit('.', 1)[-1]}.py"
        if not cls.__module__.startswith("fastgen."):
            continue
        found = proofs(method, tests)
        marks = {p: f"[tested](../../tests/{where})" if where else "-" for p, where in found.items()}
        rows.append(
            [
                f"[`{method}`]({file})",
                paper(method),
                marks["P1"],
                marks["P2"],
                _p3(method, documents) or "-",
                marks["P4"],
            ]
        )
    header = (
        "method",
        "paper",
        "P1 identities",
        "P2 exact mixture",
        "P3 trained teacher",
        "P4 plain diffusers",
    )
    return "\n".join(_markdown(header, rows))


def _best(method: str, documents: list[dict]) -> str:
    """The smallest ratio to its teacher that a method has evidence of."""
    found = []
    for document in (d for d in documents if method in d["objective"].split("+")):
        metric, results = _metric([document]), document["results"]
        teacher, fair = teacher_value(document, documents, metric) or (None, False)
        rows = [results.get("student", {}), *results.get("student_by_steps", {}).values()]
        found += [
            (not fair, r[metric] / teacher, r.get("nfe"), document["teacher"])
            for r in rows
            if teacher and metric in r
        ]
    if not found:
        return "-"
    _, ratio, nfe, teacher = min(found)
    return f"{ratio:.2f} at {nfe} ({teacher})"


def choice(documents: list[dict]) -> str:
    """What each method needs and costs, read off its class, beside the best it has reached."""
    rows = []
    for method, cls in sorted(REGISTRY.items()):
        if not cls.__module__.startswith("fastgen."):
            continue
        cfg = cls.config()
        calls = cls.evaluations(cfg, 2.0, 1)
        plain = {k: v for k, v in calls.items() if not k.endswith("+grad")}
        grads = {k.removesuffix("+grad"): v for k, v in calls.items() if k.endswith("+grad")}
        shown = [f"{k} {v:g}" for k, v in plain.items()] + [f"{k} {v:g} g" for k, v in grads.items()]
        rows.append(
            [
                f"[`{method}`](../fastgen/objectives/{cls.__module__.rsplit('.', 1)[-1]}.py)",
                "yes" if cls.requires_data(cfg) else "no",
                ", ".join(p for parts in cls.player_parts(cfg).values() for p in parts),
                ", ".join(shown),
                _best(method, documents),
            ]
        )
    header = ("method", "real images", "trained", "calls a step", "best")
    return "\n".join(_markdown(header, rows))


# -- the file
def _between(text: str, marker: str, body: str) -> str:
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    if begin not in text or end not in text:
        raise UserError("leaderboard", f"README.md lacks {begin} or {end}", "put both markers back")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{body}\n{end}{rest.split(end, 1)[1]}"


def render(text: str, documents: list[dict], tests: Path = TESTS) -> str:
    """The README with both tables rebuilt."""
    text = _between(text, "ladder", ladder(documents, tests))
    text = _between(text, "leaderboard", measured(documents))
    table = _markdown(orderings.HEADER, orderings.rows(documents, orderings.load_claims()))
    return _between(text, "orderings", "\n".join(table))


def leaderboard(
    check: bool = False,
    readme: Path = README,
    folder: Path | None = None,
    tests: Path = TESTS,
    guide: Path | None = GUIDE,
) -> list[str]:
    """Rewrite the tables, or with check only say what is out of date."""
    if not tests.is_dir():
        raise UserError("leaderboard", f"{tests} does not exist", "run it in a checkout")
    documents = evidence.read_all(folder)
    text = readme.read_text() if readme.is_file() else SKELETON
    pages = {readme: (text, render(text, documents, tests))}
    if guide is not None:
        pages[guide] = (guide.read_text(), _between(guide.read_text(), "choice", choice(documents)))
    if not check:
        for page, (_, built) in pages.items():
            write_text(page, built)
        return []
    problems = evidence.outdated(documents)
    for page, (before, built) in pages.items():
        if not page.is_file() or built != before:
            problems.append(f"{page.name} differs from the evidence; run `python -m eval leaderboard`")
    return problems
