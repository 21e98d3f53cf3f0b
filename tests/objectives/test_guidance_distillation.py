"""Guidance distillation: the target's identities, the range of w on an exact mixture, the export replayed."""

import pytest
import torch

from fastgen.config.run import validate
from fastgen.core.rng import Rng
from fastgen.diffusion.schedules import Flow
from fastgen.objectives.guidance_distillation import GuidanceDistillation, GuidanceDistillationConfig
from fastgen.roles.roles import Role, Student, StudentSpec
from fastgen.training.assembly import make_cast
from tests.support.play import batch as batch_for
from tests.support.play import play
from tests.support.replay import card_replay, replay
from tests.support.spelled import NEAR, World, at_x, gradient
from tests.support.toys import GaussianNet, batch_of, distances_by_scale, rng, run_mixture

SHORT = {}
SHORT_TEACHER = {"guidance": 4.0}
"""settings of the contract battery"""


class TwoMeans(GaussianNet):
    """Exact denoiser of N(m_c, s^2) for class 1 and of N(m_0, s^2) for the null class 0."""

    def forward(self, x_t, t, cond):
        shift = 2.0 * cond["class_labels"].double()[:, None]
        a = self.schedule.alpha(t)[:, None]
        return super().forward(x_t.double() - a * shift, t, cond) + shift


class Recorder(Student):
    """Records its inputs; its output is right for w = 1."""

    def __call__(self, x_t, t, cond):
        self.seen = x_t, t, cond
        return super().__call__(x_t, t, cond)


def make(span=None, guidance=1.0, batch=64):
    S = Flow()
    spec = StudentSpec(S.steps(4), "ode", guidance_range=span)
    student = Recorder(TwoMeans(S, 0.3, 0.5), None, spec)
    parts = {"student": student, "teacher": Role(TwoMeans(S, 0.3, 0.5).requires_grad_(False))}
    objective = GuidanceDistillation(GuidanceDistillationConfig(), parts, rng(), guidance)
    one = batch_of(torch.randn(batch, 1).double())
    one.cond = {"class_labels": torch.ones(batch).long()}
    one.uncond = {"class_labels": torch.zeros(batch).long()}
    return objective, one


def test_p1_without_guidance_the_teacher_is_the_answer():
    objective, one = make()
    loss, _ = next(objective.step(one, 0))
    assert float(loss.detach()) < 1e-12
    objective, one = make(guidance=3.0)
    loss, _ = next(objective.step(one, 0))
    assert float(loss.detach()) > 1e-2


@pytest.mark.parametrize("weighting", ["snr1", "native"])
@pytest.mark.parametrize("span", [None, (1.0, 5.0)])
def test_p1_step_is_the_formula(weighting, span):
    """max(SNR, 1), or the error of a flow, of the guided teacher at 3 or at the scale that is told."""
    world = World(GuidanceDistillation, span=span, time=NEAR, weighting=weighting)
    (turn,), (call,) = world.turns(), world.student.calls
    x_t, t, w = call.x_t, call.t, call.cond["guidance"].double() if span else 3.0
    world.within(t, NEAR)
    world.noise_in(x_t, t, world.batch.x0)
    weight = (((1 - t) / t) ** 2).clamp(min=1) if weighting == "snr1" else world.native(t)
    target = world.guided(x_t, t, w)
    wanted = at_x(lambda D: (weight[:, None] * (D - target) ** 2).mean(), call.out)
    torch.testing.assert_close(gradient(turn.loss, call.out), wanted, rtol=1e-4, atol=1e-6)


def test_p1_step_keeps_off_the_clean_end():
    world = World(GuidanceDistillation, time={"low": 0.0, "high": 5e-4})
    world.turns()
    assert world.student.calls[0].t.tolist() == pytest.approx([1e-3] * 8)


def test_p1_target_is_affine_in_w_and_told_as_drawn():
    """D^w - D_c = (w - 1)(D_c - D_u), whose second difference in w is zero; w = 0 is D_u."""
    objective, one = make((0.0, 8.0))
    next(objective.step(one, 0))
    x_t, t, cond = objective.student.seen
    w = cond["guidance"]
    assert w.min() >= 0 and w.max() <= 8 and w.std() > 1.5
    teacher = objective.teacher
    D = [teacher.guided(x_t, t, one.cond, one.uncond, torch.full_like(w, v)) for v in (0.0, 1.0, 2.0, 3.0)]
    torch.testing.assert_close(D[0], teacher(x_t, t, one.uncond))
    torch.testing.assert_close(D[1], teacher(x_t, t, one.cond))
    torch.testing.assert_close(D[3] - 2 * D[2] + D[1], torch.zeros_like(D[0]), atol=1e-6, rtol=0)
    drawn = teacher.guided(x_t, t, one.cond, one.uncond, w)
    torch.testing.assert_close(drawn - D[1], (w[:, None] - 1) * (D[1] - D[0]), rtol=1e-4, atol=1e-5)


def test_p1_w_taken_for_omega_moves_the_mean():
    """Negative check: given w - 1 where w is meant, every target is off by D_c - D_u."""
    objective, one = make((1.0, 8.0))
    next(objective.step(one, 0))
    x_t, t, cond = objective.student.seen
    w = cond["guidance"]
    right, wrong = (objective.teacher.guided(x_t, t, one.cond, one.uncond, v) for v in (w, w - 1))
    gap = objective.teacher(x_t, t, one.cond) - objective.teacher(x_t, t, one.uncond)
    torch.testing.assert_close(right - wrong, gap, rtol=1e-4, atol=1e-5)
    assert gap.abs().mean() > 0.1


def test_p1_prediction_kinds_commute_with_guidance():
    S, w = Flow(), 3.5
    x_t, c, u = torch.randn(3, 8, 2, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 8).double()
    for kind in ("eps", "v", "flow", "score"):
        out_c, out_u = (S.from_x0(kind, D, x_t, t) for D in (c, u))
        back = S.to_x0(kind, out_u + w * (out_c - out_u), x_t, t)
        torch.testing.assert_close(back, u + w * (c - u), rtol=1e-5, atol=1e-5)


def test_p2_one_network_for_a_range_of_w(tmp_path):
    """Samples at w = 1, 2, 4 match those of guided sampling with the exact teacher, at half its calls."""
    _, _, _, trainer = run_mixture(
        tmp_path,
        {"name": "guidance_distillation", "time": {"low": 0.0, "high": 1.0}},
        steps=700,
        num_steps=12,
        lr=2e-3,
        guidance=2.0,
        student={"sampler": "ode", "guidance_embedding": [1.0, 5.0]},
    )
    found, apart = distances_by_scale(trainer.cast, 12, (1.0, 2.0, 4.0))
    assert all(distance < apart / 5 for distance in found.values()), (found, apart)


def test_p1_step_on_trajectories_is_the_formula():
    """The same error at states of the guided sampler, without data."""
    world = World(GuidanceDistillation, trajectory_steps=4, weighting="native")
    world.batch.x0 = None
    (turn,), (call,) = world.turns(), world.student.calls
    grid = torch.tensor(world.schedule.teacher_times(4), dtype=torch.float64)
    assert (call.t[:, None] - grid).abs().min(1).values.max() < 1e-9
    target = world.guided(call.x_t, call.t, 3.0)
    wanted = at_x(lambda D: (world.native(call.t)[:, None] * (D - target) ** 2).mean(), call.out)
    torch.testing.assert_close(gradient(turn.loss, call.out), wanted, rtol=1e-4, atol=1e-6)


def lora(tiny, guidance, **more):
    """(cast, objective) of a LoRA student on trajectories."""
    cfg = validate(
        {
            "teacher": {"path": str(tiny("sd")), "guidance": guidance},
            "student": {"kind": "lora", "lora": {"rank": 4}, "num_steps": 2, "sampler": "ode"},
            "objective": {"name": "guidance_distillation", "trajectory_steps": 2},
            "data": {"name": "fashion"},
            **more,
        }
    )
    cast = make_cast(cfg)
    objective = cast.stage(cfg.all_stages()[0], Rng(0))
    objective.prepare()
    return cast, objective


def test_p1_a_lora_needs_one_network_and_its_own_optimizer_state_alone(tiny):
    """Storage of one network; trained is sum r (in + out); the teacher is the network with the LoRA off."""
    cast, objective = lora(tiny, 4.0)
    named = dict(cast.teacher.backbone.named_parameters())
    base = {n: p for n, p in named.items() if "lora_" not in n}
    assert [b is cast.teacher.backbone for b in cast.backbones()] == [True]
    whole = sum(p.numel() for p in make_cast_alone(tiny).parameters())
    assert sum(p.numel() for p in base.values()) == whole
    sizes = {n: p for n, p in base.items() if ".base_layer.weight" in n}
    wanted = sum(4 * (p[0].numel() + len(p)) for p in sizes.values() if p.ndim == 2)
    convolutions = sum(4 * (p[0].numel() + len(p)) for p in sizes.values() if p.ndim == 4)
    trained = objective.players["student"].trainable()
    assert sum(p.numel() for p in trained.values()) == wanted + convolutions
    one, t = batch_for(cast), torch.full((2,), 300.0, dtype=torch.float64)
    with torch.no_grad():
        before = cast.parts["teacher"](one.noise, t, one.cond)
    for k in range(4):
        play(objective, one, k, check=True)
    with torch.no_grad():
        assert torch.equal(cast.parts["teacher"](one.noise, t, one.cond), before)
        assert not torch.equal(cast.student(one.noise, t, one.cond), before)


def make_cast_alone(tiny):
    from fastgen.networks.load import load_teacher

    return load_teacher(str(tiny("sd"))).backbone


def test_p1_a_lora_without_guidance_has_nothing_to_learn(tiny):
    """At w = 1 the target is what the LoRA starts as; the negative is w = 4."""
    found = {}
    for w in (1.0, 4.0):
        cast, objective = lora(tiny, w)
        loss, _ = next(objective.step(batch_for(cast), 0))
        found[w] = float(loss.detach())
    assert found[1.0] < 1e-12 and found[4.0] > 1e-6, found


def test_p4_guidance_in_one_lora(tiny, tmp_path):
    """load_lora_weights and guidance_scale 1: one call a step."""
    objective = {"name": "guidance_distillation", "trajectory_steps": 2}
    card_replay(tiny, tmp_path, objective, "sd", steps=2, kind="lora")


def test_p4_guidance_distillation(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "guidance_distillation"}, SHORT_TEACHER)
