"""MeanFlow: its identity on Gaussian data, pairs of times, guidance in the target, its two-time network."""

import pytest
import torch

from fastgen.diffusion.schedules import Flow, expand
from fastgen.networks.denoiser import Denoiser
from fastgen.objectives import meanflow, requirements_of
from fastgen.objectives.meanflow import MeanFlow, MeanFlowConfig
from fastgen.roles.roles import Student, StudentSpec
from tests.support.heavier import first_of
from tests.support.replay import card_replay
from tests.support.spelled import TwoTimes, World, at_x, gradient
from tests.support.toys import batch_of, each, gaussian_role, rng, run_mixture

SHORT = {"flow_ratio": 0.5}
"""settings of the contract battery"""

S0 = 0.8


class FlowMapNet(Denoiser):
    """The exact average velocity for data N(0, s0^2), u = x_s (1 - sqrt(V_r / V_s)) / (s - r), as a two-time
    denoiser x_s - s u; times a gain that is 1 where it is exact.
    """

    prediction, second_time = "x0", True

    def __init__(self, schedule, gain=1.0):
        super().__init__()
        self.schedule = schedule
        self.gain = torch.nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, x_t, t, cond):
        S, r = self.schedule, cond["r"]
        s, e = S.level(t)[:, None], S.level(r)[:, None]
        x_s = x_t / (S.alpha(t) + S.sigma(t))[:, None]
        var = lambda a: (1 - a) ** 2 * S0**2 + a**2  # noqa: E731
        far = (s - e).abs() > 1e-9
        gap = torch.where(far, s - e, 1.0)
        slope = ((s - (1 - s) * S0**2) / var(s)).double()  # the velocity itself, where r = s
        u = torch.where(far, (1 - (var(e) / var(s)).sqrt()) / gap, slope)
        return x_s - s * self.gain * u * x_s

    raw = forward


def make(schedule, net=None, **cfg):
    student = Student(net or FlowMapNet(schedule), None, StudentSpec(schedule.steps(1), "ode"))
    cfg = MeanFlowConfig(**{"norm_p": 0.0, "flow_ratio": 0.25, **cfg})
    return MeanFlow(cfg, {"student": student, "teacher": gaussian_role(schedule, 0.0, S0)}, rng())


def loss_of(objective):
    objective.rng.reset(0)
    torch.manual_seed(1)
    return next(objective.step(batch_of(S0 * torch.randn(64, 1, dtype=torch.float64)), 0))[0].detach()


@each
@pytest.mark.parametrize("method", ["exact", "difference"])
def test_p1_the_average_velocity_is_the_fixed_point(schedule, method):
    cfg = {"tangent": {"method": method}, "time": {"kind": "uniform", "low": 0.1, "high": 0.9}}
    assert loss_of(make(schedule, **cfg)) < 1e-8  # a VP table has kinks at whole times
    assert loss_of(make(schedule, FlowMapNet(schedule, 1.2), **cfg)) > 1e-3


def average(net, cond, x, s, r):
    """u of a two-time flow network."""
    return (x - net(x, s, {**cond, "r": r})) / s[:, None]


@pytest.mark.parametrize("mode", ["distillation", "training"])
def test_p1_step_is_the_formula(mode):
    """Equations 10, 19 to 22 with rows of all three kinds: the gradient in D_theta."""
    cfg = {"mode": mode, "flow_ratio": 0.25, "end_ratio": 0.25, "norm_p": 0.75, "norm_c": 0.05}
    mixed = {"omega": 0.2, "kappa": 0.5, "label_drop": 0.0} if mode == "training" else {}
    span = None if mixed else (1.0, 5.0)
    net = TwoTimes(Flow(), -0.6, 0.4)
    world = World(MeanFlow, Flow(), sampler="ode", span=span, student=net, **cfg, **mixed)
    (turn,), call = world.turns(), world.student.calls[-1]
    x, s, r, cond = call.x_t, call.t, call.cond["r"], call.cond
    eps = world.noise_in(x, s, world.batch.x0)
    assert torch.equal(s[:2], r[:2]) and (r[6:] < 1e-4).all() and (s > r)[2:].all() and (r[2:6] > 0.01).all()
    if mode == "training":
        null, own = (average(net, c, x, s, s) for c in (world.batch.uncond, world.batch.cond))
        v = 0.2 * (eps - world.batch.x0) + 0.3 * null + 0.5 * own
    else:
        w = cond["guidance"].double()
        assert w.std() > 0.5
        v = (x - world.guided(x, s, w)) / s[:, None]
    ways = (v.detach(), torch.ones_like(s), torch.zeros_like(r))
    _, slope = torch.func.jvp(lambda *at: average(net, cond, *at), (x, s, r), ways)
    target = (v - (s - r)[:, None] * slope).detach()

    def loss(D):
        error = ((x - D) / s[:, None] - target).square().sum(1)
        return (error / (error.detach() + 0.05) ** 0.75).mean()

    torch.testing.assert_close(turn.loss, loss(call.out), rtol=1e-4, atol=1e-5)
    wanted = at_x(loss, call.out)
    torch.testing.assert_close(gradient(turn.loss, call.out), wanted, rtol=1e-3, atol=1e-6)
    (alone,) = torch.autograd.grad(call.out, net.m, wanted)  # nothing by another way, through the target
    torch.testing.assert_close(turn.grads["student.m"], alone, rtol=1e-3, atol=1e-6)


def test_p1_negative_other_directions_of_the_derivative(monkeypatch):
    """(v, 1, 1) moves r along, (v, 0, 0) forgets the time: neither has the average velocity at rest."""
    right = meanflow.tangent
    for name, ways in {"(v, 1, 1)": (1, 1, 1), "(v, 0, 0)": (1, 0, 0)}.items():

        def wrong(f, at, along, cfg, ways=ways):
            one = torch.ones_like(at[1])
            return right(f, at, (along[0], ways[1] * one, ways[2] * one), cfg)

        monkeypatch.setattr(meanflow, "tangent", wrong)
        assert loss_of(make(Flow())) > 1e-3, name


@each
def test_p1_any_number_of_steps_lands_on_the_same_sample(schedule):
    """x_r = x_s - (s - r) u: the exact map in one, two or four steps ends where the ODE does."""
    noise = torch.randn(16, 1, dtype=torch.float64)
    found = []
    for num in (1, 2, 4):
        student = Student(FlowMapNet(schedule), None, StudentSpec(schedule.steps(num), "ode"))
        found.append(student.generate(noise, {}, None).detach())
        assert student.ends()[:-1] == student.times[1:] and student.ends()[-1] == schedule.t_min
    torch.testing.assert_close(found[1], found[0], atol=0.06, rtol=0)
    torch.testing.assert_close(found[2], found[0], atol=0.06, rtol=0)
    torch.testing.assert_close(found[0], noise * S0, atol=0.1, rtol=0)  # t_min and t_max are not 0 and 1


def test_p1_pairs_of_times():
    objective = make(Flow(), flow_ratio=0.75)
    s, r = objective.times(400)
    assert (s >= r).all() and int((s == r).sum()) == 300 and (s[:300] == r[:300]).all()
    logit = (s[:300] / (1 - s[:300])).log()
    assert float(logit.mean()) == pytest.approx(-0.4 + 0.564, abs=0.15)  # the larger of two normals


def test_p1_the_last_rows_go_all_the_way_to_data():
    objective = make(Flow(), flow_ratio=0.25, end_ratio=0.5)
    s, r = objective.times(400)
    assert (s[:100] == r[:100]).all() and (r[200:] < 2e-6).all() and (s[200:] > 1e-3).all()
    assert float(r[100:200].mean()) > 0.1  # the rows between are drawn as ever
    plain = make(Flow(), flow_ratio=0.25).times(400)
    assert torch.equal(plain[0], s) and torch.equal(plain[1][:200], r[:200])  # and so is everything else
    with pytest.raises(ValueError, match="end_ratio: found 0.9 beside flow_ratio 0.25; at most 1"):
        MeanFlowConfig(flow_ratio=0.25, end_ratio=0.9)


@each
def test_p1_rows_that_end_at_data_have_the_average_velocity_at_rest(schedule):
    cfg = {"end_ratio": 0.75, "time": {"kind": "uniform", "low": 0.1, "high": 0.9}}
    assert loss_of(make(schedule, **cfg)) < 1e-8
    assert loss_of(make(schedule, FlowMapNet(schedule, 1.2), **cfg)) > 1e-3


def test_p1_equal_times_are_flow_matching_without_a_tangent(monkeypatch):
    monkeypatch.setattr(meanflow, "tangent", lambda *_: pytest.fail("no tangent is needed"))
    seen = make(Flow(), flow_ratio=1.0, mode="training")
    batch = batch_of(torch.randn(32, 1, dtype=torch.float64))
    loss, _ = next(seen.step(batch, 0))
    seen.rng.reset(0)
    seen.rng.generator.manual_seed(0)
    s, _ = seen.times(32)
    eps = seen.rng.randn_like(batch.x0)
    x_s = Flow().noise(batch.x0, eps, s)
    u = (x_s - FlowMapNet(Flow())(x_s, s, {"r": s})) / s[:, None]
    torch.testing.assert_close(loss, (u - (eps - batch.x0)).square().sum(1).mean())


def test_p1_guidance_in_the_target_of_training():
    """v_g = omega v + (1 - omega - kappa) u_null + kappa u_c, with a constant network plain arithmetic."""

    class Constant(Denoiser):
        prediction, schedule, second_time = "x0", Flow(), True

        def forward(self, x_t, t, cond):
            return x_t - expand(t, x_t) * cond["class_labels"][:, None].double()  # u is the label

    batch = batch_of(torch.randn(400, 1, dtype=torch.float64), cond={"class_labels": torch.full((400,), 3)})
    batch.uncond = {"class_labels": torch.zeros(400, dtype=torch.long)}
    objective = make(Flow(), Constant(), mode="training", omega=0.2, kappa=0.5, label_drop=0.25)
    s, eps = torch.full((400,), 0.5, dtype=torch.float64), torch.randn(400, 1, dtype=torch.float64)
    x_s = Flow().noise(batch.x0, eps, s)
    view = meanflow.LineView(Flow())
    v, cond = objective.velocity(view, batch, x_s, s, eps, 1.0, batch.cond)
    plain = eps - batch.x0
    dropped = cond["class_labels"] == 0
    assert float(dropped.double().mean()) == pytest.approx(0.25, abs=0.07)
    torch.testing.assert_close(v[dropped], plain[dropped])
    torch.testing.assert_close(v[~dropped], 0.2 * plain[~dropped] + 0.5 * 3)
    assert requirements_of(objective.cfg).untrained == ()


def test_p1_adaptive_weight_bounds_the_gradient():
    """At p = 1 every sample's loss is |e|^2 / (|e|^2 + c), below one."""
    objective = make(Flow(), FlowMapNet(Flow(), 50.0), norm_p=1.0)
    assert 0.9 < loss_of(objective) < 1
    assert loss_of(make(Flow(), FlowMapNet(Flow(), 50.0))) > 10


def gradient_sizes(p):
    """|d loss / du| of each sample, without the batch's 2 / B."""
    net, seen = FlowMapNet(Flow(), 50.0), []
    forward = net.forward

    def spy(x_t, t, cond):
        out = forward(x_t, t, cond)
        if out.requires_grad:
            out.retain_grad()
            seen.append((t, out))
        return out

    net.forward = spy
    objective = make(Flow(), net, norm_p=p, flow_ratio=1.0)
    objective.rng.reset(0)
    torch.manual_seed(1)
    next(objective.step(batch_of(S0 * torch.randn(64, 1, dtype=torch.float64)), 0))[0].backward()
    t, out = seen[-1]
    return (out.grad[:, 0] * t).abs() * 32  # u = (x - D) / t


def test_p1_sizes_of_gradients():
    """|g| / (|g|^2 + c)^p: 1 / |g| at p = 1; at p = 1/2 nearly FastGen's default, |g| / (|g| + 0.1)."""
    g = gradient_sizes(0.0)
    for p in (1.0, 0.5):
        torch.testing.assert_close(gradient_sizes(p), g / (g**2 + 0.01) ** p)
    assert (gradient_sizes(0.5) - g / (g + 0.1)).abs().max() < 0.3 < (gradient_sizes(1.0) - 1).abs().max()


P2 = {
    "distillation, flow": ("flow", {}),
    "training, flow": ("flow", {"mode": "training"}),
    "distillation, edm": ("edm", {"tangent": {"method": "difference"}}),
}


@pytest.mark.parametrize("name", first_of(P2))
def test_p2_distils_the_mixture(tmp_path, name):
    schedule, more = P2[name]
    time = {"kind": "logit_normal", "mean": 0.4, "std": 1.4}
    objective = {"name": "meanflow", "time": time, "flow_ratio": 0.25, **more}
    before, after, _, _ = run_mixture(tmp_path, objective, f"analytic:gmm2d-{schedule}", 250, batch=128)
    assert after < before / 2 and after < 0.06, (before, after)


@pytest.mark.parametrize("family", ["flow", "edm", "sd", "sana"])
def test_p4_the_card_samples_the_two_time_network(tiny, tmp_path, family):
    card_replay(tiny, tmp_path, {"name": "meanflow", **SHORT}, family, steps=2)


def test_p4_lora(tiny, tmp_path):
    card_replay(tiny, tmp_path, {"name": "meanflow", **SHORT}, "flow", steps=2, kind="lora")
