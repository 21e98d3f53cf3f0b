"""Exports of adapters that take the guidance scale (AGD): one file, and its loader for plain diffusers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastgen.core.files import write_tensors
from fastgen.export.info import ExportInfo
from fastgen.networks import guidance_adapters
from fastgen.networks.backbone import Backbone
from fastgen.roles.roles import Role, Student


def is_guidance_adapter(role: Role) -> bool:
    """Whether a role's adapter is one that takes the guidance scale (AGD), and no LoRA."""
    control = getattr(role.backbone, "guidance_control", None)
    return control is not None and role.adapter in control.names


def write_guidance_adapter(student: Student, folder: Path, scheduler: Any, info: ExportInfo) -> ExportInfo:
    """The adapters' file, its loader and the scheduler; `info` with the name of the file."""
    network = student.backbone
    assert isinstance(network, Backbone) and network.guidance_control is not None, "it is a guidance adapter"
    (net,) = network.family.adapted(network.net).values()
    mark = f".{guidance_adapters.ATTRIBUTE}.{student.adapter}."
    state = {k: v for k, v in net.state_dict().items() if mark in k}
    tensors = {k.replace(mark, f".{guidance_adapters.ATTRIBUTE}."): v.float() for k, v in state.items()}
    info = replace(info, guidance_adapter=f"{info.name}-guidance-adapter.safetensors")
    settings = {**network.guidance_control.settings, "guidance": info.guidance}
    header = {"fastgen": json.dumps(info.to_json()), guidance_adapters.HEADER: json.dumps(settings)}
    write_tensors(folder / info.guidance_adapter, tensors, header)
    shutil.copyfile(guidance_adapters.__file__, folder / "guidance_adapter.py")
    scheduler.save_pretrained(folder / "scheduler")
    return info
