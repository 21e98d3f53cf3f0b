"""Where a user's pictures stand: a folder, a table of paths, a data set of Hugging Face's `datasets`,
archives. Each is a list of pictures with their captions and classes, none of them decoded.
"""

from pathlib import Path

from fastgen.core.errors import UserError
from fastgen.data.folders import Samples, gather, scan
from fastgen.data.hub_sets import check_set, set_samples
from fastgen.data.kinds import kind_of_source
from fastgen.data.shards import check_shards, shard_samples
from fastgen.data.table_files import check_table, table_samples

READERS = {"table": table_samples, "dataset": set_samples, "shards": shard_samples}


def gathered(source, data, key: str, clips: bool) -> Samples:
    """The pictures (or clips) of one source; data: the data section, for what goes for all its sources; key:
    what a UserError names.
    """
    kind = kind_of_source(source)
    if kind != "images" and clips:
        raise UserError(key, "given for a teacher of clips", "clips are read from a folder: data.images")
    folder = kind == "images"
    samples = (
        gather(scan(Path(source.images), clips, key), key) if folder else READERS[kind](source, data, key)
    )
    samples.fps = data.fps
    samples.key = key
    return samples


def check_named(source, key: str) -> None:
    """Refuse a table, archives or a data set that are not there, without reading them."""
    if source.table:
        check_table(Path(source.table).expanduser(), f"{key}.table")
    if source.shards:
        check_shards(source.shards, f"{key}.shards")
    if source.dataset:
        check_set(source.dataset, f"{key}.dataset")
