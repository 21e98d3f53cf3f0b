"""Scale distillation: super-resolution in one step, learned from a teacher that is shown an easier picture.

Paper: Noroozi et al. 2024 (YONOS-SR), arXiv 2401.17258.

  x0;  c the picture of factor 2n, c' that of factor n, both of x0 (c is c' halved again)
  t = T with probability p, else t ~ p(t);  x_t = alpha_t x0 + sigma_t eps
  loss = w(t) | D_teacher(x_t, t, c') - D_theta(x_t, t, c) |^2

Since c follows from c', E[ E[x0 | x_t, c'] | x_t, c ] = E[x0 | x_t, c]: the best student is the one that the
data itself would train, and its targets scatter less. A student of factor 2n teaches the one of 4n.

Differs
- the decoder is not fine-tuned on the student's latents afterwards.
- p at the last time and the settings are ours: the paper's are not published.
- `target: data` is the plain loss to x0, the paper's baseline.
"""

from typing import Literal

import torch
from pydantic import Field

from fastgen.core.batch import Batch, milder
from fastgen.diffusion import losses
from fastgen.objectives.base import Objective, ObjectiveConfig, TimeConfig, Updates, data_of, native_weighting
from fastgen.objectives.requirements import Calls, Requirements


class ScaleDistillationConfig(ObjectiveConfig):
    """From a milder degradation to a stronger one."""

    name: Literal["scale_distillation"] = "scale_distillation"
    target: Literal["teacher", "data"] = "teacher"
    """learn what the teacher makes of the milder picture, or the original itself"""
    time: TimeConfig = TimeConfig(low=0.0, high=1.0)
    """noise levels"""
    last_time: float = Field(0.5, ge=0, le=1)
    """share of the samples at the first time of the student's steps, where one step begins"""
    weighting: Literal["auto", "x0", "eps", "v", "flow", "edm"] = "x0"
    """loss weight in x0 space; auto regresses the native prediction"""


class ScaleDistillation(Objective, config=ScaleDistillationConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        taught = cfg.target == "teacher"
        calls: Calls = {"student+grad": 1, "teacher": 1} if taught else {"student+grad": 1}
        return Requirements(
            lambda guidance, num_steps: calls,
            untrained=("teacher",) if taught else (),
            degraded=True,
            one_guidance=False,
            guidance=1.0,
        )

    def step(self, batch: Batch, k: int) -> Updates:
        x0 = data_of(batch)
        with self.turn("student"):
            t = self.sample_t(len(x0), self.cfg.time)
            last = torch.full_like(t, self.student.times[0])
            t = torch.where(self.rng.rand(len(x0)).to(t.device) < self.cfg.last_time, last, t)
            x_t = self.schedule.noise(x0, self.rng.randn_like(x0), t)  # one x_t for both
            target = x0
            if self.cfg.target == "teacher":
                with torch.no_grad():
                    target = self.teacher(x_t, t, milder(batch.cond))
            D = self.student(x_t, t, batch.cond)
            weighting = native_weighting(self.student) if self.cfg.weighting == "auto" else self.cfg.weighting
            loss = losses.denoising(self.schedule, D, target, t, weighting)
            yield loss, {"error": (D - x0).abs().mean()}
