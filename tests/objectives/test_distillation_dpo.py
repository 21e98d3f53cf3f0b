"""Distillation-DPO: what the pair loss is, where it is VSD or nothing, and what keeps it from diverging."""

import math

import pytest
import torch

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import VP, expand
from fastgen.networks.denoiser import Denoiser
from fastgen.objectives.distillation_dpo import (
    DistillationDPO,
    DistillationDPOConfig,
    guarded,
    noise_gap,
)
from fastgen.objectives.score_lidar import ScoreLiDAR, ScoreLiDARConfig
from fastgen.roles.roles import Role, Student, StudentSpec
from tests.support.clouds import levels, tiny_world
from tests.support.replay import replay
from tests.support.spelled import FAR, NEAR, Classes, Heard, World, gradient
from tests.support.toys import rng, run_mixture

SHORT: dict = {}
"""settings of the contract battery"""
VP_SCHEDULE = VP.scaled_linear()


def world(**cfg):
    """Among noting networks, the losers' critic another one than the winners'."""
    loser = Heard(Classes(VP_SCHEDULE, 0.1, 0.7))
    made = World(DistillationDPO, VP_SCHEDULE, parts={"loser": loser}, time=NEAR, critic_time=FAR, **cfg)
    return made, loser


def test_p1_step_is_the_formula():
    """Winners towards the teacher, losers away from it, at one t and one noise; each critic on its own."""
    here, loser = world(guard="none", loser_weight=0.7)
    student, critics = here.turns()
    S, y, n = VP_SCHEDULE, here.batch.x0, len(here.batch.noise)
    a, b = (call.out for call in here.student.calls[:2])
    first = ((a - y).square().mean(1) <= (b - y).square().mean(1))[:, None]
    assert 0 < first.sum() < n
    asked = here.teacher.calls[0]
    w_t, l_t, t = asked.x_t[:n], asked.x_t[n : 2 * n], asked.t[:n]
    here.within(t, NEAR)
    w, l = torch.where(first, a, b), torch.where(first, b, a)  # noqa: E741
    eps = here.noise_in(w_t, t, w)
    torch.testing.assert_close(l_t, S.noise(l, eps, t).detach())
    gaps = []
    for x_t, critic in ((w_t, here.critic), (l_t, loser)):
        real, fake = here.guided(x_t, t), critic.backbone(x_t, t, here.batch.cond)
        gaps.append(S.from_x0("eps", real, x_t, t) - S.from_x0("eps", fake, x_t, t))
    towards, away = torch.where(first, gaps[0], -0.7 * gaps[1]), torch.where(first, -0.7 * gaps[1], gaps[0])
    for x, wanted in ((a, towards), (b, away)):
        torch.testing.assert_close(
            gradient(student.loss, x), (wanted / x.numel()).detach(), rtol=1e-4, atol=1e-7
        )
    total = 0.0
    for x, critic in ((w, here.critic), (l, loser)):
        call = critic.calls[-1]
        here.within(call.t, FAR)
        here.noise_in(call.x_t, call.t, x)
        total = total + (here.native(call.t)[:, None] * (call.out - x.detach()) ** 2).mean()
    torch.testing.assert_close(critics.loss.detach(), total.detach())
    assert {n.split(".")[0] for n in critics.grads} == {"critic", "loser"}


def test_p1_the_published_product_has_no_gradient():
    S, generator = levels(), torch.Generator().manual_seed(0)
    w, gap, eps = torch.randn(3, 2, 9, 3, generator=generator).unbind(0)
    w.requires_grad_(True)
    t = torch.tensor([300.0, 800.0], dtype=torch.float64)
    published = (gap * (S.noise(w, eps, t) - w)).mean()
    assert torch.autograd.grad(published, w)[0].abs().max() == 0
    torch.testing.assert_close(torch.autograd.grad(losses.linear(w, gap), w)[0], gap / w.numel())


def test_p1_noise_gap_is_of_the_noises():
    S, generator = VP_SCHEDULE, torch.Generator().manual_seed(0)
    real, fake, x_t = torch.randn(3, 2, 4, generator=generator).unbind(0)
    t = torch.tensor([100.0, 700.0], dtype=torch.float64)
    wanted = S.from_x0("eps", real, x_t, t) - S.from_x0("eps", fake, x_t, t)
    torch.testing.assert_close(noise_gap(S, real, fake, t), wanted)


def grads(student, batch, method, cfg, **parts):
    """Gradients of a student's turn, by name."""
    student.backbone.requires_grad_(True)
    objective = method(cfg, {"student": student, **parts}, rng())
    objective.rng.reset(0)
    next(objective.step(batch, 0))[0].backward()
    found = {n: p.grad.clone() for n, p in student.trainable().items() if p.grad is not None}
    student.backbone.zero_grad()
    return found


def test_p1_nothing_is_learned_where_pairs_or_scores_are_alike():
    student, batch, teacher, other = tiny_world()
    cfg = lambda **more: DistillationDPOConfig(guard="none", **more)  # noqa: E731
    same = grads(student, batch, DistillationDPO, cfg(), teacher=teacher, critic=teacher, loser=teacher)
    most = max(float(g.abs().max()) for g in same.values())
    assert most < 1e-6, "critics that say what the teacher says"
    alike = cfg(pair_scale=1.0)  # both samples are one
    zero = grads(student, batch, DistillationDPO, alike, teacher=teacher, critic=other, loser=other)
    most = max(float(g.abs().max()) for g in zero.values())
    kept = grads(student, batch, DistillationDPO, cfg(), teacher=teacher, critic=other, loser=other)
    assert most < 1e-6 < 1e-4 < max(float(g.abs().max()) for g in kept.values())


def test_p1_without_losers_and_choice_it_is_score_distillation():
    """loser_weight 0 and two equal samples: ScoreLiDAR's gradient without structure."""
    student, batch, teacher, other = tiny_world()
    alone = DistillationDPOConfig(loser_weight=0.0, pair_scale=1.0)
    ours = grads(student, batch, DistillationDPO, alone, teacher=teacher, critic=other, loser=other)
    plain = ScoreLiDARConfig(scene_weight=0, key_weight=0)
    theirs = grads(student, batch, ScoreLiDAR, plain, teacher=teacher, critic=other)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-7)
    pushed = DistillationDPOConfig(loser_weight=0.5, pair_scale=1.0)
    half = grads(student, batch, DistillationDPO, pushed, teacher=teacher, critic=other, loser=other)
    assert any((half[n] - theirs[n]).abs().max() > 1e-5 for n in theirs)


def test_p1_the_nearer_completion_wins_whatever_the_order_of_its_points():
    student, batch, teacher, other = tiny_world()
    objective = DistillationDPO(
        DistillationDPOConfig(),
        {"student": student, "teacher": teacher, "critic": other, "loser": other},
        rng(),
    )
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    order = torch.cat([order + 5 * i for i in range(12)])  # copies of one start change places
    shuffled = batch.x0[:, order] + 0.01
    found = objective.distance(shuffled, batch)
    torch.testing.assert_close(found, objective.distance(batch.x0 + 0.01, batch))
    assert (found < objective.distance(batch.x0 + 1.0, batch)).all()
    assert float((shuffled - batch.x0).square().mean()) > 0.5


def test_p1_guards_bound_the_push():
    gap = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    pull = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    capped = guarded(gap, pull, "cap", 0.5)
    torch.testing.assert_close(capped.norm(dim=1), torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(capped[0] * 5, gap[0])
    gated = guarded(gap, pull, "gate", 0.5)
    wanted = gap * torch.tensor([[1 / (1 + math.exp(49))], [1 / (1 + math.exp(-0.5))]])
    torch.testing.assert_close(gated, wanted)
    assert torch.equal(guarded(gap, pull, "none", 0.5), gap)


class Affine(Denoiser):
    """G = mu + tau z in one dimension."""

    prediction = "x0"

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        self.mu = torch.nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
        self.tau = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x_t, t, cond):
        return self.mu + self.tau * x_t

    raw = forward


class Normal(Denoiser):
    """The exact denoiser of N(0, 1) whose data are not scaled."""

    prediction = "x0"

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t, t, cond):
        s = expand(self.schedule.sigma(t).double(), x_t)
        return x_t / (1 + s**2)

    raw = forward


class Kernel(Denoiser):
    """E[x0 | x_t] over samples that it is given: the exact score of a student's own."""

    prediction = "x0"

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.samples = schedule, torch.zeros(1, dtype=torch.float64)

    def forward(self, x_t, t, cond):
        s = self.schedule.sigma(t)[:, None]
        return ((-0.5 * ((x_t - self.samples[None]) / s) ** 2).softmax(1) @ self.samples)[:, None]

    raw = forward


def pair_toy(steps, **cfg):
    """(mu, tau) of 512 samples after `steps`: teacher N(0, 1), truth 1, both critics exact."""
    S = levels()
    net, winners, losers = Affine(S), Kernel(S), Kernel(S)
    student = Student(net, None, StudentSpec(S.steps(1)))
    parts = {"student": student, "teacher": Role(Normal(S)), "critic": Role(winners), "loser": Role(losers)}
    time = {"low": 0.02, "high": 1.0}
    objective = DistillationDPO(DistillationDPOConfig(time=time, critic_time=time, **cfg), parts, rng())
    ranked = objective.ranked

    def told(batch, last):
        """The pair, which the exact critics are told of."""
        w, l, logs = ranked(batch, last)  # noqa: E741
        winners.samples, losers.samples = (x.detach()[:, 0] for x in (w, l))
        return w, l, logs

    objective.ranked = told
    optimizer = torch.optim.Adam(student.trainable().values(), 0.02)
    for k in range(steps):
        objective.rng.reset(k)
        z = torch.randn(512, 1, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        batch = Batch(
            torch.ones(512, 1, dtype=torch.float64), {}, {}, z / S.prior_std(999.0), torch.arange(512)
        )
        loss, _ = next(objective.step(batch, k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(net.mu.detach()), float(net.tau.detach())


def test_p1_unguarded_pairs_diverge_and_guarded_ones_do_not():
    """The linear loss has no lower bound: samples spread without end. Both guards end it."""
    short, wide = (pair_toy(steps, guard="none")[1] for steps in (80, 160))
    assert wide > 4 and wide > 1.6 * short, (short, wide)
    for guard in ("cap", "gate"):
        mu, tau = pair_toy(160, guard=guard)
        assert -1.3 < mu < 0 and 1 < tau < 1.8, (guard, mu, tau)


def test_p1_matching_winners_alone_moves_the_samples_to_the_losers_side():
    """Selection is compensated: winners, nearer to the truth at 1, match a teacher at 0: all lie below it."""
    mu, _ = pair_toy(200, loser_weight=0.0)
    assert mu < -0.4, mu
    same, tau = pair_toy(200, loser_weight=0.0, pair_scale=1.0)  # no choice: score distillation
    assert abs(same) < 0.2 and 0.7 < tau < 1.2, (same, tau)


def test_p2_mixture(tmp_path):
    objective = {"name": "distillation_dpo", "loser_weight": 0.1}
    before, after, *_ = run_mixture(tmp_path, objective, steps=400)
    assert after < 0.35 * before, (before, after)


def test_p4_plain_diffusers_draws_the_same(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "distillation_dpo"})


@pytest.mark.parametrize("guard", ["cap", "gate", "none"])
def test_guards_of_clouds_are_by_point_or_sample(guard):
    gap = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    found = guarded(gap, torch.zeros_like(gap), guard, 0.5)
    assert found.shape == gap.shape and (found.abs().max() == 0) == (guard == "cap")
