"""Tiny networks that enlarge pictures, distilled as a user would, and one that is drawn by sample.py."""

import numpy as np
import torch
import yaml
from PIL import Image

from fastgen.cli.sample import main as sample
from fastgen.cli.train import main


def enlarging_run(folder, *flags, **values):
    """A few real steps on six pictures from the teacher in a folder, which enlarges by 4; the exit code and
    the export.
    """
    (folder / "set").mkdir(exist_ok=True)
    for i in range(6):
        Image.linear_gradient("L").resize((16, 16)).rotate(60 * i).save(folder / "set" / f"{i}.png")
    values = {
        "teacher": {"path": str(folder / "teacher")},
        "data": {"images": str(folder / "set"), "degradation": {"factor": 4}},
        "optim": {"student": {"lr": 1e-2}},
        "train": {"max_train_steps": 3, "train_batch_size": 2, "validation_steps": 0, "ema_decay": [0.5]},
        "eval": {"num_samples": 4},
        **values,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    done = main(["--config", str(folder / "run.yaml"), "--output_dir", str(folder / "run"), *flags])
    return done, folder / "run/export"


def restorer_run(folder, *flags, colours=3, **change):
    """The same of OFTSR, from a restorer of its own."""
    from tests.families.cases.unets import restorer_folder

    teacher = folder / "teacher"
    if not teacher.is_dir():
        restorer_folder(teacher, colours)
    values = {"teacher": {"path": str(teacher), "num_steps": 4}, "objective": {"name": "oftsr"}, **change}
    return enlarging_run(folder, *flags, **values)


def restorer_export(folder):
    """An export of OFTSR with a small picture, image.png, beside it."""
    done, export = restorer_run(folder)
    assert done == 0
    Image.linear_gradient("L").resize((4, 4)).convert("RGB").save(export / "image.png")
    return export


def drawn(export, out, *flags):
    given = ["--model", str(export), "--image", str(export / "image.png"), "--out", str(out), "--scale", "4"]
    assert sample([*given, "--overwrite", *flags]) == 0
    return torch.from_numpy(np.array(Image.open(next(out.glob("0*.png")))).astype(np.int64))
