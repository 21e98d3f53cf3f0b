"""ScoreLiDAR: score distillation of scan completion, held to the truth's structure.

Paper: Zhang et al. 2024, arXiv 2412.03515. The teacher is LiDiff (arXiv 2403.13470).

  every step:
    x = G(z, scan),  t ~ U,  x_t = alpha x + sigma eps
    student: mean(sg[e_T^w(x_t) - e_F(x_t)] . x)
             + scene_weight CD^2(x, y) + key_weight |d(k_x) - d(k_y)|^2
    critic:  |e_F(x_t) - eps|^2                                             always of the scan, noised anew

  y is the truth, CD^2 the Chamfer distance of squares, d the distances between key points: of a random tenth
  of y the most curved third, k_x the point of x nearest to each.

Any other data will do with both weights 0: then it is VSD without a weight of the times.

Differs
- the published loss multiplies with x_t - x, which does not depend on the student, so that only its
  structural terms train it; here the difference of the scores reaches x (that form is a test's negative).
- the published scene term compares point i of two clouds whose order says nothing; here clouds are sets.
- the critic learns from the student's own samples of the step; authors draw new ones.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.objectives.base import TimeConfig, Updates, data_of, guided
from fastgen.objectives.requirements import Requirements
from fastgen.objectives.shared.clouds import check_clouds, key_points, placed, squared_chamfer, structure
from fastgen.objectives.shared.critic import Matching, MatchingConfig, diagnostics
from fastgen.roles.roles import Role


class ScoreLiDARConfig(MatchingConfig):
    """Score distillation of completions with structural terms."""

    name: Literal["score_lidar"] = "score_lidar"
    student_every: int = Field(1, ge=1)
    """critic updates per student update"""
    critic_time: TimeConfig = TimeConfig(low=0.0, high=1.0)
    """noise levels of the critic's loss"""
    scene_weight: float = Field(0.5, ge=0)
    """weight of the squared Chamfer distance to the truth"""
    key_weight: float = Field(0.01, ge=0)
    """weight of the squared error of the distances between key points"""
    key_neighbours: int = Field(20, ge=3)
    """points around a key point that tell how curved the surface is there"""


class ScoreLiDAR(Matching, config=ScoreLiDARConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        return replace(super().requirements(cfg), real_data=bool(cfg.scene_weight or cfg.key_weight))

    def step(self, batch: Batch, k: int, teacher: Role | None = None) -> Updates:
        cfg, teacher = self.cfg, teacher or self.teacher
        last = self.rng.shared_randint(len(self.student.times))
        if k % cfg.student_every == 0:
            with self.turn("student"):
                x = self.generate(batch, last)  # x = G(z, scan)
                t, x_t = self.noised(x, cfg.time)  # x_t = alpha x + sigma eps
                with torch.no_grad():
                    real = guided(teacher, x_t, t, batch, self.guidance)  # e_T^w, as D
                    fake = self.critic(x_t, t, batch.cond)  # e_F, as D
                loss = noise_difference(self.schedule, x, real, fake, t)  # mean(sg[e_T^w - e_F] . x)
                terms = self.structural(x, batch)
                total = sum((w * term for w, term in terms.values()), loss)
                named = {name: term for name, (_, term) in terms.items()}
                yield total, {"score": loss, **diagnostics(x, real, fake), **named}
        else:
            with torch.no_grad():
                x = self.generate(batch, last)
        yield from self.critic_turn(batch, x)  # |e_F(x_t) - eps|^2

    def structural(self, x: Tensor, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        """(weight, term) of how far clouds x [B, N, 3] are from the truth, by name; nothing at weight 0."""
        cfg, found = self.cfg, {}
        if not (cfg.scene_weight or cfg.key_weight):
            return {}
        check_clouds(tuple(x.shape[1:]), {"scene_weight": cfg.scene_weight, "key_weight": cfg.key_weight})
        x, y = placed(x, batch.cond), placed(data_of(batch), batch.cond)
        if cfg.scene_weight:
            found["scene"] = cfg.scene_weight, squared_chamfer(x, y).mean()  # CD^2(x, y)
        if cfg.key_weight:
            order = self.rng.randn(*y.shape[:2]).to(y.device).argsort(1)
            keys = key_points(y, order[:, : y.shape[1] // 10], cfg.key_neighbours, 1 / 3)
            found["keys"] = cfg.key_weight, structure(x, y, keys).mean()  # |d(k_x) - d(k_y)|^2
        return found


def noise_difference(schedule, x: Tensor, real: Tensor, fake: Tensor, t: Tensor) -> Tensor:
    """Loss whose gradient in x is that of mean(sg[e_real - e_fake] . x), of two estimates D at the same x_t:
    e_real - e_fake = alpha / sigma (D_fake - D_real).
    """
    return losses.score_difference(x, real, fake, schedule.alpha(t) / schedule.sigma(t))
