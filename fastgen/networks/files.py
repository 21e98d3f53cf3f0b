"""Reading the files of a diffusers folder; errors are UserErrors of one line."""

import contextlib
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastgen.core.console import no_weight_bars
from fastgen.core.errors import UserError, first_line
from fastgen.core.paths import resolve
from fastgen.core.reading import read_json, readable
from fastgen.families.parts import cast_network
from fastgen.networks.weight_files import (
    PICKLES,
    WEIGHTS,
    check_indexes,
    check_quantised,
    choose_variant,
    component_dtype,
    single_file,
)

OWN = {"PointVoxelModel": "fastgen.networks.point_voxel"}
"""classes of diffusers models that are ours, and their modules"""
DTYPES = {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    files = [f.name for f in folder.iterdir()] if folder.is_dir() else []
    if not any(f.endswith(WEIGHTS) for f in files):
        pickles = [f for f in files if f.endswith(PICKLES)]
        found = f"{folder} has only pickled weights ({pickles[0]})" if pickles else f"{folder} has no weights"
        raise UserError(key, found, "give a folder with .safetensors files, the only format that is read")
    config = read_json(folder / "config.json", key)
    check_quantised(folder, config, key, denoiser)
    variant = choose_variant(folder, dtype, key)
    check_indexes(folder, variant, key)
    dtype = component_dtype(config, cls, dtype)
    with readable(key, folder):
        if not weights:
            return cast_network(_build_on_meta(folder, cls), dtype)
        no_weight_bars()
        chosen = {"variant": variant, "use_safetensors": True, "local_files_only": True}
        return cls.from_pretrained(folder, torch_dtype=dtype, **chosen)


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


def component_class(folder: Path, key: str = "teacher.path") -> type:
    """The class of diffusers or transformers that a component's config.json names; `key` is the setting that
    an error names.
    """
    import diffusers
    import transformers

    config = read_json(folder / "config.json", key)
    library: ModuleType = diffusers
    name: object = config.get("_class_name", "")
    kind: type = diffusers.ModelMixin
    if name in OWN:
        return network_class(str(name))
    if config.get("architectures"):
        library, name, kind = transformers, config["architectures"][0], transformers.PreTrainedModel
    cls = library_class(library, name, kind)
    if cls is None:
        short = str(name)[:80]
        found = f"{folder / 'config.json'} names the class {short!r}, which is no model of {library.__name__}"
        raise UserError(key, found, f"correct the name, or install another {library.__name__}")
    return cls


def network_class(name: str) -> Any:
    """The class of a denoiser by its name, of diffusers or of our own; AttributeError for none."""
    import diffusers

    return getattr(importlib.import_module(OWN[name]) if name in OWN else diffusers, name)


def library_class(library: ModuleType, name: object, *kinds: type) -> Any:
    """The class that a file names, or None if the library has none of these kinds by that name: nothing else
    of a library is ever called by name.
    """
    found = getattr(library, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, kinds) else None


def named_class(folder: Path, part: str, library: object, name: object) -> Any:
    """The model or processor that a model_index.json names for a component, in a library or in the module of
    one of diffusers' pipelines.
    """
    import diffusers
    import transformers

    cls = None
    if isinstance(library, str) and library.isidentifier():
        where = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
        processors = (
            transformers.AutoImageProcessor,
            transformers.image_processing_base.ImageProcessingMixin,
            transformers.ProcessorMixin,
            transformers.FeatureExtractionMixin,
        )
        with contextlib.suppress(ImportError):
            module = importlib.import_module(where)
            models = (diffusers.ModelMixin, transformers.PreTrainedModel)
            cls = library_class(module, name, *models, *processors)
    if cls is None:
        found = f"{folder} names {str(name)[:80]!r} of {str(library)[:80]!r} as its component {part!r}"
        raise UserError("teacher.path", found, "name a model or processor of diffusers or transformers")
    return cls


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

    with readable("teacher.path", folder):
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
