"""The model card of an export: settings, measured numbers, and the snippet of `usage`."""

import json
import shlex
from pathlib import Path
from typing import Any

from fastgen.core.errors import UserError
from fastgen.core.reading import COPY, MAX_JSON_BYTES, read_bytes, read_json
from fastgen.export.comfyui import FILE as WORKFLOW
from fastgen.export.comfyui import lora_file, unfit
from fastgen.export.info import ExportInfo
from fastgen.export.markdown import code, escape, fenced, visible
from fastgen.export.snippet import hub_id, keywords, usage
from fastgen.networks.codecs import TextCodec
from fastgen.networks.files import hub_folder
from fastgen.networks.linear_attention import linear_attention
from fastgen.networks.teacher import Teacher
from fastgen.roles.router import Router

ROWS = (("teacher", "teacher"), ("untrained_student", "untrained student"), ("student", "student"))

UNDER_AUTOCAST = (
    "Under `torch.autocast` choose `torch.bfloat16`: the linear attention of plain diffusers divides 0 by 0 "
    "in float16 autocast. Loading with `torch_dtype=torch.float16`, without autocast, is right."
)


SAMPLES = "samples.png"
"""pictures of the student in its export's folder, which the card shows"""


def license_of(base: str) -> str:
    """The licence that the teacher's own card names, which an export inherits; empty where none is known.
    Of a hub id the card is read where the model has been downloaded.
    """
    try:
        card = hub_folder(base, False) / "README.md" if base else None
    except UserError:
        card = None
    if card is not None and card.is_file():
        text = read_bytes(card, "teacher.path", COPY, MAX_JSON_BYTES).decode("utf-8", "replace")
        for line in text.split("---")[1].splitlines() if text.startswith("---") else ():
            if line.startswith("license:"):
                return visible(line.partition(":")[2]).strip("\"'")[:100]
    return ""


def _numbers(results: dict) -> list[str]:
    """The measured rows as a table, with how they were measured."""
    rows = [(title, results[key]) for key, title in ROWS if isinstance(results.get(key), dict)]
    by_steps = results.get("student_by_steps") or {}
    rows += [(f"student, {n} steps", row) for n, row in by_steps.items() if isinstance(row, dict)]
    columns = list(dict.fromkeys(k for _, row in rows for k, v in row.items() if isinstance(v, (int, float))))
    if not columns:
        return ["Not measured."]
    lines = ["| | " + " | ".join(map(escape, columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    for title, row in rows:
        cells = [f"{row[c]:.4g}" if isinstance(row.get(c), (int, float)) else "" for c in columns]
        lines.append(f"| {escape(title)} | " + " | ".join(cells) + " |")
    protocol = {k: v for k, v in (results.get("protocol") or {}).items() if not isinstance(v, dict)}
    note = protocol.pop("note", "fd_mini is measured on a small net; not comparable with published FIDs")
    if protocol:
        lines += ["", f"Measured with: {', '.join(escape(f'{k} {v}') for k, v in protocol.items())}."]
    if "fd_mini" in columns:
        lines += ["", f"{escape(note).removesuffix('.')}."]
    return lines


def _task(teacher: Teacher) -> str:
    """The hub's name for what a model does."""
    family = teacher.family
    if family.kind == "scans":
        return "other"
    if family.kind == "pictures":
        return "image-to-image"
    if not isinstance(teacher.codec, TextCodec):
        return "unconditional-image-generation"
    source = "image" if family.needs_image and family.temporal else "text"
    return f"{source}-to-{'video' if family.temporal else '3d' if family.views else 'image'}"


def _front_matter(info: ExportInfo, what: dict, teacher: Teacher) -> str:
    from huggingface_hub import ModelCardData

    tags = ["diffusers", "fastgen", visible(info.objective)]
    tags += ["distillation", "few-step"] if info.is_student else []
    tags += ["lora"] if info.lora else []
    tags += [_task(teacher)]
    base = visible(hub_id(info.base)) if info.base else ""
    licence = visible(what.get("license") or license_of(info.base))
    data = ModelCardData(
        base_model=base or None, library_name="diffusers", license=licence or None, tags=tags
    )
    return f"---\n{data.to_yaml()}\n---"


def quoted(name: str) -> str:
    """A file name as Python writes it, in double quotes where they do."""
    return json.dumps(name) if name.isascii() and name.isprintable() else repr(name)


def _steps(info: ExportInfo) -> list[str]:
    """How its own steps are taken: by the loop of a causal student, or by a scheduler."""
    if info.causal:
        return [
            f"It makes {info.causal['block']} latent frames after {info.causal['block']}, each block in "
            f"{info.steps} steps over a cache of those before: `block_causal.py` has the loop, and a plain "
            "call of the pipeline, whose attention looks both ways, is not this model. Longer clips: pass "
            "`num_frames`; the cache then rolls on."
        ]
    if info.is_student and info.timestep_arguments:
        given = keywords(info.timestep_arguments)[2:]
        return [f"The scheduler's plain grid is another one: pass {code(given)} as below."]
    if len(info.times or ()) > 1 and not info.grid:
        return [f"The scheduler is set for exactly {info.steps} steps: a plain call is right."]
    return []


def _masks(info: ExportInfo) -> list[str]:
    """What masks its attention has between frames."""
    if not info.tiles:
        return []
    return [
        f"Its attention keeps {info.tiles:.0%} of the tiles between frames (Efficient-vDiT, arXiv "
        "2502.06155): `tile_masks.json` has the masks and `tile_attention.py` puts them on. They are of "
        "clips of this length alone; without them the network computes what it was not trained for."
    ]


def _notes(info: ExportInfo, teacher: Teacher) -> list[str]:
    """What a user of these files must know beside the settings."""
    lora, notes = info.lora, []
    if linear_attention(teacher.network.net):
        notes.append(UNDER_AUTOCAST)
    notes += _steps(info) + _masks(info)
    if info.fidelity_range:
        low, high = info.fidelity_range
        notes.append(
            f"`fidelity` below may be {low:g} to {high:g}: high is near the original on the average, low "
            f"looks real. The default is {info.fidelity:g}."
        )
    for num, change in info.other_step_counts.items():
        set_to = "".join(f", {code(f'{k}={v!r}')}" for k, v in change["scheduler"].items())
        given = keywords(change["arguments"])[2:] or f"num_inference_steps={num}"
        loaded = f" with the scheduler loaded with {set_to[2:]}" if set_to else ""
        notes.append(f"In {num} step{'s' * (num != '1')}: pass {code(given)}{loaded}.")
    if lora:
        notes.append(f"{code(lora)}: adapter in PEFT layout, alpha equal to rank.")
    if info.kohya:
        notes.append(f"{code(info.kohya)}: the same adapter under kohya's names.")
    if not unfit(teacher, info):
        notes.append(_comfyui(teacher, info))
    if info.nasa_scale:
        notes.append(
            "Negative prompts: `nasa.py` subtracts their attention (NASA, arXiv 2412.02687). First call "
            f'`from nasa import negative_prompt; negative_prompt(pipe, "red", scale={info.nasa_scale:g})`.'
        )
    if info.steps_as_guidance:
        notes.append(
            "The network takes the number of steps in its input for the guidance scale: pass the "
            "step count as `guidance_scale`. The guidance itself is baked in."
        )
    elif info.guidance_adapter and info.guidance_range:
        low, high = info.guidance_range
        notes.append(
            f"{code(info.guidance_adapter)}: adapters that take the guidance scale (AGD, arXiv 2503.07274), "
            f"trained for {low:g} to {high:g}, put on the base by {code('guidance_adapter.py')}: one call a "
            "step. Pass `guidance_scale=1.0` and set the scale with `set_guidance(pipe, w)`; "
            "`remove(pipe)` gives the base back. LoRAs and checkpoints fine-tuned from the base work with "
            "them; negative prompts do nothing."
        )
    elif info.guidance_range:
        low, high = info.guidance_range
        notes.append(
            f"The network takes the guidance scale as an input, trained for {low:g} to {high:g}: one call a "
            "step, and `guidance_scale` works as usual; negative prompts do nothing."
        )
    if lora and info.guidance_range:
        notes.append(
            "`merged/` holds the network for plain diffusers, whose LoRA loader cannot add the layer for w."
        )
    elif lora and not teacher.family.lora_loader:
        call = code(f"fastgen.export.lora.load_lora_into(net, {quoted(lora)})")
        notes.append(
            f"diffusers has no LoRA loader for {teacher.family.net_class}: `merged/` holds the "
            "merged network for it; "
            f"{call} puts the file itself into a base network."
        )
    return notes


def _comfyui(teacher: Teacher, info: ExportInfo) -> str:
    """Where ComfyUI wants the files that its workflow names."""
    if info.student_kind == "lora":
        place = f"put {code(lora_file(info, teacher.family.name))} into its `models/loras`"
    else:
        file = f"{teacher.family.component}/diffusion_pytorch_model.safetensors"
        place = f"copy {code(file)} to its `models/diffusion_models` as {code(info.name + '.safetensors')}"
    return (
        f"`{WORKFLOW}`: this student in ComfyUI. Drop it onto ComfyUI's window, {place}, and choose your "
        "checkpoint of the base in the first node. Its levels are this student's: change no scheduler."
    )


def model_card(
    teacher: Teacher, info: ExportInfo, results: dict, command: list[str], place: Path, pictures: bool = False
) -> str:
    """README.md of the export that stands in the folder `place`; with `pictures` it shows SAMPLES."""
    what = teacher.info or {}
    trained = f"{info.training_steps} steps"
    settings: dict[str, Any] = {"method": info.objective, "trained for": trained, "steps": info.steps}
    if info.times is not None:
        negative = (
            "negative prompts by nasa.py, see below" if info.nasa_scale else "negative prompts do nothing"
        )
        is_input = info.guidance_range and not info.steps_as_guidance
        how = "an input, see below" if is_input else f"baked in: guidance_scale 1, {negative}"
        settings |= {
            "times": ", ".join(f"{t:g}" for t in info.times),
            "between steps": info.sampler,
            "guidance": f"{info.guidance:g}, {how}",
            "teacher": f"{info.base} ({info.teacher_steps} steps)",
        }
    else:
        settings["guidance"] = f"{info.guidance:g}"
    settings["scheduler"] = f"{info.scheduler_class}, as configured in scheduler/"
    notes = _notes(info, teacher)
    first = "A few-step student distilled" if info.is_student else "A generator trained"
    lines = [
        _front_matter(info, what, teacher),
        "",
        f"# {escape(info.name)}",
        "",
        f"{first} with fastgen {info.fastgen_version}.",
        "",
        *([f"![samples]({SAMPLES})", ""] if pictures else []),
        "| setting | value |",
        "|---|---|",
        *(f"| {k} | {escape(v)} |" for k, v in settings.items()),
        "",
        *(f"{n}\n" for n in notes),
        "## Use",
        "",
        *fenced("python", usage(what, teacher, info, place)),
        "",
        "## Numbers",
        "",
        *_numbers(results),
        "",
        "## Training",
        "",
        *fenced("sh", shlex.join(command)),
        "",
        "`config.yaml` of the run folder holds every setting. The licence of the base model applies.",
        "",
    ]
    return "\n".join(lines)


def members_card(info: ExportInfo, router: Router) -> str:
    """README.md over the folders of several students."""
    lines = [f"# {escape(info.name)}, {info.num_students} students", ""]
    if router.tensors and "table" in router.tensors:
        table = router.tensors["table"][:-1].tolist()
        lines += ["| class | folder |", "|---|---|"]
        lines += [f"| {c} | `student{j}/` |" for c, j in enumerate(table)]
    elif router.num > 1:
        lines += [
            "Prompts are cut along one axis of their mean text state (`router.safetensors`): the student's",
            "number is how many `edges` lie below `(mean over tokens - mean) @ axis`.",
        ]
    lines += [
        "",
        "Each folder is an ordinary export with a card of its own. The numbers in those cards are of all",
        "students together, each on its own conditions. fastgen's `sample.py` routes by itself:",
        "",
        "```sh",
        "python sample.py --model . --num_images 16",
        "```",
        "",
    ]
    return "\n".join(lines)


def read_command(folder: Path) -> list[str]:
    """The command that made a run folder."""
    file = folder / "environment.json"
    found = read_json(file, "output_dir").get("command") if file.is_file() else None
    found = found or ["train.py", "--config", "config.yaml"]
    return ["python", *found] if found[0].endswith(".py") else found
