"""Numbers that no run can use are refused in one line before anything is written, in every command."""

import json
import os
import signal

import pytest
from PIL import Image

from fastgen.cli.sample import main as sample
from fastgen.cli.train import main
from fastgen.core.files import finite, to_json
from tests.cli.test_bad_input import TOY, say
from tests.cli.test_run_folder import refused
from tests.cli.test_sample import call, exports, pictures  # noqa: F401
from tests.training.test_stopping import not_ignored  # noqa: F401

BIG = 10**9
OUT = {
    "betas": (["--optim.student.betas", "2", "3"], ["optim.student.betas"]),
    "beta of 1": (["--optim.student.betas", "1.0", "0.9"], ["optim.student.betas"]),
    "negative beta": (["--optim.student.betas", "-0.5", "0.9"], ["optim.student.betas"]),
    "average above 1": (["--train.ema_decay", "2"], ["train.ema_decay"]),
    "average of 1": (["--train.ema_decay", "1"], ["train.ema_decay"]),
    "negative average": (["--train.ema_decay", "-1"], ["train.ema_decay"]),
    "seed of 64 bits": (["--train.seed", str(2**63)], ["train.seed"]),
    "seed of the samples": (["--eval.seed", str(2**64)], ["eval.seed"]),
    "threads": (["--train.num_threads", str(2**40)], ["train.num_threads"]),
    "learning rate": (["--optim.student.lr", "1e300"], ["optim.student.lr"]),
    "clip": (["--optim.student.clip", "1e300"], ["optim.student.clip"]),
    "weight decay": (["--optim.critic.weight_decay", "1e200"], ["optim.critic.weight_decay"]),
    "steps": (["--train.max_train_steps", str(2**70)], ["train.max_train_steps"]),
    "objective's number": (["--objective.student_every", str(2**70)], ["student_every"]),
    "objective's nan": (["--objective.disc_weight", "nan"], ["objective.disc_weight", "nan"]),
    "teacher's steps": (["--teacher.num_steps", str(BIG)], ["teacher.num_steps"]),
    "steps measured": (["--eval.student_steps", str(BIG)], ["eval.student_steps"]),
    "many images": (["--eval.num_samples", str(100 * BIG)], ["eval.num_samples", "GiB", "--insist"]),
    "large grid": (["--eval.grid", str(100 * BIG)], ["eval.grid", "GiB", "--insist"]),
    "large batch": (["--train.train_batch_size", str(10 * BIG)], ["train_batch_size", "GiB", "--insist"]),
    "endless": (["--train.max_train_steps", str(10 * BIG)], ["max_train_steps", "days", "--insist"]),
    "one sample": (["--eval.num_samples", "1"], ["eval.num_samples", "found 1", "2 samples or more"]),
    "one of the teacher": (["--eval.teacher_samples", "1"], ["eval.teacher_samples", "found 1"]),
}


@pytest.mark.parametrize("name", OUT)
def test_numbers_out_of_range(name, tmp_path, capsys):
    arguments, wanted = OUT[name]
    toy = [*TOY, "--eval.num_samples", "10", "--output_dir", tmp_path / "run", *arguments]
    refused(capsys, toy, *wanted)
    assert not (tmp_path / "run").exists()


def test_insisting_starts_what_the_estimate_refuses(tmp_path, capsys, monkeypatch, no_finish):
    from fastgen.training import limits

    monkeypatch.setattr(limits, "memory", lambda device: 1000.0)
    toy = [*TOY, "--eval.grid", "1000", "--output_dir", tmp_path / "run"]
    refused(capsys, toy, "GiB of memory", "--insist")
    assert say(capsys, [*toy, "--insist"])[0] == 0


@pytest.mark.parametrize("seed", [2**50, 2**63 - 1])
def test_seeds_of_63_bits_train(seed, tiny, tmp_path, capsys, no_finish):
    (tmp_path / "p.txt").write_text("a red dress\n")
    argv = ["--teacher.path", tiny("sd"), "--student.kind", "lora", "--objective.name", "swiftbrush"]
    argv += ["--data.name", "", "--data.prompts", tmp_path / "p.txt", "--train.seed", seed]
    argv += ["--train.max_train_steps", 1, "--train.train_batch_size", 1, "--train.validation_steps", 0]
    code, err = say(capsys, [*argv, "--output_dir", tmp_path / "run"])
    assert code == 0, err


def test_json_knows_no_nan():
    nan = float("nan")
    value = {"a": nan, "b": [1.0, nan, float("inf")], "c": {"d": -float("inf"), "e": 2}}
    assert finite(value) == {"b": [1.0, None, None], "c": {"e": 2}}
    assert json.loads(to_json(value)) == {"b": [1.0, None, None], "c": {"e": 2}}


# -- sample.py
WRONG = {
    "device": (["--device", "foo"], ["--device", "'foo'"]),
    "meta": (["--device", "meta"], ["--device"]),
    "seed": (["--seed", str(2**64)], ["--seed"]),
    "last seed": (["--seed", str(2**63 - 1), "--num_images", "3"], ["--seed"]),
    "huge label": (["--labels", str(2**70)], ["--labels"]),
    "endless labels": (["--labels", "0-99999999999"], ["--labels"]),
    "guidance nan": (["--guidance", "nan"], ["--guidance"]),
    "guidance inf": (["--guidance", "inf"], ["--guidance"]),
    "nasa nan": (["--nasa_scale", "nan"], ["--nasa_scale"]),
    "steps": (["--steps", str(BIG)], ["--steps"]),
    "images": (["--num_images", str(1000 * BIG)], ["--num_images", "--insist"]),
    "batch": (["--num_images", str(100 * BIG), "--batch_size", str(100 * BIG)], ["--batch_size", "--insist"]),
    "below a file": (["--out", "{tmp}/file/o"], ["--out"]),
    "nowhere": (["--out", "/proc/o"], ["--out"]),
    "no JSON": (["--out", "{tmp}/no_json", "--overwrite"], ["--out", "damaged"]),
    "a list": (["--out", "{tmp}/a_list", "--overwrite"], ["--out", "damaged"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_sample_refuses_in_one_line(name, exports, tmp_path, capsys):  # noqa: F811
    arguments, wanted = WRONG[name]
    (tmp_path / "file").write_text("x")
    for folder, text in (("no_json", "{"), ("a_list", "[]")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "samples.json").write_text(text)
    more = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    code, _, err = call(capsys, "--model", exports["flow"], "--out", tmp_path / "o", *more)
    assert code == 2 and err.count("\n") == 1 and all(w in err for w in wanted), err
    assert not (tmp_path / "o").exists()


def test_overwriting_samples_deletes_pictures_of_ours_alone(exports, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "o"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    entries = [{"file": "thesis.tex"}, {"file": "../p.txt"}, {"file": "00000_0.png"}]
    (out / "samples.json").write_text(json.dumps({"images": entries}))
    (tmp_path / "p.txt").write_text("mine")
    assert call(capsys, "--model", exports["flow"], "--labels", "1", "--out", out, "--overwrite")[0] == 0
    assert (out / "thesis.tex").exists() and (tmp_path / "p.txt").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_pictures_are_written_as_they_are_made_and_kept(name, exports, tmp_path, capsys, monkeypatch):  # noqa: F811
    """The first before the first batch is drawn; after a signal, with their record and how to go on."""
    from fastgen.cli.sample import Generator

    real, seen = Generator.__call__, []

    def draw(self, cond, seeds, device):
        seen.append(len(list((tmp_path / "o").glob("*_*.png"))))
        if len(seen) == 4:
            os.kill(os.getpid(), getattr(signal, name))
        return real(self, cond, seeds, device)

    monkeypatch.setattr(Generator, "__call__", draw)
    ask = ("--labels", "0-3", "--num_images", 10, "--batch_size", 2, "--seed", 5)
    code, _, err = call(capsys, "--model", exports["flow"], *ask, "--out", tmp_path / "o")
    assert code == 75 and seen == [0, 1, 2, 4]
    assert "4 of 10 images are kept" in err and "--seed 9 --num_images 6" in err
    kept = pictures(tmp_path / "o")
    record = json.loads((tmp_path / "o/samples.json").read_text())
    assert list(kept) == [e["file"] for e in record["images"]] == [f"{i:05d}_{5 + i}.png" for i in range(4)]
    assert Image.open(tmp_path / "o/grid.png").height > 60


def test_black_pictures_are_never_written_in_silence(exports, tmp_path, capsys, monkeypatch):  # noqa: F811
    from fastgen.networks.codecs import LabelCodec

    real = LabelCodec.decode
    monkeypatch.setattr(LabelCodec, "decode", lambda self, x0: real(self, x0) * float("nan"))
    code, _, err = call(capsys, "--model", exports["flow"], "--labels", "1", "--out", tmp_path / "o")
    assert code == 3 and "not finite" in err and not list((tmp_path / "o").glob("0*.png"))


def test_memory_does_not_grow_with_the_number_of_pictures(exports, tmp_path, monkeypatch):  # noqa: F811
    """No list of pictures, seeds or records is held: only what the grid shows."""
    from fastgen.cli import pictures as written

    galleries, real = [], written.Gallery.close
    monkeypatch.setattr(written.Gallery, "close", lambda self, r: (galleries.append(self), real(self, r))[1])
    argv = ["--model", str(exports["flow"]), "--num_images", "130", "--batch_size", "10"]
    assert sample([*argv, "--out", str(tmp_path / "o")]) == 0
    assert [len(images) for images in galleries[0].shown] == [100] and galleries[0].count == 130
    assert isinstance(galleries[0].seeds, range) and len(list((tmp_path / "o").glob("*_*.png"))) == 130


def test_nan_samples_end_a_run_with_3_and_no_export(tiny, tmp_path, capsys, monkeypatch):
    from fastgen.networks.codecs import LabelCodec
    from tests.cli.test_run_folder import flow

    real = LabelCodec.decode
    monkeypatch.setattr(LabelCodec, "decode", lambda self, x0: real(self, x0) * float("nan"))
    assert main(flow(tiny, tmp_path)) == 3
    assert "samples of the student are not finite" in capsys.readouterr().err
    assert not (tmp_path / "run/export").exists() and not (tmp_path / "run/results.json").exists()


@pytest.mark.parametrize(
    "metric,least", [("fid", "2 or more"), ("kid", "2 or more"), ("recall", "4 or more")]
)
def test_too_few_images_for_a_metric(metric, least, tmp_path, capsys):
    """Before any weights are looked for."""
    from fastgen.cli.evaluate import main as evaluate

    (tmp_path / "one").mkdir()
    for i in range(3 if metric == "recall" else 1):
        Image.new("L", (8, 8)).save(tmp_path / f"one/{i}.png")
    argv = ["--images", str(tmp_path / "one"), "--against", str(tmp_path / "one"), "--metrics", metric]
    assert evaluate([*argv, "--extractor", "digits"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --images") and least in err and err.count("\n") == 1
