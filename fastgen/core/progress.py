"""How far a long task is: one bar on a terminal; in a log file, in a pipe and under SLURM plain lines, one
every so often. All of it goes to stderr, from the main process alone; TQDM_DISABLE=1 shows nothing.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeVar

Style = Literal["bar", "lines", "off"]
Item = TypeVar("Item")
EVERY = 30.0
"""seconds between two lines"""
QUICK = 2.0
"""seconds of a task below which nothing of it is shown; stages of training are always shown"""
FIRST = 2
"""reports of a task before its end is foretold"""
MOST_TIMES = 1000
"""moments that are kept of a task to foretell its end"""


def style() -> Style:
    """How progress is shown in this process."""
    if os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false") or not main_process():
        return "off"
    if "SLURM_JOB_ID" in os.environ:
        return "lines"
    return "bar" if sys.stderr.isatty() or "ipykernel" in sys.modules else "lines"


def main_process() -> bool:
    """Whether this process is the one of its run that speaks."""
    return os.environ.get("RANK", "0") == "0"


def duration(seconds: float) -> str:
    """Seconds as a person says them: "40 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


class Progress:
    """A task of `total` parts, `done` of which were there before; a context that ends it.

    always: show it even if it is quick, and leave its bar on the screen.
    """

    def __init__(self, what: str, total: int, done: int = 0, always: bool = False):
        self.what, self.total, self.done, self.always = what, total, done, always
        self.style: Style = style()
        self.note = ""
        """what the task is busy with, shown beside its counts"""
        self.values: dict[str, float] = {}
        self.started = self.last_line = time.monotonic()
        self.times = [(done, self.started)]
        self.bar = self._bar() if self.style == "bar" else None
        self.lines = 0

    def _bar(self):
        from tqdm.auto import tqdm

        return tqdm(
            total=self.total,
            initial=self.done,
            desc=self.what,
            file=sys.stderr,
            disable=False,
            mininterval=0.2,
            delay=0 if self.always else QUICK,
            leave=self.always,
            dynamic_ncols=True,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def update(self, num: int = 1, values: Mapping[str, float] | None = None) -> None:
        """`num` parts more are done; `values` (losses) replace those shown before."""
        self.done += num
        self.values |= values or {}
        now = time.monotonic()
        self._remember(now)
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(self._parts(now)), refresh=False)
            self.bar.update(num)
        elif self.style == "lines" and self._due(now):
            self._print(now)

    def _remember(self, now: float) -> None:
        self.times.append((self.done, now))
        if len(self.times) > MOST_TIMES:
            self.times = self.times[::2]

    def _due(self, now: float) -> bool:
        if self.done >= self.total:  # close() says it
            return False
        if self.lines:
            return now - self.last_line >= EVERY
        return (self.always and bool(self.values)) or now - self.started >= QUICK

    def left(self, now: float) -> float | None:
        """Seconds that the rest will take at the pace of the later half of what was done; None before there
        is one: the first part of a task also starts it (files, caches, compilation).
        """
        if len(self.times) <= FIRST:
            return None
        middle = (self.times[0][0] + self.done) / 2
        earlier = [m for m in self.times if m[0] <= middle and m[0] < self.done]
        if not earlier or self.done >= self.total:
            return None
        num, then = earlier[-1]
        return (now - then) / (self.done - num) * (self.total - self.done)

    def _parts(self, now: float) -> list[str]:
        left = self.left(now)
        said = [self.note] if self.note else []
        said += [f"{name} {value:.4g}" for name, value in self.values.items()]
        return said + ([f"{duration(left)} left"] if left is not None else [])

    def _print(self, now: float) -> None:
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        counts = f"{self.what}: {self.done:,}/{self.total:,}{share}"
        print(", ".join([counts, *self._parts(now)]), file=sys.stderr, flush=True)
        self.last_line, self.lines = now, self.lines + 1

    def close(self) -> None:
        """The task is over, or stopped where it is."""
        now = time.monotonic()
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        elif self.style == "lines" and (self.lines or self.always or now - self.started >= QUICK):
            self.values = {}
            self.note = f"in {duration(now - self.started)}"
            self._print(now)
        self.style = "off"


def tracked(items: Iterable[Item], what: str, total: int, num: int = 1) -> Iterator[Item]:
    """The items, each of which is `num` parts of a task of `total`, the last one what is left."""
    with Progress(what, total) as progress:
        for item in items:
            yield item
            progress.update(min(num, total - progress.done))


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A task that cannot be counted: its name at once, and its end where it took long."""
    show = style() != "off"
    if show:
        print(f"{what} ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    yield
    if show and (seconds := time.monotonic() - start) > QUICK:
        print(f"{what}: {duration(seconds)}", file=sys.stderr, flush=True)


def say(text: str, file=None) -> None:
    """One line (on stdout unless told) that breaks no bar which stands on the screen."""
    file = file or sys.stdout
    if "tqdm" in sys.modules and style() == "bar":
        from tqdm.auto import tqdm

        tqdm.write(text, file=file)
    else:
        print(text, file=file)
