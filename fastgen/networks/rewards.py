"""Rewards: how good an image is for its prompt, one number a sample, larger is better.

`reward(images, prompts) -> [B]`, images [B, 3, H, W] in [0, 1]; of clips [B, 3, F, H, W] the first, middle
and last frames are judged and their mean taken, except by a reward that says it judges clips. What a reward
looks through (a CLIP score, a preference model, a classifier, a function of the user's) is made in
`fastgen/evaluation/rewards.py`; methods only call it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.core.errors import UserError

KEY = "objective.rewards"
Score = Callable[[Tensor, list[str]], Tensor]
"""(images [B, 3, H, W] in [0, 1], or clips [B, 3, F, H, W]; prompts) -> [B]"""


class Reward:
    """A frozen score of images and prompts.

    differentiable: whether a gradient reaches the images; weights: checksums of the networks it looks
    through, by which a run knows that it is not measured by what it was tuned by; clips: whether it judges
    whole clips.
    """

    def __init__(
        self,
        name: str,
        score: Score,
        differentiable: bool = True,
        weights: Iterable[str] = (),
        clips: bool = False,
    ):
        self.name, self.score, self.differentiable = name, score, differentiable
        self.weights, self.clips = frozenset(weights), clips

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B] in float32, computed outside any autocast; a UserError where it is not finite or of another
        shape.
        """
        if images.ndim == 5 and not self.clips:
            seen = key_frames(images)
            each = self(seen.flatten(0, 1), [text for text in prompts for _ in range(seen.shape[1])])
            return each.reshape(seen.shape[:2]).mean(1)
        graph = self.differentiable and torch.is_grad_enabled()
        with torch.set_grad_enabled(graph), torch.autocast(images.device.type, enabled=False):
            found = self.score(images.float(), prompts)
        return _checked(self.name, found, len(images)).float()


def key_frames(clips: Tensor) -> Tensor:
    """The first, middle and last frames [B, 3, C, H, W] of clips [B, C, F, H, W]; fewer of shorter clips."""
    num = clips.shape[2]
    return clips[:, :, sorted({0, num // 2, num - 1})].transpose(1, 2)


def _checked(name: str, found: Any, num: int) -> Tensor:
    if not isinstance(found, Tensor):
        raise UserError(KEY, f"{name} returned {type(found).__name__}", "return a tensor [B]")
    if tuple(found.shape) != (num,):
        raise UserError(KEY, f"{name} returned shape {tuple(found.shape)} for {num} images", "return [B]")
    bad = int((~found.detach().isfinite()).sum())
    if bad:
        raise UserError(KEY, f"{name} is not finite for {bad} of {num} images", "correct it, or leave it out")
    return found


class Rewards:
    """The rewards of a run: one frozen part, which sees what the teacher's codec decodes."""

    def __init__(self, models: Sequence[Reward], codec: Any):
        self.models, self.codec = list(models), codec

    def images(self, x0: Tensor) -> Tensor:
        """What is judged of x0: decoded images in [0, 1]; points as they are."""
        return self.codec.decode(x0) if len(self.codec.shape) > 1 else x0

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[rewards, B] of images [B, 3, H, W] or clips [B, 3, F, H, W] in [0, 1]; one grey channel of images
        is repeated to three.
        """
        if images.ndim == 4 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return torch.stack([model(images, prompts) for model in self.models])

    def trainable(self) -> dict[str, nn.Parameter]:
        return {}
