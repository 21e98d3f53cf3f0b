"""The one exception for a user's mistake: printed as a single line, exit code 2, no traceback."""

import difflib
import sys
from collections.abc import Iterable

from fastgen.core.progress import say


class UserError(ValueError):
    """A setting, file or request that the user can correct.

    The message is one line, "key: found; instruction": the setting or file, what is wrong with it, and what
    to do about it. An empty instruction is left out.
    """

    def __init__(self, key: str, found: object, instruction: str):
        self.key, self.found, self.instruction = key, found, instruction
        super().__init__(f"{key}: {found}; {instruction}" if instruction else f"{key}: {found}")


class NotFinite(RuntimeError):
    """A loss, gradient, weight or sample became NaN or infinite; says which and when. Exit code 3."""


def warn(text: str) -> None:
    """One line on stderr: the run continues, but differs from what was requested."""
    say(f"warning: {text}", sys.stderr)


def first_line(error: Exception) -> str:
    """First line of an exception's message, or its class name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def suggest(word: str, known: Iterable[str]) -> str:
    """A hint " (did you mean ...?)" for a misspelt word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
