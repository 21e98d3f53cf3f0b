"""Light and material to colour: distant light on a grid of directions, and a dielectric that scatters it.

  L_out(v) = sum_k L_k w_k (n.l_k) [ albedo / pi + D(n.h_k) F(v.h_k) / (4 G(n.l_k) G(n.v)) ]
  D = a^2 / (pi ((n.h)^2 (a^2 - 1) + 1)^2),  a = roughness^2                         GGX (Walter et al. 2007)
  1/G(c) = 1 / (c (1 - k) + k),  k = (roughness + 1)^2 / 8;  F = 0.04 + 0.96 (1 - v.h)^5      after Schlick

Cook-Torrance with the terms that Karis chose for real-time rendering (2013); radiance is linear.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BASE = 0.04
"""reflectance of a dielectric seen along its normal"""
ROUGH = (0.25, 1.0)
"""least and most roughness: sharper highlights fall between the directions of a light"""


@dataclass(frozen=True)
class Light:
    """Radiance [rows, columns, 3] from all around, none occluded: rows from straight above (+z) to straight
    below, columns by azimuth from +x to +y; each entry stands for its middle.
    """

    radiance: Tensor

    @property
    def directions(self) -> Tensor:
        """[K, 3], unit, towards the light."""
        rows, columns, _ = self.radiance.shape
        polar = (torch.arange(rows) + 0.5) / rows * math.pi
        azimuth = (torch.arange(columns) + 0.5) / columns * 2 * math.pi
        polar, azimuth = torch.meshgrid(polar, azimuth, indexing="ij")
        parts = polar.sin() * azimuth.cos(), polar.sin() * azimuth.sin(), polar.cos()
        return torch.stack(parts, -1).view(-1, 3).to(self.radiance)

    @property
    def solid_angles(self) -> Tensor:
        """[K], steradians; 4 pi together."""
        rows, columns, _ = self.radiance.shape
        edges = torch.linspace(0, math.pi, rows + 1).cos()
        return ((edges[:-1] - edges[1:]) * 2 * math.pi / columns).repeat_interleave(columns).to(self.radiance)

    def turned(self, columns: int) -> "Light":
        """Turned about z by whole columns, from +x to +y."""
        return Light(self.radiance.roll(columns, 1))


def uniform(rows: int = 8, columns: int = 16, radiance: float = 1.0) -> Light:
    """The same from everywhere."""
    return Light(torch.full((rows, columns, 3), radiance))


def sky(
    sun: tuple[float, float],
    colour: tuple[float, float, float],
    above: tuple[float, float, float],
    below: tuple[float, float, float],
    rows: int = 8,
    columns: int = 16,
) -> Light:
    """A gradient from `below` to `above`, and a soft sun of this colour at (azimuth, elevation) degrees."""
    grid = uniform(rows, columns)
    up = 0.5 + 0.5 * grid.directions[:, 2:]
    azimuth, elevation = (math.radians(a) for a in sun)
    way = torch.tensor(
        [
            math.cos(elevation) * math.cos(azimuth),
            math.cos(elevation) * math.sin(azimuth),
            math.sin(elevation),
        ]
    )
    glow = (12 * (grid.directions @ way - 1)).exp()[:, None] * torch.tensor(colour)
    radiance = up * torch.tensor(above) + (1 - up) * torch.tensor(below) + glow
    return Light(radiance.view(rows, columns, 3))


def specular(n_l: Tensor, n_v: Tensor, l_v: Tensor, roughness: Tensor) -> Tensor:
    """D F / (4 G G) of cosines of any shape that broadcasts: normal and light, normal and view, light and
    view; per steradian.
    """
    n_l, n_v = n_l.clamp(min=0), n_v.clamp(min=1e-3)
    v_h = (0.5 + 0.5 * l_v).clamp(min=1e-6).sqrt()
    n_h = ((n_l + n_v) / (2 * v_h)).clamp(max=1.0)
    a2 = roughness**4
    spread = a2 / (math.pi * (n_h.square() * (a2 - 1) + 1).square())
    k = (roughness + 1).square() / 8
    masked = 4 * (n_l * (1 - k) + k) * (n_v * (1 - k) + k)
    return spread * (BASE + (1 - BASE) * (1 - v_h).clamp(min=0) ** 5) / masked


def shade(normal: Tensor, view: Tensor, albedo: Tensor, roughness: Tensor, light: Light) -> Tensor:
    """Radiance [P, 3] towards view [P, 3] (unit, from the surface to the camera) of surfaces with unit normal
    [P, 3], albedo [P, 3] in 0 to 1 and roughness [P].
    """
    ways = light.directions.to(normal)
    n_l, l_v = (normal @ ways.T).clamp(min=0), view @ ways.T  # [P, K]
    n_v = (normal * view).sum(-1, keepdim=True)
    arriving = (light.radiance.reshape(-1, 3) * light.solid_angles[:, None]).to(normal)  # [K, 3]
    shine = specular(n_l, n_v, l_v, roughness[:, None]) * n_l
    return albedo / math.pi * (n_l @ arriving) + shine @ arriving


def hdr(light: Light) -> bytes:
    """The light as a Radiance picture (.hdr), which renderers take for a world: four bytes a pixel, a
    mantissa for each colour and one exponent.
    """
    rows, columns, _ = light.radiance.shape
    rgb = light.radiance.detach().float().cpu().clamp(min=0)
    most = rgb.amax(-1)
    exponent = torch.frexp(most.clamp(min=1e-30)).exponent
    mantissa = (rgb * 2.0 ** (8 - exponent)[..., None]).clamp(max=255).byte()
    last = torch.where(most > 1e-30, exponent + 128, torch.zeros_like(exponent)).byte()
    head = f"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y {rows} +X {columns}\n"
    return head.encode() + torch.cat([mantissa, last[..., None]], -1).numpy().tobytes()


def unit(v: Tensor) -> Tensor:
    """Of length 1 along the last axis."""
    return F.normalize(v, dim=-1)
