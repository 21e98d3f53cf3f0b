"""DMD: distribution matching distillation with a regression loss on teacher pairs (version 1).

Paper: Yin et al. 2023, arXiv 2311.18828 (Alg. 1; eq. 7-9). No official code.

  once per condition:  pair (z_ref, y): y is the end of the guided ODE from z_ref
  every step:
    x = G(z, c);  x_ref = G(z_ref, c)
    x_t = alpha x + sigma eps                t ~ U(0.02, 0.98)
    grad = (D_fake(x_t) - D_real^w(x_t)) / mean|x - D_real^w|              (eq. 7-8)
    update G with  0.5 |x - sg[x - grad]|^2 + regression_weight d(x_ref, y)            (eq. 9, weight 0.25)
    update critic with  w(t) |D_fake(x_t) - sg x|^2                        (eq. 6)

Differs
- paper: d is LPIPS on decoded images; no perceptual network is bundled, so d is the square or a pseudo-Huber
  on x0, and its best weight is another one.
- paper stores the pairs in advance; here a pair is made when its condition is first met (`data.limit` says
  how many there are).
- the student has one step: a pair holds the teacher's state at every time of a longer list, and the
  regression draws one of them.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.objectives.base import Updates, guided
from fastgen.objectives.ode_pairs import Pairs
from fastgen.objectives.requirements import Calls, Requirements, passes
from fastgen.objectives.shared.critic import Matching, MatchingConfig, diagnostics
from fastgen.roles.roles import Role


class DMDConfig(MatchingConfig):
    """Distribution matching distillation, version 1."""

    name: Literal["dmd"] = "dmd"
    student_every: int = Field(1, ge=1)
    """critic updates per student update"""
    regression_weight: float = Field(0.25, ge=0)
    """weight of the regression on teacher pairs; 0 makes none"""
    regression: Literal["l2", "huber"] = "l2"
    """distance between the student's output and the pair's end point"""
    teacher_steps: int = Field(20, ge=1)
    """ODE steps a pair costs; the student's times after the first lie on this grid"""


class DMD(Matching, config=DMDConfig):
    pairs: Pairs

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        needs = super().requirements(cfg)
        if not cfg.regression_weight:
            return needs

        def network_calls(guidance: float, num_steps: int) -> Calls:
            calls = needs.network_calls(guidance, num_steps)
            with_pairs = round(calls["student+grad"] + 1 / cfg.student_every, 3)
            pairs = cfg.teacher_steps * passes(guidance)
            return calls | {"student+grad": with_pairs, "teacher (first epoch)": pairs}

        return replace(needs, network_calls=network_calls)

    def prepare(self) -> None:
        if self.cfg.regression_weight:
            self.pairs = Pairs(self, self.cfg.teacher_steps)

    def busy(self) -> str:
        return self.pairs.busy() if self.cfg.regression_weight else ""

    def step(self, batch: Batch, k: int, teacher: Role | None = None) -> Updates:
        cfg, teacher = self.cfg, teacher or self.teacher
        last = self.rng.shared_randint(len(self.student.times))
        if k % cfg.student_every == 0:
            with self.turn("student"):
                x = self.generate(batch, last)  # x = G(z, c)
                t, x_t = self.noised(x, cfg.time)  # x_t = alpha x + sigma eps
                with torch.no_grad():
                    real = guided(teacher, x_t, t, batch, self.guidance)  # D_real^w
                    fake = self.critic(x_t, t, batch.cond)  # D_fake
                loss = dm = losses.distribution_matching(x, real, fake)  # eq. 7-8
                logs = {"dm": dm, **diagnostics(x, real, fake)}
                if cfg.regression_weight:
                    rows = self.pairs(batch, teacher)  # the states from z_ref to y
                    x_ref = self.student(rows[:, last], self.student.time(last, rows), batch.cond)
                    logs["regression"] = self.distance(x_ref, rows[:, -1])  # d(G(z_ref, c), y)
                    loss = dm + cfg.regression_weight * logs["regression"]  # eq. 9
                yield loss, logs
        else:
            with torch.no_grad():
                x = self.generate(batch, last)
        x = x.detach()
        with self.turn("critic"):
            t, x_t = self.noised(x, cfg.critic_time)
            fake = self.critic(x_t, t, batch.cond)  # D_fake
            loss = self.denoising_loss(fake, x, t)  # w(t) |D_fake - sg x|^2 (eq. 6)
            yield loss, {"denoising": loss, **self.critic_error(fake, x, x_t, t, batch.cond)}

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """d(x, y) of the regression."""
        if self.cfg.regression == "l2":
            return losses.mse(x, y)
        return losses.sample_huber(x, y, 0.00054 * x[0].numel() ** 0.5)
