"""Tables, data sets and archives of a user: every kind gives the same pictures with the same captions; what
is missing, cut short or no picture is named.
"""

import io
import json
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgen.cli.python_api import _kind_of_path
from fastgen.config.data_section import DataConfig
from fastgen.core.errors import UserError
from fastgen.data import packages
from fastgen.data.columns import columns_of
from fastgen.data.labels import drop_missing
from fastgen.data.media import read_files
from fastgen.data.readers import gathered
from fastgen.data.shards import shard_files
from fastgen.data.streaming import PictureReader

NUM = 6
SIZE = (3, 8, 8)


def encoded(i):
    buffer = io.BytesIO()
    Image.new("RGB", (10, 8), (40 * i, 7, 200)).save(buffer, "png")
    return buffer.getvalue()


CAPTIONS = [f"picture {i}" for i in range(NUM)]


def archive(path, numbers, extra=None):
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            files = {f"{i:04d}.png": encoded(i), f"{i:04d}.txt": CAPTIONS[i].encode()}
            files |= {f"{i:04d}.cls": str(i % 2).encode()}
            for name, data in (files if extra is None else extra(i)).items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def made(tmp_path):
    """One set in every layout that needs no package."""
    (tmp_path / "p").mkdir()
    for i in range(NUM):
        (tmp_path / f"p/{i}.png").write_bytes(encoded(i))
    rows = "".join(f"p/{i}.png,{CAPTIONS[i]},{i % 2}\n" for i in range(NUM))
    (tmp_path / "a.csv").write_text("image,caption,label\n" + rows)
    lines = [json.dumps({"path": f"p/{i}.png", "text": CAPTIONS[i], "cls": i % 2}) for i in range(NUM)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for i, (a, b) in enumerate(pairwise((0, 2, NUM))):
        archive(tmp_path / f"s-{i:02d}.tar", range(a, b))
    return tmp_path


@pytest.fixture
def with_arrow(made):
    """The same with parquet files and a saved data set; skipped where `datasets` is not installed."""
    datasets = pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    datasets.disable_progress_bars()
    paths = [f"p/{i}.png" for i in range(NUM)]
    labels = [i % 2 for i in range(NUM)]
    table = pyarrow.table({"file_name": paths, "text": CAPTIONS, "label": labels})
    parquet.write_table(table, made / "paths.parquet")
    pictures = [{"bytes": encoded(i), "path": None} for i in range(NUM)]
    (made / "set").mkdir()
    for i, (a, b) in enumerate(pairwise((0, 4, NUM))):
        rows = [{"image": pictures[j], "text": CAPTIONS[j], "label": labels[j]} for j in range(a, b)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), made / f"set/train-{i}.parquet")
    one = datasets.Dataset.from_dict(
        {"image": [str(made / p) for p in paths], "text": CAPTIONS, "label": labels},
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "text": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["0", "1"]),
            }
        ),
    )
    one.save_to_disk(made / "saved")
    datasets.DatasetDict({"train": one, "test": one.select([1, 0])}).save_to_disk(made / "splits")
    return made


def read(folder, **given):
    """The samples of a source whose paths are in a folder, and their pictures."""
    keys = ("table", "dataset", "shards", "images")
    data = DataConfig(
        **{k: str(folder / v) if k in keys else v for k, v in given.items()}, cache_dir=str(folder / "c")
    )
    key = next(k for k in keys if k in given)
    samples = gathered(data, data, f"data.{key}", False)
    reader = PictureReader([samples], SIZE)
    return samples, torch.stack([reader.load(i)["images"] for i in range(len(reader))])


def check(samples, pictures):
    assert samples.captions == CAPTIONS and [int(v) for v in samples.labels] == [i % 2 for i in range(NUM)]
    assert pictures[:, 0, 4, 4].tolist() == [40 * i for i in range(NUM)] and samples.origin


@pytest.mark.parametrize(
    "given",
    [
        {"table": "a.csv"},
        {"table": "a.jsonl"},
        {"shards": "s-*.tar"},
        {"shards": "s-{00..01}.tar"},
        {"shards": ""},
    ],
    ids=str,
)
def test_layouts_without_a_package(made, given):
    check(*read(made, **given))


@pytest.mark.parametrize(
    "given",
    [
        {"table": "paths.parquet"},
        {"table": "set/train-0.parquet"},
        {"dataset": "set"},
        {"dataset": "saved"},
        {"dataset": "splits"},
    ],
    ids=str,
)
def test_layouts_of_datasets(with_arrow, given):
    samples, pictures = read(with_arrow, **given)
    if given == {"table": "set/train-0.parquet"}:
        assert samples.captions == CAPTIONS[:4] and len(pictures) == 4
        return
    check(samples, pictures)


def test_a_split_of_a_data_set(with_arrow):
    assert read(with_arrow, dataset="splits", split="test")[0].captions == ["picture 1", "picture 0"]
    with pytest.raises(UserError, match="data.split: found 'valid'; there are train, test"):
        read(with_arrow, dataset="splits", split="valid")


def test_columns_are_named(made):
    (made / "b.csv").write_text("shot,words,image\np/0.png,a dog,p/1.png\n")
    samples, pictures = read(made, table="b.csv", image_column="shot", text_column="words")
    assert samples.captions == ["a dog"] and int(pictures[0, 0, 0, 0]) == 0
    assert read(made, table="b.csv")[0].captions == [None]
    with pytest.raises(UserError, match="data.text_column: b.csv has no column 'wrds' .did you mean 'words'"):
        read(made, table="b.csv", text_column="wrds")
    with pytest.raises(UserError, match="set data.sources.1.image_column to one of them"):
        columns_of(DataConfig(), ["a", "b"], "t.csv", "data.sources.1.table")
    archive(made / "j.tar", [0], lambda i: {"0.png": encoded(3), "0.json": b'{"tags": ["one", "two"]}'})
    assert read(made, shards="j.tar", text_column="tags")[0].captions == ["one"]


def test_files_of_a_table_that_are_not_there_are_named(made):
    (made / "a.csv").write_text("image,text\np/0.png,a\np/9.png,b\n" + f"{made / 'p/1.png'},c\n")
    samples, _ = read(made, table="a.csv")
    assert samples.captions == ["a", "c"] and samples.listing.skipped == ["p/9.png (it does not exist)"]


WRONG = [
    ({"table": "a.txt"}, "give a file of one of the kinds .csv, .jsonl, .parquet"),
    ({"table": "none.csv"}, "none.csv is not a file"),
    ({"table": "web.csv"}, "web.csv row 2: .* is an address on the web; download the pictures first"),
    ({"table": "empty.csv"}, "empty.csv has no rows"),
    ({"table": "gap.csv"}, "gap.csv row 2: no path in the column 'image'"),
    ({"shards": "s-{00..02}.tar"}, "s-02.tar cannot be read .it does not exist.; copy it again"),
    ({"shards": "none-*.tar"}, "names no archive"),
    ({"shards": "cut.tar"}, "cut.tar cannot be read .it is cut short, or no archive"),
    ({"shards": "packed.tar"}, "it is compressed"),
]


@pytest.mark.parametrize("given,message", WRONG, ids=[str(g) for g, _ in WRONG])
def test_mistakes_are_one_line(made, given, message):
    (made / "web.csv").write_text("image,text\nhttps://x.org/a.png,b\n")
    (made / "empty.csv").write_text("image,text\n")
    (made / "gap.csv").write_text("image,text\n,b\n")
    (made / "cut.tar").write_bytes((made / "s-01.tar").read_bytes()[:3000])
    with tarfile.open(made / "packed.tar", "w:gz") as tar:
        tar.add(made / "a.csv", "a.csv")
    with pytest.raises(UserError, match=message) as error:
        read(made, **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["pipe:curl x", "https://x.org/a.tar", "s3://b/a-{00..01}.tar"])
def test_commands_and_addresses_are_refused(text):
    with pytest.raises(UserError, match="only files on this disk are read"):
        shard_files(text, "data.shards")


def test_archives_that_are_missing_or_cut_are_skipped_if_asked(made, capsys):
    (made / "s-00.tar").write_bytes((made / "s-00.tar").read_bytes()[:2000])
    with pytest.raises(UserError, match="data.on_bad_shard skip"):
        read(made, shards="s-{00..02}.tar")
    samples, pictures = read(made, shards="s-{00..02}.tar", on_bad_shard="skip")
    assert samples.captions == CAPTIONS[2:] and len(pictures) == 4
    err = capsys.readouterr().err
    assert "s-00.tar is skipped (it is cut short" in err and "s-02.tar is skipped (it does not exist)" in err
    assert len(samples.listing.skipped) == 2


def test_an_archive_that_is_cut_later_is_an_unreadable_picture(made):
    samples, _ = read(made, shards="s-00.tar")
    (made / "s-00.tar").write_bytes((made / "s-00.tar").read_bytes()[:530])
    with pytest.raises(OSError, match="cut short"):
        PictureReader([samples], SIZE).load(0)


def test_parquet_files_that_are_cut_are_fatal_or_skipped(with_arrow, capsys):
    file = with_arrow / "set/train-0.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="train-0.parquet cannot be read .*data.on_bad_shard skip"):
        read(with_arrow, dataset="set")
    assert read(with_arrow, dataset="set", on_bad_shard="skip")[0].captions == CAPTIONS[4:]
    assert "train-0.parquet is skipped" in capsys.readouterr().err
    with pytest.raises(UserError, match="train-0.parquet cannot be read"):
        read(with_arrow, table="set/train-0.parquet")


def test_data_sets_that_are_not_there(with_arrow):
    (with_arrow / "nothing").mkdir()
    with pytest.raises(UserError, match="holds neither a saved data set nor parquet or arrow files"):
        read(with_arrow, dataset="nothing")
    for name, message in (("owner/set", "data.allow_download true"), ("./set", "is not a folder")):
        data = DataConfig(dataset=name)
        with pytest.raises(UserError, match=message) as error:
            gathered(data, data, "data.dataset", False)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [{"dataset": "set"}, {"table": "a.parquet"}], ids=str)
def test_a_missing_package_is_one_line(made, given, monkeypatch):
    (made / "a.parquet").write_bytes(b"")
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'which is not installed; pip install "fastgen-distill\[data\]"'):
        read(made, **given)


def test_clips_are_read_from_folders(made):
    data = DataConfig(shards=str(made))
    with pytest.raises(UserError, match="clips are read from a folder"):
        gathered(data, data, "data.shards", True)


def test_paths_of_a_source_are_expanded(made, monkeypatch):
    monkeypatch.setenv("HOME", str(made))
    assert Path(DataConfig(table="~/a.csv").table).is_file()


def test_messages_name_the_setting_that_was_given(made):
    (made / "a.csv").write_text("image,text\np/0.png,\np/1.png,b\n")
    (made / "a.jsonl").write_text(json.dumps({"image": "p/0.png"}))
    data = DataConfig(table=str(made / "a.jsonl"), on_bad_image="error")
    samples = gathered(data, data, "data.sources.1.table", False)
    with pytest.raises(UserError, match="data.sources.1.table: 1 of 1 files have no caption: p/0.png"):
        drop_missing(samples.captions, samples, "error", "caption")
    (made / "p/0.png").write_bytes(b"x")
    with pytest.raises(UserError, match="data.sources.1.table: 1 unreadable: p/0.png"):
        read_files(samples, SIZE, "error")


@pytest.mark.parametrize(
    "path,key",
    [
        ("a.csv", "table"),
        ("s-00.tar", "shards"),
        ("x.txt", "prompts"),
        ("p", "images"),
        ("saved", "dataset"),
        ("latents", "latents"),
    ],
)
def test_a_path_in_python_is_of_its_kind(made, path, key):
    for name, file in (("saved", "dataset_info.json"), ("latents", "manifest.json")):
        (made / name).mkdir()
        (made / name / file).write_text("{}")
    assert _kind_of_path(str(made / path)) == key
