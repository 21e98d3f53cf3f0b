"""Webdataset archives: .tar files in which a sample's files share their name up to the first dot of it, as
000012.jpg with 000012.txt (caption), 000012.cls (class) or 000012.json ({"caption", "label"}).
"""

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.core.files import sha256
from fastgen.data.folders import named, natural
from fastgen.data.pictures import decode_picture, formats, kind_of, to_tensor
from fastgen.evaluation.sources import Source, joined, warn_converted

MOST_BYTES = 256 * 2**20
"""of one member"""
SPAN = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_archive(text: str) -> bool:
    """A .tar file, several by shard-{000..010}.tar, or a folder that holds some and no pictures."""
    if text.endswith(".tar"):
        return True
    folder = Path(text).expanduser()
    return folder.is_dir() and any(folder.glob("*.tar"))


def _files(text: str, key: str) -> list[Path]:
    path = Path(text).expanduser()
    if path.is_dir():
        return sorted(path.glob("*.tar"), key=natural)
    span = SPAN.search(text)
    if not span:
        return [path]
    first, last = span.groups()
    numbers = range(int(first), int(last) + 1)
    if len(numbers) > 100_000:
        raise UserError(key, f"{text} names {len(numbers)} files", "give fewer shards")
    return [
        Path(f"{text[: span.start()]}{i:0{len(first)}d}{text[span.end() :]}").expanduser() for i in numbers
    ]


class Archives(Source):
    """Samples of .tar files in the order they are stored."""

    def __init__(self, files: list[Path], key: str):
        super().__init__(str(files[0]) if len(files) == 1 else f"{len(files)} archives", key)
        self.files = files
        self.names: list[str] = []
        self._told = False
        texts: dict[int, str] = {}
        labels: dict[int, int] = {}
        for name, members in self._samples(read_pictures=False):
            index = len(self.names)
            self.names.append(name)
            caption, label = _said(members)
            if caption is not None:
                texts[index] = caption
            if label is not None:
                labels[index] = label
        if not self.names:
            raise UserError(key, f"{self.name} holds no images", "add png, jpg, webp or other image files")
        num = len(self.names)
        self.captions = [texts[i] for i in range(num)] if len(texts) == num else None
        self.labels = [labels[i] for i in range(num)] if len(labels) == num else None

    def __len__(self) -> int:
        return len(self.names)

    def _samples(self, read_pictures: bool = True) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(name, members by suffix), those that have a picture."""
        kinds = formats()
        for file in self.files:
            try:
                _check_end(file)
                with tarfile.open(file, "r:") as archive:
                    yield from _grouped(archive, kinds, read_pictures)
            except (OSError, tarfile.TarError, EOFError) as error:
                found = f"{file} cannot be read ({error})"
                raise UserError(self.key, found, "give a webdataset .tar file") from None

    def _images(self) -> Iterator[tuple[str, Tensor]]:
        seen: Counter = Counter()
        for name, members in self._samples():
            data = next(v for k, v in members.items() if k in formats())
            try:
                seen[kind_of(io.BytesIO(data))] += 1
                image = to_tensor(decode_picture(data))
            except OSError as error:
                found = f"{named(name)} in {self.name} cannot be read ({error})"
                raise UserError(self.key, found, "repair or remove it") from None
            yield named(name), image
        if not self._told:
            warn_converted(self.key, seen, len(self))
            self._told = True

    def digest(self) -> str:
        return joined(sha256(file) for file in self.files)


def _check_end(file: Path) -> None:
    """An OSError of an archive without the two blocks of zeros that end one: tarfile would stop quietly."""
    with open(file, "rb") as opened:
        opened.seek(max(0, file.stat().st_size - 1024))
        if opened.read().strip(b"\0") or file.stat().st_size < 1024:
            raise OSError("it is cut short, or no archive")


def _grouped(archive: tarfile.TarFile, kinds, read_pictures: bool) -> Iterator[tuple[str, dict[str, bytes]]]:
    name = ""
    members: dict[str, bytes] = {}
    for info in archive:
        base, dot, suffix = info.name.rpartition("/")[2].partition(".")
        if not info.isfile() or not dot or not base:
            continue
        key = f"{info.name[: len(info.name) - len(suffix) - 1]}"
        if key != name:
            if any(k in kinds for k in members):
                yield name, members
            name, members = key, {}
        suffix = "." + suffix.lower()
        if info.size > MOST_BYTES:
            raise OSError(f"{info.name} has {info.size / 2**20:.0f} MiB")
        wanted = suffix not in kinds or read_pictures
        found = archive.extractfile(info) if wanted else None
        members[suffix] = found.read() if found else b""
    if any(k in kinds for k in members):
        yield name, members


def _said(members: dict[str, bytes]) -> tuple[str | None, int | None]:
    """Caption and class of a sample."""
    caption: str | None = None
    label: int | None = None
    if ".json" in members:
        try:
            entry = json.loads(members[".json"])
        except (ValueError, RecursionError):
            entry = {}
        if isinstance(entry, dict):
            text, number = entry.get("caption"), entry.get("label")
            caption = text if isinstance(text, str) else None
            label = number if isinstance(number, int) else None
    if ".txt" in members:
        caption = members[".txt"].decode("utf-8", "replace").strip()
    if ".cls" in members and members[".cls"].strip().isdigit():
        label = int(members[".cls"])
    return caption, label


def archives(text: str, key: str) -> Archives:
    """Opened; a UserError of the first file that is not there."""
    files = _files(text, key)
    if missing := [f for f in files if not f.is_file()]:
        raise UserError(
            key, f"{missing[0]} does not exist", "give a webdataset .tar file, or shard-{000..010}.tar"
        )
    return Archives(files, key)
