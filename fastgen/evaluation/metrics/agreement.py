"""Whether images show what was asked for, by a classifier: of the bundled sets, or the user's own.

Agreement:   share of images that show every requested attribute; -1 asks for nothing
Forgetting:  unlearning accuracy UA = 1 - accuracy on images asked for the forgotten class (of those alone),
             retained accuracy RA on the others, and their harmonic mean H
"""

from typing import Any

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.evaluation.metrics.estimate import Estimate, mean_of
from fastgen.evaluation.metrics.metric import Metric


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
    return {"agreement": float(together), **shares}


def forgetting(predicted: Tensor, wanted: Tensor, forgotten: int) -> dict[str, float]:
    """UA, RA and H of predicted and wanted classes [N]; of a side without images nothing is said."""
    gone = wanted == forgotten
    hit = (predicted == wanted).double()
    found = {}
    if gone.any():
        found["unlearning_accuracy"] = 1 - float(hit[gone].mean())
    if (~gone).any():
        found["retained_accuracy"] = float(hit[~gone].mean())
    if len(found) == 2:
        ua, ra = found.values()
        found["harmonic_mean"] = 2 * ua * ra / (ua + ra) if ua + ra else 0.0
    return found


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
    return mean_of(torch.stack(list(each.values())).all(0).double())


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
)
