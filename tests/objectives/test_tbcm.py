"""TBCM: points on the teacher's trajectory, no call wasted, sCM's loss there; the mixture without data."""

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.diffusion.reparametrization import TrigView
from fastgen.diffusion.schedules import EDM, VP, Flow
from fastgen.objectives.tbcm import TBCM, TBCMConfig
from fastgen.roles.roles import Student, StudentSpec
from tests.objectives.test_scm import PLAIN, S0, SD, FlowMapNet, alg_1, trig
from tests.support.replay import replay
from tests.support.spelled import NEAR, World, at_x, gradient
from tests.support.toys import CountingRole, GaussianNet, batch_of, rng, run_mixture

SHORT = {"points": 2, "scm": {"name": "scm", "warmup_steps": 2}}
"""settings of the contract battery"""
SCHEDULES = pytest.mark.parametrize("S", [Flow(), EDM(), VP.scaled_linear()])


def make(S, net=None, points=6, **scm):
    scm = {"name": "scm", "sigma_data": 1.0, **PLAIN, **scm}
    student = Student(net or FlowMapNet(S), None, StudentSpec(S.steps(1)))
    teacher = CountingRole(GaussianNet(S, 0.0, S0).requires_grad_(False))
    return TBCM(TBCMConfig(points=points, scm=scm), {"student": student, "teacher": teacher}, rng())


def batch_without_data(num=64):
    z = torch.randn(num, 1, dtype=torch.float64)
    batch = batch_of(z, z)
    batch.x0 = None
    return batch


@SCHEDULES
def test_p1_points_lie_on_the_teachers_trajectory_at_one_call_each(S):
    """Gaussian data: on the exact ODE x_t / sqrt(V_t) is constant, which many points come close to; times
    descend from T; d is the exact velocity.
    """
    objective = make(S, points=200)
    batch = batch_without_data(16)
    x, t, d = (v.reshape(200, 16, *v.shape[1:]) for v in objective.walk(batch, 1.0))
    assert len(objective.teacher.calls) == 200
    assert (t[:-1] >= t[1:]).all()
    assert torch.equal(t[0], TrigView(S, 1.0).time(torch.full((16,), S.steps(1)[0]).double()))
    spread = (t.cos() ** 2 * S0**2 + t.sin() ** 2).sqrt()[..., None]
    straight = x / spread
    assert (straight - straight[0]).abs().max() < 0.05 * straight.abs().max()
    exact = x * (t.sin() * t.cos() * (1 - S0**2))[..., None] / spread**2
    torch.testing.assert_close(d, exact, rtol=1e-4, atol=1e-4)


def test_p1_few_points_are_the_teachers_ddim_sampler():
    """At K = 2 the second point is the teacher's one DDIM step from pure noise to the drawn time."""
    S = Flow()
    objective = make(S, points=2)
    batch = batch_without_data(32)
    (x0, x1), (t0, t1), _ = (v.reshape(2, 32, *v.shape[1:]) for v in objective.walk(batch, 1.0))
    torch.testing.assert_close(x0, batch.noise)
    view = TrigView(S, 1.0)
    start, scale0 = view.trig.map_to(S, t0)
    tau, scale1 = view.trig.map_to(S, t1)
    D = objective.teacher(x0 * scale0[:, None], start, {})
    expected = S.ode_step(D, x0 * scale0[:, None], start, tau) / scale1[:, None]
    torch.testing.assert_close(x1, expected, rtol=1e-4, atol=1e-4)


@SCHEDULES
def test_p1_no_loss_at_the_flow_map(S):
    """The exact consistency function has no tangent anywhere on the trajectories; a wrong one has."""
    batch = batch_without_data()
    right = float(next(make(S).step(batch, 1))[0].detach())
    wrong = float(next(make(S, FlowMapNet(S, 0.5)).step(batch, 1))[0].detach())
    assert right < 1e-6 and wrong > 100 * right + 1e-4, (right, wrong)


def test_p1_step_is_the_formula():
    """Three points of a walk that starts at noise, and Alg. 1 at each, told the scale of its row."""
    scm = {"name": "scm", "sigma_data": SD, "time": NEAR, "warmup_steps": 10, "adaptive": False}
    world = World(TBCM, Flow(), span=(1.0, 5.0), points=3, scm=scm)
    world.batch.x0 = None
    (turn,), call = world.turns(5), world.student.calls[-1]
    w = world.student.calls[-1].cond["guidance"].double().reshape(3, 8)
    assert torch.equal(w[0], w[2]) and w[0].std() > 0.5
    labels = call.cond["class_labels"].reshape(3, 8)
    assert torch.equal(labels[1], world.batch.cond["class_labels"])
    states, taus = call.x_t.reshape(3, 8, 3), call.t.reshape(3, 8)
    assert (taus[0] > 0.999).all() and (taus[1] >= taus[2]).all()
    world.within(taus[1:], NEAR)
    x, real = world.batch.noise * SD, []
    for i, tau in enumerate(taus):
        t, c = trig(tau)
        torch.testing.assert_close(states[i], c[:, None] * x, rtol=1e-4, atol=1e-5)
        real.append(world.guided(states[i], tau, w[0]))
        d = (t.cos()[:, None] * x - real[-1]) / t.sin()[:, None]
        if i < 2:
            gap = (t - trig(taus[i + 1])[0])[:, None]
            x = gap.cos() * x - gap.sin() * d
    formula = alg_1(world.student.backbone, call.cond, call.x_t, call.t, torch.cat(real), 0.5)
    wanted = at_x(formula, call.out)
    torch.testing.assert_close(gradient(turn.loss, call.out), wanted, rtol=1e-3, atol=1e-6)


def test_training_without_a_teacher_is_refused():
    with pytest.raises(UserError, match=r"objective.scm.mode: found 'training'"):
        make(Flow(), mode="training")


@pytest.mark.slow
def test_p2_distils_the_mixture_without_data(tmp_path):
    scm = {"sigma_data": 0.7, "warmup_steps": 100, "weighting": "uniform"}
    scm |= {"name": "scm", "time": {"kind": "log_normal", "mean": -0.4, "std": 1.6}}
    cfg = {"name": "tbcm", "points": 6, "scm": scm}
    before, after, _, _ = run_mixture(tmp_path, cfg, steps=300, batch=64, lr=1e-3)
    assert after < 0.03 and after < before / 4, (before, after)


def test_p4_tbcm(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "tbcm", **SHORT})
