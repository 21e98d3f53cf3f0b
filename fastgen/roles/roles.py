"""Networks in their parts: a Role is a backbone as teacher, student, critic or target.

With full copies each role has a backbone of its own. With adapters one frozen backbone plays every part:
the teacher with adapters off, the others with the adapter of their name on. Objectives cannot tell the
difference.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastgen.core.batch import Cond, stack
from fastgen.diffusion.schedules import Schedule


class Role:
    """A backbone under one adapter (or as it is): D, guided D, raw prediction and features."""

    guidance: float | None = None
    """what a network with w as an input is told where cond["guidance"] is missing; None: no such input"""

    def __init__(self, backbone: nn.Module, adapter: str | None = None):
        self.backbone, self.adapter = backbone, adapter

    @property
    def schedule(self) -> Schedule:
        return self.backbone.schedule

    @contextmanager
    def _acting(self) -> Iterator[nn.Module]:
        if hasattr(self.backbone, "using"):
            with self.backbone.using(self.adapter):
                yield self.backbone
        else:
            yield self.backbone

    def _told(self, cond: Cond, x: Tensor) -> Cond:
        """cond with the guidance scale [B], where this network takes one."""
        if self.guidance is None or "guidance" in cond:
            return cond
        return {**cond, "guidance": torch.full((len(x),), self.guidance, device=x.device)}

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """D [B, ...] in float32 at x_t [B, ...], t [B]."""
        with self._acting() as net:
            return net(x_t, t, self._told(cond, x_t))

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's native prediction."""
        with self._acting() as net:
            return net.raw(x_t, t, self._told(cond, x_t))

    def features(
        self, x_t: Tensor, t: Tensor, cond: Cond, taps: tuple[int, ...] = (-1,), score: bool = False
    ):
        """(feature maps, D or None) from one pass."""
        with self._acting() as net:
            return net.features(x_t, t, self._told(cond, x_t), taps, score)

    def guided(self, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, w: float | Tensor) -> Tensor:
        """D_uncond + w (D_cond - D_uncond) (Ho & Salimans 2022, arXiv 2207.12598), both in one batched
        pass; w = 1 is D_cond.
        """
        if isinstance(w, (int, float)) and w == 1:
            return self(x_t, t, cond)
        if isinstance(w, (int, float)) and w == 0:
            return self(x_t, t, uncond)
        both = self(torch.cat([x_t, x_t]), torch.cat([t, t]), stack([cond, uncond]))
        D, D_uncond = both.chunk(2)
        if isinstance(w, Tensor):
            w = w.to(D).reshape(-1, *[1] * (D.ndim - 1))
        if hasattr(self.backbone, "guide"):
            return self.backbone.guide(D, D_uncond, w, x_t, t)
        return D_uncond + w * (D - D_uncond)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters this role learns: all of its copy, or those of its adapter."""
        named = dict(self.backbone.named_parameters())
        if self.adapter is not None:
            return {n: p for n, p in named.items() if f".{self.adapter}." in n and "lora_" in n}
        if getattr(self.backbone, "adapter_names", ()):
            return {}
        fixed = getattr(self.backbone, "fixed", ())
        return {n: p for n, p in named.items() if not n.startswith(fixed)}


class Student(Role):
    """The role that becomes a few-step generator: it carries the time list it will be sampled with."""

    guidance_range: tuple[float, float] | None = None
    """guidance scales a student that is told w is trained for"""
    steps_as_guidance = False
    """whether that input holds the number of steps instead of w"""

    def __init__(
        self,
        backbone: nn.Module,
        adapter: str | None,
        times: list[float],
        sampler: str = "renoise",
        gamma: float = 0.0,
        grid: int = 0,
    ):
        """gamma is the tcd sampler's; grid the steps of the grid it was trained on, 0 for a fixed list."""
        super().__init__(backbone, adapter)
        self.times, self.sampler, self.gamma, self.grid = times, sampler, gamma, grid

    def taking(self, num: int, role: Role | None = None) -> "Student":
        """The same network (or another in its place) sampled in num steps; 0 keeps the time list, and a list
        of its own says where every other one starts.
        """
        other = copy.copy(self)
        if num not in (0, len(self.times)):
            few, times = self.schedule.student_times, self.times
            other.times = few(num, self.grid, 0.0 if times == few(len(times), self.grid) else times[0])
        if self.steps_as_guidance:
            other.guidance = float(len(other.times))
        if role is not None:
            other.backbone, other.adapter, other.guidance = role.backbone, role.adapter, role.guidance
        return other

    def at(self, guidance: float) -> "Student":
        """The same network told another guidance scale."""
        other = copy.copy(self)
        other.guidance = guidance
        return other

    def generate(
        self, noise: Tensor, cond: Cond, randn_like: Callable[[Tensor], Tensor], last: int | None = None
    ) -> Tensor:
        """Sample x0 [B, ...] from unit noise; gradient flows through the last network call only.

        With `last` < len(times) - 1 the walk stops after that step: backward simulation, the student
        trained on its own intermediate states (DMD2, arXiv 2405.14867, Sec. 4.5).
        """
        last = len(self.times) - 1 if last is None else last
        x_t = noise * self.schedule.prior_std(self.times[0])
        with torch.no_grad():
            for i in range(last):
                t, u = self.time(i, noise), self.time(i + 1, noise)
                x = self(x_t, t, self.ending(cond, i, noise))
                x_t = self.between(x, x_t, t, u, randn_like)
        t = self.time(last, noise)
        x = self(x_t, t, self.ending(cond, last, noise))
        if self.sampler == "tcd" and last == len(self.times) - 1:
            return self.schedule.ode_step(x, x_t, t, torch.full_like(t, self.schedule.t_min))
        return x

    def between(self, x: Tensor, x_t: Tensor, t: Tensor, u: Tensor, randn_like: Callable) -> Tensor:
        """The state at u after the estimate x at t: fresh noise, the ODE, or TCD's mixture of both."""
        S = self.schedule
        if self.sampler == "renoise":
            return S.noise(x, randn_like(x), u)
        if self.sampler == "ode" or not self.gamma:
            return S.ode_step(x, x_t, t, u)
        s = S.toward_data(u, self.gamma)
        return S.renoise(
            S.ode_step(x, x_t, t, s), randn_like(x), s, u
        )  # strategic stochastic sampling, 2402.19159

    def ends(self) -> list[float]:
        """Where each step ends for a network that reads it: at the next time of an ODE walk, else clean."""
        clean = self.schedule.t_min
        following = self.times[1:] if self.sampler == "ode" else [clean] * (len(self.times) - 1)
        return [*following, clean]

    def ending(self, cond: Cond, i: int, x: Tensor) -> Cond:
        """cond with the end r [B] of step i, where the network takes one."""
        if not getattr(self.backbone, "second_time", False):
            return cond
        r = torch.full((len(x),), self.ends()[i], dtype=torch.float64, device=x.device)
        return {**cond, "r": r}

    def time(self, i: int, x: Tensor) -> Tensor:
        """The i-th time of the list for every row of x, [B] float64."""
        return torch.full((len(x),), self.times[i], dtype=torch.float64, device=x.device)


class Students(Student):
    """Several few-step generators behind one router: each row is drawn by the student of its condition."""

    def __init__(self, members: list[Student], router: Callable[[Cond], Tensor]):
        self.__dict__.update(vars(members[0]))  # schedule, time list and sampler are common
        self.members, self.router = members, router
        self.trained = list(range(len(members)))  # by this run

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        part, out = self.router(cond).to(x_t.device), torch.empty_like(x_t, dtype=torch.float32)
        for j, member in enumerate(self.members):
            rows = (part.expand(len(x_t)) == j).nonzero()[:, 0]
            if len(rows):
                out[rows] = member(x_t[rows], t[rows], {n: c[rows] for n, c in cond.items()})
        return out

    def taking(self, num: int, role: Role | None = None) -> Student:
        return super().taking(num) if role is None else self.members[0].taking(num, role)

    def trainable(self) -> dict[str, nn.Parameter]:
        return Members(self.members).trainable()


class Members:
    """One part of each student of a run with several."""

    def __init__(self, members: list):
        self.members = members

    def trainable(self) -> dict[str, nn.Parameter]:
        return {f"{j}.{n}": p for j, m in enumerate(self.members) for n, p in learned(m).items()}


def learned(part) -> dict[str, nn.Parameter]:
    """What a part learns: a role says so itself, of a plain module it is everything."""
    return part.trainable() if hasattr(part, "trainable") else dict(part.named_parameters())


class Player:
    """A named set of parts that one optimizer updates, e.g. critic = fake-score network + discriminator
    heads.
    """

    def __init__(self, name: str, parts: dict[str, Role | nn.Module]):
        self.name, self.parts = name, parts
        self._trainable: dict[str, nn.Parameter] = {}
        for part_name, part in parts.items():
            self._trainable.update({f"{part_name}.{n}": p for n, p in learned(part).items()})

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every learned parameter by dotted name; fixed when the player is cast, so turns switch fast."""
        return self._trainable

    def requires_grad_(self, value: bool) -> None:
        for parameter in self.trainable().values():
            parameter.requires_grad_(value)
