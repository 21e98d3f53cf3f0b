"""Caches are made of content, checked when read, and cost no run its life."""

import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgen.core.errors import UserError
from fastgen.data import cache


@pytest.fixture
def made(tmp_path):
    """(read the cache, how often it was made, its file)."""
    count = []

    def make():
        count.append(1)
        return ({"x0": part} for part in torch.arange(12.0).reshape(4, 3).split(3))

    def read():
        found = cache.kept(str(tmp_path), "latents-a", 4, make)["x0"]
        assert torch.equal(found, torch.arange(12.0).reshape(4, 3))
        return len(count)

    assert read() == read() == 1
    return read, tmp_path / "latents-a.safetensors"


def damage(kind, file):
    data = file.read_bytes()
    if kind == "cut":
        file.write_bytes(data[:-8])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "a bit":
        file.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    elif kind == "fewer rows":
        save_file({"x0": load_file(file)["x0"][:2]}, file)
    elif kind == "no checksum":
        save_file(load_file(file), file)


@pytest.mark.parametrize("kind", ["cut", "empty", "a bit", "fewer rows", "no checksum"])
def test_a_damaged_file_is_made_again(made, kind, capsys):
    read, file = made
    damage(kind, file)
    assert read() == 2 and read() == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "data.cache_dir: latents-a.safetensors is damaged (" in message
    assert os.listdir(file.parent) == [file.name], "nothing else is left"


def test_a_full_disk_costs_the_cache_only(made, monkeypatch, capsys):
    read, file = made
    file.unlink()

    def full(path, *rest):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.tables, "write", full)
    assert read() == 3 and os.listdir(file.parent) == []
    assert "was not written (the disk is full); the run goes on without it" in capsys.readouterr().err


def test_a_disk_without_room_is_seen_before_anything_is_written(made, monkeypatch, capsys):
    read, file = made
    file.unlink()
    monkeypatch.setattr(cache.tables.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    assert read() == 3 and os.listdir(file.parent) == []
    assert "was not written (the disk is full)" in capsys.readouterr().err


def test_an_error_while_it_is_made_leaves_no_file(tmp_path):
    def broken():
        yield {"x0": torch.zeros(2, 3)}
        raise RuntimeError("encoder")

    with pytest.raises(RuntimeError, match="encoder"):
        cache.kept(str(tmp_path), "latents-a", 4, broken)
    assert os.listdir(tmp_path) == []


def test_a_cache_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/inner"):
        with pytest.raises(UserError, match="data.cache_dir"):
            cache.check_folder(str(path))
    cache.check_folder(str(tmp_path / "new/folder"))


def test_names_follow_the_content():
    a, b = torch.zeros(3), torch.ones(3, dtype=torch.bfloat16)
    names = {cache.fingerprint(about, t) for about in ("x", "y") for t in ([a], [b], [a, b])}
    assert len(names) == 6 and cache.fingerprint("x", [a]) in names
