"""Students of a teacher of clips leave as files that WanPipeline alone samples to the same clips."""

from types import SimpleNamespace

import pytest
import torch

from fastgen.config.parse import read_files
from fastgen.config.run import validate
from fastgen.core.paths import config
from fastgen.data import moving
from fastgen.export.load import load_export
from fastgen.training.assembly import make_cast
from fastgen.training.exporting import export_run
from tests.support.clips import clip_teacher
from tests.support.replay import assert_drawn_as, moved, plainly

PROMPTS = moving.captions([0, 1], "heldout")
PLAIN = """
import json, torch, diffusers
info = json.load(open("fastgen.json"))["export"]
pipe = diffusers.WanPipeline.from_pretrained(BASE or ".", torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
if BASE:
    pipe.load_lora_weights(".", weight_name=info["lora"])
    kind = getattr(diffusers, info["scheduler"]["_class_name"])
    pipe.scheduler = kind.from_pretrained(".", subfolder="scheduler")
seeds = [torch.Generator().manual_seed(s) for s in (11, 12)]
call = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 32, "width": 32}
call |= {"num_frames": 8, "max_sequence_length": 16, "output_type": "pt", **info["step_arguments"]}
images = pipe(PROMPTS, generator=seeds, **call).frames.float().transpose(1, 2)
"""


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_p4_a_student_of_clips_is_sampled_by_plain_diffusers(tmp_path, kind):
    """At moved weights, so that a teacher in the student's place is found out."""
    base = str(clip_teacher(tmp_path / "teacher"))
    values = {
        "teacher": {"path": base},
        "student": {"kind": kind, "num_steps": 4, "sampler": "ode", "lora": {"rank": 2}},
        "objective": {"name": "dmd2", "gan_weight": 0.0},
        "data": {"name": "moving"},
    }
    cfg = validate(values)
    cast = moved(make_cast(cfg), 0.03)
    run = SimpleNamespace(cast=cast, train_cfg=cfg.train, step=1, example="", folder=tmp_path, enlarges=0)
    folder = export_run(run, tmp_path / "export", {})
    under = base if kind == "lora" else ""
    theirs = plainly(f"PROMPTS, BASE = {PROMPTS!r}, {under!r}\n" + PLAIN, folder)
    assert theirs.shape == (2, 3, moving.FRAMES, moving.SIZE, moving.SIZE)
    assert_drawn_as(theirs, folder, base, PROMPTS)


MOVING = """
import json, torch, diffusers
pipe = diffusers.AnimateDiffPipeline.from_pretrained(".", torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
assert pipe.scheduler.config.rescale_betas_zero_snr and pipe.scheduler.alphas_cumprod[-1] == 0
seeds = [torch.Generator().manual_seed(s) for s in (11, 12)]
call = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 32, "width": 32, "num_frames": 9}
images = pipe(PROMPTS, generator=seeds, output_type="pt", **call).frames.float().transpose(1, 2)
"""


def test_p4_motion_modules_on_a_schedule_that_ends_in_noise(tmp_path):
    """The first of four steps begins where nothing of the clip is left."""
    base = "assets:teachers/moving-animatediff"
    values = {
        "teacher": {"path": base},
        "student": {"num_steps": 4, "trained": ["*motion_modules*"]},
        "objective": {"name": "mcm", "grid_steps": 20, "gan_weight": 0.0},
        "data": {"name": "moving"},
    }
    cfg = validate(values)
    cast = moved(make_cast(cfg), 0.02)
    first = torch.tensor(cast.student.times[0])
    assert first == 999 and float(cast.teacher.schedule.alpha(first)) < 1e-6
    run = SimpleNamespace(cast=cast, train_cfg=cfg.train, step=1, example="", folder=tmp_path, enlarges=0)
    folder = export_run(run, tmp_path / "export", {})
    theirs = plainly(f"PROMPTS = {PROMPTS!r}\n" + MOVING, folder)
    assert theirs.shape == (2, 3, moving.FRAMES, moving.SIZE, moving.SIZE)
    assert_drawn_as(theirs, folder, base, PROMPTS)


FIRST = """
import numpy, torch, diffusers
from PIL import Image
pipe = diffusers.DiffusionPipeline.from_pretrained(".", torch_dtype=torch.float32)
assert type(pipe).__name__ == "WanImageToVideoPipeline" and pipe.config.expand_timesteps
pipe.set_progress_bar_config(disable=True)
shown = Image.fromarray(numpy.asarray(SHOWN, dtype=numpy.uint8))
call = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32, "output_type": "pt"}
call |= {"num_frames": 9, "max_sequence_length": 16, "generator": torch.Generator().manual_seed(1)}
images = pipe(shown, PROMPTS[0], **call).frames.float().transpose(1, 2)
"""


def test_what_a_blueprint_says_of_a_pipeline_is_exported(tmp_path):
    """A teacher of image to video, made from one of text to video, is one where it is loaded again too."""
    path = [str(config("teachers/moving-wan-i2v.yaml"))]
    cfg = validate(read_files(path))
    cast = make_cast(cfg)
    run = SimpleNamespace(cast=cast, train_cfg=cfg.train, step=1, example="", folder=tmp_path, enlarges=0)
    folder = export_run(run, tmp_path / "export", {})
    assert load_export(str(folder)).role.backbone.family.name == cast.teacher.family.name == "wan-ti2v-image"
    first = moving.compose([0], "heldout")[0, :, 0]
    shown = first.permute(1, 2, 0).tolist()
    theirs = plainly(f"PROMPTS, SHOWN = {PROMPTS!r}, {shown!r}\n" + FIRST, folder)
    assert ((theirs[0, :, 0] - first / 255) ** 2).mean() < 0.01, "the clip begins with another picture"
