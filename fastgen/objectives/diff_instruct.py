"""Diff-Instruct: integral-KL distillation of any one-step generator.

Paper: Luo et al. 2023, arXiv 2305.18455 (eq. 3.4, Alg. 1). Data-free.

  every step k:
    x = G(z, c)
    if k % student_every == 0:
      x_t = alpha x + sigma eps              log(sigma / alpha) ~ N(-1.2, 1.2)
      update G with  grad = w(t) (D_fake(x_t) - D_real(x_t))    w = 1: sigma^2 / alpha on scores
    update critic with  w(t) |D_fake(x_t) - sg x|^2

G may be anything that maps noise to a sample; only the critic has to be a denoiser.

Differs
- authors: critic first, generator second, each on samples of its own; here the critic reuses the sample.
- authors sum the loss over pixels; losses here are means, which Adam's steps do not see.
- authors run both networks in train mode under one dropout mask, so that it cancels in the difference; here
  networks run in eval mode, without dropout.
- the log-normal rarely visits sigma > 10: a student far from the teacher wants `time: {kind: uniform}`.
"""

from typing import Literal

import torch
from pydantic import Field

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.objectives.base import TimeConfig, Updates, guided
from fastgen.objectives.shared.critic import Matching, MatchingConfig, diagnostics
from fastgen.roles.roles import Role


class DiffInstructConfig(MatchingConfig):
    """Integral KL without normalisation, regression or GAN."""

    name: Literal["diff_instruct"] = "diff_instruct"
    student_every: int = Field(1, ge=1)
    """critic updates per student update"""
    time: TimeConfig = TimeConfig(kind="log_normal", mean=-1.2, std=1.2)
    """noise levels of the gradient"""
    critic_time: TimeConfig = TimeConfig(kind="log_normal", mean=-1.2, std=1.2)
    """noise levels of the critic's denoising loss"""


class DiffInstruct(Matching, config=DiffInstructConfig):
    def step(self, batch: Batch, k: int, teacher: Role | None = None) -> Updates:
        cfg, teacher = self.cfg, teacher or self.teacher
        last = self.rng.shared_randint(len(self.student.times))
        if k % cfg.student_every == 0:
            with self.turn("student"):
                x = self.generate(batch, last)  # x = G(z, c)
                t, x_t = self.noised(x, cfg.time)  # x_t = alpha x + sigma eps
                with torch.no_grad():
                    real = guided(teacher, x_t, t, batch, self.guidance)  # D_real
                    fake = self.critic(x_t, t, batch.cond)  # D_fake
                loss = losses.score_difference(x, real, fake)  # grad = D_fake - D_real
                yield loss, diagnostics(x, real, fake)
        else:
            with torch.no_grad():
                x = self.generate(batch, last)
        yield from self.critic_turn(batch, x)  # w(t) |D_fake - sg x|^2
