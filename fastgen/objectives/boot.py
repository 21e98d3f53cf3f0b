"""BOOT: distillation without data, each noise level bootstrapped from the one above it.

Paper: Gu et al. 2023, arXiv 2306.05544 (signal-ODE; no code was released).

  eps is one fixed noise per row, x_T = eps;  y_t = (x_t - sigma_t eps) / alpha_t is the signal on its ODE;
  n = sigma / alpha;  dy/dt = -(log n)' (D(x_t, t) - y_t),  y_0 = x_0        no noise is left in this ODE
  t = t_i, s = t_{i-1} of a grid of N levels, i ~ U{1 .. N}
  y   = sg y_theta(eps, t);   f = D^w(alpha_t y + sigma_t eps, t)
  y*  = (1 - r) f + r y,   r = n_s / n_t                  exact for f held; Heun averages f with the next
  loss = | y_theta(eps, s) - sg y* |^2 + boundary_weight | y_theta(eps, T) - D^w(eps, T) |^2

Differs
- y_theta(eps, t) is the student's D at (eps, T), told the time that mirrors t on the grid: T for the clean
  end. So the sample is an ordinary one-step D at T, which any pipeline draws, and starts as the teacher's.
  The paper tells t itself and needs a sampler that passes t = 0.
- under VP, T may be any time of signal over noise at most 0.2: an eps student divides its errors by alpha_T,
  0.07 at the last time of Stable Diffusion, 0.17 at 850.
- 1 / delta^2 is left out: the grid is even, so it is a constant, which Adam cancels; boundary_weight is
  relative to what remains.
- the last step lands on f itself, as samplers do (r = 0).
"""

from typing import Literal

import torch
from pydantic import Field

from fastgen.core.errors import UserError
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import VP, expand
from fastgen.objectives.base import Objective, ObjectiveConfig
from fastgen.objectives.ect import noise_level


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
    needs_data = False
    draws_guidance = True

    @classmethod
    def unsampled(cls, cfg, num_steps, sampler):
        return "" if num_steps == 1 else "trained to be drawn in one step"

    @classmethod
    def evaluations(cls, cfg, guidance, num_steps):
        teacher = (cfg.boundary_share + (2 if cfg.solver == "heun" else 1)) * (1 if guidance == 1 else 2)
        return {"student": 1, "student+grad": 1 + cfg.boundary_share, "teacher": teacher}

    def check(self):
        S, first = self.schedule, self.student.times[0]
        signal = float(1 / noise_level(S, torch.tensor([first], dtype=torch.float64)))
        pure = signal <= 0.2 if isinstance(S, VP) else first == S.steps(1)[0] and signal <= 0.1
        if not pure:
            found = f"the teacher's x_t at {first:g} is not pure noise (signal over noise {signal:.2g})"
            raise UserError("student.timesteps", found, f"BOOT starts from noise alone, at {S.steps(1)[0]:g}")

    def time(self, u):
        """Time at grid position u in [0, 1], 1 being the student's own, which only VP has below t_max."""
        return self.schedule.from_unit(u.double() * (self.student.times[0] / self.schedule.t_max))

    def step(self, batch, k):
        cfg, eps, num = self.cfg, batch.noise, self.cfg.num_times
        w, told = self.tell(batch)
        i = self.rng.randint(num, len(eps)) + 1
        u_t, u_s = i / num, (i - 1) / num
        edge = torch.arange(max(1, round(cfg.boundary_share * len(eps))), device=i.device)
        with self.turn("student"):
            with torch.no_grad():
                y = self.signal(eps, u_t, told)
                f, f_T = self.estimates(batch, w, y, self.time(u_t), edge)
                target = self.target(batch, w, y, f, self.time(u_t), self.time(u_s), i == 1)
            both = torch.cat([torch.arange(len(eps), device=i.device), edge])
            u = torch.cat([u_s, torch.ones_like(u_s[edge])])
            pred = self.signal(eps[both], u, {n: c[both] for n, c in told.items()})
            step, boundary = losses.mse(pred[: len(eps)], target), losses.mse(pred[len(eps) :], f_T)
            yield step + cfg.boundary_weight * boundary, {"step": step, "boundary": boundary}

    def signal(self, eps, u, cond):
        """y_theta(eps, t) at grid position u: the student's D at (eps, T), told the mirrored time."""
        x_T = eps * self.schedule.prior_std(self.student.times[0])
        told = {**cond, "net_t": self.time(1 - u)}
        return self.student(x_T, self.student.time(0, eps), told)

    def estimates(self, batch, w, y, t, edge):
        """f at (y, t) of every row, and D at (eps, T) of the boundary's rows, in one pass of the teacher."""
        eps, T = batch.noise, self.student.time(0, batch.noise)
        x_T = eps * self.schedule.prior_std(self.student.times[0])
        x = torch.cat([self.schedule.noise(y, eps, t), x_T[edge]])
        rows = torch.cat([torch.arange(len(eps), device=edge.device), edge])
        f = self.teach(batch, w, x, torch.cat([t, T[edge]]), rows)
        return f[: len(eps)], f[len(eps) :]

    def teach(self, batch, w, x, t, rows):
        """D^w at x, t under the conditions of these rows."""
        cond, uncond = ({n: c[rows] for n, c in d.items()} for d in (batch.cond, batch.uncond))
        D = self.teacher.guided(x, t, cond, uncond, w if isinstance(w, float) else w[rows])
        return D.clamp(-self.cfg.clamp, self.cfg.clamp) if self.cfg.clamp else D

    def target(self, batch, w, y, f, t, s, last):
        """y* one level down; f itself in the last step, and where t is noise without signal."""
        ratio = noise_level(self.schedule, s) / noise_level(self.schedule, t)  # r = n_s / n_t
        r = expand(torch.where(last, 0.0, ratio), y)
        found = (1 - r) * f + r * y
        if self.cfg.solver == "heun":
            near = torch.where(last, t, s)  # no second estimate at the clean end
            x = self.schedule.noise(torch.where(expand(last, y).bool(), y, found), batch.noise, near)
            second = self.teach(batch, w, x, near, torch.arange(len(y), device=s.device))
            found = (1 - r) * 0.5 * (f + second) + r * y
        return found
