"""DINOv2 from a local transformers folder: the normalised class token, as FD-DINOv2 takes it
(Stein 2023, arXiv 2306.04675; EDM2, arXiv 2312.02696).
"""

from pathlib import Path

from fastgen.evaluation.encoders import resize
from fastgen.evaluation.encoders.base import Encoder, checksum, unreadable

WANTED = "a transformers Dinov2 folder (config.json, model.safetensors), published numbers: dinov2-large"
SIZE = 224


def load(path: Path) -> Encoder:
    """1024 features for ViT-L/14."""
    from transformers import Dinov2Model

    try:
        net = Dinov2Model.from_pretrained(path, local_files_only=True, use_safetensors=True)
    except Exception as error:
        raise unreadable("dinov2", path, error, WANTED) from None
    return Encoder(
        "dinov2",
        net,
        lambda images: resize.normalised(
            resize.squared(images, SIZE), resize.IMAGENET_MEAN, resize.IMAGENET_STD
        ),
        f"PIL bicubic to {SIZE}, no crop",
        checksum(path),
        lambda model, x: {"features": model(pixel_values=x).last_hidden_state[:, 0]},
    )
