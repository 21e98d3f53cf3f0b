"""What score distillations share: settings, the critic, the GAN pair, diagnostics.

A method of this family makes a student sample x, noises it, and compares the frozen teacher's D_real(x_t)
with the D_fake(x_t) of a critic that learns the student's own distribution. How the two become a gradient is
the method; the pieces that several methods need are here.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch, Cond
from fastgen.diffusion import losses
from fastgen.networks.attention import exact_attention
from fastgen.objectives.base import (
    Objective,
    ObjectiveConfig,
    TimeConfig,
    Updates,
    data_of,
    guided,
    native_weighting,
)
from fastgen.objectives.requirements import Calls, DiscriminatorSpec, Requirements, passes
from fastgen.roles.roles import Role


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


def has_gan(cfg: ObjectiveConfig) -> bool:
    """Whether these settings train a discriminator."""
    return isinstance(cfg, GanMatchingConfig) and cfg.gan_weight > 0


def check_ratio_level(cfg):
    """Validator of configs with a divergence f that is weighed by the density ratio p_t / q_t: the
    discriminator must be trained and read where the score is, at its noise levels and its x_t.
    """
    if cfg.gan_time is not None and cfg.f != "rkl":
        raise ValueError(
            f"gan_time: f: {cfg.f} weighs the score by the discriminator's ratio at the very same x_t, so "
            "the two share their noise levels; leave gan_time out (critic_time is where both are trained)"
        )
    return cfg


def critic_calls(cfg, guidance: float, earlier: float = 0) -> Calls:
    """Expected network calls of one step; `earlier` counts the student's calls before its last one."""
    gan, r = has_gan(cfg), 1 / cfg.student_every
    own = gan and not cfg.one_pass
    penalty = gan and bool(cfg.r1_weight) * (1 if cfg.r1_step else 2)
    calls = {
        "student": earlier + (1 - r),
        "student+grad": r,
        "teacher": r * passes(guidance),
        "critic": r * (not gan or own),
        "critic+grad": 1 + r * (gan and not own),
        "features+grad": (gan + own) + r * own + penalty,
    }
    return {name: round(n, 3) for name, n in calls.items() if n}


def calls_through_scores(
    cfg, guidance: float, num_steps: int, score_guidance: float = 1.0, train_guidance: float = 1.0
) -> Calls:
    """The same for methods that differentiate teacher and critic in x_t and draw a sample for each turn."""
    r, gan, earlier = 1 / cfg.student_every, has_gan(cfg), (num_steps - 1) / 2
    teacher, score, train = (passes(w) for w in (guidance, score_guidance, train_guidance))
    own = [gan and not (cfg.one_pass and n == 1) for n in (score, train)]  # logits of a pass of their own
    calls = {
        "student": earlier * (1 + r) + 1,
        "student+grad": r,
        "teacher+grad": r * teacher,
        "critic+grad": r * score + train,
        "features+grad": gan + r * own[0] + own[1],
    }
    return {name: round(n, 3) for name, n in calls.items() if n}


def through_scores(needs: Requirements, cfg) -> Requirements:
    """Requirements of such a method whose critic is trained and read under guidance scales of its own."""
    scales = {"score_guidance": cfg.score_guidance, "train_guidance": cfg.train_guidance}
    return replace(
        needs,
        network_calls=lambda w, num_steps: calls_through_scores(cfg, w, num_steps, *scales.values()),
        guidance_settings=scales,
    )


class Matching(Objective):
    """A method with an online critic, whose optimizer also trains the discriminator's heads of a GAN."""

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        gan, auxiliaries = has_gan(cfg), {}
        if gan:
            disc = DiscriminatorSpec(cfg.disc_features, cfg.disc_taps)
            auxiliaries["disc"] = replace(disc, head="mean") if cfg.disc_mean else disc
        return Requirements(
            lambda guidance, num_steps: critic_calls(cfg, guidance, (num_steps - 1) / 2),
            players={"student": ("student",), "critic": ("critic", "disc") if gan else ("critic",)},
            auxiliaries=auxiliaries,
            real_data=gan,
        )

    def step(self, batch: Batch, k: int, teacher: Role | None = None) -> Updates:
        """Another teacher may take the place of the method's own (DisBack)."""
        raise NotImplementedError

    def noised(self, x: Tensor, time: TimeConfig) -> tuple[Tensor, Tensor]:
        """(t, x_t = alpha x + sigma eps), fresh for every row; gradient flows through x."""
        t, eps = self.sample_t(len(x), time), self.rng.randn_like(x)
        return t, self.schedule.noise(x, eps, t)

    def critic_forward(
        self, x: Tensor, x_t: Tensor, t: Tensor, batch: Batch, grad: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """(D_fake, the discriminator's logits): one pass of the critic where they share it, else two; no
        logits without a GAN. Without `grad`, D_fake of a pass of its own carries no gradient.
        """
        if has_gan(self.cfg) and self.cfg.one_pass:
            logits, fake = self.disc(x_t, t, batch.cond, score=True)
            return fake, logits
        logits = self.disc_logits(x, x_t, t, batch.cond) if has_gan(self.cfg) else []
        with nullcontext() if grad else torch.no_grad():
            return self.critic(x_t, t, batch.cond), logits

    def guided_critic_forward(
        self, x: Tensor, x_t: Tensor, t: Tensor, batch: Batch, w: float
    ) -> tuple[Tensor, list[Tensor]]:
        """The same, always with gradient, under a guidance scale w of the critic (SiD-LSG)."""
        if w == 1:
            return self.critic_forward(x, x_t, t, batch)
        logits = self.disc_logits(x, x_t, t, batch.cond) if has_gan(self.cfg) else []
        return guided(self.critic, x_t, t, batch, w), logits

    def denoising_loss(self, fake: Tensor, x: Tensor, t: Tensor, weight: Tensor | None = None) -> Tensor:
        """w(t) |fake - sg x|^2 with the weight of the critic's native prediction, times a weight [B]."""
        kind = native_weighting(self.critic)
        return losses.denoising(self.schedule, fake, x, t, kind, weight=weight)

    def disc_logits(self, x: Tensor, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """Logits of samples x by a pass of their own: at x_t, or noised anew where gan_time is set."""
        if self.cfg.gan_time is not None:
            t, x_t = self.noised(x, self.cfg.gan_time)
        return self.disc(x_t, t, cond)

    def real_logits(self, batch: Batch, t: Tensor) -> tuple[list[Tensor], Tensor]:
        """(logits of noised real data, R1 there: 0 where r1_weight is); at t, or at levels of gan_time."""
        cfg, x0 = self.cfg, data_of(batch)
        t = t if cfg.gan_time is None else self.sample_t(len(x0), cfg.gan_time)
        x_t = self.schedule.noise(x0, self.rng.randn_like(x0), t)
        logits, penalty = real_side(self, x_t, t, batch.cond, cfg.r1_step if cfg.r1_weight else None)
        return logits, x0.new_zeros(()) if penalty is None else penalty

    def critic_turn(
        self,
        batch: Batch,
        x: Tensor,
        cond: Cond | None = None,
        w: float = 1.0,
        weight: Tensor | None = None,
    ) -> Updates:
        """Update the critic on samples x: w(t) |D_fake^w(x_t) - sg x|^2 + disc_weight (GAN pair).

        cond replaces the batch's condition of the samples; w is the guidance under which the critic is
        trained (SiD-LSG); weight [B] multiplies each sample's error.
        """
        cfg, x = self.cfg, x.detach()
        fakes = batch if cond is None else replace(batch, cond=cond)
        with self.turn("critic"):
            t, x_t = self.noised(x, cfg.critic_time)
            fake, logits = self.guided_critic_forward(x, x_t, t, fakes, w)  # D_fake^w
            loss = self.denoising_loss(fake, x, t, weight)
            logs = {"denoising": loss, **self.critic_error(fake, x, x_t, t, fakes.cond)}
            if has_gan(cfg):
                real, r1 = self.real_logits(batch, t)
                disc = losses.gan_discriminator(logits, real)  # softplus pair
                loss = loss + cfg.disc_weight * disc + cfg.r1_weight * r1
                logs |= self.disc_logs(disc, logits, real, r1)
            yield loss, logs

    def drop_batch_condition(self, batch: Batch, share: float) -> Cond:
        """The condition, or with this probability the null condition for all of it (if there is one)."""
        return batch.uncond if batch.uncond and float(self.rng.rand(1)) < share else batch.cond

    # -- diagnostics ---------------------------------------------------------------------------------------
    def disc_logs(self, disc: Tensor, fake: list[Tensor], real: list[Tensor], r1: Tensor) -> dict:
        """What to log of the discriminator: its loss, mean logits of its first head, R1 where it is on."""
        logs = {"disc": disc, "logit_fake": fake[0].mean(), "logit_real": real[0].mean()}
        return logs | ({"r1": r1} if self.cfg.r1_weight else {})

    @torch.no_grad()
    def critic_error(self, fake: Tensor, x: Tensor, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, Tensor]:
        """On point data (exact teachers): mean |D_fake - E[x0 | x_t]| over rows noised past the samples'
        spacing. The expectation is over the batch's other samples of the same class, the student's own
        distribution.
        """
        if x.ndim != 2 or len(x) < 32:
            return {}
        a, s = (v.to(x)[:, None] for v in (self.schedule.alpha(t), self.schedule.sigma(t)))
        log_w = -torch.cdist(x_t, a * x).square() / (2 * s**2)
        same = torch.eye(len(x), dtype=torch.bool, device=x.device)
        if "class_labels" in cond:
            same = same | (cond["class_labels"][:, None] != cond["class_labels"][None])
        exact = log_w.masked_fill(same, -torch.inf).softmax(1) @ x
        rows = (s / a)[:, 0] > 0.5 * x.std()
        gap = (fake - exact)[rows].abs()
        return {"critic_error": gap.nanmean()} if rows.any() else {}


def real_side(
    obj: Objective, x_t: Tensor, t: Tensor, cond: Cond, step: float | None
) -> tuple[list[Tensor], Tensor | None]:
    """Logits of noised real data and their R1 at this very input: exact for step 0, by one more pass at that
    distance for a larger one, None for None.
    """
    exact = step == 0
    with exact_attention() if exact else nullcontext():  # which differentiates twice
        logits = obj.disc(x_t.requires_grad_(exact), t, cond)
        if exact:
            return logits, losses.r1(logits, x_t)
    if step is None:
        return logits, None
    near = x_t + step * obj.rng.randn_like(x_t)
    return logits, losses.approximate_r1(logits, obj.disc(near, t, cond))


@torch.no_grad()
def diagnostics(x: Tensor, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """What distinguishes a healthy run from a sick one: distance of the two scores, spread of the samples."""
    found = {"real_fake_gap": (real - fake).abs().mean(), "x_mean": x.mean(), "x_std": x.std()}
    if len(x) > 1:  # over the batch: falls to 0 when every sample is the same
        found["x_spread"] = x.std(0).mean()
    return found
