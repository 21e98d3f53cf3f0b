"""Coloured solids as signed distances: the analytic scenes that minis are trained on and tests compare with.

Each stands on the z axis inside the unit ball and carries a white ball on its front (+x), so that the front
of a torus or of a sphere differs from its back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.threed.cameras import Cameras

Distance = Callable[[Tensor], Tensor]
"""points [..., 3] to signed distances [...], negative inside"""

MARK, WHITE, LIGHT, AMBIENT = 0.16, (0.96, 0.96, 0.96), (0.35, 0.25, 0.9), 0.45
"""radius of the white ball, its colour, where the light comes from, how bright its shadows are"""
STEPS = 28
"""of sphere tracing"""


def sphere(p: Tensor, radius: float, z: float = 0.0) -> Tensor:
    return (p - _at(p, z)).norm(dim=-1) - radius


def box(p: Tensor, half: tuple[float, float, float], z: float = 0.0) -> Tensor:
    q = (p - _at(p, z)).abs() - torch.tensor(half).to(p)
    return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)


def cylinder(p: Tensor, radius: float, half: float, z: float = 0.0) -> Tensor:
    q = torch.stack([p[..., :2].norm(dim=-1) - radius, (p[..., 2] - z).abs() - half], -1)
    return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)


def cone(p: Tensor, radius: float, low: float, high: float) -> Tensor:
    """With its base at z = low and its tip at z = high; a bound of the distance outside."""
    r, slope = p[..., :2].norm(dim=-1), (high - low) / radius
    side = (slope * r + p[..., 2] - high) / (1 + slope**2) ** 0.5
    return torch.maximum(side, low - p[..., 2])


def torus(p: Tensor, ring: float, tube: float) -> Tensor:
    """Upright, its axis along x."""
    q = torch.stack([p[..., 1:].norm(dim=-1) - ring, p[..., 0]], -1)
    return q.norm(dim=-1) - tube


def _at(p: Tensor, z: float) -> Tensor:
    return torch.tensor([0.0, 0.0, z]).to(p)


def _least(*parts: Distance) -> Distance:
    return lambda p: torch.stack([part(p) for part in parts]).amin(0)


SHAPES: dict[str, tuple[Distance, tuple[float, float, float]]] = {
    "torus": (lambda p: torus(p, 0.55, 0.22), (0.25, 0.0, 0.55)),
    "cube": (lambda p: box(p, (0.5, 0.5, 0.5)), (0.55, 0.0, 0.15)),
    "sphere": (lambda p: sphere(p, 0.65), (0.68, 0.0, 0.15)),
    "cone": (lambda p: cone(p, 0.62, -0.6, 0.75), (0.5, 0.0, -0.2)),
    "cylinder": (lambda p: cylinder(p, 0.42, 0.68), (0.47, 0.0, 0.2)),
    "snowman": (_least(lambda p: sphere(p, 0.5, -0.32), lambda p: sphere(p, 0.34, 0.42)), (0.38, 0.0, 0.45)),
    "house": (
        _least(lambda p: box(p, (0.42, 0.42, 0.36), -0.36), lambda p: cone(p, 0.66, 0.0, 0.7)),
        (0.47, 0.0, -0.3),
    ),
    "mushroom": (
        _least(
            lambda p: cylinder(p, 0.2, 0.4, -0.3),
            lambda p: torch.maximum(sphere(p, 0.62, 0.02), 0.06 - p[..., 2]),
        ),
        (0.6, 0.0, 0.3),
    ),
    "rocket": (
        _least(lambda p: cylinder(p, 0.26, 0.45, -0.25), lambda p: cone(p, 0.44, 0.2, 0.85)),
        (0.31, 0.0, -0.1),
    ),
    "table": (
        _least(lambda p: cylinder(p, 0.7, 0.11, 0.36), lambda p: box(p, (0.16, 0.16, 0.45), -0.2)),
        (0.7, 0.0, 0.4),
    ),
}
"""by name: the distance, and where the white ball sits"""


@dataclass(frozen=True)
class Solid:
    """One of `SHAPES` in one colour (red, green, blue in 0 to 1)."""

    shape: str
    colour: tuple[float, float, float]

    def distance(self, p: Tensor) -> Tensor:
        """Signed distance [...] of points [..., 3]."""
        body, at = SHAPES[self.shape]
        return torch.minimum(body(p), _ball(p, at))

    def normal(self, p: Tensor, step: float = 1e-3) -> Tensor:
        """Outward unit normals [..., 3] by central differences."""
        offsets = step * torch.eye(3).to(p)
        gradient = torch.stack([self.distance(p + o) - self.distance(p - o) for o in offsets], -1)
        return F.normalize(gradient, dim=-1)

    def colours(self, p: Tensor) -> Tensor:
        """Shaded colours [..., 3] of points on the surface, under one fixed distant light."""
        body, at = SHAPES[self.shape]
        marked = (_ball(p, at) < body(p))[..., None]
        paint = torch.where(marked, torch.tensor(WHITE).to(p), torch.tensor(self.colour).to(p))
        light = F.normalize(torch.tensor(LIGHT).to(p), dim=0)
        shade = AMBIENT + (1 - AMBIENT) * (self.normal(p) @ light).clamp(min=0)
        return paint * shade[..., None]

    @torch.no_grad()
    def render(self, cameras: Cameras, size: int, background: Tensor, samples: int = 2) -> Tensor:
        """Images [B, 3, size, size] in [0, 1] by sphere tracing, samples x samples rays a pixel; background
        [B, 3].
        """
        side = size * samples
        origins, directions = (r.flatten(0, 2) for r in cameras.rays(side, side))
        nearest = -(origins * directions).sum(-1)  # of the ray to the origin, along it
        half = (1 - (origins + nearest[:, None] * directions).square().sum(-1)).clamp(min=0).sqrt()
        image = background[:, None].expand(-1, side * side, 3).reshape(-1, 3).clone()
        inside = half.nonzero()[:, 0]  # rays that meet the unit ball
        start, way = origins[inside], directions[inside]
        travelled = (nearest - half)[inside].clamp(min=0.0)
        for _ in range(STEPS):
            travelled += self.distance(start + travelled[:, None] * way)
        points = start + travelled[:, None] * way
        hit = (self.distance(points).abs() < 0.01) & (points.norm(dim=-1) < 1.01)
        image[inside[hit]] = self.colours(points[hit])
        image = image.view(len(cameras), side, side, 3).permute(0, 3, 1, 2)
        return F.avg_pool2d(image, samples).clamp(0, 1)


def _ball(p: Tensor, at: tuple[float, float, float]) -> Tensor:
    return (p - torch.tensor(at).to(p)).norm(dim=-1) - MARK
