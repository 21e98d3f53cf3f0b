"""SFD: score forgetting distillation, a one-step student without a class or concept of its teacher, without
images.

Paper: Chen, Zhang & Zhou 2024, arXiv 2409.11219. It is SiD (sid.py) on two kinds of rows:

  rows to keep:    condition c_r, of the teacher too
  rows to forget:  condition c_f of student and critic, c_o (the override) of the teacher
  critic:   x = G(z, c) without gradient;  w(t) |D_fake^k1(x_t, c) - x|^2  [c_f: critic_forget_weight]
  student:  x = G(z', c);  x_t = alpha x + sigma eps, all with gradient
            Delta = D_real^k4(x_t, c_r or c_o) - D_fake^k2(x_t, c_r or c_f),   W = sg mean|x - D_real|
            L = Delta.[(D_real - x) - alpha Delta] / W                          [c_f: forget_weight times]

For an exact critic the c_f rows stand still where G(z, c_f) has the teacher's law of c_o, whatever alpha is.
c_o = c_f is SiD on all conditions; both weights 0 is plain fine-tuning on what is to be kept.

Differs
- authors take a batch of each kind, here the batch is divided between them (`forget_share`).
- their weights of the rows to keep are 1 everywhere, and so they are here, without a setting.
- an override is one for everything, one for each, or none: any class that is kept, or the prompt without the
  words. The authors' third way, a classifier that chooses it, and their negative prompts are left out.
- W and the means over pixels, fresh conditions and stops at NaN as in sid.py. Their gradients are clipped by
  value, ours by norm (optim.student.clip).
- a run's distances are, as published, those of what is kept; `forgotten` is the share of the samples asked
  for the rest that show it. The authors' script divides that by all samples, here it is those asked for it.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.diffusion import divergences, losses
from fastgen.objectives.base import TimeConfig, Updates, guided
from fastgen.objectives.requirements import ConceptSpec, Requirements
from fastgen.objectives.shared.critic import Matching, MatchingConfig, diagnostics, through_scores
from fastgen.roles.concepts import Concepts
from fastgen.roles.roles import Role


class SFDConfig(MatchingConfig):
    """Score identity distillation that leaves out classes or concepts."""

    name: Literal["sfd"] = "sfd"
    forget: tuple[str, ...] = ()
    """classes by name or number, or words of the prompts, that are to be forgotten"""
    override: tuple[str, ...] = ()
    """what is shown instead: one for all, one for each, or none (any kept class; the prompt without it)"""
    forget_share: float = Field(0.5, gt=0, lt=1)
    """share of a batch's rows that ask for what is to be forgotten"""
    forget_weight: float = Field(1.0, ge=0)
    """weight of these rows in the student's loss, those to keep having 1"""
    critic_forget_weight: float = Field(1.0, ge=0)
    """the same in the critic's"""
    student_every: int = Field(1, ge=1)
    """critic updates per student update"""
    time: TimeConfig = TimeConfig(low=0.0, high=0.8)
    """noise levels of the student's loss"""
    critic_time: TimeConfig = TimeConfig(kind="log_normal", mean=-1.2, std=1.2)
    """noise levels of the critic's denoising loss"""
    alpha: float = 1.2
    """how much of |Delta|^2 is taken away; 1/2 is the exact gradient"""
    train_guidance: float = Field(1.0, ge=0)
    """k1: guidance under which the critic is trained"""
    score_guidance: float = Field(1.0, ge=0)
    """k2: guidance under which the critic is read in the student's turn"""


class SFD(Matching, config=SFDConfig):
    concepts: Concepts

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        return replace(
            through_scores(super().requirements(cfg), cfg),
            auxiliaries={"concepts": ConceptSpec(cfg.forget, cfg.override)},
            forgets=cfg.forget,
        )

    def step(self, batch: Batch, k: int, teacher: Role | None = None) -> Updates:
        cfg, teacher = self.cfg, teacher or self.teacher
        asked, shown = self.conditions(batch)  # c_r and c_f;  c_r and c_o
        last = self.rng.shared_randint(len(self.student.times))
        with torch.no_grad():
            x = self.generate(asked, last)  # x = G(z, c)
        weight = self.weights(len(x), cfg.critic_forget_weight)
        yield from self.critic_turn(asked, x, w=cfg.train_guidance, weight=weight)  # w(t) |D_fake^k1 - x|^2
        if k % cfg.student_every:
            return
        with self.turn("student"):
            noise = self.rng.randn_like(batch.noise)
            x = self.student.generate(noise, asked.cond, self.rng.randn_like, last)  # x = G(z', c)
            t, x_t = self.noised(x, cfg.time)  # x_t = alpha x + sigma eps
            real = guided(teacher, x_t, t, shown, self.guidance)  # D_real^k4(x_t, c_o)
            fake = guided(self.critic, x_t, t, asked, cfg.score_guidance)  # D_fake^k2(x_t, c_f)
            scale = losses.per_sample_mean((x - real).abs()).detach().clamp(min=1e-5)  # W
            sid = divergences.score_identity(x, real, fake, cfg.alpha) / scale
            kept = len(x) - self.num_gone(len(x))
            logs = {"keep": sid[:kept].mean(), "forget": sid[kept:].mean(), **diagnostics(x, real, fake)}
            yield (sid * self.weights(len(x), cfg.forget_weight).to(sid)).mean(), logs

    def num_gone(self, num: int) -> int:
        """Rows of num that ask for what is to be forgotten: at least one, and at least one is kept."""
        return min(max(round(num * self.cfg.forget_share), 1), num - 1)

    def conditions(self, batch: Batch) -> tuple[Batch, Batch]:
        """The batch with conditions to keep and then to forget, and the same with what the teacher shows."""
        num = len(batch.noise)
        gone = self.num_gone(num)
        asked, shown = self.concepts.draw(num - gone, gone, self.rng, batch.noise.device)
        return replace(batch, cond=asked, texts=None), replace(batch, cond=shown, texts=None)

    def weights(self, num: int, weight: float) -> Tensor:
        """[B], by which a mean over rows is mean over those to keep + weight * mean over those to forget."""
        gone = self.num_gone(num)
        one = torch.ones(num, device=self.rng.device)
        one[: num - gone] = num / (num - gone)
        one[num - gone :] = weight * num / gone
        return one
