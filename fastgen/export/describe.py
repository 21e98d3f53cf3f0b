"""What a trained generator is, in the words of its export: see `ExportInfo`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgen import __version__
from fastgen.diffusion.schedules import TrigFlow
from fastgen.export import tiles
from fastgen.export.guidance_adapters import is_guidance_adapter
from fastgen.export.info import ExportInfo
from fastgen.export.scheduler import SchedulerSetup, scheduler_setup
from fastgen.networks.backbone import Backbone
from fastgen.networks.load import RECORDED
from fastgen.networks.teacher import Teacher
from fastgen.roles.roles import Student


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained generator, and what its export says about the run behind it."""

    teacher: Teacher
    student: Student
    objective: str
    """methods of all stages, joined by +"""
    few_step: bool
    """whether it is sampled in its few steps; if not, like its teacher"""
    takes: Callable[[int], bool]
    """whether the method trains the student for that many steps"""
    guidance: float
    """scale of the teacher that was learned"""
    nasa_scale: float
    """of negative prompts by attention (NASA); 0: none"""
    base: str
    """path of the teacher"""
    teacher_steps: int
    training_steps: int
    run_name: str
    command: list[str]
    """that made the run"""
    dtype: torch.dtype
    example: str = ""
    """a prompt of the run's own data"""
    enlarges: int = 0
    """factor of the enlarged pictures that it is shown; 0: none"""


def _kind(student: Student) -> str:
    if is_guidance_adapter(student):
        return "guidance_adapter"
    return "lora" if student.adapter else "full"


def network_of(student: Student) -> Backbone:
    """The student's diffusers network; closed forms and the small networks beside them are not exported."""
    if not isinstance(student.backbone, Backbone):
        raise TypeError(f"{type(student.backbone).__name__} is no diffusers network")
    return student.backbone


def export_name(trained: Trained) -> str:
    """<base>-<objective>-<N>step, or the run's name where nothing was distilled."""
    base = Path(trained.base.replace(":", "/")).name
    if not trained.few_step:
        return (base if trained.student.adapter else "") or trained.run_name
    return f"{base}-{trained.objective}-{len(trained.student.times)}step"


def describe(trained: Trained, setup: SchedulerSetup) -> ExportInfo:
    """What an export must say about itself, so that nothing needs to be remembered to sample it."""
    teacher, student, few_step = trained.teacher, trained.student, trained.few_step
    return ExportInfo(
        fastgen_version=__version__,
        name=export_name(trained),
        objective=trained.objective,
        student_kind=_kind(student),
        base=trained.base if few_step or student.adapter else "",
        training_steps=trained.training_steps,
        steps=len(student.times) if few_step else trained.teacher_steps,
        times=tuple(float(t) for t in student.times) if few_step else None,
        sampler=student.sampler,
        gamma=student.spec.gamma,
        grid=student.spec.grid,
        scheduler=_config_of(setup.scheduler),
        timestep_arguments=setup.arguments,
        step_arguments=setup.step,
        needs_loop=setup.needs_loop,
        set_on_scheduler=setup.set_on_scheduler,
        other_step_counts=other_step_counts(trained, setup) if few_step else {},
        step_lengths=step_lengths(student) if few_step else None,
        guidance=trained.guidance,
        guidance_range=student.guidance_range,
        steps_as_guidance=student.spec.steps_as_guidance,
        embedded_guidance=teacher.codec.guidance,
        nasa_scale=trained.nasa_scale,
        teacher_steps=trained.teacher_steps,
        teacher_scheduler=_config_of(teacher.scheduler),
        example=trained.example,
        enlarges=trained.enlarges,
        fidelity=student.spec.fidelity,
        fidelity_range=student.spec.fidelity_range,
        causal=_causal(student, teacher) if few_step and student.spec.block else None,
        tiles=tiles.share(student),
        teacher_settings={k: v for k, v in (teacher.info or {}).items() if k in RECORDED},
    )


def _causal(student: Student, teacher: Teacher) -> dict[str, int]:
    """Blocks of a student that makes one after the other, and the size of its latents."""
    sizes = dict(zip(("frames", "height", "width"), teacher.codec.shape[1:]))
    return {"block": student.spec.block, "window": student.spec.window, **sizes}


def step_lengths(student: Student) -> tuple[float, ...] | None:
    """What the extra input channel of a two-time network is filled with at each step."""
    if not student.backbone.second_time:
        return None
    times = torch.tensor([student.times, student.ends()], dtype=torch.float64)
    return tuple(student.schedule.gap(times[0], times[1]).tolist())


def other_step_counts(trained: Trained, setup: SchedulerSetup) -> dict[str, dict]:
    """For each other step count of one model, what to change in the scheduler and what to pass: of a student
    trained on a grid, or of a SANA-Sprint student, trained at all times.
    """
    teacher, student, own = trained.teacher, trained.student, _config_of(setup.scheduler)
    most, found = 4 if isinstance(teacher.schedule, TrigFlow) else student.spec.grid, {}
    for num in (1, 2, 4, 8):
        if num == len(student.times) or num > most or not trained.takes(num):
            continue
        other = scheduler_setup(student.with_steps(num), teacher)
        changed = {k: v for k, v in _config_of(other.scheduler).items() if own.get(k) != v}
        given = {"sigmas": student.with_steps(num).times} if other.needs_loop else other.arguments
        if student.spec.steps_as_guidance:
            given = {"num_inference_steps": num, **given, "guidance_scale": float(num)}
        found[str(num)] = {"scheduler": changed, "arguments": given}
    return found


def _config_of(scheduler) -> dict[str, Any]:
    """A scheduler's config as JSON values."""
    config = {"_class_name": type(scheduler).__name__, **scheduler.config}
    kept = {k: v for k, v in config.items() if k == "_class_name" or not k.startswith("_")}
    return {
        k: v.tolist() if isinstance(v, (np.ndarray, np.generic, torch.Tensor)) else v for k, v in kept.items()
    }
