"""Checkpoints in parts, and such that are written beside the training."""

import threading
import time

import pytest
import torch

from fastgen.cli.train import main
from fastgen.training import checkpoint, saving, stored_tensors
from fastgen.training.trainer import Trainer
from tests.training.test_resume import BASE, RUNS, state, write

WHOLE = {"net.weight": torch.arange(20.0).reshape(5, 4), "step": torch.tensor(3.0)}


def in_parts(folder):
    """The tensors as two processes write them."""
    first, second = WHOLE["net.weight"].split([3, 2])
    stored_tensors.write(
        folder / stored_tensors.part_name(0, 2),
        {"net.weight": first.contiguous(), "step": WHOLE["step"]},
        {"net.weight": [0, 0], "step": []},
    )
    stored_tensors.write(
        folder / stored_tensors.part_name(1, 2),
        {"net.weight": second.contiguous()},
        {"net.weight": [3, 0]},
    )


def test_parts_are_read_as_wholes(tmp_path):
    in_parts(tmp_path)
    found = stored_tensors.StoredTensors(tmp_path)
    assert found.shapes == {"net.weight": (5, 4), "step": ()} and len(found) == 2
    assert all(torch.equal(found[name], value) for name, value in WHOLE.items())


def test_torch_reads_the_parts_too(tmp_path):
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    in_parts(tmp_path)
    state_dict = {name: torch.zeros_like(value) for name, value in WHOLE.items()}
    load(state_dict, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert all(torch.equal(state_dict[name], value) for name, value in WHOLE.items())


def test_a_gap_between_parts_is_found(tmp_path):
    in_parts(tmp_path)
    (tmp_path / stored_tensors.part_name(0, 2)).unlink()
    with pytest.raises(ValueError, match="the parts of net.weight hold 8 numbers of 20"):
        stored_tensors.StoredTensors(tmp_path)


def test_a_missing_part_is_damage(tmp_path):
    meta = dict.fromkeys(checkpoint.META, 0) | {k: {} for k in ("rest", "best", "fingerprint", "logs")}
    meta |= {"step": 1, "scaler": None, "validated": True}
    temporary = checkpoint.begin(tmp_path, 1)
    in_parts(temporary)
    path = checkpoint.seal(temporary, meta)
    checkpoint.verify(path)
    (path / stored_tensors.part_name(1, 2)).unlink()
    with pytest.raises(checkpoint.Damaged, match="it has no state-00002-of-00002"):
        checkpoint.verify(path)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    from fastgen.training import validation

    monkeypatch.setattr(validation, "finish", lambda trainer, validator: None)
    train = BASE["train"] | {"validation_steps": 0, "async_checkpoints": True, "log_steps": 1}
    return write(tmp_path, RUNS["consistency with target"] | {"train": train})


def test_written_beside_the_training_it_is_the_same(arguments, tmp_path):
    """What is on the disk is the state of its step, although weights have changed since."""
    assert main([*arguments, str(tmp_path / "behind")]) == 0
    assert main([*arguments, str(tmp_path / "at_once"), "--train.async_checkpoints", "false"]) == 0
    for step in (5, 6):
        one, two = state(tmp_path / "at_once", step), state(tmp_path / "behind", step)
        assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
        checkpoint.verify(tmp_path / f"behind/checkpoints/checkpoint-{step}")


def test_training_goes_on_while_it_is_written(arguments, tmp_path, monkeypatch):
    written, steps, real = threading.Event(), [], saving.write

    def slow(*rest):
        real(*rest)
        assert written.wait(30)

    def seen(self, *rest):
        steps.append((self.step, len(checkpoint.checkpoints(self.folder))))
        if self.step == 4:
            written.set()

    monkeypatch.setattr(saving, "write", slow)
    monkeypatch.setattr(Trainer, "_log", seen)
    assert main([*arguments, str(tmp_path / "run"), "--train.checkpointing_steps", "2"]) == 0
    assert (3, 0) in steps, "the third step waited for the checkpoint of the second"
    assert checkpoint.newest_good(tmp_path / "run").name == "checkpoint-6"


def test_old_checkpoints_go_while_new_ones_are_written(arguments, tmp_path, monkeypatch):
    """Also where each is completed by the one after it, and none by a line of the log."""
    kept, real = [], Trainer._log

    def seen(self, *rest):
        kept.append(len(checkpoint.checkpoints(self.folder)))
        real(self, *rest)

    monkeypatch.setattr(Trainer, "_log", seen)
    flags = ["--train.log_steps", "100", "--train.checkpoints_total_limit", "1"]
    assert main([*arguments, str(tmp_path / "run"), *flags]) == 0
    assert max(kept) == 1 and len(checkpoint.checkpoints(tmp_path / "run")) == 1, kept


def test_a_full_disk_is_one_line_and_keeps_the_last(arguments, tmp_path, monkeypatch, capfd):
    real = saving.write

    def full(path, *rest):
        if "checkpoint-4" in str(path):
            time.sleep(0.01)
            raise OSError(28, "No space left on device")
        real(path, *rest)

    monkeypatch.setattr(saving, "write", full)
    assert main([*arguments, str(tmp_path / "run"), "--train.checkpointing_steps", "2"]) == 2
    assert "step 4 could not be saved" in capfd.readouterr().err
    assert checkpoint.newest_good(tmp_path / "run").name == "checkpoint-2"
    assert not list((tmp_path / "run/checkpoints").glob("*.tmp"))
