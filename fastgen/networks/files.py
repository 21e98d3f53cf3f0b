"""Reading the files of a diffusers folder; errors are UserErrors of one line."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastgen.core.errors import UserError, first_line
from fastgen.core.paths import resolve
from fastgen.families.parts import cast_network
from fastgen.networks.weight_files import (
    PICKLES,
    WEIGHTS,
    check_quantised,
    check_shards,
    choose_variant,
    component_dtype,
    single_file,
)

DTYPES = {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def read_json(path: Path, key: str) -> dict:
    """The object in a JSON file; `key` is the setting that an error names."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(key, f"{path} does not exist", "give a complete diffusers folder") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(key, f"{path} is not valid JSON ({error})", "copy the file again") from None
    if not isinstance(found, dict):
        raise UserError(key, f"{path} contains no JSON object", "copy the file again")
    return found


def load_part(
    folder: Path,
    key: str,
    cls: Any,
    weights: bool = True,
    dtype: torch.dtype = torch.float32,
    denoiser: bool = False,
) -> Any:
    """`from_pretrained` of one subfolder, safetensors files only; UserError if it cannot be read.

    Full weights are preferred to variants (*.fp16.safetensors), and an autoencoder that says force_upcast
    stays in float32 where `dtype` is float16. With weights=False the network is built on the meta device, and
    only the headers of its weight files are read.
    """
    from safetensors import SafetensorError

    files = [f.name for f in folder.iterdir()] if folder.is_dir() else []
    if not any(f.endswith(WEIGHTS) for f in files):
        pickles = [f for f in files if f.endswith(PICKLES)]
        found = f"{folder} has only pickled weights ({pickles[0]})" if pickles else f"{folder} has no weights"
        raise UserError(key, found, "give a folder with .safetensors files, the only format that is read")
    config = read_json(folder / "config.json", key)
    check_quantised(folder, config, key, denoiser)
    variant = choose_variant(folder, dtype, key)
    check_shards(folder, variant, key)
    dtype = component_dtype(config, cls, dtype)
    try:
        if not weights:
            return cast_network(_build_on_meta(folder, cls), dtype)
        chosen = {"variant": variant, "use_safetensors": True, "local_files_only": True}
        return cls.from_pretrained(folder, torch_dtype=dtype, **chosen)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, ImportError) as error:
        raise UserError(
            key, f"{folder} cannot be read ({first_line(error)})", "copy or download the folder again"
        ) from None


def _build_on_meta(folder: Path, cls: Any) -> Any:
    """The network of a folder's config without weights; the headers of its weight files are checked."""
    from safetensors import safe_open

    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            handle.keys()
    with torch.device("meta"):
        if hasattr(cls, "load_config"):
            return cls.from_config(cls.load_config(folder, local_files_only=True))
        return cls(cls.config_class.from_pretrained(folder, local_files_only=True)).eval()


def component_class(folder: Path) -> type:
    """The class of diffusers or transformers that a component's config.json names."""
    import diffusers
    import transformers

    config = read_json(folder / "config.json", "teacher.path")
    library: ModuleType = diffusers
    name = config.get("_class_name", "")
    if config.get("architectures"):
        library, name = transformers, config["architectures"][0]
    if not hasattr(library, name) or not name:
        found = f"{folder / 'config.json'} names the class {name!r}, which {library.__name__} does not have"
        raise UserError("teacher.path", found, f"correct the name, or install another {library.__name__}")
    return getattr(library, name)


def hub_folder(path: str, allow_network: bool) -> Path:
    """The local folder of `path`: a folder, a bundled asset, or a hub model (downloaded if allowed)."""
    try:
        folder = resolve(path)
    except FileNotFoundError as error:
        raise UserError("teacher.path", str(error), "choose one of the folders in assets/teachers") from None
    if folder.is_dir():
        return folder
    if (refusal := single_file(folder)) is not None:
        raise refusal
    looks_like_id = path.count("/") == 1 and not path.startswith((".", "/", "assets:"))
    if not looks_like_id:
        raise UserError(
            "teacher.path",
            f"{path!r} is not a folder",
            "give a diffusers folder, assets:teachers/NAME or a hub id (OWNER/NAME)",
        )
    from huggingface_hub import snapshot_download

    try:
        skip = ["*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.onnx*"]
        return Path(snapshot_download(path, ignore_patterns=skip, local_files_only=not allow_network))
    except Exception as error:
        hint = f"check the name and the connection ({first_line(error)})"
        if not allow_network:
            hint = "set teacher.allow_download to true to download it"
        raise UserError(
            "teacher.path", f"{path!r} is neither a folder nor in the local hub cache", hint
        ) from None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; UserError if it cannot be read."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raise errors of many types
        found = f"{folder} cannot be read ({first_line(error)})"
        raise UserError("teacher.path", found, "copy or download the folder again") from None
