"""BOOT: the signal-ODE and its targets in closed form, on every schedule; the mixture without data."""

import pytest
import torch
from torch import nn

from fastgen.core.errors import UserError
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import EDM, VP, Flow, expand
from fastgen.networks.denoiser import Denoiser
from fastgen.objectives.boot import BOOT, BOOTConfig
from fastgen.roles.roles import Student, StudentSpec
from fastgen.sampling.solvers import sample_teacher
from tests.support.heavier import first_of
from tests.support.replay import replay
from tests.support.spelled import World, at_x, gradient
from tests.support.toys import batch_of, energy_distance, gaussian_role, rng, run_mixture

SHORT = {}
"""settings of the contract battery"""
M, SD = 0.5, 0.3
SCHEDULES = [Flow(), VP.scaled_linear(), EDM()]


class Signal(Denoiser):
    """y_theta: whatever function of (eps, grid position) a test sets."""

    prediction = "x0"

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.gain = schedule, nn.Parameter(torch.ones(()))
        self.y = None

    def forward(self, x_t, t, cond):
        return self.gain * self.y(x_t, cond["net_t"])


def make(S, times=None, **cfg):
    student = Student(Signal(S), None, StudentSpec(times or S.steps(1)))
    return BOOT(BOOTConfig(**cfg), {"student": student, "teacher": gaussian_role(S, M, SD)}, rng())


def exact(S, eps, t):
    """The signal y_t on the exact ODE of N(m, s^2) from x_T = eps: (x - alpha m) / sqrt(V) is constant."""
    T = torch.full_like(t, S.steps(1)[0])
    a, s = (expand(f(t), eps) for f in (S.alpha, S.sigma))
    a_T, s_T = (expand(f(T), eps) for f in (S.alpha, S.sigma))
    x_T = eps * S.prior_std(S.steps(1)[0])
    z = (x_T - a_T * M) / (a_T**2 * SD**2 + s_T**2).sqrt()
    return (a * M + z * (a**2 * SD**2 + s**2).sqrt() - s * eps) / a


def target_of(objective, eps, i, y, monkeypatch):
    """y* of the step in which row n is at level i[n] of 64, its signal being y[n]."""
    objective.rng.randint = lambda high, num: i - 1
    objective.student.backbone.y = lambda x, net_t: torch.cat([y, y])[: len(x)]
    seen, mse = [], losses.mse
    monkeypatch.setattr(losses, "mse", lambda pred, target: (seen.append(target), mse(pred, target))[1])
    next(objective.step(batch_of(y, eps), 0))
    monkeypatch.setattr(losses, "mse", mse)
    return seen[0]


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_p1_step_is_the_formula(solver):
    """Four levels, a told scale: the gradient in y_theta, and the boundary on a quarter of the rows."""
    world = World(BOOT, Flow(), span=(1.0, 5.0), num=16, num_times=4, solver=solver)
    (turn,), (below, call) = world.turns(), world.student.calls
    eps, w = world.batch.noise, call.cond["guidance"][:16].double()
    assert w.std() > 0.5 and torch.equal(below.cond["guidance"], call.cond["guidance"][:16])
    i = ((1 - call.cond["net_t"]) * 4).round()[:16] + 1
    assert set(i.tolist()) == {1.0, 2.0, 3.0, 4.0} and not below.grad
    t, s = i / 4, (i - 1) / 4
    torch.testing.assert_close(below.cond["net_t"], 1 - t)
    assert torch.equal(call.x_t, torch.cat([eps, eps[:4]])) and set(call.t.tolist()) == {1.0}
    assert call.cond["net_t"][16:].tolist() == [0.0] * 4
    y, r = below.out, (s * (1 - t) / (t * (1 - s)))[:, None]
    at = lambda y, t: (1 - t)[:, None] * y + t[:, None] * eps  # noqa: E731
    f = world.guided(at(y, t), t, w)
    target = (1 - r) * f + r * y
    if solver == "heun":
        more = world.guided(at(target, s), s.clamp(min=1e-6), w)
        target = torch.where((i > 1)[:, None], (1 - r) * (f + more) / 2 + r * y, f)
    end = world.guided(eps, torch.ones(16).double(), w)[:4]

    def loss(D):
        return (D[:16] - target.detach()).square().mean() + 0.25 * (D[16:] - end).square().mean()

    torch.testing.assert_close(gradient(turn.loss, call.out), at_x(loss, call.out), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("S", SCHEDULES)
def test_p1_signal_form_is_the_ddim_step(S, monkeypatch):
    """(x_s - sigma_s eps) / alpha_s = (1 - r) f + r y for any y and f."""
    objective = make(S)
    eps, y, f = torch.randn(3, 40, 2, dtype=torch.float64)
    i = torch.arange(40) % 60 + 3
    t, s = S.from_unit(i / 64), S.from_unit((i - 1) / 64)
    object.__setattr__(objective.teacher, "guided", lambda x, *_: torch.cat([f, f])[: len(x)])
    found = target_of(objective, eps, i, y, monkeypatch)
    x_s = S.ode_step(f, S.noise(y, eps, t), t, s)
    expected = (x_s - expand(S.sigma(s), eps) * eps) / expand(S.alpha(s), eps)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("S", SCHEDULES)
def test_p1_targets_follow_the_exact_signal(S, monkeypatch):
    """Gaussian oracle: Heun's local error is a small part of Euler's; a flipped increment is far off."""
    errors = {}
    for solver in ("euler", "heun"):
        objective = make(S, solver=solver)
        i = torch.arange(200) % 50 + 10
        t, s = S.from_unit(i / 64), S.from_unit((i - 1) / 64)
        eps = torch.randn(200, 2, dtype=torch.float64)
        y = exact(S, eps, t)
        found = target_of(objective, eps, i, y, monkeypatch)
        errors[solver] = float((found - exact(S, eps, s)).abs().mean())
        step = float((exact(S, eps, s) - y).abs().mean())
    assert errors["euler"] < 0.15 * step and errors["heun"] < 0.25 * errors["euler"], (errors, step)
    flipped = float((2 * y - found - exact(S, eps, s)).abs().mean())
    assert flipped > 1.5 * step


@pytest.mark.parametrize("S", SCHEDULES)
def test_p1_the_exact_signal_has_hardly_any_loss(S):
    """Told the mirrored time, the oracle meets its targets; the signal of another noise does not."""
    objective = make(S, num_times=256)
    objective.rng.randint = lambda high, num: torch.arange(num) % (high - 6)  # off the noisy end

    def oracle(x_T, net_t):
        u = torch.linspace(0, 1, 257, dtype=torch.float64)
        at = (S.from_unit(1 - u)[None] - net_t[:, None]).abs().argmin(1)
        t = S.from_unit(u[at]).clamp(1e-6, 0.999 * S.t_max)
        return exact(S, x_T / S.prior_std(S.steps(1)[0]), t)

    batch = batch_of(torch.zeros(500, 2, dtype=torch.float64), torch.randn(500, 2, dtype=torch.float64))
    found = {}
    for name, shift in (("right", 0), ("wrong", 1)):
        objective.student.backbone.y = lambda x, net_t, n=shift: oracle(x.roll(n, 0), net_t)
        found[name] = float(next(objective.step(batch, 0))[1]["step"].detach())
    assert found["right"] < 1e-4 and found["wrong"] > 5 * found["right"], found


@pytest.mark.parametrize("S", SCHEDULES)
def test_p1_the_boundary_is_the_teachers_estimate_from_noise(S):
    objective = make(S)
    teacher, T = objective.teacher, torch.full((8,), S.steps(1)[0], dtype=torch.float64)
    x_T = torch.randn(8, 2) * S.prior_std(S.steps(1)[0])
    for off in (0.0, 0.3):
        objective.student.backbone.y = lambda x, net_t, off=off: teacher(x, T[:1].expand(len(x)), {}) + off
        batch = batch_of(x_T, x_T / S.prior_std(S.steps(1)[0]))
        boundary = float(next(objective.step(batch, 0))[1]["boundary"].detach())
        assert boundary == pytest.approx(off**2, abs=1e-6)


def test_p1_the_sample_is_an_ordinary_one_step_draw():
    """y_theta at the clean end is the student's D at (eps, T), given T: what samplers and pipelines do."""
    for S in SCHEDULES:
        objective = make(S)
        times = []
        objective.student.backbone.y = lambda x, net_t: (times.append(net_t), x)[1]  # noqa: B023
        objective.signal(torch.randn(3, 2), torch.zeros(3, dtype=torch.float64), {})
        assert times[0].tolist() == [S.steps(1)[0]] * 3
        objective.signal(torch.randn(3, 2), torch.ones(3, dtype=torch.float64), {})
        assert times[1].tolist() == pytest.approx([S.t_min] * 3)


def test_p1_a_later_start_keeps_the_grid_below_it():
    """VP from 850: the boundary is at time 0, the clean end at 850, every level between them below 850."""
    objective = make(VP.scaled_linear(), [850.0])
    assert objective.time(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0.0, 425.0, 850.0]
    seen = []
    objective.student.backbone.y = lambda x, net_t: (seen.append(net_t), x)[1]
    for u in (1.0, 0.0):
        objective.signal(torch.randn(2, 2), torch.full((2,), u, dtype=torch.float64), {})
    assert [t[0].item() for t in seen] == [0.0, 850.0]


def test_p1_clamp_limits_the_teacher():
    objective = make(Flow(), clamp=0.1)
    batch = batch_of(torch.zeros(8, 2))
    f = objective.estimate(3 * torch.randn(8, 2), torch.full((8,), 0.3).double(), batch, 1.0)
    assert f.abs().max() <= 0.1


@pytest.mark.parametrize("S, times", [(Flow(), [0.9]), (VP.scaled_linear(), [499.0]), (EDM(), [1.0])])
def test_a_start_that_is_not_pure_noise_is_refused(S, times):
    with pytest.raises(UserError, match="is not pure noise") as error:
        make(S, times)
    assert "student.timesteps" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("schedule", first_of(["flow", "vp"]))
def test_p2_distils_the_guided_mixture_without_data(tmp_path, schedule):
    """Against the guided teacher's own samples from the same noise."""
    cfg = {"name": "boot", "num_times": 16}
    steps = {"steps": 350, "lr": 2e-3, "guidance": 1.5}
    _, _, samples, trainer = run_mixture(tmp_path, cfg, f"analytic:gmm2d-{schedule}", **steps)
    cast = trainer.cast
    noise = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(i)) for i in range(1500)])
    labels = cast.teacher.backbone.sample(1500, torch.Generator().manual_seed(7))[1]
    cond, uncond = cast.teacher.codec.labels(labels), cast.teacher.codec.null(1500)
    many, one = (sample_teacher(cast.parts["teacher"], noise, cond, uncond, n, 1.5) for n in (32, 1))
    assert energy_distance(samples, many) < energy_distance(one, many) / 8
    assert (samples - many).square().mean() < (one - many).square().mean() / 4


def test_p4_boot(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "boot"})
