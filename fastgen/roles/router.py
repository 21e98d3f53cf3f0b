"""Which of several students draws a condition: classes in blocks, prompts by their place along one axis.

Prompts are ordered along the first principal axis of their pooled text states and cut into parts of equal
size; a new prompt goes where its own place lies. The rule is three small tensors, written into the export.
"""

from pathlib import Path

import torch
from torch import Tensor

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError
from fastgen.core.files import write_tensors
from fastgen.networks.codecs import Codec, TextCodec

KEY = "objective.num_students"
FILE = "router.safetensors"


class Router:
    """cond -> the student [B] that draws each row."""

    def __init__(self, num: int, tensors: dict[str, Tensor] | None = None):
        """{"table" [classes + 1]}, or {"mean" [C], "axis" [C], "edges" [num - 1]}; None: not divided yet."""
        self.num, self.tensors = num, tensors

    @classmethod
    def for_codec(cls, codec: Codec, num: int) -> "Router":
        """The router of a teacher's conditions; a text teacher's waits for the prompts (see `divide`)."""
        if num == 1 or isinstance(codec, TextCodec):
            return cls(num)
        classes = codec.num_classes
        if not classes:
            raise UserError(
                KEY,
                f"found {num} for an unconditional teacher",
                "set it to 1: there are no classes to divide",
            )
        if num > classes:
            raise UserError(
                KEY,
                f"found {num} for {classes} classes",
                f"a student would have none; set it to {classes} or less",
            )
        table = torch.arange(classes) * num // classes
        return cls(num, {"table": torch.cat([table, torch.zeros(1).long()])})  # the null class: any student

    def divide(self, table: Cond) -> None:
        """Cut these distinct prompts into parts of equal size; needed once, before the first call."""
        if self.num == 1 or self.tensors is not None:
            return
        pooled = pool(table).double()
        if len(pooled) < self.num:
            found = f"found {self.num} for {len(pooled)} distinct prompts"
            raise UserError(KEY, found, "a student would have none; set it lower, or give more prompts")
        mean = pooled.mean(0)
        axis = torch.linalg.svd(pooled - mean, full_matrices=False)[2][0]
        axis = axis * axis[axis.abs().argmax()].sign()  # svd leaves the sign open
        place = ((pooled - mean) @ axis).sort().values
        cuts = [len(place) * j // self.num for j in range(1, self.num)]
        edges = torch.stack([(place[i - 1] + place[i]) / 2 for i in cuts])
        self.tensors = {"mean": mean, "axis": axis, "edges": edges}

    def __call__(self, cond: Cond) -> Tensor:
        if self.num == 1:
            return torch.zeros(len(next(iter(cond.values()), torch.zeros(1))), dtype=torch.long)
        if self.tensors is None:
            raise UserError(
                KEY, "the router has no clusters yet, because there are no prompts to divide", "set data"
            )
        if "table" in self.tensors:
            return self.tensors["table"][cond["class_labels"].cpu()]
        place = (pool(cond).double().cpu() - self.tensors["mean"]) @ self.tensors["axis"]
        return torch.searchsorted(self.tensors["edges"], place)

    def save(self, folder: Path) -> None:
        write_tensors(folder / FILE, {"num": torch.tensor([self.num]), **(self.tensors or {})})

    @classmethod
    def load(cls, folder: Path, key: str) -> "Router":
        from safetensors.torch import load_file

        if not (folder / FILE).is_file():
            raise UserError(
                key, f"{folder} holds several students but no {FILE}", "copy the whole export folder"
            )
        tensors = load_file(folder / FILE)
        num = int(tensors.pop("num"))
        return cls(num, tensors or None)


def pool(cond: Cond) -> Tensor:
    """Mean text state of each row [B, C], padding left out where there is a mask."""
    states, mask = cond["encoder_hidden_states"].float(), cond.get("encoder_attention_mask")
    if mask is None:
        return states.mean(1)
    weights = mask.to(states)[..., None]
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
