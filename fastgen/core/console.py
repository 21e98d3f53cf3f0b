"""What every command shares on the terminal: flags, one-line errors, and quiet libraries."""

import argparse
import logging
import sys

from fastgen.core.errors import UserError


class Flags(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors."""

    def error(self, message: str):
        raise UserError("command line", message, "see --help")


def fail(error: UserError) -> int:
    """Print a user's mistake as one line; the exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def quiet() -> None:
    """Keep libraries' start-up chatter out of the terminal."""
    for name in ("diffusers", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
