"""Image-text similarity: the cosine of a CLIP model's embeddings of an image and a caption."""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.core.console import no_weight_bars
from fastgen.core.errors import UserError, first_line
from fastgen.core.paths import resolve
from fastgen.core.reading import read_json, reads_model


class ImageText(nn.Module):
    """A frozen CLIPModel with its tokenizer, from a local folder; differentiable in the images."""

    model: Any
    image_mean: Tensor
    image_std: Tensor

    @reads_model("clip")
    def __init__(self, path: str, key: str = "clip"):
        super().__init__()
        from transformers import AutoTokenizer, CLIPModel

        no_weight_bars()
        try:
            folder = resolve(path)
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
            self.tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            processor = read_json(folder / "processor_config.json", key)
        except (OSError, ValueError, FileNotFoundError) as error:
            found = f"{path} cannot be read ({first_line(error)})"
            needed = "give a folder with a CLIPModel, its tokenizer and its processor_config.json"
            raise UserError(key, found, needed) from None
        processor = processor.get("image_processor", processor)
        for name in ("image_mean", "image_std"):
            self.register_buffer(name, torch.tensor(processor[name]).reshape(3, 1, 1))
        self.requires_grad_(False).eval()
        self._embeddings: dict[str, Tensor] = {}

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Unit vectors [B, C] of texts; each text is encoded only once."""
        new = sorted(set(texts) - set(self._embeddings))
        if new:
            length = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                new, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            inputs = {k: tokens[k].to(self.image_mean.device) for k in ("input_ids", "attention_mask")}
            with torch.no_grad():
                states = self.model.text_projection(self.model.text_model(**inputs).pooler_output)
            self._embeddings |= dict(zip(new, F.normalize(states, dim=-1)))
        return torch.stack([self._embeddings[t] for t in texts])

    def forward(self, images: Tensor, texts: list[str]) -> Tensor:
        """Cosine of image i [B, 3, H, W] in [0, 1] with text i, [B]."""
        size = self.model.config.vision_config.image_size
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        pixels = (images.float() - self.image_mean) / self.image_std
        states = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return (F.normalize(states, dim=-1) * self.encode_texts(texts)).sum(-1)


class Alignment:
    """Image-text cosine of x0, which the teacher's codec decodes; a frozen auxiliary of a method."""

    def __init__(self, net: ImageText, codec: Any):
        self.net, self.codec = net, codec

    def __call__(self, x0: Tensor, texts: list[str]) -> Tensor:
        return self.net(self.codec.decode(x0), texts)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {}


@lru_cache(maxsize=2)
def image_text(path: str, device: str = "cpu") -> ImageText:
    """One model per folder and device, kept in memory until the process ends."""
    return ImageText(path).to(device)
