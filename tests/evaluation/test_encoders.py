"""Encoders with random weights against computations by hand: resizing, CLIP, HPS, PickScore, aesthetic,
LPIPS.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.core.errors import UserError
from fastgen.data.bundled import load_images
from fastgen.evaluation.encoders import dinov2, inception, resize, text_image
from fastgen.evaluation.encoders.catalogue import CLIP_PRESETS, ClipPreset, Encoders
from fastgen.evaluation.material import Material, measure
from fastgen.evaluation.metrics import lpips
from fastgen.evaluation.metrics.text_scores import affine_head, by_style
from fastgen.evaluation.registry import wanted
from fastgen.evaluation.sources import Arrays

PROMPTS = ["a red dress", "a blue boot", "a bag"]


def shown(num: int = 3, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num, 3, size, size), generator=generator).to(torch.uint8)


def score(name: str, encoders: Encoders, images=None, prompts=PROMPTS, **more) -> float:
    images = shown() if images is None else images
    material = Material(Arrays(images, "test", "--images"), encoders, prompts=prompts, **more)
    return measure(material, [wanted(name)])[name].value


# -- resizing
def test_cropped_takes_the_middle():
    wide = torch.zeros(1, 1, 8, 16, dtype=torch.uint8)
    wide[..., 4:12] = 255
    assert resize.cropped(wide, 8).shape == (1, 3, 8, 8) and (resize.cropped(wide, 8) == 255).all()
    assert not (resize.squared(wide, 8) == 255).all(), "without a crop the margins stay"


def test_clean_keeps_what_rounding_would_lose():
    """Bicubic overshoots at an edge: clean-fid keeps values above 255, 8-bit resizing cuts them."""
    edge = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    edge[..., 8:] = 255
    found = resize.clean(edge, 40)
    assert found.max() > 255 and found.min() < 0 and found.shape == (1, 3, 40, 40)
    plane = Image.fromarray(edge[0, 1].float().numpy()).resize((40, 40), Image.Resampling.BICUBIC)
    assert np.array_equal(found[0, 1].numpy(), np.array(plane))


def test_centre_takes_pixels_as_they_are():
    x = torch.arange(3 * 7 * 9).reshape(1, 3, 7, 9)
    assert torch.equal(resize.centre(x, 5), x[..., 1:6, 2:7])


# -- inception
def test_inception_refuses_pickles_and_wrong_files(tmp_path):
    pytest.importorskip("torch_fidelity")
    (tmp_path / "x.pth").write_bytes(b"nothing")
    torch.save({"a": torch.nn.Linear(1, 1)}, tmp_path / "pickle.pth")
    for name in ("x.pth", "pickle.pth"):
        with pytest.raises(UserError, match="cannot be read"):
            inception.load(tmp_path / name)


@pytest.mark.slow
def test_inception_is_torch_fidelitys(tmp_path, monkeypatch):
    """Features and logits equal theirs; the patch takes pixels as they are; clean is another number."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *a, **k: None)
    net = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    monkeypatch.undo()
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    images = shown(2, 299)
    features, logits = net(images)
    for name in ("inception", "inception_patch"):
        ours = inception.load(tmp_path / "inception.pth", name)(images)
        assert torch.allclose(ours["features"], features) and torch.allclose(ours["logits"], logits)
    small = shown(2, 40)
    theirs, ours = net(small)[0], inception.load(tmp_path / "inception.pth")(small)["features"]
    clean = inception.load(tmp_path / "inception.pth", "inception_clean")(small)["features"]
    assert torch.allclose(ours, theirs) and not torch.allclose(clean, theirs)
    with pytest.raises(UserError, match="images of 40 x 40"):
        inception.load(tmp_path / "inception.pth", "inception_patch")(small)


# -- clip and hps
@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(architecture name, checkpoint) of a random CLIP small enough for a test."""
    open_clip = pytest.importorskip("open_clip")
    where = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    (where / "tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(where)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-test")
    torch.save({"state_dict": model.state_dict()}, where / "tiny.pt")  # as HPS_v2.1_compressed.pt is laid out
    return "tiny-test", where / "tiny.pt"


def by_hand(tiny, prefix: str = "") -> torch.Tensor:
    import open_clip

    model = open_clip.create_model(tiny[0])
    model.load_state_dict(torch.load(tiny[1], weights_only=True)["state_dict"])
    model.eval()
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (resize.CLIP_MEAN, resize.CLIP_STD))
    with torch.no_grad():
        pixels = model.encode_image((shown() / 255 - mean) / std)
        words = model.encode_text(open_clip.get_tokenizer(tiny[0])([prefix + p for p in PROMPTS]))
    return torch.nn.functional.cosine_similarity(pixels, words)


def test_clip_score_is_the_mean_cosine(tiny, monkeypatch):
    arch, file = tiny
    monkeypatch.setitem(CLIP_PRESETS, "tiny", ClipPreset(arch))
    monkeypatch.setitem(CLIP_PRESETS, "spliced", ClipPreset(arch, "A photo depicts ", 1.0))
    plain = score("clip", Encoders({"clip": str(file)}, clip="tiny"))
    assert plain == pytest.approx(100 * float(by_hand(tiny).mean()), abs=1e-3)
    spliced = score("clip", Encoders({"clip": str(file)}, clip="spliced"))
    assert spliced == pytest.approx(float(by_hand(tiny, "A photo depicts ").mean()), abs=1e-5)


def test_hps_is_a_cosine_times_a_hundred(tiny, monkeypatch):
    monkeypatch.setattr("fastgen.evaluation.encoders.catalogue.HPS_ARCH", tiny[0])
    found = score("hps", Encoders({"hps": str(tiny[1])}))
    assert found == pytest.approx(100 * float(by_hand(tiny).mean()), abs=1e-3)


def test_clip_refuses_a_checkpoint_of_another_network(tiny, tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt cannot be read"):
        text_image.load("clip", tmp_path / "other.pt", tiny[0])


def test_hps_by_style():
    found = by_style(torch.tensor([1.0, 3.0, 10.0]), ["anime", "anime", "photo"])
    assert found == {"anime": 2.0, "photo": 10.0, "all": 6.0}


# -- transformers
@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random transformers CLIP with the bundled teacher's tokenizer."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    from fastgen.core.paths import asset

    where = tmp_path_factory.mktemp("folder")
    tokenizer = AutoTokenizer.from_pretrained(asset("teachers/tinted-sd") / "tokenizer")
    sides = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=20, **sides)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **sides)
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


def test_pickscore_of_a_folder_is_the_scaled_cosine(clip_folder):
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = (
        CLIPModel.from_pretrained(clip_folder).eval(),
        AutoTokenizer.from_pretrained(clip_folder),
    )
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (resize.CLIP_MEAN, resize.CLIP_STD))
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=20, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=(shown() / 255 - mean) / std, **tokens)
    wanted_score = float(out.logits_per_image.diagonal().mean())
    assert score("pickscore", Encoders({"pickscore": str(clip_folder)})) == pytest.approx(
        wanted_score, abs=1e-3
    )


def test_cmmd_of_a_folder(clip_folder):
    encoders = Encoders({"clip_336": str(clip_folder)})
    same = Arrays(shown(), "reference", "--against")
    assert score("cmmd", encoders, against=same) == pytest.approx(0, abs=1e-6)
    other = Arrays(255 - shown(), "reference", "--against")
    assert score("cmmd", encoders, against=other) > 0.001
    assert encoders.open("clip_336").preprocessing == "PIL bicubic to 16, no crop"


def test_aesthetic_collapses_the_published_stack(clip_folder, tmp_path):
    """The layout of sac+logos+ava1-l14-linearMSE.pth: five linear layers with dropout between."""
    torch.manual_seed(0)
    linear, drop = torch.nn.Linear, torch.nn.Dropout
    stack = torch.nn.Sequential(
        linear(8, 10), drop(), linear(10, 7), drop(), linear(7, 6), drop(), linear(6, 1)
    )
    stack.eval()
    torch.save({f"layers.{k}": v for k, v in stack.state_dict().items()}, tmp_path / "head.pth")
    row, offset = affine_head(tmp_path / "head.pth")
    x = torch.randn(5, 8)
    assert torch.allclose((x.double() @ row + offset).float(), stack(x)[:, 0], atol=1e-5)
    encoders = Encoders({"clip_l14": str(clip_folder), "aesthetic": str(tmp_path / "head.pth")})
    features = torch.nn.functional.normalize(encoders.open("clip_l14")(shown())["features"], dim=-1)
    assert score("aesthetic", encoders) == pytest.approx(float(stack(features).mean()), abs=1e-5)
    torch.save({"a": torch.zeros(1)}, tmp_path / "head.pth")
    with pytest.raises(UserError, match="head.pth cannot be read"):
        affine_head(tmp_path / "head.pth")


def test_dinov2_of_a_folder_is_the_class_token(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    net = Dinov2Model(config).eval()
    net.save_pretrained(tmp_path)
    encoder = dinov2.load(tmp_path)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (resize.IMAGENET_MEAN, resize.IMAGENET_STD))
    x = (resize.squared(shown(), 224) / 255 - mean) / std
    with torch.no_grad():
        by_net = net(pixel_values=x).last_hidden_state[:, 0]
    assert torch.allclose(encoder(shown())["features"], by_net, atol=1e-5)
    assert encoder.key != dinov2.Encoder("x", net, lambda x: x, "another resize", encoder.weights).key


# -- lpips
@pytest.mark.parametrize("name", ["alexnet", "squeezenet1_1"])
def test_lpips_fills_its_backbone_from_a_torchvision_file(name, tmp_path):
    models = pytest.importorskip("torchvision.models")
    pytest.importorskip("torchmetrics")
    torch.manual_seed(0)
    backbone = getattr(models, name)(weights=None)
    torch.save(backbone.state_dict(), tmp_path / f"{name}.pth")
    net = lpips.load(tmp_path / f"{name}.pth")
    a, b = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in (0, 1))
    first = next(p for p in backbone.features.parameters())
    assert any(p.shape == first.shape and torch.equal(p, first) for p in net.net.parameters())
    assert (net(a, b) > 0).all() and torch.equal(net(a, a), torch.zeros(2, 1, 1, 1))
    images = load_images("tinted", "heldout").images[:6].repeat_interleave(2, 2).repeat_interleave(2, 3)
    encoders = Encoders({"lpips": str(tmp_path / f"{name}.pth")})
    apart = score("lpips_diversity", encoders, images, None, group_size=3)
    same = score("lpips_diversity", encoders, images[:1].expand(6, -1, -1, -1), None, group_size=3)
    assert apart > 0 and same == pytest.approx(0, abs=1e-6)


def test_lpips_refuses_another_file(tmp_path):
    pytest.importorskip("torchvision")
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth cannot be read \(1 tensors\)"):
        lpips.load(tmp_path / "x.pth")


# -- efficientnet
def test_efficientnet_is_read_whole_or_refused(tmp_path):
    """Random weights in the released file's names: 4.7M parameters, the layout that tests/real loads."""
    from fastgen.evaluation.encoders import efficientnet

    net = efficientnet.EfficientNetLite0().eval()
    assert sum(p.numel() for p in net.parameters()) == 4_652_008
    torch.save(net.state_dict(), tmp_path / "net.pth")
    encoders = Encoders({"efficientnet": str(tmp_path / "net.pth")})
    images = torch.randint(0, 256, (2, 3, 40, 50), generator=torch.Generator().manual_seed(0)).byte()
    found = encoders.open("efficientnet_96")(images)
    assert found["features"].shape == (2, 1280) and found["logits"].shape == (2, 1000)
    square = (resize.cropped(images, 96).float() - 127) / 128
    torch.testing.assert_close(found["logits"], net(square)["logits"].detach())
    assert encoders.open("efficientnet").key != encoders.open("efficientnet_96").key
    state = net.state_dict()
    del state["_fc.bias"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(UserError, match="cut.pth cannot be read"):
        Encoders({"efficientnet": str(tmp_path / "cut.pth")}).open("efficientnet")
    with pytest.raises(UserError, match="efficientnet=PATH of efficientnet-lite0"):
        Encoders({}).open("efficientnet_96")
