"""Paths of the bundled files, in a checkout and in an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

from fastgen.core.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
ANALYTIC = "analytic:"
"""beginning of a path that names a teacher in closed form, e.g. analytic:gmm2d-vp"""


def _bundled(kind: str, name: str) -> Path:
    # A wheel has the files in fastgen/_data; a checkout has the folders beside the package.
    data = PACKAGE / "_data"
    root = (data if data.is_dir() else PACKAGE.parent) / kind
    path = root / name
    if not (lies_inside(path, root) and path.exists()):
        raise FileNotFoundError(f"fastgen has no bundled {kind} named {name!r} (looked in {root})")
    return path


def asset(name: str) -> Path:
    """Path of a bundled file or folder, e.g. `asset("data/digits.npz")`."""
    return _bundled("assets", name)


def config(name: str) -> Path:
    """Path of a bundled config, e.g. `config("recipes/quickstart.yaml")`."""
    return _bundled("configs", name)


def is_analytic(path: str | Path) -> bool:
    """Whether a path names a teacher in closed form, which is no folder."""
    return str(path).startswith(ANALYTIC)


def expand(path: str) -> str:
    """A user's path with a leading ~ or ~NAME as that home folder; environment variables stay as they are."""
    return os.path.expanduser(path)


def resolve(path: str | Path) -> Path:
    """A user's path: "assets:NAME" is the bundled file, ~ the home folder, any other path stays as it is."""
    text = str(path)
    return asset(text.removeprefix("assets:")) if text.startswith("assets:") else Path(expand(text))


def lies_inside(path: Path, root: Path) -> bool:
    """Whether a path, its links followed, is inside the folder `root`, or in the blobs that a folder of the
    hub's cache links to.
    """
    try:
        place, root = path.resolve(), root.resolve()
    except (OSError, ValueError, RuntimeError):  # a circle of links, a zero byte
        return False
    blobs = root.parent.parent / "blobs"
    if root.parent.name == "snapshots" and blobs.is_dir() and place.is_relative_to(blobs):
        return True
    return place.is_relative_to(root)


def inside(folder: Path, name: object, key: str) -> Path:
    """The file or folder that a document of `folder` names; a UserError of `key` where the name leads out of
    it.
    """
    plain = isinstance(name, str) and name and "\0" not in name and "\\" not in name
    if plain and not os.path.isabs(str(name)) and ".." not in Path(str(name)).parts:
        path = folder / str(name)
        if lies_inside(path, folder):
            return path
    found = f"{folder} names the file {str(name)[:80]!r}, which is not inside of it"
    raise UserError(key, found, "use the folder as it was published, without links")
