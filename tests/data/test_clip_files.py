"""Clips are read at the rate that is asked for, by what a viewer would see at each time."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.core.errors import UserError
from fastgen.data.clips import read_clip, save_clip
from fastgen.data.sources import read_source
from tests.data.test_moving import codec, section

SIZE = 16


def pictures(num):
    """Frame i has the grey level 10 i."""
    return [Image.new("RGB", (SIZE, SIZE), (10 * i,) * 3) for i in range(num)]


def seen(path, num, fps=None):
    """Numbers of the frames that are read."""
    clip = read_clip(path, (3, num, SIZE, SIZE), fps)
    return (clip.float().mean((0, 2, 3)) / 10).round().int().tolist()


def test_every_second_or_third_frame(tmp_path):
    save_clip(pictures(20), tmp_path / "a.gif", 20)
    assert seen(tmp_path / "a.gif", 5) == [0, 1, 2, 3, 4]
    assert seen(tmp_path / "a.gif", 5, 10.0) == [0, 2, 4, 6, 8]
    assert seen(tmp_path / "a.gif", 5, 8.0) == [0, 2, 5, 7, 10]
    save_clip(pictures(20), tmp_path / "a.mp4", 24)
    assert seen(tmp_path / "a.mp4", 5, 8.0) == [0, 3, 6, 9, 12]
    assert seen(tmp_path / "a.mp4", 20, 24.0) == list(range(20))


def test_frames_of_unequal_length(tmp_path):
    """0 for .1 s, 1 for .3 s, 2 for .1 s, 3 for .1 s: ten times a second."""
    first, *rest = pictures(4)
    durations = [100, 300, 100, 100]
    first.save(tmp_path / "a.webp", save_all=True, append_images=rest, duration=durations, lossless=True)
    with pytest.raises(OSError, match="3.33 frames a second of the 10 that data.fps asks for"):
        seen(tmp_path / "a.webp", 6, 10.0)
    assert seen(tmp_path / "a.webp", 2, 10 / 3) == [0, 1]
    with pytest.raises(OSError, match="2 frames of the 3 needed at 3.33333 a second"):
        seen(tmp_path / "a.webp", 3, 10 / 3)


def test_a_clip_that_says_no_rate(tmp_path):
    first, *rest = pictures(3)
    first.save(tmp_path / "a.png", save_all=True, append_images=rest, duration=0)
    with pytest.raises(OSError, match="does not say how long a frame is shown"):
        seen(tmp_path / "a.png", 2, 4.0)
    assert seen(tmp_path / "a.png", 3) == [0, 1, 2]


def test_odd_sides_become_even(tmp_path):
    import imageio.v3 as imageio

    save_clip([Image.new("RGB", (15, 17), "red")] * 3, tmp_path / "a.mp4", 8)
    frames = imageio.imread(tmp_path / "a.mp4")
    assert frames.shape == (3, 18, 16, 3) and np.abs(frames.astype(int) - (255, 0, 0)).max() < 12


def test_a_folder_at_a_rate(tmp_path, capsys):
    save_clip(pictures(20), tmp_path / "fast.gif", 20)
    save_clip(pictures(20), tmp_path / "slow.gif", 2)
    for name in ("fast", "slow"):
        (tmp_path / f"{name}.txt").write_text(name)
    asked = {"name": "", "images": str(tmp_path), "fps": 10.0}
    own = codec()
    own.shape, own.decode = (12, 9, 8, 8), lambda x: torch.zeros(len(x), 3, 9, 32, 32)
    found = read_source(section().model_copy(update=asked), own, "cpu", pixels=True)
    assert found.captions == ["fast"] and found.images.shape[:3] == (1, 3, 9)
    assert torch.equal(found.images[0, 0, :, 0, 0] // 20, torch.arange(9).byte())
    assert "slow.gif (2 frames a second of the 10" in capsys.readouterr().out
    for made, more, why in (
        (codec(temporal=0), {}, "for a teacher of pictures"),
        (codec(), {"images": "", "name": "moving"}, "beside no clips of your own"),
    ):
        with pytest.raises(UserError, match=f"data.fps: found 10 {why}"):
            read_source(section().model_copy(update={**asked, **more}), made, "cpu", pixels=False)
