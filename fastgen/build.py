"""From a config to the cast of one run: teacher, student, critic, discriminator, target, and the
objective that plays them.
"""

import copy
import json
import zlib
from contextlib import nullcontext
from dataclasses import fields

import torch
from torch import nn

from fastgen.backbones import Source, Teacher, load_teacher
from fastgen.backbones.attention import check as check_attention
from fastgen.config import LoraConfig, RunConfig, StageConfig
from fastgen.critics import Discriminator
from fastgen.errors import UserError
from fastgen.objectives import REGISTRY, Objective
from fastgen.rng import Rng
from fastgen.roles import Role, Student
from fastgen.serving import scheduler_for


class Cast:
    """The networks of a run by part name. Parts are made when a stage first asks for them and kept for
    later stages.
    """

    def __init__(self, cfg: RunConfig, device="cpu"):
        """On the device "meta" every network is laid out without its numbers, exact teachers apart."""
        exact = cfg.teacher.path.startswith("analytic:")
        self.cfg, self.device = cfg, "cpu" if exact and str(device) == "meta" else device
        self.teacher = self._load()
        self._check_null()
        names = {p for s in cfg.all_stages() for p in _wanted(s)}
        self.parts: dict[str, Role | nn.Module] = {"teacher": Role(self.teacher.backbone)}
        self.teacher.backbone.requires_grad_(False).eval()
        kinds = {"student": cfg.student.kind, "critic": self.critic_kind, "target": cfg.student.kind}
        for name in sorted(
            (n for n in kinds if n in names), key=lambda n: kinds[n] != "full"
        ):  # copies before adapters
            self._make(name, kinds[name], alone="teacher" not in names)
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

    def _check_null(self) -> None:
        """Guidance and label dropout need a null condition that the teacher knows."""
        codec, cfg = self.teacher.codec, self.cfg
        conditional, family = bool(codec.null(1)), getattr(self.teacher.backbone, "family", None)
        if cfg.teacher.guidance != 1 and family is not None and not family.guidable:
            told = (
                f"found {cfg.teacher.guidance} for {family.name}, whose guidance is an input of the network"
            )
            raise UserError("teacher.guidance", told, "use 1, and teacher.embedded_guidance")
        if cfg.teacher.guidance != 1 and not (conditional and codec.has_null):
            what = "a teacher without a null class" if conditional else "an unconditional teacher"
            raise UserError("teacher.guidance", f"found {cfg.teacher.guidance} for {what}", "use 1")
        for stage in cfg.all_stages():
            drop = getattr(stage.objective, "cond_dropout", 0)
            if drop and conditional and not codec.has_null:
                raise UserError(
                    "objective.cond_dropout", f"found {drop} for a teacher without a null class", "use 0"
                )

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
        weights = str(self.device) != "meta"
        asked = {f.name: getattr(t, f.name) for f in fields(Source) if f.name != "weights"}
        return load_teacher(**asked, weights=weights).to(self.device)

    def _make(self, name: str, kind: str, alone: bool) -> None:
        base = self.teacher.backbone
        adapter = None
        if kind == "lora":
            if not hasattr(base, "add_adapter"):
                raise UserError(
                    f"{name}.kind", "lora on an analytic teacher, which has no weights to adapt", "use full"
                )
            lora = self.cfg.critic.lora if name == "critic" else self.cfg.student.lora
            adapter = name
            self._adapter(base, name, lora)
        elif hasattr(base, "trainable_copy"):
            base = base.trainable_copy().to(self.device)
        elif not alone:
            base = copy.deepcopy(base).float()
        if name == "student":
            self.parts[name] = Student(base, adapter, self._times(), self.cfg.student.sampler)
        else:
            self.parts[name] = Role(base, adapter)
        base.eval()
        if name == "student" and self.cfg.student.init and str(self.device) != "meta":
            from fastgen.export import init_student

            init_student(self.parts[name], self.cfg.student.init)

    def _adapter(self, base, name: str, lora: LoraConfig) -> None:
        laid_out = torch.device("meta") if str(self.device) == "meta" else nullcontext()
        with torch.random.fork_rng(devices=[]), laid_out:
            torch.manual_seed(self.cfg.train.seed * 1_000_003 + zlib.crc32(name.encode()))
            targets = lora.target_modules or base.family.lora_targets
            base.add_adapter(name, lora.rank, lora.lora_alpha, targets, rs=lora.use_rslora)
        base.to(self.device)

    def _times(self) -> list[float]:
        s, schedule = self.cfg.student, self.teacher.schedule
        times = list(s.timesteps) or schedule.steps(s.num_steps)
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
        self.parts["student"].times = (
            self.teacher.schedule.steps(stage.num_steps) if stage.num_steps else self._times()
        )
        if cls.few_step and self.teacher.scheduler is not None:  # an export that nothing can serve fails now
            student, family = self.parts["student"], self.teacher.backbone.family
            scheduler_for(student.times, student.sampler, student.schedule, self.teacher.scheduler, family)
        if "disc" in names and "disc" not in self.parts:
            self.parts["disc"] = self._disc(stage.objective)
        return cls(stage.objective, {n: self.parts[n] for n in names}, rng, self.cfg.teacher.guidance)

    def _disc(self, objective) -> Discriminator:
        role = self.parts[objective.disc_features if objective.disc_features in self.parts else "teacher"]
        codec, schedule = self.teacher.codec, self.teacher.schedule
        taps = objective.disc_taps or (
            role.backbone.family.default_taps(role.backbone.net)
            if hasattr(role.backbone, "family")
            else (-1,)
        )
        t = torch.full((2,), schedule.steps(1)[0], dtype=torch.float64, device=self.device)
        cond = {k: v.to(self.device) for k, v in codec.null(2).items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.cfg.train.seed)
            return Discriminator(role, taps, (torch.zeros(2, *codec.shape, device=self.device), t, cond)).to(
                self.device
            )


def switch_vae(vae, teacher) -> None:
    """Tiled or sliced decoding where it is asked for; an autoencoder without it is told, not passed over."""
    for key, method in (("vae_tiling", "enable_tiling"), ("vae_slicing", "enable_slicing")):
        if not getattr(teacher, key):
            continue
        if vae is None or not hasattr(vae, method):
            found = "this teacher has no autoencoder" if vae is None else f"{type(vae).__name__} cannot do it"
            raise UserError(f"teacher.{key}", found, "leave it false")
        getattr(vae, method)()


def _wanted(stage: StageConfig) -> list[str]:
    """Part names one stage needs, student first."""
    cls = REGISTRY[stage.objective.name]
    players = cls.player_parts(stage.objective)
    return list(
        dict.fromkeys([*(p for members in players.values() for p in members), *cls.uses(stage.objective)])
    )


def fingerprint(cfg: RunConfig) -> dict[str, str]:
    """What may not change between a run and its resumption, as JSON by dotted key."""
    values = cfg.model_dump(mode="json")
    train = ("seed", "train_batch_size", "gradient_accumulation_steps", "ema_decay", "mixed_precision")
    kept = {k: values[k] for k in ("teacher", "student", "critic", "data")}
    kept["train"] = {k: values["train"][k] for k in train}
    kept["data"].pop("cache_dir")
    if cfg.stages:
        kept["stages"] = {
            str(i): {k: v for k, v in s.items() if k != "optim"} for i, s in enumerate(values["stages"])
        }
    else:
        kept["objective"], kept["train"]["max_train_steps"] = (
            values["objective"],
            values["train"]["max_train_steps"],
        )
    return dict(_leaves(kept, ""))


def _leaves(tree: dict, prefix: str):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)
