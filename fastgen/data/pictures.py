"""The one reader of pictures: training images, control images, `sample.py --image` and evaluation folders.

A picture is read as a viewer shows it: turned by its EXIF orientation, 16-bit depth scaled to 8, palettes,
CMYK and other colour profiles converted to sRGB, transparency laid over BACKGROUND; of an animation the first
frame. Every format that Pillow reads counts, apart from those that need another program (EPS) or hold no
pixels.
Whatever is wrong with a file's content is an OSError with a short reason.
"""

import contextlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.core.errors import first_line

BACKGROUND = (255, 255, 255)
"""colour behind transparent pixels, as in viewers and web pages"""
MAX_PIXELS = 2**26
"""largest picture that is decoded: 8192 x 8192, or as many pixels in another shape"""
MAX_SCAN_PIXELS = 2**31
"""pixels times scans of a progressive JPEG; a few kilobytes can ask for thousands of scans"""
MAX_PROFILE = 4 * 2**20
NOT_PICTURES = {"EPS", "PDF", "WMF", "EMF", "BUFR", "GRIB", "HDF5", "MPEG"}
"""formats that run another program, or that Pillow knows by name only"""
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")


@cache
def formats() -> dict[str, str]:
    """Pillow's picture formats by lower-case suffix, plug-ins that are installed included."""
    from PIL import Image

    known = Image.registered_extensions()
    return {s.lower(): f for s, f in known.items() if f in Image.OPEN and f not in NOT_PICTURES}


@cache
def decoders() -> tuple[str, ...]:
    """Pillow's names of these formats."""
    return tuple(sorted(set(formats().values())))


def is_picture(path: Path) -> bool:
    """Whether the file's name is a picture's."""
    return path.suffix.lower() in formats()


def check_regular(path: str | Path) -> None:
    """An OSError unless the path is a regular file: pipes, devices and sockets are never opened."""
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        return
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    kind = next((name for test, name in kinds if test(mode)), "a device")
    raise OSError(f"{kind}, not a file")


@contextlib.contextmanager
def _no_remarks() -> Iterator[None]:
    """Silence Pillow's remarks on odd files; what matters is raised. The filters of warnings belong to the
    whole process, so other threads than the main one leave them alone (see `silence_threads`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def silence_threads() -> None:
    """Pillow's remarks are not shown from now on, for pictures that are decoded in threads."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Whatever a decoder raises on somebody's file, as an OSError with one short line."""
    from PIL import Image

    with _no_remarks():
        try:
            yield
        except FileNotFoundError:
            raise OSError("it does not exist") from None
        except Image.UnidentifiedImageError:
            raise OSError("not a picture that can be read") from None
        except Image.DecompressionBombError:
            raise OSError(f"more than {MAX_PIXELS} pixels") from None
        except MemoryError:
            raise OSError("it needs more memory than there is") from None
        except Exception as error:  # decoders raise anything, from struct.error to IndexError
            reason = getattr(error, "strerror", None) or first_line(error)
            raise OSError(reason[:100]) from None


def read_picture(path: Path, mode: str = "RGB"):
    """The file as a PIL image of mode "RGB" or "L", as a viewer shows it."""
    with decoding():
        check_regular(path)
        return _read(path, mode, path.read_bytes)


def decode_picture(data: bytes, mode: str = "RGB"):
    """The same of a file's bytes, for members of an archive."""
    with decoding():
        return _read(io.BytesIO(data), mode, lambda: data)


def _read(file, mode: str, data: Callable[[], bytes]):
    from PIL import Image

    with Image.open(file, formats=decoders()) as image:
        check_size(image)
        _check_scans(image, data)
        return as_shown(image, mode)


def kind_of(file) -> str:
    """What a picture (a path or an open file) holds beside plain colour: "grey", "alpha", or nothing; its
    header alone is read.
    """
    from PIL import Image

    with decoding(), Image.open(file, formats=decoders()) as image:
        if image.mode in TRANSPARENT or "transparency" in image.info:
            return "alpha"
        return "grey" if image.mode in ("1", "L", "F") or image.mode.startswith("I") else ""


def check_size(image) -> None:
    """An OSError for a picture without pixels or with too many, before any of them is decoded."""
    num = image.width * image.height
    if not 0 < num <= MAX_PIXELS:
        raise OSError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are read")


def _check_scans(image, data: Callable[[], bytes]) -> None:
    if image.info.get("progressive") or image.info.get("progression"):
        scans = data().count(b"\xff\xda")
        if scans * image.width * image.height > MAX_SCAN_PIXELS:
            raise OSError(f"a progressive JPEG of {scans} scans")


def as_shown(image, mode: str):
    """A PIL image (of one frame) upright, in 8 bits, sRGB and opaque, as "RGB" or "L"."""
    from PIL import Image, ImageOps

    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF, of which viewers take no notice either
        ImageOps.exif_transpose(image, in_place=True)
    clear = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    elif image.mode in TRANSPARENT or clear is not None:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        flat = Image.new("RGB", image.size, BACKGROUND)
        flat.paste(_srgb(image.convert("RGB"), image.info), mask=image.getchannel("A"))
        image = flat
    else:
        image = _srgb(image.convert("RGB") if image.mode == "P" else image, image.info)
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image):
    """16-bit grey (or float in [0, 1]) scaled to 0..255; a transparent level becomes the background."""
    from PIL import Image

    values, clear = np.asarray(image), image.info.get("transparency")
    if image.mode == "F":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise OSError("float pixels outside [0, 1], whose white is not known")
        return Image.fromarray(np.round(values * 255).astype(np.uint8))
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # those two hold 16 bits in this mode
        raise OSError("32-bit pixels, whose white is not known")
    table = np.round(np.arange(2**16) / 257).astype(np.uint8)
    grey = table[values.clip(0, 2**16 - 1)]
    if isinstance(clear, int):
        grey = np.where(values == clear, np.uint8(BACKGROUND[0]), grey)
    return Image.fromarray(grey)


def _srgb(image, info: dict):
    """Colours in sRGB where the file names another profile (Display P3 photos, CMYK prints)."""
    profile = info.get("icc_profile")
    if image.mode not in ("RGB", "CMYK") or not profile or len(profile) > MAX_PROFILE:
        return image
    try:
        from PIL import ImageCms

        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(found).lower():
            return image
        return ImageCms.profileToProfile(image, found, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except Exception:  # a damaged profile, or Pillow without LittleCMS: the numbers as they are
        return image


def fit(image, size: tuple[int, ...]) -> Tensor:
    """A PIL image "RGB" or "L" as uint8 [C, H, W]: scaled to cover the size, cropped about the middle."""
    from PIL import Image, ImageOps

    _, height, width = size
    scale = max(height / image.height, width / image.width)
    wide = round(image.width * scale), round(image.height * scale)
    if wide[0] * wide[1] > MAX_PIXELS:  # a long thin strip: crop before scaling
        fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    else:
        fitted = image.resize(wide, Image.Resampling.LANCZOS)
    left, top = (fitted.width - width) // 2, (fitted.height - height) // 2
    return to_tensor(fitted.crop((left, top, left + width, top + height)))


def to_tensor(image) -> Tensor:
    """uint8 [C, H, W] of a PIL image "RGB" or "L"."""
    array: Any = torch.from_numpy(np.array(image))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1)
