"""ImageReward (Xu 2023, arXiv 2304.05977) from its published checkpoint, on transformers' BLIP.

reward = (m(h) - 0.16717) / 1.03334,  h the first token of BERT over the prompt, which attends to the patches
of a ViT in every layer (BLIP), m a stack of linear layers without activations.

The file is a plain state dict: blip.visual_encoder (a ViT in timm's names), blip.text_encoder (BLIP's BERT)
and mlp. Widths and depths are read from its shapes, as the released one has them ViT-L/16 at 224 pixels and
BERT-base. The prompt is cut to 35 tokens and padded to them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.core.errors import UserError
from fastgen.evaluation.encoders import resize
from fastgen.evaluation.encoders.base import Encoder, Outputs, checksum, unreadable

FILE, CONFIG, VOCABULARY = "ImageReward.pt", "med_config.json", "vocab.txt"
WANTED = f"a folder with {FILE} and {CONFIG} (THUDM/ImageReward) and {VOCABULARY} of bert-base-uncased"
MEAN, STD, TOKENS = 0.16717, 1.03334, 35
HEAD_WIDTH = 64
"""of an attention head, in ViT and BERT alike"""
VISION = (
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("pos_embed", "embeddings.position_embedding"),
    ("cls_token", "embeddings.class_embedding"),
    ("blocks.", "encoder.layers."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)
"""names of the ViT in the file, and in transformers"""


class ImageReward(nn.Module):
    """Pixels [B, 3, H, W] and token ids [B, T] with their mask to rewards [B]."""

    def __init__(self, vision: nn.Module, text: nn.Module, mlp: nn.Sequential):
        super().__init__()
        self.vision, self.text, self.mlp = vision, text, mlp

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        patches = self.vision(pixels).last_hidden_state
        everywhere = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        found = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=everywhere,
        )
        return (self.mlp(found.last_hidden_state[:, 0])[:, 0] - MEAN) / STD


class Reward(Encoder):
    """Scores images together with their prompts; it has no features of images alone."""

    tokenizer: Any
    size: int
    """side of the pictures"""

    def __call__(self, images: Tensor) -> Outputs:
        raise UserError("--metrics", "image_reward has no features", "ask for the metric image_reward")

    @torch.no_grad()
    def rewards(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B] of uint8 images [B, 3, H, W]."""
        return self.of_pixels(self.prepare(images).to(self.device), prompts).double().cpu()

    def of_pixels(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """[B] of what `prepare` makes, where the network is; differentiable in it."""
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        ids, mask = (tokens[k].to(self.device) for k in ("input_ids", "attention_mask"))
        return self.net(pixels, ids, mask)


def load(folder: Path) -> Reward:
    """The encoder of a folder with the published files; UserError that names what is missing."""
    for name in (FILE, CONFIG, VOCABULARY):
        if not (folder / name).is_file():
            raise UserError("--weights", f"image_reward: {folder / name} does not exist", f"give {WANTED}")
    try:
        state = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        med = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        net, size = build(state, med)
    except Exception as error:
        raise unreadable("image_reward", folder, error, WANTED) from None

    def prepare(images: Tensor) -> Tensor:
        return resize.normalised(resize.cropped(images, size), resize.CLIP_MEAN, resize.CLIP_STD)

    words = f"PIL bicubic to {size}, centre crop; prompts of {TOKENS} tokens"
    found = Reward("image_reward", net, prepare, words, checksum(folder / FILE))
    found.tokenizer, found.size = _tokenizer(folder / VOCABULARY), size
    return found


def _tokenizer(vocabulary: Path) -> Any:
    """BERT's of lower-cased words; the two further tokens that BLIP has at the end stand in no prompt."""
    from transformers import BertTokenizer

    try:
        return BertTokenizer(vocab=str(vocabulary), do_lower_case=True)
    except Exception as error:
        raise unreadable("image_reward", vocabulary, error, WANTED) from None


def build(state: dict[str, Tensor], med: dict) -> tuple[ImageReward, int]:
    """(network with the file's weights, the size of its pictures); an exception where they do not fit."""
    vision, size = _vision(_under(state, "blip.visual_encoder."))
    text = _text(_under(state, "blip.text_encoder."), med, vision.config.hidden_size)
    head = _under(state, "mlp.layers.")
    names = sorted((n for n in head if n.endswith(".weight")), key=lambda n: int(n.split(".")[0]))
    layers = [nn.Linear(head[n].shape[1], head[n].shape[0]) for n in names]
    for layer, name in zip(layers, names):
        layer.load_state_dict(
            {"weight": head[name], "bias": head[name.removesuffix("weight") + "bias"]}, strict=True
        )
    assert layers[-1].out_features == 1, f"the last layer has {layers[-1].out_features} outputs"
    return ImageReward(vision, text, nn.Sequential(*layers)).float(), size


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    assert found, f"no weights under {prefix}"
    return found


def _vision(state: dict[str, Tensor]) -> tuple[Any, int]:
    from transformers import BlipVisionConfig, BlipVisionModel

    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=side * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )
    net: Any = BlipVisionModel(config)
    renamed = {}
    for name, value in state.items():
        for old, new in VISION:
            name = name.replace(old, new)
        renamed["post_layernorm." + name.removeprefix("norm.") if name.startswith("norm.") else name] = value
    net.load_state_dict(renamed, strict=True)
    return net, side * patch


def _text(state: dict[str, Tensor], med: dict, vision_width: int) -> Any:
    """BLIP's BERT: bidirectional over the prompt, with cross-attention in every layer."""
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=vision_width,
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.layer.")),
        num_attention_heads=int(med["num_attention_heads"]),
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        hidden_act=str(med.get("hidden_act", "gelu")),
        layer_norm_eps=float(med.get("layer_norm_eps", 1e-12)),
        bos_token_id=None,
        sep_token_id=None,
        is_decoder=True,  # in transformers' words: its layers have cross-attention
    )
    net: Any = BlipTextModel(config, add_pooling_layer=False)
    kept = {k: v for k, v in state.items() if not k.endswith("position_ids") and not k.startswith("pooler.")}
    net.load_state_dict(kept, strict=True)
    return net
