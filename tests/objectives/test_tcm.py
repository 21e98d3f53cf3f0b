"""TCM: who answers on each side of the boundary, the heavy tail, and the second stage on the mixture."""

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import EDM, Flow
from fastgen.objectives.ect import noise_level
from fastgen.objectives.tcm import TCM, TCMConfig
from fastgen.roles.roles import Student, StudentSpec
from tests.support.replay import replay
from tests.support.spelled import Classes, Heard, World, at_x, gradient
from tests.support.toys import GaussianNet, batch_of, gaussian_role, rng, run_mixture

SHORT = {}
"""settings of the contract battery"""


def make(S=None, times=None, **cfg):
    S = S or EDM()
    student = Student(GaussianNet(S, 0.0, 1.0), None, StudentSpec(times or S.steps(1)))
    parts = {
        "student": student,
        "previous": gaussian_role(S, 0.5, 0.3),
        "teacher": gaussian_role(S, 0.5, 0.3),
    }
    return TCM(TCMConfig(**cfg), parts, rng())


def test_p1_levels_hold_the_boundary_and_a_heavy_tail():
    objective = make()
    n, weight = objective.levels(40_000)
    assert (n[:10_000] == 1 + 1e-8).all() and n.min() >= 1 and n.max() <= 80.0001
    log_n = n[10_000:].log()
    grid = torch.linspace(0, float(torch.tensor(80.0).log()), 200_001, dtype=torch.float64)
    density = (1 + (grid / 0.2) ** 2 / 0.01) ** (-0.505)
    for level in (0.05, 0.5, 1.0, 3.0):  # the law's own distribution function
        share = float(density[grid < level].sum() / density.sum())
        assert float((log_n < level).double().mean()) == pytest.approx(share, abs=0.01)
    ones = torch.ones_like(weight)
    assert float((weight * ones).mean()) == pytest.approx(1 + 0.1)  # mean of the rest + 0.1 boundary's


@pytest.mark.parametrize("source", ["data", "teacher"])
def test_p1_step_is_the_formula(source):
    """A quarter of the rows at the boundary, with their weight; f- for the rows whose r lies below it."""
    previous = Heard(Classes(EDM(), 0.2, 0.9).requires_grad_(False))
    cfg = {"source": source, "gap": 0.02, "boundary_weight": 0.3}
    world = World(TCM, EDM(), num=32, parts={"previous": previous}, **cfg)
    world.student.backbone.m.data.fill_(0.7)
    world.objective.follow = lambda name: None  # f- and the student apart, as later in the stage
    (turn,), call = world.turns(), world.student.calls[-1]
    x_t, t, x0 = call.x_t, call.t, world.batch.x0
    world.noise_in(x_t, t, x0)
    r = t * (1 - 0.02 * (1 + 8 * torch.sigmoid(-t)))
    below = r < 1
    torch.testing.assert_close(t[:8], torch.ones(8).double())
    assert below[:8].all() and (~below).sum() > 0
    D = x0 if source == "data" else world.guided(x_t, t)
    x_r, cond = D + (r / t)[:, None] * (x_t - D), world.batch.cond
    answers = (net(x_r, r, cond) for net in (previous.backbone, world.student.backbone))
    target = torch.where(below[:, None], *answers).detach()
    weight = torch.where(torch.arange(32) < 8, 0.3 * 32 / 8, 32 / 24).double() / (t - r)
    wanted = at_x(lambda y: (weight * (y - target).norm(dim=1) / 3**0.5).mean(), call.out)
    torch.testing.assert_close(gradient(turn.loss, call.out), wanted, rtol=1e-3, atol=1e-5)
    (alone,) = torch.autograd.grad(call.out, world.student.backbone.m, wanted)
    torch.testing.assert_close(turn.grads["student.m"], alone, rtol=1e-3, atol=1e-5)  # none by the target


def test_p1_the_frozen_network_answers_below_the_boundary_only():
    objective = make()
    x, t = torch.randn(6, 2), torch.linspace(0.3, 3, 6).double()
    below = noise_level(objective.schedule, t) < 1
    found = objective.target(x, t, {}, below)
    torch.testing.assert_close(found[below], objective.previous(x, t, {})[below].float())
    torch.testing.assert_close(found[~below], objective.student(x, t, {})[~below].float())
    assert below.any() and not below.all()


def test_p1_no_level_below_the_boundary_is_trained():
    S = EDM()
    objective = make(S, gap=0.3)
    seen = []
    inner = objective.student.backbone.forward
    objective.student.backbone.forward = lambda x, t, cond: (seen.append(t), inner(x, t, cond))[1]
    next(objective.step(batch_of(torch.randn(256, 2)), 0))
    assert torch.cat(seen).min() >= 1


def test_p1_stage_one_is_kept_as_it_was():
    objective = make()
    objective.student.backbone.m.data.fill_(2.0)
    next(objective.step(batch_of(torch.randn(8, 2)), 0))
    objective.student.backbone.m.data.fill_(3.0)
    next(objective.step(batch_of(torch.randn(8, 2)), 1))
    assert float(objective.previous.backbone.m) == 2.0


def test_p1_teacher_source_steps_along_its_ode():
    """With the exact student of the teacher's law, steps along the ODE beat pairs of shared noise."""
    x0 = 0.5 + 0.3 * torch.randn(512, 2, dtype=torch.float64)

    def flow_map(x, t, cond):  # the exact consistency function of N(0.5, 0.3^2)
        return 0.5 + (x - 0.5) * (0.3 / (0.3**2 + t**2).sqrt())[:, None]

    found = {}
    for source in ("data", "teacher"):
        objective = make(source=source)
        objective.follow = lambda name: None
        objective.student.backbone.forward = objective.previous.backbone.forward = flow_map
        found[source] = float(next(objective.step(batch_of(x0), 0))[0])
    assert found["teacher"] < found["data"] / 3, found


def collapsed(**cfg):
    """Loss of a student with a constant output."""
    objective = make(**cfg)
    next(objective.step(batch_of(torch.randn(4, 2)), 0))
    objective.student.backbone.forward = lambda x, t, cond: objective.student.backbone.m + 0 * x
    return float(next(objective.step(batch_of(0.5 + 0.3 * torch.randn(512, 2)), 1))[0].detach())


def test_p1_the_boundary_rules_the_constant_out():
    """Negative check: without rows at n', and gaps too narrow to cross it, a constant is a solution."""
    assert collapsed() > 1.0
    assert collapsed(boundary_share=0.0, gap=1e-6) < 1e-3


def test_times_below_the_boundary_are_refused():
    with pytest.raises(UserError, match="less noise than the boundary") as error:
        make(times=[80.0, 0.5])
    assert "student.timesteps" in str(error.value)
    make(times=[80.0, 1.0])
    make(Flow(), times=[1.0, 0.5])


@pytest.mark.slow
def test_p2_improves_on_stage_one(tmp_path):
    ect, tcm = {"name": "ect", "double_every": 60}, {"name": "tcm", "gap": 0.02}
    kw = {"teacher": "analytic:gmm2d-edm", "lr": 1e-3}
    before, after, _, _ = run_mixture(tmp_path, None, stages=[(ect, 250, None), (tcm, 250, None)], **kw)
    assert after < 0.02 and after < before / 5, (before, after)


def test_p4_tcm(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "tcm"})
