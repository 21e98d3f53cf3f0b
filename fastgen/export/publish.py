"""An export on the Hugging Face hub: which files go there, and the upload. No pickle ever does."""

import re
from pathlib import Path

from fastgen.core.errors import UserError, first_line
from fastgen.export.info import FILE, read_info

PUBLISHED = (".safetensors", ".json", ".md", ".txt", ".png", ".gif", ".model", ".py")
"""suffixes of what an export is made of"""
SCRIPTS = ("nasa.py", "guidance_adapter.py", "block_causal.py", "tile_attention.py")
"""of fastgen, which exports carry"""
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def files_to_publish(folder: Path) -> list[Path]:
    """Every file of an export, relative to it; a UserError names one that no export has: pickled weights, a
    script of somebody else, a link that leads out of the folder.
    """
    if read_info(folder, "--model") is None:
        raise UserError("--model", f"{folder} has no {FILE} of an export", "give an export folder")
    found = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() or p.is_symlink())
    for path in found:
        wrong = path.suffix not in PUBLISHED or (path.suffix == ".py" and path.name not in SCRIPTS)
        if wrong or not (folder / path).resolve().is_relative_to(folder.resolve()):
            why = "is no file of an export: only safetensors, JSON, text and pictures are published"
            raise UserError("--push", f"{folder / path} {why}", "move it out of the folder")
    if not any(path.suffix == ".safetensors" for path in found):
        raise UserError("--push", f"{folder} holds no weights", "give a whole export folder")
    return found


def describe(folder: Path, repository: str) -> str:
    """What `push` would do, as plain text."""
    files = files_to_publish(folder)
    sizes = {path: (folder / path).stat().st_size for path in files}
    lines = [f"  {path.as_posix():<60} {size / 2**20:>9.2f} MB" for path, size in sizes.items()]
    total = sum(sizes.values()) / 2**20
    return "\n".join([f"{len(files)} files, {total:.2f} MB, to {_checked(repository)}", *lines])


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Create the repository where it is missing and upload the export; the address. Needs an account: the
    token is huggingface_hub's own (`hf auth login`).
    """
    from huggingface_hub import HfApi

    files, api = files_to_publish(folder), HfApi()
    try:
        api.create_repo(_checked(repository), private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[path.as_posix() for path in files],
            commit_message=f"Upload {folder.resolve().parent.name}",
        )
    except Exception as error:  # no account, no rights, no network: errors of many types
        way = "log in with `hf auth login`, and check the name and the connection"
        raise UserError("--push", f"{repository}: {first_line(error)}", way) from None
    return f"https://huggingface.co/{repository}"


def _checked(repository: str) -> str:
    if not REPOSITORY.fullmatch(repository):
        raise UserError("--push", f"found {repository[:80]!r}", "give OWNER/NAME")
    return repository
