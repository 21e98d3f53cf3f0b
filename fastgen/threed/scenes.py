"""Analytic scenes for scan completion: a ground, boxes and cylinders on it, seen by a simulated spinning
LiDAR that stands at the origin. Lengths in metres, z up, the ground at z = 0.

  truth:  points of all surfaces, uniform by area, seen or not; of the ground two for five of an object's
  scan:   the first surface along each ray of a few rings, 1 cm of noise along it; of the hits the farthest
          from each other

A seed stands for its scenes: nothing is stored.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HALF, HEIGHT = 6.0, 1.7
"""half the side of the ground; height of the sensor above it"""
BOXES, CYLINDERS = 4, 3
"""most of each"""
RINGS, AZIMUTHS = 24, 90
LOWEST, HIGHEST = -48.0, 8.0
"""elevations of the rings in degrees"""
NOISE = 0.01
GROUND = 0.4
"""points of the ground for one on as much of an object"""
AT_ONCE = 64
"""scenes that are made together"""


@dataclass(frozen=True)
class Scenes:
    """S scenes. boxes [S, 4, 6]: centre x, y, half length, half width, height, yaw; cylinders [S, 3, 4]:
    centre x, y, radius, height. What a scene does not have has height 0.
    """

    boxes: Tensor
    cylinders: Tensor

    def inside(self, x: Tensor) -> Tensor:
        """Whether points [S, K, 3] lie within an object, [S, K]."""
        p, b, c = x[:, None], self.boxes[:, :, None], self.cylinders[:, :, None]
        u, v = _turned(p[..., 0] - b[..., 0], p[..., 1] - b[..., 1], -b[..., 5])
        in_box = (u.abs() < b[..., 2] - 1e-4) & (v.abs() < b[..., 3] - 1e-4) & (p[..., 2] < b[..., 4] - 1e-4)
        far = torch.hypot(p[..., 0] - c[..., 0], p[..., 1] - c[..., 1])
        in_cylinder = (far < c[..., 2] - 1e-4) & (p[..., 2] < c[..., 3] - 1e-4)
        return in_box.any(1) | in_cylinder.any(1)


def _turned(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = angle.cos(), angle.sin()
    return cos * x - sin * y, sin * x + cos * y


def draw_scenes(num: int, generator: torch.Generator) -> Scenes:
    """Random ones; nothing stands within 1.2 m of the sensor's axis."""

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(num, *shape, generator=generator)

    def places(most: int, least: float, reach: Tensor) -> tuple[Tensor, Tensor]:
        angle = between(0, 2 * math.pi, most)
        far = (least + reach) + between(0, 1, most) * (HALF - 1.0 - least - reach).clamp(min=0.1)
        return far * angle.cos(), far * angle.sin()

    long, wide = between(0.6, 1.3, BOXES), between(0.4, 0.9, BOXES)
    x, y = places(BOXES, 1.2, torch.hypot(long, wide))
    here = torch.arange(BOXES) < torch.randint(2, BOXES + 1, (num, 1), generator=generator)
    height = between(0.8, 2.6, BOXES) * here
    boxes = torch.stack([x, y, long, wide, height, between(0, math.pi, BOXES)], -1)
    radius = between(0.15, 0.5, CYLINDERS)
    x, y = places(CYLINDERS, 1.2, radius)
    here = torch.arange(CYLINDERS) < torch.randint(1, CYLINDERS + 1, (num, 1), generator=generator)
    cylinders = torch.stack([x, y, radius, between(1.0, 3.2, CYLINDERS) * here], -1)
    return Scenes(boxes, cylinders)


def surface_points(scenes: Scenes, num: int, generator: torch.Generator) -> Tensor:
    """[S, num, 3] of what is no object's inside, by area, of the ground fewer."""
    S, many = len(scenes.boxes), 2 * num
    u, v, w = torch.rand(3, S, many, generator=generator).unbind(0)
    x, y, long, wide, height, yaw = scenes.boxes.unbind(-1)
    sides = [4 * wide * height, 4 * long * height, 4 * long * wide * (height > 0)]  # two ends, two sides, top
    _, _, radius, tall = scenes.cylinders.unbind(-1)
    rounds = [2 * math.pi * radius * tall, math.pi * radius**2 * (tall > 0)]
    areas = torch.cat([torch.full((S, 1), GROUND * 4 * HALF**2), *sides, *rounds], 1)
    part = torch.multinomial(areas, many, replacement=True, generator=generator) - 1
    ground = torch.stack([(2 * u - 1) * HALF, (2 * v - 1) * HALF, torch.zeros_like(u)], -1)
    face = part.clamp(0, 3 * BOXES - 1)
    b = scenes.boxes.gather(1, (face % BOXES)[..., None].expand(-1, -1, 6))
    kind, flip = face // BOXES, torch.where(w < 0.5, -1.0, 1.0)
    a = torch.where(kind == 0, flip, 2 * u - 1) * b[..., 2]
    c = torch.where(kind == 1, flip, torch.where(kind == 0, 2 * u - 1, 2 * v - 1)) * b[..., 3]
    a, c = _turned(a, c, b[..., 5])
    of_box = torch.stack([b[..., 0] + a, b[..., 1] + c, torch.where(kind == 2, 1.0, v) * b[..., 4]], -1)
    round_ = (part - 3 * BOXES).clamp(0, 2 * CYLINDERS - 1)
    c = scenes.cylinders.gather(1, (round_ % CYLINDERS)[..., None].expand(-1, -1, 4))
    top = round_ // CYLINDERS == 1
    far, angle = torch.where(top, v.sqrt(), 1.0) * c[..., 2], 2 * math.pi * u
    height = torch.where(top, 1.0, v) * c[..., 3]
    of_round = torch.stack([c[..., 0] + far * angle.cos(), c[..., 1] + far * angle.sin(), height], -1)
    rest = torch.where((part < 3 * BOXES)[..., None], of_box, of_round)
    points = torch.where((part < 0)[..., None], ground, rest)
    order = scenes.inside(points).long().argsort(dim=1, stable=True)[:, :num]
    return points.gather(1, order[..., None].expand(-1, -1, 3))


def cast_rays(scenes: Scenes, direction: Tensor) -> Tensor:
    """Distance [S, K] from the sensor along unit directions [K, 3] to the first surface; inf where nothing is
    hit within the ground's extent.
    """
    d = direction[None, None]
    down = torch.where(direction[:, 2] < 0, -HEIGHT / direction[:, 2].clamp(max=-1e-9), torch.inf)
    b, c = scenes.boxes[:, :, None], scenes.cylinders[:, :, None]
    u, v = _turned(-b[..., 0], -b[..., 1], -b[..., 5])
    du, dv = _turned(d[..., 0], d[..., 1], -b[..., 5])
    enter, leave = [], []
    middle = b[..., 4] / 2
    for at, step, half in ((u, du, b[..., 2]), (v, dv, b[..., 3]), (HEIGHT - middle, d[..., 2], middle)):
        safe = torch.where(step.abs() < 1e-9, 1e-9, step)
        ends = torch.stack([(-half - at) / safe, (half - at) / safe])
        enter.append(ends.amin(0))
        leave.append(ends.amax(0))
    first, last = (torch.stack(torch.broadcast_tensors(*ends)) for ends in (enter, leave))
    first, last = first.amax(0), last.amin(0)
    of_box = torch.where((first < last) & (first > 0) & (b[..., 4] > 0), first, torch.inf).amin(1)
    flat = d[..., :2].square().sum(-1)
    along = (c[..., :2] * d[..., :2]).sum(-1)
    inner = along**2 - flat * (c[..., :2].square().sum(-1) - c[..., 2] ** 2)
    t = (along - inner.clamp(min=0).sqrt()) / flat
    z = HEIGHT + t * d[..., 2]
    side = torch.where((inner > 0) & (t > 0) & (z > 0) & (z < c[..., 3]), t, torch.inf)
    lid = (c[..., 3] - HEIGHT) / torch.where(d[..., 2].abs() < 1e-9, 1e-9, d[..., 2])
    at = lid[..., None] * d[..., :2] - c[..., :2]
    on = (lid > 0) & (at.square().sum(-1) < c[..., 2] ** 2) & (c[..., 3] > 0)
    of_round = torch.minimum(side, torch.where(on, lid, torch.inf)).amin(1)
    hit = torch.minimum(torch.minimum(of_box, of_round), down[None])
    reach = hit[..., None] * direction[None, :, :2]
    return torch.where((reach.abs() <= HALF).all(-1), hit, torch.inf)


def farthest_points(points: Tensor, valid: Tensor, num: int) -> Tensor:
    """[S, num, 3] of points [S, K, 3]: from the first valid one on always the one farthest from those chosen;
    once all are chosen they come again.
    """
    far = torch.where(valid, torch.inf, -1.0)
    chosen, at = [], valid.long().argmax(1)
    for _ in range(num):
        chosen.append(points.gather(1, at[:, None, None].expand(-1, 1, 3)))
        far = torch.where(valid, torch.minimum(far, (points - chosen[-1]).square().sum(-1)), -1.0)
        at = far.argmax(1)
    return torch.cat(chosen, 1)


def scanned(scenes: Scenes, num: int, generator: torch.Generator) -> Tensor:
    """[S, num, 3]: what the sensor sees of each scene."""
    elevation = torch.deg2rad(torch.linspace(LOWEST, HIGHEST, RINGS))
    azimuth = torch.arange(AZIMUTHS) * (2 * math.pi / AZIMUTHS)
    e, a = (g.flatten() for g in torch.meshgrid(elevation, azimuth, indexing="ij"))
    direction = torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()], -1)
    hit = cast_rays(scenes, direction)
    valid = hit.isfinite()
    hit = torch.where(valid, hit, 0.0) + NOISE * torch.randn(hit.shape, generator=generator)
    points = hit[..., None] * direction + torch.tensor([0.0, 0.0, HEIGHT])
    order = torch.rand(hit.shape, generator=generator).argsort(1)  # another first point for every scan
    points, valid = points.gather(1, order[..., None].expand(-1, -1, 3)), valid.gather(1, order)
    return farthest_points(points, valid, num)


def make_scans(num: int, scan_points: int, truth_points: int, seed: int) -> tuple[Tensor, Tensor]:
    """(scans [num, scan_points, 3], truth [num, truth_points, 3]) of random scenes; the first ones of a seed
    do not depend on how many follow.
    """
    scans, truth = [], []
    for first in range(0, num, AT_ONCE):
        generator = torch.Generator().manual_seed(seed * 100_003 + first)
        scenes = draw_scenes(AT_ONCE, generator)
        truth.append(surface_points(scenes, truth_points, generator))
        scans.append(scanned(scenes, scan_points, generator))
    return torch.cat(scans)[:num], torch.cat(truth)[:num]
