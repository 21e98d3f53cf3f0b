"""A SANA student in SANA-Sprint's form: the same class with times in [0, 1] and the guidance scale as inputs.

While it is trained it is a flow network beside its flow teacher. What is exported is the same network seen in
TrigFlow, which is what SanaSprintPipeline and SCMScheduler expect (arXiv 2503.09641, Sec. 3.1).
"""

from dataclasses import replace

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import Flow, Schedule
from fastgen.families.dit import SanaSprint
from fastgen.families.parts import rebuilt
from fastgen.networks.backbone import Backbone
from fastgen.networks.denoiser import Denoiser
from fastgen.networks.schedulers import schedule_of
from fastgen.networks.teacher import Teacher
from fastgen.networks.time_embedding import embedded, solve_embedder
from fastgen.roles.roles import Role, Student

UNIT_TIMES = 1e-3
"""`timestep_scale` of a network that sees 0..1 where SanaPipeline counts 0..1000"""
SCHEDULE = Flow(angles=True)
"""of such a student while it is trained: a flow whose few steps are those of SCMScheduler"""


def make_sprint(denoiser: Denoiser, schedule: Schedule) -> Backbone:
    """A SANA denoiser with times in [0, 1] and a guidance input, seen under `schedule` (see SCHEDULE). Its
    function of time is kept as closely as a bounded slope allows; the solved embedder is not trained, because
    steep ramps turn small steps into large ones.
    """
    family = denoiser.family
    sana = isinstance(denoiser, Backbone) and denoiser.family.name == "sana"
    if not isinstance(denoiser, Backbone) or not sana or not isinstance(denoiser.schedule, Flow):
        found = "a teacher of another kind" if family is None else f"a teacher of family {family.name}"
        raise UserError("student.sprint", found, "use a flow teacher of the SANA class, or set it to false")
    net = denoiser.net
    if net.config.timestep_scale != UNIT_TIMES:
        changed = rebuilt(net, timestep_scale=UNIT_TIMES)
        t = torch.linspace(0, 1, 4001, device=next(net.parameters()).device)
        solve_embedder(changed, denoiser.family, t, embedded(net, denoiser.family, 1000 * t))
        net = changed.eval()
    made = Backbone(net, denoiser.family, schedule, denoiser.prediction)
    made.second_time, made.fixed = denoiser.second_time, denoiser.fixed
    made.add_guidance()
    made.fix("time_embed.timestep_embedder")
    return made


def is_sprint(denoiser: Denoiser) -> bool:
    """Whether a denoiser was made so and is still seen as a flow."""
    return isinstance(denoiser.schedule, Flow) and denoiser.schedule.angles


def as_exported(teacher: Teacher, student: Student) -> tuple[Teacher, Student]:
    """(teacher, student) as an export shows them: a SANA-Sprint student in TrigFlow, others as they are."""
    flow, trained = student.schedule, student.backbone
    if not (isinstance(trained, Backbone) and isinstance(flow, Flow) and flow.angles):
        return teacher, student
    from diffusers import SCMScheduler

    scheduler = SCMScheduler(sigma_data=0.5)
    schedule, prediction = schedule_of(scheduler)
    network = Backbone(trained.net, SanaSprint(), schedule, prediction).eval()
    seen = student.with_network(Role(network, student.adapter, student.guidance))
    times = [_angle(flow, schedule, t) for t in student.times]
    return replace(teacher, backbone=network, scheduler=scheduler), seen.with_times(times)


def _angle(flow: Flow, trig: Schedule, t: float) -> float:
    """The angle of a flow level; those of SCMScheduler's own grid come out as it has them."""
    found = float(flow.map_to(trig, torch.tensor([t], dtype=torch.float64))[0])
    nearest: Tensor = torch.tensor([a for num in range(1, 9) for a in trig.steps(num)], dtype=torch.float64)
    best = float(nearest[(nearest - found).abs().argmin()])
    return best if abs(best - found) < 1e-9 else found
