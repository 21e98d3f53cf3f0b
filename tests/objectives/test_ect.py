"""ECT: the gap's law, the boundary, the norm; both sources on the mixture; the export replayed."""

import pytest
import torch

from fastgen.diffusion.schedules import EDM, VP, Flow
from fastgen.objectives.ect import ECT, ECTConfig, level_time, noise_level, shrink
from fastgen.roles.roles import Student, StudentSpec
from tests.support.replay import replay
from tests.support.spelled import World, at_x, gradient
from tests.support.toys import GaussianNet, batch_of, gaussian_role, rng, run_mixture

SHORT = {}
"""settings of the contract battery"""


def make(S=None, student=(0.0, 1.0), **cfg):
    S = S or EDM()
    parts = {
        "student": Student(GaussianNet(S, *student), None, StudentSpec(S.steps(1))),
        "teacher": gaussian_role(S, 0.5, 0.3),
    }
    return ECT(ECTConfig(**cfg), parts, rng())


def test_p1_gap_law():
    """r < t always; r / t tends to 1 - q^-(j+1) at high noise; in the first stage r = 0 at small noise."""
    n = torch.logspace(-4, 6, 400, dtype=torch.float64)
    objective = make(double_every=10)
    for k, j in ((0, 0), (10, 1), (35, 3)):
        gap = objective.gap(k)
        assert gap == 2.0 ** -(j + 1)
        r = shrink(n, gap, 8.0, 1.0)
        assert (r < n).all() and (r >= 0).all()
        assert float(r[-1] / n[-1]) == pytest.approx(1 - gap, abs=1e-6)
    assert (shrink(n, 0.5, 8.0, 1.0)[n < 1] == 0).all()  # 1 + 8 sigmoid(-t) > 2 there
    assert objective.gap(10_000) == pytest.approx(0.001)  # the cap on r / t
    torch.testing.assert_close(shrink(n, 1.0, 0.0, 1.0), torch.zeros_like(n))  # j = -1


@pytest.mark.parametrize("source", ["data", "teacher"])
def test_p1_step_is_the_formula(source):
    """In the second gap: x_r of the data, or the step of the guided teacher; D itself where r is clean."""
    world = World(ECT, EDM(), num=64, source=source, double_every=10, huber_c=0.1)
    (turn,), (earlier, call) = world.turns(15), world.student.calls
    x_t, t, x0 = call.x_t, call.t, world.batch.x0
    world.noise_in(x_t, t, x0)
    assert not earlier.grad
    r = (t * (1 - 0.25 * (1 + 8 * torch.sigmoid(-t)))).clamp(min=0)
    clean = r <= 0.002
    assert 0 < clean.sum() < 64
    D = x0 if source == "data" else world.guided(x_t, t)
    eps = (x_t - D) / t[:, None]
    torch.testing.assert_close(earlier.x_t[~clean], (D + r[:, None] * eps)[~clean])
    torch.testing.assert_close(earlier.t[~clean], r[~clean])
    target = torch.where(clean[:, None], D, earlier.out).detach()

    def loss(y):
        norm = ((y - target).square().sum(1) + 0.1**2 * 3).sqrt() - 0.1 * 3**0.5
        return (norm / 3**0.5 / (t - r)).mean()

    torch.testing.assert_close(gradient(turn.loss, call.out), at_x(loss, call.out), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("S", [EDM(), Flow(), VP.scaled_linear()])
def test_p1_levels_and_times(S):
    n = torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64)
    t, clean = level_time(S, n)
    torch.testing.assert_close(noise_level(S, t), n, rtol=1e-6, atol=1e-9)
    assert not clean.any() and level_time(S, torch.zeros(2).double())[1].all()


def test_p1_first_gap_at_small_noise_is_diffusion_training():
    """Where r = 0 the target is x0 itself, and the loss the distance to the data over t."""
    S = EDM()
    objective = make(S, time={"kind": "log_normal", "mean": -4.0, "std": 0.1})
    x0 = torch.randn(2000, 2)
    loss, logs = next(objective.step(batch_of(x0), 0))
    objective.rng.generator.manual_seed(0)
    t = objective.sample_t(2000, objective.cfg.time)
    x_t = S.noise(x0, objective.rng.randn_like(x0), t)
    gap = (objective.student(x_t, t, {}) - x0).norm(dim=1)
    torch.testing.assert_close(loss.detach(), (gap / 2**0.5 / t).mean().to(loss), rtol=1e-4, atol=1e-6)


def test_p1_loss_is_the_norm_not_its_square():
    """Both means shifted alike: pred - target is linear in the student's error, and so is the loss."""
    found = []
    for scale in (1.0, 2.0):
        objective = make(student=(0.0, 1.0))
        objective.student.backbone.forward = lambda x, t, cond, s=scale: s * t[:, None]
        found.append(float(next(objective.step(batch_of(torch.zeros(64, 2)), 0))[0]))
    assert found[1] / found[0] == pytest.approx(2.0, rel=1e-3)


def test_p1_teacher_source_steps_along_its_ode():
    """With the exact student of the teacher's law, steps along the ODE beat pairs of shared noise."""
    x0 = 0.5 + 0.3 * torch.randn(512, 2, dtype=torch.float64)
    found = {}
    for source in ("data", "teacher"):
        objective = make(source=source, q=64.0)

        def flow_map(x, t, cond):  # the exact consistency function of N(0.5, 0.3^2)
            return 0.5 + (x - 0.5) * (0.3 / (0.3**2 + t**2).sqrt())[:, None]

        objective.student.backbone.forward = flow_map
        found[source] = float(next(objective.step(batch_of(x0), 0))[0])
    assert found["teacher"] < found["data"] / 3, found


def test_p2_distils_the_mixture(tmp_path):
    cfg = {"name": "ect", "double_every": 60}
    before, after, _, _ = run_mixture(tmp_path, cfg, "analytic:gmm2d-edm", steps=400)
    assert after < 0.02 and after < before / 5, (before, after)


def test_p2_a_gap_that_never_shrinks_stays_behind(tmp_path):
    """Negative check: pairs as far apart as at the start keep the student a denoiser, not a sampler."""
    _, after, _, _ = run_mixture(tmp_path, {"name": "ect"}, "analytic:gmm2d-edm", steps=400)
    assert after > 0.02, after


def test_p4_ect(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "ect"})
