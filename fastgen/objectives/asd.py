"""Asynchronous score distillation (ScaleDreamer): the frozen teacher at a larger time stands for the critic.

Paper: Ma et al. 2024, arXiv 2407.02040 (Sec. 3.2); times, shift and schedule from the authors' code.

  every step:
    c ~ cameras;  x = render(theta, c)
    t ~ U[low, high], both falling over the run;  t' = t + u rho (t - low), u ~ U(0, 1)       t' >= t: noisier
    the same eps in  x_t = alpha x + sigma eps  and  x_t' = alpha' x + sigma' eps
    theta: gradient  sigma_t^2 (e^w(x_t, prompt) - e(x_t', prompt)) dx/dtheta                   e: the teacher

  No critic, so nothing drifts and memory stays that of SDS. e(x_t') has about the noise of e(x_t), so that
  the variance falls; without guidance the mean pull has the wrong sign at small times, which is why w > 1.

Differs
- times are positions of the schedule's grid as everywhere here, not whole steps; t' ends with the grid.
- the networks for many prompts are small forms of the authors' (`fastgen/threed/generator_networks.py`).
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.objectives.base import ObjectiveConfig, Updates
from fastgen.objectives.requirements import Requirements
from fastgen.objectives.shared.score_distillation import (
    AssetObjective,
    AssetTermsConfig,
    Omega,
    along,
    asset_calls,
    omega,
    view_passes,
)


class ASDConfig(ObjectiveConfig):
    """Asynchronous score distillation."""

    name: Literal["asd"] = "asd"
    low: tuple[float, float] = (0.5, 0.02)
    """lowest grid position of the noise levels, at the start and from fall_steps on"""
    high: tuple[float, float] = (0.98, 0.5)
    """highest grid position, likewise"""
    fall_steps: int = Field(1000, ge=1)
    """steps over which both fall linearly; the length of the run"""
    shift: float = Field(0.1, ge=0, le=1)
    """rho: how much noisier the teacher's second estimate is, at most"""
    omega: Omega = "sigma2"
    """weight of the gradient at each time"""
    asset: AssetTermsConfig = AssetTermsConfig()
    """regularisers of an asset"""


class ASD(AssetObjective, config=ASDConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        return Requirements(asset_calls(lambda w: view_passes(cfg.asset)(w) + 1), real_data=False)

    def positions(self, num: int, k: int) -> tuple[Tensor, Tensor]:
        """Grid positions [num] of t and of the noisier t' at step k."""
        cfg, done = self.cfg, min(1.0, k / self.cfg.fall_steps)
        low, high = (a + (b - a) * done for a, b in (cfg.low, cfg.high))
        p = low + (high - low) * self.rng.rand(num)
        return p, (p + cfg.shift * self.rng.rand(num) * (p - low)).clamp(max=1.0)  # t' >= t

    def step(self, batch: Batch, k: int) -> Updates:
        cfg, S = self.cfg, self.schedule
        with self.turn("student"):
            x = self.generate(batch, self.rng.shared_randint(len(self.student.times)))  # x = render(theta, c)
            t, later = (S.from_unit(p) for p in self.positions(len(x), k))
            eps = self.rng.randn_like(x)
            x_t, x_later = S.noise(x, eps, t), S.noise(x, eps, later)  # the same noise
            with torch.no_grad():
                real = S.from_x0("eps", self.view_guided(self.teacher, x_t, t, batch, self.guidance), x_t, t)
                fake = S.from_x0("eps", self.teacher(x_later, later, batch.cond), x_later, later)
                g = real - fake  # e^w(x_t) - e(x_t')
            loss = along(x, g, omega(cfg.omega, S, t))
            penalty, logs = self.asset_terms(k)
            yield loss + penalty, {"gap": g.abs().mean(), **logs}
        self.settle(k)
