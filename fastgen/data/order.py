"""The endless order in which samples are drawn: a function of the seed and the position alone, so that a run
resumes with the very next sample and no reader has a state.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


class Order:
    """A fresh permutation of all samples every epoch. Of several sources, which stand one after the other, an
    epoch holds as many samples as all of them together, shared out by their weights; each source goes through
    its own permutations, so that a small one comes round more often.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] = ()):
        """sizes: samples of each source; weights: their shares of what is drawn, by default their sizes."""
        self.sizes, self.total = list(sizes), sum(sizes)
        self.firsts = [0, *accumulate(self.sizes)][:-1]
        self.slots = shared_out(self.total, weights or sizes)
        self.ends = list(accumulate(self.slots))
        self._kept: dict[tuple[int, int, int], Tensor] = {}
        self._epoch = -1

    def __call__(self, position: int, seed: int) -> int:
        """The sample at a position of the stream."""
        epoch, offset = divmod(position, self.total)
        if epoch != self._epoch:
            self._kept, self._epoch = {}, epoch
        slot = int(self._shuffled(-1, epoch, seed)[offset])
        if len(self.sizes) == 1:
            return slot
        source = bisect_right(self.ends, slot)
        before = self.ends[source] - self.slots[source]
        own_epoch, own = divmod(epoch * self.slots[source] + slot - before, self.sizes[source])
        return self.firsts[source] + int(self._shuffled(source, own_epoch, seed)[own])

    def _shuffled(self, source: int, epoch: int, seed: int) -> Tensor:
        """The permutation of one epoch: of the whole (-1) or of a source."""
        key = source, epoch, seed
        if key not in self._kept:
            size = self.total if source < 0 else self.sizes[source]
            mixed = (seed * 1_000_003 + epoch) * (1 if source < 0 else 1_009 + source)
            generator = torch.Generator().manual_seed(mixed % 2**63)
            self._kept[key] = torch.randperm(size, generator=generator)
        return self._kept[key]


def shared_out(total: int, weights: Sequence[float]) -> list[int]:
    """total as whole numbers in the proportion of the weights, each at least 1."""
    exact = [total * w / sum(weights) for w in weights]
    whole = [max(1, int(x)) for x in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in by_rest[: max(0, total - sum(whole))]:
        whole[i] += 1
    while sum(whole) > total:
        whole[whole.index(max(whole))] -= 1
    return whole
