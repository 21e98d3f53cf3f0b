"""CausVid: a time for every block, DMD's turns on the result, and the ODE stage of causal students."""

import pytest
import torch

from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import Flow
from fastgen.objectives.causvid import CausVid, CausVidConfig
from fastgen.objectives.dmd2 import DMD2
from fastgen.objectives.ode_pairs import ODEPairs, ODEPairsConfig
from fastgen.objectives.shared.blocks import draw_levels, is_clean, picked
from fastgen.roles.roles import Role
from fastgen.training.assembly import make_cast
from tests.support.causal import (
    Chain,
    causal_cast,
    causal_export,
    chain_covariance,
    check_plain,
    linear_student,
)
from tests.support.play import batch as batch_for
from tests.support.play import play
from tests.support.spelled import FAR, NEAR, World, at_x, dmd_weight, gradient, softplus_pair
from tests.support.toys import batch_of, rng, run_mixture

SHORT = {"student_every": 2, "gan_weight": 0.1, "disc_weight": 0.1}
"""settings of the contract battery"""
TIMES = [1.0, 0.75, 0.5, 0.25]
SETTINGS = {"time": NEAR, "critic_time": FAR, "student_every": 1}


def test_p1_step_is_the_formula():
    """One pass at x0 noised to the levels that were drawn; both turns with the GAN at guidance 3."""
    world = World(CausVid, times=TIMES, gan_weight=0.3, disc_weight=0.2, r1_weight=0.7, **SETTINGS)
    (student, critic), (call,), disc = world.turns(), world.student.calls, world.disc
    x0, eps = world.batch.x0, world.batch.noise
    assert len(call.t.unique()) > 1 and set(call.t.tolist()) <= set(TIMES) and call.grad
    torch.testing.assert_close(call.x_t, (1 - call.t[:, None]) * x0 + call.t[:, None] * eps)
    x, t = call.out, world.shown(world.teacher)[1]
    eps = world.noise_in(*world.shown(world.teacher), x)

    gan = world.gan_of(0.3, eps, t)
    torch.testing.assert_close(gradient(student.loss, x), world.score_gradient(x, dmd_weight) + at_x(gan, x))
    fake, real = (disc.logit(*seen) for seen in disc.seen[1:])
    wanted = 0.2 * softplus_pair(fake, real) + 0.7 * disc.a.square().sum()
    torch.testing.assert_close(world.check_critic(critic, x), wanted.detach())


def test_p1_between_student_updates_the_critic_alone_moves():
    world = World(CausVid, times=TIMES, **{**SETTINGS, "student_every": 3})
    (turn,) = world.turns(1)
    assert turn.player == "critic" and not world.student.calls[0].grad


def test_p1_of_one_block_it_is_dmd2_without_backward_simulation(monkeypatch):
    """Both turns, to the bit, at one and the same level for all rows."""
    found = []
    for method, more in ((CausVid, {}), (DMD2, {"backward_simulation": False})):
        world = World(method, times=TIMES, gan_weight=0.3, **more, **SETTINGS)
        monkeypatch.setattr(world.tape, "shared_randint", lambda high: 2)
        monkeypatch.setattr(world.tape, "randint", lambda high, num: torch.full((num,), 2))
        found.append([(turn.player, turn.loss, turn.grads) for turn in world.turns()])
    for (one, loss, grads), (other, same, alike) in zip(*found):
        assert one == other and torch.equal(loss, same)
        assert grads.keys() == alike.keys() and all(torch.equal(g, alike[n]) for n, g in grads.items())


def chain_objective(method, cfg, times=(1.0, 0.5), frames=4, **start):
    """A method over the exact chain of `frames` frames, its student linear and frame by frame."""
    teacher = Role(Chain(chain_covariance(frames, 0.8)).requires_grad_(False))
    student, critic = linear_student(times, **start), Role(Chain(torch.eye(frames)))
    return method(method.config(**cfg), {"student": student, "critic": critic, "teacher": teacher}, rng())


def clips(num=64, frames=4, phi=0.8, generator=None):
    """Draws of the chain, [num, 1, frames]."""
    z = torch.randn(num, 1, frames, dtype=torch.float64, generator=generator)
    return z @ torch.linalg.cholesky(chain_covariance(frames, phi)).T


def test_p1_every_block_has_a_level_of_its_own_and_may_be_clean():
    objective, one = chain_objective(CausVid, SETTINGS), batch_of(clips())
    next(objective.step(one, 0))
    ((noisy, t, grad, now),) = objective.student.backbone.seen
    assert t.shape == (64, 4) and grad and now.past == () and not now.write
    assert set(t.flatten().tolist()) == {1.0, 0.5, 0.0}
    assert (t != t[:, :1]).any(1).float().mean() > 0.8
    torch.testing.assert_close(noisy, (1 - t[:, None]) * one.x0 + t[:, None] * one.noise)
    share = (t == 0).double().mean()
    assert 0.2 < share < 0.47, share


def test_p1_clean_blocks_pass_unchanged_and_get_no_gradient():
    objective, one = chain_objective(CausVid, SETTINGS, back=0.3), batch_of(clips())
    x, t = None, None
    loss, _ = next(objective.step(one, 0))
    noisy, t, *_ = objective.student.backbone.seen[0]
    x = objective.student(noisy, t, {})
    clean = (t == 0)[:, None]
    assert torch.equal(x[clean], one.x0[clean])
    (back,) = torch.autograd.grad(x[clean].sum(), objective.student.backbone.back)
    assert back == 0


def test_p1_levels_pick_states_and_say_which_are_clean():
    objective = chain_objective(CausVid, SETTINGS)
    states = torch.arange(3.0)[None, :, None, None].expand(8, 3, 1, 4)
    levels = draw_levels(objective, states[:, 0])
    found = picked(states, levels.which)
    assert torch.equal(found[:, 0], levels.which.float()) and levels.which.shape == (8, 4)
    assert torch.equal(is_clean(levels, found, 2), found == 2)
    times = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    assert torch.equal(levels.t, times[levels.which])


# -- stage 0 -------------------------------------------------------------------------------------------------
def test_p1_the_ode_stage_learns_every_block_at_its_own_state():
    """The loss is the square over blocks that are not clean, each at the teacher's state of its own time."""
    cfg = {"teacher_steps": 4, "metric": "l2"}
    objective, one = chain_objective(ODEPairs, cfg, own=0.7), batch_of(clips())
    objective.prepare()
    loss, _ = next(objective.step(one, 0))
    x_t, t, *_ = objective.student.backbone.seen[0]
    rows = torch.stack([objective.pairs.rows[n] for n in range(64)]).double()
    y = rows[:, -1]
    for index, time in enumerate((1.0, 0.5, 0.0)):
        at = (t == time)[:, None]
        assert at.any() and torch.equal(x_t[at], rows[:, index][at])
    error = (objective.student(x_t, t, {}) - y).square()
    torch.testing.assert_close(loss, error.where((t != 0)[:, None], 0).mean())
    torch.testing.assert_close(y, teacher_end(objective, rows[:, 0]), rtol=1e-6, atol=1e-6)


def teacher_end(objective, noise):
    """Where the teacher's ODE of four Euler steps leads from noise, written out."""
    S, x, grid = Flow(), noise, [1.0, 0.75, 0.5, 0.25, 0.0]
    for t, u in zip(grid, grid[1:]):
        D = objective.teacher(x, torch.full((len(x),), t, dtype=torch.float64), {})
        x = S.ode_step(D, x, *(torch.full((len(x),), v, dtype=torch.float64) for v in (t, u)))
    return x


# -- on networks ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("patch", [1, 3])
def test_p1_wan_teacher_and_critic_look_both_ways_and_the_student_does_not(tmp_path, kind, patch):
    cfg, cast = causal_cast(tmp_path, {"name": "causvid", "student_every": 1}, kind, patch)
    objective, one = cast.stage(cfg.all_stages()[0], rng()), batch_for(cast)
    other = one.noise.clone()
    other[:, :, -3:] += 1
    t = torch.full((2,), 0.7, dtype=torch.float64)
    with torch.no_grad():
        before = cast.parts["teacher"](one.noise, t, one.cond)
        for name in ("teacher", "critic", "student"):
            part = cast.parts[name]
            gap = (part(one.noise, t, one.cond) - part(other, t, one.cond))[:, :, :6].abs().max()
            assert (gap == 0) == (name == "student"), name
    found = play(objective, one, 0, check=True) + play(objective, one, 1, check=True)
    assert {player for player, _ in found} == {"student", "critic"}
    with torch.no_grad():
        assert torch.equal(cast.parts["teacher"](one.noise, t, one.cond), before)


def test_p2_distils_the_mixture(tmp_path):
    before, after, _, _ = run_mixture(
        tmp_path, {"name": "causvid", "student_every": 2}, num_steps=2, steps=250
    )
    assert after < 0.03 and after < before / 2, (before, after)


def test_p4_causvid(tmp_path):
    """A full student's folder in plain diffusers, with the loop it carries, as long as trained and longer."""
    folder, cast = causal_export(tmp_path, {"name": "causvid"})
    check_plain(folder, cast, "full")


# -- mistakes ------------------------------------------------------------------------------------------------
def values(path, **student):
    return {
        "teacher": {"path": str(path)},
        "student": student,
        "objective": {"name": "causvid"},
        "data": {"name": "moving"},
    }


@pytest.mark.parametrize(
    ("causal", "message"),
    [
        ({"block": 2}, "student.causal.block: 9 latent frames are no whole blocks of 2"),
        ({"block": 3, "window": 4}, "student.causal.window: found 4 blocks"),
        (None, "student.causal: found null for causvid on a teacher of clips"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(tmp_path, causal, message):
    from tests.support.clips import clip_teacher

    cfg = validate(values(clip_teacher(tmp_path), causal=causal))
    with pytest.raises(UserError, match=message):
        make_cast(cfg).stage(cfg.all_stages()[0], rng())


def test_images_have_no_blocks(tiny):
    cfg = validate({**values(tiny("sd"), causal={"block": 1}), "data": {"name": "tinted"}})
    with pytest.raises(UserError, match="student.causal: found for sd"):
        make_cast(cfg)


def test_methods_that_make_all_of_a_clip_refuse_blocks():
    one = values("somewhere", causal={"block": 3})
    with pytest.raises(
        UserError, match="student.causal: lcm makes all of a clip at once; use .*self_forcing"
    ):
        validate({**one, "objective": {"name": "lcm"}})
    with pytest.raises(UserError, match="student.net: found beside student.causal"):
        validate({**one, "student": {"causal": {"block": 3}, "net": {"num_layers": 1}}})
    assert CausVidConfig().gan_weight == 0 and ODEPairsConfig().name == "ode_pairs"
