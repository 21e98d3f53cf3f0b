"""OFTSR: restoration in one step, with a knob between what is faithful and what looks real.

Paper: Zhu et al. 2024, arXiv 2412.09465 (the distillation's own code was not released). tau there is 1 - t.

  e = sqrt(1 - p^2) c + p n, the noised picture c, is where the teacher's flow begins:  x_t = (1 - t) x0 + t e
  y_theta(e, t) = e + v_theta: the student's picture for a walk that stops at t;  x_t = (1 - t) y_theta + t e
  t ~ U[low + d, high], s = t - d;  k1 = v(x_t, t), k2 = v at the inner time, vbar = k1 + (k2 - k1) / (2 r)
  y* = sg (x_t + (s - t) vbar - s e) / (1 - s)           BOOT's target with e for its noise (2306.05544)
  loss = | y_theta(e, s) - y* |  +  boundary_weight | y_theta(e, high) - (e + v(e, high)) |
         + align_weight | y_theta(e, t) - D(x_t, t) |

The network is told t in place of its time, so that t is the fidelity of a sample: towards 1 it is the mean
of what may be (the least squared error), towards 0 the end of the teacher's walk.

Differs
- losses are of pictures: y - y* is v - v*.
- of the alignment no formula is published; this is the picture that each of the two would end at. The exact
  student does not make it zero, so its weight has to stay small.
- any teacher's schedule is walked; the flow above is the paper's. Paths of a teacher that begins at noise
  begin there, and the method is then BOOT with a time that says where the walk stops.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.core.batch import Batch, Cond, select
from fastgen.core.errors import UserError
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import expand
from fastgen.objectives.base import Objective, ObjectiveConfig, Updates
from fastgen.objectives.requirements import Calls, Requirements

INNER = {"midpoint": 0.5, "ralston": 2 / 3, "heun": 1.0}
"""where the second stage of a solver of second order is taken, as a share of its step (r)"""


class OFTSRConfig(ObjectiveConfig):
    """One-step restoration with a fidelity that is chosen when it is sampled."""

    name: Literal["oftsr"] = "oftsr"
    low: float = Field(0.01, gt=0, lt=1)
    """least fidelity that is trained"""
    high: float = Field(0.99, gt=0, le=1)
    """highest one, where the student is tied to the teacher's first estimate"""
    step: float = Field(0.05, gt=0, lt=1)
    """length d of the teacher's step"""
    solver: Literal["euler", "midpoint", "ralston", "heun"] = "midpoint"
    """of the teacher's step"""
    boundary_weight: float = Field(0.1, ge=0)
    """weight of the first estimate"""
    align_weight: float = Field(0.01, ge=0)
    """weight of the alignment with the teacher's own end, which has to stay small"""

    @model_validator(mode="after")
    def _room(self):
        if self.low + self.step >= self.high:
            found = f"found {self.step:g} between low {self.low:g} and high {self.high:g}"
            raise ValueError(f"step: {found}; give less than their distance")
        return self


class OFTSR(Objective, config=OFTSRConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        calls: Calls = {"student+grad": 3, "teacher": 2 if cfg.solver == "euler" else 3}
        return Requirements(
            lambda guidance, num_steps: calls,
            real_data=False,
            any_source=True,
            fidelity=(cfg.low, cfg.high),
            one_guidance=False,
            guidance=1.0,
            why_not_sampled=lambda num_steps, sampler: "" if num_steps == 1 else "OFTSR trains one step",
        )

    def check(self):
        first, start = self.student.times[0], self.schedule.steps(1)[0]
        if first != start:
            raise UserError("student.timesteps", f"found {first:g}", f"leave it out: the start is {start:g}")

    def step(self, batch: Batch, k: int) -> Updates:
        cfg, S, cond = self.cfg, self.schedule, batch.cond
        e = self.student.source(batch.noise, cond)
        u = cfg.low + cfg.step + (cfg.high - cfg.low - cfg.step) * self.rng.rand(len(e))
        t, s = S.from_unit(u), S.from_unit(u - cfg.step)
        high = S.from_unit(torch.full_like(u, cfg.high))
        with self.turn("student"):
            y_t, y_s, y_high = self.signal(e, torch.cat([t, s, high]), cond).chunk(3)
            with torch.no_grad():
                x_t = S.noise(y_t, e, t)
                D, x_s = self.walked(x_t, t, s, cond)
                target = (x_s - expand(S.sigma(s), e) * e) / expand(S.alpha(s), e)  # y*
                first = self.first(e, high, cond)
            distil = losses.l1(y_s, target)
            boundary = losses.l1(y_high, first)
            align = losses.l1(y_t, D)
            loss = distil + cfg.boundary_weight * boundary + cfg.align_weight * align
            yield loss, {"distil": distil, "boundary": boundary, "align": align}

    def signal(self, e: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """y_theta(e, t) for times t [n B], one after the other: the student's D at the start, told t."""
        rows = torch.arange(len(e), device=e.device).repeat(len(t) // len(e))
        x_T = (e * self.schedule.prior_std(self.student.times[0]))[rows]
        return self.student(x_T, self.student.time(0, x_T), {**select(cond, rows), "net_t": t})

    def walked(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """(the teacher's D at x, x at time s by one step of its ODE)."""
        S = self.schedule
        D = self.teacher(x, t, cond)
        k1 = S.velocity(D, S.from_x0("eps", D, x, t), t)
        if self.cfg.solver == "euler":
            return D, x + expand(s - t, x) * k1
        r = INNER[self.cfg.solver]
        inner = t + r * (s - t)
        x_r = x + expand(inner - t, x) * k1
        D_r = self.teacher(x_r, inner, cond)
        k2 = S.velocity(D_r, S.from_x0("eps", D_r, x_r, inner), inner)
        return D, x + expand(s - t, x) * (k1 + (k2 - k1) / (2 * r))

    def first(self, e: Tensor, high: Tensor, cond: Cond) -> Tensor:
        """e + v(e, high): the teacher's velocity at the start, told the highest time, walked to the end."""
        S = self.schedule
        x_T = e * S.prior_std(self.student.times[0])
        v = S.from_x0("flow", self.teacher(x_T, high, cond), x_T, high)
        return S.to_x0("flow", v, x_T, self.student.time(0, x_T))
