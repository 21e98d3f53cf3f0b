"""Text files of users: UTF-8 with or without a byte-order mark, one entry a line.

Only a newline ends a line (not U+2028, a form feed or a vertical tab), as in an editor. What cannot be read
is one line that names the file, the line and the byte.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from fastgen.core import reading
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
    return reading.read_text(Path(path).expanduser(), key, instruction, MAX_BYTES, "save the file as UTF-8")


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


def example_of(texts: Sequence[str] | None) -> str:
    """The first of the run's prompts that a shell and a card show on one line, or the first one cut short."""
    shown = [t for t in texts or () if t.strip() and t.isprintable()]
    return next((t for t in shown if len(t) <= 80), shown[0][:80].rpartition(" ")[0] if shown else "")


def whole(text: str) -> str:
    """Text without halves of characters, as JSON can hold them (cut emoji) and no tokenizer takes them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
