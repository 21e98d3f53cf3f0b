"""LADD: latent adversarial distillation on the features of the frozen teacher.

Paper: Sauer et al. 2024, arXiv 2403.12015 (SD3-Turbo; no code); as a second loss: SANA-Sprint,
arXiv 2503.09641 (Sec. 3.2), NVlabs/Sana.

  i ~ P(student's steps);  x_t = alpha x0 + sigma eps at t_i, pure noise at the first
  x = D_theta(x_t, t_i, c)
  features of the teacher at (alpha x + sigma eps', t', c), t' of their own; heads at several depths -> logits
  update G with     -mean logits                        (hinge), or softplus(-logits)
  update heads with 1/2 [relu(1 - l_real) + relu(1 + l_fake)], or the softplus pair,
                    + r1_weight |d l_real / d x_t'|^2   at the same noised real input
  fake also: real x0 under another row's condition (misaligned pairs)

Differs
- heads: spectral norm, residual block and one logit per token as in StyleGAN-T, with 3 x 3 convolutions on
  the map instead of 1-D ones over tokens, GroupNorm instead of batch statistics of eight samples (so that a
  batch of one works and samples stay apart), and no condition of their own: text and time come through the
  teacher.
- paper: samples of the guided teacher stand for real data; here the data does. Both updates are made at each
  step and share the sample; authors alternate on different batches.
- R1: exact, or finite differences (`approximate`, APT). The public code compares the logit of a noised sample
  with that of an un-noised one; here both are the same x_t', one of them perturbed.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.objectives.base import Objective, ObjectiveConfig, Updates
from fastgen.objectives.requirements import Requirements
from fastgen.objectives.shared.gan import AdversarialConfig, disc_turn, gan_student_loss, student_input


class LADDConfig(ObjectiveConfig):
    """Latent adversarial diffusion distillation."""

    name: Literal["ladd"] = "ladd"
    gan: AdversarialConfig = AdversarialConfig()
    """the discriminator and its loss"""
    student_every: int = Field(1, ge=1)
    """head updates per student update"""
    step_weights: tuple[float, ...] = ()
    """how often each of the student's steps is trained; empty trains all alike"""


class LADD(Objective, config=LADDConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        r = 1 / cfg.student_every
        calls = cfg.gan.network_calls() | {"student+grad": r, "features+grad": r}
        return Requirements(
            lambda guidance, num_steps: calls | ({"student": 1 - r} if r < 1 else {}),
            players={"student": ("student",), "disc": ("disc",)},
            auxiliaries={"disc": cfg.gan.discriminator()},
            one_guidance=False,  # of the teacher only features are read
            guidance_embedding=True,
        )

    def step(self, batch: Batch, k: int) -> Updates:
        _, cond = self.draw_guidance(batch)
        if k % self.cfg.student_every == 0:
            with self.turn("student"):
                x = self.sample(batch, cond)
                yield gan_student_loss(self, self.cfg.gan, x, batch.cond)
        else:
            with torch.no_grad():
                x = self.sample(batch, cond)
        yield from disc_turn(self, self.cfg.gan, batch, x)

    def sample(self, batch: Batch, cond: dict) -> Tensor:
        """D_theta from a random step of the student's list."""
        times = torch.tensor(self.student.times, dtype=torch.float64, device=batch.noise.device)
        p = torch.tensor(self.cfg.step_weights or [1.0] * len(times), dtype=torch.float64).cumsum(0)
        i = torch.searchsorted(p / p[-1], self.rng.rand(len(batch.noise)).cpu(), right=True).to(times.device)
        return self.student(student_input(self, batch, times[i]), times[i], cond)
