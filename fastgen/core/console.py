"""What every command shares on the terminal: flags, one-line errors, and quiet libraries."""

import argparse
import logging
import sys
from collections.abc import Callable

from fastgen.core.errors import NotFinite, UserError
from fastgen.core.files import disk_error


class Flags(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors."""

    def error(self, message: str):
        raise UserError("command line", message, "see --help")


def fail(error: UserError) -> int:
    """Print a user's mistake as one line; the exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def not_finite(error: NotFinite, more: str = "") -> int:
    """Print a number that became NaN or infinite as one line; the exit code."""
    print(f"error: {' '.join(str(error).split())}{more and '; ' + more}", file=sys.stderr)
    return 3


def exit_code(command: Callable[[], int]) -> int:
    """Run a command: its own exit code, 2 for a user's mistake or a disk that refuses, 3 for numbers that are
    not finite, each with one line on stderr.
    """
    try:
        return command()
    except UserError as error:
        return fail(error)
    except NotFinite as error:
        return not_finite(error)
    except Exception as error:
        if not disk_error(error):
            raise
        return fail(UserError("disk", error, "free some space, or choose a folder that can be written"))


def quiet() -> None:
    """Keep libraries' start-up chatter out of the terminal."""
    for name in ("diffusers", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
