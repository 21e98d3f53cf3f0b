"""The input of a training step: one micro-batch, and the conditions of its rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

Cond = dict[str, Tensor]
"""condition tensors by the network's keyword argument, each with the batch as its first axis"""

MILDER = "milder_"
"""prefix of the condition that a teacher is shown instead of the student's, of a less degraded picture"""


@dataclass
class Batch:
    """One micro-batch: x0 [B, ...] or None without data, conditions, null conditions, standard normal noise
    [B, ...], the index of each row in the data set, the captions of text data, where the data has pairs the
    x0 that each row's is preferred to, of views of an asset what its critic is told in the place of cond,
    with the prompt as it is seen from every side, a row for each word (all rows of the first sample, then of
    the next, or once for all), and where the data has them pictures [B, 3, H, W] in [0, 1] whose look is to
    be taken over.
    """

    x0: Tensor | None
    cond: Cond
    uncond: Cond
    noise: Tensor
    index: Tensor
    texts: list[str] | None = None
    dispreferred: Tensor | None = None
    critic_cond: Cond | None = None
    views: Cond | None = None
    appearance: Tensor | None = None


def stack(conds: list[Cond]) -> Cond:
    """Concatenate conditions along the batch axis."""
    return {k: torch.cat([c[k] for c in conds]) for k in conds[0]}


def select(cond: Cond, index: Tensor) -> Cond:
    """The rows of a condition at an index (or mask) [B]."""
    return {k: v[index] for k, v in cond.items()}


def milder(cond: Cond) -> Cond:
    """The teacher's side of conditions that name a milder one; any other as it is."""
    own = {k: v for k, v in cond.items() if not k.startswith(MILDER)}
    return own | {k.removeprefix(MILDER): v for k, v in cond.items() if k.startswith(MILDER)}
