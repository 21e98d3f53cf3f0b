"""Images and prompts of a run encoded once, into shards that training reads without the encoders.

A shard is a function of the settings alone and is renamed into its place when it is whole, so that any number
of processes share them out, and after a kill or a full disk the same command makes those that are missing.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.core.errors import UserError, warn
from fastgen.core.files import disk_error, write_json, write_tensors
from fastgen.core.progress import tracked
from fastgen.core.reading import read_json
from fastgen.data.digest import data_digest
from fastgen.data.labels import unlabelled_rows
from fastgen.data.latents import MANIFEST, NULL, damage, model_of
from fastgen.data.sources import Found, read_source
from fastgen.data.streaming import IN_A_ROW, PictureReader, Rows
from fastgen.networks.codecs import TextCodec
from fastgen.networks.teacher import Teacher

KEY = "--out"
FORMAT = 1
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""of x0 and of the encoded prompts, where they are numbers with fractions"""
BATCH = 8
"""images that are encoded together"""
DECIDES = ("name", "dataset", "split", "image_column", "text_column", "label_column", "fps")
"""settings of a source that decide what its samples are, beside the content of its files"""
UNREADABLE = "unreadable"
"""key of a shard's header that holds the names of pictures left out"""


@dataclass(frozen=True)
class Share:
    """Which shards a process makes: those whose number is `part` modulo `parts`."""

    part: int = 0
    parts: int = 1


class Precompute:
    """Encodes a data section for a teacher into a folder."""

    def __init__(self, cfg, teacher: Teacher, out: Path, size: int, dtype: str, device="cpu"):
        """cfg: the data section; size: samples of a shard; dtype: one of DTYPES."""
        self.cfg, self.teacher, self.out, self.size, self.device = cfg, teacher, out, size, device
        self.dtype = DTYPES[dtype]
        codec: Any = teacher.codec
        if codec.needs_image:
            found = f"{codec.family.name} is shown an image of every sample"
            raise UserError("--teacher", found, "train it on data.images, which are read as they are")
        if cfg.buckets:
            raise UserError("data.buckets", "given", "leave it out: what is encoded once is of one size")
        self.found = read_source(cfg.model_copy(update={"stream": "always"}), codec, device, not cfg.prompts)
        self.num = self.found.num or 0
        sizes = self.found.order.sizes if self.found.order else [self.num]
        self.ends = list(accumulate(sizes))  # of the samples of each source
        self.weights = [cfg.weight, *(source.weight for source in cfg.sources)]
        if not self.num:
            raise UserError("data", "nothing to encode is named", "set data.images or another source")
        self.captions, self.labels = _conditions(self.found, codec, self.num)
        self.plan = {
            "format": FORMAT,
            "model": model_of(teacher),
            "teacher": teacher.path,
            "shape": list(codec.shape),
            "dtype": dtype,
            "shard_size": size,
            "samples": self.num,
            "images": not cfg.prompts,
            "data": data_digest(cfg),
            "settings": _deciding(cfg),
        }

    @property
    def shards(self) -> int:
        return -(-self.num // self.size)

    def file(self, i: int) -> Path:
        return self.out / f"shard-{i:05d}.safetensors"

    def begin(self) -> None:
        """Note what the folder is of; a UserError where it holds something else."""
        file = self.out / MANIFEST
        if file.is_file():
            there = read_json(file, KEY)
            changed = [k for k, v in self.plan.items() if there.get(k) != v]
            if changed:
                spelled = ", ".join(f"{k} {there.get(k)!r} and now {self.plan[k]!r}" for k in changed[:3])
                raise UserError(KEY, f"{self.out} was begun with {spelled}", "give another folder")
        elif self.out.is_dir() and any(self.out.iterdir()):
            raise UserError(KEY, f"{self.out} is not empty and has no {MANIFEST}", "give another folder")
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(file, {**self.plan, "complete": False})
        if not (self.out / NULL).is_file():
            write_tensors(self.out / NULL, self.teacher.codec.null(1))

    def missing(self, share: Share = Share()) -> list[int]:
        """The shards of a share that are not there whole."""
        own = range(share.part, self.shards, share.parts)
        return [i for i in own if not self.file(i).is_file() or damage(self.file(i), self._count(i))]

    def make(self, share: Share = Share()) -> None:
        """Make the shards of a share that are missing."""
        todo = self.missing(share)
        what = f"encoding {self.num:,} samples" + (f", part {share.part}" if share.parts > 1 else "")
        with ThreadPoolExecutor(max(1, self.cfg.workers)) as pool:
            for i in tracked(todo, what, len(todo)):
                try:
                    self._shard(i, pool)
                except Exception as error:
                    if not disk_error(error):
                        raise
                    way = "free some space; the same command then makes what is missing"
                    raise UserError(KEY, f"{self.out} takes no more ({error})", way) from None

    def end(self) -> int | None:
        """Write the whole manifest if every shard is there: the samples in them, None if some are missing."""
        if self.missing():
            return None
        shards: list[dict] = [
            {"file": self.file(i).name, "count": self._count(i)} for i in range(self.shards)
        ]
        several = len(self.ends) > 1
        for i, one in enumerate(shards if several else []):
            one["of_sources"] = json.loads(self._header(i)["of_sources"])
        skipped = [name for i in range(self.shards) for name in json.loads(self._header(i)[UNREADABLE])]
        count = sum(int(str(one["count"])) for one in shards)
        more: dict = {"count": count, "skipped": skipped, "shards": shards, "complete": True}
        more |= {"weights": self.weights} if several else {}
        write_json(self.out / MANIFEST, {**self.plan, **more})
        if skipped:
            warn(f"data: {len(skipped)} pictures cannot be read and are left out: {', '.join(skipped[:5])}")
        return count

    def _header(self, i: int) -> dict[str, str]:
        from safetensors import safe_open

        with safe_open(self.file(i), "pt") as source:
            return source.metadata() or {}

    def _count(self, i: int) -> int:
        """Samples of a shard that is there, as its header says; -1 where it has none."""
        try:
            return int(self._header(i)["count"])
        except Exception:  # a file that is no shard
            return -1

    @torch.no_grad()
    def _shard(self, i: int, pool: ThreadPoolExecutor) -> None:
        every = list(range(i * self.size, min((i + 1) * self.size, self.num)))
        x0, index, bad = self._encoded(every, pool) if self.plan["images"] else (None, every, [])
        cond, rows, captions = self._encoded_conditions(index)
        tensors = {"row": rows, **{f"cond.{k}": self._stored(v) for k, v in cond.items()}}
        if x0 is not None:
            tensors["x0"] = self._stored(x0)
        header = {"count": str(len(index)), "captions": json.dumps(captions), UNREADABLE: json.dumps(bad)}
        counts = Counter(bisect_right(self.ends, i) for i in index)
        header["of_sources"] = json.dumps([counts[source] for source in range(len(self.ends))])
        write_tensors(self.file(i), tensors, header)

    def _stored(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value

    def _encoded(self, every: Sequence[int], pool: ThreadPoolExecutor) -> tuple[Tensor, list[int], list[str]]:
        """x0 of the samples that can be read, which they are, and the names of the others."""
        codec: Any = self.teacher.codec
        index: list[int] = []
        parts: list[Tensor] = [torch.zeros(0, *codec.shape)]
        bad: list[str] = []
        for first in range(0, len(every), BATCH):
            some = every[first : first + BATCH]
            read = list(pool.map(self._read, some))
            bad += [f"{self._name(i)} ({one})" for i, one in zip(some, read) if isinstance(one, str)]
            sound = [(i, one["images"]) for i, one in zip(some, read) if not isinstance(one, str)]
            if bad and self.cfg.on_bad_image == "error":
                way = "repair or remove it; data.on_bad_image skip leaves it out"
                raise UserError(self._key(every[0]), f"{bad[0]} cannot be read", way)
            if len(bad) >= IN_A_ROW and not index:
                raise UserError(
                    self._key(every[0]), f"{len(bad)} in a row cannot be read: {bad[0]}", "repair them"
                )
            if sound:
                images = torch.stack([image for _, image in sound]).to(self.device)
                parts.append(codec.encode(images.float() / 127.5 - 1).float().cpu())
                index += [i for i, _ in sound]
        return torch.cat(parts), index, bad

    def _read(self, i: int) -> Rows | str:
        """A picture, or why it cannot be read."""
        if self.found.images is not None:
            return {"images": self.found.images[i]}
        assert self.found.reader is not None, "images are wanted"
        try:
            return self.found.reader.load(i)
        except OSError as error:
            return str(error)

    def _key(self, i: int) -> str:
        """The setting that sample i comes from."""
        reader = self.found.reader
        return reader.sets[bisect_right(self.ends, i)].key if isinstance(reader, PictureReader) else "data"

    def _name(self, i: int) -> str:
        reader = self.found.reader
        return reader.name(i) if isinstance(reader, PictureReader) else f"sample {i}"

    def _encoded_conditions(self, index: list[int]) -> tuple[Rows, Tensor, list[str]]:
        """A table of the conditions of some samples, the row of each, and the captions of the table."""
        codec: Any = self.teacher.codec
        if self.captions is None:
            labels = self.labels[index] if self.labels is not None else torch.zeros(len(index)).long()
            classes = {"class_labels": torch.arange(int(codec.num_classes) + 1)} if codec.num_classes else {}
            return classes, labels, []
        texts = sorted({self.captions[i] for i in index}) or [""]
        parts = [codec.prompts(texts[i : i + 32]) for i in range(0, len(texts), 32)]
        table = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
        where = {text: row for row, text in enumerate(texts)}
        return table, torch.tensor([where[self.captions[i]] for i in index]).long(), texts


def _deciding(cfg) -> list[dict]:
    """What decides the samples of each source, where it is set."""
    every = [{key: getattr(one, key, None) for key in DECIDES} for one in (cfg, *cfg.sources)]
    return [{key: value for key, value in one.items() if value} for one in every]


def _conditions(found: Found, codec, num: int) -> tuple[list[str] | None, Tensor | None]:
    """The captions and the class rows of the samples, as the teacher takes them."""
    if isinstance(codec, TextCodec):
        if codec.family.takes_text and found.captions is None:
            way = "add metadata.jsonl with file_name and text, or a .txt file beside each image"
            raise UserError("data", "this teacher needs captions and the set has none", way)
        return (found.captions if codec.family.takes_text else [""] * num), None
    if not codec.num_classes:
        return None, None
    return None, found.labels if found.labels is not None else unlabelled_rows(num, codec, True)
