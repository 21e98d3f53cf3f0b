"""Refusal of runs that cannot work or would not end, by an estimate of memory and time, before they start."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from fastgen.config.sections import EvalConfig, TrainConfig
from fastgen.core.errors import UserError
from fastgen.training.cast import Cast
from fastgen.training.memory import GIB, estimate, network_calls

SLACK = 2.0
"""memory is refused from this multiple of what the machine has: the estimate of activations is rough"""
LARGE_BATCH = 256
"""a batch from which the estimate is worth its pass through the network"""
DAYS = 100
PASS_SECONDS = 2e-3
"""one network pass of the smallest network, by which counts are turned into a time"""


def check_limits(cast: Cast, train: TrainConfig, measured: EvalConfig, step_keys: Sequence[str]) -> None:
    """Raises a UserError naming the count to lower where a run needs far more memory than there is, or more
    than a hundred days; `cast` may be on the meta device. `step_keys`: what sets the length of each stage.
    """
    key, needed = _host_memory(cast, measured, bool(train.validation_steps))
    available = memory("cpu")
    _refuse(key, needed, available)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if train.train_batch_size > LARGE_BATCH:
        with suppress(NotImplementedError):  # a method from elsewhere that counts no passes
            _refuse("train.train_batch_size", estimate(cast, train).total, memory(device))
    for name, seconds in _times(cast, train, measured, step_keys).items():
        if seconds > DAYS * 86_400:
            found = f"about {seconds / 86_400:,.0f} days or more"
            raise UserError(name, found, "lower it, or pass --insist to start all the same")


def memory(device: str) -> float:
    """Bytes of memory that a device has in all."""
    import psutil

    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().total


def _refuse(key: str, needed: float, available: float) -> None:
    if needed > SLACK * available:
        found = f"needs about {needed / GIB:,.0f} GiB of memory of the {available / GIB:,.0f} there are"
        raise UserError(key, found, "lower it, or pass --insist to start all the same")


def _host_memory(cast: Cast, measured: EvalConfig, validates: bool) -> tuple[str, float]:
    """(key, bytes) of the largest set of images that is held at once; each as float32 pixels of what the
    teacher decodes, at least as many as its x0 has numbers.
    """
    codec: Any = cast.teacher.codec
    numbers = math.prod(codec.shape)
    pixels = getattr(codec, "pixels", None)
    if pixels:
        numbers = max(numbers, 3 * pixels[0] * pixels[1])
    counts = {
        "eval.num_samples": measured.num_samples,
        "eval.teacher_samples": measured.teacher_samples,
        "eval.validation_samples": measured.validation_samples * validates,
        "eval.grid": measured.grid,
    }
    key = max(counts, key=lambda k: counts[k])
    return key, 4.0 * numbers * counts[key]


def _times(
    cast: Cast, train: TrainConfig, measured: EvalConfig, step_keys: Sequence[str]
) -> dict[str, float]:
    """Seconds by the key that decides them, at a network pass as quick as they come."""
    found, last, own = {}, cast.stages[-1], cast.student_cfg.num_steps
    teacher_steps = cast.teacher_cfg.num_steps
    for key, stage in zip(step_keys, cast.stages, strict=True):
        passes = 0.0
        with suppress(NotImplementedError):
            passes = sum(network_calls(cast, stage, own).values())
        windows = stage.max_train_steps * train.gradient_accumulation_steps
        found[key] = max(1.0, passes) * windows * PASS_SECONDS
    few = last.num_steps or own
    for key, num, steps in (
        ("eval.num_samples", measured.num_samples, few),
        ("eval.teacher_samples", measured.teacher_samples or measured.num_samples, teacher_steps),
        ("eval.student_steps", measured.num_samples, sum(measured.student_steps)),
        ("teacher.num_steps", 1, teacher_steps),
    ):
        found[key] = num / measured.batch_size * steps * PASS_SECONDS
    return found
