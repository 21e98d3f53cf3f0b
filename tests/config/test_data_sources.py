"""Of several data sources the later one wins, in one line; two in one place are an error that names both."""

import itertools

import pytest
import yaml

from fastgen.config.data_sources import SOURCES
from fastgen.config.run import load, validate
from fastgen.core.errors import UserError

VALUES = {"name": "digits", "images": "my/pictures", "prompts": "my/prompts.txt"}
PAIRS = list(itertools.permutations(SOURCES, 2))


def file(path, *keys):
    # a method that needs no images, so that every source is enough
    values = {"objective": {"name": "swiftbrush"}, "data": {key: VALUES[key] for key in keys}}
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("old,new", PAIRS)
def test_a_flag_wins_over_a_file_and_says_so(tmp_path, capsys, old, new):
    cfg = load([file(tmp_path / "a.yaml", old)], [f"--data.{new}", VALUES[new]])
    assert (getattr(cfg.data, new), getattr(cfg.data, old)) == (VALUES[new], "")
    message = capsys.readouterr().out
    assert message == f"data.{old}: {VALUES[old]!r} is replaced by data.{new}, which was given later\n"


@pytest.mark.parametrize("old,new", PAIRS)
def test_a_later_file_wins_too(tmp_path, capsys, old, new):
    cfg = load([file(tmp_path / "a.yaml", old), file(tmp_path / "b.yaml", new)], [])
    assert (getattr(cfg.data, new), getattr(cfg.data, old)) == (VALUES[new], "")
    assert "is replaced by" in capsys.readouterr().out


@pytest.mark.parametrize("one,two", PAIRS)
def test_two_in_one_place_are_refused(tmp_path, one, two):
    flags = [f"--data.{one}", VALUES[one], f"--data.{two}", VALUES[two]]
    for files, argv in (([file(tmp_path / "a.yaml", one, two)], []), ([file(tmp_path / "b.yaml")], flags)):
        with pytest.raises(UserError) as error:
            load(files, argv)
        assert f"{one} {VALUES[one]!r}" in str(error.value) and f"{two} {VALUES[two]!r}" in str(error.value)


def test_an_emptied_source_says_nothing(tmp_path, capsys):
    cfg = load([file(tmp_path / "a.yaml", "name")], ["--data.name", "", "--data.images", "x"])
    assert cfg.data.images == "x" and not cfg.data.name and capsys.readouterr().out == ""
    assert load([file(tmp_path / "a.yaml", "name")], ["--data.limit", "3"]).data.name == "digits"


@pytest.mark.parametrize("key", ["num_samples", "teacher_samples"])
def test_one_sample_is_refused_before_anything_runs(key):
    for num, fine in ((0, True), (1, False), (2, True)):
        values = {"objective": {"name": "sft"}, "data": {"name": "digits"}, "eval": {key: num}}
        if fine:
            assert getattr(validate(values).eval, key) == num
            continue
        with pytest.raises(UserError, match=f"{key}: found 1; use 2 samples or more"):
            validate(values)
