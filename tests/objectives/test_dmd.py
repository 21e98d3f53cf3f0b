"""DMD version 1: the normalised gradient, and the regression on the teacher's own samples."""

import torch

from fastgen.diffusion import losses
from fastgen.diffusion.schedules import Flow
from fastgen.objectives.dmd import DMD, DMDConfig
from tests.support.replay import replay
from tests.support.spelled import FAR, NEAR, World, at_x, dmd_weight, gradient
from tests.support.toys import (
    AffineStudent,
    CountingRole,
    GaussianNet,
    batch_of,
    gaussian_role,
    rng,
    run_mixture,
)

SHORT = {"student_every": 2, "teacher_steps": 2}
"""settings of the contract battery"""


def make(m=-1.0, s=0.3, **cfg):
    S = Flow()
    parts = {"student": AffineStudent(S, m, s), "critic": CountingRole(GaussianNet(S, m, s))}
    objective = DMD(DMDConfig(**cfg), parts | {"teacher": gaussian_role(S, 0.5, 1.0)}, rng())
    objective.prepare()
    return objective


def student_turn(objective, batch):
    loss, logs = next(objective.step(batch, 0))
    names = list(objective.student.trainable())
    return loss, logs, dict(zip(names, torch.autograd.grad(loss, objective.student.trainable().values())))


def batch(num=64):
    return batch_of(
        torch.zeros(num, 1), torch.randn(num, 1, generator=torch.Generator().manual_seed(3)).double()
    )


def test_p1_normaliser_is_scale_free():
    """x, D_real, D_fake scaled together: the gradient stays (eq. 8)."""
    x = torch.randn(16, 4, requires_grad=True)
    real, fake = torch.randn(2, 16, 4)
    grads = [
        torch.autograd.grad(losses.distribution_matching(x * c, real * c, fake * c), x)[0] for c in (1, 3.0)
    ]
    torch.testing.assert_close(grads[1], 3.0 * grads[0])  # the chain rule's own factor, and no other


def test_p1_loss_is_the_sum_of_its_terms():
    loss, logs, _ = student_turn(make(regression_weight=0.25, teacher_steps=8), batch())
    torch.testing.assert_close(loss, logs["dm"] + 0.25 * logs["regression"])
    objective = make(regression_weight=0.0)
    loss, logs, _ = student_turn(objective, batch())
    assert "regression" not in logs and not hasattr(objective, "pairs")


def test_p1_regression_is_zero_at_the_teachers_own_map():
    """The flow's ODE of N(0.5, 1) carries z to 0.5 + z: the affine student there feels no regression."""
    objective = make(0.5, 1.0, teacher_steps=200)
    _, logs, _ = student_turn(objective, batch())
    assert logs["regression"] < 1e-4, logs["regression"]
    _, logs, _ = student_turn(make(0.5, -1.0, teacher_steps=200), batch())  # same distribution, mirrored map
    assert logs["regression"] > 1.0, "the regression sees the pairing, not only the distribution"


def test_p1_regression_breaks_the_mirror_symmetry():
    """With an exact critic m + s z and m - s z are one distribution; the pairs alone tell them apart."""
    for weight, moves in ((0.0, False), (1.0, True)):
        objective = make(0.5, -1.0, regression_weight=weight, teacher_steps=20)
        _, logs, grads = student_turn(objective, batch())
        name = next(n for n in grads if n.endswith("s"))
        assert (abs(grads[name]) > 0.5) == moves, (weight, grads)


def test_p1_gradient_only_in_ones_own_turn():
    objective = make(teacher_steps=4)
    for loss, _ in objective.step(batch(), 0):
        loss.backward()
        for name, player in objective.players.items():
            grads = [p.grad for p in player.trainable().values()]
            assert all((g is not None) == (name == objective.active) for g in grads)
            for p in player.trainable().values():
                p.grad = None


def test_p1_step_is_the_formula(monkeypatch):
    """Equations 6 to 9 at guidance 3, on the second of two steps: gradients in x, times and weights."""
    world = World(DMD, times=[1.0, 0.5], time=NEAR, critic_time=FAR, teacher_steps=4)
    monkeypatch.setattr(world.tape, "shared_randint", lambda high: high - 1)
    student, critic = world.turns()
    x, x_ref = (call.out for call in world.student.calls if call.grad)
    torch.testing.assert_close(gradient(student.loss, x), world.score_gradient(x, dmd_weight))
    state, y = world.student.calls[-1], torch.stack([world.objective.pairs.rows[i][0] for i in range(8)])
    for t, u in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)):
        if t == state.t[0]:
            torch.testing.assert_close(state.x_t, y, rtol=1e-4, atol=1e-4)
        t, u = (torch.full((8,), v, dtype=torch.float64) for v in (t, u))
        y = world.schedule.ode_step(world.guided(y, t), y, t, u)
    assert state.t.tolist() == [0.5] * 8
    wanted = at_x(lambda r: 0.25 * ((r - y) ** 2).mean(), x_ref)
    torch.testing.assert_close(gradient(student.loss, x_ref), wanted, rtol=1e-4, atol=1e-6)
    assert abs(world.check_critic(critic, x)) < 1e-12


def test_p1_huber_constant():
    """C = 0.00054 dim of sqrt(|d|^2 + C^2) - C, over sqrt(dim)."""
    d, C = torch.full((1, 100), 1e-3, dtype=torch.float64), 0.054
    wanted = ((100 * 1e-6 + C**2) ** 0.5 - C) / 10
    torch.testing.assert_close(make(regression="huber").distance(d, 0 * d), torch.tensor(wanted).double())


def test_p2_distils_the_mixture(tmp_path):
    objective = {"name": "dmd", "teacher_steps": 10, "student_every": 2}
    before, after, *_ = run_mixture(tmp_path, objective, "analytic:gmm2d-flow", steps=250)
    assert after < 0.03 and after < before / 3, (before, after)


def test_p4_dmd(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "dmd", "teacher_steps": 4})
