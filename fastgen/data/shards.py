"""Webdataset archives on this disk: .tar files in which a sample's files share their name up to the first dot
of it, as 000012.jpg with 000012.txt (caption), 000012.cls (class) or 000012.json ({"caption", "label"}).

An archive is gone through once, header by header, to find where its pictures stand; a batch then reads the
bytes of its own. So samples come in any order, and what is cut short is seen before the first step.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path

from fastgen.core.errors import UserError, warn
from fastgen.data.columns import as_caption, as_label, names_of
from fastgen.data.folders import Listing, Member, Samples, named, natural
from fastgen.data.pictures import formats

MOST_BYTES = 256 * 2**20
"""of one member"""
SPAN = re.compile(r"\{(\d+)\.\.(\d+)\}")
WANTED = "give a .tar file, a folder of them, my/train-*.tar or my/train-{000..063}.tar"
Members = dict[str, tarfile.TarInfo]
"""files of one sample by lower-case suffix"""


class TarPicture(Member):
    """A picture in an archive, by its place there."""

    __slots__ = ("file", "start", "size", "member")

    def __init__(self, file: Path, info: tarfile.TarInfo):
        self.file, self.start, self.size, self.member = file, info.offset_data, info.size, info.name

    @property
    def name(self) -> str:
        return f"{self.file.name}: {self.member}"

    def read(self) -> bytes:
        with open(self.file, "rb") as opened:
            opened.seek(self.start)
            data = opened.read(self.size)
        if len(data) < self.size:
            raise OSError("the archive is cut short")
        return data


def shard_files(text: str, key: str) -> list[Path]:
    """The archives that a path, a folder, a pattern or a span names; those of a span need not be there."""
    if text.startswith("pipe:") or "://" in text:
        what = "a command" if text.startswith("pipe:") else "an address on the web"
        found = f"{text[:80]} is {what}, and only files on this disk are read"
        raise UserError(key, found, f"copy the archives first, then {WANTED}")
    path = Path(text).expanduser()
    if path.is_dir():
        return sorted(path.glob("*.tar"), key=natural)
    if path.is_file():  # whatever its name
        return [path]
    if span := SPAN.search(text):
        first, last = span.groups()
        numbers = range(int(first), int(last) + 1)
        if len(numbers) > 100_000:
            raise UserError(key, f"{text} names {len(numbers)} files", "give fewer shards")
        names = (f"{text[: span.start()]}{i:0{len(first)}d}{text[span.end() :]}" for i in numbers)
        return [Path(name).expanduser() for name in names]
    if any(c in text for c in "*?["):
        return sorted(map(Path, glob(str(path))), key=natural)
    return [path]


def check_shards(text: str, key: str) -> list[Path]:
    """The archives of a source, at least one."""
    files = shard_files(text, key)
    if not files:
        raise UserError(key, f"{text} names no archive", WANTED)
    return files


def check_end(file: Path) -> None:
    """An OSError of an archive without the two blocks of zeros that end one: tarfile would stop quietly."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        if opened.read(3).startswith((b"\x1f\x8b", b"BZh", b"\xfd7z")):
            raise OSError("it is compressed; unpack it to a plain .tar")
        opened.seek(max(0, size - 1024))
        if opened.read().strip(b"\0") or size < 1024:
            raise OSError("it is cut short, or no archive")


def samples_in(archive: tarfile.TarFile) -> Iterator[tuple[str, Members]]:
    """(name, files) of each sample that has a picture, in the order they are stored."""
    name = ""
    members: Members = {}
    for info in archive:
        archive.members = []  # type: ignore[attr-defined]  # it would keep them all
        base, dot, suffix = info.name.rpartition("/")[2].partition(".")
        if not info.isfile() or not dot or not base:
            continue
        sample = info.name[: len(info.name) - len(suffix) - 1]
        if sample != name:
            if picture_of(members):
                yield name, members
            name, members = sample, {}
        if info.size > MOST_BYTES:
            raise OSError(f"{info.name} has {info.size / 2**20:.0f} MiB")
        members["." + suffix.lower()] = info
    if picture_of(members):
        yield name, members


def picture_of(members: Members) -> tarfile.TarInfo | None:
    """The picture of a sample."""
    return next((info for suffix, info in members.items() if suffix in formats()), None)


def said(
    archive: tarfile.TarFile, members: Members, texts: tuple[str, ...], labels: tuple[str, ...]
) -> tuple[str | None, str | int | None]:
    """Caption and class of a sample; texts, labels: keys of its .json that may hold them."""

    def content(suffix: str) -> bytes | None:
        found = archive.extractfile(members[suffix]) if suffix in members else None
        return found.read() if found else None

    caption: str | None = None
    label: str | int | None = None
    if entry := content(".json"):
        try:
            values = json.loads(entry)
        except (ValueError, RecursionError):
            values = {}
        if isinstance(values, dict):
            caption = next((c for k in texts if (c := as_caption(values.get(k))) is not None), None)
            label = next((v for k in labels if (v := as_label(values.get(k))) is not None), None)
    if (text := content(".txt")) is not None:
        caption = text.decode("utf-8", "replace").strip()
    if (number := (content(".cls") or b"").strip()).isdigit() and len(number) < 1000:
        label = int(number)
    return caption, label


def shard_samples(source, data, key: str) -> Samples:
    """The pictures of data.shards; archives that are missing or cut short are fatal or skipped by name."""
    files = check_shards(source.shards, key)
    listing = Listing(files[0].parent)
    pictures: list[Member] = []
    captions: list[str | None] = []
    labels: list[str | int | None] = []
    names = names_of(source, "text"), names_of(source, "label")
    for file in files:
        try:
            found = list(_indexed(file, *names))
        except (OSError, tarfile.TarError, EOFError) as error:
            reason = "it does not exist" if isinstance(error, FileNotFoundError) else str(error)[:100]
            if data.on_bad_shard == "error":
                way = "copy it again, or set data.on_bad_shard skip"
                raise UserError(key, f"{file} cannot be read ({reason})", way) from None
            warn(f"{key}: {named(file.name)} is skipped ({reason})")
            listing.skipped.append(f"{named(file.name)} ({reason})")
            continue
        for picture, caption, label in found:
            pictures.append(picture)
            captions.append(caption)
            labels.append(label)
    origin = "the archives" if any(v is not None for v in labels) else ""
    return Samples(listing, pictures, captions, labels, origin)


def _indexed(file: Path, texts: tuple[str, ...], labels: tuple[str, ...]) -> Iterator:
    check_end(file)
    with tarfile.open(file, "r:") as archive:
        for _, members in samples_in(archive):
            info = picture_of(members)
            assert info is not None, "a sample has a picture"
            yield TarPicture(file, info), *said(archive, members, texts, labels)
