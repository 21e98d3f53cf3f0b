"""Write an export from a checkpoint of a run, and publish one.

fastgen export --run runs/quickstart                       the newest checkpoint, into runs/quickstart/export
fastgen export --run runs/quickstart --checkpoint 200 --out step200 [--raw]
fastgen export --model runs/quickstart/export --push OWNER/NAME --dry_run      what would go to the hub
"""

import argparse
import sys
from pathlib import Path

from fastgen.core.console import documented, run_command
from fastgen.core.errors import UserError
from fastgen.core.paths import expand


def _flags() -> argparse.ArgumentParser:
    flags = documented("fastgen export", __doc__)
    add = flags.add_argument
    add("--run", default="", type=expand, metavar="DIR", help="run folder to write an export of")
    add("--checkpoint", type=int, default=None, metavar="STEP", help="default: the newest one")
    add("--raw", action="store_true", help="the trained weights themselves, not their average")
    add("--out", default="", type=expand, metavar="DIR", help="default: export/ in the run folder")
    add("--overwrite", action="store_true", help="replace an export that is there")
    add("--model", default="", type=expand, metavar="DIR", help="an export that is there, to publish it")
    add("--push", default="", metavar="OWNER/NAME", help="publish it on the Hugging Face hub")
    add("--private", action="store_true", help="with --push: a repository that only you see")
    add("--dry_run", "--dry-run", action="store_true", help="with --push: list the files, upload nothing")
    add("--device", default="cpu", help="to load the run on")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Entry point of `fastgen export`; 0, or 2 for a user's mistake."""
    return run_command(_flags(), run, argv)


def run(args: argparse.Namespace) -> int:
    """Write, then publish, whichever is asked for."""
    if bool(args.run) == bool(args.model):
        raise UserError("--run", "give either --run DIR or --model EXPORT", "see --help")
    if args.model and not args.push:
        raise UserError("--model", "given without --push", "an export is there already; --push publishes it")
    if (args.dry_run or args.private) and not args.push:
        raise UserError("--dry_run" if args.dry_run else "--private", "given without --push", "add --push")
    folder = Path(args.model) if args.model else write(args)
    if args.push:
        from fastgen.export.publish import describe, push

        if args.dry_run:
            print(f"{describe(folder, args.push)}\nnothing was uploaded")
        else:
            print(f"published {push(folder, args.push, args.private)}")
    return 0


def write(args: argparse.Namespace) -> Path:
    """The export of a checkpoint in its place."""
    from fastgen.cli.restore import choose, restore
    from fastgen.core import interrupt
    from fastgen.core.reading import read_json
    from fastgen.export.load import sample_command
    from fastgen.networks.device import open_device
    from fastgen.training.exporting import export_run, write_cards

    source = Path(args.run)
    choose(source, args.checkpoint)
    folder = Path(args.out) if args.out else source / "export"
    check_place(folder, args.overwrite)
    restored = restore(source, args.checkpoint, args.raw, open_device(args.device))
    if restored.cast.teacher.is_analytic:
        raise UserError("--run", f"{source} distils an exact teacher", "its student is no diffusers network")
    with interrupt.deferred():
        export_run(restored, folder, {})
        if restored.finished and not args.raw and (source / "results.json").is_file():
            write_cards(restored, folder, read_json(source / "results.json", "--run"))
    print(f"export  {folder} (step {restored.step}, {restored.weights})")
    print(f"sample  {sample_command(folder)}")
    return folder


def check_place(folder: Path, overwrite: bool) -> None:
    """Refuse a place that holds something else than an export, or an export without `overwrite`."""
    from fastgen.export.info import FILE

    if folder.is_file():
        raise UserError("--out", f"{folder} is a file", "give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / FILE).is_file():
            raise UserError("--out", f"{folder} is not empty and no export", "give another folder")
        if not overwrite:
            raise UserError("--out", f"{folder} holds an export", "give another folder, or --overwrite")


if __name__ == "__main__":
    sys.exit(main())
