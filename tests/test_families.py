"""One battery over every family: what each declaration promises, at tiny size, against diffusers itself."""

import copy
import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

from fastgen import config, lora
from fastgen.backbones import FAMILIES, load_teacher
from fastgen.backbones.attention import exact_attention
from fastgen.build import Cast
from fastgen.export import export_student, load_export
from fastgen.objectives.base import Batch
from fastgen.rng import Rng
from fastgen.schedules import EDM, VP, TrigFlow
from tests.families import CASES, PROMPTS

each = pytest.mark.parametrize("name", sorted(CASES))
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
        self.teacher = load_teacher(str(folder), **self.case.asked)
        self.backbone, self.codec = self.teacher.backbone, self.teacher.codec
        self.family, self.schedule = self.backbone.family, self.backbone.schedule
        generator = torch.Generator().manual_seed(3)
        self.noise, self.x0 = torch.randn(2, 2, *self.codec.shape, generator=generator)
        self.images = self.case.images() if self.case.images else None
        self.cond, self.uncond = self.asked(PROMPTS), self.null()

    def asked(self, prompts):
        if hasattr(self.codec, "prompts"):
            return self.codec.prompts(prompts, self.images)
        return self.codec.labels(torch.arange(len(prompts)) % max(self.codec.num_classes, 1))

    def null(self):
        return self.codec.null(2, self.images) if hasattr(self.codec, "prompts") else self.codec.null(2)

    def batch(self):
        return Batch(self.x0, self.cond, self.uncond, self.noise, torch.arange(2))

    def times(self, num: int = 5):
        """Interior times [num] of the schedule."""
        return self.schedule.from_unit(torch.linspace(0.1, 0.95, num, dtype=torch.float64))

    def level(self, u: float = 0.5):
        return self.schedule.from_unit(torch.full((2,), u, dtype=torch.float64))

    def cast(self, objective: str, kind: str = "full", **student):
        """(cast, objective) over a copy of this teacher."""
        cfg = config.validate(
            {
                "teacher": {"path": str(self.folder), **self.case.asked},
                "student": {"kind": kind, "lora": {"rank": 2, "lora_alpha": 3}, **student},
                "critic": {"lora": {"rank": 2}},
                "objective": {"name": objective, **SHORT[objective]},
                "data": {"name": "fashion"},
            }
        )
        cast = _Cast(cfg, self.teacher)
        method = cast.stage(cfg.all_stages()[0], Rng(0))
        method.prepare()
        return cast, method

    def trainer(self, kind: str, num_steps: int, sampler: str = "ode"):
        """What the exporter reads of a trainer, its student moved well away from the teacher."""
        cast, _ = self.cast("sft", kind, num_steps=num_steps, sampler=sampler)
        move(cast.parts["student"])
        cfg = cast.cfg.model_copy(
            update={
                "objective": config.validate(
                    {"objective": {"name": "dmd2", "gan_weight": 0.0}, "data": {"name": ""}}
                ).objective
            }
        )
        return SimpleNamespace(cast=cast, cfg=cfg, step=5, folder=self.folder)


class _Cast(Cast):
    """A cast over a teacher in memory, not read from its folder again."""

    def __init__(self, cfg, teacher):
        self._given = teacher
        super().__init__(cfg)

    def _load(self):
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


_WORLDS: dict[str, World] = {}


@pytest.fixture
def world(name, tmp_path_factory):
    if name not in _WORLDS:
        _WORLDS[name] = World(name, tmp_path_factory.mktemp(name) / "teacher")
    return _WORLDS[name]


def excuse(world, check: str) -> None:
    if check in world.case.excused:
        pytest.skip(world.case.excused[check])


# -- the network as a denoiser ------------------------------------------------------------------------------
def scheduler_x0(scheduler, out, x_t, t, schedule):
    """pred_original_sample of the diffusers scheduler that belongs to a schedule, for one time."""
    settings = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    if isinstance(schedule, VP):
        kept = {
            k: v
            for k, v in settings.items()
            if k.startswith("beta")
            or k in ("prediction_type", "trained_betas", "num_train_timesteps", "rescale_betas_zero_snr")
        }
        ddim = diffusers.DDIMScheduler(**kept, clip_sample=False)
        ddim.set_timesteps(ddim.config.num_train_timesteps)
        return ddim.step(out, int(t), x_t).pred_original_sample
    if isinstance(schedule, TrigFlow):
        scm = diffusers.SCMScheduler.from_config(scheduler.config)
        scm.set_timesteps(1, timesteps=[float(t), 0.0], max_timesteps=None, intermediate_timesteps=None)
        return scm.step(out, scm.timesteps[0], x_t).pred_original_sample
    one = type(scheduler).from_config(scheduler.config)
    if isinstance(schedule, EDM):
        if hasattr(one, "precondition_outputs"):
            return one.precondition_outputs(x_t, out, t)
        one.set_timesteps(2)
        one.sigmas = torch.tensor([float(t), 0.0])  # a single step, which ends at the estimate
        one.timesteps = one.timesteps[:1]
        if hasattr(one, "sigma_to_t"):
            return one.step(out, one.timesteps[0], x_t).prev_sample
        return one.step(out, one.timesteps[0], x_t).pred_original_sample
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    euler.set_timesteps(sigmas=[float(t)])
    return euler.step(out, euler.timesteps[0], x_t).prev_sample


@each
def test_x0_is_the_schedulers(world):
    """D from the network equals the scheduler's own pred_original_sample at five times."""
    for t in world.times():
        t2 = t.expand(2)
        x_t = world.schedule.noise(world.x0, world.noise, t2)
        with torch.no_grad():
            D = world.backbone(x_t, t2, world.cond)
            out = world.backbone.raw(x_t, t2, world.cond)
        theirs = scheduler_x0(world.teacher.scheduler, out, x_t, t, world.schedule)
        torch.testing.assert_close(D, theirs, rtol=1e-5, atol=1e-5)
        assert D.abs().max() > 1e-3 and out.abs().max() > 1e-4, "the tiny network is dead: perturb its zeros"


@each
def test_guidance_ends(world):
    """w = 1 is the conditional estimate, w = 0 the unconditional one, and the two differ."""
    from fastgen.roles import Role

    role, t = Role(world.backbone), world.level()
    x_t = world.schedule.noise(world.x0, world.noise, t)
    ones = torch.ones(2)
    with torch.no_grad():
        D, D_null = role(x_t, t, world.cond), role(x_t, t, world.uncond)
        torch.testing.assert_close(
            role.guided(x_t, t, world.cond, world.uncond, ones), D, rtol=1e-5, atol=1e-5
        )
        zero = role.guided(x_t, t, world.cond, world.uncond, 0 * ones)
        torch.testing.assert_close(zero, D_null, rtol=1e-5, atol=1e-5)
    excuse(world, "guidance")
    assert (D - D_null).abs().max() > 1e-6


def gradients(world, checkpointing: bool):
    """(gradient of x, gradients by name) of one pass through a copy of the network."""
    backbone = copy.deepcopy(world.backbone).requires_grad_(True)
    if checkpointing:
        backbone.enable_gradient_checkpointing()
    t = world.level()
    x_t = world.schedule.noise(world.x0, world.noise, t).requires_grad_(True)
    (backbone(x_t, t, world.cond) * world.noise).sum().backward()
    return x_t.grad, {n: p.grad for n, p in backbone.net.named_parameters()}


@each
def test_gradient_reaches_everything(world):
    """x and every parameter, but for the exceptions that the family documents."""
    to_x, to_weights = gradients(world, False)
    assert to_x is not None and torch.isfinite(to_x).all() and to_x.abs().max() > 0
    dead = {n for n, g in to_weights.items() if g is None or not g.any()}
    told = {n for n in to_weights if world.family.is_unreached(n, world.backbone.net)}
    assert dead == told, (sorted(dead - told)[:8], sorted(told - dead)[:8])


@each
def test_checkpointed_gradients_are_the_plain_ones(world):
    excuse(world, "checkpointing")
    plain, recomputed = gradients(world, False), gradients(world, True)
    torch.testing.assert_close(recomputed[0], plain[0], rtol=1e-4, atol=1e-6)
    for key, gradient in plain[1].items():
        if gradient is not None:
            torch.testing.assert_close(recomputed[1][key], gradient, rtol=1e-4, atol=1e-6)


@each
def test_features_have_the_declared_shapes(world):
    taps = tuple(range(len(world.family.taps(world.backbone.net))))
    channels = world.family.feature_channels(world.backbone.net)
    t = world.level()
    with torch.no_grad():
        maps, D = world.backbone.features(world.noise, t, world.cond, taps=taps, score=True)
        alone, _ = world.backbone.features(
            world.noise, t, world.cond, world.family.default_taps(world.backbone.net)
        )
        torch.testing.assert_close(D, world.backbone(world.noise, t, world.cond))
    assert [m.shape[1] for m in maps] == channels
    assert all(m.ndim == 4 and len(m) == 2 for m in maps)
    default = [range(len(taps))[i] for i in world.family.default_taps(world.backbone.net)]
    for one, index in zip(alone, default):
        torch.testing.assert_close(one, maps[index])


@each
def test_tangent_against_central_differences(world):
    """Forward-mode derivative of the network along (x, time), under the math attention kernel."""
    excuse(world, "jvp")
    net = copy.deepcopy(world.backbone.net).double()
    cond = {k: v.double() if v.is_floating_point() else v for k, v in world.cond.items()}
    time = world.backbone.net_time(world.level()).double()
    h = {"t1000": 0.1, "unit": 1e-4, "reversed": 1e-4}[world.family.flow_time]
    h = 1e-4 * max(1.0, world.family.edm_time) if isinstance(world.schedule, EDM) else h
    dx, dt = 1e-3 / h * world.noise.double(), torch.ones(2, dtype=torch.float64)

    def f(x, s):
        return world.family.call(net, x, s, cond)

    with torch.no_grad(), exact_attention():
        _, tangent = torch.func.jvp(f, (world.x0.double(), time), (dx, dt))
        x = world.x0.double()
        central = (f(x + h * dx, time + h * dt) - f(x - h * dx, time - h * dt)) / (2 * h)
    error = (tangent - central).norm() / central.norm()
    assert error < 5e-3, float(error)


# -- roles and objectives -----------------------------------------------------------------------------------
@each
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_objectives_step(world, kind):
    """One DMD2, one consistency and one sft step: finite, the student moves, nobody else does."""
    t, start = world.level(), None
    for objective in SHORT:
        cast, method = world.cast(objective, kind)
        roles = {n: r for n, r in cast.parts.items() if n in ("teacher", "student", "critic")}
        before = {n: r(world.noise, t, world.cond).detach() for n, r in roles.items()}
        start = start if start is not None else world.backbone(world.noise, t, world.cond).detach()
        for found in before.values():  # whoever shares the base, or holds a copy, starts as the teacher
            torch.testing.assert_close(found, start, rtol=1e-5, atol=1e-5)
        players = []
        for loss, _ in method.step(world.batch(), 0):
            assert torch.isfinite(loss), objective
            loss.backward()
            player = method.players[method.active]
            moved = 0
            for parameter in player.trainable().values():
                if parameter.grad is not None:
                    parameter.data -= 1e-2 * parameter.grad.sign()
                    moved += 1
                    parameter.grad = None
            assert moved, objective
            players.append(method.active)
            if players == ["student"]:
                with torch.no_grad():
                    after = {n: r(world.noise, t, world.cond) for n, r in roles.items()}
                assert not torch.equal(after["student"], before["student"])
                shared = objective == "sft" and kind == "full"  # no second role: the student is the network
                for name in after.keys() - {"student"} if not shared else ():
                    assert torch.equal(after[name], before[name]), f"{name} moved in the student's turn"
        assert players


# -- what leaves the framework ------------------------------------------------------------------------------
def pipeline_class(folder):
    index = json.loads((folder / "model_index.json").read_text())
    return getattr(diffusers, index["_class_name"])


def open_pipeline(folder):
    pipe = pipeline_class(folder).from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def network_of(world, pipe):
    """The denoiser inside a pipeline, as the family puts it together."""
    names = world.family.parts(world.backbone.net)
    return world.family.assemble({n: getattr(pipe, n) for n in names}).eval()


@pytest.fixture
def exported(world, tmp_path):
    """A full student of three steps and a LoRA student, written as a user would ship them."""

    def write(kind: str, num_steps: int = 3):
        trainer = world.trainer(kind, num_steps, world.case.sampler)
        return trainer.cast.parts["student"], export_student(trainer, tmp_path / kind, {})

    return write


def plain_call(world, pipe, info, noise):
    """Images in [0, 1] by a pipeline call that any user could write."""
    family, codec = world.family, world.codec
    call = {"num_inference_steps": info["steps"]}
    if info["arguments"]:
        call = dict(info["arguments"])
    height, width = codec.pixels
    guidance = {k: v if codec.guidance is None else codec.guidance for k, v in family.guidance_off.items()}
    file = world.folder / "fastgen.json"
    document = json.loads(file.read_text()) if file.exists() else {}
    call["generator"] = torch.Generator().manual_seed(5)
    call |= {"height": height, "width": width, **guidance, **family.plain_call(document), **world.case.call}
    latents = family.pipeline_latents(noise, world.schedule)
    found = pipe(prompt=list(PROMPTS), latents=latents, output_type="pt", **call)
    return found[0]


def label_loop(world, pipe, info, noise):
    """UNet2DModel: the loop that its pipelines lack."""
    scheduler, net = pipe.scheduler, pipe.unet.eval()
    labels = world.cond.get("class_labels")
    edm = isinstance(world.schedule, EDM)
    x = noise * (world.schedule.prior_std(info["times"][0]))
    scheduler.set_timesteps(**(info["arguments"] or {"num_inference_steps": info["steps"]}))
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if edm else x
        x = scheduler.step(net(scaled, t, class_labels=labels).sample, t, x).prev_sample
    return world.codec.decode(x)


@each
def test_our_sampler_is_the_exported_pipeline(world, exported):
    """K steps from the same noise: our sampler, the reloaded export in our code, and diffusers alone."""
    student, folder = exported("full")
    info = json.loads((folder / "fastgen.json").read_text())["export"]
    with torch.no_grad():
        g = torch.Generator().manual_seed(5)
        drawn = student.generate(world.noise, world.cond, lambda x: torch.randn(x.shape, generator=g))
        ours = world.codec.decode(drawn)
        loaded = load_export(folder)
        t = world.level()
        same = loaded.role.raw(world.noise, t, world.cond)
        torch.testing.assert_close(same, student.raw(world.noise, t, world.cond), rtol=0, atol=0)
        pipe = open_pipeline(folder)
        how = world.case.plain or (label_loop if world.family.kind == "labels" else plain_call)
        theirs = how(world, pipe, info, world.noise)
    assert theirs.shape == ours.shape, (theirs.shape, ours.shape)
    assert (theirs - ours).abs().max() < 1e-4
    untrained = world.codec.decode(_untrained(world, student))
    assert (untrained - ours).abs().max() > 1e-3, "the student does not differ from its teacher"


@torch.no_grad()
def _untrained(world, student):
    from fastgen.roles import Student

    return Student(world.backbone, None, student.times, "ode").generate(
        world.noise, world.cond, torch.randn_like
    )


@each
def test_lora_file_in_a_fresh_pipeline(world, exported):
    """The adapter, read by the pipeline's own loader (or ours where it has none), gives the student's
    output; wrong prefixes are ignored in silence, so the output must also differ from the base's.
    """
    student, folder = exported("lora")
    info = json.loads((folder / "fastgen.json").read_text())["export"]
    t = world.level()
    files = [info["lora"], *([info["kohya"]] if world.family.kohya_prefix else [])]
    with torch.no_grad():
        wanted, base = student.raw(world.noise, t, world.cond), world.backbone.raw(world.noise, t, world.cond)
        for file in files:
            pipe = open_pipeline(world.folder)
            net = network_of(world, pipe)
            if world.family.lora_loader:
                assert hasattr(pipe, "load_lora_weights")
                world.family.load_lora(pipe, folder, file)
            else:
                assert not hasattr(pipe, "load_lora_weights")
                lora.load_lora_into(net, folder / file)
            shell = copy.copy(world.backbone)
            shell._modules = {"net": net}
            found = shell.raw(world.noise, t, world.cond)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
            assert (found - base).abs().max() > 1e-3


def test_every_family_has_a_case():
    assert {c.family for c in CASES.values()} == set(FAMILIES)


REAL = [p for c in CASES.values() for p in c.published]


@pytest.mark.parametrize("model,config,count,tolerance", REAL, ids=[r[0] for r in REAL])
def test_real_size(model, config, count, tolerance):
    """What a checkpoint of the real network stores, laid out on the meta device, against the published count;
    the relative tolerance is for the rounding of what was published.
    """
    with torch.device("meta"):
        net = getattr(diffusers, config["_class_name"]).from_config(config)
    assert isinstance(net, nn.Module)
    found = sum(v.numel() for v in net.state_dict().values())
    assert abs(found - count) <= tolerance * count, found
