"""Exact teachers: denoisers in closed form, and the small network that is distilled from them.

For a Gaussian mixture sum_k w_k N(mu_k, s_k^2 I) noised to x_t = alpha x0 + sigma eps, component k becomes
N(alpha mu_k, V_k I) with V_k = alpha^2 s_k^2 + sigma^2, and

  D(x, t) = sum_k r_k(x) [ mu_k + (alpha s_k^2 / V_k) (x - alpha mu_k) ],   r_k = softmax_k log w_k N(x;
    alpha mu_k, V_k)

s_k = 0 gives point masses, one component a linear-Gaussian teacher. A label restricts the sum to its
components.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError, suggest
from fastgen.core.paths import ANALYTIC
from fastgen.diffusion.schedules import EDM, VP, Flow, Schedule, TrigFlow, expand
from fastgen.networks.codecs import LabelCodec
from fastgen.networks.denoiser import Denoiser
from fastgen.networks.teacher import Teacher


class GaussianMixture(Denoiser):
    """D of a mixture in any dimension; images are [B, D]. labels[k] is the class of component k; null
    class = num_classes.
    """

    prediction = "x0"
    means: Tensor
    stds: Tensor
    weights: Tensor
    labels: Tensor

    def __init__(
        self, means: Tensor, stds: Tensor, weights: Tensor, schedule: Schedule, labels: Tensor | None = None
    ):
        super().__init__()
        self.schedule = schedule
        for name, value in (("means", means), ("stds", stds), ("weights", weights / weights.sum())):
            self.register_buffer(name, value.double())
        self.register_buffer("labels", torch.zeros(len(means)).long() if labels is None else labels)
        self.num_classes = 0 if labels is None else int(labels.max()) + 1
        self._copies: dict[int, MLPDenoiser] = {}

    def _log_weights(self, x: Tensor, cond: Cond) -> Tensor:
        log_w = self.weights.log().expand(len(x), -1)
        if "class_labels" not in cond:
            return log_w
        c = cond["class_labels"][:, None]
        allowed = (self.labels[None] == c) | (c == self.num_classes)
        return log_w.masked_fill(~allowed, -math.inf)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self._posterior(x_t, t, cond)[0]

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, taps=(-1,), score: bool = False):
        """x_t, D and the components' responsibilities as one [B, C, 1, 1] map."""
        D, r = self._posterior(x_t, t, cond)
        return [torch.cat([x_t, D, r.to(x_t)], 1)[..., None, None]], D if score else None

    def _posterior(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """(D, r_k)."""
        x = x_t.double()
        a, s = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        var = a**2 * self.stds**2 + s**2  # [B, K]
        gap = x[:, None] - a[..., None] * self.means  # [B, K, D]
        log_r = self._log_weights(x, cond) - 0.5 * gap.square().sum(-1) / var - 0.5 * x.shape[1] * var.log()
        mean = self.means + (a * self.stds**2 / var)[..., None] * gap
        r = log_r.softmax(1)
        D = (r[..., None] * mean).sum(1)
        return D if x_t.dtype == torch.float64 else D.float(), r

    raw = forward

    def sample(self, num: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Exact draws [num, D] and the label of each."""
        k = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        noise = torch.randn(num, self.means.shape[1], generator=generator, dtype=torch.float64)
        return (self.means[k] + self.stds[k, None] * noise).float(), self.labels[k]

    def trainable_copy(self, steps: int = 600) -> "MLPDenoiser":
        """A network regressed on this teacher, to stand where a copy of the teacher's weights would: the same
        weights at every call.
        """
        if steps not in self._copies:
            self._copies[steps] = self._regressed(steps)
        return copy.deepcopy(self._copies[steps])

    def _regressed(self, steps: int) -> "MLPDenoiser":
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            net = MLPDenoiser(self.means.shape[1], self.schedule, self.num_classes, float(self._data_std()))
        optimizer = torch.optim.Adam(net.parameters(), 2e-3, fused=True)
        generator = torch.Generator().manual_seed(0)
        for k in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * k / steps))
            x0, labels = self.sample(256, generator)
            drop = torch.rand(256, generator=generator) < 0.2
            cond = {"class_labels": labels.masked_fill(drop, self.num_classes)} if self.num_classes else {}
            t = self.schedule.from_unit(0.001 + 0.999 * torch.rand(256, generator=generator))
            x_t = self.schedule.noise(x0, torch.randn(x0.shape, generator=generator), t)
            weight = (1 + (self.schedule.alpha(t) / self.schedule.sigma(t)) ** 2).clamp(max=100).float()
            loss = (weight * (net(x_t, t, cond) - self(x_t, t, cond)).square().mean(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        return net

    def _data_std(self) -> Tensor:
        mean = (self.weights[:, None] * self.means).sum(0)
        return (
            (self.weights[:, None] * (self.means - mean) ** 2).sum(0).mean()
            + (self.weights * self.stds**2).sum()
        ).sqrt()


class MLPDenoiser(Denoiser):
    """A small residual MLP in the preconditioned form D = c_skip x + c_out F(c_in x, log-SNR, label) on
    [B, D] data.
    """

    prediction = "x0"
    freqs: Tensor

    def __init__(
        self, dim: int, schedule: Schedule, num_classes: int = 0, data_std: float = 1.0, width: int = 128
    ):
        super().__init__()
        self.schedule, self.data_std, self.num_classes = schedule, data_std, num_classes
        self.inp = nn.Linear(dim, width)
        self.time = nn.Linear(16, width)
        self.label = nn.Embedding(num_classes + 1, width)
        self.mid = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, dim)
        self.guidance: nn.Linear | None = None
        self.second: nn.Sequential | None = None
        self.register_buffer("freqs", torch.tensor([0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]))

    def add_guidance(self) -> None:
        """Make cond["guidance"] [B] an input; the output does not depend on it yet."""
        if self.guidance is None:
            self.guidance = nn.Linear(1, self.out.in_features, bias=False)
            nn.init.zeros_(self.guidance.weight)

    def add_second_time(self) -> None:
        """Make cond["r"] [B], the end of the step, an input; the output does not depend on it yet."""
        if self.second is None:
            width = self.out.in_features
            first, last = nn.Linear(1, width), nn.Linear(width, width, bias=False)
            self.second = nn.Sequential(first, nn.SiLU(), last)
            nn.init.zeros_(last.weight)
            self.second_time = True

    def _hidden(self, x: Tensor, t: Tensor, phase: Tensor, cond: Cond) -> Tensor:
        waves = phase.to(x.dtype)[:, None] * self.freqs.to(x.dtype)
        h = self.inp(x) + self.time(torch.cat([waves.sin(), waves.cos()], 1))
        h = h + self.label(cond["class_labels"] if "class_labels" in cond else torch.zeros(len(x)).long())
        if self.guidance is not None:
            h = h + self.guidance(cond["guidance"].to(h)[:, None] - 1)
        if self.second is not None:
            gap = torch.zeros(len(x)) if "r" not in cond else self.schedule.gap(t, cond["r"])
            h = h + self.second(gap.to(h)[:, None])
        for layer in self.mid:
            h = h + layer(nn.functional.silu(h))
        return h

    def _coefficients(self, x_t: Tensor, t: Tensor):
        a, s, sd = self.schedule.alpha(t), self.schedule.sigma(t), self.data_std
        total = a**2 * sd**2 + s**2
        return (
            expand(c, x_t) for c in (1 / total.sqrt(), a * sd**2 / total, s * sd / total.sqrt())
        ), torch.atan2(s, a * sd)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        (c_in, c_skip, c_out), phase = self._coefficients(x_t, t)
        net_phase = self._coefficients(x_t, cond["net_t"])[1] if "net_t" in cond else phase
        return c_skip * x_t + c_out * self.out(
            nn.functional.silu(self._hidden(c_in * x_t, t, net_phase, cond))
        )

    raw = forward

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, taps=(-1,), score: bool = False):
        """The last hidden layer as a [B, C, 1, 1] map."""
        (c_in, c_skip, c_out), phase = self._coefficients(x_t, t)
        h = self._hidden(c_in * x_t, t, phase, cond)
        D = c_skip * x_t + c_out * self.out(nn.functional.silu(h)) if score else None
        return [h[..., None, None]], D

    def feature_channels(self) -> list[int]:
        return [self.out.in_features]


def _ring(num: int = 6, radius: float = 1.0, std: float = 0.1):
    angle = torch.arange(num) * 2 * math.pi / num
    return torch.stack([angle.cos(), angle.sin()], 1) * radius, torch.full((num,), std), torch.ones(num)


def _fixed(name: str):
    if name == "gmm2d":
        return (*_ring(), torch.tensor([0, 0, 1, 1, 2, 2]))
    if name == "gaussian":
        return torch.tensor([[0.5]]), torch.tensor([1.0]), torch.ones(1), None
    if name == "points":
        return torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.zeros(2), torch.tensor([0.3, 0.7]), None
    if name == "gmm8d":
        return (
            torch.randn(5, 8, generator=torch.Generator().manual_seed(0)),
            torch.full((5,), 0.3),
            torch.ones(5),
            None,
        )
    known = ("gmm2d", "gaussian", "points", "gmm8d")
    raise UserError(
        "teacher.path",
        f"no analytic teacher {name!r}{suggest(name, known)}",
        f"use one of {', '.join(known)}",
    )


def load_analytic(spec: str):
    """A teacher from "NAME" or "NAME-SCHEDULE", e.g. gmm2d-vp; the schedule defaults to flow."""
    name, _, kind = spec.partition("-")
    schedules: dict[str, Callable[[], Schedule]] = {
        "": Flow,
        "flow": Flow,
        "vp": VP.scaled_linear,
        "edm": EDM,
        "trig": TrigFlow,
    }
    if kind not in schedules:
        raise UserError(
            "teacher.path",
            f"found the schedule {kind!r}",
            f"use one of {', '.join(k for k in schedules if k)}",
        )
    means, stds, weights, labels = _fixed(name)
    mixture = GaussianMixture(means, stds, weights, schedules[kind](), labels)
    codec = LabelCodec((means.shape[1],), num_classes=mixture.num_classes)
    return Teacher(mixture, codec, None, f"{ANALYTIC}{spec}", {})
