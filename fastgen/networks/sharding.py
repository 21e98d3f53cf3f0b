"""Networks spread over the processes of a run: torch's FSDP2, so that no process holds one of them whole.

`fully_shard` keeps a part of every parameter on each process (a DTensor), gathers those of a block when it
computes and averages gradients on the way back. Networks get their weights on the first process alone, on
its CPU; the others make their shapes and are sent the weights, one tensor after the other. What is trained
of an adapter stays whole: it is small, and of another precision than its base. Everything that is written or
read is whole, so that a run goes on with any number of processes.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from fastgen.core.errors import UserError
from fastgen.families.parts import of_adapter
from fastgen.networks.backbone import Backbone
from fastgen.networks.denoiser import Denoiser


def processes() -> int:
    """How many there are in this run."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that reads networks and writes what is whole."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def before_sharding(device: str | torch.device) -> str | torch.device:
    """Where networks are made that will be spread: on the first process's CPU, elsewhere without weights."""
    if str(device) == "meta" or processes() == 1:
        return device
    return "cpu" if is_first() else "meta"


def of_first(value: Any) -> Any:
    """The first process's value, on all of them."""
    held = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(held, 0)
    return held[0]


def least_of_all(count: int) -> int:
    """The smallest of the counts that the processes have."""
    held = [count] * processes()
    if len(held) > 1:
        torch.distributed.all_gather_object(held, count)
    return min(held)


def mean_of_all(values: Mapping[str, float]) -> dict[str, float]:
    """Each value's mean over the processes that have it."""
    held: list[Any] = [None] * processes()
    if len(held) == 1:
        return dict(values)
    torch.distributed.all_gather_object(held, dict(values))
    names = dict.fromkeys(name for one in held for name in one)
    found = {name: [one[name] for one in held if name in one] for name in names}
    return {name: sum(many) / len(many) for name, many in found.items()}


def shard(backbones: Iterable[Denoiser], device: str | torch.device, mesh: DeviceMesh) -> None:
    """Spread every network over a mesh of parts, or of copies by parts (HSDP), block by block. Weights are
    those of the first process. UserError where a network is no model of diffusers.
    """
    from torch.distributed.fsdp import fully_shard

    for backbone in backbones:
        if not isinstance(backbone, Backbone):
            raise UserError("train.sharding", "found fsdp for an exact teacher", "leave it out")
        _shapes[backbone.net] = _without_weights(backbone.net)
        given = _tensors(backbone.net)
        for part in backbone.family.parts(backbone.net).values():
            whole = {p for n, p in part.named_parameters() if of_adapter(n)}
            for module in [*backbone.repeated_blocks(part), part]:
                kind = type(module)
                fully_shard(module, mesh=mesh, ignored_params=whole)
                type(module).__name__ = kind.__name__  # what configs and messages call it
            part.register_forward_hook(_part_again)
        _receive(backbone.net, given, device)
        backbone.spread = True


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and tensors that are plain attributes of a module, by name."""
    found = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for where, module in net.named_modules():
        loose = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
        found |= {f"{where}.{name}".lstrip("."): value for name, value in loose.items()}
    return {name: value.detach() for name, value in found.items()}  # not moved when fully_shard moves them


def _receive(net: nn.Module, given: dict[str, Tensor], device: str | torch.device) -> None:
    """Give a network that is spread, or of which shapes alone are known, what the first process has."""
    for name, tensor in given.items():
        if is_first():
            value = tensor.to(device).contiguous()
        else:
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        torch.distributed.broadcast(value, 0)
        where, _, leaf = name.rpartition(".")
        _put(net.get_submodule(where), leaf, value)


def _put(module: nn.Module, leaf: str, value: Tensor) -> None:
    """A whole tensor in the place of a parameter (spread as that one is), buffer or plain attribute."""
    old: Any = module._parameters.get(leaf)
    if old is None:
        (module._buffers if leaf in module._buffers else vars(module))[leaf] = value
        return
    if isinstance(old, DTensor):
        value = distribute_tensor(value, old.device_mesh, old.placements, src_data_rank=None)
    module._parameters[leaf] = nn.Parameter(value, old.requires_grad)


def _part_again(net: Any, inputs: Any, outputs: Any) -> None:
    """After a pass without a backward to come, let go of what the outermost module gathered: FSDP keeps it,
    and it would stand for the weights even after they have changed.
    """
    if not torch.is_grad_enabled():
        net.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of all its parts; every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """What this process writes of tensors so that each number is written once: its parts of those that are
    spread, and where in the whole they begin; of whole ones all, on the first process.
    """
    first = is_first()
    parts: dict[str, Tensor] = {}
    begins: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            if first:
                parts[name], begins[name] = tensor, [0] * tensor.dim()
            continue
        *copies, _ = tensor.device_mesh.get_coordinate() or [0]
        for chunk in tensor.__create_chunk_list__() if not any(copies) else ():
            if tensor.to_local().numel():
                parts[name], begins[name] = tensor.to_local(), list(chunk.offsets)
    return parts, begins


def everywhere(good: Tensor) -> Tensor:
    """Whether a condition holds on every process of the run."""
    if torch.distributed.is_initialized():
        good = good.to(torch.uint8)
        torch.distributed.all_reduce(good, torch.distributed.ReduceOp.MIN)
    return good.bool()


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole value, spread and ordered in memory as the target is."""
    if not isinstance(target, DTensor):
        if value.stride() == target.stride():
            return value
        return torch.empty_like(target, dtype=value.dtype, device=value.device).copy_(value)
    placed = value.to(target.to_local().device)
    return distribute_tensor(placed, target.device_mesh, target.placements, src_data_rank=None)


def clip_gradients(parameters: Sequence[Tensor], most: float) -> Tensor:
    """Scale the gradients down to a norm of at most `most`, over spread and whole ones; the norm before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = [whole(torch.linalg.vector_norm(g)) for g in grads]
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    scale = (most / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale.to(grad.device))
    return total


@contextmanager
def gathered(backbones: Iterable[Denoiser], here: bool) -> Iterator[None]:
    """In the place of every network a whole one, where `here` says so, which then computes and is saved
    without the other processes; changes of its weights are lost.
    """
    kept = []
    for backbone in (b for b in backbones if isinstance(b, Backbone)):
        backbone.named_weights()  # lets go of what is gathered
        tensors = {**dict(backbone.net.named_parameters()), **dict(backbone.net.named_buffers())}
        state = wholes(tensors, here)
        if here:
            kept.append((backbone, backbone.net))
            backbone.net = _filled(_shapes[backbone.net], state)
    try:
        yield
    finally:
        for backbone, net in kept:
            backbone.net = net


_shapes: "WeakKeyDictionary[nn.Module, nn.Module]" = WeakKeyDictionary()
"""networks that are spread, and the same without weights as they were before"""


def _without_weights(net: nn.Module) -> nn.Module:
    """A copy on the meta device."""
    tensors = [*net.parameters(), *net.buffers()]
    known: dict[int, Any] = {id(t): t.detach().to("meta") for t in tensors}
    known |= {id(p): nn.Parameter(known[id(p)], p.requires_grad) for p in net.parameters()}
    return copy.deepcopy(net, known)


def _filled(shapes: nn.Module, state: dict[str, Tensor]) -> Any:
    """A copy with these parameters and buffers."""
    net = copy.deepcopy(shapes)
    for name, tensor in state.items():
        where, _, leaf = name.rpartition(".")
        module = net.get_submodule(where)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor.detach(), requires_grad=False)
        else:
            module._buffers[leaf] = tensor
    return net.eval()


def wholes(tensors: Mapping[str, Tensor], here: bool = True, on_cpu: bool = False) -> dict[str, Any]:
    """All of a mapping, whole, by name; empty where they are not wanted `here`. Put on the CPU they go one by
    one, so that no card holds more than one of those that were spread.
    """
    found = {}
    for name, tensor in tensors.items():
        one = whole(tensor)
        if here:
            found[name] = one.cpu() if on_cpu else one
    return found
