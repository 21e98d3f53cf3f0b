"""Samples drawn by all processes of a run and gathered in their order.

Batches begin where they do for one process and noise is drawn by the sample's number, so the pictures are the
same for any number of processes. What stops one of them stops all, so that none waits for another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgen.core.errors import NotFinite
from fastgen.core.interrupt import Stopped
from fastgen.core.progress import tracked

FINE, STOPPED, NOT_FINITE, FAILED = range(4)


class Spread:
    """Over the processes of an Accelerator, which all make the same calls."""

    def __init__(self, acc: Any):
        self.acc = acc

    @property
    def main(self) -> bool:
        """Whether this process has the result."""
        return self.acc.is_main_process

    def decided(self, flag: bool) -> bool:
        """The main process's answer, on all."""
        if self.acc.num_processes == 1:
            return flag
        own = torch.tensor([int(flag and self.main)], device=self.acc.device)
        return bool(self.acc.gather(own).max())

    def samples(self, draw: Callable[[int], Tensor], num: int, batch_size: int, what: str) -> Tensor | None:
        """[num, ...] of draw(first), which draws the batch that begins with sample `first`; None where this
        is not the main process. `what` names the task in its bar.
        """
        firsts, found = range(0, num, batch_size), []
        world = self.acc.num_processes
        for round_first in tracked(range(0, len(firsts), world), what, num, batch_size * world):
            # A process without a batch of its own draws the last one again: all gather tensors of one shape.
            mine = min(round_first + self.acc.process_index, len(firsts) - 1)
            batch = self._together(partial(draw, firsts[mine]))
            whole = batch.new_zeros(batch_size, *batch.shape[1:])
            whole[: len(batch)] = batch
            gathered = self.acc.gather(whole.to(self.acc.device)) if world > 1 else whole
            if self.main:
                parts = gathered.cpu().split(batch_size)[: len(firsts) - round_first]
                found += [p[: num - firsts[round_first + k]] for k, p in enumerate(parts)]
        return torch.cat(found) if self.main else None

    def _together(self, draw: Callable[[], Tensor]) -> Tensor:
        """draw() here; raises on every process where it raises on any."""
        state, error, batch = FINE, None, None
        try:
            batch = draw()
        except (Stopped, Exception) as caught:
            kinds = ((Stopped, STOPPED), (NotFinite, NOT_FINITE), (BaseException, FAILED))
            state, error = next(value for kind, value in kinds if isinstance(caught, kind)), caught
        states = torch.tensor([state], device=self.acc.device)
        worst = int((self.acc.gather(states) if self.acc.num_processes > 1 else states).max())
        if error is not None:
            raise error
        if worst == STOPPED:
            raise Stopped("a signal to another process")
        if worst == NOT_FINITE:
            raise NotFinite("samples of another process are not finite")
        if worst == FAILED:
            raise RuntimeError("another process failed to draw its samples")
        assert batch is not None
        return batch
