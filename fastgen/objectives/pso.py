"""PSO: a few-step student tuned by pairs of samples, one preferred to the other; no gradient of a reward.

Paper: Miao et al. 2024, arXiv 2410.03190 (authors' code; built on D3PO, arXiv 2311.13231).

  a few-step walk with fresh noise is a chain of Gaussians: x_{i+1} ~ N(m_theta(x_i), s_i^2), i = 1 .. N - 1;
  the last step is deterministic and is left out
  online, every step:
    two walks of the student as it is from two noises;  h_0 = +1, h_1 = -1 where the first sample is
    preferred, the other way round, or 0 and 0 without a preference
    log r_j = mean [ |x_{i+1} - m_ref|^2 - |x_{i+1} - m_theta|^2 ] / (2 s_i^2)  clamped to log(1 -+ clamp)
    loss = - mean log sigmoid( beta (h_0 log r_0 + h_1 log r_1) )              mean over the N - 1 transitions
  offline, pairs (w, l) of images:
    t ~ U(the student's times), one eps for both;  e(x0) = mean |eps - eps_theta(x_t)|^2
    d = e(w) - neg_factor e(l);  loss = - mean log sigmoid( beta (d_ref - d) )      or mean relu(1 + beta d)
           + prior_weight mean e(l)
  ref: the student that the stage started from, not the one that made the samples

With neg_factor 1 the offline form is Diffusion-DPO (arXiv 2311.12908) at the student's own times.

Differs
- authors: 16 pairs a round, trained on in mini-batches; here the pairs of one batch, in `updates` steps.
- the mean over elements is the authors' (code), so beta does not depend on the size of an image.
- several rewards: `pareto` is the authors' DMD2 script, their Turbo script picks one at random; `sum` is
  ours.
- step noise is drawn for each sample; the authors' DMD2 sampler shares it in a batch.
- the authors' offline script trains at wrong rows of its table of timesteps; here at the student's times.
- without `data.dispreferred` the losers are fresh samples of the reference; the authors draw them once.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.core.batch import Batch, Cond, stack
from fastgen.core.errors import UserError
from fastgen.diffusion import losses
from fastgen.objectives.base import Updates, data_of
from fastgen.objectives.requirements import Calls, Requirements
from fastgen.objectives.shared.rewards import Rewarded, RewardedConfig, judged, pareto
from fastgen.roles.roles import Role


class PSOConfig(RewardedConfig):
    """Pairwise sample optimization."""

    name: Literal["pso"] = "pso"
    pairs: Literal["online", "offline"] = "online"
    """online: samples of the student, which the rewards compare; offline: data.images are preferred to
    data.dispreferred, or to samples of the student at the start
    """
    beta: float = Field(50.0, gt=0)
    """how sharply a preference is learned; authors: 50 online, 5 offline"""
    clamp: float = Field(0.1, gt=0, lt=1)
    """online: a likelihood ratio further from 1 feels nothing"""
    prefer: Literal["pareto", "sum"] = "pareto"
    """several rewards: the sample that is worse in none, or the larger weighted sum"""
    updates: int = Field(1, ge=1)
    """online: optimizer updates on each batch of pairs"""
    offline_loss: Literal["dpo", "hinge"] = "dpo"
    """offline: against the reference, or without it, for subjects and styles"""
    neg_factor: float = Field(1.0, ge=0)
    """offline: weight of the dispreferred image"""
    prior_weight: float = Field(0.0, ge=0)
    """offline: weight of plain denoising of the dispreferred image, which keeps its kind"""

    @model_validator(mode="after")
    def _rewards_where_used(self):
        if self.pairs == "offline" and self.rewards:
            raise ValueError("objective.rewards: found some with pairs offline, which compares by the data")
        return self


class PSO(Rewarded, config=PSOConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        online = cfg.pairs == "online"

        def network_calls(guidance: float, num: int) -> Calls:
            if online:
                num = max(num, 2)  # one step has no transition
                tried = 2.0 * (num - 1)
                return {"student": 2.0 * num, "previous": tried, "student+grad": cfg.updates * tried}
            return {"student+grad": 2, "previous": 2}

        def why_not_sampled(num: int, sampler: str) -> str:
            if online and num < 2:
                return "one step has no transition to learn: use 2 or more, or objective.pairs offline"
            if online and sampler == "ode":
                return "its steps have no density: use renoise, or tcd with student.gamma above 0"
            return ""

        needs = replace(
            super().requirements(cfg), network_calls=network_calls, why_not_sampled=why_not_sampled
        )
        return needs if online else replace(needs, auxiliaries={}, real_data=True, dispreferred=True)

    def check(self) -> None:
        if self.cfg.pairs == "offline":
            return
        super().check()
        num, spec = len(self.student.times), self.student.spec
        if spec.sampler == "tcd" and not spec.gamma:
            found = "found 0: steps without fresh noise have no density"
            raise UserError("student.gamma", found, "set it above 0, or student.sampler to renoise")
        if why := self.requirements(self.cfg).why_not_sampled(num, spec.sampler):
            raise UserError("student.num_steps", f"found {num} with sampler {spec.sampler}", why)

    def step(self, batch: Batch, k: int) -> Updates:
        if k == 0:
            self.follow("previous")
        yield from self.online(batch) if self.cfg.pairs == "online" else self.offline(batch)

    # -- pairs of its own samples ----------------------------------------------------------------------------
    def online(self, batch: Batch) -> Updates:
        noises = [batch.noise, self.rng.randn_like(batch.noise)]
        walks, samples = zip(*(self.walk(noise, batch.cond) for noise in noises))
        r = torch.stack([judged(self.rewards, x, batch) for x in samples])  # [2, num, B]
        h = self.preference(r)  # [2, B]
        states = [torch.cat(pair) for pair in zip(*walks)]  # both members of each pair, one below the other
        cond = stack([batch.cond, batch.cond])
        with torch.no_grad():
            reference = [self.step_error(self.previous, states, i, cond) for i in range(len(states) - 1)]
        logs = {**self.reward_logs(r.mean(0)), "decided": (h[0] != 0).float().mean()}
        for _ in range(self.cfg.updates):
            with self.turn("student"):
                terms, ratios = [], []
                for i, ref in enumerate(reference):
                    log_r = ref - self.step_error(self.student, states, i, cond)  # [2 B]
                    terms.append(self.pair_loss(log_r.reshape(2, -1), h))
                    ratios.append(log_r.detach().abs().mean())
                yield torch.stack(terms).mean(), {**logs, "log_ratio": torch.stack(ratios).mean()}

    def walk(self, noise: Tensor, cond: Cond) -> tuple[list[Tensor], Tensor]:
        """(states at each of the student's times, its sample) from unit noise, without gradient."""
        student, last = self.student, len(self.student.times) - 1
        states = student.states(noise, cond, self.rng.randn_like, last)
        with torch.no_grad():
            x_t, t = states[-1], student.time(last, noise)
            x = student(x_t, t, student.ending(cond, last, x_t))
        return states, student.sample_at(x, x_t, last)

    def preference(self, r: Tensor) -> Tensor:
        """+1 for the preferred sample and -1 for the other, 0 for both without a preference [2, B]; r holds
        rewards [2, num, B].
        """
        better = r[0] - r[1]
        if self.cfg.prefer == "sum":
            first = (self.weight[:, None] * better).sum(0).sign()
        else:
            first = pareto(better)
        return torch.stack([first, -first])

    def step_error(self, role: Role, states: list[Tensor], i: int, cond: Cond) -> Tensor:
        """mean |x_{i+1} - m|^2 / (2 s_i^2) [B], minus log p(x_{i+1} | x_i) but for a constant."""
        student, x_t = self.student, states[i]
        t, u = student.time(i, x_t), student.time(i + 1, x_t)
        mean, std = student.transition(role(x_t, t, student.ending(cond, i, x_t)), x_t, t, u)
        return losses.per_sample_mean(((states[i + 1] - mean) / std) ** 2) / 2

    def pair_loss(self, log_r: Tensor, h: Tensor) -> Tensor:
        """- mean log sigmoid( beta sum_j h_j log r_j ) of log ratios and preferences [2, B]."""
        e = self.cfg.clamp
        kept = log_r.clamp(math.log(1 - e), math.log(1 + e))
        return -F.logsigmoid(self.cfg.beta * (h * kept).sum(0)).mean()

    # -- pairs of images -------------------------------------------------------------------------------------
    def offline(self, batch: Batch) -> Updates:
        cfg, S = self.cfg, self.schedule
        winner = data_of(batch)
        loser = self.negatives(batch) if batch.dispreferred is None else batch.dispreferred
        times = torch.tensor(self.student.times, dtype=torch.float64, device=winner.device)
        t, eps = times[self.rng.randint(len(times), len(winner))], self.rng.randn_like(winner)
        weight = losses.error_weight(S, t, "eps")

        def error(role: Role, x0: Tensor) -> Tensor:
            D = role(S.noise(x0, eps, t), t, batch.cond)
            return weight.to(D) * losses.per_sample_mean((D - x0) ** 2)  # |eps - eps_theta|^2

        with torch.no_grad():
            d_ref = error(self.previous, winner) - cfg.neg_factor * error(self.previous, loser)
        with self.turn("student"):
            e_w, e_l = error(self.student, winner), error(self.student, loser)
            d = e_w - cfg.neg_factor * e_l
            logit = cfg.beta * (d_ref - d)
            hinge = cfg.offline_loss == "hinge"
            loss = (torch.relu(1 + cfg.beta * d) if hinge else -F.logsigmoid(logit)).mean()
            logs = {"pair": loss, "right": (logit > 0).float().mean()}
            yield loss + cfg.prior_weight * e_l.mean(), logs

    @torch.no_grad()
    def negatives(self, batch: Batch) -> Tensor:
        """Samples of the student that the stage started from, for this batch's conditions."""
        return self.student.with_network(self.previous).generate(batch.noise, batch.cond, self.rng.randn_like)
