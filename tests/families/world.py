"""A tiny teacher of one family and requests for it; what diffusers makes of the same, for comparison."""

import copy
import json
from types import SimpleNamespace

import diffusers
import torch

from fastgen.config.run import validate
from fastgen.core.batch import Batch
from fastgen.core.rng import Rng
from fastgen.diffusion.schedules import EDM, VP, LocalVP, TrigFlow
from fastgen.export.scheduler import SchedulerSetup, bind, scheduler_for
from fastgen.networks.codecs import PictureCodec, ScanCodec, TextCodec
from fastgen.networks.files import component_class
from fastgen.networks.load import load_teacher
from fastgen.roles.roles import Student, StudentSpec
from fastgen.training.cast import Cast
from tests.families.cases import CASES, PROMPTS

SHORT = {
    "dmd2": {"student_every": 1},
    "consistency": {"num_scales": 8},
    "sft": {},
}


class World:
    """One tiny teacher, loaded once, and requests for it. Tests copy what they change."""

    def __init__(self, name: str, folder):
        self.case, self.folder = CASES[name], folder
        self.case.build(folder)
        self.options = dict(self.case.options)
        self.teacher = load_teacher(str(folder), **self.options)
        free = self.teacher.backbone.family.has_size and self.case.images is None
        if free and hasattr(
            self.teacher.codec, "pixels"
        ):  # so that height and width cannot be mixed up unseen
            self.options["width"] = 2 * self.teacher.codec.pixels[1]
            self.teacher = load_teacher(str(folder), **self.options)
        self.backbone, self.codec = self.teacher.backbone, self.teacher.codec
        self.family, self.schedule = self.backbone.family, self.backbone.schedule
        generator = torch.Generator().manual_seed(3)
        self.noise, self.x0 = torch.randn(2, 2, *self.codec.shape, generator=generator)
        self.images = self.case.images() if self.case.images else None
        self.cond, self.uncond = self.conditions(PROMPTS), self.null()

    def conditions(self, prompts):
        if isinstance(self.codec, TextCodec):
            return self.codec.prompts(prompts, self.images)
        if isinstance(self.codec, PictureCodec):
            return self.codec.image_rows(self.images)[0]
        if isinstance(self.codec, ScanCodec):
            return self.codec.scans(self.scans(len(prompts)))
        return self.codec.labels(torch.arange(len(prompts)) % max(self.codec.num_classes, 1))

    def scans(self, num):
        generator = torch.Generator().manual_seed(4)
        return 2 * torch.randn(num, self.codec.scan_points, 3, generator=generator)

    def null(self):
        if isinstance(self.codec, PictureCodec):
            return self.codec.image_rows(self.images)[1]
        if isinstance(self.codec, ScanCodec):
            return self.codec.untold(self.scans(2))
        return self.codec.null(2, self.images) if isinstance(self.codec, TextCodec) else self.codec.null(2)

    def seen(self, x0):
        return x0 if self.case.latent else self.codec.decode(x0)

    def batch(self):
        return Batch(self.x0, self.cond, self.uncond, self.noise, torch.arange(2))

    def times(self, num: int = 5):
        """Interior times [num] of the schedule."""
        return self.schedule.from_unit(torch.linspace(0.1, 0.95, num, dtype=torch.float64))

    def level(self, u: float = 0.5):
        return self.schedule.from_unit(torch.full((2,), u, dtype=torch.float64))

    def cast(self, objective: str, kind: str = "full", **student):
        """(cast, objective) over a copy of this teacher."""
        more = {} if objective != "sft" or self.codec.has_null else {"cond_dropout": 0.0}
        cfg = validate(
            {
                "teacher": {"path": str(self.folder), **self.options},
                "student": {"kind": kind, "lora": {"rank": 2, "lora_alpha": 3}, **student},
                "critic": {"lora": {"rank": 2}},
                "objective": {"name": objective, **SHORT.get(objective, {}), **more},
                "data": {"name": "fashion"},
            }
        )
        cast = _Cast(self.teacher, cfg)
        method = cast.stage(cfg.all_stages()[0], Rng(0))
        method.prepare()
        return cast, method

    def trainer(self, kind: str, num_steps: int, sampler: str = "ode"):
        """What the exporter reads of a trainer, its student moved well away from the teacher."""
        cast, _ = self.cast("sft", kind, num_steps=num_steps, sampler=sampler)
        move(cast.parts["student"])
        cast.stages = validate(
            {"objective": {"name": "dmd2", "gan_weight": 0.0}, "data": {"name": ""}}
        ).all_stages()
        return SimpleNamespace(
            cast=cast, train_cfg=cast.train_cfg, step=5, example="", enlarges=0, folder=self.folder
        )


class _Cast(Cast):
    """A cast over a teacher in memory, not read from its folder again."""

    def __init__(self, given, cfg):
        self._given = given
        super().__init__(cfg.teacher, cfg.student, cfg.critic, cfg.train, cfg.all_stages())

    def _load(self, null):
        given = copy.copy(self._given)
        given.backbone = copy.deepcopy(given.backbone)
        return given


@torch.no_grad()
def move(role, std: float = 0.02) -> None:
    """Change a role's weights as training would: every one of them, visibly."""
    generator = torch.Generator().manual_seed(9)
    for name, parameter in role.trainable().items():
        if role.adapter is None or "lora_B" in name:
            scale = std if role.adapter is None else 0.2
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def scheduler_x0(scheduler, out, x_t, t, schedule):
    """pred_original_sample of the diffusers scheduler that belongs to a schedule, for one time."""
    settings = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    if isinstance(schedule, LocalVP):
        euler = scheduler_for([float(t)], "ode", schedule, scheduler).scheduler
        euler.set_timesteps(timesteps=[int(t)])
        return euler.step(out, euler.timesteps[0], x_t).pred_original_sample
    if isinstance(schedule, VP):
        known = {k: settings[k] for k in ("prediction_type", "num_train_timesteps")}
        ddim = diffusers.DDIMScheduler(**known, clip_sample=False)
        ddim.alphas_cumprod = scheduler.alphas_cumprod  # some classes make them as no other can
        ddim.set_timesteps(ddim.config.num_train_timesteps)
        return ddim.step(out, int(t), x_t).pred_original_sample
    if isinstance(schedule, TrigFlow):
        scm = diffusers.SCMScheduler.from_config(scheduler.config)
        scm.set_timesteps(1, timesteps=[float(t), 0.0], max_timesteps=None, intermediate_timesteps=None)
        return scm.step(out, scm.timesteps[0], x_t).pred_original_sample
    clip = {"clip_denoised": False} if "clip_denoised" in scheduler.config else {}
    one = type(scheduler).from_config(scheduler.config, **clip)
    if isinstance(schedule, EDM):
        if hasattr(one, "precondition_outputs"):
            return one.precondition_outputs(x_t, out, t)
        if one.config.get("timestep_type") == "continuous":
            out = -out  # its v has the other sign than EDM's network
        one.set_timesteps(2)
        one.sigmas = torch.tensor([float(t), 0.0])  # a single step, which ends at the estimate
        one.timesteps = one.timesteps[:1]
        if hasattr(one, "sigma_to_t"):
            return one.step(out, one.timesteps[0], x_t).prev_sample
        return one.step(out, one.timesteps[0], x_t).pred_original_sample
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    euler.set_timesteps(sigmas=[float(t)])
    return euler.step(out, euler.timesteps[0], x_t).prev_sample


def pipeline_class(folder):
    index = json.loads((folder / "model_index.json").read_text())
    return getattr(diffusers, index["_class_name"])


def open_pipeline(folder, **parts):
    index = json.loads((folder / "model_index.json").read_text())
    if not index["_class_name"]:  # no pipeline draws with it
        unet = component_class(folder / "unet").from_pretrained(folder, subfolder="unet")
        scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder, subfolder="scheduler")
        return SimpleNamespace(unet=unet.eval(), scheduler=scheduler, config=index)
    pipe = pipeline_class(folder).from_pretrained(folder, **{"torch_dtype": torch.float32, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def network_of(world, pipe):
    """The denoiser inside a pipeline, as the family puts it together."""
    names = world.family.parts(world.backbone.net)
    return world.family.assemble({n: getattr(pipe, n) for n in names}, dict(pipe.config)).eval()


def draws():
    """The noise between steps, as a pipeline given this seed draws it."""
    generator = torch.Generator().manual_seed(7)
    return lambda x: torch.randn(x.shape, generator=generator)


def plain_call(world, pipe, info, noise):
    """Images in [0, 1] by a pipeline call that any user could write."""
    family, codec = world.family, world.codec
    call = {"num_inference_steps": info["steps"]}
    if info["set_on_scheduler"]:
        bind(pipe.scheduler, info["timestep_arguments"])
    elif info["timestep_arguments"]:
        call = dict(info["timestep_arguments"])
    height, width = codec.pixels
    guidance = family.guidance_call(codec.guidance)
    document = (
        json.loads((world.folder / "fastgen.json").read_text())
        if (world.folder / "fastgen.json").exists()
        else {}
    )
    call |= {"height": height, "width": width, **guidance, **family.plain_call(document), **world.case.call}
    latents = family.pipeline_latents(noise, world.schedule)
    given = {"latents": latents, "output_type": "pt", "generator": torch.Generator().manual_seed(7)}
    found = pipe(prompt=list(PROMPTS), **given, **call)
    return found[0]


def label_loop(world, pipe, info, noise):
    """UNet2DModel: the loop that its pipelines lack."""
    scheduler, net = pipe.scheduler, pipe.unet.eval()
    labels = world.cond.get("class_labels")
    edm = isinstance(world.schedule, EDM)
    x = noise * (world.schedule.prior_std(info["times"][0]))
    SchedulerSetup(scheduler, info["timestep_arguments"]).set_timesteps(info["steps"])
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if edm else x
        x = scheduler.step(net(scaled, t, class_labels=labels).sample, t, x).prev_sample
    return world.codec.decode(x)


@torch.no_grad()
def untrained(world, student):
    return Student(world.backbone, None, StudentSpec(student.times, student.sampler)).generate(
        world.noise, world.cond, draws()
    )
