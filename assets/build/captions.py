"""What the builders of text networks share: tokenizers of the captions' words, scores of retrieval."""

from __future__ import annotations

import string
from collections.abc import Sequence

import common  # noqa: F401  makes fastgen importable
import torch
from torch import Tensor

from fastgen.data import moving
from fastgen.data.bundled import BACKGROUNDS, COLOURS, GARMENTS, WORDS, all_captions, attributes_of
from fastgen.threed.cameras import VIEWS
from fastgen.threed.solids import SHAPES

LENGTH = 16
TINTED = ("photo", "of", "with", *GARMENTS, "on", "background", *COLOURS, *BACKGROUNDS)
MOTIONS = tuple(dict.fromkeys(word for phrase in moving.PHRASES.values() for word in phrase.split()))
TOKENS = {
    "tinted": TINTED,
    "moving": (*TINTED, *MOTIONS),
    "solids": ("photo", "of", *SHAPES, *COLOURS, *VIEWS, "view"),
}
LAST = ("of", "on", "red", "top")  # their merges would cut up longer words if they came first


def steps_to(word: list[str], from_right: bool) -> list[tuple[str, str]]:
    """The merges that join a word's letters into one token, one letter at a time."""
    if from_right:
        return [(word[i], "".join(word[i + 1 :])) for i in range(len(word) - 2, -1, -1)]
    return [("".join(word[:i]), word[i]) for i in range(1, len(word))]


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE: printable bytes first, then the others."""
    spans = (("!", "~"), ("\u00a1", "\u00ac"), ("\u00ae", "\u00ff"))
    shown = [b for low, high in spans for b in range(ord(low), ord(high) + 1)]
    return [chr(b) for b in shown] + [chr(256 + n) for n in range(256 - len(shown))]


def clip_tokenizer(name: str = "tinted"):
    """A CLIPTokenizer of every byte and the captions' words, one token for each word."""
    from transformers import CLIPTokenizer

    pieces = [[*word[:-1], word[-1] + "</w>"] for word in TOKENS[name]]
    merges = list(dict.fromkeys(pair for word in pieces for pair in steps_to(word, from_right=True)))
    letters = byte_letters()
    tokens = [*letters, *(x + "</w>" for x in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def gemma_tokenizer(more: Sequence[str] = ()):
    """A GemmaTokenizer of ASCII and the captions' words (and some more), after a space and without."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    space = "\u2581"
    plain = [*sorted({*TOKENS["tinted"], *more} - set(LAST)), *LAST]
    words = [*(space + word for word in (*TOKENS["tinted"], *more)), space + "a", *plain]
    merges = list(dict.fromkeys(pair for word in words for pair in steps_to(list(word), from_right=False)))
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{b:02X}>" for b in range(256)), space]
    tokens += string.digits + string.ascii_letters + string.punctuation
    vocab = {token: i for i, token in enumerate([*tokens, *("".join(pair) for pair in merges)])}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH, padding_side="right")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    return tokenizer


def tokens_of(tokenizer, texts: list[str]) -> dict[str, Tensor]:
    """input_ids and attention_mask [N, 16]."""
    found = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return {key: found[key] for key in ("input_ids", "attention_mask")}


def phrasings(name: str = "tinted") -> list[list[str]]:
    """Every caption as it is, and said with the other words a user may choose."""
    plain = all_captions(name)
    return [plain, ["a photo of " + text.replace(" on a ", " with a ") for text in plain]]


def caption_ids(attributes: dict[str, Tensor], name: str = "tinted") -> Tensor:
    """Which of all captions is true of each image, [N]."""
    ids = torch.zeros_like(next(iter(attributes.values())))
    for key, names in WORDS[name].items():
        ids = ids * len(names) + attributes[key]
    return ids


def retrieval(similarity: Tensor, attributes: dict[str, Tensor], name: str = "tinted") -> dict:
    """How often the nearest of all captions [N, K] is the true one, and names each attribute rightly."""
    found, captions = similarity.argmax(1), all_captions(name)
    share = (found == caption_ids(attributes, name)).float().mean().item()
    named = [attributes_of(text, name) for text in captions]
    table = {key: torch.tensor([row[key] for row in named]) for key in WORDS[name]}
    right = {key: (table[key][found] == attributes[key]).float().mean().item() for key in WORDS[name]}
    return {
        f"heldout_retrieval_of_{len(captions)}_captions": round(share, 4),
        "heldout_agreement": {key: round(value, 4) for key, value in right.items()},
    }
