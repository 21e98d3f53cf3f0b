"""What the image transformers promise beyond the battery: teachers guided as their pipelines guide, null
conditions, latents, shifts, adapters and model cards.
"""

import inspect
import json
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import TrigFlow
from fastgen.export.scheduler import scheduler_for
from fastgen.export.snippet import PROMPT
from fastgen.families.registry import detect
from fastgen.networks.codecs import TextCodec
from fastgen.networks.load import load_teacher
from fastgen.networks.lora_targets import adapter_layers
from fastgen.roles.roles import Role
from fastgen.sampling.solvers import sample_student, teacher_grid
from fastgen.training.assembly import make_cast
from fastgen.training.exporting import export_run
from tests.families.cases import CASES, PROMPTS
from tests.families.cases.image_transformers import FOLDERS, dit_call
from tests.families.cases.image_transformers_real import DIT
from tests.families.test_families import open_pipeline
from tests.families.world import World

W = 2.5
NAMES = sorted(FOLDERS)
TEXT = [n for n in NAMES if n != "dit"]
_WORLDS: dict[str, World] = {}


@pytest.fixture
def world(name, tmp_path_factory):
    if name not in _WORLDS:
        _WORLDS[name] = World(name, tmp_path_factory.mktemp(name) / "teacher")
    return _WORLDS[name]


def each(names):
    return pytest.mark.parametrize("name", names)


# -- the teacher ---------------------------------------------------------------------------------------------
@each([n for n in NAMES if n not in ("sana-sprint", "flux")])  # their guidance is an input
def test_guided_teacher_is_the_pipelines(world, name):
    """Three Euler steps at w: our guided D along the pipeline's own times gives the pipeline's own images."""
    pipe, family, schedule = open_pipeline(world.folder), world.family, world.schedule
    if name.startswith("pixart"):  # its solver of second order made one of first, which is an Euler step
        cls = diffusers.DPMSolverMultistepScheduler
        pipe.scheduler = cls.from_config(pipe.scheduler.config, solver_order=1)
    call = {"num_inference_steps": 3, "output_type": "pt"}
    if name == "dit":
        info = {"timestep_arguments": {}, "steps": 3}
        theirs = dit_call(world, pipe, info, world.noise, guidance=W)
    else:
        document = json.loads((world.folder / "fastgen.json").read_text())
        call |= {**family.size_call(world.codec), **family.plain_call(document), **family.guided_call(W)}
        if family.guided_call(W).get("negative_prompt") is not None:
            call["negative_prompt"] = [call["negative_prompt"]] * 2
        latents = family.pipeline_latents(world.noise, schedule)
        theirs = pipe(prompt=list(PROMPTS), latents=latents, **call)[0]
    times = (pipe.scheduler.timesteps.double() / (1000 if schedule.t_max == 1 else 1)).tolist()
    role, x = Role(world.backbone), world.noise
    with torch.no_grad():
        for k, t in enumerate(times):
            t2 = torch.full((2,), t, dtype=torch.float64)
            D = role.guided(x, t2, world.cond, world.uncond, W)
            x = D if t == times[-1] else schedule.ode_step(D, x, t2, torch.full_like(t2, times[k + 1]))
        ours = world.codec.decode(x)
    assert (ours - torch.as_tensor(theirs)).abs().max() < 1e-4


@each(["flux", "flux2", "qwen-image", "z-image", "lumina2", "sd3"])
def test_shift_is_the_pipelines(world, name):
    """The grid that our schedule bends is where the pipeline's scheduler stands at the teacher's steps."""
    pipe = open_pipeline(world.folder)
    num = 50 if name == "flux2" else 4  # FLUX.2's shift depends on the steps
    if pipe.scheduler.config.shift_terminal:  # a teacher's: the last of few steps must not end near zero
        pipe.scheduler.register_to_config(shift_terminal=None)
    latents = world.family.pipeline_latents(world.noise[:1], world.schedule)
    more = world.family.plain_call(json.loads((world.folder / "fastgen.json").read_text()))
    sigmas = {"sigmas": [1 - k / num for k in range(num)]}  # SD3 leaves its scheduler's own, which end lower
    if "sigmas" not in inspect.signature(pipe.__call__).parameters:
        sigmas = {"num_inference_steps": num}
    size = world.family.size_call(world.codec)
    pipe(prompt="a", latents=latents, output_type="latent", **size, **more, **sigmas)
    found = pipe.scheduler.sigmas[:-1].tolist()
    assert found == pytest.approx(world.schedule.steps(num), abs=1e-6)


@each(["qwen-image"])
def test_teacher_grid_ends_where_the_schedulers_does(world, name):
    """Qwen-Image's scheduler stretches its grid to end at 0.02; a few-step student's is left alone."""
    scheduler = world.teacher.scheduler
    scheduler.set_timesteps(sigmas=[1 - k / 5 for k in range(5)], mu=float(np.log(world.schedule.shift)))
    assert teacher_grid(world.schedule, 5) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
    assert world.schedule.steps(5)[-1] > 0.2


@pytest.mark.parametrize(
    "pipeline,net",
    [
        ("Flux2Pipeline", {"_class_name": "Flux2Transformer2DModel"}),
        (
            "FluxFillPipeline",
            {"_class_name": "FluxTransformer2DModel", "in_channels": 384, "out_channels": 64},
        ),
        (
            "QwenImageLayeredPipeline",
            {"_class_name": "QwenImageTransformer2DModel", "use_layer3d_rope": True},
        ),
        (
            "WanImageToVideoPipeline",
            {"_class_name": "WanTransformer3DModel", "in_channels": 16, "out_channels": 16},
        ),
    ],
)
def test_siblings_that_ask_otherwise_are_refused(pipeline, net):
    with pytest.raises(UserError, match=f"no family for {net['_class_name']} in the form of {pipeline}"):
        detect({"_class_name": pipeline}, net)


@each(["dit"])
def test_dit_is_square(world, name):
    with pytest.raises(UserError, match="width: found 128 with a height of 64; set both to one value"):
        load_teacher(str(world.folder), height=64, width=128)


@each(["sana-sprint"])
def test_embedded_guidance_is_not_guidance(world, name):
    values = {"teacher": {"path": str(world.folder), "guidance": 4.5}, "data": {"name": "fashion"}}
    with pytest.raises(UserError, match="teacher.guidance: found 4.5 .* teacher.embedded_guidance"):
        make_cast(validate({**values, "objective": {"name": "dmd2", "gan_weight": 0.0}}))


@each(TEXT)
def test_round_trip_of_latents(world, name):
    """denormalise inverts normalise, and x0 stands near unit scale as noise does."""
    family, vae = world.family, world.codec.vae
    z = family.denormalise(vae, world.x0)
    torch.testing.assert_close(family.normalise(vae, z), world.x0, rtol=1e-5, atol=1e-5)
    images = torch.rand(2, 3, *world.codec.pixels) * 2 - 1
    assert world.codec.encode(images).shape == world.x0.shape


@each(["flux2"])
def test_encoding_is_the_pipelines(world, name):
    """FLUX.2 whitens what it encodes by the autoencoder's running statistics."""
    images = torch.rand(2, 3, *world.codec.pixels) * 2 - 1
    theirs = open_pipeline(world.folder)._encode_vae_image(images, None)
    torch.testing.assert_close(world.codec.encode(images), theirs)


def test_pixart_alpha_tells_the_size(tmp_path):
    """The network made for 1024 pixels (sample_size 128) takes resolution and aspect ratio as inputs."""
    from tests.families.cases.image_transformers import pixart_folder

    teacher = load_teacher(str(pixart_folder(tmp_path, sigma=False, additional=True)), height=32, width=16)
    net, codec = teacher.backbone.net, teacher.codec
    cond, x, t = codec.prompts(PROMPTS), torch.randn(2, *codec.shape), torch.tensor([500.0, 20.0])
    sizes = {"resolution": torch.tensor([[128.0, 64.0]] * 2), "aspect_ratio": torch.tensor([[2.0]] * 2)}
    wanted = net(x, timestep=t, added_cond_kwargs=sizes, **cond).sample[:, :4]
    torch.testing.assert_close(teacher.backbone.raw(x, t, cond), wanted)


def test_sd3_without_t5(tmp_path):
    """A folder that leaves the large encoder out: zeros stand in for its states, as in the pipeline."""
    FOLDERS["sd3"](tmp_path)
    folder = tmp_path / "without"
    left_out = {"text_encoder_3": None, "tokenizer_3": None}
    open_pipeline(tmp_path, **left_out).save_pretrained(folder)
    (folder / "fastgen.json").write_text('{"max_sequence_length": 24}')
    states = load_teacher(str(folder)).codec.prompts(PROMPTS)["encoder_hidden_states"]
    theirs = open_pipeline(folder, **left_out).encode_prompt(PROMPTS, None, None, max_sequence_length=24)[0]
    torch.testing.assert_close(states, theirs)


def test_dit_xl_counts_one_embedder():
    """675M are published for DiT-XL/2; diffusers gives every block a time and class embedder of its own."""
    with torch.device("meta"):
        net = diffusers.DiTTransformer2DModel(**DIT, sample_size=32, norm_type="ada_norm_zero")
    found = {n: p.numel() for n, p in net.named_parameters()}
    repeated = sum(v for n, v in found.items() if ".norm1.emb." in n and ".0." not in n)
    assert (sum(found.values()) - repeated) / 1e6 == pytest.approx(675, abs=0.5)


# -- students ------------------------------------------------------------------------------------------------
@each(["flux"])
def test_default_adapters_leave_the_last_layer_alone(world, name):
    net, family = world.backbone.net, world.family
    one = "single_transformer_blocks.0.proj_out"
    assert adapter_layers(family, net, (one,)) == [one]
    with pytest.raises(UserError, match="target_modules: 'proj_out' also matches"):
        adapter_layers(family, net, ("proj_out", "to_q"))
    assert all(".attn." in n for n in adapter_layers(family, net, family.lora_targets))
    assert family.reads_kohya(adapter_layers(family, net, family.lora_targets))
    assert not family.reads_kohya(["transformer_blocks.0.ff.net.2"]), "diffusers misreads kohya's name for it"


@pytest.mark.parametrize("times", [[np.pi / 2], [np.pi / 2, 1.3], [np.pi / 2, 1.0], [1.5, 1.0, 0.5]])
def test_scm_visits_the_students_angles(times):
    """One step, SANA-Sprint's own two, another two, and any three."""
    scheduler = diffusers.SCMScheduler(sigma_data=0.5)
    setup = scheduler_for(times, "renoise", TrigFlow(middle=1.3), scheduler)
    setup.set_timesteps(len(times))
    np.testing.assert_allclose(setup.scheduler.timesteps, [*times, 0.0], atol=1e-5)


@each(["sana-sprint"])
def test_scheduler_without_ode_is_told_before_training(world, name):
    with pytest.raises(UserError, match="student.sampler"):
        world.cast("dmd2", num_steps=2, sampler="ode")


@each(["flux", "flux2", "qwen-image"])
def test_renoising_tokens(world, name, tmp_path):
    """The scheduler draws its noise over packed tokens; with the same draws our images are the pipeline's."""
    trainer = world.trainer("full", 3, "renoise")
    folder, student = export_run(trainer, tmp_path / "out", {}), trainer.cast.parts["student"]
    info = json.loads((folder / "fastgen.json").read_text())["export"]
    latents = world.family.pipeline_latents(world.noise, world.schedule)
    tokens = latents if latents.ndim == 3 else latents.flatten(2).transpose(1, 2)

    def draw(x):
        flat = torch.randn(tokens.shape).transpose(1, 2)
        if latents.ndim == 4:
            return flat.unflatten(2, x.shape[-2:])
        return torch.pixel_shuffle(flat.unflatten(2, (x.shape[-2] // 2, x.shape[-1] // 2)), 2)

    torch.manual_seed(4)  # these pipelines hand their scheduler no generator
    with torch.no_grad():
        drawn = world.codec.decode(student.generate(world.noise, world.cond, draw))
        document = json.loads((folder / "fastgen.json").read_text())
        family, embedded = world.family, world.codec.guidance
        call = family.size_call(world.codec) | family.guidance_call(embedded) | family.plain_call(document)
        steps = info["timestep_arguments"] or {"num_inference_steps": info["steps"]}
        pipe = open_pipeline(folder)
        torch.manual_seed(4)
        found = pipe(prompt=list(PROMPTS), latents=latents, output_type="pt", **call, **steps)[0]
    assert (found - drawn).abs().max() < 1e-4


def code_of(folder) -> str:
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


@each(NAMES)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_card_s_snippet(world, name, kind, tmp_path, monkeypatch):
    """Run as it stands, it draws what our sampler draws with its seed."""
    trainer = world.trainer(kind, 2, CASES[name].sampler)
    folder, student = export_run(trainer, tmp_path / "out", {}), trainer.cast.parts["student"]
    monkeypatch.chdir(folder)
    exec(code_of(folder), {"__name__": "card"})
    codec = world.codec
    cond = codec.prompts([PROMPT]) if isinstance(codec, TextCodec) else codec.labels(torch.tensor([3]))
    ours = codec.decode(sample_student(student, [0], codec.shape, cond))[0]
    drawn = np.asarray(Image.open(folder / "sample.png"), dtype=np.float32)
    mine = (ours.permute(1, 2, 0) * 255).numpy()
    assert np.abs(drawn - mine).max() <= 1, SimpleNamespace(name=name, kind=kind)
