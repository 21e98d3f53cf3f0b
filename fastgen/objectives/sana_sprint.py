"""SANA-Sprint: continuous-time consistency and latent adversarial distillation, one model for 1 to 4 steps.

Paper: Chen et al. 2025, arXiv 2503.09641 (Sec. 3); NVlabs/Sana. Its parts: `scm.py` and `gan.py`.

  w ~ U(range), an input of the student (student.guidance_embedding)
  L_sCM as in scm.py, with the guided flow teacher seen in TrigFlow coordinates                  (eq. 5-6)
  t' = t_max with probability p ("max-time weighting"), else log-normal
  x = D_theta(alpha x0 + sigma eps, t', c, w)
  update G with     scm_weight L_sCM + gan_weight L_adv(x)                                       (eq. 10)
  update heads with hinge on teacher features of re-noised x, x0 and misaligned x0

With `student.dense_time` and `student.guidance_embedding` the SANA class itself takes t in [0, 1] and w, and
the export is a SanaSprintPipeline with SCMScheduler.

Differs
- authors first fine-tune the teacher with t in [0, 1] for thousands of steps; here the student's time
  embedder is solved for it in closed form, and the tangent warm-up, in which the loss is plain diffusion
  distillation, does the rest. The teacher stays as it is.
- authors draw w from {4, 4.5, 5} and alternate the two updates on different batches; here w is uniform over
  the range, and both updates are made at each step and share the sample.
- latents have unit scale here (sigma_data 1); theirs are halved, which shifts log-normal means by log 2.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from fastgen.core.batch import Batch
from fastgen.objectives.base import Objective, ObjectiveConfig, TimeConfig, Updates, data_of, requirements_of
from fastgen.objectives.requirements import Calls, Requirements
from fastgen.objectives.scm import SCMConfig, consistency_loss, noised_point
from fastgen.objectives.shared.gan import AdversarialConfig, disc_turn, gan_student_loss, student_input


class SanaSprintConfig(ObjectiveConfig):
    """sCM and LADD together."""

    name: Literal["sana_sprint"] = "sana_sprint"
    scm: SCMConfig = SCMConfig(
        sigma_data=1.0, time=TimeConfig(kind="log_normal", mean=0.9, std=1.6), warmup_steps=4000
    )
    """the consistency loss"""
    gan: AdversarialConfig = AdversarialConfig(disc_time=TimeConfig(kind="log_normal", mean=0.1, std=1.0))
    """the adversarial loss"""
    scm_weight: float = Field(1.0, ge=0)
    """weight of the consistency loss"""
    gan_weight: float = Field(0.5, ge=0)
    """weight of the adversarial loss; 0 leaves it out"""
    student_time: TimeConfig = TimeConfig(kind="log_normal", mean=0.9, std=1.6)
    """noise levels of the samples that the adversarial loss judges"""
    max_time_prob: float = Field(0.5, ge=0, le=1)
    """how often such a sample starts from pure noise instead"""


class SanaSprint(Objective, config=SanaSprintConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        scm = requirements_of(cfg.scm)
        if not cfg.gan_weight:
            return replace(scm, untrained=("teacher",))

        def network_calls(guidance: float, num_steps: int) -> Calls:
            return scm.network_calls(guidance, num_steps) | {"student+grad": 2} | cfg.gan.network_calls()

        return replace(
            scm,
            network_calls=network_calls,
            players={**scm.players, "disc": ("disc",)},
            untrained=("teacher",),
            auxiliaries={**scm.auxiliaries, "disc": cfg.gan.discriminator()},
        )

    def step(self, batch: Batch, k: int) -> Updates:
        cfg, x0 = self.cfg, data_of(batch)
        w, cond = self.draw_guidance(batch)
        with self.turn("student"):
            teacher = self.teacher if cfg.scm.mode == "distillation" else None
            point = noised_point(cfg.scm, self, batch, w, teacher)
            scm, logs = consistency_loss(cfg.scm, self, cond, point, k)
            loss = cfg.scm_weight * scm
            if cfg.gan_weight:
                t = self.sample_t(len(x0), cfg.student_time)
                pure = self.rng.rand(len(t)) < cfg.max_time_prob
                t = torch.where(pure, self.student.times[0], t)  # max-time weighting
                x = self.student(student_input(self, batch, t), t, cond)
                adversarial, more = gan_student_loss(self, cfg.gan, x, batch.cond)
                loss, logs = loss + cfg.gan_weight * adversarial, logs | more  # eq. 10
            yield loss, logs
        if cfg.gan_weight:
            yield from disc_turn(self, cfg.gan, batch, x)
