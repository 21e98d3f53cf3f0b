"""Several sources, and what single files of a source may look like: nothing is lost without a word."""

import io
import json
import os
from collections import Counter
from types import SimpleNamespace

import pytest
from PIL import Image, ImageCms

from fastgen.cli.precompute import main as precompute
from fastgen.config.data_section import DataConfig
from fastgen.config.run import shortened, validate
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.data.folders import gather, natural, scan
from fastgen.data.hub_sets import RowPicture, set_samples
from fastgen.data.latents import captions_of, open_latents
from fastgen.data.media import shape_of
from fastgen.data.pictures import read_picture
from fastgen.data.shards import shard_files
from fastgen.data.sources import read_source
from fastgen.data.table_files import table_samples
from fastgen.networks.load import load_teacher

TEACHER = "assets:teachers/tinted-sd"


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of pictures, with captions or without."""

    def make(name, num, captions=True):
        (tmp_path / name).mkdir(parents=True)
        for i in range(num):
            Image.new("RGB", (34, 34), (9 * i, 60, 90)).save(tmp_path / name / f"{i}.png")
            if captions:
                (tmp_path / name / f"{i}.txt").write_text(f"{name} {i}")
        return tmp_path / name

    return make


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(TEACHER)


def config(data, **more):
    return validate({"objective": {"name": "lcm"}, "teacher": {"path": TEACHER}, "data": data, **more})


def share_of_first(data, num_first):
    """The share of 60 drawn samples that come from the first source."""
    windows = data.batches(5, 0, 1, Rng(3), "cpu")
    drawn = Counter(i < num_first for _ in range(12) for i in next(windows)[0].index.tolist())
    return drawn[True] / 60


def test_what_is_encoded_once_keeps_the_weights_of_its_sources(folder, teacher, tmp_path):
    """4 pictures of weight 9, one of them damaged, beside 10 of weight 1."""
    few, many = folder("few", 4), folder("many", 10)
    (few / "3.png").write_bytes(b"no picture")
    file = tmp_path / "two.yaml"
    file.write_text(
        json.dumps({"data": {"images": str(few), "weight": 9, "sources": [{"images": str(many)}]}})
    )
    argv = [
        "--teacher",
        "tinted-sd",
        "--config",
        str(file),
        "--shard_size",
        "5",
        "--out",
        str(tmp_path / "out"),
    ]
    assert precompute(argv) == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["weights"] == [9, 1] and [s["of_sources"] for s in manifest["shards"]] == [
        [3, 1],
        [0, 5],
        [0, 4],
    ]
    data = open_latents(DataConfig(latents=str(tmp_path / "out")), teacher)
    assert len(data) == 13 and share_of_first(data, 3) > 0.8
    with pytest.raises(UserError, match=r"data.limit: found 5 beside encodings of 2 sources"):
        open_latents(DataConfig(latents=str(tmp_path / "out"), limit=5), teacher)


def test_the_first_examples_of_several_sources_are_not_taken_by_a_stage(folder):
    data = {"images": str(folder("a", 2)), "sources": [{"images": str(folder("b", 3))}]}
    stage = {"name": "one", "objective": {"name": "lcm"}, "limit": 3}
    with pytest.raises(UserError, match=r"stages.0.limit: found 3 beside data.sources.*set data.limit"):
        validate({"teacher": {"path": TEACHER}, "data": data, "stages": [stage]})
    whole = validate({"teacher": {"path": TEACHER}, "data": data, "stages": [stage | {"limit": 0}]})
    assert shortened(whole, 2).stages[0].limit == 0


def test_a_source_without_captions_beside_others_is_named(folder, teacher):
    data = {"images": str(folder("a", 2)), "sources": [{"images": str(folder("b", 2, captions=False))}]}
    with pytest.raises(UserError, match=r"data.sources.0.images: no captions, and other sources have them"):
        read_source(config(data).data, teacher.codec, "cpu", True)


def test_a_source_without_labels_is_of_the_null_class(folder, capsys):
    for i in range(10):
        folder(f"classes/{i}", 1, captions=False)
    codec = load_teacher("assets:teachers/digits").codec
    bare = folder("bare", 2, captions=False)
    data = DataConfig(images=str(bare.parent / "classes"), sources=({"images": str(bare)},))
    assert read_source(data, codec, "cpu", True).labels.tolist() == [*range(10), 10, 10]
    assert "warning: data.sources.0.images: no labels" in capsys.readouterr().out
    (bare / "metadata.jsonl").write_text('{"file_name": "0.png", "label": true}\n')
    with pytest.raises(UserError, match=r"data.sources.0.images: .*metadata.jsonl line 1: label is"):
        read_source(data, codec, "cpu", True)


def test_other_settings_need_another_folder_of_encodings(folder, tmp_path, capsys):
    folder("a", 1)
    (tmp_path / "t.csv").write_text("image,short,long\na/0.png,a red dress,a blue boot\n")
    argv = ["--teacher", "tinted-sd", "--data.table", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")]
    assert precompute([*argv, "--data.text_column", "short"]) == 0
    assert precompute([*argv, "--data.text_column", "short"]) == 0
    assert precompute([*argv, "--data.text_column", "long"]) == 2
    assert "was begun with settings" in capsys.readouterr().err
    assert captions_of(tmp_path / "out/shard-00000.safetensors") == ["a red dress"]
    (tmp_path / "a/0.png").write_bytes(b"no picture")
    argv[-1] = str(tmp_path / "other")
    assert precompute([*argv, "--data.text_column", "long", "--data.on_bad_image", "error"]) == 2
    assert "error: data.table: " in capsys.readouterr().err


def test_metadata_is_found_by_any_spelling_of_the_folder(folder, tmp_path, monkeypatch):
    one = folder("one", 2, captions=False)
    (one / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "cap"}\n')
    monkeypatch.chdir(one)
    for spelling in (one, tmp_path / "other/../one", one.parent / "." / "one"):
        (tmp_path / "other").mkdir(exist_ok=True)
        assert gather(scan(spelling)).captions == ["cap", None], spelling


def test_half_a_character_is_replaced(folder, teacher):
    one = folder("one", 2, captions=False)
    (one / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a \\ud83d dress"}\n')
    captions = gather(scan(one)).captions
    assert captions[0] == "a \ufffd dress"
    teacher.codec.prompts(captions[:1])
    (one / "t.jsonl").write_text('{"image": "1.png"}\n{"image": "0.png", "text": "a \\ud83d dress"}\n')
    data = DataConfig(table=str(one / "t.jsonl"))
    assert table_samples(data, data, "data.table").captions == [None, "a \ufffd dress"], (
        "of a column not in line 1"
    )


def test_a_clip_in_a_folder_with_a_dot_has_its_caption(tmp_path):
    (tmp_path / "walk.v2").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(tmp_path / "walk.v2" / f"{i:03d}.png")
    (tmp_path / "walk.v2.txt").write_text("walking")
    assert gather(scan(tmp_path, clips=True)).captions == ["walking"]


@pytest.mark.parametrize("kind", ["tif", "jpg", "png", "webp"])
def test_the_shape_is_that_of_the_turned_picture(kind, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / f"a.{kind}", exif=exif)
    assert shape_of(tmp_path / f"a.{kind}") == read_picture(tmp_path / f"a.{kind}").size[::-1] == (64, 32)


def test_a_palette_has_the_colours_of_its_profile(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = lab.replace(b"rXYZ", b"tmpX", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"tmpX", b"gXYZ", 1)
    profile = profile.replace(
        "sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")
    )  # red and green have changed places
    plain = Image.new("RGB", (4, 4), (200, 30, 60))
    plain.save(tmp_path / "rgb.png", icc_profile=profile)
    plain.quantize(4).save(tmp_path / "palette.png", icc_profile=profile)
    shown = read_picture(tmp_path / "rgb.png").getpixel((0, 0))
    assert shown != (200, 30, 60) and read_picture(tmp_path / "palette.png").getpixel((0, 0)) == shown


def test_an_archive_may_have_a_bracket_in_its_path(tmp_path):
    (tmp_path / "b[1]").mkdir()
    file = tmp_path / "b[1]" / "a.tar"
    file.write_bytes(b"")
    assert shard_files(str(file), "data.shards") == [file]
    assert natural("9" * 5000)[1] == "9" * 5000, "no number of thousands of digits"
    assert natural("2b") < natural("010a") < natural("10b") < natural("a\u00b2"), "which is no number either"


def test_a_row_that_names_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="a pipe, not a file"):
        RowPicture([{"image": str(tmp_path / "pipe.png")}], 0, "image").read()


def test_splits_and_kinds_of_files(tmp_path):
    """A split is a whole word of a name; what is of another one, or another kind of file, is not mixed in."""
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet as parquet

    cache, tmp_path = str(tmp_path / "cache"), tmp_path / "set"
    tmp_path.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "png")
    table = pyarrow.table({"image": [buffer.getvalue()] * 2, "text": ["a", "b"]})

    def found(split="train"):
        source = SimpleNamespace(
            dataset=str(tmp_path), split=split, image_column="", text_column="", label_column=""
        )
        data = SimpleNamespace(cache_dir=cache, on_bad_shard="error", allow_download=False)
        return len(set_samples(source, data, "data.dataset").files)

    parquet.write_table(table, tmp_path / "part-0.parquet")
    assert found() == 2
    with pytest.raises(UserError, match=r"data.split: found 'test'; no file's name says one"):
        found("test")
    for name in ("train-0.parquet", "training_extra.parquet", "test-0.parquet"):
        parquet.write_table(table, tmp_path / name)
    assert found() == found("test") == 2
    with pytest.raises(UserError, match=r"data.split: found 'validation'; there are test, train"):
        found("validation")
    for file in tmp_path.glob("*.parquet"):
        file.unlink()
    with (
        pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as out,
        pyarrow.ipc.new_file(out, table.schema) as writer,
    ):
        writer.write_table(table)
    assert found() == 2, "the file form of arrow"
    parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"data.dataset: .* are of two kinds"):
        found()


def test_weights_hold_in_memory(folder, teacher):
    from fastgen.data.loader import load_data

    data = {"images": str(folder("a", 4)), "weight": 9, "sources": [{"images": str(folder("b", 10))}]}
    assert share_of_first(load_data(config(data).data, teacher, "cpu"), 4) > 0.8
