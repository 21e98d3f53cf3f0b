"""Directional derivatives of a network: d/dh f(x + h dx, t + h dt) at h = 0, for continuous-time methods.

exact: forward-mode AD. Of PyTorch's attention kernels only "math" supports it, so that one is used, or our
  own derivative (`attention_tangent`), which keeps no matrix of tokens by tokens.
difference: (f(+h) - f(-h)) / 2h, two passes with any kernel. Networks embed time in float32 whatever the
  precision of their weights, so that h cannot be arbitrarily small.

Both are computed without gradient and without autocast. The value of f is not returned: every method has it
from its pass with gradient, as `.detach()`. (One pass that keeps both the graph and the tangents is slower
than two passes: 3.2 against 2.7 times a plain training step on a UNet.)
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastgen.core.errors import UserError
from fastgen.networks.attention import exact_attention
from fastgen.networks.attention_tangent import OnlineAttention

SMALLEST_STEP = 1e-5
"""for a smaller h the difference of float32 passes is mostly rounding error, about 1e-6 / 2h"""
NORMS = (F.layer_norm, F.group_norm, F.rms_norm)


class TangentConfig(BaseModel):
    """How derivatives along the trajectory are computed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    method: Literal["exact", "difference"] = "exact"
    """exact: forward-mode automatic differentiation; difference: central difference of two passes"""
    step: float = Field(default=1e-4, gt=0)
    """step h of the central difference, in units of a time that runs from 0 to about 1"""
    math_attention: bool = True
    """compute exact derivatives with PyTorch's math attention; false keeps the kernel that is set, which
    must support forward-mode differentiation
    """
    online_attention: bool = False
    """compute exact derivatives of attention block by block, in memory linear in the tokens, whichever kernel
    is set (Triton on CUDA, PyTorch elsewhere); for resolutions and clips whose attention matrices do not fit
    """

    @model_validator(mode="after")
    def _above_rounding(self) -> "TangentConfig":
        if self.step < SMALLEST_STEP:
            raise ValueError(
                f"step: found {self.step:g}, where float32 rounding exceeds the difference; "
                f"use at least {SMALLEST_STEP:g}"
            )
        return self

    @property
    def reach(self) -> float:
        """Distance from the point at which f is evaluated."""
        return self.step if self.method == "difference" else 1e-6


class _NormsInFloat32(TorchFunctionMode):
    """Normalise layers of half precision in float32. PyTorch's derivative of a norm multiplies by 1 / std to
    the third power, which float16 cannot hold for a std below 1/40.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        if function not in NORMS or x.dtype not in (torch.float16, torch.bfloat16):
            return function(*args, **kwargs)
        raised = function(*map(_float32, args), **{k: _float32(v) for k, v in kwargs.items()})
        return raised.to(x.dtype)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def tangent(f: Callable[..., Tensor], at: tuple, along: tuple, cfg: TangentConfig) -> Tensor:
    """Derivative of f at the tensors `at` in the direction `along`, shaped like the output of f, detached."""
    device = at[0].device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        if cfg.method == "exact":
            return _forward_mode(f, at, along, cfg)
        ends = [f(*(a + h * b for a, b in zip(at, along))) for h in (cfg.step, -cfg.step)]
        return (ends[0] - ends[1]) / (2 * cfg.step)


def _forward_mode(f: Callable[..., Tensor], at: tuple, along: tuple, cfg: TangentConfig) -> Tensor:
    kernel: AbstractContextManager[Any] = nullcontext()
    if cfg.online_attention:
        kernel = OnlineAttention()
    elif cfg.math_attention:
        kernel = exact_attention()
    try:
        with kernel, _NormsInFloat32():
            return torch.func.jvp(f, at, along)[1].detach()
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error) and "forward-mode AD" not in str(error):
            raise
        raise UserError(
            "objective.tangent",
            "an operation of this network does not support forward-mode differentiation",
            "set its math_attention to true, or its method to difference",
        ) from error
