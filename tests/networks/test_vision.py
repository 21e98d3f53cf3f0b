"""Networks that pictures are judged by: a bundled one, a vision transformer, and what is none."""

import json

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.networks.augment import augment
from fastgen.networks.vision import open_vision

PICTURES = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(1))


def dino(folder):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(2)
    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**shape, image_size=28, patch_size=7)).save_pretrained(folder)
    return folder


def test_a_vision_transformer_gives_the_tokens_of_four_depths(tmp_path):
    """By hand: hidden states without the class token, in rows, of pictures resized and normalised."""
    net = open_vision(str(dino(tmp_path / "dino")), 3)
    maps = net.maps(PICTURES)
    assert [m.shape for m in maps] == [(2, 16, 4, 4)] * 4
    small = torch.nn.functional.interpolate(PICTURES, (28, 28), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    states = net.net(pixel_values=(small - mean) / std, output_hidden_states=True).hidden_states
    torch.testing.assert_close(maps[1][0, :, 2, 3], states[2][0, 1 + 2 * 4 + 3])
    assert not any(p.requires_grad for p in net.parameters())
    pictures = PICTURES.clone().requires_grad_()
    net.maps(pictures)[-1].sum().backward()
    assert pictures.grad.abs().sum() > 0


def test_the_bundled_network_and_pixels():
    maps = open_vision("assets:rewards/tinted", 3).maps(PICTURES)
    assert len(maps) == 3 and maps[0].shape[0] == 2
    whole, half = open_vision("pixels", 3).maps(PICTURES)
    torch.testing.assert_close(whole, PICTURES * 2 - 1)
    assert half.shape == (2, 3, 10, 10)


def test_what_is_no_network_of_pictures_is_named(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    for path, wrong in (
        (str(tmp_path / "other"), "is no network of pictures that is known here"),
        (str(tmp_path / "none"), "objective.features"),
        ("assets:rewards/digits", "takes pictures of 1 channels, the teacher's have 3"),
    ):
        with pytest.raises(UserError, match="objective.features") as error:
            open_vision(path, 3)
        assert wrong in str(error.value)


def test_augmentations():
    """Translation keeps what stays inside and brings in black; cutout leaves three quarters or more."""
    ones = torch.ones(400, 3, 16, 16)
    moved = augment(ones, ("translation",), Rng(0).rand)
    kept = moved[:, 0].flatten(1).mean(1)
    assert set(moved.unique().tolist()) == {0.0, 1.0} and kept.min() >= (14 / 16) ** 2 and kept.max() == 1
    cut = augment(ones, ("cutout",), Rng(0).rand)[:, 0].flatten(1).mean(1)
    assert cut.min() == pytest.approx(0.75) and cut.max() < 1
    grey = torch.full((400, 3, 4, 4), 0.5)
    coloured = augment(grey, ("colour",), Rng(0).rand)
    assert coloured.min() > 0.24 and coloured.max() < 0.76 and coloured.flatten(1).std(1).max() < 1e-6
    assert augment(ones, (), Rng(0).rand) is ones
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    rows = {tuple(augment(ramp, ("translation",), Rng(s).rand)[0, 0, 8].tolist()) for s in range(30)}
    assert len(rows) == 5, "two pixels to each side"
