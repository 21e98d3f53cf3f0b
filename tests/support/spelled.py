"""A step spelled out: roles that note every call, so that a test can write the loss from its paper's formula.

`World` puts a method among small closed-form networks whose answer depends on the class, on the guidance they
are told and on the time; the teacher is followed at guidance 3. Tests take x_t and t from what a network was
shown, and everything else from the formula.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.core.batch import Batch
from fastgen.core.rng import Rng
from fastgen.diffusion.schedules import Flow, Schedule, expand
from fastgen.objectives.base import Objective
from fastgen.roles.roles import Role, Student, StudentSpec
from tests.support.toys import GaussianNet

GUIDANCE = 3.0
NEAR, FAR = {"low": 0.3, "high": 0.4}, {"low": 0.7, "high": 0.8}
"""two ranges of time that do not meet, so that a test sees which of two settings a time is drawn by"""

TOLD = {"guidance": 0.1, "r": 0.2, "net_t": 0.3}


class Classes(GaussianNet):
    """Exact denoiser of N(m + c + told, s^2): c the class, 0 the null one, told a mixture of what else some
    networks read. Its native prediction is the flow, so that the weight of a native error is not 1.
    """

    prediction = "flow"

    def forward(self, x_t, t, cond):
        zero = torch.zeros(1)
        shift = cond["class_labels"].double() + sum(
            share * cond.get(name, zero).double() for name, share in TOLD.items()
        )
        shift = shift.reshape(-1, *[1] * (x_t.ndim - 1))
        return super().forward(x_t.double() - expand(self.schedule.alpha(t), x_t) * shift, t, {}) + shift

    raw = forward


class TwoTimes(Classes):
    """The same, which also reads where its step ends."""

    second_time = True


class Call(NamedTuple):
    """One call of a network."""

    x_t: Tensor
    t: Tensor
    cond: dict
    out: Tensor
    grad: bool


class Heard(Role):
    """A role that notes its calls."""

    def __init__(self, backbone, *rest):
        super().__init__(backbone, *rest)
        self.calls: list[Call] = []

    def __call__(self, x_t, t, cond):
        out = super().__call__(x_t, t, cond)
        self.calls.append(Call(x_t, t, cond, out, torch.is_grad_enabled()))
        return out


class HeardStudent(Heard, Student):
    """A student that notes its calls."""

    def __init__(self, backbone, times, sampler="renoise", span=None):
        Student.__init__(self, backbone, None, StudentSpec(times, sampler, guidance_range=span))
        self.calls = []


class Tape(Rng):
    """Random numbers that remember the normal ones."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.drawn: list[Tensor] = []

    def randn(self, *shape):
        self.drawn.append(super().randn(*shape))
        return self.drawn[-1]


class Judge(nn.Module):
    """A discriminator with one logit, a . x_t + t + class / 2, and the critic's D from the same pass."""

    def __init__(self, critic=None, dim=3):
        super().__init__()
        self.a = nn.Parameter(torch.linspace(-0.7, 0.9, dim, dtype=torch.float64))
        self.critic, self.seen = [critic], []

    def forward(self, x_t, t, cond, score=False):
        self.seen.append((x_t, t, cond))
        logits = [self.logit(x_t, t, cond)]
        return (logits, self.critic[0](x_t, t, cond)) if score else logits

    def logit(self, x_t, t, cond):
        return (x_t * self.a).sum(1) + t + 0.5 * cond["class_labels"].double()


class Turn(NamedTuple):
    """One loss that a step yields, with its gradient on the active player's parameters."""

    player: str | None
    loss: Tensor
    logs: dict
    grads: dict[str, Tensor]


def turns(objective: Objective, batch: Batch, k: int = 0) -> list[Turn]:
    """All turns of a step; a gradient in another player than the active one fails."""
    found = []
    for loss, logs in objective.step(batch, k):
        loss.backward(retain_graph=True)
        grads = {}
        for name, player in objective.players.items():
            for key, p in player.trainable().items():
                if p.grad is not None:
                    assert name == objective.active, f"{key} has a gradient in {objective.active}'s turn"
                    grads[key], p.grad = p.grad.clone(), None
        found.append(Turn(objective.active, loss, logs, grads))
    return found


class World:
    """A method among noting networks, and a batch of labelled rows with their null conditions."""

    def __init__(
        self,
        method: type[Objective],
        schedule: Schedule | None = None,
        times: list[float] | None = None,
        sampler: str = "renoise",
        span: tuple[float, float] | None = None,
        num: int = 8,
        student: nn.Module | None = None,
        parts: dict[str, Any] | None = None,
        **cfg,
    ):
        S = self.schedule = schedule or Flow()
        torch.manual_seed(5)
        self.student = HeardStudent(student or Classes(S, -0.6, 0.4), times or S.steps(1), sampler, span)
        self.critic = Heard(Classes(S, -0.3, 0.6))
        self.teacher = Heard(Classes(S, 0.5, 1.0).requires_grad_(False))
        self.disc = Judge(self.critic)
        x0, noise = torch.randn(2, num, 3, dtype=torch.float64)
        labels = torch.arange(num) % 2 + 1
        self.batch = Batch(
            x0, {"class_labels": labels}, {"class_labels": 0 * labels}, noise, torch.arange(num)
        )
        self.tape = Tape()
        everyone = {
            "student": self.student,
            "critic": self.critic,
            "teacher": self.teacher,
            "disc": self.disc,
        }
        self.objective = method(
            method.config(**cfg), {**everyone, **(parts or {})}, self.tape, 1.0 if span else GUIDANCE
        )
        self.objective.prepare()

    def turns(self, k: int = 0) -> list[Turn]:
        """All turns of a step; a loss of another player that is a function of the student fails."""
        found = turns(self.objective, self.batch, k)
        drawn = [call.out for call in self.student.calls if call.out.requires_grad]
        for turn in found:
            if turn.player != "student" and drawn and "student" in self.objective.players:
                back = torch.autograd.grad(turn.loss, drawn, retain_graph=True, allow_unused=True)
                assert back == (None,) * len(drawn), f"the {turn.player}'s loss reaches the student"
        return found

    def guided(
        self, x_t: Tensor, t: Tensor, w: float | Tensor = GUIDANCE, role: Role | None = None
    ) -> Tensor:
        """D_uncond + w (D_cond - D_uncond) by the network itself, unheard."""
        net = (role or self.teacher).backbone
        D, null = (net(x_t, t, cond) for cond in (self.batch.cond, self.batch.uncond))
        return null + (w[:, None] if isinstance(w, Tensor) else w) * (D - null)

    def shown(self, role: Heard, i: int = 0) -> tuple[Tensor, Tensor]:
        """(x_t, t) of a role's i-th call, of one row each where it was a guided pair."""
        call, num = role.calls[i], len(self.batch.noise)
        return call.x_t[:num], call.t[:num]

    def noise_in(self, x_t: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """eps of x_t = alpha x + sigma eps, which must be one of the draws."""
        S = self.schedule
        eps = ((x_t - expand(S.alpha(t), x_t) * x) / expand(S.sigma(t), x_t)).detach()
        drawn = [d for d in self.tape.drawn if d.shape == eps.shape]
        assert any(torch.allclose(d.double(), eps, atol=1e-4) for d in drawn), "not x noised to this time"
        return eps

    def noises(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(e_T^w, e_F): the noise in x_t by the guided teacher and by the critic."""
        estimates = self.guided(x_t, t), self.guided(x_t, t, 1.0, self.critic)
        real, fake = (self.schedule.from_x0("eps", D, x_t, t) for D in estimates)
        return real, fake

    def gan_of(self, weight: float, eps: Tensor, t: Tensor):
        """weight mean softplus(-Disc(alpha x + sigma eps)) as a function of samples x."""

        def gan(x: Tensor) -> Tensor:
            logit = self.disc.logit(self.schedule.noise(x, eps, t), t, self.batch.cond)
            return weight * torch.nn.functional.softplus(-logit).mean()

        return gan

    def within(self, t: Tensor, window: dict) -> None:
        """t is drawn by these settings of time."""
        low, high = (float(self.schedule.from_unit(torch.tensor(window[k]))) for k in ("low", "high"))
        assert low - 1e-6 <= t.min() and t.max() <= high + 1e-6, (t, window)

    def score_gradient(self, x: Tensor, weight, window: dict = NEAR, i: int = 0) -> Tensor:
        """d loss / d x [B, ...] of a score distillation at what the teacher was shown by its i-th call:
        weight(x, real, t) (D_fake - D_real^w) / numel.
        """
        x_t, t = self.shown(self.teacher, i)
        self.within(t, window)
        self.noise_in(x_t, t, x)
        real, fake = self.guided(x_t, t), self.critic.backbone(x_t, t, self.batch.cond)
        return (weight(x, real, t) * (fake - real) / x.numel()).detach()

    def native(self, t: Tensor) -> Tensor:
        """((alpha + sigma) / sigma)^2 [B], which makes an error of D one of a flow."""
        S = self.schedule
        return ((S.alpha(t) + S.sigma(t)) / S.sigma(t)) ** 2

    def check_critic(self, turn: Turn, x: Tensor, weight=lambda t: 1.0, window: dict = FAR) -> Tensor:
        """The critic's turn is mean weight(t) w(t) |D_fake(x_t) - sg x|^2; returns what else its loss has."""
        assert turn.player == "critic"
        call = self.critic.calls[-1]
        self.within(call.t, window)
        self.noise_in(call.x_t, call.t, x)
        w = (weight(call.t) * self.native(call.t))[:, None]
        denoising = (w * (call.out - x.detach()) ** 2).mean()
        torch.testing.assert_close(turn.logs["denoising"], denoising)
        assert {name.split(".")[0] for name in turn.grads} >= {"critic"}
        return (turn.loss - denoising).detach()


def line(D: Tensor, x_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """The DDIM step of a flow from t to u: the straight line through x_t and D."""
    share = (u / t).reshape(-1, *[1] * (x_t.ndim - 1))
    return (1 - share) * D + share * x_t


def dmd_weight(x: Tensor, real: Tensor, t: Tensor) -> Tensor:
    """1 / mean |x - D_real| per sample (DMD, eq. 8)."""
    return 1 / (x - real).abs().mean(1, keepdim=True)


def at_x(formula, x: Tensor) -> Tensor:
    """The gradient of formula(x) at x."""
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(formula(leaf), leaf)[0]


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    """d loss / d x of what a step yielded."""
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def softplus_pair(fake: Tensor, real: Tensor) -> Tensor:
    """The discriminator's loss."""
    return F.softplus(fake).mean() + F.softplus(-real).mean()
