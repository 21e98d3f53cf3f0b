"""Paths of the bundled files, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ANALYTIC = "analytic:"
"""beginning of a path that names a teacher in closed form, e.g. analytic:gmm2d-vp"""


def _bundled(kind: str, name: str) -> Path:
    # A wheel has the files in fastgen/_data; a checkout has the folders beside the package.
    data = PACKAGE / "_data"
    root = (data if data.is_dir() else PACKAGE.parent) / kind
    path = root / name
    if not path.exists():
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


def resolve(path: str | Path) -> Path:
    """Turn "assets:NAME" into the bundled path and leave any other path as it is."""
    text = str(path)
    return asset(text.removeprefix("assets:")) if text.startswith("assets:") else Path(path)
