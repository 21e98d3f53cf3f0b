"""Whether images show what was asked for, by a classifier: of the bundled sets, or the user's own.

Agreement:   share of images that show every requested attribute; -1 asks for nothing
Janus rate:  share of views from the side or the back that are taken for the front
Forgetting:  unlearning accuracy UA = 1 - accuracy on images asked for the forgotten class (of those alone),
             retained accuracy RA on the others, and their harmonic mean H
"""

from typing import Any

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.evaluation.metrics.estimate import Estimate, around, share_of
from fastgen.evaluation.metrics.metric import Metric
from fastgen.threed.cameras import VIEWS


def right(logits: dict[str, Tensor], attributes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whether each image shows each attribute as asked, bool [N] by attribute."""
    found = {}
    for key, wanted in attributes.items():
        if key in logits:
            wanted = wanted.to(logits[key].device)
            found[key] = (logits[key].argmax(1) == wanted) | (wanted < 0)
    return found


def agreement(logits: dict[str, Tensor], attributes: dict[str, Tensor]) -> dict[str, float]:
    """Share of images that show every requested attribute, and with several attributes the share for each."""
    each = right(logits, attributes)
    if not each:
        return {}
    together = torch.stack(list(each.values())).all(0).double().mean()
    shares = {f"agreement_{k}": float(v.double().mean()) for k, v in each.items()} if len(each) > 1 else {}
    return {"agreement": float(together), **shares, **janus(logits, attributes)}


def janus(logits: dict[str, Tensor], attributes: dict[str, Tensor]) -> dict[str, float]:
    """Share of the views from the side or the back that look like the front, for a classifier of views: the
    Janus problem of 3D assets. Empty where no such view is asked for.
    """
    if "view" not in logits or "view" not in attributes:
        return {}
    rows = torch.isin(attributes["view"], torch.tensor([VIEWS.index("side"), VIEWS.index("back")]))
    front = logits["view"].argmax(1).cpu() == VIEWS.index("front")
    return {"janus": float(front[rows].double().mean())} if rows.any() else {}


def library_of(*attributes: dict[str, Tensor]) -> dict[str, Tensor]:
    """The different prompts [P] among requests, by what they name beside the view."""
    keys = [key for key in attributes[0] if key != "view"]
    rows = torch.cat([torch.stack([one[key] for key in keys], 1) for one in attributes]).unique(dim=0)
    return dict(zip(keys, rows.unbind(1)))


def prompt_recall(
    logits: dict[str, Tensor], wanted: dict[str, Tensor], library: dict[str, Tensor]
) -> dict[str, float]:
    """Recall at 1: share of images that fit their own prompt best among those of a library [P], by the sum of
    the log-probabilities of what a prompt names (ScaleDreamer, arXiv 2407.02040, asks CLIP); of all images,
    and of those from each side that some are asked for from.
    """
    fits = torch.stack([logits[key].log_softmax(1)[:, names] for key, names in library.items()]).sum(0)
    own = torch.stack([wanted[key][:, None] == names for key, names in library.items()]).all(0)
    right = own.gather(1, fits.argmax(1, keepdim=True))[:, 0].double()
    sides = {name: wanted["view"] == i for i, name in enumerate(VIEWS)} if "view" in wanted else {}
    by_side = {f"prompt_recall_{k}": float(right[rows].mean()) for k, rows in sides.items() if rows.any()}
    return {"prompt_recall": float(right.mean()), **by_side}


def _logits(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Named heads of an encoder; a lone "logits" is that of the class."""
    heads = {k.removeprefix("logits_"): v for k, v in outputs.items() if k.startswith("logits_")}
    if "logits" in outputs:
        heads["class"] = outputs["logits"]
    return heads


def _agreement(material: Any, encoder: str) -> Estimate:
    each = right(_logits(material.outputs(encoder)), material.labels())
    if not each:
        found = "the encoder has no logits for what the labels ask for"
        raise UserError(
            "--metrics", f"agreement:{encoder}: {found}", "give an encoder whose module returns logits"
        )
    return share_of(torch.stack(list(each.values())).all(0))


def _predicted(material: Any, encoder: str) -> tuple[Tensor, Tensor]:
    """(whether each image shows its class, whether that class is the forgotten one), float64 and bool [N]."""
    labels = {k: v for k, v in material.labels().items() if k == "class"}
    each = right(_logits(material.outputs(encoder)), labels)
    if not each:
        found = "labels and encoder share no attribute called class"
        raise UserError(
            "--metrics", f"unlearning on {encoder}: {found}", "give class labels and a classifier"
        )
    gone = labels["class"] == material.forgotten
    if not gone.any() or gone.all():
        asked = "all images are" if gone.any() else "no image is"
        raise UserError("--forgotten", f"{asked} asked for class {material.forgotten}", "give images of both")
    return each["class"].cpu().double(), gone.cpu()


def unlearning(hit: Tensor, gone: Tensor) -> dict[str, Estimate]:
    """UA, RA and H of whether each image shows its class [N], and which classes are the forgotten one.

    H = 2 UA RA / (UA + RA), whose slope in UA is 2 RA^2 / (UA + RA)^2 and the other way round.
    """
    missed, kept = 1 - hit[gone], hit[~gone]
    ua, ra = float(missed.mean()), float(kept.mean())
    both = ua + ra

    def influence() -> Tensor:
        moved = torch.zeros_like(hit)
        if both:
            moved[gone] = (missed - ua) * len(hit) / len(missed) * 2 * ra**2 / both**2
            moved[~gone] = (kept - ra) * len(hit) / len(kept) * 2 * ua**2 / both**2
        return moved

    return {
        "unlearning_accuracy": share_of(missed),
        "retained_accuracy": share_of(kept),
        "unlearning_h": around(2 * ua * ra / both if both else 0.0, influence),
    }


def _unlearning(name: str, what: str) -> Metric:
    def compute(material: Any, encoder: str) -> Estimate:
        return unlearning(*_predicted(material, encoder))[name]

    return Metric(name, what, "higher", "definition", compute, ("labels", "forgotten"))


METRICS = (
    Metric(
        "agreement",
        "share that shows what was asked for",
        "higher",
        "definition",
        _agreement,
        ("labels",),
        "",
        1,
    ),
    _unlearning("unlearning_accuracy", "share asked for the forgotten class that does not show it"),
    _unlearning("retained_accuracy", "share asked for the other classes that shows them"),
    _unlearning("unlearning_h", "harmonic mean of these two"),
)
