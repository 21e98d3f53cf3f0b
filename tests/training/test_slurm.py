"""The SLURM script, with stand-ins for the commands of a cluster that start two tasks here."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from fastgen.training import checkpoint
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "configs/accelerate/slurm.sh"
SRUN = """#!/bin/bash
for i in $(seq 0 $((SLURM_NTASKS - 1))); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & echo $! >> tasks; done
code=0
for task in $(jobs -p); do wait $task || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> requeued; fi
"""


def start(folder, *flags, **more):
    """The script in a folder with train.py, as a job of two tasks."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    shutil.copy(ROOT / "train.py", folder / "train.py")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2"}
    job["MASTER_PORT"] = str(free_port())
    paths = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment = os.environ | paths | job | {"ACCELERATE_USE_CPU": "true"} | more
    command = ["bash", str(SCRIPT), "--config", "run.yaml", "--output_dir", "run", *flags]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_signal_saves_requeues_and_the_next_start_goes_on(tmp_path):
    values = {
        "teacher": {"path": "analytic:gmm2d-flow"},
        "objective": {"name": "dmd2", "gan_weight": 0.0},
        "train": {"max_train_steps": 100_000, "train_batch_size": 8, "validation_steps": 0, "log_steps": 1},
        "eval": {"num_samples": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    job = start(tmp_path)
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert job.poll() is None
        time.sleep(0.1)
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    assert job.wait(60) == 0 and (tmp_path / "requeued").read_text() == "requeue 7\n"
    saved = int(checkpoint.newest_good(tmp_path / "run").name.removeprefix("checkpoint-"))
    values["train"]["max_train_steps"] = saved + 2
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    again = start(tmp_path, "--allow_changed", "train", SLURM_RESTART_COUNT="1")
    assert again.wait(90) == 0
    assert checkpoint.newest_good(tmp_path / "run").name == f"checkpoint-{saved + 2}"
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
