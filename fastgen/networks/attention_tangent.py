"""Forward-mode derivative of softmax attention, block of keys by block: memory linear in the tokens.

With P = softmax(S), S = q k^T scale and dots for tangents (dS = (dq k^T + q dk^T) scale):

  o  = P v
  do = (P * dS) v + P dv - rowsum(P * dS) o

All sums run over blocks with a running maximum, as in FlashAttention (arXiv 2205.14135); sCM's JVP kernel
(arXiv 2410.11081, appendix) does the same. On CUDA a Triton kernel, with masks and elsewhere PyTorch. The
math kernel, which PyTorch differentiates itself, keeps S, P and their tangents whole.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

BLOCK = 256
"""keys of a block"""


def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """(o, do) of q [..., N, D], k [..., M, D], v [..., M, E] and their tangents, float32 [..., N, E].

    mask broadcasts to [..., N, M]: added to S, or a boolean that is true where a query sees a key.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, dq, dk, dv = (x.float() for x in (q, k, v, dq, dk, dv))
    top = q.new_full((*q.shape[:-1], 1), -torch.inf)
    mass, drift = torch.zeros_like(top), torch.zeros_like(top)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    moved = torch.zeros_like(out)
    for first in range(0, k.shape[-2], block):
        part = slice(first, first + block)
        keys, values = k[..., part, :], v[..., part, :]
        s = scale * q @ keys.mT
        ds = scale * (dq @ keys.mT + q @ dk[..., part, :].mT)
        if mask is not None:
            seen = mask if mask.shape[-1] == 1 else mask[..., part]
            s = s.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else s + seen
        higher = torch.maximum(top, s.amax(-1, keepdim=True))
        safe = higher.masked_fill(higher == -torch.inf, 0.0)  # no key was seen so far
        kept, p = (top - safe).exp(), (s - safe).exp()
        weighed = p * ds
        mass = mass * kept + p.sum(-1, keepdim=True)
        drift = drift * kept + weighed.sum(-1, keepdim=True)
        out = out * kept + p @ values
        moved = moved * kept + weighed @ values + p @ dv[..., part, :]
        top = higher
    out = out / mass
    return out, moved / mass - drift / mass * out


class _Attention(torch.autograd.Function):
    """Attention that forward mode differentiates by `attention_tangent`; it has no backward."""

    @staticmethod
    def forward(q, k, v, mask, scale):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, mask, ctx.scale = inputs
        ctx.has_mask = mask is not None
        ctx.save_for_forward(q, k, v, *([mask] if ctx.has_mask else []))

    @staticmethod
    def jvp(ctx, dq, dk, dv, dmask, dscale):
        q, k, v, *mask = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) if d is None else d for x, d in ((q, dq), (k, dk), (v, dv)))
        if q.is_cuda and not mask:
            from fastgen.networks.triton_attention import fused_attention_tangent, there

            if there():
                return fused_attention_tangent(q, k, v, dq, dk, dv, ctx.scale)[1].to(q.dtype)
        return attention_tangent(q, k, v, dq, dk, dv, mask[0] if mask else None, ctx.scale)[1].to(q.dtype)


class OnlineAttention(TorchFunctionMode):
    """Inside the block PyTorch's attention is differentiated forwards without its matrices of weights."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        return _online(*args, **kwargs)


def _online(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """F.scaled_dot_product_attention, argument for argument; dropout has no derivative along a path."""
    if dropout_p:
        raise RuntimeError("attention with dropout is not deterministic: no forward-mode AD")
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    return _Attention.apply(query, key, value, attn_mask, scale)
