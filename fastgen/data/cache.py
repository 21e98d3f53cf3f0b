"""Encoded latents and prompts kept on disk between runs, by the content they were made of.

A file carries a checksum of its tensors; one that is damaged or of another shape is made again, in one line.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastgen.core.errors import UserError, warn
from fastgen.data import tables

KEY = "data.cache_dir"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fingerprint(about: object, tensors: Iterable[Tensor]) -> str:
    """Sixteen hex digits of a description and the numbers of some tensors."""
    digest = hashlib.sha256(repr(about).encode("utf-8", "surrogatepass"))
    for tensor in tensors:
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor):
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def check_folder(cache_dir: str, key: str = KEY) -> None:
    """A UserError where the cache folder cannot be made or written."""
    if not cache_dir:
        return
    folder = Path(cache_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "is a file" if folder.is_file() else f"cannot be made ({error.strerror})"
        raise UserError(
            key, f"{folder} {reason}", "choose a folder that can be written, or leave it out"
        ) from None
    if not os.access(folder, os.W_OK):
        raise UserError(
            key, f"{folder} cannot be written", "choose a folder that can be written, or leave it out"
        )


def kept(cache_dir: str, name: str, num: int, make: Callable[[], Iterable[tables.Rows]]) -> tables.Rows:
    """The tables of one cache file, each of num rows, mapped from it. Where there is no sound file they are
    made, part by part, and written.
    """
    if not cache_dir:
        return tables.made(num, make)
    file = Path(cache_dir).expanduser() / f"{name}.safetensors"
    found = read(file, num)
    return written(file, num, make) if found is None else found


def read(file: Path, num: int | None, key: str = KEY) -> tables.Rows | None:
    """The tables of a file, mapped from it; None where there is none, or none that is sound and has num rows
    (None: any number).
    """
    from safetensors import SafetensorError

    if not file.is_file():
        return None
    try:
        found = tables.mapped(file)
        reason = "" if tables.recorded_checksum(file) == tables.checksum(file) else "its checksum differs"
        if not found or (num is not None and any(len(v) != num for v in found.values())):
            reason = f"it does not hold {num} rows"
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0][:80] if str(error) else "it cannot be read"
    if not reason:
        return found
    warn(f"{key}: {file.name} is damaged ({reason}); made again")
    return None


def written(file: Path, num: int, make: Callable[[], Iterable[tables.Rows]], key: str = KEY) -> tables.Rows:
    """Written under a name of this process's own, then renamed; a full disk costs the cache, not the run."""
    own = file.with_name(f"{file.name}.{os.getpid()}")
    first, parts = tables.begun(make)
    try:
        if not tables.has_room(file.parent, first, num):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        tables.write(own, num, parts)
        own.chmod(0o644)
        os.replace(own, file)
        return tables.mapped(file)
    except OSError as error:
        reason = "the disk is full" if error.errno in FULL else str(error).splitlines()[0][:80]
        warn(f"{key}: {file.name} was not written ({reason}); the run goes on without it")
        return tables.made(num, make)
    finally:
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)
