"""What `fastgen precompute` writes is what training would encode; it goes on where it stopped, and belongs to
one model.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fastgen.cli.precompute import main
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.data import precompute
from fastgen.data.latents import captions_of, check_latents, read_null
from fastgen.data.loader import load_data
from fastgen.networks import load
from fastgen.networks.load import load_teacher
from fastgen.training.cast import load_configured

NUM = 10
TEACHER = "assets:teachers/tinted-sd"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """(folder of pictures, its latents, the arguments that made them)."""
    root = tmp_path_factory.mktemp("latents")
    for i in range(NUM):
        Image.new("RGB", (40, 36), (20 * i, 90, 30)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"a dress number {i % 3}")
    (root / "7.png").write_bytes(b"no picture")
    out = root.with_name("out")
    argv = ["--teacher", "tinted-sd", "--data.images", str(root), "--shard_size", "4"]
    assert main([*argv, "--out", str(out)]) == 0
    return root, out, argv


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(TEACHER)


def section(**data):
    return validate({"objective": {"name": "swiftbrush"}, "data": {"name": "", **data}}).data


def shards(out):
    """The numbers and headers of the files of a folder; the order of a header is left open."""
    found = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as source:
            tensors = {k: source.get_tensor(k) for k in source.keys()}  # noqa: SIM118
            plain = {k: (str(v.dtype), v.tolist()) for k, v in tensors.items()}
            found[file.name] = plain, source.metadata()
    return found


def drawn(data, num=4):
    windows = data.batches(3, 0, 1, Rng(1), "cpu")
    return [next(windows)[0] for _ in range(num)]


def test_batches_are_those_of_the_pictures(own, teacher, capsys):
    folder, out, _ = own
    found = json.loads((out / "manifest.json").read_text())
    assert found["count"] == NUM - 1 and found["complete"] and len(found["shards"]) == 3
    assert [one["count"] for one in found["shards"]] == [4, 3, 2]
    assert len(found["skipped"]) == 1 and found["skipped"][0].startswith("7.png (")
    plain = load_data(section(images=str(folder), stream="never"), teacher)
    for workers in (0, 2):
        data = load_data(section(latents=str(out), workers=workers), teacher)
        assert len(data) == len(plain) == NUM - 1 and not data.encodes_later
        for one, two in zip(drawn(data), drawn(plain)):
            assert torch.equal(one.index, two.index) and one.texts == two.texts
            assert torch.allclose(one.x0, two.x0, atol=1e-5) and torch.equal(one.noise, two.noise)
            for key, value in two.cond.items():
                assert torch.allclose(one.cond[key], value, atol=1e-5)
                assert torch.allclose(one.uncond[key], two.uncond[key])
    few = load_data(section(latents=str(out), limit=5), teacher)
    assert len(few) == 5 and torch.equal(few.x0[:9], data.x0[:5])
    assert "9 encoded images in 3 shards" in capsys.readouterr().out


def test_no_text_encoder_is_loaded(own, teacher, monkeypatch):
    loaded = []
    real = load.load_part

    def noted(folder, key, cls, weights=True, *rest, **more):
        loaded.append((Path(folder).name, weights))
        return real(folder, key, cls, weights, *rest, **more)

    monkeypatch.setattr(load, "load_part", noted)
    settings = validate({"objective": {"name": "sft"}, "teacher": {"path": TEACHER}}).teacher
    found = load_configured(settings, null=read_null(str(own[1])))
    assert ("text_encoder", False) in loaded and ("text_encoder", True) not in loaded
    assert ("vae", True) in loaded, "the negative: its decoder draws the samples"
    assert found.codec.encoders is None and found.codec.pipe.text_encoder is None
    for key, value in teacher.codec.null(2).items():
        assert torch.equal(found.codec.null(2)[key], value)
    with pytest.raises(UserError, match="freed"):
        found.codec.prompts(["a dress"])
    data = load_data(section(latents=str(own[1])), found)
    assert torch.equal(drawn(data)[0].x0, drawn(load_data(section(latents=str(own[1])), teacher))[0].x0)


def test_it_goes_on_after_a_kill_and_in_parts(own, tmp_path, capsys, monkeypatch):
    _, whole, argv = own
    out = ["--out", str(tmp_path / "out")]
    assert main([*argv, *out, "--part", "1/2"]) == 0
    assert "2 of 3 shards are left" in capsys.readouterr().out
    assert sorted(shards(tmp_path / "out")) == ["null.safetensors", "shard-00001.safetensors"]
    assert not json.loads((tmp_path / "out/manifest.json").read_text())["complete"]
    with pytest.raises(UserError, match="is not complete; run the same"):
        read_null(str(tmp_path / "out"))
    assert main([*argv, *out, "--part", "0/2"]) == 0
    assert shards(tmp_path / "out") == shards(whole), "any parts make the same"
    (tmp_path / "out/shard-00001.safetensors").unlink()
    cut = tmp_path / "out/shard-00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-40])
    made = []
    monkeypatch.setattr(
        precompute.Precompute,
        "_shard",
        lambda s, i, p, real=precompute.Precompute._shard: (made.append(i), real(s, i, p)),
    )
    assert main([*argv, *out]) == 0
    assert made == [1, 2] and shards(tmp_path / "out") == shards(whole)
    assert (tmp_path / "out/manifest.json").read_text() == (whole / "manifest.json").read_text()


def test_a_full_disk_is_one_line_and_the_command_goes_on(own, tmp_path, capsys, monkeypatch):
    _, whole, argv = own
    argv = [*argv, "--out", str(tmp_path / "out")]
    real = precompute.write_tensors

    def full(path, *rest):
        if path.name.startswith("shard-00001"):
            raise OSError(28, "No space left on device")
        return real(path, *rest)

    monkeypatch.setattr(precompute, "write_tensors", full)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "error: --out" in err and "the same command then makes what is missing" in err
    monkeypatch.undo()
    assert main(argv) == 0 and shards(tmp_path / "out") == shards(whole)


@pytest.mark.parametrize(
    "change,message",
    [
        (["--dtype", "bf16"], "begun with dtype 'fp32' and now 'bf16'"),
        (["--data.limit", "5"], "begun with samples 10 and now 5"),
        (["--shard_size", "0"], "--shard_size: found 0"),
        (["--part", "2/2"], "--part: found '2/2'"),
        (["--train.seed", "1"], "--train: decides nothing here"),
        (["--out", ""], "--out: not given"),
    ],
)
def test_mistakes_are_one_line(own, change, message, capsys):
    _, out, argv = own
    named = [] if "--out" in change else ["--out", str(out)]
    if change[0] == "--shard_size":
        argv = argv[:-2]
    assert main([*argv, *named, *change]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and len([x for x in err.splitlines() if x.startswith("error")]) == 1


def edited(own, tmp_path, **changes):
    _, out, _ = own
    for file in out.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((out / "manifest.json").read_text()) | changes
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return str(tmp_path)


def test_a_folder_of_another_model_is_refused(own, teacher, tmp_path):
    for change in ({"model": "0" * 16}, {"shape": [4, 16, 16]}):
        with pytest.raises(UserError, match="is of another model or size .*tinted-sd"):
            check_latents(section(latents=edited(own, tmp_path, **change)), teacher)
    assert check_latents(section(latents=edited(own, tmp_path)), teacher)["count"] == NUM - 1
    other = load_teacher("assets:teachers/tinted-sana")
    with pytest.raises(UserError, match="is of another model"):
        check_latents(section(latents=str(own[1])), other)
    with pytest.raises(UserError, match="has no manifest.json"):
        read_null(str(tmp_path.parent))


@pytest.mark.parametrize("damage", ["missing", "cut", "fewer"])
def test_shards_that_are_missing_or_cut_are_fatal_or_skipped(own, teacher, tmp_path, capsys, damage):
    folder = edited(own, tmp_path)
    file = tmp_path / "shard-00000.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        file.write_bytes((tmp_path / "shard-00001.safetensors").read_bytes())
    with pytest.raises(UserError, match="shard-00000.safetensors cannot be read") as error:
        load_data(section(latents=folder), teacher)
    assert "same `fastgen precompute` again" in str(error.value)
    data = load_data(section(latents=folder, on_bad_shard="skip"), teacher)
    assert len(data) == 5 and "shard-00000.safetensors is skipped" in capsys.readouterr().err
    whole = load_data(section(latents=str(own[1])), teacher)
    assert torch.equal(data.x0[:5], whole.x0[4:9])


def test_classes_and_half_precision(tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--teacher", "digits", "--data.name", "digits", "--data.limit", "30", "--dtype", "bf16"]
    assert main([*argv, "--out", str(out), "--shard_size", "16"]) == 0
    net = load_teacher("assets:teachers/digits")
    data = load_data(section(latents=str(out), workers=0), net)
    plain = load_data(section(name="digits", limit=30), net)
    for one, two in zip(drawn(data), drawn(plain)):
        assert torch.equal(one.cond["class_labels"], two.cond["class_labels"])
        assert torch.allclose(one.x0, two.x0, atol=5e-3) and one.x0.dtype == torch.float32
        assert not torch.equal(one.x0, two.x0), "the negative: rounded"
        assert torch.equal(one.uncond["class_labels"], two.uncond["class_labels"])


def test_prompts_alone(tmp_path, teacher):
    (tmp_path / "p.txt").write_text("".join(f"a red bag {i}\n" for i in range(7)))
    out = tmp_path / "out"
    argv = ["--teacher", "tinted-sd", "--data.prompts", str(tmp_path / "p.txt")]
    assert main([*argv, "--out", str(out), "--shard_size", "3"]) == 0
    data = load_data(section(latents=str(out)), teacher, pixels=False)
    plain = load_data(section(prompts=str(tmp_path / "p.txt")), teacher, pixels=False)
    for one, two in zip(drawn(data), drawn(plain)):
        assert one.x0 is None and one.texts == two.texts and data.x0 is None
        for key, value in two.cond.items():
            assert torch.allclose(one.cond[key], value, atol=1e-5)
    with pytest.raises(UserError, match="holds prompts alone"):
        load_data(section(latents=str(out)), teacher)
    assert captions_of(out / "shard-00000.safetensors") == [f"a red bag {i}" for i in range(3)]


def test_a_teacher_that_is_shown_an_image_is_refused(teacher, tmp_path):
    family = SimpleNamespace(needs_image=True, name="SVD")
    codec = object.__new__(precompute.TextCodec)
    torch.nn.Module.__init__(codec)
    codec.family = family
    with pytest.raises(UserError, match="SVD is shown an image"):
        precompute.Precompute(section(images="x"), SimpleNamespace(codec=codec), tmp_path, 4, "fp32")


@pytest.mark.slow
def test_processes_share_the_work_and_a_kill_costs_what_was_begun(own, tmp_path):
    _, whole, argv = own
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fastgen", "precompute", *argv, "--out", str(out), "--processes", "2"]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    while child.poll() is None and not list(out.glob("shard-*")):
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("shard-?????.safetensors")}
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "9 samples in 3 shards" in done.stdout, done.stderr
    assert shards(out) == shards(whole) and all((out / n).stat().st_mtime_ns == t for n, t in before.items())
    (out / "shard-00001.safetensors").unlink()
    broken = subprocess.run([*command, "--data.on_bad_image", "error"], capture_output=True, text=True)
    assert broken.returncode == 2 and "Traceback" not in broken.stderr
