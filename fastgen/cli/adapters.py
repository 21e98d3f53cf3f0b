"""LoRA files: what is in them, merged into their base, under other names, what one adds to another.

fastgen adapters list runs/tinted-sd_dmd2_lora                         rank, layers, base, steps
fastgen adapters merge FILE --out merged [--base BASE] [--dtype fp16]    a whole model folder
fastgen adapters convert FILE --to kohya --out OTHER.safetensors       or --to peft --base BASE
fastgen adapters difference TUNED START --out ADDED.safetensors        stacked on START it is TUNED
"""

import argparse
import sys
from pathlib import Path

from fastgen.cli.sample import DTYPES
from fastgen.core.console import documented, run_command
from fastgen.core.errors import UserError
from fastgen.core.paths import expand


def _flags() -> argparse.ArgumentParser:
    flags = documented("fastgen adapters", __doc__)
    add = flags.add_argument
    add("command", choices=RUN)
    add("paths", nargs="+", type=expand, metavar="PATH", help="LoRA file; for list also a folder")
    add("--base", default="", type=expand, help="model that the LoRA adapts, if its header names none")
    add("--to", choices=("kohya", "peft"), default="", help="convert: whose names")
    add("--out", default="", type=expand, help="merge: folder to write; else the file")
    add("--dtype", choices=DTYPES, default="fp32", help="merge: of the weights")
    add("--overwrite", action="store_true", help="replace what is there")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Entry point of `fastgen adapters`; 0, or 2 for a user's mistake."""
    return run_command(_flags(), lambda args: RUN[args.command](args), argv)


def _one(args: argparse.Namespace) -> Path:
    """The one file that merge and convert are about."""
    if len(args.paths) > 1:
        raise UserError("adapters", f"found {len(args.paths)} files", "give one")
    return _file(args.paths[0])


def _file(place: str) -> Path:
    """The LoRA file that a path stands for."""
    from fastgen.export.adapters import lora_files

    path = Path(place)
    files = [f for f in lora_files(path) if f == path or not f.stem.endswith("-kohya")]
    if len(files) > 1:
        raise UserError("adapters", f"{path} holds {len(files)} LoRA files", "name one of them")
    return files[0]


def _out(args: argparse.Namespace) -> Path:
    if not args.out:
        raise UserError("--out", "none given", "where to write")
    return Path(args.out)


def _list(args: argparse.Namespace) -> int:
    from fastgen.export.adapters import describe, lora_files, open_adapter

    for path in args.paths:
        for file in lora_files(Path(path)):
            print("\n".join(describe(open_adapter(file))))
    return 0


def _merge(args: argparse.Namespace) -> int:
    import torch

    from fastgen.cli.export import check_place
    from fastgen.export.adapters import merge

    out = _out(args)
    check_place(out, args.overwrite)
    print(f"wrote {merge(_one(args), args.base, out, getattr(torch, DTYPES[args.dtype]))}")
    return 0


def _new_file(args: argparse.Namespace) -> Path:
    """The LoRA file to write."""
    out = _out(args)
    if out.suffix != ".safetensors":
        raise UserError("--out", f"found {out}", "give a .safetensors file")
    if out.exists() and not args.overwrite:
        raise UserError("--out", f"{out} exists", "give another file, or --overwrite")
    return out


def _convert(args: argparse.Namespace) -> int:
    from fastgen.export.adapters import convert

    if not args.to:
        raise UserError("--to", "none given", "kohya or peft")
    print(f"wrote {convert(_one(args), args.to, _new_file(args), args.base)}")
    return 0


def _difference(args: argparse.Namespace) -> int:
    from fastgen.export.adapters import difference

    if len(args.paths) != 2:
        raise UserError("adapters", f"found {len(args.paths)} files", "give two: TUNED START")
    tuned, start = map(_file, args.paths)
    print(f"wrote {difference(tuned, start, _new_file(args))}")
    return 0


RUN = {"list": _list, "merge": _merge, "convert": _convert, "difference": _difference}


if __name__ == "__main__":
    sys.exit(main())
