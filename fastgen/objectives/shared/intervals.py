"""Discretisations of the consistency family: how many intervals a grid has, which of them are drawn, and what
the methods share whose grid falls into segments.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.core.rng import Rng
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import Schedule
from fastgen.objectives.base import Objective, ObjectiveConfig
from fastgen.objectives.requirements import Calls, DiscriminatorSpec, Requirements, passes


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


def check_segments(cfg, num: int, key: str = "segments"):
    """Validator of configs with segments: they must divide a grid of num steps."""
    if num % cfg.segments:
        raise ValueError(f"{key}: {cfg.segments} segments do not divide a grid of {num} steps; use a divisor")
    return cfg


def unfit_segments(grid: int, segments: int, num_steps: int, sampler: str) -> str:
    """Why a student trained on the segments of a grid cannot be sampled so; empty if it can."""
    if num_steps > grid:
        return f"the grid it is trained on has {grid} steps"
    if segments > 1 and sampler == "renoise":
        return f"trained to land at the ends of {segments} segments, not at data: use student.sampler ode"
    if num_steps % segments:
        return f"trained on {segments} segments: use a multiple of {segments}"
    return ""


class SolverGridConfig(ObjectiveConfig):
    """A consistency loss between neighbours on the grid of the teacher's solver."""

    grid_steps: int = Field(40, ge=1)
    """steps K of the solver's grid; the student is sampled in any fitting number up to it"""
    weighting: losses.Weighting | None = None
    """w(t) of the consistency loss; null is 1, as in the papers"""
    target_decay: float = Field(0.0, ge=0, lt=1)
    """EMA decay of the target network; 0 uses the student itself"""


class OnSolverGrid(Objective):
    """A method with these settings."""

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        moving = cfg.target_decay > 0

        def network_calls(guidance: float, num_steps: int) -> Calls:
            return {"student+grad": 1, ("target" if moving else "student"): 1, "teacher": passes(guidance)}

        return Requirements(
            network_calls,
            untrained=("teacher", "target") if moving else ("teacher",),
            grid_steps=cfg.grid_steps,
            why_not_sampled=partial(unfit_segments, cfg.grid_steps, 1),
        )


class SegmentedConfig(SolverGridConfig):
    """The same inside the segments of the grid, and a GAN on the noised predictions."""

    segments: int = Field(8, ge=1)
    """segments of the grid, which they must divide"""
    gan_weight: float = Field(0.0, ge=0)
    """weight of the adversarial loss; 0 drops the discriminator"""
    gan_loss: Literal["hinge", "softplus"] = "hinge"
    """form of the adversarial pair"""
    disc_taps: tuple[int, ...] = ()
    """teacher features the heads read, by index; empty takes the family's default"""

    @model_validator(mode="after")
    def _divides(self):
        return check_segments(self, self.grid_steps)


class Segmented(OnSolverGrid):
    """A method with these settings."""

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        needs = super().requirements(cfg)
        needs = replace(needs, why_not_sampled=partial(unfit_segments, cfg.grid_steps, cfg.segments))
        if not cfg.gan_weight:
            return needs

        def network_calls(guidance: float, num_steps: int) -> Calls:
            return needs.network_calls(guidance, num_steps) | {"features+grad": 1, "features": 2}

        return replace(
            needs,
            network_calls=network_calls,
            players={"student": ("student",), "disc": ("disc",)},
            auxiliaries={"disc": DiscriminatorSpec(taps=cfg.disc_taps)},
        )
