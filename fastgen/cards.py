"""Model cards: settings, measured numbers, and a snippet in plain diffusers that works as it stands."""

import json
from pathlib import Path

import yaml

from fastgen.backbones import Teacher
from fastgen.checkpoint import write_text
from fastgen.roles import Student
from fastgen.serving import Serving

LABELS = '''import torch
from diffusers import {scheduler}, UNet2DModel

folder = "{folder}"
unet = UNet2DModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")
scheduler.set_timesteps({steps})
generator = torch.Generator().manual_seed(0)
labels = torch.arange(10)
x = torch.randn(10, {shape}, generator=generator) * scheduler.init_noise_sigma
with torch.no_grad():
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(unet(scaled, t, class_labels=labels).sample, t, x, generator=generator).prev_sample
images = (torch.nn.functional.pixel_shuffle(x, {patch}) / 2 + 0.5).clamp(0, 1)  # [10, C, H, W]
'''
RENOISE_EDM = '''import torch
from diffusers import EDMEulerScheduler, UNet2DModel

folder = "{folder}"
unet = UNet2DModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
scheduler = EDMEulerScheduler.from_pretrained(folder, subfolder="scheduler")
times = torch.tensor({times})
labels = torch.arange(10)
x = torch.randn(10, {shape}) * times[0]
with torch.no_grad():
    for i, t in enumerate(times):
        out = unet(scheduler.precondition_inputs(x, t), 0.25 * t.log(), class_labels=labels).sample
        x0 = scheduler.precondition_outputs(x, out, t)
        x = x0 + times[i + 1] * torch.randn_like(x0) if i + 1 < len(times) else x0
images = (torch.nn.functional.pixel_shuffle(x, {patch}) / 2 + 0.5).clamp(0, 1)  # [10, C, H, W]
'''
TEXT = '''import torch
from diffusers import {pipeline}{lora_import}

pipe = {pipeline}.from_pretrained("{base}", use_safetensors=True)
{load}images = pipe(
    ["a red dress on a grey background"], {steps}, guidance_scale=1.0, output_type="pt",
    generator=torch.Generator().manual_seed(0), {extra}
).images  # [1, 3, H, W] in [0, 1]
'''


def snippet(folder: str, teacher: Teacher, student: Student, serving: Serving, lora_file: str = "", base: str = "") -> str:
    """Ten lines of plain diffusers that sample this export."""
    codec, family = teacher.codec, teacher.backbone.family
    scheduler = type(serving.scheduler).__name__
    if not hasattr(codec, "prompts"):
        shape = ", ".join(map(str, codec.shape))
        if serving.needs_loop:
            return RENOISE_EDM.format(folder=folder, times=list(student.times), shape=shape, patch=codec.patch)
        steps = ", ".join(f"{k}={v}" for k, v in serving.arguments.items()) or len(student.times)
        return LABELS.format(folder=folder, scheduler=scheduler, steps=steps, shape=shape, patch=codec.patch)
    side = student.backbone.family.name == "sana"
    size = teacher.codec.decode_size()
    extra = [f"height={size}", f"width={size}"]
    if side:
        extra += ["complex_human_instruction=None", "use_resolution_binning=False", f"max_sequence_length={codec.max_length}"]
    steps = ", ".join(f"{k}={v}" for k, v in serving.arguments.items()) or f"num_inference_steps={len(student.times)}"
    load = ""
    if lora_file:
        load = (f'pipe.scheduler = {scheduler}.from_pretrained("{folder}", subfolder="scheduler")\n'
                f'pipe.load_lora_weights("{folder}", weight_name="{lora_file}")\n')
    return TEXT.format(
        pipeline=family.pipeline, lora_import=f", {scheduler}" if lora_file else "", base=base or folder, load=load,
        steps=steps, extra=", ".join(extra),
    )


def write_card(folder: Path, cfg, teacher: Teacher, student: Student, serving: Serving, results: dict) -> None:
    """README.md of an export."""
    final = cfg.output_dir + "/export"
    files = [f.name for f in sorted(folder.glob("*-lora.safetensors"))]
    labelled = not hasattr(teacher.codec, "prompts")
    code_folder = f"{final}/merged" if files and labelled else final
    base = cfg.teacher.path.replace("assets:", "assets/") if files else ""
    code = snippet(code_folder, teacher, student, serving, "" if labelled or not files else files[0], base)
    objective = cfg.all_stages()[-1].objective.name
    task = "unconditional-image-generation" if labelled else "text-to-image"
    front = {
        "base_model": cfg.teacher.path, "library_name": "diffusers", "license": "other",
        "tags": [task, "distillation", "few-step", *(["lora"] if files else [])],
    }
    lines = [
        "---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "",
        f"# {Path(cfg.output_dir).name}", "",
        f"A {len(student.times)}-step student of `{cfg.teacher.path}`, distilled by `{objective}` with fastgen.", "",
        f"- steps: {len(student.times)} at times {[round(t, 6) for t in student.times]} ({student.sampler})",
        f"- scheduler: {type(serving.scheduler).__name__}" + (f", pass {serving.arguments}" if serving.arguments else ""),
        f"- guidance: {cfg.teacher.guidance} is baked in; sample with guidance_scale 1, negative prompts have no effect",
    ]
    if files:
        lines.append(f"- LoRA: `{files[0]}`, alpha equals rank in every reader; load at strength 1")
    if files and labelled:
        lines.append("- no pipeline reads a LoRA for this class: `merged/` is the student as a folder, "
                     "or `fastgen.lora.load_lora_into(unet, file)`")
    lines += ["", "```python", code.rstrip(), "```", "", "## Measured", "", "```json", json.dumps(results, indent=2), "```", ""]
    write_text(folder / "README.md", "\n".join(lines))
