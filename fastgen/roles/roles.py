"""Networks in their parts: a Role is a backbone as teacher, student, critic or target.

With full copies each role has a backbone of its own. With adapters one frozen backbone plays every part:
the teacher with adapters off, the others with the adapter of their name on. Objectives cannot tell the
difference.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastgen.core.batch import Cond, stack
from fastgen.diffusion.schedules import Schedule
from fastgen.families.parts import of_adapter
from fastgen.networks.denoiser import Denoiser
from fastgen.roles.router import Router


@dataclass(frozen=True, eq=False, repr=False)
class Role:
    """A denoiser under one adapter (or as it is): D, guided D, raw prediction and features."""

    backbone: Denoiser
    adapter: str | None = None
    guidance: float | None = None
    """value of the network's input for the guidance scale where cond["guidance"] is missing; None: no such
    input"""
    share: float = 1.0
    """of the adapter's weights that act"""

    @property
    def schedule(self) -> Schedule:
        return self.backbone.schedule

    @property
    def members(self) -> "Sequence[Role]":
        """The roles inside: of several students each one, of any other role itself."""
        return [self]

    @contextmanager
    def _acting(self) -> Iterator[Denoiser]:
        with self.backbone.using(self.adapter, self.share):
            yield self.backbone

    def _with_guidance(self, cond: Cond, x: Tensor) -> Cond:
        """cond with the guidance scale [B], where this network takes one."""
        if self.guidance is None or "guidance" in cond:
            return cond
        return {**cond, "guidance": torch.full((len(x),), self.guidance, device=x.device)}

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """D [B, ...] in float32 at x_t [B, ...], t [B]."""
        with self._acting() as net:
            return net(x_t, t, self._with_guidance(cond, x_t))

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's native prediction."""
        with self._acting() as net:
            return net.raw(x_t, t, self._with_guidance(cond, x_t))

    def source(self, noise: Tensor, cond: Cond) -> Tensor:
        """Where sampling begins, given unit noise: the other end of the paths from the data."""
        return self.backbone.source(noise, cond)

    def features(
        self, x_t: Tensor, t: Tensor, cond: Cond, taps: tuple[int, ...] = (-1,), score: bool = False
    ):
        """(feature maps, D or None) from one pass."""
        with self._acting() as net:
            return net.features(x_t, t, self._with_guidance(cond, x_t), taps, score)

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
        return self.backbone.guide(D, D_uncond, w, x_t, t)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters this role learns: all of its copy, or those of its adapter."""
        named = self.backbone.named_weights()
        if self.adapter is not None:
            return {n: p for n, p in named.items() if f".{self.adapter}." in n and of_adapter(n)}
        if self.backbone.adapter_names:
            return {}
        return {n: p for n, p in named.items() if not n.startswith(self.backbone.fixed)}


@dataclass(frozen=True)
class StudentSpec:
    """How a student is sampled, and what it was trained for."""

    times: Sequence[float]
    """of its steps, noise first, in the schedule's own unit"""
    sampler: str = "renoise"
    """what happens between steps: renoise, ode or tcd"""
    gamma: float = 0.0
    """of the tcd sampler: 0 is the ODE, 1 fresh noise at every step"""
    grid: int = 0
    """steps of the time grid it was trained on; 0: on a fixed list"""
    guidance: float | None = None
    """value of its input for the guidance scale; None without such an input"""
    guidance_range: tuple[float, float] | None = None
    """lowest and highest value that this input was trained for"""
    steps_as_guidance: bool = False
    """whether this input holds the number of steps instead of the guidance scale"""
    block: int = 0
    """latent frames that are made at once, after those before them (roles/causal.py); 0: the whole sample"""
    window: int = 0
    """blocks that attention spans, the own included; 0: no bound"""
    fidelity: float | None = None
    """grid position that it is told in place of its time: towards 1 the mean of what a sample may be, towards
    0 one of them; None for a student that takes none"""
    fidelity_range: tuple[float, float] | None = None
    """least and highest value that was trained"""

    def __post_init__(self):
        object.__setattr__(self, "times", tuple(self.times))


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Student(Role):
    """The role that becomes a few-step generator. Its `with_` methods return another student over the same
    network; nothing changes one that is made.
    """

    spec: StudentSpec = field(kw_only=True)

    def __init__(self, backbone: Denoiser, adapter: str | None, spec: StudentSpec):
        super().__init__(backbone, adapter, spec.guidance)
        object.__setattr__(self, "spec", spec)

    @property
    def times(self) -> list[float]:
        return list(self.spec.times)

    @property
    def sampler(self) -> str:
        return self.spec.sampler

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        return self.spec.guidance_range

    def _copy(self, spec: StudentSpec, role: Role | None = None) -> "Student":
        """A student of the same class with another spec, and with the network of `role` if one is given."""
        other, role = copy.copy(self), role or self
        changed = {
            "spec": spec,
            "guidance": spec.guidance,
            "backbone": role.backbone,
            "adapter": role.adapter,
        }
        for name, value in changed.items():
            object.__setattr__(other, name, value)
        return other

    def with_times(self, times: Sequence[float], grid: int | None = None) -> "Student":
        """The same network with another time list, picked of a grid of that many steps if one is given."""
        spec = self.spec
        return self._copy(replace(spec, times=times, grid=spec.grid if grid is None else grid))

    def with_steps(self, num: int) -> "Student":
        """The same network in num steps: 0 keeps the time list, and a list that starts off the schedule's own
        grid says where every other one starts.
        """
        spec, times = self.spec, self.times
        if num not in (0, len(times)):
            few = self.schedule.student_times
            times = few(num, spec.grid, 0.0 if times == few(len(times), spec.grid) else times[0])
        guidance = float(len(times)) if spec.steps_as_guidance else spec.guidance
        return self._copy(replace(spec, times=times, guidance=guidance))

    def with_window(self, window: int) -> "Student":
        """The same network over a cache of another length, in blocks."""
        return self._copy(replace(self.spec, window=window))

    def num_blocks(self, x: Tensor) -> int:
        """Blocks of a sample x that are made one after the other: here it is all made at once."""
        return 1

    def of_blocks(self, times: Tensor, x: Tensor) -> Tensor:
        """Times of every block of x, [B, N], as the network takes them."""
        return times[:, 0]

    @property
    def nfe(self) -> int:
        """Network evaluations per sample; what is made block by block is seen once more, by the cache."""
        return len(self.times) + bool(self.spec.block)

    def with_guidance(self, guidance: float) -> "Student":
        """The same network with another value of its guidance input."""
        return self._copy(replace(self.spec, guidance=guidance))

    def with_fidelity(self, fidelity: float) -> "Student":
        """The same network told another fidelity."""
        return self._copy(replace(self.spec, fidelity=fidelity))

    def with_network(self, role: Role) -> "Student":
        """The network of another role, with its guidance input if it has one, sampled as this one is."""
        return self._copy(replace(self.spec, guidance=role.guidance), role)

    def generate(
        self, noise: Tensor, cond: Cond, randn_like: Callable[[Tensor], Tensor], last: int | None = None
    ) -> Tensor:
        """Sample x0 [B, ...] from unit noise; gradient flows through the last network call only.

        With `last` < len(times) - 1 the walk stops after that step: backward simulation, the student
        trained on its own intermediate states (DMD2, arXiv 2405.14867, Sec. 4.5).
        """
        final = len(self.times) - 1
        last = final if last is None else last
        x_t, t = self.states(noise, cond, randn_like, last)[-1], self.time(last, noise)
        x = self(x_t, t, self.ending(cond, last, noise))
        return self.sample_at(x, x_t, last)

    @torch.no_grad()
    def states(
        self, noise: Tensor, cond: Cond, randn_like: Callable[[Tensor], Tensor], last: int
    ) -> list[Tensor]:
        """The states [B, ...] at the first last + 1 times of the walk from unit noise, without gradient."""
        found = [self.source(noise, cond) * self.schedule.prior_std(self.times[0])]
        for i in range(last):
            t, u = self.time(i, noise), self.time(i + 1, noise)
            x = self(found[i], t, self.ending(cond, i, noise))
            found.append(self.between(x, found[i], t, u, randn_like))
        return found

    def sample_at(self, x: Tensor, x_t: Tensor, last: int) -> Tensor:
        """What the walk returns if it stops at step `last` with the estimate x: x but for TCD's last step."""
        if self.sampler == "tcd" and last == len(self.times) - 1:
            t = self.time(last, x_t)
            return self.schedule.ode_step(x, x_t, t, torch.full_like(t, self.schedule.t_min))
        return x

    def transition(self, x: Tensor, x_t: Tensor, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, ...] of the state at u after the estimate x at t, which is Gaussian
        given x_t; the deviation is 0 where no fresh noise enters.
        """
        mean = self.between(x, x_t, t, u, torch.zeros_like)
        return mean, (self.between(x, x_t, t, u, torch.ones_like) - mean).detach()

    def between(self, x: Tensor, x_t: Tensor, t: Tensor, u: Tensor, randn_like: Callable) -> Tensor:
        """The state at u after the estimate x at t: fresh noise, the ODE, or TCD's mixture of both."""
        S = self.schedule
        if self.sampler == "renoise":
            return S.noise(x, randn_like(x), u)
        if self.sampler == "ode" or not self.spec.gamma:
            return S.ode_step(x, x_t, t, u)
        s = S.toward_data(u, self.spec.gamma)
        return S.renoise(
            S.ode_step(x, x_t, t, s), randn_like(x), s, u
        )  # strategic stochastic sampling, 2402.19159

    def ends(self) -> list[float]:
        """Where each step ends for a network that reads it: at the next time of an ODE walk, else clean."""
        clean = self.schedule.t_min
        following = self.times[1:] if self.sampler == "ode" else [clean] * (len(self.times) - 1)
        return [*following, clean]

    def ending(self, cond: Cond, i: int, x: Tensor) -> Cond:
        """cond with the end r [B] of step i, or a fidelity in the place of its time, where the network takes
        one.
        """
        if self.spec.fidelity is not None:
            told = torch.full((len(x),), self.spec.fidelity, dtype=torch.float64, device=x.device)
            return {**cond, "net_t": self.schedule.from_unit(told)}
        if not self.backbone.second_time:
            return cond
        r = torch.full((len(x),), self.ends()[i], dtype=torch.float64, device=x.device)
        return {**cond, "r": r}

    def time(self, i: int, x: Tensor) -> Tensor:
        """The i-th time of the list for every row of x, [B] float64."""
        return torch.full((len(x),), self.spec.times[i], dtype=torch.float64, device=x.device)


class Students(Student):
    """Several few-step generators behind one router: each row is drawn by the student of its condition."""

    def __init__(self, members: Sequence[Student], router: Router):
        super().__init__(members[0].backbone, members[0].adapter, members[0].spec)  # the spec is common
        self._students = list(members)
        self.router = router
        self.trained = list(range(len(members)))  # by this run

    @property
    def members(self) -> list[Student]:
        return self._students

    def _copy(self, spec: StudentSpec, role: Role | None = None) -> Student:
        if role is not None:  # one network in the place of all
            return self.members[0]._copy(spec, role)
        other = super()._copy(spec)
        assert isinstance(other, Students)
        other._students = [m._copy(spec) for m in self.members]
        return other

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        part, out = self.router(cond).to(x_t.device), torch.empty_like(x_t, dtype=torch.float32)
        for j, member in enumerate(self.members):
            rows = (part.expand(len(x_t)) == j).nonzero()[:, 0]
            if len(rows):
                out[rows] = member(x_t[rows], t[rows], {n: c[rows] for n, c in cond.items()})
        return out

    def trainable(self) -> dict[str, nn.Parameter]:
        return Members(self.members).trainable()


class Members:
    """One part of each student of a run with several."""

    def __init__(self, members: Sequence["Part"]):
        self.members = members

    def trainable(self) -> dict[str, nn.Parameter]:
        return {f"{j}.{n}": p for j, m in enumerate(self.members) for n, p in learned(m).items()}


Part = Role | Members | nn.Module
"""what a run is made of: denoisers in their roles, and whole modules such as discriminators"""


def members(part: Part) -> Sequence[Part]:
    """The parts inside one: of several students' the one of each, of any other itself."""
    return part.members if isinstance(part, (Role, Members)) else [part]


def learned(part: Part) -> dict[str, nn.Parameter]:
    """The trainable parameters of a part: a role declares them, of a plain module they are all."""
    return dict(part.named_parameters()) if isinstance(part, nn.Module) else part.trainable()


class Player:
    """A named set of parts that one optimizer updates, e.g. critic = fake-score network + discriminator
    heads.
    """

    def __init__(self, name: str, parts: Mapping[str, Part]):
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
