"""Attention around a ring of processes: a kernel for diffusers' loop over the parts of keys and values.

The loop needs the logarithm of the sum of the weights beside the output, which diffusers' native attention
does not return: without this there is no ring on a CPU, and on a card only where a user chooses a kernel. It
gets the fused kernel of PyTorch, on a card in half precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def ring_kernel() -> Iterator[None]:
    """Inside the block, diffusers' native attention over processes uses it."""
    from diffusers.models import attention_dispatch as native

    before = native._native_attention_forward_op, native._native_attention_backward_op
    native._native_attention_forward_op, native._native_attention_backward_op = _forward, _backward
    try:
        yield
    finally:
        native._native_attention_forward_op, native._native_attention_backward_op = before


def _forward(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _save_ctx: bool = True,
    _parallel_config: Any = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, D], logarithm of the sum [B, S, H]) of [B, S, H, D], in the precision of autocast."""
    if attn_mask is not None:
        raise ValueError("attention with a mask cannot go around a ring")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if kind != "cpu":
        from diffusers.models.attention_dispatch import _native_flash_attention_forward_op as flash

        return flash(ctx, query, key, value, None, 0.0, False, scale, False, True, _save_ctx)
    given = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*given, 0.0, False, scale=scale)
    if _save_ctx:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
    return out.transpose(1, 2), lse.transpose(1, 2)


def _backward(ctx: Any, grad_out: Tensor, **part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value [B, S, H, D]; part: these, with `out` and `lse` over all keys."""
    dtype = part["key"].dtype
    part |= {"grad_out": grad_out.to(dtype), "out": part["out"].to(dtype)}
    if grad_out.device.type != "cpu":
        from diffusers.models.attention_dispatch import _native_flash_attention_backward_op as flash

        return flash(ctx, **part)
    names = ("grad_out", "query", "key", "value", "out", "lse")
    given = (part[name].transpose(1, 2).contiguous() for name in names)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    q, k, v = (x.transpose(1, 2) for x in backward(*given, 0.0, False, scale=ctx.scale))
    return q, k, v
