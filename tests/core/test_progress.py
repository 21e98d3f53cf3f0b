"""Progress: what a terminal, a log file and a job of SLURM see of a long task."""

import io
import re

import pytest

from fastgen.core import progress
from fastgen.core.errors import warn
from fastgen.core.progress import Progress, duration, tracked, waiting


class Screen(io.StringIO):
    def __init__(self, tty):
        super().__init__()
        self.tty = tty

    def isatty(self):
        return self.tty


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def screen(monkeypatch):
    """A function that makes stderr a terminal or a file."""
    for name in ("TQDM_DISABLE", "SLURM_JOB_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)

    def make(tty):
        found = Screen(tty)
        monkeypatch.setattr("sys.stderr", found)
        return found

    return make


@pytest.mark.parametrize(
    ("tty", "environment", "style"),
    [
        (True, {}, "bar"),
        (False, {}, "lines"),
        (True, {"SLURM_JOB_ID": "7"}, "lines"),
        (True, {"TQDM_DISABLE": "1"}, "off"),
        (True, {"TQDM_DISABLE": "0"}, "bar"),
        (False, {"TQDM_DISABLE": "true"}, "off"),
        (True, {"RANK": "1"}, "off"),
        (True, {"RANK": "0"}, "bar"),
    ],
)
def test_style(tty, environment, style, screen, monkeypatch):
    screen(tty)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert progress.style() == style


def test_lines_come_at_once_then_every_half_minute_and_at_the_end(screen, clock):
    seen = screen(False)
    with Progress("dmd2 2/2", 100, always=True) as one:
        for step in range(100):
            clock[0] += 1
            one.update(1, {"student": step / 10})
    lines = seen.getvalue().splitlines()
    assert lines[0] == "dmd2 2/2: 1/100 (1%), student 0", (
        "a first step starts things too: it foretells nothing"
    )
    assert lines[1] == "dmd2 2/2: 31/100 (31%), student 3, 69 s left"
    assert lines[-1] == "dmd2 2/2: 100/100 (100%), in 2 min" and len(lines) == 5


def test_a_quick_task_is_not_shown_and_a_slow_one_is(screen, clock):
    for seconds, shown in ((0.1, False), (1.0, True)):
        seen = screen(False)
        for _ in tracked(range(4), "drawing 8 pictures", 8, 2):
            clock[0] += seconds
        assert ("drawing 8 pictures: 8/8 (100%)" in seen.getvalue()) is shown


def test_what_is_left_follows_a_change_of_pace(screen, clock):
    """A stage that first collects teacher pairs is slow, then quick."""
    screen(False)
    one = Progress("x", 400)
    for step in range(300):
        clock[0] += 10 if step < 100 else 1
        one.update()
    assert one.left(clock[0]) == pytest.approx(100, rel=0.05)
    assert one.left(clock[0]) < 1200 / 300 * 100, "the average over all"
    one.update(100)
    assert one.left(clock[0]) is None


def test_a_resumed_task_counts_from_where_it_was(screen, clock):
    seen = screen(False)
    one = Progress("x", 100, done=90, always=True)
    clock[0] += 30
    one.update(1, {"loss": 1.0})
    assert "x: 91/100 (91%), loss 1\n" in seen.getvalue() and one.left(clock[0]) is None
    clock[0] += 30
    one.update(1, {"loss": 1.0})
    assert one.left(clock[0]) == pytest.approx(240)
    assert "x: 92/100 (92%), loss 1, 4 min left" in seen.getvalue()


def test_many_updates_keep_few_moments(screen, clock):
    screen(False)
    one = Progress("x", 10_000)
    for _ in range(9_999):
        clock[0] += 1
        one.update()
    assert len(one.times) <= progress.MOST_TIMES and one.left(clock[0]) == pytest.approx(1, rel=0.01)


def test_a_bar_is_one_line_with_losses_and_the_time_left(screen, clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    seen = screen(True)
    with Progress("dmd2 2/2", 10, always=True) as one:
        clock[0] += 24
        one.update(2)
        clock[0] += 36
        one.update(3, {"student": 0.25})
        one.bar.refresh()
    text = seen.getvalue()
    assert "dmd2 2/2:  50%|" in text and "5/10, student 0.25, 60 s left" in text


def test_a_warning_stands_on_a_line_of_its_own(screen):
    seen = screen(True)
    with Progress("dmd2", 10, always=True) as one:
        one.update(5)
        warn("the disk is slow")
    assert re.search(r"[\r\n]warning: the disk is slow\n", seen.getvalue())
    seen = screen(False)
    warn("the disk is slow")
    assert seen.getvalue() == "warning: the disk is slow\n"


def test_nothing_where_it_is_switched_off(screen, monkeypatch):
    seen = screen(True)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with Progress("x", 2, always=True) as one, waiting("loading"):
        one.update(2)
    assert seen.getvalue() == ""


def test_waiting_says_what_for_and_how_long(screen, clock):
    seen = screen(False)
    with waiting("loading the teacher"):
        clock[0] += 65
    assert seen.getvalue().splitlines() == ["loading the teacher ...", "loading the teacher: 65 s"]


def test_durations():
    said = [duration(s) for s in (0.2, 99, 100, 5000, 6000, 86400 * 3 + 7200)]
    assert said == ["0 s", "99 s", "2 min", "83 min", "1 h 40 min", "3 d 2 h"]
