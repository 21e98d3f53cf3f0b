"""Tables with a row for each picture: csv, jsonl, parquet. A picture is a path, beside the table or absolute;
addresses on the web are refused. A parquet file that holds the pictures themselves is read as a data set.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from fastgen.core.errors import UserError, first_line
from fastgen.data.columns import Columns, as_caption, as_label, columns_of
from fastgen.data.folders import Listing, Samples, named
from fastgen.data.hub_sets import parquet_samples
from fastgen.data.metadata import csv_rows, json_rows
from fastgen.data.packages import needed
from fastgen.data.text import shorten

KINDS = (".csv", ".jsonl", ".parquet")
WANTED = "a row for each picture, such as image,text and a/0.png,a red dress"


def check_table(path: Path, key: str) -> None:
    """A UserError unless the path is a table that is there."""
    if path.suffix.lower() not in KINDS:
        raise UserError(key, f"found {path}", f"give a file of one of the kinds {', '.join(KINDS)}")
    if not path.is_file():
        raise UserError(key, f"{path} is not a file", WANTED)
    if path.suffix.lower() == ".parquet":
        needed("pyarrow", key)


def table_samples(source, data, key: str) -> Samples:
    """The pictures that a table names."""
    path = Path(source.table).expanduser()
    check_table(path, key)
    if path.suffix.lower() == ".parquet":
        names, images = _parquet_columns(path, key)
        columns = columns_of(source, names, path.name, key)
        if not images[columns.image]:
            return parquet_samples([path], source, data, key)
        rows = _parquet_rows(path, [c for c in vars(columns).values() if c], key)
        return _paths(path, rows, columns, key)
    read = csv_rows if path.suffix.lower() == ".csv" else json_rows
    lines = list(read(path, key, WANTED))
    if not lines:
        raise UserError(key, f"{path} has no rows", WANTED)
    names = list(dict.fromkeys(name for _, row in lines for name in row))  # a line may lack some
    return _paths(path, iter(lines), columns_of(source, names, path.name, key), key)


def _paths(table: Path, rows: Iterator[tuple[int, dict]], columns: Columns, key: str) -> Samples:
    """Pictures by their paths; those that do not exist are skipped by name."""
    listing = Listing(table.parent)
    captions: list[str | None] = []
    labels: list[str | int | None] = []
    for line, row in rows:
        name = row.get(columns.image)
        if not isinstance(name, str) or not name.strip():
            raise UserError(key, f"{table} row {line}: no path in the column {columns.image!r}", WANTED)
        if "://" in name:
            found = f"{table} row {line}: {shorten(name)} is an address on the web"
            raise UserError(key, found, "download the pictures first; nothing is fetched while training")
        path = table.parent / name
        if not os.path.isfile(path):
            listing.skipped.append(f"{named(name)} (it does not exist)")
            continue
        listing.files.append(path)
        captions.append(as_caption(row.get(columns.text)))
        labels.append(as_label(row.get(columns.label)))
    origin = table.name if any(value is not None for value in labels) else ""
    return Samples(listing, listing.files, captions, labels, origin)


def _parquet_columns(path: Path, key: str) -> tuple[list[str], dict[str, bool]]:
    """The columns of a parquet file, and which of them hold text."""
    import pyarrow.parquet as parquet
    import pyarrow.types as types

    try:
        schema = parquet.read_schema(path)
    except (OSError, ValueError) as error:
        found = f"{path} cannot be read ({first_line(error)[:120]})"
        raise UserError(key, found, "copy the file again") from None
    text = (types.is_string, types.is_large_string)
    return schema.names, {field.name: any(is_(field.type) for is_ in text) for field in schema}


def _parquet_rows(path: Path, columns: list[str], key: str) -> Iterator[tuple[int, dict]]:
    """Rows of some columns, with their numbers."""
    import pyarrow.parquet as parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (OSError, ValueError) as error:
        found = f"{path} cannot be read ({first_line(error)[:120]})"
        raise UserError(key, found, "copy the file again") from None
