"""An encoder or classifier of the user's: a dotted path to a function that returns a torch module.

The module takes uint8 images [B, 3, H, W] and returns features [B, d], or a dict of named outputs
("features", "logits").
"""

import importlib

from torch import Tensor, nn

from fastgen.core.errors import UserError, first_line
from fastgen.evaluation.encoders.base import Encoder, Outputs, state_checksum


def is_plugin(text: str) -> bool:
    """Whether a weight is given as package.module:function."""
    module, colon, function = text.partition(":")
    return bool(colon) and function.isidentifier() and all(p.isidentifier() for p in module.split("."))


def load(name: str, where: str) -> Encoder:
    """`where` as package.module:function."""
    module, _, function = where.partition(":")
    try:
        net = getattr(importlib.import_module(module), function)()
    except Exception as error:
        found = f"{name}: {where} cannot be called ({type(error).__name__}: {first_line(error)})"
        raise UserError(
            "--weights", found, "give a function without arguments that returns a torch module"
        ) from None
    if not isinstance(net, nn.Module):
        found = f"{name}: {where} returned {type(net).__name__}"
        raise UserError("--weights", found, "give a function without arguments that returns a torch module")

    def run(module: nn.Module, x: Tensor) -> Outputs:
        found = module(x)
        return found if isinstance(found, dict) else {"features": found}

    return Encoder(name, net, lambda images: images, "the module's own", state_checksum(net), run)
