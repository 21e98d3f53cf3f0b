"""Text files of users: UTF-8 with or without a byte-order mark, one entry a line.

Only a newline ends a line (not U+2028, a form feed or a vertical tab), as in an editor. What cannot be read
is one line that names the file, the line and the byte.
"""

import stat
from collections.abc import Iterator
from pathlib import Path

from fastgen.core.errors import UserError

MAX_BYTES = 256 * 2**20
"""largest text file that is read; a million prompts take about a third of it"""
MAX_QUOTED = 80
"""characters of a user's text that a message repeats"""


def shorten(text: str, limit: int = MAX_QUOTED) -> str:
    """The text in quotes, its middle left out where it is longer than `limit` characters."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[len(text) - limit // 4 :]}"
    return repr(text)


def cut_prompts(codec, prompts: list[str], most: int = 5) -> Iterator[str]:
    """Name the first prompts that do not fit the tokenizer's length, in short, and count the others."""
    # no token stands for less than one ASCII character, so a short prompt needs no tokenizer
    unsure = [text for text in prompts if not text.isascii() or len(text) + 4 > codec.max_length]
    long = codec.too_long(unsure)
    for text in long[:most]:
        about = f"cut: {shorten(codec.cut(text))} of {shorten(text)}"
        yield f"prompt longer than {codec.max_length} tokens, {about}"
    if (num := len(long)) > most:
        yield f"{num - most} more prompts longer than {codec.max_length} tokens, cut"


def read_text(path: str | Path, key: str, instruction: str) -> str:
    """The whole file as text, newlines as they are. key and instruction are those of the UserError raised for
    a file that is missing, no regular file (pipes and devices are never opened), too large, or not UTF-8.
    """
    path = Path(path).expanduser()
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(key, f"{path} is not a regular file", instruction)
        if found.st_size > MAX_BYTES:
            size = f"{path} has {found.st_size / 2**20:.0f} MB"
            raise UserError(key, size, f"a text file of at most {MAX_BYTES // 2**20} MB")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(key, f"{path} does not exist", instruction) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero character
        raise UserError(key, f"{path} cannot be read ({_reason(error)})", instruction) from None
    return _decoded(data, path, key)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _decoded(data: bytes, path: Path, key: str) -> str:
    """UTF-8 bytes as text, or a UserError that names line and byte."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(key, f"{path} is UTF-16 text", "save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
        place = text.find("\0")
        if place < 0:
            return text
        line, what = text.count("\n", 0, place) + 1, "holds a zero byte: no text"
    except UnicodeDecodeError as error:
        whole = error.object[: error.start]  # the byte-order mark, if any, is already gone
        line, column = whole.count(b"\n") + 1, error.start - (whole.rfind(b"\n") + 1) + 1
        what = f"byte {column} (0x{error.object[error.start]:02x}) is not UTF-8"
    raise UserError(key, f"{path} line {line}: {what}", "save the file as UTF-8")


def split_lines(text: str) -> list[str]:
    """Lines without their ends and outer white space; the newline that ends the file begins no line."""
    lines = [line.strip() for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def read_lines(path: str | Path, key: str, instruction: str, keep_blank: bool = False) -> list[str]:
    """The lines of a file; blank ones are left out unless their place counts. An empty file is an error."""
    lines = split_lines(read_text(path, key, instruction))
    if not any(lines):
        raise UserError(key, f"{path} is empty", instruction)
    return lines if keep_blank else [line for line in lines if line]
