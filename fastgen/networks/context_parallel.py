"""Sequences cut over processes: diffusers' context parallelism, while networks are trained.

The processes of a group have the same samples and the same noise, and each computes with its part of their
tokens. For attention they exchange heads for tokens (Ulysses); where there are too few heads, keys and values
go around a ring, or both. Every process sees the whole prediction and the same
loss, and its gradient of a weight is that of its own tokens: the sum over the group is the gradient.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastgen.core.errors import UserError, first_line
from fastgen.networks.backbone import Backbone
from fastgen.networks.denoiser import Denoiser
from fastgen.networks.ring_attention import ring_kernel
from fastgen.networks.sharding import processes
from fastgen.networks.teacher import Teacher

KEY = "train.context_parallel"


class SplitSequences:
    """Cuts the sequences of networks into `degree` parts within `split()`; whole outside of it."""

    def __init__(self, backbones: Iterable[Denoiser], device: torch.device, mesh: DeviceMesh):
        """mesh: of `make_mesh`, with the dimensions ring and ulysses."""
        from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

        mesh = mesh["ring", "ulysses"]
        self.degree, self.ring = mesh.size(), mesh["ring"].size()
        self.nets = [net for backbone in backbones for net in _networks(backbone, self.degree)]
        ulysses = mesh["ulysses"].size()
        self.settings = ContextParallelConfig(ring_degree=self.ring, ulysses_degree=ulysses, mesh=mesh)
        self.config = ParallelConfig(context_parallel_config=self.settings)
        self.config.setup(torch.distributed.get_rank(), processes(), device, mesh=mesh)

    @contextmanager
    def split(self) -> Iterator[None]:
        from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel

        for net in self.nets:
            _set_processors(net, self.config)
            apply_context_parallel(net, self.settings, net._cp_plan)
        try:
            with ring_kernel() if self.ring > 1 else nullcontext():
                yield
        finally:
            for net in self.nets:
                _set_processors(net, None)
                remove_context_parallel(net, net._cp_plan)

    @torch.no_grad()
    def try_one(self, teacher: Teacher, device: torch.device) -> None:
        """One pass of the teacher; UserError where the tokens of a sample do not come out even, or there is
        no ring for its attention.
        """
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
        except (RuntimeError, ValueError) as error:
            if self.ring == 1:
                raise
            found = f"the heads do not divide by {self.degree}, and there is no ring ({first_line(error)})"
            raise UserError(KEY, found, "choose a number that divides the heads") from None


def ring_size(backbones: Iterable[Denoiser], degree: int) -> int:
    """How many of `degree` processes have to pass on keys and values, as they have too few heads to exchange;
    UserError where a network cannot be split.
    """
    nets = [net for backbone in backbones for net in _networks(backbone, degree)]
    return degree // math.gcd(degree, *(getattr(net.config, "num_attention_heads", 0) for net in nets))


def sum_over_groups(gradients: Iterable[Tensor | None], degree: int) -> None:
    """From means over all processes to means over groups of sums within each."""
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(degree)


def _networks(backbone: Denoiser, degree: int) -> list[Any]:
    """The diffusers models of a denoiser, each of which has a plan of where its sequences are cut."""
    if not isinstance(backbone, Backbone):
        raise UserError(KEY, f"found {degree} for an exact teacher", "leave it out")
    nets: list[Any] = list(backbone.family.parts(backbone.net).values())
    for net in nets:
        kind = type(net).__name__
        if getattr(net, "_cp_plan", None) is None:
            raise UserError(KEY, f"diffusers has no plan of {kind}'s sequences", "use train.sharding fsdp")
        if any(not hasattr(one, "_parallel_config") for one in _processors(net)):
            raise UserError(KEY, f"an attention of {kind} is not diffusers' own", "leave it out")
    return nets


def _processors(net: nn.Module) -> list[Any]:
    found = (getattr(module, "processor", None) for module in net.modules())
    return [one for one in found if one is not None]


def _set_processors(net: nn.Module, config: Any) -> None:
    for processor in _processors(net):
        processor._parallel_config = config
