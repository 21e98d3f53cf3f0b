"""Hybrid sampling: the base model takes the first steps, its few-step student the rest.

Paper: Gandikota & Bau 2025, arXiv 2503.10637. What a picture is of is decided at the highest noise; there the
base model keeps the variety that a student has lost, and the student is nearly as good at all that follows.
Nothing is trained.

  base:     x at the first time, by guided ODE steps along its own grid, the last one exactly to tau
  student:  its steps i_s .. N_s - 1 from x at tau, tau being the time of its step i_s

Differs
- the authors hand over at the base step nearest to tau, so that the student may read a wrong time (with four
  base steps theirs takes none at all); here the last base step ends on tau.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError
from fastgen.roles.roles import Role, Student
from fastgen.sampling.solvers import ImageNoise, teacher_grid


@dataclass(frozen=True)
class Handover:
    """Where the base model stops and the student goes on."""

    base_times: tuple[float, ...]
    """of the base model's steps and, last, the time at which they end: all in its own schedule"""
    start: int
    """i_s, the student's first step; its number of steps where the base model takes all"""
    scale: float
    """x of the student's schedule over x of the base model's, at the same signal-to-noise ratio"""

    @property
    def base_steps(self) -> int:
        return max(len(self.base_times) - 1, 0)

    def nfe(self, student: Student, w: float) -> int:
        """Network evaluations of one sample, guided at w while the base model draws."""
        return self.base_steps * (1 if w in (0, 1) else 2) + len(student.times) - self.start


def handover(base: Role, student: Student, num_steps: int, start: int) -> Handover:
    """The base model on its grid of num_steps down to the time of the student's step `start`: with 0 the
    student draws alone, with its number of steps the base model does.
    """
    total = len(student.times)
    if not 0 <= start <= total:
        raise UserError("--handover", f"found {start}", f"give 0 to {total}: the student takes {total} steps")
    if start == 0:
        return Handover((), 0, 1.0)
    if num_steps < 1:
        raise UserError("--base_steps", f"found {num_steps}", "give 1 or more")
    own, grid = base.schedule, teacher_grid(base.schedule, num_steps)
    if start == total:
        return Handover(tuple(grid), start, 1.0)
    tau = torch.tensor([student.times[start]], dtype=torch.float64)
    u, c = student.schedule.map_to(own, tau)
    end = float(u) if own is not student.schedule else float(tau)
    scale = 1 / float(c) if own is not student.schedule else 1.0
    return Handover((*(t for t in grid if t > end + 1e-9), end), start, scale)


def walk_base(
    base: Role, noise: Tensor, cond: Cond, uncond: Cond, times: tuple[float, ...], w: float
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """(time, D there, x at the following time) of each guided Euler step along `times`, from unit noise."""
    S = base.schedule
    x = base.source(noise, cond) * S.prior_std(times[0])
    for first, second in zip(times, times[1:]):
        t = torch.full((len(x),), first, dtype=torch.float64, device=x.device)
        D = base.guided(x, t, cond, uncond, w)
        x = D if second <= S.t_min else S.ode_step(D, x, t, torch.full_like(t, second))
        yield first, D, x


@torch.no_grad()
def estimates(
    base: Role | None,
    student: Student | None,
    plan: Handover,
    seeds: list[int],
    shape: tuple[int, ...],
    cond: Cond,
    uncond: Cond,
    w: float,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[str, float, Tensor]]:
    """(who, time, denoised estimate [B, ...]) of every step, one seed per image; the last is the sample.

    base may be None where it takes no step, student where it takes none.
    """
    noise = ImageNoise(seeds, shape, device)
    x = noise.first
    if plan.base_steps:
        assert base is not None, "the base model has steps to take"
        for time, D, x_u in walk_base(base, noise.first, cond, uncond, plan.base_times, w):
            x = x_u
            yield "base", time, D
    if student is None or plan.start == len(student.times):
        return
    S, times = student.schedule, student.times[plan.start :]
    tail = student.with_times(times)
    x_t = x * plan.scale if plan.base_steps else student.source(x, cond) * S.prior_std(times[0])
    for i, time in enumerate(times):
        t = tail.time(i, x_t)
        D = tail(x_t, t, tail.ending(cond, i, x_t))
        last = i + 1 == len(times)
        if last and tail.sampler == "tcd":
            D = S.ode_step(D, x_t, t, torch.full_like(t, S.t_min))
        yield "student", time, D
        if not last:
            x_t = tail.between(D, x_t, t, tail.time(i + 1, x_t), noise)


@torch.no_grad()
def sample_hybrid(
    base: Role,
    student: Student,
    plan: Handover,
    seeds: list[int],
    shape: tuple[int, ...],
    cond: Cond,
    uncond: Cond,
    w: float = 1.0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """x0 [B, ...] of the hybrid, one seed per image."""
    *_, (_, _, x0) = estimates(base, student, plan, seeds, shape, cond, uncond, w, device)
    return x0
