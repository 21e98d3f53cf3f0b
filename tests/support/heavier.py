"""Cases of a test that run by default, and those that only `pytest -m slow` runs."""

from collections.abc import Iterable

import pytest


def first_of(values: Iterable, keep: int = 1) -> list:
    """Parameters of which the first `keep` run by default."""
    return [v if i < keep else pytest.param(v, marks=pytest.mark.slow) for i, v in enumerate(values)]


def some_of(values: Iterable, kept: Iterable) -> list:
    """Tuples of parameters of which those in `kept` run by default."""
    chosen = list(kept)
    return [v if v in chosen else pytest.param(*v, marks=pytest.mark.slow) for v in values]
