"""Contenders side by side: each metric with its interval, the differences to the first one, as a table.

All contenders answer the same requests with the same noise, so differences are paired image by image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastgen.evaluation.metrics.estimate import Estimate, difference, pooled
from fastgen.evaluation.metrics.metric import Better
from fastgen.export.markdown import table


@dataclass
class Contender:
    """One generator or set of images. by_seed: the estimates of each seed by metric; nfe, seconds: of one
    image, 0 where it is not known.
    """

    name: str
    by_seed: list[dict[str, Estimate]]
    nfe: int = 0
    seconds: float = 0.0
    line: str = ""
    """contenders of one line are one model at several step counts"""
    about: dict[str, Any] = field(default_factory=dict)

    def pooled(self, metric: str) -> Estimate:
        """Over the seeds."""
        return pooled([found[metric] for found in self.by_seed])


def compared(contenders: list[Contender], better: dict[str, Better]) -> dict:
    """Values with intervals by contender and metric, and the paired difference of each to the first."""
    first = contenders[0]
    rows = []
    for contender in contenders:
        row: dict[str, Any] = {"name": contender.name, "line": contender.line or contender.name}
        row |= {k: v for k, v in (("nfe", contender.nfe), ("seconds", contender.seconds)) if v}
        row["metrics"] = {m: _entry(contender, m) for m in better}
        if contender is not first:
            row["differences"] = {m: _difference(contender, first, m, way) for m, way in better.items()}
        rows.append(row | contender.about)
    return {"baseline": first.name, "better": dict(better), "contenders": rows}


def _entry(contender: Contender, metric: str) -> dict:
    estimate = contender.pooled(metric)
    low, high = estimate.interval()
    found: dict[str, Any] = {"value": estimate.value, "low": low, "high": high}
    if len(contender.by_seed) > 1:
        found["by_seed"] = [e[metric].value for e in contender.by_seed]
    return found


def _difference(one: Contender, first: Contender, metric: str, better: Better) -> dict:
    found = difference(one.pooled(metric), first.pooled(metric))
    verdict = "undecided" if found.low == found.low else "no interval"
    if found.decided and better != "none":
        verdict = "better" if (found.value < 0) == (better == "lower") else "worse"
    elif found.decided:
        verdict = "differs"
    return {**found._asdict(), "verdict": verdict}


def shown(value: float | None, digits: int = 4) -> str:
    """A number as tables have it; an empty cell for none."""
    if value is None or value != value:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def cell(entry: dict) -> str:
    """value [low, high]."""
    if entry["low"] != entry["low"]:
        return shown(entry["value"])
    return f"{shown(entry['value'])} [{shown(entry['low'], 3)}, {shown(entry['high'], 3)}]"


def tables(document: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of the values, and of the differences."""
    arrows = {"lower": " (lower is better)", "higher": " (higher is better)", "none": ""}
    metrics = list(document["better"])
    costs = [c for c in ("nfe", "seconds") if any(c in row for row in document["contenders"])]
    header = ["", *(c.replace("nfe", "network calls").replace("seconds", "seconds / image") for c in costs)]
    header += [m + arrows[document["better"][m]] for m in metrics]
    rows = []
    for row in document["contenders"]:
        cells = [row["name"], *(shown(row.get(c), 3) for c in costs)]
        rows.append(cells + [cell(row["metrics"][m]) for m in metrics])
    found = [("Values, with 95 % intervals", header, rows)]
    apart = [
        [row["name"], *(f"{cell(row['differences'][m])} {row['differences'][m]['verdict']}" for m in metrics)]
        for row in document["contenders"]
        if "differences" in row
    ]
    if apart:
        found.append((f"Differences to {document['baseline']}", ["", *metrics], apart))
    return found


def markdown(document: dict) -> str:
    """The tables, and what they were made with."""
    lines = ["# Comparison", ""]
    for title, header, rows in tables(document):
        lines += [f"## {title}", "", *table(header, rows), ""]
    lines += [f"- {line}" for line in notes(document)]
    return "\n".join(lines) + "\n"


def notes(document: dict) -> list[str]:
    """What has to be said beside the numbers."""
    protocol = document.get("protocol", {})
    found = [f"{k.replace('_', ' ')}: {v}" for k, v in protocol.items() if not isinstance(v, dict)]
    for name, encoder in protocol.get("encoders", {}).items():
        found.append(
            f"encoder {name}: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in encoder.items())
        )
    paired = [d["paired"] for row in document["contenders"] for d in row.get("differences", {}).values()]
    if paired and not all(paired):
        found.append("some differences are not paired: their sets have different counts")
    return found
