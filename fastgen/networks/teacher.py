"""A loaded teacher: the denoiser, the codec around it, and what an export repeats of its folder."""

from dataclasses import dataclass

from torch import nn

from fastgen.diffusion.schedules import Schedule


@dataclass
class Teacher:
    """Everything one folder holds: the denoiser, the codec around it, and what an export must repeat."""

    backbone: nn.Module
    codec: nn.Module
    scheduler: object = None
    path: str = ""
    info: dict | None = None

    @property
    def schedule(self) -> Schedule:
        return self.backbone.schedule

    @property
    def pipeline(self) -> str:
        """The pipeline class that holds it; its family's own where the folder's is another (SANA-Sprint)."""
        pipe, family = getattr(self.codec, "pipe", None), self.backbone.family
        name = "" if pipe is None else type(pipe).__name__
        return name if name in family.pipelines or (name and not family.pipelines) else family.pipeline

    def to(self, device) -> "Teacher":
        self.backbone.to(device)
        self.codec.to(device)
        return self
