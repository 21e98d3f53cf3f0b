"""The samples of a run and the endless batches made of them.

The order of samples is a function of (seed, step), so a resumed run continues with the very next batch and no
iterator state exists.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from fastgen.core.batch import Batch, Cond, select
from fastgen.core.rng import Rng
from fastgen.data.order import Order

Taken = tuple[Tensor, Tensor | None, Cond]
"""what is read of some samples: their index, x0 [B, ...] or None, and their conditions"""


class Data:
    """x0 table [N, ...] or None, condition table, and for each sample its condition row.

    own and own_null hold what is each sample's alone, row by row: the image a network is shown.
    """

    order: Order | None = None
    """of the samples; None for one source of them all"""
    dropout: float = 0.0
    """share of the samples that get the null condition"""
    dispreferred: Tensor | None = None
    """x0 that each sample's own is preferred to; None without pairs"""
    appearance: Tensor | None = None
    """uint8 [M, 3, H, W], pictures whose look is to be taken over; None without any"""
    degradation: Any = None
    """the section data.degradation that made what the network is shown; None without one"""
    originals: Tensor | None = None
    """uint8 [N, C, H, W], the pictures that were degraded"""

    def __init__(
        self,
        x0: Tensor | None,
        cond_table: dict[str, Tensor],
        rows: Tensor,
        uncond: dict[str, Tensor],
        shape,
        texts: list[str] | None = None,
        own: dict[str, Tensor] | None = None,
        own_null: dict[str, Tensor] | None = None,
    ):
        """texts: the caption of each row of the condition table."""
        self.x0, self.cond_table, self.rows, self.uncond, self.shape = x0, cond_table, rows, uncond, shape
        self.own, self.own_null, self.texts = own or {}, own_null or {}, texts

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def encodes_later(self) -> bool:
        """Whether the text encoders are needed while it is read."""
        return False

    def first(self, num: int) -> "Data":
        """The first num samples; all of them for 0."""
        if not 0 < num < len(self):
            return self
        x0 = None if self.x0 is None else self.x0[:num]
        own, null = ({k: v[:num] for k, v in d.items()} for d in (self.own, self.own_null))
        some = Data(x0, self.cond_table, self.rows[:num], self.uncond, self.shape, self.texts, own, null)
        some.dropout = self.dropout
        some.dispreferred = None if self.dispreferred is None else self.dispreferred[:num]
        some.appearance = self.appearance
        some.degradation = self.degradation
        some.originals = None if self.originals is None else self.originals[:num]
        return some

    def cond(self, index: Tensor) -> Cond:
        return select(self.cond_table, self.rows[index]) | select(self.own, index)

    def null(self, index: Tensor) -> Cond:
        shared = {k: v.expand(len(index), *v.shape[1:]) for k, v in self.uncond.items()}
        return shared | select(self.own_null, index)

    def texts_of(self, index: Tensor) -> list[str] | None:
        """The captions of some samples; None of data without any."""
        return [self.texts[i] for i in self.rows[index].tolist()] if self.texts else None

    def batches(
        self, batch_size: int, start: int, accumulation: int, rng: Rng, device
    ) -> Iterator[list[Batch]]:
        """Windows of `accumulation` micro-batches from step `start` on, endlessly."""
        indices = self._indices(batch_size, start * accumulation, rng)
        k = start
        with closing(self._taken(indices, device)) as taken:
            while True:
                window = []
                for micro in range(accumulation):
                    index, x0, cond = next(taken)
                    rng.reset(k, micro, stream=1)
                    noise = rng.randn(batch_size, *(self.shape if x0 is None else x0.shape[1:]))
                    cond = {n: v.to(device) for n, v in cond.items()}
                    uncond = {n: v.to(device) for n, v in self.null(index).items()}
                    texts = self.texts_of(index)
                    if self.dropout:
                        rng.reset(k, micro, stream=2)
                        gone = rng.rand(batch_size) < self.dropout
                        cond = _without(cond, uncond, gone.to(device))
                        texts = texts and ["" if out else text for out, text in zip(gone.tolist(), texts)]
                    worse = self.dispreferred
                    worse = None if worse is None else worse[index].float().to(device)
                    look = self._look(batch_size, k, micro, rng, device)
                    noise = noise.to(device)
                    window.append(Batch(x0, cond, uncond, noise, index, texts, worse, appearance=look))
                yield window
                k += 1

    def _look(self, num: int, k: int, micro: int, rng: Rng, device) -> Tensor | None:
        """Some of the pictures whose look is taken over, [B, 3, H, W] in [0, 1]."""
        if self.appearance is None:
            return None
        rng.reset(k, micro, stream=3)
        return self.appearance[rng.randint(len(self.appearance), num).cpu()].to(device).float() / 255

    def _indices(self, batch_size: int, start: int, rng: Rng) -> Iterator[Tensor]:
        """The samples of this process in each micro-batch from micro-batch `start` on, endlessly."""
        order, micro = self.order or Order([len(self)]), start
        while True:
            first = micro * batch_size * rng.world + rng.rank * batch_size
            yield torch.tensor([order(first + i, rng.seed) for i in range(batch_size)])
            micro += 1

    def _taken(self, indices: Iterator[Tensor], device) -> Generator[Taken, None, None]:
        """What is read of the samples of each micro-batch."""
        for index in indices:
            x0 = None if self.x0 is None else self.x0[index].float().to(device)
            yield index, x0, self.cond(index)


def _without(cond: Cond, uncond: Cond, gone: Tensor) -> Cond:
    """Conditions with those of some rows [B] replaced by the null condition."""
    out = dict(cond)
    for key, value in uncond.items():
        if key in cond:
            out[key] = torch.where(gone.view(-1, *[1] * (value.ndim - 1)), value, cond[key])
    return out
