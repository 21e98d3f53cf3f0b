"""Packages that only some layouts of data need."""

from importlib.util import find_spec

from fastgen.core.errors import UserError


def needed(package: str, key: str) -> None:
    """A UserError that names the key where a package is not installed."""
    if find_spec(package) is None:
        missing = f"it needs the package {package}, which is not installed"
        raise UserError(key, missing, 'pip install "fastgen-distill[data]"')
