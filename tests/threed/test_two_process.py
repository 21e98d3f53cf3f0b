"""Two gloo processes train assets, or a network that makes them, as one process with twice the batch does."""

import pytest
import yaml

from fastgen.cli.train import main
from tests.threed import test_generators, test_run
from tests.training.test_two_process import DRIVER, assert_same, launch_two, state

EPS = {"lr": 1e-2, "eps": 1e-4}
CASES = {
    "assets": {**test_run.VALUES, "objective": {"name": "vsd", "camera_drop": 0.0}},
    "generator": {
        **test_generators.VALUES,
        "data": {"views": {"prompt": "a {red,blue,green} {bag,boot,hat}", "held_out": ["a red hat"]}},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_two_processes_equal_one_with_twice_the_batch(tiny, tmp_path, kind):
    values = {
        **CASES[kind],
        "teacher": {"path": str(tiny("sd")), "guidance": 2.0, "num_steps": 2},
        "optim": {"student": EPS, **({"critic": EPS} if kind == "assets" else {})},
    }
    for folder, batch in (("one", 8), ("two", 4)):
        values["train"] = {**CASES[kind]["train"], "train_batch_size": batch}
        (tmp_path / f"{folder}.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "one")]) == 0
    launch_two(tmp_path, DRIVER)
    assert_same(state(tmp_path / "one", 4), state(tmp_path / "two", 4), rtol=1e-3, atol=2e-5)
