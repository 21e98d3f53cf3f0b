"""Train the text encoder of a captioned mini teacher: --kind clip (Stable Diffusion) or gemma (Sana).

A caption's pooled state must pick out the images that it describes: softmax over all captions of the
set (--set) of the cosine with a linear map of its measuring net's features. Writes text_encoder/ and
tokenizer/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from captions import LENGTH, caption_ids, clip_tokenizer, gemma_tokenizer, phrasings, retrieval, tokens_of
from common import ASSETS, Rows, one_cycle, readable, seconds, update, write_card
from torch import Tensor, nn

from fastgen.data.bundled import WORDS, load_images
from fastgen.networks.feature_net import FeatureNet, measure

LR, SCALE, BATCH_SIZE, STEPS = 2e-3, 20.0, 512, 1200
TEACHER, SEED = {"clip": "sd", "gemma": "sana"}, {"clip": 11, "gemma": 12}


def build(kind: str, name: str = "tinted") -> tuple[nn.Module, object]:
    """An untrained text encoder of the shipped shape, with its tokenizer."""
    import transformers as hf

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "clip":
        tokenizer = clip_tokenizer(name)
        config = hf.CLIPTextConfig(
            vocab_size=len(tokenizer),
            intermediate_size=192,
            projection_dim=64,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **shape,
        )
        return hf.CLIPTextModel(config), tokenizer
    tokenizer = gemma_tokenizer()
    config = hf.Gemma2Config(
        vocab_size=len(tokenizer),
        intermediate_size=160,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=512,
        max_position_embeddings=512,
        **shape,
    )
    return hf.Gemma2Model(config), tokenizer


def pooled(encoder: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """One vector per text: the state at its end for CLIP, the mean over its tokens for Gemma."""
    out = encoder(**tokens)
    if getattr(out, "pooler_output", None) is not None:
        return out.pooler_output
    mask = tokens["attention_mask"][..., None].to(out.last_hidden_state.dtype)
    return (out.last_hidden_state * mask).sum(1) / mask.sum(1)


class Match(nn.Module):
    """Cosine of images' features and captions' pooled states, each through a linear map."""

    def __init__(self, encoder: nn.Module, num_features: int):
        super().__init__()
        self.encoder = encoder
        self.of_image, self.of_text = nn.Linear(num_features, 64), nn.Linear(64, 64, bias=False)

    def forward(self, features: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        texts = F.normalize(self.of_text(pooled(self.encoder, tokens)), dim=-1)
        return F.normalize(self.of_image(features), dim=-1) @ texts.T


def train(kind: str, name: str, steps: int, seed: int) -> tuple[Match, FeatureNet, object]:
    torch.manual_seed(seed)
    data, net = load_images(name, "train"), FeatureNet.load(ASSETS / "measure" / name)
    features, wanted = measure(net, data.images)["features"], caption_ids(data.attributes, name)
    encoder, tokenizer = build(kind, name)
    match = Match(encoder, net.num_features)
    said = [tokens_of(tokenizer, texts) for texts in phrasings(name)]
    optimizer = torch.optim.AdamW(match.parameters(), lr=LR, weight_decay=0.01)
    rows = Rows(len(data), BATCH_SIZE, torch.Generator().manual_seed(seed))
    for step in range(steps):
        chosen = rows.next()
        similarity = match(features[chosen], said[step % len(said)])
        loss = F.cross_entropy(SCALE * similarity, wanted[chosen])
        update(optimizer, loss, LR * one_cycle(step, steps), clip=1.0)
        if step % 100 == 0:
            print(kind, step, steps, f"{loss.item():.3f}", seconds(), flush=True)
    return match.eval(), net, tokenizer


def main(kind: str, out: Path, steps: int, seed: int, name: str = "tinted") -> None:
    match, net, tokenizer = train(kind, name, steps, seed)
    folder = out / "text_encoder"
    match.encoder.half().save_pretrained(folder)
    readable(folder)
    tokenizer.save_pretrained(out / "tokenizer")
    match.encoder = type(match.encoder).from_pretrained(folder, dtype=torch.float32).eval()
    heldout = load_images(name, "heldout")
    with torch.no_grad():
        features = measure(net, heldout.images)["features"]
        similarity = match(features, tokens_of(tokenizer, phrasings(name)[0]))
    write_card(
        folder,
        parameters=sum(p.numel() for p in match.encoder.parameters()),
        vocabulary=len(tokenizer),
        steps=steps,
        seed=seed,
        **retrieval(similarity, heldout.attributes, name),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=TEACHER, required=True)
    parser.add_argument("--set", choices=WORDS, default="tinted", help="bundled image set with captions")
    parser.add_argument("--out", type=Path, help="teacher folder to write into; the shipped one if not given")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, help="as recorded if not given")
    args = parser.parse_args()
    folder = args.out or ASSETS / "teachers" / f"{args.set}-{TEACHER[args.kind]}"
    main(args.kind, folder, args.steps, SEED[args.kind] if args.seed is None else args.seed, args.set)
