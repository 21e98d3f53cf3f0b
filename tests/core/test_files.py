"""JSON files: infinities are kept where diffusers reads them only; a failed write changes nothing."""

import json
import math

import diffusers
import pytest

from fastgen.core.files import write_json, write_model_json
from fastgen.core.reading import read_json

CONFIG = dict(diffusers.DPMSolverMultistepScheduler().config)


def test_infinities_stay_in_what_diffusers_reads(tmp_path):
    path = tmp_path / "scheduler_config.json"
    assert CONFIG["lambda_min_clipped"] == -math.inf
    write_model_json(path, CONFIG)
    read = read_json(path, "key")
    assert read["lambda_min_clipped"] == -math.inf
    again = diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    assert again.config.lambda_min_clipped == -math.inf


def test_they_are_left_out_of_what_every_reader_takes(tmp_path):
    write_json(tmp_path / "a.json", CONFIG)
    text = (tmp_path / "a.json").read_text()
    assert "Infinity" not in text and "lambda_min_clipped" not in json.loads(text)


@pytest.mark.parametrize("write", [write_json, write_model_json])
def test_a_value_that_is_no_json_leaves_the_old_file(write, tmp_path):
    path = tmp_path / "a.json"
    write(path, {"a": 1})
    with pytest.raises(TypeError):
        write(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
