"""The cast of one run: teacher, student, critic, target, and the objective that plays them.
Discriminators and other parts that are no denoiser are made in `auxiliaries.py`.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from typing import Any

import torch

from fastgen.config.assets import ViewsConfig
from fastgen.config.run import StageConfig
from fastgen.config.sections import (
    CriticConfig,
    GuidanceAdapterConfig,
    LoraConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from fastgen.core.batch import Cond
from fastgen.core.errors import UserError, first_line, suggest
from fastgen.core.paths import is_analytic
from fastgen.core.rng import Rng
from fastgen.diffusion.schedules import VP, Schedule
from fastgen.export.assets import shown_prompts
from fastgen.export.scheduler import scheduler_setup
from fastgen.families.parts import changed_config
from fastgen.networks.backbone import Backbone
from fastgen.networks.codecs import TextCodec, switch_vae
from fastgen.networks.denoiser import Denoiser
from fastgen.networks.load import TeacherOptions, load_teacher
from fastgen.networks.quantization import quantize
from fastgen.networks.sharding import before_sharding
from fastgen.networks.teacher import Teacher
from fastgen.objectives import REGISTRY, Objective, requirements_of
from fastgen.objectives.requirements import ConceptSpec, base_name
from fastgen.roles.causal import check_frames, check_window, make_student
from fastgen.roles.roles import Members, Part, Role, Student, Students, StudentSpec, members
from fastgen.roles.router import Router
from fastgen.roles.sana_sprint import SCHEDULE, make_sprint
from fastgen.threed.assets import make_assets
from fastgen.threed.generators import generated, text_width
from fastgen.threed.student import AssetStudent
from fastgen.training.auxiliaries import make_auxiliary
from fastgen.training.checks import check_fits, check_quantized
from fastgen.training.preparing import offload_frozen, prepare_networks


def load_configured(
    settings: TeacherConfig, device="cpu", null: Cond | None = None, place: Any = None
) -> Teacher:
    """The teacher of a config, on the device "meta" without weights; null: the null condition, where every
    prompt is encoded already and no text encoder is needed. place: the device of the denoiser, where it is
    another one.
    """
    place = device if place is None else place
    given = settings.model_dump(include={f.name for f in fields(TeacherOptions)})
    weights, denoiser = str(device) != "meta", str(place) != "meta"
    teacher = load_teacher(**given, weights=weights, denoiser=denoiser, encoders=null is None)
    if null is not None and isinstance(teacher.codec, TextCodec):
        teacher.codec.know_null(null)
    switch_vae(teacher.codec.vae, settings)
    teacher.codec.to(device)
    if settings.quantization is None or str(device) == "meta":
        teacher.backbone.to(place)  # else it follows layer by layer, when it has its adapters
    return teacher


class Cast:
    """The networks of a run by part name. Parts are made when a stage first needs them and kept for
    later stages.
    """

    def __init__(
        self,
        teacher: TeacherConfig,
        student: StudentConfig,
        critic: CriticConfig,
        train: TrainConfig,
        stages: Sequence[StageConfig],
        device="cpu",
        null: Cond | None = None,
        views: ViewsConfig | None = None,
    ):
        """On the device "meta" networks have shapes and no weights, exact teachers apart. null: the null
        condition, where every prompt is encoded already; then no text encoder is loaded. views: what a 3D
        asset is seen by.
        """
        self.views = views
        self.teacher_cfg, self.student_cfg, self.critic_cfg, self.train_cfg = teacher, student, critic, train
        self.stages = stages
        self.device = "cpu" if is_analytic(teacher.path) and str(device) == "meta" else device
        self.place = self._place()  # of networks, as they are made
        torch.manual_seed(train.seed)  # an untrained blueprint draws its weights here
        self.teacher = self._load(null)
        check_fits(self.teacher, teacher, student, stages)
        self.shown_texts = self._shown_texts()
        if student.fuse:
            from fastgen.export.load import locate

            locate(student.fuse, "student.fuse")  # a wrong path is refused now, not at the end
        self.num_students = _num_students(stages)
        self.parts: dict[str, Part] = {"teacher": Role(self.teacher.backbone)}
        self.teacher.backbone.requires_grad_(False).eval()
        self._make_roles()
        prepare_networks(self.backbones(), teacher, train, self.device)
        if teacher.offload and str(self.device) not in ("cpu", "meta"):
            offload_frozen(self.backbones(), self.teacher.codec.vae, self.parts, self.device)

    def _place(self) -> Any:
        if self.train_cfg.sharding and not is_analytic(self.teacher_cfg.path):
            return before_sharding(self.device)
        return "cpu" if self.teacher_cfg.offload and str(self.device) != "meta" else self.device

    def _load(self, null: Cond | None) -> Teacher:
        return load_configured(self.teacher_cfg, self.device, null, self.place)

    def _make_roles(self) -> None:
        """Students, critics and targets that a stage needs, each under its name."""
        needs = [requirements_of(s.objective) for s in self.stages]
        names = {base_name(p) for one in needs for p in one.parts}
        own = self.student_cfg.kind
        kinds = {"student": own, "critic": self.critic_kind, "target": own, "previous": own}
        kinds |= {"path": self.critic_kind, "loser": self.critic_kind}
        few_step = any(one.few_step for one in needs)
        alone = "teacher" not in names and not few_step  # else the table compares with the teacher as it was
        if self.teacher_cfg.quantization:
            roles = {name: kind for name, kind in kinds.items() if name in names}
            own_input = self.two_times or bool(self.student_cfg.guidance_embedding)
            check_quantized(self.teacher, self.teacher_cfg.quantization, roles, own_input, self.stages)
        copies_first = sorted((n for n in kinds if n in names), key=lambda n: kinds[n] != "full")
        for name in copies_first:  # adapters go on a network once it has been copied
            self._make(name, kinds[name], alone)
        if self.teacher_cfg.quantization and str(self.device) != "meta":
            base = self.teacher.network
            quantize(base.family, base.net, self.teacher_cfg.quantization, self.device)

    @property
    def student(self) -> Student:
        """The student as the current stage samples it."""
        student = self.parts["student"]
        assert isinstance(student, Student)
        return student

    @property
    def critic_kind(self) -> str:
        own = "full" if self.student_cfg.kind == "full" else "lora"
        return own if self.critic_cfg.kind == "auto" else self.critic_cfg.kind

    @property
    def two_times(self) -> bool:
        """Whether a stage trains the student at pairs of times."""
        return any(requirements_of(s.objective).step_end for s in self.stages)

    @property
    def student_guidance(self) -> float:
        """The guidance scale that a student with an input for it gets when it is sampled."""
        return self.student_cfg.guidance_of_samples(self.teacher_cfg.guidance)

    @property
    def few_step_schedule(self) -> Schedule:
        """The teacher's schedule, or the one whose few steps a student of another form takes."""
        return SCHEDULE if self.student_cfg.sprint else self.teacher.schedule

    def backbones(self) -> list[Denoiser]:
        """Distinct networks, teacher first."""
        roles = [r for p in self.parts.values() for r in members(p) if isinstance(r, Role)]
        return list({id(r.backbone): r.backbone for r in roles}.values())

    def _make(self, name: str, kind: str, alone: bool) -> None:
        """One role under a name, or one for each of several students."""
        if not self.num_students:
            self.parts[name] = self._role(name, name, kind, alone)
            return
        roles = [self._role(name, f"{name}{j}", kind, False) for j in range(self.num_students)]
        students = [r for r in roles if isinstance(r, Student)]
        if students:
            router = Router.for_codec(self.teacher.codec, self.num_students)
            self.parts[name] = Students(students, router)
        else:
            self.parts[name] = Members(roles)

    def _role(self, name: str, adapter_name: str, kind: str, alone: bool) -> Role:
        chosen, as_student = self.student_cfg, name in ("student", "target", "previous")
        if chosen.asset is not None and as_student:
            return Student(self._asset(), None, StudentSpec(self._times()))
        counts = [n for s in self.stages for n in requirements_of(s.objective).step_counts]
        span = (min(counts), max(counts)) if counts else chosen.guidance_embedding if as_student else None
        two_times, adapter = as_student and self.two_times, adapter_name if kind != "full" else None
        base = self._network(name, alone) if adapter is None else self.teacher.backbone
        if adapter and self.teacher.is_analytic:
            found = f"{kind} on an analytic teacher, which has no weights to adapt"
            raise UserError(f"{name}.kind", found, "use full")
        if chosen.asset is not None and name == "critic":
            base.add_camera(adapter)
        if chosen.smooth_time and as_student:
            from fastgen.networks.time_embedding import smooth_time_embedding

            smooth_time_embedding(base)
        if two_times:
            base.add_second_time()
        if span and chosen.sprint and not adapter:
            base = make_sprint(base, self.few_step_schedule)
        if span and kind != "guidance_adapter":
            base.add_guidance()
        if adapter and kind == "guidance_adapter":
            assert span is not None, "the config says which scales such adapters take"
            self._guidance_adapter(base, adapter, span)
        elif adapter:
            lora = self.critic_cfg.lora if name in ("critic", "path", "loser") else chosen.lora
            self._adapter(base, adapter, lora, span is not None, two_times)
        if self.teacher_cfg.quantization is None:
            base.to(self.place)
        role, guidance = Role(base, adapter), self.student_guidance if span else None
        if name == "student":
            how = chosen.sampler, chosen.gamma, 0, guidance, span, bool(counts)
            spec = StudentSpec(self._times(), *how, *self._blocks())
            role = make_student(base, adapter, replace(spec, **self._fidelity()))
        elif span:
            role = Role(base, adapter, guidance)
        if chosen.trained and as_student:
            if not isinstance(base, Backbone):
                raise UserError("student.trained", "found for an exact teacher", "leave it out")
            base.fix_all_but(chosen.trained, "student.trained")
        base.eval()
        if name == "student" and chosen.init and str(self.place) != "meta":
            from fastgen.export.load import init_student

            init_student(role, chosen.init, self.teacher.codec)
        return role

    def _asset(self) -> AssetStudent:
        """3D assets as they are before training, in the place of a network: always the same ones."""
        assert self.student_cfg.asset is not None, "asked for where there are settings of one"
        codec, settings, seed = self.teacher.codec, self.student_cfg.asset.model_dump(), self.train_cfg.seed
        size = codec.pixels[0] if isinstance(codec, TextCodec) else codec.shape[-1]
        given = codec.encode, self.teacher.schedule, size, settings["background"]
        if settings["generator"] is None:
            return AssetStudent(make_assets(settings, seed), *given).to(self.device)
        width = text_width(codec.cond_shapes if isinstance(codec, TextCodec) else {})
        return generated(settings, width, seed, *given).to(self.device)

    def _shown_texts(self) -> Cond | None:
        """Of a network that makes assets: the prompts that its export shows; text encoders go later."""
        asset, views, codec = self.student_cfg.asset, self.views, self.teacher.codec
        if asset is None or asset.generator is None or views is None or str(self.device) == "meta":
            return None
        if not isinstance(codec, TextCodec):
            return None
        return {k: v.cpu() for k, v in codec.prompts(shown_prompts(views.trained, views.held_out)).items()}

    def untrained(self) -> Role:
        """What a student is compared with: the teacher in the student's few steps, or the assets that
        training began with.
        """
        return Role(self.teacher.backbone if self.student_cfg.asset is None else self._asset())

    def _network(self, name: str, alone: bool) -> Denoiser:
        """The network of a player with weights of its own; the teacher's where nobody else needs it."""
        base = self.teacher.backbone
        if self.student_cfg.net and name == "student":
            return self._other_net()
        return base if alone and not self.teacher.is_analytic else base.trainable_copy()

    def _other_net(self) -> Backbone:
        """An untrained network of the teacher's class with some of its config changed."""
        base, changes = self.teacher.network, self.student_cfg.net or {}
        config = dict(base.net.config)
        unknown = [k for k in changes if k not in config]
        if unknown:
            found = f"{type(base.net).__name__} has no {unknown[0]!r}{suggest(unknown[0], config)}"
            raise UserError("student.net", found, "use keys of the teacher's own config.json")
        try:
            with torch.device(self.place):
                net = type(base.net).from_config(changed_config(base.net, **changes))
        except Exception as error:  # whatever a network's constructor raises
            raise UserError(
                "student.net", f"refused ({first_line(error)})", "correct the value that it names"
            ) from None
        return Backbone(net, base.family, base.schedule, base.prediction, base.start_noise)

    def divide(self, data) -> None:
        """Give each of several students its part of the prompts, and sort out those that are to be forgotten;
        while the text encoders are there.
        """
        if isinstance(self.student, Students):
            self.student.router.divide(data.cond_table)
        found = (requirements_of(s.objective).auxiliaries.values() for s in self.stages)
        specs = {spec for one in found for spec in one if isinstance(spec, ConceptSpec)}
        if len(specs) > 1:
            raise UserError("objective.forget", "stages differ in it", "name the same in every stage")
        for spec in specs:
            concepts = self.parts["concepts"] = make_auxiliary(spec, self)
            concepts.read(data.cond_table, data.rows, data.texts)

    def _adapter(self, base, name: str, lora: LoraConfig, guided: bool, two_times: bool = False) -> None:
        if guided or two_times:
            base.requires_grad_(False)
        with self._drawing(name):
            targets = lora.target_modules or base.family.lora_targets
            targets += base.family.guidance_layers if guided else ()
            targets += (base.family.input_layer,) if two_times else ()
            base.add_adapter(name, lora.rank, lora.lora_alpha, targets, rs=lora.use_rslora)

    def _guidance_adapter(self, base, name: str, span: tuple[float, float]) -> None:
        chosen, codec = self.student_cfg.guidance_adapter or GuidanceAdapterConfig(), self.teacher.codec
        classes = codec.num_classes + 1 if codec.num_classes else 0
        with self._drawing(name):
            base.add_guidance_adapter(name, chosen.model_dump(), codec.null(1), classes, span)

    @contextmanager
    def _drawing(self, name: str) -> Iterator[None]:
        """Draw the first weights of an adapter inside the block: by the run's seed and its name alone."""
        where = torch.device("meta") if str(self.place) == "meta" else nullcontext()
        with torch.random.fork_rng(devices=[]), where:
            torch.manual_seed((self.train_cfg.seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63)
            yield

    def _blocks(self) -> tuple[int, int]:
        """(latent frames of a block, blocks of the cache) of a causal student; zeros of any other."""
        causal, shape = self.student_cfg.causal, self.teacher.codec.shape
        if causal is None:
            return 0, 0
        frames, key = shape[1], "student.causal"
        check_frames(causal.block, frames, f"{key}.block")
        check_window(causal.window, frames // causal.block, f"{key}.window")
        return causal.block, causal.window or frames // causal.block

    def _fidelity(self) -> dict[str, Any]:
        """The fidelity that a student is told, and its range; None of any other."""
        span = requirements_of(self.stages[-1].objective).fidelity
        chosen = self.student_cfg.fidelity
        least = None if span is None else span[0]
        return {"fidelity": least if chosen is None else chosen, "fidelity_range": span}

    def _times(self, grid: int = 0) -> list[float]:
        s, schedule = self.student_cfg, self.few_step_schedule
        if s.sampler == "tcd" and not isinstance(schedule, VP):
            found = f"'tcd' for a {type(schedule).__name__} teacher; TCDScheduler is made for VP"
            raise UserError("student.sampler", found, "use ode (as tcd with gamma 0) or renoise (gamma 1)")
        if isinstance(schedule, VP) and grid > schedule.num_timesteps:
            found = f"found a grid of {grid} steps"
            raise UserError("objective", found, f"the teacher has {schedule.num_timesteps} timesteps")
        times = list(s.timesteps) or schedule.student_times(s.num_steps, grid)
        if isinstance(schedule, VP) and any(t != round(t) for t in times):
            raise UserError(
                "student.timesteps", f"found {times}", "give whole numbers: the schedule has no others"
            )
        if not all(schedule.t_min < t <= schedule.t_max for t in times):
            raise UserError(
                "student.timesteps",
                f"found {times}",
                f"give times of the teacher's schedule, in ({schedule.t_min}, {schedule.t_max}]",
            )
        return times

    def stage(self, stage: StageConfig, rng: Rng) -> Objective:
        """The objective of one stage over these parts."""
        needs = requirements_of(stage.objective)
        grid = needs.grid_steps
        student = self.student.with_times(self._times(grid), grid).with_steps(stage.num_steps or 0)
        self.parts["student"] = student
        if needs.few_step and self.teacher.scheduler is not None and not self.student_cfg.sprint:
            scheduler_setup(student, self.teacher)  # refused now where no scheduler can take these steps
        for name in map(base_name, needs.parts):
            if name not in self.parts:
                self.parts[name] = make_auxiliary(needs.auxiliaries[name], self)
        parts = {name: self._part(name) for name in needs.parts}
        net = student.backbone
        if stage.asset is not None and isinstance(net, AssetStudent):
            parts["student"] = student.with_network(Role(net.staged(stage.asset.train, stage.asset.view)))
        return REGISTRY[stage.objective.name](stage.objective, parts, rng, self.teacher_cfg.guidance)

    def _part(self, name: str):
        """A part by name; "critic2" is the critic of student 2."""
        if name in self.parts:
            return self.parts[name]
        base = base_name(name)
        return members(self.parts[base])[int(name.removeprefix(base))]


def _num_students(stages: Sequence[StageConfig]) -> int:
    """Students of a run with several, else 0."""
    found = {requirements_of(s.objective).num_students for s in stages}
    if len(found) > 1:
        values = f"found {', '.join(map(str, sorted(found)))} in different stages (0: no such method)"
        raise UserError("objective.num_students", values, "set the same in every stage")
    return found.pop()
