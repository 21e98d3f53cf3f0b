"""The weight files of one component of a model: variants (fp16), shards, quantised weights, single files."""

import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import torch

from fastgen.core.errors import UserError
from fastgen.core.paths import inside
from fastgen.core.reading import read_json

WEIGHTS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
INDEX = re.compile(r"(?P<base>[^.]+)\.safetensors\.index(\.(?P<variant>[^.]+))?\.json")
SHARD = re.compile(r"(?P<base>[^.]+?)(\.(?P<a>[^.]+?))?-\d{5}-of-\d{5}(\.(?P<b>[^.]+))?\.safetensors")
WHOLE = re.compile(r"(?P<base>[^.]+)(\.(?P<variant>[^.]+))?\.safetensors")
QUANTISERS = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "quanto": "optimum.quanto",
    "gptq": "gptqmodel",
    "awq": "awq",
    "modelopt": "modelopt",
}
"""quantization_config.quant_method -> the Python package that reads it"""


def variants(names: list[str]) -> dict[str | None, list[str]]:
    """File names of a component by variant; None is the full weights, "fp16" is *.fp16.safetensors."""
    found: dict[str | None, list[str]] = {}
    for name in sorted(names):
        if match := INDEX.fullmatch(name):
            variant = match["variant"]
        elif match := SHARD.fullmatch(name):
            variant = match["a"] or match["b"]
        elif match := WHOLE.fullmatch(name):
            variant = match["variant"]
        else:
            continue
        found.setdefault(variant, []).append(name)
    return found


def choose_variant(folder: Path, dtype: torch.dtype, key: str) -> str | None:
    """The variant of a component's weights to read: the full weights where they exist, else the variant of
    `dtype`, else the only one.
    """
    known = variants([f.name for f in folder.iterdir()])
    if None in known or not known:
        return None
    preferred = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype)
    for variant in (preferred, "fp16", "bf16"):
        if variant in known:
            return variant
    if len(known) > 1:
        names = ", ".join(sorted(v for v in known if v))
        instruction = "remove the variant from the file names of the one to read"
        raise UserError(key, f"{folder} has no full weights, but the variants {names}", instruction)
    return next(iter(known))


def check_indexes(folder: Path, variant: str | None, key: str) -> None:
    """Every index of a component's shards names files inside of its folder, and the one of the variant to
    read names files that exist; UserError otherwise.
    """
    names = [f.name for f in folder.iterdir() if ".index." in f.name and f.suffix == ".json"]
    read = variants(names).get(variant, [])
    for name in sorted(names):
        shards = read_json(folder / name, key).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(key, f"{folder / name} has no weight_map", "copy or download the folder again")
        for shard in sorted({str(s) for s in shards.values()}):
            file = inside(folder, shard, key)
            if name in read and (Path(shard).name != shard or not file.is_file()):
                found = f"{folder} has no file {shard!r}, which {name} names"
                raise UserError(key, found, "copy or download the folder again")


def check_quantised(folder: Path, config: dict, key: str, denoiser: bool = False) -> None:
    """UserError for quantised weights that cannot be read here; a denoiser's can never be trained from."""
    quantised = config.get("quantization_config")
    if not quantised:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    what = f"{folder} is stored quantised ({method or 'by an unknown method'})"
    full = f"give a model whose {folder.name} is not quantised"
    if denoiser:
        raise UserError(key, f"{what}, and a denoiser cannot be distilled from quantised weights", full)
    package = QUANTISERS.get(str(method))
    if package is None:
        raise UserError(key, what, full)
    try:
        missing = importlib.util.find_spec(package) is None
    except ModuleNotFoundError:  # of a package inside a missing one
        missing = True
    if missing:
        raise UserError(key, f"{what}, and {package} is not installed", f"install {package}, or {full}")


def component_dtype(config: dict, cls: Any, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, but float32 instead of float16 for an autoencoder whose config says force_upcast: its
    activations overflow float16. As in diffusers, bfloat16 is kept.
    """
    if dtype != torch.float16 or not hasattr(cls, "load_config"):
        return dtype
    default = inspect.signature(cls.__init__).parameters.get("force_upcast")
    upcast = config.get("force_upcast", default is not None and default.default is True)
    return torch.float32 if upcast else dtype


def drop_variant(folder: Path) -> None:
    """Rename the weights of a component that has only one variant to the names of full weights, so that it
    is read without naming the variant. Shards keep their names, which the index lists.
    """
    known = variants([f.name for f in folder.iterdir()])
    if None in known or not known:
        return
    variant = choose_variant(folder, torch.float32, "export")
    for name in known[variant]:
        if SHARD.fullmatch(name) is None:
            (folder / name).rename(folder / name.replace(f".{variant}", "", 1))


def single_file(path: Path) -> UserError | None:
    """The error for a path that names one weight file and not a folder; None for any other path."""
    if path.suffix not in (WEIGHTS, ".gguf", *PICKLES) or path.is_dir():
        return None
    if not path.is_file():
        return UserError("teacher.path", f"{str(path)!r} does not exist", "give a diffusers folder")
    if path.suffix in PICKLES:
        found = f"{path} is a pickled single-file checkpoint"
        return UserError("teacher.path", found, "give a diffusers folder with .safetensors files")
    if path.suffix == WEIGHTS and _is_adapter(path):
        found = f"{path} is a LoRA file"
        return UserError("teacher.path", found, "give the folder of its base, and the file as student.init")
    found = f"{path} is a single-file checkpoint, and fastgen reads diffusers folders"
    convert = f"<pipeline class>.from_single_file({str(path)!r}).save_pretrained('folder')"
    instruction = f"convert it once with diffusers, {convert}, and give that folder"
    return UserError("teacher.path", found, instruction)


def _is_adapter(file: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as handle:
            return any("lora_" in k or ".lora." in k for k in handle.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False
