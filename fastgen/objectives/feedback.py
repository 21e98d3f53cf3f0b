"""Reward feedback: a few-step student raised along the gradient of differentiable rewards.

Papers: ReFL, Xu et al. 2023, arXiv 2304.05977 (Alg. 1, code); on a distilled student: Hyper-SD, Ren et al.
2024, arXiv 2404.13686 (Sec. 3.2); Seedance 1.0, 2025, arXiv 2506.09113.

  start:  mean_d and std_d of each reward over samples of the student as it is
  every step:
    k ~ U{from_step .. N};  x_t by the first k - 1 steps of the student, without gradient
    D = D_theta(x_t, t, c)                                          step k alone carries gradient
    z_d = (r_d(augment(decode D), c) - mean_d) / std_d
    loss = sum_d weight_d mean relu(margin_d - z_d)  +  ref_weight mean |D - D_ref(x_t, t, c)|^2
  D_ref: the student that the stage started from

The rewards of ReFL are standardised by its authors, its margin is 2 and k one of the last ten of 40 steps
(`from_step: 31`). A student in adapter form goes on in the adapter of its distillation (`student.init`), so
that one LoRA holds both; `fastgen adapters difference` writes what was added as a LoRA of its own.

Differs
- Hyper-SD released no training code; its structure reward, an instance segmenter on noised real images whose
  masks are known, is left out for want of one.
- weights and margins are counted in standard deviations at the start, so that rewards of any scale mix.
- the regulariser and the augmentation are ours to choose: ReFL alternates with the pre-training loss in the
  paper, and has neither in the code.
- gradient goes through one step, not through several.
"""

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.core.errors import UserError
from fastgen.diffusion import losses
from fastgen.networks.rewards import KEY
from fastgen.objectives.base import Updates
from fastgen.objectives.requirements import Calls, Requirements
from fastgen.objectives.shared.rewards import Rewarded, RewardedConfig, prompts_of


class FeedbackConfig(RewardedConfig):
    """Reward feedback on a few-step student."""

    name: Literal["feedback"] = "feedback"
    from_step: int = Field(1, ge=1)
    """first of the student's steps that the gradient may pass through, counted from 1"""
    ref_weight: float = Field(0.0, ge=0)
    """weight of the squared distance to the estimate of the student that the stage started from"""
    shift: float = Field(0.0, ge=0, lt=0.5)
    """images are moved by up to this share of their side before they are judged, against reward hacking"""
    noise: float = Field(0.0, ge=0)
    """standard deviation of noise added to them, against reward hacking"""


class Feedback(Rewarded, config=FeedbackConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        def network_calls(guidance: float, num_steps: int) -> Calls:
            calls = {"student": (cfg.from_step + num_steps) / 2 - 1, "student+grad": 1.0}
            return {k: n for k, n in calls.items() if n} | ({"previous": 1.0} if cfg.ref_weight else {})

        needs = replace(super().requirements(cfg), network_calls=network_calls)
        return needs if cfg.ref_weight else replace(needs, untrained=())

    def check(self) -> None:
        super().check()
        for one in self.rewards.models:
            if not one.differentiable:
                raise UserError(KEY, f"{one.name} has no gradient", "use objective.name pso")
        num = len(self.student.times)
        if self.cfg.from_step > num:
            raise UserError("objective.from_step", f"found {self.cfg.from_step} of {num} steps", "lower it")

    def step(self, batch: Batch, k: int) -> Updates:
        cfg, num = self.cfg, len(self.student.times)
        if k == 0:
            self.calibrate(batch)
            if cfg.ref_weight:
                self.follow("previous")
        last = cfg.from_step - 1 + self.rng.shared_randint(num - cfg.from_step + 1)
        with self.turn("student"):
            x_t = self.student.states(batch.noise, batch.cond, self.rng.randn_like, last)[-1]
            t, cond = self.student.time(last, x_t), self.student.ending(batch.cond, last, x_t)
            D = self.student(x_t, t, cond)
            x = self.student.sample_at(D, x_t, last)
            r = self.rewards(self.augment(self.rewards.images(x)), prompts_of(batch))  # [num, B]
            loss, logs = self.hinge(r), self.reward_logs(r)
            if cfg.ref_weight:
                logs["reference"] = losses.mse(D, self.reference(x_t, t, cond))
                loss = loss + cfg.ref_weight * logs["reference"]
            yield loss, logs

    def hinge(self, r: Tensor) -> Tensor:
        """sum_d weight_d mean relu(margin_d - z_d) of rewards [num, B]."""
        margin = torch.tensor([one.margin for one in self.cfg.rewards], device=r.device)
        short = torch.relu(margin[:, None] - self.standardised(r))
        return (self.weight * short.mean(1)).sum()

    def augment(self, images: Tensor) -> Tensor:
        """Images moved a little, their border repeated, and noised."""
        if self.cfg.shift and images.ndim == 4:
            most = max(1, round(self.cfg.shift * images.shape[-1]))
            down, right = (self.rng.shared_randint(2 * most + 1) for _ in range(2))
            padded = F.pad(images, [most] * 4, mode="replicate")
            height, width = images.shape[-2:]
            images = padded[..., down : down + height, right : right + width]
        if self.cfg.noise:
            images = images + self.cfg.noise * self.rng.randn_like(images)
        return images
