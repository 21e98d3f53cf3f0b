"""A small picture beside each piece of evidence: the first samples of its student, at most 15 kB."""

import io
from pathlib import Path

from PIL import Image

from fastgen.core.files import placed
from fastgen.evaluation.report_pictures import layout

MOST_BYTES = 15_000
ROWS, WIDTH = 2, 640


def write_thumbnail(run: Path, target: Path) -> Path | None:
    """The top rows of a run's samples/student.png as a .webp at `target`; None for a run without."""
    file = run / "samples" / "student.png"
    if not file.is_file():
        return None
    with Image.open(file) as grid:
        picture = grid.convert("RGB")
    known = layout(run)
    if known is not None:
        rows = ROWS if known.columns > 1 else 4
        picture = picture.crop((0, 0, picture.width, min(picture.height, rows * (known.height + 2))))
    picture.thumbnail((WIDTH, WIDTH))
    with placed(target) as temporary:
        temporary.write_bytes(_small(picture))
    return target


def _small(picture: Image.Image) -> bytes:
    """The best of some qualities that fits."""
    while True:
        for quality in (85, 70, 50, 30):
            buffer = io.BytesIO()
            picture.save(buffer, "webp", quality=quality, method=6)
            if buffer.tell() <= MOST_BYTES:
                return buffer.getvalue()
        picture = picture.resize((max(1, picture.width * 3 // 4), max(1, picture.height * 3 // 4)))
