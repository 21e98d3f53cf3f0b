"""Folders that `fastgen precompute` writes: encoded images and prompts in shards, with a manifest that says
which model they are of.

  manifest.json           model, shape, count and shards; complete is true once all of them are there
  null.safetensors        the empty condition
  shard-00000.safetensors x0 [n, ...] (not of prompts alone), row [n], cond.KEY [m, ...]: sample i has row
    row[i] of each cond table; captions of the m rows as JSON in the header
"""

import json
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError, first_line, warn
from fastgen.core.reading import read_json
from fastgen.data import tables
from fastgen.data.batches import Data
from fastgen.data.digest import encoders_digest
from fastgen.data.order import Order
from fastgen.data.streaming import Reader, Rows, Stream, StreamedData
from fastgen.networks.files import hub_folder
from fastgen.networks.teacher import Teacher

KEY = "data.latents"
MANIFEST, NULL = "manifest.json", "null.safetensors"
AGAIN = "run the same `fastgen precompute` again, which makes what is missing"
OPEN = 32
"""shards that are mapped at a time"""
SHOWN = 256
"""samples whose conditions are kept for what is measured"""


def model_of(teacher: Teacher) -> str:
    """What the encodings of a teacher depend on: its autoencoder, its text encoders, its size."""
    codec: Any = teacher.codec
    length, guidance = getattr(codec, "max_length", 0), codec.guidance
    name = "" if codec.family is None else codec.family.name
    about = name, tuple(codec.shape), length, guidance, getattr(codec, "patch", 1)
    return encoders_digest(hub_folder(teacher.path, False), about)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete folder."""
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(KEY, f"{folder} has no {MANIFEST}", "give a folder that `fastgen precompute` wrote")
    found = read_json(file, KEY)
    if not found.get("complete"):
        raise UserError(KEY, f"{folder} is not complete", AGAIN)
    return found


def read_null(folder: str) -> Cond:
    """The empty condition [1, ...] of a folder."""
    path = Path(folder).expanduser()
    read_manifest(path)
    if not (path / NULL).is_file():
        raise UserError(KEY, f"{path / NULL} does not exist", AGAIN)
    return {k: v.clone() for k, v in tables.mapped(path / NULL).items()}


def check_latents(cfg, teacher: Teacher) -> dict[str, Any]:
    """The manifest of data.latents, which must be of this teacher; prints what there is."""
    folder = Path(cfg.latents).expanduser()
    found = read_manifest(folder)
    if found["model"] != model_of(teacher) or found["shape"] != list(teacher.codec.shape):
        made = f"{folder} is of another model or size ({found['teacher']}, x0 {found['shape']})"
        raise UserError(KEY, made, f"run `fastgen precompute` with {teacher.path}, into another folder")
    kind = "encoded images" if found["images"] else "encoded prompts"
    print(f"data: {found['count']:,} {kind} in {len(found['shards'])} shards, none of them decoded")
    return found


class LatentReader(Reader):
    """The samples of some shards, by their number."""

    def __init__(self, files: list[Path], counts: list[int], images: bool, most: int = 0):
        """images: whether x0 is wanted; most: the first samples only; 0 is all."""
        self.files, self.counts, self.images = files, counts, images
        self.ends = list(accumulate(counts))
        self.num = min(most or self.ends[-1], self.ends[-1])
        self._open: OrderedDict[int, tuple[tables.Rows, list[str]]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return self.num

    def first(self, num: int) -> "LatentReader":
        return LatentReader(self.files, self.counts, self.images, num)

    def name(self, i: int) -> str:
        shard, row, _, _ = self._at(i)
        return f"{self.files[shard].name} row {row}"

    def _at(self, i: int) -> tuple[int, int, tables.Rows, list[str]]:
        """The shard of a sample, its row there, and the shard's tables and captions."""
        shard = bisect_right(self.ends, i)
        with self._lock:
            if shard not in self._open:
                self._open[shard] = tables.mapped(self.files[shard]), captions_of(self.files[shard])
            self._open.move_to_end(shard)
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
            rows, captions = self._open[shard]
        return shard, i - (self.ends[shard] - self.counts[shard]), rows, captions

    def load(self, i: int) -> Rows:
        _, at, rows, _ = self._at(i)
        row = int(rows["row"][at])
        found = {k.removeprefix("cond."): v[row].clone() for k, v in rows.items() if k.startswith("cond.")}
        return found | ({"x0": rows["x0"][at].clone()} if self.images else {})

    def cond(self, index: Tensor) -> Cond:
        every = [self.load(i) for i in index.tolist()]
        return {k: torch.stack([one[k] for one in every]) for k in every[0] if k != "x0"}

    def texts(self, index: Tensor) -> list[str] | None:
        found = []
        for i in index.tolist():
            _, at, rows, captions = self._at(i)
            found += [captions[int(rows["row"][at])]] if captions else []
        return found or None


def captions_of(file: Path) -> list[str]:
    """The captions of a shard's condition rows; an empty list of a teacher that takes none."""
    from safetensors import safe_open

    with safe_open(file, "pt") as source:
        return json.loads((source.metadata() or {}).get("captions", "[]"))


def damage(file: Path, count: int) -> str:
    """Why a shard cannot be used, by its header and its size; empty if it can."""
    if not file.is_file():
        return "it does not exist"
    try:
        num = len(tables.mapped(file)["row"])
    except Exception as error:  # safetensors' own, of a header or a length
        return f"cut short or damaged: {first_line(error)[:60]}"
    return "" if num == count else f"it holds {num} samples and not {count}"


def open_latents(cfg, teacher: Teacher, pixels: bool = True) -> Data:
    """The samples of data.latents, read when a batch has them."""
    folder, found = Path(cfg.latents).expanduser(), check_latents(cfg, teacher)
    if pixels and not found["images"]:
        raise UserError(KEY, f"{folder} holds prompts alone", "precompute images, which this method needs")
    weights = found.get("weights", [])
    if weights and cfg.limit:
        wrong = f"found {cfg.limit} beside encodings of {len(weights)} sources, whose weights it would lose"
        raise UserError("data.limit", wrong, "leave it out, or give it to `fastgen precompute`")
    files, counts, sizes = [], [], [0] * len(weights)
    for shard in found["shards"]:
        file, count = folder / shard["file"], shard["count"]
        if reason := damage(file, count):
            if cfg.on_bad_shard == "error":
                raise UserError(KEY, f"{file} cannot be read ({reason})", AGAIN)
            warn(f"{KEY}: {file.name} is skipped ({reason})")
        elif count:
            files.append(file)
            counts.append(count)
            sizes = [a + b for a, b in zip(sizes, shard.get("of_sources", []))]
    if not files:
        raise UserError(KEY, f"{folder} holds no shard that can be read", AGAIN)
    reader = LatentReader(files, counts, pixels, cfg.limit)
    index = torch.arange(min(SHOWN, len(reader)))
    uncond = read_null(cfg.latents)
    stream = Stream(reader, cfg.workers, cfg.on_bad_image, KEY)
    given = (reader.cond(index), index, uncond, teacher.codec.shape, reader.texts(index))
    there = [(size, weight) for size, weight in zip(sizes, weights) if size]
    order = Order([size for size, _ in there], [weight for _, weight in there]) if there else None
    data = StreamedData(stream, None, *given, later=reader, order=order)
    if not pixels:
        data.x0 = None
    return data
