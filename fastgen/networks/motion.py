"""What of a clip's latents is its motion: representations in which two clips of other looks may be alike.

Paper: Zhai et al. 2024 (motion consistency model), arXiv 2406.06890. Latents are [B, C, F, h, w]; images
[B, C, h, w] and points [B, C] count as clips of a single frame.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from fastgen.core.errors import UserError
from fastgen.diffusion.spectra import frequency_band

Motion = Literal["learned", "raw", "diff", "low", "high"]
"""a head that is trained, latents as they are, what changes from frame to frame, a band of frequencies"""


def _groups(width: int) -> int:
    return next(n for n in (32, 16, 8, 4, 2, 1) if width % n == 0 and width // n > 1 or n == 1)


class MotionHead(nn.Module):
    """M(z) = z + net(z), every frame for itself; net's last layer begins at zero, so that M begins as z."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        last = nn.Conv2d(width, channels, 1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        inner = nn.Conv2d(channels, width, 1), nn.GroupNorm(_groups(width), width), nn.SiLU()
        self.net = nn.Sequential(nn.SiLU(), *inner, last)

    def forward(self, z: Tensor) -> Tensor:
        """Shaped like z."""
        frames = z.transpose(1, 2).flatten(0, 1) if z.ndim == 5 else z
        whole = frames.to(next(self.net.parameters()).dtype)
        whole = whole if whole.ndim == 4 else whole[..., None, None]
        more = self.net(whole).reshape(frames.shape)
        return z + (more.unflatten(0, (len(z), -1)).transpose(1, 2) if z.ndim == 5 else more)


def motion_of(kind: Motion, z: Tensor, head: nn.Module | None = None, cutoff: float = 0.25) -> Tensor:
    """The motion of latents z; `diff` has one frame less, every other kind is shaped like z."""
    if kind == "learned":
        assert head is not None, "a learned representation has a head"
        return head(z)
    if kind == "raw":
        return z
    if z.ndim < 4 or kind == "diff" and (z.ndim < 5 or z.shape[2] < 2):
        what = "points" if z.ndim < 4 else "single pictures"
        raise UserError("objective.motion", f"found {kind} for a teacher of {what}", "use learned or raw")
    if kind == "diff":
        return z.diff(dim=2)  # z_{f+1} - z_f
    band = frequency_band(z, cutoff, dims=3 if z.ndim == 5 else 2)
    return band if kind == "low" else z - band


@torch.no_grad()
def kept_share(motion: Tensor, z: Tensor) -> Tensor:
    """var M(z) / var z: what tells whether a head has collapsed to a constant."""
    return motion.float().var() / z.float().var().clamp(min=1e-12)
