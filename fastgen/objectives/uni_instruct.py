"""Uni-Instruct: one-step distillation by any f-divergence, expanded over the noise levels.

Paper: Wang et al. 2025, arXiv 2505.20755. D_f(teacher || student) is an integral over noise levels of the
score difference, weighted by the density ratio; one family holds SiD / SIM (reverse KL: h = 1, the Fisher
divergence), f-distill's divergences, and forward KL, Jeffreys, chi^2.

  critic:   x = G(z, c) without gradient;   w(t) |D_fake(x_t) - x|^2 + disc_weight (GAN pair)
  student:  x = G(z', c), a fresh z';  x_t = alpha x + sigma eps, all with gradient
            l = mean logit Disc(x_t),  r = clamp(exp l) ~ p_t / q_t          discriminator: real = 1
            Delta = D_real^w(x_t) - D_fake(x_t),   W = sg mean|x - D_real^w|
            L = [ 2 h(r) Delta.(D_fake - x) + (h - r h')(r) |Delta|^2 ] / (W mean h)
                + gan_weight softplus(-l) / W
  steps before `warmup_steps` take h = 1 (SIM's family), while the ratio is still being learned.

Differs
- authors' script keeps only h Delta.(D_fake - x), reads a "ratio" off the weighted BCE loss, and drops the
  gradient of the ratio; on Gaussians that is a wrong direction (tests/objectives/test_uni_instruct.py).
  `terms: [sim]` with `ratio_grad: none` is their form.
- the ratio is a function of x_t. `logit` differentiates it through the discriminator; `score` uses
  grad r = r Delta, exact for exact scores but of third order in their error; `none` leaves it out.
- their divergence starts after 200k images, ours after `warmup_steps`; the mean of h is divided out by batch.
- no `gan_time` but for f = rkl: the ratio is that of the score's own x_t.
- authors use channel means of the critic's features as logits (`disc_mean`); learned heads are the default
  here.
"""

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator

from fastgen.core.batch import Batch
from fastgen.diffusion import divergences, losses
from fastgen.objectives.base import TimeConfig, Updates, guided
from fastgen.objectives.requirements import Requirements
from fastgen.objectives.shared.critic import (
    GanMatchingConfig,
    Matching,
    calls_through_scores,
    check_ratio_level,
    diagnostics,
)
from fastgen.roles.roles import Role


class UniInstructConfig(GanMatchingConfig):
    """The expanded f-divergence family."""

    name: Literal["uni_instruct"] = "uni_instruct"
    f: divergences.Name = "js"
    """the divergence D_f(teacher || student); rkl is the Fisher corner (SiD, SIM)"""
    student_every: int = Field(1, ge=1)
    """critic updates per student update"""
    time: TimeConfig = TimeConfig(low=0.0, high=0.8)
    """noise levels of the student's loss"""
    critic_time: TimeConfig = TimeConfig(kind="log_normal", mean=-1.2, std=1.2)
    """noise levels of the critic's denoising loss"""
    gan_weight: float = Field(0.01, ge=0)
    """weight of the student's GAN term; its discriminator is the ratio, only f = rkl does without (0)"""
    disc_weight: float = Field(1.0, ge=0)
    """weight of the discriminator's loss beside the critic's"""
    terms: tuple[Literal["sim", "fgm"], ...] = ("sim", "fgm")
    """sim: 2 h Delta.(D_fake - x);  fgm: (h - r h') |Delta|^2"""
    ratio_grad: Literal["logit", "score", "none"] = "logit"
    """how the ratio is differentiated in x_t"""
    ratio_low: float = Field(0.1, gt=0)
    """smallest ratio"""
    ratio_high: float = Field(20.0, gt=0)
    """largest ratio"""
    warmup_steps: int = Field(0, ge=0)
    """steps with h = 1"""

    @model_validator(mode="after")
    def _ratio_needs_a_discriminator(self):
        if self.f != "rkl" and not self.gan_weight:
            raise ValueError(f"f: {self.f} needs a density ratio, set gan_weight above 0 (and real data)")
        return check_ratio_level(self)


class UniInstruct(Matching, config=UniInstructConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        calls = partial(calls_through_scores, cfg)
        return replace(super().requirements(cfg), network_calls=calls)

    def step(self, batch: Batch, k: int, teacher: Role | None = None) -> Updates:
        cfg, teacher = self.cfg, teacher or self.teacher
        last = self.rng.shared_randint(len(self.student.times))
        with torch.no_grad():
            x = self.generate(batch, last)  # x = G(z, c)
        yield from self.critic_turn(batch, x)  # w(t) |D_fake - x|^2 + disc_weight (GAN pair)
        if k % cfg.student_every:
            return
        with self.turn("student"):
            noise = self.rng.randn_like(batch.noise)
            x = self.student.generate(noise, batch.cond, self.rng.randn_like, last)  # x = G(z', c)
            t, x_t = self.noised(x, cfg.time)  # x_t = alpha x + sigma eps
            real = guided(teacher, x_t, t, batch, self.guidance)  # D_real^w
            fake, logits = self.critic_forward(x, x_t, t, batch)  # D_fake, l
            scale = losses.per_sample_mean((x - real).abs()).detach().clamp(min=1e-5)  # W
            divergence, logs = self.divergence(k, x, x_t, t, real, fake, logits)
            loss = logs["divergence"] = (divergence / scale).mean()
            if logits:
                logs["gan"] = losses.gan_generator(logits, weight=1 / scale)  # softplus(-l) / W
                loss = loss + cfg.gan_weight * logs["gan"]
            yield loss, logs | diagnostics(x, real, fake)

    def divergence(self, k, x, x_t, t, real, fake, logits):
        """[2 h Delta.(D_fake - x) + (h - r h') |Delta|^2] / mean h, [B], and what to log of the ratio."""
        cfg = self.cfg
        f, log_r = cfg.f, divergences.log_ratio(logits) if logits else x.new_zeros(len(x))
        if k < cfg.warmup_steps:
            f = "rkl"
        r = log_r.exp() if cfg.ratio_grad == "logit" else log_r.exp().detach()
        h, kappa, r2h = divergences.weights(f, r, cfg.ratio_low, cfg.ratio_high)
        level = divergences.global_mean(h.detach()).clamp(min=1e-6)
        loss = divergences.expanded(
            x, real, fake, h * ("sim" in cfg.terms) / level, kappa * ("fgm" in cfg.terms) / level
        )
        if cfg.ratio_grad == "score":
            path = divergences.ratio_path(self.schedule, x, x_t, t, real, fake, h, kappa, r2h)
            loss = loss + path / level
        clamped = ((r < cfg.ratio_low) | (r > cfg.ratio_high)).float().mean()
        return loss, {"log_ratio": log_r.mean(), "ratio_clamped": clamped}
