"""Solids: renders of coloured solids from many sides, each with a caption that says what and from where, such
as "a red torus, front view". The images are `fastgen.threed.solids` through `assets/build/solids.py`.
"""

import torch
from torch import Tensor

from fastgen.threed.cameras import VIEWS, Cameras
from fastgen.threed.solids import SHAPES, Solid

COLOURS = {
    "red": (235, 45, 45),
    "yellow": (245, 220, 45),
    "green": (45, 190, 70),
    "cyan": (45, 215, 225),
    "blue": (50, 80, 240),
    "purple": (190, 60, 220),
}
DARKEST, BRIGHTEST = 0.05, 0.95
"""greys of the background"""
VOCABULARY = {"shape": tuple(SHAPES), "colour": tuple(COLOURS), "view": VIEWS}


def caption(shape: int, colour: int, view: int) -> str:
    """The sentence that names all three attributes."""
    return f"a {VOCABULARY['colour'][colour]} {VOCABULARY['shape'][shape]}, {VIEWS[view]} view"


def renders(shape: int, colour: int, cameras: Cameras, size: int, seed: int = 0) -> Tensor:
    """Images uint8 [B, 3, size, size] of one solid from given cameras, each over a grey drawn by the seed."""
    red, green, blue = tuple(COLOURS.values())[colour]
    solid = Solid(VOCABULARY["shape"][shape], (red / 255, green / 255, blue / 255))
    u = torch.rand(len(cameras), 1, generator=torch.Generator().manual_seed(seed))
    grey = DARKEST + (BRIGHTEST - DARKEST) * u
    return (solid.render(cameras, size, grey.expand(-1, 3)) * 255).round().byte()
