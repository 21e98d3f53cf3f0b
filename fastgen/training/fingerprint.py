"""What a run is made of, recorded in its checkpoints: settings, the teacher's weights, the data's content,
the number of processes. A run that resumes under another fingerprint would be another run.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgen.config.sections import DataConfig
from fastgen.core.errors import UserError, warn

WHOLE, BLOCKS, BLOCK = 2**30, 64, 2**16
"""weights up to WHOLE bytes are hashed in full; of larger ones BLOCKS evenly spaced blocks of each tensor"""
FOUND = ("teacher.weights", "data.content", "world_size", "device", "version")
"""keys that are found while a run loads, beside those of its config"""
TRAIN = (
    "seed",
    "train_batch_size",
    "gradient_accumulation_steps",
    "ema_decay",
    "mixed_precision",
    "gradient_checkpointing",
    "compile",
)
FREE = ("lr", "gradient_checkpointing", "compile", "version")
"""last or first words of keys whose change is reported and never refused"""


def by_key(tree: dict) -> dict[str, str]:
    """Nested settings as JSON by dotted key."""
    return dict(_leaves(tree, ""))


def of_run(
    settings: dict[str, str], teacher, data, source: DataConfig, num_processes: int, device: torch.device
) -> dict[str, str]:
    """The whole fingerprint: the settings (JSON by dotted key), and what they stood for when the run was
    loaded.
    """
    found = {
        "teacher.weights": weights_digest(teacher),
        "data.content": f"{len(data)} samples, {data_digest(source)}",
        "world_size": num_processes,
        "device": device.type,
        "version.fastgen": _version("fastgen-distill"),
        "version.torch": torch.__version__,
    }
    return settings | {k: json.dumps(v) for k, v in found.items()}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def _leaves(tree: dict, prefix: str):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def weights_digest(teacher) -> str:
    """Hash of a teacher's weights (denoiser, autoencoder and encoders; adapters apart) and of the settings
    of its network and scheduler.
    """
    tensors: list[tuple[str, Tensor]] = []
    for part in (teacher.backbone, teacher.codec):
        if isinstance(part, nn.Module):
            tensors += [*part.named_parameters(), *part.named_buffers()]
    kept = [(n, t.detach()) for n, t in tensors if "lora_" not in n and not t.is_meta]
    whole = sum(t.numel() * t.element_size() for _, t in kept) <= WHOLE
    digest = hashlib.sha256(repr(_configs(teacher)).encode())
    for name, tensor in kept:
        digest.update(f"{name.replace('.base_layer.', '.')}{tuple(tensor.shape)}{tensor.dtype}".encode())
        for part in [tensor] if whole else _blocks(tensor):
            digest.update(part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _configs(teacher) -> list:
    """The settings that a teacher's folder gives its network, its scheduler and us."""
    found = [getattr(p, "config", None) for p in (getattr(teacher.backbone, "net", None), teacher.scheduler)]
    plain = [sorted((k, repr(v)) for k, v in dict(c or {}).items() if not k.startswith("_")) for c in found]
    return [*plain, sorted((k, repr(v)) for k, v in (teacher.info or {}).items())]


def _blocks(tensor: Tensor) -> Iterable[Tensor]:
    """Evenly spaced blocks of a tensor, the first and the last included."""
    flat, size = tensor.reshape(-1), max(1, BLOCK // tensor.element_size())
    if flat.numel() <= BLOCKS * size:
        return [flat]
    last = flat.numel() - size
    return [flat[i * last // (BLOCKS - 1) :][:size] for i in range(BLOCKS)]


def data_digest(source: DataConfig) -> str:
    """Hash of the files that the data section names: names, sizes, and the first and last 64 KiB of each."""
    digest = hashlib.sha256()
    for name in (source.images, source.control, source.dispreferred, source.prompts):
        root = Path(name).expanduser()
        for path in sorted(_files(root)) if name else ():
            size = path.stat().st_size
            digest.update(f"{path.relative_to(root) if path != root else path.name}:{size};".encode())
            with open(path, "rb") as file:
                digest.update(file.read(BLOCK))
                if size > BLOCK:
                    file.seek(max(BLOCK, size - BLOCK))
                    digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


def _files(root: Path) -> Iterable[Path]:
    """Regular files of a folder, hidden ones left out, or the one file."""
    if root.is_file():
        return [root]
    found = (Path(folder) / name for folder, _, names in os.walk(root) for name in names)
    return (p for p in found if p.is_file() and not p.name.startswith("."))


def check_same(name: str, before: dict, now: dict, allowed: Iterable[str], report: bool) -> None:
    """Refuse to resume the checkpoint `name` where settings changed since, naming each with both values;
    report those that are allowed. A key newer than the checkpoint counts as null.
    """
    allowed = tuple(allowed)
    loaded = any(k.startswith(FOUND) for k in now)  # else only the settings are compared yet
    known = now.keys() | {k for k in before if loaded or not k.startswith(FOUND)}
    changed = [k for k in sorted(known) if before.get(k, "null") != now.get(k, "null")]
    free = [k for k in changed if _is_free(k) or _matches(k, allowed)]
    unknown = [a for a in allowed if not any(_matches(k, (a,)) for k in (*before, *now, *FOUND))]
    if unknown:
        found = f"no setting is named {unknown[0]!r}"
        raise UserError("--allow_changed", found, "name a setting, e.g. optim, data or world_size")
    refused = [k for k in changed if k not in free]
    if refused:
        spelled = ", ".join(_change(k, before, now) for k in refused[:4])
        more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
        way = f"restore them, start a new output_dir, or pass --allow_changed {' '.join(refused[:4])}"
        raise UserError("--resume", f"changed since {name}: {spelled}{more}", way)
    if free and report:
        spelled = ", ".join(_change(k, before, now) for k in free)
        warn(f"--resume: changed since {name}, going on with the new values: {spelled}")


def _change(key: str, before: dict, now: dict) -> str:
    return f"{key} ({before.get(key, 'unset')} -> {now.get(key, 'unset')})"


def _matches(key: str, names: Iterable[str]) -> bool:
    return any(key == n or key.startswith(n + ".") for n in names)


def _is_free(key: str) -> bool:
    return key.rsplit(".", 1)[-1] in FREE or key.split(".", 1)[0] in FREE
