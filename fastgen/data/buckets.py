"""Buckets: a picture is scaled and cropped to that of several sizes whose shape is nearest to its own, a clip
to one of the longest for which it has frames enough, and every batch is of one size.

The order of the batches is a function of (seed, step) as it is elsewhere: an epoch permutes the pictures of
each bucket, cuts them into batches of all processes together, and permutes the batches. What is left of a
bucket after its last whole batch waits for another epoch; a bucket smaller than a batch is repeated in it.
"""

import math
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.data.folders import Samples
from fastgen.data.media import read_one, shape_of, shape_of_clip
from fastgen.data.streaming import Reader, Rows, Stream, StreamedData
from fastgen.families.factors import check_frames, spatial_factor, temporal_factor
from fastgen.networks.codecs import TextCodec

KEY = "data.buckets"
Size = tuple[int, ...]
"""height and width in pixels, for clips after the number of frames"""


def parsed(texts: Sequence[str]) -> list[Size]:
    """Sizes of texts such as 512x768, height x width, or for clips 81x480x832, frames first."""
    found = []
    for text in texts:
        if not re.fullmatch(r"([1-9]\d{0,4}x){1,2}[1-9]\d{0,4}", text):
            way = "give sizes as HEIGHTxWIDTH, such as 512x768, for clips as FRAMESxHEIGHTxWIDTH"
            raise UserError(KEY, f"found {text[:40]!r}", way)
        found.append(tuple(map(int, text.split("x"))))
    if double := next((text for text, size in zip(texts, found) if found.count(size) > 1), ""):
        raise UserError(KEY, f"{double} is given twice", "give each size once")
    return found


def check_fits(sizes: Sequence[Size], codec) -> None:
    """A UserError where a teacher cannot be trained at several sizes, or not at one of these."""
    family = codec.family
    why = ""
    if family is None or not family.has_size:
        why = "has no image size"
    elif family.square:
        why = "needs square images"
    elif family.needs_image:
        why = "is shown an image"
    if why:
        name = "an exact teacher" if family is None else family.name
        raise UserError(KEY, f"given for {name}, which {why}", "leave it out")
    text = isinstance(codec, TextCodec)
    factor = spatial_factor(family, codec.pipe) if text else family.factor * getattr(codec, "patch", 1)
    step, per = factor * family.divisor, temporal_factor(family, codec.pipe) if text else 0
    for size in sizes:
        if len(size) != (3 if per else 2):
            form = "FRAMESxHEIGHTxWIDTH for a teacher of clips" if per else "HEIGHTxWIDTH"
            raise UserError(KEY, f"found {written(size)}", f"give {form}")
        if any(side % step for side in size[-2:]):
            wanted = f"give multiples of {step}, as {family.name} needs"
            raise UserError(KEY, f"found {written(size)}", wanted)
        if per:
            check_frames(size[0], family, per, codec.frame_patch, KEY, f"found {written(size)}", encoded=True)


def written(size: Size) -> str:
    """As a user gives it."""
    return "x".join(map(str, size))


def nearest(size: Size, sizes: Sequence[Size]) -> int | None:
    """The bucket whose ratio of sides is nearest to that of a picture, by its logarithm; for a clip of those
    of most frames among the ones it has frames for, None without one.
    """
    ratio, fitting = math.log(size[-2] / size[-1]), list(range(len(sizes)))
    if len(size) == 3:
        lengths = [s[0] for s in sizes if s[0] <= size[0]]
        fitting = [b for b in fitting if lengths and sizes[b][0] == max(lengths)]
    apart = {b: abs(math.log(sizes[b][-2] / sizes[b][-1]) - ratio) for b in fitting}
    return min(apart, key=lambda b: apart[b], default=None)


class BucketReader(Reader):
    """Pictures as uint8 [C, H, W], or clips [C, F, H, W], at the size of their bucket."""

    def __init__(self, samples: Samples, channels: int, sizes: Sequence[Size], bucket: Sequence[int]):
        """bucket: that of each picture."""
        self.samples, self.channels, self.sizes, self.bucket = samples, channels, list(sizes), list(bucket)
        self.members: list[list[int]] = [[] for _ in sizes]
        self.place: list[int] = []
        for i, b in enumerate(bucket):
            self.place.append(len(self.members[b]))
            self.members[b].append(i)

    def __len__(self) -> int:
        return len(self.bucket)

    def load(self, i: int) -> Rows:
        size = (self.channels, *self.sizes[self.bucket[i]])
        return {"images": read_one(self.samples.files[i], size, self.samples.fps)}

    def name(self, i: int) -> str:
        return self.samples.name(i)

    def after(self, i: int, k: int) -> int:
        """Of the same bucket, so that a batch stays of one size."""
        members = self.members[self.bucket[i]]
        return members[(self.place[i] + k) % len(members)]

    def first(self, num: int) -> "BucketReader":
        some = self.samples.chosen(list(range(num)))
        return BucketReader(some, self.channels, self.sizes, self.bucket[:num])


def sorted_in(samples: Samples, channels: int, sizes: Sequence[Size], on_bad: str) -> BucketReader:
    """Pictures or clips with their buckets, by their headers alone where these say enough; those without a
    readable one, and clips too short for every bucket, are left out or fatal. An empty bucket is an error.
    """
    kept, bucket = [], []
    clips = len(sizes[0]) == 3
    for i, file in enumerate(samples.files):
        try:
            size = shape_of_clip(file, samples.fps) if clips else shape_of(file)
            found = nearest(size, sizes)
            if found is None:
                raise OSError(f"{size[0]} frames, too few for every bucket")
        except OSError as error:
            bad = f"{samples.name(i)} ({error})"
            if on_bad == "error":
                way = "repair or remove it; data.on_bad_image skip leaves it out"
                raise UserError(samples.key, f"1 unreadable: {bad}", way) from None
            samples.listing.skipped.append(bad)
            continue
        kept.append(i)
        bucket.append(found)
    empty = [written(size) for b, size in enumerate(sizes) if b not in bucket]
    if empty:
        what = "clip is nearest to the length and shape" if clips else "picture is of the shape"
        raise UserError(KEY, f"no {what} of {', '.join(empty)}", "leave it out")
    counts = ", ".join(f"{bucket.count(b)} of {written(size)}" for b, size in enumerate(sizes))
    print(f"data: in buckets, {'frames x ' * clips}height x width: {counts}")
    return BucketReader(samples.chosen(kept), channels, sizes, bucket)


def batches_of(members: Sequence[Sequence[int]], size: int, epoch: int, seed: int) -> list[list[int]]:
    """The batches of an epoch, each of `size` samples of one bucket."""
    found: list[list[int]] = []
    for b, some in enumerate(members):
        order = [some[i] for i in _permutation(len(some), epoch, seed, b + 1)]
        if len(order) < size:
            order = (order * -(-size // len(order)))[:size] if order else []
        found += [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    return [found[i] for i in _permutation(len(found), epoch, seed, 0)]


def _permutation(num: int, epoch: int, seed: int, stream: int) -> list[int]:
    mixed = ((seed * 1_000_003 + epoch) * 1_009 + stream) % 2**63
    return torch.randperm(num, generator=torch.Generator().manual_seed(mixed)).tolist()


class BucketedData(StreamedData):
    """Streamed pictures or clips of several sizes, a size a batch."""

    reader: BucketReader

    def __init__(self, stream: Stream, *given, **more):
        assert isinstance(stream.reader, BucketReader), "samples that are sorted into buckets"
        super().__init__(stream, *given, **more)
        self.reader, self.x0 = stream.reader, None  # no table holds several sizes

    def _indices(self, batch_size: int, start: int, rng: Rng) -> Iterator[Tensor]:
        whole, members, micro = batch_size * rng.world, self.reader.members, start
        num = sum(max(len(some) // whole, 1) for some in members if some)
        while True:
            epoch, place = divmod(micro, num)
            batches = batches_of(members, whole, epoch, rng.seed)
            for batch in batches[place:]:
                yield torch.tensor(batch[rng.rank * batch_size : (rng.rank + 1) * batch_size])
            micro = (epoch + 1) * num

    def cond(self, index: Tensor) -> Cond:
        return self._sized(super().cond(index), index)

    def null(self, index: Tensor) -> Cond:
        return self._sized(super().null(index), index)

    def _sized(self, cond: Cond, index: Tensor) -> Cond:
        """With the sizes that SDXL takes as a condition: that of the bucket, not cropped."""
        if "time_ids" not in cond:
            return cond
        sizes = [self.reader.sizes[self.reader.bucket[i]] for i in index.tolist()]
        ids = torch.tensor([[h, w, 0, 0, h, w] for h, w in sizes]).to(cond["time_ids"])
        return cond | {"time_ids": ids}
