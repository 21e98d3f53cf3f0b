"""Linear attention stays out of float16 autocast, where plain diffusers divides 0 by 0."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    SanaLinearAttnProcessor2_0,
    SanaMultiscaleLinearAttention,
)

from fastgen.networks import codecs
from fastgen.networks.linear_attention import OwnPrecision, guard, linear_attention


@pytest.fixture
def net():
    """One layer whose keys are so small that float16 rounds their products to zero."""
    torch.manual_seed(0)
    processor = SanaLinearAttnProcessor2_0()
    layer = Attention(8, heads=2, dim_head=4, processor=processor).requires_grad_(False)
    for linear in (layer.to_q, layer.to_k):
        linear.weight.mul_(1e-4)
    return torch.nn.ModuleList([layer, torch.nn.Linear(8, 8)])


def under(dtype, layer, x):
    with torch.autocast("cpu", dtype):
        return layer(x)


def test_plain_diffusers_fails_and_the_guard_does_not(net):
    x = torch.randn(2, 6, 8)
    wanted = net[0](x)
    assert not under(torch.float16, net[0], x).isfinite().all()
    guard(net)
    torch.testing.assert_close(under(torch.float16, net[0], x), wanted)
    torch.testing.assert_close(net[0](x), wanted, rtol=0, atol=0)


def test_half_precision_weights_and_inputs(net):
    x = torch.randn(2, 6, 8)
    wanted = net[0](x)
    found = under(torch.float16, guard(net).half()[0], x.half())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))


def test_bfloat16_autocast_is_left_alone(net):
    x = torch.randn(2, 6, 8)
    before = under(torch.bfloat16, net[0], x)
    torch.testing.assert_close(under(torch.bfloat16, guard(net)[0], x), before, rtol=0, atol=0)


def test_guarded_once_and_copied(net):
    again = copy.deepcopy(guard(guard(net)))
    assert linear_attention(again) == [again[0]]
    assert isinstance(again[0].processor, OwnPrecision)
    assert isinstance(again[0].processor.inner, SanaLinearAttnProcessor2_0)


def test_autoencoders_with_linear_attention_leave_float16_autocast():
    """The kind of SANA's autoencoder, with and without such a layer."""

    vae = torch.nn.Module()
    with torch.autocast("cpu", torch.float16):
        with codecs._no_overflow(vae, "cpu"):
            assert torch.is_autocast_enabled("cpu")
        vae.layer = SanaMultiscaleLinearAttention(8, 8, attention_head_dim=4, norm_type="rms_norm")
        with codecs._no_overflow(vae, "cpu"):
            assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16), codecs._no_overflow(vae, "cpu"):
        assert torch.is_autocast_enabled("cpu")
