"""What a run's networks get once they have their adapters: kernels, order, compilation, a place to live."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastgen.config.sections import TeacherConfig, TrainConfig
from fastgen.core.errors import warn
from fastgen.networks.attention import check
from fastgen.networks.backbone import Backbone
from fastgen.networks.denoiser import Denoiser
from fastgen.networks.offload import offload
from fastgen.roles.roles import Part, Role, members


def prepare_networks(
    backbones: Sequence[Denoiser], teacher: TeacherConfig, train: TrainConfig, device: Any
) -> None:
    """Attention kernels, order of the weights, compilation and gradient checkpointing, as the settings have
    them.
    """
    for built in (b for b in backbones if isinstance(b, Backbone)):
        built.attention = check(built.net, teacher.attention, device)
        if train.channels_last:
            built.channels_last()
        if train.compile_blocks:
            built.compile_blocks()
        elif train.compile:
            built.net.compile()  # in place: parameter names and hooks stay as they are
    if train.gradient_checkpointing:
        for backbone in backbones:
            backbone.enable_gradient_checkpointing(train.gradient_checkpointing == "selective")
    if teacher.offload and str(device) == "cpu":
        warn("teacher.offload: no effect where the CPU computes")


def offload_frozen(
    backbones: Sequence[Denoiser], vae: nn.Module | None, parts: Mapping[str, Part], device: Any
) -> None:
    """Frozen weights of every network and of the autoencoder stay on the CPU between their passes."""
    kept = trained(parts)
    for backbone in backbones:
        offload(backbone, kept, device)
    if vae is not None:
        offload(vae, set(), device)


def trained(parts: Mapping[str, Part]) -> set[int]:
    """Ids of the parameters that some role trains."""
    roles = [r for name, p in parts.items() if name != "teacher" for r in members(p)]
    return {id(p) for r in roles if isinstance(r, Role) for p in r.trainable().values()}
