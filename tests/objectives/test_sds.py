"""Score distillation sampling: its gradient in closed form, the loss trick, an exact scene, prompts."""

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import VP
from fastgen.objectives.sds import SDS, SDSConfig
from fastgen.threed.fields import FieldAsset
from fastgen.threed.gaussians import GaussianAsset
from fastgen.threed.solids import Solid
from tests.support.heavier import some_of
from tests.support.replay import replay
from tests.support.scenes import BLUE, RED, SceneTeacher, Solids, asset_student, fitted, psnr, role
from tests.support.spelled import NEAR, World, gradient
from tests.support.toys import AffineStudent, batch_of, gaussian_role, rng

SHORT: dict = {}
"""settings of the contract battery"""


def test_p1_step_is_the_formula():
    """sigma^2 (e^w - eps), its sum over a sample and its mean over the batch."""
    world = World(SDS, VP.scaled_linear(), time=NEAR)
    (student,) = world.turns()
    x, S = world.student.calls[0].out, world.schedule
    x_t, t = world.shown(world.teacher)
    world.within(t, NEAR)
    world.noise_in(x_t, t, x)
    estimate = S.from_x0("eps", world.guided(x_t, t), x_t, t)
    wanted = S.sigma(t)[:, None] ** 2 * (estimate - S.from_x0("eps", x, x_t, t)) / len(x)
    torch.testing.assert_close(gradient(student.loss, x), wanted.detach(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("k,high", [(9, 0.98), (10, 0.1)])
def test_p1_step_has_lower_times_late(k, high):
    cfg = {"time": {"low": 0.02, "high": 0.98}, "anneal": {"after": 10, "high": 0.1}}
    world = World(SDS, VP.scaled_linear(), num=64, **cfg)
    world.turns(k)
    _, t = world.shown(world.teacher)
    world.within(t, {"low": 0.02, "high": high})
    assert t.max() > 0.7 * high * 999


def draws(time=400 / 999, num=200_000):
    """(gradients [num] of the step in x, alpha, sigma) at x = 0.7 under the teacher N(-0.4, 0.3^2)."""
    S = VP.scaled_linear()
    cfg = SDSConfig(time={"low": time, "high": time + 1e-9}, omega="one")
    objective = SDS(
        cfg, {"student": AffineStudent(S, 0.7, 0.0), "teacher": gaussian_role(S, -0.4, 0.3)}, rng()
    )
    x = torch.full((num, 1), 0.7, dtype=torch.float64, requires_grad=True)
    objective.generate = lambda batch, last=None: x
    objective.rng.reset(0)
    noise = torch.zeros(num, 1, dtype=torch.float64)
    loss, _ = next(objective.step(batch_of(noise, noise), 0))
    (grad,) = torch.autograd.grad(loss, x)
    t = S.from_unit(torch.tensor([time], dtype=torch.float64))
    return grad[:, 0] * num, S.alpha(t), S.sigma(t)


def test_p1_mean_and_variance_in_closed_form():
    """E[e - eps] = alpha sigma (x0 - m) / V, Var = (alpha^2 s^2 / V)^2, V = alpha^2 s^2 + sigma^2."""
    g, a, s = draws()
    V = a**2 * 0.3**2 + s**2
    assert float(g.mean()) == pytest.approx(float(a * s * 1.1 / V), rel=2e-3)
    assert float(g.var()) == pytest.approx(float((a**2 * 0.3**2 / V) ** 2), rel=2e-2)


@pytest.mark.parametrize("kind,bound", some_of([("gaussians", 30.0), ("grid", 28.0)], [("gaussians", 30.0)]))
def test_p2_fits_an_exact_scene(kind, bound):
    """Per-camera Gaussian teachers of three blobs: renders of unseen views are theirs."""
    asset = GaussianAsset(100) if kind == "gaussians" else FieldAsset("grid", 24, samples=32)
    teacher = SceneTeacher(VP.scaled_linear())
    objective = SDS(SDSConfig(), {"student": asset_student([asset]), "teacher": role(teacher)}, rng())
    before = psnr(objective.student.backbone, teacher)
    after = psnr(fitted(objective, 120), teacher)
    assert before < 20 and after > bound, (before, after)


def test_p2_negative_swapped_prompts_lead_to_the_other_object():
    """The null condition of these batches is the other solid, so a swap of the two in the guidance shows."""
    teacher = SceneTeacher(VP.scaled_linear(), [Solids(Solid("sphere", colour)) for colour in (RED, BLUE)])
    found = {}
    for w in (1.0, 0.0):  # 0: the null condition alone, as after a swap at scale 1
        parts = {"student": asset_student([GaussianAsset(60)]), "teacher": role(teacher)}
        objective = SDS(SDSConfig(), parts, rng())
        objective.guidance = w
        net = fitted(objective, 50, batch=2, prompt=0)
        found[w] = psnr(net, teacher, prompt=0), psnr(net, teacher, prompt=1)
    assert found[1.0][0] > found[1.0][1] + 2 and found[0.0][1] > found[0.0][0] + 2, found


def test_regularisers_are_for_assets_alone():
    S = VP.scaled_linear()
    cfg = SDSConfig(asset={"sparsity": 1.0})
    with pytest.raises(UserError, match="objective.asset"):
        SDS(cfg, {"student": AffineStudent(S, 0, 1), "teacher": gaussian_role(S, 0, 1)}, rng())
    parts = {"student": asset_student([GaussianAsset(20)]), "teacher": role(SceneTeacher(S))}
    SDS(cfg, parts, rng())


def test_p4_sds(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "sds"})
