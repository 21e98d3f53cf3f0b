"""Checkpoints: damage is found and the one before used, another run's settings refused, and only weights that
can go on are kept.
"""

import json
import os
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fastgen.cli.train import main
from fastgen.core.files import sha256, to_json
from fastgen.networks import weights_digest
from fastgen.training import checkpoint, fingerprint
from fastgen.training.trainer import NotFinite, Trainer
from tests.training.test_resume import BASE, DMD2, RUNS, Stop, losses, pictures, state, stop_after, write


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(arguments, folder) of a finished run of six steps, a checkpoint each."""
    from fastgen.training import validation

    folder = tmp_path_factory.mktemp("whole")
    train = BASE["train"] | {"validation_steps": 0}
    arguments = write(folder, RUNS["dmd2 with GAN"] | {"train": train})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "finish", lambda trainer, validator: None)
        assert main([*arguments, str(folder / "run")]) == 0
    return arguments, folder / "run"


def cut(whole, tmp_path, last=4):
    """A copy of the run that ended after a step."""
    run = tmp_path / "cut"
    shutil.copytree(whole[1], run)
    for step in range(last + 1, 7):
        shutil.rmtree(run / f"checkpoints/checkpoint-{step}")
    return run


def without(path, prefix):
    tensors = load_file(path / "state.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith(prefix)}, path / "state.safetensors")


def flip(path, where):
    content = bytearray(path.read_bytes())
    content[where % len(content)] ^= 1
    path.write_bytes(content)


def sealed(path, change):
    """Change state.json and make its checksum right again."""
    meta = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(to_json(change(meta)))
    sums = {n: sha256(path / n) for n in ("state.safetensors", "state.json")}
    (path / "checksums.json").write_text(to_json(sums))


DAMAGE = {
    "no student": lambda p: without(p, "part/student"),
    "no averages": lambda p: without(p, "ema/"),
    "no optimizer": lambda p: without(p, "optim/"),
    "one bit of a tensor": lambda p: flip(p / "state.safetensors", -1),
    "one bit of the header": lambda p: flip(p / "state.safetensors", 40),
    "one bit of the state": lambda p: flip(p / "state.json", 12),
    "half of the tensors": lambda p: os.truncate(p / "state.safetensors", 1000),
    "empty tensors": lambda p: os.truncate(p / "state.safetensors", 0),
    "state {}": lambda p: (p / "state.json").write_text("{}"),
    "state null": lambda p: (p / "state.json").write_text("null"),
    "checksums null": lambda p: (p / "checksums.json").write_text("null"),
    "no state": lambda p: (p / "state.json").unlink(),
    "no tensors": lambda p: (p / "state.safetensors").unlink(),
    "no checksums": lambda p: (p / "checksums.json").unlink(),
    "an empty folder": lambda p: (shutil.rmtree(p), p.mkdir()),
    "sealed: a list": lambda p: sealed(p, lambda m: [m]),
    "sealed: no stage": lambda p: sealed(p, lambda m: {k: v for k, v in m.items() if k != "stage"}),
    "sealed: k is text": lambda p: sealed(p, lambda m: m | {"k": "4"}),
    "sealed: another step": lambda p: sealed(p, lambda m: m | {"step": 3}),
    "sealed: no fingerprint": lambda p: sealed(p, lambda m: m | {"fingerprint": None}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back(name, whole, tmp_path, capfd):
    run = cut(whole, tmp_path)
    DAMAGE[name](run / "checkpoints/checkpoint-4")
    assert checkpoint.newest_good(run).name == "checkpoint-3"
    lines = [x for x in capfd.readouterr().err.splitlines() if "checkpoint-4 is damaged" in x]
    assert len(lines) == 1, lines


def test_a_run_goes_on_from_the_one_before(whole, tmp_path, capfd, no_finish):
    run = cut(whole, tmp_path)
    DAMAGE["one bit of a tensor"](run / "checkpoints/checkpoint-4")
    assert main([*whole[0], str(run), "--resume"]) == 0
    assert "checkpoint-4 is damaged" in capfd.readouterr().err
    again, first = state(run, 6), state(whole[1], 6)
    assert again.keys() == first.keys() and all(torch.equal(v, again[k]) for k, v in first.items())
    assert losses(run) == losses(whole[1])
    assert (run / "checkpoints/checkpoint-4.damaged").is_dir(), "nothing is thrown away"


def test_no_undamaged_checkpoint_is_one_line(whole, tmp_path, capfd):
    run = cut(whole, tmp_path, last=2)
    for path in checkpoint.checkpoints(run):
        DAMAGE["state {}"](path)
    assert main([*whole[0], str(run), "--resume"]) == 2
    errors = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(errors) == 1 and "no undamaged checkpoint" in errors[0] and "--overwrite" in errors[0]


def test_a_run_without_a_checkpoint_starts_from_the_beginning(whole, tmp_path, capfd, no_finish):
    """Killed before the first checkpoint: a requeued --resume is not stuck, and no line is written twice."""
    run = cut(whole, tmp_path, last=0)
    shutil.rmtree(run / "checkpoints")
    assert main([*whole[0], str(run), "--resume"]) == 0
    assert "starting from the beginning" in capfd.readouterr().err
    assert losses(run) == losses(whole[1])


CHANGED = {
    "--optim.student.betas": (["0.5", "0.9"], "optim"),
    "--optim.student.weight_decay": (["0.1"], "optim.student"),
    "--optim.critic.clip": (["3"], "optim.critic.clip"),
    "--optim.student.schedule": (["linear"], "optim"),
    "--train.seed": (["7"], "train.seed"),
}


@pytest.mark.parametrize("flag", CHANGED)
def test_changed_settings_are_refused_or_allowed_by_name(flag, whole, tmp_path, capfd, no_finish):
    values, name = CHANGED[flag]
    run, key = cut(whole, tmp_path), flag[2:]
    arguments = [*whole[0], str(run), "--resume", flag, *values]
    assert main(arguments) == 2
    message = capfd.readouterr().err
    assert f"changed since checkpoint-4: {key} (" in message and f"--allow_changed {key}" in message
    assert main([*arguments, "--allow_changed", name]) == 0
    message = capfd.readouterr().err
    assert f"going on with the new values: {key} (" in message, message


def test_a_learning_rate_may_change_and_is_reported(whole, tmp_path, capfd, no_finish):
    run = cut(whole, tmp_path)
    assert main([*whole[0], str(run), "--resume", "--optim.student.lr", "5e-4"]) == 0
    assert "optim.student.lr (0.001 -> 0.0005)" in capfd.readouterr().err


def test_an_unknown_name_of_a_change(whole, tmp_path, capfd):
    run = cut(whole, tmp_path)
    assert main([*whole[0], str(run), "--resume", "--allow_changed", "optimm"]) == 2
    assert "'optimm'" in capfd.readouterr().err


def test_another_number_of_processes_is_refused(whole, tmp_path, monkeypatch, capfd):
    real = fingerprint.of_run
    monkeypatch.setattr(fingerprint, "of_run", lambda *given: real(*given[:-2], 2, given[-1]))
    run = cut(whole, tmp_path)
    assert main([*whole[0], str(run), "--resume"]) == 2
    assert "world_size (1 -> 2)" in capfd.readouterr().err


@pytest.mark.parametrize("what", ["unet", "scheduler", "picture", "caption"])
def test_other_weights_or_data_under_the_same_path_are_refused(what, tiny, tmp_path, monkeypatch, capfd):
    kind = "sd" if what == "caption" else "flow"
    teacher, images = tmp_path / "teacher", pictures(tmp_path)
    shutil.copytree(tiny(kind), teacher)
    for i in range(10 if kind == "sd" else 0):
        (images / f"{i}.txt").write_text("a red dress")
    values = {
        "teacher": {"path": str(teacher)},
        "student": {"kind": "lora", "lora": {"rank": 2, "lora_alpha": 2}},
        "data": {"images": str(images)},
        "objective": {"name": "dmd2", "gan_weight": 0.1},
        "train": {
            "max_train_steps": 2,
            "train_batch_size": 2,
            "checkpointing_steps": 1,
            "validation_steps": 0,
        },
    }
    argv = [*write(tmp_path, values), str(tmp_path / "run")]
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 1)
        main(argv)
    if what == "unet":
        file = teacher / "unet/diffusion_pytorch_model.safetensors"
        save_file({k: v * 1.5 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    elif what == "scheduler":
        file = teacher / "scheduler/scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": 3.0}))
    elif what == "picture":
        shutil.copyfile(images / "3.png", images / "4.png")
    else:
        (images / "4.txt").write_text("a blue boot")
    assert main([*argv, "--resume"]) == 2
    key = "teacher.weights" if what in ("unet", "scheduler") else "data.content"
    assert f"changed since checkpoint-1: {key} (" in capfd.readouterr().err


def test_a_checkpoint_of_other_shapes_is_refused(whole, tmp_path, capfd):
    run = cut(whole, tmp_path)
    for path in checkpoint.checkpoints(run):
        tensors = load_file(path / "state.safetensors")
        tensors["part/student.extra"] = torch.zeros(3)
        save_file(tensors, path / "state.safetensors")
        sealed(path, lambda meta: meta)
    assert main([*whole[0], str(run), "--resume"]) == 2
    assert "checkpoint-4 does not fit: part/student.extra is (3,)" in capfd.readouterr().err


def test_large_weights_are_hashed_in_blocks(monkeypatch):
    tensor = torch.arange(10_000_000, dtype=torch.float32)
    blocks = list(weights_digest._blocks(tensor))
    assert len(blocks) == 64 and blocks[0][0] == 0 and blocks[-1][-1] == tensor[-1]
    assert sum(b.numel() * 4 for b in blocks) == 64 * 2**16


# -- numbers that are not finite
def blow_up(tmp_path, *more):
    """A run whose every update makes the weights huge."""
    train = {"max_train_steps": 1, "train_batch_size": 4, "validation_steps": 0, "ema_decay": []}
    values = {"objective": {"name": "sft"}, "train": train, "optim": {"student": {"lr": 1e20}}}
    return main([*write(tmp_path, values), str(tmp_path / "run"), *more])


def test_the_last_update_is_checked(tmp_path, capfd):
    assert blow_up(tmp_path) == 3
    message = capfd.readouterr().err
    assert "not finite" in message and "no good checkpoint was made yet" in message
    assert not list((tmp_path / "run").glob("checkpoints/checkpoint-*"))
    assert not (tmp_path / "run/results.json").exists()


def test_weights_that_are_not_finite_are_never_saved(whole, tmp_path, monkeypatch, capfd, no_finish):
    real = Trainer._update

    def update(self, player, k, total):
        real(self, player, k, total)
        if self.step == 3:
            next(iter(self.params[player].values())).data.view(-1)[0] = float("inf")

    monkeypatch.setattr(Trainer, "_update", update)
    assert main([*whole[0], str(tmp_path / "run")]) == 3
    message = capfd.readouterr().err
    assert "step 4" in message and "checkpoint-3" in message
    assert checkpoint.latest(tmp_path / "run").name == "checkpoint-3"


@pytest.mark.parametrize("after", [False, True])
def test_a_checkpoint_that_leads_to_nan_is_not_the_last_good_one(
    after, tmp_path, monkeypatch, capfd, no_finish
):
    """Not rotated in before a step from it was finite, and set aside where that step never was; a blow-up
    after the step's first update is that update's.
    """
    train = BASE["train"] | {"validation_steps": 0, "checkpoints_total_limit": 1}
    argv = [*write(tmp_path, RUNS["dmd2 with GAN"] | {"train": train}), str(tmp_path / "run")]

    def check(self, loss, logs, player):
        if self.step == 4 and self.unchanged != after:
            raise NotFinite("step 4: a test's")

    monkeypatch.setattr(Trainer, "_check_finite", check)
    assert main(argv) == 3
    good = "checkpoint-4" if after else "checkpoint-3"
    assert f"last good checkpoint is {tmp_path}/run/checkpoints/{good}" in capfd.readouterr().err
    assert checkpoint.latest(tmp_path / "run").name == good
    assert (tmp_path / "run/checkpoints/checkpoint-4.not-finite").is_dir() != after


def test_f_distill_resumes_with_what_it_keeps(tmp_path, monkeypatch, no_finish):
    """State that prepare() makes is restored after it."""
    train = BASE["train"] | {"validation_steps": 0, "max_train_steps": 4}
    objective = {"name": "f_distill", "student_every": 1, "f": "kl", "gan_weight": 0.1}
    arguments = write(tmp_path, {"objective": objective, "train": train})
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 2)
        main([*arguments, str(tmp_path / "cut")])
    assert main([*arguments, str(tmp_path / "cut"), "--resume"]) == 0
    first, second = state(tmp_path / "whole", 4), state(tmp_path / "cut", 4)
    assert all(float(first[f"objective/{k}"][1].sum()) > 0 for k in ("ratio_sums", "weight_sums"))
    assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_no_json_file_of_a_run_holds_a_nan(tmp_path, no_finish):
    """A batch of one has no spread."""
    train = BASE["train"] | {
        "train_batch_size": 1,
        "max_train_steps": 3,
        "log_steps": 2,
        "validation_steps": 0,
    }
    argv = [*write(tmp_path, {"objective": DMD2, "train": train}), str(tmp_path / "run")]
    assert main(argv) == 0

    def refuse(constant):
        raise AssertionError(constant)

    for path in (tmp_path / "run").rglob("*.json*"):
        for line in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    assert "x_mean" in (tmp_path / "run/metrics.jsonl").read_text()
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())


@pytest.mark.parametrize("off", ["null", "[]", "false", '""', "0", "{}"])
def test_a_setting_newer_than_the_checkpoint_counts_as_off(off):
    before, now = {"a": "1", "stages.0.b": "2"}, {"a": "1", "stages.0.b": "2", "student.trained": off}
    fingerprint.check_same("checkpoint-1", before, now, (), True)
    fingerprint.check_same("checkpoint-1", now, before, (), True)
    with pytest.raises(checkpoint.UserError, match="student.trained .unset -> .'x'.."):
        fingerprint.check_same("checkpoint-1", before, now | {"student.trained": "['x']"}, (), True)
    with pytest.raises(checkpoint.UserError, match="student.trained"):
        fingerprint.check_same("checkpoint-1", now | {"student.trained": "1"}, now, (), True)
