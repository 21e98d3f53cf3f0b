"""From a config to the cast of one run: teacher, student, critic, discriminator, target, and the objective that plays them."""

import copy
import json
import zlib

import torch
from torch import nn

from fastgen.backbones import Teacher, load_teacher
from fastgen.config import LoraConfig, RunConfig, StageConfig
from fastgen.critics import Discriminator
from fastgen.errors import UserError
from fastgen.objectives import REGISTRY, Objective
from fastgen.rng import Rng
from fastgen.roles import Role, Student


class Cast:
    """The networks of a run by part name. Parts are made when a stage first asks for them and kept for later stages."""

    def __init__(self, cfg: RunConfig, device="cpu"):
        self.cfg, self.device = cfg, device
        self.teacher = self._load()
        if cfg.teacher.guidance != 1 and not self.teacher.codec.null(1):
            raise UserError("teacher.guidance", f"found {cfg.teacher.guidance} for an unconditional teacher", "use 1")
        names = {p for s in cfg.all_stages() for p in _wanted(s)}
        self.parts: dict[str, Role | nn.Module] = {"teacher": Role(self.teacher.backbone)}
        self.teacher.backbone.requires_grad_(False).eval()
        kinds = {"student": cfg.student.kind, "critic": self.critic_kind, "target": cfg.student.kind}
        for name in sorted(names & set(kinds), key=lambda n: kinds[n] != "full"):  # copies before adapters are injected
            self._make(name, kinds[name], alone="teacher" not in names)
        if cfg.train.gradient_checkpointing:
            for backbone in self.backbones():
                if hasattr(backbone, "enable_gradient_checkpointing"):
                    backbone.enable_gradient_checkpointing()

    @property
    def critic_kind(self) -> str:
        return self.cfg.student.kind if self.cfg.critic.kind == "auto" else self.cfg.critic.kind

    def backbones(self) -> list[nn.Module]:
        """Distinct networks, teacher first."""
        roles = [p for p in self.parts.values() if isinstance(p, Role)]
        return list({id(r.backbone): r.backbone for r in roles}.values())

    def _load(self) -> Teacher:
        t = self.cfg.teacher
        torch.manual_seed(self.cfg.train.seed)  # an untrained blueprint draws its weights here
        return load_teacher(t.path, t.prediction, t.blueprint, t.allow_download).to(self.device)

    def _make(self, name: str, kind: str, alone: bool) -> None:
        base = self.teacher.backbone
        adapter = None
        if kind == "lora":
            if not hasattr(base, "add_adapter"):
                raise UserError(f"{name}.kind", "lora on an analytic teacher, which has no weights to adapt", "use full")
            lora = self.cfg.critic.lora if name == "critic" else self.cfg.student.lora
            adapter = name
            self._adapter(base, name, lora)
        elif hasattr(base, "trainable_copy"):
            base = base.trainable_copy().to(self.device)
        elif not alone:
            base = copy.deepcopy(base)
        if name == "student":
            self.parts[name] = Student(base, adapter, self._times(), self.cfg.student.sampler)
        else:
            self.parts[name] = Role(base, adapter)
        base.eval()
        if name == "student" and self.cfg.student.init:
            from fastgen.export import init_student

            init_student(self.parts[name], self.cfg.student.init)

    def _adapter(self, base, name: str, lora: LoraConfig) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.cfg.train.seed * 1_000_003 + zlib.crc32(name.encode()))
            targets = lora.target_modules or base.family.lora_targets
            base.add_adapter(name, lora.rank, lora.lora_alpha, targets)
        base.to(self.device)

    def _times(self) -> list[float]:
        s, schedule = self.cfg.student, self.teacher.schedule
        times = list(s.timesteps) or schedule.steps(s.num_steps)
        if not all(schedule.t_min < t <= schedule.t_max for t in times):
            raise UserError(
                "student.timesteps", f"found {times}", f"the teacher's times lie in ({schedule.t_min}, {schedule.t_max}]"
            )
        return times

    def stage(self, stage: StageConfig, rng: Rng) -> Objective:
        """The objective of one stage over these parts."""
        cls = REGISTRY[stage.objective.name]
        names = _wanted(stage)
        if stage.num_steps:
            self.parts["student"].times = self.teacher.schedule.steps(stage.num_steps)
        if "disc" in names and "disc" not in self.parts:
            self.parts["disc"] = self._disc(stage.objective)
        return cls(stage.objective, {n: self.parts[n] for n in names}, rng, self.cfg.teacher.guidance)

    def _disc(self, objective) -> Discriminator:
        role = self.parts[objective.disc_features if objective.disc_features in self.parts else "teacher"]
        codec, schedule = self.teacher.codec, self.teacher.schedule
        taps = objective.disc_taps or (role.backbone.family.default_taps(role.backbone.net) if hasattr(role.backbone, "family") else (-1,))
        t = torch.full((2,), schedule.steps(1)[0], dtype=torch.float64, device=self.device)
        cond = {k: v.to(self.device) for k, v in codec.null(2).items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.cfg.train.seed)
            return Discriminator(role, taps, (torch.zeros(2, *codec.shape, device=self.device), t, cond)).to(self.device)


def _wanted(stage: StageConfig) -> list[str]:
    """Part names one stage needs, student first."""
    cls = REGISTRY[stage.objective.name]
    players = cls.player_parts(stage.objective)
    return list(dict.fromkeys([*(p for members in players.values() for p in members), *cls.uses(stage.objective)]))


def fingerprint(cfg: RunConfig) -> dict[str, str]:
    """What may not change between a run and its resumption, by dotted key."""
    stages = [[s.name, s.max_train_steps, s.objective.model_dump(mode="json")] for s in cfg.all_stages()]
    keys = {
        "teacher": cfg.teacher.model_dump(mode="json"), "student": cfg.student.model_dump(mode="json"),
        "critic": cfg.critic.model_dump(mode="json"), "stages": stages, "data": cfg.data.model_dump(mode="json", exclude={"cache_dir"}),
        "train.seed": cfg.train.seed, "train.train_batch_size": cfg.train.train_batch_size,
        "train.gradient_accumulation_steps": cfg.train.gradient_accumulation_steps, "train.ema_decay": cfg.train.ema_decay,
    }
    return {k: json.dumps(v, sort_keys=True) for k, v in keys.items()}
