"""Asynchronous score distillation: its closed form against that of SDS, its shift, an exact scene."""

import pytest
import torch

from fastgen.diffusion.schedules import VP
from fastgen.objectives.asd import ASD, ASDConfig
from fastgen.threed.gaussians import GaussianAsset
from tests.support.replay import replay
from tests.support.scenes import SceneTeacher, asset_student, fitted, psnr, role
from tests.support.spelled import World, gradient
from tests.support.toys import AffineStudent, batch_of, gaussian_role, rng

SHORT: dict = {"fall_steps": 4}
"""settings of the contract battery"""
FIXED = {"fall_steps": 1, "omega": "one"}


def between(t, later, s=0.3, num=200_000, same=True):
    """Gradients [num] of the step in x = 0.7 under the teacher N(-0.4, s^2), at times t and t' of SD."""
    S = VP.scaled_linear()
    cfg, parts = (
        ASDConfig(**FIXED),
        {"student": AffineStudent(S, 0.7, 0.0), "teacher": gaussian_role(S, -0.4, s)},
    )
    objective = ASD(cfg, parts, rng())
    x = torch.full((num, 1), 0.7, dtype=torch.float64, requires_grad=True)
    objective.generate = lambda batch, last=None: x
    at = lambda time: torch.full((num,), time / 999).double()  # noqa: E731
    objective.positions = lambda n, k: (at(t), at(later))
    objective.rng.reset(0)
    if not same:  # the mistake: fresh noise for the second estimate
        noise = S.noise
        other = torch.randn(num, 1, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        calls = []
        objective.schedule = type("Two", (), {"__getattr__": lambda self, name: getattr(S, name)})()
        objective.schedule.noise = lambda x0, eps, u: noise(
            x0, calls.append(u) or eps if not calls else other, u
        )
    one = torch.zeros(num, 1, dtype=torch.float64)
    loss, _ = next(objective.step(batch_of(one, one), 1))
    (grad,) = torch.autograd.grad(loss, x)
    return grad[:, 0] * num


def closed(t, later, s=0.3):
    """(mean, variance): (h(t) - h(t')) (x - m) and (k(t) - k(t'))^2, h = alpha sigma / V, k = sigma^2 / V."""
    S, h, k = VP.scaled_linear(), [], []
    for u in (t, later):
        a, sig = (f(torch.tensor([float(u)]).double()) for f in (S.alpha, S.sigma))
        V = a**2 * s**2 + sig**2
        h.append(float(a * sig / V))
        k.append(float(sig**2 / V))
    return (h[0] - h[1]) * 1.1, (k[0] - k[1]) ** 2


def test_p1_mean_and_variance_in_closed_form():
    """A far smaller variance than that of SDS, and a weaker pull; fresh noise would lose it."""
    g = between(400, 438)
    mean, var = closed(400, 438)
    assert float(g.mean()) == pytest.approx(mean, rel=2e-2) and float(g.var()) == pytest.approx(var, rel=2e-2)
    assert var < 3.9e-3 / 20, "SDS has .0039 here"
    assert float(between(400, 438, same=False).var()) > 100 * var


def test_p1_below_the_peak_it_repels():
    """h rises up to t = 81 for s = 0.3: there t' > t has the larger pull; a shift the other way repels."""
    assert float(between(40, 60).mean()) < 0 < float(between(300, 340).mean())
    assert float(between(300, 270).mean()) < 0, "the negative: t' below t"


def test_p1_times_fall_and_the_second_is_noisier():
    S = VP.scaled_linear()
    cfg = ASDConfig(fall_steps=100)
    objective = ASD(cfg, {"student": AffineStudent(S, 0, 1), "teacher": gaussian_role(S, 0, 1)}, rng())
    for k, (low, high) in {0: (0.5, 0.98), 50: (0.26, 0.74), 100: (0.02, 0.5), 500: (0.02, 0.5)}.items():
        objective.rng.reset(k)
        p, later = objective.positions(20_000, k)
        assert low <= p.min() < low + 0.01 and high - 0.01 < p.max() <= high
        assert (later >= p).all() and (later <= p + 0.1 * (p - low) + 1e-9).all() and later.max() <= 1
        assert (later - p).mean() == pytest.approx(0.1 * 0.5 * (high - low) / 2, rel=0.05)


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_p1_step_is_the_formula(shift):
    """sigma^2 (e_u + w (e_c - e_u) - e'), e' without guidance; without a shift it is guidance alone:
    sigma^2 (w - 1) (e_c - e_u).
    """
    world = World(ASD, VP.scaled_linear(), low=(0.3, 0.3), high=(0.4, 0.4), shift=shift)
    (student,) = world.turns()
    x, S = world.student.calls[0].out, world.schedule
    (x_t, t), (x_later, later) = world.shown(world.teacher), world.shown(world.teacher, 1)
    eps = world.noise_in(x_t, t, x)
    torch.testing.assert_close(world.noise_in(x_later, later, x), eps, rtol=1e-4, atol=1e-4)
    e = lambda D, at, u: S.from_x0("eps", D, at, u)  # noqa: E731
    second = e(world.guided(x_later, later, 1.0), x_later, later)
    wanted = S.sigma(t)[:, None] ** 2 * (e(world.guided(x_t, t), x_t, t) - second) / len(x)
    torch.testing.assert_close(gradient(student.loss, x), wanted.detach(), rtol=1e-4, atol=1e-6)
    if not shift:
        cond, null = (e(world.guided(x_t, t, w), x_t, t) for w in (1.0, 0.0))
        alone = S.sigma(t)[:, None] ** 2 * 2.0 * (cond - null) / len(x)
        torch.testing.assert_close(wanted, alone, rtol=1e-4, atol=1e-6)


class Wide(SceneTeacher):
    """The null condition is a wide Gaussian around the same image, so that guidance makes it sharper."""

    def forward(self, x_t, t, cond):
        if "null" not in cond:
            return super().forward(x_t, t, cond)
        mean = self.images(cond)
        std = torch.where(cond["null"].bool(), 1.0, self.std)[:, None, None, None]
        a, s = (v.view(-1, 1, 1, 1) for v in (self.schedule.alpha(t), self.schedule.sigma(t)))
        return (mean + a * std**2 / (a**2 * std**2 + s**2) * (x_t - a * mean)).float()

    raw = forward


def test_p2_fits_an_exact_scene(monkeypatch):
    """Guided at 7.5, as published; unguided, small times push away from the scene."""
    teacher, seen = Wide(VP.scaled_linear()), fitted.__globals__["seen_from"]

    def with_null(num, k, prompt=None):
        batch = seen(num, k, prompt)
        batch.cond["null"], batch.uncond = torch.zeros(num), {**batch.cond, "null": torch.ones(num)}
        return batch

    monkeypatch.setitem(fitted.__globals__, "seen_from", with_null)
    parts = {"student": asset_student([GaussianAsset(80)]), "teacher": role(teacher)}
    objective = ASD(ASDConfig(fall_steps=100), parts, rng(), 7.5)
    before = psnr(objective.student.backbone, teacher)
    after = psnr(fitted(objective, 100, batch=3), teacher)
    assert before < 20 and after > 25, (before, after)


def test_p4_asd(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "asd", "fall_steps": 3})
