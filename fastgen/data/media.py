"""Folders of images and clips read into tensors, fitted to the size a teacher takes."""

import io
from pathlib import Path

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.core.progress import tracked
from fastgen.data.clips import length_of, read_clip
from fastgen.data.folders import CLIPS, Listing, Member, Samples, gather, named, scan, some
from fastgen.data.pictures import (
    check_regular,
    check_size,
    decode_picture,
    decoders,
    decoding,
    fit,
    read_picture,
)

ORIENTATION = 0x0112
"""EXIF's tag of how a camera was held; 5 to 8 are turned by a quarter"""


def read_folder(folder: Path, size: tuple[int, ...], on_bad: str) -> tuple[Tensor, list[str] | None]:
    """uint8 images [N, C, H, W] (clips [N, C, F, H, W] for a size of four) of a folder, and their captions,
    None if any has none; files that cannot be read are named and skipped, or fatal.
    """
    samples = gather(scan(folder, clips=len(size) == 4))
    images, kept = read_files(samples, size, on_bad)
    print(describe(samples.listing, {"images": len(kept.files)}))
    return images, None if None in kept.captions else [c for c in kept.captions if c is not None]


def read_files(
    samples: Samples, size: tuple[int, ...], on_bad: str, limit: int = 0, key: str = ""
) -> tuple[Tensor, Samples]:
    """Images (or clips) of the files in order, and which these are: the first `limit` that can be read, all
    for 0. The others are named in the listing's `skipped`, or fatal. key: that of a UserError, if not the
    samples' own.
    """
    key = key or samples.key
    num = min(limit or len(samples.files), len(samples.files))
    found = torch.empty(num, *size, dtype=torch.uint8)
    kept: list[int] = []
    bad: list[str] = []
    for i, path in enumerate(tracked(samples.files, f"reading {num:,} files", num)):
        if len(kept) == num:
            break
        try:
            one = read_one(path, size, samples.fps)
        except OSError as error:
            bad.append(f"{samples.name(i)} ({error})")
            continue
        found[len(kept)] = one
        kept.append(i)
    if on_bad == "error" and (every := [*samples.listing.skipped, *bad]):
        way = "; data.on_bad_image skip leaves it out" if key != "data.control" else ""
        raise UserError(key, f"{len(every)} unreadable: {every[0]}", f"repair or remove it{way}")
    if bad:
        print(f"warning: {key}: skipped {len(bad)} unreadable: {some(bad)}")
    samples.listing.skipped += bad
    if not kept:
        why = f" ({some(samples.listing.skipped)})" if samples.listing.skipped else ""
        kinds = f"{', '.join(CLIPS)} files" if len(size) == 4 else "png, jpg, webp or other picture files"
        raise UserError(key, f"{samples.listing.folder} holds no readable image{why}", kinds)
    return found[: len(kept)], samples.chosen(kept)


def describe(listing: Listing, counts: dict[str, int], label: str = "") -> str:
    """One line of what was found in a folder and what was left out; label: which of several it is."""
    parts = [", ".join(f"{n} {what}" for what, n in counts.items())]
    if listing.skipped:
        parts.append(f"{len(listing.skipped)} skipped: {some(listing.skipped)}")
    others = {s: n for s, n in sorted(listing.others.items()) if n}
    if others:
        kinds = some(named(s) for s in others)
        parts.append(f"{sum(others.values())} files of other kinds left out ({kinds})")
    return f"{label or 'data: '}{'; '.join(parts)}"


def read_one(file: Path | Member, size: tuple[int, ...], fps: float | None = None) -> Tensor:
    """An image [C, H, W], or for a size of four a clip [C, F, H, W] of fps frames a second; an OSError where
    it cannot be read.
    """
    if len(size) == 3:
        return read_image(file, size)
    if isinstance(file, Path):
        return read_clip(file, size, fps)
    raise OSError("clips are read from folders")


def shape_of(file: Path | Member) -> tuple[int, int]:
    """Height and width of a picture as a viewer shows it, by its header alone; an OSError without one."""
    from PIL import Image

    with decoding():
        if isinstance(file, Path):
            check_regular(file)
        with Image.open(
            file if isinstance(file, Path) else io.BytesIO(file.read()), formats=decoders()
        ) as image:
            check_size(image)
            width, height = image.size
            # a TIFF's header has been turned already; a PNG Pillow would decode to look behind its pixels
            whole = image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info)
            turned = not whole and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def shape_of_clip(file: Path | Member, fps: float | None = None) -> tuple[int, int, int]:
    """Frames that a clip has, or are seen fps times a second, and their height and width; an OSError of what
    is none.
    """
    if not isinstance(file, Path):
        raise OSError("clips are read from folders")
    num, first = length_of(file, fps)
    return num, first.height, first.width


def read_image(file: Path | Member, size: tuple[int, ...]) -> Tensor:
    """One image [C, H, W] as a viewer shows it, scaled and cropped about its middle."""
    mode = "L" if size[0] == 1 else "RGB"
    image = read_picture(file, mode) if isinstance(file, Path) else decode_picture(file.read(), mode)
    return fit(image, size)


def to_pil(image: Tensor):
    """[C, H, W] in [0, 1] as a PIL image, rounded as diffusers does."""
    from PIL import Image

    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
