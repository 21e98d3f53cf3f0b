"""The rasteriser against a loop over pixels, its derivatives, and one Gaussian in closed form."""

import pytest
import torch

from fastgen.threed.cameras import Cameras, turntable
from fastgen.threed.gaussians import GaussianAsset, harmonics
from fastgen.threed.rasteriser import DILATION, LEAST, MOST, Projected, project, rasterise


def scene(num=12, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    means = 0.4 * torch.randn(num, 3, generator=g, dtype=dtype)
    scales = 0.08 + 0.25 * torch.rand(num, 3, generator=g, dtype=dtype)
    quaternions = torch.randn(num, 4, generator=g, dtype=dtype)
    opacities = 0.2 + 0.79 * torch.rand(num, generator=g, dtype=dtype)
    colours = torch.rand(num, 3, generator=g, dtype=dtype)
    return means, quaternions, scales, opacities, colours


def cameras(dtype=torch.float64):
    rows = torch.tensor([[20.0, 15.0, 2.2, 48.0], [-130.0, 50.0, 2.5, 40.0]], dtype=dtype)
    return Cameras.of(rows)


def by_pixel(seen: Projected, opacities, colours, size, far_first=False):
    """Blend every pixel by itself, Gaussian after Gaussian."""
    image = torch.zeros(len(seen.depths), 3, size, size, dtype=seen.means.dtype)
    for b in range(len(image)):
        order = [i for i in seen.depths[b].argsort(descending=far_first).tolist() if seen.radii[b, i] > 0]
        for v in range(size):
            for u in range(size):
                T = 1.0
                for i in order:
                    d = torch.tensor([u + 0.5, v + 0.5]).to(seen.means) - seen.means[b, i]
                    xx, xy, yy = seen.conics[b, i]
                    q = xx * d[0] ** 2 + 2 * xy * d[0] * d[1] + yy * d[1] ** 2
                    a = min(float(opacities[i] * torch.exp(-0.5 * q)), MOST)
                    if a >= LEAST:
                        image[b, :, v, u] += colours[i] * a * T
                        T *= 1 - a
    return image


def test_tiles_are_the_loop_over_pixels():
    means, quaternions, scales, opacities, colours = scene()
    seen = project(means, quaternions, scales, cameras(), 20)  # 20 is no multiple of a tile
    image, alpha = rasterise(seen, opacities, colours, 20)
    slow = by_pixel(seen, opacities, colours, 20)
    # A tile may leave out a Gaussian three deviations away: exp(-4.5) of its opacity at most.
    assert (image - slow).abs().max() < 0.02 and (image - slow).abs().mean() < 5e-4
    assert alpha.min() >= 0 and alpha.max() <= 1
    wrong = by_pixel(seen, opacities, colours, 20, far_first=True)
    assert (image - wrong).abs().max() > 0.1, "the negative: the order matters"


def test_where_every_gaussian_meets_every_tile_it_is_exact():
    means, quaternions, scales, opacities, colours = scene()
    seen = project(means, quaternions, scales, cameras(), 12)  # one tile
    image, _ = rasterise(seen._replace(radii=seen.radii * 9), opacities, colours, 12)
    assert (image - by_pixel(seen, opacities, colours, 12)).abs().max() < 1e-9


def test_gradients_are_those_of_differences():
    values = [v.requires_grad_() for v in scene(3, seed=4)]

    def image(means, quaternions, scales, opacities, colours):
        seen = project(means, quaternions, scales, cameras(), 6)
        return rasterise(seen._replace(radii=seen.radii * 9), opacities, colours, 6)[0]

    assert torch.autograd.gradcheck(image, values, eps=1e-6, atol=1e-5)


def test_one_gaussian_on_the_axis_in_closed_form():
    s, o, size, distance, fovy = 0.2, 0.8, 33, 2.0, 50.0
    camera = Cameras.of(torch.tensor([[37.0, 21.0, distance, fovy]], dtype=torch.float64))
    one = torch.ones(1, dtype=torch.float64)
    turned = torch.tensor([[0.3, -0.5, 0.7, 0.2]], dtype=torch.float64)  # a round one looks the same
    seen = project(torch.zeros(1, 3).double(), turned, (s * one).expand(1, 3), camera, size)
    _, alpha = rasterise(seen._replace(radii=seen.radii * 9), o * one, torch.ones(1, 3).double(), size)
    focal = 0.5 * size / torch.tensor(fovy / 2).double().deg2rad().tan()
    variance = (focal * s / distance) ** 2 + DILATION
    y, x = torch.meshgrid(*[torch.arange(size).double() - size // 2] * 2, indexing="ij")
    expected = o * (-(x**2 + y**2) / (2 * variance)).exp()
    assert torch.allclose(alpha[0, 0], torch.where(expected < LEAST, 0.0, expected), atol=1e-9)


def test_what_is_behind_the_camera_is_not_seen():
    means, quaternions, scales, opacities, colours = scene()
    camera = Cameras.of(torch.tensor([[0.0, 0.0, 1.0, 50.0]]).double())
    behind = means * 0 + torch.tensor([3.0, 0, 0]).double()
    image, alpha = rasterise(project(behind, quaternions, scales, camera, 16), opacities, colours, 16)
    assert image.abs().max() == 0 and alpha.max() == 0


def test_an_empty_asset_renders_its_background_and_finite_gradients():
    asset = GaussianAsset(20)
    asset.put("logits", torch.full((20,), -30.0))
    out = asset.render(turntable(2), 16, torch.tensor([[0.2, 0.4, 0.6]] * 2))
    assert torch.allclose(out.rgb, torch.tensor([0.2, 0.4, 0.6])[None, :, None, None].expand(2, 3, 16, 16))
    (out.rgb.sum() + out.depth.sum()).backward()
    assert all(p.grad.isfinite().all() for p in asset.parameters())


def test_harmonics_are_orthonormal():
    g = torch.Generator().manual_seed(0)
    way = torch.nn.functional.normalize(torch.randn(200_000, 3, generator=g), dim=-1)
    basis = harmonics(way, 3)
    gram = 4 * torch.pi * basis.T @ basis / len(way)
    assert basis.shape[-1] == 16 and (gram - torch.eye(16)).abs().max() < 0.02


@pytest.mark.parametrize("move_every", [0, 5])
def test_transparent_gaussians_move_to_where_the_image_pulls(move_every):
    asset = GaussianAsset(8, move_every=move_every)
    asset.put("logits", torch.tensor([-9.0] * 3 + [0.0] * 5))
    asset.pull.copy_(torch.tensor([9.0, 9, 9, 0, 5, 1, 4, 3]))
    camera, white = turntable(3), torch.ones(3, 3)
    before, shape = asset.render(camera, 24, white).alpha, asset.means.shape
    asset.settle(3)  # not yet
    assert torch.equal(asset.render(camera, 24, white).alpha, before)
    asset.settle(4)
    after = asset.render(camera, 24, white).alpha
    assert asset.means.shape == shape
    if not move_every:
        assert torch.equal(after, before)
        return
    assert (asset.value("logits").sigmoid() > 0.1).all(), "none is idle any more"
    assert (asset.means[:3] - asset.means[[4, 6, 7]]).norm(dim=-1).max() < 2, "next to the most pulled"
    assert (after - before).abs().mean() < 0.03, "and the picture stays"
    assert asset.pull.sum() == 0
