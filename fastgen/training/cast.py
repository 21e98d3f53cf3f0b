"""From a config to the cast of one run: teacher, student, critic, target, and the objective that plays them.
Discriminators and other helpers are made in `extras.py`.
"""

import copy
import zlib
from contextlib import nullcontext
from dataclasses import fields

import torch
from torch import nn

from fastgen.config.run import RunConfig, StageConfig
from fastgen.config.sections import LoraConfig
from fastgen.core.errors import UserError, first_line, suggest
from fastgen.core.rng import Rng
from fastgen.diffusion.schedules import VP, Flow, Schedule
from fastgen.export.scheduler import serve
from fastgen.networks.attention import check as check_attention
from fastgen.networks.backbone import Backbone
from fastgen.networks.codecs import switch_vae
from fastgen.networks.load import Source, load_teacher
from fastgen.networks.teacher import Teacher
from fastgen.objectives import REGISTRY, Objective
from fastgen.roles.roles import Members, Role, Student, Students
from fastgen.roles.router import Router
from fastgen.training.auxiliaries import make_extra
from fastgen.training.checks import check_fits


class Cast:
    """The networks of a run by part name. Parts are made when a stage first asks for them and kept for
    later stages.
    """

    def __init__(self, cfg: RunConfig, device="cpu"):
        """On the device "meta" every network is laid out without its numbers, exact teachers apart."""
        exact = cfg.teacher.path.startswith("analytic:")
        self.cfg, self.device = cfg, "cpu" if exact and str(device) == "meta" else device
        self.teacher = self._load()
        check_fits(cfg, self.teacher)
        if cfg.student.fuse:
            from fastgen.export.load import locate

            locate(cfg.student.fuse, "student.fuse")  # a wrong path is told now, not at the end
        names = {_base(p) for s in cfg.all_stages() for p in _wanted(s)}
        self.num_students = _num_students(cfg)
        self.parts: dict[str, Role | nn.Module] = {"teacher": Role(self.teacher.backbone)}
        self.teacher.backbone.requires_grad_(False).eval()
        own = cfg.student.kind
        kinds = {"student": own, "critic": self.critic_kind, "target": own, "previous": own}
        kinds |= {"path": self.critic_kind}
        few_step = any(REGISTRY[s.objective.name].few_step for s in cfg.all_stages())
        alone = "teacher" not in names and not few_step  # else the table compares with the teacher as it was
        copies_first = sorted((n for n in kinds if n in names), key=lambda n: kinds[n] != "full")
        for name in copies_first:  # adapters go on a network once it has been copied
            self._make(name, kinds[name], alone)
        for backbone in self.backbones():
            if hasattr(backbone, "net"):
                backbone.attention = check_attention(backbone.net, cfg.teacher.attention, self.device)
        switch_vae(self.teacher.codec.vae if hasattr(self.teacher.codec, "vae") else None, cfg.teacher)
        if cfg.train.compile:
            for backbone in self.backbones():
                if hasattr(backbone, "net"):
                    backbone.net.compile()  # in place: parameter names and hooks stay as they are
        if cfg.train.gradient_checkpointing:
            for backbone in self.backbones():
                if hasattr(backbone, "enable_gradient_checkpointing"):
                    backbone.enable_gradient_checkpointing()

    @property
    def critic_kind(self) -> str:
        return self.cfg.student.kind if self.cfg.critic.kind == "auto" else self.cfg.critic.kind

    @property
    def two_times(self) -> bool:
        """Whether a stage trains the student at pairs of times."""
        return any(REGISTRY[s.objective.name].two_times for s in self.cfg.all_stages())

    @property
    def few_step_schedule(self) -> Schedule:
        """The teacher's schedule, or the one whose few steps a student of another form takes."""
        return Flow(angles=True) if self.cfg.student.sprint else self.teacher.schedule

    def backbones(self) -> list[nn.Module]:
        """Distinct networks, teacher first."""
        roles = [r for p in self.parts.values() for r in getattr(p, "members", [p]) if isinstance(r, Role)]
        return list({id(r.backbone): r.backbone for r in roles}.values())

    def _load(self) -> Teacher:
        t = self.cfg.teacher
        torch.manual_seed(self.cfg.train.seed)  # an untrained blueprint draws its weights here
        weights = str(self.device) != "meta"
        asked = {f.name: getattr(t, f.name) for f in fields(Source) if f.name != "weights"}
        return load_teacher(**asked, weights=weights).to(self.device)

    def _make(self, name: str, kind: str, alone: bool) -> None:
        """One role under a name, or one for each of several students."""
        if not self.num_students:
            self.parts[name] = self._role(name, name, kind, alone)
            return
        members = [self._role(name, f"{name}{j}", kind, False) for j in range(self.num_students)]
        if name == "student":
            router = Router.for_codec(self.teacher.codec, self.num_students)
            self.parts[name] = Students(members, router)
        else:
            self.parts[name] = Members(members)

    def _role(self, name: str, adapter_name: str, kind: str, alone: bool) -> Role:
        chosen, as_student = self.cfg.student, name in ("student", "target", "previous")
        counts = [
            n for s in self.cfg.all_stages() for n in REGISTRY[s.objective.name].step_counts(s.objective)
        ]
        told = (min(counts), max(counts)) if counts else chosen.guidance_embedding if as_student else None
        two_times, adapter = as_student and self.two_times, adapter_name if kind == "lora" else None
        base = self._network(name, alone) if adapter is None else self.teacher.backbone
        if adapter and not hasattr(base, "add_adapter"):
            found = "lora on an analytic teacher, which has no weights to adapt"
            raise UserError(f"{name}.kind", found, "use full")
        if chosen.smooth_time and as_student:
            from fastgen.networks.time_embedding import make_smooth

            make_smooth(base)
        if two_times:
            base.add_second_time()
        if told and chosen.sprint and not adapter:
            from fastgen.roles.sana_sprint import make_sprint

            make_sprint(base)
        if told:
            base.add_guidance()
        if adapter:
            lora = self.cfg.critic.lora if name in ("critic", "path") else chosen.lora
            self._adapter(base, adapter, lora, told is not None, two_times)
        base.to(self.device)
        role = Role(base, adapter)
        if name == "student":
            role = Student(base, adapter, self._times(), chosen.sampler, chosen.gamma)
            role.guidance_range, role.steps_as_guidance = told, bool(counts)
        if told:
            role.guidance = self.cfg.student_guidance
        base.eval()
        if name == "student" and chosen.init and str(self.device) != "meta":
            from fastgen.export.load import init_student

            init_student(role, chosen.init)
        return role

    def _network(self, name: str, alone: bool) -> nn.Module:
        """The network of a player with weights of its own; the teacher's where nobody else needs it."""
        base = self.teacher.backbone
        if hasattr(base, "trainable_copy"):
            return base.trainable_copy()
        if self.cfg.student.net and name == "student":
            return self._other_net()
        return base if alone else copy.deepcopy(base).float()

    def _other_net(self) -> nn.Module:
        """An untrained network of the teacher's class with some of its config changed."""
        base, changes = self.teacher.backbone, self.cfg.student.net
        config = dict(base.net.config)
        unknown = [k for k in changes if k not in config]
        if unknown:
            found = f"{type(base.net).__name__} has no {unknown[0]!r}{suggest(unknown[0], config)}"
            raise UserError("student.net", found, "keys of the teacher's own config.json")
        try:
            with torch.device(self.device):
                net = type(base.net).from_config({**config, **changes})
        except Exception as error:  # whatever a network's constructor raises
            raise UserError("student.net", f"refused ({first_line(error)})", "mend the change") from None
        return Backbone(net, base.family, base.schedule, base.prediction)

    def divide(self, data) -> None:
        """Give each of several students its part of the prompts."""
        if self.num_students:
            self.parts["student"].router.divide(data.cond_table)

    def _adapter(self, base, name: str, lora: LoraConfig, told: bool, two_times: bool = False) -> None:
        if told or two_times:
            base.requires_grad_(False)
        laid_out = torch.device("meta") if str(self.device) == "meta" else nullcontext()
        with torch.random.fork_rng(devices=[]), laid_out:
            torch.manual_seed((self.cfg.train.seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63)
            targets = lora.target_modules or base.family.lora_targets
            targets += base.family.guidance_layers if told else ()
            targets += (base.family.input_layer,) if two_times else ()
            base.add_adapter(name, lora.rank, lora.lora_alpha, targets, rs=lora.use_rslora)

    def _times(self, grid: int = 0) -> list[float]:
        s, schedule = self.cfg.student, self.few_step_schedule
        if s.sampler == "tcd" and not isinstance(schedule, VP):
            found = f"'tcd' for a {type(schedule).__name__} teacher; TCDScheduler is made for VP"
            raise UserError("student.sampler", found, "use ode (gamma 0) or renoise (gamma 1)")
        times = list(s.timesteps) or schedule.few_steps(s.num_steps, grid)
        if isinstance(schedule, VP) and any(t != round(t) for t in times):
            raise UserError(
                "student.timesteps", f"found {times}", "whole numbers: the schedule has no others"
            )
        if not all(schedule.t_min < t <= schedule.t_max for t in times):
            raise UserError(
                "student.timesteps",
                f"found {times}",
                f"the teacher's times lie in ({schedule.t_min}, {schedule.t_max}]",
            )
        return times

    def stage(self, stage: StageConfig, rng: Rng) -> Objective:
        """The objective of one stage over these parts."""
        cls = REGISTRY[stage.objective.name]
        names = _wanted(stage)
        student, grid = self.parts["student"], cls.grid_steps(stage.objective)
        for one in (student, *getattr(student, "members", ())):
            one.grid, one.times = grid, self._times(grid)
            one.times = one.taking(stage.num_steps or 0).times
        if student.steps_as_guidance:
            student.guidance = float(len(student.times))
        if cls.few_step and self.teacher.scheduler is not None and not self.cfg.student.sprint:
            serve(student, self.teacher)  # an export that nothing can serve fails now
        for name in map(_base, names):
            if name not in self.parts:
                self.parts[name] = make_extra(name, self, stage)
        return cls(stage.objective, {n: self._part(n) for n in names}, rng, self.cfg.teacher.guidance)

    def _part(self, name: str):
        """A part by name; "critic2" is the critic of student 2."""
        if name in self.parts:
            return self.parts[name]
        base = _base(name)
        return self.parts[base].members[int(name.removeprefix(base))]


def _base(name: str) -> str:
    """The kind of part a numbered one is: "critic2" is a critic."""
    return name.rstrip("0123456789")


def _num_students(cfg: RunConfig) -> int:
    """Students of a run with several, else 0."""
    found = {getattr(s.objective, "num_students", 0) for s in cfg.all_stages()}
    if len(found) > 1:
        told = f"found {', '.join(map(str, sorted(found)))} in different stages (0: no such method)"
        raise UserError("objective.num_students", told, "the same in every stage")
    return found.pop()


def _wanted(stage: StageConfig) -> list[str]:
    """Part names one stage needs, student first."""
    cls = REGISTRY[stage.objective.name]
    players = cls.player_parts(stage.objective)
    return list(
        dict.fromkeys([*(p for members in players.values() for p in members), *cls.uses(stage.objective)])
    )
