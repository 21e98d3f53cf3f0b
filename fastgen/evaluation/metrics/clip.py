"""CLIP score with open_clip from a local checkpoint, or any model of its interface; nothing is downloaded.

score = scale * mean cos(image, prefix + prompt). Papers differ in network, prefix, scale, resizing: PRESETS
names the combinations. Values of two presets are not comparable.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastgen.core.errors import UserError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Preset(NamedTuple):
    """One published way to measure a CLIP score."""

    arch: str
    prefix: str = ""
    scale: float = 100.0
    pre_resize: int = 0


PRESETS = {
    "vit-b-32": Preset("ViT-B-32-quickgelu"),
    "vit-l-14": Preset("ViT-L-14-quickgelu"),
    "vit-g-14": Preset("ViT-g-14"),
    "dmd2": Preset("ViT-g-14", "A photo depicts ", 1.0, 256),
}
WANTED = "an open_clip checkpoint of {arch} (safetensors or a plain state dict)"


def load_model(arch: str, path: Path, metric: str = "clip") -> tuple[Any, Any]:
    """(open_clip model in eval mode, tokenizer) with weights from a local file that holds tensors only."""
    try:
        import open_clip
    except ImportError:
        raise UserError(
            "--metrics", f"{metric} needs open_clip_torch", 'pip install "fastgen-distill[eval]"'
        ) from None
    try:
        model = open_clip.create_model(arch, pretrained=str(path), weights_only=True)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        allowed = f"expected {WANTED.format(arch=arch)}"
        raise UserError("--weights", f"{metric}: {path} cannot be read ({first})", allowed) from None
    return model.eval().requires_grad_(False), open_clip.get_tokenizer(arch)


def prepare(images: Tensor, size: int, pre_resize: int = 0) -> Tensor:
    """uint8 [B, C, H, W] centre-cropped, bicubic as CLIP's own transform: float [B, 3, s, s] in [0, 1].

    With pre_resize the crop is first brought to that size with a Lanczos filter.
    """
    import numpy as np
    from PIL import Image, ImageOps

    out = []
    for image in images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy():
        picture = Image.fromarray(np.ascontiguousarray(image))
        if pre_resize:
            picture = ImageOps.fit(picture, (pre_resize, pre_resize), Image.Resampling.LANCZOS)
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
        out.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return torch.stack(out).float() / 255


def _image_size(model: Any) -> int:
    size = model.visual.image_size
    return size[0] if isinstance(size, (tuple, list)) else size


@torch.no_grad()
def cosines(
    model: Any, tokenizer, images: Tensor, prompts: list[str], prefix="", pre_resize=0, batch_size=32
) -> Tensor:
    """cos of image i of uint8 [N, C, H, W] with prompt i, [N]."""
    assert len(images) == len(prompts), (len(images), len(prompts))
    device = next(model.parameters()).device
    mean, std = (torch.tensor(v, device=device).reshape(3, 1, 1) for v in (MEAN, STD))
    found = []
    for first in range(0, len(images), batch_size):
        x = prepare(images[first : first + batch_size], _image_size(model), pre_resize).to(device)
        tokens = tokenizer([prefix + p for p in prompts[first : first + batch_size]]).to(device)
        image = normalize(model.encode_image((x - mean) / std), dim=-1)
        text = normalize(model.encode_text(tokens), dim=-1)
        found.append((image * text).sum(-1).float().cpu())
    return torch.cat(found)


def clip_score(
    model, tokenizer, images: Tensor, prompts: list[str], scale=100.0, prefix="", pre_resize=0
) -> float:
    """Mean cosine times scale."""
    return scale * float(cosines(model, tokenizer, images, prompts, prefix, pre_resize).mean())
