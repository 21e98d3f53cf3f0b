"""Families by diffusers class, and `load_teacher`: a folder (or hub id) to a denoiser with its codec."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastgen.backbones.base import Backbone, Family
from fastgen.backbones.dit import Sana
from fastgen.backbones.unet import SDUNet, UNet2D
from fastgen.errors import UserError, first_line, suggest
from fastgen.paths import resolve
from fastgen.schedules import EDM, VP, Flow, Schedule

FAMILIES: dict[str, Family] = {f.net_class: f for f in (UNet2D(), SDUNet(), Sana())}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}


@dataclass
class Teacher:
    """Everything one folder holds: the denoiser, the codec around it, and what an export must repeat."""

    backbone: nn.Module
    codec: nn.Module
    scheduler: object = None
    path: str = ""
    info: dict | None = None

    @property
    def schedule(self) -> Schedule:
        return self.backbone.schedule

    def to(self, device) -> "Teacher":
        self.backbone.to(device)
        self.codec.to(device)
        return self


def schedule_of(scheduler, prediction: str = "auto") -> tuple[Schedule, str]:
    """The schedule and native prediction kind behind a diffusers scheduler."""
    config = scheduler.config
    kind = config.get("prediction_type", "flow_prediction")
    if type(scheduler).__name__.startswith("EDM"):
        schedule, found = (
            EDM(config.sigma_min, config.sigma_max, config.sigma_data, config.get("rho", 7.0)),
            "edm",
        )
    elif type(scheduler).__name__.startswith("FlowMatch") or kind == "flow_prediction":
        shift = (
            config.get("flow_shift")
            if kind == "flow_prediction" and "flow_shift" in config
            else config.get("shift")
        )
        schedule, found = Flow(shift or 1.0), "flow"
    elif hasattr(scheduler, "alphas_cumprod"):
        if kind not in PREDICTIONS:
            raise UserError(
                "scheduler.prediction_type", f"found {kind!r}", f"allowed: {', '.join(PREDICTIONS)}"
            )
        schedule, found = VP(scheduler.alphas_cumprod), PREDICTIONS[kind]
    else:
        raise UserError(
            "scheduler", f"{type(scheduler).__name__} has no noise schedule that fastgen knows", ""
        )
    if prediction not in ("auto", found):
        raise UserError(
            "teacher.prediction",
            f"{prediction!r} disagrees with {type(scheduler).__name__}",
            f"whose config says {found!r}; use 'auto' or mend scheduler_config.json",
        )
    return schedule, found


def load_scheduler(config: dict):
    """A diffusers scheduler from its config dict (which names its class)."""
    import diffusers

    cls = getattr(diffusers, config.get("_class_name", ""), None)
    if cls is None:
        raise UserError(
            "scheduler._class_name", f"found {config.get('_class_name')!r}", "a diffusers scheduler class"
        )
    return cls.from_config(config)


def _read_json(path: Path, key: str) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(key, f"{path} does not exist", "expected a diffusers folder with this part") from None
    except json.JSONDecodeError as error:
        raise UserError(key, f"{path} is not valid JSON ({error})", "") from None


def load_part(folder: Path, key: str, cls, weights: bool = True):
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
            return _layout(folder, cls)
        return cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32
        )
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

    config = _read_json(folder / "config.json", "teacher.path")
    library, name = diffusers, config.get("_class_name", "")
    if config.get("architectures"):
        library, name = transformers, config["architectures"][0]
    if not hasattr(library, name) or not name:
        raise UserError(
            "teacher.path", f"{folder / 'config.json'} names {name!r}", f"a class of {library.__name__}"
        )
    return getattr(library, name)


def family_of(net_class: str) -> Family:
    if net_class not in FAMILIES:
        raise UserError(
            "teacher.path",
            f"no family for {net_class!r}{suggest(net_class, FAMILIES)}",
            f"known: {', '.join(FAMILIES)}",
        )
    return FAMILIES[net_class]


def _label_codec(net, info: dict):
    from fastgen.codecs import LabelCodec

    patch = info.get("patch", 1)
    size = net.config.sample_size
    shape = (net.config.in_channels, size, size)
    classes = info.get("num_classes", net.config.get("num_class_embeds") or 0)
    return LabelCodec(shape, patch, classes, info.get("class_names"))


def _text_codec(folder: Path, family: Family, net, info: dict, weights: bool):
    import transformers

    from fastgen.codecs import TextCodec

    vae, text = (
        load_part(folder / part, "teacher.path", component_class(folder / part), weights)
        for part in ("vae", "text_encoder")
    )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:  # tokenizers raise many kinds
        raise UserError(
            "teacher.path", f"{folder / 'tokenizer'} cannot be read ({first_line(error)})", "copy it again"
        ) from None
    tokenizer.padding_side = "right"
    masked = family.name == "sana"
    length = info.get("max_sequence_length", 300 if masked else tokenizer.model_max_length)
    shape = (net.config.in_channels, net.config.sample_size, net.config.sample_size)
    return TextCodec(shape, vae, tokenizer, text, length, masked)


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


def _from_blueprint(blueprint: dict, weights: bool):
    """(family, untrained network, scheduler, info) of diffusers configs."""
    import diffusers

    for part in ("net", "scheduler"):
        if not isinstance(blueprint.get(part), dict):
            raise UserError(
                f"teacher.blueprint.{part}", "not given", "a diffusers config with its _class_name"
            )
    scheduler = load_scheduler(blueprint["scheduler"])
    family = family_of(blueprint["net"].get("_class_name", ""))
    try:
        with torch.device("cpu" if weights else "meta"):
            net = getattr(diffusers, family.net_class).from_config(blueprint["net"])
    except Exception as error:  # whatever a network's constructor raises
        raise UserError(
            "teacher.blueprint.net", f"{family.net_class} refuses it ({first_line(error)})", "mend the config"
        ) from None
    return family, net, scheduler, blueprint.get("info", {})


def _from_folder(folder: Path, weights: bool):
    """(family, network, scheduler, info) of a diffusers folder."""
    import diffusers

    info = _read_json(folder / "fastgen.json", "teacher.path") if (folder / "fastgen.json").exists() else {}
    noised_by = info.get("export", {}).get("teacher_scheduler")  # a student's own serves its few steps only
    scheduler = load_scheduler(
        noised_by or _read_json(folder / "scheduler/scheduler_config.json", "teacher.path")
    )
    part = next((p for p in ("unet", "transformer", "prior") if (folder / p).is_dir()), "unet")
    family = family_of(_read_json(folder / part / "config.json", "teacher.path").get("_class_name", ""))
    net = load_part(folder / part, "teacher.path", getattr(diffusers, family.net_class), weights)
    return family, net, scheduler, info


def load_teacher(
    path: str,
    prediction: str = "auto",
    blueprint: dict | None = None,
    allow_download: bool = False,
    weights: bool = True,
) -> Teacher:
    """A teacher from a diffusers folder, a bundled asset ("assets:teachers/fashion") or a hub id.

    With a blueprint {"net": config, "scheduler": config, "info": {...}} the denoiser is built untrained
    from its diffusers config, and `path` (if any) supplies the autoencoder and text encoder. With
    weights=False the networks are laid out on the meta device: shapes without numbers.
    """
    from fastgen.backbones.analytic import load_analytic

    if path.startswith("analytic:"):
        return load_analytic(path.removeprefix("analytic:"))
    if not path and blueprint is None:
        raise UserError("teacher.path", "found ''", "a diffusers folder, assets:teachers/NAME or a hub id")
    folder = hub_folder(path, allow_download) if path else None
    made = _from_blueprint(blueprint, weights) if blueprint is not None else _from_folder(folder, weights)
    family, net, scheduler, info = made
    schedule, found = schedule_of(scheduler, prediction)
    has_text = folder is not None and (folder / "text_encoder").is_dir()
    codec = _text_codec(folder, family, net, info, weights) if has_text else _label_codec(net, info)
    return Teacher(Backbone(net.eval(), family, schedule, found), codec, scheduler, path, info)
