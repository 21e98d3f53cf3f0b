"""Tensors of a checkpoint on disk: in one file, or each process's parts in a file of its own, laid out as
torch.distributed.checkpoint does for safetensors (its `HuggingFaceStorageReader` reads such a folder).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TENSORS = "state.safetensors"
PARTS = re.compile(r"state-\d{5}-of-\d{5}\.safetensors")
OFFSETS = "DCP_SHARDING_INFO"
"""header entry: for each tensor, where in the whole one this part begins (`saved_offsets`)"""


def part_name(rank: int, world: int) -> str:
    """File of a process's parts."""
    return f"state-{rank + 1:05d}-of-{world:05d}.safetensors"


def is_tensors(name: str) -> bool:
    """Whether a file of a checkpoint holds tensors."""
    return name == TENSORS or PARTS.fullmatch(name) is not None


def write(
    path: Path, tensors: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]] | None = None
) -> None:
    """Tensors on the CPU into a file; with `offsets`, each is a part that begins there in the whole."""
    from safetensors.torch import save_file

    header = None
    if offsets is not None:
        where = {name: {"saved_offsets": list(at)} for name, at in offsets.items()}
        header = {OFFSETS: json.dumps(where), "DCP_VERSION": "1.0", "format": "pt"}
    save_file(dict(tensors), path, metadata=header)


@dataclass(frozen=True)
class _Part:
    file: Any
    begin: tuple[int, ...]
    shape: tuple[int, ...]


class StoredTensors(Mapping[str, Tensor]):
    """Whole tensors by name, each read from its files when it is asked for: memory need hold one at a time.
    Raises ValueError where the parts of one do not fill it.
    """

    def __init__(self, folder: Path):
        from safetensors import safe_open

        self.parts: dict[str, list[_Part]] = {}
        for path in sorted(p for p in folder.iterdir() if is_tensors(p.name)):
            file: Any = safe_open(path, "pt")
            where = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
            for name in file.keys():  # noqa: SIM118
                shape = tuple(file.get_slice(name).get_shape())
                begin = tuple(where[name]["saved_offsets"]) if name in where else (0,) * len(shape)
                self.parts.setdefault(name, []).append(_Part(file, begin, shape))
        self.shapes = {name: _whole_shape(name, parts) for name, parts in self.parts.items()}

    def __getitem__(self, name: str) -> Tensor:
        found: Any = None
        for part in self.parts[name]:
            value = part.file.get_tensor(name)
            if len(self.parts[name]) == 1:
                return value
            found = torch.empty(self.shapes[name], dtype=value.dtype) if found is None else found
            found[tuple(slice(b, b + n) for b, n in zip(part.begin, part.shape))] = value
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __contains__(self, name: object) -> bool:
        return name in self.parts


def _whole_shape(name: str, parts: list[_Part]) -> tuple[int, ...]:
    shape = tuple(max(b + n for b, n in zip(*ends)) for ends in _by_dimension(parts))
    filled = sum(torch.Size(p.shape).numel() for p in parts)
    if filled != torch.Size(shape).numel():
        raise ValueError(f"the parts of {name} hold {filled} numbers of {torch.Size(shape).numel()}")
    return shape


def _by_dimension(parts: list[_Part]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """For every dimension where the parts begin, and how long they are."""
    return list(zip(zip(*(p.begin for p in parts)), zip(*(p.shape for p in parts))))
