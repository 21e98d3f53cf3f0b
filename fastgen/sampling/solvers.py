"""ODE solvers of the teacher, and sampling with one random generator per image, so that an image does not
depend on the batch size.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastgen.core.batch import Cond
from fastgen.core.errors import NotFinite
from fastgen.diffusion.schedules import Schedule, expand
from fastgen.roles.roles import Student


class Guided(Protocol):
    """What the teacher's sampler asks of a role."""

    @property
    def schedule(self) -> Schedule: ...

    def source(self, noise: Tensor, cond: Cond) -> Tensor: ...

    def guided(self, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, w: float | Tensor) -> Tensor: ...


DenoiserFn = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> D, the denoised estimate"""


def solver_step(schedule: Schedule, D: DenoiserFn, x_t: Tensor, t: Tensor, u: Tensor, solver: str) -> Tensor:
    """One ODE step from time t to time u. solver: "euler" (DDIM), or "heun", its second-order correction in
    the same exponential form.
    """
    first = D(x_t, t)
    x_u = schedule.ode_step(first, x_t, t, u)
    if solver == "euler":
        return x_u
    second = D(x_u, u.clamp(min=schedule.t_min + 1e-4))
    corrected = schedule.ode_step(0.5 * (first + second), x_t, t, u)
    return torch.where(expand(u <= schedule.t_min, x_t).bool(), x_u, corrected)


def jump(schedule: Schedule, D: Tensor, x_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """The boundary parametrization: a DDIM step from t to u with the estimate D, so that u = t gives x_t.

    At the clean end of the schedule it is D, which is what few-step samplers return.
    """
    clean = expand(u <= schedule.t_min * 1.0001 + 1e-9, x_t).bool()
    return torch.where(clean, D, schedule.ode_step(D, x_t, t.clamp(min=1e-6), u))


def undo_jump(schedule: Schedule, x_u: Tensor, x_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """The estimate D for which `jump` from x_t at time t gives x_u; its inverse."""
    ratio = schedule.sigma(u) / schedule.sigma(t)
    clean = expand(u <= schedule.t_min * 1.0001 + 1e-9, x_t).bool()
    D = (x_u - expand(ratio, x_u) * x_t) / expand(schedule.alpha(u) - ratio * schedule.alpha(t), x_u)
    return torch.where(clean, x_u, D)


def segment_ends(num: int, segments: int) -> Tensor:
    """For each of a grid's num intervals, noise first, the index [num] of the time at which its segment ends.

    Segments are counted from the data end, edges at floor(j num / segments) as in PCM (arXiv 2405.18407).
    """
    from_data = torch.arange(num - 1, -1, -1)
    segment = ((from_data + 1) * segments - 1) // num
    return num - segment * num // segments


def teacher_grid(schedule: Schedule, num: int) -> list[float]:
    """num + 1 times from noise to data in the spacing of the teacher's own scheduler ("trailing")."""
    return [*schedule.teacher_times(num), schedule.t_min]


@torch.no_grad()
def sample_teacher(
    role: Guided,
    noise: Tensor,
    cond: Cond,
    uncond: Cond,
    num_steps: int,
    w: float | Tensor = 1.0,
    solver: str = "euler",
) -> Tensor:
    """x0 [B, ...] by the ODE of the guided teacher: num_steps network evaluations, twice as many with
    guidance, and twice as many with Heun.
    """
    schedule = role.schedule
    times = teacher_grid(schedule, num_steps)
    x = role.source(noise, cond) * schedule.prior_std(times[0])

    def D(x_t: Tensor, t: Tensor) -> Tensor:
        return role.guided(x_t, t, cond, uncond, w)

    for i in range(num_steps):
        t = torch.full((len(x),), times[i], dtype=torch.float64, device=x.device)
        if i == num_steps - 1:
            return D(x, t)
        x = solver_step(schedule, D, x, t, torch.full_like(t, times[i + 1]), solver)
    raise AssertionError("num_steps must be at least 1")


def check_finite(what: str, x0: Tensor, images: Tensor) -> None:
    """Raise NotFinite, naming what was drawn, where the denoised samples or their decoded pictures hold a
    NaN or an infinity: as pictures they would be black, and no metric means anything.
    """
    for tensor, where in ((x0, "from the denoiser"), (images, "from the autoencoder")):
        bad = int((~tensor.isfinite().flatten(1).all(1)).sum())
        if bad:
            remedy = "in half precision, try bf16 or float32"
            raise NotFinite(f"{what} are not finite: {bad} of {len(tensor)} as they come {where}; {remedy}")


class ImageNoise:
    """One random generator per image: `first` is the initial noise, calls draw the noise of `renoise`."""

    def __init__(self, seeds: list[int], shape: tuple[int, ...], device: str | torch.device = "cpu"):
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        self.device = device
        self.first = self._draw(shape)

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)

    def __call__(self, x: Tensor) -> Tensor:
        return self._draw(x.shape[1:]).to(x.dtype)


@torch.no_grad()
def sample_student(
    student: Student, seeds: list[int], shape: tuple[int, ...], cond: Cond, device: str | torch.device = "cpu"
) -> Tensor:
    """x0 [B, ...] at the student's own times, one seed per image."""
    noise = ImageNoise(seeds, shape, device)
    return student.generate(noise.first, cond, noise)
