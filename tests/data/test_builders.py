"""The scripts that rebuild the bundled assets: their nets fit the shipped weights, their scores the cards."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

ASSETS = Path(__file__).resolve().parents[2] / "assets"
MOVING = ("moving_measure", "moving_autoencoder", "moving_text_encoder")
MODULES = ("common", "captions", "data", "measure", "autoencoders", "text_encoders", "two_tower", *MOVING)


@pytest.fixture
def builder(monkeypatch):
    """Modules of assets/build by name, forgotten after the test."""
    monkeypatch.syspath_prepend(str(ASSETS / "build"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    known = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(known)


def card(folder: Path) -> dict:
    return json.loads((folder / "card.json").read_text())


def shapes(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def test_every_command_of_the_assets_is_kept_in_git():
    """The ignore rule for build folders once hid the scripts."""
    root = ASSETS.parent
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    found = subprocess.run(
        ["git", "ls-files", "assets/build"], cwd=root, capture_output=True, text=True, check=True
    )
    kept = set(found.stdout.split())
    named = {word for c in ASSETS.rglob("card.json") for word in card(c.parent)["command"].split()}
    named = {word for word in named if word.startswith("assets/build/")}
    assert len(named) == 7 and named <= kept


@pytest.mark.parametrize("name", MODULES)
def test_every_builder_imports_and_none_trains_on_import(builder, name):
    assert builder(name).__doc__


def test_digits_come_out_as_shipped(builder, tmp_path):
    builder("data").digits(tmp_path)
    with np.load(tmp_path / "digits.npz") as made, np.load(ASSETS / "data/digits.npz") as shipped:
        assert made.files == shipped.files
        assert all(np.array_equal(made[key], shipped[key]) for key in shipped.files)


@pytest.mark.parametrize("kind, teacher", [("clip", "tinted-sd"), ("gemma", "tinted-sana")])
def test_text_encoders_have_the_shipped_shapes_and_tokenizer(builder, tmp_path, kind, teacher):
    encoder, tokenizer = builder("text_encoders").build(kind)
    folder = ASSETS / "teachers" / teacher
    found = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    assert found == shapes(folder / "text_encoder/model.safetensors")
    builder("captions").tokens_of(tokenizer, ["a red dress"])  # the shipped file keeps the padding last used
    tokenizer.save_pretrained(tmp_path)
    made, shipped = (p / "tokenizer.json" for p in (tmp_path, folder / "tokenizer"))
    assert json.loads(made.read_text()) == json.loads(shipped.read_text())


@pytest.mark.parametrize("kind, teacher", [("kl", "tinted-sd"), ("dc", "tinted-sana")])
def test_autoencoders_have_the_shipped_shapes(builder, kind, teacher):
    found = {
        key: tuple(value.shape) for key, value in builder("autoencoders").build(kind).state_dict().items()
    }
    assert found == shapes(ASSETS / "teachers" / teacher / "vae/diffusion_pytorch_model.safetensors")


def test_an_autoencoder_is_scored_as_its_card_says(builder):
    """The first 500 held-out images, whose error is near that of all 5,000; an untrained one is far off."""
    from diffusers import AutoencoderDC

    from fastgen.data.bundled import load_images

    autoencoders, folder = builder("autoencoders"), ASSETS / "teachers/tinted-sana/vae"
    vae = AutoencoderDC.from_pretrained(folder, torch_dtype=torch.float32).eval()
    images = load_images("tinted", "heldout").images[:500]
    errors = {}
    for name, net in (("shipped", vae), ("untrained", autoencoders.build("dc").eval())):
        latents, decoded = autoencoders.rebuild(net, images)
        errors[name] = (decoded - (images.float() / 127.5 - 1)).abs().mean().item()
    assert latents.shape == (500, 4, 8, 8) and decoded.shape == images.shape
    assert errors["shipped"] == pytest.approx(card(folder)["heldout_l1"], rel=0.05)
    assert errors["untrained"] > 10 * errors["shipped"]


def test_the_moving_autoencoder_is_a_projection(builder):
    """On principal components of 4x4 patches, through all of the network's layers."""
    from diffusers import AutoencoderKLWan
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify

    from fastgen.data import moving

    module, folder = builder("moving_autoencoder"), ASSETS / "teachers/moving-wan/vae"
    mean, basis, _ = module.components(moving.load_clips("train", range(module.CLIPS)).images)
    clips = moving.compose(range(4), "heldout")
    patches = patchify(clips.float() / 127.5 - 1, module.PATCH).movedim(1, -1) - mean.float()
    B = basis.float()
    wanted = unpatchify((patches @ B.T @ B + mean.float()).movedim(-1, 1), module.PATCH).clamp(-1, 1)
    vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32).eval()
    latents, decoded = module.rebuild(vae, clips)
    assert latents.shape == (4, 12, 9, 8, 8)
    assert (decoded - wanted).abs().max() < 0.02 and (decoded - wanted).abs().mean() < 2e-3
    untrained = module.rebuild(module.build().eval(), clips)[1]
    assert (untrained - wanted).abs().mean() > 0.1


@pytest.mark.parametrize("part", ["t5", "clip", "measure"])
def test_the_moving_nets_have_the_shipped_shapes(builder, part):
    from fastgen.data import moving
    from fastgen.networks.clip_net import ClipNet

    if part == "measure":
        heads = {k: len(v) for k, v in moving.VOCABULARY.items()}
        net, file = ClipNet(3, moving.FRAMES, moving.SIZE, heads), ASSETS / "measure/moving/model.safetensors"
    else:
        module = builder("moving_text_encoder")
        net, _ = module.build(part)
        file = ASSETS / "teachers" / module.TEACHER[part] / "text_encoder/model.safetensors"
    found = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert shapes(file).items() <= found.items()


def test_the_two_towers_score_is_the_recorded_one(builder):
    from transformers import AutoTokenizer, CLIPModel

    two_tower, folder = builder("two_tower"), ASSETS / "measure/tinted-clip"
    made, _ = two_tower.build()
    assert {key: tuple(v.shape) for key, v in made.state_dict().items()} == shapes(
        folder / "model.safetensors"
    )
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = two_tower.score(model, AutoTokenizer.from_pretrained(folder))
    recorded = card(folder)
    for key in ("heldout_retrieval_of_180_captions", "cosine_of_true_caption", "cosine_of_mean_caption"):
        assert found[key] == pytest.approx(recorded[key], abs=2e-3), key


def test_a_short_training_writes_a_whole_asset(builder, tmp_path, monkeypatch):
    """Two steps of a text encoder: folders that transformers reads back, with a card of how it was made."""
    from transformers import AutoTokenizer, CLIPTextModel

    text_encoders = builder("text_encoders")
    load = text_encoders.load_images

    def few(name, split):
        data = load(name, split)
        rows = slice(0, 600)
        attributes = {key: value[rows] for key, value in data.attributes.items()}
        return type(data)(data.images[rows], data.labels[rows], 10, data.class_names, None, attributes)

    monkeypatch.setattr(text_encoders, "load_images", few)
    monkeypatch.setattr(sys, "argv", ["text_encoders.py", "--kind", "clip"])
    text_encoders.main("clip", tmp_path, 2, 0)
    assert CLIPTextModel.from_pretrained(tmp_path / "text_encoder").config.vocab_size == 605
    assert len(AutoTokenizer.from_pretrained(tmp_path / "tokenizer")) == 605
    made = card(tmp_path / "text_encoder")
    assert made["command"] == "python assets/build/text_encoders.py --kind clip" and made["steps"] == 2
    assert set(made) == set(card(ASSETS / "teachers/tinted-sd/text_encoder"))
