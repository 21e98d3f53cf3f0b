"""Two gloo processes give the parameters of one process with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fastgen.cli.train import main
from fastgen.training import checkpoint
from tests.support.heavier import first_of

ROOT = Path(__file__).resolve().parents[2]
START = """
import sys, torch
from fastgen.cli.train import main
from fastgen.evaluation.spread import Spread
worlds, reduce, drawn, together = set(), torch.distributed.all_reduce, [], Spread._together
def all_reduce(tensor, *args, **kwargs):
    worlds.add(torch.distributed.get_world_size())
    return reduce(tensor, *args, **kwargs)
torch.distributed.all_reduce = all_reduce
Spread._together = lambda self, draw: (drawn.append(1), together(self, draw))[1]
code = main(sys.argv[1:])
assert worlds == {2}, worlds
"""
DRIVER = START + "sys.exit(code)\n"
COUNTED = START + "assert len(drawn) == 6, len(drawn)\nsys.exit(code)\n"
"""six rounds: five pictures in batches of two, the teacher's once, the student's before and after training"""
# Adam divides a gradient by its size: at its usual epsilon one that is rounding alone decides a whole step.
EPS = {"lr": 1e-3, "eps": 1e-4}
METHODS = {
    "dmd2": {"name": "dmd2", "student_every": 2, "gan_weight": 0.1, "disc_weight": 0.1},
    "consistency": {"name": "consistency", "num_scales": 8, "target_decay": 0.9},
}


def launch_two(tmp_path, driver: str, *flags: str, processes: int = 2, fails: bool = False) -> str:
    """Run two.yaml into the folder `two` by two processes (or more) that the driver starts from; what they
    print to stderr.
    """
    (tmp_path / "driver.py").write_text(driver)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = ["driver.py", "--config", "two.yaml", "--output_dir", "two", *flags]
    command = [*launch, "--nproc-per-node", str(processes), *run]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    limit = 240 if processes == 2 else 600
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=limit
    )
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    return dict(checkpoint.load(folder / f"checkpoints/checkpoint-{step}")[0])


def assert_same_losses(one: Path, two: Path, rel: float) -> None:
    """Every line of metrics.jsonl has the same losses, means over the samples of all processes."""
    found = []
    for folder in (one, two):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append([{n: v for n, v in line.items() if n.endswith("/loss")} for line in lines])
    assert any(found[0]) and len(found[0]) == len(found[1])
    for a, b in zip(*found):
        assert a == pytest.approx(b, rel=rel)


def assert_same(one: dict, two: dict, rtol: float, atol: float) -> None:
    """The same tensors under the same names."""
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=rtol, atol=atol, msg=key)


@pytest.mark.parametrize("name", first_of(METHODS))
def test_two_processes_equal_one_with_twice_the_batch(name, tmp_path):
    """In what they train and log, and in the pictures of a validation, which both draw."""
    values = {
        "teacher": {"path": "assets:teachers/digits", "num_steps": 2},
        "objective": METHODS[name],
        "data": {"name": "digits", "limit": 64},
        "student": {"num_steps": 2},
        "optim": {"student": EPS, "critic": EPS} if name == "dmd2" else {"student": EPS},
        "train": {"max_train_steps": 4, "validation_steps": 4, "ema_decay": [0.9]},
        "eval": {"num_samples": 0, "validation_samples": 0, "grid": 5, "batch_size": 2},
    }
    for folder, batch in (("one", 8), ("two", 4)):
        values["train"]["train_batch_size"] = batch
        (tmp_path / f"{folder}.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "one")]) == 0
    launch_two(tmp_path, COUNTED)
    assert_same(state(tmp_path / "one", 4), state(tmp_path / "two", 4), rtol=1e-3, atol=2e-5)
    assert_same_losses(tmp_path / "one", tmp_path / "two", rel=1e-3)
    for picture in ("teacher.png", "step_000000.png"):
        one, two = ((tmp_path / f / "samples" / picture).read_bytes() for f in ("one", "two"))
        assert one == two, picture
    assert (tmp_path / "two/samples/step_000004.png").is_file()
