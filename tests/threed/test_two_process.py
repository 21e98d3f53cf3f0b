"""Two gloo processes train assets as one process with twice the batch does."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastgen.cli.train import main
from tests.threed.test_run import VALUES
from tests.training.test_two_process import DRIVER, launch_two

EPS = {"lr": 1e-2, "eps": 1e-4}


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tiny, tmp_path):
    values = {
        **VALUES,
        "teacher": {"path": str(tiny("sd")), "guidance": 2.0, "num_steps": 2},
        "objective": {"name": "vsd", "camera_drop": 0.0},
        "optim": {"student": EPS, "critic": EPS},
    }
    for folder, batch in (("one", 8), ("two", 4)):
        values["train"] = {**VALUES["train"], "train_batch_size": batch}
        (tmp_path / f"{folder}.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "one")]) == 0
    launch_two(tmp_path, DRIVER)
    one, two = (
        load_file(tmp_path / f / "checkpoints/checkpoint-4/state.safetensors") for f in ("one", "two")
    )
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=2e-5, msg=key)
