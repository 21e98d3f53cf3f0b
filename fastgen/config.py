"""The run configuration: typed, merged from YAML files left to right, overridden by dotted flags, told
apart in one line when wrong.
"""

from typing import Annotated, Any, Literal, Union, get_origin

import tyro.conf
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastgen.objectives import REGISTRY
from fastgen.parse import complain, merge, model_in, overrides, read_files


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change, field docstrings are the help
    text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _wrap(cls, values):
        """A lone value where a list is meant stands for the list of it."""
        if not isinstance(values, dict):
            return values
        lists = {n for n, f in cls.model_fields.items() if get_origin(f.annotation) is tuple}
        return {
            k: [v] if k in lists and not isinstance(v, (list, tuple, type(None))) else v
            for k, v in values.items()
        }


class TeacherConfig(Section):
    """The slow generator to distil."""

    path: str = "assets:teachers/fashion"
    """diffusers folder, bundled asset (assets:teachers/NAME), exact teacher (analytic:gmm2d-flow) or hub
    id
    """
    guidance: float = Field(1.0, ge=0)
    """classifier-free guidance w of the teacher: D_uncond + w (D_cond - D_uncond); 1 is none"""
    num_steps: int = Field(20, ge=1)
    """network steps the teacher is sampled with where it is compared"""
    prediction: Literal["auto", "eps", "v", "x0", "flow", "edm"] = "auto"
    """native prediction kind; auto reads it off the scheduler, anything else must agree with it"""
    allow_download: bool = False
    """let a hub id be fetched over the network"""
    dtype: Literal["bf16", "fp16"] | None = None
    """precision of frozen weights; null is float32. What is trained (copies, adapters) stays float32"""
    height: int | None = Field(None, ge=1)
    """pixels; null is the size the network was made for"""
    width: int | None = Field(None, ge=1)
    """pixels; null is the size the network was made for"""
    num_frames: int | None = Field(None, ge=1)
    """frames of a video teacher; null is what it was made for"""
    embedded_guidance: float | None = Field(None, ge=0)
    """guidance that the network takes as an input (FLUX.1-dev, SANA-Sprint, LCM); null is the family's"""
    attention: (
        Literal["auto", "native", "math", "flash", "efficient", "cudnn", "flex", "xformers", "sage"] | None
    ) = None
    """attention kernel; null and auto leave PyTorch's choice"""
    vae_tiling: bool = False
    """encode and decode in tiles: less memory at large sizes"""
    vae_slicing: bool = False
    """encode and decode one image at a time"""
    family: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
    """declaration of a diffusers denoiser that fastgen does not know (docs/families.md); files only"""
    blueprint: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
    """diffusers configs {net, scheduler, info} of an untrained network to build; files only"""


class LoraConfig(Section):
    """Low-rank adapter of one role."""

    rank: int = Field(16, ge=1)
    """rank of the update"""
    lora_alpha: float = Field(16, gt=0)
    """scale numerator; the update is multiplied by lora_alpha / rank"""
    use_rslora: bool = False
    """multiply by lora_alpha / sqrt(rank) instead (arXiv 2312.03732)"""
    use_dora: bool = False
    """weight-decomposed adapters (arXiv 2402.09353); refused: LoRA readers drop their magnitudes"""
    target_modules: tuple[str, ...] = ()
    """module-name endings to adapt; empty takes the family's default"""


class StudentConfig(Section):
    """The few-step generator to be."""

    kind: Literal["full", "lora"] = "full"
    """train a copy of the teacher, or an adapter over the frozen teacher"""
    num_steps: int = Field(1, ge=1, le=64)
    """network evaluations per sample; the time list follows the exported scheduler's grid"""
    timesteps: tuple[float, ...] = ()
    """explicit time list in the schedule's units, descending; overrides num_steps"""
    sampler: Literal["renoise", "ode", "tcd"] = "renoise"
    """between steps: add fresh noise, continue along the ODE with the predicted noise, or TCD's mixture"""
    gamma: float = Field(0.0, ge=0, le=1)
    """share of fresh noise of the tcd sampler, TCDScheduler's eta: 0 is the ODE, 1 renoises"""
    guidance_embedding: tuple[float, float] | None = None
    """range of guidance w to train a network that takes w as an input; null trains teacher.guidance alone"""
    smooth_time: bool = False
    """solve a full student's time embedder anew without fast ripples, for continuous-time methods"""
    sprint: bool = False
    """give a SANA student SANA-Sprint's form (times in [0, 1], w as an input), for SanaSprintPipeline"""
    init: str = ""
    """export folder or LoRA file to start from; empty starts from the teacher"""
    fuse: str = ""
    """export of another student of this teacher, averaged into this one at the end of the run"""
    fuse_weight: float | None = Field(None, ge=0, le=1)
    """this student's share of that average; null is 0.5"""
    lora: LoraConfig = LoraConfig()
    """adapter settings when kind is lora"""
    net: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
    """changes to the teacher's network config for an untrained student of another size; files only"""


class CriticConfig(Section):
    """The online fake-score network of distribution-matching methods."""

    kind: Literal["auto", "full", "lora"] = "auto"
    """auto follows the student: an adapter over the shared base for a LoRA student, else a copy"""
    lora: LoraConfig = LoraConfig(rank=32, lora_alpha=32)
    """adapter settings when the critic is a LoRA"""


class DataConfig(Section):
    """Real images and the labels or prompts that go with them."""

    name: str = ""
    """digits, fashion or tinted (bundled); empty with `images` or `prompts`"""
    images: str = ""
    """folder of images, captions in metadata.jsonl (file_name, text) or .txt side-cars"""
    prompts: str = ""
    """text file with one prompt a line, for methods that need no images"""
    limit: int = Field(0, ge=0)
    """use only the first N examples; 0 means all"""
    on_bad_image: Literal["skip", "error"] = "skip"
    """an unreadable image is named, counted and skipped, or stops the run"""
    cache_dir: str = ""
    """where encoded latents and prompts are kept between runs; empty keeps them in memory"""


class PlayerOptim(Section):
    """Optimizer of one player."""

    lr: float = Field(1e-4, gt=0)
    """learning rate"""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates"""
    eps: float = Field(1e-8, gt=0)
    """Adam's epsilon"""
    weight_decay: float = Field(0.0, ge=0)
    """decoupled weight decay"""
    name: Literal["adamw", "radam", "adamw8bit"] = "adamw"
    """adamw8bit needs bitsandbytes and CUDA"""
    clip: float = Field(1.0, ge=0)
    """gradient-norm clip; 0 is off"""
    warmup_steps: int = Field(0, ge=0)
    """linear learning-rate warm-up"""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """learning rate after warm-up, over the stage's steps"""


class OptimConfig(Section):
    """One optimizer per player."""

    student: PlayerOptim = PlayerOptim()
    """the student's"""
    critic: PlayerOptim = PlayerOptim()
    """the critic's, discriminator heads included"""
    disc: PlayerOptim = PlayerOptim()
    """a discriminator that is a player of its own"""


class TrainConfig(Section):
    """The loop."""

    max_train_steps: int = Field(300, ge=1)
    """optimizer windows (of a single-stage run)"""
    train_batch_size: int = Field(48, ge=1)
    """samples per process and micro-batch"""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """micro-batches per optimizer window"""
    seed: int = Field(0, ge=0)
    """seed of everything random"""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """autocast of network passes; losses and schedules stay in float32"""
    gradient_checkpointing: bool = False
    """recompute activations at backward: less memory, more time"""
    compile: bool = False
    """torch.compile the networks"""
    ema_decay: tuple[float, ...] = (0.995,)
    """averages of the student; the first is validated and exported; empty exports the raw weights"""
    log_steps: int = Field(10, ge=1)
    """steps between lines of metrics.jsonl"""
    validation_steps: int = Field(100, ge=0)
    """steps between sample grids and cheap metrics; 0 is off"""
    checkpointing_steps: int = Field(100, ge=0)
    """steps between checkpoints; 0 keeps only the last"""
    export_dtype: Literal["no", "fp16", "bf16"] = "no"
    """precision of exported weights; no is float32 for students, fp16 for teachers made by sft"""
    checkpoints_total_limit: int = Field(2, ge=1)
    """checkpoints kept"""
    num_threads: int = Field(0, ge=0)
    """CPU threads; 0 leaves torch's choice"""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """trackers besides metrics.jsonl, each if installed"""


class EvalConfig(Section):
    """Measuring during and after training."""

    num_samples: int = Field(1000, ge=0)
    """samples for the final table; 0 skips it"""
    teacher_samples: int = Field(0, ge=0)
    """samples of the teacher for the final table; 0 means as many as the student's"""
    student_steps: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """step counts at which the student is measured besides its own; a denoiser trained by sft takes 1, 4,
    20, 50
    """
    validation_samples: int = Field(250, ge=0)
    """samples for the cheap metric during training"""
    grid: int = Field(40, ge=1)
    """images in the validation grid"""
    batch_size: int = Field(100, ge=1)
    """images per sampling batch"""
    seed: int = Field(1234, ge=0)
    """first seed of the samples"""
    keep: Literal["last", "best"] = "last"
    """export the last weights, or those with the best cheap metric during training"""


class StageConfig(Section):
    """One stage of a staged run; it starts from the students the stage before left."""

    name: str
    """label in logs and checkpoints"""
    objective: Annotated[Union[tuple(c.config for c in REGISTRY.values())], Field(discriminator="name")]  # noqa: UP007
    """the method"""
    max_train_steps: int = Field(100, ge=1)
    """optimizer windows of this stage"""
    optim: OptimConfig = OptimConfig()
    """optimizers of this stage"""
    num_steps: int | None = None
    """student steps in this stage; the run's student.num_steps if not set"""
    limit: int = Field(0, ge=0)
    """use only the first N examples in this stage, e.g. to bound the pairs of a warm start; 0 means all"""


class RunConfig(Section):
    """Everything one run needs. `fastgen-train --help` shows each key."""

    output_dir: str = "runs/fashion_dmd2"
    """run folder"""
    teacher: TeacherConfig = TeacherConfig()
    """the slow generator"""
    student: StudentConfig = StudentConfig()
    """the few-step generator to be"""
    critic: CriticConfig = CriticConfig()
    """the fake-score network"""
    objective: (
        Annotated[Union[tuple(c.config for c in REGISTRY.values())], Field(discriminator="name")] | None  # noqa: UP007
    ) = None
    """the method (of a single-stage run)"""
    data: DataConfig = DataConfig(name="fashion")
    """real images, labels, prompts"""
    optim: OptimConfig = OptimConfig()
    """optimizers (of a single-stage run)"""
    train: TrainConfig = TrainConfig()
    """the loop"""
    eval: EvalConfig = EvalConfig()
    """measuring"""
    stages: tuple[StageConfig, ...] = ()
    """stages run one after another; empty means one stage made of objective, optim and
    train.max_train_steps
    """

    def all_stages(self) -> tuple[StageConfig, ...]:
        """The stages, with the flat form written out."""
        if self.stages:
            return self.stages
        steps = self.train.max_train_steps
        return (
            StageConfig(
                name=self.objective.name, objective=self.objective, optim=self.optim, max_train_steps=steps
            ),
        )

    def reads_data(self) -> bool:
        """Whether any stage reads real images; those of a data-free run are never opened."""
        return any(REGISTRY[s.objective.name].requires_data(s.objective) for s in self.all_stages())

    @model_validator(mode="after")
    def _cross_checks(self):
        if not self.stages and self.objective is None:
            raise ValueError(f"objective: none given; name one of {', '.join(REGISTRY)}, or write stages")
        flat = {"objective": self.objective is not None, "optim": self.optim != OptimConfig()}
        flat["train.max_train_steps"] = self.train.max_train_steps != TrainConfig().max_train_steps
        for key in (k for k, given in flat.items() if self.stages and given):
            raise ValueError(
                f"{key}: given beside stages, where it would do nothing; set stages.N.{key.split('.')[-1]}"
            )
        times = self.student.timesteps
        if any(a <= b for a, b in zip(times, times[1:])):
            raise ValueError(f"student.timesteps: found {list(times)}; they must descend")
        if self.student.net and (self.student.kind == "lora" or self.teacher.path.startswith("analytic:")):
            raise ValueError("student.net: an adapter or exact teacher has no network to change; kind full")
        if self.student.fuse and self.student.kind == "lora":
            raise ValueError(
                "student.fuse: found a LoRA student; only a full network takes an average: kind full"
            )
        if self.student.fuse_weight is not None and not self.student.fuse:
            raise ValueError("student.fuse_weight: set without student.fuse, the export to average with")
        self._check_guidance()
        if self.student.smooth_time and self.student.kind != "full":
            raise ValueError("student.smooth_time: found true for an adapter; it needs student.kind full")
        if self.student.sprint and (self.student.kind != "full" or not self.student.guidance_embedding):
            raise ValueError(
                "student.sprint: found true; it needs student.kind full and student.guidance_embedding"
            )
        if self.eval.keep == "best" and not (self.train.validation_steps and self.eval.validation_samples):
            raise ValueError(
                "eval.keep: 'best' needs train.validation_steps and eval.validation_samples above 0"
            )
        if self.student.gamma and self.student.sampler != "tcd":
            raise ValueError(f"student.gamma: found {self.student.gamma}; only student.sampler tcd reads it")
        self._check_steps()
        counts = (self.student.num_steps, len(times), *self.eval.student_steps)
        two = [s.objective.name for s in self.all_stages() if REGISTRY[s.objective.name].two_times]
        if two and max(counts) > 1 and self.student.sampler != "ode":
            raise ValueError(
                f"student.sampler: found {self.student.sampler!r}; {two[0]} walks the ODE: use ode"
            )
        for stage in self.all_stages():
            cls = REGISTRY[stage.objective.name]
            has_data = self.data.name or self.data.images
            if cls.requires_data(stage.objective) and not has_data:
                raise ValueError(
                    f"data: no images are named; {stage.objective.name} with these settings needs real data, "
                    "set data.name or data.images"
                )
        return self

    def _check_guidance(self) -> None:
        """Whether every stage trains the range of guidance that the student is to be told."""
        key, span, w = "student.guidance_embedding", self.student.guidance_embedding, self.teacher.guidance
        if span is None:
            return
        if not 0 <= span[0] < span[1] or not span[0] <= w <= span[1]:
            raise ValueError(f"{key}: found {list(span)}; allowed: [low, high] around teacher.guidance {w:g}")
        for name in (s.objective.name for s in self.all_stages()):
            if not REGISTRY[name].draws_guidance:
                able = ", ".join(n for n, cls in REGISTRY.items() if cls.draws_guidance)
                raise ValueError(f"{key}: {name} trains teacher.guidance alone; leave it out, or use {able}")

    def _check_steps(self) -> None:
        """The step counts that are sampled and measured must be among those the last stage trains."""
        last, s = self.all_stages()[-1], self.student
        own = ("student.num_steps", last.num_steps or len(s.timesteps) or s.num_steps)
        for key, num in (own, *(("eval.student_steps", n) for n in self.eval.student_steps)):
            why = REGISTRY[last.objective.name].unsampled(last.objective, num, s.sampler)
            if why:
                raise ValueError(f"{key}: found {num} with sampler {s.sampler}; {why}")


def validate(values: dict) -> RunConfig:
    """A RunConfig, or a UserError that names every offending key."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise complain(error, RunConfig) from None


def help_text(base: RunConfig) -> str:
    """Every key of this config with its text and value."""
    import contextlib
    import io

    import tyro

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
        tyro.cli(
            RunConfig, prog="train.py", default=base, args=["--help"], config=markers, use_underscores=True
        )
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    first = next(i for i, line in enumerate(lines) if "--output_dir" in line)
    return "\n".join(["keys", *lines[first:], "", *_unset_sections(base, "--")]) + "\n"


def _unset_sections(section: BaseModel, prefix: str):
    """Lines for sections that are null and so have no keys to list."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _unset_sections(value, f"{prefix}{name}.")
        elif value is None and model_in(field.annotation):
            keys = ", ".join(model_in(field.annotation).model_fields)
            yield f"  {prefix}{name} {{{keys}}}"
            yield f"        {field.description} (default: null)"


def dump(cfg: RunConfig) -> str:
    """YAML that loads back to the same config."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, width=100)


def schema() -> str:
    """JSON schema of a config file, for editors; kept in assets/config.schema.json."""
    import json

    return json.dumps(RunConfig.model_json_schema(), indent=1) + "\n"


def load(files: list[str], argv: list[str], switches: tuple[str, ...] = ()) -> RunConfig:
    """Files, then flags; `switches` are the flags that are no keys, for suggestions."""
    return validate(merge(read_files(files), overrides(argv, RunConfig, switches)))
