"""The metrics that a run's config asks for (eval.metrics), on the samples of the run itself.

Everything they need is opened and checked before the run starts: a missing weight is no surprise after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.evaluation import features
from fastgen.evaluation.encoders.catalogue import Encoders, check_weights
from fastgen.evaluation.inputs import open_source
from fastgen.evaluation.items import Items
from fastgen.evaluation.material import Material, measure
from fastgen.evaluation.metrics.metric import Better, Kind
from fastgen.evaluation.metrics.mixtures import draws
from fastgen.evaluation.metrics.speed import Generator
from fastgen.evaluation.registry import Wanted, wanted
from fastgen.evaluation.sources import Arrays, Source, Squared

KEYS = {"--metrics": "eval.metrics", "--weights": "eval.weights", "--against": "eval.against"}


def keyed(error: UserError) -> UserError:
    """An error of a command's flag as one of the config's key."""
    key = KEYS.get(error.key, error.key)
    instruction = error.instruction.replace("--weights ", "eval.weights, as ").replace("--", "eval.")
    return UserError(key, error.found, instruction)


@dataclass
class Samples:
    """What a metric may know of a run's samples beside their pixels: the text and the attributes asked for,
    one each, and how many samples apart those of one request are (0: every sample has its own).
    """

    texts: list[str] | None
    attributes: dict[str, Tensor]
    period: int
    generator: Generator | None = None
    """what drew them"""


class RunMetrics:
    """names: eval.metrics; against: a source of images (clips, points), or a statistics file, "" for none;
    mini_set: the bundled set of the run's teacher, if any; kind: what the teacher makes; mixture: the law of
    an exact teacher, which is then the reference.
    """

    def __init__(
        self,
        names,
        weights: dict[str, str],
        against: str = "",
        mini_set: str = "",
        device="cpu",
        kind: Kind = "images",
        mixture=None,
    ):
        self.kind, self.mixture = kind, mixture
        try:
            check_weights(weights)
            self.wanted: list[Wanted] = [wanted(n) for n in dict.fromkeys(names)]
            self._check_kinds()
            self.encoders = Encoders(weights, mini_set, device=device)
            self.against, self.known = self._reference(against)
            for label, metric, encoder in self.wanted:
                self._check(label, metric)
                if encoder:
                    self.encoders.open(encoder)
        except UserError as error:
            raise keyed(error) from None
        self.first: Material | None = None

    @property
    def better(self) -> dict[str, Better]:
        """Which way is better, by label."""
        return {w.label: w.metric.better for w in self.wanted}

    def least(self, period: int) -> dict[str, float]:
        """Samples that each metric needs, by label, where `period` samples answer different requests (0: all
        do).
        """
        groups = 2 * period or math.inf
        return {w.label: groups if "groups" in w.metric.needs else w.metric.least for w in self.wanted}

    def _check_kinds(self) -> None:
        for label, metric, _ in self.wanted:
            if metric.kind not in (self.kind, "any"):
                found = f"{label} measures {metric.kind}"
                raise UserError("--metrics", found, f"leave it out: this teacher makes {self.kind}")
            if "forgotten" in metric.needs:
                raise UserError("--metrics", f"{label} needs --forgotten", "measure it with fastgen-eval")

    def _reference(self, text: str) -> tuple[Source | None, Path | None]:
        if self.mixture is not None:
            return draws(self.mixture, "the teacher", "eval.against"), None
        needed = any({"reference", "pairs"} & set(w.metric.needs) for w in self.wanted)
        if not text or (self.kind != "images" and not needed):
            return None, None
        path = Path(text).expanduser()
        if features.is_statistics(path) and not features.holds_images(path):
            return None, path
        known = path if features.is_statistics(path) else None
        return open_source(text, "--against", deep=True, kind=self.kind), known

    def _check(self, label: str, metric) -> None:
        if "mixture" in metric.needs and self.mixture is None:
            raise UserError("--metrics", f"{label} needs an exact mixture", "leave it out")
        if "pairs" in metric.needs:
            raise UserError("--metrics", f"{label} needs originals", "measure it with fastgen-eval")
        if "statistics" in metric.needs and self.known is not None:
            return
        if "reference" in metric.needs and self.against is None:
            found = "statistics alone" if self.known else "none given"
            raise UserError("--against", found, f"give reference images, which {label} needs")

    def check_texts(self, has_texts: bool) -> None:
        """Refuse metrics of prompts for a teacher that takes none."""
        for label, metric, _ in self.wanted:
            if "prompts" in metric.needs and not has_texts:
                raise UserError(
                    "eval.metrics", f"{label} needs prompts", "leave it out: this teacher takes none"
                )

    def scores(self, images: Tensor, about: Samples) -> dict[str, float]:
        """By label, of samples [N, C, H, W] in [0, 1] (clips [N, C, F, H, W], points [N, D]); a metric that
        needs more samples than there are, or several of one request where there are none, is left out.
        """
        points = self.kind in ("points", "clouds")
        pixels = images.cpu() if points else (images * 255).round().byte().cpu()
        found: dict[str, float] = {}
        for group in (False, True):
            asked = [w for w in self.wanted if ("groups" in w.metric.needs) == group]
            asked = [w for w in asked if len(images) >= w.metric.least and self._fits(w, about)]
            if not asked:
                continue
            chosen, size = _grouped(len(pixels), about.period) if group else (list(range(len(pixels))), 0)
            if group and size < 2:
                continue
            material = self._material(pixels[chosen], about, chosen, size)
            found |= {label: estimate.value for label, estimate in measure(material, asked).items()}
        return {label: found[label] for label, *_ in self.wanted if label in found}

    def _fits(self, one: Wanted, about: Samples) -> bool:
        if "generator" in one.metric.needs and about.generator is None:
            return False
        return bool(about.attributes) or "labels" not in one.metric.needs

    def _material(self, pixels: Tensor, about: Samples, chosen: list[int], size: int) -> Material:
        name, key = "samples of the run", "eval.metrics"
        against: Source | None = self.against
        source: Source = Arrays(pixels, name, key)
        if self.kind != "images":
            source = Items(list(pixels), self.kind, name, key)
        elif against is not None:
            against = Squared(against, (pixels.shape[-2], pixels.shape[-1]))
        texts = None if about.texts is None else [about.texts[i] for i in chosen]
        attributes = {k: v[chosen] for k, v in about.attributes.items()}
        material = Material(source, self.encoders, against, self.known, texts, attributes, size)
        material.generator, material.mixture = about.generator, self.mixture
        if self.first is None:
            self.first = material
        else:
            material.share(self.first)
        return material

    def describe(self) -> dict:
        """What the numbers must be quoted with."""
        return self.first.describe() if self.first is not None else {}


def _grouped(num: int, period: int) -> tuple[list[int], int]:
    """Samples in an order in which those of one request follow each other, and how many each request has;
    sample i answers request i modulo period.
    """
    size = num // period if period else 0
    return [i + k * period for i in range(period) for k in range(size)], size
