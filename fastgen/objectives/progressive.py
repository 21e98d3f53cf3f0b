"""Progressive distillation: each stage halves the steps of the sampler that the stage before left.

Paper: Salimans & Ho 2022, arXiv 2202.00512 (Alg. 2); with w as an input: Meng et
al. 2022, arXiv 2210.03142 (stage two).

  one stage, N steps t_0 > ... > t_{N-1} > t_N = clean;  m_i the time between t_i and t_{i+1} on the 2N grid
  i ~ U{0 .. N-1};  t = t_i;  z_t = alpha x0 + sigma eps
  z' = DDIM step t -> m_i,  z'' = DDIM step m_i -> t_{i+1}          both with the teacher
  x* = (z'' - (sigma''/sigma_t) z_t) / (alpha'' - (sigma''/sigma_t) alpha_t)      one step to x* lands on z''
  loss = max(SNR_t, 1) | x* - D_theta(z_t, t) |^2                   or (SNR_t + 1)
  next stage: N <- N/2, the student becomes the teacher, optimizer and learning rate start anew

Differs
- stages are the run's stages (`num_steps` of each); the first says ode_teacher original where the teacher is
  guided, and so distils guidance with it, as an input of the student or not; later ones step with the last
  student.
- the student becomes the teacher as it stands, not its average, after its learning rate has come down.
- the grid is the teacher scheduler's (VP timesteps, Karras levels, shifted flow), not a cosine in i / N;
  `student.timesteps` says where every stage starts, m_i is then half-way between its times.
- the student keeps the teacher's prediction; the paper turns eps to x0 or v, as D from eps divides by alpha.
"""

from typing import Literal

import torch

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import expand
from fastgen.objectives.base import Objective, ObjectiveConfig, Updates, data_of, guided
from fastgen.objectives.requirements import Calls, Requirements, passes
from fastgen.sampling.solvers import solver_step, undo_jump


class ProgressiveConfig(ObjectiveConfig):
    """One halving of the number of steps."""

    name: Literal["progressive"] = "progressive"
    ode_teacher: Literal["original", "previous"] = "previous"
    """whose two steps are made one: the guided teacher's, or those of the student the last stage left"""
    weighting: Literal["snr1", "snr_plus_1"] = "snr1"
    """max(SNR, 1) or SNR + 1, on x0"""


class Progressive(Objective, config=ProgressiveConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        own = cfg.ode_teacher == "previous"

        def network_calls(guidance: float, num_steps: int) -> Calls:
            calls: Calls = {"student+grad": 1}
            return calls | ({"previous": 2} if own else {"teacher": 2 * passes(guidance)})

        def why_not_sampled(num_steps: int, sampler: str) -> str:
            return "" if num_steps == 1 or sampler == "ode" else "trained on DDIM's own states: use ode"

        return Requirements(
            network_calls,
            untrained=("previous",) if own else ("teacher",),
            guidance_embedding=True,
            why_not_sampled=why_not_sampled,
        )

    def step(self, batch: Batch, k: int) -> Updates:
        S, x0 = self.schedule, data_of(batch)
        if k == 0 and self.cfg.ode_teacher == "previous":  # the student becomes the teacher
            self.follow("previous")
        t, mid, end = self.times(x0)
        w, cond = self.draw_guidance(batch)
        with self.turn("student"):
            z = S.noise(x0, self.rng.randn_like(x0), t)
            with torch.no_grad():
                target = self.target(z, t, mid, end, self.denoiser(batch, w, cond))
            pred = self.student(z, t, cond)
            loss = losses.denoising(S, pred, target, t, self.cfg.weighting)  # max(SNR, 1) |x* - D_theta|^2
            yield loss, {"error": (pred - target).abs().mean()}

    def times(self, x0):
        """(t_i, m_i, t_{i+1}) of a random step for each row."""
        num = len(self.student.times)
        coarse = torch.tensor([*self.student.times, self.schedule.t_min], dtype=torch.float64)
        middle = torch.tensor(self.schedule.student_times(2 * num)[1::2], dtype=torch.float64)
        if self.student.times != self.schedule.student_times(num):  # custom times: half-way between them
            middle = (coarse[1:] + coarse[:-1]) / 2
        i = self.rng.randint(num, len(x0))
        coarse, middle = coarse.to(i.device), middle.to(i.device)
        return coarse[i], middle[i], coarse[i + 1]

    def target(self, z, t, mid, end, D):
        """x*: the estimate whose single step does what the teacher's two do."""
        S = self.schedule
        z_mid = solver_step(S, D, z, t, mid, "euler")
        D_mid = D(z_mid, mid)
        z_end = S.ode_step(D_mid, z_mid, mid, end)
        z_end = torch.where(expand(end <= S.t_min, z).bool(), D_mid, z_end)  # alpha'' = 1, sigma'' = 0
        return undo_jump(S, z_end, z, t, end)

    def denoiser(self, batch, w, cond):
        """D whose steps are halved: the guided teacher, or the last stage's student, guided already."""
        if self.cfg.ode_teacher == "previous":
            return lambda x, t: self.previous(x, t, cond)
        return lambda x, t: guided(self.teacher, x, t, batch, w)
