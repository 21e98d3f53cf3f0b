"""What each process of a run on many cards needs and sends, computed from configs on the meta device.

python -m fastgen.training.scale            table of the models in configs/teachers, by number of cards
python -m fastgen.training.scale --write    into docs/scale.md (a test holds it to what this prints)
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from fastgen.config.parse import merge, read_files
from fastgen.config.run import validate
from fastgen.core.paths import config
from fastgen.families.parts import of_adapter
from fastgen.networks.backbone import Backbone
from fastgen.roles.roles import Role
from fastgen.training.assembly import make_cast
from fastgen.training.cast import Cast
from fastgen.training.memory import GIB, USABLE, estimate, models, network_calls

COUNTS, NODE, CARD = (1, 8, 64, 512), 8, 80
"""numbers of cards, cards of a machine, and GiB of a card"""
BEGIN, END = "<!-- computed: python -m fastgen.training.scale --write -->", "<!-- end -->"
HEAD = f"""{BEGIN}
DMD2 without GAN at batch 1 for every released model, as in [memory.md](memory.md), on cards of {CARD} GiB,
{NODE} to a machine. In a cell: the layout, what a process holds (GiB), and what it receives in one training
step on average (GiB). The layout is the first of these that fits {USABLE:.0%} of a card: *whole* networks
on every card (only trained gradients travel), *parts of a machine* (`train.sharding fsdp` with
`train.shard_group {NODE}`), *parts of all* (`train.sharding fsdp`). A process holds its parts, the largest
block gathered twice, and its activations. A pass gathers a network's weights; one with a gradient gathers
them again on its way back and scatters the gradients.

| model | student | {" | ".join(f"{n} card{'s' * (n > 1)}" for n in COUNTS)} |
|---|---|{"---|" * len(COUNTS)}
"""


@dataclass(frozen=True)
class Share:
    """Bytes that one process holds and receives in a step."""

    held: float
    received: float


def share(cast: Cast, rows: dict[str, float], group: int, processes: int) -> Share:
    """Of one process among `processes`, where `group` of them hold one copy of the networks. rows: bytes by
    purpose of a process that holds all (`memory.estimate`), activations last. Gradients travel in float32.
    """
    weights, activations = next(iter(rows)), list(rows)[-1]
    fixed = sum(rows.values()) - rows[activations]
    learned = rows["gradients"] * _backward_passes(cast)
    if group == 1:
        return Share(fixed + rows[activations], 2 * learned * _others(processes))
    kept: float = _spread(cast.teacher.codec.vae) if cast.teacher.codec.vae is not None else 0
    adapters = cast.student_cfg.kind != "full"
    if adapters:  # they stay whole, with their gradients, states and averages
        kept += fixed - rows[weights] + rows["gradients"]
    held = (fixed - kept) / group + kept + 2 * max(_blocks(cast)) + rows[activations]
    gathered = sum(
        calls * (2 if name.endswith("+grad") else 1) * _spread(_backbone(cast, name))
        for name, calls in _calls(cast).items()
    )
    if adapters:
        averaged = 2 * learned * _others(processes)
    else:
        averaged = learned * (_others(group) + 2 * _others(processes // group) / group)
    return Share(held, gathered * _others(group) + averaged)


def _others(processes: int) -> float:
    """The part of a whole that comes from others when all hold equal parts."""
    return (processes - 1) / processes


def _calls(cast: Cast) -> dict[str, float]:
    return network_calls(cast, cast.stages[0], len(cast.student.times))


def _backward_passes(cast: Cast) -> float:
    """In a step, over trained networks of one size."""
    with_grad = [calls for name, calls in _calls(cast).items() if name.endswith("+grad")]
    return sum(with_grad) / len(with_grad)


def _backbone(cast: Cast, call: str) -> Backbone:
    part = cast.parts[call.removesuffix("+grad")]
    assert isinstance(part, Role) and isinstance(part.backbone, Backbone)
    return part.backbone


def _blocks(cast: Cast) -> list[int]:
    """Bytes of every repeated block of the student."""
    backbone = _backbone(cast, "student")
    nets = backbone.family.parts(backbone.net).values()
    return [_spread(block) for net in nets for block in backbone.repeated_blocks(net)]


def _spread(module: nn.Module) -> int:
    """Bytes of a module's weights without adapters."""
    return sum(p.numel() * p.element_size() for n, p in module.named_parameters() if not of_adapter(n))


def layout(cast: Cast, rows: dict[str, float], processes: int) -> tuple[str, Share]:
    """The first layout that fits a card, or the last of those there are."""
    groups = {"whole": 1}
    if processes > NODE:
        groups["parts of a machine"] = NODE
    if processes > 1:
        groups["parts of all"] = processes
    found = {name: share(cast, rows, group, processes) for name, group in groups.items()}
    fits = [n for n, one in found.items() if one.held <= USABLE * CARD * GIB]
    name = fits[0] if fits else list(found)[-1]
    return name, found[name]


def row(name: str, kind: str) -> str:
    """One line of the table."""
    ours = {"objective": {"name": "dmd2", "gan_weight": 0.0}, "data": {"prompts": "any"}}
    files = read_files([str(config(f"teachers/{name}.yaml"))])
    cfg = validate(merge(files, {**ours, "student": {"kind": kind}}))
    cast = make_cast(cfg, "meta")
    rows = estimate(cast, cfg.train).rows
    cells = []
    for processes in COUNTS:
        where, one = layout(cast, rows, processes)
        fits = "" if one.held <= USABLE * CARD * GIB else " (too large)"
        cells.append(f"{where}{fits}: {one.held / GIB:.1f}, {one.received / GIB:.1f}")
    kind = "full" if kind == "full" else "LoRA"
    return f"| [{name}](../configs/teachers/{name}.yaml) | {kind} | {' | '.join(cells)} |"


def table(names: Iterable[str]) -> str:
    """The generated part of docs/scale.md."""
    return HEAD + "\n".join(row(n, kind) for n in names for kind in ("lora", "full")) + f"\n{END}\n"


def main(argv: list[str]) -> None:
    """Print the table, or write it."""
    from fastgen.core.console import quiet

    quiet()
    text = table(models())
    if "--write" not in argv:
        print(text)
        return
    page = config("teachers").parents[1] / "docs" / "scale.md"
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(before + text + rest.partition(END + "\n")[2])


if __name__ == "__main__":
    main(sys.argv[1:])
