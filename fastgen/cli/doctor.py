"""fastgen doctor: versions, devices, attention kernels, and which optional packages are missing for what."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import NamedTuple

from fastgen.core.console import CommandFlags, exit_code, quiet


class Optional(NamedTuple):
    """A package that one extra of fastgen-distill installs."""

    module: str
    extra: str
    for_what: str


OPTIONAL = (
    Optional("bitsandbytes", "quant", "teacher.quantization nf4; optim.student.name adamw8bit, on CUDA"),
    Optional("torchao", "quant", "teacher.quantization int8, fp8; optim.student.name adamw8bit_torchao"),
    Optional("xformers", "gpu", "teacher.attention xformers, on CUDA"),
    Optional("open_clip", "eval", "fastgen eval --metrics clip hps"),
    Optional("torch_fidelity", "eval", "fastgen eval --metrics fid kid"),
    Optional("gradio", "demo", "fastgen demo"),
    Optional("datasets", "data", "data.dataset, parquet files"),
    Optional("imageio_ffmpeg", "video", "clips as mp4"),
    Optional("trimesh", "threed", "meshes of 3D assets"),
    Optional("mcubes", "threed", "meshes of 3D assets"),
    Optional("gsplat", "threed-cuda", "3D Gaussians rendered on CUDA"),
    Optional("tensorboard", "tensorboard", "train.report_to tensorboard"),
    Optional("wandb", "wandb", "train.report_to wandb"),
    Optional("trackio", "trackio", "train.report_to trackio"),
)
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "huggingface-hub")
NOT_INSTALLED = "not installed"


def version_of(distribution: str) -> str:
    """Its installed version, or that it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def missing(module: str) -> bool:
    """Whether an optional package cannot be imported here."""
    return importlib.util.find_spec(module) is None


def versions() -> list[str]:
    """fastgen, Python, the libraries."""
    from fastgen import __version__

    rows = {"fastgen": __version__, "python": f"{platform.python_version()}, {platform.platform()}"}
    rows |= {name: version_of(name) for name in LIBRARIES}
    return [f"  {name:<18}{value}" for name, value in rows.items()]


def devices() -> list[str]:
    """What torch computes on, and the memory of each."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    lines = [f"  {'cpu':<18}{cores} cores, {torch.get_num_threads()} threads of torch, {free}"]
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        half = "bf16, fp16" if torch.cuda.is_bf16_supported() else "fp16"
        size = f"{found.total_memory / 2**30:.1f} GiB"
        kind = f"capability {found.major}.{found.minor}"
        lines.append(f"  {f'cuda:{i}':<18}{found.name}, {size}, {kind}, {half}")
    if not torch.cuda.device_count():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        lines.append(f"  {'cuda':<18}none; torch is built with {built}")
    if torch.backends.mps.is_available():
        lines.append(f"  {'mps':<18}there, not used: give cpu or cuda")
    return lines


def kernels() -> list[str]:
    """Attention kernels that ran forward and backward just now, by device."""
    import torch

    from fastgen.networks.attention import DISPATCHED, TORCH, works

    lines = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        able = {name: works(name, device) for name in (*TORCH, *DISPATCHED)}
        yes = ", ".join(name for name, good in able.items() if good)
        no = ", ".join(name for name, good in able.items() if not good)
        lines.append(f"  {device:<18}{yes or 'none by name'}{no and f'   (not here: {no})'}")
    return lines


def extras() -> list[str]:
    """Every optional package: there, or what it is missing for and how to install it."""
    lines = []
    for module, extra, for_what in OPTIONAL:
        if missing(module):
            lines.append(f'  {module:<18}missing: {for_what}   pip install "fastgen-distill[{extra}]"')
        else:
            lines.append(f"  {module:<18}there: {for_what}")
    return lines


def folders() -> list[str]:
    """Where bundled files and downloaded models are."""
    from huggingface_hub import constants

    from fastgen.core.paths import asset, config

    offline = ", HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    rows = {"configs": config(""), "assets": asset(""), "hub cache": f"{constants.HF_HUB_CACHE}{offline}"}
    return [f"  {name:<18}{value}" for name, value in rows.items()]


SECTIONS = {
    "versions": versions,
    "devices": devices,
    "attention kernels (teacher.attention)": kernels,
    "optional packages": extras,
    "folders": folders,
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of `fastgen doctor`; 0, or 2 for a user's mistake."""
    flags = CommandFlags("fastgen doctor", description=__doc__, allow_abbrev=False)
    flags.parse_args(argv)
    quiet()
    return exit_code(_print)


def _print() -> int:
    for title, section in SECTIONS.items():
        print(title, *section(), "", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
