"""One run from command line to report: load the config, build the cast, train, measure, export.

python train.py --config a.yaml b.yaml --optim.student.lr 1e-4
"""

import argparse
import errno
import importlib
import importlib.util
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from fastgen.core.console import Flags, fail, quiet
from fastgen.core.errors import UserError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


def main(argv: list[str] | None = None) -> int:
    """Entry point of train.py; 0, or 2 for a user's mistake, 3 for a run stopped by a number that is not
    finite.
    """
    argv = sys.argv[1:] if argv is None else argv
    flags = _flags()
    try:
        known, rest = flags.parse_known_args(argv)
        for module in known.plugin:
            _import_plugin(module)
        from fastgen.config.run import help_text, load
        from fastgen.core.paths import config

        switches = tuple(n.lstrip("-") for a in flags._actions for n in a.option_strings)
        cfg = load(known.config or [str(config("recipes/quickstart.yaml"))], rest, switches)
        if known.help:
            print(flags.format_help() + "\n" + help_text(cfg))
            return 0
        return run(cfg, known)
    except UserError as error:
        return fail(error)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        return fail(UserError("output_dir", error, "free some space or choose a folder that can be written"))
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130


def _import_plugin(module: str) -> None:
    """Import a module by dotted name, or a .py file by path, so that its objectives join the registry."""
    path = Path(module)
    folder, name = (path.resolve().parent, path.stem) if module.endswith(".py") else (Path.cwd(), module)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever somebody's module raises
        told = f"{module} cannot be imported ({type(error).__name__}: {error})"
        raise UserError("--plugin", told, "a module on the Python path, or a .py file") from None


def _flags() -> argparse.ArgumentParser:
    flags = Flags(
        "train.py",
        add_help=False,
        allow_abbrev=False,
        usage="train.py [--config YAML ...] [flags] [--section.key VALUE ...]",
        description="Train one run: load the config, build the cast, train, measure, export. "
        "Keys of the config are flags too; "
        "the list below shows those of the objective and values chosen so far.",
    )
    flags.add_argument("-h", "--help", action="store_true", help="show this and every key of the config")
    flags.add_argument(
        "--config",
        nargs="+",
        default=[],
        metavar="YAML",
        help="files, merged left to right; configs:NAME is bundled",
    )
    flags.add_argument("--resume", action="store_true", help="continue the run in output_dir, bit-exactly")
    flags.add_argument("--overwrite", action="store_true", help="clear a run folder first")
    flags.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="print what would run, and start nothing"
    )
    flags.add_argument(
        "--plugin", nargs="+", default=[], metavar="MODULE", help="import objectives from elsewhere first"
    )
    return flags


def run(cfg, known) -> int:
    """Train one validated config."""
    import torch

    from fastgen.data.loader import load_data
    from fastgen.networks.codecs import TextCodec
    from fastgen.training import checkpoint, validation
    from fastgen.training.cast import Cast
    from fastgen.training.dryrun import describe, rehearse
    from fastgen.training.trainer import NotFinite, Trainer

    quiet()
    _check_libraries(cfg)
    if known.dry_run:
        print(describe(cfg))
        return 0
    folder = checkpoint.check_run(cfg.output_dir, known.resume, known.overwrite)
    last = checkpoint.latest(folder) if known.resume else None
    if last:
        checkpoint.check_same(last, checkpoint.fingerprint(cfg))
    if cfg.train.num_threads:
        torch.set_num_threads(cfg.train.num_threads)
    rehearse(cfg)
    accelerator = _accelerator(cfg)
    cast = Cast(cfg, accelerator.device)
    data = load_data(cfg.data, cast.teacher, accelerator.device, pixels=cfg.reads_data())
    validator = validation.Validator(cfg, cast, data, folder)
    # nothing is written before everything was found in order
    _open(cfg, folder, known.overwrite, accelerator)
    if isinstance(cast.teacher.codec, TextCodec):
        freed = cast.teacher.codec.free() / 2**20
        print(f"every prompt is encoded: text encoders freed, {freed:.1f} MB")
    trainer = Trainer(cfg, cast, data, folder, accelerator, validator)
    try:
        trainer.fit(last)
    except NotFinite as error:
        good = checkpoint.latest(folder)
        kept = f"the last good checkpoint is {good}" if good else "no checkpoint was made yet"
        print(f"error: {error}; {kept}", file=sys.stderr)
        return 3
    if accelerator.is_main_process:
        validation.finish(trainer, validator.evaluator)
    accelerator.end_training()
    return 0


def _accelerator(cfg):
    import torch
    from accelerate import Accelerator

    return Accelerator(
        log_with=list(cfg.train.report_to) or None,
        project_dir=cfg.output_dir,
        cpu=not torch.cuda.is_available(),
        mixed_precision=cfg.train.mixed_precision,
        gradient_accumulation_steps=cfg.train.gradient_accumulation_steps,
    )


def _open(cfg, folder: Path, overwrite: bool, accelerator) -> None:
    """Write what a run folder starts with, and start the trackers."""
    from fastgen.config.run import dump
    from fastgen.core.files import write_text
    from fastgen.training import checkpoint

    if accelerator.is_main_process:
        checkpoint.open_run(folder, overwrite)
        write_text(folder / "config.yaml", dump(cfg))
        write_text(folder / "environment.json", json.dumps(environment(), indent=2))
    accelerator.wait_for_everyone()
    if cfg.train.report_to:
        accelerator.init_trackers("fastgen")


def _check_libraries(cfg) -> None:
    """Optional libraries and hardware that a config asks for, before anything is loaded."""
    import torch

    def need(library: str, key: str, extra: str) -> None:
        if importlib.util.find_spec(library) is None:
            raise UserError(key, f"{library} is not installed", f'pip install "fastgen-distill[{extra}]"')

    for name in cfg.train.report_to:
        need(name, "train.report_to", name)
    for stage in cfg.all_stages():
        for player, optim in stage.optim:
            if optim.name == "adamw8bit":
                need("bitsandbytes", f"optim.{player}.name: adamw8bit", "gpu")
    if cfg.train.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.mixed_precision", "found 'fp16' without a GPU", "allowed on a CPU: no, bf16")


def environment() -> dict:
    """What a run ran on: versions, command, platform."""
    libraries = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "fastgen-distill")
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {
        "command": ["train.py", *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        **found,
    }
