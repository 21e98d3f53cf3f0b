"""Where images to be measured come from: a folder, an npz or safetensors file, webdataset archives, a bundled
set. Each gives batches of uint8 images in one order, again and again, and never holds more than a batch of
what is on disk.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.core.errors import UserError, warn
from fastgen.core.files import sha256
from fastgen.data.bundled import load_images
from fastgen.data.folders import named, scan, some
from fastgen.data.pictures import kind_of, read_picture, to_tensor

BATCH, REQUEST = 64, "request.json"
KINDS = {"grey": "grey, repeated to three channels", "alpha": "with transparency, laid over white"}


class Source:
    """Images in order. name: what messages call it; key: the flag it was given by; captions and labels: one a
    image where the source has them; files: their names where it has those.
    """

    kind = "images"

    def __init__(self, name: str, key: str):
        self.name, self.key = name, key
        self.captions: list[str] | None = None
        self.labels: list[int] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def _images(self) -> Iterator[tuple[str, Tensor]]:
        """(name, uint8 [3, H, W]) one by one."""
        raise NotImplementedError

    def digest(self) -> str:
        """sha256 of the images as they are stored."""
        raise NotImplementedError

    def batches(self, batch_size: int = BATCH) -> Iterator[Tensor]:
        """uint8 [B, 3, H, W]; a UserError that names the first image of another size."""
        size: torch.Size | None = None
        chunk: list[Tensor] = []
        for name, image in self._images():
            size = size or image.shape
            if image.shape != size:
                found = f"{name} is {_wide(image.shape)} pixels, others {_wide(size)}"
                raise UserError(self.key, found, "give images of one size")
            chunk.append(image)
            if len(chunk) == batch_size:
                yield torch.stack(chunk)
                chunk = []
        if chunk:
            yield torch.stack(chunk)

    def all(self) -> Tensor:
        """Every image at once, uint8 [N, 3, H, W]."""
        return torch.cat(list(self.batches()))


def _wide(shape: torch.Size) -> str:
    return f"{shape[-1]} x {shape[-2]}"


class Folder(Source):
    """Picture files of a folder in natural order; a contact sheet (grid*.png) is none of them. deep: those of
    its sub-folders too.
    """

    def __init__(self, folder: Path, key: str, deep: bool = False):
        super().__init__(str(folder), key)
        self.folder = folder.expanduser()
        listing = scan(folder, key=key, deep=deep)
        self.files = [p for p in listing.files if not p.stem.startswith("grid")]
        if listing.skipped:
            warn(f"{key}: {len(listing.skipped)} skipped: {some(listing.skipped)}")
        if not self.files:
            raise UserError(key, f"{folder} holds no images", "add png, jpg, webp or other image files")
        self._told = (self.folder / REQUEST).is_file()  # written by `generate`: nothing is converted

    def __len__(self) -> int:
        return len(self.files)

    def _images(self) -> Iterator[tuple[str, Tensor]]:
        kinds: Counter = Counter()
        for path in self.files:
            try:
                kinds[kind_of(path)] += 1
                yield named(path.name), to_tensor(read_picture(path))
            except OSError as error:
                found = f"{named(path.name)} cannot be read ({error})"
                raise UserError(self.key, found, "repair or remove it") from None
        if not self._told:
            warn_converted(self.key, kinds, len(self))
            self._told = True

    def digest(self) -> str:
        return joined(sha256(path) for path in self.files)

    def first(self, num: int) -> Folder:
        """This folder as if it held its first `num` pictures alone."""
        self.files = self.files[:num]
        return self


class Arrays(Source):
    """Images in memory, uint8 [N, 1 or 3, H, W]."""

    def __init__(self, images: Tensor, name: str, key: str):
        super().__init__(name, key)
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def _images(self) -> Iterator[tuple[str, Tensor]]:
        for i, image in enumerate(self.images):
            yield f"image {i} of {self.name}", image.expand(3, -1, -1)

    def digest(self) -> str:
        return hashlib.sha256(self.images.contiguous().numpy().tobytes()).hexdigest()


class Squared(Source):
    """Another source's images, cropped to the middle square and brought to `size` pixels with a Lanczos
    filter, as GigaGAN and DMD2 do; mixed sizes are welcome.
    """

    def __init__(self, source: Source, size: int | tuple[int, int]):
        self.size = (size, size) if isinstance(size, int) else size
        super().__init__(f"{source.name}, cropped to {self.size[1]} x {self.size[0]} pixels", source.key)
        self.source = source
        self.captions, self.labels = source.captions, source.labels

    def __len__(self) -> int:
        return len(self.source)

    def _images(self) -> Iterator[tuple[str, Tensor]]:
        from PIL import Image, ImageOps

        for name, image in self.source._images():
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            yield name, to_tensor(ImageOps.fit(picture, self.size[::-1], Image.Resampling.LANCZOS))

    def digest(self) -> str:
        return joined([self.source.digest(), f"cropped {self.size}"])


def warn_converted(key: str, kinds: Counter, num: int) -> None:
    """Say how many images were not plain colour."""
    for kind, words in KINDS.items():
        if kinds[kind]:
            warn(f"{key}: {kinds[kind]} of {num} images are {words}")


def joined(digests: Iterable[str]) -> str:
    """One checksum of many."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def from_npz(path: Path, key: str) -> Arrays:
    """ADM's layout: arr_0 uint8 [N, H, W, C], and perhaps arr_1, its labels."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file.files)
            name = "arr_0" if "arr_0" in names else "images"
            images = file[name]
            labels = file["arr_1"] if "arr_1" in names else None
    except KeyError:
        found = f"{path} has {', '.join(names)}"
        raise UserError(key, found, "give images in arr_0, or statistics in mu and sigma") from None
    except Exception as error:
        raise UserError(key, f"{path} cannot be read ({error})", "give an npz file without pickles") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not len(images):
        found = f"{path} holds {images.dtype} {list(images.shape)}"
        raise UserError(key, found, "give images as uint8 [N, H, W, 3]")
    made = Arrays(torch.from_numpy(images).permute(0, 3, 1, 2), str(path), key)
    made.labels = None if labels is None else _labels(labels, made, "arr_1")
    return made


def _labels(values: np.ndarray, images: Arrays, name: str) -> list[int]:
    """One class for each image; a UserError where they are something else."""
    if values.size != len(images):
        found = f"{images.name} has {values.size} labels in {name} for {len(images)} images"
        raise UserError(images.key, found, "give one class for each image, or leave them out")
    whole = values.dtype.kind in "iub" or (values.dtype.kind == "f" and bool((values % 1 == 0).all()))
    if not whole:
        raise UserError(images.key, f"{images.name}: {name} holds no whole numbers", "give classes from 0 on")
    return [int(v) for v in values.flatten()]


def from_safetensors(path: Path, key: str) -> Arrays:
    """The tensor `images`, uint8 [N, C, H, W], and perhaps `labels` [N]."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            images = file.get_tensor("images") if "images" in names else None
            labels = file.get_tensor("labels") if "labels" in names else None
    except Exception as error:
        raise UserError(key, f"{path} cannot be read ({error})", "give a safetensors file") from None
    fits = images is not None and images.dtype == torch.uint8 and images.ndim == 4 and len(images)
    if images is None or not fits or images.shape[1] not in (1, 3):
        held = ", ".join(names) if images is None else f"images {images.dtype} {list(images.shape)}"
        raise UserError(key, f"{path} holds {held}", "give a tensor `images`, uint8 [N, 3, H, W]")
    made = Arrays(images, str(path), key)
    made.labels = None if labels is None else _labels(labels.float().numpy(), made, "labels")
    return made


def bundled(name: str, key: str) -> Arrays:
    """The held-out images of a bundled set."""
    held = load_images(name, "heldout")
    made = Arrays(held.images, f"{len(held)} held-out images of {name}", key)
    made.labels, made.captions = held.labels.tolist(), held.captions
    return made
