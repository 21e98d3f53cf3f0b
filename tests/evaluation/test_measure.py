"""Measuring sets of images: the command line, sources, caches, statistics, and encoders with tiny
networks.
"""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.cli.evaluate import main
from fastgen.core.errors import UserError
from fastgen.data.bundled import load_images
from fastgen.evaluation.inputs import open_source
from fastgen.evaluation.prompts import prompts_of, read_prompts


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


def measured(capsys, *argv) -> dict:
    """What the command prints."""
    assert main([str(a) for a in argv]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys, *argv) -> str:
    """The one line that the command says of a mistake."""
    assert main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in "".join(lines)
    return lines[-1]


def test_folder_against_a_bundled_set(folder, tmp_path, capsys):
    argv = ["--images", folder, "--against", "digits", "--metrics", "fd_mini", "agreement_mini"]
    found = measured(capsys, *argv, "--prompts", tmp_path / "labels.txt")
    assert found["num_images"] == 20 and found["agreement_mini"] > 0.9 and 0 < found["fd_mini"] < 60
    assert "mmd_mini" not in found and "not comparable with an Inception FID" in found["note"]
    low, high = found["intervals"]["fd_mini"]
    assert low < found["fd_mini"] < high and found["encoders"]["mini"]["encoder"] == "digits_mini"
    assert "which agreement_mini needs" in refused(capsys, *argv)
    (tmp_path / "labels.txt").write_text("11\n")
    assert "--prompts: found '11'" in refused(capsys, *argv, "--prompts", tmp_path / "labels.txt")


def test_the_same_number_as_at_the_end_of_a_run(folder, tmp_path, capsys):
    from fastgen.evaluation.metrics.fd_mini import Measurer

    images = load_images("digits", "heldout").images[:20]
    in_run = Measurer("digits").compare(images.float() / 255, {})
    argv = ["--images", folder, "--against", "digits", "--metrics", "fd_mini", "mmd_mini", "recall_mini"]
    found = measured(capsys, *argv)
    assert found["fd_mini"] == pytest.approx(in_run["fd_mini"], rel=1e-4)
    assert found["mmd_mini"] == pytest.approx(in_run["mmd"], rel=1e-4)
    assert found["recall_mini"] == pytest.approx(in_run["recall"])


def test_two_folders(folder, capsys):
    argv = ["--images", folder, "--against", folder]
    assert "--extractor" in refused(capsys, *argv)
    names = ["fd_mini", "recall_mini", "kid_mini", "coverage_mini"]
    found = measured(capsys, *argv, "--extractor", "digits", "--metrics", *names)
    assert found["fd_mini"] == pytest.approx(0, abs=1e-4) and found["kid_mini"] == 0
    assert found["recall_mini"] == found["coverage_mini"] == 1


def test_images_that_cannot_be_used(folder, tmp_path, capsys):
    argv = ["--images", folder, "--against", "digits"]
    (folder / "broken.png").write_bytes(b"no image")
    assert "broken.png cannot be read" in refused(capsys, *argv)
    (folder / "broken.png").unlink()
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(folder / "odd.png")
    assert "odd.png is 8 x 9 pixels, others 8 x 8" in refused(capsys, *argv)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(capsys, "--images", tmp_path / "empty", "--against", "digits")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "empty" / "one.png")
    said = refused(capsys, "--images", tmp_path / "empty", "--against", "digits")
    assert "holds one image; give more: fd_mini needs 2 or more" in said
    argv = ["--images", "digits", "--against", tmp_path / "empty", "--extractor", "digits"]
    assert "--against" in (said := refused(capsys, *argv)) and "holds one image" in said


def test_what_is_converted_is_told(tmp_path, capsys):
    for i, mode in enumerate(("L", "RGBA", "RGB", "RGBA")):
        Image.new(mode, (8, 8)).save(tmp_path / f"{i}.png")
    source = open_source(str(tmp_path))
    images = source.all()
    assert images.shape == (4, 3, 8, 8) and (images[1] == 255).all(), "transparent pixels are white"
    said = capsys.readouterr().err
    assert "1 of 4 images are grey" in said and "2 of 4 images are with transparency" in said
    source.all()
    assert not capsys.readouterr().err, "once"


def test_few_samples_for_the_dimension_are_warned_of(folder, capsys):
    assert main(["--images", str(folder), "--against", "digits"]) == 0
    assert "fd_mini: 20 samples for 64 features" in capsys.readouterr().err


def test_metrics_that_cannot_be_had(folder, capsys):
    base = ["--images", folder, "--metrics"]
    assert "did you mean 'fd_mini'" in refused(capsys, *base, "fd_mni")
    assert "does not say on which encoder" in refused(capsys, *base, "fd")
    assert "looks through no encoder" in refused(capsys, *base, "psnr:mini")
    assert "--against: none given; give a folder" in refused(capsys, *base, "fd_mini")
    assert "no encoder 'dinov3'" in refused(capsys, *base, "vendi:dinov3")
    assert "give how many images follow" in refused(capsys, *base, "lpips_diversity")


# -- sources
def pictures(num: int = 6, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, size, size, 3), dtype=np.uint8)


def write_tar(path, images, first=0, suffix=".png"):
    """A webdataset shard with captions and classes."""
    with tarfile.open(path, "w") as archive:
        for i, image in enumerate(images, first):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            members = {
                suffix: buffer.getvalue(),
                ".txt": f"picture {i}".encode(),
                ".cls": str(i % 3).encode(),
            }
            for end, data in members.items():
                info = tarfile.TarInfo(f"{i:06d}{end}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def test_every_source_gives_the_same_images(tmp_path, capsys):
    from safetensors.torch import save_file

    images = pictures()
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=np.arange(6))
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    save_file({"images": planes}, tmp_path / "a.safetensors")
    write_tar(tmp_path / "shard-000.tar", images[:4])
    write_tar(tmp_path / "shard-001.tar", images[4:], 4)
    for name in ("folder", "a.npz", "a.safetensors", "shard-{000..001}.tar"):
        source = open_source(str(tmp_path / name))
        assert len(source) == 6 and torch.equal(source.all(), planes), name
        assert [len(b) for b in source.batches(4)] == [4, 2] and source.digest() == source.digest()
    archive = open_source(str(tmp_path / "shard-{000..001}.tar"))
    assert archive.captions[5] == "picture 5" and archive.labels == [0, 1, 2, 0, 1, 2]
    assert open_source(str(tmp_path / "a.npz")).labels == list(range(6))
    assert prompts_of(archive) == archive.captions
    argv = [
        "--images",
        tmp_path / "a.npz",
        "--against",
        tmp_path / "folder",
        "--metrics",
        "psnr",
        "saturation",
    ]
    found = measured(capsys, *argv)
    assert found["psnr"] == 100 and found["saturation"] > 0


def test_sources_that_are_none(tmp_path, capsys):
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((3, 8, 8, 3)))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", arr_0=np.array([{}], dtype=object))
    (tmp_path / "bad.tar").write_bytes(b"no archive")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    (tmp_path / "a.csv").write_text("")
    for name, said in (
        ("floats.npz", "holds float64 [3, 8, 8, 3]"),
        ("other.npz", "has x"),
        ("pickle.npz", "cannot be read"),
        ("bad.tar", "cannot be read"),
        ("no.tar", "does not exist"),
        ("bad.safetensors", "cannot be read"),
        ("a.csv", "is a .csv"),
        ("nowhere", "is not a folder"),
    ):
        assert said in refused(capsys, "--images", tmp_path / name, "--metrics", "contrast"), name
    write_tar(tmp_path / "cut.tar", pictures())
    for size in (2500, 3072):
        (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:size])
        assert "cut.tar" in refused(capsys, "--images", tmp_path / "cut.tar", "--metrics", "contrast")


def test_originals_must_pair(folder, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", arr_0=pictures(20))
    np.savez(tmp_path / "few.npz", arr_0=pictures(5))
    np.savez(tmp_path / "wide.npz", arr_0=pictures(20, 16))
    argv = ["--images", tmp_path / "a.npz", "--metrics", "psnr", "--against"]
    assert "5 originals for 20 images" in refused(capsys, *argv, tmp_path / "few.npz")
    assert "originals of 16 x 16 for images of 8 x 8" in refused(capsys, *argv, tmp_path / "wide.npz")


# -- statistics and caches
def test_statistics_files_give_the_same_distance(folder, tmp_path, capsys):
    file = tmp_path / "digits.npz"
    flags = ["--extractor", "digits"]
    assert main(["statistics", "--images", "digits", "--encoder", "mini", "--out", str(file), *flags]) == 0
    capsys.readouterr()
    direct = measured(capsys, "--images", folder, "--against", "digits")["fd_mini"]
    from_file = measured(capsys, "--images", folder, "--against", file, *flags)
    assert from_file["fd_mini"] == pytest.approx(direct, rel=1e-6)
    assert "statistics of digits.npz, sha256" in from_file["reference"]
    said = refused(capsys, "--images", folder, "--against", file, *flags, "--metrics", "kid_mini")
    assert "statistics alone; give a folder" in said
    Image.new("L", (32, 32)).save(folder / "000.png")
    images = tmp_path / "fashion.npz"
    np.savez(images, arr_0=load_images("fashion", "heldout").images[:5].permute(0, 2, 3, 1).numpy())
    said = refused(capsys, "--images", images, "--against", file, "--extractor", "fashion")
    assert "was made with digits_mini" in said and "not fashion_mini" in said


def test_statistics_of_others_are_told_and_checked(folder, tmp_path, capsys):
    flags = ["--images", folder, "--extractor", "digits", "--against"]
    for name, arrays, said in (
        ("edm.npz", {"mu": np.zeros(64), "sigma": np.eye(64)}, ""),
        ("adm.npz", {"mu": np.zeros(64), "sigma": np.eye(64), "mu_s": 0, "sigma_s": 0}, ""),
        (
            "wide.npz",
            {"mu": np.zeros(9), "sigma": np.eye(9)},
            "statistics of 9 features for an encoder of 64",
        ),
        ("odd.npz", {"mu": np.zeros(64), "sigma": np.eye(9)}, "finite mu [d] and sigma [d, d]"),
        ("nan.npz", {"mu": np.full(64, np.nan), "sigma": np.eye(64)}, "finite mu [d]"),
    ):
        np.savez(tmp_path / name, **arrays)
        if said:
            assert said in refused(capsys, *flags, tmp_path / name)
            continue
        assert main([str(a) for a in (*flags, tmp_path / name)]) == 0
        assert "does not say its encoder; taken for digits_mini" in capsys.readouterr().err


def test_a_cache_is_used_and_never_taken_for_another(folder, tmp_path, capsys, monkeypatch):
    from fastgen.evaluation.encoders import base

    cache = tmp_path / "cache"
    argv = ["--images", folder, "--against", "digits", "--cache", cache]
    first = measured(capsys, *argv)
    files = sorted(cache.iterdir())
    assert len(files) == 2

    def never(self, images):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(base.Encoder, "__call__", never)
        assert measured(capsys, *argv)["fd_mini"] == pytest.approx(first["fd_mini"], rel=1e-9)
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(folder / "000.png")
    assert measured(capsys, *argv)["fd_mini"] != first["fd_mini"] and len(list(cache.iterdir())) == 3
    foreign = sorted(set(cache.iterdir()) - set(files))[0]
    from safetensors.torch import load_file, save_file

    held = load_file(foreign)
    save_file(held, foreign, {"fastgen_features": json.dumps({"key": "0", "encoder": "dinov2"})})
    assert "was made with another encoder (dinov2)" in refused(capsys, *argv)
    foreign.write_bytes(b"cut")
    assert "cannot be read" in refused(capsys, *argv)


class Blind(torch.nn.Module):
    """Features of a user's own: means of the channels, NaN for a black image."""

    def forward(self, images):
        means = images.float().mean((2, 3))
        return torch.where(means.sum(1, keepdim=True) > 0, means, torch.nan)


class Judge(torch.nn.Module):
    """A user's classifier that finds the brightest channel."""

    def forward(self, images):
        means = images.float().mean((2, 3))
        return {"features": means, "logits": means}


def test_encoders_and_classifiers_of_the_users_own(tmp_path, capsys):
    images = pictures(30)
    images[..., 1] |= 128
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=np.ones(30, int))
    weights = [f"{n}={__name__}:{n.title()}" for n in ("blind", "judge")]
    argv = [
        "--images",
        tmp_path / "a.npz",
        "--against",
        tmp_path / "a.npz",
        "--weights",
        *weights,
        "--metrics",
    ]
    found = measured(capsys, *argv, "fd:blind", "agreement:judge")
    assert found["fd:blind"] == pytest.approx(0, abs=1e-6) and found["agreement:judge"] == 1
    assert "agreement:blind: the encoder has no logits" in refused(capsys, *argv, "agreement:blind")
    images[17] = 0
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=np.ones(30, int))
    said = refused(capsys, *argv, "fd:blind")
    assert "features of blind are not finite for 1 images, the first image 17 of" in said
    wrong = ["--weights", f"blind={__name__}:pictures", "--metrics", "fd:blind"]
    assert "returned ndarray" in refused(capsys, *argv[:4], *wrong)
    assert "cannot be called" in refused(capsys, *argv[:4], "--weights", "blind=no.where:x", *wrong[2:])


# -- prompts
def test_pictures_and_prompts_are_paired_in_natural_order(tmp_path, capsys):
    held = load_images("digits", "heldout")
    for i in range(12):
        Image.fromarray(held.images[i, 0].numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "p.txt").write_text("\ufeff" + "".join(f"{int(k)}\r\n" for k in held.labels[:12]), "utf-8")
    argv = ["--images", tmp_path, "--against", "digits", "--metrics", "agreement_mini"]
    assert measured(capsys, *argv, "--prompts", tmp_path / "p.txt")["agreement_mini"] > 0.9


def test_counts_of_pictures_and_prompts(tmp_path, capsys):
    file = tmp_path / "p.txt"

    def read(text, drawn=False):
        file.write_text(text)
        return read_prompts(file, 6, drawn)

    assert read("a\n\nb\nc\nd\n\n") == ["a", "", "b", "c", "d", ""], "blank lines keep their places"
    assert read("a\n\nb\nc\nd\ne\n\n\n") == ["a", "", "b", "c", "d", "e"]
    assert read("a\n\nb\nc\n\nd\ne\nf\n") == list("abcdef")
    assert capsys.readouterr().err == ""
    assert read("a\nb\nc\n") == list("abcabc") and "repeated in order" in capsys.readouterr().err
    for text, wanted in (("a\nb\nc\nd\n", "4 lines in"), ("a\n" * 7, "7 lines in"), ("\n", "is empty")):
        with pytest.raises(UserError, match=wanted):
            read(text)
    assert read("a\nb\nc\nd\n", drawn=True) == list("abcdab")
    file.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="--prompts: .*p.txt line 1: byte 4"):
        read_prompts(file, 6)


def test_samples_of_sample_py_know_their_prompts(folder):
    entries = [{"file": f"{i:03d}.png", "seed": i, "condition": f"a {i}"} for i in range(20)]
    (folder / "samples.json").write_text(json.dumps({"images": entries}))
    assert prompts_of(open_source(str(folder))) == [f"a {i}" for i in range(20)]
    (folder / "samples.json").write_text(json.dumps({"images": entries[:5]}))
    assert prompts_of(open_source(str(folder))) is None, "of other files"


def test_weights_are_local_files_named_when_missing(folder, tmp_path, capsys):
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    for argv, said in (
        (["--metrics", "fid", "--against", "digits"], "weights-inception-2015-12-05-6726825d.pth"),
        (["--metrics", "hps", "--weights", "hps=/nowhere.pt"], "HPS_v2.1_compressed.pt"),
        (["--metrics", "clip", "--clip", "best"], "vit-g-14, dmd2"),
        (["--metrics", "clip", "--weights", f"clip={tmp_path}/no.pt"], "checkpoint of ViT-g-14"),
        (["--metrics", "fd:dinov2", "--against", "digits"], "--weights dinov2=PATH of a transformers Dinov2"),
        (["--metrics", "clip", "--weights", "lips=x"], "found 'lips=x'"),
    ):
        assert said in refused(capsys, "--images", folder, "--prompts", tmp_path / "labels.txt", *argv)


def test_metrics_import_without_their_extras():
    code = (
        "import sys\n"
        "for name in ('torchmetrics', 'torch_fidelity', 'open_clip', 'torchvision', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "import fastgen.cli.evaluate, fastgen.evaluation.registry\n"
        "from pathlib import Path\n"
        "from fastgen.evaluation.encoders import inception, text_image\n"
        "from fastgen.evaluation.metrics import lpips\n"
        "from fastgen.core.errors import UserError\n"
        "pairs = (\n"
        "    (lambda: inception.load(Path('x')), 'torch-fidelity'),\n"
        "    (lambda: text_image.load_open_clip('hps', Path('x'), 'ViT-H-14'), 'open_clip'),\n"
        "    (lambda: lpips.load(Path('x')), 'torchmetrics and torchvision'),\n"
        ")\n"
        "for load, extra in pairs:\n"
        "    try:\n"
        "        load()\n"
        "    except UserError as error:\n"
        "        assert extra in str(error) and 'fastgen-distill[eval]' in str(error)\n"
        "print('fine')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr
