"""f-divergences into assets: where it is VSD, both branches spelled out, the bank for real data."""

import pytest
import torch

from fastgen.core.batch import Batch
from fastgen.diffusion.schedules import VP
from fastgen.networks.denoiser import Denoiser
from fastgen.objectives import requirements_of
from fastgen.objectives.shared.teacher_bank import TeacherBank, condition_marks
from fastgen.objectives.uni_instruct_3d import UniInstruct3D, UniInstruct3DConfig
from fastgen.objectives.vsd import VSD
from fastgen.roles.roles import Role
from fastgen.threed.gaussians import GaussianAsset
from tests.support.heavier import first_of
from tests.support.replay import replay
from tests.support.scenes import SceneTeacher, asset_student, role, seen_from
from tests.support.spelled import FAR, NEAR, World, at_x, gradient, softplus_pair
from tests.support.toys import rng, run_mixture

SHORT = {"f": "kl", "bank": 2, "bank_steps": 2, "warmup_steps": 0}
"""settings of the contract battery"""


class Grey(Denoiser):
    """A critic of scenes that answers half the noisy image and one number that it learns."""

    prediction = "x0"

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.c = schedule, torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, x_t, t, cond):
        return 0.5 * x_t + self.c

    raw = forward


class Bright(torch.nn.Module):
    """A logit that grows with brightness."""

    def __init__(self, critic):
        super().__init__()
        self.a, self.critic = torch.nn.Parameter(torch.tensor(3.0)), [critic]

    def forward(self, x_t, t, cond, score=False):
        logits = [self.a * x_t.flatten(1).mean(1)]
        return (logits, self.critic[0](x_t, t, cond)) if score else logits

    def trainable(self):
        return dict(self.named_parameters())


def of_scene(method, **cfg):
    """The gradients in an asset of one step on an exact scene."""
    S = VP.scaled_linear()
    critic = Role(Grey(S))
    parts = {
        "student": asset_student([GaussianAsset(30)]),
        "teacher": role(SceneTeacher(S)),
        "critic": critic,
    }
    parts["disc"] = Bright(critic)
    if method is VSD:
        parts.pop("disc")
    objective = method(method.config(**cfg), parts, rng())
    objective.prepare()
    objective.rng.reset(0)
    next(objective.step(seen_from(3, 0), 0))[0].backward()
    return [p.grad for p in objective.student.trainable().values()]


def test_p1_reverse_kl_is_vsd_bit_for_bit():
    """And so is any f while the ratio is being learned; afterwards it is not."""
    wanted = of_scene(VSD)
    same = of_scene(UniInstruct3D, f="rkl"), of_scene(UniInstruct3D, f="kl", warmup_steps=1)
    for found in same:
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    other = of_scene(UniInstruct3D, f="kl", warmup_steps=0)
    assert not all(torch.equal(a, b) for a, b in zip(other, wanted))


H = {  # h and h - r h'
    "kl": lambda r: (r, 0 * r),
    "js": lambda r: (r / (1 + r), (r / (1 + r)) ** 2),
    "chi2": lambda r: (2 * r**2, -2 * r**2),
}
WIDE = {"ratio_low": 1e-9, "ratio_high": 1e9, "bank": 2, "bank_steps": 2, "disc_weight": 0.2}


def told(f, branch, k=0, **more):
    cfg = {"time": NEAR, "critic_time": FAR, "warmup_steps": 0, **WIDE, **more}
    world = World(UniInstruct3D, f=f, branch=branch, **cfg)
    return world, world.turns(k)


@pytest.mark.parametrize("f", first_of(["kl", "js", "chi2"]))
def test_p1_step_di_is_the_formula(f):
    """sigma^2 h (e_T^w - e_F), h over its mean; the heads learn from the bank at the times of the critic."""
    world, (student, critic) = told(f, "di")
    x, S, cond = world.student.calls[0].out, world.schedule, world.batch.cond
    x_t, t = world.shown(world.teacher)
    world.within(t, NEAR)
    world.noise_in(x_t, t, x)
    real, fake = world.noises(x_t, t)
    h, _ = H[f](world.disc.logit(x_t, t, cond).detach().clamp(-10, 10).exp())
    assert h.std() > 0.05 * h.mean()
    wanted = (S.sigma(t) ** 2 * h / h.mean())[:, None] * (real - fake) / len(x)
    torch.testing.assert_close(gradient(student.loss, x), wanted.detach(), rtol=1e-4, atol=1e-7)
    _, fakes, reals = world.disc.seen
    world.within(fakes[1], FAR)
    world.noise_in(fakes[0], fakes[1], x)
    assert torch.equal(fakes[1], reals[1])
    bank = torch.stack([world.objective.bank.rows[key] for key in world.objective.bank.rows])
    eps = (reals[0] - S.alpha(reals[1])[:, None] * bank.double()[:, None]) / S.sigma(reals[1])[:, None]
    noise = world.tape.drawn[-1].double()
    assert (eps - noise).abs().amax(-1).amin(0).max() < 1e-3, "real is what the teacher drew, noised"
    pair = softplus_pair(world.disc.logit(*fakes), world.disc.logit(*reals))
    torch.testing.assert_close(critic.loss - critic.logs["denoising"], 0.2 * pair)


@pytest.mark.parametrize("f", first_of(["js", "kl", "chi2"]))
def test_p1_step_sim_is_the_formula(f):
    """The derivative goes through teacher, critic and ratio; with a constant ratio it is another one."""
    world, (student, _) = told(f, "sim")
    x, S, cond = world.student.calls[0].out, world.schedule, world.batch.cond
    x_t, t = world.shown(world.teacher)
    eps = world.noise_in(x_t, t, x)
    W = (x - world.guided(x_t, t)).abs().mean(1).detach()

    def loss(x, constant=False):
        x_t = S.noise(x, eps, t)
        real, fake = world.guided(x_t, t), world.critic.backbone(x_t, t, cond)
        r = world.disc.logit(x_t, t, cond).clamp(-10, 10).exp()
        h, kappa = H[f](r.detach() if constant else r)
        gap = real - fake
        found = 2 * h * (gap * (fake - x)).sum(1) + kappa * (gap**2).sum(1)
        return (found / h.mean().detach() / W).mean()

    found = gradient(student.loss, x)
    torch.testing.assert_close(found, at_x(loss, x), rtol=1e-4, atol=1e-6)
    other = at_x(lambda x: loss(x, constant=True), x)
    assert (other - found).norm() > 0.02 * found.norm(), "negative: the ratio is a function of x_t"


def test_p1_the_bank_is_made_once_and_again_the_same():
    """By condition and number alone: not by the order of batches, the camera or what else is in a batch."""
    S = VP.scaled_linear()
    calls = []

    class Counted(SceneTeacher):
        def forward(self, x_t, t, cond):
            calls.append(len(x_t))
            return (0.3 * x_t + cond["prompt"][:, None, None, None]).float()

    parts = {
        "student": asset_student([GaussianAsset(5)]),
        "teacher": role(Counted(S)),
        "critic": Role(Grey(S)),
    }
    parts["disc"] = Bright(parts["critic"])
    objective = UniInstruct3D(UniInstruct3DConfig(), parts, rng())

    def drawn(order):
        bank = TeacherBank(objective, 3, 2)
        for k in order:
            one = seen_from(4, k)
            prompt = torch.tensor([0.0, 1.0, 1.0, 0.0])
            one = Batch(None, {**one.cond, "prompt": prompt}, one.uncond, one.noise, one.index)
            objective.rng.reset(k)
            assert bank(one, objective.teacher).shape == one.noise.shape
        return bank.rows

    first, second = drawn(range(12)), drawn(reversed(range(12)))
    assert len(first) == 6 and first.keys() == second.keys(), "two prompts of three each, whatever the camera"
    assert all(torch.equal(first[key], second[key]) for key in first)
    different = list(first.values())
    gaps = [(a - b).abs().max() for i, a in enumerate(different) for b in different[:i]]
    assert min(gaps) > 0.1
    assert sum(calls) == 2 * 2 * 6, "two runs of six samples, two steps each"
    one = seen_from(3, 0)
    assert len(set(condition_marks(one))) == 1, "cameras alone do not tell conditions apart"


def test_needs_heads_with_a_ratio_and_images_never():
    ratio, plain = (requirements_of(UniInstruct3DConfig(f=f)) for f in ("kl", "rkl"))
    assert "disc" in ratio.auxiliaries and not plain.auxiliaries
    assert not ratio.real_data and not plain.real_data
    sim = requirements_of(UniInstruct3DConfig(f="kl", branch="sim")).network_calls(2.0, 1)
    assert sim["teacher+grad"] == 2 and "teacher" not in sim


@pytest.mark.parametrize("branch", first_of(["di", "sim"]))
def test_p2_distils_the_mixture(tmp_path, branch):
    objective = {
        "name": "uni_instruct_3d",
        "f": "js",
        "branch": branch,
        "student_every": 2,
        "warmup_steps": 50,
    }
    objective |= {"bank": 256, "bank_steps": 8, "ratio_memory": 2048, "ratio_low": 0.1, "ratio_high": 10.0}
    before, after, *_ = run_mixture(tmp_path, objective, "analytic:gmm2d-vp", steps=160)
    assert after < 0.04 and after < before / 3, (before, after)


def test_p4_uni_instruct_3d(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "uni_instruct_3d", **SHORT})
