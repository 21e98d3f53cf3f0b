"""Materials that were found against those of the still life, whose truth is known."""

import torch
from torch import Tensor

from fastgen.threed.cameras import Cameras, Ranges, random_cameras
from fastgen.threed.gaussians import GaussianAsset
from fastgen.threed.radiance_distillation import Materials
from fastgen.threed.relight import LIGHTS, blended_at, relit, seen_at
from fastgen.threed.shading import Light
from fastgen.threed.still_life import Photographs, photograph

RANGES = Ranges(elevation=(5.0, 60.0))
"""of the photographs"""
HELD_OUT, SEED = 8, 9
"""views that nothing was trained on"""


def photographs(num: int, size: int, seed: int = 0) -> Photographs:
    """Of the still life, from all around."""
    return photograph(random_cameras(num, RANGES, torch.Generator().manual_seed(seed)), size)[0]


@torch.no_grad()
def scores(asset: GaussianAsset, found: Materials, progress: Tensor, size: int) -> dict[str, float]:
    """Over pixels of held-out views: the root mean squared error of albedo and roughness and the mean angle
    of normals (degrees); PSNR (dB) of images with the light as it was, by S alone, blended and by the splat
    alone, and of S under each of `LIGHTS`. Albedo is defined up to the light's colour: each channel is first
    scaled to the truth, as is usual, and so are relit images.
    """
    cameras = random_cameras(HELD_OUT, RANGES, torch.Generator().manual_seed(SEED))
    photos, truth = photograph(cameras, size)
    covered = (truth.hit[:, 0] > 0.5) & (photos.alpha[:, 0] > 0.99)
    at = lambda image: image.permute(0, 2, 3, 1)[covered]  # noqa: E731  [P, C]
    parts = [found.buffers_at(seen_at(asset, cameras[i : i + 1], size)[0]) for i in range(len(cameras))]
    normal, albedo, roughness = (torch.cat(part)[covered.flatten()] for part in zip(*parts))
    scale = scales(albedo, at(truth.albedo))
    cosine = (normal * at(truth.normal)).sum(-1).clamp(-1, 1)
    blend, S = blended_at(asset, found, progress, cameras, size)
    T = torch.cat([asset.render(cameras[i : i + 1], size, torch.zeros(1, 3)).rgb for i in range(HELD_OUT)])
    rms = lambda a, b: float((a - b).square().mean().sqrt())  # noqa: E731
    measured = {
        "albedo_rmse": rms(albedo * scale, at(truth.albedo)),
        "roughness_rmse": rms(roughness, at(truth.roughness)[:, 0]),
        "normal_degrees": float(cosine.acos().rad2deg().mean()),
        "psnr_model": psnr(at(S), at(photos.rgb)),
        "psnr_blended": psnr(at(blend), at(photos.rgb)),
        "psnr_splat": psnr(at(T), at(photos.rgb)),
        "progress": float(progress.mean()),
    }
    relights = {name: _relight(asset, found, cameras, size, light, scale) for name, light in LIGHTS.items()}
    return measured | {f"psnr_{name}": psnr(at(mine), at(true)) for name, (mine, true) in relights.items()}


def scales(albedo: Tensor, truth: Tensor) -> Tensor:
    """Of each channel [3], by least squares, from albedo [P, 3] to the truth."""
    return (albedo * truth).sum(0) / albedo.square().sum(0).clamp(min=1e-9)


def psnr(a: Tensor, b: Tensor) -> float:
    """dB, of colours that are cut off at 1."""
    return float(-10 * (a.clamp(0, 1) - b.clamp(0, 1)).square().mean().log10())


def _relight(
    asset: GaussianAsset, found: Materials, cameras: Cameras, size: int, light: Light, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """(S under a light with albedo times scale, the scene under it without its lamps) [B, 3, size, size]."""
    own, scaled = found.albedo_logits, (found.albedo * scale).clamp(1e-4, 1 - 1e-4)
    found.albedo_logits = torch.nn.Parameter(scaled.logit(), requires_grad=False)
    mine = relit(asset, found, cameras, size, light, 0.0)
    found.albedo_logits = own
    return mine, photograph(cameras, size, light, lamps=False)[0].rgb
