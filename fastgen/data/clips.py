"""Clips: animated pictures, videos and folders of frames read at a rate, and samples written as such."""

import math
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.data.folders import frames_of, named
from fastgen.data.pictures import (
    as_shown,
    check_regular,
    check_size,
    decoders,
    decoding,
    fit,
    read_picture,
    to_tensor,
)

CODED = (".gif", ".webp", ".png", ".apng", ".avif", ".avifs")
"""animated pictures; every other kind of clip is a video file"""
MOST = 100_000
"""frames of a clip that are counted"""
NEAR = 0.01
"""by how much of itself a clip's frame rate may be below the one that is asked for"""


def read_clip(path: Path, size: tuple[int, ...], fps: float | None = None) -> Tensor:
    """The first frames [C, F, H, W] of an animated image or a video file: all of them one after the other, or
    those that are seen fps times a second from the first on.
    """
    channels, num, height, width = size
    mode = "L" if channels == 1 else "RGB"
    found = _frames(path, num, lambda image: fit(as_shown(image, mode), (channels, height, width)), fps)
    if len(found) < num:
        raise OSError(f"{len(found)} frames of the {num} needed{f' at {fps:g} a second' if fps else ''}")
    return torch.stack(found, 1)


def read_frames(path: Path, most: int) -> Tensor:
    """The first `most` frames uint8 [3, F, H, W] of a clip, as they are; an OSError of fewer than two."""
    found = _frames(path, most, lambda image: to_tensor(as_shown(image, "RGB")))
    if len(found) < 2:
        raise OSError("one frame only")
    return torch.stack(found, 1)


def length_of(path: Path, fps: float | None = None) -> tuple[int, Any]:
    """How many frames a clip has, or are seen fps times a second, and the first one as a PIL image. A video
    file's header says roughly how many.
    """
    with decoding():
        frames = _reader(path)
        first = as_shown(next(frames(path, False))[0], "RGB")
        if frames is _video:
            return _length_of_video(path, fps), first
        if fps is not None:
            return sum(1 for _ in _seen(frames(path, True), MOST, fps)), first
        if frames is _files:
            return len(frames_of(path)), first
        from PIL import Image

        with Image.open(path, formats=decoders()) as image:
            return getattr(image, "n_frames", 1), first


def _length_of_video(path: Path, fps: float | None) -> int:
    import imageio.v3 as imageio

    header = imageio.immeta(path)
    duration, rate = (float(header.get(key) or 0) for key in ("duration", "fps"))
    if not (duration > 0 and rate > 0):
        raise OSError("it does not say how long it is, which data.buckets needs")
    if fps is None:
        return round(duration * rate)
    _check_rate(1 / rate, fps)
    return math.ceil(duration * fps - 1e-6)


def _check_rate(seconds: float, fps: float) -> None:
    """An OSError where frames that are shown for so many seconds each are too few for a rate."""
    if seconds * fps > 1 + NEAR:
        raise OSError(f"{1 / seconds:.3g} frames a second of the {fps:g} that data.fps asks for")


def _reader(path: Path) -> Callable[[Path, bool], Iterator[tuple]]:
    """What yields the frames of a clip; an OSError of what is neither a folder nor a regular file."""
    if path.is_dir():
        return _files
    check_regular(path)
    return _animated if path.suffix.lower() in CODED else _video


def _frames(path: Path, num: int, shown: Callable, fps: float | None = None) -> list[Tensor]:
    """The first num frames as `shown` makes them of a picture."""
    with decoding():
        found = _reader(path)(path, fps is not None)
        if fps is not None:
            found = _seen(found, num, fps)
        return [shown(image) for (image, _), _ in zip(found, range(num))]


def _seen(frames: Iterable[tuple], num: int, fps: float) -> Iterator[tuple]:
    """The frame on the screen at each of num times 1 / fps apart, of frames and the seconds each is shown."""
    ends, k = 0.0, 0
    for image, seconds in frames:
        if not seconds > 0:
            raise OSError("it does not say how long a frame is shown, which data.fps needs")
        _check_rate(seconds, fps)
        ends += seconds
        while k < num and k / fps < ends - 1e-6:
            yield image, seconds
            k += 1
        if k == num:
            return


def _files(folder: Path, timed: bool) -> Iterator[tuple]:
    """(picture, 0) of a folder of frames, which does not say how long one is shown."""
    for path in frames_of(folder):
        check_regular(path)
        yield read_picture(path), 0.0


def _animated(path: Path, timed: bool) -> Iterator[tuple]:
    """(picture, seconds it is shown) of an animated image."""
    from PIL import Image, ImageSequence

    with Image.open(path, formats=decoders()) as image:
        check_size(image)
        for frame in ImageSequence.Iterator(image):
            yield frame.copy(), frame.info.get("duration", 0) / 1000


def _video(path: Path, timed: bool) -> Iterator[tuple]:
    """(picture, seconds it is shown) of a video file; seconds are 0 unless timed."""
    from PIL import Image

    if not any(find_spec(name) for name in ("imageio_ffmpeg", "av")):
        missing = f"{named(path.name)} needs imageio-ffmpeg, which is not installed"
        instruction = 'pip install "fastgen-distill[video]", or use animated images'
        raise UserError("data.images", missing, instruction)
    import imageio.v3 as imageio

    rate = float(imageio.immeta(path).get("fps") or 0) if timed else 0.0
    for frame in imageio.imiter(path):
        yield Image.fromarray(frame), 1 / rate if rate > 0 else 0.0


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
    import imageio.v3 as imageio
    import numpy as np

    pixels = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    odd = [(0, side % 2) for side in pixels.shape[1:3]]
    even = np.pad(pixels, [(0, 0), *odd, (0, 0)], mode="edge")
    settings: dict[str, Any] = {"fps": rate, "codec": "libx264", "quality": 8, "macro_block_size": 1}
    imageio.imwrite(path, even, plugin="FFMPEG", **settings)


def filmstrip(clips: Tensor, most: int = 10) -> Tensor:
    """Clips [N, C, F, H, W] as images [N, C, H, m W]: m frames of each side by side, evenly spaced."""
    num = min(most, clips.shape[2])
    index = torch.linspace(0, clips.shape[2] - 1, num).round().long()
    return clips[:, :, index].permute(0, 1, 3, 2, 4).flatten(3)
