"""What metrics are computed from: generated images, what they are compared with, prompts and labels; and the
measurement of one set by a list of metrics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgen.core.errors import UserError, warn
from fastgen.core.files import sha256
from fastgen.evaluation import features
from fastgen.evaluation.encoders.base import Outputs
from fastgen.evaluation.encoders.catalogue import Encoders
from fastgen.evaluation.items import Items
from fastgen.evaluation.metrics import agreement
from fastgen.evaluation.metrics.distributions import named
from fastgen.evaluation.metrics.estimate import Estimate
from fastgen.evaluation.metrics.fd_mini import NOTE
from fastgen.evaluation.metrics.frechet import Statistics, statistics_of
from fastgen.evaluation.registry import Wanted
from fastgen.evaluation.sources import Source

FLAGS = {
    "reference": ("--against", "a folder, archive or file of reference images"),
    "pairs": ("--against", "the original of each image, in their order"),
    "prompts": ("--prompts", "a text file with the prompt of each image"),
    "labels": ("--prompts", "the label or prompt of each image"),
    "groups": ("--group_size", "how many images follow each other for each prompt"),
    "generator": ("--images", "a model, to compare, protocol or a run: samples on disk take no time to draw"),
    "mixture": ("--against", "analytic:NAME, the exact mixture"),
    "forgotten": ("--forgotten", "the number of the class that was to be unlearned"),
}
OF_LOGITS = ("is", *(m.name for m in agreement.METRICS))
"""metrics of a classifier's answers, not of features"""


@dataclass
class Material:
    """One set to measure. against: reference images; known: a statistics file in their place; wanted_labels:
    what each image should show; group_size: images of each prompt, following each other; generator: what drew
    them; mixture: the exact law that points are compared with; forgotten: a class, -1 for none.
    """

    source: Source
    encoders: Encoders
    against: Source | None = None
    known: Path | None = None
    prompts: list[str] | None = None
    wanted_labels: dict[str, Tensor] = field(default_factory=dict)
    group_size: int = 0
    cache: Path | None = None
    generator: Any = None
    mixture: Any = None
    forgotten: int = -1
    equal_counts: bool = True
    """whether precision and its companions take equally many images of both sets"""
    _outputs: dict[tuple[str, str], Outputs] = field(default_factory=dict)
    _statistics: dict[str, Statistics] = field(default_factory=dict)
    _texts: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    keep: dict[str, str] = field(default_factory=dict)
    """by encoder, the beginning of the names of the outputs that any metric needs"""

    def share(self, other: Material) -> None:
        """Take over what another material with the same reference has opened and computed of it."""
        self.encoders, self.against, self.known = other.encoders, other.against, other.known
        self._statistics = other._statistics
        self._outputs |= {k: v for k, v in other._outputs.items() if k[0] == "reference"}

    def outputs(self, encoder: str) -> Outputs:
        """Of the generated images, computed once."""
        return self._of("images", encoder, self.source)

    def reference(self, encoder: str) -> Outputs:
        """Of the reference."""
        assert self.against is not None
        return self._of("reference", encoder, self.against)

    def _of(self, which: str, encoder: str, source: Source) -> Outputs:
        if (which, encoder) not in self._outputs:
            opened = self.encoders.open(encoder)
            keep = self.keep.get(encoder, "")
            self._outputs[which, encoder] = features.outputs(opened, source, self.cache, keep)
        return self._outputs[which, encoder]

    def statistics(self, encoder: str) -> Statistics:
        """From the file that was given, the features that are there already, or in one pass over the
        images.
        """
        if encoder not in self._statistics:
            opened = self.encoders.open(encoder)
            if self.known is not None:
                found = features.read_statistics(self.known, opened)
                features.check_width(named(self.outputs(encoder), "features", encoder), found, opened)
            elif ("reference", encoder) in self._outputs or self.cache:
                found = statistics_of([named(self.reference(encoder), "features", encoder)])
            else:
                assert self.against is not None
                found = features.statistics(opened, self.against)
            self._statistics[encoder] = found
        return self._statistics[encoder]

    def texts(self, encoder: str, prefix: str = "") -> Tensor:
        """Of the prompts, computed once."""
        if (encoder, prefix) not in self._texts:
            assert self.prompts is not None
            made = self.encoders.text_image(encoder).texts([prefix + p for p in self.prompts])
            self._texts[encoder, prefix] = made
        return self._texts[encoder, prefix]

    def images(self) -> Iterator[Tensor]:
        return self.source.batches()

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (generated, original); a UserError where they differ in count or size."""
        assert self.against is not None
        if len(self.source) != len(self.against):
            found = f"{len(self.against)} originals for {len(self.source)} images"
            raise UserError("--against", found, "give one original per image, in the same order")
        for a, b in zip(self.source.batches(), self.against.batches()):
            if a.shape != b.shape:
                found = f"originals of {b.shape[3]} x {b.shape[2]} for images of {a.shape[3]} x {a.shape[2]}"
                raise UserError("--against", found, "give originals of the size of the images")
            yield a, b

    def labels(self) -> dict[str, Tensor]:
        return self.wanted_labels

    def samples(self) -> Iterator[Tensor]:
        """Of a source of clips, clouds or points."""
        assert isinstance(self.source, Items)
        return self.source.each()

    def originals(self) -> Iterator[Tensor]:
        """Of a reference of such."""
        assert isinstance(self.against, Items)
        return self.against.each()

    def describe(self) -> dict:
        """What numbers must be quoted with: reference, encoders, and a note where one is a mini network."""
        found: dict[str, object] = {"images_sha256": self.source.digest()[:12]}
        if self.known is not None:
            found["reference"] = f"statistics of {self.known.name}, sha256 {sha256(self.known)[:12]}"
        elif self.against is not None:
            found["reference"] = f"{self.against.name}, {len(self.against)} images"
        if self.prompts is not None:
            text = "\n".join(self.prompts)
            found["prompts_sha256"] = hashlib.sha256(text.encode()).hexdigest()[:12]
        opened = self.encoders.opened
        found["encoders"] = {name: encoder.describe() for name, encoder in opened.items()}
        if "clip" in opened:
            found["clip_preset"] = self.encoders.clip
        return found | ({"note": NOTE} if "mini" in opened else {})


def check(material: Material, wanted: list[Wanted]) -> None:
    """Refuse, before anything is computed, what the given inputs do not allow; warn of counts that are
    small.
    """
    for label, metric, encoder in wanted:
        if metric.kind not in (material.source.kind, "any"):
            found = f"{label} measures {metric.kind}, {material.source.name} holds {material.source.kind}"
            raise UserError("--metrics", found, f"ask for metrics of {material.source.kind}")
        _check_needs(material, label, metric)
        if len(material.source) < metric.least:
            found = f"{material.source.name} holds {_images(len(material.source))}"
            raise UserError("--images", found, f"give more: {label} needs {metric.least} or more")
        if "groups" in metric.needs and len(material.source) < material.group_size:
            found = f"{material.group_size} for {_images(len(material.source))}"
            raise UserError("--group_size", found, f"give as many as each prompt has, which {label} needs")
        if material.against is not None and "reference" in metric.needs:
            least = max(2, metric.least)
            if len(material.against) < least:
                found = f"{material.against.name} holds {_images(len(material.against))}"
                raise UserError("--against", found, f"give more: {label} needs {least} or more")
        if encoder:
            keep = "logits" if metric.name in OF_LOGITS else "features"
            before = material.keep.get(encoder, keep)
            material.keep[encoder] = keep if before == keep else ""


def _images(num: int) -> str:
    return "one image" if num == 1 else f"{num} images"


def _check_needs(material: Material, label: str, metric) -> None:
    given = {
        "reference": material.against is not None,
        "statistics": material.known is not None,
        "pairs": material.against is not None,
        "prompts": material.prompts is not None,
        "labels": bool(material.wanted_labels),
        "groups": material.group_size > 1,
        "generator": material.generator is not None,
        "mixture": material.mixture is not None,
        "forgotten": material.forgotten >= 0,
    }
    if "statistics" in metric.needs and given["statistics"]:
        return
    for need in metric.needs:
        if need != "statistics" and not given[need]:
            flag, words = FLAGS[need]
            found = "statistics alone" if need == "reference" and given["statistics"] else "none given"
            raise UserError(flag, found, f"give {words}, which {label} needs")


def measure(material: Material, wanted: list[Wanted]) -> dict[str, Estimate]:
    """Each metric's estimate by its label."""
    check(material, wanted)
    # Those that need whole reference features come first: a covariance then takes no second pass.
    order = sorted(wanted, key=lambda w: "statistics" in w.metric.needs)
    found = {}
    for label, metric, encoder in order:
        found[label] = metric.compute(material, encoder)
        if metric.name.startswith("fd"):
            _warn_of_few(label, material, encoder)
    return {w.label: found[w.label] for w in wanted}


def _warn_of_few(label: str, material: Material, encoder: str) -> None:
    """A covariance of d features from n <= d samples has no full rank."""
    n, d = material.outputs(encoder)["features"].shape
    if n <= d:
        warn(f"{label}: {n} samples for {d} features, so mostly bias, which falls as 1/n; kid has none")
