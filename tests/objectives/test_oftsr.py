"""OFTSR: the linear-Gaussian oracle of its flow, the step written out, the knob distilled, the export."""

import pytest
import torch
from PIL import Image
from torch import nn

from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import Flow, expand
from fastgen.networks.denoiser import Denoiser
from fastgen.objectives.oftsr import OFTSR, OFTSRConfig
from fastgen.roles.roles import Role, Student, StudentSpec
from fastgen.sampling.solvers import sample_teacher
from tests.support.replay import plainly, replay
from tests.support.restorer import drawn, restorer_export, restorer_run
from tests.support.toys import Spy, batch_of, fit, rng

SHORT = {}
"""settings of the contract battery"""
A, B = 0.6, 0.5
"""x0 ~ N(0, 1); the flow begins at e = A x0 + B n"""
V0 = A**2 + B**2
SOLVERS = ["euler", "midpoint", "ralston", "heun"]
column = lambda *values: torch.tensor(values, dtype=torch.float64)[:, None]  # noqa: E731


def variance(t):
    """Of x_t."""
    return (1 - t + t * A) ** 2 + t**2 * B**2


class Oracle(Denoiser):
    """E[x0 | x_t] of the flow between x0 and e."""

    prediction = "flow"

    def __init__(self):
        super().__init__()
        self.schedule = Flow()

    def source(self, noise, cond):
        return A * cond["x0"] + B * noise

    def forward(self, x_t, t, cond):
        return expand((1 - t + t * A) / variance(t), x_t) * x_t

    def raw(self, x_t, t, cond):
        return self.schedule.from_x0("flow", self(x_t, t, cond), x_t, t)


def exact(e, t):
    """The student's picture: the walk from e stopped at t, x_t = e sqrt(V(t) / V(1)), read as its signal."""
    return e * expand(((variance(t) / V0).sqrt() - t) / (1 - t), e)


class Exact(Oracle):
    """The exact student, with a factor and an offset to learn."""

    def __init__(self):
        super().__init__()
        self.factor, self.offset = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (1.0, 0.0))

    def forward(self, x_t, t, cond):
        return self.factor * exact(x_t, cond["net_t"].double()) + self.offset


def make(student=None, **cfg):
    spec = StudentSpec([1.0], fidelity=0.01, fidelity_range=(0.01, 0.99))
    parts = {"student": Student(student or Exact(), None, spec), "teacher": Spy(Oracle())}
    return OFTSR(OFTSRConfig(**cfg), parts, rng())


def pairs(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, num, 1, dtype=torch.float64, generator=generator)
    return batch_of(x0, noise, {"x0": x0})


# -- the oracle --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tau", "mse", "var"),
    [(0.01, 0.410, 0.594), (0.3, 0.416, 0.716), (0.6, 0.432, 0.844), (0.99, 0.463, 0.996)],
)
def test_p1_the_knobs_law_in_closed_form(tau, mse, var):
    """Samples of the exact student, drawn by the few-step sampler from the family's own start."""
    batch = pairs(400_000)
    student = make().student.with_fidelity(1 - tau)
    with torch.no_grad():
        y = student.generate(batch.noise, batch.cond, torch.randn_like)
    assert float((y - batch.x0).square().mean()) == pytest.approx(mse, abs=3e-3)
    assert float(y.var()) == pytest.approx(var, abs=5e-3)


def test_p1_the_ends_are_the_posterior_mean_and_the_teachers_walk():
    e = column(1.3)
    batch = batch_of(e, e * 0 + 1.3 / B, {"x0": 0 * e})
    teacher = make().teacher
    walked = sample_teacher(teacher, batch.noise, batch.cond, batch.cond, 4000)
    assert float(walked) == pytest.approx(1.66448, abs=2e-4) == float(exact(e, column(1e-9)[0]))
    first = sample_teacher(teacher, batch.noise, batch.cond, batch.cond, 1)
    assert float(first) == pytest.approx(1.27869, abs=1e-5)  # E[x0 | e]
    assert float(exact(e, column(1 - 1e-7)[0])) == pytest.approx(1.27869, abs=1e-4)


def residual(objective, step):
    """Greatest |x_s - exact| of one step of the teacher from t = 0.7."""
    e, t = column(0.4, -1.0, 1.3), torch.full((3,), 0.7, dtype=torch.float64)
    at = lambda t: e * (variance(t) / V0).sqrt()[:, None]  # noqa: E731
    _, x_s = objective.walked(at(t), t, t - step, {})
    return float((x_s - at(t - step)).abs().max())


@pytest.mark.parametrize("solver", SOLVERS)
def test_p1_the_order_of_the_teachers_step(solver):
    objective = make(solver=solver)
    ratio = residual(objective, 0.08) / residual(objective, 0.04)
    assert ratio == pytest.approx(4, rel=0.05) if solver == "euler" else ratio > 7.5


def test_p1_two_half_steps_are_one():
    """Within the third order of the step; with Euler only the second."""
    found = {}
    for solver in ("euler", "midpoint"):
        objective, x = make(solver=solver), column(1.1, -0.3)
        t = torch.full((2,), 0.6, dtype=torch.float64)
        _, one = objective.walked(x, t, t - 0.1, {})
        _, half = objective.walked(x, t, t - 0.05, {})
        found[solver] = float((objective.walked(half, t - 0.05, t - 0.1, {})[1] - one).abs().max())
    assert found["midpoint"] < 2e-4 and found["euler"] > 10 * found["midpoint"], found


# -- the step ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", SOLVERS)
def test_p1_step_is_the_formula(solver):
    """In the paper's own terms: velocities and tau = 1 - t."""
    objective, batch = make(solver=solver, boundary_weight=0.3, align_weight=0.2), pairs(32)
    net = objective.student.backbone
    net.factor.data.fill_(1.2)
    seen = Spy(net)
    for name in ("times", "time"):
        object.__setattr__(seen, name, getattr(objective.student, name))
    objective.student = seen
    loss, logs = next(objective.step(batch, 0))
    e = (A * batch.cond["x0"] + B * batch.noise).repeat(3, 1)
    ((x_T, T, y),) = seen.seen
    assert torch.equal(x_T, e) and set(T.tolist()) == {1.0}, "the start is fed, never x_tau"
    x0, e = e[:32], e[:32]
    tau = 1 - objective.teacher.seen[0][1][:, None]
    d, v = 0.05, lambda x, tau: objective.teacher.backbone.raw(x, 1 - tau[:, 0], {}) * -1
    assert float(tau.min()) >= 0.01 and float(tau.max()) <= 0.94 and float(tau.std()) > 0.15
    v_tau, v_s, v_first = (part - e for part in y.detach().chunk(3))
    x = x0 + tau * v_tau
    k1 = v(x, tau)
    r = {"euler": 1.0, "midpoint": 0.5, "ralston": 2 / 3, "heun": 1.0}[solver]
    k2 = k1 if solver == "euler" else v(x + r * d * k1, tau + r * d)
    target = (tau * v_tau + d * (k1 + (k2 - k1) / (2 * r))) / (tau + d)
    distil = (v_s - target).abs().mean()
    boundary = (v_first - v(x0, torch.full_like(tau, 0.01))).abs().mean()
    align = ((1 - tau) * (v_tau - k1)).abs()  # x0 + v_phi is x + (1 - tau) v_phi
    assert float(logs["distil"].detach()) == pytest.approx(float(distil), rel=1e-6)
    assert float(logs["boundary"].detach()) == pytest.approx(float(boundary), rel=1e-6)
    assert float(logs["align"].detach()) == pytest.approx(float(align.mean()), rel=1e-6)
    assert float(loss.detach()) == pytest.approx(
        float(distil + 0.3 * boundary + 0.2 * align.mean()), rel=1e-6
    )
    assert float(distil) > 1e-3


def test_p1_what_the_teacher_makes_is_a_constant():
    """The gradient is that of |y_s - y*| in y_s alone, though y* is walked to from the student's own y_t."""
    objective, batch = make(boundary_weight=0.0, align_weight=0.0), pairs(64)
    net = objective.student.backbone
    net.factor.data.fill_(1.2)
    seen, signal = [], objective.signal
    objective.signal = lambda *given: (seen.append((given[1], signal(*given))), seen[0][1])[1]
    loss, _ = next(objective.step(batch, 0))
    loss.backward()
    (times, y), e = seen[0], A * batch.cond["x0"] + B * batch.noise
    (t, s, _), (y_t, y_s, _) = times.chunk(3), y.detach().chunk(3)
    _, x_s = objective.walked(objective.schedule.noise(y_t, e, t), t, s, {})
    target = (x_s - expand(s, e) * e) / expand(1 - s, e)
    expected = ((y_s - target).sign() * exact(e, s)).mean()
    assert float(net.factor.grad) == pytest.approx(float(expected), rel=1e-6)


def test_p1_eulers_target_is_boots():
    """(1 - r) f + r y with r = n_s / n_t, the start in the place of the noise."""
    objective, S = make(solver="euler"), Flow()
    e, y = column(0.3, -1.2), column(0.9, 0.4)
    t, s = column(0.8, 0.5)[:, 0], column(0.7, 0.45)[:, 0]
    f, x_s = objective.walked(S.noise(y, e, t), t, s, {})
    r = (s / (1 - s) * (1 - t) / t)[:, None]
    torch.testing.assert_close((x_s - s[:, None] * e) / (1 - s)[:, None], (1 - r) * f + r * y)


def logged(objective, batch):
    return {k: float(v.detach()) for k, v in next(objective.step(batch, 0))[1].items()}


def test_p1_the_exact_student_has_hardly_any_loss(monkeypatch):
    """Of distillation and boundary; one that is fed x_tau instead of the start has much of it."""
    batch = pairs(2000)
    right = logged(make(), batch)
    assert right["distil"] < 1e-4 and right["boundary"] < 4e-3, right
    objective = make()

    def at_x_tau(e, t, cond):
        start = e.repeat(len(t) // len(e), 1)
        return exact(start * (variance(t) / V0).sqrt()[:, None], t)

    monkeypatch.setattr(objective, "signal", at_x_tau)
    assert logged(objective, batch)["distil"] > 30 * right["distil"]


def test_p1_the_exact_student_does_not_align():
    """(1 - tau) |v* - v(x_tau, tau)| is above zero: the paths are not straight."""
    found = logged(make(), pairs(2000))["align"]
    objective = make()
    e = pairs(2000)
    e = A * e.cond["x0"] + B * e.noise
    t = 0.06 + 0.93 * torch.rand(2000, dtype=torch.float64)
    x = e * (variance(t) / V0).sqrt()[:, None]
    expected = (exact(e, t) - objective.teacher(x, t, {})).abs().mean()
    assert found == pytest.approx(float(expected), rel=0.1) and found > 0.02


def test_p1_the_boundary_is_the_teachers_first_estimate():
    for off in (0.0, 0.3):
        objective = make()
        objective.student.backbone.offset.data.fill_(off)
        objective.signal = lambda e, t, cond, off=off, o=objective: torch.cat(
            [exact(e.repeat(2, 1), t[: 2 * len(e)]), o.first(e, t[2 * len(e) :], cond) + off]
        )
        assert logged(objective, pairs(16))["boundary"] == pytest.approx(off, abs=1e-9)


def test_p1_times_are_where_they_should_be():
    objective = make(low=0.2, high=0.8, step=0.1)
    seen, signal = [], objective.signal
    objective.signal = lambda e, t, cond: (seen.append(t), signal(e, t, cond))[1]
    next(objective.step(pairs(4000), 0))
    t, s, high = seen[0].chunk(3)
    torch.testing.assert_close(s, t - 0.1)
    assert set(high.tolist()) == {0.8}
    assert 0.3 <= float(t.min()) < 0.31 and 0.79 < float(t.max()) <= 0.8


class Learns(Oracle):
    """y = w(t) e with a small network of t."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)).double()

    def forward(self, x_t, t, cond):
        return (1 + self.net(cond["net_t"].double()[:, None])) * x_t


def learned(steps=500, **cfg):
    objective = make(Learns(), **cfg)
    fit(objective, lambda r: pairs(128, int(r.randint(10**6, 1))), steps, lr=0.02)
    batch, found = pairs(20_000, 1), {}
    for tau in (0.01, 0.3, 0.6, 0.99):
        with torch.no_grad():
            y = objective.student.with_fidelity(1 - tau).generate(batch.noise, batch.cond, torch.randn_like)
        found[tau] = float((y - batch.x0).square().mean()), float(y.var())
    return found


def test_p2_distils_the_knob():
    """The least squared error rises and the variance goes to that of the data, as in closed form."""
    found = learned()
    errors, spreads = zip(*found.values())
    assert list(errors) == sorted(errors) and list(spreads) == sorted(spreads), found
    assert spreads[0] == pytest.approx(0.594, abs=0.03) and spreads[-1] == pytest.approx(0.996, abs=0.06)
    assert errors[0] == pytest.approx(0.410, abs=0.015) and errors[-1] == pytest.approx(0.463, abs=0.02)


def test_p2_much_alignment_leaves_the_walk():
    """Alone it is met by y = E[x0 | x_t] at the y of x_t itself: e / A at the end, beyond the data."""
    found = learned(align_weight=30.0)
    assert found[0.99][1] > 1.4 and abs(found[0.99][1] - V0 / A**2) < 0.3, found


# -- P4 and mistakes ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return restorer_export(tmp_path_factory.mktemp("oftsr"))


@pytest.mark.parametrize("fidelity", [None, 0.6])
def test_p4_the_cards_own_code_restores_the_same_picture(export, tmp_path, fidelity):
    """The code in the export's card, where fastgen cannot be imported."""
    card = (export / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert "fastgen" not in code and "fidelity = 0.01" in code
    code = code if fidelity is None else code.replace("fidelity = 0.01", f"fidelity = {fidelity}")
    theirs = plainly(code + "\nimages = pixels[None].float()\n", export)[0].permute(1, 2, 0).round().long()
    mine = drawn(export, tmp_path / "out", *([] if fidelity is None else ["--fidelity", str(fidelity)]))
    assert (theirs - mine).abs().max() <= 1
    assert fidelity is None or (drawn(export, tmp_path / "out") - mine).abs().max() > 1, (
        "the knob does nothing"
    )


@pytest.mark.parametrize("colours", [1, 3])
def test_p4_the_teachers_card_walks_as_we_do(tmp_path, colours):
    """A teacher trained by sft, of colour and of grey pictures: the loop of its card."""
    done, folder = restorer_run(tmp_path, colours=colours, objective={"name": "sft", "cond_dropout": 0.0})
    assert done == 0
    Image.linear_gradient("L").resize((4, 4)).convert("RGB").save(folder / "image.png")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    theirs = plainly(code + "\nimages = pixels[None].float()\n", folder)[0].permute(1, 2, 0).round().long()
    assert (theirs.squeeze(-1) - drawn(folder, tmp_path / "out")).abs().max() <= 1


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"objective": {"name": "oftsr", "step": 0.99}}, "objective.step"),
        ({"student": {"fidelity": 0.001}}, "student.fidelity"),
        ({"student": {"fidelity": 0.5}, "objective": {"name": "dmd2"}}, "student.fidelity"),
        ({"student": {"num_steps": 2}}, "student.num_steps"),
    ],
)
def test_mistakes_in_the_config(change, key):
    values = {"teacher": {"path": "x"}, "objective": {"name": "oftsr"}, "data": {"name": "tinted"}}
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        validate({**values, **change})


def test_a_later_start_is_refused():
    with pytest.raises(UserError, match="student.timesteps"):
        OFTSR(
            OFTSRConfig(),
            {"student": Student(Exact(), None, StudentSpec([0.9])), "teacher": Role(Oracle())},
            rng(),
        )


def test_p4_oftsr_of_a_teacher_that_begins_at_noise(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "oftsr"})
