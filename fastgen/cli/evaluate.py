"""Measure runs, sets of images and teachers.

fastgen-eval --run runs/quickstart [--num_samples 5000]     measure an export again, rewrite results.json
fastgen-eval --images out --against fashion --prompts labels.txt --metrics fd_mini mmd_mini agreement_mini
fastgen-eval --images a --against b --metrics fid kid --weights inception=FILE
fastgen-eval --images a.npz --against REF.npz --metrics fid is --weights inception=FILE
fastgen-eval --images shard-{000..010}.tar --metrics clip hps --weights clip=FILE hps=FILE
fastgen-eval statistics --images real --encoder inception --weights inception=FILE --out real.npz
fastgen-eval generate --model runs/mine --num_samples 5000 --out generated     images to measure
fastgen-eval compare runs/a runs/b      fastgen-eval protocol coco2014-30k ...      see their --help
fastgen-eval view out/a out/b --out look      fastgen-eval votes FILE --key look/key.json     people judge
fastgen-eval card --teacher assets:teachers/fashion [--guidance 1.5] [--num_samples 1000]
fastgen-eval metrics                                        every metric: what it needs, where it is from

In a checkout `python -m eval` is the same and keeps the leaderboard too.
"""

import argparse
import importlib
import sys
from pathlib import Path

from fastgen.cli.measuring import at_least, open_encoders, open_material
from fastgen.core import interrupt
from fastgen.core.console import documented, exit_code, passed_over, program, quiet
from fastgen.core.errors import UserError
from fastgen.core.files import to_json
from fastgen.core.paths import expand

COMMANDS = ("measure", "statistics", "card", "metrics")
OWN_FLAGS = ("generate", "compare", "protocol", "view", "votes")
"""commands with flags of their own: modules of this folder with `flags` and `run`, imported when called"""
TAKEN = {
    "run": ("run", "num_samples", "device"),
    "images": ("images", "against", "metrics", "extractor", "weights", "prompts", "clip", "group_size")
    + ("forgotten", "cache", "device"),
    "statistics": ("images", "encoder", "out", "weights", "extractor", "clip", "device"),
    "card": ("teacher", "guidance", "num_samples", "device"),
    "metrics": (),
}
"""flags of each command; measuring is of a run or of images"""
FORMATS = "a folder (without its grid*.png), .npz, .safetensors, webdataset .tar"


def flags() -> argparse.ArgumentParser:
    """Of the commands in COMMANDS."""
    found = documented(program("fastgen-eval"), __doc__)
    add = found.add_argument
    add("command", nargs="?", default="measure", choices=COMMANDS)
    add("--run", default="", type=expand, metavar="DIR", help="run folder")
    add("--num_samples", type=int, default=0, help="default: the run's eval.num_samples")
    add("--images", default="", type=expand, metavar="SOURCE", help=f"generated images: {FORMATS}")
    reference = "reference images: likewise, a statistics .npz, or digits, fashion, tinted (held-out images)"
    add("--against", default="", type=expand, metavar="SOURCE", help=reference)
    add("--metrics", nargs="+", default=["fd_mini"], metavar="NAME", help="see `fastgen-eval metrics`")
    add("--extractor", default="", help="digits, fashion or tinted: whose mini network measures two folders")
    weights = "local files or folders of networks; for one of your own NAME=package.module:function"
    add("--weights", nargs="+", default=[], metavar="NAME=PATH", help=weights)
    prompts = "the prompts or labels of the images, one a line; default: what the source has"
    add("--prompts", default="", type=expand, metavar="FILE", help=prompts)
    add("--clip", default="vit-g-14", metavar="PRESET", help="vit-b-32, vit-l-14, vit-g-14 or dmd2")
    add("--group_size", type=int, default=0, help="images of each prompt, which follow each other")
    forgotten = "the class that was to be unlearned, for unlearning_accuracy and its companions"
    add("--forgotten", type=int, default=-1, metavar="N", help=forgotten)
    add("--cache", default="", type=expand, metavar="DIR", help="keep features there between calls")
    add("--encoder", default="", metavar="NAME", help="statistics: of this encoder's features")
    add("--out", default="", type=expand, metavar="FILE", help="statistics: the .npz to write")
    add("--device", default="", help="default: cuda if there is one")
    teacher = "card: the teacher to measure at 1, 4, 20 and 50 steps"
    add("--teacher", default="", type=expand, metavar="PATH", help=teacher)
    add("--guidance", type=float, default=1.0, help="card: classifier-free guidance w")
    return found


def main(argv: list[str] | None = None) -> int:
    """Entry point of fastgen-eval; 0, or 2 for a user's mistake, 3 for samples that are not finite, 75 where
    a signal stopped it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] == "--protocol":  # as one may say it, too
        argv[0] = "protocol"
    if argv and argv[0] in OWN_FLAGS:
        command = importlib.import_module(f"fastgen.cli.{argv[0]}")
        args, run = command.flags().parse_args(argv[1:]), command.run
    else:
        args, run = flags().parse_args(argv), _run
    quiet()
    with interrupt.handled():
        try:
            return exit_code(lambda: run(args))
        except interrupt.Stopped as stop:
            print(f"{stop}: stopped; the images drawn so far are kept", file=sys.stderr)
            return interrupt.REQUEUE


def _check_flags(args) -> None:
    """Refuse a flag that the command does not take: it would be passed over in silence."""
    mode = args.command
    if mode == "measure":
        if bool(args.run) == bool(args.images):
            raise UserError("--run", "give either --run DIR or --images SOURCE", "see --help")
        mode = "run" if args.run else "images"
    for flag in passed_over(args, flags().parse_args([]), ("command", *TAKEN[mode])):
        takes = ", ".join(f"--{n}" for n in TAKEN[mode]) or "no flags"
        asked = f"--{mode}" if mode in ("run", "images") else f"`fastgen-eval {mode}`"
        raise UserError(flag, f"{asked} does not take it", f"leave it out; it takes {takes}")


def _run(args) -> int:
    _check_flags(args)
    at_least(args, num_samples=0)
    if args.command == "card":
        _card(args)
    elif args.command == "metrics":
        from fastgen.evaluation.registry import table

        print(table())
    elif args.command == "statistics":
        _statistics(args)
    elif args.run:
        from fastgen.cli.remeasure import remeasure

        remeasure(Path(args.run), args.num_samples, args.device)
    else:
        print(to_json(measure_images(args), 2))
    return 0


def _card(args) -> None:
    from fastgen.cli.remeasure import measure_teacher

    if not args.teacher:
        raise UserError("--teacher", "none given", "give a teacher folder, e.g. assets:teachers/fashion")
    measure_teacher(args.teacher, args.guidance, args.num_samples or 1000, args.device)


def _statistics(args) -> None:
    from fastgen.evaluation import features
    from fastgen.evaluation.inputs import open_source

    for flag in ("images", "encoder", "out"):
        if not getattr(args, flag):
            raise UserError(f"--{flag}", "none given", "give --images, --encoder and --out")
    if not args.out.endswith(".npz"):
        raise UserError("--out", f"found {args.out}", "give the name of an .npz file")
    source, encoder = open_source(args.images), open_encoders(args).open(args.encoder)
    found = features.statistics(encoder, source)
    features.write_statistics(Path(args.out), found, encoder, source)
    print(f"wrote {args.out}: mean and covariance of {len(found.mean)} features of {found.num} images")


def measure_images(args) -> dict:
    """Every requested metric with its interval, and what it was measured with."""
    from fastgen.evaluation.material import measure
    from fastgen.evaluation.registry import wanted

    asked = [wanted(name) for name in dict.fromkeys(args.metrics)]
    material = open_material(args, asked)
    estimates = measure(material, asked)
    found: dict[str, object] = {"num_images": len(material.source)}
    found |= {label: e.value for label, e in estimates.items()}
    found["intervals"] = {label: list(e.interval()) for label, e in estimates.items()}
    return found | material.describe()


if __name__ == "__main__":
    sys.exit(main())
