"""Scoring clips of the moving set with two nets of our own; no download, no I3D.

fvd_mini:          Frechet distance on 64 features of the space-time net in assets/measure/moving
fd_mini:           the same of single frames, on the features of the tinted images' net
agreement:         of garment, colour, background and motion, by the space-time net
frame_consistency: mean cosine of neighbouring frames' features (VBench, arXiv 2311.17982)
dynamic_degree:    mean way of the garment from frame to frame, in pixels, fitted to the clip
contrast:          mean over frames of the standard deviation of their values

The last three are right where they are the real clips', which stand under floor. All of them order generators
of this one set and are comparable with no published FVD.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastgen.core.errors import UserError
from fastgen.core.paths import asset
from fastgen.data import moving
from fastgen.evaluation.metrics.agreement import agreement
from fastgen.evaluation.metrics.displacement import displacement
from fastgen.evaluation.metrics.frechet import frechet_from, statistics
from fastgen.evaluation.metrics.neighbours import evenly, precision_recall
from fastgen.networks.clip_net import ClipNet
from fastgen.networks.feature_net import FeatureNet, measure

NOTE = "fvd_mini is a mini metric on a small net of our own; it is not comparable with a published FVD"
HELD = 1000
"""held-out clips that others are compared with, the first"""
RECONSTRUCTED = 300
"""of these, that show what an autoencoder costs"""
MOVED = 250
"""clips that the dynamic degree is measured of, the first"""
LOOKED_AT = (0, moving.FRAMES // 2, moving.FRAMES - 1)
"""frames whose features give fd_mini"""
BATCH = 100


@lru_cache(maxsize=2)
def _nets(device: str) -> tuple[ClipNet, FeatureNet]:
    """The net of clips and that of frames."""
    of_clips = ClipNet.load(asset("measure/moving")).to(device)
    assert isinstance(of_clips, ClipNet)
    return of_clips, FeatureNet.load(asset("measure/tinted")).to(device)


@lru_cache(maxsize=2)
def _reference(device: str) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Held-out clips' features, their mean and covariance, and those of their frames."""
    of_clips, of_frames = _nets(device)
    features, frames = [], []
    for first in range(0, HELD, BATCH):
        clips = moving.compose(range(first, first + BATCH), "heldout")
        features.append(measure(of_clips, clips, BATCH)["features"])
        frames.append(measure(of_frames, _frames(clips[:, :, LOOKED_AT]))["features"])
    known = torch.cat(features)
    return known, statistics(known), statistics(torch.cat(frames))


def held_out_clips() -> Tensor:
    """The first held-out clips, uint8 [N, C, F, H, W]."""
    return torch.cat([moving.compose(range(i, i + BATCH), "heldout") for i in range(0, RECONSTRUCTED, BATCH)])


def _frames(clips: Tensor) -> Tensor:
    """Clips [N, C, F, H, W] as images [N F, C, H, W]."""
    return clips.transpose(1, 2).flatten(0, 1)


def contrast(images: Tensor) -> float:
    """Mean standard deviation of the values, over pixels and channels, of pictures [N, C, H, W] in [0, 1] or
    uint8.
    """
    scale = 255 if images.dtype == torch.uint8 else 1
    return float((images.float() / scale).flatten(1).std(1).mean())


class ClipMeasurer:
    """Metrics of clips of the moving set; the same interface as `fd_mini.Measurer`."""

    name, primary = moving.NAME, "fvd_mini"
    least = 4
    """samples that every score is defined for: precision and recall look at the third neighbour"""

    def __init__(self, device="cpu", without: tuple = ()):
        if without:
            found = "found for clips, of which nothing measures what is left"
            raise UserError("objective.forget", found, "use a teacher of images")
        self.device = str(device)

    def _check(self, clips: Tensor) -> None:
        want = (3, moving.FRAMES, moving.SIZE, moving.SIZE)
        if tuple(clips.shape[1:]) != want:
            found = f"shape {tuple(clips.shape[1:])}"
            raise UserError("clips", found, f"the {self.name} measuring net takes {want}")
        if len(clips) < 2:
            raise UserError("clips", f"{len(clips)} clip", "a distance needs at least two")

    def features(self, clips: Tensor) -> Tensor:
        """[N, 64] of clips in [0, 1] or uint8."""
        self._check(clips)
        return measure(_nets(self.device)[0], clips, BATCH)["features"]

    def real(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the held-out clips' features."""
        return _reference(self.device)[1]

    def compare(self, clips: Tensor, attributes: dict[str, Tensor]) -> dict[str, float]:
        """Scores of clips [N, C, F, H, W] in [0, 1]; attributes: what each should show, -1 if unspecified."""
        self._check(clips)
        of_clips, of_frames = _nets(self.device)
        real, known, known_frames = _reference(self.device)
        seen = measure(of_clips, clips, BATCH)
        frames = measure(of_frames, _frames(clips))["features"].unflatten(0, (len(clips), moving.FRAMES))
        num = min(len(clips), len(real))
        precision, recall = precision_recall(evenly(real, num), evenly(seen["features"], num))
        return {
            "fvd_mini": frechet_from(*statistics(seen["features"]), *known),
            "fd_mini": frechet_from(*statistics(frames[:, LOOKED_AT].flatten(0, 1)), *known_frames),
            "precision": precision,
            "recall": recall,
            **agreement(seen["logits"], attributes),
            "frame_consistency": float(cosine_similarity(frames[:, :-1], frames[:, 1:], dim=-1).mean()),
            "dynamic_degree": float(displacement(clips[:MOVED].cpu()).mean()),
            "contrast": contrast(_frames(clips)),
        }

    def floor(self, num: int) -> dict[str, float]:
        """The same scores for num real training clips: what a perfect generator would get at this count."""
        order = torch.randperm(moving.count(), generator=torch.Generator().manual_seed(0))
        real = moving.load_clips("train", evenly(order, min(num, HELD)).tolist())
        return self.compare(real.images.float() / 255, real.attributes)

    def describe(self) -> dict[str, str]:
        """What a number must be quoted with."""
        digests = [
            hashlib.sha256((asset(f"measure/{name}") / "model.safetensors").read_bytes()).hexdigest()[:12]
            for name in (moving.NAME, "tinted")
        ]
        return {
            "extractor": f"assets:measure/moving, 64 features, sha256 {digests[0]}; frames {digests[1]}",
            "reference": f"{HELD} held-out clips of {self.name}",
            "note": NOTE,
        }
