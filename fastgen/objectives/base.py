"""What every distillation method shares: players, turns, time sampling and the registry.

A method is one class with one generator, `step(batch, k)`. Inside `with self.turn("student"):` that player
alone is trainable; each `yield loss, logs` hands the loss to the trainer, which runs backward and the
optimizer before the generator goes on. Values shared between turns are local variables, update ratios are
ordinary `if k % r`.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)
from torch import Tensor

from fastgen.core.batch import Batch, Cond
from fastgen.core.ema import ema_update
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import Schedule
from fastgen.networks.jvp import TangentConfig
from fastgen.objectives.requirements import Requirements
from fastgen.roles.heads import Discriminator, LogVariance
from fastgen.roles.roles import Player, Role, Student, learned

REGISTRY: dict[str, type["Objective"]] = {}

Updates = Iterator[tuple[Tensor, dict]]
"""what `step` yields: the loss of the active player's update, and what to log"""


class ObjectiveConfig(BaseModel):
    """Settings common to all methods."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    real_guidance: float | None = Field(None, ge=0)
    """guidance of the teacher that is learned from; null is teacher.guidance, that of its own samples"""

    @model_validator(mode="after")
    def _guidance_is_the_outermost(self):
        for key in type(self).model_fields:
            if getattr(getattr(self, key), "real_guidance", None) is not None:
                raise ValueError(f"{key}.real_guidance: set it on the method around, real_guidance")
        return self


def _any_objective(value: Any) -> Any:
    """The config of whichever method a mapping names."""
    if isinstance(value, ObjectiveConfig):
        return value
    name = value.get("name") if isinstance(value, dict) else value
    if name not in REGISTRY:
        raise ValueError(f"objective.host.name: found {name!r}; allowed: {', '.join(REGISTRY)}")
    try:
        return REGISTRY[name].config.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("objective", "host", *first["loc"])))
        raise ValueError(f"{key}: {first['msg']}; found {first['input']!r}") from None


AnyObjective = Annotated[SerializeAsAny[ObjectiveConfig], BeforeValidator(_any_objective)]
"""The settings of another method, for methods that are wrapped around one"""


def requirements_of(cfg: ObjectiveConfig) -> Requirements:
    """What the method of this name needs under these settings."""
    needs = replace(REGISTRY[cfg.name].requirements(cfg), forward_mode=_exact_tangent(cfg))
    return needs if needs.guidance is not None else replace(needs, guidance=cfg.real_guidance)


def _exact_tangent(cfg: BaseModel) -> bool:
    """Whether any settings inside ask for an exact tangent."""
    values = [getattr(cfg, name) for name in type(cfg).model_fields]
    if isinstance(cfg, TangentConfig):
        return cfg.method == "exact"
    return any(_exact_tangent(value) for value in values if isinstance(value, BaseModel))


class TimeConfig(BaseModel):
    """How noise levels are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: Literal["uniform", "logit_normal", "log_normal"] = "uniform"
    """uniform over the schedule's grid; logit_normal of the grid position; log_normal of sigma/alpha (EDM)"""
    low: float = Field(0.02, ge=0, lt=1)
    """lowest grid position of the uniform kind"""
    high: float = Field(0.98, gt=0, le=1)
    """highest grid position of the uniform kind"""
    mean: float = 0.0
    """mean of the (logit- or log-) normal kinds"""
    std: float = Field(1.0, gt=0)
    """standard deviation of the (logit- or log-) normal kinds"""


class Objective:
    """Base class. Subclass as `class Foo(Objective, config=FooConfig)` with `requirements` and `step`; the
    subclass registers itself under the default of FooConfig.name.
    """

    config: type[ObjectiveConfig]
    student: Student
    teacher: Role
    critic: Role
    """the network that learns the student's own distribution"""
    previous: Role
    """the student as the stage before left it"""
    disc: Discriminator
    """the heads of a GAN"""
    logvar: LogVariance
    """the learned weight of the loss at each time"""
    # each part exists where the requirements name it

    def __init_subclass__(cls, config: type[ObjectiveConfig] | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        if config is None:  # what several methods share
            return
        cls.config = config
        REGISTRY[config.model_fields["name"].default] = cls

    def __init__(self, cfg, parts: dict, rng: Rng, guidance: float = 1.0):
        needs = requirements_of(cfg)
        self.cfg, self.rng, self.guidance = cfg, rng, needs.learned_guidance(guidance)
        self.parts = parts
        self.learned = functools.cache(lambda name: learned(parts[name]))  # walked once, not every step
        for name, part in parts.items():
            setattr(self, name, part)
        self.schedule: Schedule = self.student.schedule
        self.players = {
            name: Player(name, {part: parts[part] for part in members})
            for name, members in needs.players.items()
        }
        self.active: str | None = None
        self.sync = True
        self.num_examples = 0  # of the stage's data; set before its first step
        drawn = self.student.guidance_range is not None
        if cfg.real_guidance is not None and (drawn or not needs.follows_guidance):
            why = "leave it out: with these settings no teacher is followed at one fixed guidance scale"
            raise UserError("objective.real_guidance", f"found {cfg.real_guidance:g}", why)
        self.check()

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        """What these settings need: networks, data, guidance, and the network calls of a step."""
        raise NotImplementedError(f"{cls.__name__} must define the classmethod requirements(cfg)")

    def check(self) -> None:
        """Refuse settings that do not fit these parts, with UserError. Also called before a run folder is
        opened, on parts without weights.
        """

    @contextmanager
    def turn(self, name: str) -> Iterator[Player]:
        """Make one player trainable and every other frozen, until the block ends."""
        for player in self.players.values():
            player.requires_grad_(player.name == name)
        self.active = name
        try:
            yield self.players[name]
        finally:
            self.active = None

    def step(self, batch: Batch, k: int) -> Updates:
        """Yield (loss, logs) once per update; k counts optimizer windows from 0 within the stage."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Work done once before the first step of a stage, after weights are loaded. Most methods need
        none.
        """

    def busy(self) -> str:
        """What a stage collects beside its steps, for the line of its progress; mostly nothing."""
        return ""

    def state(self) -> dict[str, Tensor]:
        """Tensors beyond the players' that a resumed run needs."""
        return {}

    # -- helpers -------------------------------------------------------------------------------------------
    def sample_t(self, num: int, time: TimeConfig) -> Tensor:
        """Noise levels [num] in the schedule's own time, float64."""
        if time.kind == "uniform":
            return self.schedule.from_unit(time.low + (time.high - time.low) * self.rng.rand(num))
        normal = time.mean + time.std * self.rng.randn(num).double()
        if time.kind == "logit_normal":
            return self.schedule.from_unit(torch.sigmoid(normal).clamp(1e-3, 1 - 1e-6))
        return self.schedule.t_from_lambda(-normal).clamp(self.schedule.t_min, self.schedule.t_max)

    def draw_guidance(self, batch: Batch) -> tuple[float | Tensor, Cond]:
        """(w of this step, the student's conditions): the one scale that is learned; or w ~ U(range) [B],
        also an input of the student (student.guidance_embedding) beside the batch's conditions.
        """
        if self.student.guidance_range is None:
            return self.guidance, batch.cond
        low, high = self.student.guidance_range
        w = low + (high - low) * self.rng.rand(len(batch.noise)).float()
        return w, {**batch.cond, "guidance": w}

    def follow(self, part: str, decay: float = 0.0) -> None:
        """Move a copy of the student (its target, its previous self) towards it; decay 0 makes them equal."""
        ema_update(self.learned(part), self.learned("student"), decay)

    def target_net(self, k: int) -> Role:
        """theta- of a consistency target: a copy that starts as the student; with target_decay 0 itself."""
        if not self.cfg.target_decay:
            return self.student
        if k == 0:
            self.follow("target")
        return self.parts["target"]

    def move_target(self, growth: float = 1.0) -> None:
        """After an update: theta- <- mu theta- + (1 - mu) theta, mu = target_decay ** growth."""
        if self.cfg.target_decay and self.sync:
            self.follow("target", self.cfg.target_decay**growth)

    def drop_condition(self, batch: Batch, share: float) -> dict[str, Tensor]:
        """The batch's conditions, the empty one in a share of its rows."""
        if not share:
            return batch.cond
        drop = self.rng.rand(len(batch.noise)) < share
        at = lambda c: drop.to(c.device).reshape(-1, *[1] * (c.ndim - 1))  # noqa: E731
        return {n: torch.where(at(c), batch.uncond[n], c) for n, c in batch.cond.items()}

    def generate(self, batch: Batch, last: int | None = None) -> Tensor:
        """The student's sample for this batch's noise."""
        return self.student.generate(batch.noise, batch.cond, self.rng.randn_like, last)


def guided(role: Role, x_t: Tensor, t: Tensor, batch: Batch, w: float | Tensor) -> Tensor:
    """D^w = D_uncond + w (D_cond - D_uncond) of a role at x_t [B, ...], t [B], for this batch."""
    return role.guided(x_t, t, batch.cond, batch.uncond, w)


def native_weighting(role: Role) -> losses.Weighting:
    """The w(t) under which an error of D is one of the network's native prediction."""
    return cast(losses.Weighting, role.backbone.prediction)


def data_of(batch: Batch) -> Tensor:
    """x0 [B, ...] of a batch with real data; a method that calls this requires it."""
    assert batch.x0 is not None, "the method reads x0: its requirements must say real_data=True"
    return batch.x0
