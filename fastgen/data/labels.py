"""Class numbers of a user's own pictures, from metadata or class folders; never made up."""

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.data.folders import Samples, natural, some
from fastgen.data.text import shorten

KEY = "data.images"


def drop_missing(values: list, samples: Samples, on_bad: str, what: str) -> Samples:
    """The samples whose value is not None; the others are named and left out, or fatal."""
    kept = [i for i, value in enumerate(values) if value is not None]
    without = [samples.name(i) for i, value in enumerate(values) if value is None]
    if without and on_bad == "error":
        found = f"{len(without)} of {len(values)} files have no {what}: {some(without)}"
        raise UserError(samples.key, found, f"add the {what}, or data.on_bad_image skip leaves these out")
    samples.listing.skipped += [f"{name} (no {what})" for name in without]
    return samples.chosen(kept)


def class_rows(samples: Samples, codec) -> Tensor:
    """The class of each labelled sample as long [N]; prints which name stands for which class.

    Names are the teacher's own (or their numbers); as many other names as the teacher has classes stand for
    them in natural order. Anything else is refused.
    """
    names = [name.casefold() for name in codec.class_names]
    found = sorted({str(label) for label in samples.labels}, key=natural)
    if all(name.casefold() in names for name in found):
        where = {name: names.index(name.casefold()) for name in found}
    elif all(name.isdecimal() and int(name) < codec.num_classes for name in found):
        where = {name: int(name) for name in found}
    elif len(found) == codec.num_classes and not any(isinstance(v, int) for v in samples.labels):
        where = {name: i for i, name in enumerate(found)}
    else:
        origin = "class folders" if samples.origin == "folders" else f"labels in {samples.origin}"
        some_names = some(shorten(name, 30) for name in found)
        raise UserError(
            samples.key,
            f"{len(found)} {origin} ({some_names}) for a teacher of {codec.num_classes} classes",
            f"name them {some(codec.class_names, 3)}, or give exactly {codec.num_classes}",
        )
    pairs = some((f"{shorten(name, 30)[1:-1]} is {i}" for name, i in where.items()), 12)
    print(f"data: classes from {samples.origin}: {pairs}")
    return torch.tensor([where[str(label)] for label in samples.labels]).long()


def unlabelled_rows(num: int, codec, pixels: bool, key: str = KEY) -> Tensor:
    """Rows of pictures without a label: the null class of the teacher, if it has one. Where no picture is
    read, as without any set, classes are drawn evenly. key: what a message names.
    """
    if not pixels:
        print(f"data: no picture is read and none has a label: all {codec.num_classes} classes, evenly")
        return torch.arange(num) % codec.num_classes
    if not codec.has_null:
        found = f"no labels for a teacher of {codec.num_classes} classes"
        raise UserError(key, found, "one folder a class, or metadata.jsonl with file_name and label")
    print(
        f"warning: {key}: no labels for a teacher of {codec.num_classes} classes, so every picture is "
        "of the null class and no class is learned; give one folder a class, or labels in metadata.jsonl"
    )
    return torch.full((num,), codec.num_classes)
