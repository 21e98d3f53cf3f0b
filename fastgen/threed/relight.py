"""What is made of materials once they are found: images under another light, maps of each, and files."""

import math
from pathlib import Path

import torch
from torch import Tensor

from fastgen.threed.cameras import Cameras
from fastgen.threed.files import write_ply
from fastgen.threed.gaussians import SH, GaussianAsset, harmonics
from fastgen.threed.radiance_distillation import Materials, Pixels, blending, spread
from fastgen.threed.shading import Light, shade, sky, unit

LIGHTS = {
    "evening": sky((-70.0, 12.0), (3.2, 1.5, 0.6), (0.2, 0.25, 0.45), (0.12, 0.08, 0.08)),
    "noon": sky((20.0, 75.0), (2.4, 2.3, 2.1), (0.6, 0.75, 1.0), (0.3, 0.28, 0.25)),
    "studio": sky((150.0, 35.0), (2.0, 2.0, 2.2), (0.55, 0.55, 0.55), (0.35, 0.35, 0.35)),
}
"""to relight by"""
WAYS = 64
"""directions from which a Gaussian's colour is looked at to find its harmonics"""


def seen_at(asset: GaussianAsset, cameras: Cameras, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [P, N] in sum 1, views [P, 3], alpha [H, W]) of every pixel of one camera, row by row."""
    weights, alpha, _ = blending(asset, cameras, size)
    total = weights.sum(-1, keepdim=True).clamp(min=1e-6)
    return (weights / total).flatten(0, 2), -cameras.rays(size, size)[1].flatten(0, 2), alpha[0]


@torch.no_grad()
def relit(
    asset: GaussianAsset, found: Materials, cameras: Cameras, size: int, light: Light, grey: float = 0.5
) -> Tensor:
    """S of each camera under a light, [B, 3, size, size] in linear radiance, over a grey."""
    images = []
    for i in range(len(cameras)):
        weights, view, alpha = seen_at(asset, cameras[i : i + 1], size)
        S = found.shaded(weights, view, light).T.view(3, size, size)
        images.append(alpha * S + (1 - alpha) * grey)
    return torch.stack(images)


@torch.no_grad()
def maps(
    asset: GaussianAsset, found: Materials, progress: Tensor, cameras: Cameras, size: int
) -> dict[str, Tensor]:
    """Pictures [3, size, size] in 0 to 1 of one camera: albedo, normal (its axes as colours), roughness, and
    the progress [N] of each Gaussian; white where nothing is.
    """
    weights, _, alpha = seen_at(asset, cameras, size)
    normal, albedo, roughness = found.buffers_at(weights)
    parts = {
        "albedo": albedo,
        "normal": 0.5 + 0.5 * normal,
        "roughness": roughness[:, None].expand(-1, 3),
        "progress": (weights @ progress)[:, None].expand(-1, 3),
    }
    return {k: alpha * v.T.view(3, size, size) + (1 - alpha) for k, v in parts.items()}


def of_gaussians(pixels: Pixels, progress: Tensor) -> Tensor:
    """The progress [N] of each Gaussian: the mean of its pixels' [P]."""
    return spread(pixels.weights, progress[:, None])[:, 0]


def blended_at(
    asset: GaussianAsset, found: Materials, progress: Tensor, cameras: Cameras, size: int
) -> tuple[Tensor, Tensor]:
    """(I = a S + (1 - a) T, S) [B, 3, size, size] of new views under the light that was found, over black."""
    black = torch.zeros(1, 3)
    S = relit(asset, found, cameras, size, found.light, 0.0)
    parts = []
    for i in range(len(cameras)):
        weights, _, _ = seen_at(asset, cameras[i : i + 1], size)
        a = (weights @ progress).view(size, size)
        T = asset.render(cameras[i : i + 1], size, black).rgb[0]
        parts.append(a * S[i] + (1 - a) * T)
    return torch.stack(parts), S


@torch.no_grad()
def baked(asset: GaussianAsset, found: Materials, light: Light) -> GaussianAsset:
    """A splat for any viewer whose colours are those under a light: each Gaussian's, looked at from all sides
    that its normal faces, as harmonics of degree 2 by least squares.
    """
    out = GaussianAsset(asset.num, 2)
    for name in ("means", "log_scales", "quaternions", "logits"):
        out.put(name, asset.value(name))
    views = _sphere(WAYS)
    basis = harmonics(-views, 2)  # a viewer's direction goes from the camera to the Gaussian
    normal = unit(found.normal)
    colours = torch.stack(
        [shade(normal, v.expand_as(normal), found.albedo, found.roughness, light) for v in views], 1
    )
    faced = ((normal @ views.T) > 0.05)[..., None].to(basis)  # [N, V, 1]
    A = (basis * faced).transpose(1, 2) @ basis + 1e-3 * torch.eye(basis.shape[-1])
    out.put("sh", torch.linalg.solve(A, (basis * faced).transpose(1, 2) @ (faced * (colours - 0.5))))
    return out


def _sphere(num: int) -> Tensor:
    """Directions [num, 3] spread evenly, along a spiral."""
    k = torch.arange(num) + 0.5
    z, azimuth = 1 - 2 * k / num, math.pi * (1 + 5**0.5) * k
    r = (1 - z * z).sqrt()
    return torch.stack([r * azimuth.cos(), r * azimuth.sin(), z], -1)


@torch.no_grad()
def write_materials(asset: GaussianAsset, found: Materials, progress: Tensor, path: Path) -> None:
    """The splat with its albedo for a colour, normals, and the properties roughness and progress."""
    out = GaussianAsset(asset.num, 0)
    for name in ("means", "log_scales", "quaternions", "logits"):
        out.put(name, asset.value(name))
    out.put("sh", ((found.albedo - 0.5) / SH)[:, None])
    more = {"roughness": found.roughness, "progress": progress}
    write_ply(out, path, unit(found.normal), more)
