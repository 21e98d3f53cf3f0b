"""The out-of-tree example: one file, trained through --plugin, under the same contract as every method."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python(*args, **env):
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, env=os.environ | env
    )


def test_the_example_gets_the_contract_battery():
    wanted = ["-m", "pytest", "-n", "0", "tests/objectives/test_contract.py", "-k", "denoiser_kd"]
    done = python(*wanted, FASTGEN_TEST_PLUGIN="examples/denoiser_kd.py")
    assert done.returncode == 0, done.stdout
    assert "7 passed" in done.stdout, done.stdout  # and 8 more kinds of network with -m slow


def test_the_example_trains_from_the_command_line(tmp_path):
    short = ["--train.max_train_steps", "2", "--train.train_batch_size", "4", "--train.validation_steps", "0"]
    flags = ["--plugin", "examples/denoiser_kd.py", "--config", "examples/denoiser_kd.yaml", *short]
    done = python("train.py", *flags, "--output_dir", str(tmp_path / "run"), "--eval.num_samples", "0")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/export/unet").is_dir()
