"""Images and conditions on both sides of a denoiser.

A codec turns images [B, C, H, W] in [-1, 1] into the x0 the network works on and back, and labels or
prompts into the `cond` dict the network takes. Nothing else in fastgen knows about autoencoders, tokenizers
or label rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.backbones.base import Cond
from fastgen.errors import UserError


class LabelCodec(nn.Module):
    """Pixels, optionally folded patch x patch into channels, with class labels; the last label row is the
    null class.
    """

    def __init__(self, shape: tuple[int, int, int], patch: int = 1, num_classes: int = 0, class_names=None):
        super().__init__()
        self.shape, self.patch, self.num_classes = shape, patch, num_classes
        self.class_names = class_names or [str(i) for i in range(num_classes)]

    def encode(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images, self.patch) if self.patch > 1 else images

    def decode(self, x0: Tensor) -> Tensor:
        """Images in [0, 1]."""
        images = F.pixel_shuffle(x0, self.patch) if self.patch > 1 else x0
        return (images / 2 + 0.5).clamp(0, 1)

    def labels(self, labels: Tensor) -> Cond:
        if not self.num_classes:
            return {}
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise UserError(
                "labels",
                f"found {int(labels.min())} to {int(labels.max())}",
                f"allowed are 0 to {self.num_classes - 1}",
            )
        return {"class_labels": labels.long()}

    def null(self, num: int) -> Cond:
        return {"class_labels": torch.full((num,), self.num_classes)} if self.num_classes else {}


class TextCodec(nn.Module):
    """A latent autoencoder and a text encoder of a diffusers text-to-image pipeline."""

    num_classes = 0

    def __init__(
        self, shape, vae: nn.Module, tokenizer, text_encoder: nn.Module, max_length: int, masked: bool
    ):
        super().__init__()
        self.shape, self.vae, self.text_encoder = shape, vae, text_encoder
        self.tokenizer, self.max_length, self.masked = tokenizer, max_length, masked
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        encoded = self.vae.encode(images.to(self.vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        return ((latents.float() - self._shift) * self.vae.config.scaling_factor).contiguous()

    def decode(self, x0: Tensor) -> Tensor:
        """Images in [0, 1]; differentiable."""
        latents = x0.to(self.vae.dtype) / self.vae.config.scaling_factor + self._shift
        return (self.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def decode_size(self) -> int:
        """Height (and width) in pixels of a decoded sample."""
        return self.decode(torch.zeros(1, *self.shape, device=self.vae.device)).shape[-1]

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    @torch.no_grad()
    def prompts(self, prompts: list[str]) -> Cond:
        """Text states [B, L, C], with the attention mask [B, L] where the family uses one."""
        if self.masked:  # SanaPipeline does the same before it tokenizes
            prompts = [p.lower().strip() for p in prompts]
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        device = self.text_encoder.device
        ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
        if device.type == "meta":  # laid out for --dry_run: shapes are all there is
            states = torch.empty(*ids.shape, self.text_encoder.config.hidden_size, device=device)
            return {"encoder_hidden_states": states} | (
                {"encoder_attention_mask": mask} if self.masked else {}
            )
        if not self.masked:
            return {"encoder_hidden_states": self.text_encoder(ids)[0].float()}
        states = self.text_encoder(ids, attention_mask=mask)[0].float()
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def cut(self, prompt: str) -> str:
        """The tail of the prompt that does not fit the tokenizer's length, or an empty string."""
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        room = self.max_length - self.tokenizer.num_special_tokens_to_add()
        return self.tokenizer.decode(ids[room:]) if len(ids) > room else ""

    def null(self, num: int) -> Cond:
        return {k: v.expand(num, *v.shape[1:]) for k, v in self.prompts([""]).items()}


def stack(conds: list[Cond]) -> Cond:
    """Concatenate conditions along the batch."""
    return {k: torch.cat([c[k] for c in conds]) for k in conds[0]}


def select(cond: Cond, index: Tensor) -> Cond:
    """Rows of a condition."""
    return {k: v[index] for k, v in cond.items()}
