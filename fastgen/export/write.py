"""What a user ships: an ordinary diffusers folder or LoRA file, which plain diffusers loads without us."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from fastgen import __version__
from fastgen.core.files import replace_folder, write_text
from fastgen.diffusion.schedules import TrigFlow
from fastgen.export import lora
from fastgen.export.load import Loaded, init_student, load_export, sample_command
from fastgen.export.lora import load_lora_into
from fastgen.export.model_card import members_card, model_card, read_command
from fastgen.export.scheduler import Serving, scheduler_for, serve
from fastgen.families.parts import part_name
from fastgen.networks import negative_prompts
from fastgen.networks.files import hub_folder
from fastgen.networks.teacher import Teacher
from fastgen.objectives import REGISTRY
from fastgen.roles.roles import Student, Students
from fastgen.roles.sana_sprint import shipped

__all__ = [
    "Loaded",
    "export_folder",
    "export_student",
    "init_student",
    "load_export",
    "load_lora_into",
    "sample_command",
    "scheduler_for",
]
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
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


def export_student(trainer, folder: Path, results: dict) -> Path:
    """Write the student as it stands (call inside the EMA swap), beside `folder` and then in its place."""
    teacher, student = shipped(trainer.cast.teacher, trainer.cast.parts["student"])
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    distilled = REGISTRY[trainer.cfg.all_stages()[-1].objective.name].few_step
    if distilled:
        served = serve(student, teacher)
    else:
        served = Serving(teacher.scheduler)
    info = describe(trainer, teacher, student, served, distilled)
    info["name"] = export_name(info, trainer.cfg.output_dir)
    dtype = export_dtype(trainer.cfg)
    told = results, read_command(Path(trainer.folder))
    if hasattr(student, "members"):
        _export_members(teacher, student, temporary, served, info, dtype, told)
    else:
        _export_one(teacher, student, temporary, served, info, dtype, told)
    return replace_folder(temporary, folder)


def export_dtype(cfg) -> torch.dtype:
    """The precision a run exports in: its own choice, else float16 for teachers and float32 for students."""
    chosen = cfg.train.export_dtype
    distilled = REGISTRY[cfg.all_stages()[-1].objective.name].few_step
    return torch.float16 if chosen == "no" and not distilled else DTYPES[chosen]


def write_cards(trainer, folder: Path, results: dict) -> None:
    """Write the cards of an export again, with the numbers that were measured since."""
    teacher, _ = shipped(trainer.cast.teacher, trainer.cast.parts["student"])
    command = read_command(Path(trainer.folder))
    for file in (folder / "fastgen.json", *sorted(folder.glob("student*/fastgen.json"))):
        info = json.loads(file.read_text())["export"]
        if "students" not in info:  # the folder of several students has a card without numbers
            files = {k: info[k] for k in ("lora", "kohya") if k in info}
            card = model_card(info["name"], teacher, info, results, command, files)
            write_text(file.parent / "README.md", card)


def _export_one(
    teacher: Teacher, student: Student, folder: Path, served: Serving, info: dict, dtype, told: tuple
) -> None:
    """One student's files and card."""
    name, files = info["name"], {}
    if student.adapter is None:
        document = _document(teacher, info)
        export_folder(teacher, student.backbone.net, folder, served.scheduler, document, dtype)
    else:
        files = _export_lora(teacher, student, folder, name, served, info, dtype)
        write_text(folder / "fastgen.json", json.dumps(_document(teacher, {**info, **files}), indent=2))
    if info["nasa"]:
        shutil.copyfile(negative_prompts.__file__, folder / "nasa.py")
    write_text(folder / "README.md", model_card(name, teacher, info, *told, files))


def _export_members(
    teacher: Teacher, students: Students, folder: Path, served: Serving, info: dict, dtype, told: tuple
) -> None:
    """A folder for each student, whole in itself, and the router that says whose condition is whose."""
    for j, member in enumerate(students.members):
        (folder / f"student{j}").mkdir()
        _export_one(teacher, member, folder / f"student{j}", served, info, dtype, told)
    students.router.save(folder)
    info = {**info, "students": len(students.members), "trained_students": students.trained}
    write_text(folder / "fastgen.json", json.dumps(_document(teacher, info), indent=2))
    write_text(folder / "README.md", members_card(info, students.router))


def export_name(info: dict, output_dir: str) -> str:
    """<base>-<objective>-<N>step, or the run's name where nothing was distilled."""
    base = Path(info["base"].replace(":", "/")).name
    if not info["times"]:
        return base or Path(output_dir).name
    return f"{base}-{info['objective']}-{info['steps']}step"


def describe(trainer, teacher: Teacher, student: Student, served: Serving, distilled: bool) -> dict:
    """What a file must say about itself, so that nothing needs to be remembered to sample it."""
    cfg, last = trainer.cfg, trainer.cfg.all_stages()[-1].objective
    return {
        "version": __version__,
        "objective": "+".join(dict.fromkeys(s.objective.name for s in cfg.all_stages())),
        "student": "lora" if student.adapter else "full",
        "steps": len(student.times) if distilled else cfg.teacher.num_steps,
        "times": [float(t) for t in student.times] if distilled else None,
        "sampler": student.sampler,
        "scheduler": _plain(served.scheduler),
        "arguments": served.arguments,
        "step": served.step,
        "gamma": student.gamma,
        "grid": student.grid,
        "others": other_steps(cfg, teacher, student, served) if distilled else {},
        "needs_loop": served.needs_loop,
        "bound": served.bound,
        "embedded_guidance": getattr(teacher.codec, "guidance", None),
        "gaps": gaps(student) if distilled else None,
        "nasa": getattr(cfg.all_stages()[-1].objective, "nasa_scale", 0.0),
        "guidance": REGISTRY[last.name].learned_guidance(last, cfg.student_guidance),
        "guidance_range": student.guidance_range and list(student.guidance_range),
        "steps_as_guidance": student.steps_as_guidance,
        "base": cfg.teacher.path if distilled or student.adapter else "",
        "teacher_steps": cfg.teacher.num_steps,
        "teacher_scheduler": _plain(teacher.scheduler),
        "trained_steps": trainer.step,
    }


def gaps(student: Student) -> list[float] | None:
    """What the extra input channel of a two-time network is filled with at each step."""
    if not getattr(student.backbone, "second_time", False):
        return None
    times = torch.tensor([student.times, student.ends()], dtype=torch.float64)
    return student.schedule.gap(times[0], times[1]).tolist()


def other_steps(cfg, teacher: Teacher, student: Student, served: Serving) -> dict[str, dict]:
    """For each other step count of one model, what to change in the scheduler and what to pass: of a student
    trained on a grid, or of a SANA-Sprint student, trained at all times.
    """
    objective, own, found = cfg.all_stages()[-1].objective, _plain(served.scheduler), {}
    for num in (1, 2, 4, 8):
        refused = REGISTRY[objective.name].unsampled(objective, num, student.sampler)
        most = 4 if isinstance(teacher.schedule, TrigFlow) else student.grid
        if num == len(student.times) or num > most or refused:
            continue
        other = serve(student.taking(num), teacher)
        changed = {k: v for k, v in _plain(other.scheduler).items() if own.get(k) != v}
        given = {"sigmas": student.taking(num).times} if other.needs_loop else other.arguments
        if student.steps_as_guidance:
            given = {"num_inference_steps": num, **given, "guidance_scale": float(num)}
        found[str(num)] = {"scheduler": changed, "arguments": given}
    return found


def _plain(scheduler) -> dict:
    """A scheduler's config as JSON values."""
    config = {"_class_name": type(scheduler).__name__, **scheduler.config}
    kept = {k: v for k, v in config.items() if k == "_class_name" or not k.startswith("_")}
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in kept.items()}


def _document(teacher: Teacher, info: dict) -> dict:
    """fastgen.json: what the teacher's said (patch, classes, ...), and this export's own description."""
    return {**(teacher.info or {}), "export": info}


def export_folder(
    teacher: Teacher, net: nn.Module, folder: Path, scheduler, info: dict, dtype=torch.float32
) -> Path:
    """Write `net` with a scheduler and the teacher's other parts as a diffusers folder."""
    family = teacher.backbone.family
    folder.mkdir(parents=True, exist_ok=True)
    parts = family.parts(net)
    for name, part in parts.items():
        _save_net(part, folder / name, dtype)
    scheduler.save_pretrained(folder / "scheduler")
    source = hub_folder(teacher.path, False) if teacher.path else None
    index = _index(teacher)
    others = [k for k, v in index.items() if isinstance(v, list) and k not in (*parts, "scheduler")]
    index |= {
        "_class_name": index["_class_name"]
        if index.get("_class_name") in family.pipelines
        else family.pipeline,
        "_diffusers_version": version("diffusers"),
        **{name: ["diffusers", type(part).__name__] for name, part in parts.items()},
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    for part in dict.fromkeys((*others, *COPIED)):
        if source is not None and (source / part).is_dir():
            if (source / part).resolve() != (folder / part).resolve():
                pickles = shutil.ignore_patterns("*.bin", "*.pt", "*.pth", "*.ckpt")
                shutil.copytree(source / part, folder / part, dirs_exist_ok=True, ignore=pickles)
            if part not in index:
                index[part] = _library_class(source / part, part)
    index |= family.index_extra
    write_text(folder / "model_index.json", json.dumps(index, indent=2))
    write_text(folder / "fastgen.json", json.dumps(info, indent=2))
    return folder


def _index(teacher: Teacher) -> dict:
    """The model_index.json of the teacher's folder, if it has one."""
    file = hub_folder(teacher.path, False) / "model_index.json" if teacher.path else None
    return json.loads(file.read_text()) if file is not None and file.is_file() else {}


def _save_net(net: nn.Module, folder: Path, dtype) -> None:
    """save_pretrained in one dtype (it shards large models), without touching the network in use."""
    before = {p.dtype for p in net.parameters()}
    if before == {dtype}:
        net.save_pretrained(folder, safe_serialization=True)
    else:
        copied = type(net).from_config(net.config)
        copied.load_state_dict(net.state_dict())
        nn.Module.to(copied, dtype).save_pretrained(folder, safe_serialization=True)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner only


def _export_lora(
    teacher: Teacher, student: Student, folder: Path, name: str, served: Serving, info: dict, dtype
) -> dict:
    """LoRA file (and kohya twin where tools read one), scheduler, merged folder where no loader exists."""
    family, net = teacher.backbone.family, student.backbone.net
    told = bool(info["guidance_range"] or info["gaps"])  # plain diffusers cannot add such an input
    loads = family.lora_loader and not told
    files, base = {"lora": f"{name}-lora.safetensors"}, family.parts(net)
    for i, (part, adapted) in enumerate(family.adapted(net).items()):
        layers = lora.collect(adapted, student.adapter)
        if not any(b.any() for _, b in layers.values()):
            print(f"warning: export: the adapter of {part} is still zero; it equals the teacher's")
        header = _header(name, family, info, layers)
        file = folder / (part_name(files["lora"], part) if i else files["lora"])
        lora.write_peft(file, layers, family.component, header, dtype)
        if not i and family.reads_kohya(layers) and not told:
            twin = folder / f"{name}-lora-kohya.safetensors"
            files["kohya"] = lora.write_kohya(twin, layers, family.kohya_prefix, header, dtype).name
        base[part] = lora.without_adapters(adapted)
        _verify(base[part], file, layers, dtype)
        if not loads:
            lora.merge(base[part], layers)
    served.scheduler.save_pretrained(folder / "scheduler")
    if not loads:
        whole = family.assemble(base, _index(teacher))
        export_folder(teacher, whole, folder / "merged", served.scheduler, _document(teacher, info), dtype)
    return files


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


def _header(name: str, family, info: dict, layers: lora.Layers) -> dict[str, str]:
    """Metadata that hubs and user interfaces show, and ours."""
    steps, scheduler = info["steps"], info["scheduler"]["_class_name"]
    w = f"{info['guidance']:.1f}" if info["guidance_range"] else "1.0"
    kinds = {"epsilon": "epsilon", "v_prediction": "v"}
    found = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": name,
        "modelspec.architecture": f"{family.net_class}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": kinds.get(info["scheduler"].get("prediction_type", ""), ""),
        "modelspec.usage_hint": f"{steps} step{'s' if steps > 1 else ''}, guidance {w}, {scheduler}",
        "ss_base_model_version": family.name,
        "ss_network_dim": str(max(a.shape[0] for a, _ in layers.values())),
        "ss_network_alpha": str(max(a.shape[0] for a, _ in layers.values())),
        "fastgen": json.dumps(info),
    }
    return {k: v for k, v in found.items() if v}


def _library_class(folder: Path, part: str) -> list[str]:
    """[library, class] of a component as model_index.json wants it."""
    if part.startswith("tokenizer"):
        return ["transformers", json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]]
    config = json.loads((folder / "config.json").read_text())
    if "architectures" in config:
        return ["transformers", config["architectures"][0]]
    return ["diffusers", config["_class_name"]]
