"""A tiny network that restores pictures, distilled as a user would, and drawn by sample.py."""

import numpy as np
import torch
import yaml
from PIL import Image

from fastgen.cli.sample import main as sample
from fastgen.cli.train import main


def restorer_run(folder, *flags, colours=3, **change):
    """A few real steps from a tiny teacher that enlarges by 4; the exit code and the export."""
    from tests.families.cases.unets import restorer_folder

    if not (folder / "teacher").is_dir():
        restorer_folder(folder / "teacher", colours)
        (folder / "set").mkdir()
        for i in range(6):
            Image.linear_gradient("L").resize((16, 16)).rotate(60 * i).save(folder / "set" / f"{i}.png")
    values = {
        "teacher": {"path": str(folder / "teacher"), "num_steps": 4},
        "data": {"images": str(folder / "set"), "degradation": {"factor": 4}},
        "objective": {"name": "oftsr"},
        "optim": {"student": {"lr": 1e-2}},
        "train": {"max_train_steps": 3, "train_batch_size": 2, "validation_steps": 0, "ema_decay": [0.5]},
        "eval": {"num_samples": 4},
        **change,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    done = main(["--config", str(folder / "run.yaml"), "--output_dir", str(folder / "run"), *flags])
    return done, folder / "run/export"


def drawn(export, out, *flags):
    given = ["--model", str(export), "--image", str(export / "image.png"), "--out", str(out), "--scale", "4"]
    assert sample([*given, "--overwrite", *flags]) == 0
    return torch.from_numpy(np.array(Image.open(next(out.glob("0*.png")))).astype(np.int64))
