"""Files of a diffusers folder, read with their trouble told in one line."""

import json
from pathlib import Path

import torch
from torch import nn

from fastgen.core.errors import UserError, first_line
from fastgen.core.paths import resolve

DTYPES = {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def read_json(path: Path, key: str) -> dict:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(key, f"{path} does not exist", "expected a diffusers folder with this part") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(key, f"{path} is not valid JSON ({error})", "copy the file again") from None
    if not isinstance(found, dict):
        raise UserError(key, f"{path} holds no JSON object", "copy the file again")
    return found


def load_part(folder: Path, key: str, cls, weights: bool = True, dtype=torch.float32):
    """`from_pretrained` of one sub-folder, safetensors only, with file trouble told in one line.

    With weights=False the files' headers are checked and the network is laid out on the meta device.
    """
    from safetensors import SafetensorError

    files = [f.name for f in folder.iterdir()] if folder.is_dir() else []
    if not any(f.endswith(".safetensors") for f in files):
        pickles = [f for f in files if f.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        found = (
            f"{folder} holds only pickled weights ({pickles[0]})" if pickles else f"{folder} has no weights"
        )
        raise UserError(key, found, "fastgen reads .safetensors files only")
    try:
        if not weights:
            return nn.Module.to(_layout(folder, cls), dtype)
        return cls.from_pretrained(folder, use_safetensors=True, local_files_only=True, torch_dtype=dtype)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            key, f"{folder} cannot be read ({first_line(error)})", "the file may be truncated; copy it again"
        ) from None


def _layout(folder: Path, cls):
    """An empty network of the folder's config; its weight files are opened but not read."""
    from safetensors import safe_open

    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            handle.keys()
    with torch.device("meta"):
        if hasattr(cls, "load_config"):
            return cls.from_config(cls.load_config(folder, local_files_only=True))
        return cls(cls.config_class.from_pretrained(folder, local_files_only=True)).eval()


def component_class(folder: Path) -> type:
    """The diffusers or transformers class a component's config names."""
    import diffusers
    import transformers

    config = read_json(folder / "config.json", "teacher.path")
    library, name = diffusers, config.get("_class_name", "")
    if config.get("architectures"):
        library, name = transformers, config["architectures"][0]
    if not hasattr(library, name) or not name:
        raise UserError(
            "teacher.path", f"{folder / 'config.json'} names {name!r}", f"a class of {library.__name__}"
        )
    return getattr(library, name)


def hub_folder(path: str, allow_network: bool) -> Path:
    """A local folder for `path`: itself, a bundled asset, or (only when asked for by name) a hub snapshot."""
    try:
        folder = resolve(path)
    except FileNotFoundError as error:
        raise UserError("teacher.path", str(error), "see assets/teachers") from None
    if folder.is_dir():
        return folder
    looks_like_id = path.count("/") == 1 and not path.startswith((".", "/", "assets:"))
    if not looks_like_id:
        raise UserError(
            "teacher.path",
            f"{path!r} is not a folder",
            "a diffusers folder, assets:teachers/NAME or a hub id",
        )
    from huggingface_hub import snapshot_download

    try:
        skip = ["*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.onnx*"]
        return Path(snapshot_download(path, ignore_patterns=skip, local_files_only=not allow_network))
    except Exception as error:
        hint = "set teacher.allow_download true to fetch it" if not allow_network else first_line(error)
        raise UserError(
            "teacher.path", f"{path!r} is neither a folder nor in the local hub cache", hint
        ) from None


def load_tokenizer(folder: Path):
    """A tokenizer, its trouble told in one line."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raise many kinds
        told = f"{folder} cannot be read ({first_line(error)})"
        raise UserError("teacher.path", told, "copy it again") from None
