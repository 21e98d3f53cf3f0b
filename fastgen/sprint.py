"""A SANA student in SANA-Sprint's form: the same class with times in [0, 1] and the guidance scale as inputs.

While it is trained it is a flow network beside its flow teacher. What is shipped is the same network seen in
TrigFlow, which is what SanaSprintPipeline and SCMScheduler expect (arXiv 2503.09641, Sec. 3.1).
"""

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastgen.backbones import Teacher
from fastgen.backbones.base import Backbone
from fastgen.backbones.dit import SanaSprint
from fastgen.backbones.parts import rebuilt
from fastgen.backbones.schedulers import schedule_of
from fastgen.errors import UserError
from fastgen.roles import Student
from fastgen.schedules import Flow

UNIT_TIMES = 1e-3
"""`timestep_scale` of a network that sees 0..1 where SanaPipeline counts 0..1000"""


def make_sprint(backbone: nn.Module) -> None:
    """Give a SANA denoiser times in [0, 1] and a guidance input, keeping its function of time as closely as a
    bounded slope allows.
    """
    family = getattr(backbone, "family", None)
    if family is None or family.name != "sana" or not isinstance(backbone.schedule, Flow):
        found = "a teacher of another kind" if family is None else f"a teacher of family {family.name}"
        raise UserError("student.sprint", found, "a flow teacher of the SANA class")
    net = backbone.net
    if net.config.timestep_scale != UNIT_TIMES:
        changed = rebuilt(net, timestep_scale=UNIT_TIMES)
        _solve_embedder(changed.time_embed.emb, net.time_embed.emb)
        backbone.net = changed.eval()
    backbone.add_guidance()
    backbone.schedule = Flow(angles=True)


@torch.no_grad()
def _solve_embedder(new: nn.Module, old: nn.Module, slope: float = 40.0, points: int = 4001) -> None:
    """Set the time embedder of times in [0, 1] to the old one's values at 0..1000.

    Sinusoids of a time in [0, 1] hold only sin t and cos t to any accuracy. The first layer becomes random
    ramps of bounded slope in sin t, the second is solved for by least squares.
    """
    mlp, device = new.timestep_embedder, next(new.parameters()).device
    if device.type == "meta":
        return
    t = torch.linspace(0, 1, points, device=device)
    wanted = old.timestep_embedder(old.time_proj(1000 * t)).double()
    waves = new.time_proj(t)
    sine = int((waves - t.sin()[:, None]).abs().sum(0).argmin())
    width = mlp.linear_1.out_features
    draws = torch.rand(3, width, generator=torch.Generator().manual_seed(0)).to(device)
    ramp = slope * (0.25 + draws[0]) * torch.where(draws[1] < 0.5, -1.0, 1.0)
    knots = (1.1 * draws[2] - 0.05) * math.sin(1.0)
    mlp.linear_1.weight.zero_()
    mlp.linear_1.weight[:, sine] = ramp
    mlp.linear_1.bias.copy_(-ramp * knots)
    hidden = mlp.act(mlp.linear_1(waves)).double()
    hidden = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)
    damped = hidden.T @ hidden + 1e-6 * points * torch.eye(width + 1, device=device, dtype=torch.float64)
    solution = torch.linalg.solve(damped, hidden.T @ wanted)
    mlp.linear_2.weight.copy_(solution[:-1].T)
    mlp.linear_2.bias.copy_(solution[-1])


def is_sprint(backbone: nn.Module) -> bool:
    """Whether a denoiser was made so and is still seen as a flow."""
    return getattr(backbone.schedule, "angles", False)


def shipped(teacher: Teacher, student: Student) -> tuple[Teacher, Student]:
    """(teacher, student) as an export shows them: a SANA-Sprint student in TrigFlow, others as they are."""
    if not is_sprint(student.backbone):
        return teacher, student
    from diffusers import SCMScheduler

    scheduler = SCMScheduler(sigma_data=0.5)
    schedule, prediction = schedule_of(scheduler)
    seen = Backbone(student.backbone.net, SanaSprint(), schedule, prediction).eval()
    other = copy.copy(student)
    other.backbone, other.times = seen, [_angle(student.schedule, schedule, t) for t in student.times]
    return replace(teacher, backbone=seen, scheduler=scheduler), other


def _angle(flow: Flow, trig, t: float) -> float:
    """The angle of a flow level; those of SCMScheduler's own grid come out as it has them."""
    found = float(flow.map_to(trig, torch.tensor([t], dtype=torch.float64))[0])
    nearest: Tensor = torch.tensor([a for num in range(1, 9) for a in trig.steps(num)], dtype=torch.float64)
    best = float(nearest[(nearest - found).abs().argmin()])
    return best if abs(best - found) < 1e-9 else found
