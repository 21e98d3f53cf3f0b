"""What the methods with a GAN on the frozen teacher's features share: settings and both sides of the game.

Functions over the objective (parts student and disc). The box is in `ladd.py` (arXiv 2403.12015).
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import expand
from fastgen.objectives.base import Objective, TimeConfig, data_of
from fastgen.objectives.requirements import Calls, DiscriminatorSpec
from fastgen.objectives.shared.critic import real_side
from fastgen.roles.heads import Discriminator


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

    def network_calls(self) -> Calls:
        """Network calls of one update of both sides."""
        extra = {"exact": 2, "approximate": 1}[self.r1] if self.r1_weight else 0
        return {"features+grad": 1, "features": 2 + self.misaligned + extra}

    def discriminator(self) -> DiscriminatorSpec:
        """The heads that these settings describe."""
        return DiscriminatorSpec("teacher", self.disc_taps, self.disc_depths, self.disc_head)


class Pairs(NamedTuple):
    """Samples [B, ...] of which one is preferred to the other of the same condition."""

    preferred: Tensor
    other: Tensor
    counted: Tensor
    """whether there is a preference [B]"""
    weight: float
    """of their term in the heads' loss"""


def student_input(objective: Objective, batch: Batch, t: Tensor) -> Tensor:
    """The student's input at times t [B]: noised data, and pure noise where sampling starts."""
    first = objective.student.times[0]
    pure = batch.noise * objective.schedule.prior_std(first)
    return torch.where(
        expand(t >= first, pure).bool(), pure, objective.schedule.noise(data_of(batch), batch.noise, t)
    )


def gan_student_loss(
    objective: Objective, cfg: AdversarialConfig, x: Tensor, cond: dict
) -> tuple[Tensor, dict]:
    """Generator side of the pair on re-noised samples; gradient passes through the frozen teacher."""
    t = objective.sample_t(len(x), cfg.disc_time)
    logits = objective.disc(objective.schedule.noise(x, objective.rng.randn_like(x), t), t, cond)
    loss = losses.gan_generator(logits, cfg.loss)
    return loss, {"gan": loss.detach()}


def disc_turn(
    objective: Objective, cfg: AdversarialConfig, batch: Batch, x: Tensor, pairs: Pairs | None = None
) -> Iterator[tuple[Tensor, dict]]:
    """Update the heads on samples x, real data and misaligned rows; with pairs also on which is preferred."""
    x, rng = x.detach(), objective.rng

    def noised(y: Tensor) -> tuple[Tensor, Tensor]:
        t = objective.sample_t(len(y), cfg.disc_time)
        return objective.schedule.noise(y, rng.randn_like(y), t), t

    with objective.turn("disc"):
        x0 = data_of(batch)
        real_t, t = noised(x0)
        step = (0.0 if cfg.r1 == "exact" else cfg.r1_std) if cfg.r1_weight else None
        real, penalty = real_side(objective, real_t, t, batch.cond, step)
        fake = objective.disc(*noised(x), batch.cond)
        logs = {"logit_real": real[0].mean(), "logit_fake": fake[0].mean()}
        wrong = x0.roll(1, 0)
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
        if pairs is not None:
            logs["preference"] = preference(objective, cfg, batch, pairs)
            loss = loss + pairs.weight * logs["preference"]
        yield loss, logs


def preference(objective: Objective, cfg: AdversarialConfig, batch: Batch, pairs: Pairs) -> Tensor:
    """mean -log sigmoid(l(preferred) - l(other)), both members noised alike."""
    S, t = objective.schedule, objective.sample_t(len(pairs.preferred), cfg.disc_time)
    eps = objective.rng.randn_like(pairs.preferred)
    won, lost = (
        objective.disc(S.noise(x.detach(), eps, t), t, batch.cond) for x in (pairs.preferred, pairs.other)
    )
    return losses.preference(won, lost, pairs.counted)


def pair_turn(
    objective: Objective,
    fake: Tensor,
    real: Tensor,
    t: Tensor,
    cond: dict,
    kind: str,
    disc: Discriminator | None = None,
) -> Iterator[tuple[Tensor, dict]]:
    """Update the heads on states that are noised already, [B, ...] at times t [B]: one fake, one real. disc:
    those heads, where a method has several sets.
    """
    disc = disc or objective.disc
    with objective.turn("disc"):
        fake_logits, real_logits = disc(fake.detach(), t, cond), disc(real, t, cond)
        loss = losses.gan_discriminator(fake_logits, real_logits, kind)
        yield loss, {"logit_fake": fake_logits[0].mean(), "logit_real": real_logits[0].mean()}


def different(cond: dict) -> Tensor | None:
    """Rows [B] whose condition is another than that of the row before; None where there are no conditions."""
    if not cond:
        return None
    same = [(c == c.roll(1, 0)).reshape(len(c), -1).all(1) for c in cond.values()]
    return ~torch.stack(same).all(0)
