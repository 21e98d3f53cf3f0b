"""AGD: guidance distilled into adapters of a frozen teacher, on the teacher's own guided trajectories.

Paper: Perez Jensen and Sadat 2025, arXiv 2503.07274 (Sec. 3), and the authors' code.

  once, for each condition c:  w ~ U(w_min, w_max);  the guided sampler from z ~ N(0, I);  every (x_t, eps^w)
    eps^w = eps(x_t, t, null) + w (eps(x_t, t, c) - eps(x_t, t, null))
  step:  (x_t, t, c, w, eps^w) of all walks and steps
    loss = | eps_psi(x_t, t, c, w) - eps^w |^2            psi: the adapters (networks/guidance_adapters.py)

`student.kind guidance_adapter` and `student.guidance_embedding: [w_min, w_max]`. The student keeps the
teacher's sampler at half its calls: `sampler ode` and `num_steps` as the teacher's. x_t is what the guided
sampler visits, which noised data are not: the guided marginal has another mean.

Differs
- w = 1 is no guidance, as everywhere here and in the paper.
- walks are those of the deterministic sampler in `teacher_steps` steps, made when first met and kept in
  memory; theirs are stochastic, of 1000 steps, in files.
- the square is taken in the network's own prediction; for eps that is the paper's.
- it also trains a whole network or a LoRA that takes w, or one for the one scale teacher.guidance.
"""

from typing import Literal

from pydantic import Field

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.objectives.base import Objective, ObjectiveConfig, Updates, native_weighting
from fastgen.objectives.requirements import Requirements, remembered_calls
from fastgen.objectives.shared.remembered import Trajectories


class AGDConfig(ObjectiveConfig):
    """Regression on the guided teacher along its own trajectories."""

    name: Literal["agd"] = "agd"
    teacher_steps: int = Field(20, ge=1)
    """steps of a trajectory, each a pair to learn from"""
    noises: int = Field(0, ge=0)
    """trajectories of each condition of the data; 0 is one"""


class AGD(Objective, config=AGDConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        return Requirements(
            remembered_calls(cfg.teacher_steps),
            real_data=False,
            guidance_embedding=True,
        )

    def prepare(self):
        self.trajectories = Trajectories(self, self.cfg.teacher_steps, self.cfg.noises or 1)

    def busy(self) -> str:
        return self.trajectories.busy()

    def step(self, batch: Batch, k: int) -> Updates:
        x_t, t, target, w, cond = self.trajectories(batch, self.teacher)  # of the guided sampler at w
        with self.turn("student"):
            pred = self.student(x_t, t, cond)
            loss = losses.denoising(self.schedule, pred, target, t, native_weighting(self.student))
            yield loss, {"error": (pred - target).abs().mean(), "guidance": w.mean()}
