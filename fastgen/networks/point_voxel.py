"""A point-voxel network: points read their surroundings on a small grid, in plain torch. An export copies
this file beside its weights, so it imports torch and diffusers alone:

    from point_voxel import PointVoxelModel
    net = PointVoxelModel.from_pretrained("unet")

Liu et al. 2019, arXiv 1907.03739 (the two branches); the scan as a condition and the noise per point are
those of LiDiff, Nunes et al. 2024, arXiv 2403.13470. Differs: one dense grid with a small U-Net in the place
of sparse convolutions, GroupNorm in the place of BatchNorm, points shared out over the eight nearest cells.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from torch import Tensor, nn

WAVES = 64
"""channels of the sinusoidal embedding of the time"""


class PointVoxelOutput(BaseOutput):
    """sample [B, N, 3]: the prediction for every point."""

    sample: Tensor


class Block(nn.Module):
    """x [B, I, X, Y, Z] to [B, O, X / stride, ...]: two normalised convolutions beside a plain one, the time
    embedding [B, E] scaling and shifting between them.
    """

    def __init__(self, inner: int, outer: int, embedded: int, stride: int = 1, groups: int = 8):
        super().__init__()
        self.norm, self.norm2 = nn.GroupNorm(groups, inner), nn.GroupNorm(groups, outer)
        self.conv = nn.Conv3d(inner, outer, 3, stride, 1)
        self.conv2 = nn.Conv3d(outer, outer, 1)
        self.time = nn.Linear(embedded, 2 * outer)
        self.skip = nn.Conv3d(inner, outer, 1, stride)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.time(e)[:, :, None, None, None].chunk(2, 1)
        h = self.conv(F.silu(self.norm(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class PointVoxelModel(ModelMixin, ConfigMixin):
    """The prediction for each of N points that start at a scan of M: `sample` [B, N, 3] says how far they
    have moved from there, all lengths in the unit of `low` and `high`.
    """

    @register_to_config
    def __init__(
        self,
        num_points: int = 1500,
        scan_points: int = 150,
        low: tuple[float, float, float] = (-6.0, -6.0, -0.5),
        high: tuple[float, float, float] = (6.0, 6.0, 3.5),
        grid: tuple[int, int, int] = (20, 20, 8),
        width: int = 24,
        formulation: str = "local",
    ):
        """num_points: of a completion, a multiple of scan_points; low, high: corners of the box that the grid
        fills, beyond which points are read at its border; formulation: local (noise is added to the true
        point, alpha = 1) or vp (alpha^2 + sigma^2 = 1), which is read by whoever makes the noise schedule.
        """
        super().__init__()
        if num_points % scan_points or formulation not in ("local", "vp"):
            raise ValueError(
                f"{num_points} points of {scan_points}, {formulation}: not a multiple, or unknown"
            )
        wide, embedded = 2 * width, 2 * width
        self.time_proj = Timesteps(WAVES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(WAVES, embedded)
        self.point_in = nn.Sequential(nn.Linear(17, width), nn.SiLU(), nn.Linear(width, width))
        self.conv_in = nn.Conv3d(width + 2, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            (
                Block(width, wide, embedded, 2),
                Block(wide, wide, embedded, 2),
                Block(wide, wide, embedded),
                Block(2 * wide, wide, embedded),
            )
        )
        self.narrow = nn.Conv3d(width + wide, width, 1)
        self.last = Block(width, width, embedded)
        self.point_time = nn.Linear(embedded, wide)
        self.point_mid = nn.Linear(2 * width + 17, wide)
        self.point_mid2 = nn.Linear(wide, wide)
        self.conv_out = nn.Linear(wide, 3)

    def starts(self, start: Tensor) -> Tensor:
        """Where the points [B, N, 3] begin: each of the scan's [B, M, 3], several times."""
        return start.repeat_interleave(self.config["num_points"] // self.config["scan_points"], 1)

    def forward(
        self, sample: Tensor, timestep: Tensor, start: Tensor, scan: Tensor, return_dict: bool = True
    ) -> PointVoxelOutput | tuple[Tensor]:
        """sample [B, N, 3], timestep [B] or one number, start [B, M, 3]: the scan that points begin at, scan
        [B, M, 3]: what the network is told of it, zeros for nothing (guidance).
        """
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        e = F.silu(self.time_embedding(self.time_proj(timestep).to(sample.dtype)))
        x = self.starts(start) + sample
        seen = (scan.abs().amax((1, 2)) > 0).to(x.dtype)[:, None, None]
        told = self._told(x, scan, seen)
        h = self.point_in(told)
        cells, weights = self._cells(x)
        counts = self._share_out(torch.ones_like(x[..., :1]), cells, weights)
        of_scan = self._share_out(torch.ones_like(scan[..., :1]) * seen, *self._cells(scan))
        mean = self._share_out(h, cells, weights) / (counts + 1e-2)
        g = self._convolved(torch.cat([mean, (1 + counts).log(), (1 + of_scan).log()], 1), e)
        around = self._read(g, cells, weights)
        m = self.point_mid(torch.cat([told, h, around], -1)) + self.point_time(e)[:, None]
        out = self.conv_out(F.silu(self.point_mid2(F.silu(m))))
        return PointVoxelOutput(sample=out) if return_dict else (out,)

    def _told(self, x: Tensor, scan: Tensor, seen: Tensor) -> Tensor:
        """What a point [B, N, 17] knows alone: where it is in the box and its cell, and the way to the
        nearest point of the scan.
        """
        low, high, grid = (x.new_tensor(self.config[k]) for k in ("low", "high", "grid"))
        unit = (x - low) / (high - low)
        phase = unit * grid * (2 * torch.pi)
        index = torch.cdist(x.detach().float(), scan.float()).argmin(-1)
        way = (scan.gather(1, index[..., None].expand(-1, -1, 3)) - x) * seen
        length = (way.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        parts = [2 * unit - 1, phase.sin(), phase.cos(), way, way / (0.1 + length), length]
        return torch.cat([*parts, seen.expand(-1, x.shape[1], 1)], -1)

    def _cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The eight cells [B, N, 8] around each point, and their shares of it, which add up to 1."""
        low, high = (x.new_tensor(self.config[k]) for k in ("low", "high"))
        size = torch.tensor(self.config["grid"], device=x.device)
        u = ((x - low) / (high - low) * size - 0.5).clamp(torch.zeros_like(size).to(x), (size - 1).to(x))
        base = u.detach().floor().clamp(max=(size - 2).to(x))
        rest, base = u - base, base.long()
        cells, weights = [], []
        for corner in range(8):
            step = torch.tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1], device=x.device)
            at = base + step
            cells.append((at[..., 0] * size[1] + at[..., 1]) * size[2] + at[..., 2])
            weights.append(torch.where(step.bool(), rest, 1 - rest).prod(-1))
        return torch.stack(cells, -1), torch.stack(weights, -1)

    def _share_out(self, f: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
        """Sums of features [B, N, C] over cells, [B, C, X, Y, Z]."""
        size, channels = tuple(self.config["grid"]), f.shape[-1]
        total = f.new_zeros(len(f), size[0] * size[1] * size[2], channels)
        for corner in range(8):
            index = cells[..., corner, None].expand(-1, -1, channels)
            total = total.scatter_add(1, index, f * weights[..., corner, None])
        return total.transpose(1, 2).unflatten(2, size)

    def _read(self, g: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
        """Features of a grid [B, C, X, Y, Z] at the points, [B, N, C]."""
        flat = g.flatten(2).transpose(1, 2)
        found = flat.new_zeros(*cells.shape[:2], flat.shape[-1])
        for corner in range(8):
            index = cells[..., corner, None].expand(-1, -1, flat.shape[-1])
            found = found + flat.gather(1, index) * weights[..., corner, None]
        return found

    def _convolved(self, g: Tensor, e: Tensor) -> Tensor:
        """The U-Net over the grid: 1, 1/2, 1/4 and back."""
        down, deeper, middle, up = self.blocks
        fine = self.conv_in(g)
        half = down(fine, e)
        coarse = middle(deeper(half, e), e)
        coarse = F.interpolate(coarse, size=half.shape[2:], mode="nearest")
        half = up(torch.cat([half, coarse], 1), e)
        half = F.interpolate(half, size=fine.shape[2:], mode="nearest")
        return self.last(self.narrow(torch.cat([fine, half], 1)), e)
