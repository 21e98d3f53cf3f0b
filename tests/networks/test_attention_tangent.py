"""The derivative of attention by blocks: PyTorch's math kernel, masks, memory, whole networks, Triton."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.networks.attention_tangent import OnlineAttention, attention_tangent
from fastgen.networks.jvp import TangentConfig, tangent
from fastgen.networks.triton_attention import there
from tests.networks.test_jvp import relative, setting

QUERIES, KEYS, WIDTH = 37, 70, 12


def drawn(seed: int = 0, heads: int = 3) -> list[torch.Tensor]:
    """q, k, v and their tangents."""
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, n, WIDTH, generator=make) for n in (QUERIES, KEYS, KEYS) * 2]


def by_math(q, k, v, dq, dk, dv, **how):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **how)

    with sdpa_kernel([SDPBackend.MATH]):
        return torch.func.jvp(attend, (q, k, v), (dq, dk, dv))


@pytest.mark.parametrize("block", [1, 16, 70, 256])
def test_any_block_gives_what_the_math_kernel_gives(block):
    found, exact = attention_tangent(*drawn(), block=block), by_math(*drawn())
    for ours, theirs in zip(found, exact):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)
    assert exact[1].abs().max() > 0.1, "a derivative to be seen"


def test_large_logits_do_not_overflow():
    q, *others = drawn()
    found, exact = attention_tangent(200 * q, *others, block=16), by_math(200 * q, *others)
    assert all(f.isfinite().all() for f in found)
    torch.testing.assert_close(found[1], exact[1], rtol=1e-3, atol=1e-3)


def test_each_tangent_has_its_share():
    """Along v alone the derivative is attention itself; equal values everywhere leave q and k no share."""
    q, k, v, dq, dk, dv = drawn()
    zero = torch.zeros_like
    _, along_v = attention_tangent(q, k, v, zero(q), zero(k), dv)
    torch.testing.assert_close(along_v, F.scaled_dot_product_attention(q, k, dv), rtol=1e-4, atol=1e-5)
    _, none = attention_tangent(q, k, torch.ones_like(v), dq, dk, zero(v))
    assert none.abs().max() < 1e-5
    _, some = attention_tangent(q, k, v, dq, dk, zero(v))
    assert some.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["boolean", "added", "causal"])
def test_masks(kind):
    """The first twenty keys, more than a block, are hidden from every query."""
    seen = torch.rand(2, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(5)) < 0.7
    seen[..., :20], seen[..., 20] = False, True
    if kind == "causal":
        seen = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril()
    mask = torch.where(seen, 0.0, -1e4) if kind == "added" else seen
    found, exact = attention_tangent(*drawn(), mask=mask, block=16), by_math(*drawn(), attn_mask=seen)
    torch.testing.assert_close(found[1], exact[1], rtol=1e-4, atol=1e-5)
    assert relative(attention_tangent(*drawn())[1], exact[1]) > 0.1, "the mask must be seen"


@pytest.mark.parametrize("how", [{}, {"is_causal": True}, {"scale": 0.1}, {"enable_gqa": True}])
def test_in_the_place_of_pytorch_s_function(how):
    q, k, v, dq, dk, dv = drawn(heads=4)
    if "enable_gqa" in how:
        k, v, dk, dv = (x[:, :2].contiguous() for x in (k, v, dk, dv))
    exact = by_math(q, k, v, dq, dk, dv, **how)
    with torch.no_grad(), OnlineAttention():
        found = torch.func.jvp(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **how), (q, k, v), (dq, dk, dv)
        )
    for ours, theirs in zip(found, exact):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_dropout_is_refused():
    q, k, v, dq, dk, dv = drawn()
    with OnlineAttention(), pytest.raises(RuntimeError, match="forward-mode AD"):
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


class Largest(TorchDispatchMode):
    """The most elements that a tensor made inside the block has."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.most = max(self.most, out.numel())
        return out


def test_no_matrix_of_tokens_by_tokens():
    tokens = 1024
    given = [torch.randn(1, 1, tokens, 16) for _ in range(6)]
    with torch.no_grad(), Largest() as ours:
        attention_tangent(*given, block=64)
    with torch.no_grad(), Largest() as math:
        by_math(*given)
    assert ours.most == tokens * 64 and math.most == tokens * tokens


@pytest.mark.parametrize("family", ["sd", "flow", "sana"])
def test_through_a_whole_network(family, tiny):
    f, at, along = setting(tiny(family))
    exact = tangent(f, at, along, TangentConfig())
    assert relative(tangent(f, at, along, TangentConfig(online_attention=True)), exact) < 1e-4


INTERPRETED = """
import torch
from fastgen.networks.attention_tangent import attention_tangent
from fastgen.networks.triton_attention import fused_attention_tangent
make = torch.Generator().manual_seed(0)
for queries, keys, width in ((37, 70, 12), (32, 32, 16), (5, 1, 40)):
    given = [torch.randn(2, 3, n, width, generator=make) for n in (queries, keys, keys) * 2]
    for ours, theirs in zip(fused_attention_tangent(*given), attention_tangent(*given)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.skipif(not there(), reason="needs triton")
def test_the_triton_kernel_in_its_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
def test_the_triton_kernel_on_a_gpu():
    from fastgen.networks.triton_attention import fused_attention_tangent

    given = [x.cuda() for x in drawn()]
    for ours, theirs in zip(fused_attention_tangent(*given), attention_tangent(*given)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
