"""BOOT: distillation without data, each noise level bootstrapped from the one above it.

Paper: Gu et al. 2023, arXiv 2306.05544 (signal-ODE; no code was released).

  eps is one fixed noise per row, x_T = eps;  y_t = (x_t - sigma_t eps) / alpha_t is the signal on its ODE;
  n = sigma / alpha;  dy/dt = -(log n)' (D(x_t, t) - y_t),  y_0 = x_0        no noise is left in this ODE
  t = t_i, s = t_{i-1} of a grid of N levels, i ~ U{1 .. N}
  y   = sg y_theta(eps, t);   f = D^w(alpha_t y + sigma_t eps, t)
  y*  = (1 - r) f + r y,   r = n_s / n_t                  exact for f held; Heun averages f with the next
  loss = | y_theta(eps, s) - sg y* |^2 + boundary_weight | y_theta(eps, T) - D^w(eps, T) |^2

Differs
- y_theta(eps, t) is the student's D at (eps, T), whose time input is the one that mirrors t on the grid: T
  for the clean end. So the sample is an ordinary one-step D at T, which any pipeline draws, and starts as
  the teacher's.
  The paper's network reads t itself and needs a sampler that passes t = 0.
- under VP, T may be any time of signal over noise at most 0.2: an eps student divides its errors by alpha_T,
  0.07 at the last time of Stable Diffusion, 0.17 at 850.
- 1 / delta^2 is left out: the grid is even, so it is a constant, which Adam cancels; boundary_weight is
  relative to what remains.
- the last step lands on f itself, as samplers do (r = 0).
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch, Cond, select
from fastgen.core.errors import UserError
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import VP, expand
from fastgen.objectives.base import Objective, ObjectiveConfig, Updates, guided
from fastgen.objectives.ect import noise_level
from fastgen.objectives.requirements import Calls, Requirements, passes


class BOOTConfig(ObjectiveConfig):
    """Bootstrapping along the signal-ODE."""

    name: Literal["boot"] = "boot"
    num_times: int = Field(64, ge=1)
    """levels N of the grid"""
    solver: Literal["euler", "heun"] = "euler"
    """teacher's steps"""
    boundary_weight: float = Field(0.25, ge=0)
    """weight of the boundary loss"""
    boundary_share: float = Field(0.25, gt=0, le=1)
    """share of the batch on which it is taken"""
    clamp: float = Field(0.0, ge=0)
    """limit on the teacher's estimates, 1 for pixels; 0 is none"""


class BOOT(Objective, config=BOOTConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        def network_calls(guidance: float, num_steps: int) -> Calls:
            teacher = (cfg.boundary_share + (2 if cfg.solver == "heun" else 1)) * passes(guidance)
            return {"student": 1, "student+grad": 1 + cfg.boundary_share, "teacher": teacher}

        return Requirements(
            network_calls,
            real_data=False,
            guidance_embedding=True,
            why_not_sampled=lambda num_steps, sampler: "" if num_steps == 1 else "BOOT trains one step",
        )

    def check(self):
        S, first = self.schedule, self.student.times[0]
        signal = float(1 / noise_level(S, torch.tensor([first], dtype=torch.float64)))
        pure = signal <= 0.2 if isinstance(S, VP) else first == S.steps(1)[0] and signal <= 0.1
        if not pure:
            found = f"the teacher's x_t at {first:g} is not pure noise (signal over noise {signal:.2g})"
            raise UserError("student.timesteps", found, f"start at {S.steps(1)[0]:g}: BOOT needs pure noise")

    def time(self, u: Tensor) -> Tensor:
        """Time at grid position u in [0, 1], 1 being the student's own, which only VP has below t_max."""
        return self.schedule.from_unit(u.double() * (self.student.times[0] / self.schedule.t_max))

    def step(self, batch: Batch, k: int) -> Updates:
        cfg, S, eps, num = self.cfg, self.schedule, batch.noise, self.cfg.num_times
        w, cond = self.draw_guidance(batch)
        i = self.rng.randint(num, len(eps)) + 1
        u_t, u_s = i / num, (i - 1) / num
        t, s, T = self.time(u_t), self.time(u_s), self.student.time(0, eps)
        x_T = eps * S.prior_std(self.student.times[0])
        rows = torch.arange(len(eps), device=i.device)
        edge = rows[: max(1, round(cfg.boundary_share * len(eps)))]  # rows of the boundary loss
        both = torch.cat([rows, edge])
        under = replace(batch, cond=select(batch.cond, both), uncond=select(batch.uncond, both))
        with self.turn("student"):
            with torch.no_grad():
                y = self.signal(x_T, u_t, cond)  # y = y_theta(eps, t)
                x = torch.cat([S.noise(y, eps, t), x_T[edge]])  # alpha_t y + sigma_t eps, and x_T
                D = self.estimate(x, torch.cat([t, T[edge]]), under, w if isinstance(w, float) else w[both])
                f, f_T = D[: len(eps)], D[len(eps) :]  # D^w(x_t, t), D^w(eps, T)
                r = expand(torch.where(i == 1, 0.0, noise_level(S, s) / noise_level(S, t)), y)  # n_s / n_t
                target = (1 - r) * f + r * y  # y*
                if cfg.solver == "heun":
                    near = torch.where(i == 1, t, s)  # no second estimate at the clean end
                    x_s = S.noise(torch.where(expand(i == 1, y).bool(), y, target), eps, near)
                    target = (1 - r) * 0.5 * (f + self.estimate(x_s, near, batch, w)) + r * y
            u = torch.cat([u_s, torch.ones_like(u_s[edge])])
            pred = self.signal(x_T[both], u, select(cond, both))  # y_theta(eps, s), y_theta(eps, T)
            step = losses.mse(pred[: len(eps)], target)  # |y_theta(eps, s) - sg y*|^2
            boundary = losses.mse(pred[len(eps) :], f_T)  # |y_theta(eps, T) - D^w(eps, T)|^2
            yield step + cfg.boundary_weight * boundary, {"step": step, "boundary": boundary}

    def signal(self, x_T: Tensor, u: Tensor, cond: Cond) -> Tensor:
        """y_theta(eps, t) at grid position u: the student's D at x_T, with the mirrored time as its input."""
        return self.student(x_T, self.student.time(0, x_T), {**cond, "net_t": self.time(1 - u)})

    def estimate(self, x: Tensor, t: Tensor, batch: Batch, w: float | Tensor) -> Tensor:
        """D^w of the teacher, clamped if the settings say to."""
        D = guided(self.teacher, x, t, batch, w)
        return D.clamp(-self.cfg.clamp, self.cfg.clamp) if self.cfg.clamp else D
