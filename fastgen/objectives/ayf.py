"""Align Your Flow: continuous-time flow maps, Eulerian (EMD) or Lagrangian (LMD), with autoguidance.

Paper: Sabour et al. 2025, arXiv 2506.14603 (Thm. 3.1 and 3.2). No official code.

  |s - r| = sigmoid(N(P_mean, P_std)), s uniform above it;  x_s = (1 - s) x0 + s eps
  f(x_s, s, r) = x_s + (r - s) u(x_s, s, r)
  v = v_teacher;  autoguidance: v + (lambda - 1) (v - v_weak), a weaker version of the same model
  EMD  residual  v - u + w (r - s) du/ds          along (v, 1, 0): f is constant on the teacher's trajectory
  LMD  residual  v(f, r) - u - w (r - s) du/dr    along (0, 0, 1): f moves along the teacher's trajectory
  w = min(1, k / H);  g = residual / (|residual| + c);  loss = |u - sg[u + g]|^2

Differs
- the step's length enters as in `meanflow.py`; sampling is deterministic, over any list of times.
- |.| is the root mean square, as for sCM here. The paper fine-tunes with a GAN at the end, which is left out:
  a discriminator stage would train one time only.
- lambda is one number here (`autoguidance`); the paper draws it from U(1, 3) and embeds it.
- distribution of times: P_mean -0.8 and P_std 1.0; the paper's values for ImageNet were not checked.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.diffusion.reparametrization import LineView
from fastgen.diffusion.schedules import expand
from fastgen.networks.jvp import TangentConfig, tangent
from fastgen.objectives.base import Objective, ObjectiveConfig, Updates, data_of, guided
from fastgen.objectives.requirements import Calls, Requirements, WeakTeacherSpec, passes
from fastgen.roles.roles import Role


class AYFConfig(ObjectiveConfig):
    """Flow-map distillation."""

    name: Literal["ayf"] = "ayf"
    loss: Literal["emd", "lmd"] = "emd"
    """Eulerian or Lagrangian map distillation"""
    gap_mean: float = -0.8
    """mean of the logit of the distance |s - r|"""
    gap_std: float = Field(1.0, gt=0)
    """its standard deviation"""
    warmup_steps: int = Field(10_000, ge=0)
    """H: steps over which the derivative's term grows to its full weight"""
    tangent: TangentConfig = TangentConfig()
    """how the derivative is taken"""
    tangent_c: float = Field(0.1, gt=0)
    """c of the residual's normalisation"""
    autoguidance: float = Field(1.0, ge=1)
    """lambda; 1 is the teacher itself"""
    weak: str = ""
    """folder of the weaker model that autoguidance leads away from"""


class AYF(Objective, config=AYFConfig):
    weak: Role

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        lead = cfg.autoguidance > 1

        def network_calls(guidance: float, num_steps: int) -> Calls:
            calls: Calls = {"student+grad": 1, "teacher": passes(guidance)}
            calls |= {"student tangent": 1} if cfg.tangent.method == "exact" else {"student": 2}
            return calls | ({"weak": 1} if lead else {})

        return Requirements(
            network_calls,
            auxiliaries={"weak": WeakTeacherSpec(cfg.weak)} if lead else {},
            guidance_embedding=True,
            step_end=True,
        )

    def step(self, batch: Batch, k: int) -> Updates:
        cfg, view = self.cfg, LineView(self.schedule, self.cfg.tangent.reach)
        w, cond = self.draw_guidance(batch)
        x0 = data_of(batch)
        s, r = self.times(view, len(x0))
        x_s = view.line.noise(x0, self.rng.randn_like(x0), s)
        warm = min(1.0, k / cfg.warmup_steps) if cfg.warmup_steps else 1.0
        way = warm * expand(r - s, x_s)
        average = view.average(lambda x, tau, rho: self.student(x, tau, {**cond, "r": rho}))
        with self.turn("student"):
            u = average(x_s, s, r)
            with torch.no_grad():
                if cfg.loss == "emd":
                    v = self.velocity(view, batch, w)(x_s, s)
                    along = (v, torch.ones_like(s), torch.zeros_like(r))
                    residual = v - u + way * tangent(average, (x_s, s, r), along, cfg.tangent)  # Thm. 3.1
                else:
                    f = x_s + expand(r - s, x_s) * u
                    along = (torch.zeros_like(x_s), torch.zeros_like(s), torch.ones_like(r))
                    slope = tangent(average, (x_s, s, r), along, cfg.tangent)
                    residual = self.velocity(view, batch, w)(f, r) - u - way * slope  # Thm. 3.2
                size = losses.per_sample_mean(residual**2).sqrt()
                target = u + residual / (expand(size, u) + cfg.tangent_c)
            yield losses.mse(u, target), {"residual": size.mean()}

    def times(self, view: LineView, num: int) -> tuple[Tensor, Tensor]:
        """Levels s > r [B] inside the teacher's own range."""
        ends = torch.tensor([self.schedule.t_min, self.schedule.t_max], dtype=torch.float64)
        low, high = view.level(ends).tolist()
        low = max(low, 1e-3)
        gap = torch.sigmoid(self.cfg.gap_mean + self.cfg.gap_std * self.rng.randn(num).double())
        s = gap + (1 - gap) * self.rng.rand(num)
        return low + (high - low) * s, low + (high - low) * (s - gap)

    def velocity(self, view: LineView, batch: Batch, w: float | Tensor):
        """v(x_s, s) of the guided teacher, led away from the weak model."""
        lead = self.cfg.autoguidance - 1

        def D(x: Tensor, tau: Tensor) -> Tensor:
            strong = guided(self.teacher, x, tau, batch, w)
            return strong + lead * (strong - self.weak(x, tau, batch.cond)) if lead else strong

        return view.velocity(D)
