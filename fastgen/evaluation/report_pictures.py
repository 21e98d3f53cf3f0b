"""The pictures of a report: each run's grids cut into single pictures, with what was asked for under them."""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fastgen.core.errors import UserError, first_line
from fastgen.core.reading import read_json

SHOWN, STRIP, WAY = 20, 8, 6
"""requests shown, pictures in a row of the way there, and rows of it"""
SMALL, LARGEST = 128, 512
"""up to this side pictures are kept exactly and drawn without smoothing; larger ones are scaled down to it"""
MOST_PIXELS = 2**16
"""of a side of a picture, in a layout that is believed"""


@dataclass(frozen=True)
class Layout:
    """How a grid is cut: cells [height, width] in columns, with a pixel around each; frames side by side."""

    texts: list[str]
    columns: int
    height: int
    width: int
    frames: int

    @property
    def side(self) -> int:
        """The longer side of one picture, or of one frame."""
        return max(self.height, self.width // self.frames)


@dataclass(frozen=True)
class PictureSet:
    """The pictures of one contender as data URIs, in the order of the requests."""

    name: str
    pictures: list[str]


def uri(data: bytes, kind: str = "png") -> str:
    """A picture inside a page."""
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def layout(folder: Path) -> Layout | None:
    """What samples/requests.json of a run says; None for runs without it, and for points."""
    file = folder / "samples" / "requests.json"
    if not file.exists():
        return None
    found = read_json(file, "report", "repair or delete it")
    numbers: list[int] = [found.get(k, 0) for k in ("columns", "height", "width", "frames")]
    texts = found.get("texts")
    good = all(type(n) is int and 0 < n <= MOST_PIXELS for n in numbers)
    if not (good and isinstance(texts, list) and all(isinstance(t, str) for t in texts)):
        raise UserError("report", f"{file} has no layout of its grids", "repair or delete it")
    return Layout(texts[:SHOWN], *numbers)


def contenders(folder: Path) -> list[tuple[str, Path]]:
    """(name, grid) of what can be compared: the measured ones, or a going run's latest samples."""
    samples = folder / "samples"
    names = {"teacher": "teacher", "student": "student", "untrained": "untrained student"}
    found = [(name, samples / f"{stem}.png") for stem, name in names.items()]
    counts = sorted(int(p.stem.split("_")[1]) for p in samples.glob("student_*_steps.png"))
    found += [(f"student in {n} step{'s' * (n > 1)}", samples / f"student_{n}_steps.png") for n in counts]
    found = [(name, file) for name, file in found if file.exists()]
    way = steps(folder)
    if way and not (samples / "student.png").exists():
        latest = (f"student at step {way[-1][0]}", way[-1][1])
        found = [*found[:1], latest, *found[1:]] if found else [latest]
        found += [("student before training", way[0][1])] if len(way) > 1 and way[0][0] == 0 else []
    return found


def turntables(folder: Path) -> list[tuple[str, str]]:
    """(what people call it, picture as text) of the turntable of every 3D asset that a run exported."""
    return [(name, uri(data, "gif")) for name, data in _of_assets(folder, "gif").items()]


def splats(folder: Path) -> dict[str, bytes]:
    """The .splat file of every 3D asset that a run exported, by what people call it."""
    return _of_assets(folder, "splat")


def _of_assets(folder: Path, kind: str) -> dict[str, bytes]:
    """The files of one kind in a run's export of 3D assets."""
    export = folder / "export"
    files = sorted(export.glob(f"asset*.{kind}")) if (export / "asset.json").is_file() else []
    return {_said(file): file.read_bytes() for file in files}


def _said(file: Path) -> str:
    return file.stem.removeprefix("asset_").replace("_", " ")


def steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, grid) of every validation, in order."""
    files = (folder / "samples").glob("step_*.png")
    return sorted((int(p.stem.split("_")[1]), p) for p in files if p.stem.split("_")[1].isdigit())


def picture_sets(folder: Path, most: int = SHOWN) -> tuple[list[str], list[PictureSet]]:
    """(texts, sets): what the pictures answer, and the pictures of each contender. Without a layout each set
    is one picture, the whole grid.
    """
    known = layout(folder)
    found = []
    for name, file in contenders(folder):
        with _opened(file) as grid:
            pictures = cut(grid, known)[:most] if known else [_whole(grid)]
        found.append(PictureSet(name, pictures))
    num = min((len(s.pictures) for s in found), default=0)
    texts = known.texts[:num] if known else [""]
    return texts, [PictureSet(s.name, s.pictures[: len(texts)]) for s in found]


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as grid:
            yield grid.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        found = f"{file} is no picture ({first_line(error)})"
        raise UserError("report", found, "delete it") from None


def cut(grid: Image.Image, known: Layout) -> list[str]:
    """The pictures of a grid; clips move."""
    return [_encoded(cell, known.frames) for cell in _cells(grid, known)]


def _cells(grid: Image.Image, known: Layout) -> list[Image.Image]:
    found = []
    for i in range(len(known.texts)):
        left = (i % known.columns) * (known.width + 2) + 1
        top = (i // known.columns) * (known.height + 2) + 1
        if left + known.width > grid.width or top + known.height > grid.height:
            break
        found.append(grid.crop((left, top, left + known.width, top + known.height)))
    return found


def _whole(grid: Image.Image) -> str:
    return _still(grid, 1600)


def _encoded(cell: Image.Image, frames: int) -> str:
    if frames == 1:
        return _still(cell, LARGEST)
    width = cell.width // frames
    parts = [_reduced(cell.crop((i * width, 0, (i + 1) * width, cell.height)), 256) for i in range(frames)]
    buffer = io.BytesIO()
    parts[0].save(buffer, "webp", save_all=True, append_images=parts[1:], duration=160, loop=0, quality=80)
    return uri(buffer.getvalue(), "webp")


def _reduced(picture: Image.Image, side: int) -> Image.Image:
    picture = picture.copy()
    picture.thumbnail((side, side))
    return picture


def _still(picture: Image.Image, side: int) -> str:
    buffer = io.BytesIO()
    small = max(picture.size) <= SMALL
    _reduced(picture, side).save(buffer, "webp", lossless=small, quality=60 if small else 85)
    return uri(buffer.getvalue(), "webp")


def way(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """(texts, rows): the first requests over the run, evenly thinned, a row (caption, data URI) for each
    validation, and the teacher's last.
    """
    known, found = layout(folder), steps(folder)
    if len(found) < 2:
        return [], []
    if len(found) > WAY:
        found = [found[round(i * (len(found) - 1) / (WAY - 1))] for i in range(WAY)]
    rows = [(f"step {step:,}", file) for step, file in found]
    teacher = folder / "samples" / "teacher.png"
    rows += [("teacher", teacher)] if teacher.exists() else []
    drawn = []
    for caption, file in rows:
        with _opened(file) as grid:
            drawn.append((caption, _strip(grid, known)))
    return (known.texts[:STRIP] if known and known.frames == 1 else []), drawn


def _strip(grid: Image.Image, known: Layout | None) -> str:
    """The first pictures side by side; the first clip frame by frame."""
    if known is None:
        return _whole(grid)
    cells = _cells(grid, known)[: STRIP if known.frames == 1 else 1]
    side = max(1, round(min(1.0, SMALL / known.side) * known.height))
    width = max(1, round(known.width * side / known.height))
    joined = Image.new("RGB", (width * len(cells), side))
    for i, cell in enumerate(cells):
        joined.paste(cell if cell.size == (width, side) else cell.resize((width, side)), (i * width, 0))
    return _still(joined, joined.width)
