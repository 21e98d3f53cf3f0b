"""DMD2: the identities of its gradient, its turns, and distillation of exact mixtures."""

import math

import pytest
import torch
from torch import nn

from fastgen.diffusion import losses
from fastgen.diffusion.schedules import EDM, VP, Flow
from fastgen.objectives import requirements_of
from fastgen.objectives.dmd2 import DMD2, DMD2Config
from tests.support.heavier import first_of
from tests.support.replay import replay, replay_counts
from tests.support.spelled import FAR, NEAR, World, at_x, dmd_weight, gradient, softplus_pair
from tests.support.toys import (
    AffineStudent,
    CountingRole,
    GaussianNet,
    batch_of,
    gaussian_role,
    rng,
    run_mixture,
)

SHORT = {"student_every": 2, "gan_weight": 0.1, "disc_weight": 0.1}
"""settings of the contract battery"""

NO_GAN = {"gan_weight": 0.0, "student_every": 1}


def kl(m, s, m_p, s_p, t):
    """KL between the noised student and teacher Gaussians (EDM)."""
    q, p = s**2 + t**2, s_p**2 + t**2
    return 0.5 * (torch.log(p / q) + (q + (m - m_p) ** 2) / p - 1)


def test_p1_score_difference_is_the_gradient_of_kl():
    """E_z,eps [(s_fake - s_real) dx/d(m, s)] equals d KL(q_t || p_t) / d(m, s), by quadrature over z and
    eps.
    """
    S, m, s, m_p, s_p = EDM(), -0.4, 0.6, 0.5, 1.0
    nodes, weights = (torch.tensor(v) for v in __import__("numpy").polynomial.hermite_e.hermegauss(24))
    weights = weights / weights.sum()
    z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
    w = (weights[:, None] * weights[None]).flatten()
    for t in (0.3, 1.0, 4.0):
        tt = torch.full((z.numel(),), t, dtype=torch.float64)
        x_t = (m + s * z + t * eps).reshape(-1, 1)
        gap = S.score(gaussian_role(S, m, s)(x_t, tt, {}), x_t, tt) - S.score(
            gaussian_role(S, m_p, s_p)(x_t, tt, {}), x_t, tt
        )
        found = torch.stack([(w * gap[:, 0]).sum(), (w * gap[:, 0] * z.flatten()).sum()])
        mm, ss = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (m, s))
        exact = torch.autograd.grad(kl(mm, ss, m_p, s_p, torch.tensor(t, dtype=torch.float64)), (mm, ss))
        torch.testing.assert_close(found, torch.stack(exact), rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", [EDM(), Flow(), VP.scaled_linear()], ids=["edm", "flow", "vp"])
def test_p1_fixed_point(schedule):
    """Exact critic and student equal to the teacher: no gradient at any noise level."""
    teacher = gaussian_role(schedule, 0.5, 1.0)
    x = (0.5 + torch.randn(64, 1, dtype=torch.float64)).requires_grad_()
    for u in (0.05, 0.5, 0.95):
        t = schedule.from_unit(torch.full((64,), u))
        x_t = schedule.noise(x.detach(), torch.randn_like(x), t)
        losses.distribution_matching(
            x, teacher(x_t, t, {}), gaussian_role(schedule, 0.5, 1.0)(x_t, t, {})
        ).backward()
    assert x.grad.abs().max() == 0


def descend(fake_of, steps, normalise=True, sign=1.0, lr=0.02):
    """Gradient descent of an affine generator with an analytic critic; returns (m, s)."""
    S, n = EDM(), 2048
    teacher = gaussian_role(S, 0.5, 1.0)
    m, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-1.0, 0.3))
    generator = torch.Generator().manual_seed(0)
    grid = S.from_unit(torch.arange(20, 1000, 60) / 999)
    for _ in range(steps):
        z, eps = torch.randn(2, n, 1, generator=generator, dtype=torch.float64)
        t = grid[torch.randint(len(grid), (n,), generator=generator)]
        x = m + s * z
        x_t = S.noise(x.detach(), eps, t)
        real, fake = teacher(x_t, t, {}), fake_of(S, m.item(), s.item(), x.detach(), x_t, t)
        gap = sign * (fake - real)
        if normalise:
            gap = gap / ((x.detach() - real).abs() + 1e-6)
        grads = torch.autograd.grad((gap * x).mean(), (m, s))
        with torch.no_grad():
            m -= lr * grads[0].clamp(-10, 10)
            s -= lr * grads[1].clamp(-10, 10)
    return m.item(), s.item()


def exact_critic(S, m, s, x, x_t, t):
    return gaussian_role(S, m, s)(x_t, t, {})


def test_p1_converges_with_an_exact_critic():
    m, s = descend(exact_critic, 400)
    assert abs(m - 0.5) < 0.05 and abs(s - 1.0) < 0.05, (m, s)


def test_p1_negative_sign_flip_runs_away():
    m, s = descend(exact_critic, 200, sign=-1.0)
    assert abs(m - 0.5) > 2, (m, s)


def test_p1_negative_without_critic_collapses_to_the_mode():
    """D_fake := x is score distillation sampling: the mean is right and the spread is gone."""
    m, s = descend(lambda S, m, s, x, x_t, t: x, 1500, normalise=False, lr=0.05)
    assert abs(m - 0.5) < 0.05 and abs(s) < 0.15, (m, s)


def make(cfg, schedule=None, student=None, steps=1):
    schedule = schedule or EDM()
    student = student or AffineStudent(schedule, -1.0, 0.3)
    critic = CountingRole(GaussianNet(schedule, -1.0, 0.3))
    return DMD2(
        DMD2Config(**cfg),
        {"student": student, "critic": critic, "teacher": gaussian_role(schedule, 0.5, 1.0)},
        rng(),
    )


def test_p1_the_real_score_may_have_its_own_guidance():
    objective, used = make({"gan_weight": 0.0, "student_every": 1, "real_guidance": 3.0}), []
    guided = objective.teacher.guided
    spy = lambda x, t, c, u, w: (used.append(w), guided(x, t, c, u, 1.0))[1]  # noqa: E731
    object.__setattr__(objective.teacher, "guided", spy)
    next(objective.step(batch_of(torch.randn(8, 1)), 0))
    assert used == [3.0] and requirements_of(DMD2Config()).learned_guidance(2.0) == 2.0
    cfg = DMD2Config(real_guidance=1.0, gan_weight=0.0, student_every=1)
    needs = requirements_of(cfg)
    calls = needs.network_calls(needs.learned_guidance(2.0), 1)
    assert calls["teacher"] == 1, "an unguided real score is one call, whatever the teacher's samples use"


def test_p1_update_ratio_and_turns():
    """Twenty steps at ratio 5: four student updates, twenty critic updates, gradients only in one's own
    turn.
    """
    objective = make({"gan_weight": 0.0, "student_every": 5})
    count = {"student": 0, "critic": 0}
    for k in range(20):
        for loss, _ in objective.step(batch_of(torch.randn(8, 1)), k):
            active = objective.active
            loss.backward()
            count[active] += 1
            for name, player in objective.players.items():
                grads = [p.grad for p in player.trainable().values()]
                if name == active:
                    assert all(g is not None and g.abs() > 0 for g in grads)
                else:
                    assert all(g is None for g in grads)
            for player in objective.players.values():
                for p in player.trainable().values():
                    p.grad = None
    assert count == {"student": 4, "critic": 20}


def test_p1_step_is_the_formula():
    """Both turns with the GAN at guidance 3: the gradient in x, the critic's loss and its times."""
    cfg = {"time": NEAR, "critic_time": FAR, "gan_weight": 0.3, "disc_weight": 0.2, "r1_weight": 0.7}
    world = World(DMD2, **cfg)
    (student, critic), disc = world.turns(), world.disc
    x, t = world.student.calls[0].out, world.shown(world.teacher)[1]
    eps = world.noise_in(*world.shown(world.teacher), x)

    gan, batch = world.gan_of(0.3, eps, t), world.batch
    torch.testing.assert_close(gradient(student.loss, x), world.score_gradient(x, dmd_weight) + at_x(gan, x))
    fake, real = (disc.logit(*seen) for seen in disc.seen[1:])
    assert torch.equal(disc.seen[1][1], disc.seen[2][1])  # one time for both
    world.noise_in(*disc.seen[2][:2], batch.x0)
    wanted = 0.2 * softplus_pair(fake, real) + 0.7 * disc.a.square().sum()
    torch.testing.assert_close(world.check_critic(critic, x), wanted.detach())
    assert set(critic.grads) == {"critic.m", "critic.s", "disc.a"} and set(student.grads) == {
        "student.m",
        "student.s",
    }


class StepNet(GaussianNet):
    """Counts calls and keeps the inputs of a several-step student."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def forward(self, x_t, t, cond):
        self.seen.append((x_t.detach().clone(), t.clone(), torch.is_grad_enabled()))
        return super().forward(x_t, t, cond)


@pytest.mark.parametrize("schedule", [Flow(), VP.scaled_linear()], ids=["flow", "vp"])
def test_p1_backward_simulation(schedule):
    """s + 1 calls, all but the last without gradient; at s = 0 the input is the noise itself."""
    from fastgen.roles.roles import Student, StudentSpec

    net = StepNet(schedule, 0.0, 1.0)
    student = Student(net, None, StudentSpec(schedule.steps(4)))
    objective = make(NO_GAN, schedule, student)
    batch = batch_of(torch.randn(8, 1))
    for last in range(4):
        net.seen.clear()
        objective.generate(batch, last)
        assert [grad for *_, grad in net.seen] == [False] * last + [True]
        assert [float(t[0]) for _, t, _ in net.seen] == schedule.steps(4)[: last + 1]
        torch.testing.assert_close(net.seen[0][0], batch.noise)
        if last:
            assert not torch.equal(net.seen[-1][0], batch.noise)


def test_p1_without_backward_simulation_the_input_is_noised_data():
    from fastgen.roles.roles import Student, StudentSpec

    schedule = Flow()
    net = StepNet(schedule, 0.0, 1.0)
    objective = make(
        NO_GAN | {"backward_simulation": False}, schedule, Student(net, None, StudentSpec(schedule.steps(4)))
    )
    batch = batch_of(torch.full((8, 1), 3.0))
    objective.sample(batch, 2)
    assert len(net.seen) == 1
    torch.testing.assert_close(net.seen[0][0], 0.5 * batch.x0 + 0.5 * batch.noise)
    assert float(net.seen[0][1][0]) == 0.5


def test_p1_discriminator_learns_the_log_density_ratio():
    """Optimal logit between N(1, 1) fake and N(0, 1) real is 0.5 - x."""
    head = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(head.parameters(), 0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        real, fake = torch.randn(512, 1, generator=generator), 1 + torch.randn(512, 1, generator=generator)
        loss = losses.gan_discriminator([head(fake)], [head(real)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert math.isclose(head.weight.item(), -1.0, abs_tol=0.15) and math.isclose(
        head.bias.item(), 0.5, abs_tol=0.15
    )


def test_gan_needs_data_and_score_alone_does_not():
    assert requirements_of(DMD2Config(gan_weight=1e-3)).real_data
    assert not requirements_of(DMD2Config(gan_weight=0)).real_data
    assert requirements_of(DMD2Config(gan_weight=0, backward_simulation=False)).real_data


@pytest.mark.parametrize("teacher", first_of(f"analytic:gmm2d-{kind}" for kind in ("vp", "flow", "edm")))
def test_p2_distils_the_mixture(tmp_path, teacher):
    before, after, samples, _ = run_mixture(
        tmp_path, {"name": "dmd2", "gan_weight": 0.0, "student_every": 2}, teacher
    )
    assert after < 0.02 and after < before / 4, (before, after)
    angle = torch.atan2(samples[:, 1], samples[:, 0])
    modes = torch.bincount((angle / (math.pi / 3)).round().long() % 6, minlength=6) / len(samples)
    assert modes.min() > 0.10, modes


@pytest.mark.slow
def test_p2_with_gan_and_four_steps(tmp_path):
    objective = {"name": "dmd2", "gan_weight": 0.03, "disc_weight": 0.03, "student_every": 2}
    before, after, _, _ = run_mixture(tmp_path, objective, num_steps=4, steps=300)
    assert after < 0.03, (before, after)


def test_p4_dmd2(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "dmd2", "student_every": 1, "gan_weight": 0.1, "disc_weight": 0.1})


def test_p4_dmd2_adapter_between_renoise_and_ode(tiny, tmp_path):
    """Walked and drawn by TCD's mixture, as the four-step adapter recipe; plain TCDScheduler with its eta."""
    objective = {"name": "dmd2", "student_every": 1, "gan_weight": 0.0}
    found = replay_counts(
        tiny, tmp_path, objective, "TCDScheduler", counts=(4,), other={"original_inference_steps": 10},
        sampler="tcd", gamma=0.3,
    )  # fmt: skip
    assert found.info.step_arguments == {"eta": 0.3}


@pytest.mark.parametrize("step", [0.0, 0.05])
def test_r1_is_part_of_the_critics_turn(tiny, step):
    from tests.objectives import test_contract as contract

    extra = {"r1_weight": 1.0, "r1_step": step, "gan_weight": 0.1, "disc_weight": 0.1, "student_every": 1}
    _, cast, plain = contract.make("dmd2", tiny("flow"))
    objective = DMD2(DMD2Config(**extra), plain.parts, rng())
    _, logs = list(objective.step(contract.batch(cast), 0))[-1]
    assert float(logs["r1"].detach()) > 0
    calls = requirements_of(DMD2Config(**extra)).network_calls(1.0, 1)
    without = requirements_of(DMD2Config(**{**extra, "r1_weight": 0.0})).network_calls(1.0, 1)
    assert calls["features+grad"] - without["features+grad"] == (1 if step else 2)


FORMS = {
    "sdxl": ({"kind": "lora", "lora": {"rank": 64, "lora_alpha": 8}}, {"kind": "full"}),
    "cheap": ({"kind": "lora", "lora": {"rank": 64, "lora_alpha": 8}}, {"kind": "lora", "lora": {"rank": 2}}),
    "full student, LoRA critic": ({"kind": "full"}, {"kind": "lora", "lora": {"rank": 2}}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("features", ["critic", "teacher"])
def test_forms_of_student_and_critic(tiny, form, features):
    """A LoRA student beside a full critic, or all three over one base; the teacher never moves."""
    from fastgen.config.run import validate
    from fastgen.training.assembly import make_cast
    from tests.objectives.test_contract import batch, play

    student, critic = FORMS[form]
    objective = {"name": "dmd2", "student_every": 1, "gan_weight": 0.1, "disc_features": features}
    cfg = validate(
        {
            "teacher": {"path": str(tiny("sd")), "guidance": 2.0},
            "student": {"num_steps": 4, **student},
            "critic": critic,
            "objective": objective,
            "data": {"name": "tinted"},
        }
    )
    cast = make_cast(cfg)
    assert len(cast.backbones()) == {"sdxl": 2, "cheap": 1}.get(form, 2)
    method, one = cast.stage(cfg.all_stages()[0], rng()), batch(cast)
    t = torch.full((2,), 499.0, dtype=torch.float64)
    with torch.no_grad():
        before = cast.parts["teacher"](one.noise, t, one.cond)
        for k in range(3):
            with torch.enable_grad():
                assert {p for p, _ in play(method, one, k, check=True)} == {"student", "critic"}
        assert torch.equal(before, cast.parts["teacher"](one.noise, t, one.cond))
        assert not torch.equal(before, cast.parts["student"](one.noise, t, one.cond))


PLAIN = """
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(".", torch_dtype=torch.float32)
assert type(pipe.scheduler) is LCMScheduler
generators = [torch.Generator().manual_seed(s) for s in (0, 1, 2)]
call = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}
images = pipe(["a red dress"] * 3, generator=generators, **call).images
assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]
"""


def test_p4_dmd2_four_steps_through_lcm_scheduler(tiny, tmp_path):
    """Stages as published (warm start, no GAN, GAN at a low rate), then 999/749/499/249 plainly."""
    import yaml
    from PIL import Image

    from fastgen.cli.train import main
    from fastgen.export.load import load_export
    from fastgen.sampling.solvers import sample_student
    from tests.support.replay import plainly

    (tmp_path / "set").mkdir()
    for i in range(6):
        Image.new("RGB", (16, 16), (40 * i, 90, 200 - 30 * i)).save(tmp_path / f"set/{i}.png")
        (tmp_path / f"set/{i}.txt").write_text("a red dress" if i % 2 else "a blue bag")
    match = {"name": "dmd2", "student_every": 1, "gan_weight": 0.0}
    values = {
        "teacher": {"path": str(tiny("sd")), "guidance": 2.0},
        "student": {"num_steps": 4},
        "data": {"name": "", "images": str(tmp_path / "set")},
        "stages": [
            {"name": "warm", "objective": {"name": "ode_pairs", "teacher_steps": 4}, "max_train_steps": 1},
            {"name": "match", "objective": match, "max_train_steps": 2},
            {"name": "gan", "objective": {**match, "gan_weight": 0.1, "r1_weight": 0.1, "r1_step": 0.05}},
        ],
        "train": {"train_batch_size": 2, "validation_steps": 0, "ema_decay": [0.5]},
        "eval": {"num_samples": 0},
    }
    values["stages"][2]["max_train_steps"] = 2
    for stage in values["stages"]:
        stage["optim"] = {"student": {"lr": 1e-2}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")]) == 0
    images = plainly(PLAIN, tmp_path / "run/export")
    loaded = load_export(tmp_path / "run/export")
    cond = loaded.codec.prompts(["a red dress"] * 3)
    with torch.no_grad():
        ours = loaded.codec.decode(sample_student(loaded.role, [0, 1, 2], loaded.codec.shape, cond))
    assert loaded.role.times == [999.0, 749.0, 499.0, 249.0]
    assert (images - ours).abs().max() < 2e-3
