"""What a user ships: an ordinary diffusers folder, or an ordinary LoRA file, that plain diffusers loads without us."""

import copy
import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from fastgen import __version__, lora
from fastgen.backbones import Teacher, load_teacher
from fastgen.checkpoint import write_text
from fastgen.errors import UserError
from fastgen.paths import resolve
from fastgen.roles import Role, Student
from fastgen.serving import Serving, scheduler_for

FAMILY_PREFIX = {"unet": "unet", "transformer": "transformer"}
NO_PIPELINE_LOADER = ("unet2d",)


@dataclass
class Loaded:
    """An export read back: the student, and the bundle (codec, scheduler, info) around it."""

    student: Student | None
    teacher: Teacher
    info: dict


def export_student(trainer, folder: Path, results: dict) -> Path:
    """Write the student (its current weights) for plain diffusers; the folder, or the LoRA file of a LoRA student."""
    from fastgen.cards import write_card

    cfg, cast = trainer.cfg, trainer.cast
    teacher, student = cast.teacher, cast.parts["student"]
    few_step = all(type_of(s).few_step for s in cfg.all_stages())
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if not few_step:
        net = lora.without_adapters(student.backbone.net) if student.adapter else student.backbone.net
        write_folder(teacher, net, temporary, teacher.scheduler, teacher.info or {}, torch.float16)
        write_text(temporary / "card.json", json.dumps(results, indent=2))
        return _replace(temporary, folder)
    serving = scheduler_for(student.times, student.sampler, student.schedule, teacher.scheduler)
    info = describe(cfg, trainer.step, student, serving)
    result = folder
    if student.adapter is None:
        write_folder(teacher, student.backbone.net, temporary, serving.scheduler, {**(teacher.info or {}), **info})
    else:
        result = folder / write_lora(cfg, teacher, student, serving, temporary, info).name
    write_card(temporary, cfg, teacher, student, serving, results)
    _replace(temporary, folder)
    return result


def type_of(stage):
    """The objective class of a stage."""
    from fastgen.objectives import REGISTRY

    return REGISTRY[stage.objective.name]


def describe(cfg, step: int, student: Student, serving: Serving) -> dict:
    """What sample.py needs to know, and what a reader wants to: kept in fastgen.json or the LoRA's header."""
    return {
        "version": __version__, "objective": cfg.all_stages()[-1].objective.name, "steps": len(student.times),
        "times": list(student.times), "sampler": student.sampler, "base": cfg.teacher.path,
        "guidance_baked_in": cfg.teacher.guidance, "guidance_scale": 1.0, "step": step,
        "scheduler": {**serving.scheduler.config, "_class_name": type(serving.scheduler).__name__},
        "scheduler_arguments": serving.arguments,
    }


def write_lora(cfg, teacher: Teacher, student: Student, serving: Serving, folder: Path, info: dict) -> Path:
    """The adapter as a PEFT file (and a kohya twin where tools read one); verified by reading it back."""
    family = teacher.backbone.family
    folder.mkdir(parents=True)
    layers = lora.collect(student.backbone.net, student.adapter)
    base = Path(cfg.teacher.path.split(":")[-1]).name
    name = f"{base}-{info['objective']}-{info['steps']}step-lora"
    header = {
        "fastgen": json.dumps(info, default=str), "modelspec.sai_model_spec": "1.0.1", "modelspec.title": name,
        "modelspec.architecture": f"{family.name}/lora",
        "modelspec.usage_hint": f"{info['steps']} steps, guidance 1.0, {info['scheduler']['_class_name']}",
    }
    file = lora.write_peft(folder / f"{name}.safetensors", layers, FAMILY_PREFIX[family.component], header)
    back, _ = lora.read_lora(file)
    assert all(torch.equal(a, b) for n in layers for a, b in zip(layers[n], back[n])), "the LoRA file reads back differently"
    if family.kohya_prefix:
        lora.write_kohya(folder / f"{name}-kohya.safetensors", layers, family.kohya_prefix, header)
    serving.scheduler.save_pretrained(folder / "scheduler")
    if family.name in NO_PIPELINE_LOADER:  # no pipeline reads a LoRA for this class: ship it merged as well
        merged = lora.without_adapters(student.backbone.net)
        lora.merge(merged, layers)
        write_folder(teacher, merged, folder / "merged", serving.scheduler, {**(teacher.info or {}), **info})
    return file


def write_folder(teacher: Teacher, net: nn.Module, folder: Path, scheduler, info: dict, dtype=torch.float32) -> Path:
    """`net` with a scheduler and the teacher's other parts as a diffusers folder."""
    family = teacher.backbone.family
    folder.mkdir(parents=True, exist_ok=True)
    shipped = copy.deepcopy(net).cpu()
    for parameter in (*shipped.parameters(), *shipped.buffers()):
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    shipped.save_pretrained(folder / family.component, safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": family.pipeline, "_diffusers_version": version("diffusers"),
        family.component: ["diffusers", family.net_class], "scheduler": ["diffusers", type(scheduler).__name__],
    }
    source = resolve(teacher.path) if teacher.path else None
    for part in ("vae", "text_encoder", "tokenizer"):
        if source is not None and (source / part).is_dir():
            shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
            index[part] = _library_class(source / part, part)
    if family.name == "sd":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    write_text(folder / "model_index.json", json.dumps(index, indent=2))
    write_text(folder / "fastgen.json", json.dumps(info, indent=2, default=str))
    return folder


def _replace(temporary: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return temporary.rename(folder)


def _library_class(folder: Path, part: str) -> list[str]:
    """[library, class] of a component as model_index.json wants it."""
    if part == "tokenizer":
        return ["transformers", json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]]
    config = json.loads((folder / "config.json").read_text())
    if "architectures" in config:
        return ["transformers", config["architectures"][0]]
    return ["diffusers", config["_class_name"]]


def load_export(path: str, base: str = "") -> Loaded:
    """Read an export folder, a LoRA file (over `base`, by default the one its header names) or a teacher folder."""
    where = Path(path)
    if where.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise UserError("--model", f"{path} is a pickle", "fastgen reads .safetensors files and folders only")
    if where.suffix == ".safetensors":
        if not where.is_file():
            raise UserError("--model", f"{path} does not exist", "a LoRA file or an export folder")
        layers, info = lora.read_lora(where, "--model")
        teacher = load_teacher(base or info.get("base", ""))
        lora.inject(teacher.backbone.net, layers, "student")
        teacher.backbone.adapter_names = ("student",)
        teacher.backbone.set_adapter(None)
        student = Student(teacher.backbone, "student", info.get("times") or teacher.schedule.steps(1), info.get("sampler", "renoise"))
        return Loaded(student, teacher, info)
    files = sorted(where.glob("*-lora.safetensors")) if where.is_dir() else []
    if files:
        return load_export(str(files[0]), base)
    teacher = load_teacher(path)
    info = teacher.info or {}
    student = Student(teacher.backbone, None, info["times"], info["sampler"]) if "times" in info else None
    return Loaded(student, teacher, info)


def load_base(loaded: Loaded, base: str = "") -> tuple[Teacher, Role]:
    """The teacher an export came from, for comparison."""
    if loaded.student is not None and loaded.student.adapter:
        return loaded.teacher, Role(loaded.teacher.backbone)
    teacher = load_teacher(base or loaded.info.get("base", ""))
    return teacher, Role(teacher.backbone)


@torch.no_grad()
def init_student(student: Student, path: str) -> None:
    """Start a student from an export: a LoRA file into its adapter, a folder into its copy."""
    where = Path(path)
    if student.adapter is not None:
        file = where if where.suffix == ".safetensors" else next(iter(sorted(where.glob("*-lora.safetensors"))), None)
        if file is None or not file.is_file():
            raise UserError("student.init", f"{path} holds no LoRA file", "a LoRA student starts from a LoRA export")
        lora.put(student.backbone.net, lora.read_lora(file, "student.init")[0], student.adapter, "student.init")
        return
    source = load_teacher(path).backbone.net
    if type(source) is not type(student.backbone.net):
        raise UserError("student.init", f"{path} holds a {type(source).__name__}", f"expected {type(student.backbone.net).__name__}")
    student.backbone.net.load_state_dict(source.state_dict())


def sample_command(path: Path) -> str:
    """The exact command that samples an export."""
    folder = path.parent if path.suffix else path
    info = json.loads((folder / "fastgen.json").read_text()) if (folder / "fastgen.json").exists() else {}
    if path.suffix:
        info = lora.read_lora(path)[1]
    text = (folder / "text_encoder").is_dir() or "tinted" in str(info.get("base", ""))
    ask = '--prompt "a red dress on a grey background"' if text else "--labels 0-9"
    return f"python sample.py --model {path} {ask} --num_images 40 --out out"
