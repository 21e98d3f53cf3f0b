"""Where the bundled files live, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def _bundled(kind: str, name: str) -> Path:
    # A wheel carries fastgen/_data; a checkout keeps the folders beside the package.
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


def resolve(path: str | Path) -> Path:
    """Turn "assets:NAME" into the bundled path and leave any other path as it is."""
    text = str(path)
    return asset(text.removeprefix("assets:")) if text.startswith("assets:") else Path(path)
