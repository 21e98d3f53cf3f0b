"""Images and clips: folders read into tensors, fitted to the size a teacher takes, and samples written."""

import io
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.core.progress import tracked
from fastgen.data.folders import CLIPS, Listing, Member, Samples, gather, named, scan, some
from fastgen.data.pictures import (
    as_shown,
    check_regular,
    check_size,
    decode_picture,
    decoders,
    decoding,
    fit,
    read_picture,
    to_tensor,
)

ORIENTATION = 0x0112
"""EXIF's tag of how a camera was held; 5 to 8 are turned by a quarter"""
CODED = (".gif", ".webp", ".png", ".apng", ".avif", ".avifs")
"""animated pictures; every other kind of clip is a video file"""


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
            one = read_one(path, size)
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


def read_one(file: Path | Member, size: tuple[int, ...]) -> Tensor:
    """An image [C, H, W], or for a size of four a clip [C, F, H, W]; an OSError where it cannot be read."""
    if len(size) == 3:
        return read_image(file, size)
    if isinstance(file, Path):
        return read_clip(file, size)
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
            whole = (
                image.format == "PNG" and "exif" not in image.info
            )  # Pillow would decode it to look behind
            turned = not whole and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def read_image(file: Path | Member, size: tuple[int, ...]) -> Tensor:
    """One image [C, H, W] as a viewer shows it, scaled and cropped about its middle."""
    mode = "L" if size[0] == 1 else "RGB"
    image = read_picture(file, mode) if isinstance(file, Path) else decode_picture(file.read(), mode)
    return fit(image, size)


def read_clip(path: Path, size: tuple[int, ...]) -> Tensor:
    """The first frames [C, F, H, W] of an animated image or a video file."""
    channels, num, height, width = size
    mode = "L" if channels == 1 else "RGB"
    frames = _animated if path.suffix.lower() in CODED else _video
    found = frames(path, num, lambda image: fit(as_shown(image, mode), (channels, height, width)))
    if len(found) < num:
        raise OSError(f"{len(found)} frames of the {num} needed")
    return torch.stack(found, 1)


def read_frames(path: Path, most: int) -> Tensor:
    """The first `most` frames uint8 [3, F, H, W] of a clip, as they are; an OSError of fewer than two."""
    frames = _animated if path.suffix.lower() in CODED else _video
    found = frames(path, most, lambda image: to_tensor(as_shown(image, "RGB")))
    if len(found) < 2:
        raise OSError("one frame only")
    return torch.stack(found, 1)


def _animated(path: Path, num: int, shown: Callable) -> list[Tensor]:
    from PIL import Image, ImageSequence

    with decoding():
        check_regular(path)
        with Image.open(path, formats=decoders()) as image:
            check_size(image)
            return [shown(frame.copy()) for frame, _ in zip(ImageSequence.Iterator(image), range(num))]


def _video(path: Path, num: int, shown: Callable) -> list[Tensor]:
    from PIL import Image

    if not any(find_spec(name) for name in ("imageio_ffmpeg", "av")):
        missing = f"{named(path.name)} needs imageio-ffmpeg, which is not installed"
        raise UserError("data.images", missing, "pip install imageio-ffmpeg, or use animated images")
    import imageio.v3 as imageio

    with decoding():
        check_regular(path)
        return [shown(Image.fromarray(frame)) for frame, _ in zip(imageio.imiter(path), range(num))]


def to_pil(image: Tensor):
    """[C, H, W] in [0, 1] as a PIL image, rounded as diffusers does."""
    from PIL import Image

    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def save_clip(frames: list, path: Path, rate: float = 8.0) -> None:
    """PIL images as an animated gif or, by the name of the file, as mp4 (H.264); `rate` frames a second."""
    if path.suffix == ".mp4":
        return _save_mp4(frames, path, rate)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / rate), loop=0)


def check_mp4(key: str) -> None:
    """UserError where no mp4 can be written."""
    if not find_spec("imageio_ffmpeg"):
        found = "mp4 needs imageio-ffmpeg, which is not installed"
        raise UserError(key, found, 'pip install "fastgen-distill[video]", or write gif')


def _save_mp4(frames: list, path: Path, rate: float) -> None:
    """Odd sides are padded by their last line of pixels: the colours of H.264 are halved."""
    import imageio.v2 as imageio
    import numpy as np

    with imageio.get_writer(path, fps=rate, codec="libx264", quality=8, macro_block_size=1) as writer:
        for frame in frames:
            pixels = np.asarray(frame.convert("RGB"))
            odd = [(0, side % 2) for side in pixels.shape[:2]]
            writer.append_data(np.pad(pixels, [*odd, (0, 0)], mode="edge"))


def filmstrip(clips: Tensor, most: int = 10) -> Tensor:
    """Clips [N, C, F, H, W] as images [N, C, H, m W]: m frames of each side by side, evenly spaced."""
    num = min(most, clips.shape[2])
    index = torch.linspace(0, clips.shape[2] - 1, num).round().long()
    return clips[:, :, index].permute(0, 1, 3, 2, 4).flatten(3)
