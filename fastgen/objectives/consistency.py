"""Consistency distillation and training, one or several segments.

Papers: Song et al. 2023, arXiv 2303.01469 (CD, CT; Alg. 2 and 3); Song & Dhariwal 2023, arXiv 2310.14189
(improved CT); Heek et al. 2024, arXiv 2403.06807 (multistep).

  grid t_0 > t_1 > ... > t_N;  i ~ p(i);  t = t_i, r = t_{i+1};  e = end of the segment holding t
  x_t = alpha x0 + sigma eps
  x_r = one ODE step of the teacher from t to r, Euler or Heun          CT: D_real := x0
  pred   = J(D_theta(x_t, t), x_t, t, e)                   J: DDIM jump to e, the identity at t = e
  target = sg J(D_theta-(x_r, r), x_r, r, e),  and x_r itself when r = e
  loss = w d(pred, target)                                 multistep: d in D, the target's jump undone
  theta- <- mu theta- + (1 - mu) theta

Differs
- boundary condition: c_skip, c_out of the papers are replaced by the DDIM jump J, exact for every schedule;
  the student stays in its native parameterization, so its export needs no special network. At the clean
  end J is D itself.
- theta- is the student under no_grad unless target_decay is set (2310.14189, Sec. 3.2); CD of 2303.01469
  used 0.95.
- the grid is the sampler's (on VP whole timesteps), and the student takes its steps from it.
- the perceptual metric is not LPIPS with its VGG: it compares the bundled feature net's maps. That net also
  measures fd_mini, so a number of such a run is no fair comparison.
- multistep: plain DDIM teacher steps in place of aDDIM; curriculum log is its growth of the teacher's steps.
- random states are not shared by pred and target: the networks run in eval mode, without dropout.
"""

from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import expand
from fastgen.networks.feature_net import Perceptual
from fastgen.objectives.base import Objective, ObjectiveConfig, Updates, data_of, guided
from fastgen.objectives.requirements import Calls, PerceptualSpec, Requirements, passes
from fastgen.objectives.shared.intervals import check_segments, draw_intervals, num_intervals, unfit_segments
from fastgen.sampling.solvers import jump, segment_ends, solver_step, undo_jump


class ConsistencyConfig(ObjectiveConfig):
    """Consistency distillation (with a teacher) or training (without)."""

    name: Literal["consistency"] = "consistency"
    mode: Literal["distillation", "training"] = "distillation"
    """distillation steps along the teacher's ODE; training uses the data in its place"""
    num_scales: int = Field(32, ge=2)
    """intervals N of the time grid at the end of training"""
    start_scales: int = Field(0, ge=0)
    """if set, N grows from here to num_scales over curriculum_steps"""
    curriculum: Literal["double", "root", "log"] = "double"
    """growth of N: doubling (2310.14189, Sec. 3.4), CT's root (2303.01469, App. C), log-linear (multistep)"""
    curriculum_steps: int = Field(0, ge=0)
    """steps over which N grows; needed with start_scales"""
    segments: int = Field(1, ge=1)
    """segments of the grid; 1 is a consistency model, more a multistep one"""
    solver: Literal["euler", "heun"] = "euler"
    """teacher's ODE solver"""
    metric: Literal["l2", "l1", "huber", "perceptual"] = "huber"
    """distance between prediction and target"""
    huber_c: float = Field(0.00054, gt=0)
    """Huber constant, multiplied by sqrt(dimension)"""
    weighting: Literal["uniform", "inverse_gap", losses.Weighting] = "uniform"
    """w: 1; 1 / (t - r) in the schedule's time, as improved CT takes it for EDM; or a w(t)"""
    space: Literal["state", "x0"] = "state"
    """where d is taken: at the state x_e, or in D (multistep, 2403.06807)"""
    log_normal: tuple[float, float] | None = None
    """mean and std of ln(sigma / alpha) to draw intervals by, (-1.1, 2.0) in improved CT; null: evenly"""
    target_decay: float = Field(0.0, ge=0, lt=1)
    """EMA decay mu of the target network; 0 uses the student itself"""
    decay_grows: bool = False
    """mu = exp(N_0 ln(target_decay) / N) while N grows (2303.01469, App. C)"""

    @model_validator(mode="after")
    def _fits(self):
        if bool(self.start_scales) != bool(self.curriculum_steps):
            raise ValueError(
                "curriculum_steps: start_scales and curriculum_steps go together; give both or none"
            )
        if self.metric == "perceptual" and self.segments > 1:
            raise ValueError("metric: perceptual compares images, and several segments end in noise; use l2")
        return check_segments(self, self.num_scales)


class Consistency(Objective, config=ConsistencyConfig):
    perceptual: Perceptual

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        distilled = cfg.mode == "distillation"
        wanted = {"teacher": distilled, "target": cfg.target_decay}

        def network_calls(guidance: float, num_steps: int) -> Calls:
            calls: Calls = {"student+grad": 1, ("target" if cfg.target_decay else "student"): 1}
            teacher = passes(guidance) * (2 if cfg.solver == "heun" else 1)
            return calls | ({"teacher": teacher} if distilled else {})

        return Requirements(
            network_calls,
            untrained=tuple(name for name, on in wanted.items() if on),
            auxiliaries={"perceptual": PerceptualSpec()} if cfg.metric == "perceptual" else {},
            grid_steps=cfg.num_scales,
            why_not_sampled=partial(unfit_segments, cfg.num_scales, cfg.segments),
        )

    def step(self, batch: Batch, k: int) -> Updates:
        cfg, S, x0 = self.cfg, self.schedule, data_of(batch)
        grid = self.grid(k).to(x0.device)
        num = len(grid) - 1
        i = draw_intervals(self.rng, S, grid, len(x0), cfg.log_normal)
        t, r = grid[i], grid[i + 1]
        e = grid[segment_ends(num, cfg.segments).to(i.device)[i]]  # end of the segment
        net = self.target_net(k)  # theta-
        with self.turn("student"):
            x_t = S.noise(x0, self.rng.randn_like(x0), t)
            with torch.no_grad():
                x_r = solver_step(S, self.denoiser(batch), x_t, t, r, cfg.solver)
                target = jump(S, net(x_r, r.clamp(min=grid[-2]), batch.cond), x_r, r, e)
                target = torch.where(expand(r == e, x_r).bool(), x_r, target)  # boundary: x_r at the end
            pred = self.student(x_t, t, batch.cond)
            if cfg.space == "x0":
                target = undo_jump(S, target, x_t, t, e)
            else:
                pred = jump(S, pred, x_t, t, e)
            yield (
                self.distance(pred, target, self.weight(t, r)),
                {"scales": float(num), "gap": (pred - target).abs().mean()},
            )
        self.move_target((cfg.start_scales or num) / num if cfg.decay_grows else 1.0)

    def distance(self, pred, target, weight):
        """w d(pred, target) over the batch."""
        if self.cfg.metric == "huber":
            return losses.sample_huber(pred, target, self.cfg.huber_c, weight)
        if self.cfg.metric == "perceptual":
            return losses.feature_distance(self.perceptual(pred), self.perceptual(target), weight)
        return (losses.mse if self.cfg.metric == "l2" else losses.l1)(pred, target, weight)

    def weight(self, t, r):
        """w [B], or None for 1."""
        if self.cfg.weighting == "uniform":
            return None
        if self.cfg.weighting == "inverse_gap":
            return 1 / (t - r)
        return losses.error_weight(self.schedule, t, self.cfg.weighting)

    def denoiser(self, batch):
        """D along whose ODE the target moves: the guided teacher, or the data point itself."""
        if self.cfg.mode == "training":
            return lambda x, t: data_of(batch)
        return lambda x, t: guided(self.teacher, x, t, batch, self.guidance)

    def grid(self, k: int) -> torch.Tensor:
        """The N + 1 descending times of step k."""
        cfg, num = self.cfg, self.cfg.num_scales
        if cfg.start_scales:
            done = min(k / cfg.curriculum_steps, 1.0)
            num = num_intervals(cfg.curriculum, cfg.start_scales, num, done)
            num = max(num - num % cfg.segments, cfg.segments)
        return torch.tensor(self.schedule.training_grid(num, cfg.num_scales), dtype=torch.float64)
