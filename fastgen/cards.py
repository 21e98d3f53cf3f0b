"""The model card of an export: settings, measured numbers, and a snippet in plain diffusers that runs."""

import json
import shlex
from pathlib import Path

from fastgen.paths import resolve

PROMPT = "a red dress on a grey background"
ROWS = (("teacher", "teacher"), ("untrained_student", "untrained student"), ("student", "student"))


def license_of(base: str) -> str:
    """The licence the teacher's own card names; an export inherits it."""
    card = resolve(base) / "README.md" if base else None
    if card is not None and card.is_file() and card.read_text().startswith("---"):
        for line in card.read_text().split("---")[1].splitlines():
            if line.startswith("license:"):
                return line.partition(":")[2].strip()
    return "other"


def shown_path(base: str) -> str:
    """A teacher's path as plain diffusers takes it from a checkout."""
    return base.replace("assets:", "assets/", 1)


def _keywords(arguments: dict) -> str:
    return "".join(f", {k}={v!r}" for k, v in arguments.items())


def _pipeline_usage(what: dict, teacher, info: dict, lora: str) -> list[str]:
    """Text to image or video: an ordinary pipeline call."""
    family, codec, scheduler = teacher.backbone.family, teacher.codec, info["scheduler"]["_class_name"]
    name = teacher.pipeline
    call = {**family.size_call(codec), "num_inference_steps": info["steps"]}
    call |= info["arguments"] if not info["bound"] else {}
    if info["arguments"] and "num_inference_steps" not in info["arguments"] and not info["bound"]:
        del call["num_inference_steps"]
    embedded = info["embedded_guidance"]
    call |= family.guidance_call(embedded)
    if not info["times"] and info["guidance"] != 1:
        call |= family.guided_call(info["guidance"])
    call |= family.plain_call(what) | ({"output_type": "pil"} if family.temporal or family.views else {})
    on_base = lora and family.lora_loader
    names = sorted([name, *([scheduler] if on_base else [])])
    source = repr(shown_path(info["base"])) if on_base else '"merged"' if lora else '"."'
    note = "" if lora else "  # this folder"
    moving = family.temporal or family.views
    tools = [*(["export_to_gif"] if moving else []), *(["load_image"] if family.needs_image else [])]
    lines = [
        "import torch",
        f"from diffusers import {', '.join(names)}",
        *([f"from diffusers.utils import {', '.join(tools)}"] if tools else []),
        "",
        f"pipe = {name}.from_pretrained({source}, torch_dtype=torch.float32){note}",
    ]
    if on_base:
        calls = family.lora_calls(lora, list(family.adapted(teacher.backbone.net)))
        lines += [
            f'pipe.scheduler = {scheduler}.from_pretrained(".", subfolder="scheduler")  # this folder',
            *(f'pipe.load_lora_weights("."{_keywords(c)})' for c in calls),
        ]
    if info["times"] and len(info["times"]) > 1 and info["sampler"] == "renoise":
        lines.append(
            "torch.manual_seed(0)  # the noise between steps, where the pipeline hands on no generator"
        )
    if info["bound"]:  # the call takes no such list
        lines += [
            "set_timesteps = pipe.scheduler.set_timesteps",
            "pipe.scheduler.set_timesteps = lambda *_, device=None, **__: set_timesteps(",
            f"    device=device{_keywords(info['arguments'])}",
            ")",
        ]
    first = f"{family.label_key}=[3]" if family.label_key else f'prompt="{PROMPT}"'
    asked = [
        *([first] if family.takes_text or family.label_key else []),
        "generator=torch.Generator().manual_seed(0)",
    ]
    if family.needs_image:
        asked.insert(len(asked) - 1, 'image=load_image("image.png")')
    return [
        *lines,
        f"{'frames' if moving else 'image'} = pipe(",
        f"    {', '.join(asked)},",
        *_wrapped([f"{k}={v!r}" for k, v in call.items()]),
        f").{'frames' if family.temporal else 'images'}[0]",
        'export_to_gif(frames, "sample.gif")' if moving else 'image.save("sample.png")',
    ]


def _label_usage(what: dict, info: dict, shape: tuple[int, ...], folder: str) -> list[str]:
    """UNet2DModel: the loop that its diffusers pipeline lacks (labels, patches, EDM scaling)."""
    scheduler, classes = info["scheduler"]["_class_name"], what.get("num_classes", 0)
    edm, w = scheduler.startswith("EDM"), 1.0 if info["times"] else info["guidance"]
    label = ", class_labels=label" if classes else ""
    step = [f"        out = net({'scheduler.scale_model_input(x, t)' if edm else 'x'}, t{label}).sample"]
    if classes and w != 1:
        step += [
            step[0].replace("out =", "null =").replace("=label", "=label * 0 + " + str(classes)),
            f"        out = null + {w} * (out - null)",
        ]
    step += ["        x = scheduler.step(out, t, x, generator=generator).prev_sample"]
    loop = ["    for t in scheduler.timesteps:", *step]
    if info["needs_loop"]:
        loop = _renoise_loop(info["times"], label)
    arguments = dict(info["arguments"])
    given = f"{info['steps']}" if edm or not arguments else ""
    if edm and arguments:
        given += f", sigmas=torch.tensor({arguments.pop('sigmas')})"
    given = (given + _keywords(arguments)).removeprefix(", ")
    set_steps = [] if info["needs_loop"] else [f"scheduler.set_timesteps({given})"]
    image = f"torch.pixel_shuffle(x, {what['patch']})" if what.get("patch", 1) > 1 else "x"
    scale = " * scheduler.config.sigma_max  # init_noise_sigma is slightly more" if edm else ""
    return [
        "import torch",
        f"from diffusers import {', '.join(sorted((scheduler, 'UNet2DModel')))}",
        "from PIL import Image",
        "",
        f'net = UNet2DModel.from_pretrained("{folder}", subfolder="unet", torch_dtype=torch.float32)',
        f'scheduler = {scheduler}.from_pretrained("{folder}", subfolder="scheduler")',
        *set_steps,
        "generator = torch.Generator().manual_seed(0)",
        *(["label = torch.tensor([3])"] if classes else []),
        f"x = torch.randn(1, {', '.join(map(str, shape))}, generator=generator){scale}",
        "with torch.no_grad():",
        *loop,
        f"pixels = ({image} / 2 + 0.5).clamp(0, 1)[0].mul(255).round().to(torch.uint8)",
        "image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())",
        'image.save("sample.png")',
    ]


def _renoise_loop(times: list[float], label: str) -> list[str]:
    """EDM with fresh noise between steps, which no diffusers scheduler does."""
    return [
        f"    sigmas = {times}",
        "    for i, sigma in enumerate(sigmas):",
        "        scaled = scheduler.precondition_inputs(x, sigma)",
        "        c_noise = scheduler.precondition_noise(sigma)",
        f"        out = net(scaled, c_noise{label}).sample",
        "        x = scheduler.precondition_outputs(x, out, sigma)",
        "        if i + 1 < len(sigmas):",
        "            x = x + sigmas[i + 1] * torch.randn(x.shape, generator=generator)",
    ]


def usage(what: dict, teacher, info: dict, lora: str = "") -> str:
    """Python code that loads the export and writes sample.png, importing diffusers and never fastgen."""
    if hasattr(teacher.codec, "prompts") or teacher.backbone.family.label_key:
        return "\n".join(_pipeline_usage(what, teacher, info, lora))
    return "\n".join(_label_usage(what, info, teacher.codec.shape, "merged" if lora else "."))


def _numbers(results: dict) -> list[str]:
    """The measured rows as a table, with how they were measured."""
    rows = [(title, results[key]) for key, title in ROWS if isinstance(results.get(key), dict)]
    by_steps = results.get("student_by_steps") or {}
    rows += [(f"student, {n} steps", row) for n, row in by_steps.items() if isinstance(row, dict)]
    columns = list(dict.fromkeys(k for _, row in rows for k, v in row.items() if isinstance(v, (int, float))))
    if not columns:
        return ["Not measured."]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for title, row in rows:
        cells = [f"{row[c]:.4g}" if isinstance(row.get(c), (int, float)) else "" for c in columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    protocol = {k: v for k, v in (results.get("protocol") or {}).items() if not isinstance(v, dict)}
    note = protocol.pop("note", "fd_mini is measured on a small net; not comparable with published FIDs")
    if protocol:
        lines += ["", f"Measured with: {', '.join(f'{k} {v}' for k, v in protocol.items())}."]
    if "fd_mini" in columns:
        lines += ["", f"{note.removesuffix('.')}."]
    return lines


def _wrapped(items: list[str], width: int = 90) -> list[str]:
    """Arguments of a call in indented lines."""
    import textwrap

    return textwrap.wrap(", ".join(items) + ",", width, initial_indent=" " * 4, subsequent_indent=" " * 4)


def _task(teacher) -> str:
    """The hub's name for what a model does."""
    family = teacher.backbone.family
    if not hasattr(teacher.codec, "prompts"):
        return "unconditional-image-generation"
    asked = "image" if family.needs_image and family.temporal else "text"
    return f"{asked}-to-{'video' if family.temporal else '3d' if family.views else 'image'}"


def _front_matter(info: dict, what: dict, teacher, lora: str) -> str:
    from huggingface_hub import ModelCardData

    tags = ["diffusers", "fastgen", info["objective"]]
    tags += ["distillation", "few-step"] if info["times"] else []
    tags += ["lora"] if lora else []
    tags += [_task(teacher)]
    base = info["base"] and shown_path(info["base"])
    base = base if base.count("/") == 1 and not base.startswith(("/", ".")) else Path(base).name
    licence = what.get("license") or license_of(info["base"])
    data = ModelCardData(base_model=base or None, library_name="diffusers", license=licence, tags=tags)
    return f"---\n{data.to_yaml()}\n---"


def _notes(info: dict, teacher, files: dict) -> list[str]:
    """What a user of these files must know beside the settings."""
    lora, student, notes = files.get("lora", ""), bool(info["times"]), []
    if student and info["arguments"]:
        given = _keywords(info["arguments"])[2:]
        notes.append(f"The scheduler's plain grid is another one: pass `{given}` as below.")
    elif student and len(info["times"]) > 1:
        notes.append(f"The scheduler is set for exactly {info['steps']} steps: a plain call is right.")
    if lora:
        notes.append(f"`{lora}`: adapter in PEFT layout, alpha equal to rank.")
    if files.get("kohya"):
        notes.append(f"`{files['kohya']}`: the same adapter under kohya's names.")
    if lora and not teacher.backbone.family.lora_loader:
        notes.append(
            f"diffusers has no LoRA loader for {teacher.backbone.family.net_class}: `merged/` holds the "
            "merged network for it; "
            f'`fastgen.export.load_lora_into(net, "{lora}")` puts the file itself into a base network.'
        )
    return notes


def model_card(name: str, teacher, info: dict, results: dict, command: list[str], files: dict) -> str:
    """README.md of an export."""
    what = teacher.info or {}
    lora, student = files.get("lora", ""), bool(info["times"])
    trained = f"{info['trained_steps']} steps"
    settings = {"method": info["objective"], "trained for": trained, "steps": info["steps"]}
    if student:
        settings |= {
            "times": ", ".join(f"{t:g}" for t in info["times"]),
            "between steps": info["sampler"],
            "guidance": f"{info['guidance']:g}, baked in: guidance_scale 1, negative prompts do nothing",
            "teacher": f"{info['base']} ({info['teacher_steps']} steps)",
        }
    else:
        settings["guidance"] = f"{info['guidance']:g}"
    settings["scheduler"] = f"{info['scheduler']['_class_name']}, as configured in `scheduler/`"
    notes = _notes(info, teacher, files)
    first = "A few-step student distilled" if student else "A generator trained"
    lines = [
        _front_matter(info, what, teacher, lora),
        "",
        f"# {name}",
        "",
        f"{first} with fastgen {info['version']}.",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {k} | {v} |" for k, v in settings.items()),
        "",
        *(f"{n}\n" for n in notes),
        "## Use",
        "",
        "```python",
        usage(what, teacher, info, lora),
        "```",
        "",
        "## Numbers",
        "",
        *_numbers(results),
        "",
        "## Training",
        "",
        "```sh",
        shlex.join(command),
        "```",
        "",
        "`config.yaml` of the run folder holds every setting. The licence of the base model applies.",
        "",
    ]
    return "\n".join(lines)


def read_command(folder: Path) -> list[str]:
    """The command that made a run folder."""
    file = folder / "environment.json"
    found = json.loads(file.read_text()).get("command") if file.is_file() else None
    return ["python", *found] if found else ["python", "train.py", "--config", "config.yaml"]
