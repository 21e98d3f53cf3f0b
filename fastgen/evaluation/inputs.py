"""The input of a measurement by its kind: pictures to look at, or numbers made of pictures before."""

from pathlib import Path

from fastgen.core.errors import UserError
from fastgen.data.bundled import NAMES
from fastgen.evaluation.archives import archives, is_archive
from fastgen.evaluation.items import open_items
from fastgen.evaluation.sources import Folder, Source, bundled, from_npz, from_safetensors

WAYS = f"give a folder of images, .npz, .safetensors, webdataset .tar, or {', '.join(NAMES)}"


def open_source(text: str, key: str = "--images", deep: bool = False, kind: str = "images") -> Source:
    """The source of images (or clips, clouds, points: `kind`) that a user's path names; deep: a folder's
    sub-folders too.
    """
    if kind != "images":
        return open_items(text, key, kind)
    if text in NAMES:
        return bundled(text, key)
    if is_archive(text):
        return archives(text, key)
    path = Path(text).expanduser()
    if path.is_dir():
        return Folder(path, key, deep)
    if not path.is_file():
        raise UserError(key, f"{text} is not a folder", WAYS)
    if path.suffix == ".npz":
        return from_npz(path, key)
    if path.suffix == ".safetensors":
        return from_safetensors(path, key)
    raise UserError(key, f"{text} is a {path.suffix or 'file without suffix'}", WAYS)
