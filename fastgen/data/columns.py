"""Which column of a table holds the picture, the caption and the class."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastgen.core.errors import UserError, suggest
from fastgen.data.text import whole

USUAL = {
    "image": ("image", "file_name", "file", "path", "jpg"),
    "text": ("text", "caption", "prompt"),
    "label": ("label", "class", "cls"),
}
"""names that are looked for where the config names none"""


@dataclass
class Columns:
    """Names of columns, empty where a table has none of the kind."""

    image: str
    text: str
    label: str


def names_of(source, what: str) -> tuple[str, ...]:
    """The names that the column of one kind may have: the one that a source sets, else the usual ones."""
    own = getattr(source, f"{what}_column")
    return (own,) if own else USUAL[what]


def columns_of(source, there: Sequence[str], where: str, key: str) -> Columns:
    """The columns of a table; a UserError for one that is named and missing, and for a table without images.

    where: the table, as a message names it.
    """
    shown = ", ".join(there[:12])
    found = {}
    for what in USUAL:
        found[what] = next((name for name in names_of(source, what) if name in there), "")
        own = getattr(source, f"{what}_column")
        if own and not found[what]:
            section = key.rpartition(".")[0]
            wrong = f"{where} has no column {own!r}{suggest(own, there)}"
            raise UserError(f"{section}.{what}_column", wrong, f"there are {shown}")
    if not found["image"]:
        wanted = f"set {key.rpartition('.')[0]}.image_column to one of them"
        raise UserError(key, f"{where} has no column of images, but {shown}", wanted)
    return Columns(**found)


def as_caption(value: object) -> str | None:
    """The caption in a cell; the first of several."""
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return whole(value).strip() if isinstance(value, str) else None


def as_label(value: object) -> str | int | None:
    """The class in a cell."""
    if isinstance(value, str):
        return value.strip() or None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
