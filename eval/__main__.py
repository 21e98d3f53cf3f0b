"""Keep the evidence: record runs of the recipes, and write the leaderboard from them.

python -m eval record --run runs/fashion_dmd2 --recipe fashion_dmd2 [--seed 1]
python -m eval leaderboard [--check]                   the tables, configs/README.md and the guide
python -m eval leaderboard --html PAGE [--runs runs]   a page to look at: filter, plots, pictures of runs
python -m eval run --recipe fashion_dmd2 [--dry_run]   a recipe and, before it, what it starts from, in runs/
python -m eval teacher --recipe quickstart             measure its bundled teacher once, for every such run
python -m eval resolved --since main                   do configs mean what they meant in that revision?
python -m eval negative --run runs/tinted-sd_snoopi    do negative prompts (NASA) remove what they name?
python -m eval forgetting --run runs/tinted-sd_sfd       pictures of a student before and after it forgot
python -m eval diversity --run runs/tinted-sd_tdm_full    does a base model's first step bring variety back?
python -m eval transfer --run runs/tinted-sd_tdm_full    does a LoRA of the base model work on its student?
python -m eval frontier --run runs/digits-sr_oftsr       what the knob between faithful and real trades
python -m eval longer --run runs/moving-wan_self_forcing  clips twice as long as trained, half by half
python -m eval relight                                 a scene of known materials, progressively and plainly
python -m eval guidance --run runs/tinted-sd_agd [--base DIR] [--num_samples 250]
                                                       a student that takes w beside guided sampling, by w

Everything else is `fastgen-eval` (`python -m fastgen.cli.evaluate --help`), which measures runs and folders:

python -m eval --run runs/quickstart [--num_samples 5000]
python -m eval --images out --against fashion --prompts labels.txt --metrics fd_mini mmd_mini agreement_mini
"""

import argparse
import importlib
import sys
from pathlib import Path

from fastgen.cli import evaluate
from fastgen.core.console import fail, quiet
from fastgen.core.errors import UserError


def _flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        "python -m eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = flags.add_argument
    add("command", choices=RUN)
    add("--run", default="", metavar="DIR", help="run folder")
    add("--recipe", default="", help="run, record, teacher: the recipe")
    add("--seed", type=int, default=None, help="record: check that the run had it; run: its seed")
    add("--dry_run", action="store_true", help="run: only say what would be run")
    add("--since", default="HEAD", metavar="REV", help="resolved: the git revision to compare with")
    add(
        "--check",
        action="store_true",
        help="leaderboard: change nothing; exit 1 where table and evidence differ",
    )
    add("--base", default="", metavar="DIR", help="guidance: another checkpoint of the base")
    add("--num_samples", type=int, default=250, help="guidance: samples of each at each scale")
    add("--html", default="", metavar="PAGE", help="leaderboard: write this page to look at, and no table")
    add(
        "--runs", default="", metavar="DIR", help="with --html: run folders named after recipes, for pictures"
    )
    return flags


def main(argv: list[str] | None = None) -> int:
    """0; 1 where --check finds something; 2 for a user's mistake."""
    argv = sys.argv[1:] if argv is None else argv
    if not (argv and argv[0] in RUN or {"-h", "--help"} & set(argv)):
        return evaluate.main(argv)
    args = _flags().parse_args(argv)
    quiet()
    try:
        return RUN[args.command](args)
    except UserError as error:
        return fail(error)


def _study(args) -> int:
    """A study of one run, kept among the benchmarks."""
    from eval.evidence import results_folder

    if not args.run:
        raise UserError("--run", "none given", "a run, or the export, of a text-to-image student")
    record = importlib.import_module(f"eval.{args.command}").record
    file = record(args.run, results_folder() / "benchmarks")
    print((file.read_text() if file.suffix == ".json" else "") + f"wrote {file}")
    return 0


def _relight(args) -> int:
    from eval.evidence import results_folder
    from eval.relight import record

    file = record(results_folder() / "benchmarks")
    print(file.read_text() + f"wrote {file}")
    return 0


def _guidance(args) -> int:
    from eval.evidence import results_folder
    from eval.guidance import record

    if not args.run:
        raise UserError("--run", "none given", "a run, or the export, of a student that takes the scale")
    file = record(args.run, results_folder() / "benchmarks", args.base, args.num_samples)
    print(file.read_text() + f"wrote {file}")
    return 0


def _leaderboard(args) -> int:
    from eval.leaderboard import README, leaderboard

    if args.html:
        from eval.evidence import read_all
        from eval.gallery import write_gallery

        print(f"wrote {write_gallery(read_all(), Path(args.html), Path(args.runs) if args.runs else None)}")
        return 0
    problems = leaderboard(args.check)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not args.check:
        print(f"wrote {README}")
    return 1 if problems else 0


def _resolved(args) -> int:
    from eval.resolved import since

    count, renamed, changed = since(args.since)
    for line in (*renamed, *changed):
        print(line)
    print(
        f"{count} configs of {args.since}: {len(renamed)} renamed, {len(changed)} that are not what they were"
    )
    return 1 if changed else 0


def _record(args) -> int:
    from eval.evidence import record

    if not (args.run and args.recipe):
        raise UserError("record", "needs --run DIR and --recipe NAME", "see --help")
    print(f"wrote {record(args.run, args.recipe, args.seed)}")
    return 0


def _run(args) -> int:
    from eval.chain import run

    if not args.recipe:
        raise UserError("run", "needs --recipe NAME", "see --help")
    return run(args.recipe, args.seed, args.dry_run)


def _teacher(args) -> int:
    from eval.teachers import record_teacher

    if not args.recipe:
        raise UserError("teacher", "needs --recipe NAME", "see --help")
    print(f"wrote {record_teacher(args.recipe)}")
    return 0


RUN = {
    "run": _run,
    "record": _record,
    "teacher": _teacher,
    "leaderboard": _leaderboard,
    "resolved": _resolved,
    "negative": _study,
    "diversity": _study,
    "forgetting": _study,
    "transfer": _study,
    "longer": _study,
    "relight": _relight,
    "frontier": _study,
    "guidance": _guidance,
}


if __name__ == "__main__":
    sys.exit(main())
