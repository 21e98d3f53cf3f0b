"""Splats in a page: the file read by its layout, the surface of a field, and what a browser shows of them."""

import base64
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.evaluation.report import write_report
from fastgen.export.viewer import viewer_page
from fastgen.threed.cameras import Cameras, turntable
from fastgen.threed.fields import FieldAsset
from fastgen.threed.gaussians import SH, GaussianAsset
from fastgen.threed.splats import splat_bytes, splats_of
from tests.support.browser import CHROMIUM, WIDER, browser

SIDE = 240


def cloud():
    """Anisotropic, coloured, half transparent; as .splat files keep it, in bytes."""
    draw = torch.Generator().manual_seed(1)
    one = GaussianAsset(200, seed=1).requires_grad_(False)
    one.put("logits", torch.randn(200, generator=draw) + 1)
    one.put("log_scales", 0.6 * torch.randn(200, 3, generator=draw) - 2.4)
    one.put("sh", torch.randn(200, 1, 3, generator=draw).clamp(-1.5, 1.5))
    return one


def test_a_splat_file_is_read_by_its_layout():
    one = cloud()
    data = splat_bytes(one)
    assert len(data) == 32 * one.num
    rows = struct.iter_unpack("<6f8B", data)
    means, scales = one.value("means"), one.value("log_scales").exp()
    weight = scales.prod(1) * one.value("logits").sigmoid()
    order = weight.argsort(descending=True).tolist()
    for row, i in zip(rows, order):
        assert row[:3] == pytest.approx(means[i].tolist()) and row[3:6] == pytest.approx(scales[i].tolist())
        rgb = (255 * (SH * one.value("sh")[i, 0] + 0.5)).clamp(0, 255).tolist()
        assert row[6:9] == pytest.approx(rgb, abs=0.51)
        assert row[9] == pytest.approx(255 * float(one.value("logits")[i].sigmoid()), abs=0.51)
        q = torch.nn.functional.normalize(one.value("quaternions")[i], dim=-1)
        assert row[10:] == pytest.approx((128 * (q + 1)).clamp(0, 255).tolist(), abs=0.51)


@pytest.mark.parametrize("density,surface", [(1.0, False), (6.0, False), (40.0, False), (0.0, True)])
def test_the_splats_of_a_field_look_like_it(density, surface):
    """A red ball in fog, thin, dense and as a surface; one that is twice as opaque would not do in fog."""
    field = FieldAsset("grid", 16, surface=surface, samples=96).requires_grad_(False)
    if not surface:
        field.at = lambda p: (density * ((0.5 - p.norm(dim=-1)) * 20).sigmoid(), red.expand_as(p))
    field.field.table.zero_()
    field.field.table[:, 1] = 0.25
    red = torch.tensor([1.0, 0.5, 0.5]).sigmoid() if surface else torch.tensor([0.9, 0.2, 0.1])
    splats, cameras, grey = splats_of(field), turntable(1), torch.full((1, 3), 0.5)
    wanted = field.render(cameras, 48, grey)
    found = splats.render(cameras, 48, grey)
    centre = lambda image: float(image[0, 0, 24, 24])  # noqa: E731
    assert (found.alpha - wanted.alpha).abs().mean() < 0.035, "soft at the edges"
    assert abs(centre(found.alpha) - centre(wanted.alpha)) < 0.06
    assert (found.rgb - wanted.rgb)[0, :, 24, 24].abs().max() < 0.03
    if density == 1.0:
        splats.put("logits", (2 * splats.value("logits").sigmoid()).logit())
        assert centre(splats.render(cameras, 48, grey).alpha) - centre(wanted.alpha) > 0.15


def test_what_nobody_sees_is_left_out():
    field = FieldAsset("grid", 8, surface=True).requires_grad_(False)
    field.field.table.zero_()
    radius = splats_of(field).value("means").norm(dim=-1)
    assert radius.min() > 0.25 and radius.max() < 0.7 and len(radius) > 500
    field.field.table[:, 0] = 10.0
    empty = splats_of(field)
    assert empty.num == 1 and empty.value("logits").sigmoid().max() < 1e-6


def shot(page):
    """The pixels of the canvas, [H, W, 3] in [0, 1], once they are drawn."""
    page.wait_for_timeout(300)
    data = base64.b64decode(page.locator("canvas").evaluate("c => c.toDataURL()").split(",")[1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float) / 255


def look(page, name):
    """Keep a screenshot where they are wanted."""
    if folder := os.environ.get("FASTGEN_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def rendered(asset, azimuth, elevation, side):
    camera = Cameras.of(torch.tensor([[azimuth, elevation, 2.2, 47.5]]))
    with torch.no_grad():
        return asset.render(camera, side, torch.full((1, 3), 0.5)).rgb[0].permute(1, 2, 0).numpy()


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_a_browser_shows_what_our_renderer_does(tmp_path):
    """From the front and after a drag of 40 pixels, which turns by 20 degrees; and it asks nobody."""
    one, other = cloud(), cloud()
    other.put("sh", -one.value("sh"))
    (tmp_path / "v.html").write_text(viewer_page("two <b>", {"a": splat_bytes(one), "b": splat_bytes(other)}))
    with browser() as open_page:
        page, problems = open_page((tmp_path / "v.html").as_uri(), 600, 800)
        page.locator("canvas").evaluate("(c, side) => { c.width = c.height = side; }", SIDE)
        page.get_by_role("button", name="b").click()
        assert np.abs(shot(page) - rendered(other, 0, 15, SIDE)).mean() < 0.01
        page.get_by_role("button", name="a").click()
        front = rendered(one, 0, 15, SIDE)
        assert np.abs(shot(page) - front).mean() < 0.01 and front.std() > 0.05
        at = page.locator("canvas").bounding_box()
        page.mouse.move(at["x"] + 100, at["y"] + 100)
        page.mouse.down()
        page.mouse.move(at["x"] + 140, at["y"] + 100)
        page.mouse.up()
        turned = rendered(one, -20, 15, SIDE)
        assert np.abs(shot(page) - turned).mean() < 0.01 < np.abs(turned - front).mean()
        page.locator("canvas").press("ArrowUp")
        assert np.abs(shot(page) - rendered(one, -20, 21, SIDE)).mean() < 0.01
        look(page, "viewer")
        assert problems == [] and page.title() == "two <b>"


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_the_report_of_a_run_has_one(tmp_path):
    export = tmp_path / "export"
    export.mkdir()
    (export / "asset.json").write_text("{}")
    assert 'class="viewer"' not in write_report(tmp_path).read_text()
    (export / "asset_a_red_torus.splat").write_bytes(splat_bytes(cloud()))
    target = write_report(tmp_path)
    with browser() as open_page:
        page, problems = open_page(target.as_uri(), 400, 800)
        assert page.get_by_role("button", name="a red torus").get_attribute("aria-pressed") == "true"
        assert page.evaluate(WIDER) == [] and shot(page).std() > 0.03
        look(page, "viewer-report")
        assert problems == []
