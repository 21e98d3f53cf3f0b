"""Clips longer than a model's own (sample.py --windows): each window begins with the last frame of the last.

The frame is decoded and encoded again, so that what a window is shown is a picture as the model was trained
on. N windows of F frames are N F - (N - 1) frames: the shared ones are kept once. This is the sliding window
of Magic 1-For-1 (arXiv 2502.07701) with an overlap of one frame and nothing blended.
"""

from copy import copy

import torch
from torch import Tensor

from fastgen.cli.generator import Generator
from fastgen.core.errors import UserError
from fastgen.data.sources import makes_clips

STRIDE = 1_000_003
"""between the seeds of neighbouring windows of one clip"""


class Windowed(Generator):
    """A contender that draws `windows` clips in a row as one."""

    def __init__(self, one: Generator, windows: int):
        self.one, self.windows = one, windows
        self.role, self.codec, self.null, self.guidance = one.role, one.codec, one.null, one.guidance
        self.is_student, self.nasa_scale, self.steps = one.is_student, one.nasa_scale, one.steps

    @property
    def name(self) -> str:
        return f"{self.one.name}, {self.windows} windows"

    @property
    def nfe(self) -> int:
        return self.windows * self.one.nfe

    def __call__(self, cond: dict, seeds: list[int], device) -> Tensor:
        """Clips [B, C, N F - N + 1, H, W] in [0, 1]."""
        one = copy(self.one)  # with the null condition of each window's own frame
        parts = [one(cond, seeds, device)]
        while len(parts) < self.windows:
            shown, nulled = self.codec.image_rows(parts[-1][:, :, -1] * 2 - 1)
            one.null = self.null | {k: v for k, v in nulled.items() if k in self.null}
            later = [seed + STRIDE * len(parts) for seed in seeds]
            parts.append(one(cond | shown, later, device)[:, :, 1:])
        return torch.cat(parts, 2)


def windowed(one: Generator, windows: int) -> Generator:
    """The contender itself for one window; a UserError for a model that is not begun by a frame."""
    if windows == 1:
        return one
    codec = one.codec
    begun = codec.needs_image and makes_clips(codec)
    if not begun or codec.family.needs_last_image:
        found = f"found {windows} for a model that no first frame alone begins"
        raise UserError("--windows", found, "leave it out, or give an image-to-video model")
    return Windowed(one, windows)
