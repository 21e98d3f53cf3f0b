"""Self-Forcing: a student that goes block by block, trained on its own rollouts over a cache.

Paper: Huang et al. 2025, arXiv 2506.08009.

  stage 0: as of CausVid (objective ode_pairs); then, every step k:
    rollout:  s ~ U{steps of the list}, one for all blocks (or one for each)
      for block b, over the cache:
        u = noise;  for j < s:  x = G(u, t_j | cache), u = alpha x + sigma eps at t_{j+1}     without gradient
        x_b = G(u, t_s | cache)                                                        with gradient, and stop
        cache <- keys and values of G(x_b, 0 | cache)                                         without gradient
    if k % student_every == 0:
      x = rollout;  x_t = alpha x + sigma eps                  one t for the clip
      update G with  0.5 |x - sg[x - (D_fake - D_real^w) / mean|x - D_real^w|]|^2
                     [+ gan_weight softplus(-Disc)]
    x = another rollout, without gradient
    update critic with  w(t) |D_fake(x_t) - sg x|^2 [+ disc_weight (GAN pair)]

  long rollouts (`rollout_blocks` more than the clip has): the clip is the end of the rollout, whose first
  block is out of the loss; the blocks before it have no gradient

A sample of one block, as an image, is DMD2 with backward simulation, but for the critic's own rollout.
SiD's loss on such rollouts is the objective sid with student.causal.

Differs
- the cache is written at time 0 without noise, the authors' default of their context noise.
- after a long rollout authors encode its first frame again from pixels, as the first latent of an autoencoder
  that compresses time is an image; here no autoencoder is in the loss, and for such a one the first block is
  only left out of it.
- conditions are those of the batch in both turns.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.core.errors import UserError
from fastgen.objectives.base import Updates
from fastgen.objectives.requirements import Calls, Requirements
from fastgen.objectives.shared.blocks import BlockMatching, frames_of
from fastgen.objectives.shared.critic import GanMatchingConfig, critic_calls
from fastgen.roles.causal import CausalStudent
from fastgen.roles.roles import Role


class SelfForcingConfig(GanMatchingConfig):
    """DMD of a block-causal student on its own rollouts."""

    name: Literal["self_forcing"] = "self_forcing"
    gan_weight: float = Field(0.0, ge=0)
    """weight of the student's GAN term; 0 drops the discriminator and needs no real data"""
    one_step_for_all_blocks: bool = True
    """all blocks of a rollout stop after the same step of the list; false draws one for each"""
    rollout_blocks: int = Field(0, ge=0)
    """blocks of a rollout in training, of which the last ones are the clip; 0 is as many as a clip has"""


class SelfForcing(BlockMatching, config=SelfForcingConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        def calls(guidance: float, num_steps: int) -> Calls:
            """In passes over a clip; what writes the cache is one more of each rollout but for a block."""
            found, earlier = critic_calls(cfg, guidance), (num_steps - 1) / 2
            return {**found, "student": round(earlier * (1 + 1 / cfg.student_every) + 1, 3)}

        return replace(super().requirements(cfg), network_calls=calls, causal=True, blocks=True)

    def step(self, batch: Batch, k: int, teacher: Role | None = None) -> Updates:
        if k % self.cfg.student_every == 0:
            with self.turn("student"):
                x = self.rollout(batch, batch.noise)
                yield self.student_loss(x, batch, self.kept(x), teacher)  # DMD at one t for the clip
        with torch.no_grad():
            x = self.rollout(batch, self.rng.randn_like(batch.noise))
        yield from self.critic_turn(batch, x)  # w(t) |D_fake(x_t) - sg x|^2

    def rollout(self, batch: Batch, noise: Tensor) -> Tensor:
        """A clip by the student's own blocks, or the last blocks of a longer one."""
        student, own = self.student, self.student.num_blocks(noise)
        before = self.blocks_before(own)
        if before:
            block = noise[:, :, : student.spec.block]
            noise = torch.cat([*(self.rng.randn_like(block) for _ in range(before)), noise], 2)
        draws = 1 if self.cfg.one_step_for_all_blocks else before + own
        steps = [self.rng.shared_randint(len(student.times)) for _ in range(draws)]  # s
        if isinstance(student, CausalStudent) and draws > 1:
            x = student.generate(noise, batch.cond, self.rng.randn_like, steps)
        else:
            x = student.generate(noise, batch.cond, self.rng.randn_like, steps[0])
        return x[:, :, -batch.noise.shape[2] :] if before else x

    def blocks_before(self, own: int) -> int:
        """Blocks of a rollout before those of the clip."""
        asked, key = self.cfg.rollout_blocks, "objective.rollout_blocks"
        if asked and asked < own:
            raise UserError(key, f"found {asked}, and a clip has {own}", "give as many or more, or 0")
        if asked and not self.student.spec.block:
            raise UserError(key, f"found {asked} for samples of one block", "leave it out")
        return asked - own if asked else 0

    def kept(self, x: Tensor) -> Tensor | float:
        """0 in the first block of what ends a longer rollout, 1 elsewhere; broadcastable to x."""
        own = self.student.num_blocks(x)
        if not self.blocks_before(own):
            return 1.0
        first = torch.arange(own, device=x.device)[None] > 0
        return frames_of(first.to(x), x)[:, None].reshape(1, 1, -1, *[1] * (x.ndim - 3))
