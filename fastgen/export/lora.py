"""LoRA files: written so that any reader gets the strength right, read back into any network.

Layout: `unet.` or `transformer.` + module path + `.lora_A.weight` / `.lora_B.weight` (PEFT names). alpha /
rank is multiplied into B, so that a reader gets B A whether it assumes alpha = rank or reads the metadata.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.core.errors import UserError
from fastgen.core.files import write_tensors
from fastgen.core.reading import parse_json, read_json
from fastgen.families.parts import DiffusersModel, part_name
from fastgen.roles.roles import Role

COMPONENTS = {"unet", "transformer", "transformer_2", "prior", "controlnet", "diffusion_model"}
"""folders of denoisers, by which diffusers prefixes the keys of a LoRA file"""
PEFT_PREFIX = "base_model.model."
"""of the keys of a file that PEFT itself saved"""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "eva_residual")
"""initialisations of PEFT that also change the weights of the base"""
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


def highest_rank(layers: Layers) -> int:
    return max(a.shape[0] for a, _ in layers.values())


def write_peft(file: Path, layers: Layers, prefix: str, header: dict[str, str], dtype=torch.float32) -> Path:
    """The file diffusers' load_lora_weights takes, its metadata in agreement with its tensors."""
    from peft import LoraConfig

    ranks = {name: a.shape[0] for name, (a, _) in layers.items()}
    rank = highest_rank(layers)
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


def read_lora(file: Path, key: str = "lora") -> tuple[Layers, dict]:
    """(layers, our header) of a LoRA file in PEFT's names, with or without a component's prefix.

    The strength follows PEFT's rules: alpha / rank, or with use_rslora alpha / sqrt(rank), where alpha comes
    from the file's metadata or from an adapter_config.json beside it; without either alpha is the rank.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {k: handle.get_tensor(k) for k in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(key, f"{file} cannot be read ({error})", "copy or download the file again") from None
    prefix, tensors = _without_prefix(tensors, file, key)
    ending = ".lora_A.weight"
    names = sorted(k.removesuffix(ending) for k in tensors if k.endswith(ending))
    expected = {f"{n}.lora_{m}.weight" for n in names for m in "AB"}
    if not names or set(tensors) != expected:
        more = sorted(set(tensors) - expected)
        found = f"{file} is not a LoRA in PEFT layout" + (f" (it has {more[0]!r})" if names and more else "")
        keys = "keys unet.<module>.lora_A.weight and .lora_B.weight (of an export, the file without -kohya)"
        raise UserError(key, found, keys)
    layers = {
        n: (tensors[f"{n}.lora_A.weight"].float(), tensors[f"{n}.lora_B.weight"].float()) for n in names
    }
    _scale(layers, _peft_config(file, prefix, metadata, key), key)
    return layers, parse_json(metadata.get("fastgen", "{}"), f"fastgen in the header of {file}", key)


def _without_prefix(tensors: dict[str, Tensor], file: Path, key: str) -> tuple[str, dict[str, Tensor]]:
    """(component that prefixes the keys, tensors without it); PEFT's own prefix is removed too."""
    prefixes = {k.partition(".")[0] for k in tensors}
    if any(p.startswith("text_encoder") for p in prefixes):
        found = f"{file} also adapts a text encoder, which fastgen does not train"
        raise UserError(key, found, "remove its text_encoder keys")
    prefix = next(iter(prefixes)) if len(prefixes) == 1 and prefixes <= COMPONENTS else ""
    start = f"{prefix}." if prefix else ""
    if all(k.startswith(PEFT_PREFIX) for k in tensors):
        start = PEFT_PREFIX
    return prefix, {k.removeprefix(start): v for k, v in tensors.items()}


def _peft_config(file: Path, prefix: str, metadata: dict[str, str], key: str) -> dict[str, Any]:
    """The LoraConfig that a file's metadata, or an adapter_config.json beside it, holds; {} without one."""
    text = metadata.get("lora_adapter_metadata", "{}")
    packed = parse_json(text, f"lora_adapter_metadata in the header of {file}", key)
    start = f"{prefix}." if prefix else ""
    if packed:
        return {k.removeprefix(start): v for k, v in packed.items() if k.startswith(start)}
    beside = file.with_name("adapter_config.json")
    return read_json(beside, key) if beside.is_file() else {}


def _scale(layers: Layers, config: dict[str, Any], key: str) -> None:
    """Multiply into B the strength that PEFT gives each layer; ours have it folded in already."""
    from peft.utils.other import get_pattern_key

    unlike = next((k for k in ("use_dora", "lora_bias") if config.get(k)), None)
    initial = str(config.get("init_lora_weights") or "").lower()
    if initial.startswith(CHANGES_BASE):
        unlike = f"init_lora_weights {initial}"
    if unlike:
        found = f"the file's adapter has {unlike}, which is more than B A added to the base"
        raise UserError(key, found, "merge it into its base with PEFT and give that folder")
    pattern = config.get("alpha_pattern") or {}
    for name, (a, b) in layers.items():
        rank = a.shape[0]
        alpha = pattern.get(get_pattern_key(list(pattern), name), config.get("lora_alpha", rank))
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise UserError(key, f"the file's lora_alpha is {alpha!r}", "correct the file's metadata")
        layers[name] = (a, b * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)))


def find_lora(folder: Path) -> Path | None:
    """The LoRA file of a folder that PEFT or diffusers saved; None if it holds none."""
    names = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
    return next((folder / n for n in names if (folder / n).is_file()), None)


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
    rank = highest_rank(layers)
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


@contextmanager
def strength(role: Role, weight: float) -> Iterator[None]:
    """A role's adapter at `weight` times its strength inside the block; nothing happens without one."""
    name, own = role.adapter, []
    if name is not None and weight != 1:
        layers: list[Any] = [m for m in role.backbone.modules() if name in getattr(m, "lora_A", {})]
        own = [(layer.scaling, layer.scaling[name]) for layer in layers]
    try:
        for scaling, trained in own:
            scaling[name] = weight * trained
        yield
    finally:
        for scaling, trained in own:
            scaling[name] = trained


@torch.no_grad()
def merge(net: nn.Module, layers: Layers) -> None:
    """Add the update to the network's own weights."""
    check_keys(net, layers)
    modules = dict(net.named_modules())
    for name, (a, b) in layers.items():
        weight = modules[name].weight
        weight.copy_(weight.float() + delta(a, b).to(weight.device))


def shape_of(net: Any) -> DiffusersModel:
    """The layers of the frozen base on the meta device: names and shapes without weights."""
    with torch.device("meta"):
        return type(net).from_config(net.config)


def without_adapters(net: Any) -> DiffusersModel:
    """A fresh network holding the frozen base alone."""
    fresh = type(net).from_config(net.config)
    state = {k.replace(".base_layer.", "."): v for k, v in net.state_dict().items() if ".lora_" not in k}
    fresh.load_state_dict(state)
    return fresh.eval()
