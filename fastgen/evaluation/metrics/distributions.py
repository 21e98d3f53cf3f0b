"""Metrics of a set of images as a whole, on the features of any encoder: `fd:dinov2` is the Frechet distance
on DINOv2. The published names are these with their own encoder (registry.ALIASES).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.evaluation.metrics import mmd, neighbours
from fastgen.evaluation.metrics.estimate import Estimate, around
from fastgen.evaluation.metrics.frechet import extrapolated, frechet_estimate
from fastgen.evaluation.metrics.metric import Metric
from fastgen.evaluation.metrics.variety import inception_score, inception_score_splits, vendi_score


def named(outputs: dict[str, Tensor], name: str, encoder: str) -> Tensor:
    """One of an encoder's outputs, [N, d]; a UserError that says which it has."""
    if name not in outputs:
        found = f"{encoder} gives no {name}" + (f" but {', '.join(outputs)}" if outputs else "")
        raise UserError("--metrics", found, f"ask for this metric on an encoder that gives {name}")
    return outputs[name]


def _features(material: Any, encoder: str) -> Tensor:
    return named(material.outputs(encoder), "features", encoder)


def frechet_distance(material: Any, encoder: str) -> Estimate:
    return frechet_estimate(_features(material, encoder), material.statistics(encoder))


def frechet_extrapolated(material: Any, encoder: str) -> Estimate:
    """Contributions are those of the distance at the full count."""
    features, reference = _features(material, encoder), material.statistics(encoder)
    value, _ = extrapolated(features, reference)
    return around(value, frechet_estimate(features, reference).contributions)


def _of_features(score: Callable[[Tensor, Tensor], Estimate], even: bool = False):
    """A function of generated and reference features; even: of equally many of both, unless a protocol takes
    all.
    """

    def compute(material: Any, encoder: str) -> Estimate:
        fake, real = _features(material, encoder), named(material.reference(encoder), "features", encoder)
        if even and material.equal_counts:
            num = min(len(fake), len(real))
            fake, real = neighbours.evenly(fake, num), neighbours.evenly(real, num)
        return score(fake, real)

    return compute


def inception(material: Any, encoder: str) -> Estimate:
    """The mean over ten splits, as papers quote it; contributions are those of the score of all samples."""
    logits = named(material.outputs(encoder), "logits", encoder)
    whole = inception_score(logits)
    return around(inception_score_splits(logits)[0], whole.contributions)


def vendi(material: Any, encoder: str) -> Estimate:
    return vendi_score(_features(material, encoder))


METRICS = (
    Metric(
        "fd", "Frechet distance", "lower", "arXiv 1706.08500", frechet_distance, ("reference", "statistics")
    ),
    Metric(
        "fd_inf",
        "Frechet distance, extrapolated to infinitely many samples",
        "lower",
        "arXiv 1911.07023",
        frechet_extrapolated,
        ("reference", "statistics"),
        least=20,
    ),
    Metric(
        "kid",
        "MMD of subsets, x 1000",
        "lower",
        "arXiv 1801.01401",
        _of_features(mmd.kid_estimate),
        ("reference",),
    ),
    Metric(
        "mmd",
        "MMD of the whole sets, x 1000",
        "lower",
        "arXiv 1801.01401",
        _of_features(mmd.mmd_estimate),
        ("reference",),
    ),
    Metric(
        "cmmd",
        "MMD, Gaussian kernel, x 1000",
        "lower",
        "arXiv 2401.09603",
        _of_features(mmd.cmmd_estimate),
        ("reference",),
    ),
    Metric(
        "precision",
        "share near real samples",
        "higher",
        "arXiv 1904.06991",
        _of_features(neighbours.precision, True),
        ("reference",),
        least=4,
    ),
    Metric(
        "recall",
        "share of real samples reached",
        "higher",
        "arXiv 1904.06991",
        _of_features(neighbours.recall, True),
        ("reference",),
        least=4,
    ),
    Metric(
        "density",
        "real balls around a sample",
        "higher",
        "arXiv 2002.09797",
        _of_features(neighbours.density, True),
        ("reference",),
        least=6,
    ),
    Metric(
        "coverage",
        "share of real balls reached",
        "higher",
        "arXiv 2002.09797",
        _of_features(neighbours.coverage, True),
        ("reference",),
        least=6,
    ),
    Metric("is", "Inception score, mean of ten splits", "higher", "arXiv 1606.03498", inception, least=20),
    Metric("vendi", "effective number of different samples", "higher", "arXiv 2210.02410", vendi),
)
