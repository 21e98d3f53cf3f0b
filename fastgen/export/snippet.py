"""The snippet in an export's card: plain diffusers, and it runs."""

import json
import os
from pathlib import Path

from fastgen.core.paths import resolve
from fastgen.export.info import ExportInfo
from fastgen.families.base import Family
from fastgen.networks.codecs import Codec, PictureCodec, ScanCodec, TextCodec
from fastgen.networks.teacher import Teacher

PROMPT = "a red dress on a grey background"


def hub_id(base: str) -> str:
    """The hub id that a teacher's path is; empty for folders and bundled models."""
    is_id = base.count("/") == 1 and not base.startswith(("/", ".", "~")) and ":" not in base
    return base if is_id and not resolve(base).exists() else ""


def shown_path(base: str, place: Path) -> str:
    """A teacher's path as plain diffusers takes it inside the export folder `place`."""
    if hub_id(base):
        return base
    return Path(os.path.relpath(resolve(base).resolve(), Path(place).resolve())).as_posix()


def keywords(arguments: dict) -> str:
    """Arguments as they follow others in a call."""
    return "".join(f", {k}={v!r}" for k, v in arguments.items())


def call_keywords(what: dict, family: Family, codec: Codec, info: ExportInfo) -> dict:
    """Sizes, steps and guidance as this pipeline's call takes them."""
    call = {**family.size_call(codec), "num_inference_steps": info.steps}
    given = info.timestep_arguments if not info.set_on_scheduler else {}
    call |= given
    if given and "num_inference_steps" not in given:
        del call["num_inference_steps"]
    w = float(info.steps if info.steps_as_guidance else info.guidance)
    own = info.guidance_range is not None and not info.guidance_adapter
    scale = w if own else info.embedded_guidance
    call |= info.step_arguments | family.guidance_call(scale)
    if not info.is_student and info.guidance != 1:
        call |= family.guided_call(info.guidance)
    call |= family.plain_call(what) | ({"output_type": "pil"} if family.temporal or family.views else {})
    return call


def _pipeline_usage(what: dict, teacher: Teacher, info: ExportInfo, place: Path) -> list[str]:
    """Text to image or video: an ordinary pipeline call."""
    family, codec, scheduler = teacher.family, teacher.codec, info.scheduler_class
    name, lora = teacher.pipeline, info.lora
    call = call_keywords(what, family, codec, info)
    own = info.guidance_range or info.step_lengths  # an input that the base has not
    adapter = info.guidance_adapter
    on_base = adapter or (lora and family.lora_loader and not own)
    names = sorted([name, *([scheduler] if on_base else [])])
    source = repr(shown_path(info.base, place)) if on_base else '"merged"' if lora else '"."'
    note = "  # the base, from this folder" if on_base else "" if lora else "  # this folder"
    moving = family.temporal or family.views
    tools = [*(["export_to_gif"] if moving else []), *(["load_image"] if family.needs_image else [])]
    lines = [
        "import torch",
        f"from diffusers import {', '.join(names)}",
        *([f"from diffusers.utils import {', '.join(tools)}"] if tools else []),
        *(["from guidance_adapter import load_guidance_adapter  # this folder"] if adapter else []),
        *(["from block_causal import generate  # this folder"] if info.causal else []),
        *(["from tile_attention import load_tiles  # this folder"] if info.tiles else []),
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        'dtype = torch.bfloat16 if device == "cuda" else torch.float32  # a CPU is slow in halves, or cannot',
        f"pipe = {name}.from_pretrained({source}, torch_dtype=dtype){note}",
    ]
    if on_base:
        calls = family.lora_calls(lora, list(family.adapted(teacher.network.net))) if lora else []
        lines += [
            f'pipe.scheduler = {scheduler}.from_pretrained(".", subfolder="scheduler")  # this folder',
            *(f'pipe.load_lora_weights("."{keywords(c)})' for c in calls),
        ]
    lines += ["pipe.to(device)", *_adapter_lines("pipe", info)]
    if info.tiles:
        lines.append(f'load_tiles(pipe.{family.component}, ".")  # which tiles its attention keeps')
    if info.causal:
        drawn = ", ".join(_requested(family, codec, info)).removeprefix("prompt=")
        return [*lines, f"frames = generate(pipe, {drawn})[0]", 'export_to_gif(frames, "sample.gif")']
    if info.step_lengths:
        call["latents"] = "latents"
        lines += _step_length_lines(family, info.step_lengths, codec.shape)
    if len(info.times or ()) > 1 and info.sampler == "renoise":
        lines.append(
            "torch.manual_seed(0)  # the noise between steps, where the pipeline hands on no generator"
        )
    if info.set_on_scheduler:  # the call takes no such list
        lines += [
            "set_timesteps = pipe.scheduler.set_timesteps",
            "pipe.scheduler.set_timesteps = lambda *_, device=None, **__: set_timesteps(",
            f"    device=device{keywords(info.timestep_arguments)}",
            ")",
        ]
    return [
        *lines,
        f"{'frames' if moving else 'image'} = pipe(",
        f"    {', '.join(_requested(family, codec, info))},",
        *_wrapped([f"{k}={v if k == 'latents' else repr(v)}" for k, v in call.items()]),
        f").{'frames' if family.temporal else 'images'}[0]",
        'export_to_gif(frames, "sample.gif")' if moving else 'image.save("sample.png")',
    ]


def _requested(family: Family, codec, info: ExportInfo) -> list[str]:
    """Keywords of a pipeline call that say what to draw."""
    prompt = '""' if info.enlarges else json.dumps(info.example or PROMPT, ensure_ascii=False)
    first = f"{family.label_key}=[3]" if family.label_key else f"prompt={prompt}"
    given = [first] if family.takes_text or family.label_key else []
    if family.needs_image:
        height, width = codec.pixels
        enlarged = f".resize(({width}, {height}), resample=3)" if info.enlarges else ""  # bicubic
        given.append(f'image=load_image("image.png"){enlarged}')
        given += ['last_image=load_image("last.png")'] if family.needs_last_image else []
    return [*given, "generator=torch.Generator().manual_seed(0)"]


def _adapter_lines(net: str, info: ExportInfo) -> list[str]:
    """Guidance adapters on a pipeline or network, at the export's scale; none where it has none."""
    file, w = info.guidance_adapter, float(info.guidance)
    return [f'load_guidance_adapter({net}, "{file}", guidance={w!r})'] if file else []


def _step_length_lines(family: Family, lengths: tuple[float, ...], shape: tuple[int, ...]) -> list[str]:
    """A pipeline whose network reads the length of each step as one more channel of its latent."""
    return [
        f"gaps, forward = iter({list(lengths)}), pipe.{family.component}.forward",
        "",
        "def with_gap(x, *args, **kwargs):  # the network also reads how long its step is",
        "    return forward(torch.cat([x, torch.full_like(x[:, :1], next(gaps))], 1), *args, **kwargs)",
        "",
        f"pipe.{family.component}.forward = with_gap",
        f"latents = torch.randn(1, {', '.join(map(str, shape))}, generator=torch.Generator().manual_seed(0))",
        "latents = latents.to(device, dtype)",
    ]


def _label_usage(what: dict, info: ExportInfo, codec: Codec, folder: str) -> list[str]:
    """UNet2DModel: the loop that its diffusers pipeline lacks (labels, patches, EDM scaling)."""
    scheduler, classes, shape = info.scheduler_class, codec.num_classes, codec.shape
    adapter = info.guidance_adapter
    edm, w = scheduler.startswith("EDM"), 1.0 if info.is_student else info.guidance
    label = ", class_labels=label" if classes else ""
    step = [f"        out = net({'scheduler.scale_model_input(x, t)' if edm else 'x'}, t{label}).sample"]
    if classes and w != 1:
        step += [
            step[0].replace("out =", "null =").replace("=label", "=label * 0 + " + str(classes)),
            f"        out = null + {w} * (out - null)",
        ]
    if info.step_lengths:
        read = "torch.cat([x, torch.full_like(x[:, :1], gap)], 1)"
        if edm:
            read = read.replace("[x, ", "[scheduler.scale_model_input(x, t), ")
        step = [f"        out = net({read}, t{label}).sample"]
    given = keywords(info.step_arguments)
    step += [f"        x = scheduler.step(out, t, x{given}, generator=generator).prev_sample"]
    loop = ["    for t in scheduler.timesteps:", *step]
    if info.step_lengths:
        loop[0] = f"    for t, gap in zip(scheduler.timesteps, {list(info.step_lengths)}):  # its length"
    times = list(info.times or ())
    if info.needs_loop:
        loop = _renoise_loop(times, label)
    arguments = dict(info.timestep_arguments)
    given = f"{info.steps}" if edm or not arguments else ""
    if edm and arguments:
        given += f", sigmas=torch.tensor({arguments.pop('sigmas')})"
    given = (given + keywords(arguments)).removeprefix(", ")
    set_steps = [] if info.needs_loop else [f"scheduler.set_timesteps({given})"]
    image = f"torch.pixel_shuffle(x, {what['patch']})" if what.get("patch", 1) > 1 else "x"
    scale = " * scheduler.config.sigma_max  # init_noise_sigma is slightly more" if edm else ""
    if edm and times and times[0] != info.scheduler["sigma_max"]:
        scale = f" * {times[0]!r}  # the first noise level this student knows"
    return [
        "import torch",
        f"from diffusers import {', '.join(sorted((scheduler, 'UNet2DModel')))}",
        *(["from guidance_adapter import load_guidance_adapter  # this folder"] if adapter else []),
        "from PIL import Image",
        "",
        f'net = UNet2DModel.from_pretrained("{folder}", subfolder="unet", torch_dtype=torch.float32)',
        *_adapter_lines("net", info),
        f'scheduler = {scheduler}.from_pretrained("{"." if adapter else folder}", subfolder="scheduler")',
        *set_steps,
        "generator = torch.Generator().manual_seed(0)",
        *(["label = torch.tensor([" + str(min(3, classes - 1)) + "])"] if classes else []),
        f"x = torch.randn(1, {', '.join(map(str, shape))}, generator=generator){scale}",
        "with torch.no_grad():",
        *loop,
        f"pixels = ({image} / 2 + 0.5).clamp(0, 1)[0].mul(255).round().to(torch.uint8)",
        "image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())",
        'image.save("sample.png")',
    ]


def _scan_usage(info: ExportInfo, codec: ScanCodec, folder: str) -> list[str]:
    """A scan is completed: scan.npy [M, 3] becomes completed.npy [N, 3]."""
    scheduler, w = info.scheduler_class, 1.0 if info.is_student else info.guidance
    given = (f"{info.steps}" if not info.timestep_arguments else "") + keywords(info.timestep_arguments)
    local = codec.formulation == "local"
    sigmas = "(1 - scheduler.alphas_cumprod[scheduler.timesteps[0]]).sqrt()"
    scale = " * scheduler.sigmas[0]" if info.is_student else f" * {sigmas}"
    step = ["        x = scheduler.step(out, t, x).prev_sample"]
    if local and not info.is_student:  # the scheduler would scale the data
        step = [
            "        s = (1 - scheduler.alphas_cumprod[t]).sqrt()",
            "        later = scheduler.timesteps[scheduler.timesteps < t][:1]",
            "        x = x - (s - (1 - scheduler.alphas_cumprod[later]).sqrt().sum()) * out",
        ]
    if info.needs_loop:
        step = [
            "        s, later = scheduler.sigmas[scheduler.index_for_timestep(t):][:2]",
            "        x = x - s * out",
            "        x = x + later * torch.randn(x.shape, generator=generator)",
        ]
    guided = ["        null = net(x, t, scan, 0 * scan).sample", f"        out = null + {w} * (out - null)"]
    return [
        "import numpy",
        "import torch",
        f"from diffusers import {scheduler}",
        "from point_voxel import PointVoxelModel  # this folder",
        "",
        f'net = PointVoxelModel.from_pretrained("{folder}", subfolder="unet", torch_dtype=torch.float32)',
        f'scheduler = {scheduler}.from_pretrained("{folder}", subfolder="scheduler")',
        f"scheduler.set_timesteps({given.removeprefix(', ')})",
        f'scan = torch.from_numpy(numpy.load("scan.npy")).float()[None, :{codec.scan_points}]',
        "generator = torch.Generator().manual_seed(0)",
        f"x = torch.randn(1, {codec.shape[0]}, 3, generator=generator){scale if local else ''}",
        "with torch.no_grad():",
        "    for t in scheduler.timesteps:",
        "        out = net(x, t, scan, scan).sample",
        *(guided if w != 1 else []),
        *step,
        'numpy.save("completed.npy", (net.starts(scan) + x)[0].numpy())',
    ]


def _restorer_usage(teacher: Teacher, info: ExportInfo, folder: str) -> list[str]:
    """A small picture, image.png, is enlarged: the walk begins at it, enlarged and noised."""
    share, codec, scheduler = teacher.network.start_noise, teacher.codec, info.scheduler_class
    assert isinstance(codec, PictureCodec), "this family has no other"
    (height, width), patch, grey = codec.pixels, codec.patch, codec.colours == 1
    mode, turned = ("L", "[None]") if grey else ("RGB", ".permute(2, 0, 1)")
    folded = f"torch.pixel_unshuffle(shown, {patch})" if patch > 1 else "shown"
    image = f"torch.pixel_shuffle(x, {patch})" if patch > 1 else "x"
    walk = [
        f'scheduler = {scheduler}.from_pretrained("{folder}", subfolder="scheduler")',
        f"scheduler.set_timesteps({info.steps})",
        "with torch.no_grad():",
        "    for t in scheduler.timesteps:",
        "        out = net(torch.cat([x, shown], 1), t).sample",
        "        x = scheduler.step(out, t, x).prev_sample",
    ]
    if info.fidelity is not None:
        told = "torch.tensor([1000 * fidelity])"
        walk = [
            f"fidelity = {info.fidelity!r}  # up to {(info.fidelity_range or (0, 1))[1]!r}",
            "with torch.no_grad():",
            f"    x = x - net(torch.cat([x, shown], 1), {told}).sample  # the one step",
        ]
    names = ["UNet2DModel"] if info.fidelity is not None else sorted((scheduler, "UNet2DModel"))
    return [
        "import numpy",
        "import torch",
        f"from diffusers import {', '.join(names)}",
        "from PIL import Image",
        "",
        f'net = UNet2DModel.from_pretrained("{folder}", subfolder="unet", torch_dtype=torch.float32)',
        f'small = Image.open("image.png").convert("{mode}")',
        f"large = small.resize(({width}, {height}), resample=3)  # bicubic",
        f"shown = torch.from_numpy(numpy.array(large)){turned}[None].float() / 127.5 - 1",
        f"shown = {folded}",
        "noise = torch.randn(shown.shape, generator=torch.Generator().manual_seed(0))",
        f"x = {(1 - share**2) ** 0.5!r} * shown + {share!r} * noise  # where the walk begins",
        *walk,
        f"pixels = ({image} / 2 + 0.5).clamp(0, 1)[0].mul(255).round().to(torch.uint8)",
        'Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy()).save("sample.png")',
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


def usage(what: dict, teacher: Teacher, info: ExportInfo, place: Path) -> str:
    """Python code that, in the export's folder `place`, loads it and writes sample.png (or sample.gif): it
    imports diffusers and never fastgen, and computes in a precision that the device has.
    """
    if isinstance(teacher.codec, TextCodec) or teacher.family.label_key:
        return "\n".join(_pipeline_usage(what, teacher, info, place))
    if isinstance(teacher.codec, ScanCodec):
        return "\n".join(_scan_usage(info, teacher.codec, "merged" if info.lora else "."))
    if isinstance(teacher.codec, PictureCodec):
        return "\n".join(_restorer_usage(teacher, info, "merged" if info.lora else "."))
    base = shown_path(info.base, place) if info.guidance_adapter else ""
    return "\n".join(_label_usage(what, info, teacher.codec, base or ("merged" if info.lora else ".")))


def _wrapped(items: list[str], width: int = 90) -> list[str]:
    """Arguments of a call in indented lines."""
    import textwrap

    return textwrap.wrap(", ".join(items) + ",", width, initial_indent=" " * 4, subsequent_indent=" " * 4)
