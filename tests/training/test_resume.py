"""Stopping and resuming is bit-exact, at any step, for every kind of state; a kill while saving costs
nothing.
"""

import json
import multiprocessing
import os
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastgen.cli.train import main
from fastgen.core.errors import UserError
from fastgen.training import checkpoint, validation
from fastgen.training.trainer import Trainer
from tests.support.heavier import first_of, some_of

BASE = {
    "teacher": {"path": "analytic:gmm2d-flow", "guidance": 1.5},
    "train": {
        "max_train_steps": 6,
        "train_batch_size": 16,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 20,
        "log_steps": 1,
        "validation_steps": 2,
        "ema_decay": [0.9, 0.99],
    },
    "eval": {"num_samples": 0, "validation_samples": 20, "grid": 4},
}
DMD2 = {"name": "dmd2", "student_every": 2, "gan_weight": 0.1, "disc_weight": 0.1}
CM = {"name": "consistency", "num_scales": 8, "target_decay": 0.9}
NEAR = [{"name": "near", "weights": {"near": "tests.support.rewards:near"}}]
FAST = {"student": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 2}}
RUNS = {
    "dmd2 with GAN": {"objective": DMD2, "optim": FAST},
    "four steps": {"objective": DMD2 | {"gan_weight": 0.0}, "student": {"num_steps": 4}},
    "consistency with target": {"objective": CM, "optim": FAST},
    "accumulation": {"objective": DMD2, "train": BASE["train"] | {"gradient_accumulation_steps": 2}},
    "pairs": {"objective": {"name": "ode_pairs", "teacher_steps": 4}},
    "path of DisBack": {
        "objective": {"name": "disback", "record_steps": 2, "nodes": 2, "switch_every": 2, "host": DMD2},
    },
    "three students": {"objective": {"name": "msd", "num_students": 3, "host": DMD2}, "optim": FAST},
    "two stages": {
        "stages": [
            {"name": "warm", "objective": CM, "max_train_steps": 3},
            {"name": "match", "objective": DMD2, "max_train_steps": 3},
        ],
    },
    "Seedance": {
        "student": {"num_steps": 2, "sampler": "ode"},
        "stages": [
            {
                "name": "a",
                "objective": {"name": "tscd", "grid_steps": 4, "segments": 2},
                "max_train_steps": 1,
            },
            {"name": "b", "objective": {"name": "tdm"}, "max_train_steps": 2},
            {
                "name": "c",
                "objective": {"name": "ladd", "preference_weight": 0.5, "rewards": NEAR},
                "max_train_steps": 2,
            },
            {"name": "d", "objective": {"name": "feedback", "rewards": NEAR}, "max_train_steps": 1},
        ],
    },
    "three stages": {
        "stages": [
            {"name": "a", "objective": DMD2, "max_train_steps": 2},
            {"name": "b", "objective": CM, "max_train_steps": 2},
            {"name": "c", "objective": DMD2, "max_train_steps": 2},
        ],
    },
}


def write(tmp_path, values):
    merged = BASE | values
    if "stages" in values:  # each stage has its own length
        merged["train"] = {k: v for k, v in merged["train"].items() if k != "max_train_steps"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(merged))
    return ["--config", str(tmp_path / "run.yaml"), "--output_dir"]


def state(run, step):
    return load_file(run / f"checkpoints/checkpoint-{step}/state.safetensors")


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "steps_per_second", "cpu_share", "rss_mb")
    return [{k: v for k, v in r.items() if k not in timed} for r in records]


class Stop(Exception):
    pass


def stop_after(monkeypatch, step):
    """Make the run die right after the checkpoint of a step is complete."""
    real = checkpoint.save

    def save(folder, at, *rest):
        real(folder, at, *rest)
        if at == step:
            raise Stop

    monkeypatch.setattr(checkpoint, "save", save)


CUTS = [(name, at) for name in RUNS for at in (3, 4)]
"""after an odd step, and after an even one"""


@pytest.mark.parametrize(
    ("name", "at"),
    some_of(
        CUTS,
        [
            ("dmd2 with GAN", 3),
            ("three stages", 4),
            ("pairs", 3),
            ("path of DisBack", 3),
        ],
    ),
)
def test_resume_is_bit_exact(name, at, tmp_path, monkeypatch, no_finish):
    arguments = write(tmp_path, RUNS[name])
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, at)
        main([*arguments, str(tmp_path / "cut")])
    assert main([*arguments, str(tmp_path / "cut"), "--resume"]) == 0
    whole, cut = state(tmp_path / "whole", 6), state(tmp_path / "cut", 6)
    assert whole.keys() == cut.keys() and any(k.startswith("optim/") for k in whole)
    for key in whole:
        assert torch.equal(whole[key], cut[key]), key
    first, second = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert first == second and len(first) >= 6


def test_resume_between_checkpoints_repeats_no_line(tmp_path, monkeypatch, no_finish):
    """A run that dies two steps after its checkpoint, in the middle of an average, logs what the whole
    run logs.
    """
    train = BASE["train"] | {"checkpointing_steps": 3, "log_steps": 2, "validation_steps": 0}
    arguments = write(tmp_path, RUNS["dmd2 with GAN"] | {"train": train})
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch, pytest.raises(Stop):
        real = Trainer.write_metrics

        def write_metrics(self, record):
            real(self, record)
            if record["step"] == 4:
                with open(self.folder / "metrics.jsonl", "a") as file:
                    file.write('{"step": 5, "cut o')
                raise Stop

        patch.setattr(Trainer, "write_metrics", write_metrics)
        main([*arguments, str(tmp_path / "cut")])
    assert main([*arguments, str(tmp_path / "cut"), "--resume"]) == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_resuming_a_finished_run_holds_its_weights(tmp_path, monkeypatch):

    seen = []
    monkeypatch.setattr(
        validation,
        "finish",
        lambda trainer, validator: seen.append(
            {n: p.detach().clone() for n, p in trainer._tensors().items()}
        ),
    )
    arguments = [
        *write(tmp_path, RUNS["two stages"] | {"train": BASE["train"] | {"validation_steps": 0}}),
        str(tmp_path / "run"),
    ]
    assert main(arguments) == 0 and main([*arguments, "--resume"]) == 0
    assert seen[0].keys() == seen[1].keys() and all(torch.equal(v, seen[1][k]) for k, v in seen[0].items())


def test_lora_resume_is_bit_exact(tiny, tmp_path, monkeypatch, no_finish):
    values = {
        "teacher": {"path": str(tiny("flow"))},
        "student": {"kind": "lora", "lora": {"rank": 2, "lora_alpha": 8}},
        "data": {"images": str(pictures(tmp_path))},
        "objective": DMD2,
        "train": BASE["train"] | {"train_batch_size": 2, "validation_steps": 0},
    }
    arguments = write(tmp_path, values)
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 3)
        main([*arguments, str(tmp_path / "cut")])
    assert main([*arguments, str(tmp_path / "cut"), "--resume"]) == 0
    whole, cut = state(tmp_path / "whole", 6), state(tmp_path / "cut", 6)
    assert any("lora_A.student" in k for k in whole) and any("lora_A.critic" in k for k in whole)
    assert not any("conv1.base_layer.weight" in k for k in whole), (
        "the frozen base has no place in a checkpoint"
    )
    for key in whole:
        assert torch.equal(whole[key], cut[key]), key


def pictures(tmp_path):
    from PIL import Image

    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(10):
        Image.new("L", (16, 16), 25 * i).save(folder / f"{i}.png")
    return folder


def kill_in_save(point, number):
    """From now on this process dies by SIGKILL in its `number`-th checkpoint, at the given point."""
    import safetensors.torch

    write_file, move, count = safetensors.torch.save_file, os.replace, []

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def save_file(tensors, path, **kw):
        count.append(path)
        if len(count) < number or point == "rename":
            return write_file(tensors, path, **kw)
        if point != "before":
            write_file(tensors, path, **kw)
        if point == "half":
            os.truncate(path, 100)
        die()

    def replace(a, b):
        if point == "rename" and str(b).endswith(f"checkpoint-{number}"):
            die()
        return move(a, b)

    safetensors.torch.save_file, os.replace = save_file, replace


def killed_run(point, arguments):
    """A run that dies in its third checkpoint."""
    kill_in_save(point, 3)
    main(arguments)


@pytest.mark.parametrize("point", first_of(["half", "before", "after", "rename"]))
def test_kill_while_saving_leaves_a_checkpoint_that_resumes(point, tmp_path, no_finish):
    values = RUNS["consistency with target"] | {
        "train": BASE["train"] | {"validation_steps": 0, "log_steps": 2}
    }
    arguments, run = write(tmp_path, values), tmp_path / "run"
    context = multiprocessing.get_context("forkserver")  # a fork would keep the locks of threads
    context.set_forkserver_preload(["fastgen.cli.train", "fastgen.training.trainer"])
    child = context.Process(target=killed_run, args=(point, [*arguments, str(run)]), daemon=True)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert checkpoint.latest(run).name == "checkpoint-2"
    assert main([*arguments, str(run), "--resume"]) == 0
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    whole, cut = state(tmp_path / "whole", 6), state(run, 6)
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    assert losses(run) == losses(tmp_path / "whole")
    assert not list((run / "checkpoints").glob("*.tmp"))


def test_only_the_newest_checkpoints_are_kept(tmp_path, no_finish):
    values = RUNS["consistency with target"] | {
        "train": BASE["train"] | {"checkpoints_total_limit": 2, "validation_steps": 0}
    }
    assert main([*write(tmp_path, values), str(tmp_path / "run")]) == 0
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-5", "checkpoint-6"]
    files = {p.suffix for p in (tmp_path / "run/checkpoints").rglob("*") if p.is_file()}
    assert files == {".safetensors", ".json"}


def test_a_setting_newer_than_the_checkpoint_must_be_off(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "read_meta", lambda path: {"fingerprint": {"train.seed": "0"}})
    checkpoint.check_same(tmp_path, {"train.seed": "0", "objective.new": "null"})
    with pytest.raises(UserError, match=r"objective.new \(unset -> 3\)"):
        checkpoint.check_same(tmp_path, {"train.seed": "0", "objective.new": "3"})
