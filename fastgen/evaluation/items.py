"""Samples that are no pictures: clips, point clouds and points, as metrics of those take them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.core.files import sha256
from fastgen.data.clips import read_frames
from fastgen.data.folders import named, scan
from fastgen.evaluation.sources import Source, joined

WAYS = {
    "clips": "give a folder of clips (gif, mp4), or `clips` uint8 [N, C, F, H, W] in .npz or .safetensors",
    "clouds": "give `points` [N, P, 3] as .npz or .safetensors",
    "points": "give `points` [N, D] as .npz or .safetensors",
}
MOST_FRAMES = 1000
"""of one clip"""


class Items(Source):
    """Samples in memory, one tensor each: clips uint8 [C, F, H, W], clouds [P, 3], points [D]."""

    def __init__(self, items: Sequence[Tensor], kind: str, name: str, key: str):
        super().__init__(name, key)
        self.items, self.kind = items, kind

    def __len__(self) -> int:
        return len(self.items)

    def each(self) -> Iterator[Tensor]:
        """One by one, in order."""
        yield from self.items

    def digest(self) -> str:
        return joined(
            hashlib.sha256(x.detach().cpu().contiguous().numpy().tobytes()).hexdigest() for x in self.each()
        )


class ClipFolder(Items):
    """Clip files of a folder in natural order, read one by one; they may differ in length."""

    def __init__(self, folder: Path, key: str):
        super().__init__((), "clips", str(folder), key)
        self.files = scan(folder, clips=True, key=key, deep=False).files
        if not self.files:
            raise UserError(key, f"{folder} holds no clips", WAYS["clips"])

    def __len__(self) -> int:
        return len(self.files)

    def each(self) -> Iterator[Tensor]:
        for path in self.files:
            try:
                yield read_frames(path, MOST_FRAMES)
            except OSError as error:
                found = f"{named(path.name)} cannot be read ({error})"
                raise UserError(self.key, found, "repair or remove it") from None

    def digest(self) -> str:
        return joined(sha256(path) for path in self.files)


def open_items(text: str, key: str, kind: str) -> Items:
    """The clips, clouds or points that a user's path names."""
    path = Path(text).expanduser()
    if path.is_dir() and kind == "clips":
        return ClipFolder(path, key)
    if not path.is_file() or path.suffix not in (".npz", ".safetensors"):
        raise UserError(key, f"{text} is no file of {kind}", WAYS[kind])
    name = "clips" if kind == "clips" else "points"
    found = _tensor(path, key, name, kind)
    width = {"clips": 5, "clouds": 3, "points": 2}[kind]
    fits = found.ndim == width and len(found) > 0
    fits = fits and (kind != "clouds" or found.shape[2] == 3)
    fits = fits and (found.dtype == torch.uint8 if kind == "clips" else found.is_floating_point())
    if not fits:
        raise UserError(key, f"{path}: {name} {found.dtype} {list(found.shape)}", WAYS[kind])
    if kind != "clips" and not found.isfinite().all():
        bad = int((~found.isfinite()).flatten(1).any(1).nonzero()[0])
        raise UserError(key, f"{path}: sample {bad} is not finite", "remove it")
    return Items(list(found), kind, str(path), key)


def _tensor(path: Path, key: str, name: str, kind: str) -> Tensor:
    from safetensors import safe_open

    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return torch.from_numpy(np.asarray(file[name]))
        with safe_open(path, "pt") as reader:
            return reader.get_tensor(name)
    except Exception as error:
        raise UserError(key, f"{path} has no readable `{name}` ({error})", WAYS[kind]) from None
