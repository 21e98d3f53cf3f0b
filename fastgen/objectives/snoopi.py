"""SNOOPI: SwiftBrush under a random guidance scale (PG-SB), and negative prompts for its students (NASA).

Paper: Nguyen et al. 2024, arXiv 2412.02687 (Sec. 4.1 PG-SB, eq. 6-7; Sec. 4.2 NASA, eq. 8-10). No code.

  PG-SB, every step:  the step of SwiftBrush (see swiftbrush.py) with
    w ~ U(w_min, w_max) for each sample, the same in teacher and critic         w < 1 is meant: anti-guidance

  NASA, sampling only (networks/negative_prompts.py, shipped with the export): in every cross-attention
    Z = softmax(Q K+^T / sqrt d) V+  -  scale softmax(Q K-^T / sqrt d) V-       before the output projection

Differs
- whether w is drawn per sample or per batch is not stated; per sample here, which averages over w at once.
- the teacher's own `teacher.guidance` plays no part in training; it is what the teacher is compared with.
- the paper adds SwiftBrush v2's clamped CLIP loss (tau 0.37): `clip_weight`, off unless set.
- `plain_critic`, which the text-to-image recipe sets, leaves w to the teacher alone (see swiftbrush.py).
- NASA inside training (the paper's v3) is left out: it needs a list of generic negative prompts.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.objectives.requirements import Requirements
from fastgen.objectives.swiftbrush import SwiftBrush, VSDConfig


class SnoopiConfig(VSDConfig):
    """SwiftBrush with guidance drawn at random."""

    name: Literal["snoopi"] = "snoopi"
    min_guidance: float = Field(0.5, ge=0)
    """w_min"""
    max_guidance: float = Field(4.0, ge=0)
    """w_max"""
    clip_margin: float = Field(0.37, gt=0, le=1)
    """tau: samples whose cosine is above it feel nothing"""

    nasa_scale: float = Field(0.5, ge=0)
    """scale of NASA that the export is sampled with when a negative prompt is given"""

    @model_validator(mode="after")
    def _ordered(self):
        if self.min_guidance > self.max_guidance:
            raise ValueError(f"objective.min_guidance: found {self.min_guidance:g}, above max_guidance")
        return self


class Snoopi(SwiftBrush, config=SnoopiConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        needs = super().requirements(cfg)
        return replace(
            needs,
            network_calls=lambda _, num_steps: needs.network_calls(2.0, num_steps),  # never 1: two passes
            one_guidance=False,  # w is drawn
            guidance_settings={"min_guidance": cfg.min_guidance, "max_guidance": cfg.max_guidance},
            negative_prompt_scale=cfg.nasa_scale,
        )

    def scale(self, batch: Batch) -> Tensor:
        low, high = self.cfg.min_guidance, self.cfg.max_guidance
        return low + (high - low) * self.rng.rand(len(batch.noise))  # w ~ U(w_min, w_max)
