"""Small things families are declared with: several networks as one, tokens as maps, FLUX's shift."""

import torch
from torch import Tensor, nn

FLOW_TIMES = {"t1000": lambda t: 1000 * t, "unit": lambda t: t, "reversed": lambda t: 1 - t}


class Parts(nn.Module):
    """Several networks that act as one denoiser (two experts, a UNet and its ControlNet), by folder name."""

    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.names = tuple(parts)

    @property
    def config(self):
        """Config of the first part, the denoiser itself."""
        return getattr(self, self.names[0]).config

    def enable_gradient_checkpointing(self, function=None) -> None:
        for name in self.names:
            getattr(self, name).enable_gradient_checkpointing(function)


def part_name(file: str, part: str) -> str:
    """Name of the adapter file of a denoiser's further network, beside the first one's."""
    return f"{file.removesuffix('.safetensors')}-{part}.safetensors"


def _of_changed_config(net: nn.Module, **changes) -> nn.Module:
    """A fresh network of the same class on the same device; the random stream stays where it was."""
    with torch.device(next(net.parameters()).device), torch.random.fork_rng(devices=[]):
        return type(net).from_config({**net.config, **changes})


def rebuilt(net: nn.Module, rename: tuple[str, str] = ("", ""), **changes) -> nn.Module:
    """The network of a changed config with the same weights, `rename`d; new layers keep their fresh ones."""
    fresh = _of_changed_config(net, **changes)
    fresh.load_state_dict({k.replace(*rename): v for k, v in net.state_dict().items()}, strict=False)
    return fresh


@torch.no_grad()
def one_channel_wider(net: nn.Module, input_layer: str) -> nn.Module | None:
    """The same function by a network with one more input channel, whose weights are zero; None where the
    input layer is not one plain convolution over the latent.
    """
    layer = dict(net.named_modules()).get(input_layer)
    width = net.config.in_channels
    if not isinstance(layer, nn.Conv2d) or layer.in_channels != width:
        return None
    wider = _of_changed_config(net, in_channels=width + 1)
    state, key = net.state_dict(), f"{input_layer}.weight"
    state[key] = torch.cat([state[key], torch.zeros_like(state[key][:, :1])], 1)
    if layer.weight.device.type != "meta":
        wider.load_state_dict(state)
    return wider


def patch_of(net: nn.Module) -> int:
    size = net.config.get("patch_size") or 1
    return size if isinstance(size, int) else size[-1]


def fold_tokens(out: Tensor, x: Tensor, patch: int) -> Tensor:
    """Tokens [B, N, C], row-major over x's patches, as [B, C, h, w] with frames stacked along h."""
    w = x.shape[-1] // patch
    return out.transpose(1, 2).unflatten(2, (out.shape[1] // w, w))


def dynamic_shift(config, tokens: int) -> float:
    """FLUX's resolution-dependent shift: mu linear in the tokens, exp(mu) unless declared linear."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    if config.get("time_shift_type", "exponential") == "linear":
        return float(mu)
    return float(torch.tensor(mu, dtype=torch.float64).exp())
