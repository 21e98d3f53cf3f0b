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

Differs
- paper: generator and critic steps alternate; authors' code, and this: the critic moves on every step,
  reusing the sample.
- authors: heads on the critic's bottleneck, own noise level t' per use. `gan_time: null` here reuses t and
  the network pass of the score, which is cheaper; give gan_time for the authors' form, and
  `disc_features: teacher` for frozen features.
- authors keep no EMA of the student; the trainer here keeps one unless told otherwise.
"""

from typing import Literal

import torch
from pydantic import Field

from fastgen import losses
from fastgen.objectives.base import Objective, ObjectiveConfig, TimeConfig


class DMD2Config(ObjectiveConfig):
    """Distribution matching distillation, version 2."""

    name: Literal["dmd2"] = "dmd2"
    student_every: int = Field(5, ge=1)
    """critic updates per student update"""
    time: TimeConfig = TimeConfig()
    """noise levels of the distribution-matching gradient"""
    critic_time: TimeConfig = TimeConfig(low=0.001, high=1.0)
    """noise levels of the critic's denoising loss"""
    gan_weight: float = Field(1e-3, ge=0)
    """weight of the student's GAN term; 0 drops the discriminator and needs no real data"""
    disc_weight: float = Field(1e-2, ge=0)
    """weight of the discriminator's loss beside the critic's"""
    gan_time: TimeConfig | None = None
    """separate noise levels of the GAN; null shares those of the score, in the same network pass"""
    disc_features: Literal["critic", "teacher"] = "critic"
    """whose features the discriminator heads read"""
    disc_taps: tuple[int, ...] = ()
    """feature taps by index; empty takes the family's default"""
    backward_simulation: bool = True
    """several steps: train on the student's own intermediate states, not on noised data (Sec. 4.5)"""

    @property
    def one_pass(self) -> bool:
        """Whether logits and D_fake come from the same pass of the critic."""
        return self.gan_weight > 0 and self.gan_time is None and self.disc_features == "critic"


class DMD2(Objective, config=DMD2Config):
    @classmethod
    def player_parts(cls, cfg):
        return {"student": ("student",), "critic": ("critic", "disc") if cfg.gan_weight else ("critic",)}

    @classmethod
    def requires_data(cls, cfg):
        return cfg.gan_weight > 0 or not cfg.backward_simulation

    @classmethod
    def evaluations(cls, cfg, guidance, num_steps):
        walk = (num_steps - 1) / 2 if cfg.backward_simulation else 0
        gan = cfg.gan_weight > 0
        own = gan and not cfg.one_pass
        r = 1 / cfg.student_every
        features = (gan + own) + r * own
        calls = {
            "student": walk + (1 - r),
            "student+grad": r,
            "teacher": r * (1 if guidance == 1 else 2),
            "critic": r * (not gan or own),
            "critic+grad": 1 + r * (gan and not own),
            "features+grad": features,
        }
        return {name: round(n, 3) for name, n in calls.items() if n}

    def step(self, batch, k):
        cfg, S = self.cfg, self.schedule
        last = self.rng.shared_randint(len(self.student.times))
        if k % cfg.student_every == 0:
            with self.turn("student"):
                x = self.sample(batch, last)  # x = G(z, c)
                t, eps = self.sample_t(len(x), cfg.time), self.rng.randn_like(x)
                x_t = S.noise(x, eps, t)  # x_t = alpha x + sigma eps
                with torch.no_grad():
                    real = self.teacher.guided(x_t, t, batch.cond, batch.uncond, self.guidance)  # D_real^w
                logits, fake = self.judge(x, x_t, t, batch.cond)  # D_fake
                loss = dm = losses.distribution_matching(x, real, fake.detach())  # grad of eq. 7-8
                logs = {
                    "dm": dm,
                    "real_fake_gap": (real - fake).abs().mean(),
                    "x_mean": x.mean(),
                    "x_std": x.std(),
                }
                if cfg.gan_weight:
                    logs["gan"] = losses.gan_generator(logits)  # softplus(-Disc(x_t'))
                    loss = dm + cfg.gan_weight * logs["gan"]
                yield loss, logs
            x = x.detach()
        else:
            with torch.no_grad():
                x = self.sample(batch, last)
        with self.turn("critic"):
            t, eps = self.sample_t(len(x), cfg.critic_time), self.rng.randn_like(x)
            logits, fake = self.judge(x, S.noise(x, eps, t), t, batch.cond)
            loss = losses.denoising(S, fake, x, t, self.critic.backbone.prediction)  # w(t) |D_fake - x|^2
            logs = {"denoising": loss}
            if cfg.gan_weight:
                t_real = t if cfg.gan_time is None else self.sample_t(len(x), cfg.gan_time)
                real_t = S.noise(batch.x0, self.rng.randn_like(x), t_real)
                real_logits = self.disc(real_t, t_real, batch.cond)
                disc = losses.gan_discriminator(logits, real_logits)  # softplus pair
                loss = loss + cfg.disc_weight * disc
                logs |= {"disc": disc, "logit_fake": logits[0].mean(), "logit_real": real_logits[0].mean()}
            yield loss, logs

    def sample(self, batch, last):
        """The student's sample at step `last` of its list, reached through its own states or from noised
        data.
        """
        if self.cfg.backward_simulation or last == 0:
            return self.generate(batch, last)
        t = self.student.time(last, batch.noise)
        return self.student(self.schedule.noise(batch.x0, batch.noise, t), t, batch.cond)

    def judge(self, x, x_t, t, cond):
        """Logits (None without a GAN) and D_fake: one critic pass where they share noise levels, else two."""
        cfg, logits = self.cfg, None
        if cfg.one_pass:
            return self.disc(x_t, t, cond, score=True)
        if cfg.gan_weight:
            t_gan = t if cfg.gan_time is None else self.sample_t(len(x), cfg.gan_time)
            logits = self.disc(self.schedule.noise(x, self.rng.randn_like(x), t_gan), t_gan, cond)
        with torch.set_grad_enabled(self.active == "critic"):
            return logits, self.critic(x_t, t, cond)
