"""Buckets of clips: by the frames they have and by shape, with and without a frame rate; refusals."""

from itertools import islice

import pytest
import torch
import yaml
from PIL import Image

from fastgen.cli.train import main
from fastgen.config.data_section import DataConfig
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.data.buckets import check_fits, nearest, parsed
from fastgen.data.clips import save_clip
from fastgen.data.loader import load_data
from fastgen.data.media import shape_of_clip
from fastgen.networks.load import load_teacher
from tests.support.clips import clip_teacher

SIZES = ["9x32x32", "9x32x48", "5x32x32"]
SHAPES = [(9, 40, 40), (12, 60, 40), (6, 40, 40), (8, 70, 42), (3, 40, 40), (30, 40, 50)]
"""frames, width and height of the clips; the fifth is too short"""
BUCKETS = [0, 1, 2, 2, None, 0]


def picture(size, i, k):
    return Image.new("RGB", size, (20 * i, 5 * k, 9))


def folder_of(path):
    path.mkdir()
    for i, (num, *size) in enumerate(SHAPES):
        frames = [picture(size, i, k) for k in range(num)]
        more = {"duration": 125, "lossless": True}
        frames[0].save(path / f"{i}.webp", save_all=True, append_images=frames[1:], **more)
        (path / f"{i}.txt").write_text(f"clip {i}")
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """9 frames of 32 x 32."""
    return clip_teacher(tmp_path_factory.mktemp("teacher"), patch=1)


def data_of(folder, teacher, sizes=SIZES, **settings):
    return load_data(DataConfig(images=str(folder), buckets=sizes, **settings), load_teacher(str(teacher)))


def test_a_clip_goes_to_one_of_the_longest_it_fills():
    sizes = parsed(SIZES)
    assert sizes == [(9, 32, 32), (9, 32, 48), (5, 32, 32)]
    assert [nearest((f, h, w), sizes) for f, w, h in SHAPES] == BUCKETS


def test_batches_are_of_one_length_and_shape(tmp_path, teacher, capsys):
    data = data_of(folder_of(tmp_path / "p"), teacher)
    said = capsys.readouterr().out
    assert "in buckets, frames x height x width: 2 of 9x32x32, 1 of 9x32x48, 2 of 5x32x32" in said
    assert "1 skipped: 4.webp (3 frames, too few for every bucket)" in said
    wanted = {0: (9, 8, 8), 1: (9, 8, 12), 2: (5, 8, 8), 3: (5, 8, 8), 4: (9, 8, 8)}
    batches = [w[0] for w in islice(data.batches(2, 0, 1, Rng(3), "cpu"), 9)]
    for batch in batches:
        assert {wanted[i] for i in batch.index.tolist()} == {tuple(batch.x0.shape[2:])}
        assert batch.noise.shape == batch.x0.shape
    assert {i for b in batches for i in b.index.tolist()} == set(range(5))
    rows = data.reader.load(4)["images"]
    assert rows.shape == (3, 9, 32, 32) and rows[:, 8, 0, 0].tolist() == [100, 40, 9], "30 frames, cut"
    with pytest.raises(UserError, match="data.images: 1 unreadable: 4.webp .3 frames"):
        data_of(tmp_path / "p", teacher, on_bad_image="error")


def test_a_rate_leaves_fewer_frames(tmp_path, teacher):
    """8 frames a second, seen 4 times a second: 30 of them are 15, 12 are 6, 9 are 5."""
    folder = folder_of(tmp_path / "p")
    assert shape_of_clip(folder / "5.webp") == (30, 50, 40)
    assert shape_of_clip(folder / "5.webp", 4.0) == (15, 50, 40)
    data = data_of(folder, teacher, ["9x32x32", "5x32x32"], fps=4.0)
    assert data.reader.bucket == [1, 1, 0], "of clips 0, 1 and 5"
    assert data.reader.load(2)["images"][1, :, 0, 0].tolist() == [10 * k for k in range(9)]
    with pytest.raises(OSError, match="8 frames a second of the 24"):
        shape_of_clip(folder / "5.webp", 24.0)


def test_videos_and_folders_of_frames_say_how_long_they_are(tmp_path):
    frames = [picture((40, 32), 3, k) for k in range(12)]
    save_clip(frames, tmp_path / "a.mp4", rate=8)
    assert shape_of_clip(tmp_path / "a.mp4") == (12, 32, 40)
    assert shape_of_clip(tmp_path / "a.mp4", 4.0) == (6, 32, 40)
    with pytest.raises(OSError, match="8 frames a second of the 16"):
        shape_of_clip(tmp_path / "a.mp4", 16.0)
    (tmp_path / "walk").mkdir()
    for k, frame in enumerate(frames[:5]):
        frame.save(tmp_path / f"walk/{k}.png")
    assert shape_of_clip(tmp_path / "walk") == (5, 32, 40)
    with pytest.raises(OSError, match="how long a frame is shown"):
        shape_of_clip(tmp_path / "walk", 4.0)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(OSError):
        shape_of_clip(tmp_path / "b.mp4")


@pytest.mark.parametrize(
    "sizes,message",
    [
        (["9x32x32", "32x32"], "found 32x32; give FRAMESxHEIGHTxWIDTH for a teacher of clips"),
        (["9x32x33"], "found 9x32x33; give multiples of 8"),
        (["8x32x32"], "found 8x32x32; give 5 or 9: 1 plus a multiple of 4, as wan needs"),
        (["9x32x32", "9x32x320"], "no clip is nearest to the length and shape of 9x32x320"),
        (["1x9x32x32"], "for clips as FRAMESxHEIGHTxWIDTH"),
    ],
)
def test_sizes_that_cannot_be(tmp_path, teacher, sizes, message):
    with pytest.raises(UserError, match="data.buckets: ") as error:
        data_of(folder_of(tmp_path / "p"), teacher, sizes)
    assert message in str(error.value)


def test_frames_are_whole_chunks_and_tokens(teacher, tmp_path):
    """Wan's autoencoder drops what is left of four frames, a network what is left of a token."""
    for num in (5, 9):
        codec = load_teacher(str(teacher), num_frames=num).codec
        assert codec.encode(torch.zeros(1, 3, num, 32, 32)).shape[1:] == codec.shape
    assert codec.encode(torch.zeros(1, 3, 8, 32, 32)).shape[2] == 5, "the negative"
    thirds = load_teacher(str(clip_teacher(tmp_path / "thirds")), num_frames=18)
    assert thirds.codec.shape == (12, 18, 8, 8), "what is drawn is not encoded"
    with pytest.raises(UserError, match="found 10; give 9 or 12: in tokens of 3 latent frames, as wan needs"):
        load_teacher(str(tmp_path / "thirds"), num_frames=10)
    for size, near in (("12x32x32", "9 or 21"), ("5x32x32", "9")):
        way = f"found {size}; give {near}: 1 plus a multiple of 4, in tokens of 3 latent frames"
        with pytest.raises(UserError, match=f"data.buckets: {way}"):
            check_fits(parsed([size]), thirds.codec)


def test_clips_are_refused_where_one_size_is_made(tmp_path):
    data = {"name": "", "images": str(folder_of(tmp_path / "p")), "buckets": SIZES}
    causal = {"student": {"causal": {}, "num_steps": 2}, "objective": {"name": "ode_pairs"}}
    sparse = {"objective": {"name": "efficient_vdit"}, "student": {"num_steps": 2}}
    found = ((causal, "reads no image|student.causal"), (sparse, "the masks of efficient_vdit"))
    for values, message in found:
        with pytest.raises(UserError, match=f"data.buckets: .*({message})"):
            validate({**values, "data": data})


def test_a_student_trains_at_every_length(tmp_path, teacher, no_finish):
    values = {
        "teacher": {"path": str(teacher), "guidance": 2.0, "num_steps": 2},
        "student": {"kind": "lora", "num_steps": 2, "lora": {"rank": 2}},
        "objective": {"name": "lcm"},
        "data": {"images": str(folder_of(tmp_path / "p")), "buckets": SIZES},
        "train": {"max_train_steps": 3, "train_batch_size": 1, "validation_steps": 0, "log_steps": 1},
    }
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "in.yaml"), "--output_dir", str(tmp_path / "run")]) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) >= 3 and all(torch.isfinite(torch.tensor(float(v))) for v in _losses(lines))


def _losses(lines):
    import json

    return [v for line in lines for k, v in json.loads(line).items() if k.endswith("loss")]
