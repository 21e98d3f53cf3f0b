"""`load_teacher`: a folder, hub id or blueprint to a denoiser with its codec."""

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastgen.core.errors import UserError, first_line
from fastgen.families.base import Family
from fastgen.families.registry import detect
from fastgen.networks.analytic import load_analytic
from fastgen.networks.backbone import Backbone
from fastgen.networks.files import DTYPES, component_class, hub_folder, load_part, load_tokenizer, read_json
from fastgen.networks.meta_layout import lay_out
from fastgen.networks.schedulers import load_scheduler, schedule_of
from fastgen.networks.teacher import Teacher

NOT_THE_CODECS = ("scheduler", "safety_checker")


@dataclass
class Source:
    """What a teacher is asked for, in the words of the config's teacher section."""

    path: str = ""
    prediction: str = "auto"
    blueprint: dict | None = None
    layout: dict | None = None
    allow_download: bool = False
    weights: bool = True
    family: dict | None = None
    dtype: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    embedded_guidance: float | None = None

    def family_of(self, index: dict, config: dict) -> Family:
        if self.family:
            from fastgen.families.declared import declared

            return declared(self.family, config.get("_class_name", ""))
        return detect(index, config)


def _component(folder: Path, name: str, declared, source: Source):
    """One part of a pipeline beside the denoiser, or None where the index leaves it out."""
    if declared == [None, None] or not (declared or (folder / name).is_dir()):
        return None
    if not (folder / name).is_dir():
        raise UserError("teacher.path", f"{folder} lacks its part {name!r}", "copy the whole folder")
    if "tokenizer" in name:
        return load_tokenizer(folder / name)
    library, cls = declared or ("transformers", "AutoImageProcessor")
    where = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    if (folder / name / "config.json").is_file():
        own = where != library  # a class that only this pipeline has
        cls = getattr(importlib.import_module(where), cls) if own else component_class(folder / name)
        return load_part(folder / name, "teacher.path", cls, source.weights, DTYPES[source.dtype])
    return getattr(importlib.import_module(where), cls).from_pretrained(folder / name, local_files_only=True)


def load_pipe(folder: Path, family: Family, index: dict, source: Source):
    """The pipeline of a folder without its denoiser and scheduler."""
    import diffusers

    name = index.get("_class_name")
    cls = getattr(diffusers, name if name in family.pipelines else family.pipeline)
    left_out = (family.component, *family.extra, *NOT_THE_CODECS)
    given = {}
    for key, parameter in inspect.signature(cls.__init__).parameters.items():
        if key == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if key in left_out:
            given[key] = None
        elif isinstance(index.get(key), list) or (folder / key).is_dir():
            given[key] = _component(folder, key, index.get(key), source)
        elif key in index:
            given[key] = index[key]
        elif parameter.default is parameter.empty:
            given[key] = None
    missing = [k for k in ("vae", "text_encoder", "tokenizer") if k in given and given[k] is None]
    if missing and not index.get(missing[0]):
        raise UserError("teacher.path", f"{folder} lacks its part {missing[0]!r}", "copy the whole folder")
    if "requires_safety_checker" in given:
        given["requires_safety_checker"] = False
    pipe = cls(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _grid(family: Family, net, source: Source, factor: int, temporal: int = 0) -> tuple[int, ...]:
    """Latent (h, w) or (f, h, w) of the size asked for, or of the size the network was made for."""
    grid = list(family.grid(net))
    for key, at in (("height", -2), ("width", -1)):
        asked = getattr(source, key)
        if asked is None:
            continue
        if not family.has_size:
            raise UserError(f"teacher.{key}", f"found {asked}", f"{family.name} has no size to choose")
        step = factor * family.divisor
        if asked % step:
            raise UserError(f"teacher.{key}", f"found {asked}", f"a multiple of {step} for {family.name}")
        grid[at] = asked // factor
    if family.square and grid[-2] != grid[-1]:
        told = f"found {grid[-1] * factor} beside a height of {grid[-2] * factor}"
        raise UserError("teacher.width", told, f"{family.name} makes square images")
    frames = source.num_frames
    if frames is not None:
        if not temporal:
            raise UserError("teacher.num_frames", f"found {frames}", f"{family.name} makes images")
        if (frames - 1) % temporal:
            allowed = f"{temporal} k + 1 for {family.name}'s autoencoder"
            raise UserError("teacher.num_frames", f"found {frames}", allowed)
        grid[0] = (frames - 1) // temporal + 1
    return tuple(grid)


def _label_codec(folder: Path | None, family: Family, net, info: dict, source: Source):
    from fastgen.networks.codecs import LabelCodec

    rows = net.config.get("num_class_embeds") or net.config.get("num_embeds_ada_norm") or 0
    classes = info.get("num_classes", rows)
    grid = _grid(family, net, source, family.factor)
    codec = LabelCodec((family.channels(net), *grid), info.get("patch", 1), classes, info.get("class_names"))
    codec.has_null = family.has_null(net, classes)
    codec.family = family
    if folder is not None and (folder / "vae").is_dir():
        cls = component_class(folder / "vae")
        codec.vae = load_part(folder / "vae", "teacher.path", cls, source.weights, DTYPES[source.dtype])
        codec.vae.requires_grad_(False).eval()
    return codec


def _text_codec(folder: Path | None, family: Family, net, info: dict, index: dict, source: Source):
    from fastgen.networks.codecs import TextCodec, spatial_factor, temporal_factor

    pipe = None if folder is None else load_pipe(folder, family, index, source)
    grid = _grid(family, net, source, spatial_factor(family, pipe), temporal_factor(family, pipe))
    length = info.get("max_sequence_length") or family.max_length
    if length is None:
        length = getattr(pipe, family.tokenizer).model_max_length if pipe else 77
    codec = TextCodec(family, net, pipe, (family.channels(net), *grid), length)
    if source.embedded_guidance is not None:
        if codec.guidance is None:
            told = f"found {source.embedded_guidance} for {family.name}, which takes no guidance as an input"
            raise UserError("teacher.embedded_guidance", told, "leave it out; see teacher.guidance")
        codec.guidance = source.embedded_guidance
    return codec


def _from_blueprint(source: Source):
    """(family, untrained network, scheduler, info, index) of diffusers configs."""
    import diffusers

    blueprint = source.blueprint
    for part in ("net", "scheduler"):
        if not isinstance(blueprint.get(part), dict):
            raise UserError(
                f"teacher.blueprint.{part}", "not given", "a diffusers config with its _class_name"
            )
    scheduler, index = load_scheduler(blueprint["scheduler"]), blueprint.get("index", {})
    family = source.family_of(index, blueprint["net"])
    configs = {family.component: blueprint["net"], **blueprint.get("extra", {})}
    try:
        with torch.device("cpu" if source.weights else "meta"):
            parts = {k: getattr(diffusers, c["_class_name"]).from_config(c) for k, c in configs.items()}
        parts = {k: nn.Module.to(p, DTYPES[source.dtype]) for k, p in parts.items()}
    except Exception as error:  # whatever a network's constructor raises
        raise UserError(
            "teacher.blueprint.net", f"{family.net_class} refuses it ({first_line(error)})", "mend the config"
        ) from None
    return family, family.assemble(parts, index), scheduler, dict(blueprint.get("info", {})), index


def _from_folder(folder: Path, source: Source):
    """(family, network, scheduler, info, index) of a diffusers folder."""
    import diffusers

    info = read_json(folder / "fastgen.json", "teacher.path") if (folder / "fastgen.json").exists() else {}
    noised_by = info.get("export", {}).get("teacher_scheduler")  # a student's own serves its few steps only
    scheduler = load_scheduler(
        noised_by or read_json(folder / "scheduler/scheduler_config.json", "teacher.path")
    )
    index = (
        read_json(folder / "model_index.json", "teacher.path")
        if (folder / "model_index.json").exists()
        else {}
    )
    source.family = source.family or info.get("family")
    known = ((source.family or {}).get("component", "unet"), "unet", "transformer", "prior")
    part = next((p for p in known if (folder / p).is_dir()), "unet")
    family = source.family_of(index, read_json(folder / part / "config.json", "teacher.path"))
    names = [family.component, *(e for e in family.extra if (folder / e).is_dir() or index.get(e, [None])[0])]
    parts = {}
    for name in names:
        config = read_json(folder / name / "config.json", "teacher.path")
        cls = getattr(diffusers, config["_class_name"])
        parts[name] = load_part(folder / name, "teacher.path", cls, source.weights, DTYPES[source.dtype])
    return family, family.assemble(parts, index), scheduler, info, index


def _sized(source: Source, info: dict) -> dict:
    """The size asked for, or else the one that fastgen.json notes, written back for exports to note."""
    for key in ("height", "width", "num_frames", "embedded_guidance"):
        if getattr(source, key) is None:
            setattr(source, key, info.get(key))
    kept = {k: getattr(source, k) for k in ("height", "width", "num_frames", "embedded_guidance", "family")}
    return {k: v for k, v in kept.items() if v is not None}


def _place(source: Source) -> tuple[Path | None, dict]:
    """The teacher's folder, or (for shapes alone) the published layout instead: (None, codec's configs)."""
    if not source.path:
        return None, {}
    try:
        return hub_folder(source.path, source.allow_download), {}
    except UserError:
        if source.weights or source.layout is None:
            raise
        source.blueprint = source.layout
        return None, source.layout.get("codec", {})


def load_teacher(path: str = "", prediction: str = "auto", **asked) -> Teacher:
    """A teacher from a diffusers folder, a bundled asset ("assets:teachers/fashion") or a hub id.

    With a blueprint {"net": config, "scheduler": config, "info": {...}} the denoiser is built untrained
    from its diffusers config, and `path` (if any) supplies the autoencoder and text encoder. With
    weights=False the networks are laid out on the meta device: shapes without numbers. The other keywords
    are those of `Source`.
    """
    source = Source(path, prediction, **asked)
    if path.startswith("analytic:"):
        return load_analytic(path.removeprefix("analytic:"))
    if not path and source.blueprint is None:
        raise UserError("teacher.path", "found ''", "a diffusers folder, assets:teachers/NAME or a hub id")
    folder, codec_configs = _place(source)
    made = _from_blueprint(source) if source.blueprint is not None else _from_folder(folder, source)
    family, net, scheduler, info, index = made
    info = {**info, **_sized(source, info)}
    if folder is not None and not index and (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json", "teacher.path")
    if family.kind == "labels":
        codec = _label_codec(folder, family, net, info, source)
    else:
        codec = _text_codec(folder, family, net, info, index, source)
    lay_out(codec, codec_configs, DTYPES[source.dtype])
    schedule, found = schedule_of(scheduler, prediction, family.shift(scheduler, net, codec.shape[1:]))
    kind = type(schedule).__name__
    if kind not in family.schedules:
        found = f"{type(scheduler).__name__} noises by {kind}, and {family.name} is trained by"
        allowed = "mend scheduler/scheduler_config.json"
        raise UserError("teacher.path", f"{found} {' or '.join(family.schedules)}", allowed)
    backbone = Backbone(net.eval(), family, schedule, found)
    if info.get("export", {}).get("gaps") and "lora" not in info["export"]:
        backbone.second_time, codec.shape = True, (codec.shape[0] - 1, *codec.shape[1:])
    return Teacher(backbone, codec, scheduler, path, info)
