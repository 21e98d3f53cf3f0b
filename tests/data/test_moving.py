"""The bundled clips: captions and attributes agree, and the paths are those that the pixels show."""

from types import SimpleNamespace

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.data import moving
from fastgen.data.sources import read_source
from fastgen.data.streaming import Stream
from fastgen.evaluation.metrics.displacement import cover, displacement


@pytest.fixture(scope="module")
def clips() -> moving.Clips:
    return moving.load_clips("heldout", range(96))


def section(**given):
    from fastgen.config.data_section import DataConfig

    return DataConfig(name="moving", **given)


def codec(num_frames: int = 9, temporal: int = 4):
    family = SimpleNamespace(name="wan", temporal=temporal, needs_image=False, takes_text=True)
    sizes = {"num_frames": num_frames, "pixels": (32, 32), "num_classes": 0}
    return SimpleNamespace(family=family, needs_image=False, **sizes)


def test_captions_name_the_attributes(clips):
    for i, text in enumerate(clips.captions):
        assert moving.attributes_of(text) == {k: int(v[i]) for k, v in clips.attributes.items()}
    assert len(set(moving.all_captions())) == len(moving.all_captions()) == 10 * 6 * 3 * 8
    assert set(clips.captions) <= set(moving.all_captions())
    assert all(set(v.tolist()) <= set(range(len(moving.VOCABULARY[k]))) for k, v in clips.attributes.items())
    assert len(set(clips.attributes["motion"].tolist())) == len(moving.MOTIONS)
    assert moving.attributes_of("a dress that stands") == {"garment": 3}  # what is not said is left out
    with pytest.raises(ValueError, match="more than one motion"):
        moving.attributes_of("a red dress moving left, growing")


def test_a_clip_depends_on_its_number_alone(clips):
    some = [7, 80, 3]
    assert torch.equal(moving.compose(some, "heldout"), clips.images[some])
    assert torch.equal(moving.displacement(some, "heldout"), clips.displacement[some])
    assert not torch.equal(moving.compose([7], "train"), clips.images[[7]])
    variants = moving.compose([5, 5 + moving.count() // moving.VARIANTS])
    assert not torch.equal(variants[0], variants[1])


def test_paths_go_there_and_back():
    paths, points = moving.paths(range(40)), torch.randn(40, 6, 2, dtype=torch.float64)
    there = paths.at(points)
    for k in range(moving.FRAMES):
        again = paths.back(there[0, k])[0, k]
        torch.testing.assert_close(again, points[0])
    steps = there.diff(dim=1)
    left = moving.attributes(range(40))["motion"] == moving.MOTIONS.index("left")
    still = moving.attributes(range(40))["motion"] == moving.MOTIONS.index("still")
    assert (steps[left][..., 0] < -0.8).all() and steps[left][..., 1].abs().max() < 1e-9
    assert steps[still].abs().max() == 0 < steps[~still].abs().amax((1, 2, 3)).min()


def test_displacement_is_that_of_the_pixels(clips):
    """The fit sees only pixels; the truth knows only paths."""
    fitted = displacement(clips.images.float() / 255)
    error = (fitted - clips.displacement).abs()
    assert error.mean() < 0.04 and error.max() < 0.25
    assert (clips.displacement[clips.attributes["motion"] == moving.MOTIONS.index("still")] == 0).all()
    frozen = clips.images[:, :, :1].expand_as(clips.images).float() / 255
    assert displacement(frozen[:20]).max() < 1e-3  # clips that stand still are found out
    assert displacement(torch.full((2, 3, 9, 32, 32), 0.5)).max() == 0  # and so are those of nothing


@pytest.mark.parametrize(
    ("motion", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)]
)
def test_the_middle_moves_as_the_caption_says(clips, motion, axis, sign):
    rows = clips.attributes["motion"] == moving.MOTIONS.index(motion)
    mask = cover(clips.images[rows].float() / 255)
    along = mask.sum(3 - axis)  # mass of each row or column, [N, F, side]
    middle = (along * torch.arange(moving.SIZE)).sum(2) / along.sum(2)
    shift = middle[:, -1] - middle[:, 0]
    torch.testing.assert_close(shift.double(), sign * 8 * clips.displacement[rows], atol=0.8, rtol=0)


def test_growing_grows_and_shrinking_shrinks(clips):
    mass = cover(clips.images.float() / 255).sum((2, 3))
    ratio = mass[:, -1] / mass[:, 0]
    motion = clips.attributes["motion"]
    assert ratio[motion == moving.MOTIONS.index("grow")].min() > 2
    assert ratio[motion == moving.MOTIONS.index("shrink")].max() < 0.5
    assert (ratio[motion == moving.MOTIONS.index("left")].log().abs() < 0.4).all()


def test_the_source_composes_what_a_batch_has(capsys):
    found = read_source(section(limit=40), codec(), "cpu", pixels=True)
    assert found.images is None and found.num == 40 and found.total == moving.count()
    read = Stream(found.reader, 2, "error", "data.name").read([3, 39])
    assert torch.equal(torch.stack([row["images"] for _, row in read]), moving.compose([3, 39]))
    whole = read_source(section(limit=4, stream="never"), codec(), "cpu", pixels=True)
    assert torch.equal(whole.images, moving.compose(range(4))) and whole.captions == found.captions[:4]
    assert read_source(section(limit=4), codec(), "cpu", pixels=False).images is None
    assert "composed when a batch has them" in capsys.readouterr().out


def test_fewer_frames_are_the_first_ones(capsys):
    few = codec(num_frames=2)
    whole = read_source(section(limit=3, stream="never"), few, "cpu", pixels=True)
    assert torch.equal(whole.images, moving.compose(range(3))[:, :, :2])
    reader = read_source(section(limit=3), few, "cpu", pixels=True).reader
    assert torch.equal(reader.first(2).load(1)["images"], moving.compose([1])[0][:, :2])
    assert "the first 2 of 9 frames" in capsys.readouterr().out
    assert torch.equal(moving.ends([4, 7], "heldout"), moving.compose([4, 7], "heldout")[:, :, [0, -1]])


@pytest.mark.parametrize(
    ("name", "made", "message"),
    [
        ("moving", codec(temporal=0), "holds clips"),
        ("moving", codec(num_frames=13), "teacher.num_frames"),
        ("tinted", codec(), "holds images"),
        ("waving", codec(), "allowed: digits, fashion, tinted, solids, moving"),
    ],
)
def test_what_does_not_fit_is_refused(name, made, message):
    with pytest.raises(UserError, match=message):
        read_source(section().model_copy(update={"name": name}), made, "cpu", pixels=True)
