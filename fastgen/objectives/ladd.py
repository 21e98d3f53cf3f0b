"""LADD: latent adversarial distillation on the features of the frozen teacher.

Paper: Sauer et al. 2024, arXiv 2403.12015 (SD3-Turbo; no code); as a second loss: SANA-Sprint,
arXiv 2503.09641 (Sec. 3.2), NVlabs/Sana; told preferences: Seedance 1.0, arXiv 2506.09113 (no code).

  i ~ P(student's steps);  x_t = alpha x0 + sigma eps at t_i, pure noise at the first
  x = D_theta(x_t, t_i, c)
  features of the teacher at (alpha x + sigma eps', t', c), t' of their own; heads at several depths -> logits
  update G with     -mean logits                        (hinge), or softplus(-logits)
  update heads with 1/2 [relu(1 - l_real) + relu(1 + l_fake)], or the softplus pair,
                    + r1_weight |d l_real / d x_t'|^2   at the same noised real input
                    - preference_weight log sigmoid(l_w - l_l)     w preferred to l, one t' and eps' for both
  fake also: real x0 under another row's condition (misaligned pairs)
  (w, l): data.images and data.dispreferred; or, with rewards, x and a second sample x' = D_theta at t_i of
  another noise, the one that is worse in no reward before the other, left out where neither is

Differs
- heads: spectral norm, residual block and one logit per token as in StyleGAN-T, with 3 x 3 convolutions on
  the map instead of 1-D ones over tokens, GroupNorm instead of batch statistics of eight samples (so that a
  batch of one works and samples stay apart), and no condition of their own: text and time come through the
  teacher.
- paper: samples of the guided teacher stand for real data; here the data does. Both updates are made at each
  step and share the sample; authors alternate on different batches.
- R1: exact, or finite differences (`approximate`, APT). The public code compares the logit of a noised sample
  with that of an un-noised one; here both are the same x_t', one of them perturbed.
- Seedance says that its discriminator learns from pairs that people have judged, and prints no loss: the
  pairwise term (Bradley-Terry) and the ranking by rewards in the place of people are ours.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.core.batch import Batch, Cond
from fastgen.diffusion.schedules import expand
from fastgen.networks.rewards import Rewards
from fastgen.objectives.base import Objective, ObjectiveConfig, Updates, data_of
from fastgen.objectives.requirements import Auxiliary, Requirements
from fastgen.objectives.shared.gan import AdversarialConfig, Pairs, disc_turn, gan_student_loss, student_input
from fastgen.objectives.shared.rewards import RewardConfig, judged, pareto, spec_of


class LADDConfig(ObjectiveConfig):
    """Latent adversarial diffusion distillation."""

    name: Literal["ladd"] = "ladd"
    gan: AdversarialConfig = AdversarialConfig()
    """the discriminator and its loss"""
    student_every: int = Field(1, ge=1)
    """head updates per student update"""
    step_weights: tuple[float, ...] = ()
    """how often each of the student's steps is trained; empty trains all alike"""
    preference_weight: float = Field(0.0, ge=0)
    """weight of telling the heads which of two samples is preferred; 0 leaves it out"""
    rewards: tuple[RewardConfig, ...] = ()
    """what ranks pairs of the student's own samples; empty takes data.images before data.dispreferred"""

    @model_validator(mode="after")
    def _rewards_where_used(self):
        if self.rewards and not self.preference_weight:
            raise ValueError(
                "objective.rewards: found some with preference_weight 0, which ranks nothing; set it above 0"
            )
        return self


class LADD(Objective, config=LADDConfig):
    rewards: Rewards
    """what ranks, where there are some"""

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        r = 1 / cfg.student_every
        calls = cfg.gan.network_calls() | {"student+grad": r, "features+grad": r}
        parts: dict[str, Auxiliary] = {"disc": cfg.gan.discriminator()}
        if cfg.rewards:
            parts["rewards"] = spec_of(cfg.rewards)
        told, others = bool(cfg.preference_weight), 1 - r + bool(cfg.rewards)
        calls["features"] += 2 * told
        return Requirements(
            lambda guidance, num_steps: calls | ({"student": others} if others else {}),
            players={"student": ("student",), "disc": ("disc",)},
            auxiliaries=parts,
            dispreferred=told and not cfg.rewards,
            losers=told and not cfg.rewards,
            one_guidance=False,  # of the teacher only features are read
            guidance_embedding=True,
        )

    def step(self, batch: Batch, k: int) -> Updates:
        _, cond = self.draw_guidance(batch)
        t = self.step_times(batch)
        if k % self.cfg.student_every == 0:
            with self.turn("student"):
                x = self.student(student_input(self, batch, t), t, cond)  # D_theta(x_t, t_i, c)
                yield gan_student_loss(self, self.cfg.gan, x, batch.cond)
        else:
            with torch.no_grad():
                x = self.student(student_input(self, batch, t), t, cond)
        pairs = self.pairs(batch, x, t, cond) if self.cfg.preference_weight else None
        yield from disc_turn(self, self.cfg.gan, batch, x, pairs)

    def step_times(self, batch: Batch) -> Tensor:
        """t_i [B], each a random one of the student's steps."""
        times = torch.tensor(self.student.times, dtype=torch.float64, device=batch.noise.device)
        p = torch.tensor(self.cfg.step_weights or [1.0] * len(times), dtype=torch.float64).cumsum(0)
        i = torch.searchsorted(p / p[-1], self.rng.rand(len(batch.noise)).cpu(), right=True).to(times.device)
        return times[i]

    def pairs(self, batch: Batch, x: Tensor, t: Tensor, cond: Cond) -> Pairs:
        """Of the data, or samples of the student at times t [B] by the rewards."""
        weight = self.cfg.preference_weight
        if not self.cfg.rewards:
            assert batch.dispreferred is not None, "the config was checked: losers are there"
            every = torch.ones(len(x), dtype=torch.bool, device=x.device)
            return Pairs(data_of(batch), batch.dispreferred, every, weight)
        again = replace(batch, noise=self.rng.randn_like(batch.noise))
        with torch.no_grad():
            other = self.student(student_input(self, again, t), t, cond)  # x'
        h = pareto(judged(self.rewards, x.detach(), batch) - judged(self.rewards, other, batch))
        first = expand(h, x) > 0
        return Pairs(torch.where(first, x, other), torch.where(first, other, x), h != 0, weight)
