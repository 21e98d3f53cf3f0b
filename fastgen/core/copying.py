"""Copies of folders that others wrote: regular files that lie inside of them, and nothing that a link, a pipe
or a device leads to.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from fastgen.core.paths import lies_inside
from fastgen.core.patterns import matches


def files_inside(folder: Path, root: Path) -> Iterator[tuple[Path, str]]:
    """(file, why it is left out) of every file under `folder`, a part of `root`; the reason is empty for a
    regular file that lies inside `root`.
    """
    if not lies_inside(folder, root):
        yield folder, "a link that leaves the folder"
        return
    for path in sorted(folder.iterdir()):
        try:
            kind = path.stat().st_mode
        except OSError:
            yield path, "a link that leads nowhere"
            continue
        if not lies_inside(path, root):
            yield path, "a link that leaves the folder"
        elif stat.S_ISDIR(kind):
            if path.is_symlink():
                yield path, "a link to a folder"  # which could lead back to where it stands
            else:
                yield from files_inside(path, root)
        else:
            yield path, "" if stat.S_ISREG(kind) else "not a regular file"


def copy_inside(source: Path, target: Path, root: Path, ignore: tuple[str, ...] = ()) -> list[str]:
    """Copy the regular files of a folder that lie inside `root`, without those that match `ignore`; what was
    left out, and why.
    """
    left_out = []
    for path, why in files_inside(source, root):
        if why:
            left_out.append(f"{path} ({why})")
        elif not matches(path.name, ignore):
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists() and os.path.samefile(place, path):
                continue
            shutil.copyfile(path, place)
    return left_out
