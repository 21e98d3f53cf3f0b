"""Sets of images of the same requests for people to look at.

fastgen-eval view out/a out/b --out look                          side_by_side.html, blind.html and key.json
fastgen-eval view compared/images/a/seed_0 compared/images/b/seed_0 --names teacher student --out look
fastgen-eval votes votes-ann.json votes-bob.json --key look/key.json

blind.html shows pairs on random sides, takes votes by mouse or keys, and saves them to a file. Which side was
which is in key.json alone: keep it, and give blind.html to who votes. Both pages are one file each.
"""

import argparse
from pathlib import Path

from fastgen.core.console import documented
from fastgen.core.errors import UserError
from fastgen.core.files import write_json, write_text
from fastgen.core.paths import expand

WRITTEN = ("side_by_side.html", "blind.html", "key.json")


def flags() -> argparse.ArgumentParser:
    """Of the command."""
    found = documented("fastgen-eval view", __doc__)
    add = found.add_argument
    add("sets", nargs="+", type=expand, metavar="SOURCE", help="two or more, as --images of fastgen-eval")
    add("--names", nargs="+", default=[], metavar="NAME", help="of the sets, in their order")
    add("--out", required=True, type=expand, metavar="DIR")
    add("--prompts", default="", type=expand, metavar="FILE", help="prompts or labels, one a line")
    add("--num", type=int, default=100, help="rows shown, drawn by the seed where there are more")
    add("--seed", type=int, default=0, help="of the rows, the order of pairs and their sides")
    return found


def run(args) -> int:
    """The command; its exit code."""
    from fastgen.evaluation.human_view import blind, shown, side_by_side
    from fastgen.evaluation.inputs import open_source

    if len(args.sets) < 2:
        raise UserError("sets", "one given", "give two or more")
    if args.num < 1:
        raise UserError("--num", f"found {args.num}", "give 1 or more")
    names, out = _names(args), Path(args.out)
    if out.is_file():
        raise UserError("--out", f"{out} is a file", "give a folder")
    if there := [name for name in WRITTEN if (out / name).exists()]:
        found = f"{out} holds {', '.join(there)}"
        raise UserError("--out", found, "give another folder: votes need the key of their own page")
    sets = shown(names, [open_source(s, "sets") for s in args.sets], args.prompts, args.num, args.seed)
    page, key = blind(sets, args.seed)
    write_text(out / "side_by_side.html", side_by_side(sets))
    write_text(out / "blind.html", page)
    write_json(out / "key.json", key)
    print(f"wrote {', '.join(WRITTEN)} to {out}: {len(sets.rows)} rows, {len(key['pairs'])} pairs")
    return 0


def _names(args) -> list[str]:
    """Of the sets: given, or the last parts of their paths that tell them apart."""
    if args.names:
        if len(args.names) != len(args.sets):
            raise UserError("--names", f"{len(args.names)} for {len(args.sets)} sets", "give one each")
        names = list(args.names)
    else:
        parts = [Path(s).parts or (s,) for s in args.sets]
        depth = next(
            (d for d in range(1, max(map(len, parts))) if len({p[-d:] for p in parts}) == len(parts)), 1
        )
        names = ["/".join(p[-depth:]) for p in parts]
    if double := next((n for n in names if names.count(n) > 1), None):
        raise UserError("--names", f"two sets are called {double!r}", "give each a name with --names")
    return names
