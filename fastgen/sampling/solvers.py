"""Teacher ODE solvers, and sampling with one generator per image so that batch size never changes a
picture.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.core.batch import Cond
from fastgen.core.errors import NotFinite
from fastgen.diffusion.schedules import Schedule, expand
from fastgen.roles.roles import Role, Student

Denoiser = Callable[[Tensor, Tensor], Tensor]


def solver_step(schedule: Schedule, D: Denoiser, x_t: Tensor, t: Tensor, u: Tensor, solver: str) -> Tensor:
    """One ODE step from t to u: Euler (DDIM), or Heun, its second-order correction in the same
    exponential form.
    """
    first = D(x_t, t)
    x_u = schedule.ode_step(first, x_t, t, u)
    if solver == "euler":
        return x_u
    second = D(x_u, u.clamp(min=schedule.t_min + 1e-4))
    corrected = schedule.ode_step(0.5 * (first + second), x_t, t, u)
    return torch.where(expand(u <= schedule.t_min, x_t).bool(), x_u, corrected)


def jump(schedule: Schedule, D: Tensor, x_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """The boundary parameterisation: DDIM from t to u with the denoiser held, so x_t itself at u = t.

    At the clean end of the schedule it is D, which is what few-step samplers return.
    """
    clean = expand(u <= schedule.t_min * 1.0001 + 1e-9, x_t).bool()
    return torch.where(clean, D, schedule.ode_step(D, x_t, t.clamp(min=1e-6), u))


def undo_jump(schedule: Schedule, x_u: Tensor, x_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """The D whose jump from x_t at t lands on x_u."""
    ratio = schedule.sigma(u) / schedule.sigma(t)
    clean = expand(u <= schedule.t_min * 1.0001 + 1e-9, x_t).bool()
    D = (x_u - expand(ratio, x_u) * x_t) / expand(schedule.alpha(u) - ratio * schedule.alpha(t), x_u)
    return torch.where(clean, x_u, D)


def segment_ends(num: int, segments: int) -> Tensor:
    """Where each of a grid's num intervals, noise first, must land: the index of its segment's end [num].

    Segments are counted from the data end, edges at floor(j num / segments) as in PCM (arXiv 2405.18407).
    """
    from_data = torch.arange(num - 1, -1, -1)
    segment = ((from_data + 1) * segments - 1) // num
    return num - segment * num // segments


def teacher_grid(schedule: Schedule, num: int) -> list[float]:
    """num + 1 times from noise to data, as the teacher's own scheduler spaces them (trailing)."""
    return [*schedule.teacher_steps(num), schedule.t_min]


@torch.no_grad()
def sample_teacher(
    role: Role, noise: Tensor, cond: Cond, uncond: Cond, num_steps: int, w: float = 1.0, solver: str = "euler"
) -> Tensor:
    """x0 [B, ...] by the guided teacher's ODE; num_steps network evaluations (x2 with guidance, x2 with
    Heun).
    """
    schedule = role.schedule
    times = teacher_grid(schedule, num_steps)
    x = noise * schedule.prior_std(times[0])

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
    """One random stream per image: `first` is its initial noise, later calls its re-noising draws."""

    def __init__(self, seeds: list[int], shape: tuple[int, ...], device="cpu"):
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        self.device = device
        self.first = self._draw(shape)

    def _draw(self, shape) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)

    def __call__(self, x: Tensor) -> Tensor:
        return self._draw(x.shape[1:]).to(x.dtype)


@torch.no_grad()
def sample_student(
    student: Student, seeds: list[int], shape: tuple[int, ...], cond: Cond, device="cpu"
) -> Tensor:
    """x0 [B, ...] by the student's own time list, one seed per image."""
    noise = ImageNoise(seeds, shape, device)
    return student.generate(noise.first, cond, noise)
