"""The command line: merging, typed dotted overrides, help, dry run, exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastgen.cli.train import main
from fastgen.config.run import load, validate

ROOT = Path(__file__).resolve().parents[2]
FLAT = ["--config", str(ROOT / "tests/support/flat.yaml")]


def load_flat(*argv, files=()):
    return load([str(ROOT / "tests/support/flat.yaml"), *map(str, files)], list(argv))


def test_files_merge_left_to_right_and_flags_win(tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {student: {lr: 1e-5, clip: 2}}\ntrain: {seed: 3}")
    (tmp_path / "b.yaml").write_text("optim: {student: {lr: 1e-6}}")
    cfg = load_flat("--train.seed", "9", files=[tmp_path / "a.yaml", tmp_path / "b.yaml"])
    assert (cfg.optim.student.lr, cfg.optim.student.clip, cfg.train.seed) == (1e-6, 2, 9)
    assert cfg.objective.student_every == 2, "keys that no later file names stay"


def test_flags_are_typed():
    cfg = load_flat(
        *(
            "--optim.student.lr",
            "1e-4",
            "--train.ema-decay",
            "0.9",
            "0.99",
            "--student.timesteps",
            "[1.0, 0.5]",
        ),
        *("--teacher.allow_download=true", "--data.name=digits", "--student.lora.target_modules", "to_q"),
    )
    assert cfg.optim.student.lr == 1e-4 and cfg.train.ema_decay == (0.9, 0.99)
    assert cfg.student.timesteps == (1.0, 0.5) and cfg.teacher.allow_download is True
    assert cfg.data.name == "digits" and cfg.student.lora.target_modules == ("to_q",)
    assert load_flat("--train.ema_decay", "[]").train.ema_decay == ()
    assert load_flat("--data.name=", "--objective.gan_weight=0").data.name == "", "an empty value is a value"
    assert load_flat("--objective.gan_time", "{low: 0.1}").objective.gan_time.low == 0.1


def test_another_objective_drops_the_keys_of_the_first():
    cfg = load_flat("--objective.name", "consistency", "--objective.num_scales", "8")
    assert cfg.objective.name == "consistency" and cfg.objective.num_scales == 8


def test_flags_reach_into_stages(tmp_path):
    stages = [{"name": n, "objective": {"name": "consistency"}} for n in "ab"]
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"stages": stages}))
    flags = ["--stages.1.max_train_steps", "7", "--stages.0.objective.num_scales", "4"]
    cfg = load([str(tmp_path / "s.yaml")], flags)
    assert [s.max_train_steps for s in cfg.stages] == [100, 7]
    assert [s.objective.num_scales for s in cfg.stages] == [4, 32]


def leaves(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"--{prefix}{key}"


@pytest.mark.parametrize("method", ["dmd2", "consistency", "sft", "ode_pairs"])
def test_help_shows_every_key_with_its_text(method, capsys):
    assert main([*FLAT, "--objective.name", method, "--help", "all"]) == 0
    text = capsys.readouterr().out
    for switch in ("--config", "--resume", "--overwrite", "--dry_run", "--plugin"):
        assert switch in text
    dumped = load(FLAT[1:], ["--objective.name", method]).model_dump(mode="json")
    hidden = {"--teacher.blueprint", "--teacher.family", "--teacher.layout", "--student.net", "--stages"}
    hidden |= {"--objective.name", "--data.sources"}
    for key in leaves(dumped):
        if key in hidden:
            continue
        lines = text.splitlines()
        at = next((i for i, line in enumerate(lines) if line.strip().startswith(key + " ")), None)
        assert at is not None, f"{key} is not in the help"
        message = " ".join(lines[at : at + 3]).replace(lines[at].strip(), "", 1)
        assert len(message.strip()) > 5, f"{key} has no text"
    assert "\x1b[" not in text and all(line == line.rstrip() for line in text.splitlines())


def test_dry_run_tells_everything_and_starts_nothing(tmp_path, capsys):
    run = tmp_path / "run"
    argv = [
        *FLAT,
        "--student.kind",
        "lora",
        "--student.lora.rank",
        "4",
        "--dry_run",
        "--output_dir",
        str(run),
    ]
    assert main(argv) == 0
    text = capsys.readouterr().out
    resolved = yaml.safe_load(text[: text.index("\nrun  ")])
    assert validate(resolved) == load(FLAT[1:], [*argv[2:6], "--output_dir", str(run)])
    for part in (
        "student",
        "critic",
        "trained",
        "frozen",
        "adapter on the teacher",
        "network calls a step",
        "memory",
        "EMA",
    ):
        assert part in text, part
    assert not run.exists()


def test_dry_run_counts_the_guidance_a_method_trains_under(capsys):
    guided = [*FLAT, "--teacher.guidance", "2", "--objective.student_every", "1", "--dry_run"]
    for more, calls in ([], "teacher 2"), (["--objective.real_guidance", "1"], "teacher 1"):
        assert main([*guided, *more]) == 0
        assert calls in capsys.readouterr().out


def test_dry_run_needs_no_room_for_the_weights(tmp_path, capsys):
    """A billion parameters are described in seconds: networks have shapes and no weights."""
    net = {
        "_class_name": "UNet2DModel", "sample_size": 64, "in_channels": 3, "out_channels": 3,
        "block_out_channels": [1024, 1024, 1024], "layers_per_block": 4, "num_class_embeds": 11,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    }  # fmt: skip
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    blueprint = {"net": net, "scheduler": scheduler, "info": {"num_classes": 10}}
    values = {"teacher": {"path": "", "blueprint": blueprint}, "objective": {"name": "consistency"}}
    (tmp_path / "big.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "big.yaml"), "--dry_run"]) == 0
    text = capsys.readouterr().out
    count = int(next(line for line in text.splitlines() if "teacher  " in line).split()[1].replace(",", ""))
    assert count > 5e8
    total = re.search(r"^memory +([\d.]+) GB estimated", text, re.M)[1]
    assert float(total) * 2**30 > 4 * count * 5, "teacher, student, gradient and two states of Adam at least"


def test_train_py_runs_two_steps_and_shows_its_results(tmp_path):
    argv = [
        sys.executable,
        str(ROOT / "train.py"),
        *FLAT,
        "--output_dir",
        "run",
        "--train.max_train_steps",
        "2",
    ]
    small = ["--train.train_batch_size", "4", "--eval.num_samples", "8", "--eval.validation_samples", "4"]
    more = ["--eval.grid", "4", "--teacher.num_steps", "2", "--eval.batch_size", "8"]
    done = subprocess.run(
        [*argv, *small, *more], cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    for line in ("teacher", "untrained student", "student", "report", "export", "sample"):
        assert line in done.stdout
    names = (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "results.json",
        "samples",
        "export",
        "report/index.html",
    )
    assert all((run / name).exists() for name in names)
    again = load([str(run / "config.yaml")], [])
    assert again.train.max_train_steps == 2 and again.output_dir == "run"
    assert json.loads((run / "environment.json").read_text())["torch"]
