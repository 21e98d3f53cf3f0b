"""Any denoiser seen in TrigFlow coordinates (Lu & Song 2024, arXiv 2410.11081, Sec. 3).

x_t = cos t x0 + sin t z with z ~ N(0, sigma_data^2 I), and the network predicts F = (cos t z - sin t x0) /
sigma_data. Time and scale follow from equal signal-to-noise ratios; F from the denoiser,
F = (cos t x_t - D) / (sigma_data sin t). For a flow network that is the training-free map of SANA-Sprint
(arXiv 2503.09641, eq. 5-6).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastgen.schedules import Schedule, TrigFlow, expand


class TrigView:
    """Times, noising and F of a native schedule, in TrigFlow's terms."""

    def __init__(self, native: Schedule, sigma_data: float):
        self.native, self.trig, self.sigma_data = native, TrigFlow(sigma_data), sigma_data

    def time(self, tau: Tensor) -> Tensor:
        """TrigFlow's t [B] of a native time tau, kept off the very ends, where a table has no slope."""
        edge = 1e-6 * (self.native.t_max - self.native.t_min)
        return self.native.map_to(self.trig, tau.clamp(self.native.t_min + edge, self.native.t_max - edge))[0]

    def velocity(self, D: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """F(x_t, t) behind a denoiser D(x_tau, tau) of the native schedule."""

        def F(x_t: Tensor, t: Tensor) -> Tensor:
            tau, scale = self.trig.map_to(self.native, t)
            found = D(expand(scale, x_t) * x_t, tau)
            return (expand(t.cos(), x_t) * x_t - found) / expand(self.sigma_data * t.sin(), x_t)

        return F


class LogVariance(nn.Module):
    """w(t), the learned log-variance of the adaptive weighting exp(-w) loss + w; zero at first."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.register_buffer("freqs", 2.0 ** torch.linspace(-2, 4, width // 2))
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, t: Tensor) -> Tensor:
        """[B] -> [B]."""
        waves = t.float()[:, None] * self.freqs
        return self.out(torch.cat([waves.sin(), waves.cos()], 1)).float().squeeze(1)
