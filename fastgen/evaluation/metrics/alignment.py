"""Prompt alignment on Tinted Fashion: mean cosine (x 100) of image and caption in the bundled two-tower net.

Real held-out images with their own captions reach about 67. It is small: its numbers order generators of this
one set and are not comparable with any published CLIP score; where a student was trained with `clip_weight`
against this very net (SwiftBrush v2), its own number says nothing.
"""

import torch
from torch import Tensor

from fastgen.networks.clip import image_text


@torch.no_grad()
def cosines(images: Tensor, texts: list[str], device="cpu", batch_size: int = 500) -> Tensor:
    """Cosine of image i in [0, 1] with text i, [N]."""
    assert len(images) == len(texts), (len(images), len(texts))
    net = image_text("assets:measure/tinted-clip", str(device))
    found = []
    for i in range(0, len(images), batch_size):
        found.append(net(images[i : i + batch_size].to(device), texts[i : i + batch_size]))
    return torch.cat(found).cpu()


def score(images: Tensor, texts: list[str], device="cpu") -> float:
    """Mean cosine x 100."""
    return 100 * float(cosines(images, texts, device).mean())
