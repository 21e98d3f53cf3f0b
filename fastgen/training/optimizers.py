"""What moves the weights of a player: its optimizer, its learning rate, and its gradients over processes."""

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastgen.config.sections import PlayerOptim
from fastgen.core.errors import UserError

EIGHT_BIT = {"adamw8bit": ("bitsandbytes", "gpu"), "adamw8bit_torchao": ("torchao", "quant")}
"""package of each optimizer with states in eight bits, and the extra that installs it"""


def make_optimizer(parameters: list[Tensor], cfg: PlayerOptim) -> torch.optim.Optimizer:
    """The optimizer of one player."""
    given: dict[str, Any] = {
        "lr": cfg.lr,
        "betas": cfg.betas,
        "eps": cfg.eps,
        "weight_decay": cfg.weight_decay,
    }
    if cfg.name in EIGHT_BIT:
        return _library(cfg.name).AdamW8bit(parameters, **given)
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


def _library(name: str) -> Any:
    """The module of the package that an optimizer with states in eight bits comes from."""
    package, extra = EIGHT_BIT[name]
    try:
        return importlib.import_module(f"{package}.optim")
    except ImportError:
        instruction = f'pip install "fastgen-distill[{extra}]"'
        raise UserError("optim.name", f"{name} needs {package}", instruction) from None


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next update; some optimizers keep it in a tensor of theirs."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def state_bytes(cfg: PlayerOptim) -> float:
    """Bytes of one of Adam's two states of a weight: float32, or 8 bits with a scale for each 256."""
    return 1 + 4 / 256 if cfg.name in EIGHT_BIT else 4


# -- states in files -----------------------------------------------------------------------------------------
CODED = "codes", "scale", "qmap"
"""what torchao keeps an 8-bit state as"""


def plain_tensors(key: str, state: Tensor) -> dict[str, Tensor]:
    """A state of an optimizer as the tensors that a file can hold: itself, or the parts of a coded one."""
    if isinstance(state, DTensor) or not hasattr(state, "__tensor_flatten__"):
        return {key: state}
    return {f"{key}.{part}": getattr(state, part) for part in CODED}


def coded_again(state: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A weight's states, with those that `plain_tensors` took apart put together again."""
    coded = {key.removesuffix(".codes") for key in state if key.endswith(".codes")}
    rest = {key: value for key, value in state.items() if key.rpartition(".")[0] not in coded}
    for key in coded:
        parts = (state[f"{key}.{part}"] for part in CODED)
        signed = key != "exp_avg_sq"  # squares have no sign
        rest[key] = _library("adamw8bit_torchao").subclass_8bit.OptimState8bit(*parts, signed, dtype)
    return rest
