"""`load_teacher`: the denoiser and codec of a model folder, a hub id or a blueprint."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastgen.core.errors import UserError, first_line
from fastgen.core.paths import ANALYTIC, is_analytic
from fastgen.core.patterns import matches
from fastgen.core.reading import COPY, check_types, read_json, readable, reads_model
from fastgen.families.base import Family
from fastgen.families.factors import check_frames, spatial_factor, temporal_factor
from fastgen.families.parts import DiffusersModel, cast_network
from fastgen.families.registry import detect
from fastgen.networks.analytic import load_analytic
from fastgen.networks.backbone import Backbone
from fastgen.networks.codecs import (
    Codec,
    LabelCodec,
    PictureCodec,
    ScanCodec,
    TextCodec,
)
from fastgen.networks.files import (
    DTYPES,
    component_class,
    hub_folder,
    load_part,
    load_tokenizer,
    named_class,
    network_class,
)
from fastgen.networks.meta_layout import build_on_meta
from fastgen.networks.schedulers import load_scheduler, schedule_of
from fastgen.networks.teacher import Teacher

INFO: dict[str, type | tuple[type, ...]] = {
    "patch": int,
    "num_classes": int,
    "class_names": list,
    "measure": str,
    "license": str,
    "max_sequence_length": int,
    "height": int,
    "width": int,
    "num_frames": int,
    "embedded_guidance": (int, float),
    "enlarges": int,
    "start_noise": (int, float),
    "family": dict,
    "export": dict,
}
"""types of what fastgen.json says of a model"""
NOT_IN_CODEC = ("scheduler", "safety_checker")
"""components of a pipeline that a codec does not need"""

RECORDED = ("height", "width", "num_frames", "embedded_guidance", "family")
"""settings that an export repeats, so that its base is loaded as it was trained"""


@dataclass
class TeacherOptions:
    """Which teacher to load and how; the fields are those of the config's teacher section."""

    path: str = ""
    prediction: str = "auto"
    blueprint: dict | None = None
    layout: dict | None = None
    allow_download: bool = False
    weights: bool = True
    """False builds the networks on the meta device: shapes without weights"""
    denoiser: bool = True
    """False builds the denoiser alone on the meta device, where another process sends its weights"""
    encoders: bool = True
    """False leaves out the text encoders, where every prompt is encoded already"""
    family: dict | None = None
    dtype: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    embedded_guidance: float | None = None

    @property
    def reads_denoiser(self) -> bool:
        """Whether the denoiser gets its weights here."""
        return self.weights and self.denoiser

    def family_of(self, index: dict, config: dict) -> Family:
        """The family that is declared, else the one of these configs."""
        if self.family:
            from fastgen.families.declared import declared

            return declared(self.family, config.get("_class_name", ""))
        return detect(index, config)


class DenoiserParts(NamedTuple):
    """The denoiser of a teacher, and the configs that it was found with."""

    family: Family
    net: DiffusersModel
    scheduler: Any
    info: dict
    """fastgen.json; empty for other models"""
    model_index: dict
    """model_index.json; empty without one"""


def _component(folder: Path, name: str, declared: Any, weights: bool, dtype: str | None) -> Any:
    """A component of a pipeline other than the denoiser, on the meta device where it is to have no weights;
    None if the index does not have it.
    """
    if declared is not None and not (isinstance(declared, list) and len(declared) == 2):
        raise UserError("teacher.path", f"model_index.json of {folder} has {name}: {declared!r}"[:200], COPY)
    if declared == [None, None] or not (declared or (folder / name).is_dir()):
        return None
    if not (folder / name).is_dir():
        raise _incomplete(folder, name)
    if "tokenizer" in name:
        return load_tokenizer(folder / name)
    library, cls = declared or ("transformers", "AutoImageProcessor")
    if (folder / name / "config.json").is_file() or _has_weights(folder / name):
        own = library not in ("diffusers", "transformers")  # a class that only this pipeline has
        model = named_class(folder, name, library, cls) if own else component_class(folder / name)
        return load_part(folder / name, "teacher.path", model, weights, DTYPES[dtype])
    processor = named_class(folder, name, library, cls)
    with readable("teacher.path", folder / name):
        return processor.from_pretrained(folder / name, local_files_only=True, trust_remote_code=False)


def _has_weights(folder: Path) -> bool:
    return any(f.suffix == ".safetensors" for f in folder.iterdir())


def _incomplete(folder: Path, name: str) -> UserError:
    return UserError(
        "teacher.path", f"{folder} has no subfolder {name!r}", "copy or download the whole model"
    )


def load_pipe(folder: Path, family: Family, index: dict, options: TeacherOptions) -> Any:
    """The pipeline of a folder without its denoiser and scheduler."""
    import diffusers

    name = index.get("_class_name")
    cls = getattr(diffusers, name if name in family.pipelines else family.pipeline)
    left_out = (family.component, *family.extra, *NOT_IN_CODEC)
    given: dict[str, Any] = {}
    for key, parameter in inspect.signature(cls.__init__).parameters.items():
        if key == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if key in left_out:
            given[key] = None
        elif isinstance(index.get(key), list) or (folder / key).is_dir():
            weights = options.weights and (options.encoders or key == family.decoder)
            given[key] = _component(folder, key, index.get(key), weights, options.dtype)
        elif key in index:
            given[key] = index[key]
        elif parameter.default is parameter.empty:
            given[key] = None
    missing = [k for k in ("vae", "text_encoder", "tokenizer") if k in given and given[k] is None]
    if missing and not index.get(missing[0]):
        raise _incomplete(folder, missing[0])
    if "requires_safety_checker" in given:
        given["requires_safety_checker"] = False
    pipe = cls(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _grid(
    family: Family, net: DiffusersModel, options: TeacherOptions, factor: int, temporal: int = 0
) -> tuple[int, ...]:
    """Latent (h, w) or (f, h, w) of the configured size, by default that of the network.

    factor: image pixels per latent pixel; temporal: frames per latent frame.
    """
    grid = list(family.grid(net))
    for key, at in (("height", -2), ("width", -1)):
        size = getattr(options, key)
        if size is None:
            continue
        if not family.has_size:
            raise UserError(f"teacher.{key}", f"found {size}", f"remove it: {family.name} has no image size")
        step = factor * family.divisor
        if size % step:
            raise UserError(
                f"teacher.{key}", f"found {size}", f"give a multiple of {step}, as {family.name} needs"
            )
        grid[at] = size // factor
    if family.square and grid[-2] != grid[-1]:
        found = f"found {grid[-1] * factor} with a height of {grid[-2] * factor}"
        raise UserError("teacher.width", found, f"set both to one value: {family.name} needs square images")
    frames = options.num_frames
    if frames is not None:
        if not temporal:
            instruction = f"remove it: {family.name} generates images, not videos"
            raise UserError("teacher.num_frames", f"found {frames}", instruction)
        patch, found = family.frame_patch(net), f"found {frames}"
        check_frames(frames, family, temporal, patch, "teacher.num_frames", found)
        grid[0] = (frames - 1) // temporal + 1
    return tuple(grid)


def _label_codec(folder: Path | None, found: DenoiserParts, options: TeacherOptions) -> LabelCodec:
    """The codec of a class-conditional (or unconditional) teacher."""
    family, net, _, info, _ = found
    rows = net.config.get("num_class_embeds") or net.config.get("num_embeds_ada_norm") or 0
    classes = info.get("num_classes", rows)
    patch = info.get("patch", 1)
    grid = _grid(family, net, options, family.factor * patch)
    codec = LabelCodec((family.channels(net), *grid), patch, classes, info.get("class_names"))
    codec.has_null = family.has_null(net, classes)
    codec.family = family
    if folder is not None and found.model_index.get("vae", [None])[0] and not (folder / "vae").is_dir():
        raise _incomplete(folder, "vae")
    if folder is not None and (folder / "vae").is_dir():
        cls = component_class(folder / "vae")
        vae = load_part(folder / "vae", "teacher.path", cls, options.weights, DTYPES[options.dtype])
        codec.vae = vae.requires_grad_(False).eval()
    return codec


def _picture_codec(found: DenoiserParts, options: TeacherOptions) -> PictureCodec:
    """The codec of a network that restores pictures, in colour or grey."""
    family, net, _, info, _ = found
    patch, channels = info.get("patch", 1), family.channels(net)
    if channels not in (patch**2, 3 * patch**2):
        wrong = f"fastgen.json has patch {patch} for a network of {channels} channels"
        raise UserError("teacher.path", wrong, "give one of patch^2 channels, three times as many in colour")
    return PictureCodec(family, (channels, *_grid(family, net, options, family.factor * patch)), patch)


def _text_codec(folder: Path | None, found: DenoiserParts, index: dict, options: TeacherOptions) -> TextCodec:
    """The codec of a teacher with text (or image) conditions; index is that of its folder."""
    family, net, _, info, _ = found
    pipe = None if folder is None else load_pipe(folder, family, index, options)
    grid = _grid(family, net, options, spatial_factor(family, pipe), temporal_factor(family, pipe))
    length = info.get("max_sequence_length") or family.max_length
    if length is None:
        length = getattr(pipe, family.tokenizer).model_max_length if pipe else 77
    codec = TextCodec(family, net, pipe, (family.channels(net), *grid), length)
    if options.embedded_guidance is not None:
        if codec.guidance is None:
            wrong = f"found {options.embedded_guidance}; {family.name} takes no guidance scale as an input"
            raise UserError("teacher.embedded_guidance", wrong, "remove it, and set teacher.guidance")
        codec.guidance = options.embedded_guidance
    if options.weights and not options.encoders:
        codec.drop_encoders()
    return codec


def _from_blueprint(options: TeacherOptions, blueprint: dict) -> DenoiserParts:
    """An untrained denoiser of diffusers configs."""
    for part in ("net", "scheduler"):
        if not isinstance(blueprint.get(part), dict):
            raise UserError(
                f"teacher.blueprint.{part}", "not given", "add a diffusers config with its _class_name"
            )
    scheduler, index = load_scheduler(blueprint["scheduler"]), blueprint.get("index", {})
    family = options.family_of(index, blueprint["net"])
    configs = {family.component: blueprint["net"], **blueprint.get("extra", {})}
    try:
        with torch.device("cpu" if options.reads_denoiser else "meta"):
            parts = {k: network_class(c["_class_name"]).from_config(c) for k, c in configs.items()}
        parts = {k: cast_network(p, DTYPES[options.dtype]) for k, p in parts.items()}
    except Exception as error:  # constructors raise errors of many types
        found = f"{family.net_class} cannot be built from it ({first_line(error)})"
        raise UserError("teacher.blueprint.net", found, "correct the setting that it names") from None
    if options.reads_denoiser and blueprint.get("start"):
        _start_from(parts[family.component], blueprint["start"], family)
    info = dict(blueprint.get("info", {}))
    return DenoiserParts(family, family.assemble(parts, index), scheduler, info, index)


@torch.no_grad()
def _start_from(net, start: str, family: Family) -> None:
    """Give an untrained network the weights of a trained one that differs at most in reading fewer channels,
    further ones begin at zero, and in lacking the layers that the family adds.
    """
    key = "teacher.blueprint.start"
    folder = hub_folder(start, False) / family.component
    known = load_part(folder, key, component_class(folder, key), denoiser=True).state_dict()
    for name, value in net.state_dict().items():
        from_it = known.get(name)
        narrower = from_it is not None and from_it.ndim == 4 and from_it.shape[1] < value.shape[1]
        if narrower and from_it.shape[:1] + from_it.shape[2:] == value.shape[:1] + value.shape[2:]:
            value.zero_()[:, : from_it.shape[1]] = from_it
        elif from_it is None and matches(name, family.added_layers):
            value.mul_(not matches(name, family.added_at_zero))
        elif from_it is None or from_it.shape != value.shape:
            raise UserError(key, f"{start} has no {name} of shape {tuple(value.shape)}", "give a model alike")
        else:
            value.copy_(from_it)


def _from_folder(folder: Path, options: TeacherOptions) -> DenoiserParts:
    """The denoiser of a diffusers folder."""
    info = read_json(folder / "fastgen.json", "teacher.path") if (folder / "fastgen.json").exists() else {}
    check_types(info, INFO, folder / "fastgen.json", "teacher.path")
    export = info.get("export")  # how it noises stands beside a student's scheduler of a few steps
    noised_by = export.get("teacher_scheduler") if isinstance(export, dict) else None
    scheduler = load_scheduler(
        noised_by or read_json(folder / "scheduler/scheduler_config.json", "teacher.path")
    )
    index = (
        read_json(folder / "model_index.json", "teacher.path")
        if (folder / "model_index.json").exists()
        else {}
    )
    options.family = options.family or info.get("family")
    known = ((options.family or {}).get("component", "unet"), "unet", "transformer", "prior")
    part = next((p for p in known if (folder / p).is_dir()), "unet")
    family = options.family_of(index, read_json(folder / part / "config.json", "teacher.path"))
    names = [family.component, *(e for e in family.extra if (folder / e).is_dir() or index.get(e, [None])[0])]
    parts = {}
    for name in names:
        cls, given = component_class(folder / name), (options.reads_denoiser, DTYPES[options.dtype])
        parts[name] = load_part(folder / name, "teacher.path", cls, *given, denoiser=True)
    return DenoiserParts(family, family.assemble(parts, index), scheduler, info, index)


def _fill_in_size(options: TeacherOptions, info: dict) -> dict:
    """Set the sizes that are not configured to those in info (fastgen.json); returns the settings that an
    export records.
    """
    for key in RECORDED:
        if getattr(options, key) is None:
            setattr(options, key, info.get(key))
    recorded = {k: getattr(options, k) for k in RECORDED}
    return {k: v for k, v in recorded.items() if v is not None}


def _locate(options: TeacherOptions) -> tuple[Path | None, dict]:
    """(the teacher's folder, {}), or without weights and without a folder (None, the published configs of the
    codec's networks); the published config of the denoiser then becomes the blueprint.
    """
    if not options.path:
        return None, {}
    try:
        return hub_folder(options.path, options.allow_download), {}
    except UserError:
        if options.weights or options.layout is None:
            raise
        options.blueprint = options.layout
        return None, options.layout.get("codec", {})


@reads_model("teacher.path")
def load_teacher(path: str = "", prediction: str = "auto", **settings: Any) -> Teacher:
    """A teacher from a diffusers folder, a bundled asset ("assets:teachers/fashion") or a hub id.

    With a blueprint {"net": config, "scheduler": config, "info": {...}} the denoiser is built untrained
    from its diffusers config, and `path` (if any) supplies the autoencoder and text encoder. With
    weights=False the networks are built on the meta device: shapes without weights. The other keywords are
    the fields of `TeacherOptions`.
    """
    options = TeacherOptions(path, prediction, **settings)
    if is_analytic(path):
        return load_analytic(path.removeprefix(ANALYTIC))
    if not path and options.blueprint is None:
        instruction = "give a diffusers folder, assets:teachers/NAME or a hub id (OWNER/NAME)"
        raise UserError("teacher.path", "found ''", instruction)
    folder, codec_configs = _locate(options)
    if options.blueprint is not None:
        parts = _from_blueprint(options, options.blueprint)
    else:
        assert folder is not None
        parts = _from_folder(folder, options)
    parts = parts._replace(info={**parts.info, **_fill_in_size(options, parts.info)})
    family, net, scheduler, info, index = parts
    if folder is not None and not index and (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json", "teacher.path")
    codec: Codec
    if family.kind == "labels":
        codec = _label_codec(folder, parts, options)
    elif family.kind == "pictures":
        codec = _picture_codec(parts, options)
    elif family.kind == "scans":
        codec = ScanCodec(family, net)
    else:
        codec = _text_codec(folder, parts, index, options)
    codec.enlarges = info.get("enlarges", 0)
    build_on_meta(codec, codec_configs, DTYPES[options.dtype])
    schedule, found = schedule_of(scheduler, prediction, family.shift(scheduler, net, codec.shape[1:]))
    kind = type(schedule).__name__
    if kind not in family.schedules:
        found = f"the noise schedule of {type(scheduler).__name__} is {kind}, {family.name} is trained with"
        instruction = "copy scheduler/scheduler_config.json from the original model"
        raise UserError("teacher.path", f"{found} {' or '.join(family.schedules)}", instruction)
    backbone = Backbone(net.eval(), family, family.noised(schedule, net), found, family.start_noise(info))
    export = info.get("export") or {}
    if export.get("step_lengths") and not export.get("lora"):
        backbone.second_time, codec.shape = True, (codec.shape[0] - 1, *codec.shape[1:])
    return Teacher(backbone, codec, scheduler, path, info, (options.blueprint or {}).get("index"))
