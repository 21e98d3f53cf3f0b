"""Consistency: boundary, solver orders, closed-form fixed point, gradients, and distillation of exact
mixtures.
"""

import pytest
import torch

from fastgen.objectives.consistency import Consistency, ConsistencyConfig
from fastgen.roles import Role, Student
from fastgen.samplers import jump, solver_step
from fastgen.schedules import EDM, VP, Flow
from tests.objectives.toys import (
    Constant,
    GaussianNet,
    PerTime,
    batch_of,
    fit,
    gaussian_role,
    rng,
    run_mixture,
)
from tests.replay import replay

SHORT = {"num_scales": 4, "target_decay": 0.5}
"""settings of the contract battery"""

SCHEDULES = {"edm": EDM(), "flow": Flow(), "vp": VP.scaled_linear()}
each = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def make(schedule, student_net, teacher=(0.0, 0.5), target=None, **cfg):
    parts = {
        "student": Student(student_net, None, schedule.steps(1)),
        "teacher": gaussian_role(schedule, *teacher),
    }
    if target is not None:
        parts["target"] = Role(target)
    return Consistency(ConsistencyConfig(**cfg), parts, rng())


@each
def test_p1_last_interval_targets_the_solver_output_itself(schedule):
    """With N = 2 and i = 1, r is the end: the target must be x_r, whatever the target network says."""
    objective = make(schedule, GaussianNet(schedule, 0.0, 0.5), num_scales=2, metric="l2", teacher=(0.0, 0.5))
    objective.rng.randint = lambda high, num: torch.full((num,), high - 1)
    seen = {}
    from fastgen import losses

    original = losses.mse
    losses.mse = lambda pred, target, w: seen.update(target=target) or original(pred, target, w)
    try:
        torch.manual_seed(0)
        x0 = torch.randn(16, 1, dtype=torch.float64)
        next(objective.step(batch_of(x0), 0))
    finally:
        losses.mse = original
    objective.rng.reset(0)
    grid = objective.grid(0)
    objective2 = make(schedule, GaussianNet(schedule, 9.0, 3.0), num_scales=2, metric="l2")
    objective2.rng.randint = objective.rng.randint
    objective2.rng.generator.manual_seed(0)
    x_t = schedule.noise(x0, objective2.rng.randn_like(x0), grid[1].expand(16))
    x_r = solver_step(
        schedule, objective2.denoiser(batch_of(x0)), x_t, grid[1].expand(16), grid[2].expand(16), "euler"
    )
    torch.testing.assert_close(seen["target"], x_r, rtol=1e-6, atol=1e-7)


def test_p1_solver_orders():
    """Halving the step divides the local error by 4 for Euler and by 8 for Heun (Gaussian data, VE flow
    map known).
    """
    S, s0 = EDM(), 0.5
    teacher = gaussian_role(S, 0.0, s0)
    x, t = torch.full((1, 1), 1.3, dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)

    def error(h, solver):
        u = t - h
        exact = x * ((s0**2 + u**2) / (s0**2 + t**2)).sqrt()
        return (solver_step(S, lambda y, r: teacher(y, r, {}), x, t, u, solver) - exact).abs().item()

    assert 3.5 < error(0.02, "euler") / error(0.01, "euler") < 4.5
    assert 7.0 < error(0.02, "heun") / error(0.01, "heun") < 9.0


def test_p1_fixed_point_is_the_product_of_solver_gains():
    """A linear student learns the teacher's N-step Euler map, not the exact flow."""
    S, s0, N = EDM(sigma_min=0.02, sigma_max=5.0), 0.5, 6
    grid = S.from_unit(torch.linspace(1, 0, N + 1, dtype=torch.float64))
    net = PerTime(S, grid)
    objective = make(S, net, teacher=(0.0, s0), num_scales=N, metric="l2")
    fit(objective, lambda rng: s0 * rng.randn(256, 1).double(), 1500)
    gains = 1 + (grid[1:] - grid[:-1]) * grid[:-1] / (s0**2 + grid[:-1] ** 2)
    expected = torch.stack([gains[i:].prod() for i in range(N)])
    exact = ((s0**2 + grid[-1] ** 2) / (s0**2 + grid[:-1] ** 2)).sqrt()
    torch.testing.assert_close(net.gain[:-1].detach(), expected, rtol=0.03, atol=0.003)
    assert (expected - exact).abs().max() > 0.05  # the two are told apart


def test_p1_huber_constant_grows_with_the_root_of_the_dimension(monkeypatch):
    """At c sqrt(dim) (2310.14189, Sec. 3.3); scaling by the dimension instead would give another loss."""
    from fastgen import losses

    S, dim, c, seen = Flow(), 16, 0.1, {}
    objective = make(S, GaussianNet(S, 0.3, 0.9), num_scales=4, huber_c=c)

    def spy(*args):
        seen.setdefault("jumps", []).append(jump(*args))
        return seen["jumps"][-1]

    monkeypatch.setattr("fastgen.objectives.consistency.jump", spy)
    objective.rng.randint = lambda high, num: torch.zeros(num, dtype=torch.long)  # never the last interval
    loss, _ = next(objective.step(batch_of(torch.randn(32, dim, dtype=torch.float64)), 0))
    target, pred = seen["jumps"]
    norm2 = (pred - target).square().sum(1)

    def huber(constant):
        return ((norm2 + constant**2).sqrt() - constant).mean() / dim**0.5

    torch.testing.assert_close(loss, huber(c * dim**0.5))
    assert (loss - huber(c * dim)).abs() > 1e-3
    torch.testing.assert_close(losses.sample_huber(pred, target, c), loss)


def test_p1_target_carries_no_gradient():
    S = Flow()
    student, target = GaussianNet(S, 0.1, 0.6), GaussianNet(S, 0.1, 0.6)
    objective = make(S, student, target=target, target_decay=0.9)
    loss, _ = next(objective.step(batch_of(torch.randn(32, 1)), 0))
    loss.backward()
    assert student.s.grad.abs() > 0 and target.s.grad is None and target.m.grad is None


def test_p1_negative_without_boundary_a_constant_has_no_loss():
    """Dropping the boundary (target never pinned to x_r) lets a constant student reach zero loss; with
    it, it cannot.
    """
    S = Flow()

    x0 = torch.randn(256, 1)
    pinned = make(S, Constant(S), num_scales=4, metric="l2")
    with_boundary = next(pinned.step(batch_of(x0), 0))[0]
    loose = make(S, Constant(S), num_scales=4, metric="l2")
    loose.rng.randint = lambda high, num: torch.arange(num) % (high - 1)  # never the last interval
    without = next(loose.step(batch_of(x0), 0))[0]
    assert without == 0 and with_boundary > 0.01


def test_p1_ema_target_moves_by_the_decay():
    S = Flow()
    student, target = GaussianNet(S, 1.0, 0.6), GaussianNet(S, 0.0, 0.6)
    objective = make(S, student, target=target, target_decay=0.9)
    for loss, _ in objective.step(batch_of(torch.randn(8, 1)), 0):
        loss.backward()
    assert target.m.item() == pytest.approx(0.1)


def test_p1_training_mode_needs_no_teacher():
    S = Flow()
    cfg = ConsistencyConfig(mode="training", num_scales=8)
    assert Consistency.uses(cfg) == ()
    objective = Consistency(cfg, {"student": Student(GaussianNet(S, 0.0, 0.5), None, [1.0])}, rng())
    loss, _ = next(objective.step(batch_of(torch.randn(8, 1)), 0))
    assert torch.isfinite(loss)


def test_scale_curriculum_doubles_up_to_the_end():
    objective = make(
        Flow(), GaussianNet(Flow(), 0.0, 0.5), num_scales=40, start_scales=10, curriculum_steps=300
    )
    sizes = [len(objective.grid(k)) - 1 for k in (0, 99, 100, 199, 200, 299, 1000)]
    assert sizes == [10, 10, 20, 20, 40, 40, 40]


P2 = {
    "distillation": {"num_scales": 16, "solver": "heun"},
    "ema target": {"num_scales": 16, "solver": "heun", "target_decay": 0.9},
    "training": {"mode": "training", "num_scales": 32, "start_scales": 8, "curriculum_steps": 300},
}


@pytest.mark.parametrize("name", P2)
def test_p2_distils_the_mixture(tmp_path, name):
    before, after, _, _ = run_mixture(tmp_path, {"name": "consistency", **P2[name]}, steps=500, lr=2e-3)
    assert after < before * 0.5 and after < 0.06, (before, after)


def test_p2_segments_serve_as_many_steps(tmp_path):
    objective = {"name": "consistency", "num_scales": 16, "segments": 4, "solver": "heun"}
    before, after, _, _ = run_mixture(
        tmp_path, objective, steps=400, num_steps=4, lr=2e-3, student={"sampler": "ode"}
    )
    assert after < 0.03, (before, after)


def test_p4_consistency(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "consistency", "num_scales": 8})
