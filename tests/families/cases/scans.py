"""A tiny completer of scans, as a folder on disk."""

from pathlib import Path

import torch

from tests.families.cases import Case
from tests.support.clouds import tiny_teacher


def point_voxel(folder: Path, **net) -> Path:
    """60 points from a scan of 12, its noise levels LiDiff's."""
    from fastgen.export.write import export_folder

    teacher = tiny_teacher(**net)
    network = teacher.network.net
    with torch.no_grad():  # so that its outputs and what it is told matter
        network.conv_out.weight.mul_(10)
    return export_folder(teacher, network, folder, teacher.scheduler, dict(teacher.info or {}))


def vp(folder: Path) -> Path:
    return point_voxel(folder, formulation="vp")


def loop(world, pipe, info, noise):
    """The loop of the export's card."""
    scheduler, x = pipe.scheduler, noise * world.schedule.prior_std(info["times"][0])
    scheduler.set_timesteps(**(info["timestep_arguments"] or {"num_inference_steps": info["steps"]}))
    for t in scheduler.timesteps:
        x = scheduler.step(pipe.unet(x, t, **world.cond).sample, t, x).prev_sample
    return x


EXCUSED = {
    "encode": "scans have no pictures that could be encoded",
    "jvp": "the nearest point of the scan jumps between the differences; tests/networks has smaller ones",
    "checkpointing": "the network has no gradient checkpointing",
}
CASES = [
    Case("point-voxel", point_voxel, plain=loop, latent=True, excused=EXCUSED),
    Case("point-voxel", vp, name="point-voxel-vp", plain=loop, latent=True, excused=EXCUSED),
]
