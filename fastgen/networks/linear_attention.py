"""Linear attention under autocast to float16.

It divides by a sum of its features, which diffusers computes in float32. Autocast turns the products back to
float16, where a sum of nothing plus 1e-15 is 0 (0 / 0) and a large one infinite. Linear attention therefore
leaves float16 autocast and computes in the precision of its weights, as it does without autocast. Under
bfloat16, which has float32's range, nothing is changed.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Net = TypeVar("Net", bound=nn.Module)


def float16_autocast(device: str) -> bool:
    """Whether autocast on this kind of device is on, and to float16; a device without weights has none."""
    if device == "meta":
        return False
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16


def linear_attention(net: nn.Module) -> list[nn.Module]:
    """The modules of a network that are linear attention (SANA's, and its autoencoder's)."""
    return [m for m in net.modules() if _is_linear(m) or _is_linear(_inner(m))]


def _is_linear(part: Any) -> bool:
    return any(word in type(part).__name__ for word in ("LinearAttn", "LinearAttention"))


def _inner(module: nn.Module) -> Any:
    processor: Any = getattr(module, "processor", None)
    return processor.inner if isinstance(processor, OwnPrecision) else processor


def guard(net: Net) -> Net:
    """The same network, whose linear attention stays out of float16 autocast."""
    layers: list[Any] = linear_attention(net)
    for layer in layers:
        if not isinstance(layer.processor, OwnPrecision):
            layer.processor = OwnPrecision(layer.processor)
    return net


class OwnPrecision:
    """An attention processor that float16 autocast does not reach: it computes in the precision of its
    layers' weights.
    """

    def __init__(self, inner: Any):
        self.inner = inner

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        device = hidden_states.device.type
        if not float16_autocast(device):
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, **more)
        dtype = attn.to_out[0].weight.dtype
        text = None if encoder_hidden_states is None else encoder_hidden_states.to(dtype)
        with torch.autocast(device, enabled=False):
            found = self.inner(attn, hidden_states.to(dtype), text, attention_mask, **more)
        return found.to(hidden_states.dtype)
