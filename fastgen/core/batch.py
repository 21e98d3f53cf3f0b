"""What a training step is given: one micro-batch, and the conditions of its rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

Cond = dict[str, Tensor]
"""condition tensors by the network's own keyword, each with the batch as first axis"""


@dataclass
class Batch:
    """One micro-batch: x0 [B, ...] or None, conditions, unit noise [B, ...], the data index of each row, and
    its caption where there is one.
    """

    x0: Tensor | None
    cond: Cond
    uncond: Cond
    noise: Tensor
    index: Tensor
    texts: list[str] | None = None


def stack(conds: list[Cond]) -> Cond:
    """Concatenate conditions along the batch."""
    return {k: torch.cat([c[k] for c in conds]) for k in conds[0]}


def select(cond: Cond, index: Tensor) -> Cond:
    """Rows of a condition."""
    return {k: v[index] for k, v in cond.items()}
