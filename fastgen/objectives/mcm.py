"""MCM: a consistency loss of a clip's motion alone, and a GAN by which its frames take the look of pictures.

Paper: Zhai et al. 2024 (Motion Consistency Model), arXiv 2406.06890; yhZhai/mcm. LCM's skeleton (`lcm.py`):

  z0 = data; with probability p, of the whole batch, z0 = f_theta(n, T, c), n ~ N(0, I), without gradient
  n ~ U, t = t_{n+1}, r = t_n;  z_t = alpha z0 + sigma eps, and eps itself at the last of the grid's times
  pred = f_theta(z_t, t);  target = sg f_theta-(z_r, r), z_r the guided teacher's DDIM step
  L_cd = mean sqrt(d^2 + c^2) - c,  d = M(pred) - sg M-(target)
  L_adv = - mean H(features(frames(pred))),  two frames of each clip, decoded with gradient
  update G and M with   L_cd + gan_weight L_adv;    M- <- .95 M- + .05 M
  update H with         mean max(-1, H(fake)) + mean max(-1, -H(real)) + gp_weight (|dH / d features| - 1)^2

M(z) = z + net(z) is learned, net per frame and zero at first; or it is raw, the difference of neighbouring
frames, or a band of frequencies. Real pictures are those of `data.appearance`; without them, frames of the
same clips, one of each of equal parts of it.

`student.trained ["*motion_modules*"]` with a full student is the paper's AnimateDiff form.

Differs
- H's loss here is half the sum of two hinges: theirs plus two, halved, and so of the same gradient but for
  the half, which Adam does not see; gp_weight is then theirs halved. It stays fixed; theirs is multiplied by
  five where the penalty passes 100.
- heads read no text, so that pictures need no captions; theirs are told it.
- features are of any image network (theirs: DINO ViT-S at four depths), shown whole pictures; they crop half
  of them to 224 pixels.
- an autoencoder that joins frames in time decodes whole clips, of which two frames are then judged.
- clipping the gradient takes in that of M, which they leave out. With LoRA M- moves too, its target is the
  student itself, as theirs.
- f is D, and the boundary exact, as in `lcm.py`: their timestep factor of 4 shows at t = 0 alone.
- local and global correlation volumes, two more forms of M in their code, are not here.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.core.ema import ema_update
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import expand
from fastgen.networks.augment import Augmentation, augment
from fastgen.networks.motion import Motion, MotionHead, kept_share, motion_of
from fastgen.objectives.base import Updates, data_of
from fastgen.objectives.lcm import LCM, LatentConsistencyConfig
from fastgen.objectives.requirements import Auxiliary, Calls, FramesSpec, MotionSpec, Requirements
from fastgen.roles.frames import FrameJudge, feature_penalty


class MCMConfig(LatentConsistencyConfig):
    """Consistency of motion, and the look of pictures."""

    name: Literal["mcm"] = "mcm"
    motion: Motion = "learned"
    """what of the latents is compared: learned, raw, diff, or the low or high frequencies"""
    motion_width: int = Field(64, ge=1)
    """channels inside the learned head"""
    motion_decay: float = Field(0.95, ge=0, lt=1)
    """EMA decay of the learned head that the target goes through"""
    cutoff: float = Field(0.25, gt=0, lt=2)
    """of low and high: the largest low frequency, as a share of the highest along each axis"""
    mix_prob: float = Field(0.5, ge=0, le=1)
    """how often a batch starts from the student's own one-step estimate instead of data"""
    pure_noise: bool = True
    """let the first of the grid's times hold noise alone, whatever the schedule leaves of the data there"""
    gan_weight: float = Field(1.0, ge=0)
    """weight of the adversarial loss; 0 leaves it out"""
    frames: int = Field(2, ge=1)
    """frames of each clip that are judged"""
    features: str = ""
    """folder of the frozen image network whose features the heads read, or pixels; empty is the bundled one
    of the teacher's set
    """
    augmentations: tuple[Augmentation, ...] = ("colour", "translation", "cutout")
    """random changes of every picture that is judged; leave colour out where the look is one of colour"""
    gp_weight: float = Field(1e-5, ge=0)
    """weight of the penalty on the gradient of the features"""

    @model_validator(mode="after")
    def _known_once(self):
        if len(set(self.augmentations)) != len(self.augmentations):
            raise ValueError("objective.augmentations: name each once")
        return self


class MCM(LCM, config=MCMConfig):
    motion: MotionHead
    """M, where it is learned"""
    judge: FrameJudge
    """H over features, where there is a GAN"""

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        needs = super().requirements(cfg)
        trained, parts = ["student"], dict[str, Auxiliary]()
        if cfg.motion == "learned":
            trained.append("motion")
            parts |= dict.fromkeys(("motion", "motion_target"), MotionSpec(cfg.motion_width))
        players: dict[str, tuple[str, ...]] = {"student": tuple(trained)}
        if cfg.gan_weight:
            players["disc"] = ("judge",)
            parts["judge"] = FramesSpec(cfg.features)

        def network_calls(guidance: float, num_steps: int) -> Calls:
            calls, net = needs.network_calls(guidance, num_steps), "target" if cfg.target_decay else "student"
            return calls | {net: calls[net] + cfg.mix_prob}

        return replace(
            needs,
            network_calls=network_calls,
            players=players,
            auxiliaries=parts,
            appearance=bool(cfg.gan_weight),
        )

    def check(self) -> None:
        family = getattr(self.student.backbone, "family", None)
        if self.cfg.motion == "diff" and family is not None and not family.temporal:
            raise UserError("objective.motion", "found diff for a teacher of pictures", "use learned or raw")

    def step(self, batch: Batch, k: int) -> Updates:
        cfg = self.cfg
        if cfg.motion == "learned" and k == 0:
            self.move_head(0.0)
        point = self.point(batch, self.start(batch, k))
        with self.turn("student"):
            pred, target = self.neighbours(batch, k, point)
            motion = motion_of(cfg.motion, pred, self.parts.get("motion"), cfg.cutoff)  # M(pred)
            with torch.no_grad():
                slow = self.parts.get("motion_target")
                goal = motion_of(cfg.motion, target, slow, cfg.cutoff)  # M-(target)
            loss = self.distance(motion, goal, point.t)  # L_cd
            logs = {"cd": loss, "gap": (pred - target).abs().mean(), "motion_kept": kept_share(motion, pred)}
            if cfg.gan_weight:
                logs["gan"] = losses.gan_generator(self.judge(self.shown(pred)), "hinge")  # L_adv
                loss = loss + cfg.gan_weight * logs["gan"]
            yield loss, logs
        self.move_target()
        if cfg.motion == "learned" and self.sync:
            self.move_head(cfg.motion_decay)
        if cfg.gan_weight:
            yield from self.judge_turn(batch, pred.detach())

    def start(self, batch: Batch, k: int) -> Tensor:
        """z0: of data, or of the student's own trajectory."""
        x0 = data_of(batch)
        if not happens(self.cfg.mix_prob, self.rng):
            return x0
        noise, last = self.rng.randn_like(x0), self.schedule.training_grid(self.cfg.grid_steps)[0]
        t = torch.full((len(x0),), last, dtype=torch.float64, device=x0.device)
        with torch.no_grad():
            return self.target_net(k)(noise * self.schedule.prior_std(last), t, self.draw_guidance(batch)[1])

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t: without any trace of x0 at the last of the grid's times."""
        x_t = super().noised(x0, eps, t)
        last = self.schedule.training_grid(self.cfg.grid_steps)[0]
        pure = expand(t >= last, x_t).bool() & self.cfg.pure_noise
        return torch.where(pure, eps * self.schedule.prior_std(last), x_t)

    def shown(self, x0: Tensor, spread: bool = False) -> Tensor:
        """Frames of clips as the heads see them."""
        pictures = self.judge.frames(x0, self.cfg.frames, self.rng.rand, spread)
        return augment(pictures, self.cfg.augmentations, self.rng.rand)

    def judge_turn(self, batch: Batch, fake: Tensor) -> Updates:
        """Update the heads on other frames of the same estimates, and on real pictures."""
        with torch.no_grad():
            fakes = self.shown(fake)
            if batch.appearance is None:
                reals = self.shown(data_of(batch), spread=True)
            else:
                reals = augment(batch.appearance, self.cfg.augmentations, self.rng.rand)
        with self.turn("disc"):
            on_fake, on_real = self.judge(fakes), self.judge(reals)
            loss = losses.gan_discriminator(on_fake, on_real, "hinge")
            logs = {"heads": loss, "logit_fake": on_fake[0].mean(), "logit_real": on_real[0].mean()}
            if self.cfg.gp_weight:
                logs["gp"] = feature_penalty(self.judge, reals, fakes, self.rng.rand)
                loss = loss + self.cfg.gp_weight * logs["gp"]
            yield loss, logs

    def move_head(self, decay: float) -> None:
        """M- <- decay M- + (1 - decay) M."""
        ema_update(self.learned("motion_target"), self.learned("motion"), decay)


def happens(probability: float, rng: Rng) -> bool:
    """Whether something of this probability happens to a batch, on every process alike."""
    if probability in (0, 1):
        return bool(probability)
    return rng.shared_randint(1 << 24) < probability * (1 << 24)
