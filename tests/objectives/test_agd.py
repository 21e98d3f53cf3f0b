"""AGD: states and targets of the guided sampler, adapters that leave their base alone, and the file in plain
diffusers, over another checkpoint and beside a LoRA.
"""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastgen.cli.sample import main as sample
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.diffusion.schedules import Flow
from fastgen.export.load import load_export
from fastgen.families.parts import of_adapter
from fastgen.objectives.agd import AGD, AGDConfig
from fastgen.roles.roles import Role, Student, StudentSpec
from fastgen.training.assembly import make_cast
from tests.objectives.test_guidance_distillation import TwoMeans
from tests.support.play import batch as batch_for
from tests.support.play import play
from tests.support.replay import plainly, train
from tests.support.spelled import World, at_x, gradient
from tests.support.toys import batch_of, distances_by_scale, rng, run_mixture

SHORT = {"teacher_steps": 2}
SHORT_TEACHER = {"guidance": 4.0}
"""settings of the contract battery"""
ADAPTERS = {"kind": "guidance_adapter", "sampler": "ode", "guidance_embedding": [1.0, 6.0]}


@pytest.mark.parametrize("span", [None, (1.0, 5.0)])
def test_p1_step_is_the_formula(span):
    """The error of the native prediction against the guided teacher, at a state of the sampler's grid."""
    world = World(AGD, span=span, teacher_steps=4)
    (turn,), (call,) = world.turns(), world.student.calls
    x_t, t, w = call.x_t, call.t, call.cond["guidance"].double() if span else 3.0
    grid = torch.tensor(world.schedule.teacher_times(4), dtype=torch.float64)
    assert (t[:, None] - grid).abs().min(1).values.max() < 1e-9
    if span:
        assert w.min() >= 1 and w.max() <= 5 and w.std() > 0.5
    target = world.guided(x_t, t, w)
    wanted = at_x(lambda D: (world.native(t)[:, None] * (D - target) ** 2).mean(), call.out)
    torch.testing.assert_close(gradient(turn.loss, call.out), wanted, rtol=1e-4, atol=1e-6)
    walked = len(world.teacher.calls)
    world.turns(1)
    assert len(world.teacher.calls) == walked, "a walk is made once"


def two_means(guidance, num=4000, span=None, steps=40):
    """An objective over the exact class-conditional Gaussian, class 1 and null 0, and its batch."""
    S = Flow()
    student = Student(TwoMeans(S, 0.3, 0.5), None, StudentSpec(S.steps(4), "ode", guidance_range=span))
    parts = {"student": student, "teacher": Role(TwoMeans(S, 0.3, 0.5).requires_grad_(False))}
    objective = AGD(AGDConfig(teacher_steps=steps), parts, rng(), guidance)
    objective.prepare()
    one = batch_of(torch.zeros(num, 1).double())
    one.cond = {"class_labels": torch.ones(num).long()}
    one.uncond = {"class_labels": torch.zeros(num).long()}
    return objective, one


def test_p1_states_have_the_guided_marginal_and_not_the_noised_datas():
    """At time t of the walk the mean is alpha mu^w, mu^w = mu_u + w (mu_c - mu_u); noised data have mu_c."""
    objective, one = two_means(3.0)
    x_t, t, *_ = objective.trajectories(one, objective.teacher)
    late = t < 0.5
    alpha = 1 - t[late]
    mean_u, mean_c = 0.3, 2.3
    guided = (x_t[late, 0] - alpha * (mean_u + 3 * (mean_c - mean_u))).mean()
    noised = (x_t[late, 0] - alpha * mean_c).mean()
    assert abs(guided) < 0.08 and noised > 2, (guided, noised)


def test_p1_without_guidance_the_teacher_is_the_answer():
    objective, one = two_means(1.0, num=64, steps=4)
    assert float(next(objective.step(one, 0))[0].detach()) < 1e-12
    objective, one = two_means(3.0, num=64, steps=4)
    assert float(next(objective.step(one, 0))[0].detach()) > 1e-2


def test_p1_a_walks_scale_and_noise_follow_its_number():
    """The same walks whatever the batch they are met in, and no two of one scale."""
    objective, one = two_means(1.0, num=6, span=(1.0, 5.0), steps=4)
    objective.trajectories(one, objective.teacher)
    other, _ = two_means(1.0, num=6, span=(1.0, 5.0), steps=4)
    few = batch_of(torch.zeros(2, 1).double())
    few.index = torch.tensor([4, 1])
    few.cond, few.uncond = ({k: v[:2] for k, v in d.items()} for d in (one.cond, one.uncond))
    other.trajectories(few, other.teacher)
    for n in (4, 1):
        torch.testing.assert_close(other.trajectories.rows[n], objective.trajectories.rows[n])
    assert len(objective.trajectories.scales(list(range(6))).unique()) == 6


def adapted(tiny, family, form="attention", **train_settings):
    """(cast, objective) of AGD with adapters on a tiny teacher."""
    cfg = validate(
        {
            "teacher": {"path": str(tiny(family)), "guidance": 2.0},
            "student": {**ADAPTERS, "guidance_adapter": {"form": form, "width": 8, "heads": 2}},
            "objective": {"name": "agd", "teacher_steps": 2},
            "data": {"name": "fashion"},
            "train": train_settings,
        }
    )
    cast = make_cast(cfg)
    objective = cast.stage(cfg.all_stages()[0], Rng(0))
    objective.prepare()
    return cast, objective


@pytest.mark.parametrize(("family", "form"), [("sd", "attention"), ("sana", "offset"), ("flow", "attention")])
def test_p1_only_adapters_move_and_off_they_are_the_teacher(tiny, family, form):
    cast, objective = adapted(tiny, family, form)
    one, before = batch_for(cast), {}
    for name, p in cast.teacher.backbone.named_parameters():
        before[name] = p.detach().clone()
    t = torch.full((2,), cast.teacher.schedule.steps(2)[1], dtype=torch.float64)
    with torch.no_grad():
        teacher = cast.parts["teacher"](one.noise, t, one.cond)
        assert torch.equal(cast.student(one.noise, t, one.cond), teacher), "A = 0 at first"
    for k in range(6):
        play(objective, one, k, check=True)
    moved = {n for n, p in cast.teacher.backbone.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(of_adapter(n) for n in moved)
    with torch.no_grad():
        assert torch.equal(cast.parts["teacher"](one.noise, t, one.cond), teacher)
        three, five = (cast.student.with_guidance(w)(one.noise, t, one.cond) for w in (3.0, 5.0))
    assert not torch.equal(three, teacher) and not torch.equal(three, five)


def test_checkpointed_gradients_are_the_plain_ones(tiny):
    """A block is run again with the scale, time and prompt of its own forward pass, after another call."""
    grads = []
    for on in (False, True):
        cast, objective = adapted(tiny, "sd", gradient_checkpointing=on)
        for p in cast.student.trainable().values():
            p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5))
        loss, _ = next(objective.step(batch_for(cast), 0))
        with torch.no_grad():
            cast.student.with_guidance(6.0)(*_call(cast))
        loss.backward()
        grads.append({n: p.grad for n, p in cast.student.trainable().items()})
    for key, plain in grads[0].items():
        torch.testing.assert_close(grads[1][key], plain, rtol=1e-4, atol=1e-7)
    assert any(g.abs().max() > 1e-6 for g in grads[0].values())


def _call(cast):
    one = batch_for(cast)
    return one.noise, torch.full((2,), 300.0, dtype=torch.float64), one.cond


@pytest.mark.slow
def test_p2_one_network_for_a_range_of_w(tmp_path):
    """Samples at w = 1, 2, 4 match those of guided sampling with the exact teacher, at half its calls."""
    _, _, _, trainer = run_mixture(
        tmp_path,
        {"name": "agd", "teacher_steps": 8},
        steps=350,
        num_steps=8,
        lr=2e-3,
        guidance=2.0,
        student={"sampler": "ode", "guidance_embedding": [1.0, 5.0]},
    )
    found, apart = distances_by_scale(trainer.cast, 8, (1.0, 2.0, 4.0))
    assert all(distance < apart / 5 for distance in found.values()), (found, apart)


# -- the export ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    student = {**ADAPTERS, "num_steps": 2, "guidance_adapter": {"width": 8, "heads": 4}}
    folder = tmp_path_factory.mktemp("agd")
    objective = {"name": "agd", "teacher_steps": 2}
    return train(tiny, folder, objective, {"guidance": 3.0}, "sd", student=student)


PLAIN = """
import torch
import warnings
from diffusers import DDIMScheduler, StableDiffusionPipeline
from guidance_adapter import load_guidance_adapter, remove, set_guidance
pipe = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
pipe.scheduler = DDIMScheduler.from_pretrained(".", subfolder="scheduler")
call = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
draw = lambda: pipe("a red dress", generator=torch.Generator().manual_seed(5), **call).images
bare = draw()
if LORA:
    pipe.load_lora_weights(LORA)
styled = draw()
load_guidance_adapter(pipe, FILE, guidance=3.0)
three = draw()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    set_guidance(pipe, 9.0)
assert any("trained for 1 to 6" in str(w.message) for w in seen), seen
set_guidance(pipe, 5.0)
five = draw()
remove(pipe)
assert torch.equal(draw(), styled)
if LORA:
    pipe.unload_lora_weights()
    assert torch.equal(draw(), bare)
images = torch.cat([bare, styled, three, five])
"""


def plain(exported, tmp_path, base, lora=""):
    """Images of the base, styled, and guided by 3 and by 5, without fastgen."""
    work = tmp_path / "work"
    shutil.copytree(exported, work)
    (file,) = work.glob("*-guidance-adapter.safetensors")
    names = {"BASE": str(base), "FILE": file.name, "LORA": str(lora)}
    return plainly("".join(f"{k} = {v!r}\n" for k, v in names.items()) + PLAIN, work)


def drawn(tmp_path, *arguments):
    """The picture that sample.py makes of this prompt."""
    from PIL import Image

    given = ["--prompt", "a red dress", "--seed", "5", "--out", str(tmp_path / "out"), "--overwrite"]
    assert sample([*given, *map(str, arguments)]) == 0
    (file,) = (tmp_path / "out").glob("00000_5.png")
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255


def test_p4_agd_in_plain_diffusers(exported, tiny, tmp_path, capsys):
    """The file, its loader and diffusers draw what sample.py draws, at two scales; w outside is warned of."""
    images = plain(exported, tmp_path, tiny("sd"))
    assert torch.equal(images[0], images[1])
    for i, w in ((2, 3.0), (3, 5.0)):
        assert (drawn(tmp_path, "--model", exported, "--guidance", w) - images[i]).abs().max() < 1.5 / 255
        assert (images[i] - images[0]).abs().max() > 3e-3, "the adapter acts"
    assert "trained for" not in capsys.readouterr().err
    drawn(tmp_path, "--model", exported, "--guidance", 9)
    assert "--guidance: trained for 1 to 6" in capsys.readouterr().err
    (file,) = exported.glob("*-guidance-adapter.safetensors")
    assert all(".guidance_adapters." in key for key in load_file(file)), "nothing of the base"
    assert (drawn(tmp_path, "--model", file) - images[2]).abs().max() < 1.5 / 255, "the file alone"


def test_p4_on_another_checkpoint_and_beside_a_lora(exported, tiny, tmp_path):
    """A base with other weights takes the same file; a LoRA's change and the adapter's go together."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    other = tmp_path / "other"
    shutil.copytree(tiny("sd"), other)
    unet = UNet2DConditionModel.from_pretrained(other / "unet")
    with torch.no_grad():
        for p in unet.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    unet.save_pretrained(other / "unet")
    layer = next(n for n, _ in unet.named_modules() if n.endswith("attn2.to_out.0"))
    size = unet.get_submodule(layer).weight.shape
    style = {
        f"unet.{layer}.lora_A.weight": torch.ones(2, size[1]),
        f"unet.{layer}.lora_B.weight": torch.ones(size[0], 2),
    }
    save_file(style, tmp_path / "style.safetensors")
    images = plain(exported, tmp_path, other, tmp_path / "style.safetensors")
    assert (images[1] - images[0]).abs().max() > 1e-3, "the LoRA acts"
    assert (images[2] - images[1]).abs().max() > 1e-3, "and the adapter on top"
    mine = drawn(tmp_path, "--model", exported, "--base", other)
    shutil.rmtree(tmp_path / "work")
    alone = plain(exported, tmp_path, other)
    assert (mine - alone[2]).abs().max() < 1.5 / 255


def test_p4_the_cards_code_draws(exported, tmp_path):
    text = (exported / "README.md").read_text()
    assert "set_guidance(pipe, w)" in text
    code = text.split("```python\n")[1].split("```")[0]
    work = exported.parent / "card"  # beside the export: the card's path to the base is relative
    shutil.copytree(exported, work)
    # Without torchvision, which no extra installs.
    as_tensor = "from diffusers.image_processor import VaeImageProcessor as As\n"
    as_tensor += "images = As.numpy_to_pt(As.pil_to_numpy(image))\n"
    images = plainly(code + as_tensor, work)
    assert images.shape[1:] == (3, 16, 16) and images.isfinite().all()


def test_the_python_interface_builds_its_pipeline(exported):
    from fastgen.export.pipeline import call_arguments, load_pipeline

    pipe, call = load_pipeline(exported), call_arguments(exported)
    assert call["guidance_scale"] == 1.0 and pipe.unet.guidance_control.guidance == 3.0


# -- mistakes ------------------------------------------------------------------------------------------------
def values(**student):
    return {
        "teacher": {"path": "assets:teachers/digits", "guidance": 2.0},
        "student": {**ADAPTERS, **student},
        "objective": {"name": "agd"},
        "data": {"name": "digits"},
    }


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"guidance_embedding": None}, "student.guidance_embedding"),
        ({"init": "somewhere"}, "student.init"),
        ({"guidance_embedding": [3.0, 5.0]}, "student.guidance_embedding"),
        ({"fuse": "somewhere"}, "student.fuse"),
        ({"guidance_adapter": {"width": 8, "heads": 3}}, "student.guidance_adapter"),
        ({"kind": "full", "guidance_adapter": {"width": 8}}, "student.guidance_adapter"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(change, key):
    with pytest.raises(UserError, match=key):
        validate(values(**change))


def test_methods_of_two_times_refuse_adapters():
    with pytest.raises(UserError, match="student.kind: found guidance_adapter; meanflow"):
        validate({**values(), "objective": {"name": "meanflow"}})


def test_exact_teachers_refuse_adapters():
    with pytest.raises(UserError, match="analytic teacher"):
        make_cast(validate({**values(), "teacher": {"path": "analytic:gmm2d-flow", "guidance": 2.0}}))


def test_a_base_of_another_architecture_is_refused(exported, tiny):
    with pytest.raises(UserError, match="does not fit"):
        load_export(str(exported), base=str(tiny("flow")))


def test_a_file_says_its_range_and_holds_its_frequencies(exported):
    from safetensors import safe_open

    (file,) = exported.glob("*-guidance-adapter.safetensors")
    with safe_open(file, "pt") as handle:
        settings = json.loads(handle.metadata()["guidance_adapter"])
        names = list(handle.keys())
    assert (settings["low"], settings["high"], settings["guidance"]) == (1.0, 6.0, 3.0)
    assert math.isclose(settings["time_scale"], 1 / 999)
    assert any(n.endswith("guidance.frequency") for n in names)


# -- measured beside guided sampling -------------------------------------------------------------------------
def test_only_students_that_take_the_scale_are_measured_by_scale(tiny):
    from eval.guidance import by_scale

    with pytest.raises(UserError, match="does not take the guidance scale"):
        by_scale(str(tiny("sd")))


@pytest.mark.slow
def test_an_untrained_adapter_is_as_far_from_guided_pictures_as_unguided_ones(tmp_path):
    """Its pictures are the unguided teacher's: `apart` is 1, and both have the same scores."""
    from types import SimpleNamespace

    from eval.guidance import by_scale
    from fastgen.training.exporting import export_run

    given = {"teacher": {"path": "assets:teachers/tinted-sd", "guidance": 3.0, "num_steps": 4}}
    given["student"] = {**ADAPTERS, "num_steps": 4}
    cfg = validate({**values(), **given, "data": {"name": "tinted"}})
    run = SimpleNamespace(
        cast=make_cast(cfg), train_cfg=cfg.train, step=1, example="", enlarges=0, folder=tmp_path
    )
    found = by_scale(str(export_run(run, tmp_path / "export", {})), num=12, scales=(3.0,))
    assert found["scales"]["3"]["apart"] == pytest.approx(1, abs=1e-4)
    assert found["scales"]["3"]["student"]["fd_mini"] == pytest.approx(found["unguided"]["fd_mini"])
    assert found["nfe"] == {"guided": 8, "student": 4}
