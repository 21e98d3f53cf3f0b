"""Score distillation sampling (DreamFusion): a rendered asset follows the teacher's own noise estimate.

Paper: Poole, Jain, Barron & Mildenhall 2022, arXiv 2209.14988 (eq. 3); the reference code is threestudio.

  every step:
    c ~ cameras;  x = encode(render(theta, c))
    t ~ U(0.02, 0.98), eps ~ N(0, I);  x_t = alpha x + sigma eps
    e^w = e(x_t, null) + w (e(x_t, prompt as seen from c) - e(x_t, null))
    theta: gradient  sigma^2 (e^w - eps) dx/dtheta                   the teacher's own derivative is left out

  e^w - eps = alpha / sigma (x - D^w). It is the mode that is sought: theta needs w of about 100 and ends
  saturated. The student need be no asset; of a network, samples collapse onto the modes.

Differs
- w counts as everywhere here (1 is no guidance): a scale of 100 in threestudio's form is 101.
- the encoder's mean takes the place of a draw of its posterior.
- no shading, no orientation loss: colours are what is rendered.
"""

from typing import Literal

import torch

from fastgen.core.batch import Batch
from fastgen.objectives.base import ObjectiveConfig, TimeConfig, Updates
from fastgen.objectives.requirements import Requirements
from fastgen.objectives.shared.score_distillation import (
    AnnealConfig,
    AssetObjective,
    AssetTermsConfig,
    Omega,
    asset_calls,
    pulled,
    view_passes,
)


class SDSConfig(ObjectiveConfig):
    """Score distillation sampling."""

    name: Literal["sds"] = "sds"
    time: TimeConfig = TimeConfig()
    """noise levels"""
    anneal: AnnealConfig = AnnealConfig()
    """lower noise levels late in the run"""
    omega: Omega = "sigma2"
    """weight of the gradient at each time"""
    asset: AssetTermsConfig = AssetTermsConfig()
    """regularisers of an asset"""


class SDS(AssetObjective, config=SDSConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        return Requirements(asset_calls(view_passes(cfg.asset)), real_data=False)

    def step(self, batch: Batch, k: int) -> Updates:
        cfg, S = self.cfg, self.schedule
        with self.turn("student"):
            x = self.generate(batch, self.rng.shared_randint(len(self.student.times)))  # x = render(theta, c)
            t = self.sample_t(len(x), cfg.anneal.at(cfg.time, k))
            x_t = S.noise(x, self.rng.randn_like(x), t)  # x_t = alpha x + sigma eps
            with torch.no_grad():
                real = self.view_guided(self.teacher, x_t, t, batch, self.guidance)  # e^w, as D
            loss = pulled(x, real, x.detach(), S, t, cfg.omega)  # omega (e^w - eps)
            penalty, logs = self.asset_terms(k)
            yield loss + penalty, {"gap": (real - x).abs().mean(), **logs}
        self.settle(k)
