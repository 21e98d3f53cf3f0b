"""Two gloo processes train assets as one process with twice the batch does."""

import pytest
import yaml

from fastgen.cli.train import main
from tests.threed.test_run import VALUES
from tests.training.test_two_process import DRIVER, assert_same, launch_two, state

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
    assert_same(state(tmp_path / "one", 4), state(tmp_path / "two", 4), rtol=1e-3, atol=2e-5)
