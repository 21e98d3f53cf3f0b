"""3D Gaussians to images: EWA projection (Zwicker et al. 2001) and front-to-back blending over tiles of
16 x 16 pixels, as 3D Gaussian Splatting does (Kerbl et al. 2023, arXiv 2308.04079), in plain torch.

  mean2d = pi(W mu);  cov2d = J W S W^T J^T + 0.3 I                     J: the Jacobian of the projection
  a_i(p) = min(0.999, o_i exp(-d^T cov2d^-1 d / 2)), 0 below 1/255      d = p - mean2d_i
  C(p) = sum_i c_i a_i T_i + T background,  T_i = prod_{j < i} (1 - a_j)        i by depth

Differs: blending does not stop where T falls below 1e-4, which changes a pixel by less than that.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.threed.cameras import Cameras

TILE, NEAR, DILATION, MOST, LEAST = 16, 0.05, 0.3, 0.999, 1 / 255
CHUNK = 2**22
"""pixel-Gaussian pairs that are blended at once"""


class Projected(NamedTuple):
    """Gaussians [N] as cameras [B] see them; what is behind a camera has radius 0."""

    means: Tensor
    """[B, N, 2] in pixels"""
    conics: Tensor
    """[B, N, 3]: entries xx, xy, yy of the inverse covariance"""
    depths: Tensor
    """[B, N] along the view direction, world units"""
    radii: Tensor
    """[B, N] of three standard deviations, pixels"""


def rotations(quaternions: Tensor) -> Tensor:
    """Rotation matrices [N, 3, 3] of quaternions (w, x, y, z) [N, 4] of any length."""
    w, x, y, z = F.normalize(quaternions, dim=-1).unbind(-1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, -1).view(-1, 3, 3)


def project(means: Tensor, quaternions: Tensor, scales: Tensor, cameras: Cameras, size: int) -> Projected:
    """Gaussians with means [N, 3], rotations [N, 4] and standard deviations [N, 3] on square images."""
    view, f = cameras.viewmat.to(means), cameras.focal(size).to(means)[:, None]
    local = means @ view[:, :3, :3].transpose(1, 2) + view[:, None, :3, 3]  # [B, N, 3]
    x, y, z = local.unbind(-1)
    seen = z > NEAR
    z = torch.where(seen, z, torch.ones_like(z))
    bound = 1.3 * size / (2 * f)  # off the image the linearisation is taken at its border
    u, v = (x / z).clamp(-bound, bound), (y / z).clamp(-bound, bound)
    zero = torch.zeros_like(z)
    J = torch.stack([f / z, zero, -f * u / z, zero, f / z, -f * v / z], -1).unflatten(-1, (2, 3))
    half = J @ view[:, None, :3, :3] @ (rotations(quaternions) * scales[:, None])  # [B, N, 2, 3]
    cov = half @ half.transpose(-1, -2)
    xx, xy, yy = cov[..., 0, 0] + DILATION, cov[..., 0, 1], cov[..., 1, 1] + DILATION
    det = xx * yy - xy * xy
    conics = torch.stack([yy / det, -xy / det, xx / det], -1)
    middle = 0.5 * (xx + yy)
    longest = middle + (middle.square() - det).clamp(min=0).sqrt()
    centre = size / 2 + torch.stack([f * x / z, f * y / z], -1)
    radii = torch.where(seen, 3 * longest.detach().sqrt(), zero)
    return Projected(centre, conics, z, radii)


def alphas(offset: Tensor, conic: Tensor, opacity: Tensor) -> Tensor:
    """Opacity of Gaussians at pixels offset [..., 2] from their means."""
    dx, dy = offset.unbind(-1)
    xx, xy, yy = conic.unbind(-1)
    a = (opacity * (-0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy).exp()).clamp(max=MOST)
    return torch.where(a < LEAST, torch.zeros_like(a), a)


def rasterise(seen: Projected, opacities: Tensor, features: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(blended features [B, C, size, size], alpha [B, 1, size, size]) of features [B, N, C] or [N, C] and
    opacities [N] in 0 to 1.
    """
    B, N = seen.depths.shape
    features = features.expand(B, N, features.shape[-1])
    side = -(-size // TILE)
    corner = torch.arange(side, device=seen.means.device) * TILE
    with torch.no_grad():
        order = torch.where(seen.radii > 0, seen.depths, torch.inf).argsort(dim=1, stable=True)
        low, high = seen.means - seen.radii[..., None], seen.means + seen.radii[..., None]
        inside = [
            (high[..., i, None] > corner) & (low[..., i, None] < corner + TILE) & (seen.radii > 0)[..., None]
            for i in (0, 1)
        ]  # [B, N, side]
        meets = (inside[1][..., None] & inside[0][:, :, None]).flatten(2)  # [B, N, tiles], row by row
        meets = meets.gather(1, order[..., None].expand_as(meets)).transpose(1, 2)  # [B, tiles, N] by depth
        most = max(1, int(meets.sum(-1).max()))
        place = (~meets).to(torch.int8).argsort(dim=-1, stable=True)[..., :most]
        real = meets.gather(-1, place)
        index = order[:, None].expand(B, side * side, N).gather(-1, place)
        index = (index + N * torch.arange(B, device=index.device)[:, None, None]).flatten(0, 1)
    real, parts = real.flatten(0, 1), []
    y, x = torch.meshgrid(*[torch.arange(TILE, device=corner.device) + 0.5] * 2, indexing="ij")
    pixels = torch.stack([x, y], -1).flatten(0, 1).to(seen.means)
    origin = torch.stack(torch.meshgrid(corner, corner, indexing="ij")[::-1], -1).flatten(0, 1).repeat(B, 1)
    flat = (seen.means.flatten(0, 1), seen.conics.flatten(0, 1), opacities.repeat(B), features.flatten(0, 1))
    for rows in torch.arange(len(index)).split(max(1, CHUNK // (TILE**2 * most))):
        mean, conic, opacity, colour = (v[index[rows]] for v in flat)  # [T, K, ...]
        opacity = opacity * real[rows]
        offset = (pixels + origin[rows, None])[:, :, None] - mean[:, None]
        a = alphas(offset, conic[:, None], opacity[:, None])  # [T, pixels, K]
        through = torch.cat([torch.ones_like(a[..., :1]), (1 - a).cumprod(-1)], -1)
        weight = a * through[..., :-1]
        parts.append(torch.cat([weight @ colour, 1 - through[..., -1:]], -1))
    tiles = torch.cat(parts).view(B, side, side, TILE, TILE, -1)
    image = tiles.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, side * TILE, side * TILE)[..., :size, :size]
    return image[:, :-1], image[:, -1:]
