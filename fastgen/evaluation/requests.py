"""What the contenders of a run are asked for, the same of each."""

from copy import copy

import torch
from torch import Tensor

from fastgen.core.batch import select
from fastgen.networks.codecs import TextCodec
from fastgen.roles.concepts import KEY, class_numbers


class Requests:
    """What a generator is to draw: condition rows, and the attributes a measuring net should find."""

    def __init__(self, teacher, data, own_data: bool = False):
        """own_data: captions are those of the data, also for a teacher of a bundled set."""
        codec = teacher.codec
        self.codec, self.uncond, self.own = codec, data.uncond, None
        self.attributes: dict[str, Tensor] = {}
        self.captions: list[str] | None = None
        """the text of each row of the table"""
        measure = (teacher.info or {}).get("measure")
        if isinstance(codec, TextCodec) and measure == "tinted" and not own_data:
            from fastgen.data.bundled import load_images

            held = load_images("tinted", "heldout")
            assert held.captions is not None and held.attributes is not None, "tinted images have both"
            unique = sorted(set(held.captions))
            self.table = {k: v.cpu() for k, v in codec.prompts(unique).items()}
            where = {text: i for i, text in enumerate(unique)}
            self.rows = torch.tensor([where[c] for c in held.captions])
            self.attributes, self.captions = held.attributes, unique
        elif isinstance(codec, TextCodec) and measure == "moving" and not own_data:
            from fastgen.data import moving

            every = range(moving.count("heldout"))
            captions = moving.captions(every, "heldout")
            self.attributes, self.captions = moving.attributes(every, "heldout"), sorted(set(captions))
            self.table = {k: v.cpu() for k, v in codec.prompts(self.captions).items()}
            where = {text: i for i, text in enumerate(self.captions)}
            self.rows = torch.tensor([where[c] for c in captions])
        elif codec.num_classes:
            self.table = codec.labels(torch.arange(codec.num_classes))
            self.rows = torch.arange(codec.num_classes)
            self.attributes = {"class": self.rows}
        else:
            self.table, self.rows = data.cond_table, data.rows
            self.own, self.captions = (data if data.own else None), data.texts

    def values(self, names: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
        """(attribute, number) of classes or words, where the requests' attributes have them; else none."""
        if "class" in self.attributes:
            return tuple(("class", number) for number in class_numbers(self.codec, names, KEY))
        if not self.attributes:
            return ()
        from fastgen.data.bundled import attributes_of

        return tuple(pair for name in names for pair in attributes_of(name).items())

    def divided(self, asked: Tensor) -> tuple["Requests", "Requests"]:
        """The requests without those that ask [N] for something, and these alone."""
        parts = copy(self), copy(self)
        for part, rows in zip(parts, (~asked, asked)):
            part.rows = self.rows[rows]
            part.attributes = {k: v[rows] for k, v in self.attributes.items()}
        return parts

    def cond(self, index: Tensor) -> dict[str, Tensor]:
        if self.own is not None:
            return self.own.cond(index % len(self.rows))
        return select(self.table, self.rows[index % len(self.rows)])

    def null(self, index: Tensor) -> dict[str, Tensor]:
        if self.own is not None:
            return self.own.null(index % len(self.rows))
        return {k: v.expand(len(index), *v.shape[1:]) for k, v in self.uncond.items()}

    def texts(self, num: int) -> list[str] | None:
        """The prompts of the first num requests; None for a teacher that takes none."""
        if self.captions is None:
            return None
        return [self.captions[int(i)] for i in self.rows[torch.arange(num) % len(self.rows)]]

    def words(self, num: int) -> list[str]:
        """What the first num requests ask for, as people read it: prompts, names of classes, or nothing."""
        texts = self.texts(num)
        if texts is None and self.codec.num_classes:
            names = getattr(self.codec, "class_names", [])
            rows = [int(self.rows[i % len(self.rows)]) for i in range(num)]
            texts = [names[row] if row < len(names) else f"class {row}" for row in rows]
        return texts or [""] * num

    def wanted(self, num: int) -> dict[str, Tensor]:
        index = torch.arange(num) % len(self.rows)
        return {k: v[index] for k, v in self.attributes.items()}
