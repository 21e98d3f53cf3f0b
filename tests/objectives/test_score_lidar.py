"""ScoreLiDAR: the score reaches the student, structure is of sets, and one step completes an exact cloud."""

import pytest
import torch

from fastgen.core.batch import Batch
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import VP
from fastgen.objectives.score_lidar import ScoreLiDAR, ScoreLiDARConfig, noise_difference
from fastgen.objectives.shared.clouds import chamfer, key_points, squared_chamfer, structure
from fastgen.roles.roles import Role, Student, StudentSpec
from fastgen.sampling.solvers import sample_teacher
from fastgen.threed import metrics
from tests.support.clouds import ExactCloud, FreePoints, levels, tiny_world
from tests.support.replay import replay
from tests.support.spelled import FAR, NEAR, World, gradient
from tests.support.toys import rng, run_mixture

SHORT = {"scene_weight": 0.0, "key_weight": 0.0}
"""settings of the contract battery"""


def lattice(num=6):
    """Two planes of num^2 points each, unit spacing."""
    a = torch.arange(float(num))
    flat = torch.stack(torch.meshgrid(a, a, indexing="ij"), -1).flatten(0, 1)
    low, wall = torch.cat([flat, 0 * flat[:, :1]], 1), torch.cat([0 * flat[:, :1], flat], 1)
    return torch.cat([low, wall])


def test_p1_step_is_the_formula():
    """e_T^w - e_F by element, and the critic at its own times."""
    world = World(ScoreLiDAR, VP.scaled_linear(), time=NEAR, critic_time=FAR, **SHORT)
    student, critic = world.turns()
    x = world.student.calls[0].out
    x_t, t = world.shown(world.teacher)
    world.within(t, NEAR)
    world.noise_in(x_t, t, x)
    real, fake = world.noises(x_t, t)
    torch.testing.assert_close(
        gradient(student.loss, x), ((real - fake) / x.numel()).detach(), rtol=1e-4, atol=1e-7
    )
    assert abs(world.check_critic(critic, x)) < 1e-12


def test_p1_the_published_product_has_no_gradient():
    """mean((e_T - e_F)(x_t - x)): x_t - x is sigma eps, whatever x. With x instead it has the due one."""
    S, generator = levels(), torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 3, generator=generator, requires_grad=True)
    real, fake, eps = torch.randn(3, 2, 9, 3, generator=generator).unbind(0)
    t = torch.tensor([300.0, 800.0], dtype=torch.float64)
    x_t = S.noise(x, eps, t)
    gap = (S.from_x0("eps", real, x_t, t) - S.from_x0("eps", fake, x_t, t)).detach()
    published = torch.autograd.grad((gap * (x_t - x)).mean(), x, retain_graph=True)[0]
    assert published.abs().max() == 0
    due = torch.autograd.grad((gap * x).mean(), x, retain_graph=True)[0]
    ours = torch.autograd.grad(noise_difference(S, x, real, fake, t), x)[0]
    torch.testing.assert_close(ours, due)
    assert due.abs().max() > 1e-3


def test_p1_structure_does_not_ask_for_an_order():
    """The clouds' points in another order change no term; the published index-by-index error sees them."""
    y = lattice()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x = (y + 0.1)[order][None].requires_grad_(True)
    keys = torch.arange(0, len(y), 5)[None]
    same = (y + 0.1)[None]
    for term in (squared_chamfer, lambda a, b: structure(a, b, keys), chamfer):
        torch.testing.assert_close(term(x, y[None]), term(same, y[None]))
    assert float(squared_chamfer(same, y[None])) == pytest.approx(0.01, rel=1e-4)
    assert float((x.detach() - y[None]).square().mean()) > 1
    assert float(structure(same, y[None], keys)) < 1e-6, "a shift leaves distances as they are"
    assert float(structure(1.5 * same, y[None], keys)) > 0.1
    squared_chamfer(x, y[None]).sum().backward()
    assert x.grad.abs().max() > 0


def test_p1_the_structural_terms_are_added_by_their_weights():
    student, batch, teacher, other = tiny_world()
    student.backbone.requires_grad_(True)
    parts = {"student": student, "teacher": teacher, "critic": other}
    objective = ScoreLiDAR(ScoreLiDARConfig(scene_weight=0.7, key_weight=0.2), parts, rng())
    objective.rng.reset(0)
    total, logs = next(objective.step(batch, 0))
    torch.testing.assert_close(total, logs["score"] + 0.7 * logs["scene"] + 0.2 * logs["keys"])
    with torch.no_grad():
        x = student.generate(batch.noise, batch.cond, torch.randn_like)
    starts = batch.cond["start"].repeat_interleave(5, 1)
    torch.testing.assert_close(logs["scene"].detach(), squared_chamfer(starts + x, starts + batch.x0).mean())
    assert float(logs["keys"].detach()) > 1e-3
    assert abs(float(logs["scene"].detach() - squared_chamfer(x, batch.x0).mean())) > 1e-3, "where points are"


def test_p1_chamfer_is_that_of_the_metrics():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 50, 3, generator=generator).unbind(0)
    for i in range(2):
        assert float(chamfer(a, b)[i]) == pytest.approx(metrics.chamfer(a[i], b[i]), rel=1e-5)


def test_p1_key_points_are_at_the_edge():
    """Of two planes that meet the most curved points are where they do."""
    y = lattice(8)
    keys = key_points(y[None], torch.arange(len(y))[None], 9, 0.1)[0]
    assert y[keys][:, [0, 2]].amax() <= 2, y[keys]


def test_structure_is_refused_of_pictures():
    with pytest.raises(UserError, match=r"objective\.scene_weight.*compares point clouds"):
        World(ScoreLiDAR, key_weight=0.0).turns()


def exact_world(num=150):
    """The teacher of two planes, and the scan of a tenth of their points; noise up to a standard deviation of
    .98 around extents of 3.
    """
    generator = torch.Generator().manual_seed(0)
    flat = torch.rand(2 * num, 2, generator=generator) * 3
    zero = torch.zeros(num, 1)
    truth = torch.cat([torch.cat([flat[:num], zero], 1), torch.cat([zero, flat[num:]], 1)])
    scan = truth[torch.randperm(2 * num, generator=generator)[: num // 5]]
    return truth, scan, ExactCloud(truth, levels())


def completion(role, scan, steps, seeds=4):
    """Chamfer distance of completions by the ODE, and of those where it starts."""
    generator = torch.Generator().manual_seed(3)
    cond = {"start": scan.expand(seeds, -1, -1), "scan": scan.expand(seeds, -1, -1)}
    noise = torch.randn(seeds, 10 * len(scan), 3, generator=generator)
    start = cond["start"].repeat_interleave(10, 1)
    x = sample_teacher(role, noise, cond, cond, steps)
    return start + x, start + noise * role.schedule.prior_std(role.schedule.steps(steps)[0])


def test_p2_the_exact_teacher_closes_the_gap_in_steps():
    truth, scan, teacher = exact_world()
    far = {n: completion(Role(teacher), scan, n) for n in (1, 8)}
    of = {n: float(chamfer(x, truth.expand(4, -1, -1)).mean()) for n, (x, _) in far.items()}
    noised = float(chamfer(far[8][1], truth.expand(4, -1, -1)).mean())
    assert of[8] < 0.6 * of[1] < 0.6 * noised, (of, noised)


def free_points(critic_is_told=True, steps=250):
    """Chamfer distance to the truth of 300 free points, before and after they follow the exact teacher, with
    the exact score of the points themselves or with the critic left where it was.
    """
    truth, scan, teacher = exact_world()
    S, generator = levels(), torch.Generator().manual_seed(1)
    start = scan.repeat_interleave(10, 0)
    net = FreePoints(0.98 * torch.randn(start.shape, generator=generator), S)
    own = ExactCloud((start + net.x).detach().clone(), S)
    parts = {"student": Student(net, None, StudentSpec(S.steps(1))), "teacher": Role(teacher)}
    objective = ScoreLiDAR(
        ScoreLiDARConfig(time={"low": 0.02, "high": 0.98}, **SHORT), parts | {"critic": Role(own)}, rng()
    )
    optimizer = torch.optim.Adam([net.x], 0.05)
    cond = {"start": scan[None], "scan": scan[None]}
    batch = Batch(None, cond, cond, torch.zeros(1, *start.shape), torch.arange(1))
    found = [metrics.chamfer(start + net.x.detach(), truth)]
    for k in range(steps):
        objective.rng.reset(k)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - k / steps)
        loss, _ = next(objective.step(batch, k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if critic_is_told:
            own.truth = (start + net.x).detach().clone()
    return [*found, metrics.chamfer(start + net.x.detach(), truth)]


def test_p2_free_points_follow_the_exact_local_teacher():
    """With their own exact score they end where the teacher's eight steps do; with the score of where they
    began they run past.
    """
    truth, scan, teacher = exact_world()
    eight = float(chamfer(completion(Role(teacher), scan, 8)[0], truth.expand(4, -1, -1)).mean())
    before, after = free_points()
    assert after < 1.3 * eight < 0.5 * before, (before, after, eight)
    left = free_points(critic_is_told=False)[1]
    assert left > 1.5 * after, (left, after)


@pytest.mark.slow
def test_p2_mixture(tmp_path):
    objective = {"name": "score_lidar", **SHORT}
    before, after, *_ = run_mixture(tmp_path, objective, steps=500)
    assert after < 0.25 * before, (before, after)


def test_p4_plain_diffusers_draws_the_same(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "score_lidar", **SHORT})
