"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, and every conversion between what a network can predict.

A schedule is four formulas (alpha, sigma, their derivatives) and the inverse of the log signal-to-noise
ratio; all else is derived once in the base class. Time `t` is the schedule's own, shape [B]; coefficients
are evaluated in float64 and cast to float32 where they meet images of shape [B, ...].

Prediction kinds: "x0"; "eps"; "v" = alpha eps - sigma x0 (Salimans & Ho 2022, arXiv 2202.00512);
"flow" = eps - x0 (Lipman et al. 2023, arXiv 2210.02747); "score" = grad log p_t.
"""

import math

import numpy as np
import torch
from torch import Tensor

KINDS = ("x0", "eps", "v", "flow", "score")


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Shape a [B] coefficient to broadcast against x [B, ...], or one of every frame, [B, F], against a clip
    [B, C, F, ...]; in float32 (float64 if x is float64).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    coefficient = coefficient.to(device=x.device, dtype=dtype)
    if coefficient.ndim == 2 and coefficient.shape[1] > 1:
        return coefficient.reshape(len(coefficient), 1, -1, *[1] * (x.ndim - 3))
    return coefficient.reshape(-1, *[1] * (x.ndim - 1))


class Schedule:
    """Base class; a subclass defines the formulas that raise NotImplementedError here.

    A time t is a tensor [B], and so are the coefficients, in float64.
    """

    t_min: float
    """time of (almost) clean data"""
    t_max: float
    """time of pure noise"""
    sigma_data: float = 0.5
    """standard deviation of the data that EDM's preconditioning and loss weight assume"""

    # -- the formulas --------------------------------------------------------------------------------------
    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the data."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the noise."""
        raise NotImplementedError

    def d_alpha(self, t: Tensor) -> Tensor:
        """Derivative of alpha by t."""
        raise NotImplementedError

    def d_sigma(self, t: Tensor) -> Tensor:
        """Derivative of sigma by t."""
        raise NotImplementedError

    def t_from_lambda(self, lam: Tensor) -> Tensor:
        """The time at a log signal-to-noise ratio; inverse of `log_snr`."""
        raise NotImplementedError

    def from_unit(self, u: Tensor) -> Tensor:
        """The time at position u in [0, 1] of the schedule's own spacing; u = 1 is pure noise."""
        raise NotImplementedError

    def steps(self, num: int) -> list[float]:
        """The num times, noise first, at which a sampler of num steps evaluates the network."""
        raise NotImplementedError

    # -- the process ---------------------------------------------------------------------------------------
    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps

    def renoise(self, x_u: Tensor, eps: Tensor, u: Tensor, t: Tensor) -> Tensor:
        """Add noise to x_u at time u until the noisier time t: a sample of q(x_t | x_u), with t >= u."""
        ratio = self.alpha(t) / self.alpha(u)
        extra = (self.sigma(t) ** 2 - (ratio * self.sigma(u)) ** 2).clamp(min=0).sqrt()
        return expand(ratio, x_u) * x_u + expand(extra, x_u) * eps

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """d x_t / dt along the straight pair (x0, eps)."""
        return expand(self.d_alpha(t), x0) * x0 + expand(self.d_sigma(t), x0) * eps

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda(t) = log(alpha / sigma), decreasing in t."""
        return self.alpha(t).log() - self.sigma(t).log()

    def level(self, t: Tensor) -> Tensor:
        """sigma / (alpha + sigma): the time of a rectified flow at the same signal-to-noise ratio."""
        return self.sigma(t) / (self.alpha(t) + self.sigma(t))

    def gap(self, t: Tensor, r: Tensor) -> Tensor:
        """Length of a step from time t to time r: level(t) - level(r)."""
        return self.level(t) - self.level(r)

    # -- conversions ---------------------------------------------------------------------------------------
    def to_x0(self, kind: str, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The denoised estimate D that a network output of the given kind implies."""
        a, s = expand(self.alpha(t), x_t), expand(self.sigma(t), x_t)
        if kind == "x0":
            return out
        if kind == "eps":
            return (x_t - s * out) / a
        if kind == "v":
            return (a * x_t - s * out) / (a**2 + s**2)
        if kind == "flow":
            return (x_t - s * out) / (a + s)
        if kind == "score":
            return (x_t + s**2 * out) / a
        raise ValueError(f"prediction kind {kind!r} is unknown; allowed: {', '.join(KINDS)}")

    def from_x0(self, kind: str, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network output of the given kind that implies the estimate x0; inverse of `to_x0`."""
        a, s = expand(self.alpha(t), x_t), expand(self.sigma(t), x_t)
        if kind == "x0":
            return x0
        if kind == "eps":
            return (x_t - a * x0) / s
        if kind == "v":
            return (a * x_t - (a**2 + s**2) * x0) / s
        if kind == "flow":
            return (x_t - (a + s) * x0) / s
        if kind == "score":
            return (a * x0 - x_t) / s**2
        raise ValueError(f"prediction kind {kind!r} is unknown; allowed: {', '.join(KINDS)}")

    def score(self, D: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Score of p_t from the denoiser (Tweedie): (alpha D - x_t) / sigma^2."""
        return self.from_x0("score", D, x_t, t)

    def ode_step(self, D: Tensor, x_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """DDIM (exponential Euler) step from time t to time u with a constant denoised estimate D."""
        eps = self.from_x0("eps", D, x_t, t)
        return expand(self.alpha(u), x_t) * D + expand(self.sigma(u), x_t) * eps

    def teacher_times(self, num: int) -> list[float]:
        """Times at which a teacher is sampled in num steps; some differ from a student's."""
        return self.steps(num)

    def prior_std(self, t: float) -> float:
        """Standard deviation of x_t where sampling starts, at time t near pure noise."""
        return 1.0

    def student_times(self, num: int, grid: int = 0, first: float = 0.0) -> list[float]:
        """Times at which a student is sampled in num steps, noise first.

        grid = 0: the schedule's own. Else every (grid / num)-th of the grid of that many times on which the
        student was trained, chosen as LCMScheduler and TCDScheduler choose them. first > 0 scales the list
        so that it starts there.
        """
        times = self.steps(grid or num)
        scale = (first or times[0]) / times[0]
        return [scale * times[int(i)] for i in np.linspace(0, grid or num, num, endpoint=False)]

    def training_grid(self, num: int, final: int = 0) -> list[float]:
        """num + 1 times, noise first and the clean end last, between whose neighbours a student is trained.

        They are those at which it is sampled in num steps. A grid on the way to one of `final` steps, which
        num divides into the same segments, has the edges of the segments in common with it.
        """
        return [*self.steps(num), self.t_min]

    def toward_data(self, u: Tensor, gamma: float) -> Tensor:
        """The time s = (1 - gamma) u of TCD's strategic stochastic sampling (arXiv 2402.19159)."""
        return ((1 - gamma) * u.double()).clamp(min=self.t_min)

    def map_to(self, other: "Schedule", t: Tensor) -> tuple[Tensor, Tensor]:
        """Time u of `other` with the same signal-to-noise ratio, and the factor c with x_u = c x_t.

        (alpha, sigma) differ by c alone, so c is the ratio of their lengths, also where alpha is 0.
        """
        u = other.t_from_lambda(self.log_snr(t))
        return u, torch.hypot(other.alpha(u), other.sigma(u)) / torch.hypot(self.alpha(t), self.sigma(t))


class VP(Schedule):
    """Variance preserving, from a scheduler's `alphas_cumprod`; t in [0, T - 1], between whole timesteps the
    log-SNR is interpolated linearly.
    """

    def __init__(self, alphas_cumprod: Tensor):
        bar = alphas_cumprod.double().clamp(1e-20, 1 - 1e-8)  # zero terminal SNR: alpha = 1e-10
        self._lambda = 0.5 * (bar.log() - (1 - bar).log())
        self.num_timesteps = len(bar)
        self.t_min, self.t_max = 0.0, float(len(bar) - 1)

    @classmethod
    def scaled_linear(cls, start: float = 0.00085, end: float = 0.012, num: int = 1000) -> "VP":
        """The Stable Diffusion schedule."""
        betas = torch.linspace(start**0.5, end**0.5, num, dtype=torch.float64) ** 2
        return cls((1 - betas).cumprod(0))

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """lambda(t) and its derivative."""
        table = self._lambda.to(t.device)
        t = t.double().clamp(self.t_min, self.t_max)
        i = t.floor().long().clamp(max=self.num_timesteps - 2)
        slope = table[i + 1] - table[i]
        return table[i] + (t - i) * slope, slope

    def log_snr(self, t: Tensor) -> Tensor:
        return self._at(t)[0]

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(2 * self.log_snr(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-2 * self.log_snr(t)).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.sigma(t) ** 2 * self._at(t)[1]

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.sigma(t) * self.alpha(t) ** 2 * self._at(t)[1]

    def t_from_lambda(self, lam: Tensor) -> Tensor:
        table = self._lambda.to(lam.device)
        lam = lam.double().clamp(table[-1], table[0])
        i = (torch.searchsorted(-table, -lam, right=True) - 1).clamp(0, self.num_timesteps - 2)
        return i + (lam - table[i]) / (table[i + 1] - table[i])

    def from_unit(self, u: Tensor) -> Tensor:
        """u in [0, 1] to a whole timestep, on which such networks are trained."""
        return (u.double() * self.t_max).round()

    def toward_data(self, u: Tensor, gamma: float) -> Tensor:
        """Rounded down to whole timesteps, as in TCDScheduler."""
        return super().toward_data(u, gamma).floor()

    def steps(self, num: int) -> list[float]:
        """The timesteps of LCMScheduler with `original_inference_steps=num`: 999, 749, 499, 249 for four."""
        stride = self.num_timesteps // num
        return [float((num - i) * stride - 1) for i in range(num)]

    def student_times(self, num: int, grid: int = 0, first: float = 0.0) -> list[float]:
        return [float(round(t)) for t in super().student_times(num, grid, first)]

    def training_grid(self, num: int, final: int = 0) -> list[float]:
        """Picked from the final grid: whole timesteps of two numbers of steps do not divide alike."""
        return [*self.student_times(num, final), self.t_min]


class LocalVP(VP):
    """The noise levels of a VP schedule around data that are not scaled: alpha = 1, sigma = sqrt(1 - abar),
    as point clouds are noised locally (LiDiff, arXiv 2403.13470). Where sampling starts says what is meant.
    """

    @classmethod
    def around(cls, other: VP) -> "LocalVP":
        """With the table of another schedule."""
        made = cls(torch.sigmoid(2 * other._lambda))
        made._lambda = other._lambda
        return made

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-2 * self._at(t)[0]).sqrt()

    def d_sigma(self, t: Tensor) -> Tensor:
        lam, slope = self._at(t)
        return -torch.sigmoid(2 * lam) * torch.sigmoid(-2 * lam).sqrt() * slope

    def log_snr(self, t: Tensor) -> Tensor:
        return -self.sigma(t).log()

    def t_from_lambda(self, lam: Tensor) -> Tensor:
        var = (-2 * lam.double()).exp().clamp(1e-12, 1 - 1e-12)
        return super().t_from_lambda(0.5 * ((1 - var).log() - var.log()))

    def prior_std(self, t: float) -> float:
        return float(self.sigma(torch.tensor([t], dtype=torch.float64)))


class Flow(Schedule):
    """Rectified flow: alpha = 1 - t, sigma = t, t = 1 is noise.

    shift: time shift s of the sampling grid, s u / (1 + (s - 1) u); s > 1 moves times towards noise.
    terminal: last time of the teacher's grid, which is stretched to end there (Qwen-Image, LTX-Video).
    angles: sample at the times of SCMScheduler, even in TrigFlow's angle (with two steps the second is 1.3).
    """

    t_min, t_max = 0.0, 1.0

    def __init__(self, shift: float = 1.0, terminal: float | None = None, angles: bool = False):
        self.shift, self.terminal, self.angles = shift, terminal, angles

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t, dtype=torch.float64)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def t_from_lambda(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam.double())

    def from_unit(self, u: Tensor) -> Tensor:
        """s u / (1 + (s - 1) u), the resolution shift of SD3 (arXiv 2403.03206, eq. 23)."""
        u = u.double()
        return self.shift * u / (1 + (self.shift - 1) * u)

    def steps(self, num: int) -> list[float]:
        if self.angles:
            times = TrigFlow(middle=1.3).steps(num)
            return [1.0, *(math.sin(t) / (math.sin(t) + math.cos(t)) for t in times[1:])]
        return self.from_unit(1 - torch.arange(num, dtype=torch.float64) / num).tolist()

    def teacher_times(self, num: int) -> list[float]:
        times = self.steps(num)
        if not self.terminal or num == 1:
            return times
        stretch = (1 - self.terminal) / (1 - times[-1])
        return [1 - (1 - t) * stretch for t in times]


class EDM(Schedule):
    """Variance exploding in the EDM form: alpha = 1, sigma = t (Karras et al. 2022, arXiv 2206.00364)."""

    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5, rho: float = 7.0
    ):
        self.t_min, self.t_max, self.sigma_data, self.rho = sigma_min, sigma_max, sigma_data, rho

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t, dtype=torch.float64)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def t_from_lambda(self, lam: Tensor) -> Tensor:
        return (-lam.double()).exp()

    def prior_std(self, t: float) -> float:
        return t

    def from_unit(self, u: Tensor) -> Tensor:
        """Karras spacing, eq. 5: uniform in sigma^(1/rho); u = 1 is sigma_max."""
        lo, hi = self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)
        return (lo + u.double() * (hi - lo)) ** self.rho

    def steps(self, num: int) -> list[float]:
        return self.from_unit(1 - torch.arange(num, dtype=torch.float64) / num).tolist()


class TrigFlow(Schedule):
    """alpha = cos t, sigma = sigma_data sin t, t in [0, pi/2] (Lu & Song 2024, arXiv 2410.11081).

    middle: the second of the times of two steps; None is half of t_max.
    """

    t_min, t_max = 0.0, math.pi / 2

    def __init__(self, sigma_data: float = 1.0, middle: float | None = None):
        self.sigma_data, self.middle = sigma_data, middle

    def alpha(self, t: Tensor) -> Tensor:
        return t.double().cos()

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * t.double().sin()

    def d_alpha(self, t: Tensor) -> Tensor:
        return -t.double().sin()

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * t.double().cos()

    def t_from_lambda(self, lam: Tensor) -> Tensor:
        return torch.atan((-lam.double()).exp() / self.sigma_data)

    def prior_std(self, t: float) -> float:
        return self.sigma_data

    def from_unit(self, u: Tensor) -> Tensor:
        return u.double() * self.t_max

    def steps(self, num: int) -> list[float]:
        if num == 2 and self.middle is not None:
            return [self.t_max, self.middle]
        return [self.t_max * (1 - i / num) for i in range(num)]
