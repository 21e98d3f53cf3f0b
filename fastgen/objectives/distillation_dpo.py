"""Distillation-DPO: score distillation of pairs, the better of two towards the teacher, the worse away from
it.

Paper: Zhao et al. 2025, arXiv 2504.11447, on ScoreLiDAR (arXiv 2412.03515). No gradient of the metric is
needed.

  every step:
    a = G(z, scan), b = G(pair_scale z, scan)
    w the one of the two that is nearer to the truth y (Chamfer distance), l the other
    one t ~ U and one eps for both:  w_t = alpha w + sigma eps,  l_t = alpha l + sigma eps
    D_w = e_T(w_t) - e_W(w_t),  D_l = e_T(l_t) - e_L(l_t)
    student: mean(sg[D_w] . w) - loser_weight mean(sg[guard(D_l)] . l)
    critics: |e_W(w_t) - eps|^2 + |e_L(l_t) - eps|^2, each at times and noise of its own

  guard: without one the loss has no lower bound, for a loser may be pushed away for ever. cap: |D_l| is at
  most `cap` |D_w| by sample; gate: times sigmoid(-4 (|D_l|^2 - 1/4)) by point, so that losers far from the
  teacher are left alone.

Data that are no clouds are compared point by point with what they are paired with.

Differs
- the published loss multiplies with w_t - w and l_t - l, of which no gradient reaches the student.
- there is no guard in the paper, which has loser_weight 1.
- z of b: the abstract speaks of different noise, the code scales the same by 1.1, and so the larger noise
  mostly loses. pair_scale 0 draws noise of its own, which is the default.
- the critics learn from the samples of the step; authors draw new ones.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import expand
from fastgen.objectives.base import TimeConfig, Updates, data_of, guided
from fastgen.objectives.requirements import Requirements, passes
from fastgen.objectives.shared.clouds import chamfer, is_clouds, placed
from fastgen.objectives.shared.critic import Matching, MatchingConfig


class DistillationDPOConfig(MatchingConfig):
    """Score distillation of preference pairs."""

    name: Literal["distillation_dpo"] = "distillation_dpo"
    student_every: int = Field(1, ge=1)
    """critic updates per student update"""
    critic_time: TimeConfig = TimeConfig(low=0.0, high=1.0)
    """noise levels of the critics' losses"""
    loser_weight: float = Field(1.0, ge=0)
    """weight of the push away from the teacher; 0 matches winners alone"""
    guard: Literal["cap", "gate", "none"] = "cap"
    """what bounds that push; none diverges from a weight of about 0.3 on"""
    cap: float = Field(0.5, gt=0)
    """largest push as a share of the pull on the winner, for guard cap"""
    pair_scale: float = Field(0.0, ge=0)
    """the second sample's noise is the first's times this; 0 draws its own"""


class DistillationDPO(Matching, config=DistillationDPOConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        r = 1 / cfg.student_every
        return replace(
            super().requirements(cfg),
            network_calls=lambda w, num_steps: {
                "student": (num_steps - 1) + 2 * (1 - r),
                "student+grad": 2 * r,
                "teacher": 2 * r * passes(w),
                "critic": r,
                "loser": r,
                "critic+grad": 1,
                "loser+grad": 1,
            },
            players={"student": ("student",), "critic": ("critic", "loser")},
            real_data=True,
        )

    def step(self, batch: Batch, k: int, teacher=None) -> Updates:
        cfg, S, teacher = self.cfg, self.schedule, teacher or self.teacher
        last = self.rng.shared_randint(len(self.student.times))
        if k % cfg.student_every == 0:
            with self.turn("student"):
                w, l, logs = self.ranked(batch, last)  # noqa: E741
                t, eps = self.sample_t(len(w), cfg.time), self.rng.randn_like(w)
                w_t, l_t = S.noise(w, eps, t), S.noise(l, eps, t)  # one t, one eps
                with torch.no_grad():
                    real = guided(
                        teacher, torch.cat([w_t, l_t]), torch.cat([t, t]), twice(batch), self.guidance
                    )
                    gap_w = noise_gap(S, real[: len(w)], self.critic(w_t, t, batch.cond), t)  # D_w
                    gap_l = noise_gap(S, real[len(w) :], self.parts["loser"](l_t, t, batch.cond), t)  # D_l
                    push = guarded(gap_l, gap_w, cfg.guard, cfg.cap)
                pull, away = losses.linear(w, gap_w), losses.linear(l, push)
                more = {"winner_gap": gap_w.square().mean(), "loser_gap": gap_l.square().mean()}
                yield pull - cfg.loser_weight * away, {**logs, **more, "pushed": push.square().mean()}
        else:
            with torch.no_grad():
                w, l, _ = self.ranked(batch, last)  # noqa: E741
        yield from self.critics_turn(batch, w.detach(), l.detach())

    def ranked(self, batch: Batch, last: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(the better of two samples, the worse, what to log of them)."""
        scale = self.cfg.pair_scale
        noise = scale * batch.noise if scale else self.rng.randn_like(batch.noise)
        a, b = self.generate(batch, last), self.generate(replace(batch, noise=noise), last)
        of_a, of_b = (self.distance(x, batch) for x in (a, b))
        first = of_a <= of_b
        here = expand(first.double(), a).bool()
        logs = {"distance": of_a.mean(), "second_wins": (~first).double().mean()}
        logs["distance_apart"] = (of_a - of_b).abs().mean()
        return torch.where(here, a, b), torch.where(here, b, a), logs

    @torch.no_grad()
    def distance(self, x: Tensor, batch: Batch) -> Tensor:
        """The metric [B]: how far samples are from their truth."""
        y = data_of(batch)
        if is_clouds(x):
            return chamfer(placed(x, batch.cond), placed(y, batch.cond))
        return (x - y).square().flatten(1).mean(1)

    def critics_turn(self, batch: Batch, w: Tensor, l: Tensor) -> Updates:  # noqa: E741
        """|e_W - eps|^2 + |e_L - eps|^2 on winners and losers."""
        with self.turn("critic"):
            found = {}
            for name, x in (("critic", w), ("loser", l)):
                t, x_t = self.noised(x, self.cfg.critic_time)
                found[name] = self.denoising_loss(self.parts[name](x_t, t, batch.cond), x, t)
            yield found["critic"] + found["loser"], {"winners": found["critic"], "losers": found["loser"]}


def twice(batch: Batch) -> Batch:
    """The batch's conditions for its rows and for them again."""
    cond, uncond = ({k: torch.cat([v, v]) for k, v in c.items()} for c in (batch.cond, batch.uncond))
    return replace(batch, cond=cond, uncond=uncond)


def noise_gap(schedule, real: Tensor, fake: Tensor, t: Tensor) -> Tensor:
    """e_real - e_fake of two estimates D [B, ...] at the same x_t: alpha / sigma (D_fake - D_real)."""
    return expand(schedule.alpha(t) / schedule.sigma(t), real) * (fake - real)


def guarded(gap: Tensor, beside: Tensor, guard: str, cap: float) -> Tensor:
    """The difference of noises on losers [B, ...] as it may push; beside: that on winners."""
    if guard == "cap":
        norm, most = (g.flatten(1).norm(dim=1) for g in (gap, cap * beside))
        return gap * expand((most / norm.clamp(min=1e-12)).clamp(max=1), gap)
    if guard == "gate":
        size = gap.square().mean(-1, keepdim=True) if is_clouds(gap) else _mean(gap.square())
        return gap * torch.sigmoid(-4 * (size - 0.25))
    return gap


def _mean(x: Tensor) -> Tensor:
    return x.mean(tuple(range(1, x.ndim)), keepdim=True)
