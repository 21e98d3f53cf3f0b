"""DisBack: degradation recording, then distillation back along the recorded path, around any host method.

Paper: Zhang et al. 2024, arXiv 2408.15991 (Alg. 1 degradation recording, Alg. 2 distribution backtracking).

  stage 1, record_steps:  the student G_0 stays as it is
    x = G_0(z, c);  update critic with  w(t) |D_psi(x_t) - sg x|^2        psi starts at the teacher P_0
    every record_steps / nodes:  P_j <- psi                               j = 1 .. N
  stage 2, from then on, with psi = P_N:
    j = N - 1, then one less every switch_every steps, down to 0, where it stays
    a step of the host method with P_j in the teacher's place             P_0 is the teacher itself

Differs
- the authors' public stage 2 loads its nodes with strict=False under other names (nothing is loaded) and
  compares the node's number with the global step; this follows the paper.
- a node is kept as the critic's trained tensors: a whole copy, or a few LoRA matrices over the shared base.
- recording drops the condition for a tenth of the batches where guidance is used, so that a node's null
  branch belongs to the same model as its conditional one; the paper does not say.
- both stages are one stage of a run, so that the critic's optimizer goes on, as the paper has it.
- the paper's faster convergence is that of a far student: on Gaussians the path saves student steps where
  student and teacher hardly overlap, and costs some where they do (test_disback.py measures both); recording
  comes on top.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.core.rng import Rng
from fastgen.objectives.base import (
    REGISTRY,
    AnyObjective,
    Objective,
    ObjectiveConfig,
    Updates,
    requirements_of,
)
from fastgen.objectives.diff_instruct import DiffInstructConfig
from fastgen.objectives.requirements import Requirements
from fastgen.objectives.shared.critic import Matching, MatchingConfig
from fastgen.roles.roles import Role


class DisBackConfig(ObjectiveConfig):
    """Backtracking around a score distillation."""

    name: Literal["disback"] = "disback"
    host: AnyObjective = DiffInstructConfig()
    """the score distillation to run along the path, with its settings"""
    record_steps: int = Field(100, ge=0)
    """steps of stage 1"""
    nodes: int = Field(5, ge=0)
    """N, recorded evenly over record_steps; 0 is the host method alone"""
    switch_every: int = Field(100, ge=1)
    """steps spent with each node"""
    record_drop: float = Field(0.1, ge=0, lt=1)
    """probability of a null-condition batch while recording, where guidance is used"""

    @model_validator(mode="after")
    def _fits(self):
        if not isinstance(self.host, MatchingConfig):
            known = [n for n, c in REGISTRY.items() if issubclass(c.config, MatchingConfig)]
            raise ValueError(f"objective.host: {self.host.name} has no critic; use one of {', '.join(known)}")
        if "critic" not in requirements_of(self.host).trained:
            raise ValueError(f"objective.host: {self.host.name} trains no critic; set its dm_weight above 0")
        if (self.nodes > 0) != (self.record_steps > 0) or self.nodes > self.record_steps:
            raise ValueError(
                f"objective.nodes: found {self.nodes} in {self.record_steps} steps of recording; "
                "use at least one step per node, or 0 for both"
            )
        return self


class DisBack(Objective, config=DisBackConfig):
    path: Role
    host: Matching

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        host = requirements_of(cfg.host)
        return replace(
            host,
            untrained=(*host.untrained, *(("path",) if cfg.nodes else ())),
            guidance_settings={f"host.{key}": w for key, w in host.guidance_settings.items()},
            dropout_settings={f"host.{key}": p for key, p in host.dropout_settings.items()},
        )

    def __init__(self, cfg, parts: dict, rng: Rng, guidance: float = 1.0):
        super().__init__(cfg, parts, rng, guidance)
        host = REGISTRY[cfg.host.name](cfg.host, parts, rng, self.guidance)
        assert isinstance(host, Matching)
        self.host = host
        self.critic_tensors = list(self.critic.trainable().values())
        self.nodes = [[torch.zeros_like(p) for p in self.critic_tensors] for _ in range(cfg.nodes)]
        self.loaded = 0

    def prepare(self) -> None:
        self.host.prepare()

    def busy(self) -> str:
        return self.host.busy()

    def state(self) -> dict[str, Tensor]:
        kept = {f"node{j}.{i}": p for j, node in enumerate(self.nodes, 1) for i, p in enumerate(node)}
        return {**self.host.state(), **kept}

    def step(self, batch: Batch, k: int) -> Updates:
        cfg = self.cfg
        if k < cfg.record_steps:
            turns = self.record(batch, k)  # stage 1
        else:
            teacher = self.node(self.index(k))  # P_j
            turns = self.host.step(batch, k - cfg.record_steps, teacher)  # stage 2
        for item in turns:
            self.active = self.host.active
            yield item
        self.active = None

    def index(self, k: int) -> int:
        """j at step k: N - 1 first, 0 in the end."""
        return max(self.cfg.nodes - 1 - (k - self.cfg.record_steps) // self.cfg.switch_every, 0)

    def record(self, batch: Batch, k: int) -> Updates:
        """One critic step on G_0's samples; after the last step of a span the critic becomes a node."""
        cfg, (last, drop) = self.cfg, (len(self.student.times) - 1, self.cfg.record_drop)
        with torch.no_grad():
            x = self.generate(batch, self.rng.shared_randint(last + 1))  # x = G_0(z, c)
        cond = self.host.drop_batch_condition(batch, drop if self.guidance != 1 else 0)
        yield from self.host.critic_turn(batch, x, cond)  # w(t) |D_psi(x_t) - sg x|^2
        j = (k + 1) * cfg.nodes // cfg.record_steps
        if j > k * cfg.nodes // cfg.record_steps:
            for kept, p in zip(self.nodes[j - 1], self.critic_tensors):
                kept.copy_(p.detach())  # P_j <- psi

    @torch.no_grad()
    def node(self, j: int) -> Role:
        """The role that plays the teacher at node j."""
        if j == 0:
            return self.teacher
        if j != self.loaded:
            for p, kept in zip(self.path.trainable().values(), self.nodes[j - 1], strict=True):
                p.copy_(kept)
            self.loaded = j
        return self.path
