"""Pictures whose look is taken over: of a folder or bundled, of a frame's size, drawn by seed and step."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fastgen.config.data_section import AppearanceConfig
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.data.appearance import contrasted, load_appearance
from fastgen.data.batches import Data
from fastgen.evaluation.metrics.fvd_mini import contrast
from fastgen.networks.codecs import TextCodec


def codec(temporal=1, pixels=(32, 32)):
    """What `load_appearance` asks of a codec."""
    made = TextCodec.__new__(TextCodec)
    torch.nn.Module.__init__(made)
    made.family = SimpleNamespace(temporal=temporal, factor=1, folded=1)
    made.pipe, made.shape = None, (4, 3, *pixels)
    return made


def test_a_folder_is_read_at_the_size_of_a_frame(tmp_path, capsys):
    for i, size in enumerate([(40, 20), (16, 16), (64, 64)]):
        Image.new("RGB", size, (10 * i, 100, 200)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.md").write_text("no picture")
    found = load_appearance(AppearanceConfig(images=str(tmp_path), limit=2), codec(pixels=(24, 16)))
    assert found.shape == (2, 3, 24, 16) and found.dtype == torch.uint8
    assert found[:, 0, 0, 0].tolist() == [0, 10]
    assert "data.appearance" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tinted", "moving"])
def test_bundled_pictures(name):
    found = load_appearance(AppearanceConfig(name=name, limit=40), codec())
    assert found.shape == (40, 3, 32, 32) and len({tuple(f.flatten().tolist()) for f in found}) == 40
    again = load_appearance(AppearanceConfig(name=name, limit=20), codec())
    assert torch.equal(found[:20], again)


def test_contrast_moves_values_away_from_mid_grey():
    images = torch.tensor([0, 100, 127, 128, 155, 255], dtype=torch.uint8).reshape(1, 1, 2, 3)
    assert contrasted(images, 2.0).flatten().tolist() == [0, 72, 126, 128, 182, 255]
    assert contrasted(images, 1.0) is images
    half = images.float() / 255
    assert contrast(images) == pytest.approx(contrast(half)) == pytest.approx(float(half.std()))
    assert contrast(contrasted(images, 2.0)) > contrast(images)


def test_batches_show_pictures_by_seed_and_step_alone():
    data = Data(torch.zeros(9, 2), {}, torch.zeros(9).long(), {}, (2,))
    data.appearance = torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1).expand(40, 3, 2, 2)

    def shown(start, num, seed=0):
        windows = data.first(5).batches(8, start, 1, Rng(seed), "cpu")
        return [next(windows)[0].appearance for _ in range(num)]

    found = shown(0, 4)
    assert found[0].shape == (8, 3, 2, 2) and found[0].max() < 40 / 255
    assert torch.equal(shown(2, 1)[0], found[2]) and not torch.equal(found[1], found[2])
    assert not torch.equal(shown(0, 1, seed=1)[0], found[0])
    plain = Data(torch.zeros(9, 2), {}, torch.zeros(9).long(), {}, (2,))
    one, other = (next(d.batches(8, 3, 1, Rng(0), "cpu"))[0] for d in (plain, data))
    assert one.appearance is None and torch.equal(one.noise, other.noise), "nothing else is drawn anew"


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        ({}, "data.appearance: found neither images nor name; give one of them"),
        ({"images": "a", "name": "tinted"}, "data.appearance: found images and name; give one"),
        ({"images": "not/there"}, "data.appearance.images: not/there is not a folder"),
        ({"name": "digits"}, "data.appearance.name: found 'digits'; allowed: tinted, moving"),
    ],
)
def test_what_is_wrong_is_named(section, wrong):
    with pytest.raises(UserError) as error:
        load_appearance(AppearanceConfig(**section), codec())
    assert str(error.value).startswith(wrong)


def test_what_does_not_fit_the_teacher_is_refused():
    section = AppearanceConfig(name="tinted")
    with pytest.raises(UserError, match="holds pictures of 32 pixels, frames have 16"):
        load_appearance(section, codec(pixels=(16, 16)))
    with pytest.raises(UserError, match="a teacher that makes no clips"):
        load_appearance(section, codec(temporal=0))
    with pytest.raises(UserError, match="contrast"):
        validate({"objective": {"name": "mcm"}, "data": {"name": "moving", "appearance": {"contrast": 0}}})
