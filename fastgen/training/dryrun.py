"""What can be refused before a run starts, found out on parts without weights."""

from pathlib import Path

from fastgen.config.run import StageConfig
from fastgen.config.sections import TrainConfig
from fastgen.core.errors import UserError, first_line
from fastgen.core.rng import Rng
from fastgen.export.write import check_copied
from fastgen.networks.backbone import Backbone
from fastgen.roles.roles import Player
from fastgen.training import checkpoint
from fastgen.training.cast import Cast


def rehearse(cast: Cast, train: TrainConfig, resume: Path | None = None) -> None:
    """Make every stage's objective once on parts without weights: what a config gets wrong and a checkpoint
    that does not fit are refused here, before a run folder is touched.
    """
    network = cast.teacher.backbone
    if isinstance(network, Backbone) and (cast.student_cfg.kind == "full" or not network.family.lora_loader):
        check_copied(cast.teacher)
    meta = checkpoint.read_meta(resume) if resume else {"stage": 0, "k": 0}
    writer = meta["stage"] if meta["k"] else meta["stage"] - 1  # the stage that saved the checkpoint
    for index, stage in enumerate(cast.stages):
        _make(cast, stage, train.seed)
        if resume and index == writer:
            _check_progress(resume, meta["k"], stage.max_train_steps)
            checkpoint.check_tensors(resume, _shapes(cast, train.ema_decay), ("part/", "ema/"))
    if writer >= len(cast.stages):
        raise UserError(
            "--resume",
            f"{resume} is of stage {writer}",
            "restore the stages of the config, or start a new output_dir",
        )


def _make(cast: Cast, stage: StageConfig, seed: int) -> None:
    """A stage's objective; a count of its own that no memory holds is the user's mistake."""
    try:
        cast.stage(stage, Rng(seed))
    except (MemoryError, OverflowError) as error:
        raise UserError("objective", first_line(error), "lower its counts") from None
    except RuntimeError as error:  # as torch reports memory that the system refuses
        if "memory" not in str(error):
            raise
        raise UserError("objective", first_line(error), "lower its counts") from None


def _shapes(cast: Cast, decays: tuple[float, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of what a checkpoint of this stage holds: trained parts and averages of the student."""
    parts = Player("all", {n: p for n, p in cast.parts.items() if n != "teacher"})
    found = {f"part/{n}": tuple(p.shape) for n, p in parts.trainable().items()}
    student = cast.student.trainable().items()
    return found | {f"ema/{d}/{n}": tuple(p.shape) for d in decays for n, p in student}


def _check_progress(path: Path, k: int, total: int) -> None:
    if k > total:
        found = f"{path.name} is {k} steps into a stage of {total}"
        raise UserError("--resume", found, "raise max_train_steps, or start a new output_dir")
