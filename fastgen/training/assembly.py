"""The parts of a run, made from its config. Below the commands this is the only module that holds the whole
config: every part is given the sections that it reads.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from fastgen.config.run import RunConfig
from fastgen.config.sections import EvalConfig
from fastgen.data.batches import Data
from fastgen.data.kinds import OWN, SOURCES, own_source
from fastgen.data.latents import read_null
from fastgen.evaluation.evaluator import EvaluationProtocol, Evaluator
from fastgen.evaluation.metrics.metric import Kind
from fastgen.evaluation.rewards import keep_apart
from fastgen.evaluation.run_metrics import RunMetrics
from fastgen.networks.rewards import Reward
from fastgen.networks.sharding import of_first
from fastgen.objectives import requirements_of
from fastgen.objectives.requirements import RewardsSpec
from fastgen.training import fingerprint
from fastgen.training.auxiliaries import open_rewards
from fastgen.training.cast import Cast
from fastgen.training.trainer import Trainer
from fastgen.training.validation import Validator

FEW = 100
"""samples that are measured where no metric needs more and the config names no number"""
FREE_DATA = ("cache_dir", "workers", "allow_download")
"""settings of the data section that decide no batch"""
KINDS: dict[int, Kind] = {1: "points", 2: "clouds", 3: "images", 4: "clips"}
"""what a teacher makes, by the number of dimensions of a sample"""


def make_cast(cfg: RunConfig, device="cpu") -> Cast:
    """The networks of a run; on the device "meta" they have shapes and no weights."""
    encoded = bool(cfg.data.latents) and str(device) != "meta" and Path(cfg.data.latents).is_dir()
    null = read_null(cfg.data.latents) if encoded else None  # an export needs no data, and so no such folder
    return Cast(
        cfg.teacher, cfg.student, cfg.critic, cfg.train, cfg.all_stages(), device, null, cfg.data.views
    )


def make_weightless_cast(cfg: RunConfig) -> Cast:
    """The networks of a run on the meta device, never compiled."""
    return make_cast(
        cfg.model_copy(
            update={"train": cfg.train.model_copy(update={"compile": False, "compile_blocks": False})}
        ),
        "meta",
    )


def make_protocol(cfg: RunConfig) -> EvaluationProtocol:
    """How the students of a run are measured."""
    one = cfg.eval
    validates = cfg.train.validation_steps and one.validation_samples
    return EvaluationProtocol(
        few_step=requirements_of(cfg.all_stages()[-1].objective).few_step,
        guidance=cfg.teacher.guidance,
        teacher_steps=cfg.teacher.num_steps,
        num_samples=one.num_samples,
        teacher_samples=one.teacher_samples,
        validation_samples=max(one.validation_samples, one.grid) if validates else 0,
        student_steps=one.student_steps,
        batch_size=one.batch_size,
        seed=one.seed,
        forgets=requirements_of(cfg.all_stages()[-1].objective).forgets,
        own_data=bool(own_source(cfg.data)),
        milder=requirements_of(cfg.all_stages()[-1].objective).degraded,
    )


def make_evaluator(cfg: RunConfig, cast, data) -> Evaluator:
    """What draws the contenders of a run and scores them, also by the metrics that the config asks for."""
    metrics = None
    if cfg.eval.metrics:
        mini_set = str((cast.teacher.info or {}).get("measure") or "")
        of_pictures = own_source(cfg.data) not in ("", "prompts")
        own = cfg.data.images or cfg.data.shards  # the other kinds are no folder that a metric reads
        against = cfg.eval.against or own or cfg.data.name or ("" if of_pictures else mini_set)
        teacher = cast.teacher
        kind, mixture = KINDS[len(teacher.codec.shape)], teacher.backbone if teacher.is_analytic else None
        metrics = RunMetrics(
            cfg.eval.metrics, cfg.eval.weights, against, mini_set, cast.device, kind, mixture
        )
    protocol = make_protocol(cfg)
    evaluator = Evaluator(protocol, cast, data, metrics)
    evaluator.tuned_by = keep_apart(tuned_by(cfg, cast), evaluator.measurer, metrics)
    if metrics is None and evaluator.label_free and protocol.num_samples == EvalConfig().num_samples:
        evaluator.protocol = replace(protocol, num_samples=FEW)
        print(
            f"measuring {FEW} samples of each: eval.metrics is empty, and nothing here judges pictures "
            "beyond the teacher's own features; eval.num_samples sets another number, 0 none"
        )
    return evaluator


def tuned_by(cfg: RunConfig, cast) -> list[Reward]:
    """The rewards that any stage of a run is tuned by."""
    parts = [p for s in cfg.all_stages() for p in requirements_of(s.objective).auxiliaries.values()]
    specs = [spec for spec in parts if isinstance(spec, RewardsSpec)]
    return [model for spec in specs for model in open_rewards(spec, cast.teacher, cast.device)]


def make_validator(cfg: RunConfig, cast: Cast, data: Data, folder: Path) -> Validator:
    """What measures a run while it trains and at its end."""
    return Validator(cfg.eval, make_evaluator(cfg, cast, data), folder)


def make_trainer(
    cfg: RunConfig,
    cast: Cast,
    data: Data,
    folder: Path,
    accelerator: Accelerator,
    validate: Callable[[Trainer], None] | None = None,
) -> Trainer:
    """The training loop of a run over networks and data that are loaded."""
    found = fingerprint.of_run(
        fixed_settings(cfg), cast.teacher, data, cfg.data, accelerator.num_processes, accelerator.device
    )
    if cfg.train.sharding:
        found = of_first(found)  # the others have no weights yet
    return Trainer(cfg.train, cast, data, folder, accelerator, found, validate)


def fixed_settings(cfg: RunConfig) -> dict[str, str]:
    """The settings that may not change between a run and its resumption, as JSON by dotted key."""
    values = cfg.model_dump(mode="json")
    kept = {k: values[k] for k in ("teacher", "student", "critic", "data")}
    kept["train"] = {k: values["train"][k] for k in fingerprint.TRAIN}
    kept["data"] = {k: v for k, v in fingerprint.data_settings(cfg.data).items() if k not in FREE_DATA}
    if cfg.stages:
        kept["stages"] = {str(i): s for i, s in enumerate(values["stages"])}
    else:
        kept |= {"objective": values["objective"], "optim": values["optim"]}
        kept["train"]["max_train_steps"] = values["train"]["max_train_steps"]
    return fingerprint.by_key(kept)


def input_paths(cfg: RunConfig) -> dict[str, str]:
    """The files and folders that a run reads, by the key that names them; empty where a key is not set."""
    data = {key: getattr(cfg.data, key) for key in ("control", *SOURCES) if key != "name"}
    found = {
        "teacher.path": cfg.teacher.path,
        "student.init": cfg.student.init,
        "student.fuse": cfg.student.fuse,
        **{f"data.{key}": value for key, value in data.items()},
        "data.dispreferred": cfg.data.dispreferred,
        "data.appearance.images": cfg.data.appearance.images if cfg.data.appearance else "",
    }
    for i, source in enumerate(cfg.data.sources):
        found |= {f"data.sources.{i}.{key}": getattr(source, key) for key in OWN}
    return found


def step_keys(cfg: RunConfig) -> tuple[str, ...]:
    """The key that sets the length of each stage."""
    if not cfg.stages:
        return ("train.max_train_steps",)
    return tuple(f"stages.{i}.max_train_steps" for i in range(len(cfg.stages)))
