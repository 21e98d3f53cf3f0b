"""Self-Forcing: DMD on rollouts, long rollouts and their mask, an exact chain that teacher forcing misses."""

import pytest
import torch

from fastgen.cli.sample import Generator, draw
from fastgen.cli.sample import main as sample
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import Flow
from fastgen.export.load import load_export
from fastgen.export.snippet import PROMPT
from fastgen.objectives import requirements_of
from fastgen.objectives.causvid import CausVid
from fastgen.objectives.dmd2 import DMD2
from fastgen.objectives.self_forcing import SelfForcing, SelfForcingConfig
from tests.objectives.test_causvid import SETTINGS, TIMES, chain_objective, clips
from tests.support.causal import causal_cast, causal_export, check_plain
from tests.support.play import batch as batch_for
from tests.support.play import play
from tests.support.replay import plainly
from tests.support.spelled import World, at_x, dmd_weight, gradient, softplus_pair
from tests.support.toys import batch_of, rng, run_mixture

SHORT = {"student_every": 2}
"""settings of the contract battery"""


def test_p1_step_is_the_formula():
    """Both turns with the GAN at guidance 3: DMD on one rollout, the critic on another."""
    world = World(SelfForcing, times=TIMES, gan_weight=0.3, disc_weight=0.2, r1_weight=0.7, **SETTINGS)
    (student, critic), calls, disc = world.turns(), world.student.calls, world.disc
    (own,) = (i for i, call in enumerate(calls) if call.grad)
    assert torch.equal(calls[0].x_t, world.batch.noise)
    assert torch.equal(calls[own + 1].x_t, world.tape.drawn[own + 1]), "noise of the critic's own rollout"
    x, t = calls[own].out, world.shown(world.teacher)[1]
    eps = world.noise_in(*world.shown(world.teacher), x)

    gan = world.gan_of(0.3, eps, t)
    torch.testing.assert_close(gradient(student.loss, x), world.score_gradient(x, dmd_weight) + at_x(gan, x))
    fake, real = (disc.logit(*seen) for seen in disc.seen[1:])
    wanted = 0.2 * softplus_pair(fake, real) + 0.7 * disc.a.square().sum()
    torch.testing.assert_close(world.check_critic(critic, calls[-1].out), wanted.detach())
    assert not calls[-1].grad


def test_p1_between_student_updates_the_critic_alone_moves():
    world = World(SelfForcing, times=TIMES, **{**SETTINGS, "student_every": 3})
    (turn,) = world.turns(1)
    assert turn.player == "critic" and not any(call.grad for call in world.student.calls)


@pytest.mark.parametrize("seed", range(3))
def test_p1_of_one_block_the_students_turn_is_dmd2s(seed):
    """With backward simulation, to the bit; the critic's turn has a rollout of its own."""
    found = []
    for method in (SelfForcing, DMD2):
        world = World(method, times=TIMES, gan_weight=0.3, **SETTINGS)
        world.tape.reset(seed)
        found.append(world.turns())
    (student, critic), (other, second) = found
    assert torch.equal(student.loss, other.loss) and student.grads.keys() == other.grads.keys()
    assert all(torch.equal(g, other.grads[n]) for n, g in student.grads.items())
    assert not torch.equal(critic.loss, second.loss)


def test_p1_the_list_is_warped_as_published():
    """1, .75, .5, .25 by the shift of 5, which the noise levels of the score are drawn through too."""
    times = Flow(shift=5.0).steps(4)
    assert times == pytest.approx([1.0, 0.9375, 0.8333333, 0.625])
    assert Flow().steps(4) != pytest.approx(times)
    tau = torch.tensor([0.75, 0.5, 0.25])
    assert Flow(shift=5.0).from_unit(tau).tolist() == pytest.approx(times[1:])


def test_p1_one_step_for_all_blocks_or_one_for_each():
    for together in (True, False):
        cfg = {**SETTINGS, "one_step_for_all_blocks": together}
        objective = chain_objective(SelfForcing, cfg, times=TIMES, frames=4)
        several = 0
        for k in range(6):
            objective.student.backbone.seen.clear()
            next(objective.step(batch_of(clips(4)), k * objective.cfg.student_every))
            ends = {float(t[0]) for _, t, grad, _ in objective.student.backbone.seen if grad}
            several += len(ends) > 1
        assert (several == 0) if together else (several > 3)


def test_p1_a_long_rollout_ends_in_the_clip_and_leaves_its_first_block_out():
    """Six blocks, the last four scored, the first of these without gradient; of a rollout as long as the clip
    every block has some.
    """
    for blocks, bare in ((6, 1), (0, 0)):
        objective = chain_objective(SelfForcing, {**SETTINGS, "rollout_blocks": blocks}, times=(1.0,))
        one = batch_of(clips(8))
        x = objective.rollout(one, one.noise)
        assert torch.equal(x.detach(), one.noise), "frame by frame x = z: it is the end that is kept"
        drawn = sum(not now.write for _, _, _, now in objective.student.backbone.seen)
        assert drawn == (blocks or 4)
        leaf = x.detach().requires_grad_()
        loss, _ = objective.student_loss(leaf, one, objective.kept(leaf))
        (found,) = torch.autograd.grad(loss, leaf)
        used, loss_of = [], objective.student_loss
        objective.student_loss = lambda *given, f=loss_of, u=used: (u.append(given[2]), f(*given))[1]
        next(objective.step(one, 0))
        assert torch.equal(torch.as_tensor(used[0]), torch.as_tensor(objective.kept(leaf)))
        assert found[:, :, :bare].abs().sum() == 0 and found[:, :, bare:].abs().amin() > 0


def test_rollouts_shorter_than_the_clip_are_refused():
    objective = chain_objective(SelfForcing, {**SETTINGS, "rollout_blocks": 3})
    with pytest.raises(UserError, match="objective.rollout_blocks: found 3, and a clip has 4"):
        next(objective.step(batch_of(clips(4)), 0))
    world = World(SelfForcing, rollout_blocks=3, **SETTINGS)
    with pytest.raises(UserError, match="one block"):
        world.turns()


def test_only_a_gan_needs_data():
    assert not requirements_of(SelfForcingConfig()).real_data
    assert requirements_of(SelfForcingConfig(gan_weight=0.1)).real_data


# -- an exact chain ------------------------------------------------------------------------------------------
def trained(method, steps=500, **cfg):
    """A one-step linear student of the AR(1) chain with phi 0.8, from scratch; its critic can be exact."""
    settings = {
        "student_every": 2,
        "time": {"low": 0.02, "high": 0.9},
        "critic_time": {"low": 0.02, "high": 0.9},
    }
    objective = chain_objective(
        method, {**settings, **cfg}, times=(1.0,), frames=4, first=0.8, own=0.9, back=0.1
    )
    optimizers = {
        name: torch.optim.Adam(objective.players[name].trainable().values(), lr, betas=(0.5, 0.9))
        for name, lr in (("student", 0.02), ("critic", 0.04))
    }
    generator = torch.Generator().manual_seed(3)
    for k in range(steps):
        objective.rng.reset(k)
        for name, lr in (("student", 0.02), ("critic", 0.04)):
            optimizers[name].param_groups[0]["lr"] = lr * (1 - k / steps)
        noise = torch.randn(512, 1, 4, dtype=torch.float64, generator=generator)
        for loss, _ in objective.step(batch_of(clips(512, generator=generator), noise), k):
            optimizer = optimizers[objective.active]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return objective.student


def rolled(student, frames=24):
    """(mean square of the last frames, correlation of neighbouring ones) of long rollouts."""
    noise = torch.randn(4000, 1, frames, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = student.generate(noise, {}, torch.randn_like)[:, 0, -8:]
    spread = x.square().mean().item()
    return spread, (x[:, 1:] * x[:, :-1]).mean().item() / spread


@pytest.mark.slow
def test_p2_self_forcing_finds_the_chain_and_teacher_forcing_drifts():
    """The conditional mean and innovation of x' = .8 x + .6 z, and so the law of clips six times as long as
    trained. A student that learned on noised data has often seen noise in the place of its past, and fades.
    """
    student = trained(SelfForcing)
    net = student.backbone
    assert abs(net.back.item() - 0.8) < 0.05 and abs(abs(net.own.item()) - 0.6) < 0.05, vars(net)
    spread, correlation = rolled(student)
    assert abs(spread - 1) < 0.12 and abs(correlation - 0.8) < 0.05, (spread, correlation)
    drift, _ = rolled(trained(CausVid))
    assert drift < 0.5, "its clips should fade"


@pytest.mark.slow
def test_p2_distils_the_mixture(tmp_path):
    before, after, _, _ = run_mixture(tmp_path, {"name": "self_forcing", "student_every": 2}, steps=250)
    assert after < 0.03 and after < before / 4, (before, after)


# -- on networks ---------------------------------------------------------------------------------------------
GAN = {"student_every": 1, "gan_weight": 0.1, "disc_weight": 0.1}
OTHERS = [{"name": "self_forcing", **GAN}, {"name": "sid"}, {"name": "dmd2", **GAN}]


@pytest.mark.parametrize("objective", OTHERS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_p1_wan_players_move_in_their_turns(tmp_path, kind, objective):
    """DMD with a GAN, and SiD, on rollouts; one frozen base serves an adapter that goes block by block and
    two that do not.
    """
    cfg, cast = causal_cast(tmp_path, objective, kind)
    method, one = cast.stage(cfg.all_stages()[0], rng()), batch_for(cast)
    t = torch.full((2,), 0.7, dtype=torch.float64)
    with torch.no_grad():
        before = [cast.parts[n](one.noise, t, one.cond) for n in ("teacher", "student")]
    assert {player for player, _ in play(method, one, 0, check=True)} == {"student", "critic"}
    with torch.no_grad():
        after = [cast.parts[n](one.noise, t, one.cond) for n in ("teacher", "student")]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return causal_export(tmp_path_factory.mktemp("causal"), {"name": "self_forcing"}, "lora")


def test_p4_self_forcing(exported):
    """A LoRA on its base in plain diffusers, with the loop it carries, as long as trained and longer."""
    check_plain(*exported, "lora")


def test_p4_the_cards_code_draws_what_we_draw(exported):
    """As written in README.md, in the export's own folder: the clip of seed 0, to the rounding of pixels."""
    folder, _ = exported
    text = (folder / "README.md").read_text()
    assert "a plain call of the pipeline" in text and "is right." not in text
    code = text.split("```python\n")[1].split("```")[0]
    code += "import numpy\nclip = numpy.stack([numpy.array(frame) for frame in frames])\n"
    code += "images = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float()\n"
    theirs = plainly(code, folder)
    loaded = load_export(str(folder))
    cond = loaded.codec.prompts([PROMPT])
    ours = draw(Generator(loaded, 0, 1.0, {}), cond, [0], 1)[0]
    theirs = theirs / 255 if theirs.max() > 1.5 else theirs
    assert theirs.shape == ours.shape and (theirs - ours).abs().max() < 1.01 / 255 + 1e-3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--num_frames", "10"],
            "--num_frames: found 10; give 9 or 12: in tokens of 3 latent frames, as wan needs",
        ),
        (["--cache_blocks", "4"], "--cache_blocks: found 4 blocks, and clips of training have 3"),
        (["--base_steps", "4"], "--base_steps: found for a student that goes block by block"),
        (["--visualize_dt"], "--visualize_dt: found for a student that goes block by block"),
    ],
)
def test_what_a_causal_student_cannot_draw_is_said_in_a_line(exported, tmp_path, capsys, flags, message):
    asked = ["--model", str(exported[0]), "--prompt", "a red bag", "--out", str(tmp_path / "out")]
    assert sample([*asked, *flags]) == 2
    found = capsys.readouterr().err.strip().splitlines()
    assert found[-1].startswith(f"error: {message}") and not any("Traceback" in line for line in found)


def test_a_window_is_for_causal_students_alone(exported, tmp_path, capsys):
    teacher = exported[1].teacher_cfg.path
    asked = [
        "--model",
        str(teacher),
        "--prompt",
        "a red bag",
        "--out",
        str(tmp_path / "out"),
        "--cache_blocks",
        "2",
    ]
    assert sample(asked) == 2 and "error: --cache_blocks: found 2" in capsys.readouterr().err


def test_longer_clips_by_a_flag(exported, tmp_path):
    """Twice as long as trained, its beginning the clip as trained; a shorter window is another clip."""
    from PIL import Image, ImageSequence

    clips = []
    for number, flags in enumerate(
        [[], ["--num_frames", "18"], ["--num_frames", "18", "--cache_blocks", "1"]]
    ):
        out = tmp_path / str(number)
        asked = ["--model", str(exported[0]), "--prompt", "a red bag", "--out", str(out), "--seed", "3"]
        assert sample([*asked, *flags]) == 0
        with Image.open(out / "00000_3.gif") as clip:
            clips.append([frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(clip)])
    assert [len(clip) for clip in clips] == [9, 18, 18]
    assert clips[1] != clips[2]
