"""Pictures read when a batch has them: the batches are those of memory, whoever reads ahead and wherever a
run resumes; what is unreadable is replaced the same way every time.
"""

import threading
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fastgen.config.data_section import DataConfig
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.data import sources, streaming
from fastgen.data.loader import load_data
from fastgen.data.order import Order, shared_out
from fastgen.data.streaming import AHEAD, Reader, Stream, StreamedData
from fastgen.networks.codecs import LabelCodec

NUM = 11
CLASSES = ("ant", "bee", "cat")


def folder_of(path, num=NUM):
    for i in range(num):
        (path / CLASSES[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * i + 5).save(path / CLASSES[i % 3] / f"{i}.png")
    return path


def teacher():
    return SimpleNamespace(path="a teacher", codec=LabelCodec((4, 4, 4), 2, 3, list(CLASSES)))


def data_of(folder, stream="always", **settings):
    return load_data(DataConfig(images=str(folder), stream=stream, **settings), teacher())


def drawn(data, num=6, start=0, rng=None, batch=4):
    return [window[0] for window in islice(data.batches(batch, start, 1, rng or Rng(3), "cpu"), num)]


def same(a, b):
    for one, two in zip(a, b, strict=True):
        assert torch.equal(one.index, two.index) and torch.equal(one.noise, two.noise)
        assert torch.equal(one.x0, two.x0) and one.x0.dtype == two.x0.dtype
        assert torch.equal(one.cond["class_labels"], two.cond["class_labels"])


@pytest.mark.parametrize("workers", [0, 1, 3, 16])
def test_batches_are_those_of_memory_for_any_number_of_threads(tmp_path, workers, capsys):
    folder = folder_of(tmp_path)
    kept, streamed = data_of(folder, "never"), data_of(folder, workers=workers)
    assert isinstance(streamed, StreamedData) and not isinstance(kept, StreamedData)
    assert f"{NUM} files, read when a batch has them" in capsys.readouterr().out
    assert len(streamed) == len(kept) == NUM
    same(drawn(streamed), drawn(kept))
    same(drawn(streamed, 3, start=3), drawn(kept)[3:])
    same(drawn(streamed.first(5)), drawn(kept.first(5)))
    assert torch.equal(streamed.x0[:7], kept.x0[:7])
    assert not torch.equal(drawn(kept, rng=Rng(4))[0].index, drawn(kept)[0].index), "the negative"


def test_processes_share_out_the_same_batches(tmp_path):
    data = data_of(folder_of(tmp_path), workers=2)
    whole = drawn(data, 3)
    halves = [drawn(data, 3, rng=Rng(3, rank, 2), batch=2) for rank in (0, 1)]
    for one, a, b in zip(whole, *halves, strict=True):
        assert torch.equal(one.x0, torch.cat([a.x0, b.x0]))


def test_an_unreadable_picture_is_replaced_the_same_way_every_time(tmp_path, capsys):
    folder = folder_of(tmp_path)
    (folder / "bee/1.png").write_bytes(b"no picture")
    runs = [drawn(data_of(folder, workers=w), 9) for w in (0, 3)]
    same(*runs)
    order = [
        p.stem for one in CLASSES for p in sorted((folder / one).glob("*.png"), key=lambda p: int(p.stem))
    ]
    bad = order.index("1")
    seen = torch.cat([b.index for b in runs[0]]).tolist()
    assert bad not in seen and seen.count(bad + 1) > 4, "the next one stands in for it"
    shades = {i: (10 * int(order[i]) + 5) / 127.5 - 1 for i in range(NUM)}
    labels = {i: CLASSES.index(folder_name) for i, folder_name in enumerate(class_of(folder, order))}
    for batch in runs[0]:
        for row, i in enumerate(batch.index.tolist()):
            assert batch.x0[row].unique().tolist() == pytest.approx([shades[i]], abs=1e-6)
            assert int(batch.cond["class_labels"][row]) == labels[i]
    message = capsys.readouterr().err
    assert message.count("bee/1.png cannot be read") == 2, "one line a run"
    with pytest.raises(UserError, match="bee/1.png cannot be read .*on_bad_image skip"):
        drawn(data_of(folder, on_bad_image="error"), 9)


def class_of(folder, order):
    return [next(p for p in folder.rglob(f"{name}.png")).parent.name for name in order]


def test_a_set_without_any_readable_picture_is_refused(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    with pytest.raises(UserError, match="3 in a row cannot be read, such as 0.png"):
        data_of(tmp_path)


class Counting(Reader):
    """Notes what is asked for."""

    def __init__(self, num=1000):
        self.num, self.loads = num, []

    def __len__(self):
        return self.num

    def load(self, i):
        self.loads.append(i)
        return {"images": torch.full((1,), i)}

    def name(self, i):
        return str(i)


def test_no_more_than_a_few_batches_are_ever_held_and_the_threads_end():
    reader = Counting()
    stream = Stream(reader, 3, "skip", "data.images")
    data = StreamedData(stream, lambda x: x.float(), {}, torch.zeros(1000).long(), {}, (1,))
    windows = data.batches(10, 0, 1, Rng(0), "cpu")
    for k in range(20):
        (batch,) = next(windows)
        assert torch.equal(batch.x0[:, 0].long(), batch.index)
        assert len(reader.loads) <= 10 * (k + 1 + AHEAD)
    windows.close()
    for thread in [t for t in threading.enumerate() if t.name.startswith("reader")]:
        thread.join(10)
        assert not thread.is_alive()
    assert len(reader.loads) <= 10 * (20 + AHEAD)


@pytest.mark.parametrize(
    "stream,num,large,shown,wanted",
    [
        ("auto", 9, 100, False, False),
        ("auto", 11, 10**9, False, True),
        ("auto", 9, 99, False, False),
        ("auto", 9, 80, False, True),
        ("auto", 11, 80, True, False),
        ("never", 11, 1, False, False),
        ("always", 1, 10**9, False, True),
    ],
)
def test_large_sets_are_streamed(monkeypatch, stream, num, large, shown, wanted):
    monkeypatch.setattr(sources, "MANY", 10)
    monkeypatch.setattr(sources, "LARGE", large)
    codec = SimpleNamespace(family=SimpleNamespace(name="x"), needs_image=shown)
    assert sources.streams(DataConfig(stream=stream), codec, (1, 3, 3), num) is wanted
    if shown:
        with pytest.raises(UserError, match="data.stream"):
            sources.streams(DataConfig(stream="always"), codec, (1, 3, 3), num)


def test_captions_of_a_large_set_are_encoded_when_a_batch_has_them(monkeypatch):
    class Codec:
        asked: list = []

        def prompts(self, texts):
            self.asked.append(texts)
            return {"states": torch.tensor([[float(len(t))] for t in texts])}

    codec, captions = Codec(), ["x" * i for i in range(1000)]
    later = streaming.EncodedLater(codec, captions)
    stream = Stream(Counting(), 2, "skip", "data.images")
    table = {"states": torch.zeros(1, 1)}
    data = StreamedData(stream, lambda x: x.float(), table, torch.zeros(9).long(), {}, (1,), [""], later)
    (batch,) = next(data.batches(5, 0, 1, Rng(0), "cpu"))
    assert batch.cond["states"][:, 0].tolist() == batch.index.tolist()
    assert batch.texts == [captions[i] for i in batch.index.tolist()]
    assert codec.asked == [batch.texts] and data.encodes_later


# -- the order ----------------------------------------------------------------------------------------------
def test_one_source_is_permuted_afresh_every_epoch():
    order, found = Order([7]), []
    for epoch in range(3):
        generator = torch.Generator().manual_seed((5 * 1_000_003 + epoch) % 2**63)
        found += torch.randperm(7, generator=generator).tolist()
    assert [order(p, 5) for p in range(21)] == found


def test_several_sources_are_drawn_by_their_weights():
    order = Order([4, 12], [3, 1])
    drawn = [order(p, 0) for p in range(16 * 6)]
    counts = [drawn.count(i) for i in range(16)]
    assert counts == [18] * 4 + [2] * 12, "three quarters from the first four, all of them equally often"
    assert [Order([4, 12], [3, 1])(p, 0) for p in (95, 3, 40)] == [drawn[95], drawn[3], drawn[40]]
    assert [order(p, 1) for p in range(16)] != drawn[:16], "the negative: another seed"


@pytest.mark.parametrize("total,weights", [(10, [1, 1, 1]), (10, [98, 1, 1]), (3, [1000, 1, 1]), (7, [2.5])])
def test_shares_add_up(total, weights):
    found = shared_out(total, weights)
    assert sum(found) == total and min(found) >= 1
    assert all(abs(n - total * w / sum(weights)) < 2 for n, w in zip(found, weights))


def test_sources_of_one_config_are_mixed(tmp_path, capsys):
    a, b = folder_of(tmp_path / "a", 4), folder_of(tmp_path / "b", 12)
    more = [{"images": str(b), "weight": 1}]
    runs = []
    for stream in ("always", "never"):
        data = data_of(a, stream, weight=3, sources=more)
        assert len(data) == 16
        runs.append(drawn(data, 4))
        drawn_first = torch.cat([x.index for x in runs[-1]]) < 4
        assert int(drawn_first.sum()) == 12
    same(*runs)
    assert "data.sources.0.images: 12 " in capsys.readouterr().out


def test_caption_dropout_gives_the_null_condition_to_its_share(tmp_path):
    folder = folder_of(tmp_path)
    data, plain = data_of(folder, "never", caption_dropout=0.5), data_of(folder, "never")
    some, all_of = drawn(data, 40), drawn(plain, 40)
    for one, two in zip(some, all_of):
        assert torch.equal(one.noise, two.noise) and torch.equal(one.x0, two.x0)
    labels = torch.cat([b.cond["class_labels"] for b in some])
    own = torch.cat([b.cond["class_labels"] for b in all_of])
    gone = labels == 3
    assert 0.35 < float(gone.float().mean()) < 0.65 and torch.equal(labels[~gone], own[~gone])
    again = torch.cat([b.cond["class_labels"] for b in drawn(data_of(folder, caption_dropout=0.5), 40)])
    assert torch.equal(labels, again), "a function of seed and step, streamed or not"
    without = teacher()
    without.codec.has_null = False
    with pytest.raises(UserError, match="data.caption_dropout"):
        load_data(DataConfig(images=str(folder), caption_dropout=0.1), without)
