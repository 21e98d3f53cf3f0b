"""Checkpoints: safetensors and JSON only, with a checksum of each file, written beside their place and
renamed into it, so that a kill or a full disk leaves the last good one.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.core.errors import UserError, warn
from fastgen.core.files import disk_error, sha256, sync_folder, to_json, write_text
from fastgen.networks.sharding import like
from fastgen.training import fingerprint
from fastgen.training.optimizers import coded_again, plain_tensors
from fastgen.training.stored_tensors import TENSORS, StoredTensors, is_tensors, write

STATE, SUMS = "state.json", "checksums.json"
META: dict[str, tuple[type, ...]] = {
    "stage": (int,),
    "k": (int,),
    "step": (int,),
    "seconds": (int, float),
    "rest": (dict,),
    "best": (dict,),
    "fingerprint": (dict,),
    "logs": (dict,),
    "scaler": (dict, type(None)),
    "validated": (bool,),
}
"""what state.json holds, by type"""


class Damaged(Exception):
    """A checkpoint that is not what was saved; says what is wrong with it."""


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by step, oldest first, damaged ones included."""
    number = lambda p: p.name.removeprefix("checkpoint-")  # noqa: E731
    found = [p for p in (folder / "checkpoints").glob("checkpoint-*") if number(p).isdecimal()]
    return sorted(found, key=lambda p: int(number(p)))


def latest(folder: Path) -> Path | None:
    """The newest checkpoint."""
    found = checkpoints(folder)
    return found[-1] if found else None


def newest_good(folder: Path, report: bool = True) -> Path | None:
    """The newest checkpoint that is whole; each damaged one after it is reported in a line. None where a run
    has no checkpoint yet; an error where all it has are damaged.
    """
    why = ""
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
            return path
        except Damaged as error:
            why = why or f"{path.name} is damaged ({error})"
            if report:
                warn(f"--resume: {path} is damaged ({error}); looking for the one before")
    if why:
        way = "restore a copy of one, or start again with --overwrite"
        raise UserError("--resume", f"{folder} has no undamaged checkpoint: {why}", way)
    return None


def set_aside(folder: Path, after: int, why: str) -> list[Path]:
    """Rename the checkpoints after a step, so that nothing resumes or counts them; what they are called
    now.
    """
    moved = []
    for path in checkpoints(folder):
        if int(path.name.removeprefix("checkpoint-")) > after:
            aside = path.with_name(f"{path.name}.{why}")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def save(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict) -> Path:
    """Write checkpoint-<step> whole or not at all."""
    with kept_on_failure(folder, step):
        temporary = begin(folder, step)
        write(temporary / TENSORS, {k: v.detach().cpu().contiguous() for k, v in tensors.items()})
        return seal(temporary, meta)


def unfinished(folder: Path, step: int) -> Path:
    """Where a checkpoint is until all of it is written."""
    return folder / "checkpoints" / f"checkpoint-{step}.tmp"


def begin(folder: Path, step: int) -> Path:
    """The empty folder that a checkpoint's files are written into."""
    temporary = unfinished(folder, step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def seal(temporary: Path, meta: dict) -> Path:
    """Give a folder that holds every tensor its state and checksums, and its name."""
    final = temporary.with_suffix("")
    (temporary / STATE).write_text(to_json(meta))
    names = sorted(p.name for p in temporary.iterdir() if is_tensors(p.name))
    sums = {name: sha256(temporary / name) for name in (*names, STATE)}
    (temporary / SUMS).write_text(to_json(sums, 1))
    sync_folder(temporary)
    if final.is_dir():
        shutil.rmtree(final)
    os.replace(temporary, final)
    sync_folder(final.parent)
    return final


@contextmanager
def kept_on_failure(folder: Path, step: int) -> Iterator[None]:
    """A disk that is full or cannot be written is an error in one line, which says what is kept."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(unfinished(folder, step), ignore_errors=True)
        if not (disk_error(error) or isinstance(error, (OSError, SafetensorError))):
            raise
        good = latest(folder)
        kept = f"the last good checkpoint is kept: {good}" if good else "no checkpoint was made before"
        found = f"step {step} could not be saved ({error}); {kept}"
        way = "free some space, then the same command with --resume goes on"
        raise UserError("checkpoint", found, way) from None


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def verify(path: Path) -> None:
    """Raises Damaged unless a checkpoint holds exactly what was saved."""
    try:
        for name in (SUMS, STATE):
            if not (path / name).is_file():
                raise Damaged(f"it has no {name}")
        sums = json.loads((path / SUMS).read_text(encoding="utf-8"))
        saved = {STATE, *(sums if isinstance(sums, dict) else ())}
        if not any(map(is_tensors, saved)):
            raise Damaged(f"{SUMS} names no file of tensors")
        for name in sorted(saved | {p.name for p in path.iterdir() if is_tensors(p.name)}):
            if not (name == STATE or is_tensors(name)):
                raise Damaged(f"{SUMS} names {name}")
            if not (path / name).is_file():
                raise Damaged(f"it has no {name}")
            if sums.get(name) != sha256(path / name):
                raise Damaged(f"{name} is not what was saved: its checksum differs")
        meta = json.loads((path / STATE).read_text(encoding="utf-8"))
        _check_meta(meta)
        if f"checkpoint-{meta['step']}" != path.name:
            raise Damaged(f"it holds step {meta['step']}")
        shapes(path)
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(" ".join(str(error).split())) from None


def _check_meta(meta: object) -> None:
    if not isinstance(meta, dict):
        raise Damaged(f"{STATE} holds no mapping")
    for key, kinds in META.items():
        value = meta.get(key, Damaged)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise Damaged(f"{STATE} has no valid {key}")
        if isinstance(value, (int, float)) and value < 0:
            raise Damaged(f"{STATE} has no valid {key}")


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint, from its headers alone."""
    from safetensors import SafetensorError

    try:
        return StoredTensors(path).shapes
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"its tensors cannot be read: {error}") from None


def load(path: Path) -> tuple[Mapping[str, Tensor], dict]:
    """(tensors, meta) of a checkpoint; a tensor is read when it is asked for."""
    from safetensors import SafetensorError

    try:
        return StoredTensors(path), read_meta(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def read_meta(path: Path) -> dict:
    """state.json of a checkpoint."""
    try:
        return json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError("--resume", f"{path} cannot be read ({error})", "delete it to use the one before")


def check_same(path: Path, now: dict[str, str], allowed: Iterable[str] = (), report: bool = True) -> None:
    """Refuse to resume a checkpoint under settings that would make another run of it."""
    fingerprint.check_same(path.name, read_meta(path)["fingerprint"], now, allowed, report)


def check_tensors(path: Path, wanted: dict[str, tuple[int, ...]], kinds: tuple[str, ...]) -> None:
    """Refuse a checkpoint that lacks tensors of these kinds (part/, ema/, objective/), has others, or has
    them in other shapes.
    """
    found = {k: v for k, v in shapes(path).items() if k.startswith(kinds)}
    wanted = {k: tuple(v) for k, v in wanted.items() if k.startswith(kinds)}
    differing = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    if differing:
        key = differing[0]
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        spelled = f"{key} is {found.get(key, 'missing')}, this run has {wanted.get(key, 'none')}{more}"
        raise UserError("--resume", f"{path.name} does not fit: {spelled}", "start a new output_dir")


def rewind_metrics(folder: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl that a stopped run wrote after the checkpoint it resumes from."""
    path = folder / "metrics.jsonl"
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            if json.loads(line)["step"] > step:
                continue
        except (ValueError, TypeError, KeyError):  # cut off by a kill
            continue
        kept.append(line + "\n")
    if path.exists():
        write_text(path, "".join(kept))


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: list[str], prefix: str
) -> tuple[dict[str, Tensor], dict]:
    """Optimizer state as named tensors and a JSON rest."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors |= {f"{prefix}/{names[index]}/{k}": v for k, v in plain_tensors(key, value).items()}
            else:
                rest[f"{prefix}/{names[index]}/{key}"] = value
    return tensors, rest


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], prefix: str, *sources: Mapping
) -> None:
    """Inverse of `optimizer_tensors`, from its tensors and its rest; states are spread as their parameters
    are.
    """
    state: dict[int, dict] = {}
    index = {n: i for i, n in enumerate(parameters)}
    for source in sources:
        for full in (n for n in source if n.startswith(f"{prefix}/")):
            name, key = full.removeprefix(f"{prefix}/").rsplit("/", 1)
            if name not in index:
                raise UserError("--resume", f"it optimizes {name}, unknown here", "start a new output_dir")
            value = source[full]
            if isinstance(value, Tensor) and value.shape == parameters[name].shape:
                value = like(value, parameters[name])
            state.setdefault(index[name], {})[key] = value
    types = [p.dtype for p in parameters.values()]
    state = {i: coded_again(found, types[i]) for i, found in state.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
