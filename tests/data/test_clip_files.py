"""Clips are read at the rate that is asked for, by what a viewer would see at each time."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.core.errors import UserError
from fastgen.data.clips import read_clip, save_clip
from fastgen.data.folders import gather, scan
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


def frames(folder, numbers, name="frame_{}.png"):
    folder.mkdir(parents=True)
    every = pictures(20)
    for i in numbers:
        every[i].save(folder / name.format(i))


def test_a_folder_of_numbered_frames_is_a_clip(tmp_path):
    """2 comes before 10; captions and classes are those of a file called as the folder."""
    frames(tmp_path / "walk", range(12))
    frames(tmp_path / "run", range(9, 15), "{}.jpg")
    (tmp_path / "walk.txt").write_text("somebody walks")
    save_clip(pictures(6), tmp_path / "jump.gif")
    samples = gather(scan(tmp_path, clips=True))
    assert [samples.name(i) for i in range(3)] == ["jump.gif", "run", "walk"]
    assert samples.captions == [None, None, "somebody walks"]
    assert seen(samples.files[2], 12) == list(range(12)) and seen(samples.files[1], 4) == [9, 10, 11, 12]
    with pytest.raises(OSError, match="6 frames of the 9 needed"):
        seen(samples.files[1], 9)
    with pytest.raises(OSError, match="does not say how long a frame is shown"):
        seen(samples.files[2], 2, 8.0)


def test_what_is_no_folder_of_frames(tmp_path):
    """Animated pictures in a folder are a clip each, pictures of several names and one alone are none."""
    (tmp_path / "moving").mkdir()
    for i in range(2):
        save_clip(pictures(3), tmp_path / f"moving/{i}.webp")
    frames(tmp_path / "mixed", range(2), "a{}.jpg")
    pictures(1)[0].save(tmp_path / "mixed/b1.jpg")
    frames(tmp_path / "one", range(1), "{}.jpg")
    listing = scan(tmp_path, clips=True)
    assert [str(p.relative_to(tmp_path)) for p in listing.files] == ["moving/0.webp", "moving/1.webp"]
    assert listing.others[".jpg"] == 4


def test_folders_of_frames_in_class_folders(tmp_path):
    for label in ("cat", "dog"):
        frames(tmp_path / label / "clip1", range(3), "{}.jpg")
    samples = gather(scan(tmp_path, clips=True))
    assert samples.labels == ["cat", "dog"] and samples.origin == "folders"
