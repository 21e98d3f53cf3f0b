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
