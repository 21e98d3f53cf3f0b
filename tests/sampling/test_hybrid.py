"""Hybrid sampling: exact hand-over, counts, what a base step brings back, and the estimates on the way."""

import math

import pytest
import torch
from torch import nn

from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import EDM, VP, Flow
from fastgen.networks.analytic import GaussianMixture
from fastgen.networks.denoiser import Denoiser
from fastgen.roles.roles import Role, Student, StudentSpec
from fastgen.sampling.hybrid import Handover, estimates, handover, sample_hybrid
from fastgen.sampling.solvers import ImageNoise, sample_student, sample_teacher
from tests.support.spelled import Classes
from tests.support.toys import SCHEDULES, GaussianNet, gaussian_role

each = pytest.mark.parametrize("S", SCHEDULES.values(), ids=SCHEDULES.keys())
SEEDS, ONE, NULL = list(range(5)), {"class_labels": torch.ones(5)}, {"class_labels": torch.zeros(5)}


def pair(S, num=4, sampler="ode", net=Classes):
    """A base model, and a student with the same network on the base model's own grid of num steps."""
    one = net(S, 0.4, 0.7).requires_grad_(False)
    return Role(one), Student(one, None, StudentSpec(S.teacher_times(num), sampler))


@each
@pytest.mark.parametrize("start", range(5))
def test_the_same_network_on_the_same_grid_is_sampled_bit_for_bit(S, start):
    base, student = pair(S)
    plan = handover(base, student, 4, start)
    assert (plan.base_steps, plan.start) == (start, start)
    found = sample_hybrid(base, student, plan, SEEDS, (3,), ONE, NULL)
    wanted = sample_teacher(base, ImageNoise(SEEDS, (3,)).first, ONE, NULL, 4)
    assert torch.equal(found, wanted)


@each
def test_no_base_step_is_the_student_and_no_student_step_the_base(S):
    base, student = pair(S, sampler="renoise")
    noise = ImageNoise(SEEDS, (3,)).first
    alone = sample_hybrid(base, student, handover(base, student, 7, 0), SEEDS, (3,), ONE, NULL, 2.0)
    assert torch.equal(alone, sample_student(student, SEEDS, (3,), ONE))
    whole = sample_hybrid(base, student, handover(base, student, 7, 4), SEEDS, (3,), ONE, NULL, 2.0)
    assert torch.equal(whole, sample_teacher(base, noise, ONE, NULL, 7, 2.0))
    assert (whole - alone).abs().max() > 1e-2


@each
def test_the_base_ends_on_the_students_time_whatever_its_grid(S):
    base, student = pair(S)
    for num in (1, 2, 3, 4, 7):
        for start in (1, 2, 3):
            plan = handover(base, student, num, start)
            assert plan.base_times[-1] == student.times[start] and plan.base_steps >= 1
            assert list(plan.base_times) == sorted(plan.base_times, reverse=True)
            assert plan.nfe(student, 3.0) == 2 * plan.base_steps + 4 - start
            assert plan.nfe(student, 1.0) == plan.base_steps + 4 - start
    assert handover(base, student, 20, 1).base_steps > handover(base, student, 4, 1).base_steps


def test_guidance_acts_on_the_base_alone():
    base, student = pair(Flow())
    plan = handover(base, student, 4, 2)
    steps = [list(estimates(base, student, plan, SEEDS, (3,), ONE, NULL, w)) for w in (1.0, 3.0)]
    assert [who for who, *_ in steps[0]] == ["base", "base", "student", "student"]
    noise = ImageNoise(SEEDS, (3,)).first
    t = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(steps[1][0][2], base.guided(noise, t, ONE, NULL, 3.0))
    x_t = noise
    for (_, time, D), following in zip(steps[1][:2], plan.base_times[1:]):
        t, u = (torch.full((5,), v, dtype=torch.float64) for v in (time, following))
        x_t = Flow().ode_step(D, x_t, t, u)
    torch.testing.assert_close(steps[1][2][2], student(x_t, u, ONE))


@pytest.mark.parametrize(("own", "other"), [(Flow(), EDM()), (EDM(), VP.scaled_linear())])
def test_another_schedule_of_the_student_gets_x_in_its_own_scale(own, other):
    """One law under two schedules: mean and deviation stay, and are lost without the scale."""
    base, S = gaussian_role(own, 0.5, 0.4), other
    net = GaussianNet(S, 0.5, 0.4).requires_grad_(False)
    student = Student(net, None, StudentSpec(S.steps(200), "ode"))
    plan = handover(base, student, 200, 100)
    seeds = list(range(800))
    x = sample_hybrid(base, student, plan, seeds, (1,), {}, {})
    assert abs(float(x.mean()) - 0.5) < 0.05 and abs(float(x.std()) - 0.4) < 0.04
    wrong = Handover(plan.base_times, plan.start, 1.0)
    y = sample_hybrid(base, student, wrong, seeds, (1,), {}, {})
    assert abs(float(y.mean()) - 0.5) > 0.1 or abs(float(y.std()) - 0.4) > 0.1


# -- what a base step brings back ----------------------------------------------------------------------------
class Collapsed(Denoiser):
    """A student that knows one mode at pure noise, and below it goes to the nearer one."""

    prediction = "x0"

    def __init__(self, schedule, m):
        super().__init__()
        self.schedule, self.m = schedule, m
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x_t, t, cond):
        mode = torch.where(t[:, None] > 900, torch.ones_like(x_t), x_t.sign())
        return self.m * mode

    raw = forward


def two_modes(m):
    S = VP.scaled_linear()
    mixture = GaussianMixture(torch.tensor([[-m], [m]]), torch.full((2,), 0.05**0.5), torch.ones(2), S)
    return Role(mixture), Student(Collapsed(S, m), None, StudentSpec([999.0, 749.0, 499.0, 249.0]))


@pytest.mark.parametrize(("m", "share"), [(2.0, 0.6470), (4.0, 0.8320)])
def test_one_base_step_brings_a_lost_mode_back(m, share):
    """Alone the student follows its Markov chain of signs; after a base step both modes are even."""
    base, student = two_modes(m)
    S, chain = student.schedule, 1.0
    for time in student.times[1:]:
        t = torch.tensor([time])
        kept = 0.5 * (1 + math.erf(float(S.alpha(t) / S.sigma(t)) * m / 2**0.5))
        chain = chain * kept + (1 - chain) * (1 - kept)
    assert chain == pytest.approx(share, abs=1e-4)
    found, seeds = {}, list(range(6000))
    for start in (0, 1):
        plan = handover(base, student, 4, start)
        x = sample_hybrid(base, student, plan, seeds, (1,), {}, {})
        found[start] = float((x > 0).double().mean())
    assert found[0] == pytest.approx(share, abs=0.02)
    assert found[1] == pytest.approx(0.5, abs=0.02)


def test_estimates_are_posterior_means_and_variety_is_decided_early():
    """Their deviation over seeds, m = 2, is 0.27, 0.90, 1.67 and 2.00 at t = 999, 749, 499 and 249."""
    base, student = two_modes(2.0)
    plan = Handover((*base.schedule.teacher_times(100), 0.0), 0, 1.0)
    steps = list(estimates(base, None, plan, list(range(4000)), (1,), {}, {}, 1.0))
    assert len(steps) == 100 and all(who == "base" for who, *_ in steps)
    noise = ImageNoise(list(range(4000)), (1,)).first
    t = torch.full((4000,), 999.0, dtype=torch.float64)
    torch.testing.assert_close(steps[0][2], base(noise, t, {}))
    for time, wanted in ((999, 0.27), (749, 0.90), (499, 1.67), (249, 2.00)):
        D = min(steps, key=lambda step: abs(step[1] - time))[2]
        assert float(D.std()) == pytest.approx(wanted, abs=0.06), time


def test_mistakes_are_said():
    base, student = pair(Flow())
    with pytest.raises(UserError, match="--handover: found 5; give 0 to 4"):
        handover(base, student, 4, 5)
    with pytest.raises(UserError, match="--base_steps: found 0"):
        handover(base, student, 0, 1)
