"""fastgen COMMAND [flags]: every command under one name, each with its own --help.

A command's module is imported when it is called, so that this page is there at once.
"""

import importlib
import sys
from typing import NamedTuple

from fastgen.core.console import fail
from fastgen.core.errors import UserError, suggest


class Command(NamedTuple):
    """One word of the command line."""

    module: str
    """that holds its `main(argv)`"""
    does: str


COMMANDS = {
    "train": Command("fastgen.cli.train", "distil a teacher into a few-step student (train.py)"),
    "sample": Command("fastgen.cli.sample", "draw pictures with an export, a LoRA or a teacher (sample.py)"),
    "precompute": Command("fastgen.cli.precompute", "encode images and prompts once, for training"),
    "eval": Command("fastgen.cli.evaluate", "measure a run, a teacher or a folder of pictures"),
    "report": Command("fastgen.cli.report", "the page of a run, also while it trains; several runs compared"),
    "export": Command("fastgen.cli.export", "write an export from a checkpoint of a run; publish one"),
    "adapters": Command("fastgen.cli.adapters", "look into LoRA files, merge and convert them"),
    "demo": Command("fastgen.cli.demo", "a page in the browser to try an export in"),
    "relight": Command(
        "fastgen.cli.relight", "a splat of 3D Gaussians as material and light, shown under another"
    ),
    "doctor": Command("fastgen.cli.doctor", "what this machine and this installation can do"),
    "list": Command("fastgen.cli.listing", "methods, teachers and recipes, a line each"),
}


def help_text() -> str:
    """What `fastgen --help` prints."""
    lines = ["usage: fastgen COMMAND [flags]", "", "commands"]
    lines += [f"  {name:<12}{command.does}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "fastgen COMMAND --help says more; fastgen --version is the version"])


def main(argv: list[str] | None = None) -> int:
    """Entry point of `fastgen` and `python -m fastgen`; the exit code of the command, 2 for a wrong one."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    name, rest = words[0], words[1:]
    if name == "--version":
        from fastgen import __version__

        print(f"fastgen {__version__}")
        return 0
    if name not in COMMANDS:
        found = f"found {name[:40]!r}{suggest(name, COMMANDS)}"
        return fail(UserError("fastgen", found, f"give one of {', '.join(COMMANDS)}"))
    sys.argv = [f"fastgen {name}", *rest]  # what a command calls itself, and a run records
    return importlib.import_module(COMMANDS[name].module).main(rest)


if __name__ == "__main__":
    sys.exit(main())
