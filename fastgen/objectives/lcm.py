"""LCM and LCM-LoRA: latent consistency models.

Papers: Luo et al. 2023, arXiv 2310.04378 (LCM, Alg. 1); Luo et al. 2023, arXiv 2311.05556 (LCM-LoRA).

  DDIM grid of K steps over the teacher's T timesteps: t_n, one solver step skips k = T / K of them
  n ~ U, w ~ U(w_min, w_max);  t = t_{n+1}, r = t_n
  z_t = alpha z0 + sigma eps
  z_r = Psi(z_t, t, r) with D^w = D_uncond + w (D_cond - D_uncond)        guided (Sec. 4.2), k at once (4.3)
  pred   = f_theta(z_t, w, c, t)
  target = sg f_theta-(z_r, w, c, r),  and z_r itself at r = 0                               (boundary)
  loss   = mean sqrt(d^2 + c^2) - c;   theta- <- mu theta- + (1 - mu) theta

Differs
- w here is the classifier-free scale of Ho & Salimans in which 1 is no guidance: the paper's w plus one.
- f = c_skip z + c_out D with the factors of LCMScheduler, which are (0, 1) to 2e-5 everywhere but at t = 0;
  f is D itself here and the boundary is exact.
- the w-embedding is student.guidance_embedding: w ~ U of that range, an input of the network's own class.
  Without it (LCM-LoRA) w is teacher.guidance throughout. The authors' script draws w from (6, 16) there
  too, so that an adapter which is not cond w learns the mean (their issue 40).
- target_decay 0 uses the student itself under no_grad, as LCM-LoRA does; the paper's LCM keeps 0.95.
- weighting is ours. In x0 an error near the data counts for little, and a student that forgets there what
  its teacher knew loses at the last of several steps: "edm" on the digits cures it.
- also for flow and EDM teachers, on the grid of their own schedules (Euler is DDIM there).
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch, Cond
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import expand
from fastgen.objectives.base import Updates, data_of, guided
from fastgen.objectives.requirements import Calls, Requirements
from fastgen.objectives.shared.intervals import OnSolverGrid, SolverGridConfig, distance_weight
from fastgen.sampling.solvers import solver_step


class Point(NamedTuple):
    """Where a consistency loss is taken: x_t [B, ...], its time t [B], the neighbour r [B] and the grid; the
    scale of the guidance there, and what the student is told.
    """

    x_t: Tensor
    t: Tensor
    r: Tensor
    grid: Tensor
    w: float | Tensor
    cond: Cond


class LatentConsistencyConfig(SolverGridConfig):
    """Latent consistency distillation with guidance in the solver."""

    grid_steps: int = Field(50, ge=1)
    """steps K of the solver's grid; the student is sampled in any number up to it"""
    solver: Literal["euler", "heun"] = "euler"
    """teacher's ODE solver"""
    metric: Literal["l2", "huber"] = "huber"
    """distance between prediction and target"""
    huber_c: float = Field(1e-3, gt=0)
    """constant of the elementwise pseudo-Huber"""


class LCMConfig(LatentConsistencyConfig):
    """The same under its own name."""

    name: Literal["lcm"] = "lcm"


class LCM(OnSolverGrid, config=LCMConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        needs = super().requirements(cfg)

        def network_calls(guidance: float, num_steps: int) -> Calls:
            calls = needs.network_calls(guidance, num_steps)
            return calls | {"teacher": calls["teacher"] * (2 if cfg.solver == "heun" else 1)}

        return replace(needs, network_calls=network_calls, guidance_embedding=True)

    def step(self, batch: Batch, k: int) -> Updates:
        point = self.point(batch, data_of(batch))
        with self.turn("student"):
            pred, target = self.neighbours(batch, k, point)
            yield self.distance(pred, target, point.t), {"gap": (pred - target).abs().mean()}
        self.move_target()

    def point(self, batch: Batch, x0: Tensor) -> Point:
        """Neighbours t_{n+1}, t_n on the grid for every row of x0 [B, ...], and x_t at the first."""
        S, num = self.schedule, self.cfg.grid_steps
        grid = torch.tensor(S.training_grid(num), dtype=torch.float64, device=x0.device)
        n = self.rng.randint(num, len(x0))
        t, r = grid[n], grid[n + 1]  # k = T / K timesteps apart
        w, cond = self.draw_guidance(batch)  # w ~ U(w_min, w_max), an input of the student
        return Point(self.noised(x0, self.rng.randn_like(x0), t), t, r, grid, w, cond)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t = alpha z0 + sigma eps."""
        return self.schedule.noise(x0, eps, t)

    def neighbours(self, batch: Batch, k: int, point: Point) -> tuple[Tensor, Tensor]:
        """f_theta(z_t, t) and the target f_theta-(z_r, r), both [B, ...]."""
        S, (x_t, t, r, grid, w, cond) = self.schedule, point
        net = self.target_net(k)  # theta-
        with torch.no_grad():

            def D(x, u):
                return guided(self.teacher, x, u, batch, w)  # D^w

            x_r = solver_step(S, D, x_t, t, r, self.cfg.solver)
            target = net(x_r, r.clamp(min=grid[-2]), cond)
            target = torch.where(expand(r == grid[-1], x_r).bool(), x_r, target)  # boundary
        return self.student(x_t, t, cond), target

    def distance(self, pred: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """The metric between two estimates, or what is made of them, weighted at the times t [B]."""
        cfg, weight = self.cfg, distance_weight(self.schedule, t, self.cfg.weighting)
        if cfg.metric == "l2":
            return losses.mse(pred, target, weight)
        return losses.pseudo_huber(pred, target, cfg.huber_c, weight)
