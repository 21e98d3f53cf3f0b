"""Views of one prompt: cameras drawn anew for every batch, and the prompt as it is seen from each."""

from collections.abc import Generator, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastgen.core.batch import Batch, Cond, select
from fastgen.core.rng import Rng
from fastgen.data.batches import Data, Taken
from fastgen.threed.cameras import VIEWS, Cameras, Ranges, random_cameras

POOL = 1024
"""views that samples are measured from, always the same"""


class Views(Data):
    """cond has the prompt with the word of the view and "camera" [B, 4]; `critic_cond` of a batch the plain
    prompt, and the camera as "c2w" [B, 16]; `views` the prompt with every word. No x0.
    """

    def __init__(
        self,
        table: Cond,
        plain: Cond,
        uncond: Cond,
        shape: tuple[int, ...],
        prompt: str,
        ranges: Ranges,
        sectors: tuple[float, float] = (45.0, 45.0),
    ):
        """table: the prompt's rows [4, ...] in the order of `VIEWS`; plain: the prompt's own row; sectors:
        half widths of front and back in degrees.
        """
        generator = torch.Generator().manual_seed(0)
        drawn = random_cameras(POOL, ranges, generator)
        self.pool = drawn[torch.randperm(POOL, generator=generator)]
        self.prompt, self.plain, self.ranges, self.sectors = prompt, plain, ranges, sectors
        self.share = (0, 1)  # of the processes of a run
        own, texts = {"camera": self.pool.rows()}, captions(prompt)
        super().__init__(None, table, self._rows(self.pool), uncond, shape, texts, own, own)

    def _rows(self, cameras: Cameras) -> Tensor:
        return torch.tensor([VIEWS.index(name) for name in cameras.names(*self.sectors)])

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
        """New cameras for each micro-batch, by its number: this process's part of those of all."""
        rank, world = self.share
        for index in indices:
            first, num = int(index[0]) - rank * len(index), len(index)
            generator = torch.Generator().manual_seed((first + 1) * 1_000_003 % 2**63)
            cameras = random_cameras(num * world, self.ranges, generator)[rank * num : (rank + 1) * num]
            cond = select(self.cond_table, self._rows(cameras)) | {"camera": cameras.rows()}
            yield index % len(self), None, cond

    def batches(
        self, batch_size: int, start: int, accumulation: int, rng: Rng, device
    ) -> Iterator[list[Batch]]:
        self.share = rng.rank, rng.world
        for window in super().batches(batch_size, start, accumulation, rng, device):
            yield [self._seen(batch) for batch in window]

    def _seen(self, batch: Batch) -> Batch:
        """With what the critic is told, and the texts of the views."""
        rows = batch.cond["camera"]
        cameras = Cameras.of(rows)
        plain = {k: v.to(rows.device).expand(len(rows), *v.shape[1:]) for k, v in self.plain.items()}
        texts = [self.texts[i] for i in self._rows(cameras).tolist()] if self.texts else None
        return replace(
            batch,
            uncond={**batch.uncond, "camera": rows},
            critic_cond={**plain, "c2w": cameras.c2w.flatten(1)},
            views={k: v.to(rows.device) for k, v in self.cond_table.items()},
            texts=texts,
        )


def captions(prompt: str) -> list[str]:
    """The prompt as it is seen from each of `VIEWS`."""
    return [f"{prompt}, {view} view" for view in VIEWS]
