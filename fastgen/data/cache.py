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
from fastgen.core.files import write_tensors

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


def _checksum(tensors: dict[str, Tensor]) -> str:
    about = [(k, str(v.dtype), tuple(v.shape)) for k, v in sorted(tensors.items())]
    return fingerprint(about, (v for _, v in sorted(tensors.items())))


def check_folder(cache_dir: str) -> None:
    """A UserError where the cache folder cannot be made or written."""
    if not cache_dir:
        return
    folder = Path(cache_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "is a file" if folder.is_file() else f"cannot be made ({error.strerror})"
        raise UserError(
            KEY, f"{folder} {reason}", "choose a folder that can be written, or leave it out"
        ) from None
    if not os.access(folder, os.W_OK):
        raise UserError(
            KEY, f"{folder} cannot be written", "choose a folder that can be written, or leave it out"
        )


def kept(cache_dir: str, name: str, num: int, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of one cache file, each of num rows; made, and written, where there is no sound file."""
    if not cache_dir:
        return make()
    file = Path(cache_dir).expanduser() / f"{name}.safetensors"
    found = _read(file, num)
    if found is None:
        found = make()
        _write(file, found)
    return found


def _read(file: Path, num: int) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as source:
            wanted = (source.metadata() or {}).get("checksum")
            tensors = {k: source.get_tensor(k) for k in source.keys()}  # noqa: SIM118
        reason = "" if wanted == _checksum(tensors) else "its checksum differs"
        if not tensors or any(len(v) != num for v in tensors.values()):
            reason = f"it does not hold {num} rows"
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0][:80] if str(error) else "it cannot be read"
    if not reason:
        return tensors
    warn(f"{KEY}: {file.name} is damaged ({reason}); made again")
    return None


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write under a name of this process's own, then rename; a full disk costs the cache, not the run."""
    own = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        write_tensors(own, tensors, {"checksum": _checksum(tensors)})
        os.replace(own, file)
    except Exception as error:  # safetensors wraps OSErrors in an exception of its own
        for left in (own, own.with_name(own.name + ".tmp")):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)
        full = getattr(error, "errno", None) in FULL or "os error 28" in str(error)
        reason = "the disk is full" if full else str(error).splitlines()[0][:80]
        warn(f"{KEY}: {file.name} was not written ({reason}); the run goes on without it")
