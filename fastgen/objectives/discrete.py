"""Discretisations of the consistency family: how many intervals a grid has, and which of them are drawn."""

import math

import torch
from torch import Tensor

from fastgen import losses
from fastgen.rng import Rng
from fastgen.schedules import Schedule


def num_intervals(curriculum: str, first: int, last: int, done: float) -> int:
    """Intervals N after a share `done` of the curriculum, from first to last.

    "double": N_0 2^j in equal spans (2310.14189, Sec. 3.4); "root": CT's (2303.01469, App. C); "log":
    log-linear, the growth of the teacher's steps in multistep consistency (2403.06807).
    """
    if curriculum == "double":
        doublings = math.ceil(math.log2(last / first))
        return min(last, first * 2 ** min(doublings, int(done * (doublings + 1))))
    if curriculum == "root":
        return min(last, math.ceil(math.sqrt(done * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1)
    return round(first * (last / first) ** done)


def distance_weight(schedule: Schedule, t: Tensor, weighting: losses.Weighting | None) -> Tensor | None:
    """w(t) [B] of a distance between denoised estimates; None where there is none, which is 1."""
    return weighting and losses.error_weight(schedule, t, weighting)


def draw_intervals(
    rng: Rng, schedule: Schedule, grid: Tensor, num: int, log_normal: tuple[float, float] | None
) -> Tensor:
    """Intervals i [num] of a descending grid: evenly, or with the mass that a normal law (mean, std) of
    ln(sigma / alpha) has between the grid's times (2310.14189, Sec. 3.5).
    """
    last = len(grid) - 2
    if log_normal is None:
        return rng.randint(last + 1, num)
    mean, std = log_normal
    below = torch.erf((-schedule.log_snr(grid) - mean) / (math.sqrt(2) * std))
    mass = (below[:-1] - below[1:]).cumsum(0)
    return torch.searchsorted(mass, rng.rand(num).to(mass) * mass[-1]).clamp(max=last)
