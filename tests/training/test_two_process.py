"""Two gloo processes give the parameters of one process with twice the batch."""

import os
import socket
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
DRIVER = """
import sys, torch
from fastgen.cli.train import main
worlds, reduce = set(), torch.distributed.all_reduce
def all_reduce(tensor, *args, **kwargs):
    worlds.add(torch.distributed.get_world_size())
    return reduce(tensor, *args, **kwargs)
torch.distributed.all_reduce = all_reduce
code = main(sys.argv[1:])
assert worlds == {2}, worlds
sys.exit(code)
"""
# Adam divides a gradient by its size: at its usual epsilon one that is rounding alone decides a whole step.
EPS = {"eps": 1e-4}
METHODS = {
    "dmd2": {"name": "dmd2", "student_every": 2, "gan_weight": 0.1, "disc_weight": 0.1},
    "consistency": {"name": "consistency", "num_scales": 8, "target_decay": 0.9},
}


def launch_two(tmp_path, driver: str, *flags: str, processes: int = 2, fails: bool = False) -> None:
    """Run two.yaml into the folder `two` by two processes (or more) that the driver starts from."""
    (tmp_path / "driver.py").write_text(driver)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    run = ["driver.py", "--config", "two.yaml", "--output_dir", "two", *flags]
    command = [*launch, "--master-port", port, *run]
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


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    return dict(checkpoint.load(folder / f"checkpoints/checkpoint-{step}")[0])


def assert_same(one: dict, two: dict, rtol: float, atol: float) -> None:
    """The same tensors under the same names."""
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=rtol, atol=atol, msg=key)


@pytest.mark.parametrize("name", first_of(METHODS))
def test_two_processes_equal_one_with_twice_the_batch(name, tmp_path):
    values = {
        "teacher": {"path": "analytic:gmm2d-flow"},
        "objective": METHODS[name],
        "student": {"num_steps": 2},
        "optim": {"student": EPS, "critic": EPS} if name == "dmd2" else {"student": EPS},
        "train": {"max_train_steps": 4, "validation_steps": 0, "ema_decay": [0.9]},
        "eval": {"num_samples": 0},
    }
    for folder, batch in (("one", 16), ("two", 8)):
        values["train"]["train_batch_size"] = batch
        (tmp_path / f"{folder}.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "one")]) == 0
    launch_two(tmp_path, DRIVER)
    assert_same(state(tmp_path / "one", 4), state(tmp_path / "two", 4), rtol=1e-4, atol=2e-6)


COUNTED = """
import sys, torch
from fastgen.cli.train import main
from fastgen.evaluation.spread import Spread
drawn, together = [], Spread._together
Spread._together = lambda self, draw: (drawn.append(1), together(self, draw))[1]
code = main(sys.argv[1:])
assert len(drawn) == 6, len(drawn)
sys.exit(code)
"""
"""five pictures in batches of two: the teacher's once, the student's grid twice; two rounds of two each"""


def test_a_validation_is_drawn_by_both_processes_and_is_the_same(tmp_path):
    values = {
        "teacher": {"path": "assets:teachers/digits", "num_steps": 2},
        "objective": {"name": "diff_instruct"},
        "data": {"name": "digits", "limit": 8},
        "train": {"max_train_steps": 1, "validation_steps": 1, "checkpointing_steps": 0},
        "eval": {"num_samples": 0, "validation_samples": 0, "grid": 5, "batch_size": 2},
    }
    for folder, batch in (("one", 2), ("two", 1)):
        values["train"]["train_batch_size"] = batch
        (tmp_path / f"{folder}.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "one")]) == 0
    launch_two(tmp_path, COUNTED)
    for name in ("teacher.png", "step_000000.png"):
        one, two = ((tmp_path / f / "samples" / name).read_bytes() for f in ("one", "two"))
        assert one == two, name
    assert (tmp_path / "two/samples/step_000001.png").is_file()


def test_an_expert_that_only_another_process_needed(monkeypatch):
    """Its gradient is averaged with zeros here, and the processes agree on what they send."""
    from fastgen.training.optimizers import average_gradients

    def all_reduce(tensor, op=None):
        tensor.fill_(1) if tensor.dtype == torch.uint8 else tensor.add_(torch.tensor([0, 0, 4.0, 4.0, 4.0]))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    here, elsewhere = (torch.nn.Parameter(torch.ones(n)) for n in (2, 3))
    here.grad = torch.full((2,), 2.0)
    average_gradients([here, elsewhere])
    assert here.grad.tolist() == [1.0] * 2 and elsewhere.grad.tolist() == [2.0] * 3
