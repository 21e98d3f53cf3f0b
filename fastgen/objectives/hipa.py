"""HiPA: one-step generation by a small LoRA, with a loss on the high frequencies of its images.

Paper: Zhang and Hooi 2023, arXiv 2311.18158. No code is public; settings the paper does not give are fields.

  once, for each condition c:  z ~ N(0, I);  y the end of the guided ODE from z;  image I* = decode(y)
  step:  I = decode(D_theta(z, T, c))
    spatial   d(I, I*)
    high      mean |HP(I) - HP(I*)| + edge_weight mean |E(I) - E(I*)|
    loss = spatial + high_weight high
    HP: Fourier transform without max(|ky|, |kx|) <= cutoff of the largest
    E: magnitude of the Sobel gradient

`student.kind lora` of rank 16 on the attention is the published 3.3 million parameters of Stable Diffusion.
`high_weight: 0` is plain regression on images.

Differs
- d is L1 on pixels, or with `metric: perceptual` the maps of the bundled feature net; the paper's perceptual
  network is not bundled. L1 in place of the paper's distances, which its public summaries do not give.
- edges: Sobel, which is differentiable.
- pairs are made when first met and kept in memory, as in ode_pairs.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.core.errors import UserError
from fastgen.diffusion import losses, spectra
from fastgen.networks.feature_net import Images, Perceptual
from fastgen.objectives.base import Objective, ObjectiveConfig, Updates
from fastgen.objectives.ode_pairs import Pairs
from fastgen.objectives.requirements import ImagesSpec, PerceptualSpec, Requirements, remembered_calls


class HiPAConfig(ObjectiveConfig):
    """Regression on images of the teacher, their high frequencies weighed apart."""

    name: Literal["hipa"] = "hipa"
    teacher_steps: int = Field(20, ge=1)
    """ODE steps a pair costs"""
    noises: int = Field(0, ge=0)
    """pairs of each condition of the data; 0 is one"""
    metric: Literal["l1", "perceptual"] = "l1"
    """distance of whole images: of pixels, or of the maps of the bundled feature net"""
    high_weight: float = Field(1.0, ge=0)
    """weight of the high frequencies and edges; 0 is off"""
    cutoff: float = Field(0.25, ge=0, lt=1)
    """frequencies up to this share of the highest are low"""
    edge_weight: float = Field(1.0, ge=0)
    """weight of the edges beside the high frequencies; 0 is off"""


class HiPA(Objective, config=HiPAConfig):
    images: Images
    perceptual: Perceptual

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        return Requirements(
            remembered_calls(cfg.teacher_steps),
            real_data=False,
            auxiliaries={
                "images": ImagesSpec(),
                **({"perceptual": PerceptualSpec()} if cfg.metric == "perceptual" else {}),
            },
            why_not_sampled=lambda num, sampler: "" if num == 1 else "it learns one step; use 1",
        )

    def check(self):
        if len(self.images.shape) < 3:
            raise UserError("objective.name", "found hipa for a teacher of points", "it compares pictures")

    def prepare(self):
        self.pairs = Pairs(self, self.cfg.teacher_steps, noises=self.cfg.noises or 1)

    def busy(self) -> str:
        return self.pairs.busy()

    def step(self, batch: Batch, k: int) -> Updates:
        z, y = self.pairs(batch, self.teacher).unbind(1)
        with torch.no_grad():
            target = self.images(y)  # I*
        with self.turn("student"):
            image = self.images(self.student(z, self.student.time(0, z), batch.cond))  # I
            spatial, high = self.spatial(image, target), self.high(image, target)
            yield spatial + self.cfg.high_weight * high, {"spatial": spatial.detach(), "high": high.detach()}

    def spatial(self, image: Tensor, target: Tensor) -> Tensor:
        """d(I, I*)"""
        if self.cfg.metric == "perceptual":
            return losses.feature_distance(self.perceptual.net.maps(image), self.perceptual.net.maps(target))
        return losses.l1(image, target)

    def high(self, image: Tensor, target: Tensor) -> Tensor:
        """| HP(I) - HP(I*) | + edge_weight | E(I) - E(I*) |"""
        fine = spectra.high_pass(image - target, self.cfg.cutoff).abs().mean()  # HP is linear
        return fine + self.cfg.edge_weight * losses.l1(spectra.edges(image), spectra.edges(target))
