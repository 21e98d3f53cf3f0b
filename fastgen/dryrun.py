"""`--dry_run`: what a config would do, told without starting anything."""

import math

import torch
from torch import Tensor

from fastgen.build import Cast
from fastgen.config import RunConfig, dump
from fastgen.objectives import REGISTRY
from fastgen.roles import Role

BYTES = 4  # trained weights, gradients and optimizer states are float32


def describe(cfg: RunConfig) -> str:
    """Resolved config, players, network evaluations per step and a memory estimate, as plain text."""
    silent = cfg.model_copy(update={"train": cfg.train.model_copy(update={"compile": False})})
    cast = Cast(silent, "meta")
    lines = [dump(cfg), "players"]
    for stage in cfg.all_stages():
        lines += _stage(cfg, cast, stage)
    return "\n".join([*lines, "", *_memory(cfg, cast), "nothing was started or written"])


def _stage(cfg: RunConfig, cast: Cast, stage) -> list[str]:
    from fastgen.rng import Rng

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
    calls = REGISTRY[stage.objective.name].evaluations(stage.objective, _guidance(cfg), len(student.times))
    spelled = ", ".join(f"{n} {v:g}" for n, v in calls.items())
    lines.append(f"    network evaluations per step (+grad carries a backward): {spelled}")
    lines.append(f"    student times: {', '.join(f'{t:g}' for t in student.times)} ({student.sampler})")
    return lines


def _guidance(cfg: RunConfig) -> float:
    """A guidance that costs what the run's costs: drawn ones always take both passes."""
    return cfg.student.guidance_embedding[1] if cfg.student.guidance_embedding else cfg.teacher.guidance


def _count(backbone, base_only: bool = False) -> int:
    return sum(p.numel() for n, p in backbone.named_parameters() if not (base_only and "lora_" in n))


def _memory(cfg: RunConfig, cast: Cast) -> list[str]:
    """Weights, gradients, Adam's two states and averages exactly; activations as autograd keeps them."""
    weights = sum(_count(b) for b in cast.backbones()) * BYTES
    weights += sum(p.numel() for p in cast.teacher.codec.parameters()) * BYTES
    trained = sum(
        sum(p.numel() for p in r.trainable().values())
        for n, r in cast.parts.items()
        if n != "teacher" and isinstance(r, Role)
    )
    heads = sum(
        p.numel() for m in cast.parts.values() if isinstance(m, torch.nn.Module) for p in m.parameters()
    )
    size, passes = _activations(cfg, cast)
    batch, half = cfg.train.train_batch_size, 1.0 if cfg.train.mixed_precision == "no" else 0.5
    student = sum(p.numel() for p in cast.parts["student"].trainable().values())
    rows = {
        "weights (all roles, shared ones once)": weights + heads * BYTES,
        "gradients": (trained + heads) * BYTES,
        "Adam states": 2 * (trained + heads) * BYTES,
        "EMA": len(cfg.train.ema_decay) * student * BYTES,
        f"activations (estimate: one pass x {passes} x batch {batch})": size * passes * batch * half,
    }
    total = sum(rows.values())
    lines = ["memory estimate (MB)"] + [f"  {n:<52}{v / 2**20:>10.1f}" for n, v in rows.items()]
    return [*lines, f"  {'total':<52}{total / 2**20:>10.1f}"]


def _activations(cfg: RunConfig, cast: Cast) -> tuple[int, int]:
    """(bytes autograd keeps for one sample's pass through the student, passes with a graph in one turn)."""
    codec, student, device = cast.teacher.codec, cast.parts["student"], cast.device
    kept: dict[int, Tensor] = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    for p in student.trainable().values():
        p.requires_grad_(True)
    own = {p.untyped_storage()._cdata for b in cast.backbones() for p in b.parameters()}
    t = torch.full((1,), student.times[0], dtype=torch.float64, device=device)
    cond = {k: v.to(device) for k, v in codec.null(1).items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = student.raw(torch.zeros(1, *codec.shape, device=device), t, cond)
    del out
    size = sum(v.untyped_storage().nbytes() for k, v in kept.items() if k not in own)
    return size, max(_passes(cfg, s, len(student.times)) for s in cfg.all_stages())


def _passes(cfg: RunConfig, stage, num_steps: int) -> int:
    """Network passes whose graphs live together, on average over turns and rounded up."""
    cls = REGISTRY[stage.objective.name]
    calls = cls.evaluations(stage.objective, _guidance(cfg), num_steps)
    with_grad = sum(v for n, v in calls.items() if n.endswith("+grad"))
    return max(1, math.ceil(with_grad / len(cls.player_parts(stage.objective))))
