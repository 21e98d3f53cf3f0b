"""rCM: continuous-time consistency regularised by score distillation.

Paper: Zheng et al. 2025, arXiv 2510.08431 (NVlabs/rcm). Its parts: `scm.py` and `critic.py`.

  steps k < warmup_steps: sCM alone; then every student_every-th step:
    L_sCM as in scm.py                                     forward divergence: covers the data, diverse
    x = G(z, c), n steps of the student's list, gradient through the last
    x_t = alpha x + sigma eps
    L_DM: grad = (D_fake(x_t) - D_real^w(x_t)) / mean|x - D_real^w|     reverse divergence: sharp
    update G with  scm_weight L_sCM + dm_weight L_DM
  every step after the warm-up: update critic with w(t) |D_fake(x_t) - sg x|^2

Differs
- authors weigh the two 100 : 1 with losses summed over elements, no learned weight and no 1/s; here both are
  means, w(t) and 1/s as in scm.py, and the weights are of the means.
- authors take the critic's step in place of the student's; here the critic moves on every step after the
  warm-up and reuses the sample where there is one.
- backward simulation walks the student's own list; authors draw intermediate times at random.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.objectives.base import TimeConfig, Updates, guided, requirements_of
from fastgen.objectives.requirements import Calls, Requirements
from fastgen.objectives.scm import SCMConfig, consistency_loss, noised_point
from fastgen.objectives.shared.critic import Matching, MatchingConfig, diagnostics
from fastgen.roles.roles import Role


class RCMConfig(MatchingConfig):
    """sCM and distribution matching together."""

    name: Literal["rcm"] = "rcm"
    scm: SCMConfig = SCMConfig(
        sigma_data=1.0, time=TimeConfig(kind="log_normal", mean=0.7, std=1.6), warmup_steps=1000
    )
    """the consistency loss; its warmup_steps are also those before distribution matching begins"""
    scm_weight: float = Field(1.0, ge=0)
    """weight of the consistency loss"""
    dm_weight: float = Field(0.1, ge=0)
    """weight of the distribution-matching loss; 0 leaves it and the critic out"""


class RCM(Matching, config=RCMConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        needs, scm = super().requirements(cfg), requirements_of(cfg.scm)

        def network_calls(guidance: float, num_steps: int) -> Calls:
            r, found = 1 / cfg.student_every, needs.network_calls(guidance, num_steps)
            calls = scm.network_calls(guidance, num_steps)
            return {n: round(found.get(n, 0) + r * calls.get(n, 0), 3) for n in {**found, **calls}}

        return replace(
            needs,
            network_calls=network_calls if cfg.dm_weight else scm.network_calls,
            players={**scm.players, **({"critic": ("critic",)} if cfg.dm_weight else {})},
            auxiliaries=scm.auxiliaries,
            real_data=True,
        )

    def step(self, batch: Batch, k: int, teacher: Role | None = None) -> Updates:
        cfg, teacher = self.cfg, teacher or self.teacher
        matched = cfg.dm_weight > 0 and k >= cfg.scm.warmup_steps
        last = self.rng.shared_randint(len(self.student.times))
        x = None
        if not matched or k % cfg.student_every == 0:
            with self.turn("student"):
                point = noised_point(cfg.scm, self, batch, self.guidance, teacher)
                scm, logs = consistency_loss(cfg.scm, self, batch.cond, point, k)
                loss = cfg.scm_weight * scm
                if matched:
                    x = self.generate(batch, last)  # x = G(z, c)
                    t, x_t = self.noised(x, cfg.time)  # x_t = alpha x + sigma eps
                    with torch.no_grad():
                        real = guided(teacher, x_t, t, batch, self.guidance)  # D_real^w
                        fake = self.critic(x_t, t, batch.cond)  # D_fake
                    dm = losses.distribution_matching(x, real, fake)
                    loss, logs = loss + cfg.dm_weight * dm, logs | {"dm": dm.detach()}
                    logs |= diagnostics(x, real, fake)
                yield loss, logs
        if not matched:
            return
        if x is None:
            with torch.no_grad():
                x = self.generate(batch, last)
        yield from self.critic_turn(batch, x)  # w(t) |D_fake - sg x|^2
