"""TSCD: trajectory segmented consistency distillation, the first part of Hyper-SD.

Papers: Ren et al. 2024, arXiv 2404.13686; with it TCD, Zheng et al. 2024, arXiv 2402.19159 (gamma
sampling) and CTM, Kim et al. 2023, arXiv 2310.02279 (targets inside the trajectory).

  a stage has k segments of the teacher's K-step DDIM grid, k = 8, 4, 2, 1 in turn; each starts from the last
  n ~ U;  t = t_n, r = t_{n+1};  e = end of the segment that holds t
  x_t = alpha x0 + sigma eps
  x_r = DDIM step t -> r with D_real^w                              (or with the last stage's student)
  u   ~ U over the grid's points in [e, r]                          e itself with probability end_prob
  pred   = Psi(x_t, t, u; theta),  target = sg Psi(x_r, r, u; theta-),  x_r itself at u = r
      Psi(x, t, u) = alpha_u D(x, t) + sigma_u (x - alpha_t D(x, t)) / sigma_t
  update G     with  mse_weight |pred - target|^2 + gan_weight gen(Disc(pred_u'))
  update Disc  with  disc(Disc(sg pred_u'), Disc(x0_u'))            u' ~ U(u, start of the segment)

Differs
- no training code was released; the paper gives the directions of the weights, not their values: MSE leads
  at 8 and 4 segments, the adversarial part at 2 and 1.
- u and u' are points of the solver's grid, so that they are whole timesteps on VP.
- the network does not read u: the same D serves every u of a segment, which is exact for one u and a
  compromise for several. end_prob above 0 favours the end, which one-segment stages need most.
- heads read the frozen teacher's features, so only the heads are trained.
- student and discriminator both move on every step.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import expand
from fastgen.objectives.base import Updates, data_of, guided
from fastgen.objectives.requirements import Calls, Requirements
from fastgen.objectives.shared.gan import pair_turn
from fastgen.objectives.shared.intervals import Segmented, SegmentedConfig, distance_weight
from fastgen.sampling.solvers import segment_ends, solver_step


class TSCDConfig(SegmentedConfig):
    """One stage of trajectory segmented consistency distillation."""

    name: Literal["tscd"] = "tscd"
    end_prob: float = Field(0.0, ge=0, le=1)
    """share of the batch whose target time is the segment's end"""
    ode_teacher: Literal["original", "previous"] = "original"
    """whose ODE is stepped along: the guided teacher's, or that of the student the last stage left"""
    mse_weight: float = Field(1.0, ge=0)
    """weight of the consistency loss"""


class TSCD(Segmented, config=TSCDConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        needs = super().requirements(cfg)
        if cfg.ode_teacher == "original":
            return needs

        def network_calls(guidance: float, num_steps: int) -> Calls:
            calls = needs.network_calls(1, num_steps)
            return {"previous" if name == "teacher" else name: n for name, n in calls.items()}

        return replace(
            needs, network_calls=network_calls, untrained=(*needs.untrained, "previous"), one_guidance=False
        )

    def step(self, batch: Batch, k: int) -> Updates:
        cfg, S, x0, K = self.cfg, self.schedule, data_of(batch), self.cfg.grid_steps
        grid = torch.tensor(S.training_grid(K), dtype=torch.float64, device=x0.device)
        n = self.rng.randint(K, len(x0))
        end = segment_ends(K, cfg.segments).to(n.device)[n]
        inside = n + 1 + (self.rng.rand(len(x0)) * (end - n)).long()
        u_at = torch.where(self.rng.rand(len(x0)) < cfg.end_prob, end, inside)
        t, r, u = grid[n], grid[n + 1], grid[u_at]
        net = self.target_net(k)  # theta-
        if k == 0 and "previous" in self.parts:
            self.follow("previous")
        with self.turn("student"):
            x_t = S.noise(x0, self.rng.randn_like(x0), t)
            with torch.no_grad():
                x_r = solver_step(S, self.denoiser(batch), x_t, t, r, "euler")
                near = r.clamp(min=grid[-2])
                target = S.ode_step(net(x_r, near, batch.cond), x_r, near, u)  # Psi(x_r, r, u; theta-)
                target = torch.where(expand(u == r, x_r).bool(), x_r, target)
            pred = S.ode_step(self.student(x_t, t, batch.cond), x_t, t, u)  # Psi(x_t, t, u; theta)
            mse = losses.mse(pred, target, distance_weight(S, t, cfg.weighting))
            loss, logs = cfg.mse_weight * mse, {"mse": mse}
            if cfg.gan_weight:
                start = end - K // cfg.segments
                v = grid[start + (self.rng.rand(len(x0)) * (u_at - start)).long()]  # u'
                fake = S.renoise(pred, self.rng.randn_like(x0), u, v)
                logs["gan"] = losses.gan_generator(self.disc(fake, v, batch.cond), cfg.gan_loss)
                loss = loss + cfg.gan_weight * logs["gan"]
            yield loss, logs
        self.move_target()
        if cfg.gan_weight:
            real = S.noise(x0, self.rng.randn_like(x0), v)
            yield from pair_turn(self, fake, real, v, batch.cond, cfg.gan_loss)

    def denoiser(self, batch):
        """D whose ODE is stepped along: the guided teacher, or the last stage's student, guided already."""
        if self.cfg.ode_teacher == "previous":
            return lambda x, t: self.previous(x, t, batch.cond)
        return lambda x, t: guided(self.teacher, x, t, batch, self.guidance)
