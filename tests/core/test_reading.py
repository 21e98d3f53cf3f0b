"""Bounded readers, paths that stay inside, and copies that follow no link."""

import json
import os

import pytest

from fastgen.core.copying import copy_inside
from fastgen.core.errors import UserError
from fastgen.core.paths import asset, inside, resolve
from fastgen.core.reading import check_types, parse_json, read_json, readable, reads_model

# name -> (content, what the one line must hold)
BROKEN = {
    "list": (b"[]", "contains no JSON object"),
    "null": (b"null", "contains no JSON object"),
    "number": (b"3", "contains no JSON object"),
    "binary": (b"\xff\x80", "line 1: byte 1 (0xff) is not UTF-8"),
    "empty": (b"", "is not valid JSON"),
    "cut": (b'{"a": ', "is not valid JSON"),
    "deep": (b'{"a": ' + b"[" * 100_000, "is nested too deeply"),
    "rather deep": (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "is nested too deeply"),
    "long number": (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON"),
    "huge": (b'{"a": "' + b"x" * 17 * 2**20 + b'"}', "is larger than 16 MiB"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_json_file_is_one_line(name, tmp_path):
    content, wanted = BROKEN[name]
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / "a.json", "teacher.path")
    assert wanted in str(caught.value) and "teacher.path: " in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 300


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device", "zero byte"])
def test_what_is_no_file_is_neither_opened_nor_waited_for(kind, tmp_path):
    path = tmp_path / "a.json"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    path = {"device": tmp_path.__class__("/dev/zero"), "zero byte": tmp_path / "a\0b"}.get(kind, path)
    with pytest.raises(UserError, match="key: "):
        read_json(path, "key")


def test_a_good_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": [1, {"b": None}]}).encode())
    assert read_json(tmp_path / "a.json", "key") == {"a": [1, {"b": None}]}


def test_types_of_a_document():
    check_types({"a": 1, "b": None, "c": "x"}, {"a": int, "b": int}, "f.json", "key")
    for wrong in ("1", True, [1], 1.5):
        with pytest.raises(UserError, match="key: a in f.json is .*of type int"):
            check_types({"a": wrong}, {"a": int}, "f.json", "key")


def test_library_errors_become_one_line_with_their_cause():
    wanted = r"key: folder cannot be read \(KeyError: 'a'\)"
    with pytest.raises(UserError, match=wanted) as caught, readable("key", "folder"):
        {}["a"]
    assert isinstance(caught.value.__cause__, KeyError)

    @reads_model("key")
    def load(path, key="key"):
        parse_json("[]", "x", key)

    with pytest.raises(UserError, match="other: x contains no JSON object"):
        load("folder", key="other")


LEADS_OUT = ["../x", "/etc/passwd", "a/../../x", "..", "", None, 3, "a\0b", "..\\x", "link", "into/x"]


@pytest.mark.parametrize("name", LEADS_OUT)
def test_names_that_lead_out_of_a_folder(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "x").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "x")
    (folder / "into").symlink_to(tmp_path)
    with pytest.raises(UserError, match="not inside of it"):
        inside(folder, name, "key")


def test_names_inside_and_links_of_the_hub_cache(tmp_path):
    snapshot = tmp_path / "models--a--b/snapshots/123"
    (tmp_path / "models--a--b/blobs").mkdir(parents=True)
    (tmp_path / "models--a--b/blobs/abc").write_text("weights")
    (snapshot / "unet").mkdir(parents=True)
    (snapshot / "unet/w.safetensors").symlink_to("../../../blobs/abc")
    assert inside(snapshot, "unet/w.safetensors", "key").read_text() == "weights"
    assert copy_inside(snapshot / "unet", tmp_path / "copy", snapshot) == []
    assert (tmp_path / "copy/w.safetensors").read_text() == "weights"
    assert not (tmp_path / "copy/w.safetensors").is_symlink()


def test_a_copy_leaves_out_what_leads_elsewhere(tmp_path):
    root, secret = tmp_path / "model", tmp_path / "secret"
    (root / "vae/sub").mkdir(parents=True)
    secret.mkdir()
    (secret / "id").write_text("secret")
    for name in ("vae/config.json", "vae/sub/w.safetensors", "vae/w.bin"):
        (root / name).write_text("kept")
    (root / "vae/inner").symlink_to(root / "vae/config.json")
    (root / "vae/key").symlink_to(secret / "id")
    (root / "vae/folder").symlink_to(secret)
    (root / "vae/circle").symlink_to(root / "vae")
    (root / "vae/nowhere").symlink_to(root / "nothing")
    os.mkfifo(root / "vae/pipe")
    left_out = copy_inside(root / "vae", tmp_path / "copy", root, ("*.bin",))
    found = sorted(
        str(p.relative_to(tmp_path / "copy")) for p in (tmp_path / "copy").rglob("*") if p.is_file()
    )
    assert found == ["config.json", "inner", "sub/w.safetensors"]
    assert sorted(line.split("/vae/")[1].split(" ")[0] for line in left_out) == sorted(
        ["circle", "folder", "key", "nowhere", "pipe"]
    )
    (root / "linked").symlink_to(secret)
    assert "leaves the folder" in copy_inside(root / "linked", tmp_path / "other", root)[0]
    assert not (tmp_path / "other").exists()


def test_bundled_names_stay_inside_and_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/x") == tmp_path / "x" and resolve("assets:teachers/digits").is_dir()
    for name in ("../pyproject.toml", "/etc/passwd", "teachers/../../README.md"):
        with pytest.raises(FileNotFoundError):
            asset(name)
