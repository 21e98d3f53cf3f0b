"""TDM: the kernel within a segment, its importance weight, segments, and four deterministic steps."""

from types import SimpleNamespace

import pytest
import torch

from fastgen.cli.sample import Generator, draw
from fastgen.cli.train import main
from fastgen.config.run import validate
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import VP, Flow
from fastgen.export.load import load_export
from fastgen.objectives import requirements_of
from fastgen.objectives.tdm import TDM, TDMConfig
from fastgen.roles.roles import Role, Student, StudentSpec
from fastgen.sampling.solvers import sample_student
from fastgen.training.assembly import make_cast
from fastgen.training.exporting import export_run
from tests.support.gaussians import nodes
from tests.support.replay import plainly, replay
from tests.support.spelled import World, at_x, gradient, line
from tests.support.tiny import PROMPTS
from tests.support.toys import (
    SCHEDULES,
    GaussianNet,
    batch_of,
    energy_distance,
    gaussian_role,
    rng,
    run_mixture,
)

SHORT = {"student_every": 2}
STUDENT = {"num_steps": 4, "sampler": "ode"}
"""settings of the contract battery"""


def make(schedule, num_steps=4, net=(-0.5, 0.6), critic=(-0.5, 0.6), **cfg):
    student = Student(GaussianNet(schedule, *net), None, StudentSpec(schedule.steps(num_steps), "ode"))
    objective = TDM(
        TDMConfig(**cfg),
        {
            "student": student,
            "critic": gaussian_role(schedule, *critic),
            "teacher": gaussian_role(schedule, 0.5, 1.0),
        },
        rng(),
    )
    objective.prepare()
    return objective


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_p1_tau_stays_inside_its_segment(schedule):
    """Between the segment's end (the floor, in the last one) and tau_gap below its start, all of it used."""
    objective = make(schedule)
    i, tau = objective.draw(20_000)
    edges = torch.tensor([*schedule.steps(4), schedule.t_min], dtype=torch.float64)
    place = torch.searchsorted(objective.grid, edges - 1e-9).clamp(max=1000).tolist()
    position = torch.searchsorted(objective.grid, tau - 1e-9)
    for j in range(4):
        inside, low, high = position[i == j], max(place[j + 1], 20), place[j] - 10
        assert inside.min() == low and inside.max() <= high
        assert inside.max() == high or isinstance(schedule, VP)  # its whole timesteps stand in the grid twice
        assert inside.max() - inside.min() > 0.95 * (high - low)
        assert abs(len(inside) / 20_000 - 0.25) < 0.02


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_p1_the_kernel_has_the_marginal_of_fresh_noise(schedule):
    """Were eps_G independent of x, x_tau would be alpha x + sigma N(0, 1), and the weight would mean 1."""
    objective, S, num = make(schedule), schedule, 40_000
    x, i = torch.full((num, 1), 0.7, dtype=torch.float64), torch.arange(num) % 4
    _, tau = objective.draw(num)
    tau = S.from_unit((objective.where[i + 1].clamp(min=20) + objective.where[i]) / 2000.0)
    X = S.noise(x, double(num, 1), objective.time(i))  # so that the DDIM jump finds fresh noise in it
    x_tau, n = objective.carry(x, X, i, tau)
    implied = (x_tau - S.alpha(tau)[:, None] * x) / S.sigma(tau)[:, None]
    for j in range(4):
        assert abs(implied[i == j].mean()) < 0.04 and abs(implied[i == j].var() - 1) < 0.06
    w = losses.tempered_ratio(schedule, x, x_tau, tau, n)
    torch.testing.assert_close(w[i == 3], torch.ones_like(w[i == 3]))  # m = 0: n' = n
    assert (w[i == 0] - 1).abs().max() > 0.1


class Spread(GaussianNet):
    def forward(self, x_t, t, cond):
        return -0.5 + 0.6 * x_t


def slope(weighted):
    """Regression of x on x_tau over one segment, by quadrature; (found, that of freshly noised x)."""
    S = Flow()
    objective = make(S)
    together = Spread(S, 0, 1)  # x and the noise implied in it move together
    objective.student = objective.student.with_network(Role(together))
    u, quad = nodes(60)
    X, n = (v.flatten()[:, None] for v in torch.meshgrid(u, u, indexing="ij"))
    objective.rng = SimpleNamespace(randn_like=lambda x: n)
    i = torch.zeros(len(X), dtype=torch.long)
    x = objective.student(X, objective.time(i), {}).detach()
    tau = torch.full((len(X),), 0.85, dtype=torch.float64)
    x_tau, n = objective.carry(x, X, i, tau)
    w = (quad[:, None] * quad[None]).flatten()
    var = float((w * (x[:, 0] + 0.5) ** 2).sum())
    w = w * losses.tempered_ratio(S, x, x_tau, tau, n) if weighted else w
    w = (w / w.sum())[:, None]
    a, b = x - (w * x).sum(), x_tau - (w * x_tau).sum()
    alpha, sigma = float(S.alpha(tau[0])), float(S.sigma(tau[0]))
    return float((w * a * b).sum() / (w * b * b).sum()), alpha * var / (alpha**2 * var + sigma**2)


def test_p1_the_weight_makes_the_critic_a_denoiser():
    """In one dimension the tempered weight is exact; without it the regression answers another question."""
    found, exact = slope(True)
    assert abs(found - exact) < 1e-4 * abs(exact), (found, exact)
    found, exact = slope(False)
    assert abs(found - exact) > 0.2 * abs(exact), ("negative", found, exact)


def test_p1_one_step_is_distribution_matching():
    """K = 1 and a square: the gradient of DMD at the same x_t."""
    S = Flow()
    objective = make(S, num_steps=1, metric="l2", critic=(-0.2, 0.7))
    one = batch_of(double(16, 1))
    turns = objective.step(one, 0)
    loss, _ = next(turns)
    loss, _ = next(turns)
    net = objective.student.backbone
    found = torch.autograd.grad(loss, (net.m, net.s))
    objective.rng.reset(0)
    objective.rng = rng()
    objective.draw(16), objective.rng.randn(16, 1)  # the critic's draws
    _, tau = objective.draw(16)
    x = objective.student(one.noise, objective.time(torch.zeros(16).long()), {})
    x_tau = S.noise(x.detach(), objective.rng.randn_like(x), tau)
    real, fake = objective.teacher(x_tau, tau, {}), objective.critic(x_tau, tau, {})
    wanted = torch.autograd.grad(losses.distribution_matching(x, real, fake), (net.m, net.s))
    torch.testing.assert_close(found, wanted)


def kernel(world, X, x, x_tau, tau):
    """n of x_tau ~ q(x_tau | x_m), a draw, for two steps of a flow: m is 1/2 above it and 0 below."""
    upper, ratio = (tau >= 0.5)[:, None], ((1 - tau) / 0.5)[:, None]
    x_m = line(x, X, torch.ones_like(tau), 0.5 * torch.ones_like(tau))
    n = (x_tau - ratio * x_m) / (tau[:, None] ** 2 - (ratio * 0.5) ** 2).clamp(min=1e-12).sqrt()
    n = torch.where(upper, n, (x_tau - (1 - tau[:, None]) * x) / tau[:, None]).detach()
    assert any(torch.allclose(d.double(), n, atol=1e-4) for d in world.tape.drawn if d.shape == n.shape)
    return n


@pytest.mark.parametrize("metric", ["huber", "l2"])
@pytest.mark.parametrize("importance", [True, False])
def test_p1_step_is_the_formula(metric, importance):
    """Two steps at guidance 3: the critic's weighted loss, and the gradient in the sample."""
    cfg = {"metric": metric, "huber_c": 0.2, "importance": importance}
    world = World(TDM, Flow(), [1.0, 0.5], "ode", num=32, **cfg)
    (critic, student), (first, second, call) = world.turns(), world.student.calls
    one = torch.ones(32, dtype=torch.float64)
    torch.testing.assert_close(second.x_t, line(first.out, first.x_t, one, 0.5 * one))
    x_tau, tau = world.shown(world.critic)
    upper = (tau >= 0.5)[:, None]
    X, x = (torch.where(upper, a, b) for a, b in zip((first.x_t, first.out), (second.x_t, second.out)))
    n = kernel(world, X, x, x_tau, tau)
    implied = (x_tau - (1 - tau[:, None]) * x) / tau[:, None]
    ratio = (0.5 * (n.square().mean(1) - implied.square().mean(1))).exp() if importance else one
    weight = (ratio * (((1 - tau) / tau) ** 2).clamp(max=5))[:, None]
    assert (weight == 5).any() or importance
    wanted = (weight * (world.critic.calls[0].out - x) ** 2).mean()
    torch.testing.assert_close(critic.loss, wanted)

    upper = (call.t == 1)[:, None]
    torch.testing.assert_close(call.x_t, torch.where(upper, first.x_t, second.x_t))
    x_tau, tau = world.shown(world.teacher)
    assert torch.equal(tau >= 0.5, upper[:, 0]) and 0 < upper.sum() < 32
    kernel(world, call.x_t, call.out, x_tau, tau)
    real, fake = world.guided(x_tau, tau), world.critic.backbone(x_tau, tau, world.batch.cond)
    goal = (call.out + real - fake).detach()
    scale = (call.out - real).abs().mean(1, keepdim=True).detach()

    def loss(x):
        d2 = (x - goal) ** 2
        return ((0.5 * d2 if metric == "l2" else (d2 + 0.2**2).sqrt()) / scale).mean()

    torch.testing.assert_close(gradient(student.loss, call.out), at_x(loss, call.out))


def test_p1_the_walk_is_deterministic_and_on_policy():
    """X_{i+1} is the DDIM step from X_i with the student's own noise: what its sampler visits."""
    objective = make(VP.scaled_linear())
    one = batch_of(double(8, 1))
    states, ends = objective.rollout(one.noise, one.cond)
    for last in range(4):
        torch.testing.assert_close(objective.student.generate(one.noise, {}, None, last), ends[last])
    again, _ = objective.rollout(one.noise, one.cond)
    assert all(torch.equal(a, b) for a, b in zip(states, again)) and torch.equal(states[0], one.noise)


def test_reads_no_image():
    """A batch without x0 is enough."""
    objective = make(Flow())
    objective.critic.backbone.requires_grad_(True)
    one = batch_of(double(8, 1))
    one.x0 = None
    assert len(list(objective.step(one, 0))) == 2 and not requirements_of(TDMConfig()).real_data


class Recorder(GaussianNet):
    """Records the guidance input and the time of each call."""

    def forward(self, x_t, t, cond):
        self.seen.append((float(cond["guidance"][0]), float(t[0])))
        return super().forward(x_t, t, cond)


def test_p1_the_step_count_is_an_input(monkeypatch):
    """K is drawn per batch, an input of student and critic; the times are every (4 / K)-th of the grid."""
    S = Flow()
    objective = make(S, step_counts=(1, 2, 4))
    nets = {n: Recorder(S, -0.5, 0.6) for n in ("student", "critic")}
    student = objective.student.with_network(Role(nets["student"]))
    objective.student, objective.critic = student.with_times(student.times, grid=4), Role(nets["critic"])
    walks = {1: [1.0], 2: [1.0, 0.5], 4: [1.0, 0.75, 0.5, 0.25]}
    for num, walk in walks.items():
        monkeypatch.setattr(objective.rng, "shared_randint", lambda high, n=num: (1, 2, 4).index(n))
        for net in nets.values():
            net.seen = []
        list(objective.step(batch_of(double(8, 1)), 0))
        assert [t for _, t in nets["student"].seen[:num]] == walk
        assert {w for net in nets.values() for w, _ in net.seen} == {float(num)}
    assert objective.student.with_steps(2).times == walks[2]


def test_renoising_is_refused(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "{teacher: {path: 'analytic:gmm2d-flow'}, objective: {name: tdm}, student: {num_steps: 4}}"
    )
    assert main(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert (
        "deterministic" in message
        and len(message.strip().splitlines()) == 1
        and not (tmp_path / "run").exists()
    )


@pytest.mark.slow
def test_p2_four_steps_on_the_mixture(tmp_path):
    before, after, *_ = run_mixture(
        tmp_path,
        {"name": "tdm"},
        "analytic:gmm2d-vp",
        steps=250,
        num_steps=4,
        student={"sampler": "ode"},
    )
    assert after < 0.02 and after < before / 2, (before, after)


@pytest.mark.slow
def test_p2_several_step_counts(tmp_path):
    """One student for one, two and four steps, better at each than the network it started from."""
    objective = {"name": "tdm", "step_counts": [1, 2, 4]}
    *_, trainer = run_mixture(tmp_path, objective, steps=250, num_steps=4, student={"sampler": "ode"})
    mixture, codec = trainer.cast.teacher.backbone, trainer.cast.teacher.codec
    real, labels = mixture.sample(1500, torch.Generator().manual_seed(7))
    untrained = Role(mixture.trainable_copy())
    for num in (1, 2, 4):
        student = trainer.cast.parts["student"].with_steps(num)
        assert student.guidance == num
        before, after = (
            energy_distance(real, sample_student(one, list(range(1500)), codec.shape, codec.labels(labels)))
            for one in (student.with_steps(num).with_network(untrained), student)
        )
        assert after < 0.03 and after < before, (num, before, after)


def test_p4_tdm(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "tdm"})


PLAIN = """
import torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(".", torch_dtype=torch.float32)
found = []
for num, w in ((4, 4.0), (2, 2.0), (2, 4.0)):
    streams = [torch.Generator().manual_seed(s) for s in (5, 6)]
    found.append(pipe(%r, generator=streams, guidance_scale=w, num_inference_steps=num, height=16,
                      width=16, output_type="pt").images)
images = torch.stack(found)
"""


def test_p4_four_and_two_steps_of_one_student(tiny, tmp_path):
    """Four deterministic steps, or two, by the stock pipeline with the count as its guidance scale."""
    cfg = validate(
        {
            "teacher": {"path": str(tiny("sd")), "guidance": 2.0},
            "student": {"num_steps": 4, "sampler": "ode"},
            "objective": {"name": "tdm", "step_counts": [2, 4]},
            "data": {"name": "fashion"},
        }
    )
    cast = make_cast(cfg)
    objective, codec = cast.stage(cfg.all_stages()[0], rng()), cast.teacher.codec
    noise = torch.randn(2, *codec.shape, generator=torch.Generator().manual_seed(1))
    one = batch_of(noise, noise, codec.prompts(list(PROMPTS)))
    objective.prepare()
    for k in range(4):
        for loss, _ in objective.step(one, k):
            grads = objective.players[objective.active].trainable()
            loss.backward()
            for p in grads.values():
                if p.grad is not None:
                    p.data -= 0.05 * p.grad.sign()
                    p.grad = None
    run = SimpleNamespace(cast=cast, train_cfg=cfg.train, step=4, example="", enlarges=0, folder=tmp_path)
    folder = export_run(run, tmp_path / "export", {})
    images = plainly(PLAIN % (list(PROMPTS),), folder)
    loaded = load_export(folder)
    cond, null = loaded.codec.prompts(list(PROMPTS)), loaded.codec.null(1)
    for num, plain in ((4, images[0]), (2, images[1])):
        mine = draw(Generator(loaded, num, 1.0, null), cond, [5, 6], batch_size=2)[0]
        assert (mine - plain).abs().max() < 1e-3, num
    assert (images[1] - images[2]).abs().max() > 2e-3, "the count has no effect"
    card = (folder / "README.md").read_text()
    assert "guidance_scale=4.0" in card and "num_inference_steps=2, guidance_scale=2.0" in card
