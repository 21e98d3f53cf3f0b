"""Light and material taken apart: closed forms of the blended loss, shading, an exact scene, its files."""

import json
import math

import pytest
import torch

from fastgen.cli import relight as command
from fastgen.threed import radiance_distillation as rd
from fastgen.threed import relight
from fastgen.threed.cameras import Ranges, random_cameras, turntable
from fastgen.threed.files import read_ply, write_ply
from fastgen.threed.gaussians import GaussianAsset
from fastgen.threed.relight_scores import psnr, scales
from fastgen.threed.shading import BASE, Light, hdr, shade, specular, uniform, unit
from fastgen.threed.still_life import photograph
from tests.support.heavier import some_of

MU = 0.005
BALANCES = [(0.2, 0.25), (0.1, 0.5), (0.02, 1.0)]


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gradients_of_the_blended_loss():
    """2 a (I - y) in S, 2 <I - y, S - T> - mu / a in a, none in T."""
    S, T, y = (drawn(50, 3, seed=i).requires_grad_(i < 2) for i in range(3))
    logit = (4 * drawn(50, seed=4) - 2).requires_grad_()
    rd.blended(S, T, y, logit, MU).sum().backward()
    a = logit.detach().sigmoid()
    error = a[:, None] * S + (1 - a)[:, None] * T - y
    torch.testing.assert_close(S.grad, (2 * a[:, None] * error).detach(), rtol=0, atol=1e-10)
    of_a = 2 * (error * (S - T)).sum(1) - MU / a
    torch.testing.assert_close(logit.grad, (of_a * a * (1 - a)).detach(), rtol=0, atol=1e-10)
    assert T.grad is None


@pytest.mark.parametrize("logit,share", [(40.0, 1.0), (-40.0, 0.0)])
def test_the_ends_are_plain_fitting_and_none(logit, share):
    S, T, y = (drawn(9, 3, seed=i) for i in range(3))
    S.requires_grad_()
    rd.blended(S, T, y, torch.full((9,), logit).double(), MU).sum().backward()
    torch.testing.assert_close(S.grad, share * 2 * (S - y).detach(), rtol=0, atol=1e-10)


def test_images_alone_only_lower_the_progress():
    """With T = y its derivative is 2 a |S - y|^2; a reward turns it where S is right."""
    S, y = drawn(200, 3), drawn(200, 3, seed=1)

    def slopes(reward, S):
        logit = torch.zeros(200, dtype=torch.float64, requires_grad=True)
        rd.blended(S, y, y, logit, reward).sum().backward()
        return logit.grad

    assert (slopes(0.0, S) > 0).all()
    assert (slopes(MU, S) > 0).any() and (slopes(MU, y + 1e-3) < 0).all()


@pytest.mark.parametrize("gap,wanted", some_of(BALANCES, BALANCES[::2]))
def test_the_progress_balances_where_it_should(gap, wanted):
    """min(1, sqrt(mu / 2) / |S - y|), approached from the start of a run."""
    y = torch.full((1, 3), 0.4, dtype=torch.float64)
    S = y + torch.tensor([[gap, 0, 0]])
    logit = torch.full((1,), rd.START, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logit], 0.1)
    for _ in range(600):
        adam.zero_grad()
        rd.blended(S, y, y, logit, MU).sum().backward()
        adam.step()
    assert float(logit.sigmoid().detach()) == pytest.approx(wanted, abs=2e-3 if wanted < 1 else 0.02)


def four_materials(reward=None):
    """Albedos found of four from 4,000 pixels of which a tenth has a highlight that no albedo explains, and
    the progress on clean pixels and on highlights; plain fitting for None.
    """
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(4, (4000,), generator=generator)
    facing = 0.2 + 0.8 * torch.rand(4000, generator=generator)
    shiny = torch.rand(4000, generator=generator) < 0.1
    y = torch.tensor([0.2, 0.4, 0.6, 0.8])[which] * facing + 0.5 * shiny
    albedo = torch.full((4,), 0.5, requires_grad=True)
    logit = torch.full((4000,), rd.START, requires_grad=True)
    adam = torch.optim.Adam([{"params": [albedo]}, {"params": [logit], "lr": 0.03}], 0.015)
    for _ in range(500):
        S = (albedo[which] * facing)[:, None]
        each = (
            (S - y[:, None]).square()
            if reward is None
            else rd.blended(S, y[:, None], y[:, None], logit, reward)
        )
        adam.zero_grad()
        each.mean().backward()
        adam.step()
    a = logit.detach().sigmoid()
    return albedo.detach(), float(a[~shiny].min()), float(a[shiny].mean())


def test_highlights_do_not_reach_the_albedo():
    wanted = torch.tensor([0.2, 0.4, 0.6, 0.8])
    plain, _, _ = four_materials()
    assert (plain - wanted)[0] > 0.1 * wanted[0], plain
    found, clean, shiny = four_materials(MU)
    assert ((found - wanted).abs() < 0.02 * wanted).all(), found
    assert clean > 0.9 and shiny == pytest.approx(0.1, abs=0.02)
    _, clean, shiny = four_materials(0.0)
    assert clean < 0.05 and shiny < 0.05, "negative: without a reward the splat keeps the image"


def test_a_matt_surface_in_even_light_has_its_albedo():
    """And what it mirrors is little, at every roughness."""
    light, normal = uniform(32, 64), unit(drawn(40, 3) - 0.5).float()
    view = unit(normal + 0.5 * (drawn(40, 3, seed=1) - 0.5).float())
    albedo = drawn(40, 3, seed=2).float()
    assert light.solid_angles.sum() == pytest.approx(4 * math.pi, rel=1e-5)
    for roughness in (0.3, 0.6, 1.0):
        whole = shade(normal, view, albedo, torch.full((40,), roughness), light)
        mirrored = shade(normal, view, 0 * albedo, torch.full((40,), roughness), light)
        torch.testing.assert_close(whole - mirrored, albedo, rtol=0.01, atol=0.01)
        assert (mirrored > 0.005).all() and (mirrored < 0.1).all()


@pytest.mark.parametrize("roughness", [0.3, 0.7])
def test_the_highlight_straight_ahead(roughness):
    """n = l = v: D = 1 / (pi roughness^4), F = 0.04, G = 1; and none from behind."""
    one = torch.ones(1)
    found = specular(one, one, one, torch.tensor(roughness))
    assert float(found) == pytest.approx(BASE / (4 * math.pi * roughness**4), rel=1e-4)
    normal, view = torch.tensor([[0.0, 0, 1]]), torch.tensor([[0.0, 0, 1]])
    below = uniform()
    below.radiance[:4] = 0
    assert float(shade(normal, view, torch.ones(1, 3), one, below).abs().max()) < 1e-6


def test_a_turned_light_is_a_turned_scene():
    light = relight.LIGHTS["evening"]
    angle = 4 * 2 * math.pi / 16
    R = torch.tensor(
        [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1.0]]
    )
    normal, view = unit(drawn(20, 3).float() - 0.5), unit(drawn(20, 3, seed=1).float() - 0.5)
    args = torch.full((20, 3), 0.5), torch.full((20,), 0.5)
    turned = shade(normal @ R.T, view @ R.T, *args, light.turned(4))
    torch.testing.assert_close(turned, shade(normal, view, *args, light), rtol=1e-4, atol=1e-5)
    assert (shade(normal, view, *args, light.turned(4)) - turned).abs().max() > 0.01


def test_light_as_a_picture_for_other_programs():
    light = Light(torch.tensor([[[0.5, 1.0, 2.0], [0.0, 0.0, 0.0]], [[30.0, 0.01, 7.0], [1e-3, 2e-3, 5e-4]]]))
    raw = hdr(light)
    head, _, data = raw.partition(b"-Y 2 +X 2\n")
    assert head.startswith(b"#?RADIANCE\n") and len(data) == 16
    for pixel, wanted in zip((data[i : i + 4] for i in range(0, 16, 4)), light.radiance.view(-1, 3)):
        got = [m * 2.0 ** (pixel[3] - 136) if pixel[3] else 0.0 for m in pixel[:3]]
        assert all(abs(g - w) <= float(wanted.max()) / 128 for g, w in zip(got, wanted.tolist()))


def ball(num=150):
    """A splat of a ball: flat Gaussians all over it."""
    asset = GaussianAsset(num, 2)
    where = relight._sphere(num)
    asset.put("means", 0.6 * where)
    asset.put("log_scales", torch.tensor([0.1, 0.1, 0.1]).log().expand(num, 3))
    asset.put("logits", torch.full((num,), 4.0))
    return asset.eval().requires_grad_(False), where


def test_normals_of_the_depth_of_a_ball():
    cameras = turntable(3, 20.0)
    origins, rays = cameras.rays(48, 48)
    middle = (origins * rays).sum(-1)
    inside = middle**2 - origins.square().sum(-1) + 0.36
    along = -middle - inside.clamp(min=0).sqrt()
    ahead = -cameras.c2w[:, None, None, :3, 2]
    depth = along * (rays * ahead).sum(-1)
    covered = inside > 0.02
    found = rd.depth_normals(cameras, depth, covered)
    known = found.norm(dim=-1) > 0.5
    wanted = (origins + along[..., None] * rays) / 0.6
    assert known.float().sum() > 0.7 * covered.float().sum()
    assert ((found * wanted).sum(-1)[known]).min() > 0.95


def test_blending_is_what_the_renderer_does():
    asset, _ = ball(60)
    cameras = turntable(2, 10.0)
    weights, alpha, depth = rd.blending(asset, cameras, 24)
    render = asset.render(cameras, 24, torch.full((2, 3), 0.3))
    own = torch.einsum("bhwn,bnc->bchw", weights, asset.colours(cameras)) + 0.3 * (1 - alpha[:, None])
    torch.testing.assert_close(own, render.rgb, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(depth, render.depth[:, 0], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def exact():
    """(splat, truth, found, progress of its pixels, pixels): a ball shaded by the model itself."""
    asset, where = ball()
    truth = rd.Materials(where, relight.LIGHTS["studio"]).requires_grad_(False)
    truth.albedo_logits.copy_(
        torch.where(where[:, 2:] > 0, torch.tensor([1.5, -1.5, -2.0]), torch.tensor([-1.5]))
    )
    truth.roughness_logits.fill_(-1.0)
    cameras = random_cameras(10, Ranges(elevation=(-60.0, 60.0)), torch.Generator().manual_seed(0))
    own = rd.renders_of(asset, cameras, 24)
    own.rgb.copy_(relight.relit(asset, truth, cameras, 24, truth.light, 0.0))
    pixels = rd.look(asset, own)
    pixels.teacher.copy_(pixels.photo)
    found, progress = rd.distil(asset, pixels, rd.Settings(steps=250, pixels=800, lr=0.03, progress_lr=0.2))
    return asset, truth, found, progress, pixels


def test_an_exact_scene_is_taken_apart(exact):
    """Albedo up to a scale, progress near 1, the right image under another light; not so at the start."""
    asset, truth, found, progress, pixels = exact
    scale = scales(found.albedo, truth.albedo)
    assert (found.albedo * scale - truth.albedo).square().mean().sqrt() < 0.08
    assert progress.mean() > 0.8
    cameras = turntable(3, 10.0)
    wanted = relight.relit(asset, truth, cameras, 24, relight.LIGHTS["evening"])
    begin = rd.Materials(rd.first_normals(asset, pixels), uniform())
    before, after = (
        psnr(relight.relit(asset, one, cameras, 24, relight.LIGHTS["evening"]), wanted)
        for one in (begin, found)
    )
    assert after > 24 and after > before + 4, (before, after)


def test_files_are_read_by_another_program(exact, tmp_path):
    trimesh = pytest.importorskip("trimesh")
    asset, _, found, progress, pixels = exact
    each = relight.of_gaussians(pixels, progress)
    relight.write_materials(asset, found, each, tmp_path / "materials.ply")
    cloud = trimesh.load(tmp_path / "materials.ply")
    torch.testing.assert_close(torch.tensor(cloud.vertices).float(), asset.value("means"))
    raw = cloud.metadata["_ply_raw"]["vertex"]["data"]
    row = lambda *names: torch.stack([torch.tensor(raw[n].astype("f4")) for n in names], -1)  # noqa: E731
    torch.testing.assert_close(row("roughness")[:, 0], found.roughness)
    torch.testing.assert_close(row("progress")[:, 0], each)
    torch.testing.assert_close(row("nx", "ny", "nz"), unit(found.normal))
    albedo = 0.5 + 0.28209479 * row("f_dc_0", "f_dc_1", "f_dc_2")
    torch.testing.assert_close(albedo, found.albedo, rtol=1e-4, atol=1e-5)
    again = read_ply(tmp_path / "materials.ply")  # and by ours, as the splat that it is
    torch.testing.assert_close(again.value("means"), asset.value("means"))

    light, cameras = relight.LIGHTS["noon"], turntable(4, 20.0)
    write_ply(relight.baked(asset, found, light), tmp_path / "relit.ply")
    splat = read_ply(tmp_path / "relit.ply").eval().requires_grad_(False)
    seen = splat.render(cameras, 24, torch.full((1, 3), 0.5)).rgb
    assert psnr(seen, relight.relit(asset, found, cameras, 24, light)) > 25
    assert psnr(seen, relight.relit(asset, found, cameras, 24, relight.LIGHTS["evening"])) < 22


def test_the_command_takes_a_splat(tmp_path, capsys):
    asset, _ = ball(80)
    write_ply(asset, tmp_path / "ball.ply")
    flags = ["--splat", str(tmp_path / "ball.ply"), "--out", str(tmp_path / "out"), "--light", "noon"]
    small = ["--size", "16", "--views", "4", "--steps", "5", "--frames", "2"]
    assert command.main([*flags, *small]) == 0
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == {"materials.ply", "relit.ply", "light.hdr", "relit.gif", "maps.png", "relight.json"}
    assert json.loads((tmp_path / "out/relight.json").read_text())["maps"][-1] == "noon"


def far(asset):
    asset.put("means", 5 * asset.value("means"))


def faint(asset):
    asset.put("logits", torch.full((asset.num,), -3.0))


@pytest.mark.parametrize(
    "change,flags,key",
    [
        (None, {"--splat": ""}, "--splat"),
        (None, {"--still_life": True}, "--splat"),
        (None, {"--splat": "none.ply"}, "--splat"),
        (None, {"--light": "dusk"}, "--light"),
        (None, {"--size": "5000"}, "--size"),
        (None, {"--reward": "0"}, "--reward"),
        (far, {}, "--splat"),
        (faint, {}, "--splat"),
    ],
)
def test_mistakes_are_one_line(change, flags, key, tmp_path, capsys):
    asset, _ = ball(40)
    if change:
        change(asset)
    write_ply(asset, tmp_path / "ball.ply")
    given = {"--splat": str(tmp_path / "ball.ply"), "--size": "16", "--views": "4", "--steps": "2", **flags}
    words = [word for pair in given.items() for word in pair if word is not True]
    assert command.main([*words, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert key in message and len(message.strip().splitlines()) == 1, message
    assert not (tmp_path / "out").exists()


def test_the_still_life_has_shadows_and_highlights():
    """Lamps add light where they reach, none in shadow; the truth is one of five materials."""
    cameras = turntable(1, 35.0)
    (lit, truth), (unlit, _) = (photograph(cameras, 32, lamps=on, samples=1) for on in (True, False))
    hit = truth.hit[0, 0] > 0.5
    added = (lit.rgb - unlit.rgb)[0, :, hit]
    assert (added >= -1e-6).all() and (added.amax(0) < 0.02).float().mean() > 0.02 and added.max() > 0.3
    assert len(truth.albedo[0, :, hit].T.unique(dim=0)) == 5
    assert (truth.normal[0, :, hit].norm(dim=0) - 1).abs().max() < 1e-4
