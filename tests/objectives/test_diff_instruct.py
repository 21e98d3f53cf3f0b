"""Diff-Instruct: its gradient is that of the KL, its critic is needed, any generator may be the student."""

import math

import pytest
import torch
from torch import nn

from fastgen.diffusion import losses
from fastgen.diffusion.schedules import EDM
from fastgen.networks.denoiser import Denoiser
from fastgen.networks.load import load_teacher
from fastgen.objectives.diff_instruct import DiffInstruct, DiffInstructConfig
from fastgen.roles.roles import Role, Student, StudentSpec
from tests.objectives.test_dmd2 import kl
from tests.support.replay import replay
from tests.support.spelled import FAR, NEAR, World, gradient
from tests.support.toys import (
    AffineStudent,
    CountingRole,
    GaussianNet,
    batch_of,
    energy_distance,
    gaussian_role,
    rng,
    run_mixture,
)

SHORT = {"student_every": 1}
"""settings of the contract battery"""


def test_p1_gradient_is_dmds_before_normalisation():
    x = torch.randn(16, 3, requires_grad=True)
    real, fake = torch.randn(2, 16, 3)
    (plain,) = torch.autograd.grad(losses.score_difference(x, real, fake), x)
    (scaled,) = torch.autograd.grad(losses.distribution_matching(x, real, fake), x)
    torch.testing.assert_close(plain, scaled * (x - real).abs().mean(1, keepdim=True).detach())
    torch.testing.assert_close(plain, (fake - real) / x.numel())


def test_p1_surrogates_agree():
    """0.5 |x - sg[x - g]|^2 and the authors' sum g x have one gradient, up to the number of pixels."""
    x = torch.randn(8, 5, requires_grad=True)
    real, fake = torch.randn(2, 8, 5)
    (ours,) = torch.autograd.grad(losses.score_difference(x, real, fake), x)
    (theirs,) = torch.autograd.grad(((fake - real) * x).sum() / len(x), x)
    torch.testing.assert_close(ours, theirs / 5)


def test_p1_weight_one_on_denoisers_is_the_kl_gradient_times_t_squared():
    """EDM: E[(D_fake - D_real) dx/d(m, s)] = t^2 d KL(q_t || p_t) / d(m, s), by quadrature."""
    S, m, s, m_p, s_p = EDM(), -0.4, 0.6, 0.5, 1.0
    nodes, weights = (torch.tensor(v) for v in __import__("numpy").polynomial.hermite_e.hermegauss(24))
    w = (weights / weights.sum())[:, None] * (weights / weights.sum())[None]
    z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
    for t in (0.3, 1.0, 4.0):
        mm, ss = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (m, s))
        x = (mm + ss * z).reshape(-1, 1)
        tt = torch.full((len(x),), t, dtype=torch.float64)
        x_t = S.noise(x, eps.reshape(-1, 1), tt).detach()
        real, fake = (gaussian_role(S, *p)(x_t, tt, {}) for p in ((m_p, s_p), (m, s)))
        (pixels,) = torch.autograd.grad(losses.score_difference(x, real, fake), x, retain_graph=True)
        found = torch.autograd.grad(x, (mm, ss), pixels * x.numel() * w.reshape(-1, 1))
        exact = torch.autograd.grad(kl(mm, ss, m_p, s_p, torch.tensor(t, dtype=torch.float64)), (mm, ss))
        torch.testing.assert_close(torch.stack(found), t**2 * torch.stack(exact), rtol=0, atol=1e-6)


def test_p1_step_is_the_formula():
    """D_fake - D_real^w at guidance 3 as it is, and the critic at its own times."""
    world = World(DiffInstruct, time=NEAR, critic_time=FAR)
    student, critic = world.turns()
    x = world.student.calls[0].out
    torch.testing.assert_close(gradient(student.loss, x), world.score_gradient(x, lambda *_: 1.0))
    assert abs(world.check_critic(critic, x)) < 1e-12


def descend(follow, steps=400, lr=0.05):
    """The objective on Gaussians; `follow` puts the critic at (student, teacher) values each step."""
    S = EDM()
    student, critic = AffineStudent(S, -1.0, 0.3), CountingRole(GaussianNet(S, -1.0, 0.3))
    parts = {"student": student, "critic": critic, "teacher": gaussian_role(S, 0.5, 1.0)}
    objective = DiffInstruct(DiffInstructConfig(), parts, rng())
    optimizer = torch.optim.Adam(student.trainable().values(), lr)
    for k in range(steps):
        with torch.no_grad():
            follow(critic.backbone, student.backbone)
        objective.rng.reset(k)
        noise = torch.randn(512, 1, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        loss, _ = next(objective.step(batch_of(noise, noise), k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - k / steps)
    return student.backbone.m.item(), student.backbone.s.item()


def exact(critic, student):
    critic.m.copy_(student.m)
    critic.s.copy_(student.s)


def test_p1_converges_with_an_exact_critic():
    m, s = descend(exact)
    assert abs(m - 0.5) < 0.08 and abs(s - 1.0) < 0.08, (m, s)


def test_p1_negative_critic_left_at_the_start():
    """Without its updates the critic pushes for ever: the mean runs past the teacher's."""
    m, _ = descend(lambda critic, student: None)
    assert abs(m - 0.5) > 0.5, m


def test_p1_equal_critic_and_teacher_give_nothing():
    m, s = descend(lambda critic, student: (critic.m.fill_(0.5), critic.s.fill_(1.0)), steps=3)
    assert math.isclose(m, -1.0) and math.isclose(s, 0.3)


class Generator(Denoiser):
    """No denoiser at all: a plain decoder of the noise, as a GAN's generator is."""

    def __init__(self, schedule, num_classes=3):
        super().__init__()
        self.schedule, self.prediction = schedule, "x0"
        self.label = nn.Embedding(num_classes + 1, 16)
        self.net = nn.Sequential(nn.Linear(18, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 2))

    def forward(self, x_t, t, cond):
        return self.net(torch.cat([x_t, self.label(cond["class_labels"])], 1))


def test_p2_a_generator_that_never_was_a_diffusion_model():
    torch.manual_seed(0)
    teacher = load_teacher("analytic:gmm2d-edm")
    S, mixture = teacher.schedule, teacher.backbone
    student = Student(Generator(S), None, StudentSpec([1.0]))
    parts = {"student": student, "critic": Role(mixture.trainable_copy()), "teacher": Role(mixture)}
    time = {"kind": "log_normal", "mean": -0.8, "std": 1.2}
    objective = DiffInstruct(DiffInstructConfig(student_every=2, time=time, critic_time=time), parts, rng())
    optimizers = {
        n: torch.optim.Adam(p.trainable().values(), 2e-3, (0.0, 0.99)) for n, p in objective.players.items()
    }
    real, labels = mixture.sample(1000, torch.Generator().manual_seed(5))

    def draw(num, seed):
        noise = torch.randn(num, 2, generator=torch.Generator().manual_seed(seed))
        return batch_of(torch.zeros(num, 2), noise, {"class_labels": labels[torch.arange(num) % 1000]})

    @torch.no_grad()
    def distance():
        return energy_distance(real, objective.generate(draw(1000, 9)))

    before = distance()
    for k in range(450):
        objective.rng.reset(k)
        for group in (g for o in optimizers.values() for g in o.param_groups):
            group["lr"] = 2e-3 * (1 - k / 450)
        for loss, _ in objective.step(draw(128, 100 + k), k):
            optimizer = optimizers[objective.active]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after = distance()
    assert after < 0.05 and after < before / 5, (before, after)


@pytest.mark.parametrize("teacher", ["analytic:gmm2d-edm"])
def test_p2_distils_the_mixture(tmp_path, teacher):
    before, after, *_ = run_mixture(
        tmp_path, {"name": "diff_instruct", "student_every": 2}, teacher, steps=300
    )
    assert after < 0.03 and after < before / 3, (before, after)


def test_p4_diff_instruct(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "diff_instruct"})
