"""Aspect-ratio buckets: nearest shape, one size a batch, an order of (seed, step), refusals in one line."""

import math
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fastgen.cli.train import main
from fastgen.config.data_section import DataConfig
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.data.buckets import BucketedData, batches_of, check_fits, nearest, parsed
from fastgen.data.loader import load_data
from fastgen.data.media import shape_of
from fastgen.families.registry import detect
from fastgen.networks.codecs import LabelCodec
from fastgen.networks.load import load_teacher
from tests.training.test_resume import Stop, losses, state, stop_after, write

SIZES = ["8x8", "8x16", "16x8"]
SHAPES = [(20, 20), (40, 20), (21, 20), (20, 40), (20, 44), (20, 39), (40, 22)]
"""width and height of the pictures"""


def folder_of(path):
    path.mkdir(exist_ok=True)
    for i, shape in enumerate(SHAPES):
        Image.new("L", shape, 30 * i + 5).save(path / f"{i}.png")
    return path


def teacher():
    codec = LabelCodec((4, 4, 4), 2)
    codec.family = SimpleNamespace(
        name="a family", has_size=True, square=False, temporal=0, factor=1, divisor=1, needs_image=False
    )
    return SimpleNamespace(path="a teacher", codec=codec)


def data_of(folder, **settings):
    return load_data(DataConfig(images=str(folder), buckets=SIZES, **settings), teacher())


def drawn(data, num, batch=2, rng=None, start=0):
    return [w[0] for w in islice(data.batches(batch, start, 1, rng or Rng(3), "cpu"), num)]


def test_the_nearest_shape_is_taken():
    sizes = parsed(["8x8", "8x16", "16x8"])
    assert [nearest((h, w), sizes) for w, h in SHAPES] == [0, 1, 0, 2, 2, 2, 1]
    assert nearest((1, 1), parsed(["512x768"])) == 0
    half = math.sqrt(2)
    assert (
        nearest((100, round(100 * half) - 1), sizes) == 0
        and nearest((100, round(100 * half) + 1), sizes) == 1
    )


def test_a_picture_that_is_turned_counts_as_it_is_shown(tmp_path):
    image, exif = Image.new("RGB", (30, 10)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    image.save(tmp_path / "b.jpg")
    assert shape_of(tmp_path / "a.jpg") == (30, 10) and shape_of(tmp_path / "b.jpg") == (10, 30)


def test_every_batch_is_of_one_size_and_every_picture_comes_round(tmp_path, capsys):
    data = data_of(folder_of(tmp_path / "p"), workers=2)
    assert isinstance(data, BucketedData) and len(data) == 7 and data.x0 is None
    assert "in buckets, height x width: 2 of 8x8, 2 of 8x16, 3 of 16x8" in capsys.readouterr().out
    wanted = {0: (4, 4), 1: (4, 8), 2: (4, 4), 3: (8, 4), 4: (8, 4), 5: (8, 4), 6: (4, 8)}
    batches = drawn(data, 30)
    for batch in batches:
        assert batch.x0.shape[1:] == batch.noise.shape[1:] == (4, *wanted[int(batch.index[0])])
        assert {wanted[i] for i in batch.index.tolist()} == {tuple(batch.x0.shape[2:])}
        for row, i in enumerate(batch.index.tolist()):
            assert batch.x0[row].unique().tolist() == pytest.approx([(30 * i + 5) / 127.5 - 1], abs=1e-6)
    assert {i for b in batches for i in b.index.tolist()} == set(range(7))
    for workers, start in ((0, 0), (3, 7), (1, 8)):
        again = drawn(data_of(folder_of(tmp_path / "p"), workers=workers), 5, start=start)
        for one, two in zip(again, batches[start:]):
            assert torch.equal(one.index, two.index) and torch.equal(one.x0, two.x0)
            assert torch.equal(one.noise, two.noise)
    whole = drawn(data, 4, batch=2)
    halves = [drawn(data, 4, batch=1, rng=Rng(3, rank, 2)) for rank in (0, 1)]
    for one, a, b in zip(whole, *halves):
        assert torch.equal(one.index, torch.cat([a.index, b.index]))


def test_an_epoch_has_whole_batches_and_repeats_a_small_bucket():
    found = batches_of([[0, 1, 2, 3, 4], [5], [6, 7]], 2, 0, 1)
    assert sorted(map(sorted, found))[2:] == [[5, 5], [6, 7]] and len(found) == 4
    assert found != batches_of([[0, 1, 2, 3, 4], [5], [6, 7]], 2, 1, 1), "another epoch"
    assert found == batches_of([[0, 1, 2, 3, 4], [5], [6, 7]], 2, 0, 1)
    missed = [set(range(5)) - {i for b in batches_of([range(5)], 2, e, 0) for i in b} for e in range(20)]
    assert set().union(*missed) == set(range(5)), "the one that is left out changes"


def test_an_unreadable_picture_is_replaced_by_one_of_its_shape(tmp_path, capsys):
    folder = folder_of(tmp_path / "p")
    good = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(good[:-30])  # its header is whole
    (folder / "1.png").write_bytes(b"no picture")
    data = data_of(folder)
    assert len(data) == 6 and "1 skipped: 1.png" in capsys.readouterr().out
    for batch in drawn(data, 20):
        assert 3 not in batch.index.tolist(), "4.png, after 1.png was left out"
    assert "4.png cannot be read" in capsys.readouterr().err
    with pytest.raises(UserError, match="data.images: 1 unreadable: 1.png"):
        data_of(folder, on_bad_image="error")


@pytest.mark.parametrize(
    "sizes,message",
    [
        (["8x8", "8x80"], "no picture is of the shape of 8x80; leave it out"),
        (["8x9"], "found 8x9; give multiples of 2"),
        (["8*8"], "give sizes as HEIGHTxWIDTH"),
        (["0x8"], "give sizes as HEIGHTxWIDTH"),
        (["8x8", "8x8"], "8x8 is given twice"),
    ],
)
def test_sizes_that_cannot_be(tmp_path, sizes, message):
    with pytest.raises(UserError, match="data.buckets: ") as error:
        load_data(DataConfig(images=str(folder_of(tmp_path / "p")), buckets=sizes), teacher())
    assert message in str(error.value)


def test_buckets_where_they_cannot_be(tmp_path):
    folder = str(folder_of(tmp_path / "p"))
    for given, message in (
        ({"images": folder, "stream": "never"}, "data.stream: found never"),
        ({"images": folder, "sources": [{"images": folder}]}, "found beside data.sources"),
        ({"name": "digits"}, "without pictures of your own"),
    ):
        with pytest.raises(UserError, match=message):
            load_data(DataConfig(**given, buckets=SIZES), teacher())
    for change, message in (({"has_size": False}, "no image size"), ({"square": True}, "square images")):
        codec = teacher().codec
        codec.family = SimpleNamespace(**{**vars(codec.family), **change})
        with pytest.raises(UserError, match=message):
            check_fits([(8, 8)], codec)
    dit = detect({}, {"_class_name": "DiTTransformer2DModel"})
    assert dit.square, "the negative: a family that is"
    gan = {"name": "dmd2", "gan_weight": 0.1}
    for objective, data, message in (
        (gan, {"images": folder}, "the discriminator of dmd2 is made for one size"),
        ({"name": "sft"}, {"latents": folder}, "found beside data.latents"),
        ({"name": "swiftbrush"}, {"images": folder}, "a method that reads no image"),
    ):
        with pytest.raises(UserError, match=message):
            validate({"objective": objective, "data": {"name": "", **data, "buckets": SIZES}})
    fine = {"name": "", "images": folder, "buckets": SIZES}
    validate({"objective": gan | {"disc_mean": True}, "data": fine})


def test_a_run_in_buckets_resumes_bit_exactly(tiny, tmp_path, monkeypatch, no_finish):
    folder = folder_of(tmp_path / "p")
    for i in range(7):
        (folder / f"{i}.txt").write_text(f"a dress {i}")
    size = load_teacher(str(tiny("sd"))).codec.pixels[0]
    sizes = [f"{size}x{size}", f"{size}x{2 * size}", f"{2 * size}x{size}"]
    train = {
        "max_train_steps": 6,
        "train_batch_size": 2,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 9,
        "log_steps": 1,
        "validation_steps": 0,
    }
    values = {
        "teacher": {"path": str(tiny("sd"))},
        "data": {"images": str(folder), "buckets": sizes},
        "objective": {"name": "lcm"},
        "train": train,
    }
    argv = write(tmp_path, values)
    assert main([*argv, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 3)
        main([*argv, str(tmp_path / "cut"), "--data.workers", "0"])
    assert main([*argv, str(tmp_path / "cut"), "--resume"]) == 0
    whole, cut = state(tmp_path / "whole", 6), state(tmp_path / "cut", 6)
    assert all(torch.equal(v, cut[k]) for k, v in whole.items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_sdxl_is_told_the_size_of_the_bucket():
    data = object.__new__(BucketedData)
    data.reader = SimpleNamespace(sizes=[(8, 8), (8, 16)], bucket=[0, 1, 1])
    ids = data._sized({"time_ids": torch.zeros(2, 6), "x": torch.ones(2)}, torch.tensor([2, 0]))["time_ids"]
    assert ids.tolist() == [[8, 16, 0, 0, 8, 16], [8, 8, 0, 0, 8, 8]] and ids.dtype == torch.float32
    assert data._sized({"x": torch.ones(2)}, torch.tensor([0])).keys() == {"x"}
