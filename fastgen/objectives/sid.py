"""SiD, SIM, SiDA and SiD-LSG: score-identity distillation, the Fisher-type divergence between noised laws.

Papers: SiD, Zhou et al. 2024, arXiv 2404.04057; SIM, Luo et al. 2024, arXiv 2410.16794 (its distances);
SiDA, Zhou et al. 2024, arXiv 2410.14919 (GAN term); SiD-LSG, Zhou et al. 2024, arXiv 2406.01561 (guidance).

  critic:   x = G(z, c) without gradient;   w(t) |D_fake^k1(x_t) - x|^2  [+ disc_weight (GAN pair)]
  student:  x = G(z', c), a fresh z';  x_t = alpha x + sigma eps, all with gradient
            Delta = D_real^k4(x_t) - D_fake^k2(x_t),   W = sg mean|x - D_real^k4|  per sample
            L = [ Delta.(D_fake^k2 - x) + (1 - alpha) |Delta|^2 ] / W
              = Delta.[(D_real - x) - alpha Delta] / W
            [+ gan_weight softplus(-Disc(x_t)) / W]
  Teacher and critic are frozen in the student's turn but differentiated through their input x_t.
  alpha = 1/2 is the gradient of E|Delta|^2 / 2 for an exact critic; alpha = 1 is SIM; SiD settles on 1.2.

Differs
- authors draw fresh conditions for the second z'; here both turns use the conditions of the batch.
- sums over pixels times 100 there, means here: Adam does not see the scale. Samples with NaN are not dropped,
  the run stops and says where.
- SIM's distances need no W: each is self-normalised, so W divides the GAN term and the l2 distance alone.
- SiD-LSG feeds sigma_625 z at t = 625; here the student's first time is any `student.timesteps` and its input
  is the schedule's unit noise, which plain pipelines draw. k4 is the guidance of the teacher.
- SiDA has no new parameters (`disc_mean`): logits are channel means of the critic's deepest encoder features.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from fastgen.core.batch import Batch
from fastgen.diffusion import divergences, losses
from fastgen.objectives.base import TimeConfig, Updates, guided
from fastgen.objectives.requirements import Requirements
from fastgen.objectives.shared.critic import GanMatchingConfig, Matching, diagnostics, through_scores
from fastgen.roles.roles import Role


class SiDConfig(GanMatchingConfig):
    """Score identity distillation; with gan_weight it is SiDA, with guidance SiD-LSG."""

    name: Literal["sid"] = "sid"
    student_every: int = Field(1, ge=1)
    """critic updates per student update"""
    time: TimeConfig = TimeConfig(low=0.0, high=0.8)
    """noise levels of the student's loss"""
    critic_time: TimeConfig = TimeConfig(kind="log_normal", mean=-1.2, std=1.2)
    """noise levels of the critic's denoising loss"""
    gan_weight: float = Field(0.0, ge=0)
    """weight of the student's GAN term (SiDA); 0 needs no real data"""
    disc_weight: float = Field(1.0, ge=0)
    """weight of the discriminator's loss beside the critic's"""
    disc_mean: bool = True
    """logits are channel means of the critic's features; false learns convolutional heads"""
    alpha: float = 1.2
    """how much of |Delta|^2 is taken away; 1/2 is the exact gradient, 1 is SIM"""
    distance: Literal["l2", "huber", "smooth"] = "l2"
    """SiD's square; SIM's pseudo-Huber over a whole sample; the same pixel by pixel"""
    huber_c: float = Field(0.01, gt=0)
    """constant of the two Huber distances, per pixel"""
    train_guidance: float = Field(1.0, ge=0)
    """k1: guidance under which the critic is trained (SiD-LSG; long-short guidance sets all scales alike)"""
    score_guidance: float = Field(1.0, ge=0)
    """k2 = k3: guidance under which the critic is read in the student's turn"""


class SiD(Matching, config=SiDConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        return replace(through_scores(super().requirements(cfg), cfg), causal=True)

    def step(self, batch: Batch, k: int, teacher: Role | None = None) -> Updates:
        cfg, teacher = self.cfg, teacher or self.teacher
        last = self.rng.shared_randint(len(self.student.times))
        with torch.no_grad():
            x = self.generate(batch, last)  # x = G(z, c)
        yield from self.critic_turn(batch, x, w=cfg.train_guidance)  # w(t) |D_fake^k1 - x|^2
        if k % cfg.student_every:
            return
        with self.turn("student"):
            noise = self.rng.randn_like(batch.noise)
            x = self.student.generate(noise, batch.cond, self.rng.randn_like, last)  # x = G(z', c)
            t, x_t = self.noised(x, cfg.time)  # x_t = alpha x + sigma eps
            real = guided(teacher, x_t, t, batch, self.guidance)  # D_real^k4
            fake, logits = self.guided_critic_forward(x, x_t, t, batch, cfg.score_guidance)  # D_fake^k2
            scale = losses.per_sample_mean((x - real).abs()).detach().clamp(min=1e-5)  # W
            sid = divergences.score_identity(x, real, fake, cfg.alpha, cfg.distance, cfg.huber_c)
            loss = sid = (sid / scale if cfg.distance == "l2" else sid).mean()
            logs = {"sid": sid, **diagnostics(x, real, fake)}
            if cfg.gan_weight:
                logs["gan"] = losses.gan_generator(logits, weight=1 / scale)  # softplus(-Disc) / W
                loss = sid + cfg.gan_weight * logs["gan"]
            yield loss, logs
