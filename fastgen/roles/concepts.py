"""What a student is to forget: the conditions that ask for it, and those that are shown in their place.

Classes go by name or number, concepts by words of the prompts (whole words, upper and lower case alike). In
the place of a forgotten class stands its override, or any class that is kept where none is named; in a prompt
the override takes the place of the words, or nothing does: "a red dress" becomes "a dress".
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.core.batch import Cond, select, stack
from fastgen.core.errors import UserError, suggest
from fastgen.core.rng import Rng
from fastgen.networks.codecs import Codec, TextCodec

KEY, INSTEAD = "objective.forget", "objective.override"
MOST_NAMED = 12
"""class names that a message lists"""


class Concepts(nn.Module):
    """Draws conditions to keep and conditions to forget, the latter with what stands in their place."""

    codec: tuple[Any, ...]
    """its one codec; in a tuple, so that it is no part of this module"""

    def __init__(self, codec: Codec, forget: Sequence[str], override: Sequence[str] = ()):
        """override: one for all of `forget`, one for each, or none."""
        super().__init__()
        if not forget:
            raise UserError(KEY, "none given", "name the classes, or the words of the prompts, to forget")
        if len(override) not in (0, 1, len(forget)):
            found = f"found {len(override)} for {len(forget)} to forget"
            raise UserError(INSTEAD, found, "give one for all, one for each, or none")
        each = override if len(override) == len(forget) else [*override] * len(forget)
        self.pairs = {name: dict(zip(forget, each)).get(name) for name in forget}
        self.codec = (codec,)
        if not isinstance(codec, TextCodec):
            self.classes = class_numbers(codec, list(self.pairs), KEY)
            self.others = class_numbers(codec, [name for name in self.pairs.values() if name], INSTEAD)
        elif not codec.family.takes_text or codec.family.needs_image:
            found = f"{codec.family.name} takes an image"
            raise UserError(KEY, found, "use a teacher of classes or of text alone")
        for name, other in self.pairs.items():
            if other is not None and self._asks(other) and other != name:
                raise UserError(INSTEAD, f"{other!r} is to be forgotten too", "name something that is kept")
        self.kept: Cond = {}
        self.gone: Cond = {}
        self.instead: Cond = {}

    def read(self, table: Cond, rows: Tensor, texts: list[str] | None) -> None:
        """Sort the conditions of the data: distinct ones [C, ...], the row of each sample [N], the prompt of
        each condition. A UserError where a concept is in none of them, or nothing would be left.
        """
        split = self._prompts if isinstance(self.codec[0], TextCodec) else self._labels
        kept, gone, instead = split(table, rows, texts or [])
        if not len(kept):
            what = "prompt" if texts else "class"
            raise UserError(KEY, f"found {list(self.pairs)}: no {what} is left to keep", "forget fewer")
        self.kept, self.gone, self.instead = select(table, kept), select(table, gone), instead

    def _labels(self, table: Cond, rows: Tensor, _: list[str]) -> tuple[Tensor, Tensor, Cond]:
        """(rows to keep, rows to forget, conditions instead of these); each forgotten class is there once for
        each class that may stand in its place.
        """
        codec, gone = self.codec[0], torch.tensor(self.classes)
        kept = rows[~torch.isin(rows, gone)]
        pairs = list(zip(self.classes, self.others))
        if not self.others:
            there = [b for b in kept.unique().tolist() if b < codec.num_classes]
            pairs = [(a, b) for a in self.classes for b in there]
        first, second = (torch.tensor([p[i] for p in pairs]).long() for i in (0, 1))
        return kept, first, codec.labels(second)

    def _prompts(self, table: Cond, rows: Tensor, texts: list[str]) -> tuple[Tensor, Tensor, Cond]:
        """The same of prompts, as often as the data have them; prompts with the override are encoded here."""
        for name in self.pairs:
            if not any(_words(name).search(text) for text in texts):
                found = f"{name!r} is in none of the {len(texts)} prompts"
                raise UserError(KEY, found, "name words that the prompts have")
        changed = [self.overridden(text) for text in texts]
        asks = torch.tensor([self._asks(text) for text in texts])
        gone = rows[asks[rows]]
        unique, where = gone.unique(return_inverse=True)
        new = [changed[i] for i in unique.tolist()]
        encoded = [self.codec[0].prompts(new[i : i + 256]) for i in range(0, len(new), 256)]
        return rows[~asks[rows]], gone, select({k: v.cpu() for k, v in stack(encoded).items()}, where)

    def _asks(self, text: str) -> bool:
        """Whether a prompt, or the name of a class, asks for something that is to be forgotten."""
        if isinstance(self.codec[0], TextCodec):
            return any(_words(name).search(text) for name in self.pairs)
        return class_numbers(self.codec[0], [text], INSTEAD)[0] in self.classes

    def overridden(self, text: str) -> str:
        """The prompt with every concept replaced by its override, or left out."""
        for name, other in self.pairs.items():
            text = _words(name).sub((other or "").replace("\\", r"\\"), text)
        return " ".join(text.split())

    def draw(self, num_kept: int, num_gone: int, rng: Rng, device) -> tuple[Cond, Cond]:
        """(what is asked for, what is shown) of num_kept conditions to keep and then num_gone to forget."""
        if not self.kept:
            raise UserError(KEY, "no conditions were read", "set data")
        first = rng.randint(_len(self.kept), num_kept).cpu()
        second = rng.randint(_len(self.gone), num_gone).cpu()
        kept = select(self.kept, first)
        found = (stack([kept, select(table, second)]) for table in (self.gone, self.instead))
        asked, shown = ({k: v.to(device) for k, v in cond.items()} for cond in found)
        return asked, shown


def class_numbers(codec: Codec, names: Sequence[str], key: str) -> list[int]:
    """The classes of these names or numbers."""
    if not codec.num_classes:
        raise UserError(
            key, f"found {list(names)} for an unconditional teacher", "use one with classes or text"
        )
    known = {name.casefold(): i for i, name in enumerate(codec.class_names)}
    known |= {str(i): i for i in range(codec.num_classes) if str(i) not in known}
    for name in names:
        if name.casefold() not in known:
            listed = ", ".join(codec.class_names[:MOST_NAMED])
            more = " ..." * (codec.num_classes > MOST_NAMED)
            raise UserError(
                key, f"found {name!r}{suggest(name, codec.class_names)}", f"allowed: {listed}{more}"
            )
    return [known[name.casefold()] for name in names]


def _words(name: str) -> re.Pattern[str]:
    """Matches a concept as whole words, in any case."""
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)


def _len(cond: Cond) -> int:
    return len(next(iter(cond.values())))
