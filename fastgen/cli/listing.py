"""fastgen list [methods] [teachers] [recipes]: what there is to choose from, a line each."""

import argparse

from fastgen.core.console import CommandFlags, exit_code

NEXT = """
start one   fastgen train --method METHOD --teacher TEACHER     or     fastgen train --config RECIPE
its numbers fastgen/objectives/README.md of the source; its settings: fastgen train --config RECIPE --help"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `fastgen list`; 0, or 2 for a user's mistake."""
    from fastgen.config.catalogue import KINDS

    flags = CommandFlags("fastgen list", description=__doc__, allow_abbrev=False)
    flags.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}; all if not given")
    args = flags.parse_args(argv)
    return exit_code(lambda: _print(args))


def _print(args: argparse.Namespace) -> int:
    from fastgen.config.catalogue import KINDS, listing
    from fastgen.core.errors import UserError, suggest

    for kind in args.kinds:
        if kind not in KINDS:
            raise UserError("list", f"found {kind[:40]!r}{suggest(kind, KINDS)}", f"give {', '.join(KINDS)}")
    print(listing(tuple(args.kinds) or tuple(KINDS)))
    if not args.kinds:
        print(NEXT)
    return 0
