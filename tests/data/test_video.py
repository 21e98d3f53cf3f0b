"""A run on clips from end to end: data, training of two experts, pictures, export, sampling."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageSequence

from fastgen.cli import sample
from fastgen.cli.train import main
from fastgen.data import clips as clip_files
from fastgen.data import media
from fastgen.data.loader import load_data
from fastgen.roles.heads import make_head
from fastgen.training import validation
from tests.families.cases import CASES
from tests.families.cases.video_parts import FRAMES, SIZE
from tests.support.plain import run_plain


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folders of tiny teachers by case."""

    def folder(name):
        path = tmp_path_factory.getbasetemp() / f"video-{name}"
        return path if path.is_dir() else CASES[name].build(path)

    return folder


def clips(folder, num=4):
    """Short animations with captions."""
    folder.mkdir()
    for i in range(num):
        frames = [Image.new("RGB", (40, 36), (60 * i, 25 * f, 90)) for f in range(FRAMES)]
        clip_files.save_clip(frames, folder / f"{i}.gif")
        (folder / f"{i}.txt").write_text(f"clip {i}")
    return folder


def train(tmp_path, folder, kind="lora", **more):
    """Exit code of a run of two steps."""
    values = {
        "teacher": {"path": str(folder), "guidance": 3.0, "num_steps": 2},
        "student": {"kind": kind, "num_steps": 2, "lora": {"rank": 2}},
        "data": {"images": str(clips(tmp_path / "clips"))},
        "objective": {"name": "dmd2", "student_every": 1},
        "optim": {"student": {"lr": 1e-2}},
        "train": {"max_train_steps": 2, "train_batch_size": 2, "validation_steps": 2, "ema_decay": [0.5]},
        "eval": {"num_samples": 2, "validation_samples": 2, "grid": 2, "batch_size": 2},
        **more,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return main(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")])


def test_two_experts_from_clips_to_plain_diffusers(tmp_path, built, monkeypatch):
    """A LoRA for each expert, shown, exported and drawn by the card's own snippet."""
    # tests/evaluation/test_report.py has the report
    monkeypatch.setattr("fastgen.evaluation.report.write_report", lambda folder: folder)
    assert train(tmp_path, built("wan22")) == 0
    run = tmp_path / "run"
    with Image.open(run / "samples/step_000002.gif") as film:
        assert film.n_frames == FRAMES
    assert (run / "samples/teacher.png").is_file()
    export = run / "export"
    files = sorted(p.name for p in export.glob("*.safetensors"))
    assert len(files) == 2 and files[0].endswith("-lora-transformer_2.safetensors")
    card = (export / "README.md").read_text()
    assert "load_into_transformer_2=True" in card and "text-to-video" in card
    code = card.split("```python\n")[1].split("```")[0]
    (export / "plain.py").write_text(code)
    done = run_plain("plain.py", cwd=export)
    assert done.returncode == 0, done.stderr
    with Image.open(export / "sample.gif") as film:
        assert film.n_frames == FRAMES and film.size == (SIZE, SIZE)
    out = tmp_path / "out"
    arguments = ["--model", str(export), "--prompt", "clip 1", "--num_images", "2", "--compare_teacher"]
    assert sample.main([*arguments, "--out", str(out)]) == 0
    assert (out / "00001_1.gif").is_file() and (out / "grid.png").is_file()
    (export / files[0]).unlink()
    assert sample.main([*arguments, "--out", str(tmp_path / "again")]) == 2


def test_a_first_frame_beside_the_text(tmp_path, built, capsys):
    """Image to video: every sample has its own picture, in both halves of guidance."""
    from fastgen.config.data_section import DataConfig
    from fastgen.networks.load import load_teacher

    teacher = load_teacher(str(built("wan-i2v")))
    section = DataConfig(images=str(clips(tmp_path / "clips")))
    data = load_data(section, teacher)
    index = torch.arange(2)
    cond, null = data.cond(index), data.null(index)
    assert data.x0.shape == (4, *teacher.codec.shape)
    assert torch.equal(cond["image_latents"], null["image_latents"])
    without = load_data(section, teacher, pixels=False).cond(index)  # of a method that learns from no clip
    assert torch.equal(cond["image_latents"], without["image_latents"])
    assert not torch.equal(cond["image_latents"][0], cond["image_latents"][1])
    assert not torch.equal(cond["encoder_hidden_states"], null["encoder_hidden_states"])
    Image.new("RGB", (SIZE, SIZE), "red").save(tmp_path / "first.png")
    arguments = ["--model", str(built("wan-i2v")), "--prompt", "a", "--steps", "2", "--guidance", "2"]
    assert (
        sample.main([*arguments, "--image", str(tmp_path / "first.png"), "--out", str(tmp_path / "o")]) == 0
    )
    assert "cropped" not in capsys.readouterr().err
    Image.new("RGB", (2 * SIZE, SIZE), "red").save(tmp_path / "wide.png")
    wide = ["--image", str(tmp_path / "wide.png"), "--out", str(tmp_path / "w")]
    assert sample.main([*arguments, *wide]) == 0
    said = f"wide.png is {2 * SIZE} x {SIZE}, cropped about its middle to {SIZE} x {SIZE}"
    assert said in capsys.readouterr().err
    assert sample.main([*arguments, "--out", str(tmp_path / "p")]) == 2
    assert "--image: found 0 for 1 prompts" in capsys.readouterr().err


def test_a_last_frame_beside_the_first(tmp_path, built, capsys):
    """From the ends of clips in training, by --last_image in sampling; another last frame is another clip."""
    from fastgen.config.data_section import DataConfig
    from fastgen.networks.load import load_teacher

    teacher = load_teacher(str(built("wan-flf2v")))
    data = load_data(DataConfig(images=str(clips(tmp_path / "clips"))), teacher)
    clip = media.read_one(tmp_path / "clips/2.gif", (3, FRAMES, SIZE, SIZE)).float() / 127.5 - 1
    wanted = teacher.codec.image_rows(clip[None][:, :, [0, -1]])[0]
    found = data.cond(torch.tensor([2]))
    for key, rows in wanted.items():
        assert torch.allclose(found[key], rows, atol=1e-5), key
    for name in ("red", "blue"):
        Image.new("RGB", (SIZE, SIZE), name).save(tmp_path / f"{name}.png")
    ask = ["--model", str(built("wan-flf2v")), "--prompt", "a", "--steps", "2", "--guidance", "1"]
    ask += ["--image", str(tmp_path / "red.png")]
    for name in ("red", "blue"):
        last = ["--last_image", str(tmp_path / f"{name}.png"), "--out", str(tmp_path / name)]
        assert sample.main([*ask, *last]) == 0
    files = [(tmp_path / name / "00000_0.gif").read_bytes() for name in ("red", "blue")]
    assert files[0] != files[1]
    capsys.readouterr()
    assert sample.main([*ask, "--out", str(tmp_path / "p")]) == 2
    assert "--last_image: found 0 for 1 of --image; one for each --image" in capsys.readouterr().err
    last = ["--last_image", str(tmp_path / "none.png"), "--out", str(tmp_path / "p")]
    assert sample.main([*ask, *last]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --last_image") and "none.png cannot be read" in said
    assert sample.main([*ask, *last, "--windows", "2", "--image", str(tmp_path / "red.png")]) == 2
    first = ["--model", str(built("wan-i2v")), "--prompt", "a", "--image", str(tmp_path / "red.png")]
    assert sample.main([*first, *last]) == 2
    assert "leave it out: no last frame is taken" in capsys.readouterr().err


def test_windows_go_on_from_the_last_frame(tmp_path, built, capsys):
    """A model whose first frame is the picture it is shown: N windows are N F - (N - 1) frames, the first
    window is the clip without the flag, and the next one begins where it ended.
    """
    Image.new("RGB", (SIZE, SIZE), "red").save(tmp_path / "first.png")
    ask = ["--model", str(built("wan-ti2v-image")), "--prompt", "a", "--steps", "2", "--guidance", "1"]
    ask += ["--image", str(tmp_path / "first.png")]
    assert sample.main([*ask, "--out", str(tmp_path / "one")]) == 0
    assert sample.main([*ask, "--windows", "3", "--out", str(tmp_path / "three"), "--fps", "5"]) == 0
    assert "3 windows" in capsys.readouterr().out
    films = {}
    for name in ("one", "three"):
        with Image.open(tmp_path / name / "00000_0.gif") as film:
            films[name] = [frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(film)]
            assert film.info["duration"] == (120 if name == "one" else 200)  # in hundredths
    count = len(films["one"])
    assert count > 1 and len(films["three"]) == 3 * count - 2
    near = [
        np.abs(np.frombuffer(a, np.uint8).astype(int) - np.frombuffer(b, np.uint8)).mean()
        for a, b in zip(films["one"], films["three"])
    ]
    assert max(near) < 4  # a gif has 256 colours
    assert sample.main([*ask, "--windows", "0", "--out", str(tmp_path / "p")]) == 2
    assert "--windows: found 0" in capsys.readouterr().err
    text = ["--model", str(built("wan-ti2v")), "--prompt", "a", "--windows", "2"]
    assert sample.main([*text, "--out", str(tmp_path / "p")]) == 2
    assert "--windows: found 2 for a model that no first frame alone begins" in capsys.readouterr().err


def test_a_clip_as_mp4(tmp_path, built, capsys, monkeypatch):
    """Read again by another program's decoder: as many frames, at the rate asked for."""
    import imageio.v3 as imageio

    ask = ["--model", str(built("wan22")), "--prompt", "a", "--steps", "1", "--clip_format", "mp4"]
    assert sample.main([*ask, "--fps", "12", "--out", str(tmp_path / "o")]) == 0
    file = tmp_path / "o/00000_0.mp4"
    assert imageio.imread(file).shape[0] == FRAMES
    assert imageio.immeta(file)["fps"] == 12
    capsys.readouterr()
    assert sample.main([*ask, "--fps", "0", "--out", str(tmp_path / "p")]) == 2
    assert "--fps: found 0" in capsys.readouterr().err
    monkeypatch.setattr(clip_files, "find_spec", lambda name: None)
    assert sample.main([*ask, "--out", str(tmp_path / "p")]) == 2
    assert "--clip_format: mp4 needs imageio-ffmpeg" in capsys.readouterr().err


def test_an_image_alone(tmp_path, built, capsys):
    """SVD is sampled without a prompt."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "first.png")
    arguments = ["--model", str(built("svd")), "--steps", "2", "--image", str(tmp_path / "first.png")]
    assert sample.main([*arguments, "--out", str(tmp_path / "o")]) == 0
    assert sample.main([*arguments, "--prompt", "a dog", "--out", str(tmp_path / "p")]) == 2
    assert "takes an image alone" in capsys.readouterr().err


@pytest.mark.parametrize("key,value", [("num_frames", 8), ("height", 24)])
def test_sizes_that_an_autoencoder_cannot_make(tmp_path, built, capsys, key, value):
    teacher = {"path": str(built("wan22")), key: value}
    assert train(tmp_path, built("wan22"), teacher=teacher) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"teacher.{key}: found {value}" in error


def test_no_checkpointing_where_diffusers_has_none(tmp_path, built, capsys):
    values = {"gradient_checkpointing": True, "max_train_steps": 2}
    (tmp_path / "p.txt").write_text("a chair\n")
    arguments = {
        "objective": {"name": "dmd2", "gan_weight": 0.0},
        "data": {"prompts": str(tmp_path / "p.txt")},
    }
    teacher = {"path": str(built("shap-e"))}
    assert train(tmp_path, built("shap-e"), teacher=teacher, train=values, **arguments) == 2
    assert "diffusers' PriorTransformer does not support" in capsys.readouterr().err


def test_pictures_of_clips(tmp_path):
    clip = torch.rand(3, 3, 5, 8, 8)
    validation.save_grid(clip, tmp_path / "g.png")
    with Image.open(tmp_path / "g.png") as image, Image.open(tmp_path / "g.gif") as film:
        assert film.n_frames == 5 and image.width > 4 * image.height / 3
    strip = clip_files.filmstrip(clip, 5)
    assert torch.equal(strip[1, :, :, 16:24], clip[1, :, 2])


@pytest.mark.parametrize("height,width", [(1, 1), (3, 2), (12, 4), (63, 10), (8, 8)])
def test_heads_over_maps_of_any_shape(height, width):
    head = make_head(16, height, width, hidden=8)
    assert head(torch.randn(2, 16, height, width)).shape == (2,)
