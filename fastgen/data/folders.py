"""What a folder of pictures or clips holds: its files in their order, their captions and their classes.

Hidden files and folders (.ipynb_checkpoints, ._x.jpg) and __MACOSX are no part of it. Captions and labels
come from metadata.jsonl or metadata.csv (file_name, text, label), in the folder or beside the files of a
sub-folder; a .txt file beside a picture fills in the caption that metadata does not give. Numbers in names
count as numbers, so 2.png comes before 10.png. A clip may be a folder of its numbered frames.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastgen.core.errors import UserError
from fastgen.data.metadata import read_metadata
from fastgen.data.pictures import check_regular, decoders, decoding, formats
from fastgen.data.text import read_text

CLIPS = (".gif", ".webp", ".png", ".apng", ".avif", ".avifs", ".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v")
STILLS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""pictures that may be the frames of a clip"""
METADATA = ("metadata.jsonl", "metadata.csv")
QUIET = (".txt", ".json", ".jsonl", ".csv", ".md", ".ini", ".db", ".yaml")
"""kinds of files beside pictures that need no mention"""


@dataclass
class Listing:
    """Files of one folder; skipped names each file that is not a regular one, with the reason."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    texts: dict[Path, Path] = field(default_factory=dict)  # .txt files by path without suffix
    metadata: list[Path] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    others: Counter = field(default_factory=Counter)  # files of other kinds by suffix
    frames: set[Path] = field(default_factory=set)  # of the files: folders with the frames of a clip


def natural(path: Path | str) -> tuple:
    """Sorting key under which numbers in names count as numbers."""
    name = str(path)
    parts = re.split(r"([0-9]+)", name)  # every second one is a number, told by its length and its digits
    numbers = [part.lstrip("0") for part in parts]
    ranks = ((1, len(n), n) if i % 2 else (0, 0, p) for i, (p, n) in enumerate(zip(parts, numbers)))
    return tuple(ranks), name


def named(path: Path | str) -> str:
    """A file name as it may be printed: control and undecodable characters escaped, cut if long."""
    name = str(path)
    name = name if name.isprintable() else ascii(name)[1:-1]
    return name if len(name) <= 100 else f"{name[:60]}...{name[-35:]}"


def some(names: Iterable[str], most: int = 5) -> str:
    """The first few of many names."""
    found = list(names)
    rest = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + rest


def hidden(name: str) -> bool:
    """Whether a file or folder is one that file managers do not show."""
    return name.startswith(".") or name == "__MACOSX"


def check_folder(folder: Path, key: str) -> None:
    """A UserError that names the key unless this is a folder."""
    if not folder.is_dir():
        raise UserError(
            key, f"{folder} is not a folder", "give a folder of png, jpg, webp or other image files"
        )


def scan(folder: Path, clips: bool = False, key: str = "data.images", deep: bool = True) -> Listing:
    """The pictures (or clips) of a folder and, with deep, its sub-folders, in natural order."""
    folder = folder.expanduser()
    check_folder(folder, key)
    kinds, found = {*CLIPS, *STILLS} if clips else formats(), Listing(folder)
    failed: list[OSError] = []
    for entry in _entries(folder, deep, found.skipped, failed):
        _sort_in(found, entry, kinds)
    found.skipped += [f"{named(e.filename)} ({e.strerror})" for e in failed]
    if clips:
        _gather_frames(found)
    depth = len(folder.parts)
    found.files.sort(key=lambda p: natural("/".join(p.parts[depth:])))
    return found


def _gather_frames(found: Listing) -> None:
    """Put a sub-folder in the place of its pictures where they are the frames of a clip: still, numbered, and
    called the same but for the number. Other pictures that never move are no clips.
    """
    folders: dict[Path, list[Path]] = {}
    for path in found.files:
        folders.setdefault(path.parent, []).append(path)
    found.files = []
    for folder, files in folders.items():
        names = {re.sub(r"[0-9]+$", "", p.stem) + p.suffix.lower() for p in files}
        numbered = len(files) > 1 and len(names) == 1 and all(p.stem[-1:].isdigit() for p in files)
        if folder != found.folder and numbered and not _moves(files[0]):
            found.files.append(folder)
            found.frames.add(folder)
            continue
        for path in files:
            if path.suffix.lower() in CLIPS:
                found.files.append(path)
            else:
                found.others[path.suffix.lower()] += 1


def _moves(path: Path) -> bool:
    """Whether a file is no still picture: an animated one, a video, or one that cannot be read."""
    from PIL import Image

    if path.suffix.lower() not in STILLS:
        return True
    try:
        with decoding(), Image.open(path, formats=decoders()) as image:
            return getattr(image, "n_frames", 1) > 1
    except OSError:
        return True


def frames_of(folder: Path) -> list[Path]:
    """The frames of a clip that is a folder, in their order."""
    found = [p for p in folder.iterdir() if p.suffix.lower() in STILLS and not hidden(p.name)]
    return sorted(found, key=lambda p: natural(p.name))


def _entries(
    where: Path | str, deep: bool, skipped: list[str], failed: list[OSError]
) -> Iterator[os.DirEntry]:
    """The files of a folder and, with deep, its sub-folders, hidden ones left out; links to folders are named
    and not followed. Folders say themselves what most of their entries are, so that few files are asked.
    """
    try:
        with os.scandir(where) as found:
            entries = [entry for entry in found if not hidden(entry.name)]
    except OSError as error:
        failed.append(error)
        return
    folders = []
    for entry in entries:
        if not _is_folder(entry):
            yield entry
        elif entry.is_symlink():
            skipped.append(f"{named(entry.name)} (a link to a folder)")
        else:
            folders.append(entry)
    for entry in sorted(folders, key=lambda e: natural(e.name)) if deep else ():
        yield from _entries(entry.path, deep, skipped, failed)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _sort_in(found: Listing, entry: os.DirEntry, kinds) -> None:
    """Put one file where it belongs; what is no regular file is named and never opened."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in kinds and suffix != ".txt" and entry.name not in METADATA:
        found.others[suffix or "no suffix"] += suffix not in QUIET
        return
    path = Path(entry.path)
    try:
        if not entry.is_file(follow_symlinks=False):
            check_regular(path)
    except FileNotFoundError:
        found.skipped.append(f"{named(path.name)} (it does not exist)")
        return
    except OSError as error:
        found.skipped.append(f"{named(path.name)} ({error.strerror or error})")
        return
    if path.name in METADATA:
        found.metadata.append(path)
    elif suffix == ".txt":
        found.texts[path.with_suffix("")] = path
    else:
        found.files.append(path)


class Member:
    """A picture that is no file of its own: a row of a table, a member of an archive."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The picture as a message names it."""
        raise NotImplementedError

    def read(self) -> bytes:
        """The encoded picture; an OSError where it cannot be read."""
        raise NotImplementedError


@dataclass
class Samples:
    """Files of a set with what goes with them, in order: captions and labels are None where there is none."""

    listing: Listing
    files: Sequence[Path | Member]
    captions: list[str | None]
    labels: list[str | int | None]
    origin: str = ""
    """where the labels come from: a metadata file, "folders", or nothing"""
    key: str = "data.images"
    """the setting that a message names"""
    fps: float | None = None
    """of clips: the rate at which their frames are taken; None takes each"""

    def chosen(self, index: list[int]) -> "Samples":
        """Some of them."""
        files, captions = [self.files[i] for i in index], [self.captions[i] for i in index]
        labels = [self.labels[i] for i in index]
        return Samples(self.listing, files, captions, labels, self.origin, self.key, self.fps)

    def name(self, i: int) -> str:
        """File i as a message names it."""
        file = self.files[i]
        return named(file.relative_to(self.listing.folder) if isinstance(file, Path) else file.name)

    def paths(self) -> list[Path]:
        """The files of a set that holds nothing else."""
        return [file for file in self.files if isinstance(file, Path)]


def gather(listing: Listing, key: str = "data.images") -> Samples:
    """Captions and labels of a folder's files: metadata first, then .txt files and class folders; key: what a
    UserError names.
    """
    entries = read_metadata(listing.metadata, key)
    captions: list[str | None] = []
    for path in listing.files:
        text = entries[path].text if path in entries else None
        side = listing.texts.get(path if path in listing.frames else path.with_suffix(""))
        if text is None and side is not None:
            text = read_text(side, key, "a text file with the caption").strip()
        captions.append(text)
    labels: list[str | int | None] = [entries[p].label if p in entries else None for p in listing.files]
    origin = ", ".join(p.name for p in listing.metadata) if any(v is not None for v in labels) else ""
    depth = len(listing.folder.parts)
    if not origin and listing.files and all(len(p.parts) > depth + 1 for p in listing.files):
        labels, origin = [p.parts[depth] for p in listing.files], "folders"
    return Samples(listing, listing.files, captions, labels, origin)
