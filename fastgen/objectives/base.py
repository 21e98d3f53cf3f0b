"""What every distillation method shares: players, turns, time sampling and the registry.

A method is one class with one generator, `step(batch, k)`. Inside `with self.turn("student"):` that player
alone is trainable; each `yield loss, logs` hands the loss to the trainer, which runs backward and the
optimizer before the generator goes on. Values shared between turns are local variables, update ratios are
ordinary `if k % r`.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

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

from fastgen.core.batch import Batch
from fastgen.core.ema import ema_update
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.diffusion.schedules import Schedule
from fastgen.roles.roles import Player, Role, Student

REGISTRY: dict[str, type["Objective"]] = {}


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
    """Base class. Subclass as `class Foo(Objective, config=FooConfig)` with `step`; the registry takes it
    from there.
    """

    config: type[ObjectiveConfig]
    needs_data = True
    """whether `step` reads batch.x0"""
    draws_guidance = False
    """whether `step` can train a student that is told w (student.guidance_embedding), through `tell`"""
    two_times = False
    """whether the student also reads where its step ends: u(x_t, t, r) instead of D(x_t, t)"""
    few_step = True
    """whether the student becomes a few-step generator; if not, it is sampled by the ODE, like a teacher"""

    student: Student
    teacher: Role

    def __init_subclass__(cls, config: type[ObjectiveConfig] | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        if config is None:  # what several methods share
            return
        cls.config = config
        REGISTRY[config.model_fields["name"].default] = cls

    def __init__(self, cfg, parts: dict, rng: Rng, guidance: float = 1.0):
        self.cfg, self.rng, self.guidance = cfg, rng, self.learned_guidance(cfg, guidance)
        self.parts = parts
        self.learned = functools.cache(lambda name: parts[name].trainable())  # walked once, not every step
        for name, part in parts.items():
            setattr(self, name, part)
        self.schedule: Schedule = self.student.schedule
        self.players = {
            name: Player(name, {p: parts[p] for p in members})
            for name, members in self.player_parts(cfg).items()
        }
        self.active: str | None = None
        self.sync = True
        if cfg.real_guidance is not None and (
            not self.follows_guidance(cfg) or self.student.guidance_range is not None
        ):
            told = "these settings learn from no guided teacher, or draw its guidance; leave it out"
            raise UserError("objective.real_guidance", f"found {cfg.real_guidance:g}", told)
        self.check()

    def check(self) -> None:
        """Refuse settings that do not fit these parts, with UserError. Also called before a run folder is
        opened, on parts without weights.
        """

    @classmethod
    def player_parts(cls, cfg) -> dict[str, tuple[str, ...]]:
        """Players and the parts each one trains; parts are built by `fastgen.training.cast`."""
        return {"student": ("student",)}

    @classmethod
    def uses(cls, cfg) -> tuple[str, ...]:
        """Untrained parts this method needs besides the players', e.g. ("teacher",)."""
        return ("teacher",)

    @classmethod
    def follows_guidance(cls, cfg) -> bool:
        """Whether these settings learn from the teacher at one fixed guidance."""
        return "teacher" in cls.uses(cfg)

    @classmethod
    def requires_data(cls, cfg) -> bool:
        """Whether these settings read real data."""
        return cls.needs_data

    @classmethod
    def grid_steps(cls, cfg) -> int:
        """Steps of the grid that any step count may be drawn from; 0 where the time list is fixed."""
        return 0

    @classmethod
    def step_counts(cls, cfg) -> tuple[int, ...]:
        """Step counts that student and critic are told, through the class's own input for w; empty: none."""
        return ()

    @classmethod
    def learned_guidance(cls, cfg, guidance: float) -> float:
        """The teacher's guidance that ends up inside the student."""
        return guidance if cfg.real_guidance is None else cfg.real_guidance

    @classmethod
    def unsampled(cls, cfg, num_steps: int, sampler: str) -> str:
        """Why a student trained with these settings is not fit for num_steps of this sampler; empty if it
        is.
        """
        return ""

    @classmethod
    def evaluations(cls, cfg, guidance: float, num_steps: int) -> dict[str, float]:
        """Expected network calls of one step by role, for `--dry_run`; guidance counts two, "+grad" a
        backward.
        """
        raise NotImplementedError

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

    def step(self, batch: Batch, k: int) -> Iterator[tuple[Tensor, dict]]:
        """Yield (loss, logs) once per update; k counts optimizer windows from 0 within the stage."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Work done once before the first step of a stage, after weights are loaded. Most methods need
        none.
        """

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

    def tell(self, batch: Batch) -> tuple[float | Tensor, dict[str, Tensor]]:
        """(w of this step, the student's cond): the learned guidance, or w ~ U(range) [B] that the student is
        told.
        """
        span = self.student.guidance_range
        if span is None:
            return self.guidance, batch.cond
        w = span[0] + (span[1] - span[0]) * self.rng.rand(len(batch.noise)).float()
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
