"""Progressive radiance distillation: a splat becomes material and light, as far as these explain its images.

Paper: Ye, Hou & Zhou 2024, arXiv 2408.07595. No student of few steps comes of it, and no diffusion model is
in it: what is distilled is a fitted radiance field, into albedo, roughness, normals and light of one scene.

  T = the splat's own image,  y = a photograph of the same view (a splat alone: y = T)
  S = shade(G-buffers of albedo, roughness and normal, light)                          deferred, per pixel
  I = a S + (1 - a) T                          a in (0, 1): how far the physical model has taken over
  loss = mean_pixels [ |I - y|^2 - reward log a ] + colour of the light + turn of the normals

  Where S is wrong, a falls and takes S's gradient with it; the reward lets it rise where S is right. With
  T = y the two balance at a = min(1, sqrt(reward / 2) / |S - y|), and S meets a robust loss: quadratic below
  sqrt(reward / 2), logarithmic above. Without the reward a only falls. Relit images are S alone.

Differs
- photometric loss: the square, without SSIM. One stage in the place of four; T is frozen.
- a is a number for each pixel of each photograph; the map of a new view spreads their means over Gaussians.
- geometry stays that of the splat, so blending is linear in what Gaussians carry and is worked out once.
- normals begin as those of the rendered depth; dielectrics alone, no metal; light is not occluded.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgen.core.errors import UserError
from fastgen.threed.cameras import Cameras
from fastgen.threed.gaussians import GaussianAsset
from fastgen.threed.rasteriser import rasterise
from fastgen.threed.shading import ROUGH, Light, shade, uniform, unit
from fastgen.threed.still_life import Photographs

START = -3.0
"""logit of the progress at first"""
COVERED = 0.9
"""opacity from which on a pixel is looked at; edges mix with what is behind"""
EDGE = 0.08
"""step of the depth between neighbours, world units, over which no normal is taken"""

Progress = Callable[[str], None]
"""told now and then how far it is"""


@dataclass(frozen=True)
class Settings:
    """How materials are found."""

    steps: int = 800
    pixels: int = 1500
    """of a step"""
    reward: float = 0.02
    """mu: errors below sqrt(mu / 2), of colours in 0 to 1, are trusted in full"""
    plain: bool = False
    """ordinary inverse rendering, a = 1 throughout"""
    lr: float = 1e-2
    progress_lr: float = 0.1
    """of the logits of a; a pixel is seen in one of some ten steps"""
    grey: float = 0.05
    """weight of how far the light is from white, which albedo could take on instead"""
    stay: float = 0.1
    """weight of how far normals are from those of the depth, which are free to explain any shading else"""
    seed: int = 0


@dataclass(frozen=True)
class Pixels:
    """Covered pixels [P] of all photographs, as a splat sees them."""

    weights: Tensor
    """[P, N] of the Gaussians, in sum 1"""
    teacher: Tensor
    """[P, 3], T"""
    photo: Tensor
    """[P, 3], y"""
    view: Tensor
    """[P, 3], unit, to the camera"""
    normal: Tensor
    """[P, 3] of the rendered depth; 0 where the depth has an edge"""
    covered: Tensor
    """[B, H, W], bool, where they are, in the order of its True entries"""

    def __len__(self) -> int:
        return len(self.photo)


def fit_splat(
    photos: Photographs, points: int = 600, steps: int = 600, seed: int = 0, tell: Progress | None = None
) -> GaussianAsset:
    """Gaussians of degree 2 fitted to photographs over random greys, two views a step."""
    asset = GaussianAsset(points, 2, seed, move_every=50)
    size, generator = photos.rgb.shape[-1], torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(asset.parameters(), 0.02, betas=(0.9, 0.99))
    for k in range(steps):
        rows = torch.randint(len(photos.rgb), (2,), generator=generator)
        grey = torch.rand(2, 1, generator=generator).expand(-1, 3)
        optimizer.param_groups[0]["lr"] = 0.02 * min(1.0, 2 * (1 - k / steps))
        found = asset.render(photos.cameras[rows], size, grey)
        wanted = photos.rgb[rows] + (1 - photos.alpha[rows]) * grey[:, :, None, None]
        loss = (found.rgb - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if k < 0.7 * steps:  # what moves last has time to settle
            asset.settle(k)
        if tell and k % 50 == 0:
            tell(f"splat {k}/{steps}: {-10 * float(loss.detach().log10()):.1f} dB")
    return asset.eval().requires_grad_(False)


def renders_of(asset: GaussianAsset, cameras: Cameras, size: int) -> Photographs:
    """A splat's own images in the place of photographs."""
    parts = [asset.render(cameras[i : i + 1], size, torch.zeros(1, 3)) for i in range(len(cameras))]
    return Photographs(cameras, torch.cat([p.rgb for p in parts]), torch.cat([p.alpha for p in parts]))


@torch.no_grad()
def blending(asset: GaussianAsset, cameras: Cameras, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [B, H, W, N], alpha [B, H, W], depth [B, H, W]) of the Gaussians in every pixel."""
    seen = asset.projected(cameras, size)
    features = torch.cat([torch.eye(asset.num).expand(len(cameras), -1, -1), seen.depths[..., None]], -1)
    image, alpha = rasterise(seen, asset.value("logits").sigmoid(), features, size)
    depth = image[:, -1] / alpha[:, 0].clamp(min=1e-6)
    return image[:, :-1].permute(0, 2, 3, 1), alpha[:, 0], depth


def depth_normals(cameras: Cameras, depth: Tensor, covered: Tensor) -> Tensor:
    """Unit normals [B, H, W, 3], towards the cameras, of depths [B, H, W] along the view direction; 0 at
    edges and where a neighbour is not covered.
    """
    origins, rays = cameras.rays(*depth.shape[1:])
    ahead = -cameras.c2w[:, None, None, :3, 2]
    points = origins + rays * (depth / (rays * ahead).sum(-1))[..., None]
    found, inner = torch.zeros_like(points), slice(1, -1)
    across = points[:, inner, 2:] - points[:, inner, :-2]
    down = points[:, 2:, inner] - points[:, :-2, inner]
    normal = unit(torch.linalg.cross(down, across))
    normal = normal * torch.where((normal * rays[:, inner, inner]).sum(-1, keepdim=True) > 0, -1.0, 1.0)
    whole = covered[:, inner, 2:] & covered[:, inner, :-2] & covered[:, 2:, inner] & covered[:, :-2, inner]
    steps = [
        (depth[:, inner, 2:] - depth[:, inner, :-2]).abs(),
        (depth[:, 2:, inner] - depth[:, :-2, inner]).abs(),
    ]
    found[:, inner, inner] = normal * (whole & (torch.maximum(*steps) < 2 * EDGE))[..., None]
    return found


def look(asset: GaussianAsset, photos: Photographs) -> Pixels:
    """The covered pixels of photographs of this splat; a UserError where there are none."""
    size, rows = photos.rgb.shape[-1], []
    own = renders_of(asset, photos.cameras, size)
    covered = (own.alpha[:, 0] > COVERED) & (photos.alpha[:, 0] > 0.99 * photos.alpha.max())
    if not covered.any():
        found = f"no pixel of its {len(covered)} views is {COVERED:.0%} covered"
        raise UserError("--splat", found, "give one that is opaque around the origin, within a radius of 1")
    for i in range(len(covered)):
        camera, at = photos.cameras[i : i + 1], covered[i]
        weights, alpha, depth = blending(asset, camera, size)
        normal = depth_normals(camera, depth, covered[i : i + 1])[0, at]
        rgb = [one.rgb[i].permute(1, 2, 0)[at] / one.alpha[i, 0][at][:, None] for one in (own, photos)]
        view = -camera.rays(size, size)[1][0, at]
        rows.append([weights[0, at] / alpha[0, at][:, None], *rgb, view, normal])
    weights, teacher, photo, view, normal = (torch.cat(part) for part in zip(*rows))
    return Pixels(weights, teacher, photo, view, normal, covered)


class Materials(nn.Module):
    """Albedo, roughness and normal of each Gaussian [N], and the light."""

    def __init__(self, normal: Tensor, light: Light):
        """normal: [N, 3], where to begin."""
        super().__init__()
        self.albedo_logits = nn.Parameter(torch.zeros(len(normal), 3))
        self.roughness_logits = nn.Parameter(torch.zeros(len(normal)))
        self.normal = nn.Parameter(normal.clone())
        self.log_radiance = nn.Parameter(light.radiance.log())

    @property
    def albedo(self) -> Tensor:
        """[N, 3] in 0 to 1."""
        return self.albedo_logits.sigmoid()

    @property
    def roughness(self) -> Tensor:
        """[N], within `ROUGH`."""
        return ROUGH[0] + (ROUGH[1] - ROUGH[0]) * self.roughness_logits.sigmoid()

    @property
    def light(self) -> Light:
        return Light(self.log_radiance.exp())

    def buffers_at(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(normal [P, 3], albedo [P, 3], roughness [P]) where Gaussians weigh [P, N]."""
        carried = torch.cat([self.normal, self.albedo, self.roughness[:, None]], 1)
        found = weights @ carried
        return unit(found[:, :3]), found[:, 3:6], found[:, 6]

    def shaded(self, weights: Tensor, view: Tensor, light: Light | None = None) -> Tensor:
        """S [P, 3], under the light that was found or another."""
        normal, albedo, roughness = self.buffers_at(weights)
        return shade(normal, view, albedo, roughness, light or self.light)


def spread(weights: Tensor, values: Tensor) -> Tensor:
    """What each Gaussian has of values [P, C] at pixels: their mean by its weights there, [N, C]."""
    return (weights.T @ values) / weights.sum(0).clamp(min=1e-6)[:, None]


def first_normals(asset: GaussianAsset, pixels: Pixels) -> Tensor:
    """[N, 3]: the rendered depth's, where a Gaussian is seen and mostly itself; else away from the origin."""
    found = spread(pixels.weights.square(), pixels.normal)
    away = unit(asset.value("means"))
    return unit(torch.where(found.norm(dim=-1, keepdim=True) > 0.1, found, away))


def blended(S: Tensor, T: Tensor, y: Tensor, logit: Tensor, reward: float) -> Tensor:
    """|a S + (1 - a) sg[T] - y|^2 - reward log a, [P], of colours [P, 3] and a = sigmoid(logit)."""
    a = logit.sigmoid()[:, None]
    image = a * S + (1 - a) * T.detach()
    return (image - y).square().sum(-1) + reward * nn.functional.softplus(-logit)


def colourful(light: Light) -> Tensor:
    """Mean squared distance of the radiance to its grey."""
    return (light.radiance - light.radiance.mean(-1, keepdim=True)).square().mean()


def turned(normal: Tensor, first: Tensor) -> Tensor:
    """Mean of 1 - cos of the angle between normals [N, 3] and the unit ones they began as."""
    return (1 - (unit(normal) * first).sum(-1)).mean()


def distil(
    asset: GaussianAsset, pixels: Pixels, cfg: Settings, tell: Progress | None = None
) -> tuple[Materials, Tensor]:
    """(what was found, the progress [P] of each pixel; 1 under `plain`)."""
    generator = torch.Generator().manual_seed(cfg.seed)
    first = first_normals(asset, pixels)
    found = Materials(first, uniform())
    progress = nn.Embedding(len(pixels), 1, sparse=True)
    nn.init.constant_(progress.weight, START)
    adam = torch.optim.Adam(found.parameters(), cfg.lr)
    of_progress = torch.optim.SparseAdam(progress.parameters(), cfg.progress_lr)
    for k in range(cfg.steps):
        rows = torch.randperm(len(pixels), generator=generator)[: cfg.pixels]
        S = found.shaded(pixels.weights[rows], pixels.view[rows])
        T, y = pixels.teacher[rows], pixels.photo[rows]
        if cfg.plain:
            each = (S - y).square().sum(-1)
        else:
            each = blended(S, T, y, progress(rows)[:, 0], cfg.reward)
        loss = each.mean() + cfg.grey * colourful(found.light) + cfg.stay * turned(found.normal, first)
        adam.param_groups[0]["lr"] = cfg.lr * min(1.0, 2 * (1 - k / cfg.steps))
        for optimizer in (adam, of_progress):
            optimizer.zero_grad()
        loss.backward()
        adam.step()
        if not cfg.plain:
            of_progress.step()
        if tell and k % 100 == 0:
            mean = 1.0 if cfg.plain else float(progress.weight.detach().sigmoid().mean())
            tell(f"materials {k}/{cfg.steps}: loss {float(loss.detach()):.4f}, progress {mean:.2f}")
    a = torch.ones(len(pixels)) if cfg.plain else progress.weight.detach()[:, 0].sigmoid()
    return found.requires_grad_(False), a
