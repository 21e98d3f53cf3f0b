"""Parts of a pipeline laid out from published configs on the meta device: sizes without numbers."""

import torch
from torch import nn

from fastgen.core.errors import UserError, first_line


def lay_out(codec, configs: dict[str, dict], dtype=torch.float32) -> None:
    """Give a codec the autoencoder and text encoders of these configs, so that their memory is counted."""
    for name, config in configs.items():
        part = _build(name, config, dtype)
        if name == codec.family.decoder:
            codec.vae = part
        else:
            codec.encoders[name] = part


def _build(name: str, config: dict, dtype) -> nn.Module:
    import diffusers
    import transformers

    given = dict(config)
    cls = given.pop("_class_name", "")
    try:
        with torch.device("meta"):
            if hasattr(diffusers, cls):
                part = getattr(diffusers, cls).from_config(given)
            else:
                kind = getattr(transformers, cls)
                part = kind(kind.config_class(**given))
    except Exception as error:  # whatever a constructor raises
        told = f"{cls or 'a class that is not named'} refuses it ({first_line(error)})"
        raise UserError(f"teacher.layout.codec.{name}", told, "mend the config") from None
    return nn.Module.to(part, dtype).requires_grad_(False).eval()
