"""Several runs on one self-contained page, as an ablation is read: what was changed, what it did to quality
and speed, curves over each other, pictures of the same requests.
"""

import json
from pathlib import Path

from fastgen.evaluation.explained import direction, meaning, number, title
from fastgen.evaluation.pages import render
from fastgen.evaluation.plots import Line, line_plot
from fastgen.evaluation.report import on_log_scale, place, summary
from fastgen.evaluation.report_pictures import SMALL, PictureSet, layout, picture_sets
from fastgen.evaluation.run_files import RunFiles, read_run

MOST_KEYS = 60
"""changed settings that are listed"""
PROTOCOL = ("num_samples", "seed", "extractor", "reference", "device", "threads")
"""what numbers must have in common to be compared; device and threads decide seconds alone"""


def runs_page(folders: list[Path], running: bool = False) -> str:
    """The page as text, of two runs or more; `running`: one of them goes on."""
    runs = [read_run(folder) for folder in folders]
    names = unique_names(folders)
    texts, sets = _pictures(folders, names)
    known = layout(folders[0])
    return render(
        "report_runs.html.j2",
        title=" and ".join(names) if len(names) == 2 else f"{len(names)} runs",
        running=running,
        names=names,
        about=[(name, summary(run)) for name, run in zip(names, runs)],
        table=_table(runs, names),
        notes=_apart(runs, names),
        changed=changed(runs),
        quality=_overlaid(runs, names, validated=True),
        losses=_overlaid(runs, names, validated=False),
        texts=texts,
        sets=sets,
        small=known is None or known.side <= SMALL,
        whole=known is None,
    )


def unique_names(folders: list[Path]) -> list[str]:
    """Names of the folders; with as much of the path as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{i}: {p[-1]}" for i, p in enumerate(parts, 1)]


def _table(runs: list[RunFiles], names: list[str]) -> dict:
    """Header [(name, meaning)] and rows [(name, cells [(text, whether it is the best)])]."""
    rows = [run.results.get("student", {}) for run in runs]
    found = dict.fromkeys(
        key for row in rows for key, value in row.items() if isinstance(value, (int, float))
    )
    keys = sorted(found, key=place)
    best = {key: _best([row.get(key) for row in rows], direction(key)) for key in keys}
    lines = [
        (name, "", [(number(row.get(k), k), row.get(k) == best[k] is not None) for k in keys])
        for name, row in zip(names, rows)
    ]
    teachers = [run.results["teacher"] for run in runs if "teacher" in run.results]
    if teachers and len({json.dumps(run.config.get("teacher"), sort_keys=True) for run in runs}) == 1:
        lines.append(("teacher", "floor", [(number(teachers[0].get(k), k), False) for k in keys]))
    return {"header": [(title(k), meaning(k)) for k in keys], "rows": lines} if keys else {}


def _best(values: list, way: str) -> float | None:
    known = [v for v in values if v is not None]
    if not way or len(known) < 2 or len(set(known)) == 1:
        return None
    return min(known) if way == "lower" else max(known)


def _apart(runs: list[RunFiles], names: list[str]) -> list[str]:
    """What the runs were measured with differently, in words."""
    found = []
    for key in PROTOCOL:
        values = [run.results["protocol"].get(key) for run in runs if "protocol" in run.results]
        if len({json.dumps(v) for v in values}) > 1:
            shown = ", ".join(str(v) for v in dict.fromkeys(map(str, values)))
            found.append(f"They were measured with different {key.replace('_', ' ')}: {shown}.")
    found += [f"{name} has no results yet." for name, run in zip(names, runs) if not run.results]
    return found


def changed(runs: list[RunFiles]) -> list[tuple[str, list[str]]]:
    """(key, value of each run) of every setting that is not the same in all."""
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, [one.get(key, "") for one in flat]) for key in keys if key != "output_dir"]
    return [(key, values) for key, values in rows if len(set(values)) > 1][:MOST_KEYS]


def _flat(value: object, prefix: str = "") -> dict[str, str]:
    """Dotted keys, and their values as text."""
    if isinstance(value, dict) and value:
        parts = [(f"{prefix}.{key}".strip("."), child) for key, child in value.items()]
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        parts = [(f"{prefix}.{i}", child) for i, child in enumerate(value)]
    else:
        return {prefix: value if isinstance(value, str) else json.dumps(value, default=str)}
    return {key: text for name, child in parts for key, text in _flat(child, name).items()}


def _overlaid(runs: list[RunFiles], names: list[str], validated: bool) -> list[tuple[str, str, str]]:
    """(name, meaning, plot) of every number that two runs or more have followed."""
    counts: dict[str, int] = {}
    for run in runs:
        for key in run.curves():
            wanted = key.startswith("validation/") if validated else key.endswith("/loss")
            counts[key] = counts.get(key, 0) + wanted
    found = []
    for key in [k for k, count in counts.items() if count > 1]:
        player, name = key.split("/", 1)
        lines = [Line(*run.series(key), name=names[i], colour=i % 6) for i, run in enumerate(runs)]
        lines = [line for line in lines if line.xs]
        values = [v for line in lines for v in line.ys]
        log = on_log_scale(values, name)
        shown = title(name) if validated else f"{player} {name}"
        found.append((shown, meaning(name), line_plot(lines, log=log, label=f"{shown} of every run")))
    return found


def _pictures(folders: list[Path], names: list[str]) -> tuple[list[str], list[PictureSet]]:
    """The students' pictures, then the teacher's; none where the runs answered different requests."""
    cut = [picture_sets(folder) for folder in folders]
    texts = [texts for texts, sets in cut if sets]
    if not texts or any(t != texts[0] for t in texts):
        return [], []
    sets = []
    for name, (_, own) in zip(names, cut):
        student = next((s for s in own if s.name.startswith("student")), None)
        sets += [PictureSet(name, student.pictures)] if student else []
    sets += [s for _, own in cut for s in own if s.name == "teacher"][:1]
    return texts[0], [s for s in sets if len(s.pictures) == len(texts[0])]
