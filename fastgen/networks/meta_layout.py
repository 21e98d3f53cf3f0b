"""Autoencoder and text encoders built from published configs on the meta device: shapes without weights."""

from typing import Any

import torch
from torch import nn

from fastgen.core.errors import UserError, first_line


def build_on_meta(codec: Any, configs: dict[str, dict], dtype: torch.dtype = torch.float32) -> None:
    """Give a codec the autoencoder and text encoders of these configs, for their memory in --dry_run."""
    for name, config in configs.items():
        part = _build(name, config, dtype)
        if name == codec.family.decoder:
            codec.vae = part
        else:
            codec.encoders[name] = part


def _build(name: str, config: dict, dtype: torch.dtype) -> nn.Module:
    import diffusers
    import transformers

    settings = dict(config)
    cls = settings.pop("_class_name", "")
    try:
        with torch.device("meta"):
            if hasattr(diffusers, cls):
                part = getattr(diffusers, cls).from_config(settings)
            else:
                kind = getattr(transformers, cls)
                part = kind(kind.config_class(**settings))
    except Exception as error:  # constructors raise errors of many types
        found = f"{cls or 'a class without _class_name'} cannot be built from it ({first_line(error)})"
        instruction = "correct it by the model's published config.json"
        raise UserError(f"teacher.layout.codec.{name}", found, instruction) from None
    return nn.Module.to(part, dtype).requires_grad_(False).eval()
