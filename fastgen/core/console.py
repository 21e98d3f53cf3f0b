"""Terminal behaviour that all commands share: flags, one-line errors, and quiet libraries."""

import argparse
import logging
import sys
from typing import NoReturn

from fastgen.core.errors import UserError


class Flags(argparse.ArgumentParser):
    """An argument parser that raises UserError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError("command line", message, "run the command with --help for its flags")


def fail(error: UserError) -> int:
    """Print a user's mistake as one line on stderr; returns the exit code 2."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def quiet() -> None:
    """Hide the start-up messages of libraries."""
    for name in ("diffusers", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
