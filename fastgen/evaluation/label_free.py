"""Numbers of a student's samples against its teacher's that need no weights but the teacher's own: for
teachers that no bundled network judges.

Colour:    saturation, contrast and sharpness as ratios to the teacher's on the same requests and noise
Distance:  Frechet distance and MMD of student and teacher samples in the teacher's own features, the means
of a middle feature map at a log signal-to-noise ratio of 2: `fd_teacher_features`, `mmd_teacher_features`
Own:       the same two distances of teacher and student to the images of the run, where those are the
user's: `fd_own_images`, `mmd_own_images`
Diversity: Vendi score in those features, as a ratio to the teacher's

They say how near a student is to its teacher, and nothing about how good either is.
"""

from typing import Any

import torch
from torch import Tensor

from fastgen.core.batch import Cond
from fastgen.evaluation.metrics.frechet import frechet
from fastgen.evaluation.metrics.mmd import polynomial_mmd
from fastgen.evaluation.metrics.pixels import appearance, drift
from fastgen.evaluation.metrics.variety import vendi_score
from fastgen.evaluation.metrics.video import clip_scores
from fastgen.networks.teacher import Teacher

LOG_SNR = 2.0


@torch.no_grad()
def teacher_features(teacher: Teacher, images: Tensor, null: Cond, batch_size: int = 50) -> Tensor:
    """[N, C] of images [N, C, H, W] (or clips) in [0, 1]: one pass of the teacher each, under the null
    condition [1, ...] and noise of the image's own number.
    """
    backbone: Any = teacher.backbone
    codec = teacher.codec
    device = next(backbone.parameters()).device
    taps = backbone.family.default_taps(backbone.net)
    found = []
    for first in range(0, len(images), batch_size):
        x0 = codec.encode(images[first : first + batch_size].to(device) * 2 - 1).float()
        noise = [torch.Generator().manual_seed(first + i) for i in range(len(x0))]
        eps = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in noise]).to(x0)
        lam = torch.full((len(x0),), LOG_SNR, dtype=torch.float64, device=device)
        t = backbone.schedule.t_from_lambda(lam)
        cond = {k: v.to(device).expand(len(x0), *v.shape[1:]) for k, v in null.items()}
        maps, _ = backbone.features(backbone.schedule.noise(x0, eps, t), t, cond, taps)
        found.append(maps[0].flatten(2).mean(2).float().cpu())
    return torch.cat(found)


def looks(images: Tensor) -> dict[str, float]:
    """Saturation, contrast and sharpness, and of clips their motion."""
    return appearance(images) | (clip_scores(images) if images.ndim == 5 and images.shape[2] > 1 else {})


def against_teacher(own: dict[str, float], teacher: dict[str, float]) -> dict[str, float]:
    """What `looks` says of a student as ratios to what it says of the teacher."""
    return drift(own, teacher)


def to_own_images(samples: Tensor, images: Tensor) -> dict[str, float]:
    """Of samples to the user's own images, both as teacher features [N, C], cut to equal counts."""
    num = min(len(samples), len(images))
    a, b = samples[:num], images[:num]
    return {"fd_own_images": frechet(a, b), "mmd_own_images": 1000 * polynomial_mmd(a, b)}


def distances(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Of two sets of teacher features [N, C], cut to equal counts."""
    num = min(len(student), len(teacher))
    a, b = student[:num], teacher[:num]
    return {
        "fd_teacher_features": frechet(a, b),
        "mmd_teacher_features": 1000 * polynomial_mmd(a, b),
        "diversity_ratio": vendi_score(a).value / vendi_score(b).value,
    }
