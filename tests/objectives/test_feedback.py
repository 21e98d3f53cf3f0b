"""Reward feedback: its gradient in closed form, the margin, the reference, which step carries gradient."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from fastgen.cli.train import main
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import VP, Flow
from fastgen.export.load import load_export
from fastgen.networks.rewards import Reward, Rewards
from fastgen.objectives import requirements_of
from fastgen.objectives.feedback import Feedback, FeedbackConfig
from fastgen.roles.roles import Student, StudentSpec
from tests.support.replay import replay
from tests.support.toys import AffineStudent, CountingRole, GaussianNet, batch_of, rng, run_mixture
from tests.training.test_resume import Stop, stop_after

SHORT = {"rewards": [{"name": "contrast"}], "ref_weight": 0.1}
"""settings of the contract battery"""
POINTS = SimpleNamespace(shape=(1,))
A = 0.8


def quadratic(x, prompts):
    return -0.5 * (x[:, 0] - A) ** 2


def linear(x, prompts):
    return 2.0 * x[:, 0]


def make(*scores, student=None, margin=1e6, **cfg):
    """(objective, student) on points; rewards as they are, unless the test calibrates."""
    S = Flow()
    student = student or AffineStudent(S, -0.3, 0.5)
    names = [{"name": f.__name__, "margin": margin} for f in scores]
    parts = {"student": student, "previous": AffineStudent(S, -0.3, 0.5)}
    parts["rewards"] = Rewards([Reward(f.__name__, f) for f in scores], POINTS)
    parts = {k: v for k, v in parts.items() if k != "previous" or cfg.get("ref_weight")}
    objective = Feedback(FeedbackConfig(rewards=names, **cfg), parts, rng())
    objective.prepare()
    return objective, student


def noise(num=512, seed=0):
    return torch.randn(num, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def descend(objective, student, steps=250, lr=0.05):
    z = noise(256)
    z = (z - z.mean()) / z.std(correction=0)
    optimizer = torch.optim.Adam(student.trainable().values(), lr)
    for k in range(1, steps + 1):  # from 1: nothing is calibrated, and the reference stays
        optimizer.param_groups[0]["lr"] = lr * (1 - k / (steps + 1))
        loss, _ = next(objective.step(batch_of(z, z), k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.backbone.m.item(), student.backbone.s.item()


def test_p1_gradient_is_minus_the_rewards():
    """Gradient of the loss in m is that of -E[r]: mean(x - a), with everything below the margin."""
    objective, student = make(quadratic)
    z = noise()
    loss, _ = next(objective.step(batch_of(z, z), 1))
    (grad,) = torch.autograd.grad(loss, student.backbone.m)
    x = (student.backbone.m + student.backbone.s * z).detach()
    torch.testing.assert_close(grad, (x - A).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("g", [0.25, 1.0])
def test_p1_the_reference_keeps_the_spread(g):
    """m = (a + 2 g m_ref) / (1 + 2 g) and s = 2 g s_ref / (1 + 2 g)."""
    objective, student = make(quadratic, ref_weight=g)
    m, s = descend(objective, student)
    assert m == pytest.approx((A + 2 * g * -0.3) / (1 + 2 * g), abs=5e-3)
    assert abs(s) == pytest.approx(2 * g * 0.5 / (1 + 2 * g), abs=5e-3)


def test_p1_negative_without_a_reference_it_collapses():
    m, s = descend(*make(quadratic))
    assert m == pytest.approx(A, abs=1e-2) and abs(s) < 1e-2, (m, s)


def test_p1_the_margin_stops_the_push():
    """All samples above it: no gradient at all; without one a linear reward grows while it is trained."""
    objective, student = make(linear, margin=-50.0)
    z = noise()
    loss, _ = next(objective.step(batch_of(z, z), 1))
    grads = torch.autograd.grad(loss, list(student.trainable().values()))
    assert loss == 0 and all(g == 0 for g in grads)
    stopped = descend(*make(linear, margin=1.0))
    endless = descend(*make(linear))
    assert stopped[0] < 2 and endless[0] > 5, (stopped, endless)


def test_p1_a_constant_reward_has_no_gradient():
    objective, student = make(lambda x, prompts: 0 * x[:, 0] + 3.0)
    z = noise()
    loss, _ = next(objective.step(batch_of(z, z), 1))
    assert all(g == 0 for g in torch.autograd.grad(loss, list(student.trainable().values())))


def test_p1_rewards_of_any_scale_mix():
    """Standardised at the start, a reward times 1000 plus 7 pulls as it did; taken as it is it does not."""

    def scaled(x, prompts):
        return 1000 * quadratic(x, prompts) + 7

    z, found = noise(), {}
    for name, score in (("plain", quadratic), ("scaled", scaled)):
        for k in (0, 1):
            objective, student = make(score, margin=1.0)
            loss, _ = next(objective.step(batch_of(z, z), k))
            (found[name, k],) = torch.autograd.grad(loss, student.backbone.m)
            if k == 0:
                x = objective.generate(batch_of(z, z)).detach()
                assert abs(float(objective.mean[0]) - float(score(x, []).mean())) < 0.2 * objective.std[0]
    torch.testing.assert_close(found["plain", 0], found["scaled", 0], rtol=1e-3, atol=1e-6)
    assert abs(found["plain", 1] - found["scaled", 1]) > 1


def test_p1_several_rewards_add_up_by_weight():
    objective, student = make(quadratic, linear)
    objective.weight = torch.tensor([1.0, 3.0])
    z = noise()
    loss, logs = next(objective.step(batch_of(z, z), 1))
    (grad,) = torch.autograd.grad(loss, student.backbone.m)
    x = (student.backbone.m + student.backbone.s * z).detach()
    torch.testing.assert_close(grad, (x - A).mean() - 3 * 2.0, rtol=1e-4, atol=1e-5)
    assert set(logs) == {"reward_quadratic", "reward_linear"}


class Counted(CountingRole, Student):
    """A student that notes which calls carried gradient."""

    def __init__(self, backbone, spec):
        Student.__init__(self, backbone, None, spec)
        self.calls = []


@pytest.mark.parametrize("first", [1, 3])
def test_p1_one_step_carries_gradient_and_none_before_the_first(first):
    S = VP.scaled_linear()
    seen = set()
    for seed in range(12):
        student = Counted(GaussianNet(S, 0.2, 0.6), StudentSpec(S.steps(4)))
        objective, _ = make(quadratic, student=student, from_step=first)
        objective.rng.reset(seed)
        student.calls.clear()
        next(objective.step(batch_of(noise(8), noise(8)), 1))
        assert student.calls[-1] and not any(student.calls[:-1])
        seen.add(len(student.calls))
    assert seen == set(range(first, 5))
    calls = requirements_of(objective.cfg).network_calls(1.0, 4)
    assert calls["student"] == sum(k - 1 for k in seen) / len(seen)


def test_p1_augmented_images_are_judged():
    """Moved and noised: the reward sees other images, the same ones without."""
    seen = []

    def keep(images, prompts):
        seen.append(images)
        return images.mean((1, 2, 3))

    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for cfg in ({}, {"shift": 0.2}, {"noise": 0.1}):
        objective, _ = make(keep, **cfg)
        objective.rng.reset(3)
        seen.append(objective.augment(images))
    plain, moved, noised = seen
    assert torch.equal(plain, images) and moved.shape == images.shape
    assert not torch.equal(moved, images) and not torch.equal(noised, images)
    assert set(moved.flatten().tolist()) <= set(images.flatten().tolist())
    assert float((noised - images).std()) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    "cfg,message",
    [
        ({"rewards": []}, "objective.rewards: none given"),
        ({"rewards": [{"name": "jpeg"}]}, "jpeg has no gradient; use objective.name pso"),
        ({"rewards": [{"name": "contrast"}], "from_step": 3}, "objective.from_step: found 3 of 1 steps"),
        ({"rewards": [{"name": "kontrast"}]}, "did you mean 'contrast'"),
        ({"rewards": [{"name": "attributes"}]}, "bundled for digits, tinted and moving"),
    ],
)
def test_what_cannot_be_is_one_line(tiny, cfg, message, monkeypatch):
    from tests.objectives import test_contract as contract

    monkeypatch.setitem(contract.SHORT, "feedback", cfg)
    with pytest.raises(UserError) as error:
        contract.make("feedback", tiny("flow"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_p1_rewards_and_autoencoder_stay_as_they_are(tiny):
    """Gradient goes through them to the adapter, never into them."""
    from tests.objectives.test_contract import batch, make, play

    _, cast, objective = make("feedback", tiny("sd"), "lora")
    vae = cast.teacher.codec.vae
    before = {n: p.clone() for n, p in vae.named_parameters()}
    play(objective, batch(cast), 0, check=True)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in vae.named_parameters())
    assert set(objective.state()) == {"reward_mean", "reward_std"}


def test_p2_moves_the_mixture_by_its_margin_and_stays_near(tmp_path):
    """From the exact denoiser: the reward rises by about its margin, with a reference the mixture keeps its
    spread, without one it is squeezed.
    """
    found = {}
    for weight in (0.0, 3.0):
        rewards = [{"name": "near", "weights": {"near": "tests.support.rewards:near"}, "margin": 1.0}]
        objective = {"name": "feedback", "rewards": rewards, "ref_weight": weight}
        (tmp_path / str(weight)).mkdir()
        _, _, x, trainer = run_mixture(
            tmp_path / str(weight), objective, "analytic:gmm2d-vp", steps=50, num_steps=4, lr=5e-3, batch=128
        )
        r = -0.5 * (x - torch.tensor([1.0, 0.0])).square().sum(1)
        rise = (r.mean() - trainer.objective.mean[0]) / trainer.objective.std[0]
        found[weight] = float(rise), float(x.std(0).mean())
    assert found[0.0][0] > 0.5 and found[3.0][0] > 0.1, found
    assert found[3.0][1] > 1.2 * found[0.0][1], found


def test_p4_feedback(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "feedback", "rewards": [{"name": "contrast"}]})


def hyper_sd(tiny, tmp_path):
    """Arguments of a run: TSCD over 8-4-2-1 segments, feedback in two steps, score distillation in one."""
    tscd = {"name": "tscd", "grid_steps": 16, "gan_weight": 0.0}
    feedback = {"name": "feedback", "rewards": [{"name": "contrast"}], "ref_weight": 1.0}
    last = {"name": "dmd2", "gan_weight": 0.0, "student_every": 1}
    plan = [*(({**tscd, "segments": k}, 1, 1) for k in (8, 4, 2, 1)), (feedback, 2, 2), (last, 1, 1)]
    stages = [
        {"name": str(i), "objective": one, "num_steps": steps, "max_train_steps": length}
        for i, (one, steps, length) in enumerate(plan)
    ]
    prompts = tmp_path / "set"
    prompts.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 40, 90)).save(prompts / f"{i}.png")
        (prompts / f"{i}.txt").write_text("a red dress")
    values = {
        "teacher": {"path": str(tiny("sd")), "guidance": 2.0},
        "student": {"kind": "lora", "timesteps": [800], "lora": {"rank": 2}},
        "critic": {"kind": "lora", "lora": {"rank": 2}},
        "data": {"images": str(prompts)},
        "stages": stages,
        "train": {"train_batch_size": 2, "validation_steps": 0, "checkpointing_steps": 1},
        "eval": {"num_samples": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return ["--config", str(tmp_path / "run.yaml"), "--output_dir"]


def test_hyper_sd_is_one_run(tiny, tmp_path, monkeypatch):
    """Stages of one adapter, each from what the one before left; stopped within the feedback and resumed it
    is the same run, and its export draws in one step.
    """
    argv, adapters = hyper_sd(tiny, tmp_path), []
    assert main([*argv, str(tmp_path / "run")]) == 0
    info = load_export(str(tmp_path / "run/export")).info
    assert info.objective == "tscd+feedback+dmd2" and list(info.times) == [800]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("student/reward_contrast" in line for line in lines)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 5)
        main([*argv, str(tmp_path / "cut")])
    assert main([*argv, str(tmp_path / "cut"), "--resume"]) == 0
    for run in ("run", "cut"):
        adapters.append(next((tmp_path / run / "export").glob("*-lora.safetensors")))
    whole, resumed = map(load_file, adapters)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)
