"""A workflow for ComfyUI beside an export: comfyui.json, in the API format that its window and server load.

loaders -> LoRA or diffusion model -> prompt -> the student's own noise levels -> decode -> save

The levels are written out (node ManualSigmas), since ComfyUI's named schedules come near a student's times
and do not meet them. A level is sqrt((1 - a) / a) of the step's alphas_cumprod a, or the flow time itself.
ComfyUI scales its first noise to the first level and starts from unit noise at its last level alone, so a
student that starts elsewhere has no workflow.
"""

from pathlib import Path

from fastgen.core.files import write_json
from fastgen.diffusion.schedules import VP, Flow
from fastgen.export.info import ExportInfo
from fastgen.networks.codecs import TextCodec
from fastgen.networks.teacher import Teacher

FILE = "comfyui.json"
UNETS, TRANSFORMERS = ("sd", "sdxl"), ("sd3", "flux")
"""families whose LoRA keys ComfyUI reads: under kohya's names, and as `transformer.` with PEFT's"""
SAMPLERS = {"renoise": "lcm", "ode": "euler"}
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""that ComfyUI gives every UNet"""
PROMPT = "a photo of a cat"


def unfit(teacher: Teacher, info: ExportInfo) -> str:
    """Why ComfyUI's own nodes cannot sample this export; empty where they can."""
    family, schedule = teacher.family.name, teacher.schedule
    if not info.is_student or family not in (*UNETS, *TRANSFORMERS):
        return f"it has no nodes for a {'student' if info.is_student else 'teacher'} of {family}"
    if info.guidance_range or info.step_lengths or info.steps_as_guidance:
        return "its loaders drop the network's extra input"
    if info.num_students or info.nasa_scale:
        return "it has no node for several students, or for this negative prompt"
    if info.sampler not in SAMPLERS:
        return f"it has no sampler for {info.sampler} steps"
    times = info.times or ()
    if isinstance(schedule, VP):
        config = info.teacher_scheduler
        if any(config.get(k) != v for k, v in NOISE.items()) or config.get("rescale_betas_zero_snr"):
            return "it gives every UNet the noise levels of Stable Diffusion, and these are others"
        first = config["num_train_timesteps"] - 1
    else:
        first = 1.0
    if not isinstance(schedule, (VP, Flow)) or abs(times[0] - first) > 1e-6:
        return f"it starts from unit noise at time {first:g} alone, and the student at {times[0]:g}"
    if info.student_kind == "lora" and not lora_file(info, family):
        return "it does not read the names of all adapted layers"
    if info.student_kind == "full" and family not in UNETS:
        return f"a whole network of {family} in diffusers' names was never tried there"
    return ""


def lora_file(info: ExportInfo, family: str) -> str:
    """The one of an export's LoRA files whose keys ComfyUI reads."""
    return info.kohya if family in UNETS else info.lora


def levels(teacher: Teacher, info: ExportInfo) -> list[float]:
    """ComfyUI's sigma of each step, and the 0 it ends at."""
    import torch

    times = torch.tensor(info.times, dtype=torch.float64)
    schedule = teacher.schedule
    if isinstance(schedule, VP):
        times = schedule.sigma(times) / schedule.alpha(times)
    return [*times.tolist(), 0.0]


def workflow(teacher: Teacher, info: ExportInfo) -> dict[str, dict]:
    """Nodes by number; `unfit` must be empty."""
    family, name = teacher.family.name, f"{info.name}.safetensors"
    base = Path(info.base.replace(":", "/")).name
    codec = teacher.codec
    assert isinstance(codec, TextCodec), "the families here take prompts"
    height, width = codec.pixels
    nodes: dict[str, dict] = {"1": _node("CheckpointLoaderSimple", ckpt_name=f"{base}.safetensors")}
    model = ["1", 0]
    if info.student_kind == "lora":
        file = lora_file(info, family)
        nodes["2"] = _node("LoraLoaderModelOnly", model=model, lora_name=file, strength_model=1.0)
    else:
        nodes["2"] = _node("UNETLoader", unet_name=name, weight_dtype="default")
    model = ["2", 0]
    if info.teacher_scheduler.get("prediction_type") == "v_prediction":
        nodes["3"] = _node("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False)
        model = ["3", 0]
    nodes["4"] = _node("CLIPTextEncode", clip=["1", 1], text=PROMPT)
    positive = ["4", 0]
    if info.embedded_guidance is not None:
        nodes["5"] = _node("FluxGuidance", conditioning=positive, guidance=float(info.embedded_guidance))
        positive = ["5", 0]
    nodes["6"] = _node("CLIPTextEncode", clip=["1", 1], text="")
    latent = "EmptyLatentImage" if family in UNETS else "EmptySD3LatentImage"
    nodes["7"] = _node(latent, width=width, height=height, batch_size=1)
    nodes["8"] = _node("KSamplerSelect", sampler_name=SAMPLERS[info.sampler])
    sigmas = ", ".join(f"{level:.9g}" for level in levels(teacher, info))
    nodes["9"] = _node("ManualSigmas", sigmas=sigmas)
    run = {"add_noise": True, "noise_seed": 0, "cfg": 1.0}
    ends = {"positive": positive, "negative": ["6", 0], "sampler": ["8", 0], "sigmas": ["9", 0]}
    nodes["10"] = _node("SamplerCustom", model=model, **run, **ends, latent_image=["7", 0])
    nodes["11"] = _node("VAEDecode", samples=["10", 0], vae=["1", 2])
    nodes["12"] = _node("SaveImage", images=["11", 0], filename_prefix=info.name)
    return nodes


def _node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


def write_workflow(folder: Path, teacher: Teacher, info: ExportInfo) -> Path | None:
    """comfyui.json in the folder of an export; None where ComfyUI cannot sample it."""
    if unfit(teacher, info):
        return None
    write_json(folder / FILE, workflow(teacher, info))
    return folder / FILE
