"""sCM: continuous-time consistency distillation and training in TrigFlow coordinates.

Paper: Lu & Song 2024, arXiv 2410.11081 (Alg. 1). TrigFlow of any teacher: `diffusion/reparametrization.py`.

  s = sigma / alpha, log-normal;  t = atan(s / sd);  x_t = cos t x0 + sin t z,  z ~ N(0, sd^2 I)
  d = dx_t/dt = sd F_real^w(x_t, t)                              training: cos t z - sin t x0 instead
  J = cos t sin t dF_theta/dt along (d, 1)                       one tangent pass, factor inside (Sec. 4.1)
  F = F_theta(x_t, t),  F- = sg F,  r = min(1, k / H)
  g = -cos^2 t (sd F- - d) - r (cos t sin t x_t + sd J)          (Alg. 1; = cos t df/dt at r = 1)
  g <- g / (|g| + c)
  loss = exp(-w(t)) / s |F - F- - g|^2 + w(t)                    f = cos t x_t - sin t sd F, so f(x, 0) = x

Differs
- |g|: the paper's text and NVlabs/Sana take the L2 norm over all elements, FastGen the root mean square;
  `rms` is the default, because with `l2` the step shrinks as the resolution grows.
- sign of w: paper e^w ... - w, every code e^-w ... + w, as here; w(t) is a head of its own instead of one on
  the network's time embedding, so that the export is the plain network.
- 1/s is bounded at s = 1e-3. F- is the value of the pass with gradient, as in the public codes.
- time embeddings: the paper needs slow ones, and fine-tunes the teacher for them; `student.smooth_time`
  solves a student's embedder for slow functions of time in closed form (`networks/time_embedding.py`).
- the teacher's own times bound t: a flow reaches pi/2, EDM atan(sigma_max / sd).
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch, Cond
from fastgen.diffusion import losses
from fastgen.diffusion.reparametrization import TrigView
from fastgen.diffusion.schedules import expand
from fastgen.networks.jvp import TangentConfig, tangent
from fastgen.objectives.base import Objective, ObjectiveConfig, TimeConfig, Updates, data_of, guided
from fastgen.objectives.requirements import Calls, LogVarianceSpec, Requirements, passes
from fastgen.roles.roles import Role


class SCMConfig(ObjectiveConfig):
    """Simplified, stabilised, scaled continuous-time consistency model."""

    name: Literal["scm"] = "scm"
    mode: Literal["distillation", "training"] = "distillation"
    """follow the teacher's ODE, or the straight pair of data and noise (no teacher)"""
    sigma_data: float = Field(0.5, gt=0)
    """standard deviation of the data; EDM teachers were trained with 0.5, latents have about 1"""
    time: TimeConfig = TimeConfig(kind="log_normal", mean=-1.0, std=1.4)
    """noise levels; log_normal is of sigma/alpha, P_mean and P_std of the paper"""
    tangent: TangentConfig = TangentConfig()
    """how dF/dt is taken"""
    tangent_norm: Literal["rms", "l2", "clip", "none"] = "rms"
    """g over its norm plus tangent_c (root mean square or L2), or clipped to [-1, 1] per element"""
    tangent_c: float = Field(0.1, gt=0)
    """c of the tangent normalisation"""
    warmup_steps: int = Field(10_000, ge=0)
    """H: steps over which the second-order part of the tangent grows to its full weight"""
    adaptive: bool = True
    """learn the weighting w(t)"""
    weighting: Literal["inverse_sigma", "uniform"] = "inverse_sigma"
    """prior weighting 1/s, or 1"""


class SCM(Objective, config=SCMConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        distilled = cfg.mode == "distillation"

        def network_calls(guidance: float, num_steps: int) -> Calls:
            calls: Calls = {"student+grad": 1}
            calls |= {"student tangent": 1} if cfg.tangent.method == "exact" else {"student": 2}
            return calls | ({"teacher": passes(guidance)} if distilled else {})

        return Requirements(
            network_calls,
            players={"student": ("student", "logvar") if cfg.adaptive else ("student",)},
            untrained=("teacher",) if distilled else (),
            auxiliaries={"logvar": LogVarianceSpec()} if cfg.adaptive else {},
            guidance_embedding=True,
        )

    def step(self, batch: Batch, k: int) -> Updates:
        w, cond = self.draw_guidance(batch)
        with self.turn("student"):
            teacher = self.teacher if self.cfg.mode == "distillation" else None
            point = noised_point(self.cfg, self, batch, w, teacher)  # x_t, t, d = sd F_real^w(x_t, t)
            yield consistency_loss(
                self.cfg, self, cond, point, k
            )  # J, g, then exp(-w) / s |F - F- - g|^2 + w


Point = tuple[Tensor, Tensor, Tensor]
"""(x_t [B, ...], t [B], d [B, ...] = dx_t/dt of the ODE that is followed), in TrigFlow coordinates"""


def noised_point(
    cfg: SCMConfig, objective: Objective, batch: Batch, w: float | Tensor, teacher: Role | None
) -> Point:
    """Noised data, and the velocity there: the guided teacher's, or without one that of the straight pair."""
    x0, sd = data_of(batch), cfg.sigma_data
    view = TrigView(objective.schedule, sd)
    t = view.time(objective.sample_t(len(x0), cfg.time))
    x_t = view.trig.noise(x0, objective.rng.randn_like(x0), t)  # x_t = cos t x0 + sin t z
    D = (lambda x, tau: guided(teacher, x, tau, batch, w)) if teacher else (lambda x, tau: x0)
    with torch.no_grad():
        return x_t, t, sd * view.velocity(D)(x_t, t)  # d = sd F_real^w; cos t z - sin t x0


def consistency_loss(
    cfg: SCMConfig, objective: Any, cond: Cond, point: Point, k: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, logs) of Alg. 1 at any points, for a method with a student (and its logvar, where adaptive)."""
    (x_t, t, d), sd, view = point, cfg.sigma_data, TrigView(objective.schedule, cfg.sigma_data)
    cos, sin = expand(t.cos(), x_t), expand(t.sin(), x_t)
    student = view.velocity(lambda x, tau: objective.student(x, tau, cond))
    with torch.no_grad():
        J = tangent(student, (x_t, t), (cos * sin * d, t.cos() * t.sin()), cfg.tangent)  # cos t sin t dF/dt
    F = student(x_t, t)
    with torch.no_grad():
        r = min(1.0, k / cfg.warmup_steps) if cfg.warmup_steps else 1.0  # min(1, k / H)
        g = -(cos**2) * (sd * F - d) - r * (cos * sin * x_t + sd * J)  # Alg. 1
        size = losses.per_sample_mean(g**2).sqrt()
        target = F + normalised(g, cfg)  # F- + g / (|g| + c)
    s = sd * t.tan()
    weight = 1 / s.clamp(min=1e-3) if cfg.weighting == "inverse_sigma" else torch.ones_like(s)
    error = weight.to(F) * losses.per_sample_mean((F - target) ** 2)  # |F - F- - g|^2 / s
    logs = {"tangent": size.mean(), "error": error.detach().mean()}
    if cfg.adaptive:
        log_var = objective.logvar(t)
        error = (-log_var).exp() * error + log_var  # exp(-w(t)) ... + w(t)
    return error.mean(), logs


def normalised(g: Tensor, cfg: SCMConfig) -> Tensor:
    """g / (|g| + c), or g clipped (Sec. 4.1)."""
    if cfg.tangent_norm == "clip":
        return g.clamp(-1, 1)
    if cfg.tangent_norm == "none":
        return g
    total = g.square().flatten(1)
    norm = (total.mean(1) if cfg.tangent_norm == "rms" else total.sum(1)).sqrt()
    return g / (expand(norm, g) + cfg.tangent_c)
