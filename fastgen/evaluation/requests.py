"""What the contenders of a run are asked for, the same of each."""

from copy import copy

import torch
from torch import Tensor

from fastgen.core.batch import select
from fastgen.data import moving
from fastgen.data.batches import Data
from fastgen.data.bundled import NAMES, WORDS, attributes_of, load_images
from fastgen.data.degradation import shown
from fastgen.data.loader import degraded_rows, image_rows, shown_frames
from fastgen.data.scans import Scans, simulated
from fastgen.data.solids import renders
from fastgen.data.views import Views
from fastgen.evaluation.metrics import fvd_mini
from fastgen.networks.codecs import ScanCodec, TextCodec
from fastgen.roles.concepts import KEY, class_numbers

HELD_OUT = 512
"""renders that the samples of an asset are compared with"""


class Requests:
    """What a generator is to draw: condition rows, and the attributes a measuring net should find."""

    def __init__(self, teacher, data, own_data: bool = False):
        """own_data: captions are those of the data, also for a teacher of a bundled set."""
        codec = teacher.codec
        self.codec, self.uncond = codec, data.uncond
        self.own: Data | None = None
        """whose rows have conditions of their own"""
        self.degradation = data.degradation
        self.attributes: dict[str, Tensor] = {}
        self.captions: list[str] | None = None
        """the text of each row of the table"""
        self.originals: Tensor | None = None
        """uint8 [N, C, H, W]: what is to be restored from what is shown of it"""
        self.first_frames: Tensor | None = None
        """uint8 [N, 3, H, W]: what clips are to begin with"""
        self.set_name = str((teacher.info or {}).get("measure") or "")
        self.truth: Tensor | None = None
        """clouds [R, N, 3] that the scans of the requests are completed to"""
        self.again: Tensor | None = None
        """other points of the same scenes"""
        if isinstance(codec, ScanCodec):
            held = data if own_data else simulated(codec, "heldout")
            assert isinstance(held, Scans), "the data of a teacher of scans"
            self.own, self.rows, self.table, self.truth = held, held.rows, held.cond_table, held.truth
            self.again = held.again
            self.attributes = {"scene": torch.arange(len(held))}
        elif isinstance(data, Views):
            self.table, self.rows, self.own, self.captions = data.cond_table, data.rows, data, data.texts
            self.attributes = _shown(self.set_name, self.captions or [], self.rows)
        elif data.degradation and self.set_name in NAMES and not own_data:
            held = load_images(self.set_name, "heldout")
            self.attributes = held.attributes or {"class": held.labels}
            self.own, self.originals = degraded(codec, held.images, data), held.images
            self.table, self.rows = self.own.cond_table, self.own.rows
        elif isinstance(codec, TextCodec) and self.set_name in WORDS and not own_data:
            held = load_images(self.set_name, "heldout")
            assert held.captions is not None and held.attributes is not None, "such images have both"
            self.attributes = held.attributes
            self._ask(held.captions)
        elif isinstance(codec, TextCodec) and self.set_name == moving.NAME and not own_data:
            every = range(fvd_mini.HELD if codec.family.needs_image else moving.count("heldout"))
            self.attributes = moving.attributes(every, "heldout")
            self._ask(moving.captions(every, "heldout"))
            if codec.family.needs_image:
                self._show(shown_frames(codec, moving.ends(every, "heldout")))
        elif codec.num_classes:
            self.table = codec.labels(torch.arange(codec.num_classes))
            self.rows = torch.arange(codec.num_classes)
            self.attributes = {"class": self.rows}
        else:
            self.table, self.rows = data.cond_table, data.rows
            self.own, self.captions = (data if data.own else None), data.texts
            self.originals = data.originals

    def _ask(self, captions: list[str]) -> None:
        """One request for each caption, each distinct one encoded once."""
        self.captions = sorted(set(captions))
        self.table = {k: v.cpu() for k, v in self.codec.prompts(self.captions).items()}
        where = {text: i for i, text in enumerate(self.captions)}
        self.rows = torch.tensor([where[text] for text in captions])

    def _show(self, frames: Tensor) -> None:
        """Beside its caption, each request shows uint8 frames of its clip: the first [N, 3, H, W], or with
        the last [N, 3, 2, H, W].
        """
        own, null = image_rows(self.codec, frames)
        table = {k: v for k, v in self.table.items() if k not in own}
        uncond = {k: v for k, v in self.uncond.items() if k not in null}
        self.first_frames = frames if frames.ndim == 4 else frames[:, :, 0]
        self.own = Data(None, table, self.rows, uncond, self.codec.shape, self.captions, own, null)

    def renders(self) -> Tensor | None:
        """New images [N, 3, H, W] of the solids that the views of prompts show, from the requests' own
        cameras; None of other requests.
        """
        if not isinstance(self.own, Views) or "shape" not in self.attributes:
            return None
        asked = torch.stack([self.attributes[key][:HELD_OUT] for key in ("shape", "colour")], 1)
        images: list[Tensor] = []
        for i, solid in enumerate(asked.unique(dim=0)):
            rows = (asked == solid).all(1).nonzero()[:, 0]
            shape, colour = solid.tolist()
            images.append(renders(shape, colour, self.own.pool[rows], self.codec.pixels[0], seed=1 + i))
        return torch.cat(images)

    def unseen(self) -> "Requests | None":
        """The same of prompts that nothing was trained on; None without any."""
        if not isinstance(self.own, Views) or (views := self.own.unseen()) is None:
            return None
        other = copy(self)
        other.own, other.rows = views, views.rows
        other.attributes = _shown(self.set_name, self.captions or [], views.rows)
        return other

    def values(self, names: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
        """(attribute, number) of classes or words, where the requests' attributes have them; else none."""
        if not names:
            return ()
        if "class" in self.attributes:
            return tuple(("class", number) for number in class_numbers(self.codec, names, KEY))
        if not self.attributes:
            return ()
        if self.set_name == moving.NAME:
            return tuple(pair for name in names for pair in moving.attributes_of(name).items())
        return tuple(pair for name in names for pair in attributes_of(name, self.set_name).items())

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

    def begun(self, num: int) -> Tensor | None:
        """Frames [num, 3, H, W] in [0, 1] that the first num clips are to begin with; None for others."""
        if self.first_frames is None:
            return None
        return self.first_frames[torch.arange(num) % len(self.first_frames)].float() / 255

    def restored(self, num: int) -> Tensor | None:
        """Images [num, C, H, W] in [0, 1] that the first num requests are to restore; None for others."""
        if self.originals is None:
            return None
        return self.originals[torch.arange(num) % len(self.originals)].float() / 255

    def enlarged(self, num: int) -> Tensor | None:
        """Images [num, C, H, W] in [0, 1]: the bicubic enlargement of what these requests are shown."""
        if self.originals is None:
            return None
        section, index = self.degradation, torch.arange(num) % len(self.originals)
        return shown(self.originals[:num], section.factor, section.kind)[index].float() / 255

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


def of_bundled_set(codec, degradation=None) -> Data:
    """The data of a run whose requests are those of a bundled set: the null condition, and what degrades."""
    null = {k: v.cpu() for k, v in codec.null(1).items()}
    data = Data(None, {}, torch.zeros(0).long(), null, codec.shape)
    data.degradation = degradation
    return data


def degraded(codec, images: Tensor, data) -> Data:
    """Requests to restore uint8 images [N, C, H, W] from what the data's own degradation leaves of them."""
    own, null = degraded_rows(data.degradation, codec, images)
    text = codec.prompts([""]) if isinstance(codec, TextCodec) else {}
    row = {k: v.cpu() for k, v in text.items() if k not in own}
    rows = torch.zeros(len(images)).long()
    return Data(None, row, rows, data.uncond, codec.shape, [""], own, null)


def _shown(name: str, texts: list[str], rows: Tensor) -> dict[str, Tensor]:
    """What a measuring net should find in each request [N], where the texts name a value of every attribute
    of its set; else nothing.
    """
    found = [attributes_of(text, name) for text in texts] if name in WORDS else []
    if not found or any(key not in one for one in found for key in WORDS[name]):
        return {}
    return {key: torch.tensor([one[key] for one in found])[rows] for key in WORDS[name]}
