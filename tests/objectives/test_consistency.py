"""Consistency: boundary, solver orders, closed-form fixed point, gradients, and distillation of exact
mixtures.
"""

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import EDM, Flow
from fastgen.objectives import requirements_of
from fastgen.objectives.consistency import Consistency, ConsistencyConfig
from fastgen.objectives.shared.intervals import draw_intervals, num_intervals
from fastgen.roles.roles import Role, Student, StudentSpec
from fastgen.sampling.solvers import jump, solver_step, undo_jump
from tests.support.heavier import first_of
from tests.support.replay import replay
from tests.support.spelled import World, at_x, gradient, line
from tests.support.toys import (
    Constant,
    GaussianNet,
    PerTime,
    batch_of,
    each,
    fit,
    gaussian_role,
    rng,
    run_mixture,
    weighed,
)

SHORT = {"num_scales": 4, "target_decay": 0.5}
"""settings of the contract battery"""


def make(schedule, student_net, teacher=(0.0, 0.5), target=None, **cfg):
    parts = {
        "student": Student(student_net, None, StudentSpec(schedule.steps(1))),
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
    from fastgen.diffusion import losses

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
    assert (expected - exact).abs().max() > 0.05  # the two differ


def test_p1_huber_constant_grows_with_the_root_of_the_dimension(monkeypatch):
    """At c sqrt(dim) (2310.14189, Sec. 3.3); scaling by the dimension instead would give another loss."""
    from fastgen.diffusion import losses

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


@pytest.mark.parametrize("space", ["state", "x0"])
def test_p1_step_is_the_formula(space):
    """Two segments of a four-step grid at guidance 3, over 1 / (t - r): the gradient in D_theta."""
    cfg = {"num_scales": 4, "segments": 2, "metric": "l2", "weighting": "inverse_gap", "space": space}
    world = World(Consistency, Flow(), num=32, **cfg)
    (turn,), (earlier, call) = world.turns(), world.student.calls
    x_t, t = call.x_t, call.t
    world.noise_in(x_t, t, world.batch.x0)
    assert set(t.tolist()) == {1.0, 0.75, 0.5, 0.25} and not earlier.grad
    r, e = t - 0.25, torch.where(t > 0.5, 0.5, 0.0).double()
    x_r = line(world.guided(x_t, t), x_t, t, r)
    inner = r > e
    torch.testing.assert_close(earlier.x_t[inner], x_r[inner])
    assert torch.equal(earlier.t[inner], r[inner])
    target = torch.where(inner[:, None], line(earlier.out, x_r, r.clamp(min=0.25), e), x_r).detach()
    share = (e / t)[:, None]

    def loss(D):
        gap = D - (target - share * x_t) / (1 - share) if space == "x0" else line(D, x_t, t, e) - target
        return (gap.square().mean(1) / (t - r)).mean()

    torch.testing.assert_close(gradient(turn.loss, call.out), at_x(loss, call.out))


def test_p1_step_weight_is_of_the_huber_distance_too():
    cfg = {"num_scales": 4, "weighting": "inverse_gap", "huber_c": 0.2}
    found = [
        World(Consistency, Flow(), **{**cfg, **more}).turns()[0] for more in ({}, {"weighting": "uniform"})
    ]
    torch.testing.assert_close(found[0].loss, 4 * found[1].loss)  # every gap is a quarter


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
    for loss, _ in objective.step(batch_of(torch.randn(8, 1)), 1):
        loss.backward()
    assert target.m.item() == pytest.approx(0.1)


def test_p1_training_mode_needs_no_teacher():
    S = Flow()
    cfg = ConsistencyConfig(mode="training", num_scales=8)
    assert requirements_of(cfg).untrained == ()
    objective = Consistency(
        cfg, {"student": Student(GaussianNet(S, 0.0, 0.5), None, StudentSpec([1.0]))}, rng()
    )
    loss, _ = next(objective.step(batch_of(torch.randn(8, 1)), 0))
    assert torch.isfinite(loss)


def test_scale_curriculum_doubles_up_to_the_end():
    objective = make(
        Flow(), GaussianNet(Flow(), 0.0, 0.5), num_scales=40, start_scales=10, curriculum_steps=300
    )
    sizes = [len(objective.grid(k)) - 1 for k in (0, 99, 100, 199, 200, 299, 1000)]
    assert sizes == [10, 10, 20, 20, 40, 40, 40]


def test_root_and_log_curricula():
    """CT's N(k) from 2 to 150 at its ends and middle; the log-linear one is geometric."""
    assert [num_intervals("root", 2, 150, d) for d in (0.0, 0.5, 1.0)] == [2, 107, 150]
    assert [num_intervals("log", 64, 1280, d) for d in (0.0, 0.5, 1.0)] == [64, 286, 1280]
    objective = make(
        Flow(), GaussianNet(Flow(), 0, 0.5), num_scales=24, start_scales=6, curriculum="log",
        curriculum_steps=100, segments=4,
    )  # fmt: skip
    sizes = [len(objective.grid(k)) - 1 for k in (0, 30, 60, 100, 500)]
    assert sizes == [4, 8, 12, 24, 24]  # whole segments only


def test_p1_log_normal_draws_follow_the_law():
    """Share of each interval against the normal law of ln sigma (iCT's mean -1.1, std 2)."""
    S = EDM()
    grid = S.from_unit(torch.linspace(1, 0, 11, dtype=torch.float64))
    i = draw_intervals(rng(), S, grid, 40_000, (-1.1, 2.0))
    law = torch.distributions.Normal(-1.1, 2.0)
    mass = law.cdf(grid[:-1].log()) - law.cdf(grid[1:].log())
    share = torch.bincount(i, minlength=10) / 40_000
    torch.testing.assert_close(share.double(), mass / mass.sum(), rtol=0, atol=0.01)
    even = torch.bincount(draw_intervals(rng(), S, grid, 40_000, None), minlength=10) / 40_000
    assert (even - share).abs().max() > 0.05


@each
def test_p1_undoing_the_jump_returns_d(schedule):
    """Also the multistep loss: in D it is the state's, divided by the square of dx_e / dD."""
    x, D = torch.randn(2, 6, 3, dtype=torch.float64)
    t, e = (schedule.from_unit(torch.full((6,), u)) for u in (0.6, 0.3))
    torch.testing.assert_close(
        undo_jump(schedule, jump(schedule, D, x, t, e), x, t, e), D, rtol=1e-5, atol=1e-5
    )
    x0, found = torch.randn(32, 1, dtype=torch.float64), {}
    for space in ("state", "x0"):
        cfg = {"num_scales": 4, "segments": 2, "metric": "l2", "space": space}
        objective = make(schedule, GaussianNet(schedule, 0.4, 0.9), **cfg)
        objective.rng.randint = lambda high, num: torch.zeros(num, dtype=torch.long)
        found[space] = float(next(objective.step(batch_of(x0), 0))[0].detach())
    t, e = (g[None] for g in objective.grid(0)[[0, 2]])
    slope = schedule.alpha(e) - schedule.alpha(t) * schedule.sigma(e) / schedule.sigma(t)
    assert found["x0"] == pytest.approx(found["state"] / float(slope) ** 2, rel=1e-4)


@pytest.mark.parametrize("metric", ["l1", "l2", "huber"])
def test_p1_weight_is_one_over_the_gap(metric):
    """Improved CT's lambda: 1 / (sigma_i - sigma_{i+1}) for EDM."""
    S, x0, found = EDM(), torch.randn(32, 1, dtype=torch.float64), {}
    for weighting in ("uniform", "inverse_gap"):
        objective = make(S, GaussianNet(S, 0.4, 0.9), num_scales=4, metric=metric, weighting=weighting)
        objective.rng.randint = lambda high, num: torch.ones(num, dtype=torch.long)
        found[weighting] = float(next(objective.step(batch_of(x0), 0))[0].detach())
    gap = float(objective.grid(0)[1] - objective.grid(0)[2])
    assert found["inverse_gap"] == pytest.approx(found["uniform"] / gap, rel=1e-5)


def test_p1_weight_of_a_prediction_kind():
    """The edm weight turns the distance into that of the preconditioned network's output."""
    S = EDM()
    ratio = weighed(
        lambda **cfg: make(S, GaussianNet(S, 0.4, 0.9), num_scales=4, metric="l2", **cfg), 1, "edm"
    )
    t = float(make(S, GaussianNet(S, 0.4, 0.9), num_scales=4).grid(0)[1])
    assert ratio == pytest.approx(1 / t**2 + 1 / 0.5**2, rel=1e-5)


def test_p1_decay_grows_with_the_scales():
    """mu = exp(N_0 ln mu_0 / N): the same memory in units of the grid."""
    S, moved = Flow(), {}
    for k in (0, 1000):
        target = GaussianNet(S, 0.0, 0.6)
        objective = make(
            S, GaussianNet(S, 1.0, 0.6), target=target, num_scales=8, start_scales=2, curriculum_steps=10,
            target_decay=0.9, decay_grows=True,
        )  # fmt: skip
        for loss, _ in objective.step(batch_of(torch.randn(8, 1)), k):
            loss.backward()
        moved[k] = target.m.item()
    assert moved[1000] == pytest.approx(1 - 0.9 ** (2 / 8))
    assert moved[0] == pytest.approx(1.0)  # a stage begins with the student itself


def test_p1_perceptual_metric_reads_the_feature_net(tiny):
    """Zero for equal pictures, blind to nothing; gradient reaches the student, none the net."""
    from fastgen.config.run import validate
    from fastgen.core.rng import Rng
    from fastgen.training.assembly import make_cast

    def cast(path):
        objective = {"name": "consistency", "metric": "perceptual", "num_scales": 4}
        values = {"teacher": {"path": path}, "objective": objective, "data": {"name": "digits"}}
        cfg = validate(values)
        found = make_cast(cfg)
        return found, found.stage(cfg.all_stages()[0], Rng(0))

    found, objective = cast("assets:teachers/digits")
    x = torch.rand(4, *found.teacher.codec.shape) * 1.6 - 0.8
    assert objective.distance(x, x, None) == 0
    near, far = (objective.distance(x, x + s * torch.randn_like(x), None) for s in (0.05, 0.5))
    assert 0 < near < far
    loss, _ = next(objective.step(batch_of(x, cond={"class_labels": torch.arange(4)}), 0))
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in objective.players["student"].trainable().values())
    assert all(p.grad is None for p in found.parts["perceptual"].parameters())
    with pytest.raises(UserError, match="objective.metric"):
        cast(str(tiny("edm")))


def test_bad_input_in_one_line():
    from fastgen.config.run import validate

    for objective, message in (
        ({"num_scales": 10, "segments": 4}, "objective.segments: 4 segments do not divide"),
        ({"start_scales": 4}, "objective.curriculum_steps"),
        ({"metric": "perceptual", "segments": 2}, "objective.metric"),
        ({"segments": 2, "num_scales": 4}, "student.sampler ode"),
    ):
        with pytest.raises(UserError, match=message):
            validate({"data": {"name": "digits"}, "objective": {"name": "consistency", **objective}})
    with pytest.raises(UserError, match="data: no images are named; consistency"):
        validate({"data": {"name": ""}, "objective": {"name": "consistency", "mode": "training"}})


P2 = {
    "improved training": {
        "mode": "training",
        "num_scales": 32,
        "start_scales": 8,
        "curriculum_steps": 300,
        "weighting": "inverse_gap",
        "log_normal": [-0.5, 1.5],
    },
    "distillation": {"num_scales": 16, "solver": "heun"},
    "ema target": {"num_scales": 16, "solver": "heun", "target_decay": 0.9},
    "training": {"mode": "training", "num_scales": 32, "start_scales": 8, "curriculum_steps": 300},
}


@pytest.mark.parametrize("name", first_of(P2))
def test_p2_distils_the_mixture(tmp_path, name):
    before, after, _, _ = run_mixture(tmp_path, {"name": "consistency", **P2[name]}, steps=500, lr=2e-3)
    assert after < before * 0.5 and after < 0.06, (before, after)


@pytest.mark.slow
def test_p2_segments_serve_as_many_steps(tmp_path):
    objective = {"name": "consistency", "num_scales": 16, "segments": 4, "solver": "heun"}
    before, after, _, _ = run_mixture(
        tmp_path, objective, steps=400, num_steps=4, lr=2e-3, student={"sampler": "ode"}
    )
    assert after < 0.03, (before, after)


def test_p4_consistency(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "consistency", "num_scales": 8})
