"""rCM: what its two parts add up to, when each acts, and exact mixtures."""

import pytest
import torch

from fastgen.diffusion import losses
from fastgen.diffusion.schedules import Flow
from fastgen.objectives.dmd2 import DMD2, DMD2Config
from fastgen.objectives.rcm import RCM, RCMConfig
from fastgen.objectives.scm import SCM
from fastgen.roles.roles import Student, StudentSpec
from tests.objectives.test_scm import SD, alg_1
from tests.support.replay import replay
from tests.support.spelled import FAR, NEAR, World, at_x, dmd_weight, gradient
from tests.support.toys import CountingRole, GaussianNet, batch_of, gaussian_role, rng, run_mixture

SHORT = {"student_every": 1, "scm": {"warmup_steps": 0, "sigma_data": 1.0}}
"""settings of the contract battery"""

SCM_ONLY = {"adaptive": False, "warmup_steps": 0, "weighting": "uniform"}


def make(**cfg):
    S = Flow()
    parts = {
        "student": Student(GaussianNet(S, 0.3, 0.6), None, StudentSpec([1.0])),
        "critic": CountingRole(GaussianNet(S, 0.3, 0.6)),
        "teacher": gaussian_role(S, 0.0, 1.0),
    }
    return RCM(RCMConfig(**{"scm": SCM_ONLY, **cfg}), parts, rng())


def batch():
    return batch_of(torch.randn(32, 2, dtype=torch.float64), torch.randn(32, 2, dtype=torch.float64))


def test_p1_without_matching_it_is_scm_bit_for_bit():
    one, objective = batch(), make(dm_weight=0.0)
    loss, _ = next(objective.step(one, 0))
    alone = SCM(objective.cfg.scm, objective.parts, rng())
    alone.rng.shared_randint(1)  # rCM draws the step of its list first
    assert torch.equal(loss, next(alone.step(one, 0))[0])
    assert len(list(objective.step(one, 1))) == 1 and set(objective.players) == {"student"}


def test_p1_without_consistency_it_is_dmd2_without_gan():
    one, found = batch(), []
    settings = {"scm_weight": 0.0, "dm_weight": 1.0, "student_every": 1}
    objective = make(**settings)
    other = DMD2(DMD2Config(gan_weight=0.0, student_every=1), objective.parts, rng())
    for method in (objective, other):
        plain = type(method).generate

        def generate(self, *args, plain=plain):
            self.rng.reset(5)  # the same draws from here on
            return plain(self, *args)

        method.generate = generate.__get__(method)
        found.append([loss.detach() for loss, _ in method.step(one, 0)])
    assert found[0] == found[1] and found[0][0] > 0


def test_p1_the_two_parts_add_up():
    one = batch()
    loss, logs = next(make(scm_weight=3.0, dm_weight=0.5, student_every=1).step(one, 0))
    torch.testing.assert_close(loss, 3 * logs["error"] + 0.5 * logs["dm"])


def test_p1_matching_begins_after_the_warm_up_and_then_the_critic_leads():
    objective = make(scm=SCM_ONLY | {"warmup_steps": 4}, student_every=3)
    turns = []
    for k in range(10):
        for _ in objective.step(batch(), k):
            turns.append((k, objective.active))
    students = [k for k, player in turns if player == "student"]
    assert students == [0, 1, 2, 3, 6, 9]
    assert [k for k, player in turns if player == "critic"] == list(range(4, 10))


def test_p1_fixed_point_of_the_matching_part():
    """Critic equal to the teacher: no distribution-matching gradient."""
    objective = make()
    objective.parts["critic"].backbone.load_state_dict(objective.teacher.backbone.state_dict())
    _, logs = next(objective.step(batch(), 0))
    assert logs["dm"].abs() < 1e-20 and logs["error"] > 0
    x = torch.randn(4, 2, requires_grad=True)
    losses.distribution_matching(x, x.detach() + 1, x.detach() + 1).backward()
    assert not x.grad.any()


def test_p1_step_is_the_formula():
    """Both parts at guidance 3, each with its weight: the gradients in F_theta's pass and in the sample."""
    scm = {"name": "scm", "sigma_data": SD, "adaptive": False, "warmup_steps": 10}
    world = World(
        RCM, Flow(), time=NEAR, critic_time=FAR, scm_weight=0.7, dm_weight=0.3, scm=scm, student_every=1
    )
    student, critic = world.turns(10)
    F, sample = (call for call in world.student.calls if call.grad)
    formula = alg_1(world.student.backbone, F.cond, F.x_t, F.t, world.guided(F.x_t, F.t), 1.0)
    wanted = 0.7 * at_x(formula, F.out)
    torch.testing.assert_close(gradient(student.loss, F.out), wanted, rtol=1e-3, atol=1e-6)
    wanted = 0.3 * world.score_gradient(sample.out, dmd_weight, i=1)
    torch.testing.assert_close(gradient(student.loss, sample.out), wanted)
    assert abs(world.check_critic(critic, sample.out)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 2])
def test_p2_distils_the_mixture(tmp_path, num_steps):
    objective = {"name": "rcm", "student_every": 2, "scm": {"sigma_data": 0.7, "warmup_steps": 50}}
    before, after, _, _ = run_mixture(tmp_path, objective, num_steps=num_steps, steps=250, batch=128)
    assert after < max(before / 4, 0.02) and after < 0.03, (before, after)


def test_p4_rcm(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "rcm", **SHORT})
