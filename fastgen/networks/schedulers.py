"""The noise schedule and the native prediction kind that a diffusers scheduler defines."""

from typing import Any

from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import EDM, VP, Flow, Schedule, TrigFlow
from fastgen.networks.files import library_class

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}

SCM_MIDDLE = 1.3
"""default time of the second of two steps in SCMScheduler and SANA-Sprint's pipeline"""


def load_scheduler(config: dict) -> Any:
    """The diffusers scheduler of a config, whose _class_name is its class."""
    import diffusers

    cls = library_class(diffusers, config.get("_class_name", ""), diffusers.SchedulerMixin)
    if cls is None:
        found = f"found {config.get('_class_name')!r}, which is not a scheduler of diffusers"
        raise UserError("scheduler._class_name", found, "correct scheduler_config.json")
    return cls.from_config(config)


def schedule_of(scheduler: Any, prediction: str = "auto", shift: float | None = None) -> tuple[Schedule, str]:
    """(noise schedule, native prediction kind) of a diffusers scheduler; `shift` is a flow's time shift."""
    schedule, found = _read(scheduler, shift)
    if prediction not in ("auto", found):
        raise UserError(
            "teacher.prediction",
            f"found {prediction!r}, but the config of {type(scheduler).__name__} says {found!r}",
            "use auto, or correct scheduler_config.json",
        )
    return schedule, found


def _read(scheduler: Any, shift: float | None) -> tuple[Schedule, str]:
    config, name = scheduler.config, type(scheduler).__name__
    kind = config.get("prediction_type", "flow_prediction")
    if name.startswith("EDM"):
        return EDM(config.sigma_min, config.sigma_max, config.sigma_data, config.get("rho", 7.0)), "edm"
    if name == "CMStochasticIterativeScheduler":  # consistency models: EDM preconditioning with a boundary
        return EDM(config.sigma_min, config.sigma_max, config.sigma_data, config.rho), "edm"
    if name == "SCMScheduler":  # latents of unit variance: the pipeline divides its own by sigma_data
        return TrigFlow(middle=SCM_MIDDLE), "v"
    if config.get("timestep_type") == "continuous" and kind == "v_prediction":  # EDM's form at sigma_data = 1
        return EDM(config.sigma_min, config.sigma_max, 1.0), "edm"
    if name.startswith(("FlowMatch", "FlowMap")) or kind == "flow_prediction":
        declared = config.get("flow_shift") if kind == "flow_prediction" else None
        time_shift = shift or declared or config.get("shift") or 1.0
        return Flow(time_shift, config.get("shift_terminal")), "flow"
    if hasattr(scheduler, "alphas_cumprod"):
        if kind not in PREDICTIONS:
            instruction = f"correct scheduler_config.json to one of {', '.join(PREDICTIONS)}"
            raise UserError("scheduler.prediction_type", f"found {kind!r}", instruction)
        return VP(scheduler.alphas_cumprod), PREDICTIONS[kind]
    instruction = "use a model with a DDPM-, flow-matching-, EDM- or SCM-type scheduler"
    raise UserError("scheduler", f"fastgen does not know the noise schedule of {name}", instruction)
