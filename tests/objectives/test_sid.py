"""SiD, SIM, SiDA, SiD-LSG: the identities of the Fisher gradient, guided critics, exact mixtures."""

import pytest
import torch
from torch import nn

from fastgen.cli.train import main
from fastgen.diffusion import divergences
from fastgen.diffusion.schedules import EDM, Flow
from fastgen.networks.denoiser import Denoiser
from fastgen.objectives import requirements_of
from fastgen.objectives.sid import SiD, SiDConfig
from tests.support import gaussians
from tests.support.replay import replay
from tests.support.spelled import FAR, NEAR, World, at_x, gradient, softplus_pair
from tests.support.toys import (
    AffineStudent,
    CountingRole,
    GaussianNet,
    batch_of,
    gaussian_role,
    rng,
    run_mixture,
)

SHORT = {"gan_weight": 0.1, "train_guidance": 2.0}
"""settings of the contract battery: SiDA and a guided critic at once"""


def identity(alpha, distance="l2", detach=()):
    def loss(x, x_t, t, real, fake, log_r):
        real = real.detach() if "real" in detach else real
        fake = fake.detach() if "fake" in detach else fake
        return divergences.score_identity(x, real, fake, alpha, distance, 0.1)

    return loss


DISTANCES = {
    "l2": lambda gap: 0.5 * gap**2,
    "huber": lambda gap: (gap**2 + 0.01).sqrt() - 0.1,
    "smooth": lambda gap: (gap**2 + 0.01).sqrt() - 0.1,
}


@pytest.mark.parametrize("distance", DISTANCES)
def test_p1_half_is_the_gradient_of_the_divergence(distance):
    """alpha = 1/2: d/d(m, s) E d(D_real - D_fake), the student's own score moving with it."""
    p = (torch.tensor(v, dtype=torch.float64) for v in gaussians.TEACHER)
    mean, std = p
    wanted = gaussians.exact(
        lambda x_t, m, s: DISTANCES[distance](
            gaussians.denoiser(x_t, mean, std) - gaussians.denoiser(x_t, m, s)
        )
    )
    _, found = gaussians.surrogate(identity(0.5, distance))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    for wrong in ({"alpha": 1.0}, {"alpha": 0.5, "detach": ("real",)}, {"alpha": 0.5, "detach": ("fake",)}):
        _, other = gaussians.surrogate(identity(distance=distance, **wrong))
        assert (other - wanted).abs().max() > 2e-3, wrong


@pytest.mark.parametrize(("alpha", "wanted"), [(0.5, (-0.04326, -0.03053)), (1.0, (-0.04958, -0.03261))])
def test_p1_known_values(alpha, wanted):
    _, found = gaussians.surrogate(identity(alpha))
    torch.testing.assert_close(found, torch.tensor(wanted).double(), rtol=0, atol=1e-5)


def test_p1_sid_writes_the_same_loss_otherwise():
    x, real, fake = torch.randn(3, 5, 4, dtype=torch.float64)
    for alpha in (1.0, 1.2):
        theirs = ((real - fake) * ((real - x) - alpha * (real - fake))).mean(1)
        torch.testing.assert_close(divergences.score_identity(x, real, fake, alpha), theirs)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2, 3.0])
def test_p1_fixed_point(alpha):
    """Student equal to the teacher: no gradient for any alpha; a teacher elsewhere pulls."""
    value, found = gaussians.surrogate(identity(alpha), teacher=gaussians.STUDENT)
    assert found.abs().max() < 1e-12 and value.abs() < 1e-12
    assert gaussians.surrogate(identity(alpha))[1].abs().max() > 1e-2


def test_p1_the_score_identity_has_mean_zero_but_a_gradient():
    value, found = gaussians.surrogate(identity(1.0))
    assert value.abs() < 1e-10 and found.abs().min() > 0.03


def flow_of(alpha, steps):
    """Gradient flow of (m, s) from (-1, 0.3) over 16 noise levels, exact critic."""
    S = EDM()
    u, w = gaussians.nodes(12)
    z, eps = (v.flatten() for v in torch.meshgrid(u, u, indexing="ij"))
    weight = (w[:, None] * w[None]).flatten().repeat(16)
    t = S.from_unit(torch.linspace(0.02, 0.8, 16, dtype=torch.float64)).repeat_interleave(len(z))
    z, eps = z.repeat(16)[:, None], eps.repeat(16)[:, None]
    m, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-1.0, 0.3))
    for _ in range(steps):
        x = m + s * z
        x_t = S.noise(x, eps, t)
        fake = gaussian_role(S, m.item(), s.item())(x_t, t, {})
        loss = divergences.score_identity(x, gaussian_role(S, *gaussians.TEACHER)(x_t, t, {}), fake, alpha)
        grads = torch.autograd.grad((weight * loss).sum() / 16, (m, s))
        with torch.no_grad():
            m -= grads[0]
            s -= grads[1]
    return m.item(), abs(s.item())


def test_p1_gradient_flow_reaches_the_teacher():
    for alpha in (0.5, 1.0, 1.2):
        m, s = flow_of(alpha, 200)
        assert abs(m - 0.5) < 0.02 and abs(s - 1) < 0.02, (alpha, m, s)
    m, s = flow_of(-1.0, 200)
    assert abs(m - 0.5) < 0.1 and s < 0.1, ("negative: the spread collapses", m, s)


def make(cfg, teacher=None, critic=None, schedule=None):
    schedule = schedule or EDM()
    return SiD(
        SiDConfig(**cfg),
        {
            "student": AffineStudent(schedule, -1.0, 0.3),
            "critic": critic or CountingRole(GaussianNet(schedule, -1.0, 0.3)),
            "teacher": teacher or CountingRole(GaussianNet(schedule, 0.5, 1.0).requires_grad_(False)),
        },
        rng(),
    )


def test_p1_scores_are_differentiated_and_frozen():
    """In the student's turn both scores carry gradient to x and take none; the critic moves every step."""
    objective = make({"student_every": 2})
    seen = []
    for k in range(4):
        for loss, _ in objective.step(batch_of(torch.randn(8, 1)), k):
            seen.append(objective.active)
            loss.backward()
            for name, player in objective.players.items():
                grads = [p.grad for p in player.trainable().values()]
                assert all((g is not None) == (name == objective.active) for g in grads)
                for p in player.trainable().values():
                    p.grad = None
    assert seen == ["critic", "student", "critic"] * 2
    assert objective.teacher.calls == [True, True]  # under no_grad the loss would be another
    assert objective.critic.calls == [True] * 6


class Labelled(Denoiser):
    """D = a c: a denoiser that knows its condition and nothing else."""

    prediction = "x0"

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.a = schedule, nn.Parameter(torch.ones(()))

    def forward(self, x_t, t, cond):
        return self.a * cond["c"][:, None].to(x_t) + 0 * x_t

    raw = forward


def test_p1_the_guided_critic_is_what_is_regressed():
    """k1: D_u + k1 (D_c - D_u) meets x, here D_c = 1 and D_u = 0; k1 = 1 is plain SiD."""
    for k1 in (1.0, 3.0):
        critic = CountingRole(Labelled(Flow()))
        objective = make({"train_guidance": k1}, critic=critic, schedule=Flow())
        one = batch_of(torch.randn(6, 1), cond={"c": torch.ones(6)})
        one.uncond = {"c": torch.zeros(6)}
        loss, _ = next(objective.step(one, 0))
        x = -1.0 + 0.3 * one.noise
        torch.testing.assert_close(loss, (k1 - x).square().mean().to(loss), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", ["l2", "huber"])
def test_p1_step_is_the_formula(distance):
    """Guidance 3, 2 and 1.5 as k4, k2 and k1, with the GAN: gradients through both scores, W held."""
    guidance = {"score_guidance": 2.0, "train_guidance": 1.5}
    cfg = {"time": NEAR, "critic_time": FAR, "gan_weight": 0.3, "disc_weight": 0.2, "distance": distance}
    world = World(SiD, **cfg, **guidance)
    (critic, student), disc = world.turns(), world.disc
    x, fresh = world.student.calls
    assert not x.grad and not torch.equal(x.x_t, fresh.x_t), "z' is drawn anew"
    x_t, t = world.shown(world.teacher)
    world.within(t, NEAR)
    eps = world.noise_in(x_t, t, fresh.out)
    W = (fresh.out - world.guided(x_t, t)).abs().mean(1).detach()

    def loss(x):
        x_t = world.schedule.noise(x, eps, t)
        real, fake = world.guided(x_t, t), world.guided(x_t, t, 2.0, world.critic)
        gap = real - fake
        sid = ((gap * ((real - x) - 1.2 * gap)).mean(1) / W).mean()
        if distance == "huber":
            norm = (gap.square().mean(1) + 0.01**2).sqrt()
            sid = ((gap * (fake - x)).mean(1) / norm + 2 * (1 - 1.2) * (norm - 0.01)).mean()
        gan = nn.functional.softplus(-disc.logit(x_t, t, world.batch.cond))
        return sid + 0.3 * (gan / W).mean()

    torch.testing.assert_close(gradient(student.loss, fresh.out), at_x(loss, fresh.out))
    call = world.critic.calls[0]
    x_t, t = call.x_t[:8], call.t[:8]
    world.within(t, FAR)
    world.noise_in(x_t, t, x.out)
    D = world.guided(x_t, t, 1.5, world.critic)
    denoising = (world.native(t)[:, None] * (D - x.out) ** 2).mean()
    fake, real = (disc.logit(*seen) for seen in disc.seen[:2])
    torch.testing.assert_close(critic.loss, denoising + 0.2 * softplus_pair(fake, real))


def test_reads_no_image_without_the_gan():
    objective = make({})
    one = batch_of(torch.randn(8, 1))
    one.x0 = None
    assert len(list(objective.step(one, 0))) == 2
    assert requirements_of(SiDConfig(gan_weight=0.1)).real_data
    assert not requirements_of(SiDConfig()).real_data


BAD = {
    "guidance": (["--objective.train_guidance", "2"], "objective.train_guidance"),
    "gan": (["--objective.gan_weight", "0.1"], "data: no images"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line(case, capsys, tmp_path):
    argv, named = BAD[case]
    (tmp_path / "run.yaml").write_text(
        "{teacher: {path: 'analytic:gaussian-edm'}, objective: {name: sid}, data: {name: ''}}"
    )
    assert main(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run"), *argv]) == 2
    message = capsys.readouterr().err
    assert named in message and len(message.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_p2_distils_the_mixture(tmp_path):
    before, after, *_ = run_mixture(tmp_path, {"name": "sid"}, "analytic:gmm2d-edm", steps=300)
    assert after < 0.02 and after < before / 4, (before, after)


@pytest.mark.slow
def test_p2_sida_and_sim(tmp_path):
    objective = {"name": "sid", "gan_weight": 0.01, "disc_mean": False, "alpha": 1.0, "distance": "huber"}
    before, after, *_ = run_mixture(tmp_path, objective, steps=250)
    assert after < 0.02 and after < before / 4, (before, after)


def test_p4_sid(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "sid", "gan_weight": 0.1})
