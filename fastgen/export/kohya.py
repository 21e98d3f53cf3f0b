"""LoRA files under kohya's names: `lora_unet_` + the module path with underscores + `.lora_down.weight`,
`.lora_up.weight` and `.alpha`. Many user interfaces read only these.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from fastgen.core.errors import UserError
from fastgen.core.files import write_tensors
from fastgen.export.lora import Layers, check_keys, highest_rank


def write_kohya(file: Path, layers: Layers, prefix: str, header: dict[str, str], dtype=torch.float32) -> Path:
    """An adapter under kohya's names; alpha equals the rank."""
    tensors = {}
    for name, (a, b) in layers.items():
        key = f"{prefix}_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = a.to(dtype)
        tensors[f"{key}.lora_up.weight"] = b.to(dtype)
        tensors[f"{key}.alpha"] = torch.tensor(float(a.shape[0]))
    rank = str(highest_rank(layers))
    kohya = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    return write_tensors(file, tensors, {**kohya, **header})


def is_kohya(keys) -> bool:
    """Whether these are the keys of such a file."""
    return any(key.endswith(".lora_down.weight") for key in keys)


def read_kohya(tensors: dict[str, Tensor], net: nn.Module, key: str = "lora") -> Layers:
    """The layers of such a file for the network it adapts: A and B in float32, alpha / rank folded into B.

    The names have lost their dots, so the network's own modules say where they stood.
    """
    modules = {name.replace(".", "_"): name for name, _ in net.named_modules() if name}
    starts = {k.partition(".")[0] for k in tensors}
    known = {start: _module(start, modules) for start in starts}
    if lost := sorted(start for start, name in known.items() if not name):
        found = f"{type(net).__name__} has no layer for {lost[0]!r}"
        raise UserError(key, found, "the LoRA belongs to another base, or adapts a text encoder too")
    layers = {}
    for start, name in known.items():
        down, up = (tensors.get(f"{start}.lora_{end}.weight") for end in ("down", "up"))
        if down is None or up is None:
            wrong = f"{start} lacks lora_down or lora_up; other kinds (LoHa, LoKr, DoRA) are not read"
            raise UserError(key, wrong, "give a plain LoRA")
        rank = down.shape[0]
        alpha = float(tensors.get(f"{start}.alpha", torch.tensor(float(rank))))
        layers[name] = (down.float(), up.float() * (alpha / rank))
    check_keys(net, layers, key)
    return layers


def _module(start: str, modules: dict[str, str]) -> str:
    """The module path behind `lora_unet_down_blocks_0_...`; empty if the network has none."""
    for prefix in ("lora_unet_", "lora_transformer_"):
        if start.startswith(prefix) and start.removeprefix(prefix) in modules:
            return modules[start.removeprefix(prefix)]
    return ""
