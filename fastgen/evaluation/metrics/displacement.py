"""How far the thing in a clip moves from frame to frame: a similarity (shift, size, turn) fitted to each pair
of neighbouring frames by Gauss-Newton on brightness constancy (Lucas and Kanade 1981; Baker and Matthews
2004).

  I_k+1(p + d(p)) = I_k(p),   d(p) = t + a q + b Jq,   q = p - c,  J = (0 -1; 1 0),  c the thing's middle

The thing is what differs from the border's median colour. For clips of one thing before a plain background,
as the bundled ones are.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

ROUNDS = 5
"""of Gauss-Newton"""
SHARP, MOST = 0.1, 8.0
"""contrast from which on a pixel is the thing's; longest shift that is believed, pixels"""


def cover(clips: Tensor) -> Tensor:
    """How much of each pixel is the thing's: [N, F, H, W] in [0, 1] of clips [N, C, F, H, W] in [0, 1]."""
    x = clips.float()
    border = torch.cat([x[..., 0, :], x[..., -1, :], x[..., :, 0], x[..., :, -1]], -1).flatten(2)
    colour = border.median(2).values[:, :, None, None, None]
    contrast = (x - colour).abs().amax(1)
    return ((contrast - SHARP / 2) / SHARP).clamp(0, 1)


def displacement(clips: Tensor, batch_size: int = 250) -> Tensor:
    """Mean way of the thing's pixels from one frame to the next, pixels, [N]; 0 where nothing is shown."""
    return torch.cat([_displacement(part) for part in clips.split(batch_size)])


def _displacement(clips: Tensor) -> Tensor:
    mask = cover(clips)
    frames = _blurred(clips.float().transpose(1, 2))  # [N, F, C, H, W]
    (n, f), side = mask.shape[:2], mask.shape[-2:]
    first, second = frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)
    weight, after = mask[:, :-1].flatten(0, 1), mask[:, 1:].flatten(0, 1)
    points = _points(side)
    mass, middle = _moments(weight, points)
    mass_after, middle_after = _moments(after, points)
    start = (mass_after / mass).sqrt().clamp(0.5, 2) - 1
    shown = (mass > 1) & (mass_after > 1)
    fit = torch.cat([middle_after - middle, start[:, None], torch.zeros_like(start)[:, None]], 1)
    fit = _fitted(first, second, _wider(weight), (points, middle), fit)
    way = _field(points[None] - middle[:, None], fit).norm(dim=-1)  # [B, P]
    inside = weight.flatten(1)
    mean = (way * inside).sum(1) / inside.sum(1).clamp(min=1e-9)
    return torch.where(shown, mean.clamp(max=MOST), 0).unflatten(0, (n, f - 1)).mean(1)


def _fitted(
    first: Tensor, second: Tensor, weight: Tensor, where: tuple[Tensor, Tensor], fit: Tensor
) -> Tensor:
    """(t_x, t_y, a, b) [B, 4] of pairs of frames [B, C, H, W]; where: pixels [P, 2] and middles [B, 2]."""
    points, middle = where
    side = torch.tensor([first.shape[-1], first.shape[-2]])
    q = points[None] - middle[:, None]
    turned = torch.stack([-q[..., 1], q[..., 0]], -1)
    ones, none = torch.ones_like(q[..., 0]), torch.zeros_like(q[..., 0])
    slope = torch.stack(
        [torch.stack([ones, none], -1), torch.stack([none, ones], -1), q, turned], -1
    )  # d field / d fit, [B, P, 2, 4]
    dy, dx = torch.gradient(second, dim=(-2, -1))
    known = torch.cat([second, dx, dy], 1)
    w, wanted = weight.flatten(1)[:, None, :], first.flatten(2)
    for _ in range(ROUNDS):
        at = (points[None] + _field(q, fit)) * (2 / side) - 1 + 1 / side
        seen = F.grid_sample(known, at[:, None], padding_mode="border", align_corners=False)[:, :, 0]
        value, gx, gy = seen.chunk(3, 1)  # [B, C, P]
        jacobian = gx[..., None] * slope[:, None, :, 0] + gy[..., None] * slope[:, None, :, 1]
        flat = (jacobian * w[..., None]).flatten(1, 2)
        normal = flat.transpose(1, 2) @ jacobian.flatten(1, 2)
        scale = normal.diagonal(dim1=1, dim2=2)
        normal = normal + torch.diag_embed(1e-3 * scale + 1e-6)
        step = torch.linalg.solve(normal, (flat.transpose(1, 2) @ (wanted - value).flatten(1)[..., None]))
        limit = torch.tensor([1.0, 1.0, 0.15, 0.15], dtype=fit.dtype)
        fit = fit + step[..., 0].clamp(-limit, limit)
    return fit


def _field(q: Tensor, fit: Tensor) -> Tensor:
    """Displacements [B, P, 2] of points [B, P, 2] from the middle."""
    turned = torch.stack([-q[..., 1], q[..., 0]], -1)
    return fit[:, None, :2] + fit[:, None, 2:3] * q + fit[:, None, 3:] * turned


def _points(side: tuple[int, ...]) -> Tensor:
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in side), indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def _moments(weight: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Mass [B] and middle [B, 2] of masks [B, H, W]."""
    flat = weight.flatten(1)
    mass = flat.sum(1).clamp(min=1e-9)
    return mass, (flat @ points) / mass[:, None]


def _blurred(frames: Tensor) -> Tensor:
    """Frames [N, F, C, H, W] under a Gaussian of one pixel, the border repeated."""
    at = torch.arange(-2, 3, dtype=torch.float32)
    line = torch.exp(-(at**2) / 2)
    kernel = (line[:, None] * line)[None, None] / line.sum() ** 2
    flat = F.pad(frames.flatten(0, 2)[:, None], [2] * 4, mode="replicate")
    return F.conv2d(flat, kernel)[:, 0].unflatten(0, frames.shape[:3])


def _wider(mask: Tensor) -> Tensor:
    """Masks [B, H, W] grown by two pixels: the outline tells most of how a plain thing moves."""
    return F.max_pool2d(mask[:, None], 5, 1, 2)[:, 0]
