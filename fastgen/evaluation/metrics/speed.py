"""Seconds per sample of several samplers, side by side so that a busy machine slows all alike; latency of one
call; peak memory.
"""

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fastgen.evaluation.metrics.estimate import Estimate, without_interval
from fastgen.evaluation.metrics.metric import Metric


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


@dataclass
class Latency:
    """Seconds of one call over its repeats: median, 95th percentile, least and mean."""

    p50: float
    p95: float
    least: float
    mean: float
    repeats: int

    def as_dict(self) -> dict[str, float]:
        """For results.json."""
        return asdict(self)


def latency(call: Callable[[], object], repeats: int = 10, warm_up: int = 2) -> Latency:
    """Of a call that makes one batch; the first `warm_up` calls are not timed."""
    for _ in range(warm_up):
        call()
    times = torch.tensor([seconds(call) for _ in range(repeats)], dtype=torch.float64)
    p50, p95 = (float(torch.quantile(times, q)) for q in (0.5, 0.95))
    return Latency(p50, p95, float(times.min()), float(times.mean()), repeats)


def peak_memory(call: Callable[[], object], every: float = 0.005) -> float:
    """Megabytes that a call needs at its peak: on a GPU what it had allocated; on the CPU how far the process
    grew, looked at `every` so many seconds (the system's own peak also counts what was before the call).
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() / 2**20
    import psutil

    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(every):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return (max(peak, process.memory_info().rss) - before) / 2**20


def nfe(num_steps: int, guidance: float = 1.0) -> int:
    """Network evaluations of one sample; guidance needs two a step unless w is 0 or 1."""
    return num_steps * (1 if guidance in (0, 1) else 2)


# -- by name
@dataclass
class Generator:
    """What draws samples. call: draws a batch; num: its samples; nfe: network calls of one sample."""

    call: Callable[[], object]
    num: int
    nfe: int
    repeats: int = 10
    _timed: list[Latency] = field(default_factory=list)

    def timed(self) -> Latency:
        """Of its call, measured once for all metrics that ask."""
        if not self._timed:
            self._timed.append(latency(self.call, self.repeats))
        return self._timed[0]


def _of_generator(score: Callable[[Generator], float]) -> Callable[[Any, str], Estimate]:
    return lambda material, encoder: without_interval(score(material.generator))


def _metric(name: str, what: str, score: Callable[[Generator], float]) -> Metric:
    return Metric(name, what, "lower", "own", _of_generator(score), ("generator",), "", 1, "any")


METRICS = (
    _metric("nfe", "network calls of a sample", lambda g: float(g.nfe)),
    _metric("latency", "seconds of a batch, median after warm-up", lambda g: g.timed().p50),
    _metric("latency_p95", "seconds of a batch, 95th percentile", lambda g: g.timed().p95),
    _metric(
        "seconds_per_sample", "mean seconds of a batch over its samples", lambda g: g.timed().mean / g.num
    ),
    _metric("peak_memory", "megabytes that a batch needs at its peak", lambda g: peak_memory(g.call)),
)
