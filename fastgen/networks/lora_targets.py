"""The layers that a LoRA adapts: endings of names, matched with the layers of a network."""

from torch import nn

from fastgen.core.errors import UserError
from fastgen.core.patterns import matches
from fastgen.families.base import Family
from fastgen.families.parts import Parts

_ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def adapter_layers(family: Family, net: nn.Module, endings: tuple[str, ...]) -> list[str]:
    """Full names of the layers whose names end in one of `endings`.

    The family's own endings skip its input, time and output layers, and an ending may match nothing. Of a
    user's endings each must match a layer, and one that matches an input, time or output layer must be the
    full name of that layer; otherwise UserError.
    """
    inside = [f"{part}." for part in family.adapted(net)] if isinstance(net, Parts) else [""]
    layers = _layers(net, tuple(inside))
    added = {*family.guidance_layers, family.input_layer}
    default = set(endings) - added == set(family.lora_targets) - added
    names: set[str] = set()
    for ending in endings:
        hit = [n for n in layers if n == ending or n.endswith(f".{ending}")]
        final = sorted(n for n in hit if _is_final(family, n, inside))
        if default:
            names.update(n for n in hit if n not in final or n == ending in added)
            continue
        if not hit:
            raise _missing(family, repr(ending), layers)
        if final and hit != [ending]:
            found = f"{ending!r} also matches {final[0]!r}, an input, time or output layer"
            raise UserError("target_modules", found, "give a longer ending, or that layer's full name")
        names.update(hit)
    if not names:
        raise _missing(family, f"any of {list(endings)}", layers)
    return sorted(names)


def _layers(net: nn.Module, inside: tuple[str, ...]) -> set[str]:
    """Names of the layers that can be adapted; a layer that has an adapter keeps its original name."""
    found = [n for n, m in net.named_modules() if isinstance(m, _ADAPTABLE) and n.startswith(inside)]
    return {n.removesuffix(".base_layer") for n in found if ".lora_" not in n}


def _is_final(family: Family, name: str, inside: list[str]) -> bool:
    part = next((p for p in inside if name.startswith(p)), "")
    return matches(name.removeprefix(part), family.final_layers)


def _missing(family: Family, ending: str, layers: set[str]) -> UserError:
    leaves = sorted({n.rsplit(".", 1)[-1] for n in layers if not n.rsplit(".", 1)[-1].isdigit()})
    found = f"no layer of {family.net_class} ends in {ending}"
    return UserError(
        "target_modules", found, f"give endings of its layers' names, which end in {', '.join(leaves)}"
    )
