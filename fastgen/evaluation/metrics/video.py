"""Numbers of clips [N, C, F, H, W] in [0, 1]: of their pixels, which need no network, and of their frames'
features.

Consistency: mean correlation of neighbouring frames (VBench's temporal consistency has the cosine of features
             in this place; give one to `frame_consistency`)
Motion:      mean absolute change between neighbouring frames
Flicker:     mean absolute second difference, which smooth motion leaves small
CLIPSIM:     mean cosine of the frames' features with the prompt's         (Wu 2021, arXiv 2104.14806)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastgen.core.errors import UserError
from fastgen.evaluation.metrics.estimate import Estimate, mean_of
from fastgen.evaluation.metrics.metric import Metric


def _frames(clips: Tensor) -> Tensor:
    assert clips.ndim == 5 and clips.shape[2] > 1, clips.shape
    return clips.transpose(1, 2)  # [N, F, C, H, W]


def frame_correlation(clips: Tensor) -> Tensor:
    """Mean correlation of the pixels of neighbouring frames, [N]; frames without any contrast count as equal
    where they are.
    """
    x = _frames(clips).flatten(2).double()
    x = x - x.mean(2, keepdim=True)
    a, b = x[:, :-1], x[:, 1:]
    power = (a.square().sum(2) * b.square().sum(2)).sqrt()
    flat = (a - b).abs().amax(2) < 1e-12
    found = torch.where(power > 0, (a * b).sum(2) / power.clamp(min=1e-300), flat.double())
    return found.mean(1)


def frame_consistency(clips: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean cosine of the features of neighbouring frames, [N]; encode: [B, C, H, W] in [0, 1] to [B, d]."""
    frames = _frames(clips)
    features = encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    return cosine_similarity(features[:, :-1], features[:, 1:], dim=-1).mean(1)


def frame_text_score(clips: Tensor, texts: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """CLIPSIM: mean cosine of the frames' features with the clip's text [N, d], [N]."""
    frames = _frames(clips)
    features = encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    return cosine_similarity(features, texts[:, None].to(features), dim=-1).mean(1)


def motion(clips: Tensor) -> Tensor:
    """[N]."""
    return _frames(clips).diff(dim=1).abs().flatten(1).mean(1)


def flicker(clips: Tensor) -> Tensor:
    """[N], of clips of three frames or more."""
    return _frames(clips).diff(n=2, dim=1).abs().flatten(1).mean(1)


def clip_scores(clips: Tensor) -> dict[str, float]:
    """The means, as a run reports them."""
    found = {"frame_correlation": frame_correlation(clips), "motion": motion(clips)}
    if clips.shape[2] > 2:
        found["flicker"] = flicker(clips)
    return {k: float(v.mean()) for k, v in found.items()}


# -- by name
def _of_clips(score: Callable[[Tensor], Tensor], frames: int = 2) -> Callable[[Any, str], Estimate]:
    """The mean over clips of a score of `frames` frames or more."""

    def compute(material: Any, encoder: str) -> Estimate:
        found = []
        for i, clip in enumerate(material.samples()):
            if clip.shape[1] < frames:
                few = f"clip {i} has {clip.shape[1]} frames"
                raise UserError("--images", few, f"give clips of {frames} or more")
            found.append(score(clip[None].double() / 255))
        return mean_of(torch.cat(found))

    return compute


def _encode(material: Any, encoder: str) -> Callable[[Tensor], Tensor]:
    opened = material.encoders.open(encoder)
    return lambda frames: opened((frames * 255).round().to(torch.uint8))["features"]


def _consistency(material: Any, encoder: str) -> Estimate:
    encode = _encode(material, encoder)
    return _of_clips(lambda clips: frame_consistency(clips, encode))(material, encoder)


def _clipsim(material: Any, encoder: str) -> Estimate:
    """By the prefix and scale of the CLIP preset."""
    preset, encode = material.encoders.preset, _encode(material, encoder)
    texts = iter(material.texts(encoder, preset.prefix))

    def score(clips: Tensor) -> Tensor:
        return preset.scale * frame_text_score(clips, next(texts)[None], encode)

    return _of_clips(score)(material, encoder)


def _metric(name: str, what: str, better, source: str, compute, needs=(), encoder: str = "") -> Metric:
    return Metric(name, what, better, source, compute, needs, encoder, 1, "clips")


METRICS = (
    _metric(
        "frame_correlation", "likeness of neighbouring frames", "none", "own", _of_clips(frame_correlation)
    ),
    _metric("motion", "change between neighbouring frames", "none", "own", _of_clips(motion)),
    _metric("flicker", "second difference of frames", "none", "own", _of_clips(flicker, 3)),
    _metric(
        "frame_consistency",
        "cosine of neighbouring frames' features",
        "higher",
        "arXiv 2311.17982",
        _consistency,
        (),
        "dinov2",
    ),
    _metric(
        "clipsim",
        "cosine of frames and prompt",
        "higher",
        "arXiv 2104.14806",
        _clipsim,
        ("prompts",),
        "clip",
    ),
)
