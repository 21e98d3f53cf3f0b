"""LADD: the GAN pair's values, who gets gradient, spectral heads, the penalty's input, and exact mixtures."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import EDM, Flow
from fastgen.networks.denoiser import Denoiser
from fastgen.networks.rewards import Reward, Rewards
from fastgen.objectives.ladd import LADD, LADDConfig
from fastgen.objectives.shared.gan import different
from fastgen.roles.heads import Discriminator, PatchHead
from fastgen.roles.roles import Role, Student, StudentSpec
from tests.support.replay import replay
from tests.support.rewards import near
from tests.support.spelled import NEAR, World, at_x, gradient
from tests.support.toys import GaussianNet, batch_of, rng, run_mixture

TOLD = {"preference_weight": 0.5, "rewards": [{"name": "contrast"}]}
SHORT = {"gan": {"r1_weight": 0.1, "disc_depths": 2}, **TOLD}
"""settings of the contract battery"""


class Linear(Denoiser):
    """A teacher whose feature is x_t itself."""

    prediction = "x0"

    def __init__(self):
        super().__init__()
        self.schedule, self.seen = Flow(), []
        self.gain = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x_t, t, cond):
        return self.gain * x_t

    def features(self, x_t, t, cond, taps=(-1,), score=False):
        self.seen.append(x_t)
        return [self.gain * x_t[..., None, None]], None


class Shift(Denoiser):
    """A student that only moves its noise."""

    prediction, schedule = "x0", Flow()

    def __init__(self):
        super().__init__()
        self.m = nn.Parameter(torch.tensor(1.0))

    def forward(self, x_t, t, cond):
        return self.m + x_t


class LinearDisc(nn.Module):
    """Logit w x + b of the noised input."""

    def __init__(self, w=0.0):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(0.0))
        self.seen = []

    def forward(self, x_t, t, cond):
        self.seen.append((x_t, t, cond))
        return [self.w * x_t.flatten(1).float() + self.b]


def make(disc=None, student=None, student_every=1, step_weights=(), **gan):
    schedule = Flow()
    cfg = {"student_every": student_every, "step_weights": step_weights, "gan": gan}
    student = student or Student(GaussianNet(schedule, -1.0, 0.3), None, StudentSpec([1.0]))
    return LADD(LADDConfig(**cfg), {"student": student, "disc": disc or LinearDisc()}, rng())


def test_p1_values_at_zero_and_at_perfect_logits():
    for kind, d, g in (("hinge", 1.0, 0.0), ("softplus", 2 * math.log(2), math.log(2))):
        turns = make(loss=kind).step(batch_of(torch.randn(8, 2)), 0)
        assert float(next(turns)[0]) == pytest.approx(g) and float(next(turns)[0]) == pytest.approx(d)


@pytest.mark.parametrize("schedule", [Flow(), EDM()], ids=["flow", "edm"])
@pytest.mark.parametrize("loss", ["hinge", "softplus"])
def test_p1_step_is_the_formula(schedule, loss):
    """Two steps, told the scale: the gradient in the sample, the heads' loss of real, fake and misaligned."""
    S, gan = schedule, {"loss": loss, "disc_time": NEAR, "r1_weight": 0.7}
    times = S.steps(2)
    world = World(LADD, S, times, span=(1.0, 5.0), num=16, gan=gan)
    (student, heads), (call,) = world.turns(), world.student.calls
    disc, batch, first = world.disc, world.batch, call.t == times[0]
    assert set(call.t.tolist()) == set(times) and call.cond["guidance"].std() > 0.5
    pure = batch.noise * S.prior_std(times[0])
    wanted = torch.where(first[:, None], pure, S.noise(batch.x0, batch.noise, call.t))
    torch.testing.assert_close(call.x_t, wanted)
    (x_t, t, cond), *seen = disc.seen
    world.within(t, NEAR)
    eps = world.noise_in(x_t, t, call.out)
    g = {"hinge": lambda y: -y, "softplus": lambda y: nn.functional.softplus(-y)}[loss]
    wanted = at_x(lambda x: g(disc.logit(S.noise(x, eps, t), t, batch.cond)).mean(), call.out)
    torch.testing.assert_close(gradient(student.loss, call.out), wanted)
    for (x_t, t, _), x in zip(seen, (batch.x0, call.out, batch.x0.roll(1, 0))):
        world.within(t, NEAR)
        world.noise_in(x_t, t, x)
    real, fake, other = (disc.logit(*one) for one in seen)
    fake = torch.cat([fake, other])  # every neighbour is of another class
    if loss == "hinge":
        pair = 0.5 * (nn.functional.relu(1 + fake).mean() + nn.functional.relu(1 - real).mean())
    else:
        pair = nn.functional.softplus(fake).mean() + nn.functional.softplus(-real).mean()
    torch.testing.assert_close(heads.loss, pair + 0.7 * disc.a.square().sum())


def test_p1_step_weights_choose_the_time():
    world = World(LADD, Flow(), [1.0, 0.75, 0.5], num=400, step_weights=(3.0, 0.0, 1.0))
    world.turns()
    t = world.student.calls[0].t
    assert float((t == 1).double().mean()) == pytest.approx(0.75, abs=0.06) and not (t == 0.75).any()


def test_p1_gradients_stay_with_their_player():
    teacher = Linear()
    disc = Discriminator(Role(teacher), (-1,), (torch.zeros(2, 3), torch.ones(2).double(), {}), "patch")
    student = Shift()
    objective = make(disc, Student(student, None, StudentSpec([1.0])))

    for loss, _ in objective.step(batch_of(torch.randn(8, 3)), 0):
        active = objective.active
        loss.backward()
        heads = [p.grad for p in disc.parameters()]
        if active == "student":
            assert student.m.grad.abs() > 0 and all(g is None for g in heads)
            student.m.grad = None
        else:
            assert student.m.grad is None and sum(float(g.abs().sum()) for g in heads if g is not None) > 0
    assert teacher.gain.grad is None


def test_p1_heads_are_spectrally_normed_and_give_a_logit_per_token():
    head = PatchHead(12)
    for conv in (head.inp[0], head.mid[0], head.out):
        seen = {}
        conv._conv_forward = lambda x, w, b, c=conv, s=seen: (
            s.update(w=w) or nn.Conv2d._conv_forward(c, x, w, b)
        )
        nn.init.normal_(conv.weight, 0, 3)
        conv(torch.randn(1, conv.in_channels, 4, 4))
        assert float(torch.linalg.svdvals(seen["w"].flatten(1))[0].detach()) == pytest.approx(1, abs=1e-4)
        del conv._conv_forward
    assert head(torch.randn(5, 12, 3, 4)).shape == (5, 12)
    assert torch.isfinite(head(torch.randn(1, 12, 1, 1))).all()  # a batch of one, a map of one


def test_p1_discriminator_of_shifted_gaussians_and_the_student_that_follows_it():
    """Softplus logit between noised N(1, 1) and N(0, 1) is linear, and pushes a shift-only student to 0."""

    net, disc = Shift(), LinearDisc()
    time = {"kind": "uniform", "low": 0.3, "high": 0.301}
    objective = make(
        disc, Student(net, None, StudentSpec([1.0])), loss="softplus", disc_time=time, misaligned=False
    )
    optimizers = {
        "student": torch.optim.Adam(net.parameters(), 0.02),
        "disc": torch.optim.Adam(disc.parameters(), 0.05, betas=(0.0, 0.9)),
    }
    slopes = []
    for k in range(400):
        objective.rng.reset(k)
        for loss, _ in objective.step(batch_of(objective.rng.randn(256, 1)), k):
            optimizer = optimizers[objective.active]
            optimizer.zero_grad()
            loss.backward()
            if objective.active == "disc" or k > 150:
                optimizer.step()
        slopes.append(float(disc.w.detach()))
    # log N(x; 0, v) - log N(x; a, v) has slope -a / v with a = 0.7, v = 0.7^2 + 0.3^2
    assert sum(slopes[100:150]) / 50 == pytest.approx(-0.7 / 0.58, abs=0.25)
    assert abs(float(net.m.detach())) < 0.15


def test_p1_exact_penalty_is_the_squared_gradient_at_the_noised_real_input():
    disc = LinearDisc(0.7)
    objective = make(disc, r1_weight=2.0)
    batch = batch_of(torch.randn(64, 5))
    turns = objective.step(batch, 0)
    next(turns)
    _, logs = next(turns)
    assert float(logs["r1"].detach()) == pytest.approx(0.49 / 5, rel=1e-5)  # mean over 5 tokens: w / 5 each
    x_t, t, _ = disc.seen[1]
    assert x_t.requires_grad and not torch.equal(x_t.detach(), batch.x0)
    noise = (x_t.detach() - (1 - t[:, None]) * batch.x0) / t[:, None]
    assert abs(float(noise.std()) - 1) < 0.2


def test_p1_approximate_penalty_perturbs_the_same_noised_input():
    disc = LinearDisc(0.7)
    objective = make(disc, r1_weight=2.0, r1="approximate", r1_std=0.01)
    batch = batch_of(torch.randn(2000, 1))
    turns = objective.step(batch, 0)
    next(turns)
    _, logs = next(turns)
    assert float(logs["r1"].detach()) == pytest.approx((0.7 * 0.01) ** 2, rel=0.1)
    (real, t, _), (near, t2, _) = disc.seen[1:3]
    assert torch.equal(t, t2) and float((near - real).std()) == pytest.approx(0.01, rel=0.1)
    assert (near - batch.x0).std() > 0.1  # negative: not the un-noised data, as the public code has it


def test_p1_misaligned_rows_are_fake_and_never_truly_aligned():
    labels = torch.tensor([0, 1, 1, 2])
    assert different({"class_labels": labels}).tolist() == [True, True, False, True]
    assert different({}) is None
    disc = LinearDisc(1.0)
    x0 = 100.0 * torch.arange(4.0)[:, None]
    batch = batch_of(x0, cond={"class_labels": labels})
    objective = make(disc, disc_time={"kind": "uniform", "low": 0.0, "high": 0.001})
    turns = objective.step(batch, 0)
    next(turns)
    loss, _ = next(turns)
    x, _, cond = disc.seen[-1]
    torch.testing.assert_close(x, torch.tensor([[300.0], [0.0], [200.0]]), atol=2, rtol=0.01)
    assert cond["class_labels"].tolist() == [0, 1, 2]
    disc.seen.clear()
    without = list(make(disc, misaligned=False).step(batch, 0))
    assert len(without) == 2 and len(disc.seen) == 3


# -- preferences ---------------------------------------------------------------------------------------------
def told(world):
    """(winner, loser) as the heads were shown them last, each (x_t, t, cond)."""
    return world.disc.seen[-2:]


def pair_term(world, weight):
    """weight mean -log sigmoid(l_w - l_l) of what the heads were shown last, on the rows that are counted."""
    won, lost = (world.disc.logit(*one) for one in told(world))
    return weight * nn.functional.softplus(lost - won)


@pytest.mark.parametrize("loss", ["hinge", "softplus"])
def test_p1_heads_are_told_which_image_is_preferred(loss):
    """The heads' loss is the pair's plus -log sigmoid(l_w - l_l), both noised alike; the student's is as it
    was, and a pair turned round pulls the other way.
    """
    found = {}
    gan = {"loss": loss, "disc_time": NEAR, "misaligned": False}
    for weight in (0.0, 0.8):
        world = World(LADD, Flow(), preference_weight=weight, gan=gan)
        loser = world.batch.x0 + torch.linspace(0.3, 1.1, 8, dtype=torch.float64)[:, None]
        world.batch = dataclasses.replace(world.batch, dispreferred=loser)
        found[weight] = world, *world.turns()
    plain, world = found[0.0], found[0.8][0]
    torch.testing.assert_close(found[0.8][1].loss, plain[1].loss)
    torch.testing.assert_close(found[0.8][2].loss, plain[2].loss + pair_term(world, 0.8).mean())
    (w_t, t, _), (l_t, t2, _) = told(world)
    world.within(t, NEAR)
    assert torch.equal(t, t2)
    eps = world.noise_in(w_t, t, world.batch.x0)
    torch.testing.assert_close(l_t, world.schedule.noise(world.batch.dispreferred, eps, t))
    a = world.disc.a
    pull, back = (torch.autograd.grad(f, a)[0] for f in (pair_term(world, 1.0).mean(), turned(world)))
    assert float((pull * back).sum()) < 0, "negative: the loser as the winner"


def turned(world):
    lost, won = (world.disc.logit(*one) for one in told(world))
    return nn.functional.softplus(lost - won).mean()


def test_p1_a_preference_does_not_move_both_logits_and_random_ones_teach_nothing():
    """Invariant to a shift of all logits, unlike the GAN's own pair; each pair in both orders has no gradient
    at heads that do not tell them apart; uncounted pairs have no part in it.
    """
    w, lost = torch.randn(2, 16, 5, dtype=torch.float64)
    every = torch.ones(16, dtype=torch.bool)
    value = losses.preference([w], [lost], every)
    torch.testing.assert_close(losses.preference([w + 3], [lost + 3], every), value)
    assert not torch.isclose(
        losses.gan_discriminator([lost + 3], [w + 3]), losses.gan_discriminator([lost], [w])
    )
    wanted = nn.functional.softplus(lost.mean(1) - w.mean(1))
    torch.testing.assert_close(value, wanted.mean())
    some = torch.arange(16) < 3
    torch.testing.assert_close(losses.preference([w], [lost], some), wanted[:3].mean())
    assert losses.preference([w], [lost], ~every) == 0
    x, y = torch.randn(2, 64, 1, dtype=torch.float64)
    slope = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def pull(first, second):
        loss = losses.preference([slope * first], [slope * second], torch.ones(len(first)))
        return float(torch.autograd.grad(loss, slope)[0])

    assert pull(torch.cat([x, y]), torch.cat([y, x])) == pytest.approx(0, abs=1e-12)
    assert pull(x.maximum(y), x.minimum(y)) < -0.1  # negative: told truly, it learns which way is up


def test_p1_rewards_rank_two_samples_of_the_same_step():
    """x and x' come of one time and two noises; the one that is worse in no reward wins, if either is."""

    def right(x, prompts):
        return x[:, 0].float()

    def up(x, prompts):
        return x[:, 1].float()

    points = SimpleNamespace(shape=(3,))
    names = [{"name": f.__name__} for f in (right, up)]
    parts = {"rewards": Rewards([Reward(f.__name__, f) for f in (right, up)], points)}
    gan = {"disc_time": NEAR, "misaligned": False}
    times = [1.0, 0.75]
    world = World(LADD, Flow(), times, num=64, parts=parts, rewards=names, preference_weight=1.0, gan=gan)
    _, heads = world.turns()
    first, second = world.student.calls
    assert torch.equal(first.t, second.t) and not second.grad and (first.x_t != second.x_t).any()
    x, y = first.out.detach(), second.out
    wins = (x[:, :2] >= y[:, :2]).all(1)
    loses = (x[:, :2] <= y[:, :2]).all(1)
    counted = wins != loses  # what is pure noise has one mean here, and no preference
    assert 10 < int(counted.sum()) < 54 and (wins & loses).any()
    first = wins[:, None]
    (w_t, t, _), (l_t, _, _) = told(world)
    eps = world.noise_in(w_t, t, torch.where(first, x, y))
    torch.testing.assert_close(l_t, world.schedule.noise(torch.where(first, y, x), eps, t))
    torch.testing.assert_close(heads.logs["preference"], pair_term(world, 1.0)[counted].mean())


@pytest.mark.parametrize(
    "objective,message",
    [
        (
            {"preference_weight": 0.5},
            "data.dispreferred: none given; ladd with a preference_weight needs the",
        ),
        ({"rewards": [{"name": "contrast"}]}, "objective.rewards: found some with preference_weight 0"),
        ({"preference_weight": -1.0}, "objective.preference_weight"),
    ],
)
def test_preferences_without_losers_are_one_line(objective, message):
    with pytest.raises(UserError) as error:
        validate({"objective": {"name": "ladd", **objective}, "data": {"name": "fashion"}})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_step_weights_choose_the_trained_step_and_the_first_is_pure_noise():
    seen = []

    class Net(GaussianNet):
        def forward(self, x_t, t, cond):
            seen.append((x_t, t))
            return super().forward(x_t, t, cond)

    student = Student(Net(Flow(), 0.0, 1.0), None, StudentSpec([1.0, 0.5]))
    batch = batch_of(torch.full((400, 1), 50.0))
    next(make(student=student, step_weights=(1.0, 3.0)).step(batch, 0))
    x_t, t = seen[0]
    assert float((t == 0.5).double().mean()) == pytest.approx(0.75, abs=0.08)
    torch.testing.assert_close(x_t[t == 1.0], batch.noise[t == 1.0])
    assert (x_t[t == 0.5] > 10).all()


def test_student_every():
    objective = make(student_every=3)
    count = {"student": 0, "disc": 0}
    for k in range(6):
        for _ in objective.step(batch_of(torch.randn(4, 1)), k):
            count[objective.active] += 1
    assert count == {"student": 2, "disc": 6}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hinge", "softplus"])
def test_p2_distils_the_mixture(tmp_path, kind):
    gan = {"loss": kind, "disc_time": {"kind": "uniform", "low": 0.05, "high": 0.7}}
    before, after, _, _ = run_mixture(tmp_path, {"name": "ladd", "gan": gan}, steps=350, batch=128)
    assert after < before / 3 and after < 0.04, (before, after)


@pytest.mark.slow
def test_p2_preferences_move_what_is_distilled(tmp_path):
    """Heads that prefer what is near (1, 0): the mixture is distilled, with more of its mass there."""
    gan = {"loss": "softplus", "disc_time": {"kind": "uniform", "low": 0.05, "high": 0.7}}
    ranked = [{"name": "near", "weights": {"near": "tests.support.rewards:near"}}]
    told = {"preference_weight": 0.3, "rewards": ranked}
    before, after, x, trainer = run_mixture(
        tmp_path, {"name": "ladd", "gan": gan, **told}, steps=200, batch=128
    )
    real, _ = trainer.cast.teacher.backbone.sample(1500, torch.Generator().manual_seed(7))
    mine, exact = (float(near()(samples, []).mean()) for samples in (x, real))
    assert after < before / 2 and mine > exact + 0.05, (before, after, mine, exact)


def test_p4_ladd(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "ladd", **SHORT})
