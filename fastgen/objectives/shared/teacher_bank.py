"""Samples of the teacher in the place of real data, for methods whose data has none: so many for each
condition that batches ask for, made when first met.

A sample depends on the run's seed, its condition and its number only, so a resumed run makes the same ones.
"""

import zlib

import torch
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.objectives.base import Objective
from fastgen.roles.roles import Role
from fastgen.sampling.solvers import sample_teacher

UNSEEN = ("camera",)
"""entries of a condition that no teacher reads: all cameras of one view word share their samples"""


class TeacherBank:
    """Guided samples x0 by (condition, number)."""

    def __init__(self, obj: Objective, size: int, steps: int):
        """size: samples of each condition; steps: of the teacher's sampler."""
        self.obj, self.size, self.steps = obj, size, steps
        self.rows: dict[tuple[int, int], Tensor] = {}
        self.growing = False  # whether the last batch needed new ones

    def __call__(self, batch: Batch, teacher: Role) -> Tensor:
        """One sample [B, ...] for each row of a batch, drawn of those of its condition."""
        drawn = self.obj.rng.randint(self.size, len(batch.noise)).tolist()
        wanted = list(zip(condition_marks(batch), drawn))
        new = {key: row for row, key in enumerate(wanted) if key not in self.rows}
        self.growing = bool(new)
        if new:
            self._make(batch, new, teacher)
        return torch.stack([self.rows[key] for key in wanted]).to(batch.noise)

    @torch.no_grad()
    def _make(self, batch: Batch, new: dict[tuple[int, int], int], teacher: Role) -> None:
        """Samples by the guided ODE under the conditions of these rows."""
        rows = torch.tensor(list(new.values()), device=batch.noise.device)
        cond, uncond = ({k: v[rows] for k, v in d.items()} for d in (batch.cond, batch.uncond))
        noise = torch.stack([self._noise(*key, batch.noise) for key in new]).to(batch.noise)
        made = sample_teacher(teacher, noise, cond, uncond, self.steps, self.obj.guidance)
        self.rows |= dict(zip(new, made.to(batch.noise).cpu()))

    def _noise(self, mark: int, number: int, like: Tensor) -> Tensor:
        seed = ((self.obj.rng.seed * 1_000_003 + mark) * 4_096 + number) % 2**63
        return torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed))

    def busy(self) -> str:
        """How many there are, while they are made."""
        return f"collecting teacher samples, {len(self.rows):,}" if self.growing else ""


def condition_marks(batch: Batch) -> list[int]:
    """A number for the condition of each row, the same for rows that ask for the same."""
    found = [0] * len(batch.noise)
    for name in sorted(batch.cond.keys() - set(UNSEEN)):
        for row, value in enumerate(batch.cond[name].detach().cpu()):
            found[row] = zlib.crc32(value.contiguous().view(-1).view(torch.uint8).numpy(), found[row])
    return found
