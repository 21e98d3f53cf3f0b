"""Every metric by name. `fd:dinov2` asks for a metric on an encoder; a published name is short for such a
pair. To add one: an entry in the METRICS of a module of metrics/; here only a new module or a published name.

python -m fastgen.evaluation.registry prints the table that docs/evaluation.md shows.
"""

from typing import NamedTuple

from fastgen.core.errors import UserError, suggest
from fastgen.evaluation.metrics import (
    agreement,
    distributions,
    geometry,
    lpips,
    mixtures,
    pixels,
    speed,
    text_scores,
    video,
)
from fastgen.evaluation.metrics.metric import Kind, Metric

MODULES = (distributions, text_scores, pixels, lpips, agreement, video, geometry, mixtures, speed)
METRICS: dict[str, Metric] = {m.name: m for module in MODULES for m in module.METRICS}
ALIASES = {
    "fid": "fd:inception",
    "fid_inf": "fd_inf:inception",
    "fid_clean": "fd:inception_clean",
    "patch_fid": "fd:inception_patch",
    "kid": "kid:inception",
    "is": "is:inception",
    "precision": "precision:inception",
    "recall": "recall:inception",
    "density": "density:inception",
    "coverage": "coverage:inception",
    "fd_dinov2": "fd:dinov2",
    "cmmd": "cmmd:clip_336",
    "vendi": "vendi:dinov2",
    "fd_mini": "fd:mini",
    "fd_inf_mini": "fd_inf:mini",
    "kid_mini": "kid:mini",
    "mmd_mini": "mmd:mini",
    "precision_mini": "precision:mini",
    "recall_mini": "recall:mini",
    "density_mini": "density:mini",
    "coverage_mini": "coverage:mini",
    "vendi_mini": "vendi:mini",
    "agreement_mini": "agreement:mini",
    "unlearning_accuracy_mini": "unlearning_accuracy:mini",
    "retained_accuracy_mini": "retained_accuracy:mini",
    "unlearning_h_mini": "unlearning_h:mini",
}
"""published and customary names"""


class Wanted(NamedTuple):
    """A metric as it was asked for: `label` is its name in results."""

    label: str
    metric: Metric
    encoder: str


def wanted(name: str) -> Wanted:
    """The metric that a name stands for; UserError of an unknown one, or of one that must say its encoder."""
    base, _, encoder = ALIASES.get(name, name).partition(":")
    if base not in METRICS:
        known = names()
        raise UserError(
            "--metrics", f"no metric {name!r}{suggest(name, known)}", f"choose one of {', '.join(known)}"
        )
    metric = METRICS[base]
    encoder = encoder or metric.encoder
    if takes_encoder(metric) and not encoder:
        raise UserError(
            "--metrics",
            f"{name} does not say on which encoder",
            f"name it as in {name}:mini or {name}:dinov2",
        )
    if encoder and not takes_encoder(metric):
        raise UserError("--metrics", f"{name}: {base} looks through no encoder", f"ask for {base}")
    label = f"{base}_mini" if encoder == "mini" else name
    return Wanted(label, metric, encoder)


def kind_of(asked: list[Wanted]) -> Kind:
    """What all of these measure; UserError where they want samples of two kinds."""
    kinds = {w.metric.kind: w.label for w in asked if w.metric.kind != "any"}
    if len(kinds) > 1:
        found = ", ".join(f"{label} measures {kind}" for kind, label in kinds.items())
        raise UserError("--metrics", found, "ask for metrics of one kind at a time")
    return next(iter(kinds), "images")


def takes_encoder(metric: Metric) -> bool:
    """Whether a metric is computed from an encoder's outputs."""
    return bool(metric.encoder) or metric in distributions.METRICS or metric in agreement.METRICS


def names() -> list[str]:
    """All that can be asked for without saying an encoder."""
    alone = [n for n, m in METRICS.items() if not takes_encoder(m) or m.encoder]
    return [*ALIASES, *(n for n in alone if n not in ALIASES)]


def table() -> str:
    """Markdown: name, what it is, what it needs, which way is better, where it is from."""
    lines = ["| metric | of | what | encoder | needs | better | source |", "|---|---|---|---|---|---|---|"]
    for name in names():
        _, metric, encoder = wanted(name)
        needs = " or ".join(n for n in metric.needs if n in ("reference", "statistics")) or ", ".join(
            metric.needs
        )
        kind = "" if metric.kind == "any" else metric.kind
        cells = (f"`{name}`", kind, metric.what, encoder, needs, metric.better, metric.source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
