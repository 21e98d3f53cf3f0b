"""Images and clips: folders read into tensors, fitted to the size a teacher takes, and samples written."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.core.errors import UserError

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
CLIPS = (".gif", ".webp", ".png", ".mp4", ".mov", ".webm")


def file_names(folder: Path, kinds: tuple[str, ...] = IMAGES) -> list[Path]:
    """Files of these kinds in a folder, sorted."""
    if not folder.is_dir():
        raise UserError("data.images", f"{folder} is not a folder", "a folder of png, jpg or webp files")
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in kinds)


def read_captions(folder: Path, names: list[Path]) -> list[str] | None:
    """The text that goes with each file, from metadata.jsonl or a .txt beside it; None if any has none."""
    captions: dict[str, str] = {}
    if (folder / "metadata.jsonl").exists():
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        captions = {r["file_name"]: r["text"] for r in map(json.loads, filter(str.strip, lines))}
    texts = []
    for path in names:
        side = path.with_suffix(".txt")
        beside = side.read_text().strip() if side.exists() else None
        texts.append(captions.get(str(path.relative_to(folder)), beside))
    return texts if texts and all(t is not None for t in texts) else None


def read_folder(folder: Path, size: tuple[int, ...], on_bad: str) -> tuple[Tensor, list[str] | None]:
    """uint8 images [N, C, H, W] (clips [N, C, F, H, W] for a size of four) and captions of a folder; files
    that cannot be read are named and skipped, or fatal.
    """
    kinds = IMAGES if len(size) == 3 else CLIPS
    found, kept, bad = [], [], []
    for path in file_names(folder, kinds):
        try:
            found.append(read_image(path, size) if len(size) == 3 else read_clip(path, size))
        except OSError as error:
            bad.append(f"{path.name} ({error})")
            continue
        kept.append(path)
    if bad and on_bad == "error":
        raise UserError(
            "data.images", f"{len(bad)} unreadable: {bad[0]}", "mend it or set data.on_bad_image skip"
        )
    if bad:
        print(f"warning: data.images: skipped {len(bad)} unreadable: {', '.join(bad[:5])}")
    if not found:
        raise UserError("data.images", f"{folder} holds no readable image", f"{', '.join(kinds)} files")
    return torch.stack(found), read_captions(folder, kept)


def read_image(path: Path, size: tuple[int, int, int]) -> Tensor:
    """One image [C, H, W], scaled and cropped about its middle."""
    from PIL import Image

    with Image.open(path) as image:
        return _fit(image, size)


def read_clip(path: Path, size: tuple[int, int, int, int]) -> Tensor:
    """The first frames [C, F, H, W] of an animated image or a video file."""
    channels, num, height, width = size
    frames = _animated if path.suffix.lower() in (".gif", ".webp", ".png") else _video
    found = frames(path, num, lambda image: _fit(image, (channels, height, width)))
    if len(found) < num:
        raise OSError(f"{len(found)} frames of the {num} needed")
    return torch.stack(found, 1)


def _animated(path: Path, num: int, fit: Callable) -> list[Tensor]:
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        return [fit(frame) for frame, _ in zip(ImageSequence.Iterator(image), range(num))]


def _video(path: Path, num: int, fit: Callable) -> list[Tensor]:
    from PIL import Image

    try:
        import imageio.v3 as imageio

        return [fit(Image.fromarray(f)) for f, _ in zip(imageio.imiter(path), range(num))]
    except (ImportError, ValueError) as error:  # imageio without its ffmpeg plug-in raises ValueError
        told = f"{path.name} needs imageio and imageio-ffmpeg ({str(error).splitlines()[0]})"
        raise UserError(
            "data.images", told, "pip install imageio imageio-ffmpeg, or use animated images"
        ) from None


def _fit(image, size: tuple[int, int, int]) -> Tensor:
    """Scaled to cover the size, then cropped about the middle."""
    from PIL import Image

    channels, height, width = size
    fitted = image.convert("L" if channels == 1 else "RGB")
    scale = max(height / fitted.height, width / fitted.width)
    fitted = fitted.resize(
        (round(fitted.width * scale), round(fitted.height * scale)), Image.Resampling.LANCZOS
    )
    left, top = (fitted.width - width) // 2, (fitted.height - height) // 2
    array = torch.from_numpy(np.array(fitted.crop((left, top, left + width, top + height))))
    return array[None] if channels == 1 else array.permute(2, 0, 1)


def to_pil(image: Tensor):
    """[C, H, W] in [0, 1] as a PIL image, rounded as diffusers does."""
    from PIL import Image

    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def save_clip(frames: list, path: Path, rate: float = 8.0) -> None:
    """PIL images as an animated gif, `rate` a second."""
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / rate), loop=0)


def filmstrip(clips: Tensor, most: int = 10) -> Tensor:
    """Clips [N, C, F, H, W] as images [N, C, H, m W]: m frames of each side by side, evenly spaced."""
    num = min(most, clips.shape[2])
    index = torch.linspace(0, clips.shape[2] - 1, num).round().long()
    return clips[:, :, index].permute(0, 1, 3, 2, 4).flatten(3)
