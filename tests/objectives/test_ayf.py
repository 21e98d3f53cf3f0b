"""Align Your Flow: both residuals at the exact flow map, autoguidance, times, and exact mixtures."""

import pytest
import torch

from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.diffusion.reparametrization import LineView
from fastgen.diffusion.schedules import EDM, Flow
from fastgen.objectives import ayf, requirements_of
from fastgen.objectives.ayf import AYF, AYFConfig
from fastgen.roles.roles import Student, StudentSpec
from fastgen.training.assembly import make_cast
from tests.objectives.test_meanflow import S0, FlowMapNet, average
from tests.support.heavier import first_of
from tests.support.replay import card_replay
from tests.support.spelled import Classes, Heard, TwoTimes, World, at_x, gradient
from tests.support.toys import batch_of, gaussian_role, rng, run_mixture

SHORT = {"warmup_steps": 2}
"""settings of the contract battery"""


def make(schedule, net=None, **cfg):
    student = Student(net or FlowMapNet(schedule), None, StudentSpec(schedule.steps(1), "ode"))
    parts = {"student": student, "teacher": gaussian_role(schedule, 0.0, S0)}
    parts["weak"] = gaussian_role(schedule, 0.0, 1.5)
    return AYF(AYFConfig(**{"warmup_steps": 0, **cfg}), parts, rng())


def residual_of(objective, k=1):
    objective.rng.reset(0)
    torch.manual_seed(1)
    batch = batch_of(S0 * torch.randn(64, 1, dtype=torch.float64))
    return float(next(objective.step(batch, k))[1]["residual"])


@pytest.mark.parametrize("schedule", [Flow(), EDM()], ids=["flow", "edm"])
@pytest.mark.parametrize("loss", ["emd", "lmd"])
def test_p1_the_exact_flow_map_has_no_residual(schedule, loss):
    """The Gaussian's average velocity is the common fixed point; a scaled one is not."""
    assert residual_of(make(schedule, loss=loss)) < 1e-6
    assert residual_of(make(schedule, FlowMapNet(schedule, 1.2), loss=loss)) > 0.03


@pytest.mark.parametrize("loss", ["emd", "lmd"])
def test_p1_step_is_the_formula(loss):
    """Theorems 3.1 and 3.2 half-way through the warm-up, autoguided, at a scale that is told."""
    S, net = Flow(), TwoTimes(Flow(), -0.6, 0.4)
    weak = Heard(Classes(S, 0.1, 0.8).requires_grad_(False))
    cfg = {"loss": loss, "warmup_steps": 10, "autoguidance": 2.5, "tangent_c": 0.3}
    world = World(AYF, S, sampler="ode", span=(1.0, 5.0), student=net, parts={"weak": weak}, **cfg)
    (turn,), (call,) = world.turns(5), [c for c in world.student.calls if c.grad]
    x, s, r, cond = call.x_t, call.t, call.cond["r"], call.cond
    world.noise_in(x, s, world.batch.x0)
    w = cond["guidance"].double()
    assert w.std() > 0.5 and (s > r).all()

    def velocity(x, s):
        strong = world.guided(x, s, w)
        D = strong + 1.5 * (strong - weak.backbone(x, s, world.batch.cond))
        return (x - D) / s[:, None]

    u, way = average(net, cond, x, s, r).detach(), (r - s)[:, None]
    v, one, zero = velocity(x, s), torch.ones_like(s), torch.zeros_like(s)
    ways = (v, one, zero) if loss == "emd" else (0 * v, zero, one)
    _, slope = torch.func.jvp(lambda *at: average(net, cond, *at), (x, s, r), ways)
    if loss == "emd":
        residual = v - u + 0.5 * way * slope
    else:
        residual = velocity(x + way * u, r) - u - 0.5 * way * slope
    goal = (u + residual / (residual.square().mean(1, keepdim=True).sqrt() + 0.3)).detach()
    wanted = at_x(lambda D: ((x - D) / s[:, None] - goal).square().mean(), call.out)
    torch.testing.assert_close(gradient(turn.loss, call.out), wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", ["emd", "lmd"])
def test_p1_negative_without_the_derivative_the_map_is_no_fixed_point(loss):
    assert residual_of(make(Flow(), loss=loss, warmup_steps=10), k=0) > 0.05
    assert residual_of(make(Flow(), loss=loss, warmup_steps=10), k=10) < 1e-6


@pytest.mark.parametrize("loss", ["emd", "lmd"])
def test_p1_negative_the_other_time_gives_another_derivative(loss, monkeypatch):
    right = ayf.tangent
    monkeypatch.setattr(
        ayf, "tangent", lambda f, at, along, cfg: right(f, at, (along[0], along[2], along[1]), cfg)
    )
    assert residual_of(make(Flow(), loss=loss)) > 0.05


def test_p1_loss_is_the_normalised_residual():
    """|u - sg[u + g]|^2 with g = residual / (rms + c): below one, and it pushes along the residual."""
    net = FlowMapNet(Flow(), 3.0)
    objective = make(Flow(), net)
    loss, logs = next(objective.step(batch_of(torch.randn(64, 1, dtype=torch.float64)), 1))
    assert 0.3 < float(loss) < 1
    loss.backward()
    assert net.gain.grad > 0  # too large a velocity is made smaller


def test_p1_autoguidance_leads_away_from_the_weak_model():
    objective = make(Flow(), autoguidance=3.0)
    assert requirements_of(objective.cfg).parts == ("student", "teacher", "weak")
    assert requirements_of(AYFConfig()).parts == ("student", "teacher")
    x, s = torch.randn(8, 1, dtype=torch.float64), torch.full((8,), 0.6, dtype=torch.float64)
    view, batch = LineView(Flow()), batch_of(x)
    strong, weak = (
        view.velocity(lambda y, t, n=n: objective.parts[n](y, t, {}))(x, s) for n in ("teacher", "weak")
    )
    torch.testing.assert_close(objective.velocity(view, batch, 1.0)(x, s), strong + 2 * (strong - weak))
    torch.testing.assert_close(make(Flow()).velocity(view, batch, 1.0)(x, s), strong)


@pytest.mark.parametrize("schedule", [Flow(), EDM()], ids=["flow", "edm"])
def test_p1_times_lie_in_the_teachers_range_a_sigmoid_normal_gap_apart(schedule):
    objective = make(schedule)
    s, r = objective.times(LineView(schedule), 4000)
    assert (
        (s > r).all()
        and float(r.min()) >= 1e-3
        and float(s.max()) <= float(schedule.level(torch.tensor([schedule.t_max])))
    )
    assert float((s - r).median()) == pytest.approx(0.31, abs=0.02)  # sigmoid(-0.8)


def built(tiny, **objective):
    cfg = validate(
        {
            "teacher": {"path": str(tiny("flow"))},
            "objective": {"name": "ayf", "autoguidance": 2.0, **objective},
            "student": {"sampler": "ode"},
            "data": {"name": "fashion"},
        }
    )
    cast = make_cast(cfg)
    return cast.stage(cfg.all_stages()[0], rng())


def test_the_weak_model_is_a_folder_of_the_same_kind(tiny):
    objective = built(tiny, weak=str(tiny("flow")))
    assert not any(p.requires_grad for p in objective.weak.backbone.parameters())
    with pytest.raises(UserError, match=r"objective.weak: not given"):
        built(tiny)
    with pytest.raises(UserError, match=r"objective.weak: .* allowed: as the teacher|as the teacher"):
        built(tiny, weak=str(tiny("edm")))


@pytest.mark.parametrize("steps, sampler", [(2, "renoise")])
def test_a_walk_without_the_ode_is_refused(tiny, steps, sampler):
    with pytest.raises(UserError, match="student.sampler: found 'renoise'; use ode, which ayf learns"):
        validate(
            {
                "teacher": {"path": str(tiny("flow"))},
                "objective": {"name": "ayf"},
                "student": {"num_steps": steps, "sampler": sampler},
                "data": {"name": "fashion"},
            }
        )


@pytest.mark.parametrize("loss", first_of(["emd", "lmd"]))
def test_p2_distils_the_mixture(tmp_path, loss):
    objective = {"name": "ayf", "loss": loss, "warmup_steps": 50}
    before, after, _, _ = run_mixture(tmp_path, objective, steps=250, batch=128)
    assert after < before / 4 and after < 0.03, (before, after)


def test_p4_the_card_samples_the_two_time_network(tiny, tmp_path):
    card_replay(tiny, tmp_path, {"name": "ayf", **SHORT}, "edm", steps=4)
