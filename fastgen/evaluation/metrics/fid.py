"""Inception FID and KID from a local weight file, or with any extractor module; nothing is downloaded.

The network and its resizing are torch-fidelity's port of the original TensorFlow graph (bilinear, pool3,
2048 features), so values line up with papers that use that graph. FID is biased by the sample count:
compare at equal counts only, and below 10,000 images prefer KID.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgen.core.errors import UserError
from fastgen.evaluation.metrics.frechet import frechet, kid

WANTED = "weights-inception-2015-12-05-6726825d.pth (torch-fidelity's Inception)"


class _Pool3(nn.Module):
    """torch-fidelity returns a tuple of the requested features; this is the one."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)[0]


def load_inception(path: Path) -> nn.Module:
    """uint8 [B, 3, H, W] -> [B, 2048]."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError(
            "--metrics", "fid and kid need torch-fidelity", 'pip install "fastgen-distill[eval]"'
        ) from None
    try:
        torch.load(path, map_location="meta", weights_only=True)  # refuse a file that holds more than tensors
        net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            "--weights", f"inception: {path} cannot be read ({first})", f"expected {WANTED}"
        ) from None
    return _Pool3(net)


@torch.no_grad()
def features(extractor: nn.Module, images: Iterable[Tensor], device="cpu") -> Tensor:
    """[N, d] of batches of uint8 images; one grey channel is repeated to three."""
    extractor = extractor.to(device).eval()
    found = []
    for chunk in images:
        assert chunk.dtype == torch.uint8, chunk.dtype
        chunk = chunk.expand(-1, 3, -1, -1) if chunk.shape[1] == 1 else chunk
        found.append(extractor(chunk.to(device)).flatten(1).cpu())
    return torch.cat(found)


def compare(fake: Tensor, real: Tensor, metrics: tuple[str, ...] = ("fid", "kid")) -> dict[str, float]:
    """FID and KID (mean over 100 subsets of up to 1000, times 1000) of two feature sets."""
    found: dict[str, float] = {}
    if "fid" in metrics:
        found["fid"] = frechet(fake, real)
    if "kid" in metrics:
        found["kid"], found["kid_std"] = kid(fake, real)
    return found
