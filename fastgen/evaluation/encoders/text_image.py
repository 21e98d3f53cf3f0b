"""CLIP-like encoders from a local open_clip checkpoint or a local transformers folder; nothing is
downloaded.
"""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastgen.evaluation.encoders import resize
from fastgen.evaluation.encoders.base import Outputs, TextImageEncoder, checksum, needs, unreadable

WANTED = (
    "an open_clip checkpoint of {arch} (safetensors or a plain state dict), or a transformers CLIP folder"
)
FOLDER = "a transformers CLIP folder (config.json, model.safetensors, tokenizer.json)"


def load(name: str, path: Path, arch: str, pre_resize: int = 0, crop: bool = True) -> TextImageEncoder:
    """A file is an open_clip checkpoint of `arch`, a folder a transformers CLIP of whatever size it says.

    pre_resize, crop: see `resize.cropped`; without a crop the picture is squeezed into the square.
    """
    make = _from_folder if path.is_dir() else _from_file
    net, size, texts, scale = make(name, path, arch)

    def prepare(images: Tensor) -> Tensor:
        square = resize.cropped(images, size, pre_resize) if crop else resize.squared(images, size)
        return resize.normalised(square, resize.CLIP_MEAN, resize.CLIP_STD)

    words = f"PIL bicubic to {size}, {'centre crop' if crop else 'no crop'}"
    words = f"PIL Lanczos to {pre_resize}, then {words}" if pre_resize else words
    encoder = TextImageEncoder(name, net, prepare, words, checksum(path), _embed, texts=texts, scale=scale)
    encoder._texts, encoder.size = partial(texts, encoder), size
    return encoder


def _embed(net: nn.Module, x: Tensor) -> Outputs:
    model: Any = net
    if hasattr(model, "encode_image"):
        return {"features": model.encode_image(x)}
    return {"features": model.get_image_features(pixel_values=x).pooler_output}


def load_open_clip(name: str, path: Path, arch: str) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) with weights from a file that holds tensors only."""
    try:
        import open_clip
    except ImportError:
        raise needs("open_clip_torch", name) from None
    try:
        model = open_clip.create_model(arch, pretrained=str(path), weights_only=True)
    except Exception as error:
        raise unreadable(name, path, error, WANTED.format(arch=arch)) from None
    return model.eval().requires_grad_(False), open_clip.get_tokenizer(arch)


def _from_file(name: str, path: Path, arch: str):
    model, tokenizer = load_open_clip(name, path, arch)
    size = model.visual.image_size
    size = size[0] if isinstance(size, (tuple, list)) else size

    def texts(encoder, prompts: list[str]) -> Tensor:
        return encoder.net.encode_text(tokenizer(prompts).to(encoder.device))

    return model, size, texts, float(model.logit_scale.detach().exp())


def _from_folder(name: str, path: Path, arch: str):
    from transformers import AutoTokenizer, CLIPModel

    try:
        model: Any = CLIPModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise unreadable(name, path, error, FOLDER) from None
    length = model.config.text_config.max_position_embeddings

    def texts(encoder, prompts: list[str]) -> Tensor:
        tokens = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        tokens = {k: v.to(encoder.device) for k, v in tokens.items() if k in ("input_ids", "attention_mask")}
        return encoder.net.get_text_features(**tokens).pooler_output

    return model, model.config.vision_config.image_size, texts, float(model.logit_scale.detach().exp())
