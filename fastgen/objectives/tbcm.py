"""TBCM: sCM without data, trained on the points of the teacher's own trajectories.

Paper: TBCM 2025, arXiv 2511.20410 (its abstract; no code was out). Its loss: `scm.py`.

  x = z ~ N(0, sd^2 I) at t_0 = T;  t_1 > ... > t_{K-1}, the ordered draws of sCM's law of times
  for each t_j in turn:
    d = dx/dt = sd F_real^w(x, t_j)              one call of the guided teacher, which is sCM's tangent ...
    keep (x, t_j, d)
    x <- cos(t_j - t_{j+1}) x - sin(t_j - t_{j+1}) d      ... and the step to the next point: none is wasted
  loss = sCM's at the K points of each row

Differs
- the paper's number of points and solver are not known to us: K is `points`, the steps are DDIM's.
- a batch of B rows trains at B K points.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.core.errors import UserError
from fastgen.diffusion.reparametrization import TrigView
from fastgen.diffusion.schedules import expand
from fastgen.objectives.base import Objective, ObjectiveConfig, TimeConfig, Updates, guided, requirements_of
from fastgen.objectives.requirements import Calls, Requirements
from fastgen.objectives.scm import Point, SCMConfig, consistency_loss


class TBCMConfig(ObjectiveConfig):
    """Continuous-time consistency on the teacher's trajectories."""

    name: Literal["tbcm"] = "tbcm"
    scm: SCMConfig = SCMConfig(
        sigma_data=1.0, time=TimeConfig(kind="log_normal", mean=0.9, std=1.6), warmup_steps=4000
    )
    """the consistency loss and its law of times"""
    points: int = Field(8, ge=1)
    """points K of a trajectory, its start included; as many teacher calls"""


class TBCM(Objective, config=TBCMConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        scm = requirements_of(cfg.scm)

        def network_calls(guidance: float, num_steps: int) -> Calls:
            return {n: v * cfg.points for n, v in scm.network_calls(guidance, num_steps).items()}

        return replace(scm, network_calls=network_calls, untrained=("teacher",), real_data=False)

    def check(self):
        if self.cfg.scm.mode == "training":
            raise UserError("objective.scm.mode", "found 'training'", "use distillation: TBCM reads no data")

    def step(self, batch: Batch, k: int) -> Updates:
        w, cond = self.draw_guidance(batch)
        point = self.walk(batch, w)
        cond = {n: c.repeat(self.cfg.points, *[1] * (c.ndim - 1)) for n, c in cond.items()}
        with self.turn("student"):
            yield consistency_loss(self.cfg.scm, self, cond, point, k)

    @torch.no_grad()
    def walk(self, batch: Batch, w: float | Tensor) -> Point:
        """Points x, times t and velocities d of every row's trajectory, [K B, ...], point by point."""
        sd, view = self.cfg.scm.sigma_data, TrigView(self.schedule, self.cfg.scm.sigma_data)
        num = len(batch.noise)
        start = view.time(self.student.time(0, batch.noise))
        draws = [view.time(self.sample_t(num, self.cfg.scm.time)) for _ in range(self.cfg.points - 1)]
        times = torch.stack([start, *draws]).sort(0, descending=True).values.clamp(max=start.max())
        velocity = view.velocity(
            lambda x, tau: guided(self.teacher, x, tau, batch, w)  # F_real^w
        )
        x, points = batch.noise * sd, []
        for j, t in enumerate(times):
            d = sd * velocity(x, t)
            points.append((x, t, d))
            if j + 1 < len(times):
                gap = t - times[j + 1]
                x = expand(gap.cos(), x) * x - expand(gap.sin(), x) * d
        x, t, d = (torch.cat(parts) for parts in zip(*points))
        return x, t, d
