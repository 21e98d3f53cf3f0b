"""The one exception for a user's mistake: printed as a single line, exit code 2, no traceback."""

import difflib
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """A setting, file or request the user can mend; the message names the key, what was found, what is
    allowed.
    """

    def __init__(self, key: str, found: object, allowed: str):
        self.key, self.found, self.allowed = key, found, allowed
        super().__init__(f"{key}: {found}; {allowed}" if allowed else f"{key}: {found}")


class NotFinite(RuntimeError):
    """A loss, gradient, weight or sample became NaN or infinite; says which and when. Exit code 3."""


def warn(text: str) -> None:
    """One line on stderr for what goes on, but not quite as asked."""
    print(f"warning: {text}", file=sys.stderr)


def first_line(error: Exception) -> str:
    """What a library's exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def suggest(word: str, known: Iterable[str]) -> str:
    """A ' (did you mean ...?)' hint for a misspelt word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
