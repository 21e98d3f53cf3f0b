"""What is made of the teacher for a row of the data when the row is first met, and kept in memory.

Its noise depends on the run's seed, the row's index and its number only, so a resumed run makes the same.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fastgen.core.batch import Batch, Cond
from fastgen.objectives.base import Objective
from fastgen.objectives.shared.trajectory_files import TrajectoryFiles
from fastgen.roles.roles import Role
from fastgen.sampling.solvers import sample_teacher


class Remembered(ABC):
    """Tensors by data index, `noises` of each; a subclass makes the missing ones of a batch."""

    what = "samples"
    """plural of what is collected, for the line of progress"""

    def __init__(self, obj: Objective, noises: int = 1, files: TrajectoryFiles | None = None):
        """files: where rows are kept between runs; None keeps them in memory."""
        self.obj, self.noises, self.files = obj, noises, files
        self.rows: dict[int, Tensor] = {} if files is None else files.read()
        self.growing = False  # whether the last batch needed new ones

    @abstractmethod
    def make(self, batch: Batch, numbers: list[int], teacher: Role) -> Tensor:
        """One row for each number, of a batch of as many."""

    def numbers(self, batch: Batch, teacher: Role) -> list[int]:
        """The number of each row of a batch, by which `rows` has it from now on."""
        index = batch.index
        if self.noises > 1:
            index = index * self.noises + self.obj.rng.randint(self.noises, len(index)).cpu()
        found = index.tolist()
        if self.files:
            self.files.check(batch, found)
        todo = [row for row, n in enumerate(found) if n not in self.rows]
        self.growing = bool(todo)
        if todo:
            rows = torch.tensor(todo, device=batch.noise.device)
            cond, uncond = ({k: v[rows] for k, v in d.items()} for d in (batch.cond, batch.uncond))
            part = Batch(None, cond, uncond, batch.noise[rows], batch.index[todo])
            numbers = [found[row] for row in todo]
            with torch.no_grad():
                made = self.make(part, numbers, teacher).cpu()
            if self.files:
                made = self.files.keep(part, numbers, made)
            self.rows |= dict(zip(numbers, made))
        return found

    def generators(self, numbers: list[int]) -> list[torch.Generator]:
        """The random generator of each number, on the CPU."""
        seed = self.obj.rng.seed
        return [torch.Generator().manual_seed((seed * 1_000_003 + n) % 2**63) for n in numbers]

    def busy(self) -> str:
        """How many there are, while they are collected."""
        total = self.obj.num_examples * self.noises
        return f"collecting {self.what}, {len(self.rows):,} of {total:,}" if self.growing else ""


class Trajectories(Remembered):
    """The guided teacher's own walks from noise to data: every state with the guided estimate there, at the
    scale that is learned, or at w ~ U(range of the student) for each walk.
    """

    what = "teacher trajectories"

    def __init__(self, obj: Objective, teacher_steps: int, noises: int = 1):
        """teacher_steps: states of a walk, on the grid of the teacher's sampler."""
        super().__init__(obj, noises)
        self.steps = teacher_steps
        self.times = torch.tensor(obj.schedule.teacher_times(teacher_steps), dtype=torch.float64)

    def __call__(self, batch: Batch, teacher: Role) -> tuple[Tensor, Tensor, Tensor, Tensor, Cond]:
        """(x_t, t, D^w at x_t, w, the student's conditions), one step of each row's walk, evenly drawn."""
        numbers, rng = self.numbers(batch, teacher), self.obj.rng
        i = rng.randint(self.steps, len(numbers))
        pairs = torch.stack([self.rows[n][:, j] for n, j in zip(numbers, i.tolist())]).to(batch.noise)
        w = self.scales(numbers).to(batch.noise.device)
        taken = self.obj.student.guidance_range is not None
        cond = {**batch.cond, "guidance": w} if taken else batch.cond
        return pairs[:, 0], self.times.to(i.device)[i], pairs[:, 1], w, cond

    def scales(self, numbers: list[int]) -> Tensor:
        """w [B] of these walks, float32."""
        span = self.obj.student.guidance_range
        if span is None:
            return torch.full((len(numbers),), self.obj.guidance)
        apart = [n + 2**40 for n in numbers]  # from the numbers of the noise
        drawn = torch.stack([torch.rand((), generator=g) for g in self.generators(apart)])
        return span[0] + (span[1] - span[0]) * drawn

    def make(self, batch: Batch, numbers: list[int], teacher: Role) -> Tensor:
        """[B, 2, steps, ...]: the states, and the guided estimates."""
        drawn = [torch.randn(batch.noise.shape[1:], generator=g) for g in self.generators(numbers)]
        w: float | Tensor = self.scales(numbers).to(batch.noise.device)
        if self.obj.student.guidance_range is None:
            w = self.obj.guidance
        heard = _Heard(teacher)
        noise = torch.stack(drawn).to(batch.noise)
        sample_teacher(heard, noise, batch.cond, batch.uncond, self.steps, w)
        states, estimates = zip(*heard.calls)
        return torch.stack([torch.stack(states, 1), torch.stack(estimates, 1).to(noise)], 1)


class _Heard:
    """A teacher that notes (x_t, D^w) of every guided call."""

    def __init__(self, teacher: Role):
        self.teacher, self.schedule = teacher, teacher.schedule
        self.calls: list[tuple[Tensor, Tensor]] = []

    def source(self, noise: Tensor, cond: Cond) -> Tensor:
        return self.teacher.source(noise, cond)

    def guided(self, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, w: float | Tensor) -> Tensor:
        found = self.teacher.guided(x_t, t, cond, uncond, w)
        self.calls.append((x_t, found))
        return found
