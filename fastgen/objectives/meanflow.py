"""MeanFlow: the average velocity between two times, trained on data or distilled from a flow.

Paper: Geng et al. 2025, arXiv 2505.13447 (Alg. 1; guidance eq. 19-21); distilled as in NVlabs/FastGen.

  s, r from the time distribution, s >= r;  r = s for the first flow_ratio of the batch,
                                                 r = 0 for the last end_ratio of it (ours)
  x_s = (1 - s) x0 + s eps
  v = eps - x0                                  distillation: v_teacher^w(x_s, s)
  training with guidance: v <- omega v + (1 - omega - kappa) u(x_s, s, s | null) + kappa u(x_s, s, s | c)
  du/ds along (v, 1, 0)                         (eq. 8: total derivative, r held)
  target = sg[v - (s - r) du/ds]                (eq. 10)
  e = u_theta(x_s, s, r) - target;  loss = |e|^2 / sg(|e|^2 + c)^p               (eq. 22)
  sampling: x_r = x_s - (s - r) u               one step: s = 1, r = 0

Differs
- any teacher: times and velocities are those of the straight line at equal signal-to-noise ratio. The step's
  length s - r enters the network as one more input channel with zero weights at first, so that the student
  starts as the teacher; the paper adds an embedding of s - r to the time's.
- the tangent is taken for the rows with r < s only: for the others it is multiplied by zero.
- end_ratio is ours, 0 in the paper: a single step goes from s = 1 to r = 0, a pair that two draws of one
  law hardly ever make.
- c is 0.01 as in the authors' code; the paper's text says 0.001. |e|^2 is the sum over elements.
- the loss is the paper's. The default of FastGen (`opt_grad`) is the normalised tangent
  |u - sg[u + g/(|g| + 0.1)]|^2, g = v - u - (s - r) du/ds: gradients of one size, where eq. 22 at p = 1 has
  those of size 1/|g|. Its `l2` is eq. 22 with c = 0.1. `norm_p: 0.5` here comes near its default.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.diffusion.reparametrization import LineView
from fastgen.diffusion.schedules import expand
from fastgen.networks.jvp import TangentConfig, tangent
from fastgen.objectives.base import Objective, ObjectiveConfig, TimeConfig, Updates, data_of, guided
from fastgen.objectives.requirements import Calls, Requirements, passes


class MeanFlowConfig(ObjectiveConfig):
    """Average velocities."""

    name: Literal["meanflow"] = "meanflow"
    mode: Literal["distillation", "training"] = "distillation"
    """velocity of the teacher, or of the straight pair of data and noise (no teacher)"""
    time: TimeConfig = TimeConfig(kind="logit_normal", mean=-0.4, std=1.0)
    """both times"""
    flow_ratio: float = Field(0.75, ge=0, le=1)
    """share of the batch with r = s: plain flow matching"""
    end_ratio: float = Field(0.0, ge=0, le=1)
    """share of the batch with r = 0: the whole way to data, as the last step of a sample takes it"""
    tangent: TangentConfig = TangentConfig()
    """how du/ds is taken"""
    norm_c: float = Field(0.01, gt=0)
    """c of the adaptive weight"""
    norm_p: float = Field(1.0, ge=0)
    """p of the adaptive weight; 0 is the plain square"""
    omega: float = 1.0
    """training: weight of v in the guided target; the guidance scale is omega / (1 - kappa)"""
    kappa: float = Field(0.0, ge=0, lt=1)
    """training: weight of the student's own conditional velocity in the guided target"""
    label_drop: float = Field(0.1, ge=0, lt=1)
    """training with guidance: share of conditions replaced by none"""

    @model_validator(mode="after")
    def _one_batch(self):
        if self.flow_ratio + self.end_ratio > 1:
            raise ValueError(
                f"end_ratio: found {self.end_ratio:g} beside flow_ratio {self.flow_ratio:g}; at most 1 in all"
            )
        return self


class MeanFlow(Objective, config=MeanFlowConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        distilled = cfg.mode == "distillation"

        def network_calls(guidance: float, num_steps: int) -> Calls:
            part = round(1 - cfg.flow_ratio, 3)
            calls: Calls = {"student+grad": 1}
            calls |= {"student tangent": part} if cfg.tangent.method == "exact" else {"student": 2 * part}
            if distilled:
                return calls | {"teacher": passes(guidance)}
            return calls | ({"student": calls.get("student", 0) + 2} if mixes_guidance(cfg) else {})

        return Requirements(
            network_calls,
            untrained=("teacher",) if distilled else (),
            guidance_embedding=True,
            step_end=True,
        )

    def step(self, batch: Batch, k: int) -> Updates:
        cfg, view = self.cfg, LineView(self.schedule, self.cfg.tangent.reach)
        w, cond = self.draw_guidance(batch)
        x0 = data_of(batch)
        s, r = self.times(len(x0))
        eps = self.rng.randn_like(x0)
        x_s = view.line.noise(x0, eps, s)  # x_s = (1 - s) x0 + s eps
        with self.turn("student"):
            with torch.no_grad():
                v, cond = self.velocity(view, batch, x_s, s, eps, w, cond)
                target = v.clone()
                far = (r < s).nonzero()[:, 0]
                if len(far):
                    u = self.average(view, {n: c[far] for n, c in cond.items()})
                    at, along = (x_s[far], s[far], r[far]), (v[far], torch.ones_like(s[far]), 0 * r[far])
                    target[far] -= expand(s[far] - r[far], x_s) * tangent(u, at, along, cfg.tangent)  # eq. 10
            error = (self.average(view, cond)(x_s, s, r) - target).square().flatten(1).sum(1)
            weight = 1 / (error.detach() + cfg.norm_c) ** cfg.norm_p  # eq. 22
            yield (weight * error).mean(), {"error": error.detach().mean() / x_s[0].numel()}

    def times(self, num: int) -> tuple[Tensor, Tensor]:
        """Levels s >= r [B], equal in the first part of the batch, with r at the data in the last."""
        cfg, view = self.cfg, LineView(self.schedule, self.cfg.tangent.reach)
        a, b = (view.level(self.sample_t(num, cfg.time)) for _ in range(2))
        s, r = torch.maximum(a, b), torch.minimum(a, b)
        row, clean = torch.arange(num, device=s.device), view.level(torch.full_like(s, self.schedule.t_min))
        r = torch.where(row >= num - int(cfg.end_ratio * num), clean, r)
        return s, torch.where(row < int(cfg.flow_ratio * num), s, r)

    def average(self, view: LineView, cond: dict):
        """u_theta(x_s, s, r) under a condition."""
        return view.average(lambda x, tau, rho: self.student(x, tau, {**cond, "r": rho}))

    def velocity(self, view: LineView, batch: Batch, x_s, s, eps, w, cond) -> tuple[Tensor, dict]:
        """(v to follow, the student's condition): the guided teacher's, the pair's, or the guided mixture of
        the pair's and the student's own, with some conditions dropped.
        """
        cfg = self.cfg
        if cfg.mode == "distillation":
            D = lambda x, tau: guided(self.teacher, x, tau, batch, w)  # noqa: E731
            return view.velocity(D)(x_s, s), cond
        v = eps - data_of(batch)
        if not mixes_guidance(cfg):
            return v, cond
        null, own = (self.average(view, c)(x_s, s, s) for c in (batch.uncond, batch.cond))
        mixed = cfg.omega * v + (1 - cfg.omega - cfg.kappa) * null + cfg.kappa * own  # eq. 19-21
        drop = self.rng.rand(len(s)) < cfg.label_drop
        cond = {n: torch.where(expand_mask(drop, c), batch.uncond[n], c) for n, c in batch.cond.items()}
        return torch.where(expand_mask(drop, v), v, mixed), cond


def mixes_guidance(cfg: MeanFlowConfig) -> bool:
    """Whether training mixes a guided velocity."""
    return cfg.omega != 1 or cfg.kappa > 0


def expand_mask(mask: Tensor, x: Tensor) -> Tensor:
    """A [B] mask shaped to broadcast against x [B, ...]."""
    return mask.to(x.device).reshape(-1, *[1] * (x.ndim - 1))
