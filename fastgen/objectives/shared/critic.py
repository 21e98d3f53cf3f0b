"""What every score distillation shares: settings, samples, the critic's turn, the GAN pair, diagnostics.

A method of this family makes a student sample x, noises it, and compares the frozen teacher's D_real(x_t)
with the D_fake(x_t) of a critic that learns the student's own distribution. How the two become a gradient is
the method; the rest is here, as functions over the objective (parts student, teacher, critic and, with a
GAN, disc).
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.objectives.base import Objective, ObjectiveConfig, TimeConfig


class MatchingConfig(ObjectiveConfig):
    """Settings of every method with an online critic."""

    student_every: int = Field(5, ge=1)
    """critic updates per student update"""
    time: TimeConfig = TimeConfig()
    """noise levels of the distribution-matching gradient"""
    critic_time: TimeConfig = TimeConfig(low=0.001, high=1.0)
    """noise levels of the critic's denoising loss"""


class GanMatchingConfig(MatchingConfig):
    """The same with a discriminator on the features of critic or teacher; gan_weight 0 drops it."""

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
    r1_weight: float = Field(0.0, ge=0)
    """weight of the gradient penalty on noised real data"""
    r1_step: float = Field(0.0, ge=0)
    """R1 by one more pass at this distance from the same noised input (APT); 0 takes second derivatives"""
    disc_mean: bool = False
    """logits are the channel means of the tapped features, without heads to learn (SiDA, arXiv 2410.14919)"""

    @property
    def one_pass(self) -> bool:
        """Whether logits and D_fake come from the same pass of the critic."""
        return self.gan_weight > 0 and self.gan_time is None and self.disc_features == "critic"


def has_gan(cfg) -> bool:
    """Whether these settings train a discriminator."""
    return getattr(cfg, "gan_weight", 0) > 0


def evaluations(cfg, guidance: float, walk: float = 0) -> dict[str, float]:
    """Expected network calls of one step; `walk` counts the student's calls before its last one."""
    gan, r = has_gan(cfg), 1 / cfg.student_every
    own = gan and not cfg.one_pass
    penalty = gan and bool(cfg.r1_weight) * (1 if cfg.r1_step else 2)
    calls = {
        "student": walk + (1 - r),
        "student+grad": r,
        "teacher": r * (1 if guidance == 1 else 2),
        "critic": r * (not gan or own),
        "critic+grad": 1 + r * (gan and not own),
        "features+grad": (gan + own) + r * own + penalty,
    }
    return {name: round(n, 3) for name, n in calls.items() if n}


def evaluations_through(
    cfg, guidance: float, num_steps: int, score_guidance: float = 1.0, train_guidance: float = 1.0
) -> dict[str, float]:
    """The same for methods that differentiate teacher and critic in x_t and draw a sample for each turn."""
    r, gan, walk = 1 / cfg.student_every, has_gan(cfg), (num_steps - 1) / 2
    doubled = [1 if w == 1 else 2 for w in (guidance, score_guidance, train_guidance)]
    own = [gan and not (cfg.one_pass and d == 1) for d in doubled[1:]]  # logits of a pass of their own
    calls = {
        "student": walk * (1 + r) + 1,
        "student+grad": r,
        "teacher+grad": r * doubled[0],
        "critic+grad": r * doubled[1] + doubled[2],
        "features+grad": gan + r * own[0] + own[1],
    }
    return {name: round(n, 3) for name, n in calls.items() if n}


class Matching(Objective):
    """A method with an online critic, which holds the discriminator's heads where there are any."""

    @classmethod
    def player_parts(cls, cfg):
        return {"student": ("student",), "critic": ("critic", "disc") if has_gan(cfg) else ("critic",)}

    @classmethod
    def requires_data(cls, cfg):
        return has_gan(cfg)

    @classmethod
    def evaluations(cls, cfg, guidance, num_steps):
        return evaluations(cfg, guidance, (num_steps - 1) / 2)


def sample(obj: Objective, batch: Batch, last: int, simulate: bool = True) -> Tensor:
    """The student's sample at step `last` of its list, reached through its own states or from noised data."""
    if simulate or last == 0:
        return obj.generate(batch, last)
    t = obj.student.time(last, batch.noise)
    return obj.student(obj.schedule.noise(batch.x0, batch.noise, t), t, batch.cond)


def noised(obj: Objective, x: Tensor, time: TimeConfig) -> tuple[Tensor, Tensor]:
    """(t, x_t = alpha x + sigma eps), fresh for every row; gradient flows through x."""
    t, eps = obj.sample_t(len(x), time), obj.rng.randn_like(x)
    return t, obj.schedule.noise(x, eps, t)


def critic_forward(
    obj: Objective,
    x: Tensor,
    x_t: Tensor,
    t: Tensor,
    cond: dict,
    uncond: dict | None = None,
    w: float = 1.0,
    through: bool = False,
) -> tuple[list[Tensor] | None, Tensor]:
    """Logits (None without a GAN) and D_fake^w: one critic pass where they share noise levels, else two.

    D_fake carries gradient in the critic's turn, where the logits of the same pass need it, and with
    `through`, for methods that differentiate the scores in x_t.
    """
    cfg, logits = obj.cfg, None
    if has_gan(cfg) and cfg.one_pass and w == 1:
        return obj.disc(x_t, t, cond, score=True)
    if has_gan(cfg):
        t_gan, x_gan = (t, x_t) if cfg.gan_time is None else noised(obj, x, cfg.gan_time)
        logits = obj.disc(x_gan, t_gan, cond)
    with torch.set_grad_enabled(obj.active == "critic" or through):
        return logits, obj.critic.guided(x_t, t, cond, uncond, w)


def critic_turn(
    obj: Objective,
    batch: Batch,
    x: Tensor,
    t: Tensor | None = None,
    cond: dict | None = None,
    weight: Tensor | None = None,
    w: float = 1.0,
) -> Iterator[tuple[Tensor, dict]]:
    """Update the critic on samples x of the student: w(t) |D_fake^w(x_t) - sg x|^2 + disc_weight (GAN pair).

    t [B] replaces the draw of critic_time, cond the batch's condition; a weight [B] multiplies w(t), the
    weight of the critic's native prediction; w is the guidance under which the critic is trained (SiD-LSG).
    """
    cfg, S, cond, x = obj.cfg, obj.schedule, batch.cond if cond is None else cond, x.detach()
    with obj.turn("critic"):
        t = obj.sample_t(len(x), cfg.critic_time) if t is None else t
        x_t = S.noise(x, obj.rng.randn_like(x), t)
        logits, fake = critic_forward(obj, x, x_t, t, cond, batch.uncond, w)
        loss = losses.denoising(S, fake, x, t, obj.critic.backbone.prediction, weight=weight)
        logs = {"denoising": loss, **critic_error(S, fake, x, x_t, t, cond)}
        if logits is not None:
            t_real = t if cfg.gan_time is None else obj.sample_t(len(x), cfg.gan_time)
            real_t = S.noise(batch.x0, obj.rng.randn_like(x), t_real)
            step = cfg.r1_step if cfg.r1_weight else None
            real_logits, penalty = real_side(obj, real_t, t_real, batch.cond, step)
            disc = losses.gan_discriminator(logits, real_logits)  # softplus pair
            loss = loss + cfg.disc_weight * disc
            logs |= {"disc": disc, "logit_fake": logits[0].mean(), "logit_real": real_logits[0].mean()}
            if penalty is not None:
                logs["r1"] = penalty
                loss = loss + cfg.r1_weight * penalty
        yield loss, logs


def real_side(obj: Objective, x_t: Tensor, t: Tensor, cond: dict, step: float | None):
    """Logits of noised real data and their R1 at this very input: exact for step 0, by one more pass at that
    distance for a larger one, None for None.
    """
    exact = step == 0
    with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():  # only this kernel differentiates twice
        logits = obj.disc(x_t.requires_grad_(exact), t, cond)
        if exact:
            return logits, losses.r1(logits, x_t)
    if step is None:
        return logits, None
    near = x_t + step * obj.rng.randn_like(x_t)
    return logits, losses.approximate_r1(logits, obj.disc(near, t, cond))


def drop_cond(obj: Objective, batch: Batch, share: float) -> dict[str, Tensor]:
    """The condition, or with this probability the null condition for all of it (if there is one)."""
    return batch.uncond if batch.uncond and float(obj.rng.rand(1)) < share else batch.cond


# -- diagnostics -------------------------------------------------------------------------------------------
@torch.no_grad()
def diagnostics(x: Tensor, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """What tells a healthy run from a sick one: distance of the two scores, spread of the samples."""
    return {
        "real_fake_gap": (real - fake).abs().mean(),
        "x_mean": x.mean(),
        "x_std": x.std(),
        "x_spread": x.std(0).mean(),  # over the batch: falls to 0 when every sample is the same
    }


@torch.no_grad()
def critic_error(schedule, fake: Tensor, x: Tensor, x_t: Tensor, t: Tensor, cond: dict) -> dict[str, Tensor]:
    """On point data (exact teachers): mean |D_fake - E[x0 | x_t]| over rows noised past the samples' spacing.

    The expectation is over the batch's other samples of the same class, the student's own distribution.
    """
    if x.ndim != 2 or len(x) < 32:
        return {}
    a, s = (v.to(x)[:, None] for v in (schedule.alpha(t), schedule.sigma(t)))
    log_w = -torch.cdist(x_t, a * x).square() / (2 * s**2)
    same = torch.eye(len(x), dtype=torch.bool, device=x.device)
    if "class_labels" in cond:
        same = same | (cond["class_labels"][:, None] != cond["class_labels"][None])
    exact = log_w.masked_fill(same, -torch.inf).softmax(1) @ x
    rows = (s / a)[:, 0] > 0.5 * x.std()
    gap = (fake - exact)[rows].abs()
    return {"critic_error": gap.nanmean()} if rows.any() else {}
