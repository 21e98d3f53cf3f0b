"""AccVideo: regression on key points of stored teacher trajectories, and a GAN at each of their noise levels.

Paper: Zhang et al. 2025, arXiv 2503.19462 (Sec. 4; inference code only). The student's m times are the key
times of the teacher's walk of n steps, m + 1 points x_0 (noise) .. x_m (data) at t_0 > ... > t_m.

  once, for each condition c:  the guided teacher's walk from z ~ N(0, I) in n steps;  its key points are kept
  step:  a batch of trajectories x_0 .. x_m;  z ~ N(0, I) into queue Q_0;  for each step i = 0 .. m - 1:
    student:  | v(x_i, t_i, c) - (x_{i+1} - x_i) / (t_{i+1} - t_i) |^2         the segment's mean velocity
    student:  y_i out of Q_i;  y_{i+1} = y_i + (t_{i+1} - t_i) v(y_i, t_i, c), detached into Q_{i+1}
              gan_weight softplus(-H_{i+1}(features(y_{i+1}, t_{i+1}, c)))
    heads:    softplus(H_{i+1}(y_{i+1})) + softplus(-H_{i+1}(x_{i+1}))          features of the frozen teacher

No data is noised: real samples of a level are the teacher's states there. `student.sampler ode`; the times
lie on the teacher's grid, every (n / m)-th of it by default. With a flow shift of 7 and m = 5 they are 1,
0.9655, 0.9130, 0.8235, 0.6364, which plain diffusers visit with `sigmas=[1, .8, .6, .4, .2]`.

Differs
- the paper counts levels down from noise, m to 0; here steps go up from it, as everywhere.
- on another schedule than a flow the mean velocity becomes the estimate D whose DDIM step spans the segment,
  and the error is that of the network's own prediction: for a flow both are the paper's.
- one batch goes through all levels of a step, so y is as old as the updates since its own level; queues are
  empty between steps, and a resumed run has nothing to fill again.
- walks are made when a row of the data is first met, in memory or in the folder `trajectories`; a walk keeps
  its key points only (theirs: 110k prompts, all 50 states).
- form and depth of the heads are not published: LADD's, at the teacher's last block and for clean data at two
  thirds of it (theirs: blocks 60 and 40 of 60). One set for all levels (`heads shared`) is their ablation.
"""

from collections import deque
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.data.cache import fingerprint
from fastgen.diffusion import losses
from fastgen.networks.weights_digest import denoiser_digest
from fastgen.objectives.base import Objective, ObjectiveConfig, Updates, native_weighting
from fastgen.objectives.ode_pairs import Pairs
from fastgen.objectives.requirements import Calls, LevelHeadsSpec, Requirements, passes
from fastgen.objectives.shared.gan import pair_turn
from fastgen.objectives.shared.trajectory_files import TrajectoryFiles
from fastgen.roles.heads import LevelHeads
from fastgen.sampling.solvers import jump, teacher_grid, undo_jump


class AccVideoConfig(ObjectiveConfig):
    """Regression and a GAN on the teacher's trajectories."""

    name: Literal["accvideo"] = "accvideo"
    teacher_steps: int = Field(50, ge=1)
    """steps of a trajectory; the student's times lie on its grid"""
    noises: int = Field(0, ge=0)
    """trajectories of each condition of the data; 0 is one"""
    trajectories: str = ""
    """folder in which they are kept between runs; empty keeps them in memory"""
    gan_weight: float = Field(0.1, ge=0)
    """lambda_adv; 0 is regression alone, without heads"""
    gan_loss: Literal["softplus", "hinge"] = "softplus"
    """the GAN pair"""
    heads: Literal["per_level", "shared"] = "per_level"
    """heads of their own for the end of each step, or one set for all"""
    disc_head: Literal["patch", "pooled"] = "patch"
    """a logit per token, or one per map"""
    disc_depth: float = Field(1.0, gt=0, le=1)
    """where heads read, as a share of the teacher's depth"""
    clean_depth: float = Field(2 / 3, gt=0, le=1)
    """where those of clean data read"""


class AccVideo(Objective, config=AccVideoConfig):
    heads: LevelHeads
    """the discriminators"""

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        gan = bool(cfg.gan_weight)

        def network_calls(guidance: float, num_steps: int) -> Calls:
            calls = {"student+grad": num_steps * (1 + gan)}
            calls |= {"features+grad": num_steps, "features": 2 * num_steps} if gan else {}
            return calls | {"teacher (first epoch)": cfg.teacher_steps * passes(guidance)}

        def why_not_sampled(num_steps: int, sampler: str) -> str:
            walks = sampler == "ode" or num_steps == 1
            return "" if walks else "accvideo trains a deterministic walk: use ode"

        spec = LevelHeadsSpec(cfg.disc_depth, cfg.clean_depth, cfg.disc_head, cfg.heads == "shared")
        players = {"student": ("student",), **({"disc": ("heads",)} if gan else {})}
        return Requirements(
            network_calls,
            players=players,
            auxiliaries={"heads": spec} if gan else {},
            real_data=False,
            accumulates=False,
            why_not_sampled=why_not_sampled,
        )

    def check(self) -> None:
        if self.cfg.trajectories:
            TrajectoryFiles(self.cfg.trajectories, self.collected())

    def prepare(self):
        cfg, files = self.cfg, None
        if cfg.trajectories:
            about = self.collected() | {"teacher": denoiser_digest(self.teacher.backbone)}
            files = TrajectoryFiles(cfg.trajectories, about)
        self.pairs = Pairs(self, cfg.teacher_steps, noises=cfg.noises or 1, files=files)
        self.times = [*self.student.times, self.schedule.t_min]  # t_0 .. t_m

    def collected(self) -> dict[str, str]:
        """What a trajectory is made of beside the teacher's weights."""
        t = torch.tensor(teacher_grid(self.schedule, self.cfg.teacher_steps), dtype=torch.float64)
        levels = [self.schedule.alpha(t).round(decimals=6), self.schedule.sigma(t).round(decimals=6)]
        return {
            "guidance": f"{self.guidance:g}",
            "teacher_steps": str(self.cfg.teacher_steps),
            "times": ", ".join(f"{t:.6g}" for t in self.student.times),
            "schedule": fingerprint("levels", levels),
        }

    def busy(self) -> str:
        return self.pairs.busy()

    def step(self, batch: Batch, k: int) -> Updates:
        cfg, S, cond = self.cfg, self.schedule, batch.cond
        rows = self.pairs(batch, self.teacher)  # [B, m + 1, ...]: x_0 .. x_m of the teacher
        num = len(self.times) - 1
        self.queues: list[deque[Tensor]] = [deque() for _ in range(num + 1)]
        self.queues[0].append(batch.noise * S.prior_std(self.times[0]))
        for i in range(num):
            t, u = self.time(i, rows), self.time(i + 1, rows)
            real = rows[:, i + 1]
            with self.turn("student"):
                D = self.student(rows[:, i], t, cond)
                goal = undo_jump(S, real, rows[:, i], t, u)  # (x_{i+1} - x_i) / (t_{i+1} - t_i), as D
                weighting = native_weighting(self.student)
                loss = losses.denoising(S, D, goal, t, weighting)  # |v - mean velocity|^2
                yield loss, {"trajectory": loss, "error": (D - goal).abs().mean()}
            if not cfg.gan_weight:
                continue
            disc = self.heads.at(i)  # H_{i+1}
            with self.turn("student"):
                y = self.queues[i].popleft()
                fake = jump(S, self.student(y, t, cond), y, t, u)  # y_{i+1}
                self.queues[i + 1].append(fake.detach())
                loss = losses.gan_generator(disc(fake, u, cond), cfg.gan_loss)
                yield cfg.gan_weight * loss, {"gan": loss, f"gan_{i + 1}": loss}
            yield from pair_turn(self, fake, real, u, cond, cfg.gan_loss, disc)

    def time(self, i: int, x: Tensor) -> Tensor:
        """t_i for every row of x, [B]."""
        return torch.full((len(x),), self.times[i], dtype=torch.float64, device=x.device)
