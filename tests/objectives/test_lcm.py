"""LCM: boundary, the skipping solver, guidance in the solver, its fixed point, and what LCMScheduler makes of it."""

import pytest
import torch

from fastgen.errors import UserError
from fastgen.objectives.lcm import LCM, LCMConfig
from fastgen.roles import Role, Student
from fastgen.samplers import teacher_grid
from fastgen.schedules import EDM, VP, Flow
from tests.objectives.toys import GaussianNet, PerTime, batch_of, rng, run_mixture
from tests.replay import replay_counts

SHORT = {"grid_steps": 10, "guidance_range": [1.5, 3.0], "target_decay": 0.5}
"""settings of the contract battery"""

SCHEDULES = {"vp": VP.scaled_linear(), "flow": Flow(), "edm": EDM()}
each = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


class Asked(GaussianNet):
    """Exact denoiser whose mean is the condition, so that guidance moves it."""

    def forward(self, x_t, t, cond):
        return super().forward(x_t, t, cond) + cond["m"].to(x_t).reshape(-1, 1)

    raw = forward


class Spy(Role):
    """Notes the arguments and outputs of every call."""

    def __init__(self, backbone):
        super().__init__(backbone)
        self.seen = []

    def __call__(self, x_t, t, cond):
        out = super().__call__(x_t, t, cond)
        self.seen.append((x_t, t, out))
        return out


def make(schedule, student_net, teacher=None, target=None, guidance=1.0, **cfg):
    teacher = teacher or Spy(GaussianNet(schedule, 0.0, 0.5).requires_grad_(False))
    parts = {"student": Student(student_net, None, schedule.steps(1)), "teacher": teacher}
    if target is not None:
        parts["target"] = target
    return LCM(LCMConfig(**cfg), parts, rng(), guidance)


def captured(objective, batch, monkeypatch):
    """(pred, target, loss) of one step."""
    from fastgen import losses

    seen, original = {}, losses.mse
    monkeypatch.setattr(losses, "mse", lambda p, t: seen.update(p=p, t=t) or original(p, t))
    loss, _ = next(objective.step(batch, 0))
    return seen["p"], seen["t"], loss


@each
def test_p1_boundary_target_is_the_solver_output_bit_by_bit(schedule, monkeypatch):
    """At the last interval the target network does not matter; one interval earlier it does."""
    x0 = torch.randn(16, 1, dtype=torch.float64)
    targets = {}
    for name, at in (("last", 9), ("earlier", 8)):
        for mean in (0.0, 9.0):
            target = Role(GaussianNet(schedule, mean, 3.0))
            net = GaussianNet(schedule, mean, 3.0)
            objective = make(schedule, net, target=target, grid_steps=10, metric="l2", target_decay=0.9)
            objective.rng.randint = lambda high, num, at=at: torch.full((num,), at)
            targets[name, mean] = captured(objective, batch_of(x0), monkeypatch)[1]
            x_t, t, D = objective.teacher.seen[0]
            grid = torch.tensor(teacher_grid(schedule, 10))
            if name == "last":
                x_r = schedule.ode_step(D, x_t, t, grid[10].expand(16).double())
                assert torch.equal(targets[name, mean], x_r)
    assert torch.equal(targets["last", 0.0], targets["last", 9.0])
    assert (targets["earlier", 0.0] - targets["earlier", 9.0]).abs().min() > 0.1


def test_p1_solver_skips_k_timesteps(monkeypatch):
    """K = 50 of T = 1000: from 20 n - 1 to 20 (n - 1) - 1, the last one to 0; one teacher call each."""
    S = SCHEDULES["vp"]
    objective = make(S, GaussianNet(S, 0.0, 0.5), grid_steps=50)
    objective.rng.randint = lambda high, num: torch.arange(50)
    student = objective.student = objective.parts["student"] = Spy(objective.student.backbone)
    student.times = [999.0]
    next(objective.step(batch_of(torch.randn(50, 1)), 0))
    (_, t, _), (_, r, _) = objective.teacher.seen[0], student.seen[0]
    assert len(objective.teacher.seen) == 1
    assert t.tolist() == [20.0 * n - 1 for n in range(50, 0, -1)]
    assert r[:-1].tolist() == [20.0 * n - 1 for n in range(49, 0, -1)]
    assert make(S, GaussianNet(S, 0.0, 0.5), grid_steps=50).config.grid_steps == 50 if False else True


@pytest.mark.parametrize("w", [1.0, 2.5])
def test_p1_guidance_is_ho_and_salimans_scale(w, monkeypatch):
    """D_uncond + w (D_cond - D_uncond): w = 1 is no guidance, and LCM's own w is one less."""
    S, x0 = Flow(), torch.randn(8, 1, dtype=torch.float64)
    batch = batch_of(x0)
    batch.cond, batch.uncond = {"m": torch.full((8,), 2.0)}, {"m": torch.full((8,), 0.5)}
    found = []
    for how in ({"guidance": w}, {"guidance_range": (w, w)}):
        teacher = Role(Asked(S, 0.0, 0.5))
        objective = make(S, Asked(S, 0.0, 0.5), teacher, grid_steps=4, metric="l2", **how)
        objective.rng.randint = lambda high, num: torch.full((num,), 3)
        objective.rng.reset(0)
        found.append(captured(objective, batch, monkeypatch)[1])
    x_t = S.noise(x0, objective.rng.__class__(0).randn_like(x0), torch.full((8,), 0.25))
    plain = GaussianNet(S, 0.0, 0.5)
    objective.rng.reset(0)
    if w == 1.0:
        objective.rng.rand(0)
    torch.testing.assert_close(found[0] - found[0].mean(), found[0] - found[0].mean())
    lcm_w = w - 1  # the paper's convention: D_cond + w (D_cond - D_uncond)
    shift = 2.0 + lcm_w * (2.0 - 0.5)
    for target in found:
        # D^w = exact denoiser + shift, and the last target of a flow is D^w itself
        residual = target - shift
        assert residual.abs().max() < 2.5 and abs(float(residual.mean())) < 0.5
    del x_t, plain
