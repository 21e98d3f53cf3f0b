"""SwiftBrush: image-free one-step text-to-image by variational score distillation; version 2's CLIP loss.

Papers: Nguyen & Tran 2023, arXiv 2312.05239 (Alg. 1, eq. 5-7); v2: Dao et al. 2024, arXiv 2408.14176
(Sec. 4).

  every step:
    x = G(z, c);  x_t = alpha x + sigma eps                              t ~ U(0.02, 0.98)
    g = sigma^2 (e_T^w(x_t) - e_L^w(x_t))               e_T teacher, e_L its LoRA: both guided, same w
    update G with  0.5 |x - sg[x - g]|^2  [+ clip_weight max(0, tau - cos(image(x), text(c)))]            (v2)
    c' = the null prompt for the whole batch with probability 0.1, else c
    update critic with  alpha^2 |e_L(x_t', t', c') - eps|^2

  e_T - e_L = alpha / sigma (D_L - D_T), so g = alpha sigma (D_L - D_T): the step below works on D.

v2 also starts from a few-step student (`student.init`), trains a LoRA student beside a full one, and averages
the two at the end (`student.fuse`, `student.fuse_weight`).

Where teacher and critic are guided alike, the step vanishes at the teacher's *unguided* distribution: two
equal models are equal at every w. Students of this method therefore end near what the teacher draws without
guidance. `plain_critic` leaves the critic unguided, as variational score distillation in 3D does, and the
student then follows the guided teacher.

Differs
- authors fix alpha_T^2 = 0.0047; here it is the scheduler's own 0.00466, so that plain diffusers agrees.
- the alpha^2 weight and the null prompts of the critic stand in the authors' code only; both are kept. Null
  prompts are drawn only where guidance is used and there is a null prompt.
- v2 computes CLIP through a tiny decoder, with ViT-B/32 and tau 0.35; here through the teacher's own decoder
  and whatever net `clip` names, whose cosines lie on a scale of their own.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.networks.clip import Alignment
from fastgen.objectives.base import Updates, guided
from fastgen.objectives.requirements import Calls, ImageTextSpec, Requirements, passes
from fastgen.objectives.shared.critic import Matching, MatchingConfig, diagnostics
from fastgen.roles.roles import Role


class VSDConfig(MatchingConfig):
    """Variational score distillation with guidance on teacher and critic."""

    student_every: int = Field(1, ge=1)
    """critic updates per student update"""
    critic_drop: float = Field(0.1, ge=0, lt=1)
    """probability that the critic's batch is given the null condition"""
    plain_critic: bool = False
    """no guidance on the critic: the student follows the guided teacher instead of the unguided one"""
    clip_weight: float = Field(0.0, ge=0)
    """weight of version 2's clamped image-text loss at the start; it falls linearly to 0 over clip_steps"""
    clip_margin: float = Field(0.35, gt=0, le=1)
    """tau: samples whose cosine is above it feel nothing"""
    clip_steps: int = Field(0, ge=0)
    """steps over which clip_weight falls to 0"""
    clip: str = "assets:measure/tinted-clip"
    """folder of the CLIPModel"""

    @model_validator(mode="after")
    def _clip_needs_steps(self):
        if self.clip_weight and not self.clip_steps:
            raise ValueError(
                "objective.clip_steps: clip_weight falls to 0 over clip_steps; set the stage's length"
            )
        return self


class SwiftBrushConfig(VSDConfig):
    """Variational score distillation at one guidance scale."""

    name: Literal["swiftbrush"] = "swiftbrush"


class SwiftBrush(Matching, config=SwiftBrushConfig):
    clip: Alignment

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        needs = super().requirements(cfg)

        def network_calls(guidance: float, num_steps: int) -> Calls:
            calls = needs.network_calls(guidance, num_steps)
            return calls | {"critic": calls["critic"] * (1 if cfg.plain_critic else passes(guidance))}

        clip = {"clip": ImageTextSpec(cfg.clip)} if cfg.clip_weight else {}
        return replace(needs, network_calls=network_calls, auxiliaries=clip)

    def step(self, batch: Batch, k: int, teacher: Role | None = None) -> Updates:
        cfg, S, teacher = self.cfg, self.schedule, teacher or self.teacher
        w = self.scale(batch)
        last = self.rng.shared_randint(len(self.student.times))
        if k % cfg.student_every == 0:
            with self.turn("student"):
                x = self.generate(batch, last)  # x = G(z, c)
                t, x_t = self.noised(x, cfg.time)  # x_t = alpha x + sigma eps
                with torch.no_grad():
                    real = guided(teacher, x_t, t, batch, w)  # e_T^w, as D
                    fake = guided(self.critic, x_t, t, batch, 1.0 if cfg.plain_critic else w)  # e_L^w, as D
                loss = losses.score_difference(x, real, fake, S.alpha(t) * S.sigma(t))  # sigma^2 (e_T - e_L)
                logs = {"vsd": loss, **diagnostics(x, real, fake)}
                if cfg.clip_weight:
                    cos, weight = self.clip(x, batch.texts or []), max(0, 1 - k / cfg.clip_steps)
                    logs |= {"clip": losses.clamped(cos, cfg.clip_margin), "cosine": cos.mean()}
                    loss = loss + cfg.clip_weight * weight * logs["clip"]  # max(0, tau - cos)
                yield loss, logs
        else:
            with torch.no_grad():
                x = self.generate(batch, last)
        x = x.detach()
        with self.turn("critic"):
            t = self.sample_t(len(x), cfg.critic_time)
            drop = cfg.critic_drop if isinstance(w, Tensor) or w != 1 else 0
            cond = self.drop_batch_condition(batch, drop)  # c'
            x_t = S.noise(x, self.rng.randn_like(x), t)
            fake = self.critic(x_t, t, cond)
            loss = self.denoising_loss(fake, x, t, S.alpha(t) ** 2)  # alpha^2 |e_L - eps|^2
            yield loss, {"denoising": loss, **self.critic_error(fake, x, x_t, t, cond)}

    def scale(self, batch: Batch) -> float | Tensor:
        """w of this step, a number or one for each row."""
        return self.guidance
