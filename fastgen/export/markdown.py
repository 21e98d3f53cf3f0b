"""Text of users and of others' files as Markdown shows it: never as markup, never as HTML, on one line."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""Unicode categories that a reader does not see: controls, direction marks, halves of characters"""
HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
MARKS = re.compile(r"[\\`*\[\]|~$!]|(?<!\w)_|_(?!\w)|^[#+-]|^\d+(?=[.)])")


def visible(text: object) -> str:
    """The text on one line, without the characters that hide or reorder others."""
    words = " ".join(str(text).split())
    return "".join(c for c in words if not _hidden(c))


def escape(text: object) -> str:
    """As plain text of a paragraph, a heading or a table's cell."""
    marked = MARKS.sub(lambda m: m[0] + "\\" if m[0].isdigit() else "\\" + m[0], visible(text))
    return "".join(HTML.get(c, c) for c in marked)


def code(text: object) -> str:
    """As a span of code, in a paragraph or in a table's cell."""
    shown = visible(text).replace("|", "\\|")
    fence = "`" * (1 + _longest(shown))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def fenced(language: str, text: str) -> list[str]:
    """As lines of a block of code, whose fence is longer than any row of backticks in the text."""
    shown = shown_lines(text)
    fence = "`" * max(3, 1 + _longest(shown))
    return [f"{fence}{language}", shown, fence]


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table; a | in a cell does not end it."""
    lines = ["| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def shown_lines(text: str) -> str:
    """The text with its lines, without hidden characters."""
    return "".join(c for c in text if c == "\n" or not _hidden(c))


def _longest(text: str) -> int:
    return max((len(row) for row in re.findall("`+", text)), default=0)


def _hidden(character: str) -> bool:
    return unicodedata.category(character) in HIDDEN and character != "\t"
