"""A method kept out of tree: train.py --plugin examples/denoiser_kd.py --objective.name denoiser_kd

Knowledge distillation of the denoiser itself (Hinton et al. 2015, arXiv 1503.02531, with D for the logits):

  x_t = alpha x0 + sigma eps,  t ~ the config's times;   loss = |D_theta(x_t) - D_teacher^w(x_t)|^2

Differs
- the paper distils classifiers. Here it folds guidance into the weights: the student needs one call where the
  guided teacher needs two, and is sampled with as many steps as before.
"""

from typing import Literal

import torch

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.objectives.base import Objective, ObjectiveConfig, TimeConfig, Updates, guided
from fastgen.objectives.requirements import Requirements, passes


class DenoiserKDConfig(ObjectiveConfig):
    """Match the guided teacher's D with one call."""

    name: Literal["denoiser_kd"] = "denoiser_kd"
    time: TimeConfig = TimeConfig()
    """noise levels"""


class DenoiserKD(Objective, config=DenoiserKDConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        return Requirements(
            lambda guidance, num_steps: {"student+grad": 1, "teacher": passes(guidance)}, few_step=False
        )

    def step(self, batch: Batch, k: int) -> Updates:
        t, S = self.sample_t(len(batch.x0), self.cfg.time), self.schedule
        x_t = S.noise(batch.x0, batch.noise, t)  # x_t = alpha x0 + sigma eps
        with torch.no_grad():
            target = guided(self.teacher, x_t, t, batch, self.guidance)  # D_teacher^w
        with self.turn("student"):
            yield losses.mse(self.student(x_t, t, batch.cond), target), {}  # |D_theta - D_teacher^w|^2
