"""What --overwrite clears, what a full disk leaves, and that every refusal comes before the first file."""

import errno
import os
from pathlib import Path

import pytest

from fastgen.cli.train import main
from fastgen.training import checkpoint, validation
from tests.cli.test_bad_input import TOY, say, started
from tests.training.test_resume import DMD2, pictures, write


def toy(run, *more):
    return started([*TOY, "--output_dir", str(run), *map(str, more)])


def refused(capsys, argv, *pieces):
    code, err = say(capsys, argv)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and all(p in errors[0] for p in pieces), err


@pytest.mark.parametrize("name", ["", ".", "..", "../.."])
def test_overwrite_never_clears_the_working_directory(name, tmp_path, capsys, monkeypatch):
    home = tmp_path / "a/b"
    home.mkdir(parents=True)
    monkeypatch.chdir(home)
    for folder in (tmp_path, tmp_path / "a", home):
        (folder / "config.yaml").write_text("site_name: x")
        (folder / "run.lock").write_text('{"fastgen_run": true}')
    refused(capsys, toy(name, "--overwrite"), "output_dir")
    assert all((f / "config.yaml").exists() for f in (tmp_path, tmp_path / "a", home))


def test_overwrite_never_clears_the_home_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "me").mkdir()
    (tmp_path / "me/run.lock").write_text('{"fastgen_run": true}')
    (tmp_path / "me/config.yaml").write_text("")
    refused(capsys, toy(tmp_path / "me", "--overwrite"), "the home folder")


def test_overwrite_wants_our_own_marker(tmp_path, capsys):
    """A config.yaml alone is anybody's."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/config.yaml").write_text("site_name: x")
    (tmp_path / "site/environment.json").write_text('{"python": "3"}')
    refused(capsys, toy(tmp_path / "site", "--overwrite"), "not written by fastgen")
    assert len(list((tmp_path / "site").iterdir())) == 2


def test_overwrite_clears_what_a_run_writes_and_nothing_else(tmp_path, capsys, no_finish):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert main(toy(run)) == 0
    (run / "notes.txt").write_text("mine")
    elsewhere.mkdir()
    (elsewhere / "data.bin").write_text("theirs")
    (run / "export").symlink_to(elsewhere)
    (run / "metrics.jsonl").write_text("old")
    assert main(toy(run, "--overwrite")) == 0
    assert (run / "notes.txt").read_text() == "mine" and (elsewhere / "data.bin").exists()
    assert not (run / "export").exists() and "old" not in (run / "metrics.jsonl").read_text()


def test_overwrite_follows_no_link_and_keeps_its_inputs(tmp_path, capsys, no_finish):
    assert main(toy(tmp_path / "run")) == 0
    (tmp_path / "link").symlink_to(tmp_path / "run")
    refused(capsys, toy(tmp_path / "link", "--overwrite"), "is a link to")
    inside = ["--student.init", tmp_path / "run/export"]
    refused(capsys, toy(tmp_path / "run", "--overwrite", *inside), "student.init", "would clear")
    assert checkpoint.latest(tmp_path / "run")


@pytest.mark.parametrize("place", ["file/run", "/proc/run", "a\0b", "x" * 300])
def test_folders_that_cannot_be_made(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    refused(capsys, toy(place), "output_dir")


# -- full disks
def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def flow(tiny, tmp_path, steps=1):
    values = {
        "teacher": {"path": str(tiny("flow")), "num_steps": 2},
        "data": {"images": str(pictures(tmp_path))},
        "objective": DMD2,
        "train": {"max_train_steps": steps, "train_batch_size": 2, "validation_steps": 0},
    }
    return [*write(tmp_path, values), str(tmp_path / "run")]


def test_a_full_disk_while_exporting(tiny, tmp_path, capsys, monkeypatch):
    from fastgen.export import write as export

    argv, run = flow(tiny, tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(export, "write_text", full)
        refused(capsys, argv, "export: could not be written", "safe in the last checkpoint", "--resume")
    assert not (run / "export").exists() and not (run / "export.tmp").exists()
    assert main([*argv, "--resume"]) == 0 and (run / "export/unet").is_dir()
    before = (run / "export/README.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(export, "model_card", full)
        refused(capsys, [*argv, "--resume"], "export: could not be written")
    assert (run / "export/README.md").read_text() == before, "the old export stays until the new one is whole"


def test_a_full_disk_while_measuring_keeps_the_export(tiny, tmp_path, capsys, monkeypatch):
    argv, run = flow(tiny, tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(validation, "write_json", full)
        refused(capsys, argv, "the export is whole", "--resume measures again")
    assert (run / "export/unet").is_dir() and not (run / "results.json").exists()
    assert main([*argv, "--resume"]) == 0 and (run / "results.json").exists()


def test_a_full_disk_while_logging(tmp_path, capsys, monkeypatch, no_finish):
    from fastgen.training import trainer

    real, lines = trainer.append_line, []

    def append_line(path, line):
        lines.append(line)
        return real(path, line) if len(lines) < 3 else full()

    run = tmp_path / "run"
    every = ["--train.checkpointing_steps", "1", "--train.max_train_steps", "4", "--train.log_steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "append_line", append_line)
        refused(
            capsys,
            toy(run, *every),
            "No space left",
            f"last good checkpoint is {run}/checkpoints/checkpoint-2",
        )
    assert main(toy(run, *every, "--resume")) == 0


def test_a_line_that_finds_no_room_leaves_the_file_as_it_was(tmp_path):
    import resource

    from fastgen.core.files import append_line

    file = tmp_path / "metrics.jsonl"
    append_line(file, "x" * 99)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
    try:
        with pytest.raises(OSError):
            append_line(file, "y" * 99)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_text() == "x" * 99 + "\n"
