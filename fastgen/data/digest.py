"""Hashes of what a run reads: the files of a data section, and the encoders of a model's folder."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

BLOCK = 2**16
MANY = 20_000
"""files of a set from which on all names are hashed, and the sizes and contents of some"""
SAMPLED = 1000
"""how many"""
BLOCKS = 16
"""evenly spaced blocks of a weight file that are hashed"""
NOT_ENCODERS = ("unet", "transformer", "prior", "scheduler", "safety_checker", "feature_extractor")


def data_digest(source) -> str:
    """Hash of the files that a data section names: names, sizes, and the first and last 64 KiB of each."""
    digest = hashlib.sha256()
    named = [source.images, source.control, source.dispreferred, source.prompts, source.table, source.latents]
    named += [source.appearance.images] if source.appearance else []
    for one in source.sources:
        named += [one.images, one.table]
    for name in named:
        _add(digest, Path(name).expanduser()) if name else None
    for one in (source, *source.sources):
        if one.dataset:
            _add(digest, Path(one.dataset).expanduser())
        if one.shards:
            from fastgen.data.shards import shard_files

            for file in shard_files(one.shards, "data.shards"):
                _add(digest, file)
    return digest.hexdigest()[:16]


def _add(digest, root: Path) -> None:
    """Every file of a folder, or the one file; of something else the name alone."""
    if not root.exists():
        digest.update(str(root).encode())
        return
    files, every = list(_files(root)), 1
    if len(files) > MANY:
        files.sort(key=str)
        every = -(-len(files) // SAMPLED)
        digest.update("\n".join(map(str, files)).encode("utf-8", "surrogateescape"))
    else:
        files.sort()
    for path in files[::every]:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root) if path != root else path.name}:{size};".encode())
        with open(path, "rb") as file:
            digest.update(file.read(BLOCK))
            if size > BLOCK:
                file.seek(max(BLOCK, size - BLOCK))
                digest.update(file.read(BLOCK))


def _files(root: Path) -> Iterable[Path]:
    """Regular files of a folder, hidden ones left out, or the one file."""
    if root.is_file():
        yield root
        return
    folders = [str(root)]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except OSError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif not entry.name.startswith(".") and entry.is_file():
                yield Path(entry.path)


def encoders_digest(folder: Path, about: object) -> str:
    """Hash of the autoencoder and the text encoders in a model's folder, by blocks of their files, and of
    what else decides how they encode. Nothing is loaded.
    """
    digest = hashlib.sha256(repr(about).encode())
    parts = sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in NOT_ENCODERS)
    for path in (file for part in parts for file in sorted(_files(part))):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}:{size};".encode())
        with open(path, "rb") as file:
            for i in range(BLOCKS):
                file.seek(i * max(0, size - BLOCK) // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]
