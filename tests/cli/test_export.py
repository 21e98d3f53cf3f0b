"""fastgen export: what a run's checkpoint holds is what is exported; what is published, and what is not."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastgen.cli.export import main
from fastgen.cli.train import main as train
from fastgen.export import publish
from fastgen.export.load import load_export
from fastgen.training.exporting import export_run
from tests.export.test_plain_diffusers import make_run

QUICK = {
    "train.max_train_steps": 4,
    "train.train_batch_size": 4,
    "train.checkpointing_steps": 2,
    "train.checkpoints_total_limit": 5,
    "train.validation_steps": 0,
    "eval.num_samples": 0,
    "optim.student.lr": 1e-2,
    "data.limit": 16,
}


def run_of(folder, *more):
    argv = [f"--{k}={v}" for k, v in QUICK.items()]
    what = ["--objective.name", "dmd2", "--objective.student_every", "1", *map(str, more)]
    config = folder.parent / "empty.yaml"
    config.write_text("data: {name: digits}")
    teacher = ["--teacher.path", "assets:teachers/digits", "--output_dir", str(folder)]
    assert train(["--config", str(config), *teacher, *argv, *what]) == 0
    return folder


def weights(folder):
    return load_file(next((folder / "unet").glob("*.safetensors")))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("run") / "run")


def test_the_last_checkpoint_is_the_run_s_own_export(run, tmp_path, capsys):
    assert main(["--run", str(run), "--out", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert "step 4, EMA 0.995" in said and str(tmp_path / "again") in said
    own, again = weights(run / "export"), weights(tmp_path / "again")
    assert own.keys() == again.keys() and all(torch.equal(own[k], again[k]) for k in own)
    info = [json.loads((f / "fastgen.json").read_text()) for f in (run / "export", tmp_path / "again")]
    assert info[0] == info[1]


def test_another_step_and_the_raw_weights_are_others(run, tmp_path):
    assert main(["--run", str(run), "--checkpoint", "2", "--out", str(tmp_path / "two")]) == 0
    assert main(["--run", str(run), "--raw", "--out", str(tmp_path / "raw")]) == 0
    kept = load_file(run / "checkpoints/checkpoint-4/state.safetensors")
    raw, own = weights(tmp_path / "raw"), weights(run / "export")
    name = next(iter(raw))
    assert torch.equal(raw[name], kept[f"part/student.net.{name}"])
    assert not torch.equal(raw[name], own[name]) and not torch.equal(
        weights(tmp_path / "two")[name], own[name]
    )
    assert json.loads((tmp_path / "two/fastgen.json").read_text())["export"]["training_steps"] == 2


def test_a_lora_and_an_earlier_stage(tmp_path):
    stages = (
        "stages: [{name: a, objective: {name: consistency}, max_train_steps: 2, num_steps: 2},"
        " {name: b, objective: {name: consistency}, max_train_steps: 2, num_steps: 1}]\ndata: {name: digits}"
    )
    (tmp_path / "s.yaml").write_text(stages)
    quick = [f"--{k}={v}" for k, v in QUICK.items() if "max_train" not in k and "optim" not in k]
    folder = tmp_path / "run"
    argv = ["--config", str(tmp_path / "s.yaml"), "--teacher.path=assets:teachers/digits"]
    assert (
        train([*argv, "--student.kind=lora", "--student.lora.rank=2", *quick, f"--output_dir={folder}"]) == 0
    )
    assert main(["--run", str(folder), "--checkpoint", "2", "--out", str(tmp_path / "a")]) == 0
    assert main(["--run", str(folder), "--overwrite"]) == 0
    assert [load_export(tmp_path / f).info.steps for f in ("a", "run")] == [2, 1]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "give either --run DIR or --model EXPORT"),
        (("--run", "{tmp}"), "is not a run folder"),
        (("--run", "{run}", "--checkpoint", "3"), "has none of step 3; there are 2, 4"),
        (("--run", "{run}"), "holds an export; give another folder, or --overwrite"),
        (("--run", "{run}", "--out", "{run}/samples"), "not empty and no export"),
        (("--model", "{run}/export"), "given without --push"),
        (("--run", "{run}", "--dry_run"), "given without --push"),
        (("--model", "{run}/export", "--push", "name", "--dry_run"), "give OWNER/NAME"),
        (("--model", "{run}", "--push", "a/b", "--dry_run"), "give an export folder"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, argv, said, capsys):
    (run / "samples").mkdir(exist_ok=True)
    (run / "samples/x.png").write_bytes(b"x")
    assert main([a.format(run=run, tmp=tmp_path) for a in argv]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


# -- the hub -------------------------------------------------------------------------------------------------
@pytest.fixture
def export(tiny, tmp_path):
    return export_run(make_run(tiny("sd"), "full", tmp_path), tmp_path / "export", {})


def test_a_dry_run_lists_the_files_and_uploads_nothing(export, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    assert main(["--model", str(export), "--push", "me/student", "--dry_run"]) == 0
    text = capsys.readouterr().out
    for path in export.rglob("*"):
        assert path.is_dir() or path.relative_to(export).as_posix() in text
    assert "to me/student" in text and "nothing was uploaded" in text


@pytest.mark.parametrize("name", ["unet/model.bin", "weights.pt", "unet/run.py", "x.pkl"])
def test_no_pickle_and_no_script_is_published(export, name, capsys):
    (export / name).write_bytes(b"x")
    assert main(["--model", str(export), "--push", "me/student", "--dry_run"]) == 2
    assert "is no file of an export" in capsys.readouterr().err


def test_no_link_out_of_the_folder_is_published(export, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (export / "notes.json").symlink_to(tmp_path / "secret.json")
    assert main(["--model", str(export), "--push", "me/student", "--dry_run"]) == 2


def test_push_uploads_exactly_these_files(export, monkeypatch, capsys):
    calls = []

    class Hub:
        def create_repo(self, name, **how):
            calls.append(("create", name, how))

        def upload_folder(self, **how):
            calls.append(("upload", how))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert main(["--model", str(export), "--push", "me/student", "--private"]) == 0
    assert calls[0] == ("create", "me/student", {"private": True, "exist_ok": True})
    sent = calls[1][1]
    files = [p.relative_to(export).as_posix() for p in export.rglob("*") if p.is_file()]
    assert sent["repo_id"] == "me/student" and sorted(sent["allow_patterns"]) == sorted(files)
    assert "https://huggingface.co/me/student" in capsys.readouterr().out


def test_a_refusal_of_the_hub_is_one_line(export, capsys):
    """Offline, as all tests are."""
    assert main(["--model", str(export), "--push", "me/student"]) == 2
    err = capsys.readouterr().err
    assert "hf auth login" in err and len(err.splitlines()) == 1
    assert publish.REPOSITORY.fullmatch("me/student-1.0") and not publish.REPOSITORY.fullmatch("../x")
