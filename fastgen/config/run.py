"""The run configuration: typed, merged from YAML files left to right, overridden by dotted flags; what is
wrong is one line that names the key.
"""

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field, ValidationError, model_validator

from fastgen.config.assets import AssetStageConfig, check_asset_stages, check_library
from fastgen.config.competing import check_stages, competing, replaced
from fastgen.config.data_section import DataConfig
from fastgen.config.parse import as_user_error, merge, overrides, read_files, run_folder
from fastgen.config.processes import Sections, check_processes
from fastgen.config.section import Section, UserPath, check_booleans, check_numbers
from fastgen.config.sections import (
    CriticConfig,
    EvalConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from fastgen.core.paths import is_analytic
from fastgen.core.yaml_text import dump_yaml
from fastgen.data.kinds import PICTURES
from fastgen.objectives import REGISTRY, ObjectiveConfig, requirements_of
from fastgen.objectives.requirements import DiscriminatorSpec

if TYPE_CHECKING:
    Method = ObjectiveConfig
else:  # made of what is registered, plugins included
    _METHODS = tuple(cls.config for cls in REGISTRY.values())
    Method = Annotated[Union[_METHODS], Field(discriminator="name")]  # noqa: UP007


class StageConfig(Section):
    """One stage of a staged run; it starts from the students the stage before left."""

    name: str
    """label in logs and checkpoints"""
    objective: Method
    """the method"""
    max_train_steps: int = Field(100, ge=1)
    """optimizer windows of this stage"""
    optim: OptimConfig = OptimConfig()
    """optimizers of this stage"""
    num_steps: int | None = Field(None, ge=1, le=64)
    """student steps in this stage, from where student.timesteps starts; the run's own if not set"""
    asset: AssetStageConfig | None = None
    """of a 3D asset: what of it is trained in this stage and what is shown; all and its colours if not set"""
    limit: int = Field(0, ge=0)
    """use only the first N examples in this stage, e.g. to bound the pairs of a warm start; 0 means all"""


class RunConfig(Section):
    """Everything one run needs. `fastgen-train --help` shows each key."""

    output_dir: UserPath = "runs/unnamed"
    """run folder; where not given, runs/ and the names of the --config files joined by +"""
    teacher: TeacherConfig = TeacherConfig()
    """the diffusion model that is distilled"""
    student: StudentConfig = StudentConfig()
    """the few-step generator that is trained"""
    critic: CriticConfig = CriticConfig()
    """the fake-score network of distribution-matching methods"""
    objective: Method | None = None
    """the method (of a single-stage run)"""
    data: DataConfig = DataConfig(name="fashion")
    """training images, labels, prompts"""
    optim: OptimConfig = OptimConfig()
    """optimizers (of a single-stage run)"""
    train: TrainConfig = TrainConfig()
    """the training loop"""
    eval: EvalConfig = EvalConfig()
    """evaluation during and after training"""
    stages: tuple[StageConfig, ...] = ()
    """stages run one after another; empty means one stage made of objective, optim and
    train.max_train_steps
    """

    @property
    def student_guidance(self) -> float:
        """The guidance scale that a student with an input for it gets when it is sampled."""
        return self.student.guidance_of_samples(self.teacher.guidance)

    def all_stages(self) -> tuple[StageConfig, ...]:
        """The stages, with the flat form written out."""
        if self.stages:
            return self.stages
        assert self.objective is not None, "checked in _cross_checks"
        steps = self.train.max_train_steps
        return (
            StageConfig(
                name=self.objective.name, objective=self.objective, optim=self.optim, max_train_steps=steps
            ),
        )

    def reads_data(self) -> bool:
        """Whether any stage reads real images; those of a data-free run are never opened."""
        return any(requirements_of(s.objective).real_data for s in self.all_stages())

    @model_validator(mode="after")
    def _cross_checks(self):
        check_numbers(self)
        if not self.stages and self.objective is None:
            raise ValueError(f"objective: none given; name one of {', '.join(REGISTRY)}, or write stages")
        flat = {"objective": self.objective is not None, "optim": self.optim != OptimConfig()}
        flat["train.max_train_steps"] = self.train.max_train_steps != TrainConfig().max_train_steps
        for key in (k for k, given in flat.items() if self.stages and given):
            raise ValueError(
                f"{key}: given beside stages, where it would do nothing; set stages.N.{key.split('.')[-1]}"
            )
        for key in (r for r in ("student", "critic") if getattr(self, r).lora.use_dora):
            raise ValueError(
                f"{key}.lora.use_dora: found true; set it to false: readers of LoRA files drop its magnitudes"
            )
        if clash := competing(self.data, self.stages):
            raise ValueError(clash)
        self._check_buckets()
        times = self.student.timesteps
        if any(a <= b for a, b in zip(times, times[1:])):
            raise ValueError(f"student.timesteps: found {list(times)}; give them in descending order")
        if self.student.fuse and self.student.kind != "full":
            raise ValueError(
                f"student.fuse: found with student.kind {self.student.kind}; use full, since only full "
                "networks are averaged"
            )
        self._check_own_network()
        self._check_guidance_adapter()
        if self.student.fuse_weight is not None and not self.student.fuse:
            raise ValueError("student.fuse_weight: set without student.fuse; name an export there")
        self._check_guidance()
        if self.student.smooth_time and self.student.kind != "full":
            raise ValueError("student.smooth_time: found true for an adapter; it needs student.kind full")
        if self.student.sprint and (self.student.kind != "full" or not self.student.guidance_embedding):
            raise ValueError("student.sprint: found true; it needs kind full and student.guidance_embedding")
        if self.eval.keep == "best" and not (self.train.validation_steps and self.eval.validation_samples):
            raise ValueError(
                "eval.keep: found 'best'; set train.validation_steps and eval.validation_samples above 0"
            )
        if self.student.gamma and self.student.sampler != "tcd":
            raise ValueError(
                f"student.gamma: found {self.student.gamma}; leave it out, or use student.sampler tcd"
            )
        self._check_steps()
        self._check_fidelity()
        counts = (self.student.num_steps, len(times), *self.eval.student_steps)
        two = [s.objective.name for s in self.all_stages() if requirements_of(s.objective).step_end]
        if two and max(counts) > 1 and self.student.sampler != "ode":
            raise ValueError(
                f"student.sampler: found {self.student.sampler!r}; use ode, which {two[0]} learns"
            )
        self._check_asset()
        self._check_causal()
        sections = Sections(self.train, self.teacher, self.student, self.eval)
        optimizers = {one.name for s in self.all_stages() for _, one in s.optim}
        check_processes(sections, [s.objective for s in self.all_stages()], optimizers)
        self._check_accumulation()
        self._check_data()
        return self

    def _check_own_network(self) -> None:
        """Settings of a student's network that need one of its own."""
        if self.student.net and (self.student.kind != "full" or is_analytic(self.teacher.path)):
            raise ValueError(
                "student.net: leave it out: an adapter or an exact teacher has no network to change"
            )
        if self.student.trained and (self.student.kind != "full" or self.student.asset is not None):
            raise ValueError("student.trained: found without a network of the student's own; use kind full")

    def _check_accumulation(self) -> None:
        """Gradients of several updates of one player in a step do not add up over micro-batches."""
        num = self.train.gradient_accumulation_steps
        for one in (s.objective for s in self.all_stages()):
            if num > 1 and not requirements_of(one).accumulates:
                raise ValueError(
                    f"train.gradient_accumulation_steps: found {num}; {one.name} updates its student several "
                    "times in a step, use 1"
                )

    def _check_causal(self) -> None:
        """Students that go block by block, and the methods that train them."""
        if self.student.causal is None:
            return
        for key in ("net", "asset", "guidance_adapter", "sprint"):
            if getattr(self.student, key):
                raise ValueError(f"student.{key}: found beside student.causal; leave one of them out")
        for one in (s.objective for s in self.all_stages()):
            if not requirements_of(one).causal:
                every = ((n, cls.config.model_validate({})) for n, cls in REGISTRY.items())
                able = ", ".join(n for n, cfg in every if requirements_of(cfg).causal)
                raise ValueError(f"student.causal: {one.name} makes all of a clip at once; use {able}")

    def _check_asset(self) -> None:
        """A 3D asset is trained on views, in one step of no network, by methods that need no images."""
        asset, views = self.student.asset, self.data.views
        if (asset is None) != (views is None):
            have, lack = ("data.views", "student.asset") if asset is None else ("student.asset", "data.views")
            raise ValueError(f"{lack}: none given beside {have}; a 3D asset needs both")
        check_asset_stages(asset, self.all_stages())
        if asset is None or views is None:
            return
        check_library(asset, views, self.train.train_batch_size)
        plain, own = StudentConfig(), self.student
        for key in (
            "kind",
            "num_steps",
            "guidance_embedding",
            "smooth_time",
            "sprint",
            "init",
            "fuse",
            "net",
        ):
            if getattr(own, key) != getattr(plain, key):
                raise ValueError(
                    f"student.{key}: found beside student.asset, which is no network; leave it out"
                )
        for stage in self.all_stages():
            needs = requirements_of(stage.objective)
            if needs.real_data or not needs.few_step or needs.step_end or stage.num_steps not in (None, 1):
                name = stage.objective.name
                raise ValueError(
                    f"objective.name: {name} trains no 3D asset; use one that needs no images, as vsd or sds"
                )

    def _check_data(self) -> None:
        """Whether there are images for every stage that reads some, and a reader for pairs."""
        needs = {s.objective.name: requirements_of(s.objective) for s in self.all_stages()}
        for name in (n for n, one in needs.items() if one.real_data):
            if not any(getattr(self.data, key) for key in PICTURES):
                raise ValueError(
                    f"data: no images are named; {name} needs real data: "
                    f"set data.name, data.images or another of data.{', data.'.join(PICTURES[2:])}"
                )
        wanting = [name for name, one in needs.items() if one.degraded]
        if wanting and not self.data.degradation:
            raise ValueError(
                f"data.degradation: not set; {wanting[0]} compares pictures of two factors, such as "
                "data.degradation.factor 4"
            )
        if self.data.degradation:
            mild = self.data.degradation.teacher_factor
            if mild and mild >= self.data.degradation.factor:
                raise ValueError(
                    f"data.degradation.teacher_factor: found {mild}; use less than the factor of "
                    f"{self.data.degradation.factor}"
                )
        if self.data.appearance is not None and not any(one.appearance for one in needs.values()):
            raise ValueError(
                "data.appearance: no stage takes over a look; leave it out, or use mcm with a gan_weight"
            )
        if self.data.dispreferred and not any(one.dispreferred for one in needs.values()):
            raise ValueError(
                "data.dispreferred: no stage learns from pairs; leave it out, use pso with pairs offline, or "
                "ladd with a preference_weight and no rewards"
            )
        wanting = [name for name, one in needs.items() if one.losers]
        if wanting and not self.data.dispreferred:
            raise ValueError(
                f"data.dispreferred: none given; {wanting[0]} with a preference_weight needs the losers of "
                "its pairs: name their folder, or rank samples of the student by objective.rewards"
            )

    def _check_guidance_adapter(self) -> None:
        """Whether the adapters of the guidance scale have one to take, and nothing else to add."""
        if self.student.kind != "guidance_adapter":
            if self.student.guidance_adapter is not None:
                raise ValueError(
                    f"student.guidance_adapter: found with student.kind {self.student.kind}; set the kind to "
                    "guidance_adapter, or leave it out"
                )
            return
        if self.student.guidance_embedding is None:
            raise ValueError(
                "student.guidance_embedding: none given; set it to the [low, high] of the scales that "
                "student.kind guidance_adapter is to take"
            )
        if self.student.init:
            raise ValueError("student.init: found with student.kind guidance_adapter; leave it out")
        two = [s.objective.name for s in self.all_stages() if requirements_of(s.objective).step_end]
        if two:
            raise ValueError(
                f"student.kind: found guidance_adapter; {two[0]} reads two times: use full or lora"
            )

    def _check_buckets(self) -> None:
        """Buckets need pictures that are read as they are, and a method that takes several sizes."""
        if not self.data.buckets:
            return
        if self.data.latents:
            raise ValueError("data.buckets: found beside data.latents, which are of one size; leave it out")
        if not self.reads_data():
            raise ValueError("data.buckets: found for a method that reads no image; leave it out")
        if self.student.causal is not None:
            raise ValueError("data.buckets: found with student.causal, which makes one size; leave it out")
        for stage in self.all_stages():
            wanted = requirements_of(stage.objective)
            if wanted.tiles:
                made = f"the masks of {stage.objective.name} are made for one size"
                raise ValueError(f"data.buckets: {made}; leave it out")
            heads = wanted.auxiliaries.values()
            if any(isinstance(one, DiscriminatorSpec) and one.head == "pooled" for one in heads):
                made = f"the discriminator of {stage.objective.name} is made for one size"
                raise ValueError(f"data.buckets: {made}; leave it out")

    def _check_guidance(self) -> None:
        """Whether every stage trains the range of guidance scales that the student gets as an input."""
        key, span, w = "student.guidance_embedding", self.student.guidance_embedding, self.student_guidance
        if span is None:
            if self.student.guidance is not None:
                raise ValueError(f"student.guidance: found {w:g} without {key}, whose input it is; give both")
            return
        own = self.teacher.guidance
        if not 0 <= span[0] < span[1] or not all(span[0] <= x <= span[1] for x in (own, w)):
            around = f"around teacher.guidance {own:g}" + f" and student.guidance {w:g}" * (w != own)
            raise ValueError(f"{key}: found {list(span)}; allowed: [low, high] {around}")
        for one in (s.objective for s in self.all_stages()):
            if not requirements_of(one).guidance_embedding:
                able = (
                    n
                    for n, cls in REGISTRY.items()
                    if requirements_of(cls.config.model_validate({})).guidance_embedding
                )
                raise ValueError(
                    f"{key}: {one.name} trains teacher.guidance alone; leave it out, or use {', '.join(able)}"
                )

    def _check_fidelity(self) -> None:
        """A fidelity is told to students that the last stage trains for it."""
        last, value = self.all_stages()[-1].objective, self.student.fidelity
        span = requirements_of(last).fidelity
        if value is None or (span is not None and span[0] <= value <= span[1]):
            return
        way = f"give {span[0]:g} to {span[1]:g}" if span else f"leave it out: {last.name} has no such knob"
        raise ValueError(f"student.fidelity: found {value:g}; {way}")

    def _check_steps(self) -> None:
        """The step counts that are sampled and measured must be among those the last stage trains."""
        last, s = self.all_stages()[-1], self.student
        own = ("student.num_steps", last.num_steps or len(s.timesteps) or s.num_steps)
        for key, num in (own, *(("eval.student_steps", n) for n in self.eval.student_steps)):
            why = requirements_of(last.objective).why_not_sampled(num, s.sampler)
            if why:
                raise ValueError(f"{key}: found {num} with sampler {s.sampler}; {why}")


def validate(values: dict) -> RunConfig:
    """A RunConfig, or a UserError that names every offending key."""
    try:
        made = RunConfig.model_validate(values)
    except ValidationError as error:
        raise as_user_error(error, RunConfig) from None
    check_booleans(values, made)
    return made


def dump(cfg: RunConfig) -> str:
    """YAML that loads back to the same config."""
    return dump_yaml(cfg.model_dump(mode="json"))


def load(files: list[str], argv: list[str], switches: tuple[str, ...] = ()) -> RunConfig:
    """Files, then flags; `switches` are the flags that are no keys, for suggestions. Where neither names an
    output_dir, it follows from the names of the files.
    """
    over = overrides(argv, RunConfig, switches)
    return validate(with_flags(read_files(files), over, run_folder(files) if files else ""))


def with_flags(base: dict, over: dict, output_dir: str = "") -> dict:
    """Values of files under those of flags; `output_dir` where neither names one."""
    values = merge(replaced(base, over), over)
    check_stages(values, over)
    if output_dir:
        values.setdefault("output_dir", output_dir)
    return values


def shortened(cfg: RunConfig, most: int) -> RunConfig:
    """A config for a smoke run: every stage takes at most `most` steps on no more examples than they use, and
    at most a hundred samples are measured.
    """
    values = cfg.model_dump(mode="json")
    train, evaluation = values["train"], values["eval"]
    used = most * train["train_batch_size"] * train["gradient_accumulation_steps"]
    least = lambda count, bound: min(count, bound) if count else bound  # noqa: E731  (0 is all)
    for stage in values["stages"]:
        stage["max_train_steps"] = min(stage["max_train_steps"], most)
        stage["limit"] = 0 if cfg.data.sources else least(stage["limit"], used)
    if not values["stages"]:
        train["max_train_steps"] = min(train["max_train_steps"], most)
        values["data"]["limit"] = least(values["data"]["limit"], used)
    for key in ("num_samples", "teacher_samples", "validation_samples"):
        evaluation[key] = min(evaluation[key], 100)
    return validate(values)
