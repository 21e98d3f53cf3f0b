"""LCM: boundary, skipping solver, guidance in the solver, fixed point; several step counts of one LoRA."""

import json

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import VP, Flow
from fastgen.export.load import load_export
from fastgen.objectives.lcm import LCM, LCMConfig
from fastgen.roles.roles import Role, Student, StudentSpec
from fastgen.sampling.solvers import teacher_grid
from fastgen.training.exporting import export_run
from tests.export.test_plain_diffusers import make_run
from tests.support.heavier import first_of
from tests.support.replay import replay_counts
from tests.support.spelled import World, at_x, gradient, line
from tests.support.toys import (
    SCHEDULES,
    Constant,
    GaussianNet,
    PerTime,
    Spy,
    batch_of,
    captured,
    check_weight,
    each,
    fit,
    outputs,
    rng,
    run_mixture,
)

SHORT = {"grid_steps": 10, "target_decay": 0.5}
"""settings of the contract battery"""


def make(schedule, net, teacher=None, target=None, guidance=1.0, **cfg):
    teacher = teacher or Spy(GaussianNet(schedule, 0.0, 0.5).requires_grad_(False))
    parts = {"student": Student(net, None, StudentSpec(schedule.steps(1))), "teacher": teacher}
    if target is not None:
        parts["target"] = Role(target)
    return LCM(LCMConfig(**{"metric": "l2", **cfg}), parts, rng(), guidance)


def at(objective, n):
    """Fix the interval."""
    objective.rng.randint = lambda high, num: torch.full((num,), n)
    return objective


@each
def test_p1_boundary_target_is_the_solver_output_bit_by_bit(schedule, monkeypatch):
    """In the last interval the networks' own opinion does not matter; earlier they do."""
    x0, targets = torch.randn(16, 1, dtype=torch.float64), {}
    for n in (9, 4):
        for mean in (0.0, 9.0):
            objective = at(make(schedule, GaussianNet(schedule, mean, 3.0), grid_steps=10), n)
            targets[n, mean] = captured(monkeypatch, "mse", objective, batch_of(x0))[1]
            x_t, t, D = objective.teacher.seen[0]
            end = torch.full((16,), teacher_grid(schedule, 10)[n + 1], dtype=torch.float64)
            same = torch.equal(targets[n, mean], schedule.ode_step(D, x_t, t, end))
            assert same == (n == 9)
    assert torch.equal(targets[9, 0.0], targets[9, 9.0])
    assert (targets[4, 0.0] - targets[4, 9.0]).abs().max() > 0.1


@outputs
def test_p1_weight_makes_it_the_error_of_the_networks_output(kind):
    check_weight(make, kind)


@pytest.mark.parametrize("metric", ["l2", "huber"])
@pytest.mark.parametrize("span", [None, (1.0, 5.0)])
def test_p1_step_is_the_formula(metric, span):
    """On a four-step grid, at guidance 3 or at a scale given to the student: the gradient in D_theta."""
    cfg = {"grid_steps": 4, "metric": metric, "huber_c": 0.3, "weighting": "snr1"}
    world = World(LCM, Flow(), num=32, span=span, **cfg)
    (turn,), (earlier, call) = world.turns(), world.student.calls
    x_t, t = call.x_t, call.t
    w = call.cond["guidance"].double() if span else 3.0
    assert not span or (w.min() > 1 and w.max() < 5 and w.std() > 0.5)
    assert not span or torch.equal(call.cond["guidance"], earlier.cond["guidance"])
    world.noise_in(x_t, t, world.batch.x0)
    assert set(t.tolist()) == {1.0, 0.75, 0.5, 0.25} and not earlier.grad
    r = t - 0.25
    x_r = line(world.guided(x_t, t, w), x_t, t, r)
    torch.testing.assert_close(earlier.x_t, x_r, rtol=1e-4, atol=1e-5)
    assert torch.equal(earlier.t, r.clamp(min=0.25))
    target = torch.where((r > 0)[:, None], earlier.out, x_r).detach()
    weight = (((1 - t) / t) ** 2).clamp(min=1)[:, None]

    def loss(D):
        d2 = (D - target) ** 2
        return (weight * (d2 if metric == "l2" else (d2 + 0.3**2).sqrt() - 0.3)).mean()

    torch.testing.assert_close(gradient(turn.loss, call.out), at_x(loss, call.out), rtol=1e-4, atol=1e-6)


class WithGuidance(Student):
    """Notes the times and conditions it is given."""

    def __init__(self, student, guidance_range=None):
        spec = StudentSpec(student.times, guidance_range=guidance_range)
        super().__init__(student.backbone, None, spec)
        self.times_seen, self.conds = [], []

    def __call__(self, x_t, t, cond):
        self.times_seen.append(t)
        self.conds.append(cond)
        return super().__call__(x_t, t, cond)


def test_p1_solver_skips_k_timesteps():
    """K = 50 of T = 1000: from 20 n - 1 to 20 (n - 1) - 1, the last one to 0, with one teacher call."""
    S = SCHEDULES["vp"]
    objective = make(S, GaussianNet(S, 0.0, 0.5), grid_steps=50)
    objective.rng.randint = lambda high, num: torch.arange(50)
    objective.student = WithGuidance(objective.student)
    next(objective.step(batch_of(torch.randn(50, 1)), 0))
    t, (r, again) = objective.teacher.seen[0][1], objective.student.times_seen
    assert len(objective.teacher.seen) == 1 and torch.equal(t, again)
    assert t.tolist() == [20.0 * n - 1 for n in range(50, 0, -1)]
    assert r[:-1].tolist() == [20.0 * n - 1 for n in range(49, 0, -1)]


def test_p1_one_interval_is_regression_on_the_teachers_one_step_estimate(monkeypatch):
    """K = 1 on a flow: the target is D^w(x_T) itself."""
    S = Flow()
    objective = make(S, GaussianNet(S, 0.3, 1.0), grid_steps=1)
    _, target, _ = captured(monkeypatch, "mse", objective, batch_of(torch.randn(8, 1, dtype=torch.float64)))
    assert torch.equal(target, objective.teacher.seen[0][2])


class Conditional(GaussianNet):
    """Its mean is the condition, so that guidance moves its estimate."""

    def forward(self, x_t, t, cond):
        return super().forward(x_t, t, cond) + cond["m"].to(x_t).reshape(-1, 1)

    raw = forward


def test_p1_guidance_counts_from_one(monkeypatch):
    """Our w is Ho and Salimans'; LCM's code counts from 0: D_cond + (w - 1)(D_cond - D_uncond)."""
    S, batch = Flow(), batch_of(torch.randn(8, 1, dtype=torch.float64))
    batch.cond, batch.uncond = {"m": torch.full((8,), 2.0)}, {"m": torch.full((8,), 0.5)}
    targets = {}
    for w in (1.0, 2.5):
        for as_input in (False, True):
            objective = at(
                make(S, Conditional(S, 0.0, 0.5), Spy(Conditional(S, 0.0, 0.5)), guidance=w, grid_steps=4), 3
            )
            objective.rng.randn_like = torch.zeros_like
            if as_input:
                objective.guidance, objective.student = 9.0, WithGuidance(objective.student, (w, w))
            targets[w, as_input] = captured(monkeypatch, "mse", objective, batch)[1].detach()
            if as_input:
                assert [c["guidance"].unique().tolist() for c in objective.student.conds] == [[w], [w]]
    conditional = targets[1.0, False]  # w = 1 is no guidance
    for (w, _), target in targets.items():
        torch.testing.assert_close(target, conditional + (w - 1) * (2.0 - 0.5))


def test_p1_fixed_point_is_the_product_of_ddim_gains():
    """A linear student learns the teacher's K-step DDIM map, and differs from the exact flow."""
    S, s0, K = VP.scaled_linear(), 0.5, 6
    grid = torch.tensor(teacher_grid(S, K), dtype=torch.float64)
    net = PerTime(S, grid)
    fit(make(S, net, grid_steps=K), lambda rng: s0 * rng.randn(256, 1).double(), 1200)
    a, s = S.alpha(grid), S.sigma(grid)
    D = a * s0**2 / (a**2 * s0**2 + s**2)  # the exact denoiser's gain
    gains = a[1:] * D[:-1] + s[1:] * (1 - a[:-1] * D[:-1]) / s[:-1]
    expected = torch.stack([gains[i:].prod() for i in range(K)])
    exact = ((a[-1] ** 2 * s0**2 + s[-1] ** 2) / (a**2 * s0**2 + s**2)).sqrt()[:-1]
    torch.testing.assert_close(net.gain[:-1].detach(), expected, rtol=0.03, atol=0.003)
    assert (expected - exact).abs().max() > 0.03


def test_p1_target_carries_no_gradient_and_follows_by_the_decay():
    S = Flow()
    student, target = GaussianNet(S, 1.0, 0.6), GaussianNet(S, 0.0, 0.6)
    objective = make(S, student, target=target, target_decay=0.9, grid_steps=4)
    turns = objective.step(batch_of(torch.randn(32, 1)), 1)
    next(turns)[0].backward()
    assert student.m.grad.abs() > 0 and target.m.grad is None and target.m == 0
    assert next(turns, None) is None
    assert target.m.item() == pytest.approx(0.1)
    next(objective.step(batch_of(torch.randn(32, 1)), 0))  # a stage begins: the target is the student
    assert target.m.item() == pytest.approx(1.0)


def test_p1_negative_without_boundary_a_constant_has_no_loss():
    S, x0 = Flow(), torch.randn(64, 1)
    loose = at(make(S, Constant(S), grid_steps=4), 2)
    pinned = at(make(S, Constant(S), grid_steps=4), 3)
    assert next(loose.step(batch_of(x0), 0))[0] == 0 and next(pinned.step(batch_of(x0), 0))[0] > 0.01


@pytest.mark.parametrize("teacher", first_of(["gmm2d-flow", "gmm2d-vp"]))
def test_p2_distils_the_mixture(tmp_path, teacher):
    objective = {"name": "lcm", "grid_steps": 16, "metric": "l2"}
    before, after, _, _ = run_mixture(tmp_path, objective, f"analytic:{teacher}", steps=400, lr=2e-3)
    assert after < before * 0.5 and after < 0.08, (before, after)


def test_p4_lcm(tiny, tmp_path):
    """1, 2, 4 and 8 steps through LCMScheduler, which reads the grid from the export."""
    objective = {"name": "lcm", "grid_steps": 50}
    found = replay_counts(tiny, tmp_path, objective, "LCMScheduler", other={"original_inference_steps": 10})
    assert found.info.scheduler["original_inference_steps"] == 50
    assert found.role.spec.grid == 50


def test_p4_lcm_of_a_flow(tiny, tmp_path):
    """1, 2, 4 and 8 steps through FlowMatchLCMScheduler, set as the card says for each count."""
    more = {"other": {"shift": 3.0}, "family": "sana"}
    replay_counts(tiny, tmp_path, {"name": "lcm", "grid_steps": 20}, "FlowMatchLCMScheduler", **more)
    card = (tmp_path / "run/export/README.md").read_text()
    assert "2 steps: pass `num_inference_steps=2` with the scheduler loaded with `shift_terminal=0.5`" in card
    assert "In 8 steps: pass `sigmas=[1.0, 0.9," in card


def test_lcm_scheduler_without_its_original_steps_is_refused(tiny, tmp_path):

    folder = export_run(make_run(tiny("sd"), out=tmp_path), tmp_path / "export", {})
    document = json.loads((folder / "fastgen.json").read_text())
    del document["export"]["scheduler"]["original_inference_steps"]
    (folder / "fastgen.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="original_inference_steps"):
        load_export(folder)
