"""Clips of pixels for a judge of frames, and a world of dots that go left or right on a background."""

import torch
from torch import nn

from fastgen.networks.denoiser import Denoiser
from fastgen.roles.frames import FrameJudge


class Codec:
    """Clips of pixels, for a judge: x0 is twice what is seen, less one."""

    vae, patch = None, 1

    def __init__(self, shape=(4, 3, 2, 2), frames=0):
        self.shape, self.num_frames = shape, frames or shape[1]

    def decode(self, x0):
        return x0 / 2 + 0.5


FRAMES, SIDE, DARK, BRIGHT = 3, 6, -0.6, 0.2


def dots(level: float) -> torch.Tensor:
    """Every clip [24, 1, F, 1, S] of a dot that goes left or right on a background of one level."""
    found = []
    for start in range(SIDE):
        for way in (-1, 1):
            clip = torch.full((1, FRAMES, 1, SIDE), level, dtype=torch.float64)
            for f in range(FRAMES):
                clip[0, f, 0, (start + way * f) % SIDE] += 1.0
            found.append(clip)
    return torch.stack(found)


class Dots(Denoiser):
    """Exact denoiser of a mixture of narrow Gaussians around clips, whose means can be learned."""

    prediction = "x0"

    def __init__(self, schedule, level):
        super().__init__()
        self.schedule, self.means = schedule, nn.Parameter(dots(level))

    def forward(self, x_t, t, cond):
        a, s = (f(t).double().reshape(-1, 1) for f in (self.schedule.alpha, self.schedule.sigma))
        flat, x, small = self.means.flatten(1), x_t.flatten(1).double(), 0.05**2
        var = a**2 * small + s**2
        weight = (-((x[:, None] - a[:, None] * flat) ** 2).sum(2) / (2 * var)).softmax(1)
        D = weight @ flat
        return (D + a * small / var * (x - a * D)).view_as(x_t)

    raw = forward


class Levels(FrameJudge):
    """A judge by one number, the level of a picture's background."""

    def __init__(self):
        nn.Module.__init__(self)
        self._fixed = [None, Codec((1, FRAMES, 1, SIDE))]
        self.heads = nn.ModuleList([nn.Linear(1, 1)]).double()

    def maps(self, images):
        return [images.flatten(1).mean(1, keepdim=True).double()]

    def judge(self, maps):
        return [self.heads[0](m) for m in maps]
