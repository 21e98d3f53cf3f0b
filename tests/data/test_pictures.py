"""Pictures are read as a viewer shows them; files that are none are named, never opened or traced back."""

import os
import random
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from fastgen.core.errors import UserError
from fastgen.data.clips import read_clip
from fastgen.data.media import read_folder, read_image
from fastgen.data.pictures import BACKGROUND, MAX_PIXELS

GREY, COLOUR = (1, 16, 16), (3, 16, 16)


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation(tmp_path, turn):
    """Of all eight, the stored picture is the one a viewer turns back to an upright one."""
    upright = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    back = [None, *(None, 0, 3, 1, 5, 2, 6, 4)]  # the transposition that stores it, by EXIF's number
    stored = upright if back[turn] is None else upright.transpose(Image.Transpose(back[turn]))
    exif = Image.Exif()
    exif[0x0112] = turn
    stored.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "a.png", GREY)[0], torch.from_numpy(np.array(upright)))


def test_sixteen_bits_are_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 256).reshape(16, 16)
    wanted = torch.arange(256).reshape(16, 16)
    for name, array in (("a.png", ramp.astype(np.uint16)), ("b.tif", ramp.astype(np.uint16))):
        Image.fromarray(array).save(tmp_path / name)
        assert torch.equal(read_image(tmp_path / name, GREY)[0].long(), wanted)
        assert torch.equal(read_image(tmp_path / name, COLOUR)[2].long(), wanted)
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "unit.tif")
    assert torch.equal(read_image(tmp_path / "unit.tif", GREY)[0].long(), wanted)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "wide.tif")
    with pytest.raises(OSError, match="white is not known"):
        read_image(tmp_path / "wide.tif", GREY)


def test_transparency_shows_the_background(tmp_path):
    """Half red under alpha 0, 128 and 255; a palette and a level that stand for clear; both sizes of mode."""
    for alpha, wanted in ((0, BACKGROUND), (128, (255, 127, 127)), (255, (255, 0, 0))):
        Image.new("RGBA", (16, 16), (255, 0, 0, alpha)).save(tmp_path / "a.png")
        assert read_image(tmp_path / "a.png", COLOUR)[:, 3, 3].tolist() == list(wanted)
    Image.new("LA", (16, 16), (0, 0)).save(tmp_path / "la.png")
    Image.new("P", (16, 16), 0).save(tmp_path / "p.png", transparency=0)
    Image.new("L", (16, 16), 7).save(tmp_path / "l.png", transparency=7)
    deep = Image.fromarray(np.full((16, 16), 700, np.uint16))
    deep.save(tmp_path / "deep.png", transparency=700)
    for name in ("la", "p", "l", "deep"):
        assert (read_image(tmp_path / f"{name}.png", COLOUR) == 255).all(), name
        assert (read_image(tmp_path / f"{name}.png", GREY) == 255).all(), name


@pytest.mark.parametrize(
    "suffix", ["bmp", "tif", "TIFF", "avif", "webp", "gif", "jp2", "tga", "ppm", "PNG", "JPG"]
)
def test_formats(tmp_path, suffix):
    Image.init()
    if f".{suffix.lower()}" not in Image.registered_extensions():
        pytest.skip("this Pillow has no such format")
    Image.new("RGB", (20, 24), (200, 100, 10)).save(tmp_path / f"a.{suffix}")
    found, _ = read_folder(tmp_path, COLOUR, "error")
    assert torch.allclose(found[0, :, 8, 8].float(), torch.tensor([200.0, 100, 10]), atol=3)


def test_colours_of_other_modes(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "c.tif")
    assert read_image(tmp_path / "c.tif", COLOUR)[:, 0, 0].tolist() == [255, 0, 0]
    Image.new("1", (16, 16), 1).save(tmp_path / "one.png")
    assert (read_image(tmp_path / "one.png", GREY) == 255).all()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ"))
    Image.new("RGB", (16, 16), (90, 90, 90)).save(tmp_path / "x.png", icc_profile=lab.tobytes())
    Image.new("RGB", (16, 16), (90, 90, 90)).save(tmp_path / "junk.png", icc_profile=b"no profile")
    assert read_image(tmp_path / "junk.png", COLOUR)[:, 0, 0].tolist() == [90, 90, 90]
    assert read_image(tmp_path / "x.png", COLOUR).shape == COLOUR


def png(width: int, height: int, raw: bytes, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", raw) + chunk(b"IEND", b"")


def odd_files(folder) -> dict[str, str]:
    """Files that are no good, with a word of the reason."""
    good = png(16, 16, zlib.compress(b"\0" * 17 * 16))
    (folder / "bomb.png").write_bytes(png(30_000, 30_000, zlib.compress(b"\0" * 1000)))
    (folder / "large.png").write_bytes(png(MAX_PIXELS, 2, zlib.compress(b"\0" * 1000)))
    (folder / "cut.png").write_bytes(good[:45])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.gif").write_text("no picture")
    (folder / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (folder / "script.png").write_bytes((folder / "script.eps").read_bytes())
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2 * 2**20, zip=True)
    Image.new("L", (16, 16)).save(folder / "chunk.png", pnginfo=info)
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe.txt")
    os.symlink("nowhere", folder / "link.png")
    os.symlink("/dev/zero", folder / "device.png")
    return {
        "bomb.png": "pixels",
        "large.png": "pixels",
        "cut.png": "trunc",
        "empty.jpg": "not a picture",
        "text.gif": "not a picture",
        "script.png": "not a picture",
        "chunk.png": "too large",
        "pipe.png": "a pipe",
        "link.png": "does not exist",
        "device.png": "a device",
    }


def test_odd_files_are_named_and_cost_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastgen.data.media.some", lambda names, most=99: ", ".join(names))
    Image.new("L", (16, 16), 9).save(tmp_path / "good.png")
    wanted = odd_files(tmp_path)
    start = time.process_time()
    found, _ = read_folder(tmp_path, GREY, "skip")
    assert len(found) == 1 and time.process_time() - start < 5
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"1 images; {len(wanted) + 1} skipped" in line and "files of other kinds left out (.eps)" in line
    for name, reason in wanted.items():
        assert reason in line.split(f"{name} (")[1].split(")")[0].lower(), (name, line)
    with pytest.raises(UserError, match="11 unreadable"):
        read_folder(tmp_path, GREY, "error")


def test_hidden_files_are_no_part_of_a_set(tmp_path, capsys):
    for name in ("a.png", ".b.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/._a.png", "._a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (16, 16)).save(tmp_path / name)
    assert len(read_folder(tmp_path, GREY, "error")[0]) == 1
    assert capsys.readouterr().out == "data: 1 images\n"


def test_natural_order_and_strange_names(tmp_path, capsys):
    for name, shade in (("10.png", 100), ("9.png", 90), ("1.png", 10), ("a\nb\x1b.png", 200)):
        Image.new("L", (16, 16), shade).save(tmp_path / name)
    (tmp_path / "bad\n\x1b[31m.png").write_bytes(b"")
    found, _ = read_folder(tmp_path, GREY, "skip")
    assert found[:, 0, 0, 0].tolist() == [10, 90, 100, 200]
    message = capsys.readouterr().out
    assert "bad\\n\\x1b[31m.png" in message and "\x1b" not in message


def test_a_long_strip_is_not_blown_up(tmp_path):
    Image.new("L", (1, 60_000), 70).save(tmp_path / "strip.png")
    start = time.process_time()
    assert (read_image(tmp_path / "strip.png", (1, 64, 64)) == 70).all()
    assert time.process_time() - start < 5


def test_a_progressive_jpeg_of_very_many_scans(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64), (200, 0, 0)).save(tmp_path / "a.jpg", progressive=True)
    assert read_image(tmp_path / "a.jpg", COLOUR)[0, 0, 0] > 190
    monkeypatch.setattr("fastgen.data.pictures.MAX_SCAN_PIXELS", 64 * 64)
    with pytest.raises(OSError, match="progressive JPEG of"):
        read_image(tmp_path / "a.jpg", COLOUR)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (16, 16), (90 * i, 0, 0)) for i in range(3)]
    for suffix in ("gif", "webp", "png", "tif"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
        assert read_image(tmp_path / f"a.{suffix}", COLOUR)[0, 0, 0] < 4
    with pytest.raises(OSError, match="3 frames of the 4 needed"):
        read_clip(tmp_path / "a.gif", (3, 4, 16, 16))


def test_damaged_bytes_never_trace_back(tmp_path):
    """Every format with bytes changed or cut: a picture, or an OSError of one line."""
    draw = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "jpg", "webp", "tif", "gif", "bmp", "tga", "ppm", "ico"):
        file = tmp_path / f"a.{suffix}"
        more = {"exif": exif} if suffix in ("png", "jpg", "webp", "tif") else {}
        Image.effect_noise((24, 24), 90).convert("RGB").save(file, **more)
        whole = file.read_bytes()
        for _ in range(40):
            data = bytearray(whole)
            for _ in range(draw.randint(1, 8)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            file.write_bytes(bytes(data[: draw.choice((len(data), draw.randrange(len(data))))]))
            try:
                assert read_image(file, COLOUR).shape == COLOUR
            except OSError as error:
                assert len(str(error)) <= 120 and "\n" not in str(error)
