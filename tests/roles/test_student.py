"""Students never change: every variation is another one over the same network."""

import dataclasses

import pytest
import torch

from fastgen.diffusion.schedules import EDM, Flow
from fastgen.roles.roles import Role, Student, Students, StudentSpec
from fastgen.roles.router import Router
from tests.support.spelled import HeardStudent, TwoTimes, World
from tests.support.toys import AffineStudent, GaussianNet

S = Flow()


def student(**spec) -> Student:
    return Student(GaussianNet(S, 0.0, 1.0), None, StudentSpec(S.steps(4), **spec))


@pytest.mark.parametrize(
    "name, value",
    [
        ("spec", StudentSpec([1.0])),
        ("times", [1.0]),
        ("sampler", "ode"),
        ("guidance", 3.0),
        ("guidance_range", (1.0, 2.0)),
        ("backbone", None),
        ("adapter", "student"),
        ("grid", 4),
    ],
)
def test_assignment_raises(name, value):
    made = student()
    with pytest.raises(AttributeError):
        setattr(made, name, value)
    assert made.spec == StudentSpec(S.steps(4)) and made.adapter is None and made.guidance is None


def test_a_spec_is_frozen_whole():
    times = [1.0, 0.5]
    spec = StudentSpec(times)
    times.append(0.1)
    assert spec.times == (1.0, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.times = (1.0,)
    made = Student(GaussianNet(S, 0.0, 1.0), None, spec)
    made.times.append(0.2)  # a list of the caller's own
    assert made.times == [1.0, 0.5]


def test_variations_leave_the_first_one_alone():
    first = student(guidance=2.0, guidance_range=(1.0, 4.0), grid=4)
    other = Role(GaussianNet(S, 1.0, 1.0), "critic")
    found = {
        "steps": first.with_steps(2),
        "times": first.with_times([0.9, 0.3], grid=8),
        "guidance": first.with_guidance(3.0),
        "network": first.with_network(other),
    }
    assert found["steps"].times == S.student_times(2, 4) and found["steps"].guidance == 2.0
    assert found["times"].times == [0.9, 0.3] and found["times"].spec.grid == 8
    assert found["guidance"].guidance == 3.0 == found["guidance"].spec.guidance
    assert found["network"].backbone is other.backbone and found["network"].adapter == "critic"
    assert found["network"].guidance is None, "the other network has no such input"
    assert all(one.backbone is first.backbone for name, one in found.items() if name != "network")
    assert first.times == S.steps(4) and first.guidance == 2.0 and first.spec.grid == 4


def test_the_number_of_steps_is_its_guidance_where_the_network_reads_it():
    counted = student(guidance=4.0, guidance_range=(1.0, 4.0), steps_as_guidance=True)
    assert [counted.with_steps(n).guidance for n in (0, 1, 2)] == [4.0, 1.0, 2.0]


def test_a_variation_keeps_its_class():
    affine = AffineStudent(S, 2.0, 0.5).with_steps(2)
    x, t = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert affine(x, t, {}).item() == 2.0  # its own formula, not its network's


def test_several_students_vary_together():
    members = [AffineStudent(S, m, 1.0) for m in (1.0, 2.0)]
    both = Students(members, Router(2, {"table": torch.tensor([0, 1, 0])}))
    two = both.with_steps(2)
    assert isinstance(two, Students) and two.times == S.steps(2)
    assert [m.times for m in two.members] == [S.steps(2)] * 2
    assert [m.times for m in both.members] == [S.steps(1)] * 2
    for member in members:
        member.backbone.float()  # what several students draw is float32
    x, t = torch.zeros(2, 1), torch.ones(2, dtype=torch.float64)
    assert two(x, t, {"class_labels": torch.tensor([1, 0])})[:, 0].tolist() == [2.0, 1.0]
    with pytest.raises(AttributeError):
        both.spec = StudentSpec([1.0])


def test_guided_is_the_condition_over_its_absence():
    """D_null + w (D_cond - D_null), w a number or one a row; a single pass at 1 and at 0."""
    from fastgen.objectives.diff_instruct import DiffInstruct

    world = World(DiffInstruct)
    x, t, teacher = world.batch.noise, torch.full((8,), 0.4, dtype=torch.float64), world.teacher
    for w in (0.0, 1.0, 2.5, torch.linspace(0, 3, 8, dtype=torch.float64)):
        teacher.calls.clear()
        found = teacher.guided(x, t, world.batch.cond, world.batch.uncond, w)
        torch.testing.assert_close(found, world.guided(x, t, w))
        once = isinstance(w, float) and w in (0, 1)
        assert len(teacher.calls) == 1 and len(teacher.calls[0].x_t) == (8 if once else 16)


@pytest.mark.parametrize("sampler", ["renoise", "ode", "tcd"])
@pytest.mark.parametrize("schedule", [Flow(), EDM()], ids=["flow", "edm"])
def test_generation_is_the_samplers_walk(sampler, schedule):
    """Three steps from noise at the first time: between them fresh noise, the ODE, or TCD's mixture; gradient
    in the last call alone; each told where it ends.
    """
    S, times = schedule, schedule.steps(3)
    student = HeardStudent(TwoTimes(S, 0.3, 0.5), times, sampler)
    student = student._copy(dataclasses.replace(student.spec, gamma=0.3 if sampler == "tcd" else 0.0))
    student.calls.clear()
    noise, fresh = torch.randn(2, 4, 3, dtype=torch.float64)
    cond = {"class_labels": torch.arange(4)}
    student.generate(noise, cond, lambda x: fresh)
    assert [call.grad for call in student.calls] == [False, False, True]
    torch.testing.assert_close(student.calls[0].x_t, noise * S.prior_std(times[0]))
    ends = [*(times[1:] if sampler == "ode" else [S.t_min] * 2), S.t_min]
    for call, t, end in zip(student.calls, times, ends):
        assert set(call.t.tolist()) == {t} and set(call.cond["r"].tolist()) == {end}
    for call, after in zip(student.calls, student.calls[1:]):
        t, u = call.t, after.t
        D, x_t = call.out, call.x_t
        if sampler == "renoise":
            wanted = S.noise(D, fresh, u)
        elif sampler == "ode":
            wanted = S.noise(D, (x_t - S.alpha(t)[:, None] * D) / S.sigma(t)[:, None], u)
        else:
            s = 0.7 * u
            x_s = S.noise(D, (x_t - S.alpha(t)[:, None] * D) / S.sigma(t)[:, None], s)
            ratio = (S.alpha(u) / S.alpha(s))[:, None]
            more = (S.sigma(u)[:, None] ** 2 - (ratio * S.sigma(s)[:, None]) ** 2).sqrt()
            wanted = ratio * x_s + more * fresh
        torch.testing.assert_close(after.x_t, wanted, rtol=1e-5, atol=1e-5)
