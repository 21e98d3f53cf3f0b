"""HPSv2 and HPSv2.1 (arXiv 2306.09341) from a local checkpoint; nothing is downloaded.

score = 100 * mean cos(image, prompt) of a fine-tuned open_clip ViT-H-14. The two versions are not comparable.
The published benchmark averages over 800 prompts in each of four styles; `by_style` does the same for any.
"""

from pathlib import Path

import torch
from torch import Tensor

from fastgen.evaluation.metrics.clip import cosines, load_model

ARCH, WANTED = "ViT-H-14", "HPS_v2.1_compressed.pt or HPS_v2_compressed.pt"


def load_hps(path: Path):
    """(model, tokenizer)."""
    return load_model(ARCH, path, "hps")


def hps_score(model, tokenizer, images: Tensor, prompts: list[str]) -> float:
    """Mean score over images, times 100."""
    return 100 * float(cosines(model, tokenizer, images, prompts).mean())


def by_style(scores: Tensor, styles: list[str]) -> dict[str, float]:
    """Mean of scores [N] for each style, and the mean over styles under "all"."""
    assert len(scores) == len(styles)
    found = {
        s: float(scores[torch.tensor([s == other for other in styles])].mean()) for s in sorted(set(styles))
    }
    return {**found, "all": sum(found.values()) / len(found)}
