"""fastgen.distill and fastgen.load_student: what the commands do, from Python."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastgen
from fastgen.config.run import load
from fastgen.export.load import load_export
from fastgen.networks.codecs import TextCodec
from tests.export.test_plain_diffusers import ours
from tests.support.tiny import PROMPTS

SMALL = {
    "train": {"train_batch_size": 2, "validation_steps": 0, "mixed_precision": "no", "ema_decay": [0.5]},
    "eval": {"num_samples": 4, "grid": 2, "batch_size": 4},
    "teacher": {"num_steps": 2},
}


def pairs():
    return [(Image.new("RGB", (16, 16), colour), PROMPTS[i % 2]) for i, colour in enumerate(("red", "blue"))]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A LoRA of a pipeline object in halves, trained on what a function returns."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny("sd"), torch_dtype=torch.float16)
    folder = tmp_path_factory.mktemp("api") / "run"
    settings = SMALL | {"student": {"lora": {"rank": 2}}, "objective": {"grid_steps": 10}}
    return fastgen.distill(
        pipe, "lcm", pairs, student="lora", steps=2, output_dir=folder, max_steps=2, settings=settings
    )


def test_a_run_of_a_pipeline_object_and_a_function_of_pictures(run):
    again = load([str(run.folder / "recipe.yaml")], [])
    assert (
        again.student.kind == "lora" and again.student.num_steps == 2 and again.train.max_train_steps == 300
    )
    trained = load([str(run.folder / "config.yaml")], [])
    assert trained.train.max_train_steps == 2 and trained.teacher.path == f"{run.folder}-teacher"
    assert sorted(p.name for p in (run.folder.parent / "run-data").iterdir())[0] == "000000.png"
    assert run.results["student"]["nfe"] == 2 and run.report().is_file() and "run" in repr(run)


def test_the_student_draws_what_sample_py_draws(run):
    student = fastgen.load_student(run.export)
    drawn = student(PROMPTS[0], seed=11, num_images=2)
    expected = ours(load_export(run.export), [PROMPTS[0]] * 2)
    for picture, image in zip(drawn, expected):
        assert np.abs(np.asarray(picture) / 255 - image.permute(1, 2, 0).numpy()).max() < 1 / 255
    assert run.student()(PROMPTS[0], seed=12)[0].tobytes() == drawn[1].tobytes()


def test_the_pipeline_draws_what_the_student_draws(run):
    pipe = run.pipeline()  # in float32 where there is no GPU, whatever its files hold
    pipe.set_progress_bar_config(disable=True)
    call = run.call_arguments
    assert call["num_inference_steps"] == 2 and call["guidance_scale"] == 1.0
    picture = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(3), **call).images[0]
    own = run.student()(PROMPTS[0], seed=3)[0]
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(own)).max() <= 2
    assert isinstance(load_export(run.export).codec, TextCodec)


def test_a_teacher_draws_too_and_labels_are_labels(tiny):
    teacher = fastgen.load_student("assets:teachers/digits")
    three, seven = (teacher(label=n, steps=4, seed=1)[0] for n in (3, 7))
    assert three.size == (8, 8) and three.tobytes() != seven.tobytes()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"teacher": "no/such/teacher"}, "--teacher: "),
        ({"teacher": 3}, "teacher: found a int"),
        ({"method": "lcmm"}, "did you mean 'lcm'"),
        ({"data": [1]}, "data: found a list"),
        ({"data": lambda: []}, "the function gave no picture"),
        ({"settings": {"train": {"stepz": 1}}}, "unknown key"),
    ],
)
def test_mistakes_are_user_errors(given, said, tmp_path):
    with pytest.raises(fastgen.UserError, match=said):
        fastgen.distill(**{"teacher": "digits", "output_dir": tmp_path / "run", **given})
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_used_is_refused_as_on_the_command_line(run):
    with pytest.raises(fastgen.UserError, match="is not empty"):
        fastgen.distill("digits", "dmd2", output_dir=run.folder)
    with pytest.raises(fastgen.UserError, match="is not a run folder"):
        fastgen.Run(run.folder / "export")


def test_the_import_stays_light():
    code = "import sys, fastgen; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
