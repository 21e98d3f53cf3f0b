"""Atomic writes: a temporary file that is renamed, so that a kill leaves the old file or the new one."""

import os
from pathlib import Path

from torch import Tensor


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> Path:
    """Write a safetensors file atomically, with mode 0644 (safetensors itself writes 0600)."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=header)
    temporary.chmod(0o644)
    os.replace(temporary, path)
    return path
