"""Supervised training: its loss is a native regression, dropout is as stated, and it learns exact
denoisers.
"""

import pytest
import torch

from fastgen.diffusion import losses
from fastgen.diffusion.schedules import EDM, VP, Flow
from fastgen.export.load import load_export
from fastgen.objectives.sft import SFT, SFTConfig
from fastgen.roles.roles import Student, StudentSpec
from fastgen.sampling.solvers import sample_teacher
from tests.support.replay import plainly, train
from tests.support.spelled import NEAR, World, at_x, gradient
from tests.support.toys import GaussianNet, batch_of, rng, run_mixture

SHORT = {}
"""settings of the contract battery"""
TEACHER = """
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
unet = UNet2DModel.from_pretrained("{folder}", subfolder="unet", torch_dtype=torch.float32)
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("{folder}", subfolder="scheduler")
scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
x = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    for t in scheduler.timesteps:
        out = unet(x, t, class_labels=torch.arange(10)).sample
        x = scheduler.step(out, t, x).prev_sample
images = (torch.nn.functional.pixel_shuffle(x, 2) / 2 + 0.5).clamp(0, 1)
"""


def make(schedule, **cfg):
    return SFT(
        SFTConfig(**cfg),
        {"student": Student(GaussianNet(schedule, 0.3, 0.8), None, StudentSpec(schedule.steps(1)))},
        rng(),
    )


@pytest.mark.parametrize(
    "kind,schedule", [("eps", VP.scaled_linear()), ("flow", Flow()), ("v", VP.scaled_linear())]
)
def test_p1_loss_is_the_native_regression(kind, schedule):
    objective = make(schedule, weighting=kind, time={"low": 0.1, "high": 0.9})
    x0 = torch.randn(64, 2, dtype=torch.float64)
    loss, _ = next(objective.step(batch_of(x0), 0))
    objective.rng.generator.manual_seed(0)
    t, eps = objective.sample_t(64, objective.cfg.time), objective.rng.randn_like(x0)
    x_t = schedule.noise(x0, eps, t)
    out = schedule.from_x0(kind, objective.student(x_t, t, {}), x_t, t)
    torch.testing.assert_close(
        loss, (out - schedule.from_x0(kind, x0, x_t, t)).square().mean(), rtol=1e-4, atol=1e-6
    )


def test_p1_moments_of_the_noise_are_added():
    """5 (mean^2 + (std - 1)^2) of the noise that D implies, by sample; zero of noise that is white."""
    weighted, plain = (make(VP.scaled_linear(), noise_moments=w) for w in (5.0, 0.0))
    x0 = torch.randn(16, 40, dtype=torch.float64)
    (a, logs), (b, _) = (next(one.step(batch_of(x0), 0)) for one in (weighted, plain))
    weighted.rng.generator.manual_seed(0)
    t, eps = weighted.sample_t(16, weighted.cfg.time), weighted.rng.randn_like(x0)
    x_t = weighted.schedule.noise(x0, eps, t)
    out = weighted.schedule.from_x0("eps", weighted.student(x_t, t, {}), x_t, t)
    moments = (out.mean(1) ** 2 + (out.std(1) - 1) ** 2).mean()
    torch.testing.assert_close(a - b, 5 * moments, rtol=1e-4, atol=1e-6)
    assert moments > 1e-3 and torch.equal(logs["denoising"], b)
    white = torch.tensor([[-1.0, 1.0]]) / 2**0.5
    assert losses.noise_moments(white) < 1e-12 < 0.9 < losses.noise_moments(white + 1)


def test_p1_step_is_the_formula():
    """The error of the native prediction, here a flow's, at times drawn as the settings say."""
    world = World(SFT, time=NEAR, cond_dropout=0.0)
    (turn,), (call,) = world.turns(), world.student.calls
    world.within(call.t, NEAR)
    world.noise_in(call.x_t, call.t, world.batch.x0)
    weight = world.native(call.t)[:, None]
    wanted = at_x(lambda D: (weight * (D - world.batch.x0) ** 2).mean(), call.out)
    torch.testing.assert_close(gradient(turn.loss, call.out), wanted)


def test_p1_condition_dropout_rate():
    class Spy(GaussianNet):
        def forward(self, x_t, t, cond):
            self.dropped = (cond["class_labels"] == 9).double().mean()
            return super().forward(x_t, t, cond)

    net = Spy(Flow(), 0.0, 1.0)
    objective = SFT(SFTConfig(cond_dropout=0.3), {"student": Student(net, None, StudentSpec([1.0]))}, rng())
    batch = batch_of(torch.randn(4000, 1), cond={"class_labels": torch.zeros(4000).long()})
    batch.uncond = {"class_labels": torch.full((4000,), 9)}
    next(objective.step(batch, 0))
    assert 0.27 < net.dropped < 0.33


def test_p1_log_normal_times():
    objective = make(EDM(), time={"kind": "log_normal", "mean": -1.2, "std": 1.2})
    t = objective.sample_t(20_000, objective.cfg.time).log()
    assert abs(t.mean() + 1.2) < 0.05 and abs(t.std() - 1.2) < 0.05


@pytest.mark.slow
def test_p2_learns_the_exact_denoiser(tmp_path):
    """Trained on samples of the mixture, D comes near the closed form at every noise level."""
    *_, trainer = run_mixture(
        tmp_path, {"name": "sft", "time": {"low": 0.001, "high": 1.0}}, steps=500, lr=2e-3
    )
    mixture, net, S = (
        trainer.cast.teacher.backbone,
        trainer.cast.parts["student"],
        trainer.cast.teacher.schedule,
    )
    x0, labels = mixture.sample(2000, torch.Generator().manual_seed(3))
    for u in (0.2, 0.5, 0.8):
        t = S.from_unit(torch.full((2000,), u))
        x_t = S.noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(4)), t)
        cond = {"class_labels": labels}
        with torch.no_grad():
            exact, found = mixture(x_t, t, cond), net(x_t, t, cond)
        excess = (found - x0).square().mean() - (exact - x0).square().mean()
        assert excess < 0.15 * (exact - x0).square().mean() + 0.01, (u, float(excess))


def test_p4_sft(tiny, tmp_path):
    export = train(tiny, tmp_path, {"name": "sft"})
    images = plainly(TEACHER.format(folder=export), tmp_path)
    loaded = load_export(str(export))
    noise = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = {"class_labels": torch.arange(10)}
    ours = loaded.codec.decode(sample_teacher(loaded.role, noise, cond, cond, 4))
    assert (images - ours).abs().max() < 1e-3
