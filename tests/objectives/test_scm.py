"""sCM: its tangent on Gaussian data where everything is known, its weights, and exact mixtures."""

import pytest
import torch

from fastgen.diffusion.reparametrization import TrigView
from fastgen.diffusion.schedules import EDM, VP, Flow, TrigFlow, expand
from fastgen.networks.denoiser import Denoiser
from fastgen.objectives import requirements_of, scm
from fastgen.objectives.scm import SCM, SCMConfig, normalised
from fastgen.roles.heads import LogVariance
from fastgen.roles.roles import Student, StudentSpec
from tests.support.heavier import first_of
from tests.support.replay import replay
from tests.support.spelled import NEAR, World, at_x, gradient
from tests.support.toys import GaussianNet, batch_of, gaussian_role, rng, run_mixture

SHORT = {"warmup_steps": 2}
"""settings of the contract battery"""

SCHEDULES = {"edm": EDM(), "flow": Flow(), "vp": VP.scaled_linear(), "trig": TrigFlow(0.5)}
each = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
S0 = 0.8
PLAIN = {"tangent_norm": "none", "adaptive": False, "weighting": "uniform", "warmup_steps": 0}


class FlowMapNet(Denoiser):
    """The ODE's end point for data N(0, s0^2) at power 1; any other power is wrong between the ends."""

    prediction = "x0"

    def __init__(self, schedule, power=1.0):
        super().__init__()
        self.schedule = schedule
        self.power = torch.nn.Parameter(torch.tensor(power, dtype=torch.float64))

    def forward(self, x_t, t, cond):
        a, sig = (expand(c, x_t) for c in (self.schedule.alpha(t), self.schedule.sigma(t)))
        return x_t * (S0 / (a**2 * S0**2 + sig**2).sqrt()) ** self.power

    raw = forward


def make(schedule, net, **cfg):
    cfg = SCMConfig(**{**PLAIN, **cfg})
    parts = {
        "student": Student(net, None, StudentSpec(schedule.steps(1))),
        "teacher": gaussian_role(schedule, 0.0, S0),
    }
    if cfg.adaptive:
        parts["logvar"] = LogVariance()
    return SCM(cfg, parts, rng())


def data(num=64):
    return batch_of(S0 * torch.randn(num, 1, dtype=torch.float64))


def loss_of(objective, k=1):
    objective.rng.reset(0)
    torch.manual_seed(1)
    return next(objective.step(data(), k))[0]


@each
@pytest.mark.parametrize("method", ["exact", "difference"])
def test_p1_no_tangent_at_the_flow_map(schedule, method):
    """At f* the whole tangent vanishes; the loss is its mean square."""
    exact = loss_of(make(schedule, FlowMapNet(schedule), tangent={"method": method}))
    assert exact < (1e-20 if method == "exact" else 1e-8)
    assert loss_of(make(schedule, FlowMapNet(schedule, power=1.5), tangent={"method": method})) > 1e-3


def test_p1_negative_each_term_of_the_tangent_counts(monkeypatch):
    """Without the x_t term, without the time direction, or with the sign turned, f* is no fixed point."""
    S = Flow()
    right = scm.tangent
    wrong = {
        "no x_t term": lambda f, at, along, cfg: (
            right(f, at, along, cfg) - expand(along[1], at[0]) * at[0] / SCMConfig().sigma_data
        ),
        "no time": lambda f, at, along, cfg: right(f, at, (along[0], 0 * along[1]), cfg),
        "sign": lambda f, at, along, cfg: -right(f, at, along, cfg),
    }
    for name, version in wrong.items():
        monkeypatch.setattr(scm, "tangent", version)
        assert loss_of(make(S, FlowMapNet(S))) > 0.01, name


@each
def test_p1_at_the_start_of_the_warm_up_the_teacher_itself_is_the_fixed_point(schedule):
    """r = 0 is plain diffusion distillation; r = 1 is not."""
    teacher = GaussianNet(schedule, 0.0, S0)
    assert loss_of(make(schedule, teacher, warmup_steps=10), k=0) < 1e-20
    assert loss_of(make(schedule, teacher, warmup_steps=10), k=10) > 1e-3
    half = loss_of(make(schedule, teacher, warmup_steps=10), k=5)
    torch.testing.assert_close(half, 0.25 * loss_of(make(schedule, teacher, warmup_steps=10), k=20))


def test_p1_flow_to_trigflow_is_the_training_free_map():
    """F from D equals SANA-Sprint's form in v, and the clean and noise ends are kept."""
    view, sd = TrigView(Flow(), 0.5), 0.5
    t = torch.tensor([0.05, 0.4, 1.0, 1.5], dtype=torch.float64)
    u, eps = torch.randn(2, 4, 3, dtype=torch.float64)  # data and noise of unit scale; x0 = u here
    x_t = view.trig.noise(u, eps, t)  # cos t u + sin t sd eps
    tau, scale = view.trig.map_to(view.native, t)
    x_fm = expand(scale, x_t) * x_t
    torch.testing.assert_close(x_fm, view.native.noise(u, eps, tau))
    F = view.velocity(lambda x, s: x - expand(s, x) * (eps - u))(x_t, t)  # a flow network that says eps - u
    expected = expand(t.cos(), u) * eps - expand(t.sin(), u) * u / sd
    torch.testing.assert_close(F, expected)
    unit = TrigView(Flow(), 1.0)
    s = t.sin() / (t.sin() + t.cos())
    torch.testing.assert_close(unit.trig.map_to(unit.native, t)[0], s)
    r = expand((s**2 + (1 - s) ** 2).sqrt(), u)
    x = unit.trig.noise(u, eps, t)
    direct = (expand(1 - 2 * s, u) * x * r + r**2 * (eps - u)) / r  # arXiv 2503.09641, eq. 6
    found = unit.velocity(lambda x, s: x - expand(s, x) * (eps - u))(x, t)
    torch.testing.assert_close(found, direct)


def test_p1_times_meet_the_ends_of_each_schedule():
    assert torch.isclose(
        TrigView(Flow(), 0.5).time(torch.ones(1).double()), torch.tensor(torch.pi / 2).double()
    )
    hi = TrigView(EDM(), 0.5).time(torch.tensor([80.0]).double())
    assert float(hi) == pytest.approx(1.56454, abs=1e-5)  # atan(80 / 0.5), the paper's first step
    tau, scale = TrigView(Flow(), 0.5).trig.map_to(Flow(), torch.tensor([torch.pi / 2], dtype=torch.float64))
    assert float(tau) == pytest.approx(1.0, abs=1e-12) and float(scale) == pytest.approx(
        2.0
    )  # pure noise, sd 0.5 to 1


def test_p1_training_follows_the_straight_pair():
    """d = cos t z - sin t x0 without a teacher: at r = 0 the fixed point is D = x0."""

    class Knows(Denoiser):
        prediction, schedule = "x0", Flow()

        def forward(self, x_t, t, cond):
            return cond["x0"]

    batch = data()
    batch.cond["x0"] = batch.x0
    cfg = SCMConfig(**{**PLAIN, "warmup_steps": 10, "mode": "training"})
    assert requirements_of(cfg).untrained == ()
    objective = SCM(cfg, {"student": Student(Knows(), None, StudentSpec([1.0]))}, rng())
    assert next(objective.step(batch, 0))[0].detach() < 1e-20
    batch.cond["x0"] = batch.x0 + 1
    assert next(objective.step(batch, 0))[0].detach() > 0.1


def test_p1_gradient_is_minus_two_g_times_dF():
    """d loss / d theta = -2 mean(g dF/dtheta): nothing flows through the target."""
    S = Flow()
    net = FlowMapNet(S, power=1.5)
    objective = make(S, net)
    seen = {}
    right = scm.normalised
    try:
        scm.normalised = lambda g, cfg: seen.setdefault("g", right(g, cfg))
        loss = loss_of(objective)
    finally:
        scm.normalised = right
    loss.backward()
    objective.rng.reset(0)
    torch.manual_seed(1)
    x0 = data().x0
    view = TrigView(S, 0.5)
    t = view.time(objective.sample_t(len(x0), objective.cfg.time))
    x_t = view.trig.noise(x0, objective.rng.randn_like(x0), t)
    tau, scale = view.trig.map_to(S, t)
    base = S0 / (S.alpha(tau) ** 2 * S0**2 + S.sigma(tau) ** 2).sqrt()[:, None]
    dD = expand(scale, x_t) * x_t * base**1.5 * base.log()
    dF = -dD / (0.5 * t.sin()[:, None])
    torch.testing.assert_close(net.power.grad, (-2 * seen["g"] * dF).mean())
    assert net.power.grad.abs() > 1e-3


def test_p1_tangent_normalisation():
    g = torch.randn(4, 3, 16) * torch.tensor([1e-3, 1.0, 10.0, 1e3])[:, None, None]
    rms = normalised(g, SCMConfig()).square().flatten(1).mean(1).sqrt()
    size = g.square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(rms, size / (size + 0.1))
    l2 = normalised(g, SCMConfig(tangent_norm="l2")).flatten(1).norm(dim=1)
    torch.testing.assert_close(l2[3], torch.tensor(1.0), rtol=1e-3, atol=0)
    assert normalised(g, SCMConfig(tangent_norm="clip")).abs().max() == 1
    assert torch.equal(normalised(g, SCMConfig(tangent_norm="none")), g)


def test_p1_adaptive_weight_starts_neutral_and_learns_the_log_of_the_loss():
    w = LogVariance()
    t = torch.linspace(0.1, 1.5, 64, dtype=torch.float64)
    assert w(t).abs().max() == 0
    error = (0.5 + t).float()
    optimizer = torch.optim.Adam(w.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        ((-w(t)).exp() * error + w(t)).mean().backward()
        optimizer.step()
    torch.testing.assert_close(w(t).detach(), error.log(), atol=0.05, rtol=0)


SD, C = 0.5, 0.1
"""sigma_data and tangent_c of the formula below"""


def trig(tau):
    """TrigFlow's (t, c) of a flow's time, where x_tau = c x_t."""
    t = torch.atan(tau / ((1 - tau) * SD))
    return t, torch.hypot(1 - tau, tau) / torch.hypot(t.cos(), SD * t.sin())


def alg_1(net, cond, x_tau, tau, D_real, r, w=None):
    """sCM's loss as a function of D_theta: a flow network at x_tau, following D_real; w is w(t) or None."""
    (t, c), row = trig(tau), lambda v: v[:, None]
    x, cos, sin = x_tau / row(c), row(t.cos()), row(t.sin())
    d = (cos * x - D_real) / sin

    def F(x, t):
        tau = SD * t.sin() / (t.cos() + SD * t.sin())
        c = torch.hypot(1 - tau, tau) / torch.hypot(t.cos(), SD * t.sin())
        return (row(t.cos()) * x - net(row(c) * x, tau, cond)) / row(SD * t.sin())

    value, slope = torch.func.jvp(F, (x, t), (d, torch.ones_like(t)))
    g = -(cos**2) * (SD * value - d) - r * cos * sin * (x + SD * slope)
    target = value + g / (g.square().mean(1, keepdim=True).sqrt() + C)

    def loss(D):
        error = (((cos * x - D) / (SD * sin) - target.detach()) ** 2).mean(1) / (SD * t.tan())
        return (error if w is None else (-w).exp() * error + w).mean()

    return loss


@pytest.mark.parametrize("span", [None, (1.0, 5.0)])
def test_p1_step_is_the_formula(span):
    """Alg. 1 half-way through the warm-up with a learned weight, at guidance 3 or at a scale that is told."""
    torch.manual_seed(2)
    logvar = LogVariance()
    torch.nn.init.normal_(logvar.out.weight, 0, 0.1)
    world = World(SCM, Flow(), span=span, parts={"logvar": logvar}, time=NEAR, warmup_steps=10)
    (turn,), call = world.turns(5), world.student.calls[-1]
    x_tau, tau, w = call.x_t, call.t, call.cond["guidance"].double() if span else 3.0
    world.within(tau, NEAR)
    world.noise_in(x_tau, tau, world.batch.x0)
    real = world.guided(x_tau, tau, w)
    found = logvar(trig(tau)[0]).detach().double()
    formula = alg_1(world.student.backbone, call.cond, x_tau, tau, real, 0.5, found)
    torch.testing.assert_close(turn.loss, formula(call.out), rtol=1e-4, atol=1e-5)
    wanted = at_x(formula, call.out)
    torch.testing.assert_close(gradient(turn.loss, call.out), wanted, rtol=1e-3, atol=1e-6)
    assert {name.split(".")[0] for name in turn.grads} == {"student", "logvar"}


P2 = {
    "exact, flow": ("flow", {}),
    "difference, vp": ("vp", {"tangent": {"method": "difference"}}),
    "training, edm": ("edm", {"mode": "training"}),
}


@pytest.mark.parametrize("name", first_of(P2))
def test_p2_distils_the_mixture(tmp_path, name):
    schedule, more = P2[name]
    objective = {"name": "scm", "sigma_data": 0.7, "warmup_steps": 50, **more}
    before, after, _, _ = run_mixture(tmp_path, objective, f"analytic:gmm2d-{schedule}", 200, batch=128)
    assert after < before / 4 and after < 0.03, (before, after)


def test_p4_scm(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "scm", **SHORT})
