"""Train the text encoder of a small video pipeline on the moving clips: --kind t5 (Wan, a UMT5EncoderModel)
or clip (AnimateDiff). The mean of a caption's states must tell garment, colour, background and motion. Writes
text_encoder/ and tokenizer/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from captions import LENGTH, MOTIONS, gemma_tokenizer, tokens_of
from common import ASSETS, Rows, one_cycle, readable, seconds, update, write_card
from text_encoders import build as build_still
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen.data import moving

LR, STEPS, BATCH_SIZE, SEED = 2e-3, 400, 180, 13
TEACHER = {"t5": "moving-wan", "clip": "moving-animatediff"}


def build(kind: str) -> tuple[nn.Module, object]:
    """An untrained text encoder of the shipped shape, with its tokenizer."""
    from transformers import UMT5Config, UMT5EncoderModel

    if kind == "clip":
        return build_still("clip", "moving")
    tokenizer = gemma_tokenizer(MOTIONS)
    shape = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = UMT5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **shape, **ids)
    return UMT5EncoderModel(config), tokenizer


class Told(nn.Module):
    """What the mean of a caption's states tells of each attribute."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({k: nn.Linear(64, len(v)) for k, v in moving.VOCABULARY.items()})

    def forward(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        states, mask = self.encoder(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        pooled = (states * mask).sum(1) / mask.sum(1)
        return {name: head(pooled) for name, head in self.heads.items()}


def main(kind: str, out: Path, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    encoder, tokenizer = build(kind)
    plain = moving.all_captions()
    captions = [*plain, *("a photo of " + text.replace(" on a ", " with a ") for text in plain)]
    named = [moving.attributes_of(text) for text in captions]
    wanted = {key: torch.tensor([row[key] for row in named]) for key in moving.VOCABULARY}
    tokens = tokens_of(tokenizer, captions)
    ends = {"t5": 1, "clip": 2}[kind]
    words = [len(text.split()) + ends for text in captions]
    assert tokens["attention_mask"].sum(1).tolist() == words and max(words) <= LENGTH, "a token for each word"
    told = Told(encoder)
    optimizer = torch.optim.AdamW(told.parameters(), lr=LR, weight_decay=0.01)
    rows = Rows(len(captions), BATCH_SIZE, torch.Generator().manual_seed(seed))
    for step in range(steps):
        some = rows.next()
        logits = told({key: value[some] for key, value in tokens.items()})
        loss = sum(F.cross_entropy(logits[key], wanted[key][some]) for key in wanted)
        update(optimizer, loss, LR * one_cycle(step, steps), clip=1.0)
        if step % 50 == 0:
            print(step, steps, f"{loss.item():.3f}", seconds(), flush=True)
    folder = out / "text_encoder"
    encoder.half().save_pretrained(folder)
    readable(folder)
    tokenizer.save_pretrained(out / "tokenizer")
    told.encoder = type(encoder).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = told(tokens)
    share = {k: round((v.argmax(1) == wanted[k]).float().mean().item(), 4) for k, v in logits.items()}
    facts = {"parameters": sum(p.numel() for p in encoder.parameters()), "vocabulary": len(tokenizer)}
    write_card(folder, **facts, steps=steps, seed=seed, told_of_2880_captions=share)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=TEACHER, default="t5")
    parser.add_argument("--out", type=Path, help="teacher folder to write into; the shipped one if not given")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    main(args.kind, args.out or ASSETS / "teachers" / TEACHER[args.kind], args.steps, args.seed)
