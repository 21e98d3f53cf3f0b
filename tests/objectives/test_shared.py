"""What several methods share: the critic's turn, guidance, conditions that are dropped, R1, times."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastgen.diffusion.schedules import EDM, Flow
from fastgen.objectives.base import TimeConfig, guided
from fastgen.objectives.consistency import Consistency
from fastgen.objectives.diff_instruct import DiffInstruct
from fastgen.objectives.dmd2 import DMD2
from fastgen.objectives.lcm import LCM
from fastgen.objectives.shared.critic import real_side
from fastgen.objectives.sid import SiD
from tests.support.spelled import FAR, NEAR, Classes, Heard, Tape, World, gradient, softplus_pair

MID = {"low": 0.5, "high": 0.6}


def critic_turn(world, **more):
    """(turn, x) of the critic's turn on samples that are a function of the student."""
    objective = world.objective
    x = objective.student(world.batch.noise, objective.student.time(0, world.batch.noise), world.batch.cond)
    for loss, logs in objective.critic_turn(world.batch, x, **more):
        assert torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True) == (None,), "x is held"
        return loss, logs, x.detach()


@pytest.mark.parametrize("method", [SiD, DMD2])
def test_p1_step_with_times_of_the_gans_own(method):
    """gan_time: both sides are noised anew, at times of their own, and the student's side reaches x."""
    cfg = {"time": NEAR, "critic_time": FAR, "gan_time": MID, "gan_weight": 0.3, "disc_weight": 0.2}
    world = World(method, Flow(), student_every=1, **cfg)
    found = {turn.player: turn for turn in world.turns()}
    samples = [call.out for call in world.student.calls]
    disc, of_student = world.disc, method is DMD2  # DMD2's student comes first
    fakes = disc.seen[1:] if of_student else disc.seen[:2]
    for _, t, _ in disc.seen:
        world.within(t, MID)
        assert not torch.equal(t, world.critic.calls[0].t)
    world.noise_in(*fakes[1][:2], world.batch.x0)
    world.noise_in(*fakes[0][:2], samples[0])
    fake, real = (disc.logit(*seen) for seen in fakes)
    rest = found["critic"].loss - found["critic"].logs["denoising"]
    torch.testing.assert_close(rest, 0.2 * softplus_pair(fake, real))
    x_t, t, cond = disc.seen[0 if of_student else 2]
    world.noise_in(x_t, t, samples[-1])
    if of_student:
        plain = World(method, Flow(), student_every=1, **{**cfg, "gan_weight": 0.0})
        turns = plain.turns()
        slope = -torch.sigmoid(-disc.logit(x_t, t, cond))[:, None] * disc.a * (1 - t)[:, None] / 8
        alone = gradient(turns[0].loss, plain.student.calls[0].out)
        both = gradient(found["student"].loss, samples[0])
        torch.testing.assert_close(both - alone, 0.3 * slope.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("w", [1.0, 2.5])
def test_p1_step_of_the_critic_under_another_condition(w):
    """The samples' condition is the one given; guidance w of the critic is in what is regressed; softplus
    pair and R1 with their weights.
    """
    cfg = {"critic_time": FAR, "gan_weight": 0.3, "disc_weight": 0.2, "r1_weight": 0.7}
    world = World(DMD2, Flow(), **cfg)
    other = {"class_labels": world.batch.cond["class_labels"].flip(0)}
    loss, logs, x = critic_turn(world, cond=other, w=w)
    call = world.critic.calls[-1]
    x_t, t = call.x_t[:8], call.t[:8]
    world.within(t, FAR)
    world.noise_in(x_t, t, x)
    net = world.critic.backbone
    D, null = net(x_t, t, other), net(x_t, t, world.batch.uncond)
    denoising = (world.native(t)[:, None] * (null + w * (D - null) - x) ** 2).mean()
    torch.testing.assert_close(logs["denoising"], denoising)
    fake, real = (world.disc.logit(*seen) for seen in world.disc.seen)
    assert torch.equal(world.disc.seen[0][2]["class_labels"], other["class_labels"])
    assert torch.equal(world.disc.seen[1][1], t)
    world.noise_in(*world.disc.seen[1][:2], world.batch.x0)
    pair = 0.2 * softplus_pair(fake, real) + 0.7 * world.disc.a.square().sum()
    torch.testing.assert_close(loss, denoising + pair)


def test_p1_step_of_the_critic_with_a_weight_of_the_methods():
    world = World(DiffInstruct)
    D, x = torch.randn(2, 8, 3, dtype=torch.float64)
    t = torch.linspace(0.2, 0.9, 8, dtype=torch.float64)
    found = world.objective.denoising_loss(D, x, t, t**2)
    torch.testing.assert_close(found, ((t**2 * world.native(t))[:, None] * (D - x) ** 2).mean())


def test_p1_step_null_condition_for_a_whole_batch():
    world, kept = World(DiffInstruct), 0
    for _ in range(400):
        kept += world.objective.drop_batch_condition(world.batch, 0.2) is world.batch.cond
    assert 0.73 < kept / 400 < 0.87


def test_p1_step_guidance_is_of_the_condition_over_its_absence():
    world = World(DiffInstruct)
    t = torch.full((8,), 0.4, dtype=torch.float64)
    found = guided(world.teacher, world.batch.noise, t, world.batch, 2.5)
    torch.testing.assert_close(found, world.guided(world.batch.noise, t, 2.5))
    assert (found - world.guided(world.batch.noise, t, 1.5)).abs().min() > 0.1


def test_p1_step_a_told_scale_is_uniform_over_its_range():
    world = World(LCM, span=(2.0, 6.0), num=2000)
    w, cond = world.objective.draw_guidance(world.batch)
    assert torch.equal(cond["guidance"], w)
    assert 2 <= w.min() < 2.1 and 5.9 < w.max() < 6 and abs(float(w.mean()) - 4) < 0.1
    fixed = World(LCM)
    assert fixed.objective.draw_guidance(fixed.batch) == (3.0, fixed.batch.cond)


def test_p1_step_conditions_are_dropped_row_by_row():
    world = World(LCM, num=4000)
    labels = world.objective.drop_condition(world.batch, 0.2)["class_labels"]
    dropped = labels == 0
    assert 0.17 < float(dropped.double().mean()) < 0.23
    assert torch.equal(labels[~dropped], world.batch.cond["class_labels"][~dropped])


def test_p1_step_the_target_moves_by_its_decay():
    """theta- <- mu theta- + (1 - mu) theta with mu = target_decay ** growth, from theta at first."""
    target = Heard(Classes(Flow(), 0.2, 0.9))
    world = World(Consistency, parts={"target": target}, target_decay=0.8)
    objective, net = world.objective, target.backbone.requires_grad_(False)
    assert objective.target_net(0) is target and float(net.m) == pytest.approx(-0.6)
    world.student.backbone.m.data.fill_(1.4)
    objective.move_target(2.0)
    assert float(net.m) == pytest.approx(0.64 * -0.6 + 0.36 * 1.4)
    objective.target_net(1)
    assert float(net.m) == pytest.approx(0.64 * -0.6 + 0.36 * 1.4), "only the first step copies"


def test_p1_step_laws_of_time():
    """uniform on the grid; logit-normal of the grid position; log-normal of sigma / alpha."""
    flow, edm = World(LCM, Flow()).objective, World(LCM, EDM()).objective
    t = flow.sample_t(20_000, TimeConfig(low=0.2, high=0.6))
    assert 0.2 <= t.min() < 0.201 and 0.599 < t.max() < 0.6 and abs(float(t.mean()) - 0.4) < 0.01
    t = flow.sample_t(20_000, TimeConfig(kind="logit_normal", mean=0.7, std=0.5))
    logit = (t / (1 - t)).log()
    assert abs(float(logit.mean()) - 0.7) < 0.02 and abs(float(logit.std()) - 0.5) < 0.02
    for objective, level in ((edm, lambda t: t), (flow, lambda t: t / (1 - t))):
        t = objective.sample_t(20_000, TimeConfig(kind="log_normal", mean=-0.8, std=0.7))
        log = level(t).log()
        assert abs(float(log.mean()) + 0.8) < 0.02 and abs(float(log.std()) - 0.7) < 0.02


class LinearDisc(nn.Module):
    """l(x) = a . x: its squared gradient is |a|^2 everywhere. Keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.a, self.seen = nn.Parameter(torch.tensor([0.6, -0.8, 2.0])), []

    def forward(self, x_t, t, cond, score=False):
        self.seen.append(x_t.detach().clone())
        return [x_t @ self.a]


def test_p1_r1_at_the_same_noised_input():
    """Exact: |a|^2. Approximate: E (a . step n)^2 = step^2 |a|^2, one more pass at exactly that distance."""
    obj = SimpleNamespace(disc=LinearDisc(), rng=Tape())
    x_t, t = torch.randn(4000, 3), torch.ones(4000)
    _, exact = real_side(obj, x_t.clone(), t, {}, 0.0)
    assert math.isclose(float(exact), 5.0, rel_tol=1e-5)
    exact.backward()
    torch.testing.assert_close(obj.disc.a.grad, 2 * obj.disc.a.detach())
    obj.disc.seen.clear()
    _, near = real_side(obj, x_t, t, {}, 0.1)
    first, second = obj.disc.seen
    assert torch.equal(first, x_t) and 0.09 < float((second - first).std()) < 0.11
    assert math.isclose(float(near) / 0.01, 5.0, rel_tol=0.1)
    logits, none = real_side(obj, x_t, t, {}, None)
    assert none is None and len(logits) == 1
