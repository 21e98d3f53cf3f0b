"""Win rates from the votes that a blind page of `fastgen-eval view` saved.

fastgen-eval votes votes-ann.json votes-bob.json --key look/key.json [--per_prompt] [--out votes.json]

A tie is half a win for both. Votes of several people on one pair of images count as one mean, so intervals
are about other pairs of images, not about other people. Without --key the key.json beside the first file is
taken.
"""

import argparse
from pathlib import Path

from fastgen.core.console import documented
from fastgen.core.errors import UserError
from fastgen.core.files import write_json
from fastgen.core.paths import expand


def flags() -> argparse.ArgumentParser:
    """Of the command."""
    found = documented("fastgen-eval votes", __doc__)
    add = found.add_argument
    add("files", nargs="+", type=expand, metavar="FILE", help="as the blind page saved them")
    add("--key", default="", type=expand, metavar="FILE", help="key.json of the page")
    add("--per_prompt", action="store_true", help="show the win rate of every prompt too")
    add("--out", default="", type=expand, metavar="FILE", help="write all numbers there, as JSON")
    return found


def run(args) -> int:
    """The command; its exit code."""
    from fastgen.evaluation.votes import markdown, read_key, read_votes, tally

    files = [Path(f) for f in args.files]
    place = Path(args.key) if args.key else files[0].parent / "key.json"
    if not place.is_file():
        raise UserError("--key", f"{place} does not exist", "give the key.json written with the page")
    key = read_key(place)
    found = tally(read_votes(files, key), key)
    if args.out:
        write_json(Path(args.out), found)
    print(markdown(found, args.per_prompt))
    return 0
