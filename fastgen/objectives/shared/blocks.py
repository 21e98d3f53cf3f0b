"""What methods of students that go block by block share: a level for every block, states picked by it, and
DMD's turn on a finished clip.

A sample that is made all at once, as of an image, is one block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.objectives.base import Objective, guided
from fastgen.objectives.shared.critic import Matching, diagnostics
from fastgen.roles.roles import Role


class Levels(NamedTuple):
    """A step of the student's list for every block of every row."""

    which: Tensor
    """[B, N]; one behind the last step is clean data"""
    t: Tensor
    """its time as the student takes it: of every frame, [B, F], or of the sample, [B]"""


def draw_levels(obj: Objective, x: Tensor) -> Levels:
    """Even over the student's times and, where x [B, ...] has several blocks, clean data, which is what the
    cache shows to the blocks after it.
    """
    student, num = obj.student, obj.student.num_blocks(x)
    times = [*student.times, *([obj.schedule.t_min] if num > 1 else [])]
    index = obj.rng.randint(len(times), len(x) * num).view(len(x), num)
    every = torch.tensor(times, dtype=torch.float64, device=x.device)
    return Levels(index, student.of_blocks(every[index.to(x.device)], x))


def frames_of(index: Tensor, x: Tensor) -> Tensor:
    """A value of each block, [B, N] of several, for each frame of x [B, C, F, ...]: [B, F]."""
    return index.to(x.device).repeat_interleave(x.shape[2] // index.shape[1], 1)


def picked(states: Tensor, index: Tensor) -> Tensor:
    """Of states [B, L, ...] the one that each block's index [B, N] names, [B, ...]."""
    row = torch.arange(len(states), device=states.device)
    if index.shape[1] == 1:
        return states[row, index[:, 0].to(states.device)]
    frame = frames_of(index, states[:, 0])
    found = states.movedim(3, 1)[row[:, None], torch.arange(frame.shape[1], device=row.device), frame]
    return found.movedim(1, 2)


def is_clean(levels: Levels, x: Tensor, num_steps: int) -> Tensor:
    """Where x [B, ...] is clean data and no step of the student's, broadcastable to x."""
    if levels.which.shape[1] == 1:
        return torch.zeros(1, dtype=torch.bool, device=x.device)
    clean = frames_of(levels.which == num_steps, x)
    return clean.reshape(len(x), 1, -1, *[1] * (x.ndim - 3))


class BlockMatching(Matching):
    """DMD with a student that goes block by block: teacher and critic look at whole clips, at one time."""

    def student_loss(
        self, x: Tensor, batch: Batch, kept: Tensor | float = 1.0, teacher: Role | None = None
    ) -> tuple[Tensor, dict]:
        """(DMD's loss of samples x, what to log); kept: 1 where x counts, 0 where it gets no gradient."""
        cfg = self.cfg
        t, x_t = self.noised(x, cfg.time)  # one t for all frames
        with torch.no_grad():
            real = guided(teacher or self.teacher, x_t, t, batch, self.guidance)  # D_real^w
        fake, logits = self.critic_forward(x, x_t, t, batch, grad=False)  # D_fake, Disc(x_t')
        loss = dm = losses.distribution_matching(x, real, real + kept * (fake.detach() - real))
        logs = {"dm": dm, **diagnostics(x, real, fake)}
        if cfg.gan_weight:
            logs["gan"] = losses.gan_generator(logits)
            loss = dm + cfg.gan_weight * logs["gan"]
        return loss, logs
