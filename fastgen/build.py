"""From a config to the cast of one run: teacher, student, critic, discriminator, target, and the
objective that plays them.
"""

import copy
import zlib
from contextlib import nullcontext
from dataclasses import fields

import torch
from torch import nn

from fastgen.backbones import Source, Teacher, load_teacher
from fastgen.backbones.attention import check as check_attention
from fastgen.backbones.base import Backbone
from fastgen.checks import check_fits, method_of
from fastgen.codecs import switch_vae
from fastgen.config import RunConfig, StageConfig
from fastgen.critics import Discriminator, LogVariance
from fastgen.errors import UserError, first_line, suggest
from fastgen.nets import FeatureNet, Perceptual
from fastgen.objectives import REGISTRY, Objective
from fastgen.paths import asset
from fastgen.rng import Rng
from fastgen.roles import Members, Role, Student, Students
from fastgen.router import Router
from fastgen.schedules import VP, Flow, Schedule
from fastgen.sections import LoraConfig
from fastgen.serving import serve


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
            from fastgen.reload import locate

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
        base = self.teacher.backbone
        two_times = name in ("student", "target", "previous") and self.two_times
        counts = [
            n for s in self.cfg.all_stages() for n in REGISTRY[s.objective.name].step_counts(s.objective)
        ]
        adapter, told = None, (min(counts), max(counts)) if counts else None
        if name in ("student", "target", "previous") and not counts:
            told = self.cfg.student.guidance_embedding
        if kind == "lora":
            if not hasattr(base, "add_adapter"):
                raise UserError(
                    f"{name}.kind", "lora on an analytic teacher, which has no weights to adapt", "use full"
                )
            lora = self.cfg.critic.lora if name in ("critic", "path") else self.cfg.student.lora
            adapter = adapter_name
            if two_times:
                base.add_second_time()
                base.requires_grad_(False)
            self._adapter(base, adapter, lora, told is not None, two_times)
        elif hasattr(base, "trainable_copy"):
            base = base.trainable_copy().to(self.device)
        elif self.cfg.student.net and name == "student":
            base = self._other_net()
        elif not alone:
            base = copy.deepcopy(base).float()
        if self.cfg.student.smooth_time and name in ("student", "target", "previous"):
            from fastgen.smooth import make_smooth

            make_smooth(base)
        if two_times and adapter is None:
            base.add_second_time()
            base.to(self.device)
        if told and adapter is None:
            if self.cfg.student.sprint:
                from fastgen.sprint import make_sprint

                make_sprint(base)
            base.add_guidance()
            base.to(self.device)
        role = Role(base, adapter)
        if name == "student":
            chosen = self.cfg.student
            role = Student(base, adapter, self._times(), chosen.sampler, chosen.gamma)
            role.guidance_range, role.told_steps = told, bool(counts)
        if told:
            role.guidance = self.cfg.told_guidance
        base.eval()
        if name == "student" and self.cfg.student.init and str(self.device) != "meta":
            from fastgen.export import init_student

            init_student(role, self.cfg.student.init)
        return role

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
        if told:
            base.add_guidance()
            base.requires_grad_(False)
        laid_out = torch.device("meta") if str(self.device) == "meta" else nullcontext()
        with torch.random.fork_rng(devices=[]), laid_out:
            torch.manual_seed(self.cfg.train.seed * 1_000_003 + zlib.crc32(name.encode()))
            targets = lora.target_modules or base.family.lora_targets
            targets += base.family.guidance_layers if told else ()
            targets += (base.family.input_layer,) if two_times else ()
            base.add_adapter(name, lora.rank, lora.lora_alpha, targets, rs=lora.use_rslora)
        base.to(self.device)

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
        few = self.few_step_schedule.few_steps
        for one in (student, *getattr(student, "members", ())):
            one.grid = grid
            one.times = few(stage.num_steps, grid) if stage.num_steps else self._times(grid)
        if student.told_steps:
            student.guidance = float(len(student.times))
        if cls.few_step and self.teacher.scheduler is not None and not self.cfg.student.sprint:
            serve(student, self.teacher)  # an export that nothing can serve fails now
        self._make_extras({_base(n) for n in names}, stage)
        return cls(stage.objective, {n: self._part(n) for n in names}, rng, self.cfg.teacher.guidance)

    def _make_extras(self, names: set[str], stage: StageConfig) -> None:
        """Parts beside the roles, each made when a stage first names it."""
        method, num = method_of(stage), range(self.num_students)
        makers = {
            "logvar": lambda: LogVariance().to(self.device),
            "weak": lambda: self._weak(stage.objective.weak),
            "disc": lambda: Members([self._disc(method, j) for j in num]) if num else self._disc(method),
            "clip": lambda: self._clip(method.clip),
            "perceptual": self._perceptual,
        }
        for name, make in makers.items():
            if name in names and name not in self.parts:
                self.parts[name] = make()

    def _part(self, name: str):
        """A part by name; "critic2" is the critic of student 2."""
        if name in self.parts:
            return self.parts[name]
        base = _base(name)
        return self.parts[base].members[int(name.removeprefix(base))]

    def _weak(self, path: str) -> Role:
        """The weaker version of the teacher that autoguidance leads away from."""
        if not path:
            found = "not given, and objective.autoguidance leads away from a weaker model"
            raise UserError(
                "objective.weak", found, "an early checkpoint or a smaller model of the same data"
            )
        weak = load_teacher(path, weights=str(self.device) != "meta").to(self.device)
        same = type(weak.schedule) is type(self.teacher.schedule)
        if weak.codec.shape != self.teacher.codec.shape or not same:
            found = f"{path} makes {weak.codec.shape} on a {type(weak.schedule).__name__} schedule"
            allowed = f"as the teacher: {self.teacher.codec.shape}, {type(self.teacher.schedule).__name__}"
            raise UserError("objective.weak", found, allowed)
        weak.backbone.requires_grad_(False).eval()
        return Role(weak.backbone)

    def _clip(self, path: str):
        """The image-text net that version 2 of SwiftBrush trains against."""
        from fastgen.imagetext import Alignment, image_text

        return Alignment(image_text(path, str(self.device)), self.teacher.codec)

    def _perceptual(self) -> Perceptual:
        measured = (self.teacher.info or {}).get("measure")
        if not measured:
            found = f"perceptual for {self.cfg.teacher.path}, whose images no bundled net knows"
            raise UserError("objective.metric", found, "use l2, l1 or huber")
        return Perceptual(self.teacher.codec, FeatureNet.load(asset(f"measure/{measured}"))).to(self.device)

    def _disc(self, objective, member: int = 0) -> Discriminator:
        objective = getattr(objective, "gan", objective)  # a section of its own where one loss of several
        features = getattr(objective, "disc_features", "teacher")
        role = self.parts[features if features in self.parts else "teacher"]
        role = role.members[member] if hasattr(role, "members") else role
        codec, schedule = self.teacher.codec, self.teacher.schedule
        taps, head = objective.disc_taps or (-1,), getattr(objective, "disc_head", "pooled")
        if not objective.disc_taps and hasattr(role.backbone, "family"):
            family, net = role.backbone.family, role.backbone.net
            depths = getattr(objective, "disc_depths", 0)
            taps = family.spread_taps(net, depths) if depths else family.default_taps(net)
        t = torch.full((2,), schedule.steps(1)[0], dtype=torch.float64, device=self.device)
        cond = {k: v.to(self.device) for k, v in codec.null(2).items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.cfg.train.seed)
            example = (torch.zeros(2, *codec.shape, device=self.device), t, cond)
            head = "mean" if getattr(objective, "disc_mean", False) else head
            return Discriminator(role, taps, example, head).to(self.device)


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
