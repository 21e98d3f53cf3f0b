"""Attention kernels by name, and the one that forward-mode and second derivatives need.

A kernel is in use while a network runs (and while a checkpointed block is recomputed), never globally. math,
flash, efficient and cudnn are PyTorch's own and work with every network; flex, xformers and sage need
diffusers' attention dispatcher. On older networks, which do not call it, they would have no effect and are a
user error.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.core.errors import UserError

TORCH = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
DISPATCHED = ("flex", "xformers", "sage")
_exact: ContextVar[bool] = ContextVar("exact_attention", default=False)


@contextmanager
def exact_attention() -> Iterator[None]:
    """Run attention with PyTorch's math kernel, the only one with forward-mode and with second derivatives,
    whichever kernel the network is set to.
    """
    token = _exact.set(True)
    try:
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    finally:
        _exact.reset(token)


def as_now() -> Callable[[], AbstractContextManager[None]]:
    """What lets attention be as exact in a pass later on as it is now."""
    return exact_attention if _exact.get() else nullcontext


@contextmanager
def kernel(name: str | None) -> Iterator[None]:
    """Run attention with this kernel inside the block; None leaves the choice to PyTorch."""
    if name is None or _exact.get():
        yield
    elif name in TORCH:
        with sdpa_kernel([TORCH[name]]):
            yield
    else:
        from diffusers.models.attention_dispatch import attention_backend

        with attention_backend(name):
            yield


def dispatches(net: nn.Module) -> bool:
    """Whether a network's attention goes through diffusers' dispatcher, not directly to PyTorch."""
    return any(hasattr(getattr(m, "processor", None), "_attention_backend") for m in net.modules())


def works(name: str, device: str | torch.device) -> bool:
    """Whether a kernel runs on this device, forward and backward."""
    try:
        if name == "xformers":
            import xformers.ops  # noqa: F401
        q = torch.randn(1, 16, 2, 16, device=device, requires_grad=True)
        if torch.device(device).type == "cuda":
            q = q.detach().half().requires_grad_()
        with kernel(name):
            if name in TORCH:
                heads = q.transpose(1, 2)
                out = nn.functional.scaled_dot_product_attention(heads, heads, heads)
            else:
                from diffusers.models.attention_dispatch import dispatch_attention_fn

                out = dispatch_attention_fn(q, q, q)
            out.float().sum().backward()
    except Exception:  # a missing kernel, or one without backward, raises errors of many types
        return False
    return True


def check(net: nn.Module, name: str | None, device: str | torch.device) -> str | None:
    """The kernel to use (None for PyTorch's choice); UserError with those that work if it does not."""
    if name in (None, "auto", "native"):
        return None
    device = (
        ("cuda" if torch.cuda.is_available() else "cpu") if torch.device(device).type == "meta" else device
    )
    known = [*TORCH, *(DISPATCHED if dispatches(net) else ())]
    if name in known and works(name, device):
        return name
    usable = ", ".join(["auto", "native", *(k for k in known if k != name and works(k, device))])
    found = f"{name!r} does not run on this machine"
    if name not in known:
        found = f"{name!r} has no effect on {type(net).__name__}, which calls PyTorch's attention directly"
    raise UserError("teacher.attention", found, f"use one of {usable}")
