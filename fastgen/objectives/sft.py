"""Supervised training of a denoiser: how the bundled teachers are made, and fine-tuning of any other.

Paper: Ho et al. 2020, arXiv 2006.11239 (eps); Lipman et al. 2023, arXiv 2210.02747 (flow); Karras et al.
2022, arXiv 2206.00364 (EDM); label dropout for guidance: Ho & Salimans 2022, arXiv 2207.12598, Alg. 1.

  x0, c ~ data;  c <- null with probability p
  t ~ p(t), eps ~ N(0, I);  x_t = alpha_t x0 + sigma_t eps
  for a network whose paths begin at a noised picture: eps <- sqrt(1 - p^2) c + p eps (OFTSR, 2412.09465)
  loss = w(t) |D(x_t, t, c) - x0|^2  [+ noise_moments (mean(e)^2 + (std(e) - 1)^2)]

e is the noise that D implies; the last term is LiDiff's (Nunes et al. 2024, arXiv 2403.13470, eq. 9), by
sample over all its points.

Differs: nothing; the weight makes the loss a plain regression of the network's native prediction.
"""

from typing import Literal

from pydantic import Field

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.objectives.base import Objective, ObjectiveConfig, TimeConfig, Updates, data_of, native_weighting
from fastgen.objectives.requirements import Requirements


class SFTConfig(ObjectiveConfig):
    """Supervised denoiser training."""

    name: Literal["sft"] = "sft"
    time: TimeConfig = TimeConfig(low=0.0, high=1.0)
    """noise levels"""
    cond_dropout: float = Field(0.1, ge=0, le=1)
    """probability of training a sample with the null condition"""
    weighting: Literal["auto", "x0", "eps", "v", "flow", "edm"] = "auto"
    """loss weight in x0 space; auto regresses the native prediction"""
    noise_moments: float = Field(0.0, ge=0)
    """weight of how far mean and deviation of the predicted noise are from 0 and 1 (LiDiff has 5)"""


class SFT(Objective, config=SFTConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        return Requirements(
            lambda guidance, num_steps: {"student+grad": 1},
            untrained=(),
            dropout_settings={"cond_dropout": cfg.cond_dropout},
            few_step=False,
            any_source=True,
        )

    def step(self, batch: Batch, k: int) -> Updates:
        with self.turn("student"):
            x0 = data_of(batch)
            t, eps = self.sample_t(len(x0), self.cfg.time), self.rng.randn_like(x0)
            cond = self.drop_condition(batch, self.cfg.cond_dropout)
            x_t = self.schedule.noise(x0, self.student.source(eps, cond), t)  # x_t = alpha x0 + sigma eps
            D = self.student(x_t, t, cond)
            weighting = native_weighting(self.student) if self.cfg.weighting == "auto" else self.cfg.weighting
            loss = losses.denoising(self.schedule, D, x0, t, weighting)  # w(t) |D - x0|^2
            if not self.cfg.noise_moments:
                yield loss, {}
                return
            moments = losses.noise_moments(self.schedule.from_x0("eps", D, x_t, t))
            yield loss + self.cfg.noise_moments * moments, {"denoising": loss, "noise_moments": moments}
