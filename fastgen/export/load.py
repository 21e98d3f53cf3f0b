"""Exports read back: for sample.py, for measuring, and to start the next run from."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastgen.core.errors import UserError
from fastgen.core.paths import PACKAGE, resolve
from fastgen.export import lora
from fastgen.networks.load import load_teacher
from fastgen.networks.teacher import Teacher
from fastgen.roles.roles import Role, Student, Students
from fastgen.roles.router import Router
from fastgen.roles.sana_sprint import is_sprint, make_sprint

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass
class Loaded:
    """A generator on disk made ready: `role` is a Student with its time list, or the Role of a teacher."""

    role: Role
    teacher: Teacher
    """the network's codec, schedule and scheduler (a full student's folder repeats them)"""
    info: dict = field(default_factory=dict)
    """the export's description; empty for a folder that fastgen did not write"""
    path: str = ""

    @property
    def is_student(self) -> bool:
        return isinstance(self.role, Student)

    @property
    def codec(self):
        return self.teacher.codec

    def to(self, device, dtype=torch.float32) -> "Loaded":
        """Move everything; the denoiser alone takes `dtype`."""
        self.teacher.to(device)
        for role in getattr(self.role, "members", [self.role]):
            role.backbone.to(device)
            if dtype != torch.float32 and hasattr(role.backbone, "net"):
                torch.nn.Module.to(role.backbone.net, dtype)
        return self

    def reference(self) -> "Loaded":
        """The teacher this student was distilled from: adapters off, or the folder the export names."""
        if self.role.adapter is not None:
            return Loaded(Role(self.role.backbone), self.teacher, self.info, self.info.get("base", ""))
        if not self.info.get("base"):
            found = f"{self.path} does not name a teacher"
            raise UserError("--compare_teacher", found, "only fastgen exports do")
        return Loaded(*_as_role(load_teacher(self.info["base"])), self.info, self.info["base"])


def _as_role(teacher: Teacher) -> tuple[Role, Teacher]:
    teacher.backbone.requires_grad_(False).eval()
    return Role(teacher.backbone), teacher


def locate(path: str | Path, key: str = "--model") -> Path | None:
    """The export behind a path (a run folder stands for its export/); None for a hub id or exact teacher."""
    text = str(path)
    if text.startswith("analytic:"):
        return None
    try:
        found = resolve(text)
    except FileNotFoundError as error:
        raise UserError(key, str(error), "a bundled asset that exists") from None
    if found.suffix in PICKLES:
        raise UserError(key, f"{found} is a pickled checkpoint", "fastgen reads .safetensors files only")
    if (found / "config.yaml").is_file():
        if not (found / "export").is_dir():
            raise UserError(key, f"{found} is a run without an export", "let it end, or --resume it")
        return found / "export"
    if not found.exists():
        if found.suffix != ".safetensors" and text.count("/") == 1 and not text.startswith(("/", ".")):
            return None
        raise UserError(key, f"{found} does not exist", "an export folder, a LoRA file or a teacher folder")
    return found


def load_export(path: str | Path, base: str | None = None, key: str = "--model") -> Loaded:
    """A student (or teacher) from an export folder, LoRA file, run folder, or any teacher path.

    A LoRA stands on the base its header names unless `base` says another.
    """
    found = locate(path, key)
    if found is None:
        return Loaded(*_as_role(load_teacher(str(path))), {}, str(path))
    if found.is_file():
        return _load_lora(found, base, key)
    file = found / "fastgen.json"
    info = _read(file, key).get("export", {}) if file.is_file() else {}
    if "students" in info:
        return _load_members(found, info, base, key)
    if "lora" in info:
        return _load_lora(found / info["lora"], base, key)
    if not any((found / part).is_dir() for part in ("unet", "transformer", "prior")):
        pickles = [f.name for f in found.iterdir() if f.suffix in PICKLES]
        what = f"holds only pickled weights ({pickles[0]})" if pickles else "holds no network"
        raise UserError(key, f"{found} {what}", "an export folder, a LoRA .safetensors or a teacher folder")
    role, teacher = _as_role(load_teacher(str(found)))
    if info.get("times"):
        role = _student(role.backbone, None, info, key)
        if role.guidance_range:
            teacher.codec.guidance = None  # the student itself says what it is told
    return Loaded(role, teacher, info, str(path))


def _load_members(found: Path, info: dict, base: str | None, key: str) -> Loaded:
    """Several students and their router."""
    router = Router.load(found, key)
    loaded = [load_export(found / f"student{j}", base, key) for j in range(info["students"])]
    return Loaded(Students([one.role for one in loaded], router), loaded[0].teacher, info, str(found))


def _student(backbone, adapter: str | None, info: dict, key: str) -> Student:
    """The student an export describes, with its time list."""
    scheduler = info.get("scheduler", {})
    name, original = scheduler.get("_class_name", ""), scheduler.get("original_inference_steps")
    if name in ("LCMScheduler", "TCDScheduler") and not original:
        found = f"the {name} of this export names no original_inference_steps"
        raise UserError(key, found, "without it its times are unknown; export the run again")
    times, gamma, grid = list(info["times"]), info.get("gamma", 0.0), info.get("grid", 0)
    student = Student(backbone, adapter, times, info["sampler"], gamma, grid)
    if info.get("guidance_range"):
        student.steps_as_guidance = info.get("steps_as_guidance", False)
        student.guidance_range = tuple(info["guidance_range"])
        student.guidance = float(len(times) if student.steps_as_guidance else info["guidance"])
    return student


def _read(file: Path, key: str) -> dict:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(key, f"{file} is not valid JSON ({error})", "") from None


def _load_lora(file: Path, base: str | None, key: str) -> Loaded:
    info = lora.read_lora(file, key)[1]
    base = base or info.get("base")
    if not base:
        raise UserError("--base", f"{file} does not name its base", "give the teacher's folder with --base")
    if "times" not in info:
        raise UserError(key, f"{file} was not written by fastgen", "its header lacks the steps to take")
    role, teacher = _as_role(load_teacher(base))
    backbone = role.backbone
    if not hasattr(backbone, "net"):
        raise UserError("--base", f"{base} has no weights to adapt", "a diffusers folder")
    if info.get("gaps"):
        backbone.add_second_time()
    if info.get("guidance_range"):
        backbone.add_guidance()
    parts = backbone.family.adapted(backbone.net)
    for part, layers in lora.read_parts(file, parts, key).items():
        lora.inject(parts[part], layers, "student")
    backbone.adapter_names += ("student",)
    backbone.set_adapter(None)
    backbone.requires_grad_(False)
    role = Role(backbone, "student")
    if info["times"]:
        role = _student(backbone, "student", info, key)
    return Loaded(role, teacher, info, str(file))


@torch.no_grad()
def init_student(student: Role, path: str) -> None:
    """Start a student from an export: a folder's weights, or a LoRA (into an adapter, or merged)."""
    key = "student.init"
    found = locate(path, key)
    if found is None:
        raise UserError(key, f"{path!r} is not an export on this disk", "an export folder or a LoRA file")
    document = _read(found / "fastgen.json", key) if (found / "fastgen.json").is_file() else {}
    file = found if found.is_file() else found / document.get("export", {}).get("lora", "")
    if not hasattr(student.backbone, "net"):
        raise UserError(key, f"found {path} for the student of an exact teacher", "leave it empty")
    if file.is_file():
        parts = student.backbone.family.adapted(student.backbone.net)
        for part, layers in lora.read_parts(file, parts, key).items():
            if student.adapter is None:
                lora.check_keys(parts[part], layers, key)
                lora.merge(parts[part], layers)
            else:
                lora.put(parts[part], layers, student.adapter, key)
    elif student.adapter is not None:
        found = f"{path} is a full network and the student a LoRA"
        raise UserError(key, found, "give a LoRA file, or set student.kind full")
    else:
        _init_full(student, str(found), key)


def _init_full(student: Role, path: str, key: str) -> None:
    net, source = student.backbone.net, load_teacher(path).backbone
    if getattr(student.backbone, "second_time", False):
        source.add_second_time()
    if is_sprint(student.backbone) and source.family.name == "sana":
        make_sprint(source)
    elif student.guidance is not None:
        source.add_guidance()
    state = source.net.state_dict()
    own = net.state_dict()
    wrong = [n for n in {**own, **state} if n not in own or n not in state or own[n].shape != state[n].shape]
    if wrong:
        found = f"{path} is another network ({wrong[0]} differs)"
        raise UserError(key, found, "an export of a student of this teacher")
    net.load_state_dict(state)


@torch.no_grad()
def fuse(own: dict[str, torch.Tensor], path: str, weight: float) -> None:
    """own <- weight own + (1 - weight) other, by name; other is the student at path, its LoRA merged
    (SwiftBrush v2, arXiv 2408.14176, Sec. 4.4).
    """
    key = "student.fuse"
    other = load_export(path, key=key)
    net = other.role.backbone.net
    if other.role.adapter is not None:
        layers = lora.collect(net, other.role.adapter)
        net = lora.without_adapters(net)
        lora.merge(net, layers)
    state = {f"net.{n}": p for n, p in net.state_dict().items()}
    wrong = [n for n, p in own.items() if n not in state or state[n].shape != p.shape]
    if wrong:
        raise UserError(key, f"{path} is another network ({wrong[0]} differs)", "a student of this teacher")
    for name, value in own.items():
        value.lerp_(state[name].to(value), 1 - weight)


def sample_command(path: str | Path) -> str:
    """The shell command that samples an export."""
    program = "python sample.py" if (PACKAGE.parent / "sample.py").is_file() else "fastgen-sample"
    folder = locate(path) or Path(path)
    text = folder.is_dir() and _text_to_image(folder)
    ask = ' --prompt "a red dress on a grey background"' if text else ""
    return f"{program} --model {shlex.quote(str(path))}{ask} --num_images 16 --out samples"


def _text_to_image(folder: Path) -> bool:
    if (folder / "tokenizer").is_dir():
        return True
    file = folder / "fastgen.json"
    document = json.loads(file.read_text()) if file.is_file() else {}
    base = document.get("export", {}).get("base", "")
    found = locate(base) if base and not base.startswith("analytic:") else None
    return found is not None and (found / "tokenizer").is_dir()
