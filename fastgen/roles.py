"""Networks in their parts: a Role is a backbone as teacher, student, critic or target.

With full copies each role has a backbone of its own. With adapters one frozen backbone plays every part:
the teacher with adapters off, the others with the adapter of their name on. Objectives cannot tell the
difference.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastgen.backbones.base import Cond
from fastgen.codecs import stack
from fastgen.schedules import Schedule


class Role:
    """A backbone under one adapter (or as it is): D, guided D, raw prediction and features."""

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

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """D [B, ...] in float32 at x_t [B, ...], t [B]."""
        with self._acting() as net:
            return net(x_t, t, cond)

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's native prediction."""
        with self._acting() as net:
            return net.raw(x_t, t, cond)

    def features(
        self, x_t: Tensor, t: Tensor, cond: Cond, taps: tuple[int, ...] = (-1,), score: bool = False
    ):
        """(feature maps, D or None) from one pass."""
        with self._acting() as net:
            return net.features(x_t, t, cond, taps, score)

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
        return named


class Student(Role):
    """The role that becomes a few-step generator: it carries the time list it will be sampled with."""

    def __init__(
        self, backbone: nn.Module, adapter: str | None, times: list[float], sampler: str = "renoise"
    ):
        super().__init__(backbone, adapter)
        self.times, self.sampler = times, sampler

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
                x = self(x_t, t, cond)
                if self.sampler == "renoise":
                    x_t = self.schedule.noise(x, randn_like(x), u)
                else:
                    x_t = self.schedule.ode_step(x, x_t, t, u)
        return self(x_t, self.time(last, noise), cond)

    def time(self, i: int, x: Tensor) -> Tensor:
        """The i-th time of the list for every row of x, [B] float64."""
        return torch.full((len(x),), self.times[i], dtype=torch.float64, device=x.device)


class Player:
    """A named set of parts that one optimizer updates, e.g. critic = fake-score network + discriminator
    heads.
    """

    def __init__(self, name: str, parts: dict[str, Role | nn.Module]):
        self.name, self.parts = name, parts
        self._trainable: dict[str, nn.Parameter] = {}
        for part_name, part in parts.items():
            named = part.trainable() if hasattr(part, "trainable") else dict(part.named_parameters())
            self._trainable.update({f"{part_name}.{n}": p for n, p in named.items()})

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every learned parameter by dotted name; fixed when the player is cast, so turns switch fast."""
        return self._trainable

    def requires_grad_(self, value: bool) -> None:
        for parameter in self.trainable().values():
            parameter.requires_grad_(value)
