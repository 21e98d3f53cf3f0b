"""CausVid: a bidirectional video model as a few-step student that makes a clip block after block.

Paper: Yin et al. 2024 (CVPR 2025), arXiv 2412.07772.

  student: block-causal attention, a time for every block; teacher and critic look both ways, at one time
  stage 0 (objective ode_pairs): states of the teacher's ODE, a step of the list for each block,
                                 |G(states)_b - end_b|^2 of every block b that is not clean already
  stage 1, every step k:
    i_b ~ U{steps of the list, clean}                  for each block b by itself
    x = G(alpha x0 + sigma eps at t_{i_b})             one pass of all blocks under the mask
    if k % student_every == 0:
      x_t = alpha x + sigma eps                        one t for the clip
      update G with  0.5 |x - sg[x - (D_fake - D_real^w) / mean|x - D_real^w|]|^2
                     [+ gan_weight softplus(-Disc)]
    update critic with  w(t) |D_fake(x_t) - sg x|^2 [+ disc_weight (GAN pair)]

A sample of one block, as an image, is DMD2 without backward simulation.

Differs
- authors' list ends in a clean entry too, which is how a block learns to attend to finished ones; here it is
  always there, and is no step of the sampler.
- the critic moves on the sample of its step, as in DMD2 here; authors draw another batch for it.
- authors hand the block-causal mask to FlexAttention; here it is a boolean mask, of which the parallel pass
  alone has need.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from fastgen.core.batch import Batch
from fastgen.objectives.base import Updates, data_of
from fastgen.objectives.requirements import Requirements
from fastgen.objectives.shared.blocks import BlockMatching, draw_levels
from fastgen.objectives.shared.critic import GanMatchingConfig, critic_calls
from fastgen.roles.roles import Role


class CausVidConfig(GanMatchingConfig):
    """DMD of a block-causal student on noised clips."""

    name: Literal["causvid"] = "causvid"
    gan_weight: float = Field(0.0, ge=0)
    """weight of the student's GAN term; 0 drops the discriminator"""


class CausVid(BlockMatching, config=CausVidConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        calls = lambda guidance, _: critic_calls(cfg, guidance)  # noqa: E731
        return replace(
            super().requirements(cfg), network_calls=calls, real_data=True, causal=True, blocks=True
        )

    def step(self, batch: Batch, k: int, teacher: Role | None = None) -> Updates:
        x0 = data_of(batch)
        t = draw_levels(self, x0).t  # t_{i_b}
        noisy = self.schedule.noise(x0, batch.noise, t)
        if k % self.cfg.student_every == 0:
            with self.turn("student"):
                x = self.student(noisy, t, batch.cond)  # one pass under the mask
                yield self.student_loss(x, batch, teacher=teacher)  # DMD at one t for the clip
        else:
            with torch.no_grad():
                x = self.student(noisy, t, batch.cond)
        yield from self.critic_turn(batch, x)  # w(t) |D_fake(x_t) - sg x|^2
