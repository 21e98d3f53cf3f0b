"""Numbers of bundled teachers from record: found by the whole protocol, and true."""

import json

import pytest

from fastgen.config.parse import read_files
from fastgen.config.run import validate
from fastgen.core.paths import config
from fastgen.data.loader import load_data
from fastgen.evaluation import recorded_teachers
from fastgen.evaluation.evaluator import measure
from fastgen.evaluation.recorded_teachers import file_of, find, protocol_of
from fastgen.training.assembly import make_cast, make_evaluator

VALUES = {
    "teacher": {"path": "assets:teachers/digits", "num_steps": 3},
    "data": {"name": "digits", "limit": 40},
    "objective": {"name": "dmd2", "gan_weight": 0.0},
    "eval": {"num_samples": 24, "batch_size": 9},
}


def evaluator_of(values: dict):
    cfg = validate(values)
    cast = make_cast(cfg)
    return make_evaluator(cfg, cast, load_data(cfg.data, cast.teacher))


@pytest.fixture
def evaluator():
    return evaluator_of(VALUES)


@pytest.fixture
def record(tmp_path, monkeypatch, evaluator):
    """The digits teacher's record has one entry, of this run's protocol."""
    entry = {
        "measured": "by hand",
        "protocol": protocol_of(evaluator, 24),
        "teacher": {"nfe": 3, "fd_mini": 123.0},
        "look": {"contrast": 0.25},
    }
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"entries": [{"protocol": {}}, entry]}))
    monkeypatch.setattr(recorded_teachers, "file_of", lambda path: file)
    return entry


def test_a_run_of_the_same_protocol_takes_the_record(evaluator, record):
    shown = {}
    results = measure(evaluator, lambda who, steps, images: shown.setdefault(who, len(images)), False)
    assert results["teacher"]["fd_mini"] == 123.0 and results["look"]["teacher"] == {"contrast": 0.25}
    assert results["teacher"]["seconds_per_sample"] > 0, "times are of this machine"
    assert results["protocol"]["teacher_measured"] == "by hand"
    assert shown == {"teacher": 9, "student": 24, "untrained_student": 24}, "a batch of it, to be looked at"
    assert results["student"]["fd_mini"] != 123.0


def test_it_can_be_measured_again(evaluator, record):
    results = measure(evaluator, None, True)
    assert results["teacher"]["fd_mini"] != 123.0 and "teacher_measured" not in results["protocol"]


@pytest.mark.parametrize("key", ["weights", "num_samples", "seed", "guidance", "teacher_steps", "extractor"])
def test_any_other_protocol_is_measured(evaluator, record, key, tmp_path):
    record["protocol"][key] = "another"
    (tmp_path / "measured.json").write_text(json.dumps({"entries": [record]}))
    assert find(evaluator, 24) is None


def test_other_teachers_have_no_record(evaluator):
    assert file_of("runs/mine/export") is None and file_of("analytic:gmm2d-vp") is None
    assert find(evaluator, 24) is None, "no such protocol is on record"


def test_the_quick_start_finds_its_teacher():
    cfg = validate(read_files([str(config("recipes/quickstart.yaml"))]))
    cast = make_cast(cfg)
    found = find(make_evaluator(cfg, cast, load_data(cfg.data, cast.teacher)), cfg.eval.num_samples)
    assert found is not None and found["measured"] == "python -m eval teacher --recipe quickstart"


@pytest.mark.slow
def test_the_record_is_what_measuring_gives():
    """A hundred seconds: the teacher of the quick start, drawn and scored anew."""
    from fastgen.evaluation.evaluator import scored

    cfg = validate(read_files([str(config("recipes/quickstart.yaml"))]))
    cast = make_cast(cfg)
    evaluator = make_evaluator(cfg, cast, load_data(cfg.data, cast.teacher))
    num = cfg.eval.num_samples
    again = scored(evaluator, "teacher", evaluator.images("teacher", num, cfg.eval.seed), 0, None, {})
    assert again == pytest.approx(find(evaluator, num)["teacher"], rel=0.02)
