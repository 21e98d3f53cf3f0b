"""Scoring images of the bundled sets with the nets in assets/measure; no download, no Inception.

fd_mini is the Frechet distance on 64 features of our own small classifier, against all held-out images of a
set. It orders generators of that set among each other and is never comparable with an Inception FID.
"""

import hashlib
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.core.paths import asset
from fastgen.data import moving
from fastgen.data.bundled import NAMES, WORDS, Images, attributes_of, caption, load_images
from fastgen.evaluation.metrics.agreement import agreement, right, unlearning
from fastgen.evaluation.metrics.frechet import frechet_from, statistics
from fastgen.evaluation.metrics.fvd_mini import ClipMeasurer
from fastgen.evaluation.metrics.mmd import polynomial_mmd
from fastgen.evaluation.metrics.neighbours import evenly, precision_recall
from fastgen.networks.feature_net import FeatureNet, measure

NOTE = "fd_mini is a mini metric on a small net of our own; it is not comparable with an Inception FID"


Values = tuple[tuple[str, int], ...]
"""values of attributes, as (attribute, number): ("class", 3), ("colour", 0)"""


def shows(attributes: dict[str, Tensor], values: Values) -> Tensor:
    """Whether each row of these attributes has one of the values, bool [N]."""
    num = len(next(iter(attributes.values())))
    found = [attributes[key] == number for key, number in values if key in attributes]
    return torch.stack(found).any(0) if found else torch.zeros(num, dtype=torch.bool)


def _attributes(images: Images) -> dict[str, Tensor]:
    return images.attributes or {"class": images.labels}


@lru_cache(maxsize=8)
def _reference(name: str, device: str, without: Values = ()):
    """(net, held-out features, their mean and covariance) of one set, kept for the life of the process."""
    net = FeatureNet.load(asset(f"measure/{name}")).to(device)
    features = measure(net, held_out(name, without))["features"]
    return net, features, statistics(features)


def held_out(name: str, without: Values = ()) -> Tensor:
    """The held-out images of a set that show none of these values, uint8 [N, C, H, W]."""
    held = load_images(name, "heldout")
    return held.images[~shows(_attributes(held), without)]


class Measurer:
    """Metrics in the features of the measuring network of one bundled image set."""

    primary = "fd_mini"
    least = 4
    """samples that every score is defined for: precision and recall look at the third neighbour"""

    def __init__(self, name: str, device="cpu", without: Values = (), own: Tensor | None = None):
        """without: what a student was to forget, and the real images that it is compared with do not show;
        own: real images uint8 [N, C, H, W] in the place of the set's held-out ones.
        """
        if name not in NAMES:
            raise UserError("measure", f"no measuring net for {name!r}", f"allowed: {', '.join(NAMES)}")
        self.name, self.device, self.without, self.own = name, str(device), without, own
        self.with_clip = True
        """whether images are compared with their captions too, where there is a net for it"""

    @property
    def net(self) -> FeatureNet:
        return self._known[0]

    @cached_property
    def _known(self):
        known = _reference(self.name, self.device, self.without)
        if self.own is None:
            return known
        features = measure(known[0], self.own)["features"]
        return known[0], features, statistics(features)

    def _check(self, images: Tensor) -> None:
        want = (self.net.config["channels"], self.net.config["size"], self.net.config["size"])
        if tuple(images.shape[1:]) != want:
            raise UserError(
                "images", f"shape {tuple(images.shape[1:])}", f"the {self.name} measuring net takes {want}"
            )
        if len(images) < 2:
            raise UserError("images", f"{len(images)} image", "a distance needs at least two")

    def features(self, images: Tensor) -> Tensor:
        """[N, 64] of images in [0, 1] or uint8."""
        self._check(images)
        return measure(self.net, images)["features"]

    def real(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the held-out images' features."""
        return self._known[2]

    def compare(self, images: Tensor, attributes: dict[str, Tensor]) -> dict[str, float]:
        """Scores of images [N, C, H, W] in [0, 1]; attributes: what each should show, -1 if unspecified."""
        self._check(images)
        _, real, (mean, cov) = self._known
        seen = measure(self.net, images)
        distances = compare_features(seen["features"], real, (mean, cov))
        found = {**distances, **agreement(seen["logits"], attributes)}
        score = self._alignment(images, attributes)
        return found if score is None else found | {"clip": score}

    def _alignment(self, images: Tensor, attributes: dict[str, Tensor]) -> float | None:
        """Image-text agreement by the bundled two-tower net, where captions follow from the attributes."""
        keys = ("garment", "colour", "background")
        if (
            not self.with_clip
            or self.name != "tinted"
            or any(k not in attributes or (attributes[k] < 0).any() for k in keys)
        ):
            return None
        from fastgen.evaluation.metrics.alignment import score

        texts = [caption(*ids) for ids in zip(*(attributes[k].tolist() for k in keys))]
        return score(images, texts, self.device)

    def floor(self, num: int) -> dict[str, float]:
        """The same scores for num real training images: what a perfect generator would get at this count."""
        if self.own is not None:
            return {}
        real = load_images(self.name, "train")
        attributes = _attributes(real)
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
        rows = evenly(order[~shows(attributes, self.without)[order]], num)
        return self.compare(real.images[rows].float() / 255, {k: v[rows] for k, v in attributes.items()})

    def unlearned(self, kept: tuple, gone: tuple) -> dict[str, float]:
        """`forgotten`, the share of images asked for what was to be forgotten that show it, and the metrics
        of unlearning; kept, gone: (images, what each was asked for), of what is kept and of the rest.
        """
        right_of = [self._right(*kept), self._right(*gone)]
        asked = gone[1]
        shown = [right_of[1][key] & (asked[key] == number) for key, number in self.without]
        hits = torch.stack(list(right_of[0].values())).all(0), torch.stack(shown).any(0)
        hit, lost = torch.cat(hits).double(), torch.arange(sum(map(len, hits))) >= len(hits[0])
        found = {name: estimate.value for name, estimate in unlearning(hit, lost).items()}
        return {"forgotten": float(hit[lost].mean()), **found}

    def _right(self, images: Tensor, attributes: dict[str, Tensor]) -> dict[str, Tensor]:
        self._check(images)
        return {k: v.cpu() for k, v in right(measure(self.net, images)["logits"], attributes).items()}

    def describe(self) -> dict[str, str]:
        """What a number must be quoted with."""
        digest = hashlib.sha256(
            (asset(f"measure/{self.name}") / "model.safetensors").read_bytes()
        ).hexdigest()
        what = "held-out images" if self.own is None else "new renders of the very object"
        left_out = "".join(f" without {key} {number}" for key, number in self.without)
        return {
            "extractor": f"assets:measure/{self.name}, 64 features, sha256 {digest[:12]}{left_out}",
            "reference": f"{len(self._known[1])} {what} of {self.name}{left_out}",
            "note": NOTE,
        }


def compare_features(
    fake: Tensor, real: Tensor, known: tuple[Tensor, Tensor] | None = None
) -> dict[str, float]:
    """fd_mini, mmd x 1000, precision and recall of two feature sets; `known` is the statistics of `real`."""
    num = min(len(fake), len(real))
    precision, recall = precision_recall(evenly(real, num), evenly(fake, num))
    return {
        "fd_mini": frechet_from(*statistics(fake), *(known or statistics(real))),
        "mmd": 1000 * polynomial_mmd(fake, real),
        "precision": precision,
        "recall": recall,
    }


def attributes_from(name: str, lines: list[str]) -> dict[str, Tensor]:
    """What prompts ask for: classes by number or name, or of a set with captions the attributes they name."""
    if not lines:
        return {}
    if name in WORDS or name == moving.NAME:
        try:
            if name == moving.NAME:
                known, found = moving.VOCABULARY, [moving.attributes_of(line) for line in lines]
            else:
                known, found = WORDS[name], [attributes_of(line, name) for line in lines]
        except ValueError as error:
            raise UserError("--prompts", str(error), "name each attribute once") from None
        return {k: torch.tensor([f.get(k, -1) for f in found]) for k in known}
    names = load_images(name, "heldout").class_names
    wanted = [int(line) if line.isdecimal() else names.index(line) if line in names else -1 for line in lines]
    if bad := [line for line, k in zip(lines, wanted) if not 0 <= k < len(names)]:
        raise UserError("--prompts", f"found {bad[0]!r}", f"0 to {len(names) - 1} or {', '.join(names)}")
    return {"class": torch.tensor(wanted)}


def measurer_for(
    info_or_name: dict | str | None, device="cpu", without: Values = (), own: Tensor | None = None
) -> Measurer | ClipMeasurer | None:
    """The measurer a teacher's info (its fastgen.json) or a set name asks for; None where we have none."""
    name = info_or_name.get("measure") if isinstance(info_or_name, dict) else info_or_name
    if name == ClipMeasurer.name:
        return ClipMeasurer(device, without)
    return Measurer(name, device, without, own) if name in NAMES else None
