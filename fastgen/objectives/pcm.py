"""PCM: phased consistency model.

Paper: Wang et al. 2024, arXiv 2405.18407.

  the K-step DDIM grid in M phases;  n ~ U;  t = t_n, r = t_{n+1};  e = end of the phase that holds t
  x_t = alpha x0 + sigma eps
  x_r = DDIM step t -> r with D_real^w                 CFG-free: w = 1, captions dropped at times
  pred   = F(x_t, t, e; theta),  target = sg F(x_r, r, e; theta-),  x_r itself at r = e
      F: DDIM jump with D held
  update G     with  mean sqrt(d^2 + c^2) - c  +  gan_weight gen(Disc(pred_v))
  update Disc  with  disc(Disc(sg pred_v), Disc(target_v))       v ~ U over the phase; both noised from e

The student is sampled in M deterministic steps, one a phase. The real side of the discriminator is the
target, not data: the adversarial term keeps to the teacher's ODE.

Differs
- authors: discriminator and generator take turns by the parity of the step; here both move on every step.
- v is a point of the solver's grid, above e.
- authors: relu(1 - fake) on the generator's side of the hinge; -fake here, as in LADD.
- the authors' 50 steps in 4 phases do not divide; a divisor is required, so that phases end where the
  sampler stops. Their SDXL runs use 40 steps and 4 phases.
- no EMA target, as in the authors' code; target_decay gives one.
- CFG-free (guided_solver false): the student stays unguided, and guidance_scale works when it is sampled.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import expand
from fastgen.objectives.base import Updates, data_of
from fastgen.objectives.requirements import Requirements
from fastgen.objectives.shared.gan import pair_turn
from fastgen.objectives.shared.intervals import Segmented, SegmentedConfig, distance_weight
from fastgen.sampling.solvers import jump, segment_ends, solver_step


class PCMConfig(SegmentedConfig):
    """Phased consistency distillation."""

    name: Literal["pcm"] = "pcm"
    segments: int = Field(4, ge=1)
    """phases M; must divide the grid, and the student takes a multiple of it in steps"""
    guided_solver: bool = True
    """step with the guided teacher; false keeps guidance for sampling (CFG-free)"""
    cond_dropout: float = Field(0.0, ge=0, lt=1)
    """share of the batch whose condition is left out; the authors take 0.1 without the guided solver"""
    huber_c: float = Field(1e-3, gt=0)
    """constant of the elementwise pseudo-Huber"""
    gan_weight: float = Field(0.1, ge=0)
    """weight of the adversarial consistency loss; 0 drops the discriminator"""


class PCM(Segmented, config=PCMConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        needs = super().requirements(cfg)
        needs = replace(needs, dropout_settings={"cond_dropout": cfg.cond_dropout})
        if cfg.guided_solver:
            return needs
        return replace(
            needs,
            network_calls=lambda guidance, num_steps: needs.network_calls(1, num_steps),
            one_guidance=False,
            guidance=1.0,
        )

    def step(self, batch: Batch, k: int) -> Updates:
        cfg, S, x0, K = self.cfg, self.schedule, data_of(batch), self.cfg.grid_steps
        grid = torch.tensor(S.training_grid(K), dtype=torch.float64, device=x0.device)
        n = self.rng.randint(K, len(x0))
        end = segment_ends(K, cfg.segments).to(n.device)[n]
        t, r, e = grid[n], grid[n + 1], grid[end]
        cond, w = self.drop_condition(batch, cfg.cond_dropout), self.guidance
        net = self.target_net(k)  # theta-
        with self.turn("student"):
            x_t = S.noise(x0, self.rng.randn_like(x0), t)
            with torch.no_grad():
                x_r = solver_step(
                    S, lambda x, u: self.teacher.guided(x, u, cond, batch.uncond, w), x_t, t, r, "euler"
                )
                target = jump(S, net(x_r, r.clamp(min=grid[-2]), cond), x_r, r, e)  # F(x_r, r, e; theta-)
                target = torch.where(expand(r == e, x_r).bool(), x_r, target)  # boundary of the phase
            pred = jump(S, self.student(x_t, t, cond), x_t, t, e)  # F(x_t, t, e; theta)
            weight = distance_weight(S, t, cfg.weighting)
            huber = losses.pseudo_huber(pred, target, cfg.huber_c, weight)
            loss, logs = huber, {"huber": huber}
            if cfg.gan_weight:
                length = K // cfg.segments
                v = grid[end - length + self.rng.randint(length, len(x0))]
                fake = S.renoise(pred, self.rng.randn_like(x0), e, v)
                logs["gan"] = losses.gan_generator(self.disc(fake, v, cond), cfg.gan_loss)
                loss = loss + cfg.gan_weight * logs["gan"]
            yield loss, logs
        self.move_target()
        if cfg.gan_weight:
            real = S.renoise(target, self.rng.randn_like(x0), e, v)
            yield from pair_turn(self, fake, real, v, cond, cfg.gan_loss)
