"""TDM: trajectory distribution matching, a deterministic few-step student without any data.

Paper: Luo et al. 2025, arXiv 2503.06674. The student walks its K times t_1 > ... > t_K by the ODE rule (DDIM
with its own estimate); segment i ends at m_i = t_{i+1}, the last one at the clean end. Per segment the law of
the end state, noised within the segment only, is matched to the teacher's; as segments are disjoint in
noise level, one critic serves them all.

  rollout, without gradient:  X_1 = z;  x_i = G(X_i, t_i, c);  X_{i+1} = alpha(m_i) x_i + sigma(m_i) eps_i
  for critic and student each:   i ~ U{1..K} per sample,  tau ~ U(m_i, t_i) on the grid
    x = G(X_i, t_i, c), eps_G its noise;   x_m = alpha(m) x + sigma(m) eps_G;   x_tau ~ q(. | x_m), noise n
  critic:   n' = (x_tau - alpha x) / sigma;   w_is = exp(-mean n'^2 / 2) / exp(-mean n^2 / 2)
            loss = w_is min(SNR, 5) |D_fake(x_tau) - sg x|^2
  student:  x* = x + D_real^w(x_tau) - D_fake(x_tau)
            loss = huber(x - sg x*) / mean|x - D_real^w|,   huber(d) = sqrt(d^2 + c^2) - c by element

  step_counts (TDM-unify): K is drawn per batch from the list, an input of student and critic.

Differs
- authors' list is 899, 674, 449, 224 of 1000; here any `student.timesteps` (the schedule's own by default),
  with `student.sampler: ode`, so that plain DDIM or Euler schedulers walk it.
- the paper puts the gradient on x_m, their code and this on x, with an element-wise Huber (paper: vector).
- tau keeps `tau_low` from the clean end and `tau_gap` below t_i, fractions of the grid (20 and 10 of 1000).
- one rollout serves both turns, and the critic's turn takes its x_i from it instead of computing it again.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.core.batch import Batch, Cond
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import expand
from fastgen.objectives.base import ObjectiveConfig, Updates, guided
from fastgen.objectives.requirements import Calls, Requirements, passes
from fastgen.objectives.shared.critic import Matching, diagnostics
from fastgen.roles.roles import Role
from fastgen.sampling.solvers import jump


class TDMConfig(ObjectiveConfig):
    """Trajectory distribution matching."""

    name: Literal["tdm"] = "tdm"
    student_every: int = Field(1, ge=1)
    """critic updates per student update"""
    tau_low: float = Field(0.02, ge=0, lt=1)
    """lowest noise level of the last segment, as a fraction of the grid"""
    tau_gap: float = Field(0.01, ge=0, lt=1)
    """how far tau stays below the time of its segment"""
    snr_clip: float = Field(5.0, gt=0)
    """bound of the signal-to-noise weight of the critic"""
    importance: bool = True
    """weigh the critic's samples by w_is; without, it learns a denoiser that is biased"""
    step_counts: tuple[int, ...] = ()
    """train these step counts at once, each a divisor of the largest, which the networks read through
    their class's input for the guidance scale; empty trains student.num_steps alone
    """
    metric: Literal["huber", "l2"] = "huber"
    """the student's distance to x*"""
    huber_c: float = Field(1e-3, gt=0)
    """constant of the Huber distance"""

    @model_validator(mode="after")
    def _counts_share_a_grid(self):
        if any(n < 1 or max(self.step_counts) % n for n in self.step_counts):
            raise ValueError(f"step_counts: found {list(self.step_counts)}; each must divide the largest")
        return self


class TDM(Matching, config=TDMConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        counts = cfg.step_counts

        def network_calls(guidance: float, num_steps: int) -> Calls:
            r = 1 / cfg.student_every
            steps = sum(counts) / len(counts) if counts else num_steps
            calls = {"student": steps, "student+grad": r, "teacher": r * passes(guidance)}
            return {n: round(v, 3) for n, v in {**calls, "critic": r, "critic+grad": 1}.items()}

        def why_not_sampled(num_steps: int, sampler: str) -> str:
            if counts and num_steps not in counts:
                return f"tdm trains objective.step_counts {list(counts)}: use one of them"
            return "" if sampler == "ode" or num_steps == 1 else "tdm trains a deterministic walk: use ode"

        return replace(
            super().requirements(cfg),
            network_calls=network_calls,
            step_counts=counts,
            grid_steps=max(counts, default=0),
            why_not_sampled=why_not_sampled,
        )

    def prepare(self) -> None:
        self.grid = self.schedule.from_unit(torch.linspace(0, 1, 1001, dtype=torch.float64))
        self.plan(len(self.student.times))

    def plan(self, num: int) -> None:
        """Fix the walk of this step: t_1 .. t_K, and where they and the clean end lie on the grid."""
        self.times = self.student.with_steps(num).times
        edges = torch.tensor([*self.times, self.schedule.t_min], dtype=torch.float64)
        self.where = torch.searchsorted(self.grid, edges - 1e-9).clamp(max=1000)

    def step(self, batch: Batch, k: int, teacher: Role | None = None) -> Updates:
        cfg, cond, teacher = self.cfg, batch.cond, teacher or self.teacher
        if cfg.step_counts:
            self.plan(cfg.step_counts[self.rng.shared_randint(len(cfg.step_counts))])
            steps = torch.full((len(batch.noise),), float(len(self.times)), device=batch.noise.device)
            cond = {**batch.cond, "guidance": steps}
        states, ends = self.rollout(batch.noise, cond)
        i, tau = self.draw(len(batch.noise))
        with self.turn("critic"):
            X, x = (torch.stack(v)[i, torch.arange(len(i))] for v in (states, ends))
            x_tau, n = self.carry(x, X, i, tau)  # x_tau ~ q(x_tau | x_m)
            fake = self.critic(x_tau, tau, cond)
            w = losses.tempered_ratio(self.schedule, x, x_tau, tau, n)  # w_is
            snr = (2 * self.schedule.log_snr(tau)).exp().clamp(max=cfg.snr_clip)
            loss = losses.mse(fake, x, w * snr if cfg.importance else snr)  # w_is min(SNR, 5) |D_fake - x|^2
            logs = self.critic_error(fake, x, x_tau, tau, batch.cond)
            yield loss, {"w_is_max": w.max(), "w_is": w.mean(), **logs}
        if k % cfg.student_every:
            return
        i, tau = self.draw(len(batch.noise))
        with self.turn("student"):
            X = torch.stack(states)[i, torch.arange(len(i))]
            x = self.student(X, self.time(i), cond)  # x = G(X_i, t_i, c)
            with torch.no_grad():
                x_tau, _ = self.carry(x, X, i, tau)
                real = guided(teacher, x_tau, tau, batch, self.guidance)  # D_real^w
                fake = self.critic(x_tau, tau, cond)  # D_fake
                goal = x + real - fake  # x*
                scale = losses.per_sample_mean((x - real).abs()).clamp(min=1e-6)
            if cfg.metric == "huber":
                loss = losses.pseudo_huber(x, goal, cfg.huber_c, 1 / scale)
            else:
                loss = 0.5 * losses.mse(x, goal, 1 / scale)
            yield loss, diagnostics(x, real, fake)

    @torch.no_grad()
    def rollout(self, noise: Tensor, cond: Cond) -> tuple[list[Tensor], list[Tensor]]:
        """The student's inputs X_1 .. X_K on its own trajectory, and its estimates x_1 .. x_K there."""
        S, X, states, ends = self.schedule, noise * self.schedule.prior_std(self.times[0]), [], []
        for time, following in zip(self.times, [*self.times[1:], None]):
            t = noise.new_full((len(noise),), time, dtype=torch.float64)
            states.append(X)
            ends.append(self.student(X, t, cond))
            if following is not None:
                X = S.ode_step(ends[-1], X, t, torch.full_like(t, following))  # the same predicted noise
        return states, ends

    def draw(self, num: int) -> tuple[Tensor, Tensor]:
        """Segment i [B] and tau [B], uniform on the grid between the segment's end and its start."""
        i = self.rng.randint(len(self.times), num)
        where = self.where.to(i.device)
        low = where[i + 1].clamp(min=round(1000 * self.cfg.tau_low))
        high = torch.maximum(where[i] - round(1000 * self.cfg.tau_gap), low)
        chosen = low + (self.rng.rand(num) * (high - low + 1)).long().clamp(max=high - low)
        return i, self.grid.to(i.device)[chosen]

    def time(self, i: Tensor) -> Tensor:
        """The times t_i of rows in segments i, [B]; the clean end after the last."""
        return torch.tensor([*self.times, self.schedule.t_min], dtype=torch.float64, device=i.device)[i]

    def carry(self, x: Tensor, X: Tensor, i: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """x_tau and the noise n it took, from the end state x_m of the step that made x of X."""
        S, n, m = self.schedule, self.rng.randn_like(x), self.time(i + 1)
        x_m = jump(S, x, X, self.time(i), m)  # alpha x + sigma eps_G; x itself at the clean end
        clean = expand(m == S.t_min, x).bool()
        return torch.where(clean, S.noise(x, n, tau), S.renoise(x_m, n, m, tau)), n
