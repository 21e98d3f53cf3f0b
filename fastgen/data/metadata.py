"""metadata.jsonl and metadata.csv (file_name, text, label), as Hugging Face's imagefolder has them.

Every mistake is one line that names the file and the line.
"""

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastgen.core.errors import UserError
from fastgen.data.text import read_text, shorten, whole

KEY = "data.images"
WANTED = 'each line like {"file_name": "0.png", "text": "a red dress"}, or with "label"'


@dataclass
class Entry:
    """What metadata says of one file."""

    text: str | None
    label: str | int | None
    line: int


def read_metadata(files: list[Path], key: str = KEY) -> dict[Path, Entry]:
    """Entries by the path of the file they are about; key: what a UserError names."""
    folders: dict[Path, Path] = {}
    found: dict[Path, Entry] = {}
    for file in files:
        if file.parent in folders:
            both = f"{folders[file.parent].name} and {file.name} are both in {file.parent}"
            raise UserError(key, both, "keep one of the two")
        folders[file.parent] = file
        table = file.suffix == ".csv"
        rows = csv_rows(file, key, WANTED, "file_name") if table else json_rows(file, key, WANTED)
        for line, row in rows:
            path, entry = _entry(file, line, row, key)
            if path in found:
                first = f"{shorten(row['file_name'])} was already on line {found[path].line}"
                raise _mistake(file, line, first, "name each file once", key)
            found[path] = entry
    return found


def _mistake(file: Path, line: int, found: str, wanted: str = WANTED, key: str = KEY) -> UserError:
    return UserError(key, f"{file} line {line}: {found}", wanted)


def json_rows(file: Path, key: str, wanted: str) -> Iterator[tuple[int, dict]]:
    """Objects of a JSON-lines file with their line numbers; key and wanted are those of a UserError."""

    def once(pairs: list[tuple]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key is given twice")
        return dict(pairs)

    for line, text in enumerate(read_text(file, key, wanted).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=once)
        except json.JSONDecodeError as error:
            what = f"not JSON ({error.msg} at column {error.colno})"
            raise _mistake(file, line, what, wanted, key) from None
        except (ValueError, RecursionError) as error:
            what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise _mistake(file, line, f"not usable ({what[:80]})", wanted, key) from None
        if not isinstance(row, dict):
            what = f"holds {shorten(text.strip(), 40)}, not an object"
            raise _mistake(file, line, what, wanted, key)
        yield line, row


def csv_rows(file: Path, key: str, wanted: str, column: str = "") -> Iterator[tuple[int, dict]]:
    """Rows of a comma-separated file with a header; an empty text is a caption, an empty label is none.

    key and wanted are those of a UserError; column: one that the header must have.
    """
    reader = csv.reader(io.StringIO(read_text(file, key, wanted), newline=""), strict=True)
    wanted = "a header line such as file_name,text and as many fields on every line"
    try:
        header = [name.strip() for name in next(reader, [])]
        if (column and column not in header) or len(set(header)) < len(header):
            raise _mistake(file, 1, f"header {shorten(','.join(header))}", wanted, key)
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                what = f"{len(row)} fields, {len(header)} in the header"
                raise _mistake(file, reader.line_num, what, wanted, key)
            values: dict = dict(zip(header, row))
            if not values.get("label", "").strip():
                values.pop("label", None)
            yield reader.line_num, values
    except csv.Error as error:
        raise _mistake(file, reader.line_num, f"not usable ({error})", wanted, key) from None


def _entry(file: Path, line: int, row: dict, key: str) -> tuple[Path, Entry]:
    """The file a row is about, which must be there, and what it says of it."""

    def wrong(found: str, wanted: str = WANTED) -> UserError:
        return _mistake(file, line, found, wanted, key)

    name, text, label = row.get("file_name"), row.get("text"), row.get("label")
    if not isinstance(name, str) or not name.strip():
        raise wrong("no file_name")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise wrong(f"{shorten(name)} leaves the folder", "a path inside the folder")
    path = file.parent / os.path.normpath(name)
    if not os.path.lexists(path):
        raise wrong(f"{shorten(name)} does not exist", "take the line out, or add the file")
    if text is not None and not isinstance(text, str):
        raise wrong(f"text is {shorten(repr(text), 40)}", "a caption in quotes")
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise wrong(f"label is {shorten(repr(label), 40)}", "a class number or name")
    if text is None and label is None:
        raise wrong(f"neither text nor label, but {shorten(', '.join(map(str, row)))}")
    return path, Entry(text and whole(text).strip(), label.strip() if isinstance(label, str) else label, line)
