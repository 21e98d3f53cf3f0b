"""Regression on teacher ODE pairs (noise, sample): knowledge distillation, and DMD2's one-step warm start.

Papers: Luhman & Luhman 2021, arXiv 2101.02388 (Alg. 1); as a warm start: DMD2, arXiv 2405.14867 (Sec. 4.2,
SDXL one step).

  for each condition c of the data (`noises` times):  z ~ N(0, I);  states x_t, end y of the guided ODE from z
  step:  t ~ U(student's time list);  loss = d(D_theta(x_t, t, c), y)                 one step: x_t = z

  a student that goes block by block (stage 0 of CausVid, arXiv 2412.07772, and Self-Forcing): each block has
  a t of its own, or is clean already and out of the loss

Differs
- DMD2 compares decoded images by LPIPS; no perceptual network is bundled, so d is a pseudo-Huber or square
  on x0 itself; the Huber constant is 0.00054 dim, closer to a square than iCT's 0.00054 sqrt(dim).
- several steps: each time of the student's list is warmed up from the teacher's own state at that time.
- pairs are made when first met and kept in memory (`data.limit` times `noises` of them); the noise of a pair
  depends on the run's seed, the data index and its number only, so a resumed run makes the same ones.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.core.errors import UserError
from fastgen.diffusion import losses
from fastgen.objectives.base import Objective, ObjectiveConfig, Updates
from fastgen.objectives.requirements import Requirements, remembered_calls
from fastgen.objectives.shared.blocks import draw_levels, is_clean, picked
from fastgen.objectives.shared.remembered import Remembered
from fastgen.objectives.shared.trajectory_files import TrajectoryFiles
from fastgen.roles.roles import Role
from fastgen.sampling.solvers import solver_step, teacher_grid


class Pairs(Remembered):
    """Teacher trajectories by data index: the states at the student's times and the end point, made when
    first needed.
    """

    what = "teacher pairs"

    def __init__(
        self,
        obj: Objective,
        teacher_steps: int,
        solver: str = "euler",
        noises: int = 1,
        files: TrajectoryFiles | None = None,
    ):
        """noises: how many pairs each data index has; files: where they are kept between runs."""
        super().__init__(obj, noises, files)
        self.solver = solver
        schedule, times = obj.schedule, obj.student.times
        self.grid = teacher_grid(schedule, teacher_steps)
        later = times[1:]  # the first input is noise, wherever it enters
        self.where = [min(range(teacher_steps), key=lambda j: abs(self.grid[j] - t)) for t in later]
        off = [t for t, j in zip(later, self.where) if abs(self.grid[j] - t) > 1e-6 * schedule.t_max]
        if off:
            raise UserError(
                "student.timesteps",
                f"{off} are not on the teacher's grid of {teacher_steps} steps",
                "make objective.teacher_steps a multiple of student.num_steps",
            )

    def __call__(self, batch: Batch, teacher: Role) -> Tensor:
        """[B, len(times) + 1, ...]: the student's noise, the teacher's x_t at each later time, then y."""
        numbers = self.numbers(batch, teacher)
        return torch.stack([self.rows[n] for n in numbers]).to(batch.noise)

    def make(self, batch: Batch, numbers: list[int], teacher: Role) -> Tensor:
        """The guided teacher's ODE from the noises of these numbers."""
        obj, like = self.obj, batch.noise
        drawn = [torch.randn(like.shape[1:], generator=g) for g in self.generators(numbers)]
        cond, uncond = batch.cond, batch.uncond
        noise = torch.stack(drawn).to(like)
        first = noise * obj.schedule.prior_std(obj.student.times[0])
        x = noise * obj.schedule.prior_std(self.grid[0])

        def D(x_t: Tensor, t: Tensor) -> Tensor:
            return teacher.guided(x_t, t, cond, uncond, obj.guidance)

        states = []
        for j in range(len(self.grid) - 1):
            states.append(x)
            t, u = (
                torch.full((len(x),), v, dtype=torch.float64, device=x.device) for v in self.grid[j : j + 2]
            )
            end = j == len(self.grid) - 2  # the last step is D itself
            x = D(x, t) if end else solver_step(obj.schedule, D, x, t, u, self.solver)
        return torch.stack([first, *(states[j] for j in self.where), x], 1)


class ODEPairsConfig(ObjectiveConfig):
    """Regression on pairs made by the teacher's ODE."""

    name: Literal["ode_pairs"] = "ode_pairs"
    teacher_steps: int = Field(20, ge=1)
    """ODE steps a pair costs; the student's times after the first lie on this grid"""
    noises: int = Field(0, ge=0)
    """pairs of each condition of the data; 0 is one"""
    solver: Literal["euler", "heun"] = "euler"
    """teacher's ODE solver"""
    metric: Literal["l2", "huber"] = "huber"
    """distance between the student's output and the end point"""


class ODEPairs(Objective, config=ODEPairsConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        calls = cfg.teacher_steps * (2 if cfg.solver == "heun" else 1) - (cfg.solver == "heun")
        return Requirements(remembered_calls(calls), real_data=False, causal=True)

    def prepare(self):
        self.pairs = Pairs(self, self.cfg.teacher_steps, self.cfg.solver, self.cfg.noises or 1)

    def busy(self) -> str:
        return self.pairs.busy()

    def step(self, batch: Batch, k: int) -> Updates:
        rows = self.pairs(batch, self.teacher)  # [B, len(times) + 1, ...]
        levels, y = draw_levels(self, rows[:, 0]), rows[:, -1]
        x_t, clean = picked(rows, levels.which), is_clean(levels, y, len(self.student.times))
        with self.turn("student"):
            x = self.student(x_t, levels.t, batch.cond).where(~clean, y)  # D_theta(x_t, t, c)
            if self.cfg.metric == "l2":
                loss = losses.mse(x, y)
            else:
                loss = losses.sample_huber(x, y, 0.00054 * y[0].numel() ** 0.5)
            yield loss, {"error": (x - y).abs().mean()}
