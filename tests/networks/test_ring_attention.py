"""Attention over parts of the keys, put together as a ring does, is attention over all of them."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastgen.networks.ring_attention import _backward, _forward, ring_kernel


class Context(SimpleNamespace):
    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


def whole(q, k, v):
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def test_parts_give_outputs_and_gradients_of_the_whole():
    """The parts' outputs weighted by the sums of their weights; gradients by the sums over all keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 8, 3, 4, generator=generator) for _ in range(4))
    ctx = Context()
    parts = [(k[:, :5], v[:, :5]), (k[:, 5:], v[:, 5:])]
    found = [_forward(ctx, q, *part) for part in parts]
    lse = torch.logsumexp(torch.stack([one for _, one in found]), 0)
    out = sum(one * (own - lse).exp()[..., None] for one, own in found)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = whole(*inputs)
    torch.testing.assert_close(out, expected.detach())
    dq, dk, dv = torch.autograd.grad(expected, inputs, grad)
    grads = [_backward(ctx, grad, query=q, key=a, value=b, out=out, lse=lse) for a, b in parts]
    torch.testing.assert_close(sum(g[0] for g in grads), dq)
    torch.testing.assert_close(torch.cat([g[1] for g in grads], 1), dk)
    torch.testing.assert_close(torch.cat([g[2] for g in grads], 1), dv)


def test_it_computes_in_the_precision_of_autocast():
    q = torch.randn(1, 4, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = _forward(Context(), q, q, q)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32


def test_a_mask_cannot_go_around():
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="mask"):
        _forward(Context(), q, q, q, torch.ones(1, 1, 4, 4))


def test_diffusers_has_its_own_kernel_back_afterwards():
    from diffusers.models import attention_dispatch as native

    before = native._native_attention_forward_op
    with pytest.raises(RuntimeError), ring_kernel():
        assert native._native_attention_forward_op is _forward
        raise RuntimeError
    assert native._native_attention_forward_op is before
