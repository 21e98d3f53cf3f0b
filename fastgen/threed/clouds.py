"""Point clouds [N, 3] as files: .ply (vertices x, y, z), KITTI's .bin (four float32 a point, of which the
fourth, reflectance, is left out) and .npy; nothing is unpickled.
"""

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.core.files import placed
from fastgen.core.reading import read_bytes

KINDS = (".ply", ".bin", ".npy")
LIMIT = 2**28
"""bytes of a file that is read"""
GIVE = "give a point cloud as .ply, .bin (KITTI) or .npy"
PLY = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"}
PLY |= {"float": "f4", "double": "f8", "float32": "f4", "float64": "f8", "uint8": "u1", "int32": "i4"}


def read_cloud(path: Path, key: str) -> Tensor:
    """Points [N, 3] of a file, float32; a UserError that names `key` for what is no finite cloud."""
    if path.suffix not in KINDS:
        raise UserError(key, f"found {path}", GIVE)
    raw = read_bytes(path, key, GIVE, LIMIT)
    try:
        points = {".ply": _ply, ".bin": _bin, ".npy": _npy}[path.suffix](raw)
    except (ValueError, KeyError, IndexError, EOFError, UnicodeDecodeError) as error:
        found = f"{path} is no {path.suffix} point cloud ({str(error).splitlines()[0][:80]})"
        raise UserError(key, found, GIVE) from None
    if not len(points):
        raise UserError(key, f"{path} holds no point", GIVE)
    if not np.isfinite(points).all():
        bad = int((~np.isfinite(points)).any(1).sum())
        found = f"{path} holds {bad} of {len(points)} points that are not finite"
        raise UserError(key, found, "leave those out: sensors mark rays without an echo so")
    return torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32))


def _bin(raw: bytes) -> np.ndarray:
    if len(raw) % 16:
        raise ValueError(f"{len(raw)} bytes are no multiple of 16")
    return np.frombuffer(raw, "<f4").reshape(-1, 4)[:, :3]


def _npy(raw: bytes) -> np.ndarray:
    found = np.load(io.BytesIO(raw), allow_pickle=False)
    if found.ndim != 2 or found.shape[1] < 3 or found.dtype.kind not in "fiu":
        raise ValueError(f"an array of {found.dtype} and shape {found.shape}, not numbers [N, 3]")
    return found[:, :3]


def _ply(raw: bytes) -> np.ndarray:
    end = raw.index(b"end_header\n") + len(b"end_header\n")
    lines = [line.split() for line in raw[:end].decode("ascii").splitlines()]
    if lines[0] != ["ply"] or lines[1][:2] not in (["format", "ascii"], ["format", "binary_little_endian"]):
        raise ValueError("neither ascii nor binary_little_endian")
    elements = [line for line in lines if line[0] == "element"]
    if not elements or elements[0][1] != "vertex":
        raise ValueError("vertices do not come first")
    num, first = int(elements[0][2]), lines.index(elements[0])
    last = lines.index(elements[1]) if len(elements) > 1 else len(lines)
    columns = [line for line in lines[first:last] if line[0] == "property"]
    if any(line[1] == "list" for line in columns):
        raise ValueError("a list among the properties of a vertex")
    names = [line[2] for line in columns]
    if lines[1][1] == "ascii":
        rows = raw[end:].decode("ascii").split("\n")[:num]
        table = np.array([[float(v) for v in row.split()] for row in rows]).reshape(num, len(names))
        return np.stack([table[:, names.index(axis)] for axis in "xyz"], 1)
    kind = np.dtype([(line[2], "<" + PLY[line[1]]) for line in columns])
    found = np.frombuffer(raw, kind, num, end)
    return np.stack([found[axis] for axis in "xyz"], 1)


def write_cloud(points: Tensor, path: Path) -> None:
    """Points [N, 3] as a binary .ply."""
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    header += [*(f"property float {axis}" for axis in "xyz"), "end_header", ""]
    data = points.detach().cpu().numpy().astype("<f4").tobytes()
    with placed(path) as file:
        Path(file).write_bytes("\n".join(header).encode() + data)


def seen_from_above(clouds: Tensor, half: float, size: int = 96, top: float = 2.5) -> Tensor:
    """Pictures [B, 3, size, size] of clouds [B, N, 3]: x to the right, y up, the highest point of each pixel,
    dark blue at 0 and yellow at `top`, over white.
    """
    low, high = torch.tensor([0.15, 0.2, 0.55]), torch.tensor([0.98, 0.8, 0.1])
    at = ((clouds[..., :2] / half / 2 + 0.5) * size).floor().long()
    inside = ((at >= 0) & (at < size)).all(-1)
    flat = (size - 1 - at[..., 1].clamp(0, size - 1)) * size + at[..., 0].clamp(0, size - 1)
    height = torch.where(inside, clouds[..., 2].clamp(0, top) / top, -1.0)
    highest = torch.full((len(clouds), size * size), -1.0).scatter_reduce(1, flat, height, "amax")
    share = highest.clamp(min=0)[:, None]
    colour = low[None, :, None] * (1 - share) + high[None, :, None] * share
    return torch.where(highest[:, None] < 0, 1.0, colour).unflatten(2, (size, size))
