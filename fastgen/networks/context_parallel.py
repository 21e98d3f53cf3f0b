"""Sequences cut over processes: diffusers' context parallelism in Ulysses' form, while networks are trained.

The processes of a group have the same samples and the same noise, and each computes with its part of their
tokens; for attention they exchange heads for tokens. Every process sees the whole prediction and the same
loss, and its gradient of a weight is that of its own tokens: the sum over the group is the gradient.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.core.errors import UserError
from fastgen.networks.backbone import Backbone
from fastgen.networks.denoiser import Denoiser
from fastgen.networks.sharding import processes
from fastgen.networks.teacher import Teacher

KEY = "train.context_parallel"


class SplitSequences:
    """Cuts the sequences of networks into `degree` parts within `split()`; whole outside of it."""

    def __init__(self, backbones: Iterable[Denoiser], degree: int, device: torch.device):
        from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
        from torch.distributed.device_mesh import init_device_mesh

        _check_processes(degree)
        self.degree = degree
        self.nets = [net for backbone in backbones for net in _networks(backbone, degree)]
        shape, names = (processes() // degree, 1, degree), ("group", "ring", "ulysses")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)["ring", "ulysses"]
        self.settings = ContextParallelConfig(ulysses_degree=degree, mesh=mesh)
        self.config = ParallelConfig(context_parallel_config=self.settings)
        self.config.setup(torch.distributed.get_rank(), processes(), device, mesh=mesh)

    @contextmanager
    def split(self) -> Iterator[None]:
        from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel

        for net in self.nets:
            _set_processors(net, self.config)
            apply_context_parallel(net, self.settings, net._cp_plan)
        try:
            yield
        finally:
            for net in self.nets:
                _set_processors(net, None)
                remove_context_parallel(net, net._cp_plan)

    @torch.no_grad()
    def try_one(self, teacher: Teacher, device: torch.device) -> None:
        """One pass of the teacher; UserError where the tokens of a sample do not come out even."""
        shape = teacher.codec.shape
        x = torch.zeros(1, *shape, device=device)
        t = torch.full((1,), teacher.schedule.t_max, dtype=torch.float64, device=device)
        cond = {k: v.to(device) for k, v in teacher.codec.null(1).items()}
        try:
            with self.split():
                teacher.backbone(x, t, cond)
        except AssertionError:
            found = f"the tokens of a sample {tuple(shape)} do not divide by {self.degree}"
            raise UserError(KEY, found, "choose another number, or another size of samples") from None


def sum_over_groups(gradients: Iterable[Tensor | None], degree: int) -> None:
    """From means over all processes to means over groups of sums within each."""
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(degree)


def _check_processes(degree: int) -> None:
    if processes() % degree or processes() == 1:
        found = f"found {degree} for {processes()} process{'es' * (processes() > 1)}"
        raise UserError(KEY, found, "start a multiple of it with `accelerate launch --num_processes N`")


def _networks(backbone: Denoiser, degree: int) -> list[Any]:
    """The diffusers models of a denoiser, each of which has a plan of where its sequences are cut."""
    if not isinstance(backbone, Backbone):
        raise UserError(KEY, f"found {degree} for an exact teacher", "leave it out")
    nets: list[Any] = list(backbone.family.parts(backbone.net).values())
    for net in nets:
        kind, heads = type(net).__name__, getattr(net.config, "num_attention_heads", 0)
        if getattr(net, "_cp_plan", None) is None:
            raise UserError(KEY, f"diffusers has no plan of {kind}'s sequences", "use train.sharding fsdp")
        if any(not hasattr(one, "_parallel_config") for one in _processors(net)):
            raise UserError(KEY, f"an attention of {kind} is not diffusers' own", "leave it out")
        if heads % degree:
            raise UserError(
                KEY, f"found {degree} for {kind} of {heads} heads", "choose a number that divides"
            )
    return nets


def _processors(net: nn.Module) -> list[Any]:
    found = (getattr(module, "processor", None) for module in net.modules())
    return [one for one in found if one is not None]


def _set_processors(net: nn.Module, config: Any) -> None:
    for processor in _processors(net):
        processor._parallel_config = config
