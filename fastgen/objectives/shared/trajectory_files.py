"""Teacher trajectories kept on disk: a file for every batch that made new ones, beside a description of what
they were collected from.

A run that was killed goes on with what it had written. Trajectories of another teacher, guidance, number of
steps or times are refused, and so is one whose conditions are not those of the data's row.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from fastgen.core.batch import Batch, Cond
from fastgen.core.errors import UserError
from fastgen.core.files import to_json, write_text
from fastgen.core.paths import expand
from fastgen.core.reading import read_json
from fastgen.data import cache

KEY = "objective.trajectories"
ABOUT = "trajectories.json"
WAY = "name another folder, or delete this one to collect again"
MARKS = 8
NEAR = 0.02
"""share by which a condition may differ from what a trajectory was collected for: text encoders round"""


class TrajectoryFiles:
    """The trajectories of one folder by number, each [states, ...], with a mark of its conditions."""

    def __init__(self, folder: str, about: dict[str, str]):
        """about: what they are collected from, by name; the same names and values in every run that reads
        them. Nothing is made or written before they are read.
        """
        self.folder, self.about = Path(expand(folder)), about
        self.rows: dict[int, Tensor] = {}
        self.marks: dict[int, Tensor] = {}
        """of those that were read and not met in a batch yet"""
        self.compare()

    def compare(self) -> None:
        """Refuse a folder that was collected from something else; what `about` does not name is not
        compared.
        """
        path = self.folder / ABOUT
        found = read_json(path, KEY, WAY) if path.exists() else {}
        if not found:
            if any(self.folder.glob("*.safetensors")):
                raise UserError(KEY, f"{self.folder} holds files and no {ABOUT}", "name an empty folder")
            return
        other = [k for k, v in self.about.items() if found.get(k) != v]
        if other:
            changes = ", ".join(f"{k} ({found.get(k)} there, {self.about[k]} here)" for k in other)
            raise UserError(KEY, f"{self.folder} was collected with another {changes}", WAY)

    def read(self) -> dict[int, Tensor]:
        """All that are there and whole, mapped from their files; a damaged file is removed."""
        cache.check_folder(str(self.folder), KEY)
        for path in sorted(self.folder.glob("*.safetensors")):
            found = cache.read(path, None, KEY)
            if found is None:
                path.unlink(missing_ok=True)
                continue
            for n, states, mark in zip(found["number"].tolist(), found["states"], found["mark"]):
                self.rows[n], self.marks[n] = states, mark
        return self.rows

    def keep(self, batch: Batch, numbers: list[int], states: Tensor) -> Tensor:
        """Write new ones, of a batch of as many; what was written, mapped from its file."""
        if not (self.folder / ABOUT).exists():
            write_text(self.folder / ABOUT, to_json(self.about, 1))
        number = torch.tensor(numbers)
        rows = {"states": states, "mark": marks(batch.cond, batch.uncond, len(numbers)), "number": number}
        path = self.folder / f"part-{cache.fingerprint('part', [number])}.safetensors"
        return cache.written(path, len(numbers), lambda: [rows], KEY)["states"]

    def check(self, batch: Batch, numbers: list[int]) -> None:
        """Refuse those that were read where a row of the batch has another shape or other conditions."""
        read = [(row, n) for row, n in enumerate(numbers) if n in self.marks]
        if not read:
            return
        now = marks(batch.cond, batch.uncond, len(numbers))
        for row, n in read:
            if n not in self.marks:  # twice in one batch
                continue
            there, here = self.rows[n].shape[1:], batch.noise.shape[1:]
            if there != here:
                raise UserError(KEY, f"{self.folder} holds x0 {tuple(there)}, here it is {tuple(here)}", WAY)
            mark = self.marks.pop(n)
            if (mark - now[row]).norm() > NEAR * mark.norm() + 1e-6:
                found = f"trajectory {n} in {self.folder} was collected for another condition than the data's"
                raise UserError(KEY, found, WAY)


def marks(cond: Cond, uncond: Cond, num: int) -> Tensor:
    """[num, MARKS] projections of the conditions and null conditions of each row, by which rows are told
    apart.
    """
    found = torch.zeros(num, MARKS, dtype=torch.float64)
    for place, one in enumerate((cond, uncond)):
        for name in sorted(one):
            flat = one[name].detach().cpu().reshape(num, -1)
            exact = not flat.is_floating_point()  # classes and masks: neighbours lie far apart
            flat = (flat.double() * 12.9898).sin() + 2 if exact else flat.double()
            for j in range(MARKS):
                waves = torch.arange(flat.shape[1], dtype=torch.float64) * (0.7311 + 0.2173 * j)
                found[:, j] += flat @ (waves + place + j).cos() / math.sqrt(flat.shape[1])
    return found.float()
