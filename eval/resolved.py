"""Whether a change to configs/ changed what the files mean, or only how they are written.

python -m eval resolved --since main    compares the resolved configs of that revision with those of now
"""

import io
import subprocess
import tempfile
import zipfile
from pathlib import Path

from eval.evidence import differing
from fastgen.config.parse import merge, read_files
from fastgen.config.run import RunConfig, validate
from fastgen.core.errors import UserError, first_line
from fastgen.core.paths import PACKAGE

KINDS = ("recipes", "teachers", "objectives")


def resolved(folder: Path, unread: dict[str, str] | None = None) -> dict[str, RunConfig]:
    """Every recipe, teacher and objective of a configs folder with its bases and defaults, by kind/name. Why
    a file cannot be read goes to `unread` by its name, where one is given.

    What a teacher or an objective alone leaves open (a method, images) is filled in alike for all.
    """
    found = {}
    for file in sorted(f for kind in KINDS for f in (folder / kind).glob("*.yaml")):
        values = read_files([str(file)])
        if not values.get("stages"):
            values = merge({"objective": {"name": "sft"}}, values)
        if not (values.get("data") or {}).get("name"):
            values = merge(values, {"data": {"name": "", "images": "images"}})
        name = f"{file.parent.name}/{file.stem}"
        try:
            found[name] = validate({**values, "output_dir": "runs/any"})
        except UserError as error:
            if unread is None:
                raise
            unread[name] = first_line(error)
    return found


def changes(old: dict[str, RunConfig], new: dict[str, RunConfig]) -> tuple[list[str], list[str]]:
    """(files under another name that mean the same, files that are gone, new or mean something else)."""
    renamed, changed = {}, []
    fresh = {name: cfg for name, cfg in new.items() if name not in old}
    for name, cfg in old.items():
        if name not in new:
            same = [n for n, c in fresh.items() if c == cfg and n not in renamed.values()]
            if same:
                renamed[name] = same[0]
            else:
                changed.append(f"{name} is gone")
        elif new[name] != cfg:
            changed.append(f"{name} differs in {', '.join(differing(cfg, new[name], free=()))}")
    changed += [f"{name} is new" for name in fresh if name not in renamed.values()]
    return [f"{a} is now {b}" for a, b in renamed.items()], changed


def since(revision: str, root: Path = PACKAGE.parent) -> tuple[int, list[str], list[str]]:
    """(files compared, renamed, changed) between a git revision's configs/ and the ones in the checkout."""
    command = ["git", "archive", "--format=zip", revision, "configs"]
    done = subprocess.run(command, cwd=root, capture_output=True)
    if done.returncode:
        reason = first_line(RuntimeError(done.stderr.decode()))
        raise UserError(
            "--since", f"{revision} cannot be read ({reason})", "give a git revision of this checkout"
        )
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(io.BytesIO(done.stdout)) as archive:
            archive.extractall(folder)
        old = resolved(Path(folder) / "configs", unread := {})
    new = resolved(root / "configs")
    renamed, changed = changes(old, {n: c for n, c in new.items() if n not in unread})
    changed += [f"{name} was written otherwise: {why.split(';')[0]}" for name, why in unread.items()]
    return len(old) + len(unread), renamed, changed
