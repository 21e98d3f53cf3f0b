"""A scene whose materials are known, for what takes light and material apart: five things on a plate, each
with its albedo and roughness, photographed under a sky and two lamps.

The lamps do what `fastgen.threed.shading` cannot: they cast shadows, and a clear coat mirrors them in small
sharp highlights that move with the camera.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.threed.cameras import Cameras
from fastgen.threed.shading import Light, shade, sky, specular
from fastgen.threed.solids import Distance, sphere

STEPS, SHADOW_STEPS, HIT = 40, 24, 0.01
COAT = 0.1
"""roughness of the clear coat over everything"""
SKY = sky((120.0, 40.0), (0.6, 0.6, 0.55), (0.6, 0.64, 0.72), (0.25, 0.22, 0.2), 12, 24)
LAMPS = (((0.55, 0.45, 0.7), (1.6, 1.45, 1.2)), ((-0.6, 0.3, 0.75), (0.5, 0.6, 0.8)))
"""directions towards them, and irradiance of a surface that faces them"""


@dataclass(frozen=True)
class Thing:
    """One thing of one material."""

    distance: Distance
    albedo: tuple[float, float, float]
    roughness: float


def _box(p: Tensor, centre: tuple[float, float, float], half: float) -> Tensor:
    q = (p - torch.tensor(centre).to(p)).abs() - half
    return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)


def _ball(p: Tensor, centre: tuple[float, float, float], radius: float) -> Tensor:
    return sphere(p - torch.tensor(centre).to(p), radius)


def _ring(p: Tensor) -> Tensor:
    q = p - torch.tensor([-0.05, -0.38, -0.2]).to(p)
    return torch.stack([q[..., :2].norm(dim=-1) - 0.19, q[..., 2]], -1).norm(dim=-1) - 0.09


def _plate(p: Tensor) -> Tensor:
    q = torch.stack([p[..., :2].norm(dim=-1) - 0.8, (p[..., 2] + 0.35).abs() - 0.06], -1)
    return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)


THINGS = (
    Thing(_plate, (0.62, 0.6, 0.56), 0.8),
    Thing(lambda p: _ball(p, (0.3, 0.12, -0.02), 0.27), (0.75, 0.12, 0.1), 0.4),
    Thing(lambda p: _ball(p, (-0.33, -0.05, -0.11), 0.19), (0.12, 0.45, 0.16), 0.5),
    Thing(lambda p: _box(p, (-0.1, 0.42, -0.12), 0.16), (0.14, 0.2, 0.65), 0.6),
    Thing(_ring, (0.75, 0.55, 0.08), 0.45),
)


@dataclass(frozen=True)
class Photographs:
    """Views [B] of a scene: rgb [B, 3, H, W] over black and alpha [B, 1, H, W] in 0 to 1."""

    cameras: Cameras
    rgb: Tensor
    alpha: Tensor


@dataclass(frozen=True)
class Truth:
    """What photographs hide: albedo and normal [B, 3, H, W], roughness [B, 1, H, W], where `hit` [B, 1, H, W]
    says that something is seen.
    """

    albedo: Tensor
    normal: Tensor
    roughness: Tensor
    hit: Tensor


def distances(p: Tensor) -> Tensor:
    """[..., number of things] of points [..., 3]."""
    return torch.stack([thing.distance(p) for thing in THINGS], -1)


def traced(cameras: Cameras, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(points [R, 3], directions [R, 3], hit [R]) of the rays of all pixels, by sphere tracing."""
    origins, directions = (r.flatten(0, 2) for r in cameras.rays(size, size))
    travelled = (cameras.distance - 1.0).repeat_interleave(size * size).clamp(min=0.0)
    for _ in range(STEPS):
        travelled = travelled + distances(origins + travelled[:, None] * directions).amin(-1)
    points = origins + travelled[:, None] * directions
    return points, directions, (distances(points).amin(-1).abs() < HIT) & (points.norm(dim=-1) < 1.01)


def normals(p: Tensor, step: float = 1e-3) -> Tensor:
    """Outward [..., 3], by central differences."""
    near = lambda q: distances(q).amin(-1)  # noqa: E731
    offsets = step * torch.eye(3).to(p)
    return F.normalize(torch.stack([near(p + o) - near(p - o) for o in offsets], -1), dim=-1)


def materials(p: Tensor) -> tuple[Tensor, Tensor]:
    """(albedo [..., 3], roughness [...]) of the nearest thing."""
    which = distances(p).argmin(-1)
    albedo = torch.tensor([thing.albedo for thing in THINGS]).to(p)
    return albedo[which], torch.tensor([thing.roughness for thing in THINGS]).to(p)[which]


def shadowed(p: Tensor, way: Tensor) -> Tensor:
    """Whether something stands between points [R, 3] and a lamp in this direction [3]."""
    travelled, blocked = p.new_full((len(p),), 0.04), torch.zeros(len(p), dtype=torch.bool)
    for _ in range(SHADOW_STEPS):
        gap = distances(p + travelled[:, None] * way).amin(-1)
        blocked, travelled = blocked | (gap < 2e-3), travelled + gap.clamp(min=0.02)
    return blocked


def lamplight(p: Tensor, n: Tensor, v: Tensor, albedo: Tensor, roughness: Tensor) -> Tensor:
    """What the lamps add, [R, 3]: their diffuse and rough reflection and that of the coat, out of shadow."""
    found = torch.zeros_like(p)
    for way, irradiance in LAMPS:
        to_lamp = F.normalize(torch.tensor(way), dim=0)
        n_l, n_v, l_v = (n @ to_lamp).clamp(min=0), (n * v).sum(-1), v @ to_lamp
        lobes = specular(n_l, n_v, l_v, roughness) + specular(n_l, n_v, l_v, torch.tensor(COAT))
        seen = (n_l * ~shadowed(p, to_lamp))[:, None] * torch.tensor(irradiance)
        found += seen * (albedo / torch.pi + lobes[:, None])
    return found


@torch.no_grad()
def photograph(
    cameras: Cameras, size: int, light: Light = SKY, lamps: bool = True, samples: int = 2
) -> tuple[Photographs, Truth]:
    """Photographs of the scene and what they hide; samples x samples rays a pixel, of which one in the middle
    of a quarter tells the truth.
    """
    side, num = size * samples, len(cameras)
    points, directions, hit = traced(cameras, side)
    p, v = points[hit], -directions[hit]
    n = normals(p)
    albedo, roughness = materials(p)
    colour = shade(n, v, albedo, roughness, light)
    if lamps:
        colour = colour + lamplight(p, n, v, albedo, roughness)
    table = torch.zeros(len(points), 11)
    table[hit] = torch.cat([colour.clamp(0, 1), torch.ones(len(p), 1), albedo, n, roughness[:, None]], 1)
    image = table.view(num, side, side, 11).permute(0, 3, 1, 2)
    mean = F.avg_pool2d(image, samples)
    one = image[:, :, samples // 2 :: samples, samples // 2 :: samples]
    truth = Truth(one[:, 4:7], one[:, 7:10], one[:, 10:], one[:, 3:4])
    return Photographs(cameras, mean[:, :3], mean[:, 3:4]), truth
