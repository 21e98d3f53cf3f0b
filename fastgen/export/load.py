"""Exports read back: for sample.py, for measuring, and to start the next run from."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastgen.core.errors import UserError, first_line
from fastgen.core.paths import PACKAGE, inside, is_analytic, resolve
from fastgen.core.reading import parse_json, reads_model
from fastgen.export import lora
from fastgen.export.info import ExportInfo, read_info
from fastgen.export.snippet import PROMPT
from fastgen.export.tiles import take_tiles
from fastgen.families.parts import cast_network
from fastgen.networks import guidance_adapters
from fastgen.networks.backbone import Backbone
from fastgen.networks.codecs import Codec
from fastgen.networks.denoiser import Denoiser
from fastgen.networks.guidance_adapters import load_guidance_adapter
from fastgen.networks.load import RECORDED, load_teacher
from fastgen.networks.teacher import Teacher
from fastgen.networks.tile_attention import FILE as TILES
from fastgen.networks.weight_files import PICKLES
from fastgen.roles.causal import make_student
from fastgen.roles.roles import Role, Student, Students, StudentSpec
from fastgen.roles.router import Router
from fastgen.roles.sana_sprint import is_sprint, make_sprint


@dataclass
class Loaded:
    """A generator on disk made ready: `role` is a Student with its time list, or the Role of a teacher."""

    role: Role
    teacher: Teacher
    """the network's codec, schedule and scheduler (a full student's folder repeats them)"""
    info: ExportInfo | None = None
    """the export's description; None for a folder that fastgen did not write"""
    path: str = ""
    size: dict[str, Any] = field(default_factory=dict)
    """height, width and num_frames that were asked for in place of its own"""

    @property
    def is_student(self) -> bool:
        return isinstance(self.role, Student)

    @property
    def student(self) -> Student:
        """The role of a loaded student; TypeError for a teacher."""
        if not isinstance(self.role, Student):
            raise TypeError(f"{self.path} is no student")
        return self.role

    @property
    def codec(self) -> Codec:
        return self.teacher.codec

    def to(self, device, dtype=torch.float32) -> "Loaded":
        """Move everything; the denoiser alone takes `dtype`."""
        self.teacher.to(device)
        for role in self.role.members:
            role.backbone.to(device)
            if dtype != torch.float32 and isinstance(role.backbone, Backbone):
                cast_network(role.backbone.net, dtype)
        return self

    def reference(self) -> "Loaded":
        """The teacher this student was distilled from: adapters off, or the folder the export names."""
        base = self.info.base if self.info else ""
        if self.role.adapter is not None:
            return Loaded(Role(self.role.backbone), self.teacher, self.info, base)
        if not base:
            found = f"{self.path} does not name a teacher"
            raise UserError("--compare_teacher", found, "leave it out; only exports of fastgen name one")
        settings = _settings(self.info, self.teacher) | self.size
        return Loaded(*_as_role(load_teacher(base, **settings)), self.info, base)


def _settings(info: ExportInfo | None, teacher: Teacher | None = None) -> dict[str, Any]:
    """The settings that an export records of its teacher: sizes, embedded guidance, a declared family."""
    found = dict(info.teacher_settings if info else {})
    found = found or {k: v for k, v in ((teacher.info or {}) if teacher else {}).items() if k in RECORDED}
    wrong = next((k for k in found if k not in RECORDED), None)
    if wrong is not None:
        raise UserError("--model", f"the export's teacher_settings has {wrong!r}", "export the run again")
    return found


def _as_role(teacher: Teacher) -> tuple[Role, Teacher]:
    teacher.backbone.requires_grad_(False).eval()
    return Role(teacher.backbone), teacher


def locate(path: str | Path, key: str = "--model") -> Path | None:
    """The export behind a path (a run folder stands for its export/); None for a hub id or exact teacher."""
    text = str(path)
    if is_analytic(text):
        return None
    try:
        found = resolve(text)
    except FileNotFoundError as error:
        raise UserError(key, str(error), "give a bundled asset that exists") from None
    if found.suffix in PICKLES:
        raise UserError(key, f"{found} is a pickled checkpoint", "fastgen reads .safetensors files only")
    if (found / "config.yaml").is_file():
        if not (found / "export").is_dir():
            raise UserError(
                key, f"{found} is a run without an export", "let the run end, or continue it with --resume"
            )
        return found / "export"
    if not found.exists():
        if found.suffix != ".safetensors" and text.count("/") == 1 and not text.startswith(("/", ".")):
            return None
        raise UserError(
            key, f"{found} does not exist", "give an export folder, a LoRA file or a teacher folder"
        )
    return found


@reads_model("--model")
def load_export(
    path: str | Path, base: str | None = None, key: str = "--model", size: dict[str, Any] | None = None
) -> Loaded:
    """A student (or teacher) from an export folder, LoRA file, run folder, or any teacher path.

    A LoRA stands on the base its header names unless `base` says another. `size` is height, width and
    num_frames in place of the model's own, where it is free in them; else a UserError.
    """
    loaded = _load_export(path, base, key, size or {})
    loaded.size = size or {}
    if loaded.info is not None and loaded.info.enlarges:
        loaded.codec.enlarges = loaded.info.enlarges
    return loaded


def _load_export(path: str | Path, base: str | None, key: str, size: dict[str, Any]) -> Loaded:
    found = locate(path, key)
    if found is None:
        return Loaded(*_as_role(load_teacher(str(path), **size)), None, str(path))
    if found.is_file():
        return _load_adapter(found, base, key, size)
    info = read_info(found, key)
    if info and info.num_students:
        return _load_members(found, info, base, key, size)
    if info and info.guidance_adapter:
        return _load_adapter(inside(found, info.guidance_adapter, key), base, key, size)
    if info and info.lora:
        return _load_lora(inside(found, info.lora, key), base, key, size)
    if not any((found / part).is_dir() for part in ("unet", "transformer", "prior")):
        pickles = [f.name for f in found.iterdir() if f.suffix in PICKLES]
        what = f"holds only pickled weights ({pickles[0]})" if pickles else "holds no network"
        raise UserError(
            key, f"{found} {what}", "give an export folder, a LoRA .safetensors or a teacher folder"
        )
    role, teacher = _as_role(load_teacher(str(found), **size))
    if info and info.is_student:
        role = _student(role.backbone, None, info, key)
        if info.tiles:
            take_tiles(role, found, key, teacher.codec, "teacher.num_frames")
        if info.guidance_range:
            teacher.codec.guidance = None  # its conditions leave this input to the student itself
    return Loaded(role, teacher, info, str(path))


def _load_members(found: Path, info: ExportInfo, base: str | None, key: str, size: dict[str, Any]) -> Loaded:
    """Several students and their router."""
    router = Router.load(found, key)
    num = info.num_students
    if num != router.num:
        raise UserError(key, f"{found} names {num} students, its router {router.num}", "export the run again")
    loaded = [_load_export(inside(found, f"student{j}", key), base, key, size) for j in range(num)]
    return Loaded(Students([one.student for one in loaded], router), loaded[0].teacher, info, str(found))


def _student(backbone: Denoiser, adapter: str | None, info: ExportInfo, key: str) -> Student:
    """The student an export describes, with its time list."""
    name = info.scheduler_class
    if name in ("LCMScheduler", "TCDScheduler") and not info.scheduler.get("original_inference_steps"):
        found = f"the {name} of this export names no original_inference_steps"
        raise UserError(key, found, "without it its times are unknown; export the run again")
    guidance, times = None, info.times or ()
    if info.guidance_range:
        guidance = float(len(times) if info.steps_as_guidance else info.guidance)
    span, counted, causal = info.guidance_range, info.steps_as_guidance, info.causal or {}
    blocks = causal.get("block", 0), causal.get("window", 0)
    if min(blocks) < 0 or causal and (not blocks[0] or not _by_frames(backbone)):
        raise UserError(key, f"found blocks of {causal} for this network", "export the run again")
    spec = StudentSpec(times, info.sampler, info.gamma, info.grid, guidance, span, counted, *blocks)
    spec = replace(spec, fidelity=info.fidelity, fidelity_range=info.fidelity_range)
    return make_student(backbone, adapter, spec)


def _by_frames(backbone: Denoiser) -> bool:
    return backbone.family is not None and backbone.family.frame_times


def _load_adapter(file: Path, base: str | None, key: str, size: dict[str, Any]) -> Loaded:
    """A LoRA file, or one of guidance adapters, on its base."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as handle:
            metadata = handle.metadata() or {}
    except (SafetensorError, OSError):
        metadata = {}
    if guidance_adapters.HEADER not in metadata:
        return _load_lora(file, base, key, size)  # which says what is wrong with other files
    header = parse_json(metadata.get("fastgen", "{}"), f"fastgen in the header of {file}", key)
    info = ExportInfo.from_json(header, file, key)
    role, teacher = _as_role(load_teacher(base or info.base, **(_settings(info) | size)))
    network = teacher.network
    (net,) = network.family.adapted(network.net).values()
    try:
        network.guidance_control = load_guidance_adapter(net, file, name="student")
    except (ValueError, KeyError, RuntimeError) as error:
        found = f"{file} does not fit {base or info.base} ({first_line(error)})"
        raise UserError(key, found, "give a base of the architecture it was trained on") from None
    network.adapter_names += ("student",)
    network.set_adapter(None)
    network.requires_grad_(False)
    return Loaded(_student(network, "student", info, key), teacher, info, str(file))


def _load_lora(file: Path, base: str | None, key: str, size: dict[str, Any]) -> Loaded:
    header = lora.read_lora(file, key)[1]
    info = ExportInfo.from_json(header, file, key) if header else None
    base = base or (info.base if info else "")
    if not base:
        raise UserError("--base", f"{file} does not name its base", "give the teacher's folder with --base")
    if info is None:
        found = f"{file} was not written by fastgen: its header does not say how many steps to take"
        raise UserError(key, found, "use diffusers' load_lora_weights")
    role, teacher = _as_role(load_teacher(base, **(_settings(info) | size)))
    if teacher.is_analytic:
        raise UserError("--base", f"{base} has no weights to adapt", "give a diffusers folder")
    network = teacher.network
    if info.step_lengths:
        network.add_second_time()
    if info.guidance_range:
        network.add_guidance()
    parts = network.family.adapted(network.net)
    for part, layers in lora.read_parts(file, parts, key).items():
        lora.inject(parts[part], layers, "student")
    network.adapter_names += ("student",)
    network.set_adapter(None)
    network.requires_grad_(False)
    role = Role(network, "student")
    if info.is_student:
        role = _student(network, "student", info, key)
    if info.tiles:
        take_tiles(role, file.parent, key, teacher.codec, "teacher.num_frames")
    return Loaded(role, teacher, info, str(file))


@reads_model("student.init")
@torch.no_grad()
def init_student(student: Role, path: str, codec: Codec | None = None) -> None:
    """Start a student from an export: a folder's weights, or a LoRA (into an adapter, or merged). Tile masks
    come with them, where the codec of its clips is given.
    """
    key = "student.init"
    found = locate(path, key)
    if found is None:
        raise UserError(
            key, f"{path!r} is not an export on this disk", "give an export folder or a LoRA file"
        )
    info = None if found.is_file() else read_info(found, key)
    file = inside(found, info.lora, key) if info and info.lora else found
    file = (lora.find_lora(found) or file) if info is None and found.is_dir() else file
    network = student.backbone
    if not isinstance(network, Backbone):
        raise UserError(key, f"found {path} for the student of an exact teacher", "leave it empty")
    if file.is_file():
        parts = network.family.adapted(network.net)
        for part, layers in lora.read_parts(file, parts, key).items():
            if student.adapter is None:
                lora.check_keys(parts[part], layers, key)
                lora.merge(parts[part], layers)
            else:
                lora.put(parts[part], layers, student.adapter, key)
    elif student.adapter is not None:
        wrong = f"{path} is a full network and the student a LoRA"
        raise UserError(key, wrong, "give a LoRA file, or set student.kind to full")
    else:
        _init_full(network, student.guidance is not None, str(found), key)
    folder = found.parent if found.is_file() else found
    if codec is not None and (folder / TILES).is_file():
        take_tiles(student, folder, key, codec, key)


def _init_full(network: Backbone, guided: bool, path: str, key: str) -> None:
    """Copy the network of a folder; `guided`: the student takes the guidance scale as an input."""
    source = load_teacher(path).network
    if network.second_time:
        source.add_second_time()
    if is_sprint(network) and source.family.name == "sana":
        source = make_sprint(source, network.schedule)
    elif guided:
        source.add_guidance()
    state = source.net.state_dict()
    own = network.net.state_dict()
    wrong = [n for n in {**own, **state} if n not in own or n not in state or own[n].shape != state[n].shape]
    if wrong:
        found = f"{path} is another network ({wrong[0]} differs)"
        raise UserError(key, found, "give an export of a student of this teacher")
    network.net.load_state_dict(state)


@torch.no_grad()
def fuse(own: Mapping[str, torch.Tensor], path: str, weight: float | None = None) -> None:
    """own <- weight own + (1 - weight) other, by name; other is the student at path, its LoRA merged
    (SwiftBrush v2, arXiv 2408.14176, Sec. 4.4). None is equal weights.
    """
    key, weight = "student.fuse", 0.5 if weight is None else weight
    other = load_export(path, key=key)
    if not isinstance(other.role.backbone, Backbone):
        raise UserError(key, f"found {path}, an exact teacher", "give a student of this teacher")
    net = other.role.backbone.net
    if other.role.adapter is not None:
        layers = lora.collect(net, other.role.adapter)
        net = lora.without_adapters(net)
        lora.merge(net, layers)
    state = {f"net.{n}": p for n, p in net.state_dict().items()}
    wrong = [n for n, p in own.items() if n not in state or state[n].shape != p.shape]
    if wrong:
        raise UserError(
            key, f"{path} is another network ({wrong[0]} differs)", "give a student of this teacher"
        )
    for name, value in own.items():
        value.lerp_(state[name].to(value), 1 - weight)


def sample_command(path: str | Path) -> str:
    """The shell command that samples an export."""
    program = "python sample.py" if (PACKAGE.parent / "sample.py").is_file() else "fastgen-sample"
    folder = locate(path) or Path(path)
    if (folder / "asset.json").is_file():
        return f"{program} --model {shlex.quote(str(path))} --turntable 48 --out samples"
    text = folder.is_dir() and _text_to_image(folder)
    info = read_info(folder, "--model") if text else None
    prompt = f" --prompt {shlex.quote((info and info.example) or PROMPT)}" if text else ""
    return f"{program} --model {shlex.quote(str(path))}{prompt} --num_images 16 --out samples"


def _text_to_image(folder: Path) -> bool:
    if (folder / "tokenizer").is_dir():
        return True
    info = read_info(folder, "--model")
    base = info.base if info else ""
    found = locate(base) if base and not is_analytic(base) else None
    return found is not None and (found / "tokenizer").is_dir()
