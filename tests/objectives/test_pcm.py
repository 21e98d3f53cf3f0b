"""PCM: phases, their fixed point, its relation to LCM, adversarial consistency, and CFG-free solving."""

from functools import partial

import pytest
import torch

from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import VP, Flow
from fastgen.objectives import requirements_of
from fastgen.objectives.lcm import LCM, LCMConfig
from fastgen.objectives.pcm import PCM, PCMConfig
from fastgen.roles.roles import Student, StudentSpec
from fastgen.sampling.solvers import jump, teacher_grid
from tests.support.replay import replay_counts
from tests.support.spelled import World, at_x, gradient, line
from tests.support.toys import (
    SCHEDULES,
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

SHORT = {"grid_steps": 8, "segments": 2, "gan_weight": 0.1, "cond_dropout": 0.5}
"""settings of the contract battery"""
STUDENT = {"sampler": "ode", "num_steps": 2}


def make(schedule, net, guidance=1.0, disc=None, **cfg):
    teacher = Spy(GaussianNet(schedule, 0.0, 0.5).requires_grad_(False))
    parts = {"student": Student(net, None, StudentSpec(schedule.steps(1))), "teacher": teacher}
    if disc is not None:
        parts["disc"] = disc
    return PCM(PCMConfig(**{"gan_weight": 0.0, **cfg}), parts, rng(), guidance)


@each
def test_p1_as_many_phases_as_steps_is_the_teachers_own_step(schedule):
    x0, losses = torch.randn(64, 1, dtype=torch.float64), {}
    for phases in (8, 2):
        objective = make(schedule, GaussianNet(schedule, 0.0, 0.5), grid_steps=8, segments=phases)
        objective.rng.randint = lambda high, num: torch.arange(num) % 7  # VP: not the one to alpha_0
        losses[phases] = float(next(objective.step(batch_of(x0), 0))[0])
    assert losses[8] < 1e-6 and losses[2] > 1e-4


@outputs
def test_p1_weight_makes_it_the_error_of_the_networks_output(kind):
    check_weight(partial(make, segments=2), kind)


@each
def test_p1_one_phase_is_lcm(schedule):
    """Same draws, same loss; with two phases another one."""
    x0, net = torch.randn(64, 1, dtype=torch.float64), GaussianNet(schedule, 0.2, 0.7)
    parts = {"student": Student(net, None, StudentSpec(schedule.steps(1)))}
    parts["teacher"] = Spy(GaussianNet(schedule, 0.0, 0.5).requires_grad_(False))
    lcm = next(LCM(LCMConfig(grid_steps=8), parts, rng()).step(batch_of(x0), 0))[0]
    one, two = (next(make(schedule, net, grid_steps=8, segments=m).step(batch_of(x0), 0))[0] for m in (1, 2))
    torch.testing.assert_close(one, lcm)
    assert (two - lcm).abs() > 1e-4


def test_p1_step_is_the_formula():
    """Two phases of eight steps at guidance 3: the gradient in D_theta of both parts, and the heads' loss."""
    cfg = {"grid_steps": 8, "segments": 2, "huber_c": 0.3, "weighting": "snr1", "gan_weight": 0.2}
    world = World(PCM, Flow(), num=64, **cfg)
    (student, heads), (earlier, call) = world.turns(), world.student.calls
    x_t, t, disc = call.x_t, call.t, world.disc
    world.noise_in(x_t, t, world.batch.x0)
    assert set(t.tolist()) == {1 - i / 8 for i in range(8)} and not earlier.grad
    r, e = t - 0.125, torch.where(t > 0.5, 0.5, 0.0).double()
    x_r = line(world.guided(x_t, t), x_t, t, r)
    inner = (r > e)[:, None]
    torch.testing.assert_close(earlier.x_t, x_r)
    target = torch.where(inner, line(earlier.out, x_r, r.clamp(min=0.125), e), x_r).detach()
    weight = (((1 - t) / t) ** 2).clamp(min=1)[:, None]
    (x_v, v, cond), (_, v_fake, _), (real, v_real, _) = disc.seen
    assert torch.equal(v, v_fake) and torch.equal(v, v_real)
    assert set(v[t > 0.5].tolist()) == {0.625, 0.75, 0.875, 1.0} and ((v > 0) & (v <= 0.5))[t <= 0.5].all()
    ratio = ((1 - v) / (1 - e))[:, None]
    more = (v[:, None] ** 2 - (ratio * e[:, None]) ** 2).sqrt()
    n, n_real = (
        (x - ratio * m).detach() / more for x, m in ((x_v, line(call.out, x_t, t, e)), (real, target))
    )
    for noise in (n, n_real):
        assert any(torch.allclose(d.double(), noise, atol=1e-4) for d in world.tape.drawn)

    def loss(D):
        pred = line(D, x_t, t, e)
        huber = weight * (((pred - target) ** 2 + 0.3**2).sqrt() - 0.3)
        return huber.mean() - 0.2 * disc.logit(ratio * pred + more * n, v, cond).mean()

    wanted = at_x(loss, call.out)
    torch.testing.assert_close(gradient(student.loss, call.out), wanted, rtol=1e-4, atol=1e-6)
    fake, real = (disc.logit(*seen) for seen in disc.seen[1:])
    wanted = 0.5 * (torch.relu(1 + fake).mean() + torch.relu(1 - real).mean())
    torch.testing.assert_close(heads.loss, wanted)


def test_p1_step_drops_conditions_for_all_networks():
    world = World(PCM, Flow(), num=64, cond_dropout=0.5, guided_solver=False)
    world.turns()
    told = [call.cond["class_labels"] for call in (*world.student.calls, *world.teacher.calls)]
    told += [cond["class_labels"] for _, _, cond in world.disc.seen]
    assert all(torch.equal(labels, told[0]) for labels in told) and 16 < (told[0] == 0).sum() < 48


def test_p1_fixed_point_is_the_product_of_ddim_gains_over_the_phase():
    """Each phase of a linear student ends where K / M DDIM steps of the teacher end."""
    S, s0, K, M = VP.scaled_linear(), 0.5, 8, 2
    grid = torch.tensor(teacher_grid(S, K), dtype=torch.float64)
    net = PerTime(S, grid)
    objective = make(S, net, grid_steps=K, segments=M, huber_c=1.0)
    fit(objective, lambda rng: s0 * rng.randn(256, 1).double(), 1200)
    a, s = S.alpha(grid), S.sigma(grid)
    D = a * s0**2 / (a**2 * s0**2 + s**2)
    gains = a[1:] * D[:-1] + s[1:] * (1 - a[:-1] * D[:-1]) / s[:-1]
    one = torch.ones(1, 1, dtype=torch.float64)
    for i in range(K):
        end = (i // (K // M) + 1) * K // M
        found = jump(S, net.gain[i] * one, one, grid[i : i + 1], grid[end : end + 1])
        assert float(found) == pytest.approx(float(gains[i:end].prod()), rel=0.03, abs=0.005), i


def test_p1_the_gan_compares_with_the_target_at_one_level_of_the_phase(monkeypatch):
    from tests.objectives.test_tscd import Ear

    S, K, M, ear = SCHEDULES["vp"], 40, 4, Ear()
    objective = make(S, GaussianNet(S, 0.0, 0.5), disc=ear, grid_steps=K, segments=M, gan_weight=0.1)
    objective.rng.randn_like = torch.zeros_like  # noise_travel without its noise
    n = {}
    draw = objective.rng.randint
    objective.rng.randint = lambda high, num: n.setdefault(high, draw(high, num))
    x0 = torch.randn(200, 1, dtype=torch.float64)
    _, target, _ = captured(monkeypatch, "pseudo_huber", objective, batch_of(x0))
    list(objective.step(batch_of(x0), 1))  # the same draws, both turns
    grid = torch.tensor(teacher_grid(S, K), dtype=torch.float64)
    end = grid[(n[K] // 10 + 1) * 10]
    (_, v), (_, v_fake), (real, v_real) = ear.heard[-3:]
    assert (v > end).all() and (v <= grid[n[K] // 10 * 10]).all()
    assert torch.equal(v, v_fake) and torch.equal(v, v_real)
    torch.testing.assert_close(real, S.renoise(target, torch.zeros_like(target), end, v))


def test_p1_cfg_free_asks_the_teacher_once_and_drops_conditions():
    S, x0 = Flow(), torch.randn(2000, 1)
    calls = {}
    for guided in (True, False):
        net = GaussianNet(S, 0.0, 0.5)
        objective = make(S, net, 5.0, guided_solver=guided, cond_dropout=0.0 if guided else 0.1)
        batch = batch_of(x0)
        batch.cond, batch.uncond = {"m": torch.ones(2000)}, {"m": torch.zeros(2000)}
        next(objective.step(batch, 0))
        calls[guided] = len(objective.teacher.seen[0][0])
        dropped = objective.drop_condition(batch, objective.cfg.cond_dropout)["m"]
        assert 1 - float(dropped.mean()) == pytest.approx(0.0 if guided else 0.1, abs=0.03)
        assert requirements_of(objective.cfg).learned_guidance(5.0) == (5.0 if guided else 1.0)
    assert calls == {True: 4000, False: 2000}


def test_p1_edge_target_is_the_solvers_output(monkeypatch):
    """At the last interval of a phase the student's own jump is not evaluated, inside it is."""
    S, x0, targets = SCHEDULES["vp"], torch.randn(16, 1, dtype=torch.float64), {}
    for n in (3, 1):
        for mean in (0.0, 9.0):
            objective = make(S, GaussianNet(S, mean, 3.0), grid_steps=8, segments=2)
            objective.rng.randint = lambda high, num, n=n: torch.full((num,), n)
            targets[n, mean] = captured(monkeypatch, "pseudo_huber", objective, batch_of(x0))[1]
    assert torch.equal(targets[3, 0.0], targets[3, 9.0])
    assert (targets[1, 0.0] - targets[1, 9.0]).abs().max() > 0.01


def test_bad_input_in_one_line():
    for values, message in (
        ({"objective": {"name": "pcm", "grid_steps": 50}}, "objective.segments: 4 segments do not divide"),
        ({"objective": {"name": "pcm"}, "student": {"sampler": "ode"}}, "student.num_steps: found 1"),
        ({"objective": {"name": "pcm"}, "student": {"num_steps": 4}}, "student.sampler ode"),
    ):
        with pytest.raises(UserError, match=message):
            validate({"data": {"name": "fashion"}, **values})


@pytest.mark.slow
def test_p2_four_phases_in_four_steps(tmp_path):
    objective = {"name": "pcm", "grid_steps": 20, "segments": 4, "huber_c": 0.1, "gan_weight": 0.0}
    more = {"num_steps": 4, "student": {"sampler": "ode"}, "lr": 2e-3}
    before, after, _, _ = run_mixture(tmp_path, objective, "analytic:gmm2d-vp", steps=250, **more)
    assert after < before * 0.5 and after < 0.05, (before, after)


def test_p4_pcm(tiny, tmp_path):
    """4 and 8 steps through DDIMScheduler, trailing."""
    objective = {"name": "pcm", "grid_steps": 40, "segments": 4}
    other = {"timestep_spacing": "leading"}
    found = replay_counts(tiny, tmp_path, objective, "DDIMScheduler", (4, 8), other, sampler="ode")
    assert set(found.info.other_step_counts) == {"8"}
