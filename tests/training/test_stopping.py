"""Signals: a checkpoint of the last step, a true message, one exit code; nothing is lost or repeated."""

import multiprocessing
import os
import signal

import pytest
import torch

from fastgen.cli.train import main
from fastgen.core import interrupt
from fastgen.training import checkpoint, run_folder, validation
from fastgen.training.trainer import Trainer
from tests.support.heavier import first_of
from tests.training.test_resume import DMD2, RUNS, losses, pictures, state, write

SIGNALS = [getattr(signal, name) for name in interrupt.NAMES]


def kill_at(monkeypatch, step, *numbers):
    """Send signals to this process when the line of a step is written."""
    real = Trainer.write_metrics

    def write_metrics(self, record):
        real(self, record)
        if record["step"] == step and "stage" in record:
            for number in numbers:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "write_metrics", write_metrics)


@pytest.fixture(autouse=True)
def not_ignored():
    """A test session in the background ignores some signals, and so would what it starts."""
    before = {n: signal.signal(n, signal.SIG_DFL) for n in SIGNALS if n != signal.SIGINT}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def argv(tmp_path):
    return [*write(tmp_path, RUNS["dmd2 with GAN"]), str(tmp_path / "run")]


@pytest.mark.parametrize("number", first_of(sorted(SIGNALS, reverse=True)))
def test_a_signal_saves_the_step_and_says_so(number, argv, tmp_path, monkeypatch, capfd, no_finish):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        kill_at(patch, 3, number)
        assert main(argv) == interrupt.REQUEUE == 75
    printed = capfd.readouterr().err
    assert f"{signal.Signals(number).name}: stopped after step 3 of 6" in printed
    assert f"{tmp_path}/run/checkpoints/checkpoint-3 is saved" in printed and "--resume" in printed
    assert signal.getsignal(number) == before
    assert main([*argv, "--resume"]) == 0
    assert main([*argv[:-1], str(tmp_path / "whole")]) == 0
    whole, cut = state(tmp_path / "whole", 6), state(tmp_path / "run", 6)
    assert whole.keys() == cut.keys() and all(torch.equal(v, cut[k]) for k, v in whole.items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")


def test_the_page_follows_the_run_and_rests_when_it_stops(argv, tmp_path, monkeypatch, capfd, no_finish):
    """Written at each validation as of a run that goes on; one that cannot be written stops no training."""
    from fastgen.evaluation import report

    page, real, seen = tmp_path / "run" / "report" / "index.html", report.write_report, []

    def write_report(folder, running=False):
        real(folder, running)
        seen.append("data-live" in page.read_text())
        if len(seen) == 2:
            raise OSError("no room")

    monkeypatch.setattr(report, "write_report", write_report)
    kill_at(monkeypatch, 3, signal.SIGTERM)
    assert main(argv) == 75
    assert seen == [True, True, False] and ">stopped at step 3<" in page.read_text()
    assert "report: not refreshed (no room)" in capfd.readouterr().err


def test_a_second_ctrl_c_stops_at_once(argv, tmp_path, monkeypatch, capfd, no_finish):
    kill_at(monkeypatch, 3, signal.SIGINT, signal.SIGINT)
    assert main(argv) == 130
    assert "stopped at once" in capfd.readouterr().err
    assert checkpoint.latest(tmp_path / "run").name == "checkpoint-2"


def test_further_signals_of_a_scheduler_change_nothing(argv, tmp_path, monkeypatch, no_finish):
    kill_at(monkeypatch, 3, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1)
    assert main(argv) == 75 and checkpoint.latest(tmp_path / "run").name == "checkpoint-3"


def test_signals_that_nohup_ignores_stay_ignored(argv, tmp_path, monkeypatch, no_finish):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        kill_at(monkeypatch, 3, signal.SIGHUP)
        assert main(argv) == 0 and checkpoint.latest(tmp_path / "run").name == "checkpoint-6"
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("at", first_of([2, 0, 6]))
def test_a_validation_that_was_cut_short_is_done_again(at, argv, tmp_path, monkeypatch, capfd, no_finish):
    from fastgen.evaluation.evaluator import Evaluator

    real = Evaluator.score

    def images(self, images):
        if trainers[-1].step == at:
            os.kill(os.getpid(), signal.SIGTERM)
            interrupt.check()
        return real(self, images)

    trainers = []
    begin = Trainer._begin
    monkeypatch.setattr(Trainer, "_begin", lambda self, stage: (trainers.append(self), begin(self, stage))[1])
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "score", images)
        assert main(argv) == 75
    assert ("before the first step" if at == 0 else f"checkpoint-{at} is saved") in capfd.readouterr().err
    assert main([*argv, "--resume"]) == 0
    assert main([*argv[:-1], str(tmp_path / "whole")]) == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")
    whole, cut = state(tmp_path / "whole", 6), state(tmp_path / "run", 6)
    assert all(torch.equal(v, cut[k]) for k, v in whole.items())


def test_a_signal_while_loading_leaves_nothing(argv, tmp_path, monkeypatch, capfd):
    from fastgen.data import loader

    monkeypatch.setattr(loader, "load_data", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM))
    assert main(argv) == 75 and not (tmp_path / "run").exists()
    assert "before training began" in capfd.readouterr().err


def test_a_signal_while_measuring_keeps_the_export(tiny, tmp_path, monkeypatch, capfd):
    values = {
        "teacher": {"path": str(tiny("flow")), "num_steps": 2},
        "data": {"images": str(pictures(tmp_path))},
        "objective": DMD2,
        "train": {"max_train_steps": 1, "train_batch_size": 2, "validation_steps": 0},
    }
    argv = [*write(tmp_path, values), str(tmp_path / "run"), "--eval.num_samples", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(validation, "measure", lambda *a: os.kill(os.getpid(), signal.SIGTERM))
        assert main(argv) == 75
    assert "the export is whole" in capfd.readouterr().err
    card = tmp_path / "run/export/README.md"
    assert (tmp_path / "run/export/unet").is_dir() and "Not measured" in card.read_text()
    assert not (tmp_path / "run/results.json").exists()
    assert main([*argv, "--resume"]) == 0 and (tmp_path / "run/results.json").exists()
    assert "Not measured" not in card.read_text() and "seconds_per_sample" in card.read_text()


# -- the run folder's lock
def test_a_second_run_in_a_folder_is_refused(argv, tmp_path, capfd, no_finish):
    with run_folder.opened(tmp_path / "run", False, False):
        assert main(argv) == 2
        assert f"in use by process {os.getpid()} on " in capfd.readouterr().err
    assert main(argv) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with run_folder.opened(tmp_path / "run", True, False):
        before[tmp_path / "run/run.lock"] = (tmp_path / "run/run.lock").stat().st_mtime_ns
        for flag in ("--resume", "--overwrite"):
            assert main([*argv, flag]) == 2 and "in use by process" in capfd.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}


def test_a_folder_that_another_run_filled_meanwhile(argv, tmp_path, monkeypatch, capfd):
    """Both found it free; the other was first and has ended."""
    from fastgen.data import loader

    real = loader.load_data

    def load_data(*args, **kwargs):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/metrics.jsonl").write_text("theirs")
        return real(*args, **kwargs)

    monkeypatch.setattr(loader, "load_data", load_data)
    assert main(argv) == 2 and "another run meanwhile" in capfd.readouterr().err
    assert (tmp_path / "run/metrics.jsonl").read_text() == "theirs"


def hold_and_die(folder):
    with run_folder.opened(folder, False, False):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_crash_releases_the_lock(argv, tmp_path, no_finish):
    child = multiprocessing.get_context("forkserver").Process(target=hold_and_die, args=(tmp_path / "run",))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL and (tmp_path / "run/run.lock").exists()
    assert main(argv) == 0
