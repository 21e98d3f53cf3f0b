"""The Triton kernel of `attention_tangent`: attention and its forward-mode derivative in one pass."""

import importlib.util

import torch
from torch import Tensor

BLOCK = 32
"""queries, and keys, of a program"""


def there() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


if there():
    import triton
    import triton.language as tl

    @triton.jit
    def _kernel(
        q_at, k_at, v_at, dq_at, dk_at, dv_at, o_at, do_at,
        scale, N, M, D,
        WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        head, rows = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        columns = tl.arange(0, WIDTH)
        at_q = head * N * D + rows[:, None] * D + columns[None, :]
        real_q = (rows[:, None] < N) & (columns[None, :] < D)
        q = tl.load(q_at + at_q, mask=real_q, other=0.0).to(tl.float32)
        dq = tl.load(dq_at + at_q, mask=real_q, other=0.0).to(tl.float32)
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        mass, drift = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        out, moved = tl.zeros([BLOCK, WIDTH], tl.float32), tl.zeros([BLOCK, WIDTH], tl.float32)
        for first in range(0, M, BLOCK):
            keys = first + tl.arange(0, BLOCK)
            at_k = head * M * D + keys[:, None] * D + columns[None, :]
            real_k = (keys[:, None] < M) & (columns[None, :] < D)
            k = tl.load(k_at + at_k, mask=real_k, other=0.0).to(tl.float32)
            dk = tl.load(dk_at + at_k, mask=real_k, other=0.0).to(tl.float32)
            v = tl.load(v_at + at_k, mask=real_k, other=0.0).to(tl.float32)
            dv = tl.load(dv_at + at_k, mask=real_k, other=0.0).to(tl.float32)
            s = scale * tl.dot(q, tl.trans(k), input_precision="ieee")
            ds = tl.dot(dq, tl.trans(k), input_precision="ieee")
            ds = scale * (ds + tl.dot(q, tl.trans(dk), input_precision="ieee"))
            s = tl.where(keys[None, :] < M, s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            kept, p = tl.exp(top - higher), tl.exp(s - higher[:, None])
            weighed = p * ds
            mass = mass * kept + tl.sum(p, 1)
            drift = drift * kept + tl.sum(weighed, 1)
            out = out * kept[:, None] + tl.dot(p, v, input_precision="ieee")
            moved = moved * kept[:, None] + tl.dot(weighed, v, input_precision="ieee")
            moved += tl.dot(p, dv, input_precision="ieee")
            top = higher
        out = out / mass[:, None]
        moved = moved / mass[:, None] - (drift / mass)[:, None] * out
        tl.store(o_at + at_q, out, mask=real_q)
        tl.store(do_at + at_q, moved, mask=real_q)


def fused_attention_tangent(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(o, do) as `attention_tangent` gives them, for q [B, H, N, D] and k, v [B, H, M, D]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, num, width = q.shape
    o, do = (torch.empty(q.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    given = [x.contiguous() for x in (q, k, v, dq, dk, dv)]
    grid = (triton.cdiv(num, BLOCK), batch * heads)
    padded = max(16, triton.next_power_of_2(width))
    _kernel[grid](*given, o, do, scale, num, k.shape[-2], width, WIDTH=padded, BLOCK=BLOCK)
    return o, do
