"""LoRA files: written so that any reader gets the strength right, read back into any network.

Layout: `unet.` or `transformer.` + module path + `.lora_A.weight` / `.lora_B.weight` (PEFT names). alpha /
rank is multiplied into B, so that a reader gets B A whether it assumes alpha = rank or reads the metadata.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.core.errors import UserError
from fastgen.core.files import write_tensors
from fastgen.core.reading import parse_json, readable
from fastgen.families.parts import part_name

Layers = dict[str, tuple[Tensor, Tensor]]  # module path -> (A [rank, in, ...], B [out, rank, ...])


def collect(net: nn.Module, adapter: str) -> Layers:
    """The adapter's matrices by module path, float32 on the CPU, alpha / rank folded into B."""
    found = {}
    for name, module in net.named_modules():
        if adapter in getattr(module, "lora_A", {}):
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            scaled = b.detach().float() * module.scaling[adapter]
            found[name] = (a.detach().float().cpu().contiguous(), scaled.cpu().contiguous())
    assert found, f"no adapter {adapter!r} in {type(net).__name__}"
    return found


def read_parts(file: Path, parts: Mapping[str, nn.Module], key: str = "lora") -> dict[str, Layers]:
    """The layers of every adapted network of a denoiser, by component folder; `file` is the first one's."""
    first = next(iter(parts))
    files = {p: file if p == first else file.with_name(part_name(file.name, p)) for p in parts}
    missing = next((f for f in files.values() if not f.is_file()), None)
    if missing is not None:
        raise UserError(key, f"{missing} does not exist", f"the file for {' and '.join(parts)} each")
    return {part: read_lora(found, key)[0] for part, found in files.items()}


def delta(a: Tensor, b: Tensor) -> Tensor:
    """The weight update B A of one layer; b is 1x1 where the layer is a convolution."""
    if a.ndim == 2:
        return b @ a
    return (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])


def _rank(layers: Layers) -> int:
    return max(a.shape[0] for a, _ in layers.values())


def write_peft(file: Path, layers: Layers, prefix: str, header: dict[str, str], dtype=torch.float32) -> Path:
    """The file diffusers' load_lora_weights takes, its metadata in agreement with its tensors."""
    from peft import LoraConfig

    ranks = {name: a.shape[0] for name, (a, _) in layers.items()}
    rank = _rank(layers)
    pattern = {n: r for n, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(layers),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
    ).to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    packed = {f"{prefix}.{k}": v for k, v in plain.items()}
    tensors = {}
    for name, (a, b) in layers.items():
        tensors[f"{prefix}.{name}.lora_A.weight"] = a.to(dtype)
        tensors[f"{prefix}.{name}.lora_B.weight"] = b.to(dtype)
    described = json.dumps(packed, sort_keys=True, default=str)
    return write_tensors(file, tensors, {"format": "pt", "lora_adapter_metadata": described, **header})


def write_kohya(file: Path, layers: Layers, prefix: str, header: dict[str, str], dtype=torch.float32) -> Path:
    """The same adapter under kohya's names, for tools that read only those; alpha equals the rank."""
    tensors = {}
    for name, (a, b) in layers.items():
        key = f"{prefix}_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = a.to(dtype)
        tensors[f"{key}.lora_up.weight"] = b.to(dtype)
        tensors[f"{key}.alpha"] = torch.tensor(float(a.shape[0]))
    rank = str(_rank(layers))
    kohya = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    return write_tensors(file, tensors, {**kohya, **header})


def read_lora(file: Path, key: str = "lora") -> tuple[Layers, dict]:
    """(layers, our header) of a LoRA file in the layout of `write_peft`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {k: handle.get_tensor(k) for k in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(key, f"{file} cannot be read ({error})", "is it a whole .safetensors file?") from None
    ending = ".lora_A.weight"
    names = {k.partition(".")[2].removesuffix(ending) for k in tensors if k.endswith(ending)}
    prefixes = {k.partition(".")[0] for k in tensors if ".lora_" in k}
    if not names or len(prefixes) != 1 or len(tensors) != 2 * len(names):
        raise UserError(
            key,
            f"{file} is not a LoRA in PEFT layout",
            "keys unet.<module>.lora_A.weight and .lora_B.weight (of an export, the file without -kohya)",
        )
    prefix = prefixes.pop()
    if lost := [n for n in names if f"{prefix}.{n}.lora_B.weight" not in tensors]:
        raise UserError(key, f"{file} has no lora_B for {lost[0]}", "copy or download the file again")
    layers = {n: tuple(tensors[f"{prefix}.{n}.lora_{m}.weight"].float() for m in "AB") for n in sorted(names)}
    packed, info = (
        parse_json(metadata.get(name, "{}"), f"{name} in the header of {file}", key)
        for name in ("lora_adapter_metadata", "fastgen")
    )
    with readable(key, file):
        _scale_by_metadata(layers, prefix, packed)
    return layers, info


def _scale_by_metadata(layers: Layers, prefix: str, packed: dict) -> None:
    """Honour alpha != rank in files that others wrote; ours have it folded in already."""
    config = {k.removeprefix(f"{prefix}."): v for k, v in packed.items() if k.startswith(f"{prefix}.")}
    for name, (a, b) in layers.items():
        alpha = (config.get("alpha_pattern") or {}).get(name, config.get("lora_alpha", a.shape[0]))
        layers[name] = (a, b * (alpha / a.shape[0]))


def check_keys(net: nn.Module, layers: Layers, key: str = "lora") -> None:
    """Every layer exists in the network and fits: other readers skip wrong keys without a word."""
    modules = dict(net.named_modules())
    for name, (a, b) in layers.items():
        module = modules.get(name)
        module = getattr(module, "base_layer", module)
        weight = getattr(module, "weight", None)
        if weight is None:
            found = f"{type(net).__name__} has no layer {name!r}"
            raise UserError(key, found, "the LoRA belongs to another base")
        if (b.shape[0], *a.shape[1:]) != tuple(weight.shape):
            raise UserError(
                key,
                f"{name} updates {(b.shape[0], *a.shape[1:])} but the base has {tuple(weight.shape)}",
                "the LoRA belongs to another base",
            )


def load_lora_into(net: nn.Module, file: str | Path, adapter: str = "student") -> nn.Module:
    """Inject a LoRA file into a diffusers network whose pipeline has no loader of its own (UNet2DModel).

    net = UNet2DModel.from_pretrained(...); load_lora_into(net, "x-lora.safetensors")
    """
    inject(net, read_lora(Path(file))[0], adapter)
    return net


@torch.no_grad()
def inject(net: nn.Module, layers: Layers, adapter: str) -> None:
    """Add the layers as an active adapter."""
    from peft import LoraConfig, inject_adapter_in_model

    check_keys(net, layers)
    ranks = {n: a.shape[0] for n, (a, _) in layers.items()}
    rank = _rank(layers)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(layers), rank_pattern=ranks, alpha_pattern=dict(ranks)
    )
    inject_adapter_in_model(config, net, adapter_name=adapter)
    put(net, layers, adapter)
    net.eval()


@torch.no_grad()
def put(net: nn.Module, layers: Layers, adapter: str, key: str = "lora") -> None:
    """Copy layers into an adapter that is there already; a smaller rank is padded with zeros."""
    check_keys(net, layers, key)
    modules = {n: m for n, m in net.named_modules() if adapter in getattr(m, "lora_A", {})}
    missing = sorted(set(layers) - set(modules))
    if missing:
        raise UserError(key, f"the adapter lacks {missing[0]!r}", "set student.lora.target_modules to match")
    for name, module in modules.items():
        a_to, b_to = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        b_to.zero_()
        if name not in layers:
            continue
        a, b = layers[name]
        if a.shape[0] > a_to.shape[0]:
            allowed = f"student.lora.rank is {a_to.shape[0]}; raise it"
            raise UserError(key, f"the file has rank {a.shape[0]}", allowed)
        a_to[: a.shape[0]] = a.to(a_to)
        b_to[:, : b.shape[1]] = (b / module.scaling[adapter]).to(b_to)


@torch.no_grad()
def merge(net: nn.Module, layers: Layers) -> None:
    """Add the update to the network's own weights."""
    check_keys(net, layers)
    modules = dict(net.named_modules())
    for name, (a, b) in layers.items():
        weight = modules[name].weight
        weight += delta(a, b).to(weight)


def without_adapters(net: Any) -> nn.Module:
    """A fresh network holding the frozen base alone."""
    fresh = type(net).from_config(net.config)
    state = {k.replace(".base_layer.", "."): v for k, v in net.state_dict().items() if ".lora_" not in k}
    fresh.load_state_dict(state)
    return fresh.eval()
