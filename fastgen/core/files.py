"""Files written beside their place and renamed into it, so that a kill or a full disk leaves the old one or
the new one, never half of one.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
)
_FULL = ("No space left", "os error 28", "Disk quota", "os error 122", "File too large", "os error 27")


def disk_error(error: BaseException) -> bool:
    """Whether an exception is about a disk: full, over quota, read-only, not ours. Safetensors reports them
    as its own error, with the system's text.
    """
    if isinstance(error, OSError) and error.errno in DISK:
        return True
    return any(part in str(error) for part in _FULL)


@contextmanager
def placed(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; renamed into its place at the end, removed if anything fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    with placed(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Add one line to a file; a line that finds no room leaves the file as it was."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def finite(value):
    """A JSON value without NaN and infinities, which JSON does not have: left out of mappings, null in
    lists.
    """
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items() if not _not_finite(v)}
    if isinstance(value, (list, tuple)):
        return [None if _not_finite(v) else finite(v) for v in value]
    return None if _not_finite(value) else value


def _not_finite(value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def to_json(value, indent: int | None = None) -> str:
    """JSON text that every reader takes."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def write_json(path: Path, value, indent: int | None = 2) -> None:
    """Write a small JSON file atomically."""
    write_text(path, to_json(value, indent))


def write_model_json(path: Path, value) -> None:
    """Write a JSON file that diffusers reads, or that repeats a config of its: infinities stand as Python's
    json writes and reads them (-Infinity), since a scheduler without its `lambda_min_clipped` is another one.
    """
    write_text(path, json.dumps(value, indent=2))


def write_tensors(path: Path, tensors: dict[str, "Tensor"], header: dict[str, str] | None = None) -> Path:
    """Write a safetensors file atomically, readable by everyone (safetensors alone writes for the owner)."""
    from safetensors.torch import save_file

    with placed(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=header)
        temporary.chmod(0o644)
    return path


def replace_folder(new: Path, place: Path) -> Path:
    """Rename a finished folder into its place; what stood there goes only after it."""
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)
    return place


def sha256(path: Path) -> str:
    """Checksum of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Have the disk hold a folder's files, and the folder's own list of them."""
    for path in (*(p for p in folder.iterdir() if p.is_file()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
