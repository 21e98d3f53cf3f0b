"""First numbers of clips [N, C, F, H, W] in [0, 1] that need no network.

Consistency: mean correlation of neighbouring frames (VBench's temporal consistency has the cosine of features
             in this place; give one to `frame_consistency`)
Motion:      mean absolute change between neighbouring frames
Flicker:     mean absolute second difference, which smooth motion leaves small
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


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
