"""Time embedders without ripples: the network stays, its derivative by time becomes what it looks like."""

import copy

import pytest
import torch

from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.diffusion.reparametrization import TrigView
from fastgen.networks.analytic import load_analytic
from fastgen.networks.codecs import TextCodec
from fastgen.networks.jvp import TangentConfig, tangent
from fastgen.networks.load import load_teacher
from fastgen.networks.time_embedding import smooth_time_embedding
from fastgen.roles.sana_sprint import SCHEDULE, make_sprint
from fastgen.training.assembly import make_cast

WIDE = TangentConfig(method="difference", step=0.03)
"""a derivative as seen from a distance: ripples average out"""


def sprint(backbone):
    return make_sprint(backbone, SCHEDULE)


def views(name, change):
    """F of a bundled teacher, F of its changed copy, and a point with its direction."""
    teacher = load_teacher(f"assets:teachers/{name}")
    teacher.backbone.requires_grad_(False)
    other = copy.deepcopy(teacher.backbone)
    other = change(other) or other
    text = isinstance(teacher.codec, TextCodec)
    cond = teacher.codec.prompts(["a red dress"] * 4) if text else teacher.codec.labels(torch.arange(4))
    view = TrigView(teacher.schedule, 1.0 if text else 0.5)
    before = view.velocity(lambda x, t: teacher.backbone(x, t, cond))
    with_w = cond | ({"guidance": torch.full((4,), 2.0)} if change is sprint else {})
    after = view.velocity(lambda x, t: other(x, t, with_w))
    t = torch.full((4,), 0.9, dtype=torch.float64)
    x0, eps = 0.8 * torch.randn(2, 4, *teacher.codec.shape)
    x = view.trig.noise(x0, eps, t)
    scale = float(t[0].cos() * t[0].sin())
    d = view.sigma_data * before(x, t)
    return before, after, (x, t), (scale * d, scale * torch.ones_like(t))


def relative(a, b):
    return float((a - b).norm() / b.norm())


CASES = [
    ("fashion", smooth_time_embedding),
    ("tinted-sd", smooth_time_embedding),
    ("tinted-sana", smooth_time_embedding),
    ("tinted-sana", sprint),
]


@pytest.mark.parametrize("name, change", CASES, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_the_function_stays_and_its_derivative_loses_the_ripple(name, change):
    before, after, at, along = views(name, change)
    assert relative(after(*at), before(*at)) < 0.03
    wide = tangent(before, at, along, WIDE)
    assert relative(tangent(before, at, along, TangentConfig()), wide) > 0.5, "the teacher has ripples"
    own = tangent(after, at, along, WIDE)
    assert relative(tangent(after, at, along, TangentConfig()), own) < 0.1
    assert relative(own, wide) < 0.7


def test_times_that_are_slow_already_stay_as_they_were():
    """EDM's ln(sigma) / 4 has no ripple to lose."""
    before, after, at, along = views("digits", smooth_time_embedding)
    assert relative(after(*at), before(*at)) < 1e-2
    exact = tangent(before, at, along, TangentConfig())
    assert relative(tangent(before, at, along, WIDE), exact) < 0.05
    assert relative(tangent(after, at, along, TangentConfig()), exact) < 0.05


def test_the_switch_changes_the_student_alone(tiny):
    values = {
        "teacher": {"path": str(tiny("flow"))},
        "objective": {"name": "scm"},
        "student": {"smooth_time": True},
        "data": {"name": "fashion"},
    }
    cast = make_cast(validate(values))
    teacher, student = (cast.parts[n].backbone.net for n in ("teacher", "student"))
    assert not torch.equal(teacher.time_embedding.linear_1.weight, student.time_embedding.linear_1.weight)
    assert torch.equal(teacher.conv_in.weight, student.conv_in.weight)
    learned = cast.parts["student"].trainable()
    assert learned and not any("time_embedding" in name for name in learned)  # training would undo it
    assert not student.time_embedding.linear_1.weight.requires_grad
    with pytest.raises(UserError, match=r"student.smooth_time: found true for an adapter"):
        validate({**values, "student": {"smooth_time": True, "kind": "lora"}})
    with pytest.raises(
        UserError,
        match="student.smooth_time: an analytic teacher has no sinusoidal time embedder.*set it to false",
    ):
        smooth_time_embedding(load_analytic("gmm2d-flow").backbone)
