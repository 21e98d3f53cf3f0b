"""Progressive distillation: two steps become one exactly, stage after stage, and on a mixture."""

import pytest
import torch

from fastgen.config.run import validate
from fastgen.diffusion.schedules import EDM, VP, Flow
from fastgen.objectives.progressive import Progressive, ProgressiveConfig
from fastgen.roles.roles import Student, StudentSpec
from fastgen.sampling.solvers import sample_teacher, solver_step
from fastgen.training.assembly import make_cast
from tests.support.replay import replay
from tests.support.spelled import Classes, Heard, World, at_x, gradient, line
from tests.support.toys import GaussianNet, batch_of, energy_distance, gaussian_role, rng, run_mixture

SHORT = {}
"""settings of the contract battery"""


def exact(S):
    teacher = gaussian_role(S, 0.5, 0.3)
    return lambda x, t: teacher(x, t, {})


def make(S, num, start=0.0, **cfg):
    student = Student(GaussianNet(S, 0.0, 1.0), None, StudentSpec(S.student_times(num, 0, start), "ode"))
    others = {name: gaussian_role(S, 0.5, 0.3) for name in ("teacher", "previous")}
    return Progressive(ProgressiveConfig(**cfg), {"student": student, **others}, rng())


def test_p1_one_step_to_the_target_is_two_of_the_teacher():
    own = [(S, 0) for S in (Flow(), Flow(3.0), EDM(), VP.scaled_linear())]
    for S, start in own + [(Flow(), 0.9), (EDM(), 30), (VP.scaled_linear(), 850), (VP.scaled_linear(), None)]:
        objective = make(S, 8, start or 0, ode_teacher="original")
        if start is None:  # a list of one's own
            times = [900.0, 880.0, 850.0, 700.0, 650.0, 600.0, 500.0, 200.0]
            objective.student = objective.student.with_times(times)
        x0 = torch.randn(200, 2, dtype=torch.float64)
        t, mid, end = objective.times(x0)
        assert ((t > mid) & (mid > end)).all() and len(set(t.tolist())) == 8
        assert t.max() == (900 if start is None else start or S.t_max)
        z = S.noise(x0, torch.randn_like(x0), t)
        D = exact(S)
        target = objective.target(z, t, mid, end, D)
        two = solver_step(S, D, solver_step(S, D, z, t, mid, "euler"), mid, end, "euler")
        inner = end > S.t_min
        one = S.ode_step(target, z, t, end)
        torch.testing.assert_close(one[inner], two[inner], rtol=1e-6, atol=1e-7)
        last = D(solver_step(S, D, z, t, mid, "euler"), mid)  # at the clean end x* = z_0
        torch.testing.assert_close(target[~inner], last[~inner])
        single = S.ode_step(D(z, t), z, t, end)  # negative check: one teacher step is not two
        assert (single - two)[inner].abs().max() > 1e-3


def test_p1_the_chain_of_targets_is_the_first_teachers_sampler():
    """Converged halvings cost nothing: 8 -> 4 -> 2 targets, applied, still land where 8 teacher steps do."""
    S = Flow()

    def halved(D, num):
        objective = make(S, num)
        coarse, fine = [*S.steps(num), 0.0], [*S.steps(2 * num), 0.0]

        def student(z, t):
            i = [j for j, c in enumerate(coarse) if abs(c - float(t[0])) < 1e-9][0]
            at = [torch.full((len(z),), v, dtype=torch.float64) for v in (fine[2 * i + 1], coarse[i + 1])]
            return objective.target(z, t, *at, D)

        return student

    D = halved(halved(exact(S), 4), 2)
    z = torch.randn(50, 2, dtype=torch.float64)
    x = z
    for t, u in ((1.0, 0.5), (0.5, 0.0)):
        t, u = (torch.full((50,), v, dtype=torch.float64) for v in (t, u))
        x = D(x, t) if u[0] == 0 else S.ode_step(D(x, t), x, t, u)
    torch.testing.assert_close(
        x, sample_teacher(gaussian_role(S, 0.5, 0.3), z, {}, {}, 8), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("source", ["original", "previous"])
@pytest.mark.parametrize("times", [[1.0, 0.5], [0.9, 0.6]])
def test_p1_step_is_the_formula(source, times):
    """Two steps of the guided teacher, or of the last stage's student told the same scale, become one."""
    S = Flow()
    previous = Heard(Classes(S, 0.9, 0.7).requires_grad_(False))
    span, parts = (1.0, 5.0), {"previous": previous}
    world = World(
        Progressive, S, times, "ode", span, num=16, parts=parts, ode_teacher=source, weighting="snr_plus_1"
    )
    (turn,), (call,) = world.turns(), world.student.calls
    z, t, w = call.x_t, call.t, call.cond["guidance"].double()
    world.noise_in(z, t, world.batch.x0)
    first = t == times[0]
    assert set(t.tolist()) == set(times) and w.std() > 0.5
    end = torch.where(first, times[1], 0.0).double()
    mid = (t + end) / 2
    if source == "previous":
        assert [float(p) for p in previous.backbone.parameters()] == pytest.approx([-0.6, 0.4])
        D = lambda x, t: previous.backbone(x, t, call.cond)  # noqa: E731
    else:
        D = lambda x, t: world.guided(x, t, w)  # noqa: E731
    z_mid = line(D(z, t), z, t, mid)
    z_end, share = line(D(z_mid, mid), z_mid, mid, end), (end / t)[:, None]
    target = ((z_end - share * z) / (1 - share)).detach()
    weight = ((1 - t) ** 2 / t**2 + 1)[:, None]
    wanted = at_x(lambda D: (weight * (D - target) ** 2).mean(), call.out)
    torch.testing.assert_close(gradient(turn.loss, call.out), wanted, rtol=1e-4, atol=1e-6)


def test_p1_later_stages_step_with_the_student_the_last_one_left():
    objective = make(Flow(), 4)
    objective.student.backbone.m.data.fill_(2.0)
    next(objective.step(batch_of(torch.randn(8, 2)), 0))
    assert float(objective.previous.backbone.m) == 2.0
    objective.student.backbone.m.data.fill_(3.0)
    next(objective.step(batch_of(torch.randn(8, 2)), 1))
    assert float(objective.previous.backbone.m) == 2.0


def test_p1_every_stage_starts_where_the_students_own_times_do():
    stages = [{"name": f"to{n}", "num_steps": n, "objective": {"name": "progressive"}} for n in (4, 1)]
    whole, own = [999.0, 749.0, 499.0, 249.0], [900.0, 800.0, 700.0, 300.0]
    for start, four in (([850], [850.0, 637.0, 425.0, 212.0]), ([], whole), (own, own)):
        student = {"sampler": "ode", "timesteps": start}
        teacher = {"path": "analytic:gmm2d-vp"}
        cfg = validate({"teacher": teacher, "student": student, "stages": stages})
        cast, (first, last) = make_cast(cfg), cfg.all_stages()
        assert cast.stage(first, rng()).student.times == four
        assert cast.stage(last, rng()).student.times == four[:1]


@pytest.mark.slow
def test_p2_distils_the_mixture_from_eight_steps_to_one(tmp_path):
    """One step of the student against eight of the guided teacher from the same noise."""
    first, later = ({"name": "progressive", "ode_teacher": who} for who in ("original", "previous"))
    stages = [(first, 120, 4), (later, 160, 2), (later, 260, 1)]
    _, _, samples, trainer = run_mixture(tmp_path, None, guidance=1.5, stages=stages, lr=2e-3)
    cast = trainer.cast
    noise = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(i)) for i in range(1500)])
    labels = cast.teacher.backbone.sample(1500, torch.Generator().manual_seed(7))[1]
    cond, uncond = cast.teacher.codec.labels(labels), cast.teacher.codec.null(1500)
    eight = sample_teacher(cast.parts["teacher"], noise, cond, uncond, 8, 1.5)
    one = sample_teacher(cast.parts["teacher"], noise, cond, uncond, 1, 1.5)
    assert energy_distance(samples, eight) < energy_distance(one, eight) / 20
    assert (samples - eight).square().mean() < (one - eight).square().mean() / 10


def test_p4_progressive(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "progressive"})
