"""What sample.py writes: a picture a sample as they are made, the grid of the first, samples.json."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from fastgen.core.errors import UserError
from fastgen.core.files import placed, to_json

SHOWN = 100
"""samples of each contender in the grid"""
NAME = re.compile(r"\d{5,}_\d+\.(png|gif|mp4)")


def open_folder(out: Path, overwrite: bool) -> Path:
    """The output folder; one with files is refused, or rid of an earlier call's samples with `overwrite`."""
    try:
        if out.exists() and not out.is_dir():
            raise UserError("--out", f"{out} is a file", "a folder")
        if out.is_dir() and any(out.iterdir()):
            if not overwrite:
                raise UserError("--out", f"{out} is not empty", "choose another folder, or pass --overwrite")
            for name in _written(out):
                (out / name).unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("--out", error, "choose a folder that can be written") from None
    return out


def _written(out: Path) -> list[str]:
    """Names of the pictures that an earlier call wrote into a folder."""
    found = f"{out} was not written by sample.py"
    if not (out / "samples.json").is_file():
        raise UserError("--out", found, "choose another folder: --overwrite replaces samples only")
    try:
        images = json.loads((out / "samples.json").read_text(encoding="utf-8"))["images"]
        names = [str(image["file"]) for image in images]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(
            "--out", f"{out}/samples.json is damaged", "choose another folder, or delete it"
        ) from None
    return [name for name in names if NAME.fullmatch(name)]


class Gallery:
    """Writes samples as they come and holds on to the few that the grid shows."""

    def __init__(
        self, out: Path, seeds: range, names: list[str], clip_format: str = "gif", rate: float = 8.0
    ):
        """clip_format: gif or mp4; rate: frames a second of clips."""
        self.clip_suffix, self.rate = f".{clip_format}", rate
        self.out, self.seeds, self.names = out, seeds, names
        self.titles: list[str] = []
        self.shown: list[list] = []
        self.suffix, self.count = ".png", 0
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError("--out", error, "choose a folder that can be created") from None

    def contender(self, title: str) -> None:
        """What comes from now on is of this contender; the pictures of the first one are written."""
        self.titles.append(title)
        self.shown.append([])

    def add(self, first: int, images) -> None:
        """Samples [B, C, H, W] (clips [B, C, F, H, W]) number `first` and on."""
        own = self.shown[-1]
        own += [image for i, image in enumerate(images, first) if len(own) <= i < SHOWN]
        if len(self.shown) > 1:
            return
        self.suffix = self.clip_suffix if images.ndim == 5 else ".png"
        for i, image in enumerate(images, first):
            with placed(self.out / self.file(i)) as path:
                _save(image, path, self.rate)
            self.count = max(self.count, i + 1)

    def file(self, i: int) -> str:
        """Name of a sample's picture."""
        return f"{i:05d}_{self.seeds[i]}{self.suffix}"

    def close(self, record: dict) -> None:
        """Write the grid and samples.json of what was made so far."""
        import torch

        from fastgen.data.clips import filmstrip

        shown = [torch.stack(images) for images in self.shown if images]
        if shown:
            shown = [filmstrip(images) if images.ndim == 5 else images for images in shown]
            num = min(map(len, shown))
            with placed(self.out / "grid.png") as path:
                grid([images[:num] for images in shown], self.titles).save(path)
        with placed(self.out / "samples.json") as path, open(path, "w", encoding="utf-8") as file:
            file.writelines(self._lines(record))

    def _lines(self, record: dict) -> Iterator[str]:
        """samples.json, an image a line: with a million of them no list is held."""
        yield to_json(record, 2).removesuffix("\n}") + ',\n  "images": ['
        for i in range(self.count):
            condition = self.names[i % len(self.names)]
            entry = {"file": self.file(i), "seed": self.seeds[i], "condition": condition}
            yield ("," if i else "") + "\n    " + to_json(entry)
        yield "\n  ]\n}\n"


def _save(image, path: Path, rate: float) -> None:
    from fastgen.data.clips import save_clip
    from fastgen.data.media import to_pil

    if image.ndim == 4:
        save_clip([to_pil(frame) for frame in image.unbind(1)], path, rate)
    else:
        to_pil(image).save(path)


def grid(images: list, titles: list[str], columns: int = 10, most: int = SHOWN):
    """Up to `most` images, each contender's row above the next one's, titled where there are several."""
    from PIL import Image, ImageDraw

    from fastgen.data.media import to_pil

    num = min(len(images[0]), most)
    filmstrips = images[0].shape[-1] >= 6 * images[0].shape[-2]  # which stand alone
    columns = 1 if filmstrips else min(num, columns)
    scale = max(1, 64 // images[0].shape[-1])
    height, width = images[0].shape[-2] * scale + 2, images[0].shape[-1] * scale + 2
    left = 110 if len(images) > 1 else 0
    rows = -(-num // columns)
    canvas = Image.new("RGB", (left + columns * width, rows * len(images) * height), "white")
    pen = ImageDraw.Draw(canvas)
    for k, (found, title) in enumerate(zip(images, titles)):
        for i in range(num):
            row, column = divmod(i, columns)
            tile = to_pil(found[i]).convert("RGB").resize((width - 2, height - 2), Image.Resampling.NEAREST)
            top = (row * len(images) + k) * height
            canvas.paste(tile, (left + column * width, top))
            if left and not column:
                pen.text((4, top + height // 2 - 6), title, fill="black")
    return canvas
