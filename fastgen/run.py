"""One run from command line to report: load the config, build the cast, train, measure, export.

  python train.py --config a.yaml b.yaml --optim.student.lr 1e-4
"""

import argparse
import importlib
import importlib.util
import json
import logging
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from fastgen.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Entry point of train.py; 0, or 2 for a user's mistake, 3 for a run stopped by a number that is not finite."""
    argv = sys.argv[1:] if argv is None else argv
    flags = _flags()
    known, rest = flags.parse_known_args(argv)
    try:
        for module in known.plugin:
            _import_plugin(module)
        from fastgen.config import help_text, load
        from fastgen.paths import config

        cfg = load(known.config or [str(config("recipes/quickstart.yaml"))], rest)
        if known.help:
            print(flags.format_help() + help_text(cfg))
            return 0
        return run(cfg, known)
    except UserError as error:
        return fail(error)


def fail(error: UserError) -> int:
    """Print a user's mistake as one line; the exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _import_plugin(module: str) -> None:
    sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError("--plugin", f"{module} cannot be imported ({error})", "a module on the Python path") from None


def _flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser("train.py", add_help=False, allow_abbrev=False, description=__doc__)
    flags.add_argument("-h", "--help", action="store_true", help="show this and every key of the config")
    flags.add_argument("--config", nargs="+", default=[], metavar="YAML", help="files, merged left to right")
    flags.add_argument("--resume", action="store_true", help="continue the run in output_dir, bit-exactly")
    flags.add_argument("--overwrite", action="store_true", help="clear a run folder first")
    flags.add_argument("--dry_run", action="store_true", help="print what would run, and start nothing")
    flags.add_argument("--plugin", nargs="+", default=[], metavar="MODULE", help="import objectives from elsewhere first")
    return flags


def run(cfg, known) -> int:
    """Train one validated config."""
    import torch
    from accelerate import Accelerator

    from fastgen import checkpoint, finish
    from fastgen.build import Cast
    from fastgen.config import dump
    from fastgen.data import load_data
    from fastgen.trainer import NotFinite, Trainer

    _quiet()
    if known.dry_run:
        from fastgen.dryrun import describe

        print(describe(cfg))
        return 0
    if cfg.train.num_threads:
        torch.set_num_threads(cfg.train.num_threads)
    accelerator = Accelerator(
        log_with=_trackers(cfg.train.report_to) or None, project_dir=cfg.output_dir,
        cpu=not torch.cuda.is_available(), mixed_precision=cfg.train.mixed_precision,
        gradient_accumulation_steps=cfg.train.gradient_accumulation_steps,
    )
    if accelerator.is_main_process:
        folder = checkpoint.open_run(cfg.output_dir, known.resume, known.overwrite)
        checkpoint.write_text(folder / "config.yaml", dump(cfg))
        checkpoint.write_text(folder / "environment.json", json.dumps(environment(), indent=2))
    accelerator.wait_for_everyone()
    if cfg.train.report_to:
        accelerator.init_trackers("fastgen")
    folder = Path(cfg.output_dir)
    cast = Cast(cfg, accelerator.device)
    data = load_data(cfg.data, cast.teacher, accelerator.device)
    validator = finish.Validator(cfg, cast, data, folder)
    trainer = Trainer(cfg, cast, data, folder, accelerator, validator)
    try:
        trainer.fit(checkpoint.latest(folder) if known.resume else None)
    except NotFinite as error:
        print(f"error: {error}; the last good checkpoint is {checkpoint.latest(folder)}", file=sys.stderr)
        return 3
    if accelerator.is_main_process:
        finish.finish(trainer, validator.judge)
    return 0


def _trackers(names: tuple[str, ...]) -> list[str]:
    """Trackers besides metrics.jsonl, each if its library is there."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError("train.report_to", f"{name} is not installed", f'pip install "fastgen-distill[{name}]"')
    return list(names)


def environment() -> dict:
    """What a run ran on: versions, command, platform."""
    libraries = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "fastgen-distill")
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {"command": ["train.py", *sys.argv[1:]], "python": platform.python_version(), "platform": platform.platform(), **found}


def _quiet() -> None:
    """Keep libraries' start-up chatter out of the terminal."""
    for name in ("diffusers", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
