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


def _keywords_of_call(what: dict, family, codec, info: dict) -> dict:
    """Sizes, steps and guidance as this pipeline's call takes them."""
    call = {**family.size_call(codec), "num_inference_steps": info["steps"]}
    call |= info["arguments"] if not info["bound"] else {}
    if info["arguments"] and "num_inference_steps" not in info["arguments"] and not info["bound"]:
        del call["num_inference_steps"]
    told = info.get("guidance_range") is not None
    w = float(info["steps"] if info.get("told_steps") else info["guidance"])
    call |= info["step"] | family.guidance_call(w if told else info["embedded_guidance"])
    if not info["times"] and info["guidance"] != 1:
        call |= family.guided_call(info["guidance"])
    call |= family.plain_call(what) | ({"output_type": "pil"} if family.temporal or family.views else {})
    return call


def _pipeline_usage(what: dict, teacher, info: dict, lora: str) -> list[str]:
    """Text to image or video: an ordinary pipeline call."""
    family, codec, scheduler = teacher.backbone.family, teacher.codec, info["scheduler"]["_class_name"]
    name = teacher.pipeline
    call, told = _keywords_of_call(what, family, codec, info), info.get("guidance_range") is not None
    own = told or info["gaps"]  # an input that the base has not
    on_base = lora and family.lora_loader and not own
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
    if info["gaps"]:
        call["latents"] = "latents"
        lines += _gap_lines(family, info["gaps"], codec.shape)
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
        *_wrapped([f"{k}={v if k == 'latents' else repr(v)}" for k, v in call.items()]),
        f").{'frames' if family.temporal else 'images'}[0]",
        'export_to_gif(frames, "sample.gif")' if moving else 'image.save("sample.png")',
    ]


def _gap_lines(family, gaps: list[float], shape: tuple[int, ...]) -> list[str]:
    """A pipeline whose network reads the length of each step as one more channel of its latent."""
    return [
        f"gaps, forward = iter({gaps}), pipe.{family.component}.forward",
        "",
        "def with_gap(x, *args, **kwargs):  # the network also reads how long its step is",
        "    return forward(torch.cat([x, torch.full_like(x[:, :1], next(gaps))], 1), *args, **kwargs)",
        "",
        f"pipe.{family.component}.forward = with_gap",
        f"latents = torch.randn(1, {', '.join(map(str, shape))}, generator=torch.Generator().manual_seed(0))",
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
    if info["gaps"]:
        read = "torch.cat([x, torch.full_like(x[:, :1], gap)], 1)"
        if edm:
            read = read.replace("[x, ", "[scheduler.scale_model_input(x, t), ")
        step = [f"        out = net({read}, t{label}).sample"]
    given = _keywords(info["step"])
    step += [f"        x = scheduler.step(out, t, x{given}, generator=generator).prev_sample"]
    loop = ["    for t in scheduler.timesteps:", *step]
    if info["gaps"]:
        loop[0] = f"    for t, gap in zip(scheduler.timesteps, {info['gaps']}):  # gap: the step's length"
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
    if edm and info["times"] and info["times"][0] != info["scheduler"]["sigma_max"]:
        scale = f" * {info['times'][0]!r}  # the first noise level this student knows"
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
    elif student and len(info["times"]) > 1 and not info["grid"]:
        notes.append(f"The scheduler is set for exactly {info['steps']} steps: a plain call is right.")
    for num, change in info["others"].items():
        set_to = "".join(f", `{k}={v!r}`" for k, v in change["scheduler"].items())
        given = _keywords(change["arguments"])[2:] or f"num_inference_steps={num}"
        loaded = f" with the scheduler loaded with {set_to[2:]}" if set_to else ""
        notes.append(f"In {num} step{'s' * (num != '1')}: pass `{given}`{loaded}.")
    if lora:
        notes.append(f"`{lora}`: adapter in PEFT layout, alpha equal to rank.")
    if files.get("kohya"):
        notes.append(f"`{files['kohya']}`: the same adapter under kohya's names.")
    if info.get("nasa"):
        notes.append(
            "Negative prompts: `nasa.py` subtracts their attention (NASA, arXiv 2412.02687). First call "
            f'`from nasa import negative_prompt; negative_prompt(pipe, "red", scale={info["nasa"]:g})`.'
        )
    if info.get("told_steps"):
        notes.append(
            "The network is told the number of steps through its input for the guidance scale: pass the "
            "step count as `guidance_scale`. The guidance itself is baked in."
        )
    elif info.get("guidance_range"):
        low, high = info["guidance_range"]
        notes.append(
            f"The network takes the guidance scale as an input, trained for {low:g} to {high:g}: one call a "
            "step, and `guidance_scale` works as usual; negative prompts do nothing."
        )
    if lora and info.get("guidance_range"):
        notes.append(
            "`merged/` holds the network for plain diffusers, whose LoRA loader cannot add the layer for w."
        )
    elif lora and not teacher.backbone.family.lora_loader:
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
        span = info.get("guidance_range")
        negative = (
            "negative prompts by nasa.py, see below" if info.get("nasa") else "negative prompts do nothing"
        )
        told = span and not info.get("told_steps")
        how = "an input, see below" if told else f"baked in: guidance_scale 1, {negative}"
        settings |= {
            "times": ", ".join(f"{t:g}" for t in info["times"]),
            "between steps": info["sampler"],
            "guidance": f"{info['guidance']:g}, {how}",
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


def members_card(info: dict, router) -> str:
    """README.md over the folders of several students."""
    lines = [f"# {info['name']}, {info['students']} students", ""]
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
        "students together, each asked for its own conditions. fastgen's `sample.py` routes by itself:",
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
    found = json.loads(file.read_text()).get("command") if file.is_file() else None
    return ["python", *found] if found else ["python", "train.py", "--config", "config.yaml"]
