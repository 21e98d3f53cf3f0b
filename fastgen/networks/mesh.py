"""The processes of a run as one mesh: copies of the networks, their parts, and samples computed together.

Neighbours compute a sample together (train.context_parallel), and groups of neighbours hold one copy of the
networks between them (train.sharding), so that both kinds of groups lie within a machine.
"""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastgen.core.errors import UserError
from fastgen.networks.sharding import processes


@dataclass(frozen=True)
class Layout:
    """What a config says of processes: whether networks are spread, over how many, and how many compute one
    sample.
    """

    sharded: bool = False
    shard_group: int | None = None
    context_parallel: int = 1


def make_mesh(layout: Layout, device: str | torch.device, ring: int = 1) -> DeviceMesh:
    """Of the dimensions copy, sample, ring and ulysses; UserError where they do not multiply to the number of
    processes. ring: how many of those that compute a sample pass on keys and values; the others exchange
    heads.
    """
    world, together = processes(), layout.context_parallel
    if layout.sharded and world == 1:
        way = "start it with `accelerate launch --num_processes N`, or leave it out"
        raise UserError("train.sharding", "found fsdp for one process", way)
    if world % together or (world == 1 and together > 1):
        found = f"found {together} for {world} process{'es' * (world > 1)}"
        way = "start a multiple of it with `accelerate launch --num_processes N`"
        raise UserError("train.context_parallel", found, way)
    group = layout.shard_group or world
    if world % group:
        found = f"groups of {group} do not divide {world} processes"
        raise UserError("train.shard_group", found, "choose a number that does")
    if group % together:
        found = f"groups of {group} do not divide into those of train.context_parallel {together}"
        raise UserError("train.shard_group", found, "choose a multiple of it")
    shape = (world // group, group // together, ring, together // ring)
    kind = torch.device(device).type
    return init_device_mesh(kind, shape, mesh_dim_names=("copy", "sample", "ring", "ulysses"))


def of_parts(mesh: DeviceMesh) -> DeviceMesh:
    """The dimensions over which networks are spread: parts, or (HSDP) copies by parts."""
    parts = mesh["sample", "ring", "ulysses"]._flatten("part")
    return parts if parts.size() == processes() else mesh["copy", "part"]
