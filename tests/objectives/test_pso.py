"""PSO: the density of a step, the pair loss, the clamp, what pairs of files and of samples teach."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from fastgen.cli.train import main
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import VP, Flow
from fastgen.networks.rewards import Reward, Rewards
from fastgen.objectives.pso import PSO, PSOConfig
from fastgen.roles.roles import Student, StudentSpec
from tests.support.replay import replay_counts
from tests.support.tiny import PROMPTS
from tests.support.toys import GaussianNet, batch_of, rng, run_mixture

SHORT = {"rewards": [{"name": "jpeg"}]}
STUDENT = {"num_steps": 2}
"""settings of the contract battery"""
POINTS = SimpleNamespace(shape=(2,))


def total(x, prompts):
    return x.flatten(1).sum(1)


def net(S, m=0.2, s=0.6):
    return GaussianNet(S, m, s)


def make(schedule=None, sampler="renoise", gamma=0.0, scores=(total,), moved=0.0, **cfg):
    """(objective, its student) on points; the reference is the student before it was moved."""
    S = schedule or Flow()
    spec = StudentSpec(S.steps(3), sampler, gamma)
    student, previous = Student(net(S, 0.2 + moved), None, spec), Student(net(S), None, spec)
    parts = {"student": student, "previous": previous}
    parts["rewards"] = Rewards([Reward(f.__name__, f) for f in scores], POINTS)
    rewards = [] if cfg.get("pairs") == "offline" else [{"name": f.__name__} for f in scores]
    objective = PSO(PSOConfig(rewards=rewards, **cfg), parts, rng())
    objective.prepare()
    return objective, student


def points(num=16, seed=0):
    return torch.randn(num, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the chain -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name,sampler,gamma", [("LCM", "renoise", 0), ("TCD", "tcd", 0.3), ("TCD", "tcd", 1)]
)
def test_p1_transitions_are_those_of_the_schedulers(name, sampler, gamma, monkeypatch):
    """Mean and deviation of a step are what diffusers' scheduler makes of noise 0 and 1."""
    import importlib

    module = importlib.import_module(f"diffusers.schedulers.scheduling_{name.lower()}")
    scheduler = getattr(module, f"{name}Scheduler")(beta_schedule="scaled_linear", original_inference_steps=4)
    scheduler.set_timesteps(4)
    S = VP.scaled_linear()
    student = Student(net(S), None, StudentSpec(S.steps(4), sampler, gamma))
    assert scheduler.timesteps.tolist() == student.times
    x_t, eps = points().float(), points(seed=1).float()
    for i in range(3):
        t, u = student.time(i, x_t), student.time(i + 1, x_t)
        mean, std = student.transition(S.to_x0("eps", eps, x_t, t), x_t, t, u)
        drawn = []
        for fill in (torch.zeros, torch.ones):
            make_noise = lambda shape, **_: fill(shape)  # noqa: B023, E731
            monkeypatch.setattr(module, "randn_tensor", make_noise)
            scheduler._step_index = i
            more = {"eta": gamma} if name == "TCD" else {}
            drawn.append(scheduler.step(eps, int(t[0]), x_t, **more).prev_sample)
        torch.testing.assert_close(mean.float(), drawn[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std.float(), drawn[1] - drawn[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sampler,gamma", [("renoise", 0.0), ("tcd", 0.4)])
def test_p1_gradient_at_the_reference(sampler, gamma):
    """Loss log 2, and -(beta / 2) (h_0 grad log p_0 + h_1 grad log p_1), from the density written out."""
    objective, student = make(VP.scaled_linear(), sampler, gamma, beta=20.0)
    batch = batch_of(points(), points())
    loss, logs = next(objective.step(batch, 0))
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-7) and logs["log_ratio"] == 0
    found = torch.autograd.grad(loss, list(student.trainable().values()))

    objective.rng = rng()  # the same walks once more
    noises = [batch.noise, objective.rng.randn_like(batch.noise)]
    walks, samples = zip(*(objective.walk(noise, {}) for noise in noises))
    h = (total(samples[0], []) - total(samples[1], [])).sign()
    terms = []
    for i in range(2):
        log_p = []
        for states in walks:
            t, u = student.time(i, states[i]), student.time(i + 1, states[i])
            mean, std = student.transition(student(states[i], t, {}), states[i], t, u)
            log_p.append(torch.distributions.Normal(mean, std).log_prob(states[i + 1]).mean(1))
        terms.append((h * (log_p[0] - log_p[1])).mean())
    wanted = torch.autograd.grad(-20.0 / 2 * torch.stack(terms).mean(), list(student.trainable().values()))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_p1_only_steps_with_noise_are_learned_from():
    """The last step, which is deterministic, has no part: two transitions of three steps, twice two calls."""
    objective, student = make()
    states, x = objective.walk(points(), {})
    assert len(states) == 3
    t = student.time(2, states[2])
    torch.testing.assert_close(x, student(states[2], t, {}))
    calls = PSO.requirements(objective.cfg).network_calls(1.0, 3)
    assert calls == {"student": 6.0, "previous": 4.0, "student+grad": 4.0}


# -- the pair loss -------------------------------------------------------------------------------------------
def test_p1_a_ratio_beyond_the_clamp_feels_nothing():
    objective, _ = make(beta=50.0, clamp=0.1)
    h = torch.tensor([[1.0], [-1.0]])
    for value, flat in ((0.2, True), (-0.2, True), (0.09, False), (-0.1, False)):
        log_r = torch.tensor([[value], [0.0]], requires_grad=True)
        objective.pair_loss(log_r, h).backward()
        assert (log_r.grad[0] == 0).all() == flat, value
    most = torch.tensor([[9.0], [-9.0]])
    assert float(objective.pair_loss(most, h)) == pytest.approx(4.4e-5, rel=0.02)


def test_p1_swapping_a_pair_and_its_labels_changes_nothing():
    objective, _ = make()
    log_r = 0.05 * torch.randn(2, 7)
    h = objective.preference(torch.randn(2, 1, 7))
    kept = objective.pair_loss(log_r, h)
    torch.testing.assert_close(objective.pair_loss(log_r.flip(0), h.flip(0)), kept)
    assert abs(objective.pair_loss(log_r.flip(0), h) - kept) > 1e-3, "the negative"
    at_zero = torch.zeros(2, 7, requires_grad=True)
    first = torch.autograd.grad(objective.pair_loss(at_zero, h), at_zero)[0]
    other = torch.autograd.grad(objective.pair_loss(at_zero, -h), at_zero)[0]
    torch.testing.assert_close(first, -other)


def test_p1_several_rewards_prefer_by_dominance_or_by_sum():
    r = torch.tensor(
        [[[1.0, 1.0, 0.0, 2.0], [1.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]]
    )
    objective, _ = make(scores=(total, total))
    assert objective.preference(r)[0].tolist() == [1, 0, 0, 1]
    objective, _ = make(scores=(total, total), prefer="sum")
    objective.weight = torch.tensor([1.0, 2.0])
    assert objective.preference(r)[0].tolist() == [1, -1, 0, 1]
    assert torch.equal(objective.preference(r)[0], -objective.preference(r)[1])


def test_p1_bradley_terry_in_closed_form():
    """Policy N(th, v), reference N(0, v), pairs of the reference with P(0 over 1) = sigmoid(g (x_0 - x_1)):
    beta th / v = g at the optimum.
    """
    v, g, beta = 0.7, 0.9, 25.0
    objective, _ = make(beta=beta, clamp=0.6)
    generator = torch.Generator().manual_seed(0)
    x = v**0.5 * torch.randn(2, 60_000, generator=generator, dtype=torch.float64)
    likely = torch.sigmoid(g * (x[0] - x[1]))
    first = torch.where(
        torch.rand(likely.shape, generator=generator, dtype=torch.float64) < likely, 1.0, -1.0
    )
    h, th = torch.stack([first, -first]), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([th], 2e-3)
    for k in range(80):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - k / 80)
        optimizer.zero_grad()
        objective.pair_loss((th * x - th**2 / 2) / v, h).backward()
        optimizer.step()
    assert float(th.detach()) == pytest.approx(v * g / beta, rel=0.02)


def test_p1_several_updates_use_one_set_of_pairs():
    objective, student = make(updates=3)
    seen = []
    for loss, logs in objective.step(batch_of(points(), points()), 0):
        (grad,) = torch.autograd.grad(loss, student.backbone.m)
        student.backbone.m.data -= 1e-3 * grad.sign()
        seen.append((float(loss.detach()), float(logs["reward_total"])))
    assert len(seen) == 3 and len({r for _, r in seen}) == 1
    assert seen[0][0] == pytest.approx(math.log(2)) and seen[2][0] < seen[1][0] < seen[0][0]


# -- pairs of files ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("factor", [1.0, 0.1])
@pytest.mark.parametrize("kind", ["dpo", "hinge"])
def test_p1_offline_is_the_formula(kind, factor):
    """- log sigmoid(-beta ((e_w - e_l) - (e_w_ref - e_l_ref))) on the error of eps, as Diffusion-DPO."""
    S, beta = VP.scaled_linear(), 7.0
    more = {"offline_loss": kind, "neg_factor": factor, "prior_weight": 0.5}
    objective, student = make(S, moved=0.4, pairs="offline", beta=beta, **more)
    batch = batch_of(points(), points())
    batch.dispreferred = points(seed=3)
    times = torch.tensor(student.times, dtype=torch.float64)
    loss, _ = next(objective.step(batch, 1))
    again = rng()
    t, eps = times[again.randint(3, 16)], again.randn_like(batch.x0)

    def error(m, x0):
        x_t = S.noise(x0, eps, t)
        return (S.from_x0("eps", net(S, m)(x_t, t, {}), x_t, t) - eps).square().mean(1)

    (good, bad), (good_ref, bad_ref) = (
        [error(m, x) for x in (batch.x0, batch.dispreferred)] for m in (0.6, 0.2)
    )
    d, d_ref = good - factor * bad, good_ref - factor * bad_ref
    pair = torch.relu(1 + beta * d) if kind == "hinge" else -torch.sigmoid(-beta * (d - d_ref)).log()
    torch.testing.assert_close(loss, pair.mean() + 0.5 * bad.mean(), rtol=1e-5, atol=1e-7)


def test_p1_without_losers_the_reference_draws_them():
    objective, student = make(moved=0.5, pairs="offline")
    batch = batch_of(points(), points())
    drawn = objective.negatives(batch)
    objective.rng = rng()
    torch.testing.assert_close(
        drawn, Student.generate(objective.previous, batch.noise, {}, objective.rng.randn_like)
    )
    objective.rng = rng()
    assert not torch.allclose(drawn, student.generate(batch.noise, {}, objective.rng.randn_like))


def pair_folders(tmp_path, lost=()):
    """Ten pictures with captions, and for each a darker one of its name, but for the lost ones."""
    rows = [{"file_name": f"{i}.png", "text": PROMPTS[i % 2]} for i in range(10)]
    for kind, scale in (("good", 25), ("bad", 5)):
        (tmp_path / kind).mkdir()
        for i, row in enumerate(rows):
            if kind == "good" or i not in lost:
                Image.new("RGB", (16, 16), (scale * i,) * 3).save(tmp_path / kind / row["file_name"])
    (tmp_path / "good/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"images": str(tmp_path / "good"), "dispreferred": str(tmp_path / "bad")}


def offline_run(tiny, tmp_path, data, objective=None):
    values = {
        "teacher": {"path": str(tiny("sd"))},
        "student": {"kind": "lora", "num_steps": 2, "lora": {"rank": 2}},
        "data": data,
        "objective": objective or {"name": "pso", "pairs": "offline"},
        "train": {"max_train_steps": 2, "train_batch_size": 4, "validation_steps": 0},
        "eval": {"num_samples": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return main(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")])


def test_pairs_of_files_reach_the_loss(tiny, tmp_path, monkeypatch, no_finish):
    seen = []
    monkeypatch.setattr(PSO, "offline", lambda self, batch: iter(seen.append(batch) or []))
    assert offline_run(tiny, tmp_path, pair_folders(tmp_path)) == 0
    for batch in seen:
        assert batch.dispreferred.shape == batch.x0.shape
        assert not torch.equal(batch.dispreferred, batch.x0) and len(batch.texts) == 4


def test_missing_files_are_named_and_counted(tiny, tmp_path, capsys):
    assert offline_run(tiny, tmp_path, pair_folders(tmp_path, lost=(3, 7))) == 2
    error = capsys.readouterr().err.strip()
    assert "data.dispreferred: 2 of 10 pairs have no file" in error and ": 3, 7;" in error
    assert "\n" not in error and "Traceback" not in error


def test_pairs_that_nobody_reads_are_refused(tiny, tmp_path, capsys):
    assert offline_run(tiny, tmp_path, pair_folders(tmp_path), {"name": "dmd2", "gan_weight": 0.0}) == 2
    assert "data.dispreferred: no stage learns from pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "student,cfg,message",
    [
        ({"num_steps": 2, "sampler": "ode"}, {}, "its steps have no density"),
        ({"num_steps": 1}, {}, "one step has no transition"),
        ({"num_steps": 2, "sampler": "tcd"}, {}, "student.gamma: found 0"),
        ({"num_steps": 2}, {"rewards": []}, "objective.rewards: none given"),
        ({"num_steps": 2}, {"pairs": "offline"}, "objective.rewards: found some with pairs offline"),
    ],
)
def test_what_cannot_be_is_one_line(tiny, student, cfg, message, monkeypatch):
    from tests.objectives import test_contract as contract

    monkeypatch.setitem(contract.SHORT, "pso", {**SHORT, **cfg})
    monkeypatch.setitem(contract.STUDENT, "pso", student)
    with pytest.raises(UserError) as error:
        contract.make("pso", tiny("vp"))
    assert message in str(error.value) and "\n" not in str(error.value)


# -- the exact mixture ---------------------------------------------------------------------------------------
def tuned(tmp_path, name, **more):
    """(samples after, share of them right of the middle) of the mixture's exact denoiser in four steps."""
    (tmp_path / name).mkdir()
    rewards = [{"name": "along", "weights": {"along": "tests.support.rewards:along"}}]
    objective = {"name": "pso", "rewards": rewards, "beta": 30, **more}
    _, _, x, _ = run_mixture(
        tmp_path / name, objective, "analytic:gmm2d-vp", steps=60, num_steps=4, lr=3e-3, batch=96
    )
    return x, float(x[:, 0].mean())


def test_p2_prefers_within_the_mixture(tmp_path, monkeypatch):
    """The preferred side gains mass and the samples stay on the modes; with the labels turned it loses."""
    x, right = tuned(tmp_path, "as_is")
    prefer = PSO.preference
    monkeypatch.setattr(PSO, "preference", lambda self, r: -prefer(self, r))
    _, left = tuned(tmp_path, "turned")
    assert right > 0.12 and left < -0.12, (right, left)
    radius = x.norm(dim=1)
    assert float(((radius - radius.median()).abs() < 0.5).float().mean()) > 0.9, "off the ring of modes"


def test_p4_pso(tiny, tmp_path):
    """A LoRA tuned by pairs, drawn by LCMScheduler; another grid shows."""
    objective = {"name": "pso", "rewards": [{"name": "contrast"}], "beta": 50}
    replay_counts(
        tiny, tmp_path, objective, "LCMScheduler", counts=(4,), other={"original_inference_steps": 10}
    )
