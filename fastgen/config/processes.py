"""What networks that are spread over processes or kept in the machine's memory, and samples that are computed
in parts, cannot be combined with; said at the start.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fastgen.config.sections import EvalConfig, StudentConfig, TeacherConfig, TrainConfig
from fastgen.objectives import ObjectiveConfig, requirements_of


@dataclass(frozen=True)
class Sections:
    """Of a run, those that have a say in this."""

    train: TrainConfig
    teacher: TeacherConfig
    student: StudentConfig
    eval: EvalConfig


def check_processes(
    cfg: Sections, objectives: Sequence[ObjectiveConfig], optimizers: Collection[str]
) -> None:
    """Raises ValueError, which names the key; `optimizers` by name."""
    if cfg.train.sharding:
        _check_sharding(cfg, objectives)
        _refuse({"optim.name adamw8bit_torchao": "adamw8bit_torchao" in optimizers}, "train.sharding fsdp")
    else:
        for key in ("shard_group", "sharded_checkpoints"):
            if getattr(cfg.train, key):
                raise ValueError(f"train.{key}: only with train.sharding fsdp; add it, or leave this out")
    if cfg.teacher.offload:
        _check_offload(cfg)
    if cfg.train.context_parallel:
        _check_context_parallel(cfg, objectives)


def _refuse(found: Mapping[str, bool], beside: str) -> None:
    for key in (key for key, given in found.items() if given):
        raise ValueError(f"{key}: not with {beside}; change one of them")


def _check_sharding(cfg: Sections, objectives: Sequence[ObjectiveConfig]) -> None:
    found = {
        "teacher.quantization": cfg.teacher.quantization is not None,
        "train.mixed_precision": cfg.train.mixed_precision == "fp16",
        "train.channels_last": cfg.train.channels_last,
        "eval.keep": cfg.eval.keep == "best",
        "student.fuse": bool(cfg.student.fuse),
        "student.asset": cfg.student.asset is not None,
    }
    _refuse(found, "train.sharding fsdp")
    for one in objectives:
        if requirements_of(one).forward_mode:
            raise ValueError(
                f"objective.tangent.method: found exact for {one.name}, which train.sharding fsdp cannot "
                "differentiate; use difference"
            )


def _check_offload(cfg: Sections) -> None:
    found = {
        "teacher.quantization": cfg.teacher.quantization is not None,
        "train.sharding": cfg.train.sharding is not None,
        "train.compile": cfg.train.compile,
        "train.compile_blocks": cfg.train.compile_blocks,
    }
    _refuse(found, "teacher.offload")


def _check_context_parallel(cfg: Sections, objectives: Sequence[ObjectiveConfig]) -> None:
    found = {
        "train.compile": cfg.train.compile,
        "train.compile_blocks": cfg.train.compile_blocks,
        "train.gradient_accumulation_steps": cfg.train.gradient_accumulation_steps > 1,
        "student.asset": cfg.student.asset is not None,
        "student.causal": cfg.student.causal is not None,
        "objective.name": any(requirements_of(one).tiles for one in objectives),
        "objective.tangent": any(requirements_of(one).forward_mode for one in objectives),
    }
    _refuse(found, "train.context_parallel")
    for one in objectives:
        if beside := requirements_of(one).auxiliaries:
            raise ValueError(
                f"train.context_parallel: {one.name} has {', '.join(beside)} beside its networks, which is "
                "not computed in parts; leave one of them out (objective.gan_weight 0)"
            )
