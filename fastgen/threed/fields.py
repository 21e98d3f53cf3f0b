"""An asset as a field of density and colour in the box [-1, 1]^3, and its volume renderer.

  density(x) = softplus(f(x) + 10 (1 - |x| / 0.5))                    the blob that Magic3D starts from
  or from a signed distance s(x) = |x| - 0.5 + f(x), as VolSDF does (Yariv et al. 2021, arXiv 2106.12052):
  density(s) = k (0.5 + 0.5 sign(-s) (1 - exp(-|s| k)))               k fixed
  alpha_i = 1 - exp(-density_i d), T_i = prod_{j < i} (1 - alpha_j),  C = sum_i T_i alpha_i c_i + T background

What gives f and the colour is a dense grid, three planes with a small network (EG3D, arXiv 2112.07945), or a
hash grid with one (instant NGP, Mueller et al. 2022, arXiv 2201.05989); one for both, or one for each.

  normal n(x) = grad s / |grad s|, by central differences of step h

Differs: samples are evenly spaced over a ray's way past the box; no occupancy grid prunes them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.threed.asset import Asset, Render
from fastgen.threed.cameras import Cameras

SHARPNESS = 30.0
"""k of VolSDF"""
PRIMES = (1, 2654435761, 805459861)
"""of the spatial hash of instant NGP"""


class DenseGrid(nn.Module):
    """`out` values at each of size^3 points, trilinear between them; stored in units of `UNIT`, so that the
    learning rate of Gaussians fits.
    """

    UNIT = 4.0

    def __init__(self, size: int, generator: torch.Generator, out: int = 4):
        super().__init__()
        start = 0.1 * torch.randn(1, out, size, size, size, generator=generator)
        self.table = nn.Parameter(start / self.UNIT)

    def forward(self, p: Tensor) -> Tensor:
        found = F.grid_sample(
            self.UNIT * self.table, p.view(1, -1, 1, 1, 3), align_corners=True, padding_mode="border"
        )
        return found[0, :, :, 0, 0].T


class Triplane(nn.Module):
    """Features of three planes, added, through a network of one hidden layer."""

    def __init__(
        self, size: int, generator: torch.Generator, out: int = 4, width: int = 16, hidden: int = 32
    ):
        super().__init__()
        self.planes = nn.Parameter(0.1 * torch.randn(3, width, size, size, generator=generator))
        self.net = small_net(width, hidden, out, generator)

    def forward(self, p: Tensor) -> Tensor:
        return self.net(plane_features(self.planes[None], p[None])[0])


def plane_features(planes: Tensor, p: Tensor) -> Tensor:
    """Features [B, N, C] of the xy, xz and yz planes [B, 3, C, S, S] at points [B, N, 3], added."""
    at = torch.stack([p[..., [0, 1]], p[..., [0, 2]], p[..., [1, 2]]], 1).flatten(0, 1)[:, :, None]
    found = F.grid_sample(planes.flatten(0, 1), at, align_corners=True, padding_mode="border")
    return found[..., 0].unflatten(0, planes.shape[:2]).sum(1).mT


class HashTables(nn.Module):
    """Levels of finer and finer grids whose corners share a table by a hash."""

    resolutions: Tensor

    def __init__(self, finest: int, generator: torch.Generator, levels: int = 8, entries: int = 2**14):
        super().__init__()
        growth = (finest / 4) ** (1 / max(1, levels - 1))
        self.register_buffer("resolutions", torch.tensor([int(4 * growth**i) for i in range(levels)]))
        self.tables = nn.Parameter(0.1 * (2 * torch.rand(levels, entries, 2, generator=generator) - 1))

    def features(self, p: Tensor) -> Tensor:
        """[N, 2 levels] at points [N, 3]."""
        scaled = (p / 2 + 0.5).clamp(0, 1)[:, None] * self.resolutions[:, None]  # [N, L, 3]
        low = scaled.floor()
        part = scaled - low
        corners = torch.tensor([[i >> k & 1 for k in range(3)] for i in range(8)], device=p.device)
        at = low.long()[:, :, None] + corners  # [N, L, 8, 3]
        mixed = at[..., 0] * PRIMES[0] ^ at[..., 1] * PRIMES[1] ^ at[..., 2] * PRIMES[2]
        index = mixed % self.tables.shape[1]
        found = self.tables[torch.arange(len(self.resolutions))[:, None], index]  # [N, L, 8, 2]
        near = torch.where(corners.bool(), part[:, :, None], 1 - part[:, :, None]).prod(-1)
        return (found * near[..., None]).sum(2).flatten(1)


class HashGrid(HashTables):
    """Their features through a network of one hidden layer."""

    def __init__(self, finest: int, generator: torch.Generator, out: int = 4, hidden: int = 32):
        super().__init__(finest, generator)
        self.net = small_net(2 * len(self.resolutions), hidden, out, generator)

    def forward(self, p: Tensor) -> Tensor:
        return self.net(self.features(p))


def small_net(width: int, hidden: int, out: int, generator: torch.Generator) -> nn.Sequential:
    """To `out` values."""
    first, last = nn.Linear(width, hidden), nn.Linear(hidden, out)
    with torch.no_grad():
        for layer in (first, last):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
            layer.bias.zero_()
    return nn.Sequential(first, nn.ReLU(), last)


KINDS = {"grid": DenseGrid, "triplane": Triplane, "hash": HashGrid}


class FieldAsset(Asset):
    """Density and colour of one of `KINDS` with `size` points a side (a hash grid: its finest level)."""

    def __init__(
        self,
        kind: str = "grid",
        size: int = 32,
        surface: bool = False,
        samples: int = 48,
        seed: int = 0,
        separate: bool = False,
    ):
        """surface: the first value is a signed distance and not a density; samples: of a ray; separate:
        density or distance and colour have a `field` and a `paint` of their own, of that kind and size.
        """
        super().__init__()
        self.kind, self.size, self.surface, self.samples = kind, size, surface, samples
        generator = torch.Generator().manual_seed(seed)
        self.field = KINDS[kind](size, generator, 1 if separate else 4)
        self.paint = KINDS[kind](size, generator, 3) if separate else None
        self.colours_in = ("paint",) if separate else ()

    def at(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """(density [...], colour [..., 3] in 0 to 1) at points [..., 3]; nothing is outside the box."""
        flat = p.reshape(-1, 3)
        found = self.field(flat)
        if self.paint is not None:
            found = torch.cat([found, self.paint(flat)], -1)
        return shaded(p, found.view(*p.shape[:-1], 4), self.surface)

    def distance(self, p: Tensor) -> Tensor:
        """Signed distance [...] of a surface's field."""
        return distance(p, self.field(p.reshape(-1, 3)).view(*p.shape[:-1], -1))

    def normal(self, p: Tensor) -> Tensor:
        """Outward unit normals [..., 3] of a surface, by steps of half a cell, or 0.01 if that is more."""
        steps = max(0.01, 1 / self.size) * torch.eye(3).to(p)
        around = self.distance(p[..., None, :] + torch.cat([steps, -steps]))  # [..., 6]
        return F.normalize(around[..., :3] - around[..., 3:], dim=-1)

    def render(self, cameras: Cameras, size: int, background: Tensor) -> Render:
        return marched(self.at, cameras, size, self.samples, background.to(next(self.parameters())))

    def render_normals(self, cameras: Cameras, size: int, background: Tensor) -> Render:
        assert self.surface, "the field holds no distance"

        def at(p: Tensor) -> tuple[Tensor, Tensor]:
            return density_of(p, self.distance(p)), 0.5 + 0.5 * self.normal(p)

        return marched(at, cameras, size, self.samples, background.to(next(self.parameters())))


def distance(p: Tensor, found: Tensor) -> Tensor:
    """Signed distance [...] that values [..., 1 or 4] of a field say of points [..., 3]; zeros are a ball."""
    return p.norm(dim=-1) - 0.5 + 0.1 * found[..., 0]


def density_of(p: Tensor, s: Tensor) -> Tensor:
    """Density [...] of VolSDF at points [..., 3] of signed distances [...]; nothing is outside the box."""
    density = SHARPNESS * (0.5 - 0.5 * s.sign() * -torch.expm1(-s.abs() * SHARPNESS))
    return density * (p.abs() <= 1).all(-1)


def shaded(p: Tensor, found: Tensor, surface: bool) -> tuple[Tensor, Tensor]:
    """(density [...], colour [..., 3]) that values [..., 4] of a field say of points [..., 3]."""
    colour = found[..., 1:].sigmoid()
    if surface:
        return density_of(p, distance(p, found)), colour
    density = F.softplus(found[..., 0] + 10 * (1 - p.norm(dim=-1) / 0.5))
    return density * (p.abs() <= 1).all(-1), colour


def marched(
    at: Callable[[Tensor], tuple[Tensor, Tensor]],
    cameras: Cameras,
    size: int,
    samples: int,
    background: Tensor,
) -> Render:
    """What `at`, (density [B, H, W, S], colour [..., 3]) of points [B, H, W, S, 3], looks like from cameras
    [B], over a colour [B, 3] each.
    """
    origins, directions = (r.to(background) for r in cameras.rays(size, size))
    reach = cameras.distance.to(background)[:, None, None, None]
    low, high = (reach - 1.3).clamp(min=0.05), reach + 1.3
    d = (high - low) / samples
    along = low + d * (torch.arange(samples).to(background) + 0.5)  # [B, 1, 1, S]
    density, colour = at(origins[..., None, :] + along[..., None] * directions[..., None, :])
    weights, alpha = composited(density, d)
    rgb = (weights[..., None] * colour).sum(-2)
    depth = (weights * along).sum(-1) / alpha.clamp(min=1e-6)
    rgb = rgb.permute(0, 3, 1, 2) + (1 - alpha)[:, None] * background[..., None, None]
    return Render(rgb, alpha[:, None], depth[:, None])


def composited(density: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """(weights T_i alpha_i [..., S], alpha [...]) of densities [..., S] along rays in steps of d."""
    a = -torch.expm1(-density * d)
    through = torch.cat([torch.ones_like(a[..., :1]), (1 - a).cumprod(-1)], -1)
    return a * through[..., :-1], 1 - through[..., -1]
