"""Frequencies and edges of images [B, C, H, W] (or of clips, frame by frame): differentiable, in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _wavenumbers(x: Tensor) -> tuple[Tensor, Tensor]:
    """Signed whole wavenumbers ky [H, 1] and kx [1, W]."""
    height, width = x.shape[-2:]
    ky, kx = (torch.fft.fftfreq(n, 1 / n, device=x.device) for n in (height, width))
    return ky[:, None], kx[None]


def high_pass(x: Tensor, cutoff: float) -> Tensor:
    """x [..., H, W] without its frequencies of max(|ky|, |kx|) <= cutoff min(H, W) / 2, the mean among them.

    It is a projection: high_pass(x) and x - high_pass(x) are orthogonal.
    """
    ky, kx = _wavenumbers(x)
    kept = torch.maximum(ky.abs(), kx.abs()) > cutoff * min(x.shape[-2:]) / 2
    return torch.fft.ifft2(torch.fft.fft2(x.float(), norm="ortho") * kept, norm="ortho").real


def frequency_band(x: Tensor, cutoff: float, dims: int = 2) -> Tensor:
    """x with its low frequencies over the last `dims` axes alone: those at most `cutoff` from zero, as a
    share of the highest along each axis. It is a projection, so that x minus it has the high ones.
    """
    axes, square = tuple(range(-dims, 0)), torch.zeros((), device=x.device)
    for axis in axes:
        share = torch.fft.fftfreq(x.shape[axis], 0.5, device=x.device)  # in [-1, 1]
        square = square + share.square().reshape(-1, *[1] * (-axis - 1))
    kept = square.sqrt() <= cutoff
    spectrum = torch.fft.fftn(x.float(), dim=axes, norm="ortho")
    return torch.fft.ifftn(spectrum * kept, dim=axes, norm="ortho").real.to(x.dtype)


def edges(x: Tensor) -> Tensor:
    """Magnitude of the Sobel gradient of the mean over channels, [B, 1, H, W]; 4 along a unit step."""
    grey = x.float().mean(1, keepdim=True)
    if x.ndim == 5:  # frames as rows of the batch
        grey = grey.transpose(1, 2).flatten(0, 1)
    kernel = x.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=torch.float32)
    both = torch.stack([kernel, kernel.T])[:, None]
    gradient = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="reflect"), both)
    return (gradient.square().sum(1, keepdim=True) + 1e-6).sqrt()  # differentiable where it is flat


def radial_power(x: Tensor) -> Tensor:
    """Power spectrum [min(H, W) // 2] of images, by whole radius of the wavenumber from 1: a mean over
    images, channels and directions.
    """
    ky, kx = _wavenumbers(x)
    radius = (ky.square() + kx.square()).sqrt().round().long()
    last = min(x.shape[-2:]) // 2
    power = torch.fft.fft2(x.float(), norm="ortho").abs().square().flatten(0, -3).mean(0)
    return torch.stack([power[radius == r].mean() for r in range(1, last + 1)])


def spectrum_gap(power: Tensor, other: Tensor) -> float:
    """Mean over radii of |ln(power / other)|; 0 for equal spectra."""
    return float((power.log() - other.log()).abs().mean())
