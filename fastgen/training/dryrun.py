"""`--dry_run`: what a config would do, without starting anything."""

from fastgen.config.run import RunConfig, dump
from fastgen.core.rng import Rng
from fastgen.roles.roles import Role
from fastgen.training.cast import Cast
from fastgen.training.memory import estimate, network_calls


def weightless(cfg: RunConfig) -> Cast:
    """The run's parts on the meta device."""
    silent = cfg.model_copy(update={"train": cfg.train.model_copy(update={"compile": False})})
    return Cast(silent, "meta")


def rehearse(cfg: RunConfig) -> None:
    """Make every stage's objective once on parts without weights: what a config gets wrong is refused here,
    before a run folder is touched.
    """
    cast = weightless(cfg)
    for stage in cfg.all_stages():
        cast.stage(stage, Rng(cfg.train.seed))


def describe(cfg: RunConfig) -> str:
    """Resolved config, players, network evaluations per step and a memory estimate, as plain text."""
    cast, lines = weightless(cfg), [dump(cfg), "players"]
    for stage in cfg.all_stages():
        lines += _stage(cfg, cast, stage)
    return "\n".join([*lines, "", *_memory(cfg, cast), "nothing was started or written"])


def _stage(cfg: RunConfig, cast: Cast, stage) -> list[str]:
    objective = cast.stage(stage, Rng(cfg.train.seed))
    teacher = cast.parts["teacher"].backbone
    lines = [f"  stage {stage.name}: {stage.objective.name}, {stage.max_train_steps} steps"]
    lines.append(f"    {'teacher':<10} {_count(teacher, base_only=True):>12,} frozen")
    for name, player in objective.players.items():
        trainable = sum(p.numel() for p in player.trainable().values())
        shared = any(isinstance(p, Role) and p.backbone is teacher for p in player.parts.values())
        frozen = _count(teacher, base_only=True) if shared else 0
        where = "adapter over the teacher's base (shared, not copied)" if shared else "own copy"
        lines.append(f"    {name:<10} {trainable:>12,} trainable {frozen:>12,} frozen  {where}")
    student = cast.parts["student"]
    spelled = ", ".join(f"{n} {v:g}" for n, v in network_calls(cfg, stage, len(student.times)).items())
    lines.append(f"    network evaluations per step (+grad carries a backward): {spelled}")
    lines.append(f"    student times: {', '.join(f'{t:g}' for t in student.times)} ({student.sampler})")
    return lines


def _count(backbone, base_only: bool = False) -> int:
    return sum(p.numel() for n, p in backbone.named_parameters() if not (base_only and "lora_" in n))


def _memory(cfg: RunConfig, cast: Cast) -> list[str]:
    found = estimate(cfg, cast)
    lines = ["memory estimate (MB)"] + [f"  {n:<52}{v / 2**20:>10.1f}" for n, v in found.rows.items()]
    lines.append(f"  {'total':<52}{found.total / 2**20:>10.1f}")
    if found.encoders:
        text = "text and image encoders, beside the weights until prompts are cached"
        lines.append(f"  ({text}: {found.encoders / 2**20:.1f})")
    return lines
