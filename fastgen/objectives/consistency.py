"""Consistency distillation and training, one or several segments.

Papers: Song et al. 2023, arXiv 2303.01469 (CD, CT; Alg. 2 and 3); Heek et al. 2024, arXiv 2403.06807
(multistep); Song & Dhariwal 2023, arXiv 2310.14189 (pseudo-Huber, 1/(t - r) weight).

  grid t_0 > t_1 > ... > t_N;  i ~ U{0 .. N-1};  t = t_i, r = t_{i+1};  e = end of the segment holding t
  x_t = alpha x0 + sigma eps
  x_r = one ODE step of the teacher from t to r, Euler or Heun          CT: D_real := x0
  pred   = J(D_theta(x_t, t), x_t, t, e)                   J: DDIM jump to e, the identity at t = e
  target = sg J(D_theta-(x_r, r), x_r, r, e),  and x_r itself when r = e
  loss = w(t) d(pred, target);   theta- <- mu theta- + (1 - mu) theta

Differs
- boundary condition: c_skip, c_out of the papers are replaced by the DDIM jump J, exact for every schedule;
  the student stays in its native parameterization, so its export needs no special network. At the clean
  end J is D itself.
- theta- is the student under no_grad unless target_decay is set (2310.14189, Sec. 3.2); CD of 2303.01469
  used 0.95.
- random states are not shared by pred and target: the networks run in eval mode, without dropout.
"""

import math
from typing import Literal

import torch
from pydantic import Field

from fastgen import losses
from fastgen.ema import ema_update
from fastgen.objectives.base import Objective, ObjectiveConfig
from fastgen.samplers import jump, segment_ends, solver_step
from fastgen.schedules import expand


class ConsistencyConfig(ObjectiveConfig):
    """Consistency distillation (with a teacher) or training (without)."""

    name: Literal["consistency"] = "consistency"
    mode: Literal["distillation", "training"] = "distillation"
    """distillation steps along the teacher's ODE; training uses the data in its place"""
    num_scales: int = Field(32, ge=2)
    """intervals N of the time grid at the end of training"""
    start_scales: int = Field(0, ge=0)
    """if set, N doubles from here to num_scales in equal spans (2310.14189, Sec. 3.4)"""
    curriculum_steps: int = Field(0, ge=0)
    """steps over which N grows; needed with start_scales"""
    segments: int = Field(1, ge=1)
    """segments of the grid; 1 is a consistency model, more a multistep one"""
    solver: Literal["euler", "heun"] = "euler"
    """teacher's ODE solver"""
    metric: Literal["l2", "huber"] = "huber"
    """distance between prediction and target"""
    huber_c: float = Field(0.00054, gt=0)
    """Huber constant, multiplied by sqrt(dimension)"""
    weighting: Literal["uniform", "inverse_gap"] = "uniform"
    """uniform, or 1 / (u_t - u_r) on the unit grid"""
    target_decay: float = Field(0.0, ge=0, lt=1)
    """EMA decay of the target network; 0 uses the student itself"""


class Consistency(Objective, config=ConsistencyConfig):
    @classmethod
    def uses(cls, cfg):
        return (
            *(("teacher",) if cfg.mode == "distillation" else ()),
            *(("target",) if cfg.target_decay else ()),
        )

    @classmethod
    def evaluations(cls, cfg, guidance, num_steps):
        teacher = (1 if guidance == 1 else 2) * (2 if cfg.solver == "heun" else 1)
        calls = {"student+grad": 1, ("target" if cfg.target_decay else "student"): 1}
        return calls | ({"teacher": teacher} if cfg.mode == "distillation" else {})

    def step(self, batch, k):
        cfg, S, x0 = self.cfg, self.schedule, batch.x0
        grid = self.grid(k).to(x0.device)
        num = len(grid) - 1
        i = self.rng.randint(num, len(x0))
        t, r = grid[i], grid[i + 1]
        e = grid[segment_ends(num, cfg.segments).to(i.device)[i]]  # end of the segment
        with self.turn("student"):
            x_t = S.noise(x0, self.rng.randn_like(x0), t)
            with torch.no_grad():
                x_r = solver_step(S, self.denoiser(batch), x_t, t, r, cfg.solver)
                target_net = self.target if cfg.target_decay else self.student
                target = jump(S, target_net(x_r, r.clamp(min=grid[-2]), batch.cond), x_r, r, e)
                target = torch.where(expand(r == e, x_r).bool(), x_r, target)  # boundary: x_r at the end
            pred = jump(S, self.student(x_t, t, batch.cond), x_t, t, e)
            weight = None if cfg.weighting == "uniform" else torch.full((len(x0),), float(num)).to(x0)
            if cfg.metric == "l2":
                loss = losses.mse(pred, target, weight)
            else:
                loss = losses.sample_huber(pred, target, cfg.huber_c, weight)
            yield loss, {"scales": float(num), "gap": (pred - target).abs().mean()}
        if cfg.target_decay and self.sync:
            ema_update(self.target.trainable(), self.student.trainable(), cfg.target_decay)

    def denoiser(self, batch):
        """D along whose ODE the target moves: the guided teacher, or the data point itself."""
        if self.cfg.mode == "training":
            return lambda x, t: batch.x0
        return lambda x, t: self.teacher.guided(x, t, batch.cond, batch.uncond, self.guidance)

    def grid(self, k: int) -> torch.Tensor:
        """The N + 1 descending times of step k."""
        cfg, num = self.cfg, self.cfg.num_scales
        if cfg.start_scales:
            doublings = math.ceil(math.log2(num / cfg.start_scales))
            stage = min(doublings, k * (doublings + 1) // max(cfg.curriculum_steps, 1))
            num = min(num, cfg.start_scales * 2**stage)
        return self.schedule.from_unit(torch.linspace(1, 0, num + 1, dtype=torch.float64))
