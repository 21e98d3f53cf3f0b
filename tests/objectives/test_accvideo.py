"""AccVideo: key points of the teacher's walk, mean velocities, heads and queues by level, files of walks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import Flow
from fastgen.export.load import load_export
from fastgen.networks.denoiser import Denoiser
from fastgen.objectives.accvideo import AccVideo, AccVideoConfig
from fastgen.roles.heads import LevelHeads
from fastgen.roles.roles import Student, StudentSpec
from fastgen.sampling.solvers import jump, sample_teacher, undo_jump
from tests.support.play import batch as batch_for
from tests.support.replay import plainly, train
from tests.support.spelled import Judge, World, at_x, gradient, line, softplus_pair
from tests.support.tiny import flow_folder
from tests.support.toys import (
    FlowMap,
    GaussianNet,
    batch_of,
    each,
    fit,
    gaussian_role,
    rng,
    run_mixture,
)

SHORT = {"teacher_steps": 2}
STUDENT = {"num_steps": 2, "sampler": "ode"}
"""settings of the contract battery"""


def make(S, student=None, steps=4, guidance=1.0, teacher=None, heads=None, **cfg):
    """An objective over the exact Gaussian N(0.5, 0.3^2); regression alone unless `heads` are given."""
    student = student or GaussianNet(S, 0.0, 1.0)
    cfg = {"teacher_steps": 2 * steps, "gan_weight": 0.0 if heads is None else 0.1, **cfg}
    parts = {"student": Student(student, None, StudentSpec(S.steps(steps), "ode")), "heads": heads}
    parts["teacher"] = teacher or gaussian_role(S, 0.5, 0.3)
    objective = AccVideo(AccVideoConfig(**cfg), parts, rng(), guidance)
    objective.prepare()
    return objective


class Segments(FlowMap):
    """The estimate whose step from each time of a list ends on the exact flow of N(m, s^2)."""

    def __init__(self, schedule, times, m=0.5, s=0.3):
        super().__init__(schedule, m, s)
        self.ends = torch.tensor([*times, schedule.t_min], dtype=torch.float64)

    def forward(self, x_t, t, cond):
        r = self.ends[(self.ends[None] - t[:, None]).abs().argmin(1) + 1]
        return super().forward(x_t, t, {"r": r})


class Stored(Denoiser):
    """Answers with the target of whichever stored trajectory it is shown a point of."""

    prediction = "x0"

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.rows, self.times = schedule, None, None
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, x_t, t, cond):
        i = (torch.tensor(self.times) - t[0]).abs().argmin()
        u = torch.full_like(t, self.times[i + 1])
        return undo_jump(self.schedule, self.rows[:, i + 1], x_t, t, u) + self.zero


# -- P1: trajectories and their regression -------------------------------------------------------------------
@each
def test_p1_a_perfect_student_walks_along_the_stored_points_to_their_end(schedule):
    """Spec 1: x_i + (t_{i+1} - t_i) target = x_{i+1}, and m such steps are the trajectory."""
    net = Stored(schedule)
    objective = make(schedule, net)
    batch = batch_of(torch.zeros(6, 2, dtype=torch.float64))
    rows = objective.pairs(batch, objective.teacher)
    net.rows, net.times = rows, objective.times
    losses = [float(loss.detach()) for loss, _ in objective.step(batch, 0)]
    assert len(losses) == 4 and max(losses) < 1e-12
    start = rows[:, 0] / schedule.prior_std(objective.times[0])
    end = objective.student.generate(start, {}, torch.randn_like)
    torch.testing.assert_close(end, rows[:, -1].float(), check_dtype=False, rtol=1e-4, atol=1e-5)
    exact = gaussian_role(schedule, 0.5, 0.3)
    whole = sample_teacher(exact, start, {}, {}, 8).float()
    torch.testing.assert_close(whole, rows[:, -1].float(), rtol=1e-4, atol=1e-5)
    few = sample_teacher(exact, start, {}, {}, 4)  # negative: the teacher in as few steps
    assert (few - whole).abs().max() > 1e-2


@each
def test_p1_mean_velocity_of_an_exact_teacher_is_closed_form(schedule):
    """Spec 2: one deterministic map, so that the optimum has no loss; the velocity at the start has some."""
    times = schedule.steps(4)
    found = {}
    for name, net in {
        "segments": Segments(schedule, times),
        "instant": GaussianNet(schedule, 0.5, 0.3),
    }.items():
        objective = make(schedule, net, teacher_steps=200)
        found[name] = [
            float(loss.detach()) for loss, _ in objective.step(batch_of(torch.zeros(64, 1).double()), 0)
        ]
    assert all(a < 2e-3 * b for a, b in zip(found["segments"], found["instant"])), found


def test_p1_key_times_of_shift_seven_need_explicit_sigmas():
    """Spec 3: every tenth of fifty; diffusers' own spacing of five steps is another."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    S = Flow(7.0)
    keys = torch.tensor([1, 0.9655, 0.9130, 0.8235, 0.6364])
    torch.testing.assert_close(torch.tensor(S.steps(50)[::10]), keys, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(S.steps(5)), keys, atol=1e-4, rtol=0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(sigmas=[1, 0.8, 0.6, 0.4, 0.2])
    torch.testing.assert_close(scheduler.sigmas[:-1], keys, atol=1e-4, rtol=0)
    scheduler.set_timesteps(5)
    assert (scheduler.sigmas[:-1] - keys).abs().max() > 0.5
    objective = make(S, steps=5, teacher_steps=50)
    next(objective.step(batch_of(torch.zeros(2, 1)), 0))
    assert objective.pairs.where == [10, 20, 30, 40] and objective.times == [*S.steps(5), 0.0]


def test_p1_as_many_key_times_as_steps_is_the_teacher_itself():
    """Spec 4: m = n."""
    for teacher_steps, same in ((4, True), (8, False)):
        objective = make(Flow(), GaussianNet(Flow(), 0.5, 0.3), teacher_steps=teacher_steps)
        losses = [float(loss.detach()) for loss, _ in objective.step(batch_of(torch.zeros(8, 1).double()), 0)]
        assert (max(losses) < 1e-12) == same, losses


@each
def test_p1_step_is_the_formula(schedule):
    """Two steps of the guided teacher's walk: both losses of the student at each, and the heads'."""
    S, m = schedule, 2
    judges = LevelHeads(Judge() for _ in range(m))
    for i, judge in enumerate(judges):
        judge.a.data += 0.3 * i
    world = World(
        AccVideo, S, S.steps(m), "ode", num=16, parts={"heads": judges}, teacher_steps=4, gan_weight=0.7
    )
    turns = world.turns()
    assert [t.player for t in turns] == ["student", "student", "disc"] * m
    calls, times = world.student.calls, [*S.steps(m), S.t_min]
    assert len(calls) == 2 * m and all(call.grad for call in calls)
    rows = torch.stack([world.objective.pairs.rows[n] for n in range(16)])
    rows = rows.double()
    grid = [*S.teacher_times(4), S.t_min]
    x, y = rows[:, 0], world.batch.noise * S.prior_std(times[0])
    at = lambda t: torch.full((16,), t, dtype=torch.float64)  # noqa: E731
    velocity = lambda D, x_t, t: S.from_x0("flow", D, x_t, t)  # noqa: E731
    for i in range(m):
        t, u = at(times[i]), at(times[i + 1])
        regression, walked = calls[2 * i : 2 * i + 2]
        torch.testing.assert_close(regression.x_t, x, rtol=1e-4, atol=1e-5)
        assert torch.equal(regression.t, t) and regression.cond is world.batch.cond
        for a, b in zip(grid[2 * i : 2 * i + 2], grid[2 * i + 1 : 2 * i + 3]):
            D = world.guided(x, at(a))
            x = jump(S, D, x, at(a), at(b))
        torch.testing.assert_close(rows[:, i + 1], x, rtol=1e-4, atol=1e-5)
        goal = undo_jump(S, rows[:, i + 1], rows[:, i], t, u)
        error = lambda D, r=rows[:, i], g=goal, t=t: (velocity(D, r, t) - velocity(g, r, t)) ** 2  # noqa: E731
        wanted = at_x(lambda D, f=error: f(D).mean(), regression.out)
        torch.testing.assert_close(gradient(turns[3 * i].loss, regression.out), wanted, rtol=1e-3, atol=1e-6)
        if isinstance(S, Flow):  # the paper's own words
            mean = (rows[:, i + 1] - rows[:, i]) / (u - t)[:, None]
            torch.testing.assert_close(velocity(goal, rows[:, i], t), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(walked.x_t, y, rtol=1e-4, atol=1e-5)
        judge, cond = judges[i], world.batch.cond
        score = lambda D, y=y, t=t, u=u, j=judge, c=cond: F.softplus(-j.logit(jump(S, D, y, t, u), u, c))  # noqa: E731
        wanted = at_x(lambda D, f=score: 0.7 * f(D).mean(), walked.out)
        torch.testing.assert_close(gradient(turns[3 * i + 1].loss, walked.out), wanted, rtol=1e-4, atol=1e-7)
        y = jump(S, walked.out, y, t, u).detach()
        pair = softplus_pair(judge.logit(y, u, cond), judge.logit(rows[:, i + 1], u, cond))
        torch.testing.assert_close(turns[3 * i + 2].loss, pair, rtol=1e-5, atol=1e-6)
    if isinstance(S, Flow):
        torch.testing.assert_close(line(walked.out, walked.x_t, t, u), y, rtol=1e-5, atol=1e-6)


# -- P1: heads and queues ------------------------------------------------------------------------------------
def trained(tiny, **cfg):
    """(cast, objective, batch) on a tiny UNet in three steps."""
    from fastgen.core.rng import Rng
    from fastgen.training.assembly import make_cast

    values = {
        "teacher": {"path": str(tiny("flow"))},
        "student": {"num_steps": 3, "sampler": "ode"},
        "objective": {"name": "accvideo", "teacher_steps": 3, **cfg},
        "data": {"name": "fashion"},
    }
    cfg = validate(values)
    cast = make_cast(cfg)
    objective = cast.stage(cfg.all_stages()[0], Rng(0))
    objective.prepare()
    return cast, objective, batch_for(cast)


@pytest.mark.parametrize("heads", ["per_level", "shared"])
def test_p1_a_level_updates_its_own_heads_alone(heads, tiny):
    """Spec 5; the negative is one set of heads for all levels."""
    _, objective, batch = trained(tiny, heads=heads)
    assert len(objective.heads) == (3 if heads == "per_level" else 1)
    updated = []
    for loss, _ in objective.step(batch, 0):
        loss.backward()
        if objective.active == "disc":
            updated.append(
                [i for i, h in enumerate(objective.heads) if any(p.grad is not None for p in h.parameters())]
            )
        for p in (*objective.heads.parameters(), *objective.learned("student").values()):
            p.grad = None
    assert updated == ([[0], [1], [2]] if heads == "per_level" else [[0], [0], [0]])


def test_p1_heads_of_clean_data_read_earlier_in_the_teacher(tiny):
    _, objective, _ = trained(tiny)
    noisy, _, clean = (h.taps for h in objective.heads)
    base = objective.teacher.backbone
    total = len(base.family.taps(base.net))
    assert noisy == (total - 1,) and clean == (round(total * 2 / 3) - 1,) and clean != noisy
    _, shared, _ = trained(tiny, heads="shared")
    assert [h.taps for h in shared.heads] == [noisy]


def test_p1_after_a_sweep_the_last_queue_holds_one_state_and_no_other_any(tiny, monkeypatch):
    """Spec 6; the negative: reading the level's own queue instead of the one before finds nothing."""
    _, objective, batch = trained(tiny)
    sizes = []
    for _, logs in objective.step(batch, 0):
        if "gan" in logs:
            sizes.append([len(q) for q in objective.queues])
    assert sizes == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    list(objective.step(batch, 1))
    assert [len(q) for q in objective.queues] == [0, 0, 0, 1], "it does not grow from step to step"
    with pytest.raises(IndexError):
        for _, logs in objective.step(batch, 2):
            if "trajectory" in logs:
                objective.queues = [*objective.queues[1:], objective.queues[0]]


def test_p1_gradient_passes_through_the_teacher_and_not_into_it(tiny):
    """Spec 7; the negative: features of a detached sample leave the student without gradient."""
    for detached in (False, True):
        _, objective, batch = trained(tiny)
        role = objective.teacher
        if detached:
            real = role.features
            cut = lambda x, t, c, taps=(-1,), score=False: real(x.detach(), t, c, taps, score)  # noqa: E731, B023
            object.__setattr__(role, "features", cut)
        found = []
        for loss, logs in objective.step(batch, 0):
            if "gan" in logs and not loss.requires_grad:
                found.append(0.0)
                continue
            if "gan" in logs:
                loss.backward()
                grads = [p.grad for p in objective.learned("student").values() if p.grad is not None]
                found.append(float(sum(g.abs().sum() for g in grads)))
            for p in objective.learned("student").values():
                p.grad = None
        assert (min(found) > 0) if not detached else (max(found) == 0), found
        assert all(p.grad is None for p in role.backbone.parameters())


def test_accumulation_is_refused():
    values = {"objective": {"name": "accvideo"}, "student": STUDENT, "data": {"name": "digits"}}
    with pytest.raises(UserError, match="train.gradient_accumulation_steps: found 2; accvideo"):
        validate({**values, "train": {"gradient_accumulation_steps": 2}})
    with pytest.raises(UserError, match="deterministic walk: use ode"):
        validate({**values, "student": {"num_steps": 5}})


# -- P2 and P4 -----------------------------------------------------------------------------------------------
def test_p2_regression_of_a_gaussian_is_solved_exactly():
    """The mean velocity has one optimum, which training finds: the student's samples are the teacher's."""
    S = Flow()
    net = Segments(S, S.steps(2), 0.0, 1.0)
    objective = make(S, net, steps=2, teacher_steps=100)
    fit(objective, lambda r: r.randn(64, 1).double(), 300, lr=0.03)
    assert float(net.m.detach()) == pytest.approx(0.5, abs=0.02)
    assert float(net.s.detach()) == pytest.approx(0.3, abs=0.02)


@pytest.mark.slow
def test_p2_distils_the_mixture(tmp_path):
    """Two steps of eight, with heads on the exact teacher's features."""
    objective = {"name": "accvideo", "teacher_steps": 8}
    before, after, _, _ = run_mixture(
        tmp_path, objective, steps=60, num_steps=2, batch=128, lr=3e-3, student={"sampler": "ode"}
    )
    assert after < before / 3 and after < 0.02, (before, after)


EXPLICIT = """
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
unet = UNet2DModel.from_pretrained(".", subfolder="unet", torch_dtype=torch.float32)
scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
def draw(**how):
    scheduler.set_timesteps(**how)
    x = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, class_labels=torch.arange(10)).sample, t, x).prev_sample
    return (torch.nn.functional.pixel_shuffle(x, 2) / 2 + 0.5).clamp(0, 1)
images = torch.stack([draw(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2]), draw(num_inference_steps=5)])
"""


def test_p4_accvideo(tmp_path):
    """The shift-7 grid in plain diffusers by explicit sigmas; its own spacing of five steps is another."""
    teacher = flow_folder(tmp_path / "teacher", shift=7.0)
    student = {"num_steps": 5, "sampler": "ode"}
    objective = {"name": "accvideo", "teacher_steps": 10}
    export = train(lambda family: teacher, tmp_path, objective, student=student)
    explicit, plain = plainly(EXPLICIT, export)
    x = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = {"class_labels": torch.arange(10)}
    loaded, base = load_export(str(export)), load_export(str(teacher))
    assert loaded.role.times == pytest.approx(Flow(7.0).steps(5))
    with torch.no_grad():
        ours = loaded.codec.decode(loaded.role.generate(x, cond, torch.randn_like))
        untrained = base.codec.decode(loaded.role.with_network(base.role).generate(x, cond, torch.randn_like))
    assert (explicit - ours).abs().max() < 1e-4
    assert (plain - ours).abs().max() > 3e-3 and (explicit - untrained).abs().max() > 1e-2
