"""LADD: latent adversarial distillation on the features of the frozen teacher.

Paper: Sauer et al. 2024, arXiv 2403.12015 (SD3-Turbo; no code); as a second loss: SANA-Sprint,
arXiv 2503.09641 (Sec. 3.2), NVlabs/Sana.

  i ~ P(student's steps);  x_t = alpha x0 + sigma eps at t_i, pure noise at the first
  x = D_theta(x_t, t_i, c)
  features of the teacher at (alpha x + sigma eps', t', c), t' of their own; heads at several depths -> logits
  update G with     -mean logits                        (hinge), or softplus(-logits)
  update heads with 1/2 [relu(1 - l_real) + relu(1 + l_fake)], or the softplus pair,
                    + r1_weight |d l_real / d x_t'|^2   at the same noised real input
  fake also: real x0 under another row's condition (misaligned pairs)

Differs
- heads: spectral norm, residual block and one logit per token as in StyleGAN-T, with 3 x 3 convolutions on
  the map instead of 1-D ones over tokens, GroupNorm instead of batch statistics of eight samples (so that a
  batch of one works and samples stay apart), and no condition of their own: text and time come through the
  teacher.
- paper: samples of the guided teacher stand for real data; here the data does. Both updates are made at each
  step and share the sample; authors alternate on different batches.
- R1: exact, or finite differences (`approximate`, APT). The public code compares the logit of a noised sample
  with that of an un-noised one; here both are the same x_t', one of them perturbed.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fastgen import losses
from fastgen.objectives.base import Batch, Objective, ObjectiveConfig, TimeConfig
from fastgen.objectives.matching import real_side
from fastgen.schedules import expand


class AdversarialConfig(BaseModel):
    """The GAN on teacher features: heads, noise levels, penalties."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    loss: Literal["hinge", "softplus"] = "hinge"
    """the GAN pair"""
    disc_time: TimeConfig = TimeConfig(kind="logit_normal", mean=0.0, std=1.0)
    """noise levels of the features: more noise judges layout, less judges texture"""
    disc_depths: int = Field(4, ge=1)
    """heads, spread over the teacher's depth"""
    disc_taps: tuple[int, ...] = ()
    """feature taps by index, instead of disc_depths"""
    disc_head: Literal["patch", "pooled"] = "patch"
    """a logit per token, or one per map"""
    misaligned: bool = True
    """count real data under a wrong condition as fake"""
    r1_weight: float = Field(0.0, ge=0)
    """weight of the gradient penalty on real data"""
    r1: Literal["exact", "approximate"] = "exact"
    """second derivatives (math attention), or one more pass at r1_std away"""
    r1_std: float = Field(0.1, gt=0)
    """perturbation of the approximate penalty"""

    def evaluations(self) -> dict[str, float]:
        """Network calls of one update of both sides."""
        extra = {"exact": 2, "approximate": 1}[self.r1] if self.r1_weight else 0
        return {"features+grad": 1, "features": 2 + self.misaligned + extra}


class LADDConfig(ObjectiveConfig):
    """Latent adversarial diffusion distillation."""

    name: Literal["ladd"] = "ladd"
    gan: AdversarialConfig = AdversarialConfig()
    """the discriminator and its loss"""
    student_every: int = Field(1, ge=1)
    """head updates per student update"""
    step_weights: tuple[float, ...] = ()
    """how often each of the student's steps is trained; empty trains all alike"""


class LADD(Objective, config=LADDConfig):
    draws_guidance = True

    @classmethod
    def player_parts(cls, cfg):
        return {"student": ("student",), "disc": ("disc",)}

    @classmethod
    def follows_guidance(cls, cfg):
        return False  # of the teacher only features are read

    @classmethod
    def evaluations(cls, cfg, guidance, num_steps):
        r = 1 / cfg.student_every
        calls = cfg.gan.evaluations() | {"student+grad": r, "features+grad": r}
        return calls | ({"student": 1 - r} if r < 1 else {})

    def step(self, batch, k):
        _, told = self.tell(batch)
        if k % self.cfg.student_every == 0:
            with self.turn("student"):
                x = self.sample(batch, told)
                yield student_loss(self, self.cfg.gan, x, batch.cond)
        else:
            with torch.no_grad():
                x = self.sample(batch, told)
        yield from disc_turn(self, self.cfg.gan, batch, x)

    def sample(self, batch: Batch, cond: dict) -> Tensor:
        """D_theta from a random step of the student's list."""
        times = torch.tensor(self.student.times, dtype=torch.float64, device=batch.noise.device)
        p = torch.tensor(self.cfg.step_weights or [1.0] * len(times), dtype=torch.float64).cumsum(0)
        i = torch.searchsorted(p / p[-1], self.rng.rand(len(batch.noise)).cpu(), right=True).to(times.device)
        return self.student(start(self, batch, times[i]), times[i], cond)


def start(objective: Objective, batch: Batch, t: Tensor) -> Tensor:
    """The student's input at times t [B]: noised data, and pure noise where sampling starts."""
    first = objective.student.times[0]
    pure = batch.noise * objective.schedule.prior_std(first)
    return torch.where(
        expand(t >= first, pure).bool(), pure, objective.schedule.noise(batch.x0, batch.noise, t)
    )


def student_loss(objective: Objective, cfg: AdversarialConfig, x: Tensor, cond: dict) -> tuple[Tensor, dict]:
    """Generator side of the pair on re-noised samples; gradient passes through the frozen teacher."""
    t = objective.sample_t(len(x), cfg.disc_time)
    logits = objective.disc(objective.schedule.noise(x, objective.rng.randn_like(x), t), t, cond)
    loss = losses.gan_generator(logits, cfg.loss)
    return loss, {"gan": loss.detach()}


def disc_turn(objective: Objective, cfg: AdversarialConfig, batch: Batch, x: Tensor):
    """Update the heads on samples x, real data and misaligned pairs."""
    x, rng = x.detach(), objective.rng

    def noised(y: Tensor) -> tuple[Tensor, Tensor]:
        t = objective.sample_t(len(y), cfg.disc_time)
        return objective.schedule.noise(y, rng.randn_like(y), t), t

    with objective.turn("disc"):
        real_t, t = noised(batch.x0)
        step = (0.0 if cfg.r1 == "exact" else cfg.r1_std) if cfg.r1_weight else None
        real, penalty = real_side(objective, real_t, t, batch.cond, step)
        fake = objective.disc(*noised(x), batch.cond)
        logs = {"logit_real": real[0].mean(), "logit_fake": fake[0].mean()}
        wrong = batch.x0.roll(1, 0)
        rows = different(batch.cond) if cfg.misaligned else None
        wrong_t, t = noised(wrong)  # drawn for every row, so that the draws do not depend on the data
        if rows is not None and rows.any():
            cond = {n: c[rows] for n, c in batch.cond.items()}
            other = objective.disc(wrong_t[rows], t[rows], cond)
            fake = [torch.cat(pair) for pair in zip(fake, other)]
        loss = losses.gan_discriminator(fake, real, cfg.loss)
        if penalty is not None:
            logs["r1"] = penalty
            loss = loss + cfg.r1_weight * penalty
        yield loss, logs


def different(cond: dict) -> Tensor | None:
    """Rows [B] whose condition is another than that of the row before; None where there are no conditions."""
    if not cond:
        return None
    same = [(c == c.roll(1, 0)).reshape(len(c), -1).all(1) for c in cond.values()]
    return ~torch.stack(same).all(0)
