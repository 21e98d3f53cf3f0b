"""MSD: several one-step students, each for its own part of the conditions, distilled by any host method.

Paper: Song et al. 2024, arXiv 2410.23274 (Sec. 4: DM and ADM stages; Sec. 4.3: TSM). No public code.

  the conditions are divided into K equal parts Y_1 .. Y_K (classes in blocks, prompts by their text states)
  every step, for each student k with a critic of its own:
    a step of the host method on the rows of the batch whose condition lies in Y_k
  score_matching (TSM), a stage before, for students of another architecture (`student.net`):
    update student k with  w(t) |D_k(x_t, t, c) - sg D_real(x_t, t, c)|^2         x_t from real data
  sampling:  x = G_k(z, c) with c in Y_k                       the router is shipped with the export

Differs
- students are independent jobs in the paper; here one run trains them in turn, each with optimizers and a
  random stream of its own, so that `only` (one run per student, in parallel, then
  `python -m fastgen.cli.merge_students`) gives the same students.
- text: the paper cuts SD1.5's text states into four quadrants, axes not stated; here equal parts along their
  first principal axis.
- regression pairs of a DMD host are made for a student's own conditions; the paper lets every student see all
  pairs with their own labels.
- a part without a row in the batch sits the step out: keep the batch a good multiple of K. Of several
  processes each takes as many rows of a part as the one that has fewest, so that all take part or none.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.core.rng import Rng
from fastgen.diffusion import losses
from fastgen.networks.sharding import least_of_all
from fastgen.objectives.base import (
    REGISTRY,
    AnyObjective,
    Objective,
    ObjectiveConfig,
    TimeConfig,
    Updates,
    data_of,
    native_weighting,
    requirements_of,
)
from fastgen.objectives.dmd2 import DMD2Config
from fastgen.objectives.requirements import Requirements
from fastgen.roles.roles import Students


class MSDConfig(ObjectiveConfig):
    """K students behind a router."""

    name: Literal["msd"] = "msd"
    num_students: int = Field(4, ge=1)
    """K; the same in every stage of a run"""
    host: AnyObjective = DMD2Config()
    """the method that distils each student, with its settings"""
    score_matching: bool = False
    """regress each student's denoiser on the teacher's instead (TSM), before a stage with the host"""
    time: TimeConfig = TimeConfig(low=0.001, high=1.0)
    """noise levels of the score matching"""
    only: tuple[int, ...] = ()
    """students to train in this run; empty trains all"""

    @model_validator(mode="after")
    def _fits(self):
        wrong = [j for j in self.only if not 0 <= j < self.num_students]
        if wrong:
            raise ValueError(f"objective.only: found {wrong[0]}; students are 0 to {self.num_students - 1}")
        if requirements_of(self.host).forgets:
            raise ValueError(
                f"objective.host: {self.host.name} draws conditions of every student; use it without msd"
            )
        if counts := requirements_of(self.host).step_counts:
            raise ValueError(
                f"objective.host.step_counts: found {list(counts)}; students behind a router read no "
                "step count; leave it out and set student.num_steps"
            )
        return self


class MSD(Objective, config=MSDConfig):
    student: Students

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        host = requirements_of(cfg.host)
        one = {"student": ("student",)} if cfg.score_matching else host.players
        wanted = cfg.only or range(cfg.num_students)
        needs = replace(
            host,
            players={f"{n}{j}": tuple(f"{p}{j}" for p in parts) for j in wanted for n, parts in one.items()},
            untrained=("student", *host.untrained),
            num_students=cfg.num_students,
            guidance_embedding=False,  # the students share one scale
            guidance_settings={f"host.{key}": w for key, w in host.guidance_settings.items()},
            dropout_settings={f"host.{key}": p for key, p in host.dropout_settings.items()},
            few_step=True,
        )
        if not cfg.score_matching:
            return needs
        return replace(
            needs,
            network_calls=lambda guidance, num_steps: {"student+grad": 1, "teacher": 1},
            real_data=True,
            one_guidance=False,  # the teacher is matched without guidance
        )

    def __init__(self, cfg, parts: dict, rng: Rng, guidance: float = 1.0):
        super().__init__(cfg, parts, rng, guidance)
        self.router, self.hosts = self.student.router, {}
        self.student.trained = list(cfg.only or range(cfg.num_students))
        host = REGISTRY[cfg.host.name]
        for j in cfg.only or range(cfg.num_students):
            own = {n.removesuffix(str(j)): p for n, p in parts.items() if n.endswith(str(j))}
            self.hosts[j] = host(cfg.host, {**parts, **own}, rng, self.guidance)

    def prepare(self) -> None:
        if not self.cfg.score_matching:
            for host in self.hosts.values():
                host.prepare()

    def state(self) -> dict[str, Tensor]:
        return {f"{j}.{n}": p for j, host in self.hosts.items() for n, p in host.state().items()}

    def step(self, batch: Batch, k: int) -> Updates:
        part, seed = self.router(batch.cond), self.rng.generator.initial_seed()
        for j, host in self.hosts.items():
            rows = (part == j).nonzero()[:, 0]
            rows = rows[: least_of_all(len(rows))]
            if not len(rows):
                continue
            self.rng.generator.manual_seed(seed + 7919 * j)  # a stream of its own
            own = rows_of(batch, rows)
            for item in self.match(own, host) if self.cfg.score_matching else host.step(own, k):
                self.active = f"{host.active}{j}"
                yield item
        self.active = None

    def match(self, batch: Batch, host: Objective) -> Updates:
        """w(t) |D_k(x_t) - sg D_real(x_t)|^2 on real data."""
        with host.turn("student"):
            x0 = data_of(batch)
            t = self.sample_t(len(x0), self.cfg.time)
            x_t = self.schedule.noise(x0, self.rng.randn_like(x0), t)
            with torch.no_grad():
                real = self.teacher(x_t, t, batch.cond)
            D = host.student(x_t, t, batch.cond)
            yield losses.denoising(self.schedule, D, real, t, native_weighting(self.teacher)), {}


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch."""

    def take(value: Tensor | None) -> Any:
        return None if value is None else value[rows.to(value.device)]

    cond, uncond = ({n: take(c) for n, c in d.items()} for d in (batch.cond, batch.uncond))
    texts = batch.texts and [batch.texts[i] for i in rows.tolist()]
    return Batch(take(batch.x0), cond, uncond, take(batch.noise), take(batch.index), texts)
