"""An encoder or classifier of the user's: a dotted path to a function that returns a torch module.

The module takes uint8 images [B, 3, H, W] and returns features [B, d], or a dict of named outputs
("features", "logits").

A cache knows it by its weights and by the files that define it, so features of an edited one are not reused.
"""

import hashlib
import importlib
import sys
from pathlib import Path

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
        found = found if isinstance(found, dict) else {"features": found}
        for key, value in found.items():
            if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != len(x):
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                wrong = f"{name}: {key} of {len(x)} images is {shape}"
                raise UserError("--weights", wrong, "return a tensor [B, d]")
        return found

    known = hashlib.sha256(f"{where} {state_checksum(net)}".encode())
    for file in _sources(net, module):
        known.update(Path(file).read_bytes())
    return Encoder(name, net, lambda images: images, "the module's own", known.hexdigest(), run)


def _sources(net: nn.Module, module: str) -> list[str]:
    """Files of the user's that say what a network computes: that of the function, and those of the classes of
    its parts that are no part of torch.
    """
    names = {module} | {type(part).__module__ for part in net.modules()}
    own = [sys.modules[n] for n in sorted(names) if n in sys.modules and n.partition(".")[0] != "torch"]
    files = [getattr(one, "__file__", None) for one in own]
    return [file for file in files if file and Path(file).is_file()]
