"""Terminal behaviour that all commands share: flags, one-line errors, and quiet libraries."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Container
from typing import NoReturn

from fastgen.core.errors import NotFinite, UserError
from fastgen.core.files import disk_error

CHATTY = ("diffusers", "transformers", "accelerate", "peft", "torchvision", "huggingface_hub", "torch")
"""libraries whose remarks are not for the user of a command"""


class Flags(argparse.ArgumentParser):
    """An argument parser that raises UserError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError("command line", message, "run the command with --help for its flags")

    def parse_known_args(self, args=None, namespace=None):
        """As argparse does, but a flag that takes one value may be given only once."""
        words = list(sys.argv[1:] if args is None else args)
        if broken := next((w for w in words if any("\ud800" <= c <= "\udfff" for c in w)), None):
            self.error(f"{broken.encode('ascii', 'backslashreplace').decode()[:80]} is not UTF-8 text")
        once = {o for a in self._actions if type(a).__name__ == "_StoreAction" for o in a.option_strings}
        names = [word.partition("=")[0] for word in words if word.startswith("--")]
        for name in sorted(once.intersection(names)):
            if names.count(name) > 1:
                self.error(f"{name} is given twice")
        return super().parse_known_args(words, namespace)


class CommandFlags(Flags):
    """Flags of a command without keys of a config: a complaint is one line and exit code 2."""

    def error(self, message: str):
        sys.exit(fail(UserError("command line", message, "see --help")))


def documented(name: str, text: str | None) -> CommandFlags:
    """Flags of a command whose --help begins with a text that is laid out already: its module's docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    return CommandFlags(name, description=text, formatter_class=layout, allow_abbrev=False)


def passed_over(args: argparse.Namespace, plain: argparse.Namespace, taken: Container[str]) -> list[str]:
    """Flags that were given and are none of those taken, with their dashes; `plain` has every default."""
    given = {k for k, v in vars(args).items() if v != getattr(plain, k)}
    return [f"--{name}" for name in vars(plain) if name in given and name not in taken]


def program(name: str) -> str:
    """What a command calls itself: `fastgen WORD` where it was called so, else its own name."""
    return sys.argv[0] if sys.argv[0].startswith("fastgen ") else name


def fail(error: UserError) -> int:
    """Print a user's mistake as one line on stderr; returns the exit code 2."""
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


def run_command(
    flags: argparse.ArgumentParser, command: Callable[[argparse.Namespace], int], argv: list[str] | None
) -> int:
    """The whole of a command: its flags read, libraries quiet; the exit code of `exit_code`."""
    args = flags.parse_args(argv)
    quiet()
    return exit_code(lambda: command(args))


NOISY_WHEN_IMPORTED = ("bitsandbytes", "torch.utils._pytree")
"""loggers that warn whenever bitsandbytes and torchao are installed, whether a run uses them or not"""


def quiet() -> None:
    """Hide what libraries print below an error: fastgen's own messages are short and name the setting.

    Diffusers and transformers set the level of their loggers when they are imported, from the environment;
    where that names a level, it is kept. Python's own warnings stay where -W or PYTHONWARNINGS asks for them.
    """
    if not sys.warnoptions:
        for name in CHATTY:
            warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
        for kind in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", kind)
    for name in NOISY_WHEN_IMPORTED:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("diffusers", "transformers", "accelerate"):
        os.environ.setdefault(f"{name.upper()}_VERBOSITY", "error")
        if os.environ[f"{name.upper()}_VERBOSITY"] == "error":
            logging.getLogger(name).setLevel(logging.ERROR)


def no_weight_bars() -> None:
    """Switch off the bars of diffusers and transformers for reading and writing weights; those of downloads
    stay as they are.
    """
    from diffusers.utils import logging as diffusers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers

    downloads = not are_progress_bars_disabled()
    diffusers.disable_progress_bar()
    transformers.disable_progress_bar()  # switches those of downloads off too
    if downloads:
        enable_progress_bars()
