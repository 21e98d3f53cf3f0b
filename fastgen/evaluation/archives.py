"""Webdataset archives: .tar files in which a sample's files share their name up to the first dot of it, as
000012.jpg with 000012.txt (caption), 000012.cls (class) or 000012.json ({"caption", "label"}).
"""

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.core.files import sha256
from fastgen.data.folders import named
from fastgen.data.pictures import decode_picture, is_picture, kind_of, to_tensor
from fastgen.data.shards import Members, check_end, picture_of, said, samples_in, shard_files
from fastgen.evaluation.sources import Source, joined, warn_converted


def is_archive(text: str) -> bool:
    """A .tar file, several by shard-{000..010}.tar, or a folder that holds some and no pictures."""
    if text.endswith(".tar"):
        return True
    folder = Path(text).expanduser()
    return folder.is_dir() and any(folder.glob("*.tar")) and not any(map(is_picture, folder.iterdir()))


class Archives(Source):
    """Samples of .tar files in the order they are stored."""

    def __init__(self, files: list[Path], key: str):
        super().__init__(str(files[0]) if len(files) == 1 else f"{len(files)} archives", key)
        self.files = files
        self.names: list[str] = []
        self._told = False
        texts: dict[int, str] = {}
        labels: dict[int, int] = {}
        for archive, name, members in self._samples():
            index = len(self.names)
            self.names.append(name)
            caption, label = said(archive, members, ("caption",), ("label",))
            if caption is not None:
                texts[index] = caption
            if isinstance(label, int):
                labels[index] = label
        if not self.names:
            raise UserError(key, f"{self.name} holds no images", "add png, jpg, webp or other image files")
        num = len(self.names)
        self.captions = [texts[i] for i in range(num)] if len(texts) == num else None
        self.labels = [labels[i] for i in range(num)] if len(labels) == num else None

    def __len__(self) -> int:
        return len(self.names)

    def _samples(self) -> Iterator[tuple[tarfile.TarFile, str, Members]]:
        """(archive, name, files) of each sample that has a picture."""
        for file in self.files:
            try:
                check_end(file)
                with tarfile.open(file, "r:") as archive:
                    for name, members in samples_in(archive):
                        yield archive, name, members
            except (OSError, tarfile.TarError, EOFError) as error:
                found = f"{file} cannot be read ({error})"
                raise UserError(self.key, found, "give a webdataset .tar file") from None

    def _images(self) -> Iterator[tuple[str, Tensor]]:
        seen: Counter = Counter()
        for archive, name, members in self._samples():
            info = picture_of(members)
            file = archive.extractfile(info) if info else None
            data = file.read() if file else b""
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


def archives(text: str, key: str) -> Archives:
    """Opened; a UserError of the first file that is not there."""
    files = shard_files(text, key)
    if missing := [f for f in files if not f.is_file()]:
        raise UserError(
            key, f"{missing[0]} does not exist", "give a webdataset .tar file, or shard-{000..010}.tar"
        )
    return Archives(files, key)
