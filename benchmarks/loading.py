"""Memory that two processes take to get ready over a teacher of a hundred million parameters, when each holds
whole networks and when they hold a part each (train.sharding fsdp).
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = {"whole": {}, "parts": {"sharding": "fsdp"}}
CHANNELS = [512, 1024]


def loading() -> dict:
    """Most megabytes of each of two processes, from the libraries' own to before the first step, over those
    of teacher, student and critic (DMD2, full, float32).
    """
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        networks = 3 * _teacher(Path(folder) / "teacher")
        for layout in LAYOUTS:
            found[layout] = _two_processes(Path(folder), layout)
            print(layout, found[layout], flush=True)
    return {
        "networks_mb": networks / 2**20,
        "peak_mb": found,
        "second_process_over_networks": {
            name: round(peaks["1"] * 2**20 / networks, 3) for name, peaks in found.items()
        },
    }


def _teacher(folder: Path) -> int:
    """The digits' teacher with wider layers and weights drawn at random; its bytes."""
    from diffusers import UNet2DModel

    shutil.copytree(ROOT / "assets/teachers/digits", folder)
    config = json.loads((folder / "unet/config.json").read_text())
    torch.manual_seed(0)
    net = UNet2DModel.from_config({**config, "block_out_channels": CHANNELS})
    net.save_pretrained(folder / "unet")
    return sum(p.numel() * p.element_size() for p in net.parameters())


def _two_processes(folder: Path, layout: str) -> dict[str, float]:
    """Megabytes by rank."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "benchmarks.loading", str(folder), layout]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {rank: json.loads((folder / f"{layout}-{rank}.json").read_text()) for rank in ("0", "1")}


def main(folder: Path, layout: str) -> None:
    """One process: what it holds more than before, at most."""
    import psutil
    from accelerate import Accelerator

    import fastgen.families.registry  # noqa: F401  (the libraries' own memory)
    from benchmarks.real_size import peak
    from fastgen.config.run import validate
    from fastgen.data.loader import load_data
    from fastgen.training.assembly import make_cast, make_trainer

    torch.set_num_threads(1)
    train = {"validation_steps": 0, "checkpointing_steps": 0, "ema_decay": [], **LAYOUTS[layout]}
    cfg = validate(
        {
            "teacher": {"path": str(folder / "teacher")},
            "objective": {"name": "dmd2", "gan_weight": 0.0},
            "data": {"name": "digits", "limit": 64},
            "train": train,
        }
    )
    accelerator = Accelerator(cpu=True)
    before = psutil.Process().memory_info().rss
    cast = make_cast(cfg, accelerator.device)
    data = load_data(cfg.data, cast.teacher, accelerator.device)
    make_trainer(cfg, cast, data, folder, accelerator)
    held = round((peak("cpu") - before) / 2**20, 1)
    (folder / f"{layout}-{accelerator.process_index}.json").write_text(json.dumps(held))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
