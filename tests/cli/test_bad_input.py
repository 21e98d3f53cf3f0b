"""Every mistake a user can make: one line on stderr naming the key, exit code 2, no traceback, nothing
overwritten.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fastgen.cli.train import main
from tests.support.flags import last_of_each

TOY = [
    *("--teacher.path", "analytic:gmm2d-flow", "--train.max_train_steps", "2"),
    *("--train.validation_steps", "0", "--eval.num_samples", "0", "--objective.gan_weight", "0"),
]
BASE = str(Path(__file__).parents[1] / "support/flat.yaml")
RECIPES = Path(__file__).parents[2] / "configs/recipes"
HALF_NOISE = ["--config", f"{RECIPES}/digits_boot.yaml", "--student.timesteps", "[0.8]"]


def started(argv):
    """Arguments over a flat one-stage config, unless they name their own."""
    return last_of_each([*argv, *([] if "--config" in argv else ["--config", BASE])])


def say(capsys, argv):
    """(exit code, stderr) of a run."""
    code = main(started(argv))
    return code, capsys.readouterr().err


# name -> (arguments, what the line must hold); {run} is the output folder, {tmp} a scratch folder
SIMPLE = {
    "misspelt section": (["--optm.student.lr", "1"], ["optm", "did you mean 'optim'"]),
    "misspelt key": (["--optim.studnt.lr", "1"], ["optim.studnt", "did you mean 'student'"]),
    "misspelt objective key": (
        ["--objective.gan_wieght", "1"],
        ["objective.gan_wieght", "did you mean 'gan_weight'"],
    ),
    "wrong type": (["--optim.student.lr", "fast"], ["optim.student.lr", "'fast'"]),
    "out of range": (["--train.seed", "-1"], ["train.seed", "greater than or equal to 0", "-1"]),
    "boot from half noise": (HALF_NOISE, ["student.timesteps", "not pure noise", "at 80"]),
    "tbcm on data": (
        ["--config", f"{RECIPES}/digits_tbcm.yaml", "--objective.scm.mode", "training"],
        ["objective.scm.mode", "use distillation: TBCM reads no data"],
    ),
    "tcm below its boundary": (
        ["--config", f"{RECIPES}/digits_tcm.yaml", "--student.timesteps", "[0.1]"],
        ["student.timesteps", "less noise than the boundary"],
    ),
    "guidance that nothing learns from": (
        ["--config", f"{RECIPES}/digits_ect.yaml", "--objective.real_guidance", "2"],
        ["objective.real_guidance", "leave it out"],
    ),
    "critic ratio 0": (
        ["--objective.student_every", "0"],
        ["objective.student_every", "greater than or equal to 1"],
    ),
    "bad choice": (["--student.kind", "loora"], ["student.kind", "'lora' or 'guidance_adapter'", "loora"]),
    "unknown objective": (
        ["--objective.name", "dmd22"],
        ["objective.name", "dmd22", "did you mean 'dmd2'", "consistency"],
    ),
    "misspelt switch": (["--resum"], ["--resum", "did you mean 'resume'"]),
    "misspelt switch 2": (["--dryrun"], ["--dryrun", "did you mean 'dry_run'"]),
    "misspelt key without value": (["--train.sed"], ["--train.sed", "did you mean 'seed'"]),
    "misspelt nested objective key": (
        ["--objective.time.lo", "0.1"],
        ["objective.time.lo", "did you mean 'low'"],
    ),
    "section and key": (["--train", "3", "--train.seed", "4"], ["train", "not both"]),
    "infinite": (["--optim.student.lr", "inf"], ["optim.student.lr", "finite"]),
    "bad list": (["--student.lora.target_modules", "[a"], ["student.lora.target_modules", "'[a'"]),
    "config without value": (["--config"], ["--config", "expected at least one"]),
    "half precision on a CPU": (
        ["--train.mixed_precision", "fp16"],
        ["train.mixed_precision", "without a GPU", "bf16"],
    ),
    "best without validation": (
        ["--eval.keep", "best", "--train.validation_steps", "0"],
        ["eval.keep", "validation_steps"],
    ),
    "resume and overwrite": ([*TOY, "--resume", "--overwrite"], ["--resume", "--overwrite", "one of them"]),
    "flag without value": (["--train.seed"], ["--train.seed", "no value"]),
    "stray word": (["train.seed", "3"], ["train.seed", "--section.key value"]),
    "config missing": (["--config", "nowhere.yaml"], ["--config", "nowhere.yaml does not exist"]),
    "plugin missing": (["--plugin", "no_such_plugin"], ["--plugin", "no_such_plugin"]),
    "teacher missing": (["--teacher.path", "{tmp}/nothing"], ["teacher.path", "is not a folder"]),
    "hub id offline": (
        ["--teacher.path", "someone/model"],
        ["teacher.path", "someone/model", "allow_download"],
    ),
    "unknown bundled teacher": (["--teacher.path", "assets:teachers/nope"], ["teachers/nope"]),
    "unknown analytic teacher": (["--teacher.path", "analytic:gmm3d"], ["gmm3d", "did you mean"]),
    "unknown analytic schedule": (
        ["--teacher.path", "analytic:gmm2d-cosine"],
        ["cosine", "flow, vp, edm, trig"],
    ),
    "unknown data set": (["--data.name", "mnist"], ["data.name", "mnist", "digits, fashion, tinted"]),
    "GAN without data": (["--data.name", ""], ["needs real data", "data.name"]),
    "ascending timesteps": (["--student.timesteps", "0.5", "1.0"], ["student.timesteps", "descend"]),
    "timesteps off the schedule": (
        ["--student.timesteps", "999"],
        ["student.timesteps", "999", "(0.0, 1.0]"],
    ),
    "LoRA on an analytic teacher": (
        ["--teacher.path", "analytic:gmm2d-flow", "--student.kind", "lora"],
        ["student.kind", "analytic", "full"],
    ),
    "timesteps between the schedule's": (
        ["--teacher.path", "analytic:gmm2d-vp", "--student.timesteps", "998.5"],
        ["student.timesteps", "998.5", "whole numbers"],
    ),
    "LoRA critic of an analytic teacher": (
        ["--teacher.path", "analytic:gmm2d-flow", "--critic.kind", "lora"],
        ["critic.kind", "analytic", "use full"],
    ),
    "host with a GAN, without data": (
        ["--objective.name", "disback", "--objective.host", "{{name: dmd2}}", "--data.name", ""],
        ["needs real data", "data.name"],
    ),
    "unknown host": (
        ["--objective.name", "disback", "--objective.host", "{{name: dmd3}}"],
        ["objective.host.name", "dmd3", "diff_instruct"],
    ),
    "host without a critic": (
        ["--objective.name", "disback", "--objective.host", "{{name: consistency}}"],
        ["objective.host", "consistency has no critic", "swiftbrush"],
    ),
    "more students than classes": (
        ["--objective.name", "msd", "--objective.num_students", "11"],
        ["objective.num_students", "found 11 for 10 classes", "would have none"],
    ),
    "students without conditions": (
        [
            "--teacher.path",
            "analytic:gmm8d-flow",
            "--objective.name",
            "msd",
            "--objective.host",
            "{{name: dmd}}",
        ],
        ["objective.num_students", "unconditional"],
    ),
    "random guidance of an unconditional teacher": (
        ["--teacher.path", "analytic:gmm8d-flow", "--objective.name", "snoopi"],
        ["objective.min_guidance", "unconditional"],
    ),
    "image-text loss without texts": (
        ["--objective.name", "swiftbrush", "--objective.clip_weight", "0.1", "--objective.clip_steps", "5"],
        ["objective.clip_weight", "no captions", "set it to 0"],
    ),
    "LoRA targets match nothing": (
        ["--student.kind", "lora", "--student.lora.target_modules", "to_nothing"],
        ["target_modules", "to_nothing", "to_q"],
    ),
    "guidance of an unconditional teacher": (
        ["--teacher.path", "analytic:gmm8d-flow", "--teacher.guidance", "3", "--objective.gan_weight", "0"],
        ["teacher.guidance", "unconditional"],
    ),
    "prediction disagrees": (["--teacher.prediction", "eps"], ["teacher.prediction", "'eps'", "'flow'"]),
    "8-bit without bitsandbytes": (
        [*TOY, "--optim.student.name", "adamw8bit"],
        ["adamw8bit", "bitsandbytes", "pip install"],
    ),
    "tracker not installed": (
        [*TOY, "--train.report_to", "trackio"],
        ["train.report_to", "trackio", "pip install"],
    ),
    "images folder missing": (
        ["--data.name", "", "--data.images", "{tmp}/nothing"],
        ["data.images", "is not a folder"],
    ),
    "images folder empty": (
        ["--data.name", "", "--data.images", "{tmp}/empty"],
        ["data.images", "no readable image"],
    ),
    "prompts missing": (
        ["--data.name", "", "--data.prompts", "{tmp}/no.txt", "--objective.gan_weight", "0"],
        ["data.prompts", "does not exist"],
    ),
    "images of another size": (["--data.name", "digits"], ["data", "(1, 8, 8)"]),
    "resume without checkpoint": ([*TOY, "--resume"], ["--resume", "no complete checkpoint"]),
}


@pytest.mark.parametrize("name", SIMPLE)
def test_one_line_and_exit_2(name, tmp_path, capsys):
    library = {"8-bit without bitsandbytes": "bitsandbytes", "tracker not installed": "trackio"}.get(name)
    if library and importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed")
    if name.startswith("half precision") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "empty").mkdir()
    run = tmp_path / "run"
    arguments, wanted = SIMPLE[name]
    code, err = say(capsys, [*(a.format(tmp=tmp_path) for a in arguments), "--output_dir", run])
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in err, err
    for part in wanted:
        assert part in errors[0], errors[0]
    assert not run.exists(), "a mistake leaves nothing behind"


@pytest.mark.parametrize(
    "text,wanted",
    [("a: [", "not valid YAML"), ("- 1", "holds a list"), ("train: {sed: 1}", "did you mean 'seed'")],
)
def test_bad_config_file(text, wanted, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(text)
    code, err = say(capsys, ["--config", tmp_path / "a.yaml", "--output_dir", tmp_path / "run"])
    assert code == 2 and wanted in err, err


def toy(tmp_path, *more):
    return [*TOY, "--output_dir", tmp_path / "run", *more]


def test_used_run_folder_is_left_alone(tmp_path, capsys, no_finish):
    assert main(started(toy(tmp_path))) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    code, err = say(capsys, toy(tmp_path))
    assert code == 2 and "output_dir" in err and "--resume" in err and "--overwrite" in err
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    changes = ["--optim.student.lr", "1", "--train.seed", "7", "--objective.student_every", "3"]
    code, err = say(capsys, toy(tmp_path, "--resume", *changes))
    assert (
        code == 2
        and "changed since checkpoint-2: objective.student_every (2 -> 3), train.seed (0 -> 7)" in err
    )
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    assert main(started(toy(tmp_path, "--overwrite"))) == 0


def test_a_mistake_under_overwrite_leaves_the_old_run(tmp_path, capsys):
    """Also one that only the objective can find, with the teacher's schedule before it."""
    (tmp_path / "config.yaml").write_text("train: {}")
    (tmp_path / "run.lock").write_text('{"fastgen_run": true}')
    code, err = say(capsys, [*HALF_NOISE, "--output_dir", tmp_path, "--overwrite"])
    assert code == 2 and "not pure noise" in err
    assert (tmp_path / "config.yaml").read_text() == "train: {}" and len(list(tmp_path.iterdir())) == 2


def test_overwrite_clears_run_folders_only(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    code, err = say(capsys, toy(tmp_path, "--overwrite"))
    assert code == 2 and "not written by fastgen" in err and (tmp_path / "run" / "thesis.txt").exists()
    (tmp_path / "file").write_text("")
    code, err = say(capsys, [*TOY, "--output_dir", tmp_path / "file"])
    assert code == 2 and "is a file" in err


def test_disk_full_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch, no_finish):
    import safetensors.torch

    from fastgen.training import checkpoint

    real, count = safetensors.torch.save_file, []

    def full(*args, **kwargs):
        count.append(1)
        if len(count) > 1:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    code, err = say(capsys, toy(tmp_path, "--train.checkpointing_steps", "1"))
    assert code == 2 and "No space left" in err and "last good checkpoint is kept" in err
    assert checkpoint.latest(tmp_path / "run").name == "checkpoint-1"


PLUGIN = '''
import torch
from typing import Literal
from fastgen.objectives.base import Objective, ObjectiveConfig
from fastgen.objectives.requirements import Requirements

class BrokenConfig(ObjectiveConfig):
    """Turns bad at step 2."""
    name: Literal["broken"] = "broken"

class Broken(Objective, config=BrokenConfig):
    requirements = classmethod(lambda cls, cfg: Requirements(lambda w, num: {}, real_data=False))
    def step(self, batch, k):
        with self.turn("student"):
            x = self.generate(batch)
            bad = x.mean() * (float("nan") if k == 2 else 1.0)
            yield x.square().mean() + bad, {"saturation": bad}
'''


def test_nan_stops_the_run_naming_player_term_and_step(tmp_path):
    """In a process of its own: the plugin joins the registry before the config is built."""
    (tmp_path / "broken_plugin.py").write_text(PLUGIN)
    base = {
        "teacher": {"path": "analytic:gmm2d-flow"},
        "objective": {"name": "broken"},
        "data": {"name": ""},
        "train": {"max_train_steps": 5, "checkpointing_steps": 1, "validation_steps": 0},
        "eval": {"num_samples": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base))
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        str(root / "train.py"),
        "--plugin",
        "broken_plugin",
        "--config",
        "run.yaml",
        "--output_dir",
        "run",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 3, done.stderr
    line = next(x for x in done.stderr.splitlines() if x.startswith("error:"))
    assert "step 2" in line and "student" in line and "saturation" in line and "checkpoint-2" in line, line


def text_set(folder, captions=True, broken=False):
    """A folder of pictures."""
    from PIL import Image

    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(folder / f"{i}.png")
        if captions:
            (folder / f"{i}.txt").write_text("a red dress " + ("very " * 60 if i == 0 else ""))
    if broken:
        (folder / "bad.png").write_bytes(b"not a picture")
    return folder


def text_run(tiny, tmp_path, images, *more):
    return [
        "--teacher.path",
        tiny("sd"),
        "--data.name",
        "",
        "--data.images",
        images,
        "--output_dir",
        tmp_path / "run",
        "--train.max_train_steps",
        1,
        "--train.train_batch_size",
        2,
        "--train.validation_steps",
        0,
        "--eval.num_samples",
        0,
        *more,
    ]


def test_text_to_image_without_captions(tiny, tmp_path, capsys):
    code, err = say(capsys, text_run(tiny, tmp_path, text_set(tmp_path / "set", captions=False)))
    assert code == 2 and "captions" in err and "metadata.jsonl" in err


def test_unreadable_image_is_named_and_counted(tiny, tmp_path, capsys):
    images = text_set(tmp_path / "set", broken=True)
    code, err = say(capsys, text_run(tiny, tmp_path, images, "--data.on_bad_image", "error"))
    assert code == 2 and "bad.png" in err and "1 unreadable" in err
    from fastgen.data.media import read_folder

    kept, captions = read_folder(images, (3, 16, 16), "skip")
    assert kept.shape == (4, 3, 16, 16) and len(captions) == 4
    assert "skipped 1 unreadable: bad.png" in capsys.readouterr().out


def test_long_prompt_is_warned_with_what_was_cut(tiny, capsys):
    from fastgen.data.loader import _text_rows
    from fastgen.networks.load import load_teacher

    codec = load_teacher(str(tiny("sd"))).codec
    _text_rows(codec, ["short", "a" * 200], torch.device("cpu"))
    assert "longer than 77 tokens" in (out := capsys.readouterr().out) and out.count("warning") == 1


def test_labels_outside_the_range():
    from fastgen.core.errors import UserError
    from fastgen.networks.codecs import LabelCodec

    with pytest.raises(UserError, match="labels: found 3 to 10; give labels from 0 to 9"):
        LabelCodec((1, 8, 8), num_classes=10).labels(torch.tensor([3, 10]))
