"""LoRA files as a user meets them: what is inside, merged into their base, under other names."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.core.files import replace_folder, write_text
from fastgen.core.reading import parse_json
from fastgen.export import lora
from fastgen.export.comfyui import write_workflow
from fastgen.export.info import ExportInfo
from fastgen.export.kohya import is_kohya, read_kohya, write_kohya
from fastgen.export.load import load_export
from fastgen.export.model_card import model_card
from fastgen.export.write import export_parts
from fastgen.families.registry import FAMILIES
from fastgen.networks.backbone import Backbone
from fastgen.networks.load import load_teacher
from fastgen.networks.schedulers import load_scheduler
from fastgen.networks.teacher import Teacher

KEY = "adapters"


@dataclass
class Adapter:
    """The header and the tensors of one LoRA file."""

    file: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def info(self) -> ExportInfo | None:
        """What fastgen wrote into the header; None for files of others."""
        header = parse_json(self.metadata.get("fastgen", "{}"), f"the header of {self.file}", KEY)
        return ExportInfo.from_json(header, self.file, KEY) if header else None

    @property
    def layout(self) -> str:
        return "kohya" if is_kohya(self.tensors) else "peft"


def open_adapter(file: Path, key: str = KEY) -> Adapter:
    """A LoRA file read whole; a UserError for anything else."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        wrong = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(key, f"{file} {wrong}", "give a LoRA .safetensors file")
    try:
        with safe_open(file, "pt") as handle:
            names = list(handle.keys())
            found = Adapter(file, {k: handle.get_tensor(k) for k in names}, handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(key, f"{file} cannot be read ({error})", "is it a whole .safetensors file?") from None
    if not any(".lora_" in name for name in names):
        raise UserError(key, f"{file} holds no LoRA", "give the file of an adapter, not a whole network")
    return found


def lora_files(path: Path) -> list[Path]:
    """The LoRA files that a path stands for: itself, or those of a folder (of a run: of its export)."""
    if path.is_file():
        return [path]
    place = path / "export" if (path / "export").is_dir() else path
    if not place.is_dir():
        raise UserError(KEY, f"{path} does not exist", "give a LoRA file, or a folder with some")
    known = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
    found = sorted(f for f in place.glob("*.safetensors") if "lora" in f.name or f.name in known)
    if not found:
        raise UserError(KEY, f"{place} holds no LoRA file", "a full student's export has none")
    return found


def describe(adapter: Adapter) -> list[str]:
    """Lines on one file: its layers and names, and what it says of itself."""
    tensors = adapter.tensors
    down = [v for k, v in tensors.items() if k.endswith((".lora_down.weight", ".lora_A.weight"))]
    ranks = sorted({v.shape[0] for v in down})
    prefixes = sorted({k.split(".")[0] if adapter.layout == "peft" else _kohya_prefix(k) for k in tensors})
    dtypes = sorted({str(v.dtype).removeprefix("torch.") for v in down})
    size = sum(v.numel() * v.element_size() for v in tensors.values()) / 2**20
    lines = [
        f"{adapter.file}",
        f"  {len(down)} layers of {', '.join(prefixes)}, rank {', '.join(map(str, ranks))}, "
        f"{', '.join(dtypes)}, {size:.2f} MB, {adapter.layout} names",
    ]
    info = adapter.info
    if info is None:
        return [*lines, "  not written by fastgen: it does not say which base and how many steps"]
    steps = f"{info.steps} step{'s' * (info.steps != 1)}"
    how = f"{steps} with {info.scheduler_class}" if info.is_student else "sampled like its teacher"
    lines.append(f"  {info.objective} student of {info.base}, {how}, guidance {info.guidance:g} learned")
    if info.other_step_counts:
        lines.append(f"  also in {', '.join(info.other_step_counts)} steps, see its card")
    return lines


def _kohya_prefix(key: str) -> str:
    return "_".join(key.split("_")[:2])


def _layers(adapter: Adapter, teacher: Teacher | None) -> lora.Layers:
    """The layers of a file in either layout; kohya's names need the network that they adapt."""
    if adapter.layout == "peft":
        return lora.read_lora(adapter.file, KEY)[0]
    if teacher is None:
        raise UserError("--base", "none given", "kohya's names say nothing without the base they adapt")
    parts = teacher.family.adapted(teacher.network.net)
    if len(parts) > 1:
        found = f"{teacher.family.name} has {len(parts)} adapted networks"
        raise UserError(KEY, found, "give the files with PEFT names")
    return read_kohya(adapter.tensors, next(iter(parts.values())), KEY)


@torch.no_grad()
def add_to(network: Backbone, teacher: Teacher, file: Path, scale: float = 1.0, key: str = KEY) -> None:
    """Add scale times a LoRA's update to the network's own weights, beneath any adapter that it has: control
    that was trained on a base model and goes to its students, or back. A layer that the network lacks is a
    UserError.
    """
    if not isinstance(network, Backbone):
        raise UserError(
            key, f"found {file} for an exact model", "leave it out: there are no weights to adapt"
        )
    adapter = open_adapter(file, key)
    parts = network.family.adapted(network.net)
    if adapter.layout == "peft":
        found = lora.read_parts(file, parts, key)
    else:
        found = {next(iter(parts)): _layers(adapter, teacher)}
    for part, layers in found.items():
        lora.check_keys(parts[part], layers, key)
        lora.merge(parts[part], {name: (a, scale * b) for name, (a, b) in layers.items()})


def _inject(adapter: Adapter, teacher: Teacher) -> None:
    """Put a file of others onto its base, as the adapter "student"."""
    parts = teacher.family.adapted(teacher.network.net)
    if adapter.layout == "peft":
        found = lora.read_parts(adapter.file, parts, KEY)
    else:
        found = {next(iter(parts)): _layers(adapter, teacher)}
    for part, layers in found.items():
        lora.inject(parts[part], layers, "student")


@torch.no_grad()
def merge(file: Path, base: str, out: Path, dtype=torch.float32) -> Path:
    """A whole model folder with the adapter's update in its weights. A student's folder keeps its steps."""
    adapter = open_adapter(file)
    info = adapter.info if adapter.layout == "peft" else None
    if info is not None:
        loaded = load_export(file, base or None, KEY)
        teacher = loaded.teacher
        net, name = teacher.network.net, str(loaded.role.adapter)
        scheduler = load_scheduler(info.scheduler)
        info = replace(info, lora="", kohya="", student_kind="full")
    else:
        if not base:
            raise UserError("--base", f"{file} does not name its base", "give the folder it was trained on")
        teacher, name = load_teacher(base), "student"
        net, scheduler = teacher.network.net, teacher.scheduler
        _inject(adapter, teacher)
    parts = dict(teacher.family.parts(net))
    for part, adapted in teacher.family.adapted(net).items():
        layers = lora.collect(adapted, name)
        parts[part] = lora.without_adapters(adapted)
        lora.merge(parts[part], layers)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    export_parts(teacher, parts, temporary, scheduler, info, dtype)
    if info is not None:
        write_workflow(temporary, teacher, info)
        command = ["fastgen", "adapters", "merge", file.name]
        write_text(temporary / "README.md", model_card(teacher, info, {}, command, out))
    return replace_folder(temporary, out)


def convert(file: Path, to: str, out: Path, base: str = "") -> Path:
    """The same adapter under the other names, at the same strength in any reader."""
    adapter = open_adapter(file)
    if adapter.layout == to:
        raise UserError("--to", f"{file} has {to} names already", "nothing to do")
    teacher = load_teacher(base, weights=False) if base else None
    layers = _layers(adapter, teacher)
    described = {k: v for k, v in adapter.metadata.items() if k.startswith(("modelspec.", "fastgen", "ss_b"))}
    if to == "peft":
        assert teacher is not None, "kohya names were read with it"
        return lora.write_peft(out, layers, teacher.family.component, described)
    named = FAMILIES.get(adapter.metadata.get("ss_base_model_version", ""))
    family = teacher.family if teacher else named
    if family is None:
        found = f"{file} does not say which family of networks it adapts"
        raise UserError("--base", found, "give the folder it was trained on")
    if not family.reads_kohya(layers):
        found = f"diffusers reads no kohya file for these layers of {family.net_class}"
        raise UserError("--to", found, "keep the PEFT names")
    return write_kohya(out, layers, family.kohya_prefix or "", described)


def difference(tuned: Path, start: Path, out: Path) -> Path:
    """What one adapter adds to another, B A of the first minus B A of the second, exactly: the ranks add up.
    Stacked on the second at weight 1 it is the first, at less a share of the way.
    """
    files = [open_adapter(tuned), open_adapter(start)]
    for one in files:
        if one.layout != "peft":
            raise UserError(KEY, f"{one.file} has kohya names", "give the files with PEFT names")
    first, second = (_layers(one, None) for one in files)
    prefix, other = ({k.partition(".")[0] for k in one.tensors} for one in files)
    common = [name for name in first if name in second]
    if len(prefix) > 1 or prefix != other or not common:
        raise UserError(KEY, f"{tuned} and {start} adapt other networks", "give two adapters of one base")
    for name in common:
        shapes = [(layers[name][0].shape[1:], layers[name][1].shape[0]) for layers in (first, second)]
        if shapes[0] != shapes[1]:
            raise UserError(KEY, f"{name} differs in shape", "give two adapters of one base")
    none = {name: (a[:0], b[:, :0]) for layers in (first, second) for name, (a, b) in layers.items()}
    found = {}
    for name, empty in none.items():
        (a, b), (a0, b0) = first.get(name, empty), second.get(name, empty)
        found[name] = (torch.cat([a, a0]).contiguous(), torch.cat([b, -b0], 1).contiguous())
    return lora.write_peft(out, found, next(iter(prefix)), {})
