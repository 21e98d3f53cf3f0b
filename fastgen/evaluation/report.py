"""One self-contained HTML page per run: what it was, its numbers, samples, curves, config.

It is written at each validation and at the end; while the run goes on it loads itself again.
"""

from collections.abc import Iterator
from pathlib import Path

from markupsafe import Markup

from fastgen.core.files import write_text
from fastgen.core.progress import duration
from fastgen.evaluation.diagnostics import warnings
from fastgen.evaluation.explained import SAID, direction, meaning, number, title
from fastgen.evaluation.pages import render
from fastgen.evaluation.plots import Line, Marks, line_plot, smooth
from fastgen.evaluation.report_pictures import SMALL, layout, picture_sets, splats, turntables, way
from fastgen.evaluation.run_files import RunFiles, Stage, read_run
from fastgen.export.viewer import STYLE, viewer_figure, viewer_script

FIRST = (
    "nfe",
    "seconds_per_sample",
    "fvd_mini",
    "fd_mini",
    "energy_distance",
    "agreement",
    "recall",
    "precision",
    "clip",
)
QUALITY = (
    "fvd_mini",
    "fd_mini",
    "energy_distance",
    "fd_teacher_features",
    "agreement",
    "recall",
    "modes",
    "diversity_ratio",
)
"""the headline's, where a run has not chosen its own; three at most"""
DETAILS = ("grad_norm", "lr", "x_mean", "x_std", "h_max", "h_std", "log_ratio")
"""curves that are folded away"""


def write_report(folder: Path, running: bool = False) -> Path:
    """Render report/index.html of a run folder from what it holds; missing parts are left out. `running`: the
    run goes on, so the page says so and loads itself again.
    """
    target = folder / "report" / "index.html"
    write_text(target, report_page(folder, running))
    return target


def report_page(folder: Path, running: bool = False) -> str:
    """The page as text."""
    run = read_run(folder)
    known = layout(folder)
    texts, sets = picture_sets(folder)
    strip_texts, strips = way(folder)
    return render(
        "report.html.j2",
        title=run.name,
        running=running,
        state=_state(run, running),
        summary=summary(run),
        run=run,
        tiles=tiles(run) if run.results else _progress(run),
        table=_table(run.results),
        warnings=warnings(run.metrics, run.results),
        quality=_quality(run),
        stages=[(stage, *_curves(run, stage)) for stage in run.stages],
        texts=texts,
        sets=sets,
        small=known is None or known.side <= SMALL,
        whole=known is None,
        strips=strips,
        turntables=turntables(folder),
        viewer=viewer(folder),
        strip_texts=strip_texts,
        glossary=_glossary(run),
    )


def viewer(folder: Path) -> dict[str, Markup]:
    """The parts of a page that shows the run's 3D assets from all around; empty without any."""
    found = splats(folder)
    parts = {"figure": viewer_figure(found), "style": STYLE, "script": viewer_script()} if found else {}
    return {key: Markup(text) for key, text in parts.items()}


def _state(run: RunFiles, running: bool) -> str:
    """Where the run stands, in words."""
    if run.results:
        return "finished"
    if running:
        return "measuring" if run.total and run.step >= run.total else "training"
    if run.total and run.step >= run.total:
        return "trained, not measured"
    return f"stopped at step {run.step:,}" if run.step else "not started"


def summary(run: RunFiles) -> str:
    """One sentence: what was made from what, and how much faster it is."""
    config, results = run.config, run.results
    if not config:
        return ""
    methods = ", then ".join(stage.method for stage in run.stages) or config["objective"]["name"]
    teacher, student = config["teacher"], config["student"]
    source = teacher["path"] or "an untrained network"
    if results and "teacher" not in results:
        return f"{source} trained with {methods}."
    steps = len(results.get("protocol", {}).get("student_times") or []) or student["num_steps"]
    guided = f", guidance {teacher['guidance']:g}" if teacher["guidance"] != 1 else ""
    made = f"{source} ({teacher['num_steps']} steps{guided}) distilled with {methods} "
    if student.get("asset"):
        number, kind = student["asset"]["num"], student["asset"]["kind"]
        what = f"{number} 3D assets" if number > 1 else "a 3D asset"
        if student["asset"].get("generator"):
            what = "a network that makes the 3D asset of any prompt, trained for those"
        return f"{made}into {what} of {config['data']['views']['prompt']!r} ({kind})."
    made += f"into a {student['kind']} student of {steps} step{'s' * (steps > 1)}"
    ratio = faster(results)
    return f"{made}: {ratio:.1f} times as fast." if ratio else f"{made}."


def faster(results: dict) -> float | None:
    """How many times as fast as its teacher the student is; None where it was not timed."""
    times = [results.get(who, {}).get("seconds_per_sample") for who in ("teacher", "student")]
    return times[0] / times[1] if all(isinstance(t, (int, float)) and t > 0 for t in times) else None


# -- the headline and the table
def tiles(run: RunFiles) -> list[dict]:
    """The headline of a measured run: what it is called, the student's value, what stands beside it."""
    results = run.results
    student, teacher = results.get("student", {}), results.get("teacher", {})
    found = []
    for key in headline_keys(results):
        beside = [f"{who} {number(row[key], key)}" for who, row in _others(results) if key in row]
        found.append(_tile(key, number(student[key], key), beside))
    if "nfe" in student:
        beside = [f"teacher {teacher['nfe']}"] if "nfe" in teacher else []
        found.append(_tile("nfe", str(student["nfe"]), beside))
    if "seconds_per_sample" in student:
        ratio, key = faster(results), "seconds_per_sample"
        beside = [f"teacher {number(teacher[key], key)} s"] if key in teacher else []
        beside += [f"{ratio:.1f} times as fast"] if ratio else []
        found.append(_tile(key, f"{number(student[key], key)} s", beside))
    return found


def _tile(key: str, value: str, beside: list[str]) -> dict:
    return {"name": title(key), "meaning": meaning(key), "value": value, "beside": beside}


def _others(results: dict) -> Iterator[tuple[str, dict]]:
    for key, name in (("teacher", "teacher"), ("untrained_student", "untrained"), ("floor", "real images")):
        if key in results:
            yield name, results[key]


def headline_keys(results: dict, most: int = 3) -> list[str]:
    """The numbers of quality to look at first."""
    wanted = dict.fromkeys([*results.get("chosen", ()), *QUALITY])
    return [key for key in wanted if key in results.get("student", {})][:most]


def _progress(run: RunFiles) -> list[dict]:
    """The headline while there is nothing measured yet."""
    found = []
    if run.step:
        part = next((s for s in run.stages if run.step <= s.last), run.stages[-1])
        share = round(100 * min(run.step / max(run.total, 1), 1))
        tile = {**_tile("step", f"{run.step:,}", [f"of {run.total:,}"]), "share": share, "stage": part.name}
        left = run.seconds / run.step * (run.total - run.step)
        beside = [f"about {duration(left)} to go"] if left > 0 else []
        found += [tile, _tile("training time", duration(run.seconds), beside)]
    for key in [k for k in run.curves() if k.startswith("validation/")][:2]:
        _, values = run.series(key)
        name = key.split("/", 1)[1]
        beside = [f"at first {number(values[0], name)}"] if len(values) > 1 else []
        found.append(_tile(name, number(values[-1], name), beside))
    for key in [k for k in run.curves() if k.endswith("/loss")][:2]:
        tile = _tile("loss", f"{run.series(key)[1][-1]:.4g}", [])
        found.append(tile | {"name": f"loss of the {key.split('/')[0]}"})
    return found


def _table(results: dict) -> dict:
    """Header [(name, meaning)] and rows [(name, kind, cells)] of the final table, as text."""
    named = {"teacher": "teacher", "untrained_student": "untrained student", "student": "student"}
    rows = [(name, key.split("_")[0], results[key]) for key, name in named.items() if key in results]
    by_steps = results.get("student_by_steps", {})
    rows += [(f"student, {n} step{'s' * (n != '1')}", "student", row) for n, row in by_steps.items()]
    rows += [("real images (floor)", "floor", results["floor"])] if "floor" in results else []
    found = list(dict.fromkeys(key for _, _, row in rows for key in row))
    keys = sorted(found, key=place)
    cells = [(name, kind, [number(row.get(k), k) for k in keys]) for name, kind, row in rows]
    return {"header": [(title(k), meaning(k)) for k in keys], "rows": cells} if rows else {}


def _glossary(run: RunFiles) -> list[tuple[str, str]]:
    """(name, meaning) of every number on the page that something is known of."""
    rows = [v for v in run.results.values() if isinstance(v, dict)]
    keys = [k for row in rows for k, v in row.items() if isinstance(v, (int, float))]
    keys += [k.split("/", 1)[1] for k in run.curves()]
    keys += [k for k in ("untrained", "floor") if run.results]
    found = {title(k): meaning(k) for k in dict.fromkeys(keys) if k in SAID or direction(k)}
    return [(name, said) for name, said in found.items() if said]


# -- curves
def _quality(run: RunFiles) -> list[tuple[str, str, str]]:
    """(name, meaning, plot) of every validated number, with stage ends, the teacher's value and the floor."""
    keys = [k for k in run.curves() if k.startswith("validation/")]
    keys.sort(key=lambda k: (place(k.split("/", 1)[1]), k))
    ends = [(f"end of {s.name}", s.last) for s in run.stages[:-1] if s.last <= run.step]
    found = []
    for key in keys:
        name = key.split("/", 1)[1]
        known = [(who, run.results.get(who, {})) for who in ("teacher", "floor")]
        levels = [(who, row[name]) for who, row in known if name in row]
        steps, values = run.series(key)
        log = on_log_scale(values, name)
        plot = line_plot([Line(steps, values)], Marks(levels=levels, ends=ends), log, f"{name} over steps")
        found.append((title(name), meaning(name), plot))
    return found


def place(key: str) -> int:
    """Where a number stands among others: those of FIRST in their order, then the rest."""
    return FIRST.index(key) if key in FIRST else len(FIRST)


def on_log_scale(values: list[float], name: str) -> bool:
    """Whether a curve is read better on a logarithmic axis: a distance that falls far."""
    return min(values) > 0 and max(values) > 20 * min(values) and direction(name) == "lower"


def _curves(run: RunFiles, stage: Stage) -> tuple[list, list]:
    """(main, folded) curves of a stage, each as (name, meaning, plot)."""
    main: list[tuple[str, str, str]] = []
    folded: list[tuple[str, str, str]] = []
    keys = [k for k in run.curves() if not k.startswith("validation/")]
    player = lambda k: (k.split("/")[0] != "student", k.split("/")[0])  # noqa: E731
    keys.sort(key=lambda k: (not k.endswith("/loss"), player(k), k))
    for key in keys:
        who, name = key.split("/", 1)
        pairs = [(x, y) for x, y in zip(*run.series(key)) if stage.first < x <= stage.last]
        if not pairs:
            continue
        steps, values = [p[0] for p in pairs], [p[1] for p in pairs]
        lines = [Line(steps, values)]
        if len(values) >= 30:
            lines = [Line(steps, values, faint=True), Line(steps, smooth(values))]
        ticks = [s for s in run.validations if stage.first <= s <= stage.last]
        plot = line_plot(lines, Marks(ticks=ticks), label=f"{name} of the {who} over steps")
        (folded if name in DETAILS else main).append((f"{who} {title(name)}", meaning(name), plot))
    return main, folded
