"""The noise schedule and the native prediction kind that a diffusers scheduler defines."""

from typing import Any

from fastgen.core.errors import UserError, warn
from fastgen.diffusion.schedules import EDM, VP, Flow, Schedule, TrigFlow
from fastgen.networks.files import library_class

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}

SCM_MIDDLE = 1.3
"""default time of the second of two steps in SCMScheduler and SANA-Sprint's pipeline"""


def load_scheduler(config: dict) -> Any:
    """The diffusers scheduler of a config, whose _class_name is its class; with a warning, without
    rescale_betas_zero_snr where noise is predicted.
    """
    import diffusers

    cls = library_class(diffusers, config.get("_class_name", ""), diffusers.SchedulerMixin)
    if cls is None:
        found = f"found {config.get('_class_name')!r}, which is not a scheduler of diffusers"
        raise UserError("scheduler._class_name", found, "correct scheduler_config.json")
    scheduler = cls.from_config(config)
    if scheduler.config.get("rescale_betas_zero_snr") and scheduler.config.prediction_type == "epsilon":
        warn(
            "scheduler: rescale_betas_zero_snr is left out: this model predicts noise, which says nothing of "
            "x0 at zero SNR (the setting is for v_prediction models)"
        )
        return cls.from_config({**config, "rescale_betas_zero_snr": False})
    return scheduler


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
        if kind == "epsilon":
            _check_terminal_snr(scheduler)
        return VP(scheduler.alphas_cumprod), PREDICTIONS[kind]
    instruction = "use a model with a DDPM-, flow-matching-, EDM- or SCM-type scheduler"
    raise UserError("scheduler", f"fastgen does not know the noise schedule of {name}", instruction)


def _check_terminal_snr(scheduler: Any) -> None:
    """Refuse a noise prediction at a time without signal: x0 = (x_t - sigma eps) / alpha has no value at
    alpha = 0. Warn where alpha is so small that it magnifies the network's errors a thousandfold.
    """
    last = float(scheduler.alphas_cumprod[-1])
    if last < 1e-12:
        found = "found epsilon with a terminal SNR of zero, where noise says nothing of x0"
        instruction = "correct the betas in scheduler_config.json, or use a v_prediction or sample model"
        raise UserError("scheduler.prediction_type", found, instruction)
    if last < 1e-6:
        warn(
            f"scheduler: at its last time alpha is {last**0.5:.1e} and the model predicts noise: x0 there is "
            "the network's error divided by it (terminal SNR nearly zero)"
        )
