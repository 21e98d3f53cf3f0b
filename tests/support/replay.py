"""The P4 rung: a method trained briefly, exported, and drawn by plain diffusers with the same images."""

import json

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from fastgen.cli.sample import Generator, draw
from fastgen.cli.train import main
from fastgen.export.load import load_export
from fastgen.networks.codecs import TextCodec
from tests.support.plain import run_plain
from tests.support.tiny import PROMPTS

SAVE = """
from safetensors.torch import save_file
save_file({"images": images.contiguous()}, "images.safetensors")
"""
STUDENT = """
import torch
from diffusers import FlowMatchLCMScheduler, UNet2DModel
unet = UNet2DModel.from_pretrained(".", subfolder="unet", torch_dtype=torch.float32)
scheduler = FlowMatchLCMScheduler.from_pretrained(".", subfolder="scheduler")
scheduler.set_timesteps(1)
x = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    t = scheduler.timesteps[0]
    x = scheduler.step(unet(x, t, class_labels=torch.arange(10)).sample, t, x).prev_sample
images = (torch.nn.functional.pixel_shuffle(x, 2) / 2 + 0.5).clamp(0, 1)
"""


def train(tiny, tmp_path, objective, teacher=None, family="flow", **more):
    """A few real steps on pictures, from a tiny teacher; the export folder."""
    (tmp_path / "set").mkdir()
    rows = [{"file_name": f"{i}.png", "text": PROMPTS[i % 2], "label": i} for i in range(10)]
    for i, row in enumerate(rows):
        Image.new("L", (16, 16), 25 * i).save(tmp_path / "set" / row["file_name"])
    (tmp_path / "set/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {
        "teacher": {"path": str(tiny(family)), **(teacher or {})},
        "data": {"images": str(tmp_path / "set")},
        "objective": objective,
        "optim": {"student": {"lr": 1e-2}},
        **more,
        "train": {"max_train_steps": 4, "train_batch_size": 4, "validation_steps": 0, "ema_decay": [0.5]},
        "eval": {"num_samples": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")]) == 0
    return tmp_path / "run/export"


def moved(cast, by):
    """The cast with random numbers of this size added to what its student trains: no teacher any more."""
    generator = torch.Generator().manual_seed(9)
    for p in cast.parts["student"].trainable().values():
        p.data += by * torch.randn(p.shape, generator=generator)
    return cast


def plainly(code, folder):
    """Images that a script without fastgen makes in this folder."""
    (folder / "plain.py").write_text(code + SAVE)
    done = run_plain("plain.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "images.safetensors")["images"]


def replay(tiny, tmp_path, objective, teacher=None):
    """A plain loop against the exported student in our code, and against the untrained teacher."""
    export = train(tiny, tmp_path, objective, teacher)
    images = plainly(STUDENT, export)
    x = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, cond = torch.ones(10, dtype=torch.float64), {"class_labels": torch.arange(10)}
    loaded, base = load_export(str(export)), load_export(str(tiny("flow")))
    with torch.no_grad():
        ours = loaded.codec.decode(loaded.role(x, t, cond))
        untrained = base.codec.decode(base.role(x, t, cond))
    assert (images - ours).abs().max() < 1e-3
    assert (images - untrained).abs().max() > 1e-2


def card_replay(tiny, tmp_path, objective, family, steps=1, kind="full"):
    """The code of the model card, run without fastgen, against the export in ours, at moved weights."""
    from types import SimpleNamespace

    from fastgen.cli.sample import Generator, draw
    from fastgen.config.run import validate
    from fastgen.training.assembly import make_cast
    from fastgen.training.exporting import export_run

    values = {
        "teacher": {"path": str(tiny(family))},
        "student": {"kind": kind, "num_steps": steps, "sampler": "ode", "lora": {"rank": 2}},
        "objective": objective,
        "data": {"name": "fashion"},
    }
    cfg = validate(values)
    cast = moved(make_cast(cfg), 0.05)
    run = SimpleNamespace(cast=cast, train_cfg=cfg.train, step=1, example="", enlarges=0, folder=tmp_path)
    folder = export_run(run, tmp_path / "export", {})
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (folder / "plain.py").write_text(code)
    done = run_plain("plain.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    pixels = torch.from_numpy(np.array(Image.open(folder / "sample.png")))
    image = (pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)) / 255
    loaded = load_export(str(folder))
    prompt = "a red dress on a grey background"
    text = isinstance(loaded.codec, TextCodec)
    cond = loaded.codec.prompts([prompt]) if text else loaded.codec.labels(torch.tensor([3]))
    mine, _ = draw(Generator(loaded, 0, 1.0, loaded.codec.null(1)), cond, [0], 1)
    assert (mine[0] - image).abs().max() < 1.01 / 255 + 1e-3
    ours = cast.parts["student"]
    here = SimpleNamespace(role=ours, codec=cast.teacher.codec, is_student=True, teacher=cast.teacher)
    cond = {k: v for k, v in cond.items() if k != "guidance"}
    trained, _ = draw(Generator(here, 0, 1.0, loaded.codec.null(1)), cond, [0], 1)
    assert (trained - mine).abs().max() < 1e-3, "the export is not what was trained"


def assert_drawn_as(theirs, folder, base, prompts):
    """What plain diffusers drew in four steps with the seeds 11 and 12 is what an exported student draws in
    our code, and not what the network of its base draws in the student's place.
    """
    loaded, untrained = load_export(str(folder)), load_export(base)
    cond = loaded.codec.prompts(prompts)
    ours = draw(Generator(loaded, 4, 1.0, {}), cond, [11, 12], 2)[0]
    assert (theirs - ours).abs().max() < 1e-3
    untrained.role = loaded.role.with_network(untrained.role)
    assert (theirs - draw(Generator(untrained, 0, 1.0, {}), cond, [11, 12], 2)[0]).abs().max() > 1e-2


COUNTS = """
import json, torch, diffusers
document = json.load(open("fastgen.json"))
info = document["export"]
sana = PIPELINE == "SanaPipeline"
pipe = getattr(diffusers, PIPELINE).from_pretrained(BASE, torch_dtype=torch.float32)
kind = getattr(diffusers, info["scheduler"]["_class_name"])
pipe.load_lora_weights(".", weight_name=info["lora"])
pipe.set_progress_bar_config(disable=True)
more = {"max_sequence_length": 48, "complex_human_instruction": None, "use_resolution_binning": False}
more = {"height": 32, "width": 32, **more} if sana else {"height": 16, "width": 16}
def draw(num, override=None):
    other = info["other_step_counts"].get(str(num), {"scheduler": {}, "arguments": {}})
    pipe.scheduler = kind.from_pretrained(".", subfolder="scheduler", **(override or other["scheduler"]))
    seeds = [torch.Generator().manual_seed(s) for s in (11, 12)]
    call = (other["arguments"] or {"num_inference_steps": num}) | info["step_arguments"] | more
    return pipe(PROMPTS, generator=seeds, output_type="pt", guidance_scale=1.0, **call).images.float()
images = torch.stack([draw(n) for n in NUMS] + [draw(NUMS[-1], OTHER)])
"""


def replay_counts(
    tiny, tmp_path, objective, scheduler, counts=(1, 2, 4, 8), other=None, family="sd", **student
):
    """One LoRA, drawn by its pipeline at several step counts through the scheduler as exported (with the
    settings that its card names for another count); another setting of the scheduler gives other images.
    """
    student = {"kind": "lora", "lora": {"rank": 4, "lora_alpha": 40}, "num_steps": 4, **student}
    export = train(tiny, tmp_path, objective, family=family, student=student)
    loaded, base = load_export(str(export)), load_export(str(tiny(family)))
    values = {"BASE": str(tiny(family)), "PROMPTS": list(PROMPTS), "NUMS": counts, "OTHER": other}
    values["PIPELINE"] = base.teacher.backbone.family.pipeline
    plain = plainly("".join(f"{k} = {v!r}\n" for k, v in values.items()) + COUNTS, export)
    assert loaded.info.scheduler_class == scheduler
    cond = loaded.codec.prompts(list(PROMPTS))
    for num, theirs in zip(counts, plain):
        mine = draw(Generator(loaded, num, 1.0, {}), cond, [11, 12], 2)[0]
        assert (theirs - mine).abs().max() < 1e-3, num
        base.role = loaded.role.with_steps(num).with_network(base.role)
        untrained = draw(Generator(base, 0, 1.0, {}), cond, [11, 12], 2)[0]
        assert (theirs - untrained).abs().max() > 1e-2, num
    assert (plain[-1] - plain[-2]).abs().max() > 3e-3, "the scheduler's setting does not show"
    return loaded
