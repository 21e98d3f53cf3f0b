"""One self-contained HTML page per run: what it was, its numbers, samples over time, curves, config."""

import base64
import io
import json
from pathlib import Path

from fastgen.core.files import write_text
from fastgen.core.paths import asset
from fastgen.core.reading import read_json, read_text
from fastgen.core.yaml_text import parse_yaml
from fastgen.evaluation.diagnostics import warnings
from fastgen.export.markdown import shown_lines

BLUE, FAINT, ORANGE, GREEN = "#1f5fa8", "#b9cfe6", "#c2571a", "#3b7d3b"
TITLES = {
    "nfe": "network calls",
    "seconds_per_sample": "seconds / sample",
    "fd_mini": "fd_mini",
    "energy_distance": "energy distance",
}
FIRST = (
    "nfe",
    "seconds_per_sample",
    "fd_mini",
    "energy_distance",
    "agreement",
    "recall",
    "precision",
    "clip",
)


def write_report(folder: Path) -> Path:
    """Render report/index.html of a run folder from what it holds; missing parts are left out."""
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True, finalize=_without_hidden)
    template = page.from_string(asset("report.html.j2").read_text())
    metrics = read_metrics(folder / "metrics.jsonl")
    results, config = _json(folder / "results.json"), _text(folder / "config.yaml")
    text = template.render(
        title=folder.resolve().name,
        summary=_summary(parse_yaml(config, "config.yaml", "report") or {}, results),
        results=results,
        table=_table(results),
        warnings=warnings(metrics, results),
        figures=_figures(metrics, results),
        grids=_grids(folder),
        config=config,
        environment=_json(folder / "environment.json"),
    )
    target = folder / "report" / "index.html"
    write_text(target, text)
    return target


def _without_hidden(value: object) -> object:
    """A value of the page without the characters that hide or reorder others; lines stay."""
    return shown_lines(value) if type(value) is str else value


def read_metrics(path: Path) -> list[dict]:
    """Records of metrics.jsonl in step order; a line cut short by a kill is skipped."""
    records = []
    for line in _text(path).splitlines():
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    numbered = (r for r in records if isinstance(r, dict) and isinstance(r.get("step"), int))
    return sorted(numbered, key=lambda r: r["step"])


def _text(path: Path) -> str:
    return read_text(path, "report", "repair or delete it", 2**30) if path.exists() else ""


def _json(path: Path) -> dict:
    return read_json(path, "report", "repair or delete it") if path.exists() else {}


def _summary(config: dict, results: dict) -> str:
    """One sentence: what was made from what, and how much faster it is."""
    if not config:
        return ""
    stages = config.get("stages") or [{"objective": config["objective"]}]
    methods = ", then ".join(s["objective"]["name"] for s in stages)
    teacher, student = config["teacher"], config["student"]
    source = teacher["path"] or "an untrained network"
    if "teacher" not in results:
        return f"{source} trained with {methods}."
    steps = len(results["protocol"].get("student_times") or []) or student["num_steps"]
    guided = f", guidance {teacher['guidance']:g}" if teacher["guidance"] != 1 else ""
    ratio = results["teacher"]["seconds_per_sample"] / max(results["student"]["seconds_per_sample"], 1e-12)
    return (
        f"{source} ({teacher['num_steps']} steps{guided}) distilled with {methods} "
        f"into a {student['kind']} student of {steps} step{'s' * (steps > 1)}: {ratio:.1f} times as fast."
    )


def _table(results: dict) -> dict:
    """Header and rows of the final table, as text."""
    named = {"teacher": "teacher", "untrained_student": "untrained student", "student": "student"}
    rows = [(title, results[key]) for key, title in named.items() if key in results]
    by_steps = results.get("student_by_steps", {})
    rows += [(f"student, {n} step{'s' * (n != '1')}", row) for n, row in by_steps.items()]
    rows += [("real images (floor)", results["floor"])] if "floor" in results else []
    found = list(dict.fromkeys(key for _, row in rows for key in row))
    keys = sorted(found, key=lambda k: FIRST.index(k) if k in FIRST else len(FIRST))
    cells = [(title, [_number(row.get(k), k) for k in keys]) for title, row in rows]
    return {"header": [TITLES.get(k, k.replace("_", " ")) for k in keys], "rows": cells} if rows else {}


def _number(value, key: str) -> str:
    """Shares as percentages, the rest with three or four digits."""
    if value is None:
        return ""
    if key.startswith("agreement") or key in ("recall", "precision", "modes"):
        return f"{100 * value:.1f} %"
    if key == "seconds_per_sample":
        return f"{value:.2g}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


# -- curves
def _series(metrics: list[dict], key: str) -> tuple[list, list]:
    """Steps and values; where a resumed run wrote a step again, the later line counts."""
    points = {r["step"]: r[key] for r in metrics if isinstance(r.get(key), (int, float))}
    return list(points), list(points.values())


def _figures(metrics: list[dict], results: dict) -> list[tuple[str, str]]:
    """(title, data URI): quality over time first, then one figure per player."""
    keys = {k for r in metrics for k, v in r.items() if "/" in k and isinstance(v, (int, float))}
    last = ("grad_norm", "lr")

    def within(key: str) -> tuple:
        name = key.split("/", 1)[1]
        return (name != "loss", name in last, FIRST.index(name) if name in FIRST else len(FIRST), name)

    players = sorted({k.split("/")[0] for k in keys}, key=lambda p: (p != "validation", p != "student", p))
    figures = []
    for player in players:
        own = sorted((k for k in keys if k.split("/")[0] == player), key=within)
        title = "Quality during training" if player == "validation" else f"Curves of the {player}"
        marks = results if player == "validation" else {}
        figures.append((title, _plot(metrics, own, marks)))
    return figures


def _plot(metrics: list[dict], keys: list[str], marks: dict) -> str:
    """Small multiples of keys over steps; dashed lines mark the teacher's final value and the floor."""
    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(12.4, 2.3 * rows), layout="constrained")
    for i, key in enumerate(keys):
        axes = figure.add_subplot(rows, columns, i + 1)
        steps, values = _series(metrics, key)
        name = key.split("/", 1)[1]
        if len(steps) < 30:
            axes.plot(steps, values, lw=1.4, color=BLUE, marker="o", ms=3)
        else:
            axes.plot(steps, values, lw=0.8, color=FAINT)
            axes.plot(steps, _smooth(values), lw=1.5, color=BLUE)
        for row, colour in (("teacher", ORANGE), ("floor", GREEN)):
            if name in marks.get(row, {}):
                axes.axhline(marks[row][name], color=colour, lw=1, ls="--", label=row)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False)
        if (
            name in ("fd_mini", "energy_distance")
            and min(values, default=0) > 0
            and max(values) > 20 * min(values)
        ):
            axes.set_yscale("log")
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return uri(buffer.getvalue())


def _smooth(values: list[float]) -> list[float]:
    """Centred moving mean over a fifteenth of the curve."""
    half = max(1, len(values) // 30)
    spans = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(s) / len(s) for s in spans]


# -- samples
def uri(data: bytes) -> str:
    """A PNG inside a page."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _grids(folder: Path, most: int = 6) -> list[tuple[str, str]]:
    """(caption, data URI): teacher, untrained and trained student, each step count, then the way there,
    evenly thinned.
    """
    samples = folder / "samples"
    ends = {"teacher": "teacher", "untrained": "untrained student", "student": "student"}
    shown = [(caption, samples / f"{name}.png") for name, caption in ends.items()]
    counts = sorted(int(p.stem.split("_")[1]) for p in samples.glob("student_*_steps.png"))
    shown += [(f"student in {n} step{'s' * (n > 1)}", samples / f"student_{n}_steps.png") for n in counts]
    way = sorted(samples.glob("step_*.png"))
    if len(way) > most:
        way = [way[round(i * (len(way) - 1) / (most - 1))] for i in range(most)]
    shown += [(f"at step {int(p.stem.split('_')[1])}", p) for p in way]
    shown = [(caption, p) for caption, p in shown if p.exists()]
    return [(caption, uri(p.read_bytes())) for caption, p in shown]
