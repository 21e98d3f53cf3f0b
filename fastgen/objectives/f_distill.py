"""f-distill: DMD2 whose gradient is weighted by how much the chosen f-divergence cares about each sample.

Paper: Xu et al. 2025, arXiv 2502.15681.  grad D_f(p_t || q_t) = -E [ h(r) (s_p - s_q) dx_t/dtheta ]

  every step k:
    x = G(z, c)
    if k % student_every == 0:
      x_t = alpha x + sigma eps
      r = clamp(exp clamp(mean logit Disc(x_t), -10, 10), 0.1, 20)    discriminator: real = 1, r ~ p_t / q_t
      r <- r / (running mean of r in the bin of t)
      h = h_f(r) / (running mean of h)    reverse KL 1, forward KL r, JS r/(1+r) (diffusion/divergences.py)
      grad = h (D_fake(x_t) - D_real^w(x_t)) / mean|x - D_real^w|
      update G with  0.5 |x - sg[x - grad]|^2 + gan_weight softplus(-Disc(x_t))
    update critic and discriminator as DMD2 does

Differs
- bins: the authors' are equal in t, which puts nearly all EDM samples into one; here they are equal in
  sigma / (alpha + sigma), which is t for flows. `bins: 1` is a plain batch normalisation of r.
- the authors' code reads features of the frozen teacher, the paper those of the critic; `disc_features`
  chooses, critic by default (one pass gives D_fake and logits).
- no `gan_time`: the ratio weighs the score at this x_t, so discriminator and score share their noise levels.
- running means are those of the last `ratio_memory` samples: the authors' batch of 2048, or their 512 and
  bins that keep half at each step. A batch of 24 to 64 divided by its own means, of a few samples a bin,
  leaves 0.6 to 0.8 of the spread of h under forward KL (tests/objectives/test_f_distill.py).
- Pearson's chi^2 is allowed too; constants in front of h do not matter, its mean is divided out.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.diffusion import divergences, losses
from fastgen.objectives.base import Updates, guided
from fastgen.objectives.shared.critic import GanMatchingConfig, Matching, check_ratio_level, diagnostics
from fastgen.roles.roles import Role


class FDistillConfig(GanMatchingConfig):
    """DMD2 under an f-divergence."""

    name: Literal["f_distill"] = "f_distill"
    f: divergences.Name = "js"
    """the divergence D_f(teacher || student); rkl is DMD2"""
    gan_weight: float = Field(1e-3, gt=0)
    """weight of the student's GAN term; the discriminator is needed, it is the ratio"""
    ratio_low: float = Field(0.1, gt=0)
    """smallest ratio"""
    ratio_high: float = Field(20.0, gt=0)
    """largest ratio"""
    bins: int = Field(10, ge=0)
    """noise-level bins by whose mean r is divided; 0 leaves r as it is"""
    ratio_memory: int = Field(2048, ge=1)
    """samples, this batch among them, over which r in each bin and h are averaged"""

    @model_validator(mode="after")
    def _ratio_is_the_scores(self):
        return check_ratio_level(self)


class FDistill(Matching, config=FDistillConfig):
    ratio_sums: Tensor
    """[2, bins], of r and of the samples it was read at"""
    weight_sums: Tensor
    """[2, 1], of h in the same way"""

    def prepare(self) -> None:
        self.ratio_sums = torch.zeros(2, self.cfg.bins, device=self.rng.device)
        self.weight_sums = torch.zeros(2, 1, device=self.rng.device)

    def state(self) -> dict[str, Tensor]:
        return {"ratio_sums": self.ratio_sums, "weight_sums": self.weight_sums}

    def step(self, batch: Batch, k: int, teacher: Role | None = None) -> Updates:
        cfg, teacher = self.cfg, teacher or self.teacher
        last = self.rng.shared_randint(len(self.student.times))
        if k % cfg.student_every == 0:
            with self.turn("student"):
                x = self.generate(batch, last)  # x = G(z, c)
                t, x_t = self.noised(x, cfg.time)  # x_t = alpha x + sigma eps
                with torch.no_grad():
                    real = guided(teacher, x_t, t, batch, self.guidance)  # D_real^w
                fake, logits = self.critic_forward(x, x_t, t, batch, grad=False)  # D_fake, Disc(x_t)
                h, ratio = self.weight(logits, t)
                dm = losses.distribution_matching(x, real, fake.detach(), h)  # h (D_fake - D_real) / mean|.|
                gan = losses.gan_generator(logits)  # softplus(-Disc(x_t))
                logs = {"dm": dm, "gan": gan, **ratio, **diagnostics(x, real, fake)}
                yield dm + cfg.gan_weight * gan, logs
        else:
            with torch.no_grad():
                x = self.generate(batch, last)
        x = x.detach()
        with self.turn("critic"):
            t, x_t = self.noised(x, cfg.critic_time)
            fake, logits = self.critic_forward(x, x_t, t, batch)  # D_fake, Disc(x_t)
            loss = self.denoising_loss(fake, x, t)  # w(t) |D_fake(x_t) - sg x|^2
            logs = {"denoising": loss, **self.critic_error(fake, x, x_t, t, batch.cond)}
            real_logits, r1 = self.real_logits(batch, t)  # Disc(x0_t), |d Disc / d x0_t|^2
            disc = losses.gan_discriminator(logits, real_logits)  # softplus(.) + softplus(-.)
            loss = loss + cfg.disc_weight * disc + cfg.r1_weight * r1
            logs |= self.disc_logs(disc, logits, real_logits, r1)
            yield loss, logs

    @torch.no_grad()
    def weight(self, logits: list[Tensor], t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """h [B], whose running mean is 1, and what to log of it."""
        cfg = self.cfg
        log_r = divergences.log_ratio(logits)
        r = log_r.exp().clamp(cfg.ratio_low, cfg.ratio_high)
        if cfg.bins:
            where = (self.schedule.level(t).to(r) * cfg.bins).long().clamp(max=cfg.bins - 1)
            r = r / (self.running_mean(r, where, self.ratio_sums) + 1e-6)
        h = divergences.TABLE[cfg.f].h(r)
        h = h / self.running_mean(h, torch.zeros_like(h, dtype=torch.long), self.weight_sums).clamp(min=1e-6)
        return h, {"log_ratio": log_r.mean(), "h_max": h.max(), "h_std": h.std(correction=0)}

    def running_mean(self, values: Tensor, where: Tensor, sums: Tensor) -> Tensor:
        """The mean of each value's bin; sums, part of a checkpoint, move in place."""
        mean, moved = divergences.running_means(values, where, sums, self.cfg.ratio_memory)
        sums.copy_(moved)
        return mean
