"""Directional derivatives of a network: d/dh f(x + h dx, t + h dt) at h = 0, for continuous-time methods.

exact: forward-mode AD. Of torch's attention kernels only "math" has it, so the pass runs under that one.
difference: (f(+h) - f(-h)) / 2h, two plain passes on any kernel. Networks embed time in float32 whatever
  their weights, so h cannot be taken arbitrarily small.

Both run in their own pass without gradient and without autocast. The value of f is not returned: the pass
with gradient that every method makes anyway gives it, and sg f is its `.detach()`. (Keeping one graph with
its tangents costs more than two passes: 3.2 against 2.7 times a plain step on a UNet.)
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.networks.attention import exact_attention

SMALLEST_STEP = 1e-5
"""below it a difference of float32 passes is mostly rounding: about 1e-6 / 2h of the output"""


class TangentConfig(BaseModel):
    """How derivatives along the trajectory are taken."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    method: Literal["exact", "difference"] = "exact"
    """forward-mode AD, or central differences of two plain passes"""
    step: float = Field(1e-4, gt=0)
    """h of the differences, on times of order one"""
    math_attention: bool = True
    """let the exact pass use torch's math attention; false keeps the kernel in force, which must have
    forward AD
    """

    @model_validator(mode="after")
    def _above_rounding(self):
        if self.step < SMALLEST_STEP:
            raise ValueError(
                f"step: found {self.step:g}; below {SMALLEST_STEP:g} the float32 rounding of the time "
                "embedding outweighs the difference"
            )
        return self

    @property
    def reach(self) -> float:
        """How far from its point the derivative looks."""
        return self.step if self.method == "difference" else 1e-6


def tangent(f: Callable[..., Tensor], at: tuple, along: tuple, cfg: TangentConfig) -> Tensor:
    """Derivative of f at the tensors `at` in the direction `along`, shaped like f's output, detached."""
    device = at[0].device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        if cfg.method == "exact":
            return _forward_mode(f, at, along, cfg)
        ends = [f(*(a + h * b for a, b in zip(at, along))) for h in (cfg.step, -cfg.step)]
        return (ends[0] - ends[1]) / (2 * cfg.step)


def _forward_mode(f, at: tuple, along: tuple, cfg: TangentConfig) -> Tensor:
    kernel = exact_attention() if cfg.math_attention else nullcontext()
    try:
        with kernel:
            return torch.func.jvp(f, at, along)[1].detach()
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error) and "forward-mode AD" not in str(error):
            raise
        raise UserError(
            "objective.tangent",
            "an operation of this network has no forward AD (as all attention kernels but math)",
            "math_attention true, or method difference",
        ) from error
