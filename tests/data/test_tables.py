"""Tables made part by part: the same numbers in memory and in a file, of which only used rows take memory."""

import os
import tempfile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.prompts import prompts
from fastgen.data import tables

NUM = 7


def parts():
    """Three parts of tables of several types, sizes and ranks."""
    torch.manual_seed(0)
    whole = {
        "states": torch.randn(NUM, 3, 5),
        "mask": torch.rand(NUM, 3) > 0.5,
        "pooled": torch.randn(NUM, 5).bfloat16(),
        "ids": torch.arange(NUM),
        "guidance": torch.rand(NUM),
    }
    return [{k: v[i : i + 3] for k, v in whole.items()} for i in range(0, NUM, 3)], whole


def same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in wanted.items())


def test_a_file_holds_what_memory_would(tmp_path):
    some, whole = parts()
    same(tables.joined(NUM, some), whole)
    tables.write(tmp_path / "a.safetensors", NUM, some)
    same(load_file(tmp_path / "a.safetensors"), whole)
    same(tables.mapped(tmp_path / "a.safetensors"), whole)


def test_the_checksum_is_of_the_content_whoever_wrote_it(tmp_path):
    some, whole = parts()
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tables.write(a, NUM, some)
    save_file(whole, b)
    assert tables.recorded_checksum(a) == tables.checksum(a) == tables.checksum(b)
    save_file(whole | {"ids": whole["ids"] + 1}, b)
    assert tables.checksum(b) != tables.checksum(a)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files, with every table as large as goes into one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tables, "LARGE", 1)
    return tmp_path


def test_a_large_table_goes_to_a_file_that_is_gone(temporary, monkeypatch):
    some, whole = parts()
    written = []
    monkeypatch.setattr(tables, "mapped", lambda path, own=tables.mapped: written.append(path) or own(path))
    found = tables.made(NUM, lambda: some)
    assert len(written) == 1 and os.listdir(temporary) == []
    same(found, whole)
    found["ids"][0] = 9  # as any other tensor
    assert found["ids"][0] == 9


def test_without_room_it_stays_in_memory(temporary, monkeypatch, capsys):
    some, whole = parts()
    monkeypatch.setattr(tables, "mapped", None)
    monkeypatch.setattr(tables.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    same(tables.made(NUM, lambda: some), whole)
    monkeypatch.undo()


def test_a_disk_that_fills_meanwhile_costs_time_only(temporary, monkeypatch, capsys):
    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    some, whole = parts()
    monkeypatch.setattr(tables, "write", full)
    same(tables.made(NUM, lambda: some), whole)
    assert "it is made again in memory" in capsys.readouterr().err and os.listdir(temporary) == []


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_rows_that_are_not_used_take_no_memory(temporary, monkeypatch):
    rows = torch.ones(1000, 4096)  # 16 MB a part, 256 MB in all
    before = resident()
    found = tables.made(16_000, lambda: ({"x0": rows} for _ in range(16)))
    assert resident() - before < 80e6 and found["x0"][[5, 15_999]].sum() == 2 * 4096
    assert resident() - before < 80e6
    monkeypatch.setattr(tables, "LARGE", 2**40)
    again = tables.made(16_000, lambda: ({"x0": rows} for _ in range(16)))
    assert resident() - before > 250e6 and torch.equal(again["x0"][:9], found["x0"][:9])


@pytest.mark.slow
def test_a_hundred_thousand_prompts():
    """Libraries and all, with and without a cache; their table alone is 410 MB."""
    found = prompts()
    for name in ("no_cache", "making_cache", "from_cache"):
        grown = found[name]["peak_megabytes"] - found[name]["before_the_prompts"]["peak_megabytes"]
        assert found[name]["table_megabytes"] == 410 and grown < 150, (name, found[name])
        assert found[name]["peak_megabytes"] < 1200, (name, found[name])
