"""The exported scheduler, called with the number of steps alone, visits the student's own times."""

import numpy as np
import pytest

from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import EDM, VP, Flow
from fastgen.export.scheduler import scheduler_for
from fastgen.roles.roles import Student, StudentSpec
from tests.support.toys import GaussianNet

SCHEDULES = {"flow": Flow(), "flow3": Flow(3.0), "flow half": Flow(0.5), "vp": VP.scaled_linear()}


@pytest.mark.parametrize("sampler", ["renoise", "ode"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_set_timesteps_equals_our_times(schedule, sampler):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    S = SCHEDULES[schedule]
    for num in (1, 2, 4, 8):
        setup = scheduler_for(S.steps(num), sampler, S, theirs)
        assert setup.arguments == {} and not setup.needs_loop
        setup.scheduler.set_timesteps(num)
        scale, atol = (1, 0) if schedule == "vp" else (1000, 2e-3)
        expected = np.array(S.steps(num)) * scale
        np.testing.assert_allclose(setup.scheduler.timesteps.numpy(), expected, atol=atol)


@pytest.mark.parametrize("times", [[999.0, 600.0, 200.0], [399.0]])
def test_times_off_the_grid_are_passed_along(times):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_schedule="scaled_linear")
    for sampler in ("renoise", "ode"):
        setup = scheduler_for(times, sampler, VP.scaled_linear(), theirs)
        assert setup.arguments == {"timesteps": [int(t) for t in times]}
        setup.set_timesteps(len(times))
        assert setup.scheduler.timesteps.tolist() == times
    flow = scheduler_for([1.0, 0.9, 0.3], "renoise", Flow(3.0), None)
    flow.set_timesteps(3)
    np.testing.assert_allclose(flow.scheduler.sigmas[:-1], [1.0, 0.9, 0.3], rtol=1e-6)


@pytest.mark.parametrize("grid", [40, 50])
def test_one_scheduler_serves_every_count_of_a_grid(grid):
    """LCM and TCD read original_inference_steps; our times are those they pick, whatever divides what."""
    from diffusers import DDIMScheduler

    S, theirs = VP.scaled_linear(), DDIMScheduler(beta_schedule="scaled_linear")
    for sampler, gamma in (("renoise", 0.0), ("tcd", 0.3)):
        setup = scheduler_for(S.student_times(4, grid), sampler, S, theirs, grid=grid, gamma=gamma)
        assert setup.arguments == {} and setup.step == ({"eta": 0.3} if sampler == "tcd" else {})
        for num in (1, 2, 3, 4, 7, 8):
            setup.scheduler.set_timesteps(num)
            assert setup.scheduler.timesteps.tolist() == S.student_times(num, grid)
    assert S.student_times(4, 50) != S.student_times(4) and S.student_times(4, 40) == S.student_times(4)


def test_every_step_count_starts_where_the_students_own_list_does():
    def counts(S, times, *wanted):
        student = Student(GaussianNet(S, 0.0, 1.0), None, StudentSpec(times))
        return [student.with_steps(num).times for num in wanted]

    S = VP.scaled_linear()
    assert counts(S, [850.0], 1, 2, 4) == [[850.0], [850.0, 425.0], [850.0, 637.0, 425.0, 212.0]]
    assert counts(S, [850.0, 300.0], 0, 1, 2) == [[850.0, 300.0], [850.0], [850.0, 300.0]]
    assert counts(Flow(3.0), [0.9], 2) == [[0.9, pytest.approx(0.675)]]
    for num in (1, 3, 16):  # the schedule's own lists stay on its grid
        assert counts(S, S.steps(num), 4) == [S.steps(4)]


def test_edm_serving():
    from diffusers import EDMEulerScheduler

    S = EDM()
    for num in (1, 2, 4):
        setup = scheduler_for(S.steps(num), "ode", S, EDMEulerScheduler())
        setup.set_timesteps(num)
        np.testing.assert_allclose(setup.scheduler.sigmas[:-1], S.steps(num), rtol=1e-5)
        assert not setup.needs_loop
    assert scheduler_for(S.steps(2), "renoise", S, EDMEulerScheduler()).needs_loop
    with pytest.raises(UserError, match="student.timesteps"):
        scheduler_for([999.0, 499.5], "renoise", VP.scaled_linear(), EDMEulerScheduler())


def test_lcm_boundary_factors_are_negligible():
    """LCMScheduler mixes c_skip x_t into x0; up to 64 steps that is below 2e-5."""
    from diffusers import LCMScheduler

    scheduler, worst = LCMScheduler(), 0.0
    for num in (1, 2, 4, 8, 64):
        for t in VP.scaled_linear().steps(num):
            c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)
            worst = max(worst, float(c_skip), abs(1 - float(c_out)))
    assert worst < 2e-5
