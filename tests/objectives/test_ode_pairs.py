"""ODE-pair regression: pairs lie on the teacher's trajectory, are reproducible, and teach its map."""

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import EDM, VP, Flow
from fastgen.objectives.ode_pairs import ODEPairs, ODEPairsConfig
from fastgen.roles.roles import Student, StudentSpec
from fastgen.sampling.solvers import sample_teacher
from tests.support.replay import replay
from tests.support.spelled import World, at_x, gradient, line
from tests.support.toys import CountingRole, GaussianNet, batch_of, gaussian_role, rng, run_mixture

SHORT = {"teacher_steps": 2}
"""settings of the contract battery"""


def make(schedule, steps, **cfg):
    student = Student(GaussianNet(schedule, 0.0, 1.0), None, StudentSpec(schedule.steps(steps)))
    objective = ODEPairs(
        ODEPairsConfig(**cfg), {"student": student, "teacher": gaussian_role(schedule, 0.5, 0.3)}, rng()
    )
    objective.prepare()
    return objective


@pytest.mark.parametrize("S", [Flow(), EDM(), VP.scaled_linear()], ids=["flow", "edm", "vp"])
def test_p1_pair_is_the_teachers_own_sample(S):
    objective = make(S, 1, teacher_steps=10)
    batch = batch_of(torch.randn(5, 2))
    next(objective.step(batch, 0))
    noise = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(i)) for i in range(5)])
    sample = sample_teacher(objective.teacher, noise, {}, {}, 10)
    for i in range(5):
        first, last = objective.pairs.rows[i].float()
        torch.testing.assert_close(first, noise[i] * S.prior_std(S.steps(1)[0]))
        torch.testing.assert_close(last, sample[i].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", ["l2", "huber"])
def test_p1_step_is_the_formula(metric):
    """The state at a random time of the student and the end of the teacher's walk at guidance 3."""
    world = World(ODEPairs, Flow(), [1.0, 0.5], num=16, teacher_steps=4, metric=metric)
    (turn,), (call,) = world.turns(), world.student.calls
    x = torch.stack([world.objective.pairs.rows[i][0] for i in range(16)])  # the noise
    assert len({float(v) for v in x[:, 0]}) == 16 and set(call.t.tolist()) == {1.0, 0.5}
    for t, u in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)):
        torch.testing.assert_close(call.x_t[call.t == t], x[call.t == t], rtol=1e-4, atol=1e-5)
        t, u = (torch.full((16,), v, dtype=torch.float64) for v in (t, u))
        x = line(world.guided(x, t), x, t, u)
    C2 = (0.00054 * 3) ** 2

    def loss(D):
        d2 = (D - x) ** 2
        return d2.mean() if metric == "l2" else (d2.sum(1) + C2).sqrt().mean() / 3**0.5

    torch.testing.assert_close(gradient(turn.loss, call.out), at_x(loss, call.out), rtol=1e-4, atol=1e-6)


def test_p1_huber_constant():
    """sqrt(|d|^2 + C^2) - C with C = 0.00054 dim, over sqrt(dim)."""
    objective, batch = make(Flow(), 1, teacher_steps=1), batch_of(torch.randn(4, 100))
    next(objective.step(batch, 0))
    y = torch.stack([objective.pairs.rows[i][-1] for i in range(4)])
    objective.student.backbone.forward = lambda x, t, cond: y + 1e-3
    loss, _ = next(objective.step(batch, 1))
    assert float(loss) == pytest.approx(((100 * 1e-6 + 0.054**2) ** 0.5 - 0.054) / 10, rel=1e-2)


def test_p1_noise_may_enter_below_the_top_of_the_schedule():
    """A one-step student evaluated at t = 0.6 still gets pure noise, not the state there, half an image."""
    S = Flow()
    student = Student(GaussianNet(S, 0.0, 1.0), None, StudentSpec([0.6]))
    parts = {"student": student, "teacher": gaussian_role(S, 0.5, 0.3)}
    objective = ODEPairs(ODEPairsConfig(teacher_steps=10), parts, rng())
    objective.prepare()
    next(objective.step(batch_of(torch.randn(5, 2)), 0))
    top = make(S, 1, teacher_steps=10)
    next(top.step(batch_of(torch.randn(5, 2)), 0))
    for i in range(5):
        low, high = objective.pairs.rows[i], top.pairs.rows[i]
        torch.testing.assert_close(low[0], high[0] * S.prior_std(0.6) / S.prior_std(1.0))
        torch.testing.assert_close(low[1], high[1])


def test_p1_many_steps_approach_the_exact_flow_map():
    """Gaussian teacher: y = m + s z (EDM from sigma_max, up to the prior's own spread)."""
    S = EDM()
    objective = make(S, 1, teacher_steps=80, solver="heun")
    next(objective.step(batch_of(torch.randn(6, 1)), 0))
    pairs = torch.stack([objective.pairs.rows[i] for i in range(6)])
    exact = 0.5 + (pairs[:, 0] - 0.5) * 0.3 / (0.3**2 + 80.0**2) ** 0.5
    torch.testing.assert_close(pairs[:, 1], exact, rtol=0.02, atol=0.004)


def test_p1_pairs_are_made_once():
    S = Flow()
    objective = make(S, 2, teacher_steps=4)
    objective.teacher = CountingRole(GaussianNet(S, 0.5, 0.3))
    batch = batch_of(torch.randn(5, 2))
    next(objective.step(batch, 0))
    first = len(objective.teacher.calls)
    next(objective.step(batch, 1))
    assert first == 4 and len(objective.teacher.calls) == 4


def test_p1_several_noises_a_condition():
    objective = make(Flow(), 1, teacher_steps=2, noises=3)
    batch = batch_of(torch.randn(5, 2))
    for k in range(20):
        next(objective.step(batch, k))
    assert sorted(objective.pairs.rows) == list(range(15))
    assert len({float(row[0, 0]) for row in objective.pairs.rows.values()}) == 15


def regressed(shuffle):
    """Slope of a one-step student fitted to exact Gaussian pairs, in the noise."""
    S = Flow()
    objective = make(S, 1, teacher_steps=40, metric="l2")
    batch = batch_of(torch.randn(256, 1))
    next(objective.step(batch, 0))
    rows = objective.pairs.rows
    if shuffle:
        ends = torch.stack([rows[i][1] for i in range(256)])[torch.randperm(256)]
        objective.pairs.rows = {i: torch.stack([rows[i][0], ends[i]]) for i in range(256)}
    slope = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    objective.student.backbone.forward = lambda x, t, cond: slope[0] + slope[1] * x
    optimizer = torch.optim.Adam([slope], 0.05)
    for k in range(200):
        loss, _ = next(objective.step(batch, k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return slope.tolist()


def test_p1_regression_finds_the_flow_map_and_shuffled_pairs_only_the_mean():
    mean, slope = regressed(False)
    assert mean == pytest.approx(0.5, abs=0.02) and slope == pytest.approx(0.3, abs=0.03)
    mean, slope = regressed(True)  # negative check
    assert mean == pytest.approx(0.5, abs=0.1) and abs(slope) < 0.1


def test_times_off_the_teachers_grid_are_refused():
    with pytest.raises(UserError, match="not on the teacher's grid of 5 steps"):
        make(Flow(), 4, teacher_steps=5)


@pytest.mark.slow
def test_p2_distils_the_mixture(tmp_path):
    before, after, _, _ = run_mixture(tmp_path, {"name": "ode_pairs"}, steps=400, lr=2e-3)
    assert after < 0.05 and after < before / 2, (before, after)


def test_p4_ode_pairs(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "ode_pairs", "teacher_steps": 4})
