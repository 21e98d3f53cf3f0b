"""What a metric is: what it needs, which way is better, where it is from, and how it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from fastgen.evaluation.metrics.estimate import Estimate
from fastgen.evaluation.metrics.frechet import Statistics

Better = Literal["lower", "higher", "none"]
Need = Literal[
    "reference", "statistics", "prompts", "labels", "pairs", "groups", "generator", "mixture", "forgotten"
]
"""reference: samples to compare with; statistics: a mean and covariance of them will do; pairs: a reference
of the same size in the same order; groups: several images of each prompt, following each other; generator:
what draws the samples; mixture: an exact Gaussian mixture; forgotten: the class that was to be unlearned"""
Kind = Literal["images", "clips", "clouds", "points", "any"]
"""what a metric measures: images, clips, point clouds [P, 3], points [D], or the generator of any of them"""


class Material(Protocol):
    """What a metric may ask for; `fastgen.evaluation.material` has the real one."""

    def outputs(self, encoder: str) -> dict[str, Tensor]:
        """Named outputs [N, d] of the generated images."""

    def reference(self, encoder: str) -> dict[str, Tensor]:
        """Of the reference."""

    def statistics(self, encoder: str) -> Statistics:
        """Mean and covariance of the reference's features."""

    def texts(self, encoder: str, prefix: str = "") -> Tensor:
        """Unit vectors [N, d] of the prompts."""

    def images(self) -> Any:
        """Batches of the generated images, uint8 [B, C, H, W]."""

    def pairs(self) -> Any:
        """Batches of (generated, reference)."""

    def labels(self) -> dict[str, Tensor]:
        """What each image should show, [N] by attribute, -1 where nothing is asked for."""

    def samples(self) -> Iterator[Tensor]:
        """Clips uint8 [C, F, H, W], clouds [P, 3] or points [D], one tensor each."""

    def originals(self) -> Iterator[Tensor]:
        """The reference of such samples."""

    prompts: list[str] | None
    group_size: int
    generator: Any
    mixture: Any
    forgotten: int
    encoders: Any


@dataclass(frozen=True)
class Metric:
    """`compute` takes the material and the name of the encoder, "" where none is looked through."""

    name: str
    what: str
    better: Better
    source: str
    compute: Callable[[Any, str], Estimate]
    needs: tuple[Need, ...] = ()
    encoder: str = ""
    least: int = 2
    """samples that it is defined for"""
    kind: Kind = "images"
