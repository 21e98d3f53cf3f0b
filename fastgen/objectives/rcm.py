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

from typing import Literal

import torch
from pydantic import Field

from fastgen.diffusion import losses
from fastgen.objectives.base import Objective, TimeConfig
from fastgen.objectives.scm import SCM, SCMConfig, scm_loss
from fastgen.objectives.shared import critic
from fastgen.objectives.shared.critic import MatchingConfig


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


class RCM(Objective, config=RCMConfig):
    @classmethod
    def player_parts(cls, cfg):
        return SCM.player_parts(cfg.scm) | ({"critic": ("critic",)} if cfg.dm_weight else {})

    @classmethod
    def evaluations(cls, cfg, guidance, num_steps):
        calls = SCM.evaluations(cfg.scm, guidance, num_steps)
        if not cfg.dm_weight:
            return calls
        r = 1 / cfg.student_every
        found = critic.evaluations(cfg, guidance, (num_steps - 1) / 2)
        return {n: round(found.get(n, 0) + r * calls.get(n, 0), 3) for n in {**found, **calls}}

    def step(self, batch, k):
        cfg = self.cfg
        matched = cfg.dm_weight > 0 and k >= cfg.scm.warmup_steps
        last = self.rng.shared_randint(len(self.student.times))
        x = None
        if not matched or k % cfg.student_every == 0:
            with self.turn("student"):
                loss, logs = scm_loss(self, cfg.scm, batch, k, self.guidance, batch.cond)
                loss = cfg.scm_weight * loss
                if matched:
                    x = self.generate(batch, last)  # x = G(z, c)
                    t, x_t = critic.noised(self, x, cfg.time)  # x_t = alpha x + sigma eps
                    with torch.no_grad():
                        real = self.teacher.guided(
                            x_t, t, batch.cond, batch.uncond, self.guidance
                        )  # D_real^w
                        fake = self.critic(x_t, t, batch.cond)  # D_fake
                    dm = losses.distribution_matching(x, real, fake)
                    loss, logs = loss + cfg.dm_weight * dm, logs | {"dm": dm.detach()}
                    logs |= critic.diagnostics(x, real, fake)
                yield loss, logs
        if not matched:
            return
        if x is None:
            with torch.no_grad():
                x = self.generate(batch, last)
        yield from critic.critic_turn(self, batch, x)  # w(t) |D_fake - sg x|^2
