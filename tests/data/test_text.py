"""Text files of users: UTF-8, newlines alone split, mistakes in one line with file, line and byte."""

import os

import pytest

from fastgen.core.errors import UserError
from fastgen.data import text


def read(path, data: bytes, **more):
    path.write_bytes(data)
    return text.read_lines(path, "data.prompts", "one prompt a line", **more)


@pytest.mark.parametrize(
    "data,wanted",
    [
        (b"\xef\xbb\xbfa red dress\n", ["a red dress"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        ("a\u2028b\u0085c\x0bd\x0ce\n".encode(), ["a\u2028b\u0085c\x0bd\x0ce"]),
        ("\u732b\n\n  dog \n".encode(), ["\u732b", "dog"]),
    ],
)
def test_lines(tmp_path, data, wanted):
    assert read(tmp_path / "p.txt", data) == wanted


def test_blank_lines_keep_their_places_where_these_count(tmp_path):
    assert read(tmp_path / "p.txt", b"\na\n\nb\n", keep_blank=True) == ["", "a", "", "b"]
    assert read(tmp_path / "p.txt", b"a\n\n", keep_blank=True) == ["a", ""]


@pytest.mark.parametrize(
    "data,wanted",
    [
        (b"a red dress\ncaf\xe9 table\n", "p.txt line 2: byte 4 (0xe9) is not UTF-8"),
        (b"\xef\xbb\xbfcaf\xe9", "line 1: byte 4 (0xe9)"),
        ("a dress".encode("utf-16"), "UTF-16"),
        (b"a\nb\0c", "line 2: holds a zero byte"),
        (b"\n \n", "is empty"),
        (b"", "is empty"),
    ],
)
def test_files_that_are_no_text(tmp_path, data, wanted):
    with pytest.raises(UserError) as error:
        read(tmp_path / "p.txt", data)
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.txt")
    for path, wanted in ((tmp_path / "pipe.txt", "regular file"), (tmp_path, "regular file")):
        with pytest.raises(UserError, match=wanted):
            text.read_lines(path, "data.prompts", "")
    with pytest.raises(UserError, match="does not exist"):
        text.read_lines(tmp_path / "none.txt", "data.prompts", "")
    with pytest.raises(UserError, match="cannot be read"):
        text.read_lines(str(tmp_path) + "/\0", "data.prompts", "")
    monkeypatch.setattr(text, "MAX_BYTES", 3)
    with pytest.raises(UserError, match="larger than 3 bytes"):
        read(tmp_path / "p.txt", b"abcd")


def test_quotes_are_short():
    assert text.shorten("a dress") == "'a dress'"
    assert len(text.shorten("red dress " * 1000)) < 80 and text.shorten("x" * 99 + "end").endswith("end'")
