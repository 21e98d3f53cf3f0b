"""The diffusers scheduler of a student, so that a plain call visits the times it was trained on."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import EDM, VP, Flow, LocalVP, Schedule, TrigFlow
from fastgen.families.base import Family
from fastgen.networks.teacher import Teacher
from fastgen.roles.roles import Student

VP_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


@dataclass
class SchedulerSetup:
    """A scheduler, what must be passed to it, and whether it can carry the student at all."""

    scheduler: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    """keywords of `set_timesteps` (and of the pipeline call) beyond the plain number of steps"""
    step: dict[str, Any] = field(default_factory=dict)
    """keywords of `step` (and of the pipeline call)"""
    needs_loop: bool = False
    """no diffusers scheduler takes these steps; the model card spells out a loop that does"""
    set_on_scheduler: bool = False
    """the pipeline's call does not take `arguments`: they are set on the scheduler itself (see `bind`)"""

    def set_timesteps(self, num: int) -> None:
        """Prepare the scheduler as the model card tells users to."""
        given = dict(self.arguments)
        if "sigmas" in given and type(self.scheduler).__name__.startswith("EDM"):
            given |= {"num_inference_steps": num, "sigmas": torch.tensor(given["sigmas"])}
        self.scheduler.set_timesteps(**(given or {"num_inference_steps": num}))


def scheduler_for(
    times: list[float],
    sampler: str,
    schedule: Schedule,
    teacher_scheduler,
    family: Family | None = None,
    grid: int = 0,
    gamma: float = 0.0,
) -> SchedulerSetup:
    """The scheduler for a student's own time list (see the table in each function); on VP one of a grid
    can take every step count that the grid holds.
    """
    if isinstance(schedule, LocalVP):
        setup = _local(times, sampler, schedule)
    elif isinstance(schedule, VP):
        on_grid = times == schedule.student_times(len(times), grid)
        setup = _vp(times, sampler, teacher_scheduler, grid or len(times), gamma, on_grid)
    elif isinstance(schedule, EDM) and _is_consistency(teacher_scheduler):
        setup = _cm(times, sampler, schedule, teacher_scheduler)
    elif isinstance(schedule, EDM):
        setup = _edm(times, sampler, schedule, teacher_scheduler)
    elif isinstance(schedule, Flow):
        setup = _flow(times, sampler, schedule, family is not None and family.default_sigmas)
    elif isinstance(schedule, TrigFlow):
        setup = _trig(times, sampler, schedule, teacher_scheduler)
    else:
        found = f"no diffusers scheduler for {type(schedule).__name__}"
        raise UserError("export", found, "use a teacher on a VP, flow, EDM or TrigFlow schedule")
    if setup.arguments and family is not None and (family.kind == "text" or family.label_key):
        setup.set_on_scheduler |= not set(setup.arguments) <= _accepted(family.pipeline)
    return setup


def scheduler_setup(student: Student, teacher: Teacher) -> SchedulerSetup:
    """The scheduler of a student at its time list; `teacher` gives the noise levels and the pipeline."""
    family, spec = teacher.backbone.family, student.spec
    return scheduler_for(
        student.times, spec.sampler, teacher.schedule, teacher.scheduler, family, spec.grid, spec.gamma
    )


def _is_consistency(scheduler) -> bool:
    """Whether it is the scheduler of consistency models, whose EDM form has a boundary."""
    return type(scheduler).__name__ == "CMStochasticIterativeScheduler"


def _accepted(pipeline: str) -> set[str]:
    """Keywords of a pipeline's call."""
    import diffusers

    return set(inspect.signature(getattr(diffusers, pipeline).__call__).parameters)


def bind(scheduler, arguments: dict) -> None:
    """Make a scheduler take these steps whatever a pipeline passes to it; the model card spells this out."""
    set_timesteps = scheduler.set_timesteps
    scheduler.set_timesteps = lambda *_, device=None, **__: set_timesteps(**arguments, device=device)


def _noise_levels(teacher_scheduler) -> dict:
    """Keys that give another scheduler the teacher's noise levels: its own, or every beta spelled out where
    only its class can make them (CogVideoX's SNR shift, Shap-E's exponential schedule).
    """
    config = teacher_scheduler.config
    if not config.get("snr_shift_scale") and config.get("beta_schedule") != "exp":
        return {k: config[k] for k in VP_KEYS if k in config}
    bar = teacher_scheduler.alphas_cumprod.double()
    betas = 1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])
    return {
        "num_train_timesteps": config["num_train_timesteps"],
        "prediction_type": config["prediction_type"],
        "trained_betas": betas.tolist(),
    }


def _vp(
    times: list[float], sampler: str, teacher_scheduler, original: int, gamma: float, on_grid: bool
) -> SchedulerSetup:
    """renoise: LCMScheduler, its boundary factors within 2e-5 of (0, 1) at these times; ode: DDIM, trailing;
    tcd: TCDScheduler, whose eta is our gamma.

    Off-grid lists are passed as `timesteps`; DPMSolverMultistepScheduler of order 1 is a DDIM that takes one.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, TCDScheduler

    if any(t != round(t) for t in times):
        raise UserError("student.timesteps", f"found {times}", "give whole numbers: schedulers index by them")
    kept = _noise_levels(teacher_scheduler)
    num, total = len(times), kept["num_train_timesteps"]
    ints = [int(t) for t in times]
    if sampler != "ode":
        cls = LCMScheduler if sampler == "renoise" else TCDScheduler
        scheduler = cls(**kept, original_inference_steps=original, clip_sample=False)
        step = {"eta": gamma} if sampler == "tcd" else {}
        return SchedulerSetup(scheduler, {} if on_grid else {"timesteps": ints}, step)
    if total % num == 0 and ints == [(num - i) * (total // num) - 1 for i in range(num)]:
        more = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
        return SchedulerSetup(DDIMScheduler(**kept, **more))
    more = {"solver_order": 1, "final_sigmas_type": "zero", "timestep_spacing": "trailing"}
    return SchedulerSetup(DPMSolverMultistepScheduler(**kept, **more), {"timesteps": ints})


def _local(times: list[float], sampler: str, schedule: LocalVP) -> SchedulerSetup:
    """EulerDiscreteScheduler, which keeps data unscaled: its noise levels sqrt(1 / abar - 1) are those of the
    schedule for the betas that are written out here. Re-noising needs a loop.
    """
    from diffusers import EulerDiscreteScheduler

    if sampler == "tcd":
        raise UserError("student.sampler", "found 'tcd' for data that are not scaled", "use renoise or ode")
    total = schedule.num_timesteps
    bar = 1 / (1 + schedule.sigma(torch.arange(total, dtype=torch.float64)) ** 2)
    betas = 1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])
    known = {"num_train_timesteps": total, "prediction_type": "epsilon", "timestep_spacing": "trailing"}
    scheduler = EulerDiscreteScheduler(**known, trained_betas=betas.tolist())
    loop = sampler == "renoise" and len(times) > 1
    return SchedulerSetup(scheduler, {"timesteps": [int(t) for t in times]}, needs_loop=loop)


def _flow(times: list[float], sampler: str, schedule: Flow, default_sigmas: bool = False) -> SchedulerSetup:
    """FlowMatchLCM (renoise) or FlowMatchEuler (ode).

    With default_sigmas the pipeline itself hands over w = 1 - k / N, which `shift` bends into our grid.
    Otherwise

    diffusers spaces N levels from 1 down to its smallest level u_N, bends them by `shift` and stretches the
    result to end at `shift_terminal`. Our grid is s w / (1 + (s - 1) w) at w = 1 - k / N. Both are Moebius
    maps of k, so they agree everywhere once three points do: with a = (1 - u_N) N / (N - 1), take
    shift' = a s / (1 + (a - 1) s) and our last time as shift_terminal. u_N depends on shift': iterate.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    cls = FlowMatchLCMScheduler if sampler == "renoise" else FlowMatchEulerDiscreteScheduler
    num, s = len(times), schedule.shift
    if default_sigmas and np.allclose(times, schedule.steps(num), atol=1e-9):
        return SchedulerSetup(cls(shift=s))
    if num > 1 and np.allclose(times, schedule.steps(num), atol=1e-9):
        bent, u_min = s, 0.001
        for _ in range(50):
            u_min = bent * 0.001 / (1 + (bent - 1) * 0.001)
            a = (1 - u_min) * num / (num - 1)
            bent = a * s / (1 + (a - 1) * s)
        return SchedulerSetup(cls(shift=bent, shift_terminal=times[-1]))
    if times == [1.0]:
        return SchedulerSetup(cls(shift=s))
    return SchedulerSetup(cls(shift=1.0), {"sigmas": list(times)})


def _trig(times: list[float], sampler: str, schedule: TrigFlow, teacher_scheduler) -> SchedulerSetup:
    """SCMScheduler, which adds fresh noise between steps. It takes `timesteps` with the final 0, or None as
    the second of two steps.
    """
    from diffusers import SCMScheduler

    num, scheduler = len(times), SCMScheduler.from_config(teacher_scheduler.config)
    if sampler != "renoise" and num > 1:
        raise UserError("student.sampler", f"found {sampler!r}", "use renoise: SCMScheduler adds fresh noise")
    plain = {"num_inference_steps": num, "intermediate_timesteps": None}
    if times != schedule.steps(num):
        given = plain | {"timesteps": [*times, 0.0], "max_timesteps": None}
        return SchedulerSetup(
            scheduler, given, set_on_scheduler=True
        )  # pipelines pass timesteps on without their number
    return SchedulerSetup(scheduler, {} if num == 2 and schedule.middle is not None else plain)


def _edm(times: list[float], sampler: str, schedule: EDM, teacher_scheduler) -> SchedulerSetup:
    """EDMEulerScheduler, whose `sigmas` argument is a ramp 0 (noise) to 1; or the EulerDiscreteScheduler of
    Stable Video Diffusion, which takes the noise levels themselves. Re-noising needs a loop.
    """
    from diffusers import EDMEulerScheduler, EulerDiscreteScheduler

    config, loop = dict(teacher_scheduler.config), sampler == "renoise" and len(times) > 1
    if config.get("timestep_type") == "continuous":
        plain = {"use_karras_sigmas": False, "timestep_spacing": "trailing"}
        scheduler = EulerDiscreteScheduler.from_config(config, **plain)
        return SchedulerSetup(scheduler, {"sigmas": [*times, 0.0]}, needs_loop=loop)
    scheduler = EDMEulerScheduler.from_config(config)
    if times == schedule.steps(1):
        return SchedulerSetup(scheduler)
    hi, lo = schedule.t_max ** (1 / schedule.rho), schedule.t_min ** (1 / schedule.rho)
    ramp = [(hi - t ** (1 / schedule.rho)) / (hi - lo) for t in times]
    return SchedulerSetup(scheduler, {"sigmas": ramp}, needs_loop=loop)


def _cm(times: list[float], sampler: str, schedule: EDM, teacher_scheduler) -> SchedulerSetup:
    """CMStochasticIterativeScheduler: its timestep k of T stands for Karras' ramp k / (T - 1), so that a grid
    of N equal parts is exact with T = N m + 1; other lists are rounded to a ramp of a million.
    """
    from diffusers import CMStochasticIterativeScheduler

    config, num = teacher_scheduler.config, len(times)
    loop = sampler == "ode" and num > 1
    if np.allclose(times, schedule.steps(num)):
        total = num * max(1, round((config.num_train_timesteps - 1) / num)) + 1
        scheduler = CMStochasticIterativeScheduler.from_config(
            config, num_train_timesteps=total, clip_denoised=False
        )
        return SchedulerSetup(scheduler, needs_loop=loop)
    total = 1_000_001
    scheduler = CMStochasticIterativeScheduler.from_config(
        config, num_train_timesteps=total, clip_denoised=False
    )
    hi, lo = schedule.t_max ** (1 / schedule.rho), schedule.t_min ** (1 / schedule.rho)
    ramp = [round((hi - t ** (1 / schedule.rho)) / (hi - lo) * (total - 1)) for t in times]
    return SchedulerSetup(scheduler, {"timesteps": ramp[::-1]}, needs_loop=loop)  # it reads them backwards
