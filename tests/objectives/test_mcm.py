"""MCM: motion heads, mixed trajectories, noise alone at the end, the judge of frames; a look taken over."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import VP, Flow
from fastgen.networks.motion import MotionHead, kept_share, motion_of
from fastgen.networks.vision import Pixels
from fastgen.objectives.lcm import LCM, LCMConfig
from fastgen.objectives.mcm import MCM, MCMConfig
from fastgen.roles.frames import FrameJudge
from fastgen.roles.roles import Role, Student, StudentSpec
from fastgen.training.assembly import make_cast
from fastgen.training.auxiliaries import JUDGED_BY
from fastgen.training.exporting import export_run
from tests.families.cases.video import animatediff
from tests.support.dots import BRIGHT, DARK, FRAMES, SIDE, Codec, Dots, Levels, dots
from tests.support.heavier import first_of
from tests.support.replay import assert_drawn_as, moved, plainly
from tests.support.spelled import World, at_x, gradient, line
from tests.support.tiny import PROMPTS
from tests.support.toys import GaussianNet, Spy, batch_of, rng, run_mixture

SHORT = {"grid_steps": 10, "features": "pixels", "target_decay": 0.5}
"""settings of the contract battery"""
CLIPS = (6, 4, 3, 2, 2)
ALONE = {"gan_weight": 0.0, "mix_prob": 0.0, "pure_noise": False}
"""what leaves LCM"""


def judge(channels=4):
    torch.manual_seed(3)
    return FrameJudge(Pixels(), Codec((channels, 3, 2, 2)), (2, 2))


def make(schedule=None, net=None, teacher=None, parts=None, **cfg):
    """MCM on closed-form networks of clips."""
    S = schedule or VP.scaled_linear()
    torch.manual_seed(4)
    found = {
        "student": Student(net or GaussianNet(S, 0.3, 0.6), None, StudentSpec(S.steps(1))),
        "teacher": teacher or Spy(GaussianNet(S, 0.0, 0.5).requires_grad_(False)),
        "target": Role(GaussianNet(S, -0.4, 0.8)),
        "judge": judge(),
        **{name: MotionHead(4).double() for name in ("motion", "motion_target")},
    }
    return MCM(MCMConfig(**{"grid_steps": 10, **cfg}), found | (parts or {}), rng())


def clips(seed=0, shape=CLIPS):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def woken(head, seed=0):
    """A head that is no longer the identity."""
    torch.manual_seed(seed)
    for p in head.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return head


# -- P1: motion ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("motion", ["learned", "raw"])
def test_p1_at_first_it_is_lcm_bit_for_bit(motion):
    """Spec 1: M begins as the identity. Negatives: a head that has learned, and noise alone at the end."""
    S, batch = VP.scaled_linear(), batch_of(clips())

    def first(objective):
        return next(objective.step(batch, 0))[0]

    parts = {"student": Student(GaussianNet(S, 0.3, 0.6), None, StudentSpec(S.steps(1)))}
    parts["teacher"] = Spy(GaussianNet(S, 0.0, 0.5))
    lcm = first(LCM(LCMConfig(grid_steps=10), parts, rng()))
    assert torch.equal(first(make(motion=motion, **ALONE)), lcm)
    awake = {"motion": woken(MotionHead(4).double())}
    same = torch.allclose(first(make(motion=motion, parts=awake, **ALONE)), lcm)
    assert same == (motion == "raw")
    fixed = make(motion=motion, **{**ALONE, "pure_noise": True})
    fixed.rng.randint = lambda high, num: torch.zeros(num).long()
    before = LCM(LCMConfig(grid_steps=10), parts, rng())
    before.rng.randint = fixed.rng.randint
    assert not torch.allclose(first(fixed), first(before))


def test_p1_what_each_motion_sees_of_a_constant_picture():
    """Spec 3: added to every frame, `diff` does not see it at all; raw and the low frequencies do."""
    z, still = (clips() * 8).round() / 8, (clips(1, (6, 4, 1, 2, 2)) * 8).round() / 8
    for motion, seen in (("diff", False), ("raw", True), ("low", True)):
        moved = motion_of(motion, z + still) - motion_of(motion, z)
        assert bool(moved.abs().max() > 0) == seen, motion
        objective, losses_seen = make(motion=motion, **ALONE), []
        for picture in (0 * still, still):
            shift = objective.neighbours
            objective.neighbours = lambda *a, p=picture, f=shift: (z + p, 0.5 * z)  # noqa: B023
            losses_seen.append(float(next(objective.step(batch_of(z), 0))[0]))
            objective.neighbours = shift
        assert (losses_seen[0] != losses_seen[1]) == seen, motion
    whole = motion_of("low", z, cutoff=2.0), motion_of("high", z, cutoff=2.0)
    torch.testing.assert_close(whole[0], z, rtol=1e-5, atol=1e-5)
    assert whole[1].abs().max() < 1e-5
    low, high = motion_of("low", z, cutoff=0.7), motion_of("high", z, cutoff=0.7)
    torch.testing.assert_close(low + high, z, rtol=1e-5, atol=1e-5)
    assert (low * high).sum().abs() < 1e-4 and min(low.var(), high.var()) > 0.05
    alternating = torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(1, 1, 4, 1, 1).expand(1, 1, 4, 2, 2)
    assert motion_of("low", alternating, cutoff=0.9).abs().max() < 1e-6, "what flickers is high in time"


def test_p1_frames_of_a_learned_head_are_seen_one_by_one():
    head, z = woken(MotionHead(4).double()), clips()
    together = head(z)
    for f in range(3):
        torch.testing.assert_close(together[:, :, f], head(z[:, :, f]))
    assert (together - z).abs().max() > 0.1
    point = head(z[:, :, 0, 0, 0])
    assert point.shape == (6, 4)


def test_p1_a_collapsed_head_is_told():
    """Spec 7: the share of variance is 1 at first, 0 for a constant, whose loss nothing else tells apart."""
    z, head = clips(), MotionHead(4).double()
    assert float(kept_share(head(z), z)) == 1.0
    assert float(kept_share(0 * z + 7, z)) == 0.0
    _, logs = next(make(**ALONE).step(batch_of(z), 0))
    assert float(logs["motion_kept"]) == 1.0


def test_p1_the_target_goes_through_a_slower_head_without_gradient():
    objective = make(**{**ALONE, "metric": "l2"})
    woken(objective.parts["motion"]), woken(objective.parts["motion_target"], 9)
    live, slow = (list(objective.parts[n].parameters()) for n in ("motion", "motion_target"))
    turns = objective.step(batch_of(clips()), 0)
    loss, _ = next(turns)
    assert all(torch.equal(a, b) for a, b in zip(live, slow)), "a stage begins with both alike"
    loss.backward()
    assert all(p.grad is None for p in slow) and any(p.grad.abs().sum() > 0 for p in live)
    before = [p.detach().clone() for p in slow]
    for p in live:
        p.data += 1
    next(turns, None)
    for a, b in zip(slow, before):
        torch.testing.assert_close(a, b + 0.05)


# -- P1: mixed trajectories and the end in noise -------------------------------------------------------------
def test_p1_half_of_the_batches_start_from_the_student():
    """Spec 2: .5 +- binomial, never at 0 and always at 1, whole batches, and no gradient passes through."""
    batch = batch_of(clips())
    for prob in (0.0, 0.5, 1.0):
        objective, own = make(mix_prob=prob, gan_weight=0.0), 0
        for k in range(300):
            objective.rng.reset(k)
            x0 = objective.start(batch, k)
            assert not x0.requires_grad
            own += not torch.equal(x0, batch.x0)
        spread = 4 * math.sqrt(300 * prob * (1 - prob))
        assert abs(own - 300 * prob) <= spread, (prob, own)


def test_p1_the_own_trajectory_is_one_step_from_noise():
    """f_theta(n, T): of the target network where there is one."""
    S = VP.scaled_linear()
    for decay, mean, std in ((0.0, 0.3, 0.6), (0.5, -0.4, 0.8)):
        objective = make(S, mix_prob=1.0, target_decay=decay)
        found = objective.start(batch_of(clips()), 1)
        objective.rng.reset(0)
        objective.rng = Rng(0)
        noise = objective.rng.randn_like(clips())
        t = torch.full((6,), S.t_max, dtype=torch.float64)
        expected = GaussianNet(S, mean, std)(noise, t, {})
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("pure", [True, False])
def test_p1_the_last_time_has_no_trace_of_the_data(pure):
    """Spec 4: exactly; the negative: what a VP schedule leaves there (alpha .068)."""
    seen = []
    for x0 in (clips(), clips(1)):
        objective = make(mix_prob=0.0, gan_weight=0.0, pure_noise=pure)
        objective.rng.randint = lambda high, num: torch.arange(num) % 2  # every other row is the last
        next(objective.step(batch_of(x0), 0))
        seen.append(objective.teacher.seen[0][0])
    last, before = (torch.equal(seen[0][rows], seen[1][rows]) for rows in (slice(0, 6, 2), slice(1, 6, 2)))
    assert last == pure and not before


# -- P1: the judge -------------------------------------------------------------------------------------------
def test_p1_the_hinge_is_their_clipped_loss():
    """Spec 6: half of (theirs + 2), so that it ends at 0 where theirs ends at -2."""
    real, fake = torch.randn(2, 40)
    theirs = (-real).clamp(min=-1).mean() + fake.clamp(min=-1).mean()
    torch.testing.assert_close(losses.gan_discriminator([fake], [real], "hinge"), (theirs + 2) / 2)
    best = losses.gan_discriminator([torch.full((4,), -3.0)], [torch.full((4,), 3.0)], "hinge")
    assert best == 0 and (-torch.tensor(3.0)).clamp(min=-1) + torch.tensor(-3.0).clamp(min=-1) == -2


def test_p1_the_look_reaches_the_student_and_no_frozen_part():
    """The gradient of L_adv goes through frames and decoder; the heads' turn leaves the student alone."""
    objective, batch = make(motion="raw", mix_prob=0.0, augmentations=()), batch_of(clips())
    batch.appearance = torch.rand(6, 4, 2, 2, dtype=torch.float64)
    turns = objective.step(batch, 0)
    loss, logs = next(turns)
    mean = objective.student.backbone.m
    gan, cd = (torch.autograd.grad(logs[n], mean, retain_graph=True)[0] for n in ("gan", "cd"))
    total = torch.autograd.grad(loss, mean)[0]
    assert gan.abs() > 0 and all(p.grad is None for p in objective.judge.parameters())
    torch.testing.assert_close(total, cd + gan, rtol=1e-4, atol=1e-6)
    loss, logs = next(turns)
    assert objective.active == "disc" and objective.players["disc"].parts == {"judge": objective.judge}
    loss.backward()
    assert mean.grad is None and all(p.grad is not None for p in objective.judge.heads.parameters())


def test_p1_real_pictures_are_the_sets_or_frames_of_the_clips():
    seen = []
    for look in (None, torch.full((6, 4, 2, 2), 0.25, dtype=torch.float64)):
        objective, batch = make(mix_prob=0.0, augmentations=(), gp_weight=0.0), batch_of(clips())
        batch.appearance, shown = look, []
        call = objective.judge.forward
        objective.judge.forward = lambda x, f=call: (shown.append(x), f(x))[1]  # noqa: B023
        for loss, _ in objective.step(batch, 0):
            loss.detach()
        seen.append(shown[2])
    at_first = batch.x0[0].transpose(0, 1) / 2 + 0.5
    assert any(torch.allclose(seen[0][0], frame) for frame in at_first)
    assert torch.equal(seen[1], look)


def test_p1_step_is_the_formula():
    """The gradient in what the student answered: Huber of the motion, and the heads' mean on its frames."""

    class Frames(nn.Module):
        """A judge of points: x0 itself is the picture."""

        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor([0.5, -0.2, 0.9], dtype=torch.float64))

        def frames(self, x0, num, rand, spread=False):
            return x0

        def forward(self, x):
            return [(x * self.a).sum(1)]

    head, slow = woken(MotionHead(3).double()), MotionHead(3).double()
    parts = {"motion": head, "motion_target": slow, "judge": Frames()}
    cfg = {"grid_steps": 4, "huber_c": 0.3, "mix_prob": 0.0, "gan_weight": 0.4, "gp_weight": 0.0}
    world = World(MCM, Flow(), num=32, parts=parts, augmentations=(), **cfg)
    student, heads = world.turns(7)
    earlier, call = world.student.calls
    x_t, t = call.x_t, call.t
    r = t - 0.25
    x_r = line(world.guided(x_t, t), x_t, t, r)
    torch.testing.assert_close(earlier.x_t, x_r, rtol=1e-4, atol=1e-5)
    target = torch.where((r > 0)[:, None], earlier.out, x_r).detach()
    goal = MotionHead(3).double()(target).detach()  # the slow head has moved since, and began as the identity

    def loss(D):
        d2 = (head(D) - goal) ** 2
        return ((d2 + 0.3**2).sqrt() - 0.3).mean() - 0.4 * (D * parts["judge"].a).sum(1).mean()

    torch.testing.assert_close(gradient(student.loss, call.out), at_x(loss, call.out), rtol=1e-4, atol=1e-6)
    assert heads.player == "disc" and set(heads.grads) == {"judge.a"}
    fake, real = ((x * parts["judge"].a).sum(1) for x in (call.out.detach(), world.batch.x0))
    hinge = 0.5 * ((1 + fake).clamp(min=0).mean() + (1 - real).clamp(min=0).mean())
    torch.testing.assert_close(heads.loss, hinge)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="found diff for a teacher of single pictures"):
        motion_of("diff", torch.zeros(2, 3, 1, 4, 4))
    with pytest.raises(UserError, match="found low for a teacher of points"):
        motion_of("low", torch.zeros(2, 3))
    look = {"objective": {"name": "lcm"}, "data": {"name": "moving", "appearance": {"name": "tinted"}}}
    with pytest.raises(UserError, match="data.appearance: no stage takes over a look"):
        validate(look)
    with pytest.raises(UserError, match="name each once"):
        validate({"objective": {"name": "mcm", "augmentations": ["cutout", "cutout"]}})
    assert "moving" not in JUDGED_BY.values()


# -- P2 ------------------------------------------------------------------------------------------------------
def test_p2_distils_the_mixture(tmp_path):
    """Without a GAN, half of the batches along its own way, through a head that learns."""
    objective = {"name": "mcm", "grid_steps": 16, "metric": "l2", "gan_weight": 0.0, "mix_prob": 0.5}
    before, after, _, _ = run_mixture(tmp_path, objective, "analytic:gmm2d-flow", steps=200, lr=4e-3)
    assert after < before * 0.5 and after < 0.1, (before, after)


def taken_over(motion, steps=300, weight=0.3):
    """(share of the way to the bright background, share of dots that go on one way) after training."""
    S = Flow()
    net, teacher = Dots(S, DARK), Role(Dots(S, DARK).requires_grad_(False))
    parts = {"student": Student(net, None, StudentSpec(S.steps(1))), "teacher": teacher, "judge": Levels()}
    cfg = {"grid_steps": 2, "motion": motion, "metric": "l2", "augmentations": (), "mix_prob": 0.0}
    objective = MCM(MCMConfig(**cfg, gan_weight=weight, gp_weight=0.1), parts, rng())
    optimizers = {
        "student": torch.optim.Adam([net.means], 0.01, (0.5, 0.9)),
        "disc": torch.optim.Adam(objective.judge.parameters(), 0.1, (0.5, 0.9)),
    }
    real = dots(DARK)
    for k in range(steps):
        objective.rng.reset(k)
        optimizers["student"].param_groups[0]["lr"] = 0.01 * (1 - k / steps)
        batch = batch_of(
            real[objective.rng.randint(len(real), 32)], noise=torch.zeros(32, 1, FRAMES, 1, SIDE)
        )
        batch.appearance = dots(BRIGHT)[objective.rng.randint(len(real), 32), :, 0] / 2 + 0.5
        for loss, _ in objective.step(batch, k):
            optimizers[objective.active].zero_grad()
            loss.backward()
            optimizers[objective.active].step()
    with torch.no_grad():
        noise = Rng(7).randn(400, 1, FRAMES, 1, SIDE).double()
        drawn = objective.student.with_times(S.steps(8)).generate(noise, {}, Rng(8).randn_like)
    level = float(drawn.flatten(1).median(1).values.mean())
    places = drawn[:, 0, :, 0].argmax(-1)
    way = (places.diff(dim=1) + SIDE // 2) % SIDE - SIDE // 2
    steady = (way[:, 0] == way[:, 1]) & (way[:, 0].abs() == 1)
    return (level - DARK) / (BRIGHT - DARK), float(steady.double().mean())


def test_p2_a_look_is_taken_over_where_only_motion_is_compared():
    """Spec 5: dots on dark backgrounds, pictures with bright ones. Compared as they are, the two losses
    fight; either way the dots go on as steadily as before.
    """
    untrained, (free, moves), (fought, also) = (taken_over(*a) for a in (("diff", 0), ("diff",), ("raw",)))
    assert abs(untrained[0]) < 0.1 and untrained[1] > 0.95
    assert 0.6 < free < 1.6 and 0.1 < fought < 0.5, (free, fought)
    assert min(moves, also) > untrained[1] - 0.03, (moves, also)


# -- P4 ------------------------------------------------------------------------------------------------------
PLAIN = """
import json, torch, diffusers
info = json.load(open("fastgen.json"))["export"]
pipe = diffusers.AnimateDiffPipeline.from_pretrained(BASE or ".", torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
if BASE:
    pipe.load_lora_weights(".", weight_name=info["lora"])
    pipe.scheduler = diffusers.LCMScheduler.from_pretrained(".", subfolder="scheduler")
assert type(pipe.scheduler).__name__ == "LCMScheduler"
seeds = [torch.Generator().manual_seed(s) for s in (11, 12)]
call = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 16, "width": 16, "num_frames": 4}
images = pipe(PROMPTS, generator=seeds, output_type="pt", **call).frames.float().transpose(1, 2)
"""


@pytest.mark.parametrize("kind", first_of(["full", "lora"]))
def test_p4_mcm(tmp_path, kind):
    """Four steps by AnimateDiffPipeline with LCMScheduler: motion modules of its own, or a LoRA file."""
    base = str(animatediff(tmp_path / "teacher"))
    values = {
        "teacher": {"path": base},
        "student": {"kind": kind, "num_steps": 4, "lora": {"rank": 2}},
        "objective": {"name": "mcm", "grid_steps": 20, "gan_weight": 0.0},
        "data": {"name": "moving"},
    }
    if kind == "full":
        values["student"]["trained"] = ["*motion_modules*"]
    cfg = validate(values)
    cast = make_cast(cfg)
    cast.stage(cfg.all_stages()[0], Rng(0))
    assert kind == "lora" or all("motion_modules" in name for name in cast.student.trainable())
    moved(cast, 0.05)
    run = SimpleNamespace(cast=cast, train_cfg=cfg.train, step=1, example="", folder=tmp_path, enlarges=0)
    folder = export_run(run, tmp_path / "export", {})
    theirs = plainly(
        f"PROMPTS, BASE = {list(PROMPTS)!r}, {base if kind == 'lora' else ''!r}\n" + PLAIN, folder
    )
    assert theirs.shape == (2, 3, 4, 16, 16)
    assert_drawn_as(theirs, folder, base, PROMPTS)
    if kind == "full":
        same, old = (
            load_file(f / "unet/diffusion_pytorch_model.safetensors") for f in (folder, tmp_path / "teacher")
        )
        other = {name for name in old if not torch.equal(same[name].float(), old[name].float())}
        assert other and all("motion_modules" in name for name in other)
