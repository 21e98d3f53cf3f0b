"""Train the net that measures how well a tinted image fits its caption, into assets/measure/tinted-clip.

A small CLIPModel: softmax over all 180 captions of the scaled cosine with a shifted or mirrored image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from captions import LENGTH, caption_ids, clip_tokenizer, phrasings, retrieval, tokens_of
from common import ASSETS, Rows, jitter, one_cycle, readable, seconds, update, write_card
from torch import Tensor

from fastgen.data.bundled import load_images

LR, BATCH_SIZE, STEPS, SEED = 1e-3, 128, 3000, 21
MEAN = STD = 0.5


def build():
    """An untrained CLIPModel of the shipped shape, with its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = clip_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "projection_dim": 64}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH,
        "num_hidden_layers": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": 32, "patch_size": 4, "num_hidden_layers": 4}
    config = CLIPConfig(text_config=shape | text, vision_config=shape | vision, projection_dim=64)
    return CLIPModel(config), tokenizer


def words(model, tokens: dict[str, Tensor]) -> Tensor:
    """Unit vectors of texts."""
    return F.normalize(model.text_projection(model.text_model(**tokens).pooler_output), dim=-1)


def pictures(model, images: Tensor) -> Tensor:
    """Unit vectors of images in [0, 1]."""
    pixels = (images - MEAN) / STD
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1)


def train(steps: int, seed: int):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data, (model, tokenizer) = load_images("tinted", "train"), build()
    said, wanted = [tokens_of(tokenizer, texts) for texts in phrasings()], caption_ids(data.attributes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    rows = Rows(len(data), BATCH_SIZE, generator)
    for step in range(steps):
        chosen = rows.next()
        images = jitter(data.images[chosen].float() / 255, 2, generator)
        flip = torch.rand(len(images), generator=generator) < 0.5
        images[flip] = images[flip].flip(-1)
        cosines = pictures(model, images) @ words(model, said[step % len(said)]).T
        loss = F.cross_entropy(model.logit_scale.exp() * cosines, wanted[chosen], label_smoothing=0.05)
        update(optimizer, loss, LR * one_cycle(step, steps), clip=1.0)
        if step % 100 == 0:
            print("clip", step, steps, f"{loss.item():.3f}", seconds(), flush=True)
    return model.eval(), tokenizer


@torch.no_grad()
def score(model, tokenizer) -> dict:
    """What the card records, on the held-out images."""
    heldout = load_images("tinted", "heldout")
    seen = torch.cat([pictures(model, x.float() / 255) for x in heldout.images.split(500)])
    cosines = seen @ words(model, tokens_of(tokenizer, phrasings()[0])).T
    true = cosines.gather(1, caption_ids(heldout.attributes)[:, None])
    return retrieval(cosines, heldout.attributes) | {
        "cosine_of_true_caption": round(true.mean().item(), 3),
        "cosine_of_mean_caption": round(cosines.mean().item(), 3),
    }


def main(out: Path, steps: int, seed: int) -> None:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

    model, tokenizer = train(steps, seed)
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size=size, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    model.half().save_pretrained(out)
    readable(out)
    CLIPProcessor(images, tokenizer).save_pretrained(out)
    model = CLIPModel.from_pretrained(out, dtype=torch.float32).eval()
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "steps": steps, "seed": seed}
    write_card(out, **facts, **score(model, tokenizer))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ASSETS / "measure" / "tinted-clip", help="folder to write"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    main(args.out, args.steps, args.seed)
