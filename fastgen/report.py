"""One self-contained HTML page per run: table, curves, grids over time, config."""

import base64
import io
import json
from pathlib import Path

from fastgen.checkpoint import write_text
from fastgen.paths import asset


def write_report(folder: Path) -> Path:
    """Render report/index.html of a run folder from what it holds."""
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(asset("report.html.j2").read_text())
    metrics = read_metrics(folder / "metrics.jsonl")
    results = _json(folder / "results.json")
    page = template.render(
        title=folder.name, results=results, rows=_rows(results), figures=_figures(metrics), grids=_grids(folder),
        config=_text(folder / "config.yaml"), environment=_json(folder / "environment.json"),
    )
    write_text(folder / "report" / "index.html", page)
    return folder / "report" / "index.html"


def read_metrics(path: Path) -> list[dict]:
    """Records of metrics.jsonl; where a resumed run wrote a step again, the later line counts."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return sorted(records, key=lambda r: r["step"])


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _rows(results: dict) -> list[tuple[str, dict]]:
    names = ("teacher", "untrained_student", "student")
    return [(n.replace("_", " "), results[n]) for n in names if n in results]


def _series(metrics: list[dict], key: str) -> tuple[list, list]:
    points = {r["step"]: r[key] for r in metrics if key in r}
    return list(points), list(points.values())


def _figures(metrics: list[dict]) -> list[tuple[str, str]]:
    """(title, data URI) of one figure per player, and of the cheap metrics over time."""
    keys = sorted({k for r in metrics for k, v in r.items() if "/" in k and isinstance(v, (int, float))})
    players = list(dict.fromkeys(k.split("/")[0] for k in keys))
    order = sorted(players, key=lambda p: (p != "validation", p != "student"))
    return [(p, _plot(metrics, [k for k in keys if k.split("/")[0] == p])) for p in order]


def _plot(metrics: list[dict], keys: list[str]) -> str:
    from matplotlib.figure import Figure

    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.1 * rows), layout="constrained")
    for i, key in enumerate(keys):
        axes = figure.add_subplot(rows, columns, i + 1)
        steps, values = _series(metrics, key)
        axes.plot(steps, values, lw=1.2, color="#1f5fa8", marker="." if len(steps) < 15 else None)
        axes.set_title(key.split("/", 1)[1], fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _uri(buffer.getvalue())


def _uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _grids(folder: Path, most: int = 6) -> list[tuple[str, str]]:
    """(caption, data URI): the teacher, then the student over time, evenly thinned."""
    steps = sorted((folder / "samples").glob("step_*.png"))
    if len(steps) > most:
        steps = [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
    found = [(f"student, step {int(p.stem.split('_')[1])}", p) for p in steps]
    teacher = folder / "samples" / "teacher.png"
    shown = [("teacher", teacher), *found] if teacher.exists() else found
    return [(caption, _uri(p.read_bytes())) for caption, p in shown]
