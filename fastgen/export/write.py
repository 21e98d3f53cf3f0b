"""What a user ships: an ordinary diffusers folder or LoRA file, which plain diffusers loads without us."""

import importlib
import json
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgen.core.copying import copy_inside, files_inside
from fastgen.core.errors import UserError, warn
from fastgen.core.files import replace_folder, write_model_json, write_text
from fastgen.core.reading import read_json
from fastgen.export import lora
from fastgen.export.comfyui import write_workflow
from fastgen.export.describe import Trained, describe, network_of
from fastgen.export.guidance_adapters import is_guidance_adapter, write_guidance_adapter
from fastgen.export.info import FILE, ExportInfo, read_info
from fastgen.export.kohya import write_kohya
from fastgen.export.model_card import SAMPLES, members_card, model_card
from fastgen.export.scheduler import SchedulerSetup, scheduler_setup
from fastgen.export.tiles import write_tiles
from fastgen.families.base import Family
from fastgen.families.parts import DiffusersModel, cast_network, part_name
from fastgen.networks import block_causal, negative_prompts
from fastgen.networks.files import OWN, hub_folder
from fastgen.networks.teacher import Teacher
from fastgen.networks.weight_files import drop_variant
from fastgen.roles.roles import Student, Students
from fastgen.roles.sana_sprint import as_exported

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.py")
"""files that a copied component leaves out: fastgen reads no pickles and publishes no code of others"""
COPIED = (
    "vae",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "image_encoder",
)


def export_student(trained: Trained, folder: Path, results: dict) -> Path:
    """Write the student as it stands (call inside the EMA swap), beside `folder` and then in its place."""
    teacher, student = as_exported(trained.teacher, trained.student)
    trained = replace(trained, teacher=teacher, student=student)
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    setup = SchedulerSetup(teacher.scheduler)
    if trained.few_step:
        setup = scheduler_setup(student, teacher)
    info = describe(trained, setup)
    if isinstance(student, Students):
        _export_members(trained, student, temporary, setup, info)
    else:
        _export_one(trained, student, temporary, setup, info)
    write_cards(temporary, teacher, results, trained.command, folder)
    return replace_folder(temporary, folder)


def _export_one(
    trained: Trained, student: Student, folder: Path, setup: SchedulerSetup, info: ExportInfo
) -> None:
    """One student's files."""
    teacher, dtype = trained.teacher, trained.dtype
    if is_guidance_adapter(student):
        info = write_guidance_adapter(student, folder, setup.scheduler, info)
        write_model_json(folder / FILE, _document(teacher, info))
    elif student.adapter is None:
        net = network_of(student).net
        export_folder(teacher, net, folder, setup.scheduler, _document(teacher, info), dtype)
    else:
        info = _export_lora(teacher, student, folder, setup, info, dtype)
        write_model_json(folder / FILE, _document(teacher, info))
    write_workflow(folder, teacher, info)
    if info.nasa_scale:
        shutil.copyfile(negative_prompts.__file__, folder / "nasa.py")
    if info.tiles:
        write_tiles(student, folder)
    if info.causal:
        shutil.copyfile(block_causal.__file__, folder / "block_causal.py")


def write_cards(
    folder: Path, teacher: Teacher, results: dict, command: list[str], place: Path | None = None
) -> None:
    """Write the cards of an export: with what was measured, and the pictures that are in its folder. `place`
    is where the folder will stand.
    """
    for file in (folder / FILE, *sorted(folder.glob(f"student*/{FILE}"))):
        info = read_info(file.parent, "export")
        if info is None or info.num_students:  # the folder of several has a card without numbers
            continue
        where = (place or folder) / file.parent.relative_to(folder)
        shown = (file.parent / SAMPLES).is_file()
        card = model_card(teacher, info, results, command, where, shown)
        write_text(file.parent / "README.md", card)


def _export_members(
    trained: Trained, students: Students, folder: Path, setup: SchedulerSetup, info: ExportInfo
) -> None:
    """A folder for each student, whole in itself, and the router that says whose condition is whose."""
    for j, member in enumerate(students.members):
        (folder / f"student{j}").mkdir()
        _export_one(trained, member, folder / f"student{j}", setup, info)
    students.router.save(folder)
    info = replace(info, num_students=len(students.members), trained_students=tuple(students.trained))
    write_model_json(folder / FILE, _document(trained.teacher, info))
    write_text(folder / "README.md", members_card(info, students.router))


def _document(teacher: Teacher, info: ExportInfo) -> dict[str, Any]:
    """fastgen.json: what the teacher's said (patch, classes, ...), and this export's own description."""
    return {**(teacher.info or {}), "export": info.to_json()}


def export_folder(
    teacher: Teacher, net: DiffusersModel, folder: Path, scheduler, document: dict, dtype=torch.float32
) -> Path:
    """Write `net`, a scheduler, the teacher's other parts and `document`, its fastgen.json, as a folder."""
    family = teacher.family
    folder.mkdir(parents=True, exist_ok=True)
    parts = family.parts(net)
    for name, part in parts.items():
        _save_net(part, folder / name, dtype)
        if module := OWN.get(type(part).__name__):
            file = importlib.import_module(module).__file__
            shutil.copyfile(str(file), folder / f"{_library(part)}.py")
    scheduler.save_pretrained(folder / "scheduler")
    source = hub_folder(teacher.path, False) if teacher.path else None
    index = _index(teacher)
    others = [k for k, v in index.items() if _is_part(k, v) and k not in (*parts, "scheduler")]
    index = {k: v for k, v in index.items() if not isinstance(v, list) or k in others}
    index |= {
        "_class_name": index["_class_name"]
        if index.get("_class_name") in family.pipelines
        else family.pipeline,
        "_diffusers_version": version("diffusers"),
        **{name: [_library(part), type(part).__name__] for name, part in parts.items()},
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    for part in dict.fromkeys((*others, *COPIED)):
        if source is not None and (source / part).is_dir():
            if (source / part).resolve() != (folder / part).resolve():
                for left_out in copy_inside(source / part, folder / part, source, PICKLES):
                    warn(f"export: not copied: {left_out}")
                drop_variant(folder / part)
            if part not in index:
                index[part] = _library_class(source / part, part)
    index |= family.index_extra
    write_model_json(folder / "model_index.json", index)
    write_model_json(folder / FILE, document)
    return folder


def _library(part: nn.Module) -> str:
    """What the class of a part is imported from: diffusers, or the file of ours that lies beside it."""
    return OWN.get(type(part).__name__, "diffusers").rsplit(".", 1)[-1]


def _index(teacher: Teacher) -> dict:
    """The model_index.json of the teacher's folder, if it has one, with what its blueprint says instead."""
    file = hub_folder(teacher.path, False) / "model_index.json" if teacher.path else None
    found = read_json(file, "teacher.path") if file is not None and file.is_file() else {}
    return found | (teacher.index or {})


def _is_part(name: str, entry: object) -> bool:
    """Whether an entry of a model_index.json names a folder beside it: never a path that leads elsewhere."""
    return name.isidentifier() and isinstance(entry, list)


def check_copied(teacher: Teacher) -> None:
    """Refuse, before anything is trained, a teacher with parts that an export could not copy whole. Of a
    teacher that is known by its published configs alone (--dry_run) there is nothing to copy yet.
    """
    try:
        source = hub_folder(teacher.path, False) if teacher.path else None
    except UserError:
        return
    family = teacher.family
    named = [k for k, v in _index(teacher).items() if _is_part(k, v)]
    for part in dict.fromkeys((*named, *COPIED)):
        if source is None or part in (family.component, *family.extra) or not (source / part).is_dir():
            continue
        for path, why in files_inside(source / part, source):
            if why:
                found = f"{path} is {why}, and an export copies what is inside of the folder only"
                raise UserError("teacher.path", found, "put the file itself in its place")


def _save_net(net: Any, folder: Path, dtype) -> None:
    """save_pretrained in one dtype (it shards large models), without touching the network in use."""
    as_files = all(p.dtype == dtype and p.is_contiguous() for p in net.parameters())
    if as_files:
        net.save_pretrained(folder, safe_serialization=True)
    else:
        copied = type(net).from_config(net.config)
        copied.load_state_dict(net.state_dict())
        cast_network(copied, dtype).save_pretrained(folder, safe_serialization=True)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner only


def _export_lora(
    teacher: Teacher, student: Student, folder: Path, setup: SchedulerSetup, info: ExportInfo, dtype
) -> ExportInfo:
    """LoRA file (and kohya twin where tools read one), scheduler, merged folder where no loader exists;
    `info` with the names of the files.
    """
    family, net, name, adapter = teacher.family, network_of(student).net, info.name, str(student.adapter)
    extra_input = bool(info.guidance_range or info.step_lengths)  # which plain diffusers cannot add
    loads = family.lora_loader and not extra_input
    described, file_name, base = info, f"{name}-lora.safetensors", family.parts(net)
    info = replace(info, lora=file_name)
    for i, (part, adapted) in enumerate(family.adapted(net).items()):
        layers = lora.collect(adapted, adapter)
        if not any(b.any() for _, b in layers.values()):
            print(f"warning: export: the adapter of {part} is still zero; it equals the teacher's")
        header = _header(family, described, layers)
        file = folder / (part_name(file_name, part) if i else file_name)
        lora.write_peft(file, layers, family.component, header, dtype)
        if not i and family.reads_kohya(layers) and not extra_input:
            twin = folder / f"{name}-lora-kohya.safetensors"
            write_kohya(twin, layers, family.kohya_prefix or "", header, dtype)
            info = replace(info, kohya=twin.name)
        _verify(lora.shape_of(adapted), file, layers, dtype)
        if not loads:
            base[part] = lora.without_adapters(adapted)
            lora.merge(base[part], layers)
    setup.scheduler.save_pretrained(folder / "scheduler")
    if not loads:
        export_parts(teacher, base, folder / "merged", setup.scheduler, described, dtype)
    return info


def export_parts(
    teacher: Teacher, parts: dict, folder: Path, scheduler, info: ExportInfo | None, dtype=torch.float32
) -> Path:
    """Write networks by component folder, adapters merged, as the denoiser of a whole folder."""
    document = _document(teacher, info) if info else dict(teacher.info or {})
    whole = teacher.family.assemble(parts, _index(teacher))
    return export_folder(teacher, whole, folder, scheduler, document, dtype)


def _verify(base: nn.Module, file: Path, layers: lora.Layers, dtype) -> None:
    """Read the file back: every key must name a layer of the base, every value must be the trained one."""
    again, _ = lora.read_lora(file)
    lora.check_keys(base, again)
    if set(again) != set(layers):
        raise RuntimeError(f"{file} does not hold the layers it was given")
    for name, pair in again.items():
        for read, written in zip(pair, layers[name]):
            if not torch.equal(read, written.to(dtype).float()):
                raise RuntimeError(f"{file}: {name} reads back differently")


def _header(family: Family, info: ExportInfo, layers: lora.Layers) -> dict[str, str]:
    """Metadata that hubs and user interfaces show, and ours."""
    steps, scheduler = info.steps, info.scheduler_class
    w = f"{info.guidance:.1f}" if info.guidance_range else "1.0"
    kinds = {"epsilon": "epsilon", "v_prediction": "v"}
    found = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": info.name,
        "modelspec.architecture": f"{family.net_class}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": kinds.get(info.scheduler.get("prediction_type", ""), ""),
        "modelspec.usage_hint": f"{steps} step{'s' if steps > 1 else ''}, guidance {w}, {scheduler}",
        "ss_base_model_version": family.name,
        "ss_network_dim": str(max(a.shape[0] for a, _ in layers.values())),
        "ss_network_alpha": str(max(a.shape[0] for a, _ in layers.values())),
        "fastgen": json.dumps(info.to_json()),
    }
    return {k: v for k, v in found.items() if v}


def _library_class(folder: Path, part: str) -> list[str]:
    """[library, class] of a component as model_index.json wants it."""
    if part.startswith("tokenizer"):
        config = read_json(folder / "tokenizer_config.json", "teacher.path")
        return ["transformers", config["tokenizer_class"]]
    config = read_json(folder / "config.json", "teacher.path")
    if "architectures" in config:
        return ["transformers", config["architectures"][0]]
    return ["diffusers", config["_class_name"]]
