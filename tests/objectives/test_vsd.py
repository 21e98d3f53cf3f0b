"""Variational score distillation: where it is SDS, that particles spread, what the critic is told."""

import pytest
import torch

from fastgen.diffusion.schedules import VP
from fastgen.networks.analytic import GaussianMixture
from fastgen.networks.denoiser import Denoiser
from fastgen.objectives.sds import SDS, SDSConfig
from fastgen.objectives.vsd import VSD, ProlificDreamerConfig
from fastgen.roles.roles import Role, Student, StudentSpec
from fastgen.threed.gaussians import GaussianAsset
from tests.support.replay import replay
from tests.support.scenes import SceneTeacher, asset_student, role, seen_from
from tests.support.spelled import FAR, NEAR, World, gradient
from tests.support.toys import batch_of, rng, run_mixture

SHORT: dict = {}
"""settings of the contract battery"""


class Particles(Denoiser):
    """256 free scalars: row i of a batch is particle i."""

    prediction = "x0"

    def __init__(self, schedule):
        super().__init__()
        start = torch.randn(256, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        self.schedule, self.x = schedule, torch.nn.Parameter(0.5 * start)

    def forward(self, x_t, t, cond):
        return self.x

    raw = forward


class Exact(Denoiser):
    """E[x0 | x_t] where x0 is one of the particles; with `told` their numbers, so that each is its own
    distribution: the estimate is the particle.
    """

    prediction = "x0"

    def __init__(self, particles, told=False):
        super().__init__()
        self.schedule, self.of, self.told = particles.schedule, [particles], told

    def forward(self, x_t, t, cond):
        x = self.of[0].x.detach()
        if self.told:
            return x
        a, s = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        weights = (-0.5 * ((x_t - a * x[:, 0]) / s) ** 2).softmax(1)
        return weights @ x

    raw = forward


def spread(method, told=False, steps=1200):
    """Wasserstein-1 of trained particles to 0.5 N(-1, .2^2) + 0.5 N(1, .2^2), and their spread in a mode."""
    S = VP.scaled_linear()
    means = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    teacher = role(GaussianMixture(means, torch.full((2,), 0.2), torch.ones(2), S))
    net = Particles(S)
    parts = {"student": Student(net, None, StudentSpec([S.steps(1)[0]])), "teacher": teacher}
    anneal = {"after": steps // 2, "high": 0.5}
    if method == "sds":
        objective = SDS(SDSConfig(anneal=anneal), parts, rng())
    else:
        objective = VSD(
            ProlificDreamerConfig(anneal=anneal), parts | {"critic": Role(Exact(net, told))}, rng()
        )
    optimizer = torch.optim.Adam([net.x], 0.02)
    noise = torch.zeros(256, 1, dtype=torch.float64)
    for k in range(steps):
        objective.rng.reset(k)
        optimizer.param_groups[0]["lr"] = 0.02 * min(1.0, 2 * (1 - k / steps))
        loss, _ = next(objective.step(batch_of(noise, noise), k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = net.x.detach()[:, 0].sort().values
    u = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    normal = torch.distributions.Normal(torch.tensor([-1.0, 1.0]).double(), torch.full((2,), 0.2).double())
    grid = torch.linspace(-2.5, 2.5, 20_001, dtype=torch.float64)
    true = grid[torch.searchsorted(normal.cdf(grid[:, None]).mean(1), u).clamp(max=20_000)]
    w1 = (x[(u * 256).long()] - true).abs().mean()
    return float(w1), float(x[x > 0].std()) if (x > 0).sum() > 1 else 0.0


def test_p2_particles_spread_where_sds_collapses():
    """With the exact score of the particles their law is the teacher's; with the noise in its place, SDS, or
    with a critic that is told which particle it sees, each falls to a mode.
    """
    w1, std = spread("vsd")
    assert w1 < 0.05 and 0.15 < std < 0.25, (w1, std)
    collapsed, _ = spread("sds")
    assert collapsed > 0.3, collapsed
    told, _ = spread("vsd", told=True)
    assert told > 0.3, told


def test_p1_with_the_noise_for_the_critic_it_is_sds():
    """D_fake = x, which is e_F = eps, gives the gradient of SDS bit for bit."""
    teacher, grads = SceneTeacher(VP.scaled_linear()), []

    class Itself(Denoiser):
        prediction, schedule = "x0", teacher.schedule

        def forward(self, x_t, t, cond):
            return self.of()

    for method in (SDS, VSD):
        student = asset_student([GaussianAsset(30)])
        parts = {"student": student, "teacher": role(teacher)}
        critic = Itself()
        critic.of = lambda: student.backbone.encode(2 * student.backbone.seen.rgb - 1).detach()  # noqa: B023
        if method is VSD:
            parts["critic"] = Role(critic)
        objective = method(method.config(), parts, rng())
        objective.rng.reset(0)
        next(objective.step(seen_from(3, 0), 0))[0].backward()
        grads.append([p.grad for p in student.trainable().values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and any(g.abs().sum() > 0 for g in grads[0])


def test_p1_step_is_the_formula():
    """sigma^2 (e_T^w - e_F), the critic plain; the critic's own step is a regression of its prediction."""
    world = World(VSD, VP.scaled_linear(), time=NEAR, critic_time=FAR)
    student, critic = world.turns()
    x, S = world.student.calls[0].out, world.schedule
    x_t, t = world.shown(world.teacher)
    world.within(t, NEAR)
    world.noise_in(x_t, t, x)
    real, fake = world.noises(x_t, t)
    wanted = S.sigma(t)[:, None] ** 2 * (real - fake) / len(x)
    torch.testing.assert_close(gradient(student.loss, x), wanted.detach(), rtol=1e-4, atol=1e-7)
    assert abs(world.check_critic(critic, x, lambda t: torch.ones_like(t))) < 1e-12


@pytest.mark.parametrize("k,high", [(9, 0.98), (10, 0.1)])
def test_p1_step_has_lower_times_late_and_the_critic_has_not(k, high):
    cfg = {"time": {"low": 0.02, "high": 0.98}, "anneal": {"after": 10, "high": 0.1}}
    world = World(VSD, VP.scaled_linear(), num=64, **cfg)
    world.turns(k)
    _, t = world.shown(world.teacher)
    world.within(t, {"low": 0.02, "high": high})
    assert t.max() > 0.7 * high * 999 and world.critic.calls[-1].t.max() > 0.8 * 999


def test_p1_the_critic_is_told_the_camera_and_the_plain_prompt():
    """critic_cond and not cond; the camera is zero in about `camera_drop` of the rows of its own turn."""

    class Told(Denoiser):
        prediction = "x0"

        def __init__(self, schedule):
            super().__init__()
            self.schedule, self.c, self.seen = schedule, torch.nn.Parameter(torch.zeros(())), []

        def forward(self, x_t, t, cond):
            self.seen.append(cond)
            return 0 * x_t + self.c

        raw = forward

    S = VP.scaled_linear()
    critic = Told(S)
    parts = {
        "student": asset_student([GaussianAsset(5)]),
        "teacher": role(SceneTeacher(S)),
        "critic": Role(critic),
    }
    objective = VSD(ProlificDreamerConfig(camera_drop=0.3), parts, rng())
    dropped = []
    for k in range(20):
        objective.rng.reset(k)
        batch = seen_from(6, k)
        for loss, _ in objective.step(batch, k):
            loss.backward()
            if objective.active == "critic":
                assert all(p.grad is None for p in objective.student.trainable().values()), "the render leaks"
            for part in parts.values():
                for p in part.trainable().values():
                    p.grad = None
        first, second = critic.seen[-2:]
        assert set(first) == {"c2w"} and torch.equal(first["c2w"], batch.critic_cond["c2w"])
        dropped += (second["c2w"].abs().sum(1) == 0).tolist()
    assert 0.15 < sum(dropped) / len(dropped) < 0.45


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_p1_a_camera_starts_without_effect_and_is_learned(tiny, kind):
    """The embedding starts at zero; the teacher on the same base never reads it."""
    from fastgen.networks.load import load_teacher

    teacher = load_teacher(str(tiny("sd")))
    base = teacher.backbone
    net, name = (base.trainable_copy(), None) if kind == "full" else (base, "critic")
    if name:
        base.requires_grad_(False)
        base.add_adapter(name, 2, 2, ("to_q",))
    net.add_camera(name)
    critic = Role(net, name)
    cond = {k: v.float() for k, v in teacher.codec.prompts(["a bag", "a boot"]).items()}
    told = {**cond, "c2w": torch.randn(2, 16)}
    x, t = torch.randn(2, *teacher.codec.shape), torch.tensor([300.0, 700.0], dtype=torch.float64)
    before = Role(base)(x, t, cond)
    assert torch.equal(critic(x, t, told), before)
    mine = {n: p for n, p in critic.trainable().items() if "camera_embedding" in n}
    assert len(mine) == 4
    for p in mine.values():
        p.requires_grad_(True)
    critic(x, t, told).square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in mine.values())
    with torch.no_grad():
        for p in mine.values():
            p.add_(0.3)
    assert (critic(x, t, told) - before).abs().max() > 1e-4
    assert torch.equal(critic(x, t, cond), before), "without a camera it is the network"
    assert torch.equal(Role(base)(x, t, told), before), "and the teacher is what it was"


def test_p2_distils_the_mixture(tmp_path):
    objective = {"name": "vsd", "student_every": 2}
    before, after, *_ = run_mixture(tmp_path, objective, "analytic:gmm2d-vp", steps=300)
    assert after < 0.04 and after < before / 3, (before, after)


def test_p4_vsd(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "vsd"})
