"""Images and prompts from disk for the measures: PNG, JPEG and WebP folders as uint8 tensors."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastgen.core.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def image_files(folder: str | Path, key: str = "--images") -> list[Path]:
    """Image files of a folder in name order; a contact sheet (grid*.png) is not one of its images."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(key, f"{folder} is not a folder", "a folder of png, jpg or webp images")
    found = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.stem.startswith("grid")]
    if not found:
        raise UserError(key, f"{folder} holds no images", "png, jpg or webp files")
    return sorted(found)


def batches(
    files: list[Path], batch_size: int = 64, mode: str = "RGB", key: str = "--images"
) -> Iterator[Tensor]:
    """uint8 [B, C, H, W] of files that all have one size."""
    import numpy as np
    from PIL import Image

    size = None
    for first in range(0, len(files), batch_size):
        chunk = []
        for path in files[first : first + batch_size]:
            try:
                with Image.open(path) as image:
                    array = np.array(image.convert(mode))
            except OSError as error:
                raise UserError(key, f"{path.name} cannot be read ({error})", "mend or remove it") from None
            size = size or array.shape
            if array.shape != size:
                raise UserError(
                    key, f"{path.name} is {array.shape[:2]}, others {size[:2]}", "images of one size"
                )
            chunk.append(torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1))
        yield torch.stack(chunk)


def read_all(folder: str | Path, mode: str = "RGB", key: str = "--images") -> Tensor:
    """All images of a folder, uint8 [N, C, H, W]."""
    return torch.cat(list(batches(image_files(folder, key), mode=mode, key=key)))


def read_lines(file: str | Path, num: int, key: str = "--prompts") -> list[str]:
    """One line per image; fewer lines are repeated in turn, as sample.py asks them."""
    if not Path(file).is_file():
        raise UserError(key, f"{file} does not exist", "a text file with one prompt or label a line")
    lines = [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
    if not lines:
        raise UserError(key, f"{file} is empty", "one prompt or label a line")
    return [lines[i % len(lines)] for i in range(num)]


def local_file(weights: dict[str, str], name: str, wanted: str) -> Path:
    """The weight file given for a metric; nothing is ever downloaded."""
    if name not in weights:
        raise UserError("--weights", f"none given for {name}", f"--weights {name}=PATH of {wanted}")
    path = Path(weights[name])
    if not path.is_file():
        raise UserError("--weights", f"{name}: {path} does not exist", f"the local file {wanted}")
    return path


def digest(path: Path) -> str:
    """First 12 hex digits of a file's sha256, to be quoted next to numbers made with it."""
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
