"""Run folder and checkpoints: safetensors and JSON only, written beside and renamed, so that a kill
leaves the last good one.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from fastgen.config.run import RunConfig
from fastgen.core.errors import UserError
from fastgen.core.files import write_text


def check_run(output_dir: str, resume: bool, overwrite: bool) -> Path:
    """The run folder if it may be used as asked; refuses a used one otherwise. Touches nothing."""
    folder = Path(output_dir)
    if resume and overwrite:
        raise UserError("--resume", "found with --overwrite", "give one of them")
    if folder.exists() and not folder.is_dir():
        raise UserError("output_dir", f"{folder} is a file", "give a folder")
    used = folder.is_dir() and any(folder.iterdir())
    if resume and latest(folder) is None:
        raise UserError("--resume", f"{folder} has no complete checkpoint", "start without --resume")
    if used and not (resume or overwrite):
        raise UserError(
            "output_dir",
            f"{folder} is not empty",
            "pass --resume to continue it or --overwrite to start over",
        )
    if used and overwrite and not (folder / "config.yaml").exists():
        raise UserError(
            "output_dir", f"{folder} was not written by fastgen", "--overwrite clears run folders only"
        )
    return folder


def open_run(folder: Path, overwrite: bool) -> None:
    """Make (or clear) a run folder that `check_run` let pass."""
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def check_same(path: Path, now: dict[str, str]) -> None:
    """Refuse to resume a checkpoint under settings that would make another run of it; says which and how."""
    before = read_meta(path)["fingerprint"]
    # a key that came after the checkpoint was written counts as null
    changed = [k for k in sorted(before | now) if before.get(k, "null") != now.get(k, "null")]
    if changed:
        told = ", ".join(f"{k} ({before.get(k, 'unset')} -> {now.get(k, 'unset')})" for k in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise UserError(
            "--resume", f"changed since {path.name}: {told}{more}", "keep them, or start a new output_dir"
        )


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    number = lambda p: p.name.removeprefix("checkpoint-")  # noqa: E731
    found = [
        p
        for p in (folder / "checkpoints").glob("checkpoint-*")
        if number(p).isdigit() and (p / "state.json").exists()
    ]
    return sorted(found, key=lambda p: int(number(p)))


def latest(folder: Path) -> Path | None:
    found = checkpoints(folder)
    return found[-1] if found else None


def save(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict, keep: int) -> Path:
    """Write checkpoint-<step>; older ones beyond `keep` go only after it is complete."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = folder / "checkpoints" / f"checkpoint-{step}"
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / "state.safetensors"
        )
        (temporary / "state.json").write_text(json.dumps(meta))
        for file in temporary.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # safetensors reports a full disk as its own error
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            "checkpoint", f"step {step} could not be saved ({error})", "the last good checkpoint is kept"
        ) from None
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, meta) of a checkpoint."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path / "state.safetensors"), read_meta(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def read_meta(path: Path) -> dict:
    """state.json of a checkpoint."""
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        "--resume", f"{path} cannot be read ({error})", "delete it to fall back to the one before"
    )


def rewind_metrics(folder: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl that a stopped run wrote after the checkpoint it resumes from."""
    path = folder / "metrics.jsonl"
    kept = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            if json.loads(line)["step"] > step:
                continue
        except ValueError:  # cut off by a kill
            continue
        kept.append(line + "\n")
    if path.exists():
        write_text(path, "".join(kept))


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: list[str], prefix: str
) -> tuple[dict[str, Tensor], dict]:
    """Optimizer state as named tensors and a JSON rest."""
    tensors, rest = {}, {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}/{names[index]}/{key}"] = value
            else:
                rest[f"{prefix}/{names[index]}/{key}"] = value
    return tensors, rest


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], prefix: str, tensors: dict, rest: dict
) -> None:
    """Inverse of `optimizer_tensors`."""
    state: dict[int, dict] = {}
    index = {n: i for i, n in enumerate(names)}
    for source in (tensors, rest):
        for full, value in source.items():
            if full.startswith(f"{prefix}/"):
                name, key = full.removeprefix(f"{prefix}/").rsplit("/", 1)
                state.setdefault(index[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def fingerprint(cfg: RunConfig) -> dict[str, str]:
    """What may not change between a run and its resumption, as JSON by dotted key."""
    values = cfg.model_dump(mode="json")
    train = ("seed", "train_batch_size", "gradient_accumulation_steps", "ema_decay", "mixed_precision")
    kept = {k: values[k] for k in ("teacher", "student", "critic", "data")}
    kept["train"] = {k: values["train"][k] for k in train}
    kept["data"].pop("cache_dir")
    if cfg.stages:
        kept["stages"] = {
            str(i): {k: v for k, v in s.items() if k != "optim"} for i, s in enumerate(values["stages"])
        }
    else:
        kept["objective"] = values["objective"]
        kept["train"]["max_train_steps"] = values["train"]["max_train_steps"]
    return dict(_leaves(kept, ""))


def _leaves(tree: dict, prefix: str):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)
