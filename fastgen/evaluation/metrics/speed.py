"""Seconds per sample of several samplers, side by side so that a busy machine slows all alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    _synchronise()
    start = time.perf_counter()
    call()
    _synchronise()
    return time.perf_counter() - start


def interleaved(
    calls: Mapping[str, Callable[[], object]], num_images: int, repeats: int = 3
) -> dict[str, float]:
    """Median seconds per image of calls that make num_images each; the first round only warms up."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call) / num_images)
    return {name: statistics.median(found) for name, found in times.items()}


def nfe(num_steps: int, guidance: float = 1.0) -> int:
    """Network evaluations of one sample; guidance needs two a step unless w is 0 or 1."""
    return num_steps * (1 if guidance in (0, 1) else 2)
