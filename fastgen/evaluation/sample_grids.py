"""Sample grids: images side by side, clips as filmstrips and moving pictures, clouds from above, points as a
scatter plot.
"""

from pathlib import Path

import torch
from torch import Tensor

from fastgen.core.files import placed, write_json
from fastgen.data.clips import filmstrip, save_clip
from fastgen.threed.clouds import seen_from_above


def to_grid(images: Tensor, columns: int = 10) -> Tensor:
    """[N, C, H, W] in [0, 1] to one [H, W, 3] uint8 picture with a grey pixel around each image."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=0.5)
    padded = torch.cat([padded, torch.full((-len(images) % columns, *padded.shape[1:]), 0.5)])
    rows = padded.unflatten(0, (-1, columns))  # [R, columns, C, H, W]
    picture = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return (picture.expand(-1, -1, 3) * 255).round().byte()


def save_grid(images: Tensor, path: Path) -> None:
    """A grid PNG; points of an analytic teacher become a scatter plot, a clip a row of its frames (and a gif
    of all clips beside the picture).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if images.ndim == 2:
        return _scatter(images, path)
    from PIL import Image

    images = _pictures(images)
    if images.ndim == 5:
        moving = [to_grid(images[:, :, f], 4).numpy() for f in range(images.shape[2])]
        with placed(path.with_suffix(".gif")) as file:
            save_clip([Image.fromarray(f) for f in moving], file)
    shown, columns = _cells(images)
    with placed(path) as file:
        Image.fromarray(to_grid(shown, columns).numpy()).save(file)


def _pictures(images: Tensor) -> Tensor:
    """Clouds [N, P, 3] as they are seen from above, all at the scale of the first; others as they are."""
    if images.ndim != 3:
        return images
    return seen_from_above(images, 0.1 + float(images[0, :, :2].abs().quantile(0.99)))


def _cells(images: Tensor) -> tuple[Tensor, int]:
    """What stands in the cells of a grid, [N, C, H, W], and its columns: small images enlarged, each pixel as
    a square; clips as their frames side by side.
    """
    columns = 1 if images.ndim == 5 else 10
    cells = filmstrip(images) if images.ndim == 5 else images
    scale = max(1, 64 // cells.shape[-1])
    return cells.repeat_interleave(scale, 2).repeat_interleave(scale, 3), columns


def save_requests(images: Tensor, texts: list[str], path: Path) -> None:
    """requests.json beside grids of such images: the text that each picture answers, and the layout by which
    the report cuts a grid into pictures. Points have no cells: nothing is written.
    """
    if images.ndim == 2:
        return
    images = _pictures(images)
    cells, columns = _cells(images[:1])
    height, width = cells.shape[-2:]
    frames = width * images.shape[-2] // (height * images.shape[-1])
    layout = {"columns": columns, "height": height, "width": width, "frames": frames}
    write_json(path, {"texts": texts[: len(images)], **layout})


def _scatter(points: Tensor, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 3))
    axes = figure.add_subplot()
    axes.scatter(points[:, 0], points[:, 1 % points.shape[1]], s=4)
    with placed(path) as file:
        figure.savefig(file)
