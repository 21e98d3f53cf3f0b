"""Render assets/data/solids.npz: every shape in every colour from random cameras, over greys.

The views are those of `fastgen.threed.cameras`: half of the overhead ones are drawn beside the others, since
few random cameras are that high.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from common import ASSETS, seconds

from fastgen.data.solids import BRIGHTEST, COLOURS, DARKEST, VOCABULARY
from fastgen.threed.cameras import VIEWS, Cameras, Ranges, random_cameras
from fastgen.threed.solids import SHAPES, Solid

SIZE, HIGH = 32, Ranges(elevation=(61.0, 85.0))
SPLITS = {"train": 80, "heldout": 16}
"""images of each shape in each colour"""


def drawn(num: int, generator: torch.Generator) -> Cameras:
    """Cameras of one solid, an eighth of them overhead."""
    low, high = random_cameras(num - num // 8, Ranges(), generator), random_cameras(num // 8, HIGH, generator)
    return Cameras.of(torch.cat([low.rows(), high.rows()]))


def split(num: int, seed: int) -> dict[str, np.ndarray]:
    generator, parts = torch.Generator().manual_seed(seed), []
    for shape, colour in itertools.product(range(len(SHAPES)), range(len(COLOURS))):
        cameras = drawn(num, generator)
        grey = DARKEST + (BRIGHTEST - DARKEST) * torch.rand(num, 1, generator=generator)
        paint = tuple(v / 255 for v in list(COLOURS.values())[colour])
        solid = Solid(VOCABULARY["shape"][shape], paint)
        images = (solid.render(cameras, SIZE, grey.expand(-1, 3)) * 255).round().byte()
        views = torch.tensor([VIEWS.index(name) for name in cameras.names()])
        ids = torch.full_like(views, shape), torch.full_like(views, colour), views
        parts.append((images, *ids))
    order = torch.randperm(num * len(parts), generator=generator)
    names = ("images", "labels", "colours", "views")
    found = dict(zip(names, (torch.cat(column)[order].byte().numpy() for column in zip(*parts))))
    print({k: v.shape for k, v in found.items()}, np.bincount(found["views"]), seconds(), flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS / "data" / "solids.npz", help="file to write")
    args = parser.parse_args()
    arrays = {}
    for number, (name, count) in enumerate(SPLITS.items()):
        arrays |= {f"{name}_{key}": value for key, value in split(count, number).items()}
    np.savez_compressed(args.out, **arrays)
    print(args.out, f"{args.out.stat().st_size / 1e6:.2f} MB", seconds())
