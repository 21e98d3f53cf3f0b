"""One run from command line to report: load config, networks and data, train, export, evaluate.

python train.py --config a.yaml b.yaml --optim.student.lr 1e-4
"""

import argparse
import importlib
import importlib.util
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from fastgen.core import interrupt, progress
from fastgen.core.console import Flags, exit_code, not_finite, program, quiet
from fastgen.core.errors import NotFinite, UserError, first_line, warn
from fastgen.core.files import disk_error
from fastgen.core.paths import expand
from fastgen.core.threads import threads_per_process

EXIT_CODES = f"""exit codes: 0 success; 2 an error of the user or of the disk, in one line; 3 NaN or infinite
numbers; {interrupt.REQUEUE} stopped by SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C, with a checkpoint of the
last step: the same command with --resume goes on (a scheduler may requeue it); 130 stopped at once by a
second Ctrl-C."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of train.py; its exit codes are in the text of --help."""
    with interrupt.handled():
        try:
            return exit_code(lambda: _main(sys.argv[1:] if argv is None else argv))
        except interrupt.Stopped as stop:
            text = "stopped before training began, nothing is lost; the same command starts it again"
            print(f"{stop}: {text}", file=sys.stderr)
            return interrupt.REQUEUE
        except KeyboardInterrupt:
            text = "stopped at once; the same command with --resume goes on from the last checkpoint"
            print(text, file=sys.stderr)
            return 130


def _main(argv: list[str]) -> int:
    quiet()
    flags = _flags()
    known, rest = flags.parse_known_args(argv)
    script = Path(sys.argv[0]).name == "train.py"
    known.command = [*(["train.py"] if script else ["fastgen", "train"]), *argv]
    for module in known.plugin:
        _import_plugin(module)
    if known.list:
        from fastgen.config.catalogue import listing

        print(listing())
        return 0
    from fastgen.cli.train_start import help_page, refused, starting_config

    switches = tuple(n.lstrip("-") for a in flags._actions for n in a.option_strings)
    try:
        cfg = starting_config(known, rest, switches)
        if known.help is not None:
            print(help_page(flags, cfg, known.help))
            return 0
        return run(cfg, known)
    except UserError as error:
        raise refused(error, known) from None


def _import_plugin(module: str) -> None:
    """Import a module by dotted name, or a .py file by path, so that its objectives join the registry."""
    path = Path(expand(module))
    folder, name = (path.resolve().parent, path.stem) if module.endswith(".py") else (Path.cwd(), module)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever somebody's module raises
        found = f"{module} cannot be imported ({type(error).__name__}: {error})"
        raise UserError("--plugin", found, "give a module on the Python path, or a .py file") from None


def _flags() -> argparse.ArgumentParser:
    name = program("train.py")
    flags = Flags(
        name,
        add_help=False,
        allow_abbrev=False,
        usage=f"{name} [--config YAML ...] [flags] [--section.key VALUE ...]",
        description="Train one run: load config, networks and data, train, export, evaluate. "
        "Keys of the config are flags too.",
        epilog=EXIT_CODES,
    )
    flags.add_argument(
        "-h", "--help", nargs="*", metavar="SECTION", help="show this; the keys of a section, or all"
    )
    flags.add_argument("--list", action="store_true", help="methods, teachers and recipes, a line each")
    flags.add_argument("--method", default="", help="start from the recommended settings of a method ...")
    flags.add_argument("--teacher", default="", metavar="PATH", help="... for this teacher, without a file")
    flags.add_argument(
        "--max_steps",
        type=int,
        metavar="N",
        help="a smoke run: at most N steps a stage, few samples measured",
    )
    flags.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="YAML",
        help="files, merged left to right; configs:NAME is bundled",
    )
    flags.add_argument("--resume", action="store_true", help="continue the run in output_dir, bit-exactly")
    flags.add_argument("--overwrite", action="store_true", help="delete the earlier run in output_dir first")
    flags.add_argument(
        "--allow_changed",
        nargs="+",
        default=[],
        metavar="KEY",
        help="with --resume: go on although these settings changed, e.g. optim data world_size",
    )
    flags.add_argument(
        "--insist",
        action="store_true",
        help="do not refuse a run whose estimate exceeds the memory there is, or 100 days",
    )
    flags.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="print what would run, and start nothing"
    )
    flags.add_argument(
        "--plugin",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODULE",
        help="import your own objectives first: dotted module names or .py files",
    )
    return flags


def run(cfg, known) -> int:
    """Train one validated config."""
    import torch

    from fastgen.cli import overview
    from fastgen.training import assembly, checkpoint, run_folder

    _check_libraries(cfg)
    if known.dry_run:
        return _dry_run(cfg)
    _check_halves(cfg)
    main_process = progress.main_process()
    folder = Path(cfg.output_dir)
    if main_process:
        run_folder.check_folder(cfg.output_dir, assembly.input_paths(cfg), known.resume, known.overwrite)
    last = checkpoint.newest_good(folder, main_process) if known.resume else None
    if last:
        checkpoint.check_same(last, assembly.fixed_settings(cfg), known.allow_changed, report=False)
    torch.set_num_threads(threads_per_process(cfg.train.num_threads, torch.get_num_threads()))
    if main_process:
        print(overview.table(overview.settings_rows(cfg)), flush=True)
    cast = _rehearse(cfg, known.insist, last)
    if main_process:
        print(overview.table(overview.network_rows(cast, cfg.train)), flush=True)
    accelerator = _accelerator(cfg)
    trainer = _prepare(cfg, folder, accelerator)
    if last:
        checkpoint.check_same(last, trainer.fingerprint, known.allow_changed, report=main_process)
    # nothing is written before everything was found in order
    if not main_process:
        accelerator.wait_for_everyone()
        with interrupt.deferred():
            return _train(cfg, trainer, last)
    with interrupt.deferred(), run_folder.opened(folder, known.resume, known.overwrite):
        _open(cfg, folder, last, known)
        accelerator.wait_for_everyone()
        with _page_at_rest(folder):
            return _train(cfg, trainer, last)


@contextmanager
def _page_at_rest(folder: Path) -> Iterator[None]:
    """However the run ends, its page no longer waits for more."""
    from fastgen.training.validation import refresh_report

    page = folder / "report" / "index.html"
    try:
        yield
    finally:
        if page.is_file() and "data-live" in page.read_text(encoding="utf-8"):
            refresh_report(folder, running=False)


def _dry_run(cfg) -> int:
    """Print the whole config, the table of the run, and what its data hold; of a run that is refused, why."""
    from fastgen.cli import overview
    from fastgen.config.run import dump
    from fastgen.data.loader import look_at
    from fastgen.data.sources import check_there
    from fastgen.training import assembly
    from fastgen.training.dryrun import rehearse

    check_there(cfg.data)
    cast = assembly.make_weightless_cast(cfg)
    rehearse(cast, cfg.train)
    print(dump(cfg))
    print(overview.table(overview.settings_rows(cfg)), flush=True)
    print(overview.table(overview.network_rows(cast, cfg.train, details=True)), flush=True)
    look_at(cfg.data, cast.teacher)
    print("nothing was started or written")
    return 0


def _rehearse(cfg, insist: bool, last: Path | None):
    """Refuse what cannot work or would not end, before the run folder is touched; the parts without weights
    that it was found out on.
    """
    from fastgen.data.sources import check_there
    from fastgen.training import assembly
    from fastgen.training.dryrun import rehearse
    from fastgen.training.limits import check_limits

    check_there(cfg.data)
    cast = assembly.make_weightless_cast(cfg)
    rehearse(cast, cfg.train, last)
    if not insist:
        check_limits(cast, cfg.train, cfg.eval, assembly.step_keys(cfg))
    return cast


def _prepare(cfg, folder: Path, accelerator):
    """The trainer of a run, with everything loaded."""
    from fastgen.data.loader import load_data
    from fastgen.training.assembly import make_cast, make_trainer, make_validator

    with progress.waiting(f"loading {cfg.teacher.path}"):
        cast = make_cast(cfg, accelerator.device)
    data = load_data(cfg.data, cast.teacher, accelerator.device, pixels=cfg.reads_data())
    validator = make_validator(cfg, cast, data, folder)
    return make_trainer(cfg, cast, data, folder, accelerator, validator)


def _train(cfg, trainer, last: Path | None) -> int:
    """Train, then export and measure; every way it can end, with what is safe."""
    import torch

    from fastgen.networks.codecs import TextCodec
    from fastgen.training import checkpoint, validation

    accelerator, codec = trainer.acc, trainer.cast.teacher.codec
    if cfg.train.report_to:
        accelerator.init_trackers("fastgen")
    if isinstance(codec, TextCodec) and not trainer.data.encodes_later:
        freed = codec.free() / 2**20
        print(f"every prompt is encoded: text encoders freed, {freed:.1f} MB")
    try:
        trainer.fit(last)
        with trainer.whole_networks():
            if accelerator.is_main_process:
                validation.finish(trainer, trainer.validate)
            if trainer.sharded:
                accelerator.wait_for_everyone()
    except NotFinite as error:
        aside = []
        if trainer.unchanged and accelerator.is_main_process:  # a step from that checkpoint leads here again
            aside = checkpoint.set_aside(trainer.folder, trainer.step - 1, "not-finite")
        led = "".join(f"; the one that led to this is kept as {path.name}" for path in aside)
        return not_finite(error, _last_good(trainer.folder) + led)
    except interrupt.Stopped as stop:
        if accelerator.is_main_process:
            print(f"{stop}: {_stopped(trainer)}", file=sys.stderr)
        return interrupt.REQUEUE
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            found = f"{first_line(error)}; {_last_good(trainer.folder)}"
            way = "lower it, or set train.gradient_checkpointing; --resume --allow_changed train goes on"
            raise UserError("train.train_batch_size", found, way) from None
        if not disk_error(error):
            raise
        way = "free some space, then the same command with --resume goes on"
        raise UserError("output_dir", f"{error}; {_last_good(trainer.folder)}", way) from None
    accelerator.end_training()
    return 0


def _last_good(folder: Path) -> str:
    from fastgen.training import checkpoint

    good = checkpoint.latest(folder)
    return f"the last good checkpoint is {good}" if good else "no good checkpoint was made yet"


def _stopped(trainer) -> str:
    """What is safe after a signal, and how to go on."""
    from fastgen.training import checkpoint

    last, way = checkpoint.latest(trainer.folder), "the same command with --resume"
    if trainer.exported:
        return f"stopped while measuring; the export is whole: {trainer.exported}; {way} measures it"
    if last is None:
        return f"stopped before the first step; {way} starts it"
    if trainer.step >= trainer.total:
        return f"stopped after the last step; {last} is saved; {way} exports and measures"
    return f"stopped after step {trainer.step} of {trainer.total}; {last} is saved; {way} goes on from it"


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


def _open(cfg, folder: Path, last: Path | None, known) -> None:
    """Write what a run folder starts with; a resumed run's newer, damaged checkpoints go aside."""
    from fastgen.config.run import dump
    from fastgen.core.files import write_json, write_text
    from fastgen.training import checkpoint

    if last:
        checkpoint.set_aside(folder, int(last.name.removeprefix("checkpoint-")), "damaged")
    elif known.resume:
        warn(f"--resume: {folder} has no checkpoint yet; starting from the beginning")
        checkpoint.rewind_metrics(folder, -1)
    write_text(folder / "config.yaml", dump(cfg))
    if known.recipe:
        write_text(folder / "recipe.yaml", known.recipe)
    write_json(folder / "environment.json", environment(known.command))


def _check_libraries(cfg) -> None:
    """Optional libraries and hardware that a config needs, before anything is loaded."""
    import torch

    from fastgen.training.optimizers import EIGHT_BIT

    def need(library: str, key: str, extra: str) -> None:
        if importlib.util.find_spec(library) is None:
            raise UserError(key, f"{library} is not installed", f'pip install "fastgen-distill[{extra}]"')

    for name in cfg.train.report_to:
        need(name, "train.report_to", name)
    for stage in cfg.all_stages():
        for player, optim in stage.optim:
            if optim.name in EIGHT_BIT:
                package, extra = EIGHT_BIT[optim.name]
                need(package, f"optim.{player}.name: {optim.name}", extra)
    if cfg.train.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError(
            "train.mixed_precision", "found 'fp16' without a GPU", "use no or bf16, which a CPU can compute"
        )


def _check_halves(cfg) -> None:
    """Float16 weights under bfloat16 autocast are a pair that CPUs do not compute."""
    import torch

    mixed, dtype = cfg.train.mixed_precision, cfg.teacher.dtype
    if dtype == "fp16" and mixed == "bf16" and not torch.cuda.is_available():
        found = "found 'fp16' with train.mixed_precision 'bf16' and no GPU"
        raise UserError("teacher.dtype", found, "give one precision to both: null and no, or bf16 and bf16")


def environment(command: list[str]) -> dict:
    """What a run ran on: versions, command, platform."""
    libraries = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "fastgen-distill")
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {
        "command": command,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **found,
    }
