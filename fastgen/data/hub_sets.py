"""Data sets of Hugging Face's `datasets`: saved folders, parquet and arrow files, hub ids. Rows are mapped
from the disk, so that only those in use take memory.
"""

import re
from pathlib import Path
from typing import Any

from fastgen.core.errors import UserError, first_line, warn
from fastgen.data.columns import as_caption, as_label, columns_of
from fastgen.data.folders import Listing, Member, Samples
from fastgen.data.packages import needed
from fastgen.data.pictures import check_regular

SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
"""names of splits that a file may begin with; the first is the usual one"""
COPY = "copy the file again, or set data.on_bad_shard skip"


class RowPicture(Member):
    """The picture in one row of a data set."""

    __slots__ = ("rows", "at", "column")

    def __init__(self, rows: Any, at: int, column: str):
        self.rows, self.at, self.column = rows, at, column

    @property
    def name(self) -> str:
        return f"row {self.at}"

    def read(self) -> bytes:
        value = self.rows[self.at][self.column]
        if isinstance(value, dict):  # {"bytes", "path"} of an image feature
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            check_regular(value)
            value = Path(value).read_bytes()
        if not value:
            raise OSError("the row has no picture")
        return value


def check_set(name: str, key: str) -> None:
    """A UserError of what is neither a folder nor the form of a hub id, or without the package."""
    needed("datasets", key)
    away = name.count("/") > 1 or name.startswith((".", "/", "~"))
    if away and not Path(name).expanduser().is_dir():
        raise UserError(key, f"{name} is not a folder", "give a folder, or a hub id (OWNER/NAME)")


def set_samples(source, data, key: str) -> Samples:
    """The pictures of data.dataset: a folder on this disk, or a data set of the hub."""
    check_set(source.dataset, key)
    import datasets

    datasets.disable_progress_bars()
    folder = Path(source.dataset).expanduser()
    if not folder.is_dir():
        return _samples(_from_hub(source, data, key), source, source.dataset, key, Listing(Path()))
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        try:
            found = datasets.load_from_disk(str(folder))
        except Exception as error:  # whatever arrow and the reader raise on damaged files
            raise _unreadable(folder, error, key) from None
        return _samples(_split(found, source, key), source, str(folder), key, Listing(folder))
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".parquet", ".arrow"))
    if not files:
        found = f"{folder} holds neither a saved data set nor parquet or arrow files"
        raise UserError(key, found, "give a folder that `save_to_disk` wrote, or a hub id")
    return parquet_samples(_of_split(folder, files, source.split, key), source, data, key)


def _of_split(folder: Path, files: list[Path], split: str, key: str) -> list[Path]:
    """The files of a split, by their names or that of a sub-folder; all where no name says one and the split
    is the usual one.
    """
    names = {p: {re.split(r"[-_.]", p.name)[0], *p.relative_to(folder).parts[:-1]} for p in files}
    own = [p for p in files if split in names[p]]
    others = sorted({name for found in names.values() for name in found if name in SPLITS} - {split})
    if not own and (others or split != SPLITS[0]):
        there = f"there are {', '.join(others)}" if others else f"no file's name says one; use {SPLITS[0]}"
        raise UserError(f"{key.rpartition('.')[0]}.split", f"found {split!r}", there)
    return own or files


def _split(found: Any, source, key: str) -> Any:
    """The split that a source names, of a data set that has several."""
    if not isinstance(found, dict):
        return found
    if source.split not in found:
        section, splits = key.rpartition(".")[0], ", ".join(found)
        raise UserError(f"{section}.split", f"found {source.split!r}", f"there are {splits}")
    return found[source.split]


def _from_hub(source, data, key: str) -> Any:
    """A split of a data set of the hub, from the local cache unless its download is allowed."""
    import datasets

    name = source.dataset
    config = datasets.DownloadConfig(local_files_only=not data.allow_download)
    try:
        return datasets.load_dataset(name, split=source.split, download_config=config)
    except Exception as error:  # network, hub and builders raise errors of many types
        where = "" if data.allow_download else " in the local cache"
        found = f"{name} is no folder, and no data set{where} ({first_line(error)[:100]})"
        way = "check the name" if data.allow_download else "data.allow_download true downloads it"
        raise UserError(key, found, way) from None


def parquet_samples(files: list[Path], source, data, key: str) -> Samples:
    """The pictures in parquet or arrow files; files that cannot be read are fatal or skipped by name."""
    needed("datasets", key)
    import datasets

    datasets.disable_progress_bars()
    listing, sound = Listing(files[0].parent), []
    for file in files:
        if not (reason := _damage(file)):
            sound.append(str(file))
            continue
        if data.on_bad_shard == "error":
            raise UserError(key, f"{file} cannot be read ({reason})", COPY)
        warn(f"{key}: {file.name} is skipped ({reason})")
        listing.skipped.append(f"{file.name} ({reason})")
    if not sound:
        raise UserError(key, f"none of {len(files)} files in {listing.folder} can be read", "copy them again")
    kind = sound[0].rpartition(".")[2]
    if others := [file for file in sound if not file.endswith(kind)]:
        found = f"{sound[0]} and {others[0]} are of two kinds"
        raise UserError(key, found, "keep the parquet files or the arrow files")
    try:
        found = datasets.load_dataset(kind, data_files=sound, split="train", cache_dir=data.cache_dir or None)
    except Exception as error:  # files of different columns, a full disk
        raise _unreadable(listing.folder, error, key) from None
    return _samples(found, source, str(listing.folder), key, listing)


def _damage(file: Path) -> str:
    """Why a file cannot be read, by its head and end; empty if it can."""
    import pyarrow

    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as parquet

            parquet.read_metadata(file)
        else:
            with pyarrow.memory_map(str(file)) as opened:
                whole = opened.read(6) == b"ARROW1"  # a file of its own, not a stream
                opened.seek(0)
                (pyarrow.ipc.open_file if whole else pyarrow.ipc.open_stream)(opened).schema  # noqa: B018
    except (OSError, ValueError) as error:
        return first_line(error)[:80]
    return ""


def _unreadable(folder: Path, error: Exception, key: str) -> UserError:
    return UserError(key, f"{folder} cannot be read ({first_line(error)[:120]})", "copy its files again")


def _samples(found: Any, source, where: str, key: str, listing: Listing) -> Samples:
    """The rows of a data set with their captions and classes."""
    import datasets

    columns = columns_of(source, found.column_names, where, key)
    rows = found.select_columns([columns.image])
    if isinstance(found.features[columns.image], datasets.Image):
        rows = rows.cast_column(columns.image, datasets.Image(decode=False))
    num = len(found)
    captions: list[str | None] = [None] * num
    labels: list[str | int | None] = [None] * num
    if columns.text:
        captions = [as_caption(v) for v in found.select_columns([columns.text])[:][columns.text]]
    if columns.label:
        labels = [as_label(v) for v in found.select_columns([columns.label])[:][columns.label]]
        feature = found.features[columns.label]
        if isinstance(feature, datasets.ClassLabel):  # names say which class is meant, numbers do not
            labels = [feature.names[v] if isinstance(v, int) and v >= 0 else None for v in labels]
    pictures = [RowPicture(rows, i, columns.image) for i in range(num)]
    origin = f"the column {columns.label}" if any(v is not None for v in labels) else ""
    return Samples(listing, pictures, captions, labels, origin)
