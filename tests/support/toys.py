"""Closed-form players for identity tests, and the mixture harness of the P2 rung."""

import pytest
import torch
from torch import nn

from fastgen.core.batch import Batch
from fastgen.core.rng import Rng
from fastgen.diffusion.schedules import EDM, VP, Flow, expand
from fastgen.networks.denoiser import Denoiser
from fastgen.roles.roles import Role, Student, StudentSpec
from fastgen.sampling.solvers import sample_teacher, teacher_grid

SCHEDULES = {"vp": VP.scaled_linear(), "flow": Flow(), "edm": EDM()}
each = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
outputs = pytest.mark.parametrize("kind", ["eps", "v", "flow"])
"""kinds of network output whose error a weighting can stand for"""


class GaussianNet(Denoiser):
    """Exact denoiser of N(m, s^2 I), with m and s learnable; its one-step sample from pure noise is
    affine in the noise.
    """

    prediction = "x0"

    def __init__(self, schedule, m, s):
        super().__init__()
        self.schedule = schedule
        self.m = nn.Parameter(torch.tensor(float(m), dtype=torch.float64))
        self.s = nn.Parameter(torch.tensor(float(s), dtype=torch.float64))

    def forward(self, x_t, t, cond):
        a, sig = (
            c.double() for c in (expand(self.schedule.alpha(t), x_t), expand(self.schedule.sigma(t), x_t))
        )
        return self.m + a * self.s**2 / (a**2 * self.s**2 + sig**2) * (x_t - a * self.m)

    raw = forward


class FlowMap(GaussianNet):
    """Where the probability flow of N(m, s^2 I) leads from x_t: the estimate D whose step ends on it, at
    cond["r"] or at clean data; m and s learnable.
    """

    second_time = False

    def forward(self, x_t, t, cond):
        S, r = self.schedule, cond.get("r", torch.zeros_like(t))
        a, sig, a_r, sig_r = (f(u).double()[:, None] for u in (t, r) for f in (S.alpha, S.sigma))
        if "r" not in cond:
            a_r, sig_r = torch.ones_like(a), torch.zeros_like(sig)
        spread = ((a_r**2 * self.s**2 + sig_r**2) / (a**2 * self.s**2 + sig**2)).sqrt()
        x_r = a_r * self.m + spread * (x_t - a * self.m)
        return (x_r - sig_r / sig * x_t) / (a_r - sig_r / sig * a)

    raw = forward


class PerTime(Denoiser):
    """D(x, t_i) = gain_i x: one free number per grid time."""

    prediction = "x0"

    def __init__(self, schedule, grid):
        super().__init__()
        self.schedule, self.grid = schedule, grid
        self.gain = nn.Parameter(torch.ones(len(grid), dtype=torch.float64))

    def forward(self, x_t, t, cond):
        i = (self.grid[None] - t[:, None]).abs().argmin(1)
        return self.gain[i][:, None] * x_t

    raw = forward


class Constant(Denoiser):
    """D = c for every input."""

    prediction = "x0"

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.c = schedule, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_t, t, cond):
        return self.c.expand_as(x_t)

    raw = forward


class Spy(Role):
    """A role that keeps the arguments and outputs of every call."""

    def __init__(self, backbone):
        super().__init__(backbone)
        self.seen = []

    def __call__(self, x_t, t, cond):
        out = super().__call__(x_t, t, cond)
        self.seen.append((x_t, t, out))
        return out


def captured(monkeypatch, loss, objective, batch, k=0):
    """(pred, target, value) of the first yield, `loss` being the name of the function it calls."""
    from fastgen.diffusion import losses

    seen, original = {}, getattr(losses, loss)

    def spy(pred, target, *rest):
        seen.update(pred=pred, target=target)
        return original(pred, target, *rest)

    monkeypatch.setattr(losses, loss, spy)
    value, _ = next(objective.step(batch, k))
    monkeypatch.setattr(losses, loss, original)
    return seen["pred"], seen["target"], value


def weighed(make, interval: int, weighting: str):
    """Loss with w(t) over the loss without, all samples being in one interval; `make(weighting=...)` is the
    objective.
    """
    x0, found = torch.linspace(-1, 1, 32, dtype=torch.float64)[:, None], []
    for name in (None, weighting):
        objective = make(**({"weighting": name} if name else {}))
        objective.rng.randint = lambda high, num: torch.full((num,), interval)
        objective.rng.reset(0)
        found.append(float(next(objective.step(batch_of(x0), 0))[0].detach()))
    return found[1] / found[0]


def check_weight(make, kind: str):
    """w(t) = (d output / dD)^2, here by finite difference through the schedule's own conversion;
    `make(schedule, net, grid_steps=, weighting=)` is the objective.
    """
    S, one = SCHEDULES["vp"], torch.ones(1, 1, dtype=torch.float64)
    t = torch.tensor([teacher_grid(S, 8)[3]], dtype=torch.float64)
    slope = S.from_x0(kind, one, one, t) - S.from_x0(kind, 0 * one, one, t)
    ratio = weighed(lambda **cfg: make(S, GaussianNet(S, 0.4, 0.9), grid_steps=8, **cfg), 3, kind)
    assert ratio == pytest.approx(float(slope) ** 2, rel=1e-4)
    assert abs(ratio - 1) > 0.05


def fit(objective, draw, steps, lr=0.05):
    """Plain training of a closed-form student; `draw(rng)` makes x0, or the whole batch."""
    params = list(objective.players["student"].trainable().values())
    optimizer = torch.optim.Adam(params, lr)
    for k in range(steps):
        objective.rng.reset(k)
        optimizer.param_groups[0]["lr"] = lr * (1 - k / steps)
        drawn = draw(objective.rng)
        batch = drawn if isinstance(drawn, Batch) else batch_of(drawn)
        for loss, _ in objective.step(batch, k):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


class AffineStudent(Student):
    """x = m + s z whatever the time: the generator of the closed forms."""

    def __init__(self, schedule, m, s):
        super().__init__(GaussianNet(schedule, m, s), None, StudentSpec([schedule.steps(1)[0]]))

    def __call__(self, x_t, t, cond):
        net = self.backbone
        return net.m + net.s * x_t / self.schedule.prior_std(self.times[0])


class CountingRole(Role):
    """A role that counts its calls and notes whether they carried gradient."""

    def __init__(self, backbone):
        super().__init__(backbone)
        self.calls = []

    def __call__(self, x_t, t, cond):
        self.calls.append(torch.is_grad_enabled())
        return super().__call__(x_t, t, cond)


def gaussian_role(schedule, m, s):
    return Role(GaussianNet(schedule, m, s).requires_grad_(False))


def batch_of(x0, noise=None, cond=None):
    noise = torch.randn_like(x0) if noise is None else noise
    return Batch(x0, cond or {}, cond or {}, noise, torch.arange(len(x0)))


def rng(seed=0):
    return Rng(seed)


def run_mixture(
    folder,
    objective,
    teacher="analytic:gmm2d-flow",
    steps=400,
    num_steps=1,
    batch=256,
    lr=1e-3,
    guidance=1.0,
    student=None,
    stages=(),
    critic_lr=None,
    **train,
):
    """Distil an exact mixture by an objective, or by stages of (objective, steps, num_steps); returns (energy
    distance before, after, samples after, its trainer).
    """
    from accelerate import Accelerator

    from fastgen.config.run import validate
    from fastgen.data.loader import load_data
    from fastgen.sampling.solvers import sample_student
    from fastgen.training.assembly import make_cast, make_trainer

    optim = {"lr": lr, "schedule": "cosine", "betas": [0.0, 0.99], "clip": 10}
    optim = {"student": optim, **{n: optim | {"lr": critic_lr or 2 * lr} for n in ("critic", "disc")}}
    one = {"objective": objective, "optim": optim}
    several = [
        {"name": str(i), "objective": o, "max_train_steps": n, "num_steps": few, "optim": optim}
        for i, (o, n, few) in enumerate(stages)
    ]
    cfg = validate(
        {
            "teacher": {"path": teacher, "guidance": guidance},
            "student": {"num_steps": num_steps, **(student or {})},
            **({"stages": several} if stages else one),
            "train": {
                **({} if stages else {"max_train_steps": steps}),
                "train_batch_size": batch,
                "checkpointing_steps": 0,
                "ema_decay": [0.99],
                **train,
            },
        }
    )
    cast = make_cast(cfg)
    trainer = make_trainer(cfg, cast, load_data(cfg.data, cast.teacher), folder, Accelerator(cpu=True))
    codec, mixture = cast.teacher.codec, cast.teacher.backbone
    generator = torch.Generator().manual_seed(7)
    real, labels = mixture.sample(1500, generator)

    def samples():
        cond = codec.labels(labels)
        return sample_student(cast.student, list(range(1500)), codec.shape, cond)

    before = energy_distance(real, samples())
    trainer.fit()
    after = samples()
    return before, energy_distance(real, after), after, trainer


def energy_distance(x, y):
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())


@torch.no_grad()
def distances_by_scale(cast, steps: int, scales) -> tuple[dict[float, float], float]:
    """Energy distance of a student that takes w from guided sampling with its exact teacher, at each scale,
    and that of guided sampling at the first scale from the last.
    """
    codec, student, teacher = cast.teacher.codec, cast.parts["student"], cast.parts["teacher"]
    noise = torch.randn(900, 2, generator=torch.Generator().manual_seed(3))
    cond, uncond = codec.labels(torch.arange(900) % 3), codec.null(900)
    guided = {w: sample_teacher(teacher, noise, cond, uncond, steps, w) for w in scales}
    found = {}
    for w in scales:
        mine = student.with_guidance(w).generate(noise, cond, torch.randn_like)
        found[w] = energy_distance(mine, guided[w])
    return found, energy_distance(guided[scales[0]], guided[scales[-1]])
