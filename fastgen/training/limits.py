"""Refusal of runs that cannot work or would not end, by an estimate of memory and time, before they start."""

import math
from contextlib import suppress
from typing import Any

import torch

from fastgen.config.run import RunConfig
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


def check_limits(cfg: RunConfig, cast: Cast, insist: bool = False) -> None:
    """Raises a UserError naming the count to lower where a run needs far more memory than there is, or more
    than a hundred days; `cast` may be on the meta device.
    """
    if insist:
        return
    key, needed = _host_memory(cfg, cast)
    available = memory("cpu")
    _refuse(key, needed, available)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.train.train_batch_size > LARGE_BATCH:
        with suppress(NotImplementedError):  # a method from elsewhere that counts no passes
            _refuse("train.train_batch_size", estimate(cfg, cast).total, memory(device))
    for name, seconds in _times(cfg).items():
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


def _host_memory(cfg: RunConfig, cast: Cast) -> tuple[str, float]:
    """(key, bytes) of the largest set of images that is held at once; each as float32 pixels of what the
    teacher decodes, at least as many as its x0 has numbers.
    """
    codec: Any = cast.teacher.codec
    numbers = math.prod(codec.shape)
    pixels = getattr(codec, "pixels", None)
    if pixels:
        numbers = max(numbers, 3 * pixels[0] * pixels[1])
    counts = {
        "eval.num_samples": cfg.eval.num_samples,
        "eval.teacher_samples": cfg.eval.teacher_samples,
        "eval.validation_samples": cfg.eval.validation_samples * bool(cfg.train.validation_steps),
        "eval.grid": cfg.eval.grid,
    }
    key = max(counts, key=lambda k: counts[k])
    return key, 4.0 * numbers * counts[key]


def _times(cfg: RunConfig) -> dict[str, float]:
    """Seconds by the key that decides them, at a network pass as quick as they come."""
    found, last = {}, cfg.all_stages()[-1]
    for i, stage in enumerate(cfg.all_stages()):
        key = f"stages.{i}.max_train_steps" if cfg.stages else "train.max_train_steps"
        passes = 0.0
        with suppress(NotImplementedError):
            passes = sum(network_calls(cfg, stage, cfg.student.num_steps).values())
        windows = stage.max_train_steps * cfg.train.gradient_accumulation_steps
        found[key] = max(1.0, passes) * windows * PASS_SECONDS
    few = last.num_steps or cfg.student.num_steps
    for key, num, steps in (
        ("eval.num_samples", cfg.eval.num_samples, few),
        ("eval.teacher_samples", cfg.eval.teacher_samples or cfg.eval.num_samples, cfg.teacher.num_steps),
        ("eval.student_steps", cfg.eval.num_samples, sum(cfg.eval.student_steps)),
        ("teacher.num_steps", 1, cfg.teacher.num_steps),
    ):
        found[key] = num / cfg.eval.batch_size * steps * PASS_SECONDS
    return found
