"""The end of a run: results.json, best weights, cards, and measuring the export again."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastgen.cli.evaluate import main as evaluate
from fastgen.cli.train import main
from fastgen.config.sections import EvalConfig
from fastgen.core.paths import asset
from fastgen.data.loader import Data
from fastgen.training.validation import Validator

SHORT = {
    "max_train_steps": 4,
    "train_batch_size": 8,
    "validation_steps": 2,
    "num_threads": 1,
    "ema_decay": [0.5],
}
FEW = {"num_samples": 24, "validation_samples": 12, "grid": 10, "batch_size": 7}


def run(folder, **values) -> dict:
    """Train briefly; the results."""
    folder.mkdir(exist_ok=True)
    (folder / "in.yaml").write_text(yaml.safe_dump({"train": SHORT, "eval": FEW, **values}))
    assert main(["--config", str(folder / "in.yaml"), "--output_dir", str(folder / "run")]) == 0
    return json.loads((folder / "run" / "results.json").read_text())


DMD2 = {"name": "dmd2", "gan_weight": 0.0, "student_every": 1}
DIGITS = {
    "teacher": {"path": "assets:teachers/digits", "num_steps": 5},
    "data": {"name": "digits", "limit": 50},
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """(run folder, results) of a four-step dmd2 run on the bundled digits teacher."""
    folder = tmp_path_factory.mktemp("digits")
    evaluation = {**FEW, "teacher_samples": 12, "student_steps": [1, 2], "keep": "best"}
    optim = {"student": {"lr": 1e-3}}
    return folder / "run", run(folder, objective=DMD2, eval=evaluation, optim=optim, **DIGITS)


def test_results_have_the_promised_shape(digits):
    _, results = digits
    assert {"teacher", "student", "untrained_student", "protocol", "train"} <= set(results)
    for name, nfe in (("teacher", 5), ("student", 1), ("untrained_student", 1)):
        row = results[name]
        assert row["nfe"] == nfe and row["seconds_per_sample"] > 0
        assert {"fd_mini", "mmd", "agreement", "precision", "recall"} <= set(row)
    assert results["teacher"]["seconds_per_sample"] > 2 * results["student"]["seconds_per_sample"]
    protocol, by_steps = results["protocol"], results["student_by_steps"]
    assert (protocol["num_samples"], protocol["teacher_samples"]) == (24, 12)
    assert "sha256" in protocol["extractor"] and "not comparable" in protocol["note"]
    assert {n: row["nfe"] for n, row in by_steps.items()} == {"1": 1, "2": 2}
    assert by_steps["1"]["fd_mini"] == results["student"]["fd_mini"] != by_steps["2"]["fd_mini"]
    assert set(results["train"]) == {"seconds", "steps", "peak_rss_mb"} and results["train"]["steps"] == 4
    assert "stages" not in results


def test_the_run_folder_is_complete(digits):
    folder, results = digits
    names = {p.name for p in (folder / "samples").iterdir()}
    way = {"step_000000.png", "step_000002.png", "step_000004.png"}
    ends = {"teacher.png", "untrained.png", "student.png", "student_1_steps.png", "student_2_steps.png"}
    assert names == way | ends | {"requests.json"}
    requests = json.loads((folder / "samples" / "requests.json").read_text())
    assert requests["texts"] == [str(i) for i in range(10)] and requests["columns"] == 10
    page = (folder / "report" / "index.html").read_text()
    assert ">finished<" in page and "data-live" not in page and '<figcaption title="9">9<' in page
    assert (folder / "export" / "unet").is_dir()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = {r["step"]: r["validation/fd_mini"] for r in records if "validation/fd_mini" in r}
    assert list(curve) == [0, 2, 4] and results["curve"] == {str(k): v for k, v in curve.items()}
    best = min((s for s in curve if s), key=curve.get)
    assert results["protocol"]["weights"] == f"EMA 0.5, step {best}"
    assert results["student"]["fd_mini"] != results["untrained_student"]["fd_mini"]


def test_the_best_weights_are_what_is_exported(digits):
    folder, _ = digits
    best = load_file(folder / "best.safetensors")
    exported = load_file(folder / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(v, exported[n.removeprefix("net.")].float()) for n, v in best.items())


def test_measuring_the_export_again_gives_the_same_numbers(digits, capsys):
    folder, results = digits
    assert evaluate(["--run", str(folder)]) == 0
    again = json.loads((folder / "results.json").read_text())
    for name in ("teacher", "student", "untrained_student"):
        assert again[name]["fd_mini"] == pytest.approx(results[name]["fd_mini"], rel=1e-4), name
    assert again["train"] == results["train"] and again["protocol"]["weights"] == "export"
    assert "fd_mini" in capsys.readouterr().out


def test_exact_teachers_are_judged_by_energy_distance(tmp_path, capsys):
    results = run(
        tmp_path,
        teacher={"path": "analytic:gmm2d-flow", "num_steps": 10},
        objective=DMD2,
        eval={**FEW, "num_samples": 200},
    )
    assert abs(results["teacher"]["energy_distance"]) < 0.1 < results["untrained_student"]["energy_distance"]
    assert results["untrained_student"]["modes"] < 1 == results["teacher"]["modes"]
    assert not (tmp_path / "run" / "export").exists()
    assert "export  none" in capsys.readouterr().out
    assert evaluate(["--run", str(tmp_path / "run")]) == 2


def test_a_trained_denoiser_gets_a_card_by_step_count(tmp_path):
    results = run(
        tmp_path, **DIGITS, objective={"name": "sft"}, eval={**FEW, "num_samples": 8, "validation_samples": 4}
    )
    assert "teacher" not in results and list(results["student_by_steps"]) == ["1", "4", "20", "50"]
    card = json.loads((tmp_path / "run" / "export" / "card.json").read_text())
    assert card["student_by_steps"] == results["student_by_steps"] and card["floor"]["fd_mini"] > 0
    assert card["train"]["steps"] == 4 and results["student"]["nfe"] == 5


def test_a_teacher_as_it_stands_gets_the_same_card(tmp_path, capsys):
    folder = shutil.copytree(
        asset("teachers/digits"), tmp_path / "digits", ignore=shutil.ignore_patterns("card.json")
    )
    assert evaluate(["card", "--teacher", str(folder), "--num_samples", "10"]) == 0
    card = json.loads((folder / "card.json").read_text())
    assert list(card["student_by_steps"]) == ["1", "4", "20", "50"] and card["protocol"]["num_samples"] == 10
    assert card["student_by_steps"]["1"]["fd_mini"] > card["student_by_steps"]["20"]["fd_mini"]
    assert evaluate(["card"]) == 2 and "--teacher" in capsys.readouterr().err


def test_a_stage_may_use_fewer_examples_than_the_next(tmp_path, monkeypatch):
    first, seen = Data.first, []
    monkeypatch.setattr(
        Data, "first", lambda self, num: seen.append(len(first(self, num))) or first(self, num)
    )
    stages = [
        {
            "name": "warm",
            "objective": {"name": "ode_pairs", "teacher_steps": 2},
            "max_train_steps": 2,
            "limit": 3,
        },
        {"name": "distil", "objective": DMD2, "max_train_steps": 1},
    ]
    train = {k: v for k, v in SHORT.items() if k != "max_train_steps"}
    run(tmp_path, **DIGITS, train=train, stages=stages, eval={**FEW, "num_samples": 4})
    assert seen[0] == 3 < seen[1]
    monkeypatch.undo()
    data = Data(torch.arange(5.0), {}, torch.arange(5), {}, (1,))
    assert data.first(3).x0.tolist() == [0, 1, 2] and len(data.first(0)) == len(data.first(9)) == 5


def test_every_stage_is_validated_where_it_ends(tmp_path):
    """Also off the cadence: results.json has what was measured at the start and after each stage."""
    stages = [
        {"name": name, "objective": DMD2, "max_train_steps": num} for name, num in (("one", 3), ("two", 2))
    ]
    train = {k: v for k, v in SHORT.items() if k != "max_train_steps"} | {"validation_steps": 100}
    results = run(tmp_path, **DIGITS, train=train, stages=stages, eval={**FEW, "num_samples": 4})
    found = [(one["stage"], one["objective"], one["step"]) for one in results["stages"]]
    assert found == [("start", "", 0), ("one", "dmd2", 3), ("two", "dmd2", 5)]
    assert {str(one["step"]): one["fd_mini"] for one in results["stages"]} == results["curve"]


def test_the_last_stage_decides_how_the_student_is_sampled(tmp_path):
    stages = [
        {"name": "tune", "objective": {"name": "sft"}, "max_train_steps": 1},
        {"name": "distil", "objective": DMD2, "max_train_steps": 1},
    ]
    train = {k: v for k, v in SHORT.items() if k != "max_train_steps"}
    results = run(tmp_path, **DIGITS, train=train, stages=stages, eval={**FEW, "num_samples": 4})
    assert results["student"]["nfe"] == 1 and "untrained_student" in results
    export = json.loads((tmp_path / "run" / "export" / "fastgen.json").read_text())["export"]
    assert export["times"] and export["steps"] == 1


def test_what_was_not_trained_is_not_kept(tmp_path):
    """A student that starts best: the best of the trained weights are kept, not the last ones."""
    scores = iter([5.0, 7.0, 9.0])
    student = SimpleNamespace(trainable=lambda: {"w": torch.tensor([float(trainer.step)])})
    trainer = SimpleNamespace(step=0, best={}, student=student, write_metrics=lambda values: None)
    evaluator = SimpleNamespace(
        better=lambda: {"fd_mini": "lower"},
        least=dict,
        score=lambda images: {"fd_mini": next(scores)},
        label_free=False,
    )
    validator = Validator(EvalConfig(keep="best"), evaluator, tmp_path)
    for trainer.step in (0, 100, 200):
        validator._look(trainer, torch.zeros(1), torch.zeros(1))
    assert trainer.best == {"score": 7.0, "step": 100}
    assert load_file(tmp_path / "best.safetensors")["w"] == 100
