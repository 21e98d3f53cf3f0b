"""Small files of models, runs and users, read within bounds: a regular file of limited size, UTF-8, and where
JSON is meant, an object of limited depth. Everything else is a UserError of one line.
"""

import functools
import inspect
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from fastgen.core.errors import UserError, first_line

MAX_JSON_BYTES = 16 * 2**20
"""the largest JSON file that is read; parsed, it takes up to 25 times as much memory"""
MAX_JSON_DEPTH = 64
COPY = "copy or download the file again"
P = ParamSpec("P")
R = TypeVar("R")


def read_bytes(path: Path, key: str, instruction: str, limit: int) -> bytes:
    """A whole regular file of at most `limit` bytes. Pipes, devices and folders are never opened or waited
    for; `key` is the setting that an error names.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(key, f"{path} is not a regular file", instruction)
        if found.st_size > limit:
            raise _too_large(path, key, limit, instruction)
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise UserError(key, f"{path} does not exist", instruction) from None
    except OSError as error:
        raise UserError(key, f"{path} cannot be read ({error.strerror or error})", instruction) from None
    except ValueError as error:  # a path with a zero byte
        raise UserError(key, f"{str(path)!r} cannot be read ({error})", instruction) from None
    if len(data) > limit:  # it grew
        raise _too_large(path, key, limit, instruction)
    return data


def _too_large(path: Path, key: str, limit: int, instruction: str) -> UserError:
    most = f"{limit // 2**20} MiB" if limit >= 2**20 else f"{limit} bytes"
    return UserError(key, f"{path} is larger than {most}", instruction)


def read_text(path: Path, key: str, instruction: str, limit: int = MAX_JSON_BYTES, not_utf8: str = "") -> str:
    """UTF-8 text of a file, without a byte-order mark, newlines as they are. A UserError names the line and
    the byte that is none; not_utf8 is its instruction, if another than that for a file that cannot be read.
    """
    data = read_bytes(path, key, instruction, limit)
    instruction = not_utf8 or instruction
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(key, f"{path} is UTF-16 text", instruction)
    try:
        text = data.decode("utf-8-sig")
        place = text.find("\0")
        if place < 0:
            return text
        line, what = text.count("\n", 0, place) + 1, "holds a zero byte: no text"
    except UnicodeDecodeError as error:
        before = error.object[: error.start]  # the byte-order mark, if any, is already gone
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        what = f"byte {column} (0x{error.object[error.start]:02x}) is not UTF-8"
    raise UserError(key, f"{path} line {line}: {what}", instruction)


def read_json(path: Path, key: str, instruction: str = COPY, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file."""
    return parse_json(read_text(path, key, instruction, limit), str(path), key, instruction)


def parse_json(text: str, where: str, key: str, instruction: str = COPY) -> dict[str, Any]:
    """The object in a JSON text; `where` names the text in an error."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise UserError(key, f"{where} is nested too deeply", instruction) from None
    except ValueError as error:  # also an integer of more digits than Python converts
        raise UserError(key, f"{where} is not valid JSON ({str(error)[:120]})", instruction) from None
    if not isinstance(found, dict):
        raise UserError(key, f"{where} contains no JSON object", instruction)
    if _deeper_than(found, MAX_JSON_DEPTH):
        raise UserError(key, f"{where} is nested too deeply", instruction)
    return found


def _deeper_than(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


def check_types(document: dict, kinds: dict[str, type | tuple[type, ...]], where: object, key: str) -> None:
    """Refuse a document in which one of these keys holds another type; true and false are no numbers."""
    for name, kind in kinds.items():
        value = document.get(name)
        if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
            continue
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(key, f"{name} in {where} is {str(value)[:40]!r}", f"it must be of type {wanted}")


@contextmanager
def readable(key: str, path: object) -> Iterator[None]:
    """What the libraries raise over the files of a malformed model becomes one UserError; the error that it
    came from stays its cause.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if type(error).__name__ in ("OutOfMemoryError", "NotFinite"):
            raise
        found = f"{path} cannot be read ({type(error).__name__}: {first_line(error)[:200]})"
        raise UserError(key, found, "copy or download the folder again") from error


def reads_model(key: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function of a `path` (and perhaps a `key`) whose errors over its files are `readable`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments
            with readable(str(given.get("key", key)), given.get("path", "")):
                return function(*args, **kwargs)

        return wrapped

    return decorate
