"""Captions, labels and control images of a user's folder: paired by name, counted, never made up."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fastgen.config.data_section import DataConfig
from fastgen.core.errors import UserError
from fastgen.data.folders import gather, scan
from fastgen.data.loader import load_data
from fastgen.data.sources import Found, control_files, read_source
from fastgen.networks.codecs import Codec, LabelCodec, TextCodec

SIZE = (1, 16, 16)


def pictures(folder, *names, shade=20):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", SIZE[1:], shade * i).save(folder / name)
    return folder


def teacher(num_classes=3, names=None, has_null=True):
    codec = LabelCodec(SIZE, num_classes=num_classes, class_names=names)
    codec.has_null = has_null
    return SimpleNamespace(path="a teacher", codec=codec)


class PlainText(TextCodec):
    """A text codec without an autoencoder and encoders."""

    def __init__(self, family, shape):
        Codec.__init__(self, family, shape)

    def decode(self, x0):
        return x0


def text_codec():
    """As much of a text codec as reading a folder needs."""
    return PlainText(SimpleNamespace(takes_text=True, needs_image=False, temporal=0), SIZE)


def rows_of(folder, some_teacher, pixels=True):
    return load_data(DataConfig(images=str(folder)), some_teacher, pixels=pixels).rows.tolist()


# -- labels -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pixels", [True, False])
def test_classes_from_folders(tmp_path, capsys, pixels):
    pictures(tmp_path, "cat/1.png", "cat/2.png", "ant/1.png", "dog/x/1.png")
    assert rows_of(tmp_path, teacher(), pixels) == [0, 1, 1, 2]
    message = capsys.readouterr().out
    assert "classes from folders: ant is 0, cat is 1, dog is 2" in message and "4 labels" in message
    assert rows_of(tmp_path, teacher(4, ["dog", "Cat", "eel", "ant"]), pixels) == [3, 1, 1, 0], "by name"


def test_numbered_folders_are_the_classes_of_their_numbers(tmp_path):
    pictures(tmp_path, "2/a.png", "10/a.png", "7/a.png")
    assert rows_of(tmp_path, teacher(11)) == [2, 7, 10]
    pictures(tmp_path, *(f"k{i}/a.png" for i in range(1, 12)))
    with pytest.raises(UserError, match=r"14 class folders \('2', '7', '10', 'k1', 'k2' and 9 more\)"):
        rows_of(tmp_path, teacher(11))


def test_classes_that_do_not_fit_are_refused(tmp_path):
    pictures(tmp_path, "train/1.png", "train/2.png")
    with pytest.raises(UserError, match=r"1 class folders \('train'\) for a teacher of 3 classes; name them"):
        rows_of(tmp_path, teacher())


def metadata(folder, *rows, name="metadata.jsonl"):
    (folder / name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))


@pytest.mark.parametrize("labels", [[2, 0, 1], ["dog", "ant", "cat"], ["2", "0", "1"]])
def test_labels_from_metadata(tmp_path, labels):
    pictures(tmp_path, "0.png", "1.png", "2.png")
    metadata(tmp_path, *({"file_name": f"{i}.png", "label": label} for i, label in enumerate(labels)))
    assert rows_of(tmp_path, teacher()) == [2, 0, 1]
    (tmp_path / "metadata.jsonl").unlink()
    lines = [f"{i}.png,{label}" for i, label in enumerate(labels)]
    metadata(tmp_path, "file_name,label", *lines, name="metadata.csv")
    assert rows_of(tmp_path, teacher()) == [2, 0, 1]


def test_a_label_out_of_range_or_missing(tmp_path, capsys):
    pictures(tmp_path, "0.png", "1.png", "2.png")
    metadata(tmp_path, {"file_name": "0.png", "label": 3}, {"file_name": "1.png", "label": 0})
    with pytest.raises(UserError, match="2 labels in metadata.jsonl"):
        rows_of(tmp_path, teacher())
    metadata(tmp_path, {"file_name": "0.png", "label": 2}, {"file_name": "1.png", "label": 0})
    assert rows_of(tmp_path, teacher()) == [2, 0]
    assert "1 skipped: 2.png (no label)" in capsys.readouterr().out
    with pytest.raises(UserError, match="1 of 3 files have no label: 2.png"):
        load_data(DataConfig(images=str(tmp_path), on_bad_image="error"), teacher())


def test_pictures_without_labels_are_of_no_class(tmp_path, capsys):
    pictures(tmp_path, "0.png", "1.png")
    data = load_data(DataConfig(images=str(tmp_path)), teacher())
    assert (
        data.cond(torch.arange(2))["class_labels"].tolist()
        == [3, 3]
        == [int(*data.uncond["class_labels"])] * 2
    )
    assert "no labels for a teacher of 3 classes" in capsys.readouterr().out
    with pytest.raises(UserError, match="no labels for a teacher of 3 classes; one folder a class"):
        rows_of(tmp_path, teacher(has_null=False))
    rows_of(tmp_path, teacher(0)), rows_of(tmp_path, teacher(), pixels=False)
    assert "all 3 classes, evenly" in capsys.readouterr().out


# -- captions -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "lines,wanted",
    [
        (['{"file_name": "0.png", "te'], "line 1: not JSON"),
        ([{"file_name": "0.png", "text": "a"}, "[1]"], "line 2: holds '[1]', not an object"),
        (
            [{"file_name": "0.png", "caption": "a"}],
            "line 1: neither text nor label, but 'file_name, caption'",
        ),
        ([{"text": "a"}], "line 1: no file_name"),
        ([{"file_name": "9.png", "text": "a"}], "line 1: '9.png' does not exist"),
        ([{"file_name": "../0.png", "text": "a"}], "leaves the folder"),
        ([{"file_name": "/etc/passwd", "text": "a"}], "leaves the folder"),
        ([{"file_name": "0.png", "text": 3}], "text is"),
        ([{"file_name": "0.png", "label": True}], "label is"),
        (
            ["", '{"file_name": "0.png", "text": "a", "text": "b"}'],
            "line 2: not usable (a key is given twice)",
        ),
        (['{"a":' + "[" * 100_000], "line 1: not usable (nested too deeply)"),
        (
            [{"file_name": n, "text": "a"} for n in ("0.png", "./0.png")],
            "line 2: './0.png' was already on line 1",
        ),
    ],
)
def test_mistakes_in_metadata_name_file_and_line(tmp_path, lines, wanted):
    metadata(pictures(tmp_path, "0.png"), *lines)
    with pytest.raises(UserError) as error:
        gather(scan(tmp_path))
    message = str(error.value)
    assert wanted in message and "metadata.jsonl" in message and "\n" not in message and len(message) < 400


@pytest.mark.parametrize(
    "lines,wanted",
    [
        (["name,text", "0.png,a"], "line 1: header 'name,text'"),
        (["file_name,text", "0.png,a,b"], "line 2: 3 fields, 2 in the header"),
        (["file_name,text", '0.png,"a'], "not usable"),
        (["file_name,text", "0.png," + "a" * 200_000], "not usable"),
    ],
)
def test_mistakes_in_csv(tmp_path, lines, wanted):
    metadata(pictures(tmp_path, "0.png"), *lines, name="metadata.csv")
    with pytest.raises(UserError) as error:
        gather(scan(tmp_path))
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_where_captions_come_from(tmp_path):
    """Metadata first, wherever it is; .txt files for the others; one kind of metadata a folder."""
    pictures(tmp_path, "0.png", "1.png", "2.PNG", "sub/3.png")
    metadata(tmp_path, "\ufeff" + json.dumps({"file_name": "0.png", "text": "a\u2028b"}, ensure_ascii=False))
    metadata(tmp_path / "sub", "file_name,text", '3.png,"c, d"', name="metadata.csv")
    (tmp_path / "0.txt").write_text("not this")
    (tmp_path / "2.TXT").write_bytes(b"\xef\xbb\xbftwo\r\n")
    assert gather(scan(tmp_path)).captions == ["a\u2028b", None, "two", "c, d"]
    (tmp_path / "metadata.csv").write_text("file_name,text")
    with pytest.raises(UserError, match="metadata.*and metadata.*are both in"):
        gather(scan(tmp_path))


def test_one_caption_of_many_is_missing(tmp_path, capsys):
    pictures(tmp_path, "0.png", "1.png", "2.png")
    metadata(tmp_path, {"file_name": "0.png", "text": "a"}, {"file_name": "2.png", "text": "c"})
    for pixels in (True, False):
        found = read_source(DataConfig(images=str(tmp_path)), text_codec(), "cpu", pixels)
        assert found.captions == ["a", "c"] and found.num == 2
        message = capsys.readouterr().out
        assert "2 captions" in message and "1 skipped: 1.png (no caption)" in message
    assert found.images is None
    with pytest.raises(UserError, match="1 of 3 files have no caption: 1.png"):
        read_source(DataConfig(images=str(tmp_path), on_bad_image="error"), text_codec(), "cpu", True)


def test_the_limit_reads_no_more_pictures_than_it_needs(tmp_path, monkeypatch):
    pictures(tmp_path, *(f"{i}.png" for i in range(12)))
    (tmp_path / "1.png").write_bytes(b"")
    seen = []
    from fastgen.data import media

    real = media.read_image
    monkeypatch.setattr(media, "read_image", lambda path, size: seen.append(path.name) or real(path, size))
    found = read_source(DataConfig(images=str(tmp_path), limit=3), teacher(0).codec, "cpu", True)
    assert len(found.images) == 3 and seen == ["0.png", "1.png", "2.png", "3.png"]


# -- what a teacher would take no notice of -----------------------------------------------------------------
def test_sources_that_a_teacher_has_no_use_for(tmp_path):
    (tmp_path / "p.txt").write_text("a dress")
    for num, kind in ((3, "class labels"), (0, "noise alone")):
        with pytest.raises(UserError, match=f"data.prompts: found .* for a teacher that takes {kind}"):
            load_data(DataConfig(prompts=str(tmp_path / "p.txt")), teacher(num))
    with pytest.raises(UserError, match="data.control: found .* takes no control images"):
        load_data(DataConfig(name="digits", control=str(tmp_path)), teacher())
    with pytest.raises(UserError, match="exact teacher, which draws its own data"):
        exact = SimpleNamespace(path="analytic:gmm2d-flow", codec=teacher().codec)
        load_data(DataConfig(images=str(tmp_path)), exact)


# -- control images -----------------------------------------------------------------------------------------
def shown(control, images=None, total=None):
    own = gather(scan(images)) if images else None
    found = Found(captions=["a"] * (total or 0), samples=own, total=total) if total else Found(samples=own)
    return [p.name for p in control_files(control, found, "X").files]


def test_control_images_by_name_else_by_place(tmp_path, capsys):
    images = pictures(tmp_path / "i", "1.png", "2.png", "10.png")
    control = pictures(tmp_path / "c", "10.jpg", "1.jpg", "2.jpg", "extra.jpg")
    assert shown(control, images) == ["1.jpg", "2.jpg", "10.jpg"]
    (control / "2.jpg").unlink()
    with pytest.raises(UserError, match=r"3 for 3 images \(none named 2\)"):
        shown(control, images)
    other = pictures(tmp_path / "o", "e2.png", "e10.png", "e1.png")
    assert shown(other, images) == ["e1.png", "e2.png", "e10.png"]
    assert "by their order" in capsys.readouterr().out
    pictures(other, "e11.png")
    with pytest.raises(UserError, match="4 for 3 images"):
        shown(other, images)
    assert shown(other, total=4) == ["e1.png", "e2.png", "e10.png", "e11.png"]
    with pytest.raises(UserError, match="4 for 3 prompts"):
        shown(other, total=3)


def test_a_skipped_picture_does_not_shift_the_others(tmp_path):
    images = pictures(tmp_path / "i", "1.png", "2.png", "3.png")
    control = pictures(tmp_path / "c", "a.png", "b.png", "c.png")
    whole = gather(scan(images))
    found = Found(samples=whole.chosen([0, 2]), total=3)
    assert [p.name for p in control_files(control, found, "X").files] == ["a.png", "c.png"]
