"""The P4 rung: a method trained briefly, exported, and drawn by plain diffusers with the same images."""

import subprocess
import sys

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from fastgen.export import load_export
from fastgen.run import main

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fastgen":
            raise ImportError("fastgen may not be imported here")
sys.meta_path.insert(0, Blocked())
"""
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


def train(tiny, tmp_path, objective, teacher):
    """A few real steps on pictures, from the tiny flow teacher; the export folder."""
    (tmp_path / "set").mkdir()
    for i in range(10):
        Image.new("L", (16, 16), 25 * i).save(tmp_path / f"set/{i}.png")
    values = {
        "teacher": {"path": str(tiny("flow")), **(teacher or {})},
        "data": {"images": str(tmp_path / "set")},
        "objective": objective,
        "optim": {"student": {"lr": 1e-2}},
        "train": {"max_train_steps": 4, "train_batch_size": 4, "validation_steps": 0, "ema_decay": [0.5]},
        "eval": {"num_samples": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")]) == 0
    return tmp_path / "run/export"


def plainly(code, folder):
    """Images that a script without fastgen makes in this folder."""
    (folder / "plain.py").write_text(BLOCK + code + SAVE)
    done = subprocess.run([sys.executable, "plain.py"], cwd=folder, capture_output=True, text=True)
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

    from fastgen.build import Cast
    from fastgen.config import validate
    from fastgen.export import export_student
    from fastgen.sample import Painter, draw

    values = {
        "teacher": {"path": str(tiny(family))},
        "student": {"kind": kind, "num_steps": steps, "sampler": "ode", "lora": {"rank": 2}},
        "objective": objective,
        "data": {"name": "fashion"},
    }
    cfg = validate(values)
    cast, generator = Cast(cfg), torch.Generator().manual_seed(9)
    for p in cast.parts["student"].trainable().values():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    run = SimpleNamespace(cast=cast, cfg=cfg, step=1, folder=tmp_path)
    folder = export_student(run, tmp_path / "export", {})
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (folder / "plain.py").write_text(BLOCK + code)
    done = subprocess.run([sys.executable, "plain.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from torchvision.transforms.functional import pil_to_tensor

    image = pil_to_tensor(Image.open(folder / "sample.png")) / 255
    loaded = load_export(str(folder))
    prompt = "a red dress on a grey background"
    text = hasattr(loaded.codec, "prompts")
    cond = loaded.codec.prompts([prompt]) if text else loaded.codec.labels(torch.tensor([3]))
    mine, _ = draw(Painter(loaded, 0, 1.0, loaded.codec.null(1)), cond, [0], 1)
    assert (mine[0] - image).abs().max() < 1.01 / 255 + 1e-3
    ours = cast.parts["student"]
    here = SimpleNamespace(role=ours, codec=cast.teacher.codec, is_student=True, teacher=cast.teacher)
    cond = {k: v for k, v in cond.items() if k != "guidance"}
    trained, _ = draw(Painter(here, 0, 1.0, loaded.codec.null(1)), cond, [0], 1)
    assert (trained - mine).abs().max() < 1e-3, "the export is not what was trained"
