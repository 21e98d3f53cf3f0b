"""The run folder: whether it may be used, who writes to it, and what --overwrite clears.

A run holds a lock on a file in its folder (flock, which a crash releases) that names its process and host.
The file also marks the folder as one of ours.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fastgen.core.errors import UserError, warn
from fastgen.core.files import to_json

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"
WRITTEN = (
    "config.yaml",
    "recipe.yaml",
    "environment.json",
    "metrics.jsonl",
    "results.json",
    "best.safetensors",
    "samples",
    "checkpoints",
    "export",
    "export.tmp",
    "export.old",
    "report",
    "fastgen",
)
"""what a run writes (fastgen holds a tracker's files) and --overwrite clears; not the lock"""


def check_folder(output_dir: str, inputs: Mapping[str, str], resume: bool, overwrite: bool) -> Path:
    """The run folder if it may be used with these flags; refuses it otherwise. `inputs`: the paths that the
    run reads, by key. Touches nothing.
    """
    if resume and overwrite:
        raise UserError("--resume", "found with --overwrite", "give one of them")
    if not output_dir.strip():
        raise UserError("output_dir", "found an empty name", "name a folder, e.g. runs/first")
    if "\0" in output_dir:
        raise UserError("output_dir", f"found {output_dir!r}", "give a name without a null character")
    folder = Path(output_dir)
    try:
        _check_usable(folder, inputs, resume, overwrite)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("output_dir", error, "choose a folder that can be written") from None
    return folder


def _check_usable(folder: Path, inputs: Mapping[str, str], resume: bool, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError("output_dir", f"{folder} is a file", "give a folder")
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise UserError("output_dir", f"{parent} is a file", "choose a folder that can be created")
    if not os.access(parent, os.W_OK):
        raise UserError("output_dir", f"{parent} cannot be written", "choose a folder that can be written")
    used = folder.is_dir() and any(p.name != LOCK for p in folder.iterdir())
    if used and not (resume or overwrite):
        found = f"{folder} is not empty"
        raise UserError("output_dir", found, "pass --resume to continue it or --overwrite to start over")
    if (resume or overwrite) and (owner := _owner(folder)):
        raise _in_use(folder, owner)
    if resume and not (used and is_ours(folder)):
        raise UserError("--resume", f"{folder} has no complete checkpoint", "start without --resume")
    if used and overwrite:
        _check_overwrite(folder, inputs)


def _check_overwrite(folder: Path, inputs: Mapping[str, str]) -> None:
    """--overwrite clears run folders alone, and none that holds the working directory or an input."""
    real = folder.resolve()
    protected = {"the working directory": Path.cwd(), "the home folder": Path.home()}
    for what, path in protected.items():
        if path.resolve().is_relative_to(real):
            raise UserError(
                "output_dir",
                f"{folder} is or holds {what}",
                "choose another output_dir: --overwrite never clears that",
            )
    if folder.is_symlink():
        raise UserError("output_dir", f"{folder} is a link to {real}", "give --overwrite the folder itself")
    if not is_ours(folder):
        found = f"{folder} was not written by fastgen"
        raise UserError("output_dir", found, "choose another output_dir: --overwrite clears run folders only")
    for key, value in inputs.items():
        if value and any(Path(value).resolve().is_relative_to(real / name) for name in WRITTEN):
            found = f"{value} lies in what --overwrite would clear"
            raise UserError(key, found, "move it, or choose another output_dir")


def is_ours(folder: Path) -> bool:
    """Whether a run of fastgen made this folder: it holds our lock, or the record of our environment."""
    for name, key in ((LOCK, "fastgen_run"), ("environment.json", "fastgen-distill")):
        try:
            if key in json.loads((folder / name).read_text(encoding="utf-8")):
                return True
        except (OSError, ValueError, TypeError, RecursionError):
            continue
    return False


@contextmanager
def opened(folder: Path, resume: bool, overwrite: bool) -> Iterator[None]:
    """Make (or clear) a run folder that `check_folder` let pass, and hold its lock until the end of the
    block.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    except OSError as error:
        raise UserError("output_dir", error, "choose a folder that can be written") from None
    try:
        if not _take(lock, tries=10):
            raise _in_use(folder, _read(lock))
        if not (resume or overwrite) and any(p.name != LOCK for p in folder.iterdir()):
            found = f"{folder} was used by another run meanwhile"
            raise UserError("output_dir", found, "choose another folder")
        about = {"fastgen_run": True, "pid": os.getpid(), "host": socket.gethostname()}
        os.ftruncate(lock, 0)
        os.pwrite(lock, (to_json(about) + "\n").encode(), 0)
        if overwrite:
            clear(folder)
        yield
    finally:
        os.close(lock)  # releases it


def clear(folder: Path) -> None:
    """Remove what an earlier run wrote; other people's files, and what links point to, stay."""
    for path in (folder / name for name in WRITTEN):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)


def _take(lock: int, tries: int = 1) -> bool:
    """Whether the lock on an open file is ours now; another process that only looks holds it briefly."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if tries == 1:
            return False
        time.sleep(0.05)
        return _take(lock, tries - 1)
    except OSError as error:  # file systems without locks
        warn(f"output_dir: cannot be locked ({error}); start no second run in it")
    return True


def in_use(folder: Path) -> bool:
    """Whether a run holds the folder at this moment."""
    return bool(_owner(folder))


def _owner(folder: Path) -> dict:
    """Who holds the lock of a folder: its pid and host, or nothing."""
    try:
        lock = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return {}
    try:
        return {} if _take(lock) else _read(lock)
    finally:
        os.close(lock)


def _read(lock: int) -> dict:
    try:
        found = json.loads(os.pread(lock, 4096, 0))
    except (OSError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) and found else {"pid": "unknown", "host": "unknown"}


def _in_use(folder: Path, owner: dict) -> UserError:
    who = f"process {owner.get('pid')} on {owner.get('host')}"
    return UserError(
        "output_dir", f"{folder} is in use by {who}", "wait until it ends, or choose another output_dir"
    )
