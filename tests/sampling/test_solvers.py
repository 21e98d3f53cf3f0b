"""Solvers of the teacher's ODE, spelled out: Euler, Heun, the jump and its inverse, the guided sampler."""

import pytest
import torch

from fastgen.diffusion.schedules import EDM, Flow
from fastgen.objectives.diff_instruct import DiffInstruct
from fastgen.sampling.solvers import (
    jump,
    sample_teacher,
    segment_ends,
    solver_step,
    teacher_grid,
    undo_jump,
)
from tests.support.spelled import World
from tests.support.toys import SCHEDULES, gaussian_role

each = pytest.mark.parametrize("S", SCHEDULES.values(), ids=SCHEDULES.keys())


def ddim(S, D, x_t, t, u):
    """alpha_u D + sigma_u (x_t - alpha_t D) / sigma_t."""
    eps = (x_t - S.alpha(t)[:, None] * D) / S.sigma(t)[:, None]
    return S.alpha(u)[:, None] * D + S.sigma(u)[:, None] * eps


def setting(S, high=0.7, low=0.3):
    """(x_t, t, u, D) with an estimate that depends on the time."""
    t, u = (S.from_unit(torch.full((6,), v, dtype=torch.float64)) for v in (high, low))
    net = gaussian_role(S, 0.5, 0.4)
    return torch.randn(6, 3, dtype=torch.float64), t, u, lambda x, t: net(x, t, {})


@each
def test_heun_averages_two_estimates_and_stops_at_the_clean_end(S):
    x_t, t, u, D = setting(S)
    first = ddim(S, D(x_t, t), x_t, t, u)
    torch.testing.assert_close(solver_step(S, D, x_t, t, u, "euler"), first, rtol=1e-5, atol=1e-6)
    mean = 0.5 * (D(x_t, t) + D(first, u))
    heun = solver_step(S, D, x_t, t, u, "heun")
    torch.testing.assert_close(heun, ddim(S, mean, x_t, t, u), rtol=1e-5, atol=1e-6)
    assert (heun - first).abs().max() > 1e-3
    clean = torch.full_like(t, S.t_min)
    heun, euler = (solver_step(S, D, x_t, t, clean, name) for name in ("heun", "euler"))
    assert torch.equal(heun, euler)


@each
def test_undo_jump_is_the_inverse_of_jump(S):
    x_t, t, u, D = setting(S)
    estimate = D(x_t, t)
    x_u = jump(S, estimate, x_t, t, u)
    torch.testing.assert_close(x_u, ddim(S, estimate, x_t, t, u), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(undo_jump(S, x_u, x_t, t, u), estimate, rtol=1e-4, atol=1e-5)
    clean = torch.full_like(t, S.t_min)
    assert torch.equal(undo_jump(S, x_u, x_t, t, clean), x_u)


def test_segments_end_where_a_point_of_the_grid_is():
    assert segment_ends(8, 2).tolist() == [4] * 4 + [8] * 4
    assert segment_ends(50, 4)[35:40].tolist() == [38, 38, 38, 50, 50]  # 12 steps before data, floor(50 / 4)
    assert segment_ends(8, 4).tolist() == [2, 2, 4, 4, 6, 6, 8, 8]


def test_the_teachers_grid_is_its_own_schedulers_and_ends_clean():
    assert teacher_grid(Flow(), 2) == [1.0, 0.5, 0.0]
    assert teacher_grid(Flow(terminal=0.02), 3)[1:] == pytest.approx([1 - (1 / 3) * 1.47, 0.02, 0.0])


@pytest.mark.parametrize("S", [Flow(), EDM()], ids=["flow", "edm"])
def test_sampling_is_guided_steps_from_noise_and_the_estimate_at_the_end(S):
    world = World(DiffInstruct, S)
    batch, times = world.batch, S.steps(3)
    found = sample_teacher(world.teacher, batch.noise, batch.cond, batch.uncond, 3, 2.5)
    x = batch.noise * S.prior_std(times[0])
    for t, u in zip(times, [*times[1:], None]):
        t = torch.full((8,), t, dtype=torch.float64)
        D = world.guided(x, t, 2.5)
        x = D if u is None else ddim(S, D, x, t, torch.full_like(t, u))
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)
    assert len(world.teacher.calls) == 3
