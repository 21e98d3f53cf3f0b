"""TSCD: the jump and its limits, segments, adversarial noise levels, stages, and gamma sampling."""

from functools import partial

import pytest
import torch

from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import Flow
from fastgen.objectives.tscd import TSCD, TSCDConfig
from fastgen.roles.roles import Role, Student, StudentSpec
from fastgen.sampling.solvers import segment_ends, teacher_grid
from tests.support.replay import replay_counts
from tests.support.spelled import Classes, Heard, World, at_x, gradient, line
from tests.support.toys import (
    SCHEDULES,
    GaussianNet,
    Spy,
    batch_of,
    captured,
    check_weight,
    each,
    gaussian_role,
    outputs,
    rng,
    run_mixture,
)

SHORT = {"grid_steps": 8, "segments": 2, "gan_weight": 0.1, "ode_teacher": "previous", "target_decay": 0.5}
"""settings of the contract battery"""
STUDENT = {"sampler": "ode", "num_steps": 2}


def make(schedule, net, teacher=None, disc=None, guidance=1.0, **cfg):
    teacher = teacher or gaussian_role(schedule, 0.0, 0.5)
    parts = {"student": Student(net, None, StudentSpec(schedule.steps(1))), "teacher": teacher}
    if cfg.get("ode_teacher") == "previous":
        parts["previous"] = Role(GaussianNet(schedule, 9.0, 9.0).requires_grad_(False))
    if disc is not None:
        parts["disc"] = disc
    return TSCD(TSCDConfig(**cfg), parts, rng(), guidance)


class Ear(torch.nn.Module):
    """A discriminator that listens."""

    def __init__(self):
        super().__init__()
        self.w, self.heard = torch.nn.Parameter(torch.ones(())), []

    def forward(self, x_t, t, cond):
        self.heard.append((x_t, t))
        return [self.w * x_t.float().flatten(1).mean(1)]


@each
def test_p1_as_many_segments_as_steps_is_the_teachers_own_step(schedule, monkeypatch):
    """k = K: the target is x_r everywhere and the teacher itself has no loss; with one segment it has."""
    x0, losses = torch.randn(64, 1, dtype=torch.float64), {}
    for k in (8, 1):
        objective = make(schedule, GaussianNet(schedule, 0.0, 0.5), grid_steps=8, segments=k, end_prob=1.0)
        pred, target, losses[k] = captured(monkeypatch, "mse", objective, batch_of(x0))
        assert torch.allclose(pred, target, rtol=1e-5, atol=1e-6) == (k == 8)
    assert losses[8] < 1e-9 and losses[1] > 1e-4


@pytest.mark.parametrize("source", ["original", "previous"])
@pytest.mark.parametrize("end_prob", [0.0, 1.0])
def test_p1_step_is_the_formula(end_prob, source, monkeypatch):
    """Two segments of eight steps at guidance 3: the gradient in D_theta of both parts, the heads' loss."""
    S, cfg = Flow(), {"grid_steps": 8, "segments": 2, "weighting": "snr1", "end_prob": end_prob}
    steps, original = [], S.ode_step
    monkeypatch.setattr(S, "ode_step", lambda D, x, t, u: steps.append(u) or original(D, x, t, u))
    cfg |= {"mse_weight": 0.7, "gan_weight": 0.2, "gan_loss": "softplus", "ode_teacher": source}
    parts = {"previous": Heard(Classes(S, 0.9, 0.7).requires_grad_(False))}
    world = World(TSCD, S, num=64, parts=parts, **cfg)
    (student, heads), (earlier, call) = world.turns(), world.student.calls
    x_t, t, disc, u = call.x_t, call.t, world.disc, steps[-1]
    world.noise_in(x_t, t, world.batch.x0)
    assert set(t.tolist()) == {1 - i / 8 for i in range(8)} and not earlier.grad
    r, e = t - 0.125, torch.where(t > 0.5, 0.5, 0.0).double()
    assert torch.equal(u, e) if end_prob else ((u >= e) & (u <= r)).all() and (u > e).any() and (u < r).any()
    teacher = world.guided(x_t, t)
    if source == "previous":  # a copy of the student, in which guidance is already
        teacher = world.student.backbone(x_t, t, world.batch.cond).detach()
    x_r = line(teacher, x_t, t, r)
    torch.testing.assert_close(earlier.x_t, x_r)
    torch.testing.assert_close(earlier.t, r.clamp(min=0.125))
    target = torch.where((u < r)[:, None], line(earlier.out, x_r, earlier.t, u), x_r).detach()
    weight = (((1 - t) / t) ** 2).clamp(min=1)[:, None]
    (x_v, v, cond), (_, v_fake, _), (real, v_real, _) = disc.seen
    assert torch.equal(v, v_fake) and torch.equal(v, v_real)
    assert ((v > u) & (v <= e + 0.5)).all() and (v == e + 0.5).any()
    world.noise_in(real, v, world.batch.x0)
    ratio = ((1 - v) / (1 - u))[:, None]
    more = (v[:, None] ** 2 - (ratio * u[:, None]) ** 2).sqrt()
    n = (x_v - ratio * line(call.out, x_t, t, u)).detach() / more
    assert any(torch.allclose(d.double(), n, atol=1e-4) for d in world.tape.drawn)

    def loss(D):
        pred = line(D, x_t, t, u)
        gan = torch.nn.functional.softplus(-disc.logit(ratio * pred + more * n, v, cond)).mean()
        return 0.7 * (weight * (pred - target) ** 2).mean() + 0.2 * gan

    wanted = at_x(loss, call.out)
    torch.testing.assert_close(gradient(student.loss, call.out), wanted, rtol=1e-4, atol=1e-6)
    fake, real = (disc.logit(*seen) for seen in disc.seen[1:])
    wanted = torch.nn.functional.softplus(fake).mean() + torch.nn.functional.softplus(-real).mean()
    torch.testing.assert_close(heads.loss, wanted)


@outputs
def test_p1_weight_makes_it_the_error_of_the_networks_output(kind):
    check_weight(partial(make, segments=1, end_prob=1.0), kind)


def test_p1_one_d_serves_one_u_only():
    """The denoiser that makes Psi the exact flow of Gaussian data depends on u (the restriction that a
    network without u as an input cannot avoid).
    """
    S, s0 = SCHEDULES["vp"], 0.5
    t, r, end = (torch.tensor([v], dtype=torch.float64) for v in (999.0, 874.0, 0.0))
    var = lambda u: S.alpha(u) ** 2 * s0**2 + S.sigma(u) ** 2  # noqa: E731
    x, D = torch.tensor([[1.7]], dtype=torch.float64), {}
    for name, u in (("r", r), ("end", end)):
        ratio = S.sigma(u) / S.sigma(t)
        D[name] = x * ((var(u) / var(t)).sqrt() - ratio) / (S.alpha(u) - S.alpha(t) * ratio)
        expected = x * (var(u) / var(t)).sqrt()
        torch.testing.assert_close(S.ode_step(D[name], x, t, u), expected, rtol=1e-5, atol=1e-6)
    assert (D["r"] - D["end"]).abs() > 0.05


@pytest.mark.parametrize("segments", [8, 4, 2, 1])
def test_p1_targets_and_noise_stay_inside_the_segment(segments, monkeypatch):
    """u in [end, r]; the discriminator's level u' in (u, start]; both sides of the GAN at the same one."""
    S, K, num = SCHEDULES["vp"], 40, 400
    ear = Ear()
    objective = make(S, GaussianNet(S, 0.0, 0.5), disc=ear, grid_steps=K, segments=segments, gan_weight=0.1)
    steps, original = [], S.ode_step
    monkeypatch.setattr(S, "ode_step", lambda D, x, t, u: steps.append((t, u)) or original(D, x, t, u))
    list(objective.step(batch_of(torch.randn(num, 1)), 0))
    (t, r), (_, u), (again, u_pred) = steps
    edges = torch.tensor(teacher_grid(S, K))[segment_ends(K, segments)].unique().tolist() + [999.0]
    inside = torch.bucketize(t, torch.tensor(edges, dtype=torch.float64))
    low, high = (torch.tensor(edges, dtype=torch.float64)[inside - i] for i in (1, 0))
    assert torch.equal(t, again) and torch.equal(u, u_pred)
    assert (u <= r).all() and (u >= low).all() and (t <= high).all()
    assert len(u.unique()) > len(edges) or segments == 8
    (_, v_gen), (_, v_fake), (_, v_real) = ear.heard
    assert (v_gen > u).all() and (v_gen <= high).all()
    assert torch.equal(v_gen, v_fake) and torch.equal(v_gen, v_real)


def test_p1_negative_an_end_one_segment_on_is_no_fixed_point(monkeypatch):
    """With the edges off by one segment the teacher at k = K no longer fits itself."""
    import fastgen.objectives.tscd as module

    S, losses = SCHEDULES["vp"], []
    for shift in (0, 1):
        ends = lambda K, k, shift=shift: (segment_ends(K, k) + shift).clamp(max=K)  # noqa: E731
        monkeypatch.setattr(module, "segment_ends", ends)
        objective = make(S, GaussianNet(S, 0.0, 0.5), grid_steps=8, segments=8, end_prob=1.0)
        losses.append(float(next(objective.step(batch_of(torch.randn(64, 1).double()), 0))[0]))
    assert losses[0] < 1e-9 and losses[1] > 1e-4


def test_p1_noise_travel_keeps_the_marginal():
    """A draw from q(x_u) carried to u' has the variance of q(x_u')."""
    S, s0, generator = SCHEDULES["vp"], 0.5, torch.Generator().manual_seed(0)
    u, v = (torch.full((200_000,), t, dtype=torch.float64) for t in (249.0, 749.0))
    draw = lambda: torch.randn(200_000, 1, generator=generator, dtype=torch.float64)  # noqa: E731
    x_v = S.renoise(S.noise(s0 * draw(), draw(), u), draw(), u, v)
    expected = S.alpha(v[0]) ** 2 * s0**2 + S.sigma(v[0]) ** 2
    assert float(x_v.var()) == pytest.approx(float(expected), rel=0.01)


def test_p1_gamma_sampling_is_tcd_schedulers_step():
    """Between steps: gamma 0 is DDIM with the same D, gamma 1 renoises as LCM, 0.3 is what eta 0.3 does."""
    from diffusers import TCDScheduler

    S = SCHEDULES["vp"]
    scheduler = TCDScheduler(original_inference_steps=40, prediction_type="sample")
    x_t, D = torch.randn(2, 3, 4)
    for gamma in (0.0, 0.3, 1.0):
        scheduler.set_timesteps(4)
        ours = Student(GaussianNet(S, 0.0, 0.5), None, StudentSpec(S.student_times(4, 40), "tcd", gamma, 40))
        t, u = ours.time(0, x_t), ours.time(1, x_t)
        theirs = scheduler.step(
            D, scheduler.timesteps[0], x_t, eta=gamma, generator=torch.Generator().manual_seed(3)
        ).prev_sample
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(3))
        mine = ours.between(D, x_t, t, u, lambda x, noise=noise: noise)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        if gamma == 1.0:
            s = torch.zeros_like(u)  # TCD passes through alpha_0, not through clean data
            torch.testing.assert_close(mine, S.renoise(S.ode_step(D, x_t, t, s), noise, s, u))
        if gamma == 0.0:
            torch.testing.assert_close(mine, S.ode_step(D, x_t, t, u))


def test_p1_previous_student_is_the_next_stages_ode(monkeypatch):
    """At the first step of a stage it becomes a copy of the student; guidance is in it already."""
    S = Flow()
    teacher = Spy(GaussianNet(S, 0.0, 0.5).requires_grad_(False))
    cfg = {"grid_steps": 4, "segments": 4, "ode_teacher": "previous"}
    objective = make(S, GaussianNet(S, 0.7, 0.2), teacher, guidance=3.0, **cfg)
    loss = next(objective.step(batch_of(torch.randn(16, 1).double()), 0))[0]
    assert loss < 1e-9 and not teacher.seen  # its own ODE, one step a segment
    assert objective.previous.backbone.m.item() == pytest.approx(0.7)
    objective.student.backbone.m.data += 1
    next(objective.step(batch_of(torch.randn(16, 1).double()), 1))
    assert objective.previous.backbone.m.item() == pytest.approx(0.7)


def refused(**values):
    with pytest.raises(UserError) as error:
        validate({"data": {"name": "fashion"}, **values})
    return str(error.value)


def test_bad_input_in_one_line():
    message = refused(objective={"name": "tscd", "grid_steps": 40, "segments": 3})
    assert message.startswith("config: objective.segments: 3 segments do not divide a grid of 40 steps")
    stage = {"name": "last", "objective": {"name": "tscd", "segments": 4}}
    message = refused(stages=[stage], student={"num_steps": 2, "sampler": "ode"})
    assert "student.num_steps: found 2" in message and "multiple of 4" in message
    message = refused(
        stages=[stage], student={"num_steps": 4, "sampler": "ode"}, eval={"student_steps": [4, 6]}
    )
    assert "eval.student_steps: found 6" in message
    assert "student.sampler ode" in refused(stages=[stage], student={"num_steps": 4})
    assert "student.gamma" in refused(objective={"name": "lcm"}, student={"gamma": 0.3})


def test_p2_distils_the_mixture_in_stages(tmp_path):
    stages = [
        ({"name": "tscd", "grid_steps": 16, "segments": k, "end_prob": 0.5}, 250, steps)
        for k, steps in ((4, 4), (1, 1))
    ]
    before, after, _, _ = run_mixture(tmp_path, None, "analytic:gmm2d-vp", stages=stages, lr=2e-3)
    assert after < before * 0.5 and after < 0.1, (before, after)


def test_p4_tscd(tiny, tmp_path):
    """One LoRA in 1, 2, 4 and 8 steps through TCDScheduler with its eta; another grid shows."""
    objective = {"name": "tscd", "grid_steps": 40, "segments": 1, "gan_weight": 0.1}
    found = replay_counts(
        tiny, tmp_path, objective, "TCDScheduler", other={"original_inference_steps": 10},
        sampler="tcd", gamma=0.3,
    )  # fmt: skip
    assert found.info.step_arguments == {"eta": 0.3} and set(found.info.other_step_counts) == {"1", "2", "8"}
