"""A SANA student in SANA-Sprint's form: the same class with times in [0, 1] and the guidance scale as inputs.

While it is trained it is a flow network beside its flow teacher. What is shipped is the same network seen in
TrigFlow, which is what SanaSprintPipeline and SCMScheduler expect (arXiv 2503.09641, Sec. 3.1).
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import Flow
from fastgen.families.dit import SanaSprint
from fastgen.families.parts import rebuilt
from fastgen.networks.backbone import Backbone
from fastgen.networks.schedulers import schedule_of
from fastgen.networks.teacher import Teacher
from fastgen.networks.time_embedding import embedded, solve_embedder
from fastgen.roles.roles import Student

UNIT_TIMES = 1e-3
"""`timestep_scale` of a network that sees 0..1 where SanaPipeline counts 0..1000"""


def make_sprint(backbone: nn.Module) -> None:
    """Give a SANA denoiser times in [0, 1] and a guidance input, keeping its function of time as closely as a
    bounded slope allows. The solved embedder is not trained: steep ramps turn small steps into large ones.
    """
    family = getattr(backbone, "family", None)
    if family is None or family.name != "sana" or not isinstance(backbone.schedule, Flow):
        found = "a teacher of another kind" if family is None else f"a teacher of family {family.name}"
        raise UserError("student.sprint", found, "a flow teacher of the SANA class")
    net = backbone.net
    if net.config.timestep_scale != UNIT_TIMES:
        changed = rebuilt(net, timestep_scale=UNIT_TIMES)
        t = torch.linspace(0, 1, 4001, device=next(net.parameters()).device)
        solve_embedder(changed, backbone.family, t, embedded(net, backbone.family, 1000 * t))
        backbone.net = changed.eval()
    backbone.add_guidance()
    backbone.fix("time_embed.timestep_embedder")
    backbone.schedule = Flow(angles=True)


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
