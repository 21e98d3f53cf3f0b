"""The tile masks of a sparse student, beside its weights: tile_masks.json, and the script that reads it."""

import shutil
from pathlib import Path

import torch

from fastgen.core.errors import UserError
from fastgen.core.files import write_model_json
from fastgen.core.reading import read_json
from fastgen.families.factors import temporal_factor
from fastgen.networks import tile_attention
from fastgen.networks.backbone import Backbone
from fastgen.networks.codecs import Codec, TextCodec
from fastgen.roles.roles import Role


def plan_of(role: Role) -> torch.Tensor | None:
    """Latent frames, then the global frames of every layer under a role, [1 + layers]; None: it is dense."""
    if not isinstance(role.backbone, Backbone):
        return None
    control = role.backbone.net.__dict__.get(tile_attention.ATTRIBUTE)
    plan = control.plans.get(role.adapter) if control else None
    return None if plan is None or not bool((plan[1:] < plan[0]).any()) else plan


def share(role: Role) -> float:
    """Tiles that a role's attention keeps, as a share of dense attention's; 0 if it is dense."""
    plan = plan_of(role)
    return 0.0 if plan is None else tile_attention.share_of_tiles(int(plan[0]), plan[1:].tolist())


def write_tiles(role: Role, folder: Path) -> None:
    """The masks of a sparse role and their loader."""
    plan, net = plan_of(role), role.backbone.net
    assert plan is not None, "asked for of a sparse role"
    names = list(tile_attention.layers_of(net))
    write_model_json(folder / tile_attention.FILE, tile_attention.document(names, plan))
    shutil.copyfile(tile_attention.__file__, folder / "tile_attention.py")


def take_tiles(role: Role, folder: Path, key: str, codec: Codec, of_size: str) -> None:
    """Put the masks of an export on a role that has its weights. UserError of `key` where they are damaged or
    of another network, and of `of_size` where clips of the codec have other frames.
    """
    said, net = read_json(folder / tile_attention.FILE, key), role.backbone
    assert isinstance(net, Backbone), "asked for of a network whose export has masks"
    try:
        control = tile_attention.attach(net.net)
        plan = tile_attention.parse(said, control.names)
    except ValueError as error:
        found = f"{folder / tile_attention.FILE} has {error}"
        raise UserError(key, found, "export the run again") from None
    frames, searched = codec.shape[1], int(plan[0]) * control.patch
    if frames != searched:
        per = temporal_factor(net.family, codec.pipe) if isinstance(codec, TextCodec) else 1
        found = f"{frames} latent frames, and the tile masks of {folder} were searched at {searched}"
        way = f"give {(searched - 1) * per + 1} frames, or search again by an efficient_vdit stage"
        raise UserError(of_size, found, way)
    control.acting = net.adapter
    control.plan(role.adapter).copy_(plan)
