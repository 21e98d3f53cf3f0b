"""A comparison as one self-contained HTML page: tables, quality against network calls and seconds,
samples.
"""

import io
from typing import Any

from fastgen.evaluation.comparison import notes, tables
from fastgen.evaluation.pages import render
from fastgen.evaluation.report_pictures import uri

COLOURS = ("#1f5fa8", "#c2571a", "#3b7d3b", "#7a3b8f", "#8a6d1f", "#3b7d7d")


def page(document: dict, grid: bytes = b"") -> str:
    """HTML text; grid: a PNG of samples, one row a contender."""
    return render(
        "comparison.html.j2",
        tables=tables(document),
        notes=notes(document),
        figures=figures(document),
        grid=uri(grid) if grid else "",
        names=[row["name"] for row in document["contenders"]],
    )


def figures(document: dict) -> list[tuple[str, str]]:
    """(title, SVG) of every metric against each cost that is known of two contenders or more."""
    found = []
    for cost, title in (("nfe", "network calls"), ("seconds", "seconds per image")):
        rows = [row for row in document["contenders"] if cost in row]
        if len(rows) > 1:
            found += [(f"{m} against {title}", _figure(rows, m, cost, title)) for m in document["better"]]
    return found


def _figure(rows: list[dict], metric: str, cost: str, title: str) -> str:
    """Points with their intervals; those of one line joined."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lines = list(dict.fromkeys(row["line"] for row in rows))
    with rc_context({"svg.hashsalt": "fastgen"}):
        figure = Figure(figsize=(4.6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for i, line in enumerate(lines):
            own = sorted((row for row in rows if row["line"] == line), key=lambda row: row[cost])
            values = [row["metrics"][metric]["value"] for row in own]
            bars = [
                [max(0.0, v - row["metrics"][metric]["low"]) for v, row in zip(values, own)],
                [max(0.0, row["metrics"][metric]["high"] - v) for v, row in zip(values, own)],
            ]
            style: dict[str, Any] = {"marker": "o", "ms": 4, "lw": 1.3, "capsize": 2}
            style["color"] = COLOURS[i % len(COLOURS)]
            axes.errorbar([row[cost] for row in own], values, yerr=bars, label=line, **style)
        axes.set_xscale("log")
        axes.set_xlabel(title, fontsize=9)
        axes.set_ylabel(metric, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "<svg" + buffer.getvalue().partition("<svg")[2]
