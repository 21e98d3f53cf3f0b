"""What a process is sent of a network of which it knows the shapes alone."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel

from fastgen.networks import sharding

NETS = {
    "wan": (  # tables of its positions are buffers that no file holds
        WanTransformer3DModel,
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 20, "in_channels": 4}
        | {"out_channels": 4, "text_dim": 8, "freq_dim": 8, "ffn_dim": 8, "num_layers": 1}
        | {"rope_max_seq_len": 16},
    ),
    "qwen": (  # tables of its positions are plain attributes, of complex numbers
        QwenImageTransformer2DModel,
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16}
        | {"num_attention_heads": 2, "joint_attention_dim": 8, "axes_dims_rope": (4, 6, 6)},
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_every_tensor_of_a_network_is_sent(name, monkeypatch):
    """Parameters, buffers and plain attributes, in one order; none is left on the meta device."""
    cls, config = NETS[name]
    first = cls(**config)
    with torch.device("meta"):
        other = cls(**config)
    sent = sharding._tensors(first)
    shapes = sharding._tensors(other)
    assert list(shapes) == list(sent) and all(t.is_meta for t in shapes.values())
    assert len(sent) > len(first.state_dict()), "more than a file holds"
    values = iter(sent.values())
    monkeypatch.setattr(sharding, "is_first", lambda: False)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda value, source: value.copy_(next(values)))
    sharding._receive(other, shapes, "cpu")
    received = sharding._tensors(other)
    assert list(received) == list(sent)
    for key, value in sent.items():
        torch.testing.assert_close(received[key], value, rtol=0, atol=0, equal_nan=True)
    assert all(p.requires_grad for p in other.parameters())


def test_networks_are_made_on_one_process_where_there_is_one():
    assert sharding.before_sharding("cuda") == "cuda" and sharding.is_first()
    assert sharding.of_first("own") == "own"


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_alone_makes_networks_with_weights(first, monkeypatch):
    monkeypatch.setattr(sharding, "processes", lambda: 2)
    monkeypatch.setattr(sharding, "is_first", lambda: first)
    assert sharding.before_sharding("cuda") == ("cpu" if first else "meta")
    assert sharding.before_sharding("meta") == "meta"
