"""diffusers schedulers read: the noise schedule and native prediction kind behind one."""

from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import EDM, VP, Flow, Schedule, TrigFlow

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}

SCM_MIDDLE = 1.3
"""second of two steps by default, in SCMScheduler and SANA-Sprint's pipeline"""


def load_scheduler(config: dict):
    """A diffusers scheduler from its config dict (which names its class)."""
    import diffusers

    cls = getattr(diffusers, config.get("_class_name", ""), None)
    if cls is None:
        raise UserError(
            "scheduler._class_name", f"found {config.get('_class_name')!r}", "a diffusers scheduler class"
        )
    return cls.from_config(config)


def schedule_of(scheduler, prediction: str = "auto", shift: float | None = None) -> tuple[Schedule, str]:
    """The schedule and native prediction kind behind a diffusers scheduler; `shift` bends a flow's grid."""
    schedule, found = _read(scheduler, shift)
    if prediction not in ("auto", found):
        raise UserError(
            "teacher.prediction",
            f"{prediction!r} disagrees with {type(scheduler).__name__}",
            f"whose config says {found!r}; use 'auto' or mend scheduler_config.json",
        )
    return schedule, found


def _read(scheduler, shift: float | None) -> tuple[Schedule, str]:
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
        bent = shift or declared or config.get("shift") or 1.0
        return Flow(bent, config.get("shift_terminal")), "flow"
    if hasattr(scheduler, "alphas_cumprod"):
        if kind not in PREDICTIONS:
            allowed = ", ".join(PREDICTIONS)
            raise UserError("scheduler.prediction_type", f"found {kind!r}", f"allowed: {allowed}")
        return VP(scheduler.alphas_cumprod), PREDICTIONS[kind]
    raise UserError("scheduler", f"{name} has no noise schedule that fastgen knows", "")
