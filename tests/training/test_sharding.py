"""Networks spread over two processes (FSDP2): the same weights as whole ones, from training to the export."""

import json
import shutil
import time

import pytest
import yaml
from safetensors.torch import load_file, save_file

from fastgen.cli.train import main
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.core.paths import asset
from fastgen.training import checkpoint
from tests.support.heavier import first_of
from tests.training.test_two_process import assert_same, assert_same_losses, launch_two, state

DRIVER = """
import os, sys, torch
from diffusers import ModelMixin
from torch.distributed.tensor import DTensor
from fastgen.cli.train import main
from fastgen.training.trainer import Trainer
spread, begin = set(), Trainer._begin
def seen(self, stage):
    begin(self, stage)
    for backbone in self.cast.backbones():
        for name, p in backbone.named_weights().items():
            spread.add(("lora_" in name, isinstance(p, DTensor)))
            if isinstance(p, DTensor) and len(p) > 1:
                assert p.to_local().numel() < p.numel(), name
Trainer._begin = seen
def read(*args, **kwargs):
    raise AssertionError("the first process alone reads a denoiser's weights")
if os.environ["RANK"] != "0":
    ModelMixin.from_pretrained = read
code = main(sys.argv[1:])
assert spread and all(is_spread != is_adapter for is_adapter, is_spread in spread), spread
sys.exit(code)
"""
EPS = {"lr": 1e-3, "eps": 1e-4}  # Adam divides a gradient by its size: see test_two_process.py
RUNS = {
    "dmd2 with GAN": {
        "objective": {"name": "dmd2", "student_every": 2, "gan_weight": 0.1, "disc_weight": 0.1},
        "optim": {"student": EPS, "critic": EPS},
    },
    "adapters": {
        "objective": {"name": "dmd2", "student_every": 2, "gan_weight": 0.0},
        "optim": {"student": EPS, "critic": EPS},
        "student": {"kind": "lora", "lora": {"rank": 2}},
        "critic": {"lora": {"rank": 2}},
    },
    "a target that follows": {
        "objective": {"name": "consistency", "num_scales": 8, "target_decay": 0.5},
        "optim": {"student": EPS},
    },
}


IN_PARTS = {"sharding": "fsdp", "sharded_checkpoints": True, "async_checkpoints": True}
SHARDING = {"dmd2 with GAN": IN_PARTS, "adapters": {"sharding": "fsdp"}, "a target that follows": IN_PARTS}


def settings(run: dict, batch: int, sharding: dict, steps: int = 4) -> dict:
    return {
        "teacher": {"path": "assets:teachers/digits", "num_steps": 2},
        "data": {"name": "digits", "limit": 64},
        "train": {
            "max_train_steps": steps,
            "train_batch_size": batch,
            "validation_steps": 2,
            "checkpointing_steps": 2,
            "ema_decay": [0.9],
            **sharding,
        },
        "eval": {
            "num_samples": 20,
            "teacher_samples": 10,
            "validation_samples": 10,
            "grid": 4,
            "batch_size": 5,
        },
        **run,
    }


@pytest.mark.parametrize("name", first_of(RUNS))
def test_two_processes_with_a_part_each_equal_one(name, tmp_path):
    """Checkpoint, averages and optimizer are whole and those of one process; so are results and export. The
    driver lets no second process read weights.
    """
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(settings(RUNS[name], 8, {})))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(settings(RUNS[name], 4, SHARDING[name])))
    assert main(["--config", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "one")]) == 0
    launch_two(tmp_path, DRIVER)
    for step in (2, 4):
        one, two = state(tmp_path / "one", step), state(tmp_path / "two", step)
        assert any("exp_avg" in key for key in one)
        assert_same(one, two, rtol=1e-3, atol=2e-5)
    results = [json.loads((tmp_path / f / "results.json").read_text()) for f in ("one", "two")]
    assert results[1]["student"]["fd_mini"] == pytest.approx(results[0]["student"]["fd_mini"], rel=1e-2)
    files = [sorted((tmp_path / f / "export").rglob("*.safetensors")) for f in ("one", "two")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]] and files[0]
    for a, b in zip(*files):
        assert_same(load_file(a), load_file(b), rtol=1e-3, atol=2e-5)


RELATIVE = {"adapters": 1e-5}
"""bounds where 1e-6 is less than the rounding of a small loss makes"""


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_losses_of_twenty_steps_are_those_of_one_process(name, tmp_path):
    slow = {"lr": 1e-4, "eps": 1e-3}
    run = {**RUNS[name], "optim": {"student": slow, "critic": slow}, "eval": {"num_samples": 0}}
    for file, batch, more in (("one", 8, {}), ("two", 4, {"sharding": "fsdp"})):
        values = settings(run, batch, {"validation_steps": 0, "log_steps": 1, **more}, steps=20)
        (tmp_path / f"{file}.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "one")]) == 0
    launch_two(tmp_path, DRIVER)
    assert_same_losses(tmp_path / "one", tmp_path / "two", rel=RELATIVE.get(name, 1e-6))


@pytest.mark.slow
def test_students_whose_conditions_one_process_lacks_sit_out_on_all(tmp_path):
    """Three students, four rows a process: without agreement one would wait for the other for ever."""
    host = {"name": "dmd2", "gan_weight": 0.0, "student_every": 2}
    objective = {"name": "msd", "num_students": 3, "host": host}
    run = {"objective": objective, "optim": {"student": EPS, "critic": EPS}, "eval": {"num_samples": 0}}
    values = settings(run, 4, {"sharding": "fsdp", "validation_steps": 0, "log_steps": 1}, steps=8)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    launch_two(tmp_path, DRIVER)
    lines = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    trained = [{n for n in line if n.startswith("critic") and n.endswith("/loss")} for line in lines]
    assert set().union(*trained) == {f"critic{j}/loss" for j in range(3)}
    assert any(len(found) < 3 for found in trained)


@pytest.mark.slow
def test_two_copies_of_two_parts_each_equal_one(tmp_path):
    """HSDP on four processes; what they write in parts one process goes on from."""
    run = RUNS["dmd2 with GAN"]
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(settings(run, 8, {})))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(settings(run, 2, IN_PARTS | {"shard_group": 2})))
    assert main(["--config", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "one")]) == 0
    launch_two(tmp_path, DRIVER, processes=4)
    files = sorted(p.name for p in (tmp_path / "two/checkpoints/checkpoint-2").glob("*.safetensors"))
    assert files == ["state-00001-of-00004.safetensors", "state-00002-of-00004.safetensors"]
    assert_same(state(tmp_path / "one", 4), state(tmp_path / "two", 4), rtol=1e-3, atol=2e-5)
    shutil.rmtree(tmp_path / "two/checkpoints/checkpoint-4")
    flags = ["--resume", "--allow_changed", "world_size", "train"]
    assert main(["--config", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "two"), *flags]) == 0
    assert_same(state(tmp_path / "one", 4), state(tmp_path / "two", 4), rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_a_run_goes_on_spread_over_two_processes(tmp_path):
    """A checkpoint of one process, resumed by two with a part each, ends where one process ends."""
    run = RUNS["dmd2 with GAN"]
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(settings(run, 8, {})))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(settings(run, 4, {"sharding": "fsdp"})))
    assert main(["--config", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "one")]) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/checkpoints/checkpoint-4")
    launch_two(tmp_path, DRIVER, "--resume", "--allow_changed", "world_size", "train")
    one, two = state(tmp_path / "one", 4), state(tmp_path / "two", 4)
    assert_same(one, two, rtol=1e-3, atol=2e-5)
    assert "exp_avg" in "".join(one) and (tmp_path / "two/export").is_dir()


KILLED = """
import os, signal, sys
from tests.training.test_resume import kill_in_save
from fastgen.cli.train import main
if os.environ["RANK"] == "1":
    kill_in_save("half", 2)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_process_killed_while_saving_ends_the_other_and_the_run_resumes(tmp_path):
    """Its half of the second checkpoint is cut short; the other process ends at once and not by its own
    limit, the first checkpoint is the latest, and what resumes from it ends where one process ends.
    """
    run = RUNS["dmd2 with GAN"] | {"eval": {"num_samples": 0}}
    for name, batch, more in (("one", 8, {}), ("two", 4, IN_PARTS | {"async_checkpoints": False})):
        values = settings(run, batch, {"validation_steps": 0, "checkpointing_steps": 1, **more}, steps=3)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "one")]) == 0
    began = time.monotonic()
    launch_two(tmp_path, KILLED, fails=True)
    assert time.monotonic() - began < 180, "imports, two steps and at most a minute of waiting"
    assert checkpoint.latest(tmp_path / "two").name == "checkpoint-1"
    assert not (tmp_path / "two/export").exists()
    launch_two(tmp_path, DRIVER, "--resume")
    assert_same(state(tmp_path / "one", 3), state(tmp_path / "two", 3), rtol=1e-3, atol=2e-5)
    assert not list((tmp_path / "two/checkpoints").glob("*.tmp")), "what was left half is gone"


@pytest.mark.slow
def test_weights_that_do_not_fit_end_both_processes(tmp_path):
    """The first process alone reads them and says what is wrong; the other does not wait for it."""
    teacher = tmp_path / "teacher"
    shutil.copytree(asset("teachers/digits"), teacher)
    file = next(teacher.rglob("*.safetensors"))
    wrong = {k: v[:1].clone() if k == "conv_in.weight" else v for k, v in load_file(file).items()}
    save_file(wrong, file)
    values = settings(RUNS["adapters"], 4, {"sharding": "fsdp"}) | {"teacher": {"path": str(teacher)}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    began = time.monotonic()
    said = launch_two(tmp_path, DRIVER, fails=True)
    assert time.monotonic() - began < 120, "imports, and at most a minute of waiting"
    assert "error: teacher.path: " in said and "conv_in.weight" in said


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": {"quantization": "nf4"}},
        {"train": {"mixed_precision": "fp16"}},
        {"eval": {"keep": "best"}},
        {"student": {"fuse": "somewhere"}},
    ],
)
def test_what_cannot_be_spread_is_refused(change):
    section, values = next(iter(change.items()))
    base = {"objective": {"name": "dmd2"}, "data": {"name": "digits"}, "train": {"sharding": "fsdp"}}
    with pytest.raises(UserError, match=f"{section}.{next(iter(values))}: not with train.sharding"):
        validate(base | {section: {**base.get(section, {}), **values}})


@pytest.mark.parametrize("key,value", [("shard_group", 2), ("sharded_checkpoints", True)])
def test_settings_of_sharding_without_it_are_refused(key, value):
    with pytest.raises(UserError, match=f"train.{key}: only with train.sharding fsdp"):
        validate({"objective": {"name": "dmd2"}, "data": {"name": "digits"}, "train": {key: value}})


@pytest.mark.parametrize("name", ["scm", "sana_sprint"])
def test_forward_mode_is_refused_and_says_what_works(name):
    values = {"data": {"name": "digits"}, "train": {"sharding": "fsdp"}}
    with pytest.raises(UserError, match=f"tangent.method: found exact for {name}, .* use difference"):
        validate(values | {"objective": {"name": name}})


def test_one_process_has_nothing_to_spread_over(tmp_path, capsys):
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(settings(RUNS["adapters"], 8, {"sharding": "fsdp"})))
    assert main(["--config", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "one")]) == 2
    assert "train.sharding: found fsdp for one process" in capsys.readouterr().err
