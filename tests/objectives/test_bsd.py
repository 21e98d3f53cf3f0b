"""Balanced score distillation: the shortest step, that it climbs nothing, its limits, an exact scene."""

import pytest
import torch

from fastgen.diffusion.schedules import VP
from fastgen.objectives.bsd import BSD, BSDConfig, nearest_to_zero
from fastgen.threed.gaussians import GaussianAsset
from tests.objectives.test_asd import Wide
from tests.support.replay import replay
from tests.support.scenes import asset_student, fitted, psnr, role
from tests.support.spelled import World, gradient
from tests.support.toys import rng

SHORT: dict = {"fall_steps": 4}
"""settings of the contract battery"""


def pairs(num=400, dim=6):
    c, d = torch.randn(2, num, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return c, d * 10 ** torch.linspace(-1, 1, num, dtype=torch.float64)[:, None]


def dot(a, b):
    return (a * b).flatten(1).sum(1)


def test_p1_it_is_the_shortest_of_the_segment():
    c, d = pairs()
    g0, a = nearest_to_zero(c, d)
    line = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None, None]
    shortest = (line * c + (1 - line) * d).norm(dim=-1).amin(0)
    assert (g0.norm(dim=-1) <= shortest + 1e-5).all()
    inner = (a > 1e-3) & (a < 1 - 1e-3)
    assert inner.sum() > 100 and (a == 0).any() and (a == 1).any()
    torch.testing.assert_close(dot(g0, c)[inner], dot(g0, g0)[inner], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dot(g0, d)[inner], dot(g0, g0)[inner], rtol=1e-4, atol=1e-6)


def test_p1_neither_is_climbed_where_guidance_climbs_one():
    c, d = pairs()
    g0, _ = nearest_to_zero(c, d)
    assert (dot(g0, c) > -1e-5).all() and (dot(g0, d) > -1e-5).all()
    guided = d + 7.5 * c
    assert (dot(guided, d) < -1e-3).sum() > 50, "the negative"


def test_p1_special_pairs():
    c, d = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    g0, _ = nearest_to_zero(c, d)  # orthogonal: (|d|^2 c + |c|^2 d) / (|c|^2 + |d|^2)
    torch.testing.assert_close(g0, torch.tensor([[0.4, 0.8]]))
    assert nearest_to_zero(2 * d, d)[0].tolist() == d.tolist(), "no clip would cancel what agrees"
    assert nearest_to_zero(-d / 2, d)[0].abs().max() < 1e-6, "opposed: it stands still"
    same, a = nearest_to_zero(d, d)
    assert same.isfinite().all() and torch.allclose(same, d) and a.isfinite().all()
    torch.testing.assert_close(nearest_to_zero(3 * c, 3 * d)[0], 3 * g0)


def test_p1_samples_do_not_see_each_other():
    c, d = pairs(2)
    before = nearest_to_zero(c, d)[0]
    after = nearest_to_zero(torch.stack([c[0], 100 * c[1]]), d)[0]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


@pytest.mark.parametrize("k,high", [(0, 0.98), (10, 0.1)])
def test_p1_step_has_lower_times_late(k, high):
    seen = []
    for seed in range(40):
        world = World(BSD, VP.scaled_linear(), high=(0.98, 0.1), fall_steps=10)
        world.tape.reset(seed)
        world.turns(k)
        seen.append(float(world.shown(world.teacher)[1][0]) / 999)
    assert min(seen) >= 0.02 - 1e-3 and 0.7 * high < max(seen) <= high + 1e-3


@pytest.mark.parametrize("auto", [False, True])
def test_p1_step_is_the_formula(auto):
    world = World(BSD, VP.scaled_linear(), ratio=5.0, auto=auto)
    (student,) = world.turns()
    x, S = world.student.calls[0].out, world.schedule
    x_t, t = world.shown(world.teacher)
    assert (t == t[0]).all(), "one time for the batch"
    eps = ((x_t - S.alpha(t)[:, None] * x) / S.sigma(t)[:, None]).detach()
    e_c, e_u = (S.from_x0("eps", world.guided(x_t, t, w), x_t, t).detach() for w in (1.0, 0.0))
    c, d, weight = 5.0 * (e_c - e_u), e_u, 0.1 * S.alpha(t)
    if auto:
        c, d, weight = e_c - e_u, 1.25 * (e_u - eps), S.sigma(t) * (e_u - eps).norm() / 50
    a = (dot(d - c, d) / dot(d - c, d - c)).clamp(0, 1)[:, None]
    wanted = weight[:, None] * (a * c + (1 - a) * d) / len(x)
    torch.testing.assert_close(gradient(student.loss, x), wanted, rtol=1e-4, atol=1e-6)


def test_p1_a_large_ratio_is_no_text_at_all():
    """g0 of orthogonal directions tends to d: the published default must lie where both are alike."""
    c, d = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    share = [float(nearest_to_zero(ratio * c, d)[0][0, 0]) for ratio in (1e-3, 1.0, 1e3)]
    assert share[0] < 0.01 and share[1] == pytest.approx(0.5) and share[2] < 0.01


def test_p2_fits_an_exact_scene(monkeypatch):
    teacher, seen = Wide(VP.scaled_linear()), fitted.__globals__["seen_from"]

    def with_null(num, k, prompt=None):
        batch = seen(num, k, prompt)
        batch.cond["null"], batch.uncond = torch.zeros(num), {**batch.cond, "null": torch.ones(num)}
        return batch

    monkeypatch.setitem(fitted.__globals__, "seen_from", with_null)
    parts = {"student": asset_student([GaussianAsset(80)]), "teacher": role(teacher)}
    objective = BSD(BSDConfig(auto=True, fall_steps=50), parts, rng())
    before = psnr(objective.student.backbone, teacher)
    after = psnr(fitted(objective, 100, batch=3), teacher)
    assert before < 20 and after > 25, (before, after)


def test_p4_bsd(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "bsd", "fall_steps": 3})
