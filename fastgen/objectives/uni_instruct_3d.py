"""Uni-Instruct, f-distill and SIM in 3D: ProlificDreamer's critic under any f-divergence.

Papers: Uni-Instruct (Wang et al. 2025, arXiv 2505.20755, whose code has no 3D part) and f-distill (Xu et al.
2025, arXiv 2502.15681) carried to variational score distillation (arXiv 2305.16213); Dive3D (arXiv
2506.13594) has SIM alone.

  every step, as in vsd:  x = encode(render(theta_i, c));  x_t = alpha x + sigma eps;  e_T^w,  e_F(x_t, c)
    r = exp(logit of the heads on e_F's features at x_t), clamped    ~ teacher / renders, at this x_t and c
    theta_i, branch di:   gradient  sigma^2 h(r) (e_T^w - e_F) dx/dtheta            h(r) = r^2 f''(r), mean 1
             branch sim:  d/dx_t of  [ 2 h Delta.(D_F - x) + (h - r h') |Delta|^2 ] / (W mean h)
                                                   Delta = D_T^w - D_F;  W = sg mean |x - D_T^w|
    critic:  |e_F(x'_t', c') - eps'|^2 + disc_weight (softplus pair);  real: the teacher's own samples
  steps before `warmup_steps` take h = 1.

  di with f = rkl is vsd, bit for bit, and needs no heads; sim with it is SiD at alpha = 1/2 (SIM). What e_T
  is guided by and what the bank of samples is drawn by is one scale, but not one law: the ratio is biased.

Differs
- there is no real data: the bank holds the guided teacher's samples for every view word of the prompt.
- sim differentiates the ratio through the heads; left constant it is another gradient but for rkl.
- h and its mean are of the last `ratio_memory` samples, since batches of views are small.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch, Cond
from fastgen.diffusion import divergences, losses
from fastgen.objectives.base import Updates
from fastgen.objectives.requirements import Calls, DiscriminatorSpec, Requirements, passes
from fastgen.objectives.shared.critic import diagnostics
from fastgen.objectives.shared.score_distillation import pulled, view_passes
from fastgen.objectives.shared.teacher_bank import TeacherBank
from fastgen.objectives.vsd import VSD, ProlificDreamerConfig


class UniInstruct3DConfig(ProlificDreamerConfig):
    """f-divergence score distillation into assets."""

    name: Literal["uni_instruct_3d"] = "uni_instruct_3d"  # type: ignore[assignment]
    f: divergences.Name = "js"
    """the divergence D_f(teacher || renders); rkl is vsd, or SIM, and needs no density ratio"""
    branch: Literal["di", "sim"] = "di"
    """di: the score difference weighed by h; sim: the expanded divergence, through teacher and critic"""
    ratio_low: float = Field(1e-3, gt=0)
    """smallest ratio"""
    ratio_high: float = Field(1e3, gt=0)
    """largest ratio"""
    ratio_memory: int = Field(128, ge=1)
    """samples, this batch among them, over which h is averaged"""
    warmup_steps: int = Field(1000, ge=0)
    """steps with h = 1, while the ratio is being learned"""
    disc_weight: float = Field(1.0, ge=0)
    """weight of the heads' loss beside the critic's"""
    bank: int = Field(64, ge=1, le=4096)
    """samples of the teacher for each condition, which stand for real data"""
    bank_steps: int = Field(25, ge=1)
    """steps of the teacher's sampler for them"""


class UniInstruct3D(VSD, config=UniInstruct3DConfig):
    weight_sums: Tensor
    """[2, 1], of h and of the samples it was read at"""

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        needs, ratio = super().requirements(cfg), cfg.f != "rkl"
        if ratio:
            parts = {"student": ("student",), "critic": ("critic", "disc")}
            needs = replace(needs, players=parts, auxiliaries={"disc": DiscriminatorSpec("critic")})
        return replace(needs, network_calls=lambda w, num_steps: calls_of(cfg, w, num_steps))

    def prepare(self) -> None:
        self.bank = TeacherBank(self, self.cfg.bank, self.cfg.bank_steps)
        self.weight_sums = torch.zeros(2, 1, device=self.rng.device)

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "weight_sums": self.weight_sums}

    def busy(self) -> str:
        return self.bank.busy()

    def step(self, batch: Batch, k: int, teacher=None) -> Updates:
        cfg, S, teacher = self.cfg, self.schedule, teacher or self.teacher
        told = batch.cond if batch.critic_cond is None else batch.critic_cond
        last = self.rng.shared_randint(len(self.student.times))
        if k % cfg.student_every == 0:
            with self.turn("student"):
                x = self.generate(batch, last)  # x = render(theta_i, c)
                t, x_t = self.noised(x, cfg.anneal.at(cfg.time, k))  # x_t = alpha x + sigma eps
                with torch.set_grad_enabled(cfg.branch == "sim"):
                    real = self.view_guided(teacher, x_t, t, batch, self.guidance)  # e_T^w, as D
                    fake, logits = self.judged(x_t, t, told)  # e_F, as D; the ratio's logits
                    h, kappa, logs = self.weights(logits, k, x)
                if cfg.branch == "di":
                    loss = pulled(x, real, fake, S, t, cfg.omega, h)  # omega h (e_T^w - e_F)
                else:
                    W = losses.per_sample_mean((x - real).abs()).detach().clamp(min=1e-5)
                    loss = (divergences.expanded(x, real, fake, h, kappa) / W).mean() * x[0].numel()
                penalty, of_asset = self.asset_terms(k)
                logs |= {"divergence": loss, **diagnostics(x, real.detach(), fake.detach()), **of_asset}
                yield loss + penalty, logs
        else:
            with torch.no_grad():
                x = self.generate(batch, last)
        yield from self.learn(batch, x.detach(), told, teacher)
        self.settle(k)

    def learn(self, batch: Batch, x: Tensor, told: Cond, teacher) -> Updates:
        """The critic's turn on renders x: denoising, and the heads' pair against the bank."""
        with self.turn("critic"):
            t, x_t = self.noised(x, self.cfg.critic_time)
            told = self.drop_cameras(told, len(x))  # c'
            fake, logits = self.judged(x_t, t, told)
            loss = self.denoising_loss(fake, x, t)  # |e_F - eps|^2
            logs = {"denoising": loss, **self.critic_error(fake, x, x_t, t, told)}
            if logits:
                x0 = self.bank(batch, teacher)
                real = self.disc(self.schedule.noise(x0, self.rng.randn_like(x0), t), t, told)
                disc = losses.gan_discriminator(logits, real)  # softplus pair
                loss = loss + self.cfg.disc_weight * disc
                logs |= {"disc": disc, "logit_fake": logits[0].mean(), "logit_real": real[0].mean()}
            yield loss, logs

    def judged(self, x_t: Tensor, t: Tensor, told: Cond) -> tuple[Tensor, list[Tensor]]:
        """(D_F, the heads' logits) of one pass of the critic; no logits for rkl."""
        if self.cfg.f == "rkl":
            return self.critic(x_t, t, told), []
        logits, fake = self.disc(x_t, t, told, score=True)
        return fake, logits

    def weights(self, logits: list[Tensor], k: int, x: Tensor) -> tuple[Tensor, Tensor, dict]:
        """(h, h - r h') [B] over the running mean of h, and what to log of the ratio."""
        cfg = self.cfg
        if not logits or k < cfg.warmup_steps:
            one = x.new_ones(len(x))
            return one, one, {}
        log_r = divergences.log_ratio(logits)
        h, kappa, _ = divergences.weights(cfg.f, log_r.exp(), cfg.ratio_low, cfg.ratio_high)
        everyone = torch.zeros(len(h), dtype=torch.long, device=h.device)
        level, moved = divergences.running_means(h.detach(), everyone, self.weight_sums, cfg.ratio_memory)
        self.weight_sums.copy_(moved)
        level = level.clamp(min=1e-6)
        return h / level, kappa / level, {"log_ratio": log_r.mean(), "h_max": (h / level).max()}


def calls_of(cfg: UniInstruct3DConfig, guidance: float, num_steps: int) -> Calls:
    """Expected network calls of one step."""
    r, ratio, grad = 1 / cfg.student_every, cfg.f != "rkl", "+grad" if cfg.branch == "sim" else ""
    calls: Calls = {
        "student": (num_steps - 1) / 2 + (1 - r),
        "student+grad": r,
        f"teacher{grad}": r * view_passes(cfg.asset)(guidance),
        "features+grad": float(ratio),
    }
    calls["critic+grad"] = 1.0
    calls[f"critic{grad}"] = calls.get(f"critic{grad}", 0.0) + r
    if ratio:
        calls["teacher (each new sample)"] = cfg.bank_steps * passes(guidance)
    return {name: round(n, 3) for name, n in calls.items() if n}
