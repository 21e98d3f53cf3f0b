"""Small plots as inline SVG, coloured by the page they stand in (`assets/page.html.j2`).

A plot is text of a few kilobytes: no image library, sharp at any width, light or dark as the reader prefers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 26
MOST_POINTS = 240
"""drawn of one line"""


@dataclass(frozen=True)
class Line:
    """One curve; `faint`: it stands behind another, thin and pale."""

    xs: Sequence[float]
    ys: Sequence[float]
    name: str = ""
    colour: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Marks:
    """What a plot shows beside its curves."""

    levels: Sequence[tuple[str, float]] = ()
    """(name, y): dashed lines across"""
    ends: Sequence[tuple[str, float]] = ()
    """(name, x): dashed lines upwards, where a stage ends"""
    ticks: Sequence[float] = ()
    """x of small triangles on the axis: validations"""


@dataclass(frozen=True)
class Axis:
    """One direction of a plot, from values to pixels."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    ticks: list[float] = field(default_factory=list)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def line_plot(lines: Sequence[Line], marks: Marks = Marks(), log: bool = False, label: str = "") -> str:
    """Curves over training steps as SVG text; `label` is what a screen reader says. Empty without points."""
    points = [(x, y) for line in lines for x, y in zip(line.xs, line.ys)]
    if not points:
        return ""
    xs, ys = ([p[i] for p in points] for i in (0, 1))
    levels = [(name, value) for name, value in marks.levels if not log or value > 0]
    across = axis([*xs, *(x for _, x in marks.ends)], LEFT, WIDTH - RIGHT, whole=True)
    upward = axis([*ys, *(value for _, value in levels)], HEIGHT - BOTTOM, TOP, log=log)
    drawn = [*_frame(across, upward), *_marks(marks, levels, across, upward)]
    for line in lines:
        drawn += _curve(line, across, upward)
    numbers = f"{across.low} {across.high} {upward.low} {upward.high} {int(log)}"
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}"'
        f' data-axes="{numbers}">{"".join(drawn)}</svg>'
    )


def axis(
    values: Sequence[float], start: float, stop: float, log: bool = False, whole: bool = False, most: int = 6
) -> Axis:
    """An axis that holds all values, with round numbers to label; `whole`: integers from the lowest value."""
    low, high = min(values), max(values)
    if log:
        low, high = low / 1.12, high * 1.12
        return Axis(low, high, start, stop, True, _log_ticks(low, high))
    if low == high:
        low, high = (low, low + 1) if whole else (low - abs(low or 1) * 0.1, high + abs(high or 1) * 0.1)
    elif not whole:
        room = 0.05 * (high - low)
        low, high = (max(0.0, low - room) if low >= 0 else low - room), high + room
    step = _round_step((high - low) / most)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    ticks = [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]
    return Axis(low, high, start, stop, False, ticks)


def _round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))


def _log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]


def short(value: float) -> str:
    """A number for an axis: 0.02, 350, 1.5k, 2M, 1e-5."""
    size = abs(value)
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.0e}".replace("e-0", "e-") if 0 < size < 1e-3 else f"{round(value, 10):.4g}"


def _frame(across: Axis, upward: Axis) -> list[str]:
    drawn = []
    for value in upward.ticks:
        y = upward.at(value)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(value)}</text>')
    for value in across.ticks:
        x = across.at(value)
        drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{short(value)}</text>')
    return drawn


def _marks(marks: Marks, levels: list[tuple[str, float]], across: Axis, upward: Axis) -> list[str]:
    drawn = []
    for i, (name, value) in enumerate(levels):
        y = upward.at(value)
        drawn.append(f'<line class="level l{i}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(
            f'<text class="l{i}" x="{WIDTH - RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
    for name, value in marks.ends:
        x = across.at(value)
        drawn.append(f'<line class="end" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        side, shift = ("end", -4) if x > WIDTH / 2 else ("start", 4)
        drawn.append(
            f'<text x="{x + shift:.1f}" y="{HEIGHT - BOTTOM - 9}" text-anchor="{side}">{escape(name)}</text>'
        )
    foot = HEIGHT - BOTTOM
    for value in marks.ticks:
        if across.low <= value <= across.high:
            x = across.at(value)
            drawn.append(f'<path class="tick" d="M{x:.1f} {foot - 6}l3.5 6h-7z"/>')
    return drawn


def _curve(line: Line, across: Axis, upward: Axis) -> list[str]:
    pairs = thinned(list(zip(line.xs, line.ys)))
    points = " ".join(f"{across.at(x):.1f},{upward.at(y):.1f}" for x, y in pairs)
    kind = "faint" if line.faint else "curve"
    named = f' data-name="{escape(line.name)}"' if line.name and not line.faint else ""
    drawn = [f'<polyline class="{kind} c{line.colour}" points="{points}"{named}/>']
    if len(pairs) <= 40 and not line.faint:
        drawn += [
            f'<circle class="c{line.colour}" cx="{across.at(x):.1f}" cy="{upward.at(y):.1f}" r="2.6"/>'
            for x, y in pairs
        ]
    return drawn


def thinned(pairs: list[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most about `most` points of a curve: of each stretch the lowest and the highest, in their order."""
    if len(pairs) <= most:
        return pairs
    stretch = -(-2 * len(pairs) // most)
    found = []
    for first in range(0, len(pairs), stretch):
        part = pairs[first : first + stretch]
        found += sorted({end(part, key=lambda pair: pair[1]) for end in (min, max)})
    return found


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving mean over a fifteenth of the curve."""
    half = max(1, len(values) // 30)
    spans = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(s) / len(s) for s in spans]
