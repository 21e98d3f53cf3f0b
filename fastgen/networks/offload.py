"""Frozen weights kept in the machine's memory, each layer's on the card for its own passes alone.

diffusers' group offloading (`apply_group_offloading`) serves inference: it moves every weight of a block,
those of adapters too, copies frozen ones back after each pass, and takes from a graph what its backward pass
needs. Here frozen weights have one copy at home that is never written back; what a pass is given belongs to
its graph. A graph that is recomputed (gradient checkpointing) holds one block at a time.
"""

from collections import Counter
from itertools import islice
from typing import Any

import torch
from torch import nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
"""layers that hold nearly all weights, and read them in their own forward pass alone"""
SMALLEST = 2**12
"""weights of a tensor below which the copy is not worth it: biases, norms"""


def layers_to_offload(net: nn.Module, trained: set[int]) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Layers with the large weights of theirs that are frozen; `trained`: ids of parameters that are not. The
    first weight stays: by it diffusers says where a network is.
    """
    stays = trained | {id(p) for p in islice(net.parameters(), 1)}
    layers: list[nn.Module] = [layer for layer in net.modules() if isinstance(layer, LAYERS)]
    uses = Counter(id(p) for layer in layers for p in layer.parameters(recurse=False))
    found = []
    for layer in layers:
        own = layer.parameters(recurse=False)
        large = [p for p in own if p.numel() >= SMALLEST and id(p) not in stays and uses[id(p)] == 1]
        if large:
            found.append((layer, large))
    return found


def offload(net: nn.Module, trained: set[int], device: torch.device | str) -> None:
    """Keep these weights where they are, on the CPU, and move everything else of a network to the device."""
    layers = layers_to_offload(net, trained)
    away = {id(p) for _, weights in layers for p in weights}
    for tensor in (*net.parameters(), *net.buffers()):
        if id(tensor) not in away:
            tensor.data = tensor.data.to(device)
    for layer, weights in layers:
        Visitor(layer, weights, device)


class Visitor:
    """Gives one layer copies of its weights on the device for a pass, and its own ones again after it."""

    def __init__(self, layer: nn.Module, weights: list[nn.Parameter], device: torch.device | str):
        self.device = torch.device(device)
        self.home = {
            name: p for name, p in layer.named_parameters(recurse=False) if any(p is w for w in weights)
        }
        for parameter in self.home.values():
            self.settle(parameter)
        layer.register_forward_pre_hook(self.bring)
        layer.register_forward_hook(self.leave, always_call=True)  # recomputation ends with an exception

    def settle(self, parameter: nn.Parameter) -> None:
        """Into memory from which a card reads without waiting."""
        if self.device.type == "cuda":
            parameter.data = parameter.data.pin_memory()

    def bring(self, layer: nn.Module, _inputs: Any) -> None:
        for name, parameter in self.home.items():
            layer._parameters[name] = self.copy(parameter)

    def copy(self, parameter: nn.Parameter) -> nn.Parameter:
        """A weight on the device; a graph that holds it keeps it alive."""
        return nn.Parameter(parameter.data.to(self.device, non_blocking=True), requires_grad=False)

    def leave(self, layer: nn.Module, _inputs: Any, _output: Any) -> None:
        layer._parameters.update(self.home)
