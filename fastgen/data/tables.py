"""Tables of rows (latents, encoded prompts) that are made part by part: small ones in memory, large ones in a
file that is mapped, of which only the rows in use take memory.

A file is an ordinary safetensors file, written as the parts come, so that no table is ever held twice.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.core.errors import warn

Rows = dict[str, Tensor]
LARGE = 256 * 2**20
"""bytes of a table from which on it goes to a temporary file"""
CHECKSUM = "checksum"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""names of types in a safetensors header"""
NAMES = {name: str(dtype) for dtype, name in DTYPES.items()}
CHUNK = 2**24


def joined(num: int, parts: Iterable[Rows]) -> Rows:
    """Tables of num rows in memory, filled part by part."""
    table: Rows = {}
    first = 0
    for part in parts:
        for key, value in part.items():
            if key not in table:
                table[key] = torch.empty(num, *value.shape[1:], dtype=value.dtype)
            table[key][first : first + len(value)] = value
        first += len(next(iter(part.values())))
    return table


def made(num: int, make: Callable[[], Iterable[Rows]]) -> Rows:
    """The tables that `make` yields part by part: in memory, or if they are large and a temporary file has
    room, mapped from one that is gone when they are.
    """
    first, parts = begun(make)
    folder = Path(tempfile.gettempdir())
    if _bytes_of(first, num) < LARGE or not has_room(folder, first, num):
        return joined(num, parts)
    handle, name = tempfile.mkstemp(".safetensors", "fastgen-", folder)
    os.close(handle)
    try:
        write(Path(name), num, parts)
        return mapped(Path(name))
    except OSError as error:
        warn(f"data: {folder} takes no table ({error.strerror or error}); it is made again in memory")
        return joined(num, make())
    finally:
        Path(name).unlink(missing_ok=True)


def begun(make: Callable[[], Iterable[Rows]]) -> tuple[Rows, Iterator[Rows]]:
    """The first part, and all of them."""
    parts = iter(make())
    first = next(parts)
    return first, chain([first], parts)


def _bytes_of(first: Rows, num: int) -> int:
    return sum(num * _row_bytes(v) for v in first.values())


def has_room(folder: Path, first: Rows, num: int) -> bool:
    """Whether the disk of a folder has room for num rows like these, and a little more."""
    return shutil.disk_usage(folder).free > 1.1 * _bytes_of(first, num)


def _row_bytes(value: Tensor) -> int:
    return math.prod(value.shape[1:]) * value.element_size()


def write(path: Path, num: int, parts: Iterable[Rows]) -> None:
    """Write num rows as they come, then the checksum of all into the header."""
    parts = iter(parts)
    part = next(parts)
    header, places = _header(part, num)
    with open(path, "wb") as file:
        file.write(header)
        first = 0
        for rows in chain([part], parts):
            for key, value in rows.items():
                file.seek(len(header) + places[key] + first * _row_bytes(value))
                file.write(_raw(value))
            first += len(next(iter(rows.values())))
        file.truncate(len(header) + _bytes_of(part, num))
    digest = checksum(path)
    with open(path, "r+b") as file:
        file.seek(header.index(b"0" * len(digest)))
        file.write(digest.encode())


def _raw(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _header(part: Rows, num: int) -> tuple[bytes, dict[str, int]]:
    """The header of a file of num rows with a place for the checksum, and where each table begins."""
    entries: dict[str, Any] = {"__metadata__": {CHECKSUM: "0" * 16}}
    places, end = {}, 0
    for key in sorted(part, key=lambda k: (-part[k].element_size(), k)):  # larger types first: all aligned
        value = part[key]
        places[key], end = end, end + num * _row_bytes(value)
        shape = [num, *value.shape[1:]]
        entries[key] = {"dtype": DTYPES[value.dtype], "shape": shape, "data_offsets": [places[key], end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def checksum(path: Path) -> str:
    """Sixteen hex digits of the names, types, shapes and numbers in a file, read through and not kept."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = sorted((k, v) for k, v in json.loads(file.read(size)).items() if k != "__metadata__")
        about = [(k, NAMES[v["dtype"]], tuple(v["shape"])) for k, v in entries]
        digest = hashlib.sha256(repr(about).encode())
        for _, entry in entries:
            begin, end = entry["data_offsets"]
            file.seek(8 + size + begin)
            for left in range(end - begin, 0, -CHUNK):
                digest.update(file.read(min(CHUNK, left)))
    return digest.hexdigest()[:16]


def mapped(path: Path) -> Rows:
    """The tensors of a file, read from it where they are used; changes of them stay in memory."""
    from safetensors import safe_open

    with safe_open(path, "pt") as source:
        return {k: source.get_tensor(k) for k in source.keys()}  # noqa: SIM118


def recorded_checksum(path: Path) -> str | None:
    """The checksum that a file's header names."""
    from safetensors import safe_open

    with safe_open(path, "pt") as source:
        return (source.metadata() or {}).get(CHECKSUM)
