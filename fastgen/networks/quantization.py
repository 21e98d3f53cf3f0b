"""A frozen base in eight or four bits under adapters (QLoRA, arXiv 2305.14314).

Linear layers hold nearly all weights of a transformer. Those inside its blocks are stored by torchao as int8
or fp8 with a scale for each output, or by bitsandbytes as nf4 with one for each 64 weights, and compute in
the dtype that they had. Adapters, normalisation, the first, time and last layers are not touched.
"""

import importlib.util
from typing import Any

import torch
from torch import nn

from fastgen.core.errors import UserError
from fastgen.core.patterns import matches
from fastgen.families.base import Family
from fastgen.families.parts import Parts, kept_in_float32, of_adapter

BITS = {"int8": 8.0, "fp8": 8.0, "nf4": 4.0}
LIBRARY = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
NF4_BLOCK = 64
"""weights that share one scale"""
SMALLEST = 2**12
"""weights of a layer below which its scales and its rounding are not worth it"""


def check_library(kind: str) -> None:
    """UserError where the package that this kind needs is not installed."""
    name = LIBRARY[kind]
    if importlib.util.find_spec(name) is None:
        instruction = 'pip install "fastgen-distill[quant]", or set it to null'
        raise UserError("teacher.quantization", f"{kind} needs {name}, which is not installed", instruction)


def layers_to_quantize(family: Family, net: nn.Module) -> dict[str, nn.Linear]:
    """Frozen linear layers inside a network's blocks, by name; one under an adapter has its own name."""
    parts = {f"{n}.": getattr(net, n) for n in net.names} if isinstance(net, Parts) else {"": net}
    found: dict[str, nn.Linear] = {}
    for prefix, part in parts.items():
        left_out = kept_in_float32(part)
        for name, layer in part.named_modules():
            plain = name.replace(".base_layer", "")
            if not isinstance(layer, nn.Linear) or of_adapter(name) or layer.weight.numel() < SMALLEST:
                continue
            if any(k in plain.split(".") for k in left_out):
                continue
            if not matches(plain, family.final_layers):
                found[prefix + name] = layer
    return found


def quantize(family: Family, net: nn.Module, kind: str, device: Any) -> None:
    """Store the weights of these layers in `kind`, in place, and move the network to `device`.

    One layer at a time moves to the device and is rounded there, so that the full weights are never on it.
    """
    check_library(kind)
    layers = layers_to_quantize(family, net)
    if not layers:
        found = f"{family.net_class} has no linear layer of {SMALLEST} weights or more inside its blocks"
        raise UserError("teacher.quantization", found, "set it to null")
    for name, layer in layers.items():
        if kind == "nf4":
            parent, _, own = name.rpartition(".")
            setattr(net.get_submodule(parent), own, _four_bit(layer, device))
        else:
            _eight_bit(layer, kind, device)
    net.to(device)


def _eight_bit(layer: nn.Linear, kind: str, device: Any) -> None:
    """Weights of a layer as int8 or fp8, one scale an output, in place."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    quantize_(layer, config, filter_fn=lambda module, _: module is layer, device=device)
    layer.weight.requires_grad_(False)


def _four_bit(layer: nn.Linear, device: Any) -> nn.Module:
    """The same layer with its weights as nf4, computing in the dtype that it had."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    shape, bias = (layer.in_features, layer.out_features), layer.bias
    with torch.device("meta"):
        made: Any = Linear4bit(*shape, bias is not None, compute_dtype=layer.weight.dtype, quant_type="nf4")
    made.weight = Params4bit(layer.weight.data, quant_type="nf4", blocksize=NF4_BLOCK, module=made)
    made.bias = bias
    return made.to(device)  # this rounds the weights


def quantized_bytes(layer: nn.Linear, kind: str) -> float:
    """What the weights of a layer take as `kind`, scales included."""
    scales = layer.weight.numel() / NF4_BLOCK if kind == "nf4" else layer.out_features
    return layer.weight.numel() * BITS[kind] / 8 + scales * 4


def stored_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that hold a tensor: itself, or the parts of a quantised one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in stored_tensors(getattr(tensor, name))]
