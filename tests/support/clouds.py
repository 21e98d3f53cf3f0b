"""Tiny networks of point clouds, and the exact teacher of one: noise around fixed points."""

import torch

from fastgen.core.batch import Batch
from fastgen.diffusion.schedules import VP, LocalVP
from fastgen.networks.denoiser import Denoiser
from fastgen.networks.load import load_teacher
from fastgen.roles.roles import Role, Student, StudentSpec

NET = {
    "_class_name": "PointVoxelModel",
    "num_points": 60,
    "scan_points": 12,
    "low": [-6.0, -6.0, -0.5],
    "high": [6.0, 6.0, 3.5],
    "grid": [4, 4, 4],
    "width": 8,
}
LIDIFF = {"beta_start": 3.5e-5, "beta_end": 0.007, "beta_schedule": "linear"}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
    **LIDIFF,
}


def tiny_teacher(**net):
    """An untrained one, 60 points of a scan of 12."""
    torch.manual_seed(0)
    blueprint = {"net": {**NET, **net}, "scheduler": SCHEDULER, "info": {"measure": "scenes"}}
    return load_teacher(blueprint=blueprint)


def levels(local: bool = True) -> VP:
    """LiDiff's schedule."""
    betas = torch.linspace(3.5e-5, 0.007, 1000, dtype=torch.float64)
    plain = VP((1 - betas).cumprod(0))
    return LocalVP.around(plain) if local else plain


class ExactCloud(Denoiser):
    """E[y | x_t] where y is one of the points of a fixed truth [M, 3], each point by itself; x_t [B, N, 3] is
    what it has moved from where it starts, cond["start"].
    """

    prediction = "x0"

    def __init__(self, truth, schedule):
        super().__init__()
        self.truth, self.schedule = truth, schedule

    def forward(self, x_t, t, cond):
        start = cond["start"].repeat_interleave(x_t.shape[1] // cond["start"].shape[1], 1)
        s = self.schedule.sigma(t)[:, None, None].to(x_t)
        w = (-torch.cdist(start + x_t, self.truth[None]).square() / (2 * s**2)).softmax(-1)
        return w @ self.truth - start

    raw = forward


class FreePoints(Denoiser):
    """Offsets [N, 3] that are parameters, whatever the noise."""

    prediction = "x0"

    def __init__(self, x, schedule):
        super().__init__()
        self.x, self.schedule = torch.nn.Parameter(x), schedule

    def forward(self, x_t, t, cond):
        return self.x.expand_as(x_t)

    raw = forward


def tiny_world():
    """A student on the teacher's weights, other critics, and two scans."""
    teacher = tiny_teacher()
    generator = torch.Generator().manual_seed(0)
    scans = torch.randn(2, 12, 3, generator=generator)
    cond = teacher.codec.scans(scans)
    x0, noise = torch.randn(2, 2, 60, 3, generator=generator).unbind(0)
    batch = Batch(x0, cond, teacher.codec.untold(scans), noise, torch.arange(2))
    other = teacher.backbone.trainable_copy()
    for p in other.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    student = Student(teacher.backbone.trainable_copy(), None, StudentSpec(teacher.schedule.steps(1)))
    return student, batch, Role(teacher.backbone), Role(other)
