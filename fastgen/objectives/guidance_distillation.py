"""Guidance distillation: one pass of the student for the two of a guided teacher.

Paper: Meng et al. 2022, arXiv 2210.03142 (stage one, eq. 4); w as an input of the network as in LCM,
arXiv 2310.04378; into one LoRA, teacher and student over one frozen network: Golnari 2023, arXiv 2312.06899.

  x_t = alpha x0 + sigma eps                       t over the whole schedule; or
  x_t of the guided sampler                        trajectory_steps, without data
  w ~ U(w_min, w_max)                              student.guidance_embedding; else w = teacher.guidance
  D^w = D(x_t, t, null) + w (D(x_t, t, c) - D(x_t, t, null))
  loss = max(SNR, 1) | D^w - D_theta(x_t, t, c, w) |^2

The student keeps the teacher's sampler at half the calls: `student.sampler ode` and `num_steps` as the
teacher's. A `progressive` stage after this one halves the steps and keeps w as an input.

Differs
- w is ours: 1 is no guidance. The paper's is w - 1.
- the embedding is the one that the network's own class has (`time_cond_proj_dim`, `guidance_embeds`), zero at
  first, so that the student starts as the unguided teacher for every w.
- the LoRA paper has no public code and names no states; `trajectory_steps` takes those that sampling visits
  (arXiv 2503.07274), where noised data have the unguided marginal. `weighting: native` is its plain square.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch, Cond
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
from fastgen.objectives.requirements import Calls, Requirements, passes, remembered_calls
from fastgen.objectives.shared.remembered import Trajectories


class GuidanceDistillationConfig(ObjectiveConfig):
    """Regression on the guided teacher."""

    name: Literal["guidance_distillation"] = "guidance_distillation"
    time: TimeConfig = TimeConfig(low=0.0, high=1.0)
    """noise levels"""
    weighting: Literal["snr1", "native"] = "snr1"
    """max(SNR, 1) on x0 (the paper's), or plain squares in the network's own prediction"""
    trajectory_steps: int = Field(0, ge=0)
    """x_t are the states of the guided teacher's sampler in that many steps, without data; 0: noised data"""
    noises: int = Field(0, ge=0)
    """trajectories of each condition of the data; 0 is one"""


class GuidanceDistillation(Objective, config=GuidanceDistillationConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        def network_calls(guidance: float, num_steps: int) -> Calls:
            return {"student+grad": 1, "teacher": passes(guidance)}

        steps = cfg.trajectory_steps
        calls = remembered_calls(steps) if steps else network_calls
        return Requirements(calls, real_data=not steps, guidance_embedding=True)

    def prepare(self):
        if self.cfg.trajectory_steps:
            self.trajectories = Trajectories(self, self.cfg.trajectory_steps, self.cfg.noises or 1)

    def busy(self) -> str:
        return self.trajectories.busy() if self.cfg.trajectory_steps else ""

    def step(self, batch: Batch, k: int) -> Updates:
        with self.turn("student"):
            if self.cfg.trajectory_steps:
                x_t, t, target, _, cond = self.trajectories(batch, self.teacher)
            else:
                x_t, t, target, cond = self.noised(batch)
            pred = self.student(x_t, t, cond)
            kind = native_weighting(self.student) if self.cfg.weighting == "native" else "snr1"
            loss = losses.denoising(self.schedule, pred, target, t, kind)  # max(SNR, 1) |D^w - D_theta|^2
            yield loss, {"error": (pred - target).abs().mean()}

    def noised(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Cond]:
        """(x_t, t, D^w at x_t, the student's conditions) of noised data."""
        x0 = data_of(batch)
        w, cond = self.draw_guidance(batch)  # w ~ U(w_min, w_max)
        t = self.sample_t(len(x0), self.cfg.time).clamp(min=self.low())
        x_t = self.schedule.noise(x0, self.rng.randn_like(x0), t)
        with torch.no_grad():
            return x_t, t, guided(self.teacher, x_t, t, batch, w), cond

    def low(self) -> float:
        """The least noisy time a sampler visits: SNR is infinite at t_min of some schedules."""
        return float(self.schedule.from_unit(torch.tensor(1e-3)))
