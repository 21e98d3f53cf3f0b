"""sample.py: what it writes, that the seed alone decides a picture, what it says to a wrong request."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from fastgen.cli.conditions import parse_labels
from fastgen.cli.sample import main
from fastgen.training.exporting import export_run
from tests.export.test_plain_diffusers import make_run
from tests.support.flags import last_of_each


@pytest.fixture(scope="module")
def exports(tiny, tmp_path_factory):
    """A two-step flow student (full) and a one-step Stable Diffusion LoRA."""
    root = tmp_path_factory.mktemp("exports")
    flow = make_run(tiny("flow"), out=root / "flow", num_steps=2)
    sd = make_run(tiny("sd"), "lora", out=root / "sd")
    runs = {"flow": flow, "sd": sd}
    return {name: export_run(run, root / name / "export", {}) for name, run in runs.items()}


def call(capsys, *argv):
    """(exit code, stdout, stderr)."""
    code = main(last_of_each(argv))
    message = capsys.readouterr()
    return code, message.out, message.err


def pictures(folder):
    return {p.name: np.array(Image.open(p)) for p in sorted(folder.glob("*_*.png"))}


def test_files_names_and_record(exports, tmp_path, capsys):
    ask = ("--labels", "0-2,5", "--num_images", 6, "--seed", 40)
    code, out, err = call(capsys, "--model", exports["flow"], *ask, "--out", tmp_path / "o")
    assert code == 0 and "warning" not in err
    assert "2 steps" in out and "2 network calls each" in out
    assert list(pictures(tmp_path / "o")) == [f"{i:05d}_{40 + i}.png" for i in range(6)]
    record = json.loads((tmp_path / "o/samples.json").read_text())
    assert record["arguments"]["seed"] == 40 and record["arguments"]["labels"] == "0-2,5"
    assert [e["condition"] for e in record["images"]] == ["0", "1", "2", "5", "0", "1"]
    assert record["contenders"][0]["nfe"] == 2 and record["contenders"][0]["seconds_per_image"] > 0
    assert Image.open(tmp_path / "o/grid.png").width > 6 * 60


def test_a_picture_depends_on_its_own_seed_only(exports, tmp_path, capsys):
    """Batches of 1 and 4, starts at seed 0 and at seed 2: the same file for the same seed and label."""
    ask = ("--model", exports["flow"], "--labels", "3")
    call(capsys, *ask, "--num_images", 5, "--batch_size", 4, "--out", tmp_path / "a")
    call(capsys, *ask, "--num_images", 5, "--batch_size", 1, "--out", tmp_path / "b")
    call(capsys, *ask, "--num_images", 2, "--seed", 2, "--out", tmp_path / "c")
    a, b, c = (list(pictures(tmp_path / n).values()) for n in "abc")
    for one, other in [*zip(a, b), (a[2], c[0]), (a[3], c[1])]:
        assert np.abs(one.astype(int) - other).max() <= 1
    assert np.abs(a[0].astype(int) - a[1]).max() > 30  # other seeds do differ


def test_compare_teacher(exports, tmp_path, capsys):
    """A LoRA's teacher is its own base with the adapter off; guidance doubles the evaluations."""
    code, out, _ = call(
        capsys,
        "--model",
        exports["sd"],
        "--prompt",
        "a red dress",
        "--prompt",
        "a blue boot",
        "--compare_teacher",
        "--teacher_steps",
        3,
        "--guidance",
        2.5,
        "--out",
        tmp_path / "lora",
    )
    assert code == 0 and all(p in out for p in ("teacher, 3 steps", "6 network calls", "times as fast"))
    grid = np.array(Image.open(tmp_path / "lora/grid.png"))
    student, teacher = grid[: len(grid) // 2, 110:].astype(int), grid[len(grid) // 2 :, 110:]
    assert np.abs(student - teacher).max() > 20
    ask = ("--model", exports["flow"], "--labels", "1", "--compare_teacher")
    code, out, _ = call(capsys, *ask, "--out", tmp_path / "full")
    assert code == 0 and "teacher, 6 steps" in out  # what the run compared with


def test_lora_file_alone_finds_its_base(exports, tiny, tmp_path, capsys):
    file = shutil.copy(next(exports["sd"].glob("*-lora.safetensors")), tmp_path / "x-lora.safetensors")
    ask = ("--prompt", "a red dress")
    assert call(capsys, "--model", file, *ask, "--out", tmp_path / "a")[0] == 0
    assert call(capsys, "--model", file, "--base", tiny("sd"), *ask, "--out", tmp_path / "b")[0] == 0
    assert call(capsys, "--model", exports["sd"], *ask, "--out", tmp_path / "c")[0] == 0
    assert call(capsys, "--model", tiny("sd"), *ask, "--steps", 1, "--out", tmp_path / "base")[0] == 0
    a, b, c, base = (pictures(tmp_path / n)["00000_0.png"].astype(int) for n in ("a", "b", "c", "base"))
    assert (a == b).all() and (a == c).all() and np.abs(a - base).max() > 20


def test_run_folder_prompts_file_and_dtype(exports, tmp_path, capsys):
    run = exports["sd"].parent
    (run / "config.yaml").write_text("")
    (tmp_path / "p.txt").write_text("a red dress\n\n a blue boot \n")
    ask = ("--prompts", tmp_path / "p.txt", "--dtype", "bf16")
    code, _, _ = call(capsys, "--model", run, *ask, "--out", tmp_path / "o")
    record = json.loads((tmp_path / "o/samples.json").read_text())
    assert code == 0 and [e["condition"] for e in record["images"]] == ["a red dress", "a blue boot"]


def test_overwrite_replaces_its_own_files_only(exports, tmp_path, capsys):
    ask = ("--model", exports["flow"], "--labels", "1", "--out", tmp_path / "o")
    call(capsys, *ask, "--num_images", 3)
    (tmp_path / "o/mine.txt").write_text("kept")
    code, _, err = call(capsys, *ask)
    assert code == 2 and "not empty" in err and len(pictures(tmp_path / "o")) == 3
    assert call(capsys, *ask, "--num_images", 1, "--overwrite")[0] == 0
    assert len(pictures(tmp_path / "o")) == 1 and (tmp_path / "o/mine.txt").exists()


WARNED = {
    "other steps": ("flow", ["--labels", "1", "--steps", "3"], ["--steps", "trained for 2", "with 3"]),
    "negative prompt": ("sd", ["--prompt", "a", "--negative_prompt", "b"], ["--negative_prompt", "baked"]),
    "guidance": ("flow", ["--labels", "1", "--guidance", "3"], ["--guidance", "baked"]),
    "long prompt": ("sd", ["--prompt", "a " * 80 + "very long tail"], ["77 tokens", "cut", "long tail"]),
}


@pytest.mark.parametrize("case", WARNED)
def test_warnings(exports, tmp_path, capsys, case):
    model, more, pieces = WARNED[case]
    code, _, err = call(capsys, "--model", exports[model], *more, "--out", tmp_path / "o")
    assert code == 0 and err.startswith("warning: ") and all(p in err for p in pieces), err


WRONG = {
    "model missing": ("{tmp}/nothing", [], ["--model", "does not exist"]),
    "model is a pickle": ("{tmp}/model.ckpt", [], ["--model", "pickled"]),
    "folder without a network": ("{tmp}/empty", [], ["--model", "no network"]),
    "folder of pickles": ("{tmp}/pickles", [], ["--model", "pickled", "old.bin"]),
    "run without export": ("{tmp}/run", [], ["--model", "without an export"]),
    "truncated LoRA": ("{tmp}/short-lora.safetensors", ["--prompt", "a"], ["--model", "cannot be read"]),
    "exact teacher": ("analytic:gmm2d-flow", [], ["--model", "points"]),
    "label outside": ("flow", ["--labels", "0-10"], ["--labels", "0 to 10", "0 to 9"]),
    "label no number": ("flow", ["--labels", "cat"], ["--labels", "'cat'", "0-9"]),
    "prompt for labels": ("flow", ["--prompt", "a"], ["--prompt", "--labels"]),
    "labels for text": ("sd", ["--labels", "1"], ["--labels", "--prompt"]),
    "no prompt": ("sd", [], ["--prompt", "none given"]),
    "prompts file missing": ("sd", ["--prompts", "{tmp}/no.txt"], ["--prompts", "does not exist"]),
    "negative count": ("flow", ["--num_images", "-3"], ["--num_images", "-3"]),
    "batch of none": ("flow", ["--batch_size", "0"], ["--batch_size", "0"]),
    "another base": ("sd", ["--prompt", "a", "--base", "{tmp}/nothing"], ["nothing", "not a folder"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_one_line(exports, tmp_path, capsys, case):
    model, more, pieces = WRONG[case]
    for name in ("empty", "pickles", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "pickles/old.bin").write_bytes(b"x")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    (tmp_path / "run/config.yaml").write_text("")
    whole = next(exports["sd"].glob("*-lora.safetensors")).read_bytes()
    (tmp_path / "short-lora.safetensors").write_bytes(whole[: len(whole) // 2])
    argv = [str(a).replace("{tmp}", str(tmp_path)) for a in (exports.get(model, model), *more)]
    code, _, err = call(capsys, "--model", *argv, "--out", tmp_path / "o")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(p in err for p in pieces), err
    assert not (tmp_path / "o").exists()


def test_parse_labels():
    assert parse_labels("3") == [3] and parse_labels("0-2,7") == [0, 1, 2, 7]


# -- size ----------------------------------------------------------------------------------------------------
def test_another_size_where_the_model_is_free_in_it(exports, tiny, tmp_path, capsys):
    """A LoRA, its teacher beside it, and a teacher's own folder."""
    ask = ("--prompt", "a red dress", "--height", 24, "--width", 40)
    code, _, _ = call(capsys, "--model", exports["sd"], *ask, "--compare_teacher", "--out", tmp_path / "a")
    assert code == 0 and Image.open(next((tmp_path / "a").glob("0*.png"))).size == (40, 24)
    assert call(capsys, "--model", tiny("sd"), *ask, "--steps", 2, "--out", tmp_path / "b")[0] == 0
    assert Image.open(next((tmp_path / "b").glob("0*.png"))).size == (40, 24)
    one = ("--prompt", "a red dress", "--width", 24, "--out", tmp_path / "c")
    assert call(capsys, "--model", exports["sd"], *one)[0] == 0
    assert Image.open(next((tmp_path / "c").glob("0*.png"))).size == (24, 16), "the other side stays"


def test_pixels_that_are_folded_into_channels_count_as_pixels(exports, tmp_path, capsys):
    ask = ("--labels", "3", "--height", 32, "--width", 24)
    assert call(capsys, "--model", exports["flow"], *ask, "--out", tmp_path / "o")[0] == 0
    assert Image.open(next((tmp_path / "o").glob("0*.png"))).size == (24, 32)


def test_a_full_student_in_another_size_beside_its_teacher(tiny, tmp_path, capsys):
    export = export_run(make_run(tiny("sd"), out=tmp_path), tmp_path / "export", {})
    ask = ("--prompt", "a red dress", "--height", 24, "--compare_teacher", "--teacher_steps", 2)
    assert call(capsys, "--model", export, *ask, "--out", tmp_path / "o")[0] == 0
    assert Image.open(next((tmp_path / "o").glob("0*.png"))).size == (16, 24)


@pytest.mark.parametrize(
    ("model", "ask", "said"),
    [
        ("sd", ("--height", 25), "--height: found 25; give a multiple of 2, as sd needs"),
        ("sd", ("--num_frames", 5), "--num_frames: found 5; leave it out: sd generates images"),
        ("flow", ("--height", 33), "--height: found 33; give a multiple of 2, as unet2d needs"),
        ("sd", ("--width", -8), "--width: found -8"),
    ],
)
def test_a_wrong_size_is_one_line(exports, tmp_path, capsys, model, ask, said):
    code, _, err = call(capsys, "--model", exports[model], *ask, "--out", tmp_path / "o")
    assert code == 2 and said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "o").exists()
