"""Signals that ask a process to stop: SIGTERM, SIGHUP, SIGINT (Ctrl-C) and SIGUSR1.

Where work would be lost the request is noted and obeyed at the next safe point (`deferred`, `check`); where
nothing is lost it is obeyed at once. A second Ctrl-C always stops at once.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

REQUEUE = 75
"""exit code of a process that stopped on request and can go on later (EX_TEMPFAIL of sysexits.h)"""
NAMES = ("SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1")


class Stopped(BaseException):
    """Raised where a signal stops the process; carries its name. Not an Exception, so that no handler
    catches it by accident.
    """


class _State:
    name = ""
    """signal that was received"""
    immediate = True
    """whether it is obeyed wherever it arrives"""


_state = _State()


def _receive(number: int, frame) -> None:
    if _state.name and number == signal.SIGINT:
        raise KeyboardInterrupt
    if _state.name:
        return
    _state.name = signal.Signals(number).name
    if _state.immediate:
        raise Stopped(_state.name)
    with suppress(OSError):  # print is not safe inside a signal handler
        os.write(2, f"\n{_state.name}: stopping at the next safe point; Ctrl-C stops at once\n".encode())


@contextmanager
def handled() -> Iterator[None]:
    """Receive the signals until the end of the block. A signal that the process was started to ignore
    (nohup, a shell's background jobs) stays ignored; outside the main thread nothing changes.
    """
    _state.name, _state.immediate = "", True
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, n) for n in NAMES if hasattr(signal, n)):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, _receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _state.name, _state.immediate = "", True


def requested() -> str:
    """Name of the signal received so far, or nothing."""
    return _state.name


def check() -> None:
    """A safe point: raises Stopped if a signal was received."""
    if _state.name:
        raise Stopped(_state.name)


@contextmanager
def _mode(immediate: bool) -> Iterator[None]:
    before, _state.immediate = _state.immediate, immediate
    try:
        if immediate:
            check()
        yield
    finally:
        _state.immediate = before


def deferred():
    """Context in which signals wait for the next safe point."""
    return _mode(False)


def at_once():
    """Context in which nothing would be lost: a signal, also one that waits, raises Stopped right away."""
    return _mode(True)
