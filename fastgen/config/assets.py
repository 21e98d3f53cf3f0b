"""The settings of a student that is a 3D asset, and of the views that it is trained on."""

import itertools
import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, model_validator

from fastgen.config.section import Section
from fastgen.threed.cameras import Ranges


class GeneratorConfig(Section):
    """A network that makes the asset of any prompt, trained for a library of them: 3D convolutions for the
    kind grid; for hash one that gives the layers behind tables that all share (Hyper-iNGP); for triplane a
    transformer.
    """

    width: int = Field(default=32, ge=4, le=1024)
    """a quarter of the channels where it begins (3D convolutions have half as many after each block)"""


class AssetConfig(Section):
    """3D scenes as the student: `num` of them, each a particle of the distribution that is learned."""

    kind: Literal["gaussians", "grid", "triplane", "hash"] = "gaussians"
    """3D Gaussians, or a field of density and colour: a dense grid, three planes or a hash grid"""
    num: int = Field(default=1, ge=1, le=64)
    """assets that are trained together; every sample is drawn of one of them"""
    points: int = Field(default=500, ge=1, le=10_000_000)
    """Gaussians of each asset"""
    degree: int = Field(default=0, ge=0, le=3)
    """degree of the spherical harmonics of a Gaussian's colour; 0 is the same colour from every side"""
    move_every: int = Field(default=0, ge=0)
    """steps between two moves of transparent Gaussians to where the image still changes; 0 is never"""
    size: int = Field(default=32, ge=4, le=4096)
    """points along each side of a field; of a hash grid, of its finest level"""
    surface: bool = False
    """the field holds a signed distance, from which the density follows (VolSDF), and not a density"""
    separate: bool = False
    """geometry and colour of a field have parameters of their own, so that a stage may train one alone
    (stages.N.asset); those of Gaussians always have"""
    samples: int = Field(default=48, ge=2, le=4096)
    """samples along each ray through a field"""
    background: Literal["grey", "colour", "black", "white"] = "grey"
    """what is behind it in training: a grey or any colour drawn for each image, or always black or white"""
    generator: GeneratorConfig | None = None
    """a network makes the asset of every prompt of data.views, and none has parameters of its own"""

    @model_validator(mode="after")
    def _makes_fields(self):
        if self.generator is None:
            return self
        if self.separate:
            raise ValueError("separate: found true with a generator, which makes both at once; leave it out")
        if self.kind == "gaussians" or self.num != 1:
            raise ValueError(
                f"generator: found kind {self.kind}, num {self.num}; it makes one field: use grid, "
                "hash or triplane, and 1"
            )
        if self.kind == "grid" and (self.size < 8 or self.size & (self.size - 1)):
            raise ValueError(
                f"size: found {self.size}; that of a grid's generator is a power of two, 8 or more"
            )
        if self.kind == "triplane" and self.size % 2:
            raise ValueError(f"size: found {self.size}; that of a triplane's generator is even")
        return self


class AssetStageConfig(Section):
    """What a stage trains of an asset, and what the teacher is shown of it."""

    train: Literal["all", "geometry", "colours"] = "all"
    """geometry or colours alone, the other left as it is"""
    view: Literal["colours", "normals"] = "colours"
    """normals shows (n + 1) / 2 of the surface's normals in the place of colours, as ProlificDreamer's second
    stage does; needs student.asset.surface"""


class ViewsConfig(Section):
    """A prompt and where it is seen from; a word for the view is added to it: "a red torus, side view"."""

    prompt: str = Field(min_length=1)
    """what the asset shows; of a generator a library of prompts: "a {red,blue} {torus,cube}" are four"""
    held_out: tuple[str, ...] = ()
    """prompts of the library that a generator is measured by and not trained on"""
    elevation: tuple[float, float] = (-10.0, 45.0)
    """lowest and highest elevation of the cameras in degrees"""
    distance: tuple[float, float] = (2.0, 2.4)
    """least and greatest distance from the origin; an asset lies within 1 of it"""
    fovy: tuple[float, float] = (45.0, 50.0)
    """least and greatest vertical field of view in degrees"""
    front: float = Field(default=45.0, gt=0, le=90)
    """degrees of azimuth to either side of the front that are called the front view"""
    back: float = Field(default=45.0, gt=0, le=90)
    """likewise of the back view"""

    @property
    def trained(self) -> tuple[str, ...]:
        """The prompts that are not held out."""
        return tuple(p for p in expanded(self.prompt) if p not in self.held_out)

    @property
    def library(self) -> list[str]:
        """The prompts, those that are held out last."""
        return [*self.trained, *self.held_out]

    @property
    def ranges(self) -> Ranges:
        return Ranges(self.elevation, self.distance, self.fovy)

    @model_validator(mode="after")
    def _has_library(self):
        every = expanded(self.prompt)
        for one in self.held_out:
            if one not in every:
                raise ValueError(f"held_out: found {one!r}; name prompts that data.views.prompt spells")
        if len(self.held_out) == len(every):
            raise ValueError("held_out: found every prompt; leave some to be trained on")
        return self

    @model_validator(mode="after")
    def _possible(self):
        bounds = {"elevation": (-89.0, 89.0), "distance": (1.0, 1e6), "fovy": (1.0, 170.0)}
        why = {"distance": "the camera would stand inside the object: above 1"}
        for key, (least, most) in bounds.items():
            low, high = getattr(self, key)
            if not least <= low <= high <= most or (key == "distance" and low == least):
                allowed = why.get(key, f"give [low, high] within {least:g} to {most:g}")
                raise ValueError(f"{key}: found {[low, high]}; {allowed}")
        return self


def expanded(prompt: str) -> list[str]:
    """Every prompt that alternatives in braces spell, in order: "a {red,blue} cube" is two."""
    parts = re.split(r"\{([^{}]*,[^{}]*)\}", prompt)  # texts at even places, alternatives at odd ones
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return list(dict.fromkeys("".join(words) for words in itertools.product(*choices)))


def check_asset_stages(asset: AssetConfig | None, stages: Iterable[Any]) -> None:
    """A ValueError for a stage whose `asset` does not fit the student's, or the method."""
    for i, stage in enumerate(stages):
        if stage.asset is None:
            continue
        key, part = f"stages.{i}.asset", stage.asset.train
        if asset is None or asset.generator is not None:
            what = "a student that is no asset" if asset is None else "student.asset.generator"
            raise ValueError(f"{key}: found for {what}; leave it out")
        if getattr(stage.objective, "asset", None) is None:
            raise ValueError(f"{key}: found for {stage.objective.name}; use sds, vsd, asd or bsd")
        if part != "all" and asset.kind != "gaussians" and not asset.separate:
            raise ValueError(f"{key}.train: found {part} of a field; set student.asset.separate true")
        if stage.asset.view == "colours":
            continue
        if asset.kind == "gaussians" or not asset.surface:
            raise ValueError(
                f"{key}.view: found normals of an asset without a surface; set student.asset.surface true "
                "with the kind grid, triplane or hash"
            )
        if part == "colours":
            raise ValueError(
                f"{key}.train: found colours, which a view of normals does not show; use geometry"
            )


def check_library(asset: AssetConfig, views: ViewsConfig, batch_size: int) -> None:
    """A ValueError unless many prompts have a network that makes their assets, and a batch different ones."""
    num, trained = len(views.library), len(views.trained)
    if asset.generator is None and num > 1:
        raise ValueError(
            f"data.views.prompt: found {num} prompts; one asset shows one: set student.asset.generator"
        )
    if asset.generator is not None and trained < batch_size:
        raise ValueError(
            f"data.views.prompt: found {trained} prompts to train on for a batch of {batch_size}; "
            "name more, or lower train.train_batch_size"
        )
