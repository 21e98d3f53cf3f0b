"""Images and prompts from disk for the measures: picture folders as uint8 tensors."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastgen.core.errors import UserError, warn
from fastgen.core.files import sha256
from fastgen.data.folders import named, scan, some
from fastgen.data.pictures import read_picture, to_tensor
from fastgen.data.text import read_text, split_lines


def image_files(folder: str | Path, key: str = "--images") -> list[Path]:
    """Image files of a folder in natural order (2.png before 10.png), sub-folders apart; a contact sheet
    (grid*.png) is not one of its images.
    """
    listing = scan(Path(folder), key=key, deep=False)
    found = [p for p in listing.files if not p.stem.startswith("grid")]
    if listing.skipped:
        warn(f"{key}: {len(listing.skipped)} skipped: {some(listing.skipped)}")
    if not found:
        raise UserError(key, f"{folder} holds no images", "add png, jpg, webp or other image files")
    return found


def batches(
    files: list[Path], batch_size: int = 64, mode: str = "RGB", key: str = "--images"
) -> Iterator[Tensor]:
    """uint8 [B, C, H, W] of files that all have one size."""
    size: torch.Size | None = None
    for first in range(0, len(files), batch_size):
        chunk = []
        for path in files[first : first + batch_size]:
            try:
                image = to_tensor(read_picture(path, mode))
            except OSError as error:
                found = f"{named(path.name)} cannot be read ({error})"
                raise UserError(key, found, "repair or remove it") from None
            size = size or image.shape
            if image.shape != size:
                found = f"{named(path.name)} is {tuple(image.shape[1:])}, others {tuple(size[1:])}"
                raise UserError(key, found, "give images of one size")
            chunk.append(image)
        yield torch.stack(chunk)


def read_all(folder: str | Path, mode: str = "RGB", key: str = "--images") -> Tensor:
    """All images of a folder, uint8 [N, C, H, W]."""
    return torch.cat(list(batches(image_files(folder, key), mode=mode, key=key)))


def read_prompts(file: str | Path, images: list[Path], key: str = "--prompts") -> list[str]:
    """The line of each image: as many lines as images, blank ones in their places.

    Fewer lines are repeated in turn where they divide the images, or where sample.py, which goes round its
    prompts, wrote the folder; other counts are refused.
    """
    num = len(images)
    text = read_text(file, key, "a text file with one prompt or label a line")
    lines = split_lines(text)
    filled = [line for line in lines if line]
    if not filled:
        raise UserError(key, f"{file} is empty", "write one prompt or label per line")
    while lines[-1] == "" and len(lines) > num:
        lines.pop()
    if len(lines) == num:
        return lines
    if len(filled) == num:
        return filled
    drawn = (images[0].parent / "samples.json").is_file()
    if drawn or (len(filled) < num and num % len(filled) == 0):
        warn(f"{key}: {len(filled)} lines for {num} images, repeated in order, as sample.py does")
        return [filled[i % len(filled)] for i in range(num)]
    raise UserError(
        key, f"{len(lines)} lines in {file} for {num} images", "give one line per image, in the same order"
    )


def local_file(weights: dict[str, str], name: str, wanted: str) -> Path:
    """The weight file given for a metric; nothing is ever downloaded."""
    if name not in weights:
        raise UserError("--weights", f"none given for {name}", f"pass --weights {name}=PATH of {wanted}")
    path = Path(weights[name])
    if not path.is_file():
        raise UserError("--weights", f"{name}: {path} does not exist", f"give the local file {wanted}")
    return path


def digest(path: Path) -> str:
    """First 12 hex digits of a file's sha256, to be quoted next to numbers made with it."""
    return sha256(path)[:12]
