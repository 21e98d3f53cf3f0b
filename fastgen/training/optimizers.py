"""What moves the weights of a player: its optimizer, its learning rate, and its gradients over processes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastgen.config.sections import PlayerOptim
from fastgen.core.errors import UserError


def make_optimizer(parameters: list[Tensor], cfg: PlayerOptim) -> torch.optim.Optimizer:
    """The optimizer of one player."""
    if cfg.name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise UserError(
                "optim.name", "adamw8bit needs bitsandbytes", 'pip install "fastgen-distill[gpu]"'
            ) from None
        return AdamW8bit(parameters, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay)
    given: dict[str, Any] = {
        "lr": cfg.lr,
        "betas": cfg.betas,
        "eps": cfg.eps,
        "weight_decay": cfg.weight_decay,
    }
    if cfg.name == "radam":
        return torch.optim.RAdam(parameters, **given)
    spread = {isinstance(p, DTensor) for p in parameters}
    one_by_one = False if len(spread) > 1 else None  # lists of both kinds are no input of a kernel
    return torch.optim.AdamW(parameters, **given, fused=cfg.fused or None, foreach=one_by_one)


def lr_factor(cfg: PlayerOptim, k: int, total: int) -> float:
    """Learning-rate multiplier at step k of a stage: linear warm-up, then constant, cosine or linear to
    zero.
    """
    if k < cfg.warmup_steps:
        return (k + 1) / cfg.warmup_steps
    done = (k - cfg.warmup_steps) / max(total - cfg.warmup_steps, 1)
    return {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}[cfg.schedule]


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Mean of the gradients over processes, in flat buckets of about 100 MB. A parameter that some process
    had no use for this time (an expert none of its samples needed) counts as zero there. Those that are
    spread over the processes have it already.
    """
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if not (torch.distributed.is_initialized() and parameters):
        return
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    used = used.to(parameters[0].device)
    torch.distributed.all_reduce(used, torch.distributed.ReduceOp.MAX)
    for parameter, somewhere in zip(parameters, used.tolist()):
        if somewhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    bucket: list[Tensor] = []
    size = 0
    grads = [p.grad for p in parameters if p.grad is not None]
    for i, grad in enumerate(grads):
        bucket.append(grad)
        size += grad.numel()
        if size > 25_000_000 or i == len(grads) - 1:
            flat = torch.cat([g.flatten() for g in bucket])
            torch.distributed.all_reduce(flat)
            flat /= torch.distributed.get_world_size()
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(part.view_as(g))
            bucket, size = [], 0
