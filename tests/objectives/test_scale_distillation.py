"""Scale distillation: the tower identity of its targets, its step written out, an exact teacher reached."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastgen.config.run import validate
from fastgen.core.batch import MILDER
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import VP
from fastgen.networks.denoiser import Denoiser
from fastgen.objectives.scale_distillation import ScaleDistillation, ScaleDistillationConfig
from fastgen.roles.roles import Student, StudentSpec
from tests.support.replay import plainly
from tests.support.restorer import enlarging_run
from tests.support.toys import Spy, batch_of, fit, rng

SHORT = {"target": "data"}
"""shown one picture, as the networks of the battery are, a copy of the teacher is at its minimum"""
SHORT_DATA = {"degradation": {"factor": 2}}
ALPHA, SIGMA = 0.6, 0.8
MILD, STRONG = 0.5, 0.7
"""standard deviations of what is added to x0 for the teacher's picture, and to that for the student's"""


class Scalar(VP):
    """A schedule that is at (0.6, 0.8) whatever the time."""

    def alpha(self, t):
        return torch.full_like(torch.as_tensor(t, dtype=torch.float64), ALPHA)

    def sigma(self, t):
        return torch.full_like(torch.as_tensor(t, dtype=torch.float64), SIGMA)


class Linear(Denoiser):
    """D = a x_t + b c of the shown c."""

    prediction = "x0"

    def __init__(self, schedule, a, b):
        super().__init__()
        self.schedule = schedule
        self.a, self.b = (nn.Parameter(torch.tensor(float(v), dtype=torch.float64)) for v in (a, b))

    def forward(self, x_t, t, cond):
        return self.a * x_t + self.b * cond["shown"]

    raw = forward


def posterior(noise: float) -> tuple[float, float]:
    """a, b of E[x0 | x_t, x0 + noise] for x0 ~ N(0, 1) at (0.6, 0.8)."""
    precision = 1 + (ALPHA / SIGMA) ** 2 + 1 / noise**2
    return ALPHA / SIGMA**2 / precision, 1 / noise**2 / precision


def pair(num, generator=None, independent=False):
    """A batch of x0 ~ N(0, 1) with the two pictures of each."""
    draw = lambda: torch.randn(num, 1, dtype=torch.float64, generator=generator)  # noqa: E731
    x0, mild = draw(), draw()
    mild = x0 + MILD * mild
    strong = (x0 + MILD * draw() if independent else mild) + STRONG * draw()
    return batch_of(x0, cond={"shown": strong, f"{MILDER}shown": mild})


def make(a=0.0, b=0.0, schedule=None, times=None, **cfg):
    S = schedule or Scalar.scaled_linear()
    student = Student(Linear(S, a, b), None, StudentSpec(times or S.steps(1)))
    parts = {"student": student, "teacher": Spy(Linear(S, *posterior(MILD)).requires_grad_(False))}
    return ScaleDistillation(ScaleDistillationConfig(**cfg), parts, rng())


def regressed(objective, batch, monkeypatch):
    """Least squares of the step's own target on (x_t, c): coefficients, and what is left of its variance."""
    from fastgen.diffusion import losses

    seen = {}
    monkeypatch.setattr(losses, "denoising", lambda S, D, target, *a: seen.update(y=target) or D.sum())
    spy = Spy(objective.student.backbone)
    monkeypatch.setattr(objective, "student", spy)
    spy.times = objective.parts["student"].times
    next(objective.step(batch, 0))
    x = torch.cat([spy.seen[0][0], batch.cond["shown"]], 1)
    found = torch.linalg.lstsq(x, seen["y"]).solution
    return found[:, 0], float((seen["y"] - x @ found).var())


@pytest.mark.parametrize("target", ["teacher", "data"])
def test_p1_both_targets_have_the_same_minimiser(target, monkeypatch):
    """E[E[x0 | x_t, c'] | x_t, c] = E[x0 | x_t, c]; the teacher's scatters less by its posterior variance."""
    batch = pair(200_000, torch.Generator().manual_seed(1))
    found, left = regressed(make(target=target), batch, monkeypatch)
    strong = (MILD**2 + STRONG**2) ** 0.5
    assert found.tolist() == pytest.approx(posterior(strong), abs=5e-3)
    direct = 1 / (1 + (ALPHA / SIGMA) ** 2 + 1 / strong**2)
    of_teacher = 1 / (1 + (ALPHA / SIGMA) ** 2 + 1 / MILD**2)
    assert left == pytest.approx(direct - (of_teacher if target == "teacher" else 0), rel=0.02)


def test_p1_pictures_degraded_apart_break_the_identity(monkeypatch):
    batch = pair(200_000, torch.Generator().manual_seed(1), independent=True)
    found, _ = regressed(make(), batch, monkeypatch)
    assert (found - torch.tensor(posterior((MILD**2 + STRONG**2) ** 0.5))).abs().max() > 0.05


def test_p1_step_is_the_formula():
    """One x_t for both networks, the teacher beside the milder picture, the student beside its own."""
    objective, batch = make(0.3, 0.2), pair(16)
    objective.teacher.backbone.requires_grad_(True)
    loss, _ = next(objective.step(batch, 0))
    x_t, t, target = objective.teacher.seen[0]
    a, b = posterior(MILD)
    assert torch.allclose(target, a * x_t + b * batch.cond[f"{MILDER}shown"])
    assert loss.item() == pytest.approx(
        float((0.3 * x_t + 0.2 * batch.cond["shown"] - target).square().mean()), rel=1e-5
    )
    loss.backward()
    assert objective.teacher.backbone.a.grad is None, "the target is a constant"


def test_p1_shown_the_same_a_copy_of_the_teacher_is_at_its_minimum():
    objective = make(*posterior(MILD))
    batch = pair(8)
    batch.cond["shown"] = batch.cond[f"{MILDER}shown"]
    loss, _ = next(objective.step(batch, 0))
    loss.backward()
    assert loss.item() == 0 and all(p.grad.abs().max() == 0 for p in objective.student.backbone.parameters())
    assert float(next(objective.step(pair(8), 1))[0].detach()) > 1e-3  # negative: another picture


def test_p1_a_teacher_that_is_shown_the_original_gives_the_plain_loss():
    """Factor 1: what it says is x0 itself."""
    taught, plain = make(0.3, 0.2), make(0.3, 0.2, target="data")
    batch = pair(16)
    batch.cond[f"{MILDER}shown"] = batch.x0
    taught.teacher.backbone.a.data.fill_(0)
    taught.teacher.backbone.b.data.fill_(1)
    both = [float(next(o.step(batch, 0))[0].detach()) for o in (taught, plain)]
    assert both[0] == pytest.approx(both[1], rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_p1_share_of_the_last_time(share):
    S = VP.scaled_linear()
    objective = make(schedule=S, times=[S.from_unit(torch.tensor(0.8)).item()], last_time=share)
    next(objective.step(pair(4000), 0))
    t = objective.teacher.seen[0][1]
    at = (t == objective.student.times[0]).double().mean()
    assert float(at) == pytest.approx(share, abs=0.03)
    assert share == 1 or t[t != objective.student.times[0]].std() > 100  # the others over the whole schedule


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("named", ["auto", None])
def test_p1_weighting(kind, named):
    """(d output / dD)^2, of the network's own output where it is auto; x0 weighs nothing."""
    S, one, found = VP.scaled_linear(), torch.ones(1, 1, dtype=torch.float64), []
    t = torch.tensor([400.0], dtype=torch.float64)
    for weighting in ("x0", named or kind):
        objective = make(0.3, 0.2, schedule=S, last_time=0.0, weighting=weighting)
        objective.student.backbone.prediction = kind if named else "x0"
        objective.sample_t = lambda num, time: t.expand(num)
        found.append(float(next(objective.step(pair(8, torch.Generator().manual_seed(2)), 0))[0].detach()))
    slope = S.from_x0(kind, one, one, t) - S.from_x0(kind, 0 * one, one, t)
    assert found[1] / found[0] == pytest.approx(float(slope) ** 2, rel=1e-4)


def test_p2_one_step_learns_what_the_stronger_picture_tells():
    """At a time of almost no signal the best estimate is E[x0 | c] = c / (1 + s^2)."""
    S = VP.scaled_linear()
    a, b = 0.0, 1 / (1 + MILD**2)  # the teacher's, of its own picture
    objective = make(a, b, schedule=S, last_time=1.0)
    objective.teacher.backbone.a.data.fill_(a)
    objective.teacher.backbone.b.data.fill_(b)
    fit(objective, lambda r: pair(512), 250)
    learned = objective.student.backbone.b.item()
    assert learned == pytest.approx(1 / (1 + MILD**2 + STRONG**2), abs=0.02)
    assert abs(learned - b) > 0.1


# -- P4 and mistakes ---------------------------------------------------------------------------------------
def pix2pix_run(folder, *flags):
    """A few real steps from a tiny teacher that is shown a picture; the exit code and the export."""
    from tests.families.cases.unets import pix2pix_folder

    pix2pix_folder(folder / "teacher")
    settings = {"student": {"num_steps": 1}, "objective": {"name": "scale_distillation"}}
    return enlarging_run(folder, *flags, **settings)


PLAIN = """
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image
pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(".")
small = Image.open("small.png")
large = small.resize((16, 16), Image.Resampling.BICUBIC)
latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
call = {"output_type": "pt", "num_inference_steps": 1, "guidance_scale": 1.0}
images = pipe("", image=large, latents=latents, **call).images
"""


def test_p4_plain_diffusers_restores_the_same_picture(tmp_path, monkeypatch, capsys):
    from fastgen.cli.sample import main as sample

    done, export = pix2pix_run(tmp_path)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert done == 0 and {"psnr", "ssim"} <= set(results["student"]) and results["enlarged"]["psnr"] > 10
    assert "bicubic" in capsys.readouterr().out
    small = Image.linear_gradient("L").resize((4, 4)).convert("RGB")
    small.save(export / "small.png")
    pixels = plainly(PLAIN, export)[0]
    flags = ["--model", str(export), "--image", str(export / "small.png"), "--out", str(tmp_path / "out")]
    assert sample([*flags, "--scale", "4"]) == 0
    mine = torch.from_numpy(np.array(Image.open(next((tmp_path / "out").glob("0*.png")))))
    there = (pixels.permute(1, 2, 0) * 255).round()
    assert (there - mine).abs().max() <= 1


def test_a_scale_that_was_not_trained_is_refused(tmp_path, capsys):
    from fastgen.cli.sample import main as sample

    _, export = pix2pix_run(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "small.png")
    flags = ["--model", str(export), "--image", str(tmp_path / "small.png"), "--out", str(tmp_path / "out")]
    assert sample([*flags, "--scale", "2"]) == 2
    assert "--scale: found 2" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    assert sample(flags) == 2
    assert "enlarges 4 x 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({}, "data.degradation"),
        ({"degradation": {"factor": 2, "teacher_factor": 2}}, "data.degradation.teacher_factor"),
        ({"degradation": {"factor": 3}}, "data.degradation.factor"),
    ],
)
def test_mistakes_in_the_section(change, key):
    values = {"teacher": {"path": "x"}, "objective": {"name": "scale_distillation"}}
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        validate({**values, "data": {"name": "tinted", **change}})
