"""The student of a run as one of its checkpoints left it, ready to be exported: without the run's data, its
optimizers and its trackers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgen.config.parse import read_files
from fastgen.config.run import validate
from fastgen.config.sections import TrainConfig
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.data.loader import load_data
from fastgen.evaluation.run_files import check_run
from fastgen.export.load import fuse
from fastgen.roles.roles import Students
from fastgen.training import checkpoint
from fastgen.training.assembly import make_cast
from fastgen.training.cast import Cast


@dataclass
class Restored:
    """What an exporter reads of a run."""

    cast: Cast
    """with the stages up to the one that wrote the checkpoint"""
    train_cfg: TrainConfig
    step: int
    folder: Path
    finished: bool
    """whether it is the run's last step"""
    weights: str
    """which: an average by its decay, raw, or best"""
    example: str
    """a prompt of the run's own data"""
    enlarges: int
    """how many times larger the pictures are that it makes of others; 0 of one that is shown none"""


def choose(run: Path, step: int | None) -> Path:
    """The checkpoint of a run folder after `step` steps, or for None the newest; a damaged one is refused."""
    check_run(run, "--run")
    found = {int(p.name.removeprefix("checkpoint-")): p for p in checkpoint.checkpoints(run)}
    if not found:
        raise UserError("--run", f"{run} holds no checkpoint", "let the run make one")
    if step is not None and step not in found:
        there = ", ".join(map(str, sorted(found)))
        raise UserError("--checkpoint", f"{run} has none of step {step}", f"there are {there}")
    path = found[max(found) if step is None else step]
    try:
        checkpoint.verify(path)
    except checkpoint.Damaged as error:
        way = "give another step with --checkpoint"
        raise UserError("--checkpoint", f"{path} is damaged ({error})", way) from None
    return path


@torch.no_grad()
def restore(run: Path, step: int | None = None, raw: bool = False, device="cpu") -> Restored:
    """The student of a run at a checkpoint: its first average (after the last step what the run itself would
    export), or with `raw` the trained weights themselves.
    """
    path = choose(run, step)
    tensors, meta = checkpoint.load(path)
    cfg = validate(read_files([str(run / "config.yaml")]))
    stages = cfg.all_stages()
    writer = min(meta["stage"] if meta["k"] else meta["stage"] - 1, len(stages) - 1)
    cast = make_cast(cfg, device)
    if isinstance(cast.student, Students):
        cast.divide(load_data(cfg.data, cast.teacher, device, pixels=False))
    for stage in stages[: writer + 1]:
        cast.stage(stage, Rng(cfg.train.seed))
    student, decays = cast.student.trainable(), () if raw else cfg.train.ema_decay
    _copy(student, tensors, f"ema/{decays[0]}/" if decays else "part/student.", path)
    finished, weights = meta["step"] >= sum(s.max_train_steps for s in stages), "raw"
    weights = f"EMA {decays[0]:g}" if decays else "raw"
    if finished and not raw:
        best = run / "best.safetensors"
        if cfg.eval.keep == "best" and best.is_file():
            from safetensors.torch import load_file

            _copy(student, load_file(best), "", best)
            weights = f"best, {weights}"
        if cfg.student.fuse:
            fuse(student, cfg.student.fuse, cfg.student.fuse_weight)
    cast.stages = stages[: writer + 1]
    enlarges = cfg.data.degradation.factor if cfg.data.degradation else 0
    example = meta.get("example", "")
    return Restored(cast, cfg.train, meta["step"], run, finished, weights, example, enlarges)


def _copy(own: Mapping[str, Tensor], state: Mapping[str, Tensor], prefix: str, source: Path) -> None:
    """Copy a state into parameters by name."""
    for name, value in own.items():
        if f"{prefix}{name}" not in state or state[f"{prefix}{name}"].shape != value.shape:
            found = f"{source} does not hold {name} of this run's student"
            raise UserError("--run", found, "give the run folder as the run left it")
        value.copy_(state[f"{prefix}{name}"])
