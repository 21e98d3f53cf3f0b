"""The README's second picture: quality against speed of every recipe of one teacher, drawn from the evidence.

Both axes are ratios within one run, whose teacher and student are measured on the same requests and timed in
turns, so that points of different days can stand in one plot.
"""

import statistics
from html import escape
from typing import NamedTuple

from eval.results_table import distance, numbers, teacher_value
from fastgen.core.paths import PACKAGE
from fastgen.evaluation.plots import Axis, axis, short

FIGURE = PACKAGE.parent / "assets" / "figures" / "quality_speed.svg"
TEACHER = "tinted-sd"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 430, 64, 24, 20, 52
NAMED = 14
"""points that are named, where there is room"""
Box = tuple[float, float, float, float]
"""left, top, right, bottom"""
STYLE = """
svg { font: 13px system-ui, sans-serif; } text { fill: #566472; } .name { fill: #17212b; font-weight: 600; }
.grid { stroke: #e1e7ed; } .front { fill: none; stroke: #1f5fa8; stroke-dasharray: 4 4; opacity: .7; }
circle { fill: #1f5fa8; fill-opacity: .4; } circle.best { fill-opacity: 1; } .teacher { fill: #c2571a; }
@media (prefers-color-scheme: dark) {
text { fill: #9aa9b8; } .name { fill: #e5ebf1; } .grid { stroke: #2b3642; } .front { stroke: #7ab5f2; }
circle { fill: #7ab5f2; } .teacher { fill: #ee9a5c; }
}
"""


class Point(NamedTuple):
    """One recipe: how many times as fast as its teacher it is, and its distance over the teacher's."""

    name: str
    faster: float
    ratio: float


def points(documents: list[dict], teacher: str = TEACHER) -> list[Point]:
    """Of every recipe of a teacher, means over its seeds; ablations and unmeasured ones are left out."""
    own = [d for d in documents if d["teacher"] == teacher and "+" not in d["recipe"]]
    found = []
    for recipe in dict.fromkeys(d["recipe"] for d in own):
        faster, ratios, calls = [], [], 0.0
        for document in (d for d in own if d["recipe"] == recipe):
            metric = distance([document])
            teachers = teacher_value(document, documents, metric)
            values = numbers([document], "student", metric)
            times = [numbers([document], who, "seconds_per_sample") for who in ("teacher", "student")]
            if teachers and values and all(times):
                faster.append(times[0][0] / times[1][0])
                ratios.append(values[0] / teachers[0])
                calls = numbers([document], "student", "nfe")[0]
        if faster:
            name = f"{recipe.removeprefix(f'{teacher}_')}, {calls:.0f} call{'s' * (calls != 1)}"
            found.append(Point(name, statistics.mean(faster), statistics.mean(ratios)))
    return sorted(found, key=lambda p: p.faster)


def front(found: list[Point]) -> list[Point]:
    """Those that no other one beats in both."""
    return [p for p in found if not any(q.faster >= p.faster and q.ratio < p.ratio for q in found)]


def svg(documents: list[dict]) -> str:
    """The picture, whole: it takes the reader's light or dark by itself."""
    found = points(documents)
    if not found:
        return ""
    across = axis([1, *(p.faster for p in found)], LEFT, WIDTH - RIGHT, log=True)
    upward = axis([0.8, *(p.ratio for p in found)], HEIGHT - BOTTOM, TOP, whole=False, most=9)
    body = [*_grid(across, upward), *_dots(found, across, upward)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="quality against speed"><style>{STYLE}</style>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _grid(across: Axis, upward: Axis) -> list[str]:
    drawn = []
    for value in across.ticks:
        x = across.at(value)
        drawn.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        y = HEIGHT - BOTTOM + 18
        drawn.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{short(value)}x</text>')
    for value in upward.ticks:
        y = upward.at(value)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    middle, foot = (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10
    drawn.append(f'<text x="{middle}" y="{foot}" text-anchor="middle">times as fast as the teacher</text>')
    side = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 16 {side})"'
    says = "fd_mini, as a multiple of the teacher's"
    drawn.append(f'<text x="16" y="{side}" text-anchor="middle" {turned}>{says}</text>')
    return drawn


def _dots(found: list[Point], across: Axis, upward: Axis) -> list[str]:
    best = front(found)
    path = " ".join(f"{across.at(p.faster):.1f},{upward.at(p.ratio):.1f}" for p in best)
    drawn = [f'<polyline class="front" points="{path}"/>']
    for point in found:
        x, y = across.at(point.faster), upward.at(point.ratio)
        kind = ' class="best"' if point in best else ""
        said = f"{point.name}: {point.faster:.1f} times as fast, {point.ratio:.2f} of the teacher's fd_mini"
        drawn.append(
            f'<circle{kind} cx="{x:.1f}" cy="{y:.1f}" r="5.5"><title>{escape(said)}</title></circle>'
        )
    x, y = across.at(1), upward.at(1)
    drawn.append(f'<rect class="teacher" x="{x - 6:.1f}" y="{y - 6:.1f}" width="12" height="12"/>')
    drawn.append(f'<text class="name" x="{x + 12:.1f}" y="{y - 12:.1f}">teacher, 20 guided steps</text>')
    dots = [(across.at(p.faster), upward.at(p.ratio)) for p in found]
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in dots] + [(x, y - 26, x + 190, y + 8)]
    for point in sorted(found, key=lambda p: (p not in best, p.ratio))[:NAMED]:
        drawn += _label(point, across.at(point.faster), upward.at(point.ratio), taken, point in best)
    return drawn


def _label(point: Point, x: float, y: float, taken: list[Box], bold: bool) -> list[str]:
    """The name of a point where there is room for it; `taken` gets its box."""
    wide = 7.4 * len(point.name) if bold else 6.8 * len(point.name)
    for left, base in (
        (x + 10, y + 4),
        (x - 10 - wide, y + 4),
        (x - wide / 2, y + 22),
        (x - wide / 2, y - 11),
    ):
        box = (left, base - 12, left + wide, base + 3)
        inside = box[0] > LEFT and box[2] < WIDTH - 4 and box[3] < HEIGHT - BOTTOM
        own = (x - 8, y - 8, x + 8, y + 8)
        if inside and not any(_meet(box, other) for other in taken if other != own):
            taken.append(box)
            kind = ' class="name"' if bold else ""
            return [f'<text{kind} x="{left:.1f}" y="{base:.1f}">{escape(point.name)}</text>']
    return []


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
