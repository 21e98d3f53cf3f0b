"""DMD2: improved distribution matching distillation.

Paper: Yin et al. 2024, arXiv 2405.14867 (DMD: arXiv 2311.18828). One step or several, GAN optional.

  every step k:
    x = G(z, c)                            one step, or backward simulation to a random step of the time list
    if k % student_every == 0:             two time-scale rule (Sec. 4.2), the ratio counts critic steps
      x_t = alpha x + sigma eps            t ~ U(0.02, 0.98)
      grad = (D_fake(x_t) - D_real^w(x_t)) / mean|x - D_real^w|          (2311.18828, eq. 7-8)
      update G with  0.5 |x - sg[x - grad]|^2 + gan_weight softplus(-Disc(x_t'))      (Sec. 4.3)
    update critic with  w(t) |D_fake(x_t) - sg x|^2
                        + disc_weight [softplus(Disc(x_t')) + softplus(-Disc(x0_t'))]
                        [+ r1_weight |d Disc / d x0_t'|^2]

  stages of a published run: ODE pairs (objective ode_pairs), then gan_weight 0, then the GAN at a low rate
  forms: everything full; a LoRA student (r 64, alpha 8) with a full critic, as the authors' SDXL LoRA;
  critic.kind lora, all three roles over one frozen base; there real_mix adds a share of the critic's adapter
  to the teacher (weak-to-strong matching, Shao et al. 2025, arXiv 2503.13319), which brings the two scores
  nearer while the critic is far from the teacher

Differs
- paper: generator and critic steps alternate; authors' code, and this: the critic moves on every step,
  reusing the sample.
- authors: heads on the critic's bottleneck, own noise level t' per use. `gan_time: null` here reuses t and
  the network pass of the score, which is cheaper; give gan_time for the authors' form, and
  `disc_features: teacher` for frozen features.
- R1 is not in the paper; later work adds it, exact or by finite differences at the same noised input.
- authors keep no EMA of the student; the trainer here keeps one unless train.ema_decay is empty.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.core.errors import UserError
from fastgen.diffusion import losses
from fastgen.objectives.base import Updates, data_of, guided
from fastgen.objectives.requirements import Requirements
from fastgen.objectives.shared.critic import GanMatchingConfig, Matching, critic_calls, diagnostics
from fastgen.roles.roles import Role


class DMD2Config(GanMatchingConfig):
    """Distribution matching distillation, version 2."""

    name: Literal["dmd2"] = "dmd2"
    backward_simulation: bool = True
    """several steps: train on the student's own intermediate states, not on noised data (Sec. 4.5)"""
    real_mix: float = Field(0.0, ge=0, le=1)
    """share of the critic's LoRA that the teacher carries when its score is asked for; 0 is the teacher"""


class DMD2(Matching, config=DMD2Config):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        needs = replace(super().requirements(cfg), causal=cfg.backward_simulation)
        if cfg.backward_simulation:
            return needs
        return replace(needs, network_calls=lambda guidance, _: critic_calls(cfg, guidance), real_data=True)

    def check(self) -> None:
        super().check()
        if self.cfg.real_mix and self.critic.adapter is None:
            found = f"found {self.cfg.real_mix:g} with a critic that is no adapter on the teacher"
            raise UserError("objective.real_mix", found, "set critic.kind to lora, or leave it out")

    def step(self, batch: Batch, k: int, teacher: Role | None = None) -> Updates:
        cfg = self.cfg
        teacher = teacher or (replace(self.critic, share=cfg.real_mix) if cfg.real_mix else self.teacher)
        last = self.rng.shared_randint(len(self.student.times))
        if k % cfg.student_every == 0:
            with self.turn("student"):
                x = self.sample(batch, last)  # x = G(z, c)
                t, x_t = self.noised(x, cfg.time)  # x_t = alpha x + sigma eps
                with torch.no_grad():
                    real = guided(teacher, x_t, t, batch, self.guidance)  # D_real^w
                fake, logits = self.critic_forward(x, x_t, t, batch, grad=False)  # D_fake, Disc(x_t')
                loss = dm = losses.distribution_matching(x, real, fake.detach())  # grad of eq. 7-8
                logs = {"dm": dm, **diagnostics(x, real, fake)}
                if cfg.gan_weight:
                    logs["gan"] = losses.gan_generator(logits)  # softplus(-Disc(x_t'))
                    loss = dm + cfg.gan_weight * logs["gan"]
                yield loss, logs
        else:
            with torch.no_grad():
                x = self.sample(batch, last)
        x = x.detach()
        with self.turn("critic"):
            t, x_t = self.noised(x, cfg.critic_time)
            fake, logits = self.critic_forward(x, x_t, t, batch)  # D_fake, Disc(x_t')
            loss = self.denoising_loss(fake, x, t)  # w(t) |D_fake(x_t) - sg x|^2
            logs = {"denoising": loss, **self.critic_error(fake, x, x_t, t, batch.cond)}
            if cfg.gan_weight:
                real_logits, r1 = self.real_logits(batch, t)  # Disc(x0_t'), |d Disc / d x0_t'|^2
                disc = losses.gan_discriminator(logits, real_logits)  # softplus(.) + softplus(-.)
                loss = loss + cfg.disc_weight * disc + cfg.r1_weight * r1
                logs |= self.disc_logs(disc, logits, real_logits, r1)
            yield loss, logs

    def sample(self, batch: Batch, last: int) -> Tensor:
        """The sample at step `last` of the student's list, from its own states or from noised data."""
        if self.cfg.backward_simulation or last == 0:
            return self.generate(batch, last)
        t = self.student.time(last, batch.noise)
        return self.student(self.schedule.noise(data_of(batch), batch.noise, t), t, batch.cond)
