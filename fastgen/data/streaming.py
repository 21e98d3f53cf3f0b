"""Samples that are read when a batch asks for them: threads read ahead of the step, so that memory holds a
few batches whatever the size of the set.

Which samples a batch has, and in which order, does not depend on the threads. A picture that cannot be read
is replaced by the next one of the set, in every epoch and every run the same.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError, warn
from fastgen.data.batches import Data, Taken
from fastgen.data.folders import Samples
from fastgen.data.media import read_one
from fastgen.data.order import Order
from fastgen.data.pictures import silence_threads

AHEAD = 2
"""micro-batches that are read before they are asked for"""
IN_A_ROW = 100
"""unreadable pictures one after the other at which a set is given up"""
NAMED = 20
"""unreadable pictures that are named one by one"""
Rows = dict[str, Tensor]


class Reader:
    """Samples by their number, of which nothing is kept."""

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, i: int) -> Rows:
        """The tensors of one sample; an OSError where it cannot be read. Called by several threads."""
        raise NotImplementedError

    def name(self, i: int) -> str:
        """The sample as a message names it."""
        raise NotImplementedError

    def first(self, num: int) -> "Reader":
        """The first num samples."""
        raise NotImplementedError

    def after(self, i: int, k: int) -> int:
        """The k-th sample after sample i, which may stand in for it."""
        return (i + k) % len(self)


class PictureReader(Reader):
    """Pictures (or clips) as uint8 [C, H, W], scaled and cropped to a size."""

    def __init__(self, sets: Sequence[Samples], size: tuple[int, ...]):
        """sets: one for each source."""
        self.files = [file for one in sets for file in one.files]
        self.sets, self.size = sets, size

    def __len__(self) -> int:
        return len(self.files)

    def load(self, i: int) -> Rows:
        return {"images": read_one(self.files[i], self.size, self.sets[0].fps)}

    def name(self, i: int) -> str:
        for one in self.sets:
            if i < len(one.files):
                return one.name(i)
            i -= len(one.files)
        raise IndexError(i)

    def first(self, num: int) -> "PictureReader":
        out: list[Samples] = []
        for one in self.sets:
            if num > 0:
                out.append(one.chosen(list(range(min(num, len(one.files))))))
                num -= len(one.files)
        return PictureReader(out, self.size)


class Stream:
    """Reads the samples of micro-batches, ahead of them and in their order."""

    def __init__(self, reader: Reader, workers: int, on_bad: str, key: str):
        """key: the setting that a UserError names; on_bad: "skip" or "error"."""
        self.reader, self.workers, self.on_bad, self.key = reader, workers, on_bad, key
        self.bad: dict[int, str] = {}
        self._lock = threading.Lock()

    def sound(self, i: int) -> tuple[int, Rows]:
        """Sample i, or the first one after it that can be read."""
        num = len(self.reader)
        for j in (self.reader.after(i, k) for k in range(min(num, IN_A_ROW))):
            if j not in self.bad:
                try:
                    return j, self.reader.load(j)
                except OSError as error:
                    self._note(j, error)
        why = f"{self.reader.name(i)} ({self.bad.get(i, '')})"
        found = f"{min(num, IN_A_ROW)} in a row cannot be read, such as {why}"
        raise UserError(self.key, found, "repair or remove them")

    def _note(self, j: int, error: OSError) -> None:
        name = self.reader.name(j)
        if self.on_bad == "error":
            way = "repair or remove it; data.on_bad_image skip leaves it out"
            raise UserError(self.key, f"{name} cannot be read ({error})", way) from None
        with self._lock:
            new, self.bad[j] = j not in self.bad, str(error)
            num = len(self.bad)
        if new and num <= NAMED:
            more = "; further ones are not named" if num == NAMED else ""
            warn(f"{self.key}: {name} cannot be read ({error}): the next one stands in for it{more}")

    def read(self, index: Sequence[int]) -> list[tuple[int, Rows]]:
        return [self.sound(i) for i in index]

    def ahead(self, indices: Iterator[Tensor]) -> Generator[list[tuple[int, Rows]], None, None]:
        """The samples of each micro-batch; those of the next ones are read meanwhile."""
        if not self.workers:
            for index in indices:
                yield self.read(index.tolist())
            return
        silence_threads()
        pool = ThreadPoolExecutor(self.workers, "reader")
        try:
            waiting: deque[list[Future]] = deque()
            for index in islice(indices, AHEAD):
                waiting.append(self._submit(pool, index.tolist()))
            while waiting:
                futures = waiting.popleft()
                waiting += [self._submit(pool, index.tolist()) for index in islice(indices, 1)]
                yield [one for future in futures for one in future.result()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, index: list[int]) -> list[Future]:
        """One task for each thread."""
        size = -(-len(index) // self.workers)
        return [pool.submit(self.read, index[i : i + size]) for i in range(0, len(index), size)]


class Later(Protocol):
    """Conditions that no table holds."""

    def cond(self, index: Tensor) -> Cond:
        """Those of some samples."""
        ...

    def texts(self, index: Tensor) -> list[str] | None:
        """Their captions."""
        ...


class EncodedLater:
    """Captions that are encoded when a batch has them."""

    def __init__(self, codec, captions: Sequence[str]):
        self.codec, self.captions = codec, captions

    def cond(self, index: Tensor) -> Cond:
        return self.codec.prompts(self.texts(index))

    def texts(self, index: Tensor) -> list[str]:
        return [self.captions[i] for i in index.tolist()]


class FirstSamples:
    """x0 of the first samples of a stream, by slice: as much of a table as measuring needs."""

    def __init__(self, data: "StreamedData"):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, some: slice) -> Tensor:
        index = range(*some.indices(len(self)))
        parts = [index[i : i + 32] for i in range(0, len(index), 32)]
        made = (self.data.made(self.data.stream.read(part), "cpu")[0] for part in parts)
        return torch.cat([x0 for x0 in made if x0 is not None])


class StreamedData(Data):
    """Data whose samples are read as batches need them."""

    def __init__(
        self,
        stream: Stream,
        encode: Callable[[Tensor], Tensor] | None,
        cond_table: Cond,
        rows: Tensor,
        uncond: Cond,
        shape,
        texts: list[str] | None = None,
        later: Later | None = None,
        order: Order | None = None,
    ):
        """encode: x0 [B, ...] of uint8 images [B, C, H, W]; None for a reader of x0. later: the conditions
        where the table has those of the first samples only.
        """
        super().__init__(None, cond_table, rows, uncond, shape, texts)
        x0: Any = FirstSamples(self)
        self.x0, self.stream, self.encode, self.later, self.order = x0, stream, encode, later, order

    def __len__(self) -> int:
        return len(self.stream.reader)

    def first(self, num: int) -> Data:
        if not 0 < num < len(self):
            return self
        s = self.stream
        stream = Stream(s.reader.first(num), s.workers, s.on_bad, s.key)
        given = (self.cond_table, self.rows[:num], self.uncond, self.shape, self.texts, self.later)
        some = type(self)(stream, self.encode, *given)
        some.dropout, some.appearance = self.dropout, self.appearance
        return some

    @property
    def encodes_later(self) -> bool:
        return isinstance(self.later, EncodedLater)

    def cond(self, index: Tensor) -> Cond:
        return super().cond(index) if self.later is None else self.later.cond(index)

    def texts_of(self, index: Tensor) -> list[str] | None:
        return super().texts_of(index) if self.later is None else self.later.texts(index)

    @torch.no_grad()
    def made(self, read: list[tuple[int, Rows]], device) -> tuple[Tensor | None, Rows]:
        """x0 of samples that were read, and what else was read of them."""
        rows = {k: torch.stack([row[k] for _, row in read]) for k in read[0][1]}
        images = rows.pop("x0" if self.encode is None else "images", None)
        if images is None:
            return None, rows
        on_card = torch.device(device).type == "cuda"
        images = images.pin_memory().to(device, non_blocking=True) if on_card else images.to(device)
        return (images.float() if self.encode is None else self.encode(images)), rows

    def _taken(self, indices: Iterator[Tensor], device) -> Generator[Taken, None, None]:
        with closing(self.stream.ahead(indices)) as every:
            for read in every:
                index = torch.tensor([i for i, _ in read])
                x0, cond = self.made(read, device)
                yield index, x0, cond or self.cond(index)
