"""TCM: truncated consistency models, a second stage that leaves small noise to the first.

Paper: Lee et al. 2024, arXiv 2410.14895.

  f- = the consistency model that stage one left, frozen;  n = sigma / alpha;  n' = `boundary`
  a share of the batch at n_t = n', the boundary; the rest log n_t ~ Student-t(0, scale, df) above log n'
  n_r = n_t (1 - gap (1 + k sigmoid(-b n_t)))                       as ECT, at its final gap
  target = f-(x_r, r) where n_r < n',  sg f_theta(x_r, r) where not
  loss = mean over the rest + boundary_weight mean over the boundary,
         each |f_theta(x_t, t) - target| / (n_t - n_r)

Differs
- levels are sigma / alpha of any schedule, as in `ect`.
- stage one is any stage before this one: its student is copied when the stage begins.
- `source: teacher` takes x_r from the guided teacher's ODE, as `ect` does; after a guided stage one, data
  would pull the student back to the unguided distribution.
"""

from typing import Literal

import torch
from pydantic import Field

from fastgen.core.batch import Batch
from fastgen.core.errors import UserError
from fastgen.diffusion import losses
from fastgen.objectives.base import Objective, ObjectiveConfig, Updates, data_of
from fastgen.objectives.ect import earlier, level_time, noise_level, shrink
from fastgen.objectives.requirements import Calls, Requirements, passes


class TCMConfig(ObjectiveConfig):
    """The truncated stage; give it a stage of `ect` or `consistency` before it."""

    name: Literal["tcm"] = "tcm"
    source: Literal["data", "teacher"] = "data"
    """what x_r comes from: the data point and the same noise, or a step of the guided teacher"""
    boundary: float = Field(1.0, gt=0)
    """noise level n' below which the network of stage one stays in charge"""
    boundary_share: float = Field(0.25, ge=0, lt=1)
    """share of the batch at n'"""
    boundary_weight: float = Field(0.1, ge=0)
    """weight of the boundary loss"""
    scale: float = Field(0.2, gt=0)
    """scale of the Student-t law of log n_t"""
    df: float = Field(0.01, gt=0)
    """its degrees of freedom: the smaller, the heavier the tail towards high noise"""
    max_level: float = Field(80.0, gt=0)
    """highest n_t, where the schedule reaches it"""
    gap: float = Field(0.001, gt=0, lt=1)
    """1 - r / t at high noise"""
    k: float = Field(8.0, ge=0)
    """how much wider the gap is at small noise"""
    b: float = Field(1.0, gt=0)
    """noise level at which it stops being wider, inverted"""


class TCM(Objective, config=TCMConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        distilled = cfg.source == "teacher"

        def network_calls(guidance: float, num_steps: int) -> Calls:
            calls: Calls = {"student+grad": 1, "student or previous": 1}
            return calls | ({"teacher": passes(guidance)} if distilled else {})

        return Requirements(network_calls, untrained=("previous", "teacher") if distilled else ("previous",))

    def check(self):
        levels = noise_level(self.schedule, torch.tensor(self.student.times, dtype=torch.float64))
        low = [t for t, n in zip(self.student.times, levels.tolist()) if n < self.cfg.boundary * (1 - 1e-6)]
        if low:
            found = f"{low} have less noise than the boundary, where this stage trains nothing"
            raise UserError("student.timesteps", found, f"times with sigma / alpha >= {self.cfg.boundary}")

    def step(self, batch: Batch, k: int) -> Updates:
        cfg, S, x0 = self.cfg, self.schedule, data_of(batch)
        if k == 0:
            self.follow("previous")  # f-, frozen
        n_t, weight = self.levels(len(x0))
        n_r = shrink(n_t, cfg.gap, cfg.k, cfg.b)
        (t, _), (r, _) = level_time(S, n_t), level_time(S, n_r)
        with self.turn("student"):
            eps = self.rng.randn_like(x0)
            x_t = S.noise(x0, eps, t)
            with torch.no_grad():
                _, x_r = earlier(self, batch, x_t, eps, t, r)
                target = self.target(x_r, r, batch.cond, n_r < cfg.boundary)
            pred = self.student(x_t, t, batch.cond)
            loss = losses.sample_huber(pred, target, 1e-6, weight / (n_t - n_r))
            yield loss, {"error": (pred - target).abs().mean(), "below": (n_r < cfg.boundary).float().mean()}

    def levels(self, num: int):
        """n_t [B], the boundary rows first, and weights [B] that turn one mean into the sum of both."""
        cfg = self.cfg
        at = round(cfg.boundary_share * num)
        highest = float(noise_level(self.schedule, self.highest()))
        grid = torch.linspace(0, 1, 4097, dtype=torch.float64)
        low, high = (torch.tensor(v, dtype=torch.float64).log() for v in (cfg.boundary, highest))
        log_n = low + grid * (high - low)
        density = (1 + (log_n / cfg.scale) ** 2 / cfg.df) ** (-(cfg.df + 1) / 2)
        mass = torch.cat([grid[:1], torch.cumulative_trapezoid(density)])
        u = self.rng.rand(num)
        mass, log_n = (mass / mass[-1]).to(u.device), log_n.to(u.device)
        i = torch.searchsorted(mass, u, right=True).clamp(1, len(mass) - 1)
        share = (u - mass[i - 1]) / (mass[i] - mass[i - 1])
        n_t = (log_n[i - 1] + share * (log_n[i] - log_n[i - 1])).exp()
        n_t[:at] = cfg.boundary * (1 + 1e-8)
        weight = torch.full_like(n_t, num / max(num - at, 1))
        weight[:at] = cfg.boundary_weight * num / max(at, 1)
        return n_t, weight

    def highest(self):
        """The noisiest time trained: that of max_level, or the schedule's own last before pure noise."""
        t, _ = level_time(self.schedule, torch.tensor([self.cfg.max_level], dtype=torch.float64))
        return t

    def target(self, x_r, r, cond, below):
        """f- for rows below the boundary, the student for the others: each row passes one network."""
        out = torch.empty_like(x_r)
        for net, rows in ((self.previous, below), (self.student, ~below)):
            if rows.any():
                part = {name: c[rows.to(c.device)] for name, c in cond.items()}
                out[rows] = net(x_r[rows], r[rows], part).to(out)
        return out
