"""Method by method: which proofs exist, and what it needs and costs.

Ladder: P1 identities, P2 distils an exact mixture, P3 distils a trained mini teacher (evidence), P4 exported
and sampled by plain diffusers. P1, P2 and P4 ask for test functions named `test_p1_*` and so on in
tests/objectives/test_<method>.py, and `test_p4_<method>*` in any other test file; skipped ones do not count.
"""

import ast
import importlib
import math
import re
import statistics
from pathlib import Path

from eval.results_table import distance, markdown, teacher_value
from fastgen.core.paths import PACKAGE
from fastgen.objectives import REGISTRY, requirements_of

TESTS = PACKAGE.parent / "tests"


def _methods():
    """(name, class, file) of every method of the package, by name; plugins are not ours to tell of."""
    for method, cls in sorted(REGISTRY.items()):
        if cls.__module__.startswith("fastgen."):
            yield method, cls, f"{cls.__module__.rsplit('.', 1)[-1]}.py"


def _students(document: dict) -> list[dict]:
    """What was measured of a run's student: at its own step count and at the others."""
    results = document["results"]
    return [results.get("student", {}), *results.get("student_by_steps", {}).values()]


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


def _credited(method: str, documents: list[dict]) -> list[dict]:
    """Per teacher, the runs whose number is this method's: recipes that end in it, else variants of such
    recipes, else those where it is an earlier stage.
    """

    def rank(document: dict) -> int:
        if document["objective"].split("+")[-1] != method:
            return 2
        return int("+" in document["recipe"])

    own = [d for d in documents if method in d["objective"].split("+")]
    best: dict[str, int] = {}
    for document in own:
        best[document["teacher"]] = min(rank(document), best.get(document["teacher"], 2))
    return [d for d in own if rank(d) == best[d["teacher"]]]


def _reached(method: str, documents: list[dict]):
    """(mean distance over the seeds, NFE, metric, one of the documents) of every student of a method."""
    found: dict[tuple, list[tuple[float, dict]]] = {}
    for document in _credited(method, documents):
        metric = distance([document])
        for row in (r for r in _students(document) if metric in r):
            of = (document["teacher"], document["recipe"], row.get("nfe"), metric)
            found.setdefault(of, []).append((row[metric], document))
    for (_, _, nfe, metric), seeds in found.items():
        yield statistics.mean(value for value, _ in seeds), nfe, metric, seeds[0][1]


def _p3(method: str, documents: list[dict]) -> str:
    """Per teacher, the best recipe of this method over its seeds: its distance and the teacher's."""
    best: dict[str, tuple[float, str]] = {}
    for value, nfe, metric, document in _reached(method, documents):
        trained = metric != "energy_distance"  # that of exact teachers, who are P2
        if trained and value < best.get(document["teacher"], (math.inf, ""))[0]:
            teacher = teacher_value(document, documents, metric)
            beside = f", teacher {teacher[0]:.3g}" if teacher else ""
            best[document["teacher"]] = (value, f"{document['teacher']} {value:.3g} at NFE {nfe}{beside}")
    return "; ".join(shown for _, shown in best.values())


def ladder(documents: list[dict], tests: Path = TESTS) -> str:
    """Method by method, the proofs that exist."""
    rows = []
    for method, _, file in _methods():
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
    return "\n".join(markdown(header, rows))


def _best(method: str, documents: list[dict]) -> str:
    """The smallest ratio to its teacher that a recipe of this method has evidence of, seeds averaged."""
    found = []
    for value, nfe, metric, document in _reached(method, documents):
        teacher, fair = teacher_value(document, documents, metric) or (None, False)
        if teacher:
            found.append((not fair, value / teacher, nfe, document["teacher"]))
    if not found:
        return "-"
    _, ratio, nfe, teacher = min(found)
    return f"{ratio:.2f} at {nfe} ({teacher})"


def choice(documents: list[dict]) -> str:
    """What each method needs and costs, as it declares, beside the best it has reached."""
    rows = []
    for method, cls, file in _methods():
        needs = requirements_of(cls.config())
        calls = needs.network_calls(2.0, 1)
        plain = {k: v for k, v in calls.items() if not k.endswith("+grad")}
        grads = {k.removesuffix("+grad"): v for k, v in calls.items() if k.endswith("+grad")}
        shown = [f"{k} {v:g}" for k, v in plain.items()] + [f"{k} {v:g} g" for k, v in grads.items()]
        rows.append(
            [
                f"[`{method}`](../fastgen/objectives/{file})",
                "yes" if needs.real_data else "no",
                ", ".join(needs.trained),
                ", ".join(shown),
                _best(method, documents),
            ]
        )
    header = ("method", "real images", "trained", "calls a step", "best")
    return "\n".join(markdown(header, rows))
