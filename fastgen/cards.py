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


def _pipeline_usage(
    what: dict, family, info: dict, size: tuple[int, int], lora: str, shape: tuple[int, ...]
) -> list[str]:
    """Text-to-image: an ordinary pipeline call."""
    scheduler = info["scheduler"]["_class_name"]
    call = {"height": size[0], "width": size[1], "num_inference_steps": info["steps"], **info["arguments"]}
    if info["arguments"] and "num_inference_steps" not in info["arguments"]:
        del call["num_inference_steps"]
    told = info.get("guidance_range") is not None
    baked = info["times"] and not told
    w = float(info["steps"] if info.get("told_steps") else info["guidance"])
    call |= info["step"] | (family.guidance_off if baked else {"guidance_scale": w})
    call |= family.plain_call(what)
    own = told or info["gaps"]  # an input that the base has not
    merged, lora = lora and own, "" if own else lora
    names = sorted([family.pipeline, *([scheduler] if lora else [])])
    source = repr(shown_path(info["base"])) if lora else '"merged"' if merged else '"."'
    note = "" if lora or merged else "  # this folder"
    lines = [
        "import torch",
        f"from diffusers import {', '.join(names)}",
        "",
        f"pipe = {family.pipeline}.from_pretrained({source}, torch_dtype=torch.float32){note}",
    ]
    if lora:
        lines += [
            f'pipe.scheduler = {scheduler}.from_pretrained(".", subfolder="scheduler")  # this folder',
            f'pipe.load_lora_weights(".", weight_name="{lora}")',
        ]
    if info["gaps"]:
        call["latents"] = "latents"
        lines += _gap_lines(family, info["gaps"], shape)
    return [
        *lines,
        "image = pipe(",
        f'    "{PROMPT}", generator=torch.Generator().manual_seed(0),',
        *_wrapped([f"{k}={v if k == 'latents' else repr(v)}" for k, v in call.items()]),
        ").images[0]",
        'image.save("sample.png")',
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


def usage(what: dict, family, info: dict, codec, lora: str = "") -> str:
    """Python code that loads the export and writes sample.png, importing diffusers and never fastgen."""
    import torch

    if hasattr(codec, "prompts"):
        device = next(codec.parameters()).device
        size = tuple(codec.decode(torch.zeros(1, *codec.shape, device=device)).shape[-2:])
        return "\n".join(_pipeline_usage(what, family, info, size, lora, codec.shape))
    return "\n".join(_label_usage(what, info, codec.shape, "merged" if lora else "."))


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


def _front_matter(info: dict, what: dict, codec, lora: str) -> str:
    from huggingface_hub import ModelCardData

    tags = ["diffusers", "fastgen", info["objective"]]
    tags += ["distillation", "few-step"] if info["times"] else []
    tags += ["lora"] if lora else []
    tags += ["text-to-image"] if hasattr(codec, "prompts") else ["unconditional-image-generation"]
    base = info["base"] and shown_path(info["base"])
    base = base if base.count("/") == 1 and not base.startswith(("/", ".")) else Path(base).name
    licence = what.get("license") or license_of(info["base"])
    data = ModelCardData(base_model=base or None, library_name="diffusers", license=licence, tags=tags)
    return f"---\n{data.to_yaml()}\n---"


def _notes(info: dict, codec, files: dict) -> list[str]:
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
    elif lora and not hasattr(codec, "prompts"):
        notes.append(
            "diffusers has no LoRA loader for UNet2DModel: `merged/` holds the merged network for it; "
            f'`fastgen.export.load_lora_into(net, "{lora}")` puts the file itself into a base network.'
        )
    return notes


def model_card(name: str, teacher, info: dict, results: dict, command: list[str], files: dict) -> str:
    """README.md of an export."""
    family, codec, what = teacher.backbone.family, teacher.codec, teacher.info or {}
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
    notes = _notes(info, codec, files)
    first = "A few-step student distilled" if student else "A generator trained"
    lines = [
        _front_matter(info, what, codec, lora),
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
        usage(what, family, info, codec, lora),
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
