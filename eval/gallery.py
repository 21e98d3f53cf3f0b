"""The evidence as one page to look at: a filter, quality against steps and against seconds, pictures.

The page holds its data, its script and its pictures: nothing is loaded from elsewhere.
"""

import json
import statistics
from pathlib import Path

from jinja2 import Environment

from eval.evidence import results_folder
from eval.results_table import distance, numbers
from fastgen.core.errors import UserError
from fastgen.core.files import write_text
from fastgen.evaluation.report_pictures import uri

TEMPLATE = Path(__file__).with_name("gallery.html.j2")
MOST_BYTES = 200_000
"""of one picture in the page; a run's larger grid is left out"""


def points(documents: list[dict]) -> list[dict]:
    """One point for each recipe, or teacher, and number of network calls: means over the seeds."""
    found = []
    for teacher, recipe in dict.fromkeys((d["teacher"], d["recipe"]) for d in documents):
        group = [d for d in documents if (d["teacher"], d["recipe"]) == (teacher, recipe)]
        metric = distance(group)
        paths = [("student",)]
        paths += [("student_by_steps", n) for n in group[0]["results"].get("student_by_steps", {})]
        for path in paths:
            values = numbers(group, *path, metric)
            if not values:
                continue
            first = group[0]
            about = {"recipe": recipe, "teacher": teacher, "method": first["objective"]}
            found.append({**about, "student": first["student"], **_numbers(group, path, metric, values)})
    calls: dict[tuple, dict] = {}
    for point in found:  # a step count measured twice is one: the first has been timed
        calls.setdefault((point["recipe"], point["teacher"], point["calls"]), point)
    return [*_teachers(documents), *calls.values()]


def _numbers(group: list[dict], path: tuple[str, ...], metric: str, values: list[float]) -> dict:
    mean = lambda key: statistics.mean(found) if (found := numbers(group, *path, key)) else None  # noqa: E731
    return {
        "calls": round(mean("nfe") or 0),
        "seconds": mean("seconds_per_sample"),
        "metric": metric,
        "value": statistics.mean(values),
        "recall": mean("recall"),
        "agreement": mean("agreement"),
        "seeds": len(values),
    }


def _teachers(documents: list[dict]) -> list[dict]:
    """Each teacher at its own number of steps, of the run that measured it on most samples."""
    found = []
    for teacher in dict.fromkeys(d["teacher"] for d in documents):
        own = [d for d in documents if d["teacher"] == teacher]
        metric = distance(own)
        measured = [d for d in own if numbers([d], "teacher", metric)]
        if measured:
            samples = lambda d: d["results"].get("protocol", {}).get("teacher_samples") or 0  # noqa: E731
            best = max(measured, key=samples)
            values = numbers([best], "teacher", metric)
            about = {"recipe": "teacher", "teacher": teacher, "method": "teacher", "student": ""}
            found.append({**about, **_numbers([best], ("teacher",), metric, values)})
    return found


def pictures(found: list[dict], runs: Path | None, evidence: Path | None = None) -> dict[str, str]:
    """Recipe -> its samples as a data URI: the picture beside its evidence, or the grid of a run folder that
    is named after it.
    """
    shown = {}
    for recipe, teacher in dict.fromkeys((p["recipe"], p["teacher"]) for p in found):
        kept = (evidence or results_folder()) / teacher / f"{recipe}.webp"
        files = [(kept, "webp"), *([(runs / recipe / "samples" / "student.png", "png")] if runs else [])]
        for file, kind in files:
            if file.is_file() and file.stat().st_size <= MOST_BYTES:
                shown[recipe] = uri(file.read_bytes(), kind)
    return shown


def write_gallery(documents: list[dict], page: Path, runs: Path | None = None) -> Path:
    """Write the page; `runs` holds run folders whose pictures it shows."""
    if page.suffix != ".html":
        raise UserError("--html", f"found {page}", "give a .html file")
    if runs is not None and not runs.is_dir():
        raise UserError("--runs", f"{runs} is not a folder", "give the folder that holds the run folders")
    found = points(documents)
    data = {"points": found, "pictures": pictures(found, runs)}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    write_text(page, template.render(data=text, count=len(documents)))
    return page
