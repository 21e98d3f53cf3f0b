"""fastgen-eval generate: the same files for any number of processes, after a kill too; other requests
refused.
"""

import json

import numpy as np
import pytest
from PIL import Image

from fastgen.cli import generate as module
from fastgen.cli.evaluate import main
from fastgen.core import interrupt
from fastgen.evaluation.inputs import open_source
from fastgen.evaluation.prompts import prompts_of, read_prompts
from fastgen.training.exporting import export_run
from tests.export.test_plain_diffusers import make_run


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """A two-step flow student of four classes."""
    root = tmp_path_factory.mktemp("exports")
    return export_run(make_run(tiny("flow"), out=root / "flow", num_steps=2), root / "flow" / "export", {})


def draw(model, out, *more, num=7) -> int:
    argv = ["generate", "--model", model, "--num_samples", num, "--out", out, "--batch_size", 3, *more]
    return main([str(a) for a in argv])


def files(out) -> dict[str, np.ndarray]:
    return {p.name: np.array(Image.open(p)) for p in sorted(out.glob("*.png"))}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_any_number_of_processes_draws_the_same_files(model, tmp_path, capsys):
    assert draw(model, tmp_path / "one") == 0
    for shard in ("1/2", "2/2"):
        assert not (tmp_path / "two" / "samples.json").exists()
        assert draw(model, tmp_path / "two", "--shard", shard) == 0
    assert same(files(tmp_path / "one"), files(tmp_path / "two")) and len(files(tmp_path / "two")) == 7
    records = [(tmp_path / n / "samples.json").read_text() for n in ("one", "two")]
    assert records[0] == records[1] and json.loads(records[0])["nfe"] == 2
    source = open_source(str(tmp_path / "one"))
    classes = [int(t) for t in prompts_of(source)]
    assert len(source) == 7 and classes == [i % (max(classes) + 1) for i in range(7)]


def test_torchrun_says_which_share(model, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert draw(model, tmp_path / "out") == 0
    assert sorted(files(tmp_path / "out")) == ["000003.png", "000004.png", "000005.png"]


def test_a_stopped_call_goes_on(model, tmp_path, monkeypatch, capsys):
    assert draw(model, tmp_path / "whole") == 0
    drawn = []

    def stop():
        drawn.append(1)
        if len(drawn) == 1:
            raise interrupt.Stopped("SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr(module.interrupt, "check", stop)
        assert draw(model, tmp_path / "cut") == interrupt.REQUEUE
    assert len(files(tmp_path / "cut")) == 3 and "images drawn so far are kept" in capsys.readouterr().err
    (tmp_path / "cut" / "000001.png").unlink()
    assert draw(model, tmp_path / "cut") == 0 and "drew 7 of 7" in capsys.readouterr().out
    assert same(files(tmp_path / "whole"), files(tmp_path / "cut"))
    assert draw(model, tmp_path / "cut") == 0 and "drew 0 of 7" in capsys.readouterr().out
    assert draw(model, tmp_path / "cut", num=9) == 0 and "drew 3 of 9" in capsys.readouterr().out


def test_other_requests_and_wrong_ones_are_refused(model, tmp_path, capsys):
    assert draw(model, tmp_path / "out") == 0
    (tmp_path / "labels.txt").write_text("1\n0\n")
    (tmp_path / "wrong.txt").write_text("a dress\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").write_text("")
    for more, said in (
        (("--seed", 5), "holds images of another seed"),
        (("--prompts", tmp_path / "labels.txt"), "holds images of another texts"),
        (("--prompts", tmp_path / "wrong.txt"), "--prompts: found 'a dress'; give class labels 0 to"),
        (("--shard", "3/2"), "--shard: found '3/2'"),
        (("--group_size", 0), "--group_size: found 0"),
    ):
        assert draw(model, tmp_path / "out", *more) == 2
        assert said in capsys.readouterr().err
    assert draw(model, tmp_path / "full") == 2 and "is not empty" in capsys.readouterr().err


def test_groups_show_one_prompt_each(model, tmp_path):
    assert draw(model, tmp_path / "out", "--group_size", 3) == 0
    assert prompts_of(open_source(str(tmp_path / "out"))) == list("0001112")


def test_a_model_that_is_shown_a_picture_is_refused(tmp_path, capsys):
    """Nothing here gives it one; grey would be drawn from in silence."""
    from tests.families.cases.unets import pix2pix_folder

    pix2pix_folder(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red dress\n")
    assert draw(tmp_path / "model", tmp_path / "out", "--prompts", tmp_path / "prompts.txt") == 2
    assert "is shown a picture" in capsys.readouterr().err and not list(tmp_path.glob("out/*.png"))


def test_prompts_are_spread_over_groups(tmp_path):
    """As `generate --group_size 2` draws them."""
    (tmp_path / "p.txt").write_text("red\ngreen\n")
    found = read_prompts(tmp_path / "p.txt", 8, group_size=2)
    assert found == ["red", "red", "green", "green"] * 2
    assert read_prompts(tmp_path / "p.txt", 4) == ["red", "green"] * 2
