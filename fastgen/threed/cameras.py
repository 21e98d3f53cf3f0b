"""Batches of cameras that look at the origin, and how they are drawn.

The world is right-handed with z up; azimuth turns from +x to +y, elevation rises from the xy plane, and the
camera stands at distance * (cos el cos az, cos el sin az, sin el). `c2w` has OpenGL axes (x right, y up, z
backward), `viewmat` is world-to-camera with OpenCV axes (x right, y down, z forward), which rasterisers take.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.core.errors import UserError

VIEWS = ("front", "side", "back", "overhead")
"""how a prompt names where it is seen from"""
STEEPEST = 89.0
"""degrees of elevation: straight from above, no direction is up"""
OVERHEAD = 60.0
"""degrees of elevation from which on a view is overhead"""
BOUNDS = {
    "azimuth": (-math.inf, math.inf, "give degrees"),
    "elevation": (-math.inf, math.inf, f"give degrees; beyond {STEEPEST:g} it is {STEEPEST:g}"),
    "distance": (0, math.inf, "give distances above 0"),
    "fovy": (0, 180, "give degrees between 0 and 180"),
}
"""what lies between, by the entry of cameras, and what to do"""


@dataclass(frozen=True)
class Cameras:
    """A batch of cameras, each entry [B]: angles and the vertical field of view in degrees, distance in world
    units.
    """

    azimuth: Tensor
    elevation: Tensor
    distance: Tensor
    fovy: Tensor

    def __post_init__(self):
        for key, (low, high, allowed) in BOUNDS.items():
            value = getattr(self, key)
            if not ((value > low) & (value < high)).all():
                found = f"found {float(value.min()):g} to {float(value.max()):g}"
                raise UserError(f"cameras.{key}", found, allowed)

    def __len__(self) -> int:
        return len(self.azimuth)

    @classmethod
    def of(cls, row: Tensor) -> "Cameras":
        """Cameras of rows [B, 4]: azimuth, elevation, distance, fovy; the inverse of `rows`."""
        return cls(*row.unbind(-1))

    def rows(self) -> Tensor:
        """[B, 4], as conditions hold them."""
        return torch.stack([self.azimuth, self.elevation, self.distance, self.fovy], -1)

    def __getitem__(self, index) -> "Cameras":
        return Cameras.of(self.rows()[index])

    @property
    def position(self) -> Tensor:
        """[B, 3] in the world."""
        az, el = self.azimuth.deg2rad(), self.elevation.clamp(-STEEPEST, STEEPEST).deg2rad()
        return self.distance[:, None] * torch.stack([el.cos() * az.cos(), el.cos() * az.sin(), el.sin()], -1)

    @property
    def c2w(self) -> Tensor:
        """Camera-to-world [B, 4, 4] with OpenGL axes: columns right, up, backward, position."""
        position = self.position
        forward = -F.normalize(position, dim=-1)
        up = torch.tensor([0.0, 0.0, 1.0]).to(position).expand_as(position)
        right = F.normalize(torch.linalg.cross(forward, up), dim=-1)
        top = torch.stack([right, torch.linalg.cross(right, forward), -forward, position], -1)
        last = torch.tensor([0.0, 0.0, 0.0, 1.0]).to(top).expand(len(top), 1, 4)
        return torch.cat([top, last], 1)

    @property
    def viewmat(self) -> Tensor:
        """World-to-camera [B, 4, 4] with OpenCV axes."""
        c2w = self.c2w
        axes = c2w[:, :3, :3] * torch.tensor([1.0, -1.0, -1.0]).to(c2w)
        rotation = axes.transpose(1, 2)
        out = torch.zeros_like(c2w)
        out[:, :3, :3], out[:, :3, 3] = rotation, -(rotation @ c2w[:, :3, 3:])[..., 0]
        out[:, 3, 3] = 1
        return out

    def focal(self, height: int) -> Tensor:
        """Focal length [B] in pixels, f = H / (2 tan(fovy / 2)); pixels are square."""
        return 0.5 * height / (0.5 * self.fovy.deg2rad()).tan()

    def intrinsics(self, height: int, width: int) -> Tensor:
        """K [B, 3, 3] in pixels, with the centre of the image at (W / 2, H / 2)."""
        K = torch.zeros(len(self), 3, 3).to(self.fovy)
        K[:, 0, 0] = K[:, 1, 1] = self.focal(height)
        K[:, 0, 2], K[:, 1, 2], K[:, 2, 2] = width / 2, height / 2, 1
        return K

    def rays(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """(origins, unit directions), each [B, H, W, 3] in the world, through the centres of the pixels."""
        c2w, f = self.c2w, self.focal(height)[:, None, None]
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        x, y = x.to(f), y.to(f)
        local = torch.stack(
            torch.broadcast_tensors((x - width / 2) / f, (height / 2 - y) / f, -x.new_ones(())), -1
        )
        directions = F.normalize(torch.einsum("bij,bhwj->bhwi", c2w[:, :3, :3], local), dim=-1)
        return c2w[:, None, None, :3, 3].expand_as(directions), directions

    def names(self, front: float = 45.0, back: float = 45.0) -> list[str]:
        """The word of `VIEWS` for each: front within `front` degrees of azimuth 0, back within `back` of 180,
        overhead from an elevation of 60 on, which decides first.
        """
        az = wrapped(self.azimuth)
        found = torch.ones_like(az).long()  # side
        found[az.abs() < front] = 0
        found[az.abs() > 180 - back] = 2
        found[self.elevation > OVERHEAD] = 3
        return [VIEWS[i] for i in found.tolist()]


def wrapped(azimuth: Tensor) -> Tensor:
    """Degrees in [-180, 180)."""
    return (azimuth + 180) % 360 - 180


@dataclass(frozen=True)
class Ranges:
    """Where cameras are drawn, as pairs of lowest and highest: degrees, and world units."""

    elevation: tuple[float, float] = (-10.0, 45.0)
    distance: tuple[float, float] = (2.0, 2.4)
    fovy: tuple[float, float] = (45.0, 50.0)


def random_cameras(num: int, ranges: Ranges, generator: torch.Generator | None = None) -> Cameras:
    """Cameras whose azimuths are stratified over the batch, az_k = (u_k + k) / B * 360 - 180; the elevation
    is uniform in its range with probability 1/2, else uniform over the sphere between its ends (DreamFusion,
    arXiv 2209.14988, as threestudio draws it).
    """
    u = torch.rand(5, num, generator=generator)
    azimuth = (u[0] + torch.arange(num)) / num * 360 - 180
    low, high = (math.sin(math.radians(e)) for e in ranges.elevation)
    on_sphere = (low + (high - low) * u[1]).asin().rad2deg()
    elevation = torch.where(u[2] < 0.5, _between(ranges.elevation, u[1]), on_sphere)
    return Cameras(azimuth, elevation, _between(ranges.distance, u[3]), _between(ranges.fovy, u[4]))


def rig(num: int, ranges: Ranges, generator: torch.Generator | None = None, views: int = 4) -> Cameras:
    """`num` groups of `views` cameras around the object at equal azimuths, which share elevation, distance
    and field of view: the input of multi-view teachers (MVDream, arXiv 2308.16512).
    """
    first = random_cameras(num, ranges, generator).rows().repeat_interleave(views, 0)
    first[:, 0] = wrapped(first[:, 0] + torch.arange(views).repeat(num) * 360 / views)
    return Cameras.of(first)


def turntable(num: int, elevation: float = 15.0, distance: float = 2.2, fovy: float = 47.5) -> Cameras:
    """Cameras at equal azimuths of one full turn, the front first."""
    row = torch.tensor([0.0, elevation, distance, fovy]).repeat(num, 1)
    row[:, 0] = wrapped(torch.arange(num) * 360 / num)
    return Cameras.of(row)


def middle(ranges: Ranges, num: int) -> Cameras:
    """The turntable at the middle of these ranges."""
    elevation, distance, fovy = (sum(r) / 2 for r in (ranges.elevation, ranges.distance, ranges.fovy))
    return turntable(num, elevation, distance, fovy)


def _between(span: Sequence[float], u: Tensor) -> Tensor:
    return span[0] + (span[1] - span[0]) * u
