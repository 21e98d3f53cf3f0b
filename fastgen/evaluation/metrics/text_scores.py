"""Scores of one image and its prompt, the mean over images: CLIP score, HPS, PickScore; and LAION's aesthetic
score of the image alone. All by local weights; each says which network and scale it is.

CLIP score:  scale * cos(image, prefix + prompt)                       (Hessel 2021, arXiv 2104.08718)
HPSv2, v2.1: 100 * cos of a fine-tuned open_clip ViT-H-14; the two files are not comparable (arXiv 2306.09341)
PickScore:   logit scale * cos of a fine-tuned CLIP-H                          (arXiv 2305.01569)
ImageReward: see encoders/image_reward.py                                    (arXiv 2304.05977)
Aesthetic:   a stack of linear layers without activations on unit-length ViT-L/14 embeddings (LAION 2022)
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastgen.evaluation.encoders.base import unreadable
from fastgen.evaluation.encoders.catalogue import HEAD_WANTED
from fastgen.evaluation.metrics.distributions import named
from fastgen.evaluation.metrics.estimate import Estimate, mean_of
from fastgen.evaluation.metrics.metric import Metric


def cosines(material: Any, encoder: str, prefix: str = "") -> Tensor:
    """cos of image i with prompt i, [N]."""
    images = normalize(named(material.outputs(encoder), "features", encoder), dim=-1)
    return (images * material.texts(encoder, prefix)).sum(-1)


def clip_score(material: Any, encoder: str) -> Estimate:
    """By the preset's prefix and scale."""
    preset = material.encoders.preset
    return mean_of(preset.scale * cosines(material, encoder, preset.prefix))


def hps(material: Any, encoder: str) -> Estimate:
    return mean_of(100 * cosines(material, encoder))


def pickscore(material: Any, encoder: str) -> Estimate:
    scale = material.encoders.text_image(encoder).scale
    return mean_of(scale * cosines(material, encoder))


def image_reward(material: Any, encoder: str) -> Estimate:
    model, found, first = material.encoders.open(encoder), [], 0
    for batch in material.images():
        found.append(model.rewards(batch, material.prompts[first : first + len(batch)]))
        first += len(batch)
    return mean_of(torch.cat(found))


def affine_head(path: Path) -> tuple[Tensor, Tensor]:
    """The stack of linear layers of a published head as one row [d] and an offset: it has no activations."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        names = sorted((k for k in state if k.endswith(".weight")), key=lambda k: int(k.split(".")[-2]))
        row, offset = torch.eye(state[names[0]].shape[1]).double(), torch.zeros(1).double()
        offset = torch.zeros(state[names[0]].shape[1], dtype=torch.float64)
        for name in names:
            weight, bias = state[name].double(), state[name.removesuffix("weight") + "bias"].double()
            row, offset = weight @ row, weight @ offset + bias
        assert row.shape[0] == 1, f"{row.shape[0]} outputs"
    except Exception as error:
        raise unreadable("aesthetic", path, error, HEAD_WANTED) from None
    return row[0], offset[0]


def aesthetic(material: Any, encoder: str) -> Estimate:
    row, offset = affine_head(material.encoders.path("aesthetic", HEAD_WANTED))
    unit = normalize(named(material.outputs(encoder), "features", encoder).double(), dim=-1)
    return mean_of(unit @ row + offset)


def by_style(scores: Tensor, styles: list[str]) -> dict[str, float]:
    """Mean of scores [N] for each style, and the mean over styles under "all", as HPSv2's benchmark does."""
    assert len(scores) == len(styles)
    found = {
        s: float(scores[torch.tensor([s == other for other in styles])].mean()) for s in sorted(set(styles))
    }
    return {**found, "all": sum(found.values()) / len(found)}


METRICS = (
    Metric(
        "clip",
        "cosine of image and prompt",
        "higher",
        "arXiv 2104.08718",
        clip_score,
        ("prompts",),
        "clip",
        1,
    ),
    Metric("hps", "human preference score", "higher", "arXiv 2306.09341", hps, ("prompts",), "hps", 1),
    Metric(
        "pickscore",
        "human preference score",
        "higher",
        "arXiv 2305.01569",
        pickscore,
        ("prompts",),
        "pickscore",
        1,
    ),
    Metric(
        "image_reward",
        "human preference score",
        "higher",
        "arXiv 2304.05977",
        image_reward,
        ("prompts",),
        "image_reward",
        1,
    ),
    Metric("aesthetic", "LAION's aesthetic score v2", "higher", "LAION 2022", aesthetic, (), "clip_l14", 1),
)
