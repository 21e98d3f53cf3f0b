"""Names that match one of some patterns."""

from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the patterns (`*`, `?` and `[...]`), upper and lower case told apart."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
