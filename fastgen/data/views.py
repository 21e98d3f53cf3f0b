"""Views of one prompt: cameras drawn anew for every batch, and the prompt as it is seen from each."""

from collections.abc import Generator, Iterator
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from fastgen.core.batch import Batch, Cond, select
from fastgen.core.rng import Rng
from fastgen.data.batches import Data, Taken
from fastgen.threed.cameras import VIEWS, Cameras, Ranges, random_cameras
from fastgen.threed.generators import PLAIN

POOL = 1024
"""views that samples are measured from, always the same"""
WHICH = "which"
"""entry of cond, while a batch is made: its rows' prompts"""


class Views(Data):
    """cond has the prompt with the word of the view, "camera" [B, 4] and the plain prompt under `PLAIN`;
    `critic_cond` of a batch the plain prompt, and the camera as "c2w" [B, 16]; `views` each row's prompt with
    every word. No x0. Of several prompts a batch has different ones.
    """

    def __init__(
        self,
        table: Cond,
        plain: Cond,
        uncond: Cond,
        shape: tuple[int, ...],
        prompts: list[str],
        ranges: Ranges,
        sectors: tuple[float, float] = (45.0, 45.0),
        held_out: int = 0,
    ):
        """table: rows [4 P, ...] of P prompts, each in the order of `VIEWS`; plain: the prompts' own rows
        [P]; sectors: half widths of front and back in degrees; held_out: so many of the prompts, the last
        ones, are measured and not trained on.
        """
        generator = torch.Generator().manual_seed(0)
        drawn = random_cameras(POOL, ranges, generator)
        self.pool = drawn[torch.randperm(POOL, generator=generator)]
        self.prompts, self.plain, self.ranges, self.sectors = prompts, plain, ranges, sectors
        self.num_trained = len(prompts) - held_out
        self.share = (0, 1)  # of the processes of a run
        self.which = torch.arange(POOL) % self.num_trained
        texts, own = [t for p in prompts for t in captions(p)], {"camera": self.pool.rows()}
        super().__init__(None, table, self._rows(self.pool, self.which), uncond, shape, texts, own, own)

    def unseen(self) -> "Views | None":
        """The same views of the prompts that are held out; None without any."""
        num = len(self.prompts) - self.num_trained
        if not num:
            return None
        other = copy(self)
        other.which = self.num_trained + torch.arange(POOL) % num
        other.rows = self._rows(self.pool, other.which)
        return other

    def cond(self, index: Tensor) -> Cond:
        return super().cond(index) | self._plain(self.which[index])

    def null(self, index: Tensor) -> Cond:
        return super().null(index) | self._plain(self.which[index])

    def _plain(self, which: Tensor) -> Cond:
        """The plain prompts of these numbers, as generators read them."""
        return {PLAIN + k: v[which] for k, v in self.plain.items()}

    def _rows(self, cameras: Cameras, which: Tensor) -> Tensor:
        return len(VIEWS) * which + torch.tensor([VIEWS.index(name) for name in cameras.names(*self.sectors)])

    def first(self, num: int) -> "Data":
        """Itself: there is no end of cameras."""
        return self

    def _indices(self, batch_size: int, start: int, rng: Rng) -> Iterator[Tensor]:
        """Numbers that no two micro-batches of any process share, others for each seed."""
        micro, own = start, (rng.seed % 2**31) * 2**31
        while True:
            first = own + (micro * rng.world + rng.rank) * batch_size
            yield torch.arange(first, first + batch_size)
            micro += 1

    def _taken(self, indices: Iterator[Tensor], device) -> Generator[Taken, None, None]:
        """New cameras and prompts for each micro-batch, by its number: this process's part of them."""
        rank, world = self.share
        for index in indices:
            first, num = int(index[0]) - rank * len(index), len(index)
            generator = torch.Generator().manual_seed((first + 1) * 1_000_003 % 2**63)
            mine = torch.arange(rank * num, (rank + 1) * num)
            cameras = random_cameras(num * world, self.ranges, generator)[mine]
            which = torch.randperm(self.num_trained, generator=generator)[mine % self.num_trained]
            cond = select(self.cond_table, self._rows(cameras, which)) | self._plain(which)
            yield index % len(self), None, cond | {"camera": cameras.rows(), WHICH: which}

    def batches(
        self, batch_size: int, start: int, accumulation: int, rng: Rng, device
    ) -> Iterator[list[Batch]]:
        self.share = rng.rank, rng.world
        for window in super().batches(batch_size, start, accumulation, rng, device):
            yield [self._seen(batch) for batch in window]

    def _seen(self, batch: Batch) -> Batch:
        """With what the critic is told, and the texts of the views."""
        which = batch.cond.pop(WHICH).cpu()
        cameras, device = Cameras.of(batch.cond["camera"]), batch.noise.device
        plain = {k: v[which].to(device) for k, v in self.plain.items()}
        own = {k: v for k, v in batch.cond.items() if k not in self.cond_table}  # the view's and the prompt's
        words = (len(VIEWS) * which[:, None] + torch.arange(len(VIEWS))).flatten()
        rows = self._rows(cameras, which.to(cameras.azimuth.device)).tolist()
        return replace(
            batch,
            uncond={**batch.uncond, **own},
            critic_cond={**plain, "c2w": cameras.c2w.flatten(1)},
            views={k: v[words].to(device) for k, v in self.cond_table.items()},
            texts=[self.texts[i] for i in rows] if self.texts else None,
        )


def captions(prompt: str) -> list[str]:
    """The prompt as it is seen from each of `VIEWS`."""
    return [f"{prompt}, {view} view" for view in VIEWS]
