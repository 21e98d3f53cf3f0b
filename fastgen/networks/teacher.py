"""A loaded teacher: the denoiser, the codec around it, and what an export repeats of its folder."""

from dataclasses import dataclass
from typing import Any

from fastgen.core.paths import is_analytic
from fastgen.diffusion.schedules import Schedule
from fastgen.families.base import Family
from fastgen.networks.backbone import Backbone
from fastgen.networks.codecs import Codec
from fastgen.networks.denoiser import Denoiser


@dataclass
class Teacher:
    """Everything one folder holds: the denoiser, the codec around it, and what an export must repeat."""

    backbone: Denoiser
    codec: Codec
    scheduler: Any = None
    """of diffusers; None for a teacher in closed form"""
    path: str = ""
    info: dict | None = None
    """fastgen.json of the folder"""
    index: dict | None = None
    """entries of model_index.json that a blueprint gives in the place of the folder's"""

    @property
    def is_analytic(self) -> bool:
        """Whether it is a formula (see networks/analytic.py) and no folder of weights."""
        return is_analytic(self.path)

    @property
    def network(self) -> Backbone:
        """The denoiser as the diffusers network that it is; TypeError for an exact teacher."""
        if not isinstance(self.backbone, Backbone):
            raise TypeError(f"{type(self.backbone).__name__} is no diffusers network")
        return self.backbone

    @property
    def family(self) -> Family:
        """What its diffusers class declares; TypeError for an exact teacher."""
        return self.network.family

    @property
    def schedule(self) -> Schedule:
        return self.backbone.schedule

    @property
    def pipeline(self) -> str:
        """The pipeline class that holds it; its family's own where the folder's is another (SANA-Sprint)."""
        pipe, family = self.codec.pipe, self.family
        name = "" if pipe is None else type(pipe).__name__
        return name if name in family.pipelines or (name and not family.pipelines) else family.pipeline

    def to(self, device) -> "Teacher":
        self.backbone.to(device)
        self.codec.to(device)
        return self
