"""Prompt alignment on Tinted Fashion: mean cosine (x 100) of image and caption in the bundled two-tower net.

No student is trained against it. Real held-out images with their own captions reach about 67. It is small:
its numbers order generators of this one set and are not comparable with any published CLIP score.
"""

from functools import lru_cache

import torch
from torch import Tensor

from fastgen.paths import asset


@lru_cache(maxsize=2)
def _net(device: str):
    from transformers import AutoTokenizer, CLIPModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    folder = asset("measure/tinted-clip")
    model = CLIPModel.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True), model.eval().requires_grad_(
        False
    ).to(device)


@torch.no_grad()
def cosines(images: Tensor, texts: list[str], device="cpu", batch_size: int = 500) -> Tensor:
    """Cosine of image i in [0, 1] with text i, [N]."""
    assert len(images) == len(texts), (len(images), len(texts))
    tokenizer, model = _net(str(device))
    unique = sorted(set(texts))
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(unique, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    towers = model.text_model, model.vision_model
    states = towers[0](**{k: tokens[k].to(device) for k in ("input_ids", "attention_mask")}).pooler_output
    words = torch.nn.functional.normalize(model.text_projection(states), dim=-1)
    rows = torch.tensor([unique.index(t) for t in texts], device=words.device)
    found = []
    for chunk, wanted in zip(images.split(batch_size), rows.split(batch_size)):
        seen = model.visual_projection(towers[1](pixel_values=chunk.float().to(device) * 2 - 1).pooler_output)
        found.append((torch.nn.functional.normalize(seen, dim=-1) * words[wanted]).sum(-1))
    return torch.cat(found).cpu()


def score(images: Tensor, texts: list[str], device="cpu") -> float:
    """Mean cosine x 100."""
    return 100 * float(cosines(images, texts, device).mean())
