"""What a user ships: an ordinary diffusers folder, or an ordinary LoRA file, that plain diffusers loads without us."""

import json
import shutil
from pathlib import Path

import torch

from fastgen.backbones import Teacher
from fastgen.checkpoint import write_text
from fastgen.paths import resolve


def export_folder(teacher: Teacher, net, folder: Path, scheduler, info: dict, dtype=torch.float32) -> Path:
    """Write `net` with a scheduler and the teacher's other parts as a diffusers folder."""
    import copy

    family = teacher.backbone.family
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(net).to("cpu", dtype).save_pretrained(folder / family.component, safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": family.pipeline,
        "_diffusers_version": _version("diffusers"),
        family.component: ["diffusers", family.net_class],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    source = resolve(teacher.path) if teacher.path else None
    for part in ("vae", "text_encoder", "tokenizer"):
        if source is not None and (source / part).is_dir():
            if (source / part).resolve() != (folder / part).resolve():
                shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
            index[part] = _library_class(source / part, part)
    if family.name == "sd":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    write_text(folder / "model_index.json", json.dumps(index, indent=2))
    write_text(folder / "fastgen.json", json.dumps(info, indent=2))
    return folder


def _version(library: str) -> str:
    from importlib.metadata import version

    return version(library)


def _library_class(folder: Path, part: str) -> list[str]:
    """[library, class] of a component as model_index.json wants it."""
    if part == "tokenizer":
        return ["transformers", json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]]
    config = json.loads((folder / "config.json").read_text())
    if "architectures" in config:
        return ["transformers", config["architectures"][0]]
    return ["diffusers", config["_class_name"]]
