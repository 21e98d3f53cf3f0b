"""What a run is made of, recorded in its checkpoints: settings, the teacher's weights, the data's content,
the number of processes. A run that resumes under another fingerprint would be another run.
"""

import json
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import torch

from fastgen.config.data_section import DataConfig
from fastgen.core.errors import UserError, warn
from fastgen.data.digest import data_digest
from fastgen.networks.weights_digest import weights_digest

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
    "compile_blocks",
    "channels_last",
    "sharding",
    "shard_group",
    "context_parallel",
)
FREE = (
    "lr",
    "fused",
    "gradient_checkpointing",
    "compile",
    "compile_blocks",
    "channels_last",
    "sharding",
    "shard_group",
    "offload",
    "version",
)
"""last or first words of keys whose change is reported and never refused"""
OFF = ("null", "false", "0", '""', "[]", "{}")
"""values, as JSON, of a setting that does nothing: with it a run is the one before the setting was there"""
ALWAYS_DATA = ("name", "images", "control", "prompts", "limit", "on_bad_image")
"""settings of the data section that are named also where they are not set; checkpoints and evidence from
before the others were there stay good without them
"""


def data_settings(data: DataConfig) -> dict:
    """The data section as JSON, settings that came later only where they differ from their default."""
    plain = DataConfig().model_dump(mode="json")
    return {k: v for k, v in data.model_dump(mode="json").items() if k in ALWAYS_DATA or v != plain[k]}


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


def check_same(name: str, before: dict, now: dict, allowed: Iterable[str], report: bool) -> None:
    """Refuse to resume the checkpoint `name` where settings changed since, naming each with both values;
    report those that are allowed. A key newer than the checkpoint counts as off.
    """
    allowed = tuple(allowed)
    loaded = any(k.startswith(FOUND) for k in now)  # else only the settings are compared yet
    known = now.keys() | {k for k in before if loaded or not k.startswith(FOUND)}
    changed = [k for k in sorted(known) if before.get(k) != now.get(k) and not _still_off(before, now, k)]
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


def _still_off(before: dict, now: dict, key: str) -> bool:
    """Whether a key that only one of them has is off in the other."""
    return (key in before) != (key in now) and {**before, **now}[key] in OFF


def _change(key: str, before: dict, now: dict) -> str:
    return f"{key} ({before.get(key, 'unset')} -> {now.get(key, 'unset')})"


def _matches(key: str, names: Iterable[str]) -> bool:
    return any(key == n or key.startswith(n + ".") for n in names)


def _is_free(key: str) -> bool:
    return key.rsplit(".", 1)[-1] in FREE or key.split(".", 1)[0] in FREE
