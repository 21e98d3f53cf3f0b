"""Variational score distillation as ProlificDreamer does it: renders follow the teacher against a critic.

Paper: Wang et al. 2023, arXiv 2305.16213 (Alg. 1, eq. 9); time range, camera dropout and the times of the
critic from the authors' code and threestudio's.

  every step:
    i ~ particles, c ~ cameras;  x = encode(render(theta_i, c))
    t ~ U(0.02, 0.98), from step `anneal.after` on U(0.02, 0.50);  x_t = alpha x + sigma eps
    e_T^w(x_t, prompt as seen from c),  e_F(x_t, plain prompt, c)                     the critic is not guided
    theta_i: gradient  sigma^2 (e_T^w - e_F) dx/dtheta_i
    critic:  |e_F(x'_t', prompt, c') - eps'|^2,  t' ~ U(0, 1);  c' = none with probability 0.1

  With e_F = eps it is SDS. The critic sees no i: it learns the distribution over all particles.

swiftbrush is the same for networks, with a weighted critic's loss and prompts dropped, not cameras.

Differs
- the critic starts as the teacher with a zero camera embedding; threestudio takes a v-prediction network.
- geometry (by SDS on normals, w of 101) and texture are stages of a config (`stages.N.asset`), over a signed
  distance that is there from the first stage on (VolSDF); the authors make a mesh of the density (DMTet).
  Normals are rendered through the volume, in the axes of the world and over the backgrounds of colours;
  nothing keeps a mesh smooth. The critic of the first stage goes on in the third.
- times are drawn from the schedule's grid as everywhere here, not as whole steps.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch, Cond
from fastgen.objectives.base import TimeConfig, Updates
from fastgen.objectives.requirements import Calls, Requirements
from fastgen.objectives.shared.critic import Matching, MatchingConfig, diagnostics
from fastgen.objectives.shared.score_distillation import (
    AnnealConfig,
    AssetObjective,
    AssetTermsConfig,
    Omega,
    pulled,
    view_passes,
)


class ProlificDreamerConfig(MatchingConfig):
    """Variational score distillation into assets."""

    name: Literal["vsd"] = "vsd"
    student_every: int = Field(1, ge=1)
    """critic updates per student update"""
    critic_time: TimeConfig = TimeConfig(low=0.0, high=1.0)
    """noise levels of the critic's loss; never annealed"""
    anneal: AnnealConfig = AnnealConfig()
    """lower noise levels of the gradient late in the run"""
    omega: Omega = "sigma2"
    """weight of the gradient at each time"""
    camera_drop: float = Field(0.1, ge=0, lt=1)
    """probability that the critic learns from a sample without its camera"""
    asset: AssetTermsConfig = AssetTermsConfig()
    """regularisers of an asset"""


def teacher_calls(cfg: ProlificDreamerConfig, guidance: float) -> Calls:
    """Of the teacher in a step."""
    return {"teacher": round(view_passes(cfg.asset)(guidance) / cfg.student_every, 3)}


class VSD(AssetObjective, Matching, config=ProlificDreamerConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        needs = super().requirements(cfg)
        calls = lambda w, num: needs.network_calls(w, num) | teacher_calls(cfg, w)  # noqa: E731
        return replace(needs, real_data=False, network_calls=calls)

    def step(self, batch: Batch, k: int, teacher=None) -> Updates:
        cfg, S, teacher = self.cfg, self.schedule, teacher or self.teacher
        told = batch.cond if batch.critic_cond is None else batch.critic_cond
        last = self.rng.shared_randint(len(self.student.times))
        if k % cfg.student_every == 0:
            with self.turn("student"):
                x = self.generate(batch, last)  # x = render(theta_i, c)
                t, x_t = self.noised(x, cfg.anneal.at(cfg.time, k))  # x_t = alpha x + sigma eps
                with torch.no_grad():
                    real = self.view_guided(teacher, x_t, t, batch, self.guidance)  # e_T^w, as D
                    fake = self.critic(x_t, t, told)  # e_F, as D
                loss = pulled(x, real, fake, S, t, cfg.omega)  # omega (e_T^w - e_F)
                penalty, logs = self.asset_terms(k)
                yield loss + penalty, {"vsd": loss, **diagnostics(x, real, fake), **logs}
        else:
            with torch.no_grad():
                x = self.generate(batch, last)
        x = x.detach()
        with self.turn("critic"):
            t, x_t = self.noised(x, cfg.critic_time)
            told = self.drop_cameras(told, len(x))  # c'
            fake = self.critic(x_t, t, told)
            loss = self.denoising_loss(fake, x, t)  # |e_F - eps|^2
            yield loss, {"denoising": loss, **self.critic_error(fake, x, x_t, t, told)}
        self.settle(k)

    def drop_cameras(self, told: Cond, num: int) -> Cond:
        """Conditions with the camera of some rows set to zeros, where there are cameras."""
        if "c2w" not in told or not self.cfg.camera_drop:
            return told
        keep: Tensor = self.rng.rand(num) >= self.cfg.camera_drop
        return {**told, "c2w": told["c2w"] * keep.to(told["c2w"])[:, None]}
