"""What single video families promise beyond the battery."""

import diffusers
import pytest
import torch

from fastgen.export.scheduler import bind, scheduler_for
from fastgen.networks.load import load_teacher
from fastgen.roles.roles import Student, StudentSpec
from tests.families.cases import CASES, PROMPTS


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = CASES[name].build(tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def world(folder):
    """(teacher, cond, noise) for the two prompts."""
    teacher = load_teacher(str(folder))
    noise = torch.randn(2, *teacher.codec.shape, generator=torch.Generator().manual_seed(3))
    return teacher, teacher.codec.prompts(PROMPTS), noise


def pipeline_of(folder, setup, arguments):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = setup.scheduler
    if setup.arguments:
        bind(pipe.scheduler, arguments)
    return pipe


def test_each_row_goes_through_the_expert_of_its_time(built):
    """A batch with times on both sides is each row alone, features too; neither expert does for the other."""
    teacher, cond, noise = world(built("wan22"))
    backbone, t = teacher.backbone, torch.tensor([0.3, 0.95], dtype=torch.float64)
    with torch.no_grad():
        both = backbone(noise, t, cond)
        maps, D = backbone.features(noise, t, cond, taps=(0, 1), score=True)
        assert torch.equal(D, both)
        for i in range(2):
            row = {k: v[i : i + 1] for k, v in cond.items()}
            alone, D = backbone.features(noise[i : i + 1], t[i : i + 1], row, taps=(0, 1), score=True)
            torch.testing.assert_close(D, both[i : i + 1], rtol=1e-5, atol=1e-6)
            for one, every in zip(alone, maps):
                torch.testing.assert_close(one, every[i : i + 1], rtol=1e-5, atol=1e-6)
        backbone.net.transformer.load_state_dict(backbone.net.transformer_2.state_dict())
        changed = backbone(noise, t, cond)
    assert torch.equal(changed[0], both[0]) and not torch.allclose(changed[1], both[1])


def test_a_turn_at_one_time_leaves_the_other_expert_alone(built):
    teacher, cond, noise = world(built("wan22"))
    backbone = teacher.backbone.requires_grad_(True)
    backbone(noise, torch.full((2,), 0.95, dtype=torch.float64), cond).sum().backward()
    assert all(p.grad is None for p in backbone.net.transformer_2.parameters())
    assert all(p.grad is not None for p in backbone.net.transformer.parameters())


@pytest.mark.parametrize("name", ["wan", "wan22", "anyflow", "cogvideox", "ltx"])
def test_fresh_noise_between_steps_as_the_pipeline_draws_it(built, name):
    """The renoise sampler of two steps equals the plain call, given noise in the pipeline's layout."""
    teacher, cond, noise = world(built(name))
    family, codec, times = teacher.backbone.family, teacher.codec, teacher.schedule.steps(2)
    setup = scheduler_for(times, "renoise", teacher.schedule, teacher.scheduler, family)
    pipe = pipeline_of(built(name), setup, setup.arguments)
    ours, theirs = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)

    def draw(x):  # video tokens and frames-first layouts are drawn in their own order
        if name == "ltx":
            shape = x.flatten(2).transpose(1, 2).shape
            return torch.randn(shape, generator=ours).transpose(1, 2).unflatten(2, x.shape[2:])
        if name in ("anyflow", "cogvideox"):
            return torch.randn(x.transpose(1, 2).shape, generator=ours).transpose(1, 2)
        return torch.randn(x.shape, generator=ours)

    call = {"num_inference_steps": 2, **family.size_call(codec), **family.guidance_call(None)}
    call |= family.plain_call(teacher.info)
    latents = family.pipeline_latents(noise, teacher.schedule)
    torch.manual_seed(7)  # what schedulers draw from where a pipeline hands them no generator
    with torch.no_grad():
        student = Student(teacher.backbone, None, StudentSpec(times, "renoise"))
        expected = codec.decode(student.generate(noise, cond, draw))
        given = {"generator": theirs, "latents": latents, "output_type": "pt"}
        found = pipe(PROMPTS, **given, **call).frames.transpose(1, 2)
    assert (found - expected).abs().max() < 1e-4


def test_anyflow_takes_the_time_that_a_step_ends_at(built):
    """With r in cond its average velocity, as the pipeline uses it by default; without, the velocity at t."""
    teacher, cond, noise = world(built("anyflow"))
    setup = scheduler_for([1.0], "ode", teacher.schedule, teacher.scheduler, teacher.backbone.family)
    pipe = pipeline_of(built("anyflow"), setup, setup.arguments)
    call = {
        "num_inference_steps": 1,
        "max_sequence_length": teacher.codec.max_length,
        "output_type": "latent",
    }
    call |= teacher.backbone.family.size_call(teacher.codec)
    t, r = torch.ones(2, dtype=torch.float64), torch.zeros(2)
    with torch.no_grad():
        for mean, given in ((True, cond | {"r_timestep": r}), (False, cond)):
            found = pipe(PROMPTS, latents=noise, guidance_scale=1.0, use_mean_velocity=mean, **call).frames
            torch.testing.assert_close(found, teacher.backbone(noise, t, given), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(teacher.backbone(noise, t, cond | {"r_timestep": r}), found)


def test_a_first_frame_comes_back_from_any_time(built):
    """TI2V-5B: D's first frame is the image's latent, and its tokens have time zero."""
    teacher = load_teacher(str(built("wan-ti2v-image")))
    images = torch.rand(2, 3, *teacher.codec.pixels) * 2 - 1
    cond = teacher.codec.prompts(PROMPTS, images)
    noise = torch.randn(2, *teacher.codec.shape)
    for t in (0.2, 1.0):
        with torch.no_grad():
            D = teacher.backbone(noise, torch.full((2,), t, dtype=torch.float64), cond)
        torch.testing.assert_close(D[:, :, :1], cond["image_latents"], rtol=1e-4, atol=1e-5)


def test_zero_terminal_snr_is_exact(built):
    """CogVideoX: nothing of the sample is left at its last time, and its SNR shift is in the levels."""
    teacher, _, _ = world(built("cogvideox"))
    t = torch.tensor([999.0, 500.0])
    bar = teacher.scheduler.alphas_cumprod.double()
    assert float(bar[999]) == 0 and float(teacher.schedule.alpha(t)[0]) < 1e-9
    torch.testing.assert_close(teacher.schedule.alpha(t)[1] ** 2, bar[500])
    for sampler in ("ode", "renoise"):
        setup = scheduler_for(teacher.schedule.steps(4), sampler, teacher.schedule, teacher.scheduler)
        torch.testing.assert_close(setup.scheduler.alphas_cumprod.double(), bar, rtol=1e-4, atol=1e-7)
