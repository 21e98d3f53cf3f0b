"""An export as a pipeline object of diffusers: what its card's code does, done here."""

from pathlib import Path
from typing import Any

from fastgen.core.errors import UserError
from fastgen.core.paths import resolve
from fastgen.export.info import ExportInfo, read_info
from fastgen.export.scheduler import bind
from fastgen.export.snippet import call_keywords, hub_id
from fastgen.networks.guidance_adapters import load_guidance_adapter
from fastgen.networks.load import load_teacher
from fastgen.networks.teacher import Teacher
from fastgen.networks.tile_attention import load_tiles

KEY = "pipeline"


def _described(folder: Path) -> tuple[ExportInfo, Teacher]:
    """(what an export says of itself, its teacher without weights)."""
    info = read_info(folder, KEY)
    if info is None or info.num_students:
        raise UserError(KEY, f"{folder} is no export of one student", "give an export folder")
    stands = bool(info.lora or info.guidance_adapter)  # on its base
    source = info.base if stands else str(folder)
    teacher = load_teacher(source, weights=False, **(info.teacher_settings if stands else {}))
    if teacher.codec.pipe is None and not teacher.family.label_key:
        found = f"no pipeline of diffusers draws with {teacher.family.net_class}"
        raise UserError(KEY, found, "use fastgen.load_student, or the loop in the export's card")
    return info, teacher


def load_pipeline(folder: Path, **parts: Any) -> Any:
    """The pipeline of an export: its base with the LoRA on it, or its own folder. `parts` go to
    from_pretrained; without others it is in bfloat16 on CUDA where there is a GPU, else in float32.
    """
    import diffusers
    import torch

    gpu = torch.cuda.is_available()
    parts.setdefault("torch_dtype", torch.bfloat16 if gpu else torch.float32)

    info, teacher = _described(folder)
    own = bool(info.guidance_range or info.step_lengths)
    on_base = info.guidance_adapter or (info.lora and teacher.family.lora_loader and not own)
    if info.causal:
        raise UserError(KEY, "it goes block by block", "use the loop in its block_causal.py")
    if info.step_lengths:
        raise UserError(KEY, "its network reads the length of each step", "use fastgen.load_student")
    source: str | Path = folder / "merged" if info.lora else folder
    if on_base:
        source = hub_id(info.base) or resolve(info.base)
    pipe = getattr(diffusers, teacher.pipeline).from_pretrained(source, local_files_only=True, **parts)
    if on_base:
        scheduler = getattr(diffusers, info.scheduler_class)
        pipe.scheduler = scheduler.from_pretrained(folder, subfolder="scheduler")
    if on_base and info.lora:
        for call in teacher.family.lora_calls(info.lora, list(teacher.family.adapted(teacher.network.net))):
            pipe.load_lora_weights(folder, **call)
    if info.guidance_adapter:
        load_guidance_adapter(pipe, folder / info.guidance_adapter)
    if info.tiles:
        load_tiles(getattr(pipe, teacher.family.component), folder)
    if info.set_on_scheduler:
        bind(pipe.scheduler, info.timestep_arguments)
    return pipe.to("cuda") if gpu and "device_map" not in parts else pipe


def call_arguments(folder: Path) -> dict[str, Any]:
    """Keywords of the pipeline's call: size, steps or times, guidance."""
    info, teacher = _described(folder)
    return call_keywords(teacher.info or {}, teacher.family, teacher.codec, info)
