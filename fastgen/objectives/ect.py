"""ECT: easy consistency tuning, a consistency model out of a diffusion model by narrowing the gap of a pair.

Paper: Geng et al. 2024, arXiv 2406.14548 (Alg. 1; the authors' code for the constants).

  n = sigma / alpha is the noise level;  n_t ~ exp N(-1.1, 2^2)
  n_r = n_t (1 - q^-(j+1) (1 + k sigmoid(-b n_t))), at least 0;     j grows every `double_every` steps
  x_t = alpha x0 + sigma eps
  D = x0,  x_r with the same eps                                    or the guided teacher's D(x_t, t), and
                                                                    its Euler step from x_t to r
  target = sg D_theta(x_r, r),  D itself where n_r = 0              j = -1 would be diffusion training
  loss = |D_theta(x_t, t) - target| / (n_t - n_r)                   the norm over the image, not its square

Differs
- levels are sigma / alpha of any schedule; on EDM that is the paper's t. Levels below the schedule's smallest
  count as 0.
- no dropout: our networks run in eval mode, so that pairs share random states.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import expand
from fastgen.objectives.base import Objective, ObjectiveConfig, TimeConfig, Updates, data_of, guided
from fastgen.objectives.requirements import Calls, Requirements, passes


class ECTConfig(ObjectiveConfig):
    """Consistency tuning on data, or along the teacher's ODE."""

    name: Literal["ect"] = "ect"
    source: Literal["data", "teacher"] = "data"
    """what x_r comes from: the data point and the same noise, or a step of the guided teacher"""
    time: TimeConfig = TimeConfig(kind="log_normal", mean=-1.1, std=2.0)
    """noise levels n_t"""
    q: float = Field(2.0, gt=1)
    """the gap shrinks by q each time"""
    k: float = Field(8.0, ge=0)
    """how much wider the gap is at small noise"""
    b: float = Field(1.0, gt=0)
    """noise level at which it stops being wider, inverted"""
    double_every: int = Field(0, ge=0)
    """steps after which j grows by 1; 0 keeps the first gap"""
    max_ratio: float = Field(0.999, gt=0, lt=1)
    """largest r / t at high noise that j may reach"""
    huber_c: float = Field(0.0, ge=0)
    """rounds the norm off near 0; 0 is the norm itself"""


def noise_level(schedule, t):
    """n = sigma / alpha, [B] float64."""
    return (-schedule.log_snr(t)).exp()


def shrink(n, gap: float, k: float, b: float):
    """n_r below n_t: the fraction `gap` of it away, (1 + k) / (1 + k/2) times as much at small noise."""
    return (n * (1 - gap * (1 + k * torch.sigmoid(-b * n)))).clamp(min=0)


class ECT(Objective, config=ECTConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        distilled = cfg.source == "teacher"

        def network_calls(guidance: float, num_steps: int) -> Calls:
            calls: Calls = {"student+grad": 1, "student": 1}
            return calls | ({"teacher": passes(guidance)} if distilled else {})

        return Requirements(network_calls, untrained=("teacher",) if distilled else ())

    def step(self, batch: Batch, k: int) -> Updates:
        cfg, S, x0 = self.cfg, self.schedule, data_of(batch)
        t = self.sample_t(len(x0), cfg.time)
        n_t = noise_level(S, t)
        n_r = shrink(n_t, self.gap(k), cfg.k, cfg.b)
        r, clean = level_time(S, n_r)
        with self.turn("student"):
            eps = self.rng.randn_like(x0)
            x_t = S.noise(x0, eps, t)
            with torch.no_grad():
                D, x_r = earlier(self, batch, x_t, eps, t, r)
                target = torch.where(expand(clean, x0).bool(), D, self.student(x_r, r, batch.cond))
            pred = self.student(x_t, t, batch.cond)
            loss = losses.sample_huber(pred, target, max(cfg.huber_c, 1e-6), 1 / (n_t - n_r))
            yield loss, {"gap": self.gap(k), "error": (pred - target).abs().mean()}

    def gap(self, k: int) -> float:
        """1 - r / t at high noise: q^-(j+1)."""
        j = k // self.cfg.double_every if self.cfg.double_every else 0
        return max(self.cfg.q ** -(j + 1), 1 - self.cfg.max_ratio)


def earlier(obj, batch, x_t, eps, t, r) -> tuple[Tensor, Tensor]:
    """(D, x_r), [B, ...] each: the estimate of the clean image that leads from x_t at times t [B] to x_r at
    times r [B], and is x_r where r is clean. It is the data point, x_r having the same noise; or the guided
    teacher's, x_r being its Euler step.
    """
    if obj.cfg.source == "data":
        return data_of(batch), obj.schedule.noise(data_of(batch), eps, r)
    D = guided(obj.teacher, x_t, t, batch, obj.guidance)
    return D, obj.schedule.ode_step(D, x_t, t, r)


def level_time(schedule, n):
    """(the time of noise level n [B], whether it lies below all of the schedule's, which counts as clean)."""
    lowest = noise_level(schedule, torch.tensor([schedule.t_min], dtype=torch.float64, device=n.device))
    clean = n <= lowest.clamp(min=1e-4)
    t = schedule.t_from_lambda(-n.clamp(min=1e-4).log())
    return t.clamp(schedule.t_min, schedule.t_max), clean
