"""Image-text agreement by a two-tower net in a local folder: the cosine of a picture and a caption."""

import json
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.core.errors import UserError, first_line
from fastgen.core.paths import resolve


class ImageText(nn.Module):
    """A frozen CLIPModel with its tokenizer; differentiable in the images."""

    def __init__(self, path: str, key: str = "clip"):
        super().__init__()
        from transformers import AutoTokenizer, CLIPModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        try:
            folder = resolve(path)
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            found = json.loads((folder / "processor_config.json").read_text())
        except (OSError, ValueError, FileNotFoundError) as error:
            raise UserError(
                key, f"{path} cannot be read ({first_line(error)})", "a CLIPModel folder"
            ) from None
        found = found.get("image_processor", found)
        for name in ("image_mean", "image_std"):
            self.register_buffer(name, torch.tensor(found[name]).reshape(3, 1, 1))
        self.requires_grad_(False).eval()
        self._known: dict[str, Tensor] = {}

    def words(self, texts: list[str]) -> Tensor:
        """Unit vectors of texts, each encoded once."""
        new = sorted(set(texts) - set(self._known))
        if new:
            length = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                new, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            given = {k: tokens[k].to(self.image_mean.device) for k in ("input_ids", "attention_mask")}
            with torch.no_grad():
                states = self.model.text_projection(self.model.text_model(**given).pooler_output)
            self._known |= dict(zip(new, F.normalize(states, dim=-1)))
        return torch.stack([self._known[t] for t in texts])

    def forward(self, images: Tensor, texts: list[str]) -> Tensor:
        """Cosine of image i [B, 3, H, W] in [0, 1] with text i, [B]."""
        size = self.model.config.vision_config.image_size
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        pixels = (images.float() - self.image_mean) / self.image_std
        seen = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return (F.normalize(seen, dim=-1) * self.words(texts)).sum(-1)


class Alignment:
    """cos(image(x0), text) of samples in the teacher's own space; a frozen part of a cast."""

    def __init__(self, net: ImageText, codec: nn.Module):
        self.net, self.codec = net, codec

    def __call__(self, x0: Tensor, texts: list[str]) -> Tensor:
        return self.net(self.codec.decode(x0), texts)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {}


@lru_cache(maxsize=2)
def image_text(path: str, device: str = "cpu") -> ImageText:
    """One net per folder and device for the life of the process."""
    return ImageText(path).to(device)
