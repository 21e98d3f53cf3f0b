"""Measuring image folders: the command line, and FID, CLIP score and HPS with tiny random networks."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.cli.evaluate import main
from fastgen.core.errors import UserError
from fastgen.data.bundled import load_images
from fastgen.evaluation import images
from fastgen.evaluation.metrics import clip, fid, hps


@pytest.fixture
def folder(tmp_path):
    """20 real digits as PNG files, a contact sheet that must not count, and their labels."""
    held, where = load_images("digits", "heldout"), tmp_path / "digits"
    where.mkdir()
    for i, image in enumerate(held.images[:20]):
        Image.fromarray(image[0].numpy()).save(where / f"{i:03d}.png")
    Image.fromarray(np.zeros((50, 50), np.uint8)).save(where / "grid.png")
    (tmp_path / "labels.txt").write_text("\n".join(str(int(k)) for k in held.labels[:20]))
    return where


def test_folder_against_a_bundled_set(folder, tmp_path, capsys):
    argv = ["--images", str(folder), "--against", "digits", "--metrics", "fd_mini", "agreement"]
    assert main([*argv, "--prompts", str(tmp_path / "labels.txt")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_images"] == 20 and found["agreement"] > 0.9 and 0 < found["fd_mini"] < 60
    assert "mmd" not in found and "not comparable with an Inception FID" in found["note"]
    assert main(argv) == 2 and "agreement cannot be had" in capsys.readouterr().err
    (tmp_path / "labels.txt").write_text("11\n")
    assert main([*argv, "--prompts", str(tmp_path / "labels.txt")]) == 2
    assert "--prompts: found '11'" in capsys.readouterr().err


def test_two_folders(folder, capsys):
    argv = ["--images", str(folder), "--against", str(folder)]
    assert main(argv) == 2 and "--extractor" in capsys.readouterr().err
    assert main([*argv, "--extractor", "digits", "--metrics", "fd_mini", "recall"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fd_mini"] == pytest.approx(0, abs=1e-4) and found["recall"] == 1


def test_images_that_cannot_be_used(folder):
    with pytest.raises(UserError, match="broken.png cannot be read"):
        (folder / "broken.png").write_bytes(b"no image")
        images.read_all(folder)
    (folder / "broken.png").unlink()
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(folder / "odd.png")
    with pytest.raises(UserError, match="odd.png is"):
        images.read_all(folder)


def test_pictures_and_prompts_are_paired_in_natural_order(tmp_path, capsys):
    held = load_images("digits", "heldout")
    for i in range(12):
        Image.fromarray(held.images[i, 0].numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "p.txt").write_text("\ufeff" + "".join(f"{int(k)}\r\n" for k in held.labels[:12]), "utf-8")
    argv = ["--images", str(tmp_path), "--against", "digits", "--metrics", "agreement"]
    assert main([*argv, "--prompts", str(tmp_path / "p.txt")]) == 0
    assert json.loads(capsys.readouterr().out)["agreement"] > 0.9


def test_counts_of_pictures_and_prompts(tmp_path, capsys):
    files = [tmp_path / f"{i}.png" for i in range(6)]
    file = tmp_path / "p.txt"

    def read(text):
        file.write_text(text)
        return images.read_prompts(file, files)

    assert read("a\n\nb\nc\nd\n\n") == ["a", "", "b", "c", "d", ""], "blank lines keep their places"
    assert read("a\n\nb\nc\nd\ne\n\n\n") == ["a", "", "b", "c", "d", "e"]
    assert read("a\n\nb\nc\n\nd\ne\nf\n") == list("abcdef")
    assert capsys.readouterr().err == ""
    assert read("a\nb\nc\n") == list("abcabc") and "gone round" in capsys.readouterr().err
    for text, wanted in (("a\nb\nc\nd\n", "4 lines in"), ("a\n" * 7, "7 lines in"), ("\n", "is empty")):
        with pytest.raises(UserError, match=wanted):
            read(text)
    (tmp_path / "samples.json").write_text("{}")
    assert read("a\nb\nc\nd\n") == list("abcdab")
    file.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="--prompts: .*p.txt line 1: byte 4"):
        images.read_prompts(file, files)


def test_weights_are_local_files_named_when_missing(folder, tmp_path, capsys):
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    for argv, said in (
        (["--metrics", "fid", "--against", "digits"], "weights-inception-2015-12-05-6726825d.pth"),
        (["--metrics", "hps", "--weights", "hps=/nowhere.pt"], "HPS_v2.1_compressed.pt"),
        (["--metrics", "clip", "--clip", "best"], "vit-g-14, dmd2"),
        (["--metrics", "clip", "--weights", f"clip={tmp_path}/no.pt"], "checkpoint of ViT-g-14"),
    ):
        assert main(["--images", str(folder), "--prompts", str(tmp_path / "labels.txt"), *argv]) == 2
        assert said in capsys.readouterr().err


def test_metrics_import_without_their_extras():
    code = (
        "import sys\n"
        "for name in ('torchmetrics', 'torch_fidelity', 'open_clip', 'transformers', 'diffusers'):\n"
        "    sys.modules[name] = None\n"
        "import fastgen.cli.evaluate\n"
        "from fastgen.evaluation.metrics import alignment, clip, fd_mini, fid, hps, mixtures\n"
        "from fastgen.core.errors import UserError\n"
        "pairs = (fid.load_inception, 'torch-fidelity'), (hps.load_hps, 'open_clip')\n"
        "for load, extra in pairs:\n"
        "    try:\n"
        "        load('x')\n"
        "    except UserError as error:\n"
        "        assert extra in str(error) and 'fastgen-distill[eval]' in str(error)\n"
        "print('fine')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


# -- fid
class Pooled(torch.nn.Module):
    """Stands for Inception: mean and spread of each channel."""

    def forward(self, x):
        x = x.double() / 255
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


def test_fid_takes_any_extractor_and_grows_with_noise():
    real = load_images("tinted", "heldout").images[:200]
    noise = torch.randint(0, 256, real.shape, generator=torch.Generator().manual_seed(0)).float()
    scores = []
    for share in (0.0, 0.3, 0.9):
        fake = ((1 - share) * real + share * noise).to(torch.uint8)
        features = fid.features(Pooled(), fake.split(64))
        scores.append(fid.compare(features, fid.features(Pooled(), real.split(64))))
    assert scores[0]["fid"] < 1e-6 < scores[1]["fid"] < scores[2]["fid"]
    assert scores[0]["kid"] < scores[1]["kid"] < scores[2]["kid"]
    grey = load_images("digits", "heldout").images[:8]
    assert fid.features(Pooled(), [grey]).shape == (8, 6)


def test_inception_refuses_pickles_and_wrong_files(tmp_path):
    pytest.importorskip("torch_fidelity")
    (tmp_path / "x.pth").write_bytes(b"nothing")
    torch.save({"a": Pooled()}, tmp_path / "pickle.pth")
    for name in ("x.pth", "pickle.pth"):
        with pytest.raises(UserError, match="cannot be read"):
            fid.load_inception(tmp_path / name)


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
    torch.save({"state_dict": model.state_dict()}, where / "tiny.pt")
    return "tiny-test", where / "tiny.pt"


def test_clip_score_is_the_mean_cosine(tiny):
    model, tokenizer = clip.load_model(*tiny)
    shown = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    prompts = ["a red dress", "a blue boot", "a bag"]
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (clip.MEAN, clip.STD))
    with torch.no_grad():
        pixels, words = model.encode_image((shown / 255 - mean) / std), model.encode_text(tokenizer(prompts))
    by_hand = torch.nn.functional.cosine_similarity(pixels, words)
    assert torch.allclose(clip.cosines(model, tokenizer, shown, prompts, batch_size=2), by_hand, atol=1e-5)
    score = clip.clip_score(model, tokenizer, shown, prompts)
    assert score == pytest.approx(100 * float(by_hand.mean()), abs=1e-3)
    assert hps.hps_score(model, tokenizer, shown, prompts) == pytest.approx(score, abs=1e-6)
    other = clip.clip_score(model, tokenizer, shown, prompts, prefix="A photo depicts ", pre_resize=32)
    assert other != pytest.approx(score, abs=1e-6)


def test_clip_refuses_a_checkpoint_of_another_network(tiny, tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt cannot be read"):
        clip.load_model(tiny[0], tmp_path / "other.pt")


def test_prepare_crops_the_middle():
    wide = torch.zeros(1, 1, 8, 16, dtype=torch.uint8)
    wide[..., 4:12] = 255
    assert clip.prepare(wide, 8).shape == (1, 3, 8, 8) and (clip.prepare(wide, 8) == 1).all()


def test_hps_by_style():
    found = hps.by_style(torch.tensor([1.0, 3.0, 10.0]), ["anime", "anime", "photo"])
    assert found == {"anime": 2.0, "photo": 10.0, "all": 6.0}
