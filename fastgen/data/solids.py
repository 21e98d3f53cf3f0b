"""Solids: renders of coloured solids from many sides, each with a caption that says what and from where, such as
"a red torus, front view". The images are `fastgen.threed.solids` through `assets/build/solids.py`.
"""

from fastgen.threed.cameras import VIEWS
from fastgen.threed.solids import SHAPES

COLOURS = {
    "red": (235, 45, 45),
    "yellow": (245, 220, 45),
    "green": (45, 190, 70),
    "cyan": (45, 215, 225),
    "blue": (50, 80, 240),
    "purple": (190, 60, 220),
}
VOCABULARY = {"shape": tuple(SHAPES), "colour": tuple(COLOURS), "view": VIEWS}


def caption(shape: int, colour: int, view: int) -> str:
    """The sentence that names all three attributes."""
    return f"a {VOCABULARY['colour'][colour]} {VOCABULARY['shape'][shape]}, {VIEWS[view]} view"
