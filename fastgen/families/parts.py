"""Helpers of family declarations: several networks as one, tokens as feature maps, FLUX's time shift."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

FLOW_TIMES = {"t1000": lambda t: 1000 * t, "unit": lambda t: t, "reversed": lambda t: 1 - t}


class DiffusersModel(nn.Module):
    """Type of a diffusers model (denoiser or autoencoder) in annotations, and base of `Parts`.

    A module with the settings of its class in `config` (read as attributes or with `get`); which further
    attributes it has depends on the class.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> "DiffusersModel": ...


class Parts(DiffusersModel):
    """Several networks that act as one denoiser (two experts, a UNet and its ControlNet), by folder name."""

    def __init__(self, **parts: DiffusersModel):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.names = tuple(parts)

    @property
    def config(self) -> Any:
        """Config of the first part, the denoiser itself."""
        return getattr(self, self.names[0]).config

    def enable_gradient_checkpointing(self, function=None) -> None:
        for name in self.names:
            getattr(self, name).enable_gradient_checkpointing(function)


def of_adapter(name: str) -> bool:
    """Whether a parameter or buffer of this name is of an adapter, and not of the network under it."""
    return any(part in name for part in ("lora_", "guidance_adapters.", "camera_embedding."))


def compute_dtype(net: nn.Module) -> torch.dtype:
    """The floating dtype that a network takes its inputs in.

    Of half-precision networks, diffusers keeps the modules that their class names in float32
    (`_keep_in_fp32_modules`), and adapters are trained in float32: neither counts. float32 where nothing else
    is left.
    """
    first = getattr(net, net.names[0]) if isinstance(net, Parts) else net
    kept = kept_in_float32(first)
    for name, parameter in first.named_parameters():
        if parameter.is_floating_point() and not of_adapter(name) and not any(k in name for k in kept):
            return parameter.dtype
    return torch.float32


@torch.no_grad()
def cast_network(net: nn.Module, dtype: torch.dtype) -> Any:
    """The same network with its floating parameters and buffers in `dtype`, but for those that its class
    keeps in float32 (which stay as they are).
    """
    for part in [getattr(net, n) for n in net.names] if isinstance(net, Parts) else [net]:
        kept = kept_in_float32(part)
        for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
            kept_whole = "guidance_adapters." in name or any(k in name.split(".") for k in kept)
            if tensor.is_floating_point() and not kept_whole:
                tensor.data = tensor.data.to(dtype)
    return net


def kept_in_float32(net: nn.Module) -> tuple[str, ...]:
    return tuple(getattr(net, "_keep_in_fp32_modules", None) or ())


def part_name(file: str, part: str) -> str:
    """Name of the adapter file of a further network of a denoiser, given that of the first one."""
    return f"{file.removesuffix('.safetensors')}-{part}.safetensors"


def changed_config(net: DiffusersModel, **changes) -> dict[str, Any]:
    """The config of a network with some of its values changed.

    diffusers lists the values that a file did not name under _use_default_values, and `from_config` gives
    these the class's defaults whatever the config says: without the list, a change of one of them counts.
    """
    return {k: v for k, v in net.config.items() if k != "_use_default_values"} | changes


def _of_changed_config(net: DiffusersModel, **changes) -> DiffusersModel:
    """A new network of the same class on the same device; the state of the random generators is kept."""
    with torch.device(next(net.parameters()).device), torch.random.fork_rng(devices=[]):
        return type(net).from_config(changed_config(net, **changes))


def rebuilt(net: DiffusersModel, rename: tuple[str, str] = ("", ""), **changes) -> DiffusersModel:
    """The network of a changed config with the same weights, `rename`d; new layers have random weights."""
    changed = _of_changed_config(net, **changes)
    changed.load_state_dict({k.replace(*rename): v for k, v in net.state_dict().items()}, strict=False)
    return cast_network(changed, compute_dtype(net))


@torch.no_grad()
def one_channel_wider(net: DiffusersModel, input_layer: str) -> DiffusersModel | None:
    """A network with one more input channel whose weights are zero, so that it computes the same function;
    None if the input layer is not a single convolution over the latent.
    """
    layer = dict(net.named_modules()).get(input_layer)
    if not isinstance(layer, nn.Conv2d) or layer.in_channels != net.config.in_channels:
        return None
    wider = _of_changed_config(net, in_channels=net.config.in_channels + 1)
    state, key = net.state_dict(), f"{input_layer}.weight"
    state[key] = torch.cat([state[key], torch.zeros_like(state[key][:, :1])], 1)
    if layer.weight.device.type != "meta":
        wider.load_state_dict(state)
    return cast_network(wider, compute_dtype(net))


def has_channel_statistics(vae: DiffusersModel) -> bool:
    """Whether an autoencoder's config has the mean and the standard deviation of its latents per channel."""
    return all(vae.config.get(f"latents_{k}") is not None for k in ("mean", "std"))


def channel_statistics(vae: DiffusersModel, z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents per channel, from the autoencoder's config, shaped for z
    [B, C, ...].
    """
    shape = (1, -1, *[1] * (z.ndim - 2))
    mean, std = (torch.tensor(vae.config[f"latents_{k}"]).to(z).view(shape) for k in ("mean", "std"))
    return mean, std


def patch_of(net: DiffusersModel) -> int:
    """Side of a patch (one token) in latent pixels; 1 for networks without patches."""
    size = net.config.get("patch_size") or 1
    return size if isinstance(size, int) else size[-1]


def fold_tokens(out: Tensor, x: Tensor, patch: int) -> Tensor:
    """Tokens [B, N, C], row-major over x's patches, as [B, C, h, w] with frames stacked along h."""
    w = x.shape[-1] // patch
    return out.transpose(1, 2).unflatten(2, (out.shape[1] // w, w))


def dynamic_shift(config: Any, tokens: int) -> float:
    """FLUX's resolution-dependent time shift: mu is linear in the number of tokens; the shift is exp(mu), or
    mu itself where the scheduler's time_shift_type is "linear".
    """
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    if config.get("time_shift_type", "exponential") == "linear":
        return float(mu)
    return float(torch.tensor(mu, dtype=torch.float64).exp())
