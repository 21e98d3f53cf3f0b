"""What recipes start from: chains, what they cost together, and one command that runs them."""

import json
from types import SimpleNamespace

import pytest

from eval import chain, evidence
from eval.__main__ import main
from fastgen.config.run import dump
from fastgen.core.errors import UserError


@pytest.fixture(autouse=True)
def forgotten():
    chain.chain.cache_clear()


def test_a_chain_is_what_a_config_reads_from_runs():
    assert chain.chain("fashion_ode_pairs") == ("fashion_ode_pairs",)
    assert chain.chain("fashion_dmd2") == ("fashion_ode_pairs", "fashion_dmd2")
    assert chain.chain("fashion_dmd2_unguided")[0] == "fashion_ode_pairs+unguided"
    v2 = chain.chain("tinted-sd_swiftbrush_v2")
    assert v2 == ("tinted-sd_swiftbrush", "tinted-sd_swiftbrush_clip", "tinted-sd_swiftbrush_v2")
    assert chain.chain("fashion_dmd2+score_alone")[0] == "fashion_ode_pairs"


def test_a_circle_is_refused(monkeypatch):
    monkeypatch.setattr(chain, "load_recipe", lambda name: name)
    monkeypatch.setattr(chain, "needed", {"a": ["b"], "b": ["a"]}.get)
    with pytest.raises(UserError, match="a needs b needs a"):
        chain.chain("a")


def test_the_cost_is_that_of_every_run_before():
    """By hand: 2200 steps over 5120 pairs of 10 guided steps, then 900 steps of DMD2."""
    pairs, calls = chain.work("fashion_ode_pairs")
    cfg = evidence.load_recipe("fashion_ode_pairs")
    assert cfg.teacher.guidance != 1 and (pairs, calls) == (2200, 5120 * 10 * 2)
    own, more = chain.work("fashion_dmd2")
    documents = [
        {"recipe": "fashion_ode_pairs", "results": {"train": {"seconds": 960}}},
        {"recipe": "fashion_dmd2", "results": {"train": {"seconds": 500}}},
        {"recipe": "fashion_dmd2", "results": {"train": {"seconds": 580}}},
    ]
    found, whole = chain.cost("fashion_dmd2", documents)
    assert whole and found == pytest.approx((25, 2200 + own, calls + more))
    assert chain.cells("fashion_dmd2", documents)[:2] == ["25 (own 9)", f"{2200 + own}"]
    assert chain.cells("fashion_dmd2", documents[1:])[0] == "> 9 (own 9)"
    assert chain.cells("fashion_ode_pairs", documents)[0] == "16"


def put(recipe, finished=True, **train):
    """A run folder of a recipe in runs/, without the minutes it takes."""
    cfg = evidence.load_recipe(recipe)
    from pathlib import Path

    folder = Path("runs") / recipe
    (folder / "export").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        dump(cfg.model_copy(update={"train": cfg.train.model_copy(update=train)}))
    )
    if finished:
        (folder / "results.json").write_text(json.dumps({}))


def test_one_command_runs_what_is_needed_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calls, code = [], 0
    monkeypatch.setattr(
        chain.subprocess, "run", lambda c: calls.append(c) or SimpleNamespace(returncode=code)
    )
    assert main(["run", "--recipe", "fashion_dmd2", "--dry_run"]) == 0 and calls == []
    assert "fashion_ode_pairs: 2200 steps, 102 thousand teacher calls" in capsys.readouterr().out
    assert main(["run", "--recipe", "fashion_dmd2", "--seed", "3"]) == 0
    outputs = [c[c.index("--output_dir") + 1] for c in calls]
    assert outputs == ["runs/fashion_ode_pairs", "runs/fashion_dmd2"]
    assert "--train.seed" not in calls[0] and calls[1][-1] == "3"
    assert all(c[1:4] == ["-m", "fastgen", "train"] for c in calls)

    put("fashion_ode_pairs", finished=False)
    calls.clear()
    code = 2
    assert main(["run", "--recipe", "fashion_dmd2"]) == 2
    assert len(calls) == 1 and calls[0][-1] == "--resume", "stopped where the first one failed"

    calls.clear()
    code = 0
    (tmp_path / "runs/fashion_ode_pairs/results.json").write_text("{}")
    assert main(["run", "--recipe", "fashion_dmd2"]) == 0
    assert [c[c.index("--output_dir") + 1] for c in calls] == ["runs/fashion_dmd2"]


def test_the_command_that_is_run_trains(tmp_path, monkeypatch, capfd):
    """A module without a main would end at once, with exit code 0."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chain, "recipe_files", lambda name: ["there/is/none.yaml"])
    assert main(["run", "--recipe", "digits_lcm"]) == 2
    assert "none.yaml" in capfd.readouterr().err


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    put("digits_dmd2", max_train_steps=3)
    for argv, said in (
        (["run"], "needs --recipe"),
        (["run", "--recipe", "fashion_dmd3"], "no 'fashion_dmd3' (did you mean"),
        (["run", "--recipe", "digits_dmd2"], "is a run of another config"),
    ):
        assert main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
