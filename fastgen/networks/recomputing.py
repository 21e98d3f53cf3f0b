"""Which results of a block selective checkpointing keeps: those that are costly to compute anew.

Products, convolutions and fused attention take nearly all of a pass's time; norms, activations, modulation
and the products of adapters, whose rank is small, make most of what autograd keeps (PyTorch's selective
activation checkpointing).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

WORTH = 256
"""multiplications for each number of a result from which it is kept; adapters have a rank below"""
_ATEN = torch.ops.aten
_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_fused_attention_overrideable.default,
}
_MULTIPLICATIONS: dict[Any, Callable[..., int]] = {
    _ATEN.mm.default: lambda a, b: a.shape[1],
    _ATEN.addmm.default: lambda bias, a, b: a.shape[1],
    _ATEN.convolution.default: lambda x, weight, *_: weight[0].numel(),
}
"""how many make one number of a result; those of attention without a fused kernel (bmm) are left out, since
they are as large as its matrix of weights
"""


def is_costly(operation: Any, args: tuple[Tensor, ...]) -> bool:
    """Whether the result of a call is kept."""
    count = _MULTIPLICATIONS.get(operation)
    return operation in _ATTENTION or (count is not None and count(*args) >= WORTH)


def _policy(_context: Any, operation: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_costly(operation, args) else CheckpointPolicy.PREFER_RECOMPUTE


keep_costly = partial(create_selective_checkpoint_contexts, _policy)
"""`context_fn` of torch.utils.checkpoint"""


@contextmanager
def same_casts() -> Iterator[None]:
    """Let autocast cast a weight at every use. What it remembers of a pass it has forgotten in the backward
    pass, and a block must do the same operations in both.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
