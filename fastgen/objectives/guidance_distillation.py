"""Guidance distillation: one pass of the student for the two of a guided teacher.

Paper: Meng et al. 2022, arXiv 2210.03142 (stage one, eq. 4); w as an input of the network as in LCM,
arXiv 2310.04378.

  x_t = alpha x0 + sigma eps                       t over the whole schedule
  w ~ U(w_min, w_max)                              student.guidance_embedding; else w = teacher.guidance
  D^w = D(x_t, t, null) + w (D(x_t, t, c) - D(x_t, t, null))
  loss = max(SNR, 1) | D^w - D_theta(x_t, t, c, w) |^2

The student keeps the teacher's sampler at half the calls: `student.sampler ode` and `num_steps` as the
teacher's. A `progressive` stage after this one halves the steps and keeps w as an input.

Differs
- w is ours: 1 is no guidance. The paper's is w - 1.
- the embedding is the one that the network's own class has (`time_cond_proj_dim`, `guidance_embeds`), zero at
  first, so that the student starts as the unguided teacher for every w.
"""

from typing import Literal

import torch

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.objectives.base import (
    Objective,
    ObjectiveConfig,
    TimeConfig,
    Updates,
    data_of,
    guided,
    native_weighting,
)
from fastgen.objectives.requirements import Requirements, passes


class GuidanceDistillationConfig(ObjectiveConfig):
    """Regression on the guided teacher."""

    name: Literal["guidance_distillation"] = "guidance_distillation"
    time: TimeConfig = TimeConfig(low=0.0, high=1.0)
    """noise levels"""
    weighting: Literal["snr1", "native"] = "snr1"
    """max(SNR, 1) on x0 (the paper's), or plain squares in the network's own prediction"""


class GuidanceDistillation(Objective, config=GuidanceDistillationConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        return Requirements(
            lambda guidance, num_steps: {"student+grad": 1, "teacher": passes(guidance)},
            guidance_embedding=True,
        )

    def step(self, batch: Batch, k: int) -> Updates:
        S, x0 = self.schedule, data_of(batch)
        w, cond = self.draw_guidance(batch)  # w ~ U(w_min, w_max)
        with self.turn("student"):
            t = self.sample_t(len(x0), self.cfg.time).clamp(min=self.low())
            x_t = S.noise(x0, self.rng.randn_like(x0), t)
            with torch.no_grad():
                target = guided(self.teacher, x_t, t, batch, w)  # D^w
            pred = self.student(x_t, t, cond)
            kind = native_weighting(self.student) if self.cfg.weighting == "native" else "snr1"
            loss = losses.denoising(S, pred, target, t, kind)  # max(SNR, 1) |D^w - D_theta|^2
            yield loss, {"error": (pred - target).abs().mean()}

    def low(self) -> float:
        """The least noisy time a sampler visits: SNR is infinite at t_min of some schedules."""
        return float(self.schedule.from_unit(torch.tensor(1e-3)))
