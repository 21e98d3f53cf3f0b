"""Any denoiser in the parametrization that a continuous-time method is written in.

Times and scales follow from equal signal-to-noise ratios, velocities from the denoiser:
  TrigFlow (Lu & Song 2024, arXiv 2410.11081, Sec. 3)   x_t = cos t x0 + sin t z,  z ~ N(0, sigma_data^2 I)
    F = (cos t z - sin t x0) / sigma_data = (cos t x_t - D) / (sigma_data sin t)
    For a flow network this is the training-free conversion of SANA-Sprint (arXiv 2503.09641, eq. 5-6).
  line (rectified flow)                                 x_s = (1 - s) x0 + s eps
    v = eps - x0 = (x_s - D) / s
"""

from collections.abc import Callable

from torch import Tensor

from fastgen.diffusion.schedules import Flow, Schedule, TrigFlow, expand


class TrigView:
    """A native schedule as TrigFlow: times t and velocities F."""

    def __init__(self, native: Schedule, sigma_data: float):
        self.native, self.trig, self.sigma_data = native, TrigFlow(sigma_data), sigma_data

    def time(self, tau: Tensor) -> Tensor:
        """TrigFlow's t [B] at a native time tau. tau is clamped to just inside [t_min, t_max], since a table
        of noise levels has no derivative at its ends.
        """
        edge = 1e-6 * (self.native.t_max - self.native.t_min)
        return self.native.map_to(self.trig, tau.clamp(self.native.t_min + edge, self.native.t_max - edge))[0]

    def velocity(self, D: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """F(x_t, t) of a denoiser D(x_tau, tau) of the native schedule."""

        def F(x_t: Tensor, t: Tensor) -> Tensor:
            tau, scale = self.trig.map_to(self.native, t)
            x0 = D(expand(scale, x_t) * x_t, tau)
            return (expand(t.cos(), x_t) * x_t - x0) / expand(self.sigma_data * t.sin(), x_t)

        return F


class LineView:
    """A native schedule as rectified flow: levels s, velocities v and average velocities u."""

    def __init__(self, native: Schedule, margin: float = 1e-6):
        """margin: levels are clamped to [margin, 1 - margin]; at least the step of a finite difference."""
        self.native, self.line, self.margin = native, Flow(), margin

    def level(self, tau: Tensor) -> Tensor:
        """s [B] at a native time, clamped to just inside both ranges."""
        edge = 1e-6 * (self.native.t_max - self.native.t_min)
        s = self.native.level(tau.clamp(self.native.t_min + edge, self.native.t_max - edge))
        return s.clamp(self.margin, 1 - self.margin)

    def velocity(self, D: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """v(x_s, s) of a denoiser D(x_tau, tau)."""
        return lambda x_s, s: self.average(lambda x, tau, _: D(x, tau))(x_s, s, s)

    def average(
        self, D: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """u(x_s, s, r) of a denoiser D(x_tau, tau, rho) of two times: x_s - (s - r) u is the sample at r."""

        def u(x_s: Tensor, s: Tensor, r: Tensor) -> Tensor:
            tau, scale = self.line.map_to(self.native, s)
            rho, _ = self.line.map_to(self.native, r)
            return (x_s - D(expand(scale, x_s) * x_s, tau, rho)) / expand(s, x_s)

        return u
