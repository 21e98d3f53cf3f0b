"""Random numbers that depend on (seed, step, sample) only.

Resuming needs no state, and the number of processes does not matter: every draw is made for the whole
global batch and each process keeps its own rows, so that N processes of batch size B draw exactly what one
process of batch size N B draws.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Rng:
    """Random numbers for objectives; the trainer calls `reset` before every micro-batch.

    rank and world are this process's number and the number of processes.
    """

    def __init__(self, seed: int = 0, rank: int = 0, world: int = 1, device: str | torch.device = "cpu"):
        self.seed, self.rank, self.world, self.device = seed, rank, world, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def reset(self, step: int, micro: int = 0, stream: int = 0) -> None:
        """Start the random stream of one micro-batch; streams of different numbers are independent."""
        mixed = (self.seed * 1_000_003 + step) * 1_009 + micro * 17 + stream
        self.generator.manual_seed(mixed % (2**63 - 1))

    def _rows(self, make: Callable[[int], Tensor], num: int) -> Tensor:
        """This process's rows of a draw for the global batch."""
        return make(num * self.world)[self.rank * num : (self.rank + 1) * num]

    def randn(self, *shape: int) -> Tensor:
        """Standard normal [B, ...], float32."""
        make = lambda n: torch.randn(n, *shape[1:], generator=self.generator, device=self.device)  # noqa: E731
        return self._rows(make, shape[0])

    def randn_like(self, x: Tensor) -> Tensor:
        return self.randn(*x.shape).to(x.dtype)

    def rand(self, num: int) -> Tensor:
        """Uniform in [0, 1), [B] float64."""
        make = lambda n: torch.rand(n, generator=self.generator, device=self.device, dtype=torch.float64)  # noqa: E731
        return self._rows(make, num)

    def randint(self, high: int, num: int) -> Tensor:
        """Integers in [0, high), [B]."""
        return (self.rand(num) * high).long().clamp(max=high - 1)

    def shared_randint(self, high: int) -> int:
        """One integer in [0, high), the same on every process."""
        return int(torch.randint(high, (1,), generator=self.generator, device=self.device))
