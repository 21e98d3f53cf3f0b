"""Every schedule: derivatives, conversions, inverses, scores and the grids few-step sampling visits."""

import math

import pytest
import torch

from fastgen.diffusion.schedules import EDM, KINDS, VP, Flow, LocalVP, TrigFlow

SCHEDULES = {
    "vp": VP.scaled_linear(),
    "flow": Flow(),
    "flow3": Flow(3.0),
    "edm": EDM(),
    "trig": TrigFlow(0.5),
    "local": LocalVP.around(VP.scaled_linear()),
}
each = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def times(schedule, num=17):
    """Interior times; for VP off the integers, where the interpolated log-SNR has a slope."""
    u = torch.linspace(0.05, 0.95, num, dtype=torch.float64)
    return schedule.from_unit(u) + (0.37 if isinstance(schedule, VP) else 0.0)


@each
def test_derivatives_agree_with_autograd(schedule):
    t = times(schedule).requires_grad_()
    for f, df in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)):
        value = f(t)
        slope = torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(df(t.detach()), slope, rtol=1e-8, atol=1e-10)


@each
def test_velocity_is_the_slope_of_the_pair_and_level_that_of_a_flow_at_the_same_ratio(schedule):
    t = times(schedule)
    x0, eps = torch.randn(2, len(t), 3, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda t: schedule.noise(x0, eps, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(schedule.velocity(x0, eps, t), slope, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(Flow().log_snr(schedule.level(t)), schedule.log_snr(t))
    assert schedule.gap(t, t).abs().max() == 0 and (schedule.gap(t[1:], t[:-1]) > 0).all()


@each
@pytest.mark.parametrize("kind", KINDS)
def test_conversions_are_inverse_and_true_to_definition(schedule, kind):
    t = times(schedule)
    x0, eps = torch.randn(2, len(t), 3, dtype=torch.float64)
    x_t = schedule.noise(x0, eps, t)
    a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    meaning = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": eps - x0, "score": -eps / s}[kind]
    torch.testing.assert_close(schedule.to_x0(kind, meaning, x_t, t), x0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(schedule.from_x0(kind, x0, x_t, t), meaning, rtol=1e-6, atol=1e-6)


def test_unknown_kind_is_refused():
    x, t = torch.zeros(1, 1), torch.ones(1)
    with pytest.raises(ValueError, match="prediction kind 'noise'"):
        Flow().to_x0("noise", x, x, t * 0.5)


@each
def test_score_of_a_gaussian(schedule):
    t, s0 = times(schedule), 0.7
    x = torch.randn(len(t), 2, dtype=torch.float64)
    a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    D = a * s0**2 * x / (a**2 * s0**2 + s**2)
    torch.testing.assert_close(schedule.score(D, x, t), -x / (a**2 * s0**2 + s**2), rtol=1e-6, atol=1e-8)


@each
def test_log_snr_inverts(schedule):
    t = times(schedule)
    torch.testing.assert_close(schedule.t_from_lambda(schedule.log_snr(t)), t, rtol=1e-7, atol=1e-9)


@each
@pytest.mark.parametrize("other", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_map_to_keeps_the_signal_to_noise_ratio(schedule, other):
    u = torch.linspace(0.02, 0.7, 18, dtype=torch.float64)  # low ones, for where there is no pure noise
    t = schedule.from_unit(u)
    mapped, scale = schedule.map_to(other, t)
    inside = (mapped > other.t_min) & (mapped < other.t_max)
    assert inside.sum() >= 3
    torch.testing.assert_close(
        (schedule.alpha(t) * scale)[inside], other.alpha(mapped)[inside], rtol=1e-6, atol=1e-9
    )
    torch.testing.assert_close(
        (schedule.sigma(t) * scale)[inside], other.sigma(mapped)[inside], rtol=1e-6, atol=1e-9
    )


@each
def test_ode_step_is_exact_for_a_point_mass_and_identity_in_place(schedule):
    t = times(schedule)
    x0, eps = torch.randn(2, len(t), 3, dtype=torch.float64)
    x_t, u = schedule.noise(x0, eps, t), schedule.from_unit(torch.full((len(t),), 0.03, dtype=torch.float64))
    torch.testing.assert_close(
        schedule.ode_step(x0, x_t, t, u), schedule.noise(x0, eps, u), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(schedule.ode_step(torch.randn_like(x0), x_t, t, t), x_t, rtol=1e-6, atol=1e-7)


@each
def test_renoise_composes_to_the_marginal_variance(schedule):
    u, t = schedule.from_unit(torch.tensor([0.2])), schedule.from_unit(torch.tensor([0.8]))
    ratio = schedule.alpha(t) / schedule.alpha(u)
    one = torch.ones(1, 1, dtype=torch.float64)
    extra = schedule.renoise(one * 0, one, u, t)
    total = (ratio * schedule.sigma(u)) ** 2 + extra.squeeze() ** 2
    torch.testing.assert_close(total, schedule.sigma(t) ** 2, rtol=1e-9, atol=1e-12)


def test_stable_diffusion_constants():
    bar = SCHEDULES["vp"].alpha(torch.tensor([999.0, 749.0, 499.0, 399.0, 249.0])) ** 2
    expected = torch.tensor([0.004660, 0.056623, 0.277670, 0.426086, 0.675432], dtype=torch.float64)
    torch.testing.assert_close(bar, expected, rtol=0, atol=1e-6)


def test_lidiff_constants_and_its_one_solver_step():
    """Levels of the linear betas from 3.5e-5 to 0.007. LiDiff samples unscaled data by the steps of scaled
    ones: one from the last time is (o - s eps) / sqrt(abar), which magnifies an error of eps 5.7 times; the
    local estimate is o - s eps.
    """
    from diffusers import DPMSolverMultistepScheduler

    known = {"beta_start": 3.5e-5, "beta_end": 0.007, "beta_schedule": "linear"}
    solver = DPMSolverMultistepScheduler(**known, algorithm_type="sde-dpmsolver++", solver_order=2)
    vp = VP(solver.alphas_cumprod)
    local, last = LocalVP.around(vp), torch.tensor([999.0], dtype=torch.float64)
    assert float(vp.alpha(last) ** 2) == pytest.approx(0.02943, abs=1e-5)
    assert float(local.sigma(last)) == pytest.approx(0.98518, abs=1e-5) == local.prior_std(999.0)
    o, eps = torch.randn(2, 1, 5, 3, generator=torch.Generator().manual_seed(0)).unbind(0)
    solver.set_timesteps(1)
    assert int(solver.timesteps[0]) == 999
    stepped = solver.step(eps, solver.timesteps[0], o, variance_noise=torch.zeros_like(o)).prev_sample
    torch.testing.assert_close(stepped, vp.to_x0("eps", eps, o, last), rtol=1e-5, atol=1e-5)
    estimate = local.to_x0("eps", eps, o, last)
    torch.testing.assert_close(stepped / estimate, torch.full_like(o, 1 / 0.17155), rtol=1e-3, atol=1e-3)


def test_karras_grid_constants():
    i = torch.tensor([0.0, 20, 500, 980, 999], dtype=torch.float64) / 999
    expected = torch.tensor([0.002, 0.0032, 2.5265, 72.05, 80], dtype=torch.float64)
    torch.testing.assert_close(EDM().from_unit(i), expected, rtol=2e-2, atol=1e-4)


def test_step_lists():
    assert VP.scaled_linear().steps(4) == [999, 749, 499, 249]
    assert VP.scaled_linear().steps(1) == [999]
    assert Flow().steps(4) == [1, 0.75, 0.5, 0.25]
    assert Flow(3.0).steps(4) == pytest.approx([1, 0.9, 0.75, 0.5])
    assert EDM().steps(1) == pytest.approx([80])
    assert TrigFlow().steps(2) == pytest.approx([math.pi / 2, math.pi / 4])


@pytest.mark.parametrize("num, segments, ends", [(50, 4, (0, 239, 499, 739)), (40, 4, (0, 249, 499, 749))])
def test_segment_ends(num, segments, ends):
    """PCM's table: edges at floor(j K / k), each segment ending at the predecessor of its first point."""
    from fastgen.sampling.solvers import segment_ends, teacher_grid

    grid = torch.tensor(teacher_grid(VP.scaled_linear(), num))
    where = segment_ends(num, segments)
    assert sorted(set(grid[where].tolist())) == list(ends)
    assert (where > torch.arange(num)).all() and (where.diff() >= 0).all()
    assert segment_ends(num, num).tolist() == list(range(1, num + 1)) and set(
        segment_ends(num, 1).tolist()
    ) == {num}


@each
def test_jump_is_the_identity_in_place_and_d_at_the_clean_end(schedule):
    from fastgen.sampling.solvers import jump

    x, D = torch.randn(2, 6, 3, dtype=torch.float64)
    t = schedule.from_unit(torch.full((6,), 0.4))
    torch.testing.assert_close(jump(schedule, D, x, t, t), x, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(jump(schedule, D, x, t, torch.full((6,), schedule.t_min).double()), D)
